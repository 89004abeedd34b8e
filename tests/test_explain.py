"""Twenty ways in which a bind is refused or treacherous, each built for real and explained."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from timewait import State, bind
from timewait.explain import Explanation, can_bind, explain_bind, parse_address
from timewait.kernel import processes, sock_diag
from timewait.kernel.namespace import Namespace, sysctl
from timewait.kernel.sock_diag import address_text, sockets
from timewait.kernel.ticks import wheel_step
from timewait.watching import wait_until_bindable_sync

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root for a namespace"
)

PORT = 9090
Server = Callable[..., socket.socket]
Connect = Callable[..., tuple[socket.socket, socket.socket]]


@pytest.fixture(autouse=True)
def private() -> Iterator[None]:
    with Namespace() as ns, ns.entered():
        yield


HERE = "127.0.0.1"


@pytest.fixture(params=["127.0.0.1", "::1"])
def either_family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has the test's loopback address be IPv4's and IPv6's in turn."""
    monkeypatch.setitem(globals(), "HERE", request.param)
    return "::" if ":" in request.param else "0.0.0.0"


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def bound(opened: ExitStack) -> Server:
    def make(
        host: str | None = None, port: int = PORT, *, reuse: bool = False, share: bool = False
    ) -> socket.socket:
        host = host or HERE
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = opened.enter_context(socket.socket(family))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
        sock.bind((host, port))
        return sock

    return make


@pytest.fixture
def server(bound: Server) -> Server:
    def make(*args: object, **options: object) -> socket.socket:
        sock = bound(*args, **options)
        sock.listen()
        return sock

    return make


@pytest.fixture
def connect(opened: ExitStack) -> Connect:
    def make(listener: socket.socket, *, port: int = 0) -> tuple[socket.socket, socket.socket]:
        client = opened.enter_context(socket.socket(listener.family))
        if port:
            client.bind((HERE, port))
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        return opened.enter_context(accepted), client

    return make


def tried(host: str, port: int) -> dict[str, bool]:
    """Who may bind and listen, tried here in another way than explain_bind does."""
    outcome = {}
    for name, reuse, share in (
        ("plain", 0, 0),
        ("reuse_address", 1, 0),
        ("reuse_port", 0, 1),
        ("both", 1, 1),
    ):
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, share)
        try:
            sock.bind(socket.getaddrinfo(host, port)[0][4])
            sock.listen()
            outcome[name] = True
        except OSError:
            outcome[name] = False
        sock.close()
    return outcome


def explained(host: str | None = None, port: int = PORT) -> Explanation:
    """The explanation, after a look that it told the truth and left nothing behind."""
    host = host or HERE
    before = Counter((row.local, row.remote) for row in sockets(states=State))
    found = explain_bind(port, host)
    assert Counter((row.local, row.remote) for row in sockets(states=State)) <= before
    bindable = found.to_json()["bindable"]
    assert bindable == tried(host, port)
    assert bool(found) == bindable["plain"]
    assert (found.errno is None) == bindable["plain"]
    assert (found.free_after == 0) == bindable["plain"]
    json.dumps(found.to_json())
    assert str(found)
    return found


def kinds(found: Explanation) -> list[str]:
    return [holder.kind for holder in found.holders]


def wait_for(port: int, state: State) -> None:
    until = time.monotonic() + 20
    while not any(row.state is state for row in sockets(port)):
        assert time.monotonic() < until, "what ends by a timer may have ended unseen"
        time.sleep(0.001)


@pytest.mark.usefixtures("either_family")
def test_free() -> None:
    found = explained()
    assert (found.situation, found.holders, found.free_after) == ("free", (), 0.0)
    assert found
    assert not found.advice


@pytest.mark.usefixtures("either_family")
def test_live_listener(server: Server) -> None:
    server()
    found = explained()
    assert found.situation == "live-listener"
    (holder,) = found.holders
    assert (holder.kind, holder.pid, holder.user) == ("listener", os.getpid(), "root")
    assert holder.process == Path("/proc/self/comm").read_text().strip()
    assert (holder.reuse_address, holder.reuse_port) == (False, False)
    assert (found.errno, found.call, found.free_after) == ("EADDRINUSE", "bind", None)
    assert "SO_REUSEADDR does not help" in found.rule
    assert not found.warnings


@pytest.mark.usefixtures("either_family")
def test_two_listeners_sharing(server: Server) -> None:
    server(share=True)
    server(share=True)
    found = explained()
    assert found.situation == "shared-listener"
    assert kinds(found) == ["listener", "listener"]
    assert "2 listeners share it" in found.title
    assert found.bindable.reuse_port
    assert not found.bindable.reuse_address
    assert "two would share" in found.warnings[0]


@pytest.mark.usefixtures("either_family")
@pytest.mark.parametrize("reuse", [False, True])
def test_time_wait(server: Server, connect: Connect, reuse: bool) -> None:
    listener = server(reuse=reuse)
    accepted, client = connect(listener)
    remote = client.getsockname()[:2]
    listener.close()
    accepted.close()
    client.close()
    asked = time.monotonic()
    found = explained()
    took = time.monotonic() - asked
    assert found.situation == f"time-wait-{'with' if reuse else 'without'}-reuse"
    (holder,) = found.holders
    assert (holder.kind, holder.state, holder.pid) == ("time-wait", State.TIME_WAIT, None)
    assert holder.remote == remote
    assert holder.seconds_left is not None
    assert 55 < holder.seconds_left < 62.1
    assert holder.gone_after is not None
    assert holder.seconds_left < holder.gone_after < holder.seconds_left + wheel_step(60) + 1e-6
    assert found.free_after is not None  # from now on, not from when it was seen
    assert holder.gone_after - took - 0.02 < found.free_after < holder.gone_after + 0.02
    assert found.bindable.reuse_address is reuse
    if reuse:
        assert "so a server that sets it binds now" in found.rule
        assert "with SO_REUSEADDR" in found.advice[0]
    else:
        assert "did not set SO_REUSEADDR, so setting it now does not help" in found.rule
        assert "wait" in found.advice[0]


def test_a_look_leaves_the_kernel_s_answer_as_it_was(
    server: Server, bound: Server, connect: Connect
) -> None:
    listener = server(reuse=True)
    for sock in (*connect(listener), listener):
        sock.close()
    bound(reuse=True, share=True).close()  # after which bound(share=True) is let in
    for _ in range(2):
        assert not explain_bind(PORT, HERE).bindable.reuse_port
        with pytest.raises(OSError):
            bound(share=True)


def test_a_look_at_holders_of_which_each_refuses_another_option(
    server: Server, bound: Server, connect: Connect
) -> None:
    for host, reuse in (("127.0.0.1", True), ("127.0.0.2", False)):
        listener = server(host, reuse=reuse, share=not reuse)
        for sock in (*connect(listener), listener):
            sock.close()
    for _ in range(2):
        found = explain_bind(PORT)
        assert found.to_json()["bindable"] == {
            "plain": False,
            "reuse_address": False,
            "reuse_port": False,
            "both": True,
        }
        with pytest.raises(OSError):  # though it was let in with the other
            bound("0.0.0.0", share=True)
    assert "that sets both" in found.rule
    assert "SO_REUSEADDR and SO_REUSEPORT" in found.advice[0]


@pytest.mark.parametrize("peer_closes", [False, True])
def test_what_a_timer_ends_goes_at_once_as_advised(
    server: Server, connect: Connect, peer_closes: bool
) -> None:
    listener = server()
    accepted, client = connect(listener)
    listener.close()
    accepted.close()
    if peer_closes:
        client.close()
    wait_for(PORT, State.TIME_WAIT if peer_closes else State.FIN_WAIT_2)
    command = explained().advice[1].split("root: ")[1].split(" (")[0]
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert explained("0.0.0.0").situation == "free"


def test_what_is_left_when_the_holder_stops_is_told(server: Server, connect: Connect) -> None:
    listener = server(reuse=True)
    sockets_of_it = [listener, *connect(listener)]
    then = explained().advice[1]
    assert then.startswith("Then: start the server with SO_REUSEADDR, or wait")
    for sock in sockets_of_it:
        sock.close()
    found = explained()
    assert (found.situation, found.bindable.reuse_address) == ("time-wait-with-reuse", True)


@pytest.mark.usefixtures("either_family")
def test_orphaned_fin_wait_2(server: Server, connect: Connect) -> None:
    listener = server()
    accepted, _client = connect(listener)
    listener.close()
    accepted.close()
    wait_for(PORT, State.FIN_WAIT_2)
    found = explained()
    assert found.situation == "fin-wait-2-orphan"
    (holder,) = found.holders
    assert (holder.state, holder.pid) == (State.FIN_WAIT_2, None)
    assert holder.seconds_left is not None
    assert 50 < holder.seconds_left < 62.1
    assert "tcp_fin_timeout" in found.rule


def test_orphaned_fin_wait_2_that_is_to_last_over_a_minute(
    server: Server, connect: Connect, undisturbed: Callable[..., None]
) -> None:
    sysctl("net.ipv4.tcp_fin_timeout", "61")

    def orphan() -> None:
        wait_until_bindable_sync(PORT, timeout=20)  # (after the one before)
        listener = server()
        accepted, _client = connect(listener)
        listener.close()
        accepted.close()
        wait_for(PORT, State.FIN_WAIT_2)
        (row,) = (row for row in sockets(PORT) if row.state is State.FIN_WAIT_2)
        assert row.timer == "keepalive"
        found = explained()
        assert found.situation == "fin-wait-2-orphan"
        assert found.free_after is not None
        assert 1 < found.free_after <= 2.2
        assert f"it is free in {found.free_after:.1f} s" in found.advice[0]
        assert found.free_after - 0.1 <= wait_until_bindable_sync(PORT, timeout=20)

    undisturbed(orphan)


def test_the_second_time_of_an_orphan_is_as_long_as_the_first(
    server: Server, connect: Connect
) -> None:
    listener = server()
    sysctl("net.ipv4.tcp_fin_timeout", 10)
    accepted, _client = connect(listener)
    listener.close()
    accepted.close()
    wait_for(PORT, State.FIN_WAIT_2)
    sysctl("net.ipv4.tcp_fin_timeout", 70)  # then it would now be in the last 10 s
    (holder,) = explained().holders
    assert holder.gone_after is not None
    assert holder.seconds_left is not None
    assert holder.gone_after < holder.seconds_left + wheel_step(10) + 1e-6


def test_an_orphan_with_a_time_of_its_own_is_gone_at_the_latest_when_it_is_said_to_be(
    server: Server, connect: Connect
) -> None:
    listener = server()
    accepted, _client = connect(listener)
    accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_LINGER2, 62)
    listener.close()
    accepted.close()
    wait_for(PORT, State.FIN_WAIT_2)
    found = explained()
    assert found.holders[0].seconds_left is not None
    assert 60 < found.holders[0].seconds_left <= 62  # measured: 2 s, and 2 s again
    assert "TCP_LINGER2" in found.rule


def test_an_orphan_is_told_of_where_settings_cannot_be_read(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = server()
    accepted, _client = connect(listener)
    listener.close()
    accepted.close()
    wait_for(PORT, State.FIN_WAIT_2)

    def hidden(name: str) -> str:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", name)

    for module in ("timewait.bind", "timewait.kernel.sock_diag"):
        monkeypatch.setattr(f"{module}.sysctl", hidden)
    found = explain_bind(PORT, HERE)
    assert found.situation == "fin-wait-2-orphan"
    assert found.free_after is not None


@pytest.mark.parametrize("seconds", [1, 2, 3])
def test_the_port_is_free_when_it_was_said_to_be(
    server: Server, connect: Connect, seconds: int, undisturbed: Callable[..., None]
) -> None:
    sysctl("net.ipv4.tcp_fin_timeout", seconds)

    def orphan() -> None:
        listener = server()
        accepted, _client = connect(listener)
        listener.close()
        accepted.close()
        wait_for(PORT, State.FIN_WAIT_2)
        found = explain_bind(PORT, "127.0.0.1")
        waited = wait_until_bindable_sync(PORT, "127.0.0.1", timeout=20)
        assert found.free_after is not None
        # Never sooner, but for the looks' own time; later only as this process was.
        assert found.free_after - 0.1 <= waited <= found.free_after + 0.9

    undisturbed(orphan)


def test_a_bind_succeeds_when_it_was_said_to_and_not_before(
    server: Server, connect: Connect, undisturbed: Callable[..., None]
) -> None:
    sysctl("net.ipv4.tcp_fin_timeout", 2)

    def orphan() -> None:
        wait_until_bindable_sync(PORT, timeout=20)
        listener = server()
        accepted, _client = connect(listener)
        listener.close()
        accepted.close()
        wait_for(PORT, State.FIN_WAIT_2)
        found = explain_bind(PORT, HERE)
        then = time.monotonic() + (found.free_after or 0.0)
        refused = 0.0
        while time.monotonic() < then:
            before = time.monotonic()
            if not tried(HERE, PORT)["plain"]:
                refused = before
            time.sleep(0.002)
        assert tried(HERE, PORT)["plain"]
        assert refused > then - 0.3

    undisturbed(orphan)


@pytest.mark.usefixtures("either_family")
def test_owned_fin_wait_2(server: Server, connect: Connect) -> None:
    listener = server()
    accepted, _client = connect(listener)
    listener.close()
    accepted.shutdown(socket.SHUT_WR)
    wait_for(PORT, State.FIN_WAIT_2)
    found = explained()
    assert found.situation == "fin-wait-2-owned"
    assert [(h.kind, h.pid, h.seconds_left) for h in found.holders] == [
        ("fin-wait-2", os.getpid(), None)
    ]
    assert found.free_after is None


@pytest.mark.usefixtures("either_family")
def test_close_wait_leak(server: Server, connect: Connect) -> None:
    listener = server()
    _accepted, client = connect(listener)
    listener.close()
    client.close()
    found = explained()
    assert found.situation == "close-wait-leak"
    assert kinds(found) == ["close-wait"]
    assert found.holders[0].pid == os.getpid()
    assert "recv() returns b''" in found.advice[1]


@pytest.mark.usefixtures("either_family")
def test_outbound_established(server: Server, connect: Connect) -> None:
    port = connect(server(port=80))[1].getsockname()[1]
    found = explained(port=port)
    assert found.situation == "outbound-connection"
    assert [(h.kind, h.remote, h.pid) for h in found.holders] == [
        ("outbound-connection", (HERE, 80), os.getpid())
    ]
    assert "ip_local_reserved_ports" in found.advice[-1]


@pytest.mark.usefixtures("either_family")
def test_outbound_time_wait(server: Server, connect: Connect) -> None:
    accepted, client = connect(server(port=80))
    port = client.getsockname()[1]
    client.close()
    accepted.close()
    found = explained(port=port)
    assert found.situation == "outbound-time-wait"
    assert kinds(found) == ["outbound-time-wait"]
    assert found.free_after is not None
    assert 55 < found.free_after < 62.1


@pytest.mark.usefixtures("either_family")
def test_self_connect(opened: ExitStack) -> None:
    family = socket.AF_INET6 if ":" in HERE else socket.AF_INET
    alone = opened.enter_context(socket.socket(family))
    alone.bind((HERE, PORT))
    alone.connect((HERE, PORT))
    found = explained()
    assert found.situation == "self-connect"
    assert kinds(found) == ["self-connect"]
    assert "simultaneous open" in found.rule
    assert str(os.getpid()) in found.title
    alone.close()
    ended = explained()
    assert ended.situation == "self-connect"
    assert ended.title == "a connection to itself that has ended holds it: TIME_WAIT"
    assert ended.free_after is not None
    assert 55 < ended.free_after < 63
    assert ended.advice[0].startswith("Now: wait")


def test_wildcard_against_specific(server: Server, either_family: str) -> None:
    server(either_family)
    found = explained(HERE)
    assert found.situation == "wildcard-over-specific"
    assert f"listens on {address_text((either_family, PORT))}, which includes it" in found.title


def test_specific_against_wildcard(server: Server, either_family: str) -> None:
    server(HERE)
    found = explained(either_family)
    assert found.situation == "specific-under-wildcard"
    assert f"listens on {address_text((HERE, PORT))}, a part of it" in found.title


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_ipv6_wildcard_against_ipv4(server: Server, host: str) -> None:
    server("::")
    found = explained(host)
    assert found.situation == "ipv6-wildcard"
    assert "IPV6_V6ONLY" in found.rule


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_ipv4_against_the_ipv6_wildcard(server: Server, opened: ExitStack, host: str) -> None:
    server(host)
    found = explained("::")
    assert found.situation == "ipv4-under-ipv6-wildcard"
    assert f"listens on {host}:9090, and [::] takes IPv4 too" in found.title
    assert "set IPV6_V6ONLY" in found.advice[0]
    six = opened.enter_context(socket.socket(socket.AF_INET6))
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("::", PORT))  # as the advice says
    six.listen()


@pytest.mark.parametrize(
    ("theirs", "situation"),
    [
        ("127.0.0.1", "live-listener"),
        ("0.0.0.0", "wildcard-over-specific"),
        ("::", "ipv6-wildcard"),
        ("127.0.0.2", "free"),
    ],
)
def test_a_mapped_address_is_its_ipv4_address(server: Server, theirs: str, situation: str) -> None:
    server(theirs)
    assert explained("::ffff:127.0.0.1").situation == situation


@pytest.mark.parametrize(
    ("theirs", "asked", "called", "theirs_is_called", "outcome"),
    [
        ("0.0.0.0", "127.0.0.1", "127.0.0.1", False, "take all new connections to 127.0.0.1:9090"),
        ("127.0.0.1", "0.0.0.0", "127.0.0.1", True, "127.0.0.1:9090 would keep all connections"),
        ("::", "0.0.0.0", "127.0.0.1", False, "take all new connections to 0.0.0.0:9090"),
        ("0.0.0.0", "::", "127.0.0.1", True, "0.0.0.0:9090 would keep all connections"),
        ("::", "::1", "::1", False, "take all new connections to [::1]:9090"),
    ],
)
def test_of_two_that_share_the_more_specific_is_called(
    server: Server, theirs: str, asked: str, called: str, theirs_is_called: bool, outcome: str
) -> None:
    first = server(theirs, share=True)
    (warning,) = explained(asked).warnings
    assert outcome in warning
    second = server(asked, share=True)
    waiting = first if theirs_is_called else second
    waiting.settimeout(5)
    for _ in range(9):  # of which two that share would each have some
        with socket.create_connection((called, PORT)):
            waiting.accept()[0].close()


def test_ipv6_connections_of_a_server_of_both_families_are_in_ipv4_s_way(
    opened: ExitStack, connect: Connect
) -> None:
    listener = opened.enter_context(socket.socket(socket.AF_INET6))
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    listener.bind(("::", PORT))
    listener.listen()
    accepted, client = connect(listener)
    clients_port = client.getsockname()[1]
    assert explained("0.0.0.0", clients_port).situation == "outbound-connection"
    listener.close()
    for situation in ("live-connection", "time-wait-without-reuse"):
        found = explained("0.0.0.0")
        assert (found.situation, found.holders[0].local) == (situation, ("::1", PORT))
        assert "IPV6_V6ONLY" in found.rule
        accepted.close()
        client.close()


def test_connections_of_an_ipv6_only_server_are_not_in_ipv4_s_way(
    server: Server, opened: ExitStack, connect: Connect
) -> None:
    listener = opened.enter_context(socket.socket(socket.AF_INET6))
    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    listener.bind(("::", PORT))
    listener.listen()
    connect(listener)
    assert explained("0.0.0.0").situation == "free"
    server("127.0.0.1")
    assert len(explained("0.0.0.0").holders) == 1


def test_an_ipv6_only_wildcard_does_not_refuse_ipv4_but_is_treacherous(opened: ExitStack) -> None:
    six = opened.enter_context(socket.socket(socket.AF_INET6))
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("::", PORT))
    six.listen()
    found = explained("0.0.0.0")
    assert found.situation == "free"
    assert "Another server listens on [::]:9090" in found.warnings[0]
    assert explained("::").situation == "live-listener"


def test_the_ipv6_wildcard_may_be_for_ipv6_alone_by_default(server: Server) -> None:
    sysctl("net.ipv6.bindv6only", 1)
    server("0.0.0.0")
    server("::")
    assert [holder.local for holder in explained("::").holders] == [("::", PORT)]


def test_a_request_that_outlives_its_listener_holds_nothing(
    server: Server, connect: Connect, opened: ExitStack
) -> None:
    listener = server()
    for sock in connect(listener):
        sock.close()
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)  # waits for text
    opened.enter_context(socket.create_connection(listener.getsockname()))
    wait_for(PORT, State.SYN_RECEIVED)
    listener.close()  # and for a second yet the request is there
    found = explained()
    assert kinds(found) == ["time-wait"]
    assert found.free_after is not None


@pytest.mark.usefixtures("either_family")
def test_bound_but_not_listening(bound: Server) -> None:
    bound()
    found = explained()
    assert found.situation == "bound-not-listening"
    assert kinds(found) == ["bound"]
    assert found.holders[0].pid == os.getpid()
    assert not found.bindable.reuse_address


def test_a_bind_beside_a_bound_socket_is_treacherous(bound: Server) -> None:
    bound(reuse=True)
    found = explained()
    assert found.situation == "bound-not-listening"
    assert found.bindable.reuse_address
    assert "the other's listen() fails" in found.warnings[0]


@pytest.mark.usefixtures("either_family")
def test_bind_allowed_and_listen_refused(bound: Server) -> None:
    first = bound(reuse=True)
    second = bound(reuse=True)
    first.listen()
    with pytest.raises(OSError) as refused:
        second.listen()
    assert refused.value.errno == errno.EADDRINUSE
    found = explained()
    assert found.situation == "listen-refused"
    assert kinds(found) == ["listener", "bound"]
    assert "bound as they are, get EADDRINUSE from listen()" in found.rule


EXPLAIN = """
import json, sys
from timewait.explain import explain_bind
print(json.dumps(explain_bind(int(sys.argv[1]), "127.0.0.1").to_json()))
"""


@pytest.fixture
def explained_to_nobody(importable: Path, nobody: tuple[str, ...]) -> Callable[[int], Any]:
    """What `explain_bind` tells an ordinary user of a port, as JSON."""

    def ask(port: int) -> Any:
        packages = Path(pytest.__file__).parents[1]
        done = subprocess.run(
            [*nobody, sys.executable, "-c", EXPLAIN, str(port)],
            env={"PYTHONPATH": f"{importable}:{packages}", "PYTHONDONTWRITEBYTECODE": "1"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert done.stderr == ""
        return json.loads(done.stdout)

    return ask


def test_privileged_port(explained_to_nobody: Callable[[int], Any]) -> None:
    sysctl("net.ipv4.ip_unprivileged_port_start", 1024)
    found = explained_to_nobody(80)
    assert (found["situation"], found["errno"]) == ("privileged-port", "EACCES")
    assert set(found["bindable"].values()) == {False}
    assert "below 1024" in found["rule"]
    assert "setcap" in found["advice"][1]


def test_an_ordinary_user_is_told_of_a_holder_whose_process_is_hidden(
    server: Server, explained_to_nobody: Callable[[int], Any]
) -> None:
    server()
    found = explained_to_nobody(PORT)
    assert found["situation"] == "live-listener"
    (holder,) = found["holders"]
    assert (holder["pid"], holder["user"], holder["reuse_port"]) == (None, "root", None)
    assert "cannot be seen from here" in found["title"]
    assert "It is root's" in found["rule"]
    server("0.0.0.0", PORT + 1)
    assert "It is root's" in explained_to_nobody(PORT + 1)["rule"]


@pytest.fixture(params=["s.listen()", "s"])
def other_users_server(request: pytest.FixtureRequest) -> Iterator[int]:
    program = (
        "import os, socket, sys\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n"
        f"s.bind(('127.0.0.1', {PORT})); {request.param}; print('up', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        yield process.pid
        process.terminate()


def test_another_users_reuse_port(other_users_server: int) -> None:
    found = explained()
    (holder,) = found.holders
    name = {"listener": "other-users-listener", "bound": "bound-not-listening"}[holder.kind]
    assert found.situation == name
    assert (holder.pid, holder.user, holder.reuse_port) == (other_users_server, "nobody", True)
    assert "shares only with" in found.rule
    assert "of the same user (nobody)" in found.rule


def test_address_not_local() -> None:
    found = explained("192.0.2.1")
    assert (found.situation, found.errno) == ("address-not-local", "EADDRNOTAVAIL")
    assert "192.0.2.1 is none" in found.rule
    assert not explained("192.0.2.1", port=0).holders


def test_a_link_local_address_goes_with_an_interface(opened: ExitStack) -> None:
    subprocess.run("ip address add fe80::1/64 dev lo nodad", shell=True, check=True)
    found = explain_bind(PORT, "fe80::1")
    assert (found.situation, found.errno) == ("link-local-without-interface", "EINVAL")
    assert f"[fe80::1%eth0]:{PORT}" in found.advice[0]
    assert explain_bind(PORT, "fe80::1%lo").situation == "free"
    listener = opened.enter_context(socket.socket(socket.AF_INET6))
    listener.bind(("fe80::1", PORT, 0, socket.if_nametoindex("lo")))
    listener.listen()
    assert explain_bind(PORT, "fe80::1%lo").situation == "live-listener"
    assert explain_bind(PORT, "fe80::2%lo").situation == "address-not-local"
    with pytest.raises(OSError, match="there is no interface none"):
        explain_bind(PORT, "fe80::1%none")


@pytest.mark.usefixtures("either_family")
def test_exhausted_ephemeral_range(bound: Server) -> None:
    sysctl("net.ipv4.ip_local_port_range", "50000 50009")
    for _ in range(10):
        bound(port=0)
    found = explained(port=0)
    assert (found.situation, found.errno) == ("ephemeral-range-exhausted", "EADDRINUSE")
    assert "50000 to 50009" in found.rule
    assert kinds(found) == ["bound"] * 10


def test_an_exhausted_range_has_a_port_when_the_first_timer_ends(
    server: Server, bound: Server, connect: Connect
) -> None:
    sysctl("net.ipv4.ip_local_port_range", "50000 50002")
    sysctl("net.ipv4.ip_local_reserved_ports", "50000,50002")
    bound(port=50000)
    sysctl("net.ipv4.tcp_fin_timeout", 20)
    listener = server(port=50001)
    accepted, _client = connect(listener, port=PORT)
    for sock in (accepted, listener):
        sock.close()
    wait_for(50001, State.FIN_WAIT_2)
    found = explained(port=0)
    assert [(holder.kind, holder.local[1]) for holder in found.holders] == [
        ("fin-wait-2-orphan", 50001)
    ]
    assert found.free_after is not None
    sysctl("net.ipv4.ip_local_reserved_ports", "50002")
    found = explained(port=0)
    assert kinds(found) == ["bound", "fin-wait-2-orphan"]
    assert found.free_after is not None
    assert f"wait {found.free_after:.1f} s, when one is free" in found.advice[0]


def test_old_process_still_alive_after_a_fork() -> None:
    program = (
        "import os, socket, time\n"
        f"s = socket.create_server(('127.0.0.1', {PORT}))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os._exit(0)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            found = explained()
            assert found.situation == "inherited-listener"
            assert found.holders[0].pids == (child,)
            assert f"stop process {child}" in found.advice[0]
            assert "a daemon: one that has forked twice looks the same" in found.rule
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_process_whose_first_thread_has_ended_is_found() -> None:
    program = (
        "import ctypes, socket, threading, time\n"
        f"s = socket.create_server(('127.0.0.1', {PORT}))\n"
        "threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "print('up', flush=True)\n"
        "ctypes.CDLL(None).syscall(60, 0)  # exit of this thread alone\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"up\n"
        try:
            stat = Path(f"/proc/{server.pid}/stat")
            while stat.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.001)
            assert explained().holders[0].pid == server.pid
        finally:
            server.kill()


def test_last_ack_lingering(server: Server, connect: Connect, either_family: str) -> None:
    listener = server()
    accepted, client = connect(listener)
    listener.close()
    client.close()
    subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
    accepted.close()
    found = explained(either_family)
    assert found.situation == "last-ack"
    assert kinds(found)[0] == "last-ack"
    assert found.free_after is None
    assert "tcp_orphan_retries" in found.rule
    assert "when the peer answers, or the kernel gives up" in str(found)


@pytest.mark.usefixtures("either_family")
def test_closing_before_a_peer_that_does_not_read(server: Server, connect: Connect) -> None:
    listener = server()
    accepted, _client = connect(listener)
    listener.close()
    accepted.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            accepted.send(bytes(65536))
    accepted.close()
    found = explained()
    assert (found.situation, found.free_after) == ("closing", None)
    assert "when the peer answers, or the kernel gives up" in str(found)
    assert "no timer ends it" not in str(found)


@pytest.mark.usefixtures("either_family")
def test_live_connection(server: Server, connect: Connect) -> None:
    listener = server(reuse=True)
    connect(listener)
    assert explained().situation == "live-listener"
    listener.close()
    found = explained()
    assert found.situation == "live-connection"
    assert "with SO_REUSEADDR" in found.advice[0]


def test_a_process_that_not_even_root_sees_is_sought_elsewhere(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server()
    monkeypatch.setattr("timewait.bind.owners", lambda inodes: {})
    found = explained()
    assert "in a container, or outside this one" in found.title
    assert "outside this container, or in another" in found.advice[0]


def test_what_nobody_can_see_is_said(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server()
    monkeypatch.setattr("timewait.bind._sockets", lambda port, states=(): [])
    found = explain_bind(PORT, "127.0.0.1")
    assert (found.situation, found.holders) == ("not-visible", ())


def test_a_server_that_comes_while_it_is_looked_at_is_seen(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = server(reuse=True)
    for sock in (*connect(listener), listener):
        sock.close()
    really, came = bind._try, list[socket.socket]()

    def late(*arguments: Any, **options: Any) -> Any:
        if not came:
            came.append(server(reuse=True))
        return really(*arguments, **options)

    monkeypatch.setattr("timewait.bind._try", late)
    assert explain_bind(PORT, HERE).situation == "live-listener"


def test_answers_that_cannot_be_of_one_moment_are_asked_for_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = server()
    really, asked = bind._try, list[tuple[bool, ...]]()

    def away_for_the_first(host: str, port: int, *options: Any, **how: bool) -> Any:
        asked.append(options)
        return really(host, port + (len(asked) == 2), *options, **how)

    monkeypatch.setattr("timewait.bind._try", away_for_the_first)
    assert not any(explain_bind(PORT, HERE).to_json()["bindable"].values())
    assert asked[1] == (True, False)
    listener.close()
    assert explain_bind(PORT, HERE)


def test_without_sock_diag_psutil_shows_the_holders(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "sock_diag is Linux only")

    monkeypatch.setattr("timewait.bind.details", missing)
    listener = server()
    found = explain_bind(PORT, "127.0.0.1")
    assert (found.situation, kinds(found)) == ("live-listener", ["listener"])
    accepted, client = connect(listener)
    listener.close()
    client.close()
    assert explain_bind(PORT, "127.0.0.1").situation == "close-wait-leak"
    accepted.close()
    accepted, client = connect(listener := server(port=PORT + 1))
    listener.close()
    accepted.close()
    client.close()
    found = explain_bind(PORT + 1, "127.0.0.1")
    assert (found.situation, found.free_after) == ("time-wait-without-reuse", None)
    assert "when a timer ends that cannot be seen from here" in str(found)


def test_a_time_wait_without_a_timer_to_be_seen(
    server: Server, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = server()
    accepted, client = connect(listener)
    listener.close()
    accepted.close()
    client.close()
    monkeypatch.setattr("timewait.bind.ends_in", lambda _: None)
    found = explain_bind(PORT, "127.0.0.1")
    assert found.situation == "time-wait-without-reuse"
    assert "when a timer ends that cannot be seen from here" in str(found)
    assert found.advice[0] == "Now: wait, or choose another port."


def test_many_holders_are_counted(server: Server, connect: Connect) -> None:
    listener = server()
    for accepted, client in [connect(listener) for _ in range(20)]:
        accepted.close()
        client.close()
    listener.close()
    found = explained()
    assert "20 connections of a former server" in found.title
    assert "and 8 more" in str(found)


@pytest.mark.parametrize("port", [PORT, 40_000])
def test_the_table_is_not_read_once_for_each_holder(
    server: Server, connect: Connect, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = server(port=port)
    for accepted, client in [connect(listener) for _ in range(200)]:
        accepted.close()
        client.close()
    listener.close()
    dumps = Counter[str]()
    for name in ("details", "sockets"):

        def counted(*arguments: Any, name: str = name, **options: Any) -> Any:
            dumps[name] += 1
            return getattr(sock_diag, name)(*arguments, **options)

        monkeypatch.setattr(f"timewait.bind.{name}", counted)
    assert len(explain_bind(port).holders) == 200
    assert dumps.total() < 20  # on a busy machine it looks again


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9090", ("0.0.0.0", 9090)),
        (":9090", ("0.0.0.0", 9090)),
        ("*:9090", ("0.0.0.0", 9090)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("localhost:0", ("localhost", 0)),
    ],
)
def test_addresses_as_they_are_typed(text: str, address: tuple[str, int]) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "1:2:3", "::1:80", "65536", "-1", "localhost:", "٣"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError):
        parse_address(text)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", "explain", *arguments], capture_output=True, text=True
    )


def test_the_command_answers_by_its_exit_status(server: Server) -> None:
    free = command(str(PORT))
    assert (free.returncode, free.stdout, free.stderr) == (0, "0.0.0.0:9090 is free.\n", "")
    server()
    taken = command(f"localhost:{PORT}", "--json")
    assert (taken.returncode, taken.stderr) == (1, "")
    found = json.loads(taken.stdout)
    assert list(found["bindable"]) == ["plain", "reuse_address", "reuse_port", "both"]
    assert found["address"] == "127.0.0.1:9090"
    assert {"kind", "state", "local", "remote", "seconds_left", "pid", "process"} <= set(
        found["holders"][0]
    )
    for wrong in ("nonsense", "no-such-host.invalid:80", "70000"):
        trouble = command(wrong)
        assert (trouble.returncode, trouble.stdout) == (2, "")
        assert trouble.stderr.count("\n") == 1


def test_an_empty_host_is_every_address(server: Server) -> None:
    server()
    assert explain_bind(PORT, "").address == ("0.0.0.0", PORT)


@pytest.mark.parametrize("host", ["..", "x" * 300, "\udcff"])
def test_a_host_that_idna_cannot_take_has_no_address(host: str) -> None:
    with pytest.raises(socket.gaierror, match="not a host name"):
        explain_bind(PORT, host)
    with pytest.raises(socket.gaierror, match="not a host name"):
        can_bind(PORT, host)


ADOPTION = """
import ctypes, os, socket, sys, time
first = sys.argv[1] == "first process"
if not first and os.fork():
    os.wait()  # for process 2, which is to adopt
    os._exit(0)
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
if os.fork():
    from timewait.explain import explain_bind
    while not (found := explain_bind(9090)).holders or found.situation == "bound-not-listening":
        time.sleep(0.01)
    print(found.situation, flush=True)
    os._exit(0)
first or os.fork() and time.sleep(60)  # between the adopter and the group's leader
os.setpgid(0, 0)
os.fork() and time.sleep(60)  # the leader, which lives
maker = os.getpid()
os.fork() and os._exit(0)
while os.getppid() == maker:
    time.sleep(0.01)
server = socket.create_server(("0.0.0.0", 9090))
time.sleep(60)
"""


@pytest.mark.parametrize("adopter", ["first process", "subreaper"])
def test_an_adopter_of_the_same_session_is_told_from_a_parent(adopter: str) -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    command = [*inside, sys.executable, "-c", ADOPTION, adopter]
    assert subprocess.check_output(command) == b"inherited-listener\n"


COPY = """
import os, subprocess, sys, time
from timewait.explain import explain_bind
make = "import os, socket, time; s = socket.create_server(('0.0.0.0', 9090))"
subprocess.run([sys.executable, "-c", make + "; os.fork() and os._exit(0); time.sleep(60)"])
found = explain_bind(9090)
print(found.situation, flush=True)
os.kill(found.holders[0].pid, 9)
os.wait()
with subprocess.Popen([sys.executable, "-c", make + "; print(flush=True); time.sleep(60)"],
                      stdout=subprocess.PIPE) as child:
    child.stdout.readline()
    print(explain_bind(9090).situation, flush=True)
    child.kill()
"""


def test_a_copy_is_told_from_a_child_where_all_are_of_one_session_that_is_not_shown() -> None:
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    found = subprocess.check_output([*inside, sys.executable, "-c", COPY], text=True)
    assert found.split() == ["inherited-listener", "live-listener"]


def test_a_server_whose_group_s_leader_has_ended_is_nobody_s_heir() -> None:
    serve = (
        "import socket, time\n"
        f"s = socket.create_server(('127.0.0.1', {PORT}))\n"
        "print('listening', flush=True)\n"
        "time.sleep(60)\n"
    )
    with (
        subprocess.Popen(["sleep", "60"], process_group=0) as leader,
        subprocess.Popen(
            [sys.executable, "-c", serve], stdout=subprocess.PIPE, process_group=leader.pid
        ) as server,
    ):
        leader.kill()
        leader.wait()
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"listening\n"
            assert explained().situation == "live-listener"
        finally:
            server.kill()


@pytest.fixture
def interfaces() -> tuple[str, str]:
    """Two interfaces, each with the same link-local address as the other."""
    commands = "ip link add one type veth peer name two"
    for name in ("one", "two"):
        commands += f" && ip link set {name} up && ip address add fe80::77/64 dev {name} nodad"
    subprocess.run(commands, shell=True, check=True)
    return "one", "two"


def on(interface: str, host: str, opened: ExitStack) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = opened.enter_context(socket.socket(family))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    sock.bind((host, PORT))
    sock.listen()


def test_servers_on_two_interfaces_do_not_share(
    interfaces: tuple[str, str], opened: ExitStack
) -> None:
    for name in interfaces:
        on(name, "0.0.0.0", opened)
    found = explained("0.0.0.0")
    assert found.situation == "live-listener"
    assert sorted(holder.to_json()["local"] for holder in found.holders) == [
        f"0.0.0.0%{name}:{PORT}" for name in interfaces
    ]
    assert "bound to interface" in found.rule
    assert found.warnings == ()


@pytest.mark.parametrize("host", ["::", "fe80::77"])
def test_a_link_local_address_of_another_interface_is_free(
    interfaces: tuple[str, str], opened: ExitStack, host: str
) -> None:
    one, two = interfaces
    on(one, host, opened)
    free = explained(f"fe80::77%{two}")
    assert (free.situation, free.holders) == ("free", ())
    assert not any("would share" in text for text in free.warnings)
    assert not explained(f"fe80::77%{one}")
    on(two, host, opened)
    assert [holder.interface for holder in explained(f"fe80::77%{two}").holders] == [two]


def test_a_privileged_port_is_not_free_when_its_time_wait_ends(
    server: Server, connect: Connect, explained_to_nobody: Callable[[int], Any]
) -> None:
    listener = server(port=80)
    for sock in (*connect(listener), listener):
        sock.close()
    found = explained_to_nobody(80)
    assert found["situation"] == "privileged-port"
    assert [holder["kind"] for holder in found["holders"]] == ["time-wait"]
    assert found["free_after"] is None
    sysctl("net.ipv4.ip_unprivileged_port_start", 20000)
    found = explained_to_nobody(PORT)
    assert found["advice"][0].startswith("Now: choose a port from 20000 on")


def test_what_a_policy_forbids_is_not_called_a_privileged_port() -> None:
    # A seccomp filter that refuses bind() with EACCES: load the call's number, compare, return.
    program = """
        import ctypes, json, platform, struct, sys
        number = {"x86_64": 49, "aarch64": 200}[platform.machine()]
        code = struct.pack(
            "=HBBIHBBIHBBIHBBI", 0x20, 0, 0, 0, 0x15, 0, 1, number, 6, 0, 0, 0x50000 | 13,
            6, 0, 0, 0x7FFF0000,
        )
        buffer = ctypes.create_string_buffer(code, len(code))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == 0
        head = struct.pack("@HP", 4, ctypes.addressof(buffer))
        assert libc.prctl(22, 2, head) == 0
        from timewait.explain import explain_bind
        print(json.dumps(explain_bind(9090).to_json()))
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True
    )
    found = json.loads(ran.stdout)
    assert (found["situation"], found["errno"]) == ("forbidden", "EACCES")
    assert found["free_after"] is None
    assert "seccomp" in found["rule"]


@pytest.mark.parametrize("beside", [False, True])
def test_ipv6_only_is_advised_where_it_helps(
    server: Server, opened: ExitStack, beside: bool
) -> None:
    server("0.0.0.0")
    only6 = opened.enter_context(socket.socket(socket.AF_INET6))
    only6.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    if beside:
        only6.bind(("::", PORT))
        only6.listen()
    found = explained("::")
    assert found.situation == ("live-listener" if beside else "ipv4-under-ipv6-wildcard")
    if not beside:
        only6.bind(("::", PORT))  # so it does help
    assert any("set IPV6_V6ONLY" in text for text in found.advice) == (not beside)


def test_a_server_started_in_the_background_is_not_an_heir_of_its_shell() -> None:
    serve = (
        f"import os, socket, time; s = socket.create_server(('127.0.0.1', {PORT})); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        ["sh", "-c", '"$0" -c "$1" &', sys.executable, serve],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as shell:
        assert shell.stdout is not None
        pid = int(shell.stdout.readline())
        try:
            shell.wait()
            assert explained().situation == "live-listener"
        finally:
            os.kill(pid, signal.SIGKILL)


LISTEN = "import socket, time; s = socket.create_server(('0.0.0.0', 9090)); "


@contextmanager
def elsewhere(program: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-c", LISTEN + program]
    with subprocess.Popen(command, start_new_session=True) as process:
        try:
            while not sockets(PORT):
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


def test_a_holder_whose_parent_is_hidden_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = processes._stat

    def hidden(pid: int) -> tuple[str, list[str]]:  # as hidepid= hides other users' processes
        if pid != holder.pid:
            raise FileNotFoundError
        return stat(pid)

    with subprocess.Popen([sys.executable, "-c", LISTEN + "time.sleep(60)"]) as holder:
        try:
            while not sockets(PORT):
                time.sleep(0.01)
            monkeypatch.setattr("timewait.kernel.processes._stat", hidden)
            assert explained().holders[0].pid == holder.pid
        finally:
            holder.kill()


def in_state(process: subprocess.Popen[bytes], letter: str) -> None:
    while Path(f"/proc/{process.pid}/stat").read_text().split(")")[1].split()[0] != letter:
        time.sleep(0.01)


def test_a_suspended_holder_is_to_be_killed() -> None:
    with elsewhere("time.sleep(60)") as process:
        process.send_signal(signal.SIGSTOP)
        in_state(process, "T")
        process.terminate()  # which it does not take
        found = explained()
        assert found.holders[0].process_state == "T"
        assert f"kill -KILL {process.pid}" in found.advice[0]


def test_a_holder_that_waits_uninterruptibly_is_told() -> None:
    vfork = (
        "import ctypes, os, platform; me = os.getpid()\n"
        "n = {'x86_64': 56, 'aarch64': 220}[platform.machine()]\n"
        "if not ctypes.CDLL(None).syscall(n, 0x4000 | 17, 0, 0, 0, 0):\n"
        "    s.close()\n"
        "    while os.getppid() == me: time.sleep(0.05)\n"
    )
    with elsewhere(vfork) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        while not children.read_text():  # (to read a file it waits so too, for a moment)
            time.sleep(0.01)
        in_state(process, "D")
        assert "state D" in explained().advice[0]


@pytest.mark.parametrize(
    ("name", "advice"), [("systemd", "systemctl list-sockets"), ("docker-proxy", "docker ps")]
)
def test_those_who_hold_ports_for_others_are_known(name: str, advice: str) -> None:
    with elsewhere(f"open('/proc/self/comm', 'w').write({name!r}); time.sleep(60)") as process:
        while Path(f"/proc/{process.pid}/comm").read_text().strip() != name:
            time.sleep(0.01)
        assert advice in explained().advice[0]


def test_all_processes_that_hold_it_are_to_be_stopped() -> None:
    with elsewhere("import os; os.fork(); time.sleep(60)") as process:
        while len(explain_bind(PORT).holders[0].pids) < 2:
            time.sleep(0.01)
        found = explained()
        assert "until the last of them lets go" in found.advice[0]
        process.kill()
        process.wait()
        heir = explained()
        assert heir.situation == "inherited-listener"
        assert f"stop process {heir.holders[0].pid}" in heir.advice[0]
        os.kill(heir.holders[0].pid or 0, signal.SIGKILL)


def test_who_connected_decides_whose_port_it_is(
    server: Server, bound: Server, connect: Connect, opened: ExitStack
) -> None:
    # By its number, each end could be either's: the client's is low, the server's one that
    # clients are dealt.
    listener = server(port=40000)
    accepted, _client = connect(listener, port=PORT)
    listener.close()
    assert explained(port=PORT).situation == "outbound-connection"
    assert explained(port=40000).situation == "live-connection"
    accepted.close()
    wait_for(PORT, State.CLOSE_WAIT)
    assert explained(port=PORT).situation == "close-wait-leak"


@pytest.fixture
def twofold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a name stand for ::1 and 127.0.0.1."""
    resolve = socket.getaddrinfo

    def both(host: str, *args: Any, **options: Any) -> Any:
        if host != "twofold":
            return resolve(host, *args, **options)
        return [*resolve("::1", *args, **options), *resolve("127.0.0.1", *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", both)


@pytest.mark.usefixtures("twofold")
def test_a_name_is_free_when_the_last_of_its_addresses_is(server: Server, connect: Connect) -> None:
    opened: list[socket.socket] = []
    for host, seconds in (("::1", 30), ("127.0.0.1", 60)):
        sysctl("net.ipv4.tcp_fin_timeout", seconds)
        listener = server(host)
        opened += connect(listener)
        opened[-2].close()
        listener.close()
        while (host, PORT) not in {one.local for one in sockets(states=[State.FIN_WAIT_2])}:
            time.sleep(0.001)
    assert explain_bind(PORT, "twofold").address == ("127.0.0.1", PORT)


@pytest.mark.usefixtures("twofold")
def test_a_name_is_all_of_its_addresses(server: Server) -> None:
    assert explain_bind(PORT, "twofold").address == ("::1", PORT)
    assert can_bind(PORT, "twofold")
    server("127.0.0.1")
    found = explain_bind(PORT, "twofold")
    assert (found.address, found.situation) == (("127.0.0.1", PORT), "live-listener")
    assert not can_bind(PORT, "twofold")
    # Without IPv6 the other address is all there is.
    sysctl("net.ipv6.conf.lo.disable_ipv6", 1)
    assert explain_bind(PORT + 1, "twofold").address == ("127.0.0.1", PORT + 1)
    assert can_bind(PORT + 1, "twofold")


def test_a_wait_asks_for_a_name_s_addresses_once(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    resolve = socket.getaddrinfo

    def counted(host: str, *args: Any, **options: Any) -> Any:
        asked.append(host)
        return resolve("127.0.0.1" if host == "slow" else host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counted)
    server()
    with pytest.raises(TimeoutError):
        wait_until_bindable_sync(PORT, "slow", timeout=0.3)
    assert asked.count("slow") == 2  # and once more to say what was in the way


def test_the_wait_for_many_is_counted_from_when_they_were_seen(
    server: Server,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Callable[..., None],
) -> None:
    sysctl("net.ipv4.tcp_fin_timeout", 30)
    listener = server()
    accepted, _client = connect(listener)
    listener.close()
    accepted.close()
    wait_for(PORT, State.FIN_WAIT_2)
    owners = processes.owners

    def slow(inodes: Any) -> Any:
        time.sleep(1)
        return owners(inodes)

    def told() -> float:
        found = explain_bind(PORT, HERE)
        return time.monotonic() + (found.free_after or 0)

    def twice() -> None:
        then = told()
        with monkeypatch.context() as later:
            later.setattr("timewait.bind.owners", slow)
            assert then == pytest.approx(told(), abs=0.1)

    undisturbed(twice)


def test_the_command_loads_only_what_it_needs() -> None:
    program = "import sys, timewait.commands.explain; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"asyncio", "rich", "structlog"} & set(loaded.stdout.split())

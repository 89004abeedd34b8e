"""A witness tells who closed first, what is left, and where it was made."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

import timewait.record
from timewait import explain_bind
from timewait.connections import UnusedPort
from timewait.events import Row
from timewait.kernel import tracefs
from timewait.kernel.namespace import Namespace
from timewait.kernel.tracepoint import Tracepoint
from timewait.ledger import Ledger
from timewait.port import HeldPort, hold_port
from timewait.tcp.states import State
from timewait.witness import Witness, looking_on


@pytest.fixture
def port() -> Iterator[HeldPort]:
    with hold_port() as held:
        yield held


@pytest.fixture
def seen() -> Iterator[Witness]:
    with Witness() as witness:
        yield witness


class Pair:
    """A listener, a client connected to it, and the server's socket of that connection."""

    def __init__(self, port: HeldPort) -> None:
        self.listener = port.listen()
        self.client = socket.create_connection(self.listener.getsockname())
        self.server, _ = self.listener.accept()

    def close(self, *order: str) -> None:
        for name in order:
            getattr(self, name).close()


def test_server_first(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("server", "client", "listener")
    assert seen.active_closer(port) == "server"
    (connection,) = seen.connections
    assert (connection.closed_by, connection.how, connection.time_wait) == (
        "server",
        "FIN",
        "server",
    )
    assert connection.port == port.number
    (left,) = seen.time_wait
    assert left.side == "server"
    assert left.local[1] == port.number
    assert left.seconds_left is not None
    assert 55 < left.seconds_left <= 62.1
    seen.assert_no_leak()
    seen.assert_no_reset(port)
    seen.assert_closed_by("server", port)
    with pytest.raises(AssertionError) as failure:
        seen.assert_closed_by("client", port)
    message = str(failure.value)
    assert message.startswith("1 connection not closed first by the client\n")
    assert "the server called close in ESTABLISHED, at tests/test_witness.py:" in message
    assert "created at tests/test_witness.py:" in message
    with pytest.raises(AssertionError, match="1 socket left in TIME_WAIT\n"):
        seen.assert_no_time_wait(port)
    with pytest.raises(AssertionError, match=r"(?s)without SO_REUSEADDR: EADDRINUSE\n.*TIME_WAIT"):
        seen.assert_bindable(port)


def test_client_first(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("client", "server", "listener")
    seen.assert_closed_by("client", port)
    seen.assert_no_time_wait(port)  # of the server's port: what is left is the client's
    seen.assert_bindable(port)
    seen.assert_no_leak()
    with pytest.raises(AssertionError, match="1 socket left in TIME_WAIT\n  client's side"):
        seen.assert_no_time_wait()
    seen.assert_time_wait_within(1)
    with pytest.raises(AssertionError, match="not closed first by the server"):
        seen.assert_closed_by("server", port)


def test_a_connection_that_the_server_forgot(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.close("client", "listener")
    with pytest.raises(AssertionError) as failure:
        seen.assert_no_leak()
    message = str(failure.value)
    assert message.startswith("1 socket left open\n  server's side")
    assert "CLOSE_WAIT for" in message
    assert f"(pid {os.getpid()})" in message
    assert "closed first by the client: the client called close" in message
    pair.server.close()
    seen.assert_no_leak()


def test_both_ends_left_open(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    assert [end.state for end in seen.leaks] == [State.ESTABLISHED] * 2
    with pytest.raises(AssertionError, match=r"(?s)not closed first by the client\n.*neither side"):
        seen.assert_closed_by("client", port)
    pair.close("client", "server", "listener")
    assert seen.leaks == []


def test_half_closed_and_forgotten_on_both_sides(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.client.shutdown(socket.SHUT_WR)
    seen.settle(0.3)
    states = {end.side: end.state for end in seen.leaks}
    assert states == {"client": State.FIN_WAIT_2, "server": State.CLOSE_WAIT}
    assert seen.active_closer(port) == "client"
    pair.close("server", "client", "listener")
    seen.assert_no_leak()
    seen.assert_no_reset()


def test_a_connection_nobody_accepted_is_its_listeners(seen: Witness, port: HeldPort) -> None:
    with port.listen() as listener:
        with socket.create_connection(listener.getsockname()):
            pass
        with pytest.raises(AssertionError, match="in the listener's backlog: never accepted"):
            seen.assert_no_leak()
    seen.assert_no_leak()


def test_unread_data_resets(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.client.sendall(b"hello")
    pair.close("server", "client", "listener")
    (connection,) = seen.connections
    assert (connection.closed_by, connection.how, connection.reset_by) == (
        "server",
        "RST",
        "server",
    )
    assert seen.time_wait == []
    with pytest.raises(AssertionError, match="called close with 5 bytes unread, at tests/test_wit"):
        seen.assert_no_reset(port)


def test_linger_of_zero_resets(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.close("client", "server", "listener")
    (connection,) = seen.resets
    assert connection.reset_by == "client"
    assert "SO_LINGER of 0 s" in connection.reset_because


def test_data_after_the_close_resets(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.server.close()
    pair.client.sendall(b"too late")
    pair.close("client", "listener")
    (connection,) = seen.connections
    assert (connection.closed_by, connection.how) == ("server", "FIN")
    assert connection.reset_by == "server"
    assert "the client's socket was dead" in connection.reset_because


def test_shutdown_by_both_then_close_is_no_reset(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.server.recv(1) == b""
    pair.server.shutdown(socket.SHUT_WR)
    pair.close("server", "client", "listener")
    seen.assert_no_reset(port)
    seen.assert_closed_by("client", port)


def test_a_refused_connect_is_no_connection(seen: Witness, port: HeldPort) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port.number))
    assert seen.connections == []
    seen.assert_no_reset()


def test_a_port_the_code_never_used(seen: Witness, port: HeldPort) -> None:
    with pytest.raises(UnusedPort, match=f"no connection to port {port}; no port was used"):
        seen.assert_closed_by("client", port)
    with hold_port() as other:
        Pair(other).close("client", "server", "listener")
        for ask in (seen.assert_no_time_wait, seen.assert_bindable, seen.assert_no_reset):
            with pytest.raises(UnusedPort, match=f"port {port} was never used; .* {other}$"):
                ask(port)
    with pytest.raises(ValueError, match=r'"client" or "server", not "nobody"|not .nobody.'):
        seen.assert_closed_by("nobody", other)  # type: ignore[arg-type]


def test_what_was_there_before_is_not_blamed(port: HeldPort) -> None:
    before = Pair(port)
    with hold_port() as other, Witness() as seen:
        Pair(other).close("client", "server", "listener")
        before.close("server", "client")
        assert [each.port for each in seen.connections] == [other.number]
        assert [end.remote[1] for end in seen.time_wait] == [other.number]
    before.listener.close()


def test_what_waited_to_be_accepted_before_is_not_blamed(port: HeldPort) -> None:
    with port.listen() as listener, socket.create_connection(listener.getsockname()) as client:
        with Witness() as seen:
            server, _ = listener.accept()
            seen.assert_no_leak()
            with socket.create_connection(listener.getsockname()), listener.accept()[0]:
                assert len(seen.leaks) == 2  # of the connection that is new
            server.close()
            assert len(seen.connections) == 1
        client.close()


def test_an_end_that_died_unclosed_was_reset(
    port: HeldPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timewait.witness._record", lambda: None)  # as without privilege
    with Witness() as seen:
        pair = Pair(port)
        pair.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(pair.server.detach())  # (as a child's end would be, of which no call is noted)
        assert seen.active_closer(port) == "server"
        with pytest.raises(AssertionError, match="the other end died unclosed in ESTABLISHED"):
            seen.assert_no_reset()
        seen.assert_no_leak()
        pair.close("client", "listener")


STRANGER = """
import os, socket, sys
if os.fork():
    os._exit(0)  # the child is nobody's child now
input()
own = socket.create_server(("127.0.0.1", 0))
pair = socket.create_connection(own.getsockname()), own.accept()[0]
print(flush=True)
guest = socket.create_connection(("127.0.0.1", int(input())))
print(flush=True)
input()
"""


@pytest.mark.skipif(os.getpid() == 1, reason="every orphan is a child of this process")
def test_another_process_is_not_blamed(port: HeldPort) -> None:
    with Witness():
        pass  # from now on the kernel follows what this process starts, where that is permitted
    with (
        port.listen() as listener,
        subprocess.Popen(
            [sys.executable, "-c", STRANGER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as stranger,
    ):
        assert stranger.stdin is not None
        assert stranger.stdout is not None
        stranger.wait()  # what goes on is its orphan
        with Witness() as seen:
            print(file=stranger.stdin, flush=True)
            stranger.stdout.readline()
            print(port, file=stranger.stdin, flush=True)
            stranger.stdout.readline()
            assert [each.port for each in seen.connections] == [port.number]  # it is our guest
            server, _ = listener.accept()
            server.close()
            (connection,) = seen.connections
            assert connection.client is not None
            assert connection.client.state is State.CLOSE_WAIT
            seen.assert_no_leak()  # that is the guest's, not ours
        stranger.stdin.close()


SERVER = """
import socket, sys
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
if sys.argv[1] == "first":
    connection.close()
input()
"""


@pytest.mark.parametrize("who", ["first", "leak"])
def test_a_server_in_a_child_process(seen: Witness, who: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, who],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        client = socket.create_connection(("127.0.0.1", port))
        if who == "first":
            assert client.recv(1) == b""
            client.close()
            seen.assert_closed_by("server", port)
            seen.assert_no_leak()
        else:
            client.close()
            with pytest.raises(AssertionError, match=rf"CLOSE_WAIT .*\(pid {child.pid}\)"):
                seen.assert_no_leak()
            seen.assert_closed_by("client", port)
        child.communicate("\n")
    if seen.observer != "tracepoint":
        assert any("child processes" in words for words in seen.blind)


QUICK = """
import socket, sys
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
for _ in sys.stdin:
    for _ in range(3):
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.sendall(b"unread")
        server.close()  # a reset leaves nothing
        client.close()
    print(flush=True)
"""

root = pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root")
numbered = pytest.mark.skipif(
    sys.platform == "linux" and not tracefs.in_first_pid_namespace(),
    reason="the kernel knows processes by other numbers than are seen in this PID namespace",
)


def quick(port: int = 0, program: str = QUICK) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def converse(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    assert child.stdout is not None
    print(file=child.stdin, flush=True)
    assert child.stdout.readline() == "\n"


@root
def test_what_children_do_between_two_looks_is_told_where_it_is_permitted(seen: Witness) -> None:
    assert seen.observer == "tracepoint"
    with quick() as child:
        converse(child)
        seen.look()  # its listener is known from here on
        before = len(seen.connections)
        with seen._lock:  # nobody looks
            converse(child)
        child.communicate()
    connections = seen.connections[before:]
    assert [(each.closed_by, each.how) for each in connections] == [("server", "RST")] * 3
    assert {each.reset_by for each in connections} == {"server"}
    verdict = seen.check()
    assert verdict, verdict.explain()
    assert verdict.evidence.strength == "strong"


@root
@numbered
@pytest.mark.parametrize("who", ["a child", "a daemon"])
def test_what_children_do_is_known_to_be_theirs_where_it_is_permitted(
    seen: Witness, who: str
) -> None:
    with seen._lock:  # nobody looks, and so sees no listener
        program = QUICK if who == "a child" else f"import os\nif os.fork(): os._exit(0)\n{QUICK}"
        with quick(program=program) as child:
            converse(child)
            child.communicate()
    assert [(each.closed_by, each.how) for each in seen.connections] == [("server", "RST")] * 3
    assert seen.opened == 7  # a listener, three clients and what was accepted
    assert seen.blind == ()
    seen.assert_no_leak()
    verdict = seen.check()
    assert verdict, verdict.explain()


@root
@numbered
def test_what_was_lost_before_it_began_leaves_a_witness_no_less_sure() -> None:
    with Witness():
        assert timewait.record._shared is not None
        lineage = timewait.record._shared.lineage
    assert lineage is not None
    lineage.lost += 1  # as the kernel tells where many connections began and nobody looked
    with Witness() as seen, quick() as child:
        converse(child)
        child.communicate()
        assert seen.blind == ()


@root
@numbered
def test_what_a_daemon_leaves_open_is_known_to_be_its_where_it_is_permitted(seen: Witness) -> None:
    with seen._lock:  # nobody looks while it is still a child
        daemon = subprocess.Popen(
            [sys.executable, "-c", f"import os\nif os.fork(): os._exit(0)\n{SERVER}", "leak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with daemon:
            daemon.wait()
            assert daemon.stdout is not None
            port = int(daemon.stdout.readline())
            socket.create_connection(("127.0.0.1", port)).close()
            seen.settle(0.2)
            assert [(leak.side, leak.state) for leak in seen.leaks] == [
                ("server", State.CLOSE_WAIT)
            ]
            daemon.communicate("\n")


FOREIGN = """
import os, socket
if os.fork():
    os._exit(0)  # the child is nobody's child now
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
input()
for _ in range(3):
    socket.create_connection(listener.getsockname()).close()
    listener.accept()[0].close()
print(flush=True)
for _ in range(3):
    with listener.accept()[0] as connection:
        connection.recv(1)
"""

CALLER = """
import socket, sys
for _ in range(3):
    socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()
"""


@root
@numbered
def test_a_childs_calls_of_a_strangers_server_are_told_from_the_strangers_own() -> None:
    with Witness():
        pass  # from now on the kernel follows what this process starts
    with quick(program=FOREIGN) as stranger:
        stranger.wait()  # what goes on is its orphan
        assert stranger.stdout is not None
        number = int(stranger.stdout.readline())
        with Witness() as seen, seen._lock:  # nobody looks
            converse(stranger)
            quick(number, CALLER).communicate()
            assert [each.port for each in seen.connections] == [number] * 3
            seen.assert_closed_by("client", number)
            assert seen.opened == 3


@root
def test_a_row_of_the_table_is_not_older_than_its_connection(
    seen: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Witness._rows
    with quick(program=QUICK.replace('sendall(b"unread")', "sendall(b'')")) as child:

        def rows_of_new_connections(self: Witness) -> list[Row]:
            converse(child)
            return rows(self)

        with seen._lock, monkeypatch.context() as patched:
            patched.setattr(Witness, "_rows", rows_of_new_connections)
            seen._look()
        assert [each.time_wait for each in seen.connections] == ["server"] * 3
        child.communicate()


@root
@pytest.mark.parametrize("kernel", ["tells of this namespace only", "tells of all"])
def test_the_same_port_in_another_namespace_is_not_blamed(
    kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    timewait.record._close()  # to be opened again
    if kernel == "tells of all":
        monkeypatch.setattr("timewait.kernel.tracepoint.Recorder", refused)
    with Namespace() as other, hold_port() as port:
        number = port.number
        with other.entered():
            stranger = quick(number)
        with stranger, Witness() as seen, port.listen():
            converse(stranger)
            assert seen.connections == []
            assert seen.opened == 1  # the listener
            stranger.communicate()
    timewait.record._close()


@root
def test_a_record_follows_into_another_namespace() -> None:
    with Namespace() as other, Witness() as outside:
        with other.entered(), Witness() as seen:
            assert seen.observer == "sock_diag"  # outside is being recorded
        assert outside.observer == "tracepoint"
    with Namespace() as other, other.entered(), Witness() as seen, quick() as child:
        assert seen.observer == "tracepoint"
        converse(child)
        assert len(seen.connections) == 3
        child.communicate()


@root
def test_the_record_is_opened_once_and_gone_with_the_process() -> None:
    program = """
import os
from timewait import Witness
from timewait.record import record
def mine():
    return sorted(name for name in os.listdir(home.parent) if f"-{os.getpid()}-" in name)
with Witness():
    home = record(lambda: [])._recorder._tracepoint.home
    opened = mine()
    with Witness():
        pass
if not (pid := os.fork()):
    os.abort() if record(lambda: [])._recorder._tracepoint.home == home else os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert home.name in opened == mine()
print(*opened)
"""
    with Tracepoint([1]) as other:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert not {*done.stdout.split()} & {*os.listdir(other.home.parent)}


def test_asyncio_settles_while_its_loop_runs(port: HeldPort) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with Witness() as seen:
            server = await asyncio.start_server(serve, sock=port.listen())
            _, writer = await asyncio.open_connection("127.0.0.1", port.number)
            writer.close()
            assert await seen.settled()
            seen.assert_closed_by("client", port)
            seen.assert_no_leak()
            seen.assert_no_time_wait(port)
            server.close()
            await server.wait_closed()

    asyncio.run(main())


def test_asked_by_a_coroutine_it_says_that_the_loop_could_not_close(port: HeldPort) -> None:
    async def main() -> str:
        async with Witness() as seen:
            accepted: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
            server = await asyncio.start_server(
                lambda _, writer: accepted.put_nowait(writer), sock=port.listen()
            )
            _, client = await asyncio.open_connection("127.0.0.1", port.number)
            ends = client, await accepted.get()
            with pytest.raises(AssertionError) as told:
                seen.assert_no_leak(port)
            for end in ends:
                end.close()
                await end.wait_closed()
            server.close()
            return str(told.value)

    message = asyncio.run(main())
    assert "the event loop had no turn meanwhile: `await settled()`" in message
    assert message.count(" in main") == 2  # made there: not where the loop began, that accepted


def test_a_clock_that_a_test_has_frozen_is_not_waited_by(
    seen: Witness, port: HeldPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)  # as freezegun has it
    with port.listen() as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
        client.close()
        assert not seen.settle(0.02)  # it comes back
        server.close()
    seen.assert_closed_by("client", port)


def test_a_suite_that_forbids_sockets_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise RuntimeError("a test tried to use a socket")

    monkeypatch.setattr(socket.socket, "__init__", forbidden)  # as pytest-socket has it
    with Witness() as seen:
        assert seen.connections == []


def test_a_wrapped_tls_socket_is_still_the_same_entry() -> None:
    with Ledger() as ledger, ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        client = socket.create_connection(listener.getsockname())
        server = stack.enter_context(listener.accept()[0])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        wrapped = context.wrap_socket(
            client, server_hostname="localhost", do_handshake_on_connect=False
        )
        wrapped.close()
        assert server.recv(1) == b""
    clients = [entry for entry in ledger.entries if entry.side == "client"]
    assert [[end.call for end in entry.ends] for entry in clients] == [["close"]]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_socket_closed_by_the_garbage_collector_is_told_apart(port: HeldPort) -> None:
    with Ledger() as ledger:
        pair = Pair(port)
        pair.close("server", "listener")
        del pair
        gc.collect()
    (client,) = [entry for entry in ledger.entries if entry.side == "client"]
    assert [end.call for end in client.ends] == ["collected"]


def test_the_socket_class_is_as_before_when_the_last_ledger_closes() -> None:
    before = dict(vars(socket.socket))
    with Ledger():
        with Ledger():
            assert vars(socket.socket)["accept"] is not before["accept"]
        assert vars(socket.socket)["accept"] is not before["accept"]
    assert dict(vars(socket.socket)) == before


def test_nothing_runs_on_after_the_end() -> None:
    with Witness():
        gc.collect()  # (and the tracepoint is opened, once in a process)
    threads, fds = {*threading.enumerate()}, {*os.listdir("/proc/self/fd")}
    with Witness():
        assert [each.name for each in {*threading.enumerate()} - threads] == ["timewait"]
    # (others that ran before may have ended meanwhile)
    assert {*threading.enumerate()} <= threads
    assert {*os.listdir("/proc/self/fd")} <= fds


def test_answers_afterwards_are_about_the_moment_it_stopped(port: HeldPort) -> None:
    pair = Pair(port)
    with hold_port() as other, Witness() as seen:
        late = Pair(other)
    late.close("client", "server", "listener")
    pair.close("client", "server", "listener")
    assert [end.state for end in seen.leaks] == [State.ESTABLISHED] * 2


def test_a_look_that_takes_long_is_not_the_last(seen: Witness) -> None:
    found = ["was under way", ""]

    def slow() -> str:
        time.sleep(0.02)
        return found.pop(0)

    assert seen._wait(slow, 0.01) == ""


def test_stacks_on_request(port: HeldPort) -> None:
    with Witness(stacks=True) as seen:
        pair = Pair(port)
        with pytest.raises(AssertionError) as failure:
            seen.assert_no_leak()
        pair.close("client", "server", "listener")
    assert "in test_stacks_on_request" in str(failure.value)
    assert "in __init__" in str(failure.value)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_the_witness_alone(seen: Witness, port: HeldPort) -> None:
    before = len(seen._ledger.entries)
    pid = os.fork()
    if pid == 0:
        socket.create_server(("127.0.0.1", 0)).close()
        os._exit(0 if len(seen._ledger.entries) == before else 1)
    assert os.waitpid(pid, 0)[1] == 0
    Pair(port).close("client", "server", "listener")
    seen.assert_closed_by("client", port)
    assert threading.active_count() >= 2  # it looks on


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_asks_with_a_socket_of_its_own(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    if not (pid := os.fork()):
        os._exit(0 if len(seen.leaks) == 2 else 1)
    for _ in range(100):  # while the child asks as well
        assert len(seen.leaks) == 2
    assert os.waitpid(pid, 0)[1] == 0
    pair.close("server", "client", "listener")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_it_looks_where_it_began_whatever_namespace_the_thread_is_in(
    seen: Witness, port: HeldPort
) -> None:
    pair = Pair(port)
    with Namespace() as elsewhere, elsewhere.entered():
        assert len(seen.leaks) == 2
    pair.close("server", "client", "listener")


def test_witnesses_one_after_the_other_share_a_thread() -> None:
    def threads() -> set[int | None]:
        return {each.ident for each in threading.enumerate() if each.name == "timewait"}

    with looking_on():
        assert not threads()  # nobody looks yet
        with Witness(), Witness():
            (thread,) = threads()
        assert threads() == {thread}
        code = """if True:
            import socket
            listener = socket.create_server(("127.0.0.1", 0))
            client = socket.create_connection(listener.getsockname())
            input()
        """
        with (
            Witness() as seen,
            subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as child,
        ):
            assert threads() == {thread}
            while not any(each.pid == child.pid for each in seen._all()):
                time.sleep(0.001)  # (and ask nothing)
            child.communicate(b"\n")
    assert not threads()


def test_a_duplicate_goes_on_when_the_first_is_closed(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    duplicate = pair.server.dup()
    pair.server.close()  # the kernel sends nothing: a descriptor is left
    assert seen.connections[0].closed_by is None
    pair.client.close()
    assert duplicate.recv(1) == b""
    duplicate.close()
    (connection,) = seen.connections
    assert (connection.closed_by, connection.time_wait) == ("client", "client")
    assert connection.because.startswith("the client called close in ESTABLISHED, at ")
    (end,) = connection.server.ends if connection.server else ()
    assert (end.call, end.state) == ("close", State.CLOSE_WAIT)
    pair.listener.close()


def test_a_duplicate_that_python_does_not_know(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    bare = os.dup(pair.server.fileno())
    pair.server.close()
    (connection,) = seen.connections
    assert (connection.closed_by, connection.because) == (None, "neither side has closed")
    assert [end.side for end in seen.leaks] == ["client", "server"]
    pair.client.close()
    os.close(bare)
    seen.assert_closed_by("client", port)
    pair.listener.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("table", ["sock_diag", "psutil"])
def test_a_server_that_forks_is_not_blamed_for_its_parents_close(
    request: pytest.FixtureRequest, table: str, port: HeldPort
) -> None:
    if table == "psutil":
        request.getfixturevalue("without_sock_diag")
    seen = request.getfixturevalue("seen")
    pair = Pair(port)
    pid = os.fork()
    if pid == 0:
        pair.listener.close()
        pair.client.close()
        while pair.server.recv(1):
            pass
        os._exit(0)
    pair.server.close()  # the child has it
    (connection,) = seen.connections
    assert connection.closed_by is None
    assert {end.side: end.pid for end in seen.leaks} == {"client": os.getpid(), "server": pid}
    pair.client.shutdown(socket.SHUT_WR)
    assert os.waitpid(pid, 0)[1] == 0
    pair.close("client", "listener")
    seen.assert_closed_by("client", port)
    assert seen.connections[0].time_wait == "client"


class Greeting(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        self.wfile.write(b"hello")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_pythons_forking_server(seen: Witness) -> None:
    with socketserver.ForkingTCPServer(("127.0.0.1", 0), Greeting) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        for _ in range(3):
            with socket.create_connection(server.server_address) as client:
                assert client.makefile("rb").read() == b"hello"
        server.shutdown()
        serving.join()
    assert seen.settle()
    assert [each.closed_by for each in seen.connections] == ["server"] * 3
    assert [each.time_wait for each in seen.connections] == ["server"] * 3
    seen.assert_no_leak()
    seen.assert_no_reset()


def test_what_a_forked_child_ended_in_order_was_not_reset(seen: Witness, port: HeldPort) -> None:
    pair = Pair(port)
    child = os.fork()
    if child == 0:
        pair.server.shutdown(socket.SHUT_WR)
        os._exit(0)
    os.waitpid(child, 0)
    assert pair.client.recv(1) == b""
    pair.close("client", "server", "listener")  # the server's socket is in CLOSED by now
    (connection,) = seen.connections
    assert (connection.closed_by, connection.reset_by) == ("server", None)
    assert connection.time_wait == "server"


def test_the_same_addresses_connected_twice(seen: Witness, port: HeldPort) -> None:
    with port.listen(reuse_address=True) as listener:
        clients = []
        for _ in range(2):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if clients:
                client.bind(clients[0])
            client.connect(listener.getsockname())
            clients.append(client.getsockname())
            server, _ = listener.accept()
            client.sendall(b"x")
            server.close()  # a reset leaves no TIME_WAIT: the addresses are free again
            client.close()
    assert clients[0] == clients[1]
    assert [each.reset_by for each in seen.connections] == ["server", "server"]


def test_what_was_seen_is_what_the_model_allows(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("client", "server", "listener")
    verdict = seen.check()
    assert verdict, verdict.explain()


def test_a_port_that_something_else_holds_is_explained(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("client", "server", "listener")
    with socket.create_server(("127.0.0.1", port.number)), pytest.raises(AssertionError) as failure:
        seen.assert_bindable(port.number)
    assert "EADDRINUSE\n  held by LISTEN" in str(failure.value)
    assert "\n  why: " in str(failure.value)


def test_trying_a_port_opens_none_of_the_codes_sockets(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("server", "client", "listener")
    with pytest.raises(AssertionError):
        seen.assert_bindable(port)
    seen.assert_bindable(port, host="127.0.0.2")
    assert not explain_bind(port.number)
    assert seen.opened == 3  # a listener, a client and what was accepted


def test_refused_by_time_wait_tells_the_rule_and_when(seen: Witness, port: HeldPort) -> None:
    Pair(port).close("server", "client", "listener")
    with pytest.raises(AssertionError, match=r"(?s)why: .*SO_REUSEADDR.*free in \d\d s$"):
        seen.assert_bindable(port)


@pytest.fixture
def without_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")

    def refused(*_: object) -> None:
        raise OSError(errno.EAFNOSUPPORT, "no sock_diag")

    monkeypatch.setattr("timewait.kernel.sock_diag.sockets", refused)
    monkeypatch.setattr("timewait.kernel.sock_diag.SockDiag", refused)


@pytest.mark.usefixtures("without_sock_diag")
def test_psutil_serves_where_there_is_no_sock_diag(port: HeldPort) -> None:
    with Witness() as seen:
        pair = Pair(port)
        pair.client.close()
        (leak,) = seen.leaks
        assert (leak.side, leak.state, leak.pid) == ("server", State.CLOSE_WAIT, os.getpid())
        pair.close("server", "listener")
        seen.assert_closed_by("client", port)
        seen.assert_no_leak()
        assert [end.side for end in seen.time_wait] == ["client"]
        assert seen.time_wait[0].seconds_left is None
        assert "timers and queues: psutil shows states only" in seen.blind


@pytest.mark.usefixtures("without_sock_diag")
def test_psutil_sees_a_childs_sockets(port: HeldPort) -> None:
    with (
        Witness() as seen,
        subprocess.Popen(
            [sys.executable, "-c", SERVER, "leak"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child,
    ):
        assert child.stdout is not None
        number = int(child.stdout.readline())
        socket.create_connection(("127.0.0.1", number)).close()
        with pytest.raises(AssertionError, match=rf"CLOSE_WAIT .*\(pid {child.pid}\)"):
            seen.assert_no_leak()
        child.communicate("\n")


@pytest.mark.usefixtures("without_sock_diag")
def test_psutil_that_may_not_list_all_lists_this_process_tree(
    port: HeldPort, monkeypatch: pytest.MonkeyPatch
) -> None:
    psutil = pytest.importorskip("psutil")

    def denied(**_: object) -> None:  # as macOS does to all but root
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", denied)
    with Witness() as seen:
        pair = Pair(port)
        pair.client.close()
        (leak,) = seen.leaks
        assert (leak.side, leak.state, leak.pid) == ("server", State.CLOSE_WAIT, os.getpid())
        pair.close("server", "listener")
        seen.assert_closed_by("client", port)
    assert "sockets of other processes, and TIME_WAIT, where psutil lists only ours" in seen.blind


@pytest.mark.usefixtures("without_sock_diag")
def test_without_any_way_to_list_sockets_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(OSError, match="no way to list TCP sockets here: neither sock_diag nor"):
        Witness()


def test_uvloops_sockets_are_known_by_the_listener_and_what_they_leave(port: HeldPort) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async with Witness() as seen:
            server = await asyncio.start_server(serve, sock=port.listen())
            _, writer = await asyncio.open_connection("127.0.0.1", port.number)
            writer.close()
            await writer.wait_closed()
            assert await seen.settled()
            seen.assert_closed_by("client", port)
            seen.assert_no_leak()
            assert [end.side for end in seen.time_wait] == ["client"]
            server.close()
            await server.wait_closed()

    uvloop.run(main())

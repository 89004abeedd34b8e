"""Transitions as the kernel reports them, held against the counters it keeps itself."""

import errno
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from timewait import State
from timewait.events import Event, Lost, Note, Transition
from timewait.kernel import tracefs, tracepoint
from timewait.kernel.namespace import Namespace, sysctl
from timewait.kernel.tracepoint import Tracepoint
from timewait.port import hold_port

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="the tracepoint needs root"
)

S = State
RST = struct.pack("ii", 1, 0)


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this test's own, and nobody's ephemeral one: other namespaces' are seen too."""
    with hold_port() as held:  # in the namespace that all tests share
        yield held.number


@pytest.fixture(autouse=True)
def private(port: int) -> Iterator[None]:
    with Namespace(sysctls={"net.ipv4.tcp_max_tw_buckets": 100_000}) as ns, ns.entered():
        yield


@pytest.fixture(params=["by a program of ours", "by the kernel itself"])
def recorded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "bpf: Operation not permitted")

    if "kernel" in request.param:
        monkeypatch.setattr(tracepoint, "Recorder", refused)
    return str(request.param)


def pair(port: int, host: str = "127.0.0.1") -> tuple[socket.socket, socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        client = socket.create_connection((host, port))
        server, _ = listener.accept()
    return server, client


def course(events: list[Event], local: tuple[str, int]) -> list[State]:
    """The states that a connected socket went through."""
    steps = [
        e for e in events if isinstance(e, Transition) and e.local == local and e.remote[1] != 0
    ]
    for before, after in pairwise(steps):
        assert before.new is after.old
        assert before.t <= after.t
    return [steps[0].old, *(e.new for e in steps)]


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_an_orderly_close_is_seen_whole_and_ends_in_time_wait(host: str, port: int) -> None:
    began = time.monotonic()
    with Tracepoint([port], start=began) as seen:
        server, client = pair(port, host)
        ends = server.getsockname()[:2], client.getsockname()[:2]
        server.close()
        client.close()
        took = time.monotonic() - began
        events = seen.read()
        assert seen.lost == 0
    steps = [e for e in events if isinstance(e, Transition) and e.remote[1] != 0]
    assert course(steps, ends[1]) == [
        *(S.CLOSED, S.SYN_SENT, S.ESTABLISHED, S.CLOSE_WAIT, S.LAST_ACK, S.CLOSED)
    ]
    assert course(steps, ends[0]) == [
        *(S.LISTEN, S.SYN_RECEIVED, S.ESTABLISHED, S.FIN_WAIT_1, S.FIN_WAIT_2, S.TIME_WAIT)
    ]
    assert {e.remote for e in steps} == set(ends)
    assert [(e.old, e.new) for e in events if e not in steps] == [  # type: ignore[union-attr]
        (S.CLOSED, S.LISTEN),
        (S.LISTEN, S.CLOSED),
    ]
    times = [e.t for e in events]
    assert times == sorted(times)
    assert all(0 < t < took for t in times)
    assert not any(e.sampled for e in steps)


@pytest.mark.usefixtures("recorded")
def test_an_abort_is_closed_and_not_time_wait_and_the_reset_is_told(port: int) -> None:
    with Tracepoint([port]) as seen:
        server, client = pair(port)
        ends = server.getsockname(), client.getsockname()
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        server.close()
        client.close()
        events = seen.read()
    assert course(events, ends[1]) == [S.CLOSED, S.SYN_SENT, S.ESTABLISHED, S.CLOSED]
    last = [e for e in events if isinstance(e, Transition) and e.local == ends[1]][-1]
    assert last.cause == "RST received"
    notes = [e.text.partition(" (")[0] for e in events if isinstance(e, Note)]
    (s, c) = (f"{host}:{number}" for host, number in ends)
    assert f"{c} received a RST from {s}" in notes
    assert f"{s} sent a RST to {c}" in notes


def test_an_orphan_is_followed_through_its_second_life(port: int) -> None:
    with Tracepoint([port]) as seen:
        server, client = pair(port)
        local = server.getsockname()
        server.close()
        early: list[Event] = []
        while not any(isinstance(e, Transition) and e.new is S.FIN_WAIT_2 for e in early):
            early += seen.read()  # the client's ACK may be delayed
        assert course(early, local)[-1] is S.FIN_WAIT_2
        assert all(e.old is not e.new for e in early if isinstance(e, Transition))
        client.close()
        late = seen.read()
        (end,) = [e for e in late if isinstance(e, Transition) and e.local == local]
        assert (end.old, end.new, end.sampled) == (S.FIN_WAIT_2, S.TIME_WAIT, True)


def test_a_time_wait_that_never_was_is_closed(port: int) -> None:
    sysctl("net.ipv4.tcp_max_tw_buckets", 0)
    with Tracepoint([port]) as seen:
        server, client = pair(port)
        local = server.getsockname()
        server.close()
        client.close()
        assert course(seen.read(), local)[-2:] == [S.FIN_WAIT_2, S.CLOSED]


def test_addresses_used_again_end_the_old_time_wait(port: int) -> None:
    with Tracepoint([port]) as seen:
        server, client = pair(port)
        local, remote = server.getsockname(), client.getsockname()
        server.close()
        client.close()
        with socket.socket() as listener, socket.socket() as again:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(local)
            listener.listen()
            again.bind(remote)
            seen.read()
            again.connect(local)
            events = seen.read()
    ended = [e for e in events if isinstance(e, Transition) and e.old is S.TIME_WAIT]
    assert [(e.local, e.remote, e.new) for e in ended] == [(local, remote, S.CLOSED)]


def test_a_connect_without_an_answer_has_its_port(port: int) -> None:
    with (
        Tracepoint([port]) as seen,
        socket.socket() as full,
        socket.socket() as first,
        socket.socket() as waiting,
    ):
        full.bind(("127.0.0.1", port))
        full.listen(0)
        first.connect(("127.0.0.1", port))
        waiting.setblocking(False)
        assert waiting.connect_ex(("127.0.0.1", port)) != 0
        syn_sent = [
            e.local for e in seen.read() if isinstance(e, Transition) and e.new is S.SYN_SENT
        ]
        assert sorted(syn_sent) == sorted([first.getsockname(), waiting.getsockname()])


def test_a_connect_that_is_read_before_its_next_event_has_its_port(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracepoint([port]) as told, Tracepoint([port]) as seen:
        server, client = pair(port)
        local = client.getsockname()
        server.close()
        client.close()
        (sent,) = (e for e in told.read() if isinstance(e, Transition) and e.new is S.SYN_SENT)
        moment = int((told.start + sent.t) * 1e9) + 5_000
        with monkeypatch.context() as then:
            then.setattr(tracepoint.time, "monotonic_ns", lambda: moment)
            early = seen.read()
        assert course(early, local) == [S.CLOSED, S.SYN_SENT]
        late = seen.read()
        assert course(early + late, local)[2:] == [
            *(S.ESTABLISHED, S.CLOSE_WAIT, S.LAST_ACK, S.CLOSED)
        ]


@pytest.mark.usefixtures("recorded")
def test_other_ports_are_not_seen(port: int) -> None:
    with Tracepoint([port]) as seen:
        for end in pair(port + 1):
            end.close()
        assert seen.read() == []


def test_another_network_namespace_is_another_world(recorded: str, port: int) -> None:
    with Tracepoint([port], resets=False) as seen:
        with Namespace() as elsewhere, elsewhere.entered():
            for end in pair(port):
                end.close()
        told = seen.read()
        which = "which network namespace a socket is in"
        assert (which in seen.blind) == bool(told) == ("kernel" in recorded)


def churn(port: int, count: int, closes: Iterator[str]) -> None:
    with socket.create_server(("127.0.0.1", port), backlog=128) as listener:
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port))
            server, _ = listener.accept()
            match next(closes):
                case "server":
                    server.close()
                    client.close()
                case "client":
                    client.close()
                    server.close()
                case "half":
                    server.shutdown(socket.SHUT_WR)
                    client.close()
                    server.close()
                case "abort":
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
                    server.close()
                    client.close()


def mixed(seed: int) -> Iterator[str]:
    order = random.Random(seed)
    while True:
        yield order.choice(["server", "client", "half", "abort"])


def kernel_counts() -> dict[str, int]:
    counts = {}
    for name in ("snmp", "netstat"):
        lines = Path(f"/proc/thread-self/net/{name}").read_text().splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            counts.update(zip(names.split()[1:], map(int, values.split()[1:]), strict=True))
    return counts


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("count", "pause"),
    [
        (2_000, 0.0),
        pytest.param(100_000, 0.01, marks=[pytest.mark.slow, pytest.mark.timeout(300)]),
    ],
)
def test_every_transition_of_every_socket_is_seen(
    count: int, pause: float, port: int, undisturbed: Callable[..., None]
) -> None:
    undisturbed(lambda: all_are_seen(count, pause, port), times=3)


def all_are_seen(count: int, pause: float, port: int) -> None:
    events: list[Event] = []
    with (
        Namespace(sysctls={"net.ipv4.tcp_max_tw_buckets": 1_000_000}) as ns,
        ns.entered(),
        Tracepoint([port], buffer=64 << 20, resets=False) as seen,
    ):
        before = kernel_counts()
        thread = threading.Thread(target=churn, args=(port, count, mixed(1)))
        thread.start()
        while thread.is_alive():
            events += seen.read()
            time.sleep(pause)
        thread.join()
        events += seen.read()
        after = kernel_counts()
        assert seen.lost == 0
    moves = Counter((e.old, e.new) for e in events if isinstance(e, Transition))
    grew = {name: after[name] - before[name] for name in after}
    assert moves[S.CLOSED, S.SYN_SENT] == grew["ActiveOpens"] == count
    assert moves[S.LISTEN, S.SYN_RECEIVED] == grew["PassiveOpens"]
    assert moves[S.ESTABLISHED, S.CLOSED] + moves[S.CLOSE_WAIT, S.CLOSED] == grew["EstabResets"] > 0
    in_order: dict[object, list[Transition]] = defaultdict(list)
    for e in events:
        if isinstance(e, Transition) and e.source == "tracepoint" and e.old is not S.TIME_WAIT:
            in_order[e.local, e.remote].append(e)
    for steps in in_order.values():
        for one, following in pairwise(steps):
            # Unbroken, but where the same addresses begin again.
            assert one.new is following.old or following.old in (S.CLOSED, S.LISTEN)


@pytest.mark.usefixtures("recorded")
def test_an_overrun_is_counted_exactly(port: int) -> None:
    with (
        Tracepoint([port], buffer=64 << 20, resets=False) as all_seen,
        Tracepoint([port], buffer=8192, resets=False) as seen,
    ):
        churn(port, 300, mixed(2))
        everything = all_seen.read()
        partly = seen.read()
        assert all_seen.lost == 0
        lost = [e for e in partly if isinstance(e, Lost)]
        assert sum(e.count for e in lost) == seen.lost > 0
        assert len(partly) - len(lost) + seen.lost == len(everything)
        assert "overran" in lost[0].why


def test_what_the_program_could_not_record_is_counted(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tracepoint([port]) as seen:
        assert seen.read() == []
        monkeypatch.setattr(tracepoint.Recorder, "not_run", lambda self: 3)
        (lost,) = seen.read()
        assert isinstance(lost, Lost)
        assert (lost.count, seen.lost) == (3, 3)
        assert seen.read() == []


IN_ITS_CONTEXT = """
import socket, subprocess, sys, threading
def connect():
    client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    client.close()
print("ready", flush=True)
input()
if sys.argv[2] == "thread":
    done = threading.Event()
    def connect_and_stay():
        connect()
        print("done", flush=True)
        done.wait()
    threading.Thread(target=connect_and_stay, daemon=True).start()
elif sys.argv[2] == "child":
    subprocess.run([sys.executable, "-c", f"import socket, sys; {sys.argv[3]}", sys.argv[1]])
    print("done", flush=True)
else:
    connect()
    print("done", flush=True)
input()
"""


@pytest.mark.skipif(
    sys.platform == "linux" and not tracefs.in_first_pid_namespace(),
    reason="the kernel knows processes by other numbers than are seen in this PID namespace",
)
@pytest.mark.parametrize("who", ["itself", "thread", "child"])
def test_what_happens_in_process_1_is_recorded_where_programs_do_not_run(
    who: str, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process stands in for process 1, and no program records anything."""
    connect = 'socket.create_connection(("127.0.0.1", int(sys.argv[1]))).close()'
    with (
        socket.create_server(("127.0.0.1", port)) as listener,
        subprocess.Popen(
            [sys.executable, "-c", IN_ITS_CONTEXT, str(port), who, connect],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        program = tracepoint.Recorder
        monkeypatch.setattr(tracepoint, "Recorder", lambda _, size: program([1], size))
        monkeypatch.setattr(tracepoint, "keeps_init_apart", lambda: True)
        monkeypatch.setattr(tracepoint, "_INIT", Path(f"/proc/{process.pid}/task"))
        with Tracepoint([port]) as seen:
            process.stdin.write("go\n")
            process.stdin.flush()
            assert process.stdout.readline() == "done\n"
            server, client = listener.accept()
            server.close()  # in this process's context: the program's part
            events = seen.read()
            process.stdin.write("end\n")
            process.stdin.flush()
    if who == "child":  # (the timer of its delayed ACK may come while its parent runs)
        assert not [e for e in events if getattr(e, "old", S.CLOSED) in (S.CLOSED, S.SYN_SENT)]
        return
    assert course(events, client)[:4] == [S.CLOSED, S.SYN_SENT, S.ESTABLISHED, S.FIN_WAIT_1]
    assert course(events, ("127.0.0.1", port)) == [
        *(S.LISTEN, S.SYN_RECEIVED, S.ESTABLISHED, S.CLOSE_WAIT)
    ]


@pytest.mark.usefixtures("recorded")
def test_readable_when_there_is_something_to_read(port: int) -> None:
    with Tracepoint([port], resets=False) as seen:
        assert select.select([seen], [], [], 0) == ([], [], [])
        for end in pair(port):
            end.close()
        assert select.select([seen], [], [], 10) == ([seen], [], [])


def test_what_wakes_a_waiter_may_overrun_and_nothing_is_lost(port: int) -> None:
    with Tracepoint([port], resets=False, buffer=256 << 10) as seen:
        for _ in range(300):  # some 1,800 transitions, of which the bell has room for 100
            for end in pair(port):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1" + bytes(7))
                end.close()
            seen.fileno()
        assert select.select([seen], [], [], 10) == ([seen], [], [])
        events = seen.read()
        assert (seen.lost, len(events)) == (0, 300 * 8)
        assert select.select([seen], [], [], 0) == ([], [], [])


def test_a_reset_is_not_told_of_the_next_socket_at_the_same_place_in_memory() -> None:
    home = socket.inet_aton("127.0.0.1").rjust(16, b"\0")
    ports_and_hosts = (1000, 2000, socket.IPPROTO_TCP, home, home)
    with Tracepoint([1]) as tracepoint:
        events: list[Event] = []
        tracepoint._on_reset(lambda *_: (7, 1000, 2000, home, home), 0.0, b"", 0, events)
        for old, new in ((7, 2), (2, 1), (1, 7)):  # SYN_SENT, ESTABLISHED, and a close
            tracepoint._on_state(
                lambda *_, old=old, new=new: (7, old, new, *ports_and_hosts), 0.0, b"", 0, events
            )
    assert [event.cause for event in events if isinstance(event, Transition)] == [None] * 3

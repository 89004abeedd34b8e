"""One interface over every way to watch the kernel, and the choice between them."""

import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest

from timewait import State
from timewait.events import Lost, Note, Row, Transition
from timewait.kernel import observers
from timewait.kernel.namespace import Namespace
from timewait.kernel.observers import OBSERVERS, Sampled, observe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="observes Linux")

S = State
SERVER, CLIENT = ("10.0.0.1", 80), ("10.0.0.2", 4000)


def sampled(*tables: dict[object, Row]) -> Iterator[list[tuple[State, State]]]:
    looks = iter(tables)
    observer = Sampled("test", (), lambda: next(looks), lambda port: [])
    for _ in tables[1:]:
        events = observer.read()
        assert all(isinstance(e, Transition) and e.sampled for e in events)
        yield [(e.old, e.new) for e in events]  # type: ignore[union-attr]


def row(state: State) -> Row:
    return Row(SERVER, CLIENT, state)


@pytest.fixture
def private() -> Iterator[None]:
    with Namespace() as ns, ns.entered():
        yield


def test_a_table_that_changes_is_transitions() -> None:
    assert list(
        sampled(
            {},
            {1: row(S.SYN_RECEIVED)},
            {2: row(S.ESTABLISHED)},  # a request that became a connection
            {2: row(S.ESTABLISHED)},
            {2: row(S.TIME_WAIT)},
            {3: row(S.ESTABLISHED)},  # another connection between the same addresses
            {},
        )
    ) == [
        [(S.CLOSED, S.SYN_RECEIVED)],
        [(S.SYN_RECEIVED, S.ESTABLISHED)],
        [],
        [(S.ESTABLISHED, S.TIME_WAIT)],
        [(S.TIME_WAIT, S.CLOSED), (S.CLOSED, S.ESTABLISHED)],
        [(S.ESTABLISHED, S.CLOSED)],
    ]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An observer's clock, which goes on only where a test says so."""
    now = SimpleNamespace(seconds=0.0, monotonic=lambda: now.seconds)
    monkeypatch.setattr(observers, "time", now)
    return now


@pytest.mark.usefixtures("clock")
def test_the_period_follows_what_happens() -> None:
    tables = [{n: row(S.ESTABLISHED)} for n in range(20)] + [{19: row(S.ESTABLISHED)}] * 40
    looks = iter(tables)  # type: ignore[var-annotated]
    observer = Sampled("test", (), lambda: next(looks), lambda port: [])
    for _ in range(19):
        observer.read()
    assert observer.period < 0.01
    for _ in range(40):
        observer.read()
    assert observer.period == Sampled.LATEST


def test_a_slow_look_is_taken_seldom(clock: SimpleNamespace) -> None:
    def slow() -> dict[object, Row]:
        clock.seconds += 0.02
        return {}

    observer = Sampled("test", (), slow, lambda port: [])
    observer.read()
    assert observer.period == pytest.approx(0.4)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
@pytest.mark.parametrize("name", OBSERVERS)
def test_each_sees_a_connection_and_its_end(name: str, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    peer = "127.0.0.1" if host == "::" else host  # IPv4 of an IPv6 listener
    with Namespace() as ns, ns.entered():
        observer, why = observe([9090], name)
        with observer:
            assert (observer.name, why) == (name, ())
            assert observer.blind
            with socket.create_server(
                (host, 9090), family=family, dualstack_ipv6=host == "::"
            ) as listener:
                client = socket.create_connection((peer, 9090))
                server, _ = listener.accept()
                seen = observer.read()
                ends = (peer, 9090), (peer, client.getsockname()[1])
                assert {(r.local, r.remote[1], r.state) for r in observer.rows(9090)} == {
                    ((host, 9090), 0, S.LISTEN),
                    (ends[0], ends[1][1], S.ESTABLISHED),
                    (ends[1], 9090, S.ESTABLISHED),
                }
                server.close()
                client.close()
                seen += observer.read()
            assert observer.lost == 0
        with pytest.raises(ValueError, match="closed"):
            observer.read()
    assert seen
    if name == "capture":
        assert {e.src for e in seen} == set(ends)  # type: ignore[union-attr]
        return
    steps = [e for e in seen if isinstance(e, Transition) and e.local == ends[0] and e.remote[1]]
    assert (steps[-1].remote, steps[-1].new) == (ends[1], S.TIME_WAIT)
    assert [e.new for e in steps[:-1]] == [e.old for e in steps[1:]]
    assert steps[-1].sampled is (name != "tracepoint")


@pytest.mark.parametrize("name", ["tracepoint", "sock_diag", "capture"])
def test_the_table_is_of_the_namespace_that_it_was_opened_in(name: str) -> None:
    with Namespace() as ns:
        with ns.entered():
            observer, _ = observe([9090], name)
            listener = socket.create_server(("127.0.0.1", 9090))
        with observer, listener:
            (row,) = observer.rows(9090)
            assert (row.local, row.state) == (("127.0.0.1", 9090), S.LISTEN)


@pytest.mark.usefixtures("private")
def test_psutil_tells_listeners_apart_and_keeps_a_shared_one() -> None:
    observer, _ = observe([9090], "psutil")
    with observer, socket.socket() as one, socket.socket() as two:
        for each in one, two:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            each.bind(("127.0.0.1", 9090))
            each.listen()
        (first, second) = observer.read()
        for event in (first, second):
            assert isinstance(event, Transition)
            assert (event.local, event.remote) == (("127.0.0.1", 9090), ("0.0.0.0", 0))
            assert (event.old, event.new, event.source) == (S.CLOSED, S.LISTEN, "psutil")
        with one.dup():  # another descriptor of the same socket
            assert observer.read() == []
        two.close()
        (ended,) = observer.read()
        assert isinstance(ended, Transition)
        assert (ended.old, ended.new) == (S.LISTEN, S.CLOSED)


def test_a_connection_between_two_looks_is_told_of() -> None:
    with Namespace() as ns, ns.entered():
        observer, _ = observe([9090], "sock_diag")
        with observer, socket.create_server(("127.0.0.1", 9090)) as listener:
            observer.read()
            client = socket.create_connection(("127.0.0.1", 9090))
            server, _ = listener.accept()
            ends = f"{client.getsockname()[1]} → 127.0.0.1:9090"
            server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            server.close()
            client.close()
            told = f"127.0.0.1:{ends} came and went between two looks"
            notes: list[str] = []
            until = time.monotonic() + 30  # the kernel tells of the destroyed when it has time
            while told not in notes and time.monotonic() < until:
                notes += [e.text for e in observer.read() if isinstance(e, Note)]
                time.sleep(0.005)
    assert told in notes


def test_notices_that_were_lost_are_told() -> None:
    lost = iter([0, 3, 3, 5])
    observer = Sampled("test", (), dict, lambda port: [], ended=lambda: ({}, next(lost)))
    told = [[e.count for e in observer.read() if isinstance(e, Lost)] for _ in range(4)]
    assert (told, observer.lost) == ([[], [3], [], [2]], 5)


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def make(name: str) -> None:
        def refused(*_: object) -> None:
            raise PermissionError(1, f"{name} is not allowed today")

        monkeypatch.setitem(observers._MAKERS, name, refused)

    return make


def test_auto_takes_the_strongest_and_says_why_not_a_better(
    refuse: Callable[[str], None],
) -> None:
    refuse("tracepoint")
    observer, why = observe([1])
    with observer:
        assert observer.name == "sock_diag"
        assert why == ("not tracepoint: tracepoint is not allowed today",)
    refuse("sock_diag")
    observer, why = observe([1])
    with observer:
        assert observer.name == "psutil"
        assert len(why) == 2
    refuse("psutil")
    with pytest.raises(OSError, match=r"nothing to observe with: not tracepoint: .*; not sock"):
        observe([1])


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="there are auto, tracepoint"):
        observe([1], "crystal ball")


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("port", [70_000, -1, "80"])
def test_what_is_no_port_is_refused(name: str, port: int) -> None:
    with pytest.raises(ValueError, match="not a port"):
        observe([port], name)

"""What real observers saw conforms; the same with one thing changed does not."""

from __future__ import annotations

from attrs import evolve

from timewait.check import check
from timewait.events import Event, RunStarted, Transition
from timewait.tcp.profiles import profile
from timewait.tcp.states import Event as TcpEvent
from timewait.tcp.states import State
from timewait.tcp.transitions import go

SERVER, CLIENT = ("127.0.0.1", 9090), ("127.0.0.1", 47788)


def tracepoint(*lines: str) -> list[Event]:
    """Transitions as Linux's tracepoint reports them, a millisecond apart."""
    events: list[Event] = [RunStarted(0.0, "kernel", "tracepoint")]
    for number, line in enumerate(lines, 1):
        who, old, _, new = line.split()
        local, remote = (SERVER, CLIENT) if who == "server" else (CLIENT, SERVER)
        events.append(
            Transition(
                number / 1000, local, remote, State.parse(old), State.parse(new), "tracepoint"
            )
        )
    return events


# As Linux 6.18 reported `server-first` on loopback.
SERVER_FIRST = (
    "client CLOSE -> SYN_SENT",
    "client SYN_SENT -> ESTABLISHED",
    "server LISTEN -> SYN_RECV",
    "server SYN_RECV -> ESTABLISHED",
    "server ESTABLISHED -> FIN_WAIT1",
    "client ESTABLISHED -> CLOSE_WAIT",
    "server FIN_WAIT1 -> FIN_WAIT2",
    "client CLOSE_WAIT -> LAST_ACK",
    "server FIN_WAIT2 -> CLOSE",
    "client LAST_ACK -> CLOSE",
)


def test_what_the_tracepoint_saw_conforms() -> None:
    assert check(tracepoint(*SERVER_FIRST))


def test_a_transition_left_out_diverges() -> None:
    # Without the last two there is another explanation: the client reset what it had closed.
    for left_out in range(len(SERVER_FIRST) - 2):
        events = tracepoint(*SERVER_FIRST)
        del events[1 + left_out]
        assert not check(events), SERVER_FIRST[left_out]


def test_a_broken_row_makes_a_real_run_diverge() -> None:
    linux = profile("linux")
    broken = evolve(
        linux,
        differences={
            **linux.differences,
            (State.CLOSE_WAIT, TcpEvent.CLOSE): go(State.CLOSED, source="broken"),
            (State.CLOSE_WAIT, TcpEvent.SHUTDOWN): go(State.CLOSED, source="broken"),
        },
    )
    assert not check(tracepoint(*SERVER_FIRST), profiles={"server": broken, "client": broken})

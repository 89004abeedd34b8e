"""Whole exchanges, read as transcripts: who closes first, and what states that leads to."""

import pytest

from timewait.tcp.connection import Connection
from timewait.tcp.profiles import profile
from timewait.tcp.segment import Segment
from timewait.tcp.states import State


class Pair:
    """Two endpoints joined by a perfect wire; `said` is what went over it."""

    def __init__(self, name: str = "rfc9293", **settings: object) -> None:
        stack = profile(name, **settings)
        self.client = Connection(stack, iss=100)
        self.server = Connection(stack, iss=300)
        self.said: list[str] = []
        self.now = 0.0

    def established(self) -> "Pair":
        self.server.open_passive(self.now)
        self.client.open_active(self.now)
        self.settle()
        assert self.states == (State.ESTABLISHED, State.ESTABLISHED)
        self.said.clear()
        return self

    def settle(self) -> None:
        """Deliver everything in order until nothing is under way."""
        while self.client.out or self.server.out:
            for sign, sender, receiver in (
                (">", self.client, self.server),
                ("<", self.server, self.client),
            ):
                segments = list(sender.out)
                sender.out.clear()
                for segment in segments:
                    self.said.append(f"{sign} {text(segment)}")
                    receiver.segment(segment, self.now)

    def wait(self, seconds: float) -> None:
        """Let time pass, timers first."""
        until = self.now + seconds
        while True:
            due = [c for c in (self.client, self.server) if (c.deadline or until + 1) <= until]
            if not due:
                break
            first = min(due, key=lambda c: c.deadline or 0.0)
            self.now = first.deadline or self.now
            first.expire(self.now)
            self.settle()
        self.now = until

    @property
    def states(self) -> tuple[State, State]:
        return self.client.state, self.server.state


def text(segment: Segment) -> str:
    return str(segment).split(" seq=")[0] + (f" {len(segment.data)}" if segment.data else "")


@pytest.mark.parametrize("name", ["rfc9293", "linux", "freebsd", "macos", "windows"])
def test_the_client_closes_first(name: str) -> None:
    pair = Pair(name).established()
    pair.client.close(pair.now)
    pair.settle()
    pair.wait(1)
    assert pair.said == ["> FIN,ACK", "< ACK"]
    assert pair.states == (State.FIN_WAIT_2, State.CLOSE_WAIT)
    pair.server.close(pair.now)
    pair.settle()
    assert pair.said[2:] == ["< FIN,ACK", "> ACK"]
    assert pair.states == (State.TIME_WAIT, State.CLOSED)
    pair.wait(pair.client.profile.parameters.time_wait - 0.001)
    assert pair.states == (State.TIME_WAIT, State.CLOSED)
    pair.wait(0.002)
    assert pair.states == (State.CLOSED, State.CLOSED)


def test_both_close_at_the_same_moment() -> None:
    pair = Pair().established()
    pair.client.close(0.0)
    pair.server.close(0.0)
    client_fin, server_fin = pair.client.out.pop(), pair.server.out.pop()
    pair.client.segment(server_fin, 0.0)
    pair.server.segment(client_fin, 0.0)
    assert pair.states == (State.CLOSING, State.CLOSING)
    pair.settle()
    assert pair.states == (State.TIME_WAIT, State.TIME_WAIT)


def test_a_half_closed_connection_still_carries_text_the_other_way() -> None:
    pair = Pair().established()
    pair.client.shutdown(0.0)
    pair.settle()
    assert pair.server.eof
    assert pair.server.send(b"last words", 0.0) == 10
    pair.settle()
    assert pair.client.receive(100, 0.0) == b"last words"
    pair.server.close(0.0)
    pair.settle()
    assert pair.states == (State.TIME_WAIT, State.CLOSED)


def test_closing_with_unread_text_resets() -> None:
    pair = Pair().established()
    pair.client.send(b"nobody reads this", 0.0)
    pair.settle()
    pair.server.close(0.0)
    pair.settle()
    assert pair.said[-1] == "< RST,ACK"
    assert pair.states == (State.CLOSED, State.CLOSED)
    with pytest.raises(OSError, match="reset"):
        pair.client.receive(1, 0.0)


def test_an_abort_resets() -> None:
    pair = Pair().established()
    pair.client.abort(0.0)
    pair.settle()
    assert pair.said == ["> RST,ACK"]
    assert pair.states == (State.CLOSED, State.CLOSED)


def test_text_for_an_orphan_resets() -> None:
    pair = Pair().established()
    pair.client.close(0.0)
    pair.settle()
    pair.server.send(b"too late", 0.0)
    pair.settle()
    assert pair.said[-1] == "> RST"
    assert pair.states == (State.CLOSED, State.CLOSED)


def test_a_connection_to_nobody_is_refused() -> None:
    pair = Pair()
    pair.client.open_active(0.0)
    pair.settle()
    assert pair.said == ["> SYN", "< RST,ACK"]
    assert pair.client.state is State.CLOSED
    with pytest.raises(OSError, match="refused"):
        pair.client.send(b"x", 0.0)


def test_a_lost_last_ack_is_asked_for_again_and_restarts_2msl() -> None:
    pair = Pair("linux").established()
    pair.client.close(0.0)
    pair.settle()
    pair.server.close(0.0)
    pair.client.segment(pair.server.out.pop(), 0.0)
    pair.client.out.clear()
    assert pair.states == (State.TIME_WAIT, State.LAST_ACK)
    pair.wait(0.5)
    assert pair.said[-2:] == ["< FIN,ACK", "> ACK"]
    assert pair.states == (State.TIME_WAIT, State.CLOSED)
    deadline = pair.client.deadline
    assert deadline is not None
    assert deadline > 60.19

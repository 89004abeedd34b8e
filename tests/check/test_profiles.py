"""A trace of one stack checked as another diverges where the two are documented to differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from itertools import permutations
from math import inf
from typing import Any

import pytest
from click.testing import CliRunner

from timewait.check import Verdict, check
from timewait.commands.profiles import command as profiles_command
from timewait.events import Called, Event, Note, RunStarted, SegmentSeen, Snapshot, Transition
from timewait.events import Row as TableRow
from timewait.tcp.connection import Connection
from timewait.tcp.profiles import PROFILES, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment, seq_add
from timewait.tcp.states import Event as TcpEvent
from timewait.tcp.states import State

SERVER, CLIENT = ("10.0.0.1", 9090), ("10.0.0.2", 47788)
PAIRS = list(permutations(PROFILES, 2))


class Wire:
    """A server of some profile whose client is this test: it says what the client sends."""

    def __init__(self, of: str) -> None:
        self.profile = profile(of)
        self.events: list[Event] = [RunStarted(0.0, "model", "model")]
        self.now = 0.001
        self.server = Connection(self.profile, iss=1000, timestamps=False)
        self.server.on_transition = self._moved
        self.server.open_passive(0.0)
        self.sequence, self.acked = 5000, 0

    def _moved(self, old: State, new: State, event: TcpEvent, now: float) -> None:
        if old is not State.CLOSED or new is not State.LISTEN:
            self.events.append(Transition(now, SERVER, CLIENT, old, new, "model"))

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while self.server.deadline is not None and self.server.deadline <= until:
            self.now = max(self.now, self.server.deadline)
            self.server.expire(self.now)
            self._drain()
        self.now = until

    def _drain(self) -> None:
        for seg in self.server.out:
            self._seen(SERVER, CLIENT, seg)
            self.acked = seq_add(seg.seq, seg.length)
        self.server.out.clear()

    def _seen(self, src: tuple[str, int], dst: tuple[str, int], seg: Segment) -> None:
        self.events.append(
            SegmentSeen(
                self.now, src, dst, seg.flags, seg.seq, seg.ack, len(seg.data), source="model"
            )
        )

    def sends(self, flags: int, at: int | None = None) -> None:
        """The client sends a segment, at SND.NXT unless said otherwise."""
        seg = Segment(
            self.sequence if at is None else at, self.acked if flags & ACK else 0, flags, 65535
        )
        if at is None:
            self.sequence = seq_add(self.sequence, seg.length)
        self._seen(CLIENT, SERVER, seg)
        self.now += 0.001
        self.server.segment(seg, self.now)
        self._drain()
        self.now += 0.001

    def connect(self) -> None:
        self.sends(SYN)
        self.sends(ACK)
        assert self.server.state is State.ESTABLISHED
        self._called("accept", self.now)

    def _called(self, call: str, began: float) -> None:
        self.now += 0.001
        self.events.append(Called(self.now, "server", call, SERVER, CLIENT, began=began))

    def closes(self) -> None:
        began = self.now
        self.now += 0.001
        self.server.close(self.now)
        self._drain()
        self._called("close", began)

    def looked_at(self, seconds_left: float) -> None:
        row = TableRow(
            SERVER, CLIENT, self.server.state, timer="time_wait", seconds_left=seconds_left
        )
        self.events.append(Snapshot(self.now, "look", (row,)))


def orderly(of: str) -> Wire:
    """The server closes first and is in TIME_WAIT."""
    wire = Wire(of)
    wire.connect()
    wire.closes()
    wire.sends(ACK)
    wire.sends(FIN | ACK)
    assert wire.server.state is State.TIME_WAIT
    return wire


def time_wait_to_its_end(of: str) -> Wire:
    wire = orderly(of)
    wire.pass_time(wire.profile.parameters.time_wait + 1)
    assert wire.server.state is State.CLOSED
    return wire


def rst_in_time_wait(of: str) -> Wire:
    wire = orderly(of)
    wire.sends(RST)
    wire.now += 1.0
    wire.looked_at(wire.profile.parameters.time_wait - 1.0)
    if wire.server.state is State.CLOSED:
        wire.events[-1] = Snapshot(wire.now, "look", ())
    return wire


def rst_one_before_after_fin(of: str) -> Wire:
    """The client's FIN, and then its RST with the FIN's own number."""
    wire = Wire(of)
    wire.connect()
    wire.sends(FIN | ACK)
    wire.pass_time(0.5)
    wire.sends(RST, at=seq_add(wire.sequence, -1))
    wire.events.append(Note(wire.now + 1.0, "a second later"))
    return wire


def orphan_left_alone(of: str) -> Wire:
    """The server closes, the client acknowledges and never closes."""
    wire = Wire(of)
    wire.connect()
    wire.closes()
    wire.sends(ACK)
    wire.pass_time(wire.profile.parameters.fin_wait_2 or 500.0)
    wire.pass_time(1.0)
    return wire


def as_(seen: Wire, other: str) -> Verdict:
    return check(seen.events, profiles={"server": other, "client": other})


@cache
def documented(of: str, other: str) -> dict[str, Any]:
    """What `timewait profiles OF OTHER` says that the two differ in."""
    told = CliRunner().invoke(profiles_command, [of, other, "--json"], standalone_mode=False)
    document: dict[str, Any] = json.loads(told.output)
    return document


def limits(of: str, other: str, name: str) -> tuple[float, float]:
    """A parameter of the two, as documented: the same where no difference is."""
    ours, theirs = documented(of, other)["parameters"].get(name, (0.0, 0.0))
    return (inf if ours is None else ours), (inf if theirs is None else theirs)


def leads_elsewhere(of: str, other: str, state: State, event: TcpEvent) -> bool:
    """Whether the two are documented to go to different states there."""

    def after(row: dict[str, Any]) -> str:
        return row["next"] or state.name if row["kind"] == "go" else state.name

    return any(
        after(row[of]) != after(row[other])
        for row in documented(of, other)["rows"]
        if (row["state"], row["event"]) == (state.name, event.name)
    )


def test_two_stacks_that_differ_in_nothing_would_be_no_two() -> None:
    assert all(documented(*pair)["parameters"] or documented(*pair)["rows"] for pair in PAIRS)


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_an_orderly_close_in_which_they_do_not_differ_conforms_to_every_other(
    of: str, other: str
) -> None:
    for state, event in (
        (State.ESTABLISHED, TcpEvent.CLOSE),
        (State.FIN_WAIT_1, TcpEvent.ACK_OF_FIN),
        (State.FIN_WAIT_2, TcpEvent.FIN),
    ):
        assert not leads_elsewhere(of, other, state, event)
    verdict = as_(orderly(of), other)
    assert verdict, verdict.explain()


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(
    "trace", [time_wait_to_its_end, rst_in_time_wait, rst_one_before_after_fin, orphan_left_alone]
)
def test_a_trace_conforms_to_its_own_profile(name: str, trace: Callable[[str], Wire]) -> None:
    verdict = as_(trace(name), name)
    assert verdict, verdict.explain()


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_time_wait_diverges_where_it_is_shorter(of: str, other: str) -> None:
    ours, theirs = limits(of, other, "time_wait")
    verdict = as_(time_wait_to_its_end(of), other)
    assert bool(verdict) == (ours >= theirs)
    if not verdict:
        assert verdict.divergence is not None
        assert "TIME_WAIT -> CLOSED" in verdict.divergence.event


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_time_wait_diverges_where_it_is_longer(of: str, other: str) -> None:
    seen = orderly(of)
    seen.now += 1.0
    seen.looked_at(profile(of).parameters.time_wait - 1.0)
    same = "time_wait" not in documented(of, other)["parameters"]
    verdict = as_(seen, other)
    assert bool(verdict) == same
    if not verdict:
        assert verdict.divergence is not None
        assert verdict.divergence.rule.startswith(f"{other} profile, TIME_WAIT lasts")


@pytest.mark.parametrize(("of", "other"), PAIRS)
@pytest.mark.parametrize(
    ("trace", "state", "event"),
    [
        (rst_in_time_wait, State.TIME_WAIT, TcpEvent.RST_EXACT),
        (rst_one_before_after_fin, State.CLOSE_WAIT, TcpEvent.RST_AFTER_FIN),
    ],
)
def test_a_reset_diverges_where_the_tables_differ(
    of: str, other: str, trace: Callable[[str], Wire], state: State, event: TcpEvent
) -> None:
    differ = leads_elsewhere(of, other, state, event)
    seen = trace(of)
    if trace is rst_in_time_wait and seen.server.state is state:
        # It survives, and how much is left of it is shown.
        differ |= "time_wait" in documented(of, other)["parameters"]
    verdict = as_(seen, other)
    assert bool(verdict) != differ, verdict.explain()


@pytest.mark.parametrize(("of", "other"), PAIRS)
def test_an_orphan_diverges_where_its_limit_is_shorter(of: str, other: str) -> None:
    ours, theirs = limits(of, other, "fin_wait_2")
    verdict = as_(orphan_left_alone(of), other)
    assert bool(verdict) == (ours >= theirs), verdict.explain()

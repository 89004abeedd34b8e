"""A checker that accepts everything is worthless: change one thing in a true trace and see.

Each operator makes mutants of a list of events by changing one thing that an
observer could not honestly have reported. The check must reject a mutant, or
TCP allows it too; which of its classes those are, and why, is said here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeAlias

from attrs import define, evolve, field, frozen

from timewait.check import Checker, Verdict, check
from timewait.check.sequence import PROBE_AFTER
from timewait.events import (
    USED_AGAIN,
    Called,
    Event,
    Restart,
    Row,
    SegmentSeen,
    Snapshot,
    Transition,
)
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, seq_diff
from timewait.tcp.states import State

__all__ = ["OPERATORS", "Mutant", "Outcome", "Result", "mutants", "run"]

Events: TypeAlias = Sequence[Event]


@frozen
class Mutant:
    """A trace with one thing changed: by which operator, at which event, what."""

    operator: str
    at: int
    what: str
    events: list[Event]


_Operator: TypeAlias = Callable[[Events, int, random.Random], Iterator[tuple[str, list[Event]]]]
OPERATORS: Final[dict[str, _Operator]] = {}


def _operator(function: _Operator) -> _Operator:
    OPERATORS[function.__name__.strip("_").replace("_", "-")] = function
    return function


def _replaced(events: Events, at: int, *by: Event) -> list[Event]:
    return [*events[:at], *by, *events[at + 1 :]]


def _swapped(events: Events, at: int, other: int) -> list[Event]:
    """Two events change places; each takes the other's time."""
    out = list(events)
    out[at] = evolve(events[other], t=events[at].t)
    out[other] = evolve(events[at], t=events[other].t)
    return out


def _next_of(events: Events, at: int, kind: type, **same: Any) -> int | None:
    for i in range(at + 1, len(events)):
        event = events[i]
        if isinstance(event, kind) and all(getattr(event, k) == v for k, v in same.items()):
            return i
    return None


# Transitions.


@_operator
def _transition_dropped(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    if isinstance(events[at], Transition):
        yield "", _replaced(events, at)


@_operator
def _transitions_swapped(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition):
        other = _next_of(events, at, Transition, local=event.local, remote=event.remote)
        if other is not None:
            yield "", _swapped(events, at, other)


@_operator
def _transition_doubled(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition) and not event.sampled:
        yield "", _replaced(events, at, event, event)


@_operator
def _transition_target(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition):
        others = [s for s in State if s not in (event.new, event.old, State.LISTEN)]
        for new in rng.sample(others, 2):
            yield f"to {new.name}", _replaced(events, at, evolve(event, new=new))


@_operator
def _transition_origin(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition) and not event.sampled:
        others = [s for s in State if s not in (event.new, event.old, State.LISTEN)]
        old = rng.choice(others)
        if event.old is not State.LISTEN or old is not State.CLOSED:
            yield f"from {old.name}", _replaced(events, at, evolve(event, old=old))


@_operator
def _transition_of_the_peer(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition):
        yield "", _replaced(events, at, evolve(event, local=event.remote, remote=event.local))


@_operator
def _transition_invented(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Transition) and event.new is not State.CLOSED and not event.sampled:
        new = rng.choice([s for s in State if s not in (event.new, State.LISTEN)])
        extra = evolve(event, old=event.new, new=new)
        yield f"{extra.old.name} -> {new.name}", _replaced(events, at, event, extra)


# TIME_WAIT.


def _with_rows(events: Events, at: int, rows: list[Row]) -> list[Event]:
    snapshot = events[at]
    assert isinstance(snapshot, Snapshot)
    return _replaced(events, at, evolve(snapshot, rows=tuple(rows)))


def _rows_in(events: Events, at: int, *states: State) -> Iterator[tuple[list[Row], int, Row]]:
    event = events[at]
    if isinstance(event, Snapshot):
        for i, row in enumerate(event.rows):
            if row.state in states:
                yield list(event.rows), i, row


@_operator
def _time_wait_on_the_wrong_side(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    for rows, i, row in _rows_in(events, at, State.TIME_WAIT):
        rows[i] = evolve(row, local=row.remote, remote=row.local)
        yield "row", _with_rows(events, at, rows)
    if isinstance(event, Transition) and event.new is State.TIME_WAIT:
        other = evolve(event, local=event.remote, remote=event.local, old=State.LAST_ACK)
        yield "transition", _replaced(events, at, other, evolve(event, new=State.CLOSED))


@_operator
def _time_wait_missing(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    for rows, i, _row in _rows_in(events, at, State.TIME_WAIT):
        del rows[i]
        yield "", _with_rows(events, at, rows)


@_operator
def _time_wait_two_seconds_short(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    for rows, i, row in _rows_in(events, at, State.TIME_WAIT):
        if row.seconds_left is not None:
            rows[i] = evolve(row, seconds_left=max(row.seconds_left - 2.0, 0.0))
            yield "by its timer", _with_rows(events, at, rows)
    event = events[at]
    if isinstance(event, Transition) and event.new is State.TIME_WAIT and not event.sampled:
        gone = Transition(
            event.t + 58.0, event.local, event.remote, State.TIME_WAIT, State.CLOSED, event.source
        )
        if _next_of(events, at, Transition, local=event.local, remote=event.remote) is None:
            yield "by its end", sorted([*events, gone], key=lambda e: e.t)


@_operator
def _time_wait_too_long(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    for rows, i, row in _rows_in(events, at, State.TIME_WAIT):
        if row.seconds_left is not None:
            rows[i] = evolve(row, seconds_left=row.seconds_left + 5.0)
            yield "by its timer", _with_rows(events, at, rows)
    event = events[at]
    if isinstance(event, Snapshot) and at == len(events) - 1:
        held = [
            evolve(row, seconds_left=None) for _, _, row in _rows_in(events, at, State.TIME_WAIT)
        ]
        if held:
            later = evolve(event, t=event.t + 70.0, rows=tuple(held))
            yield "still there", [*events, later]


# Snapshots.


@_operator
def _row_state(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    for rows, i, row in _rows_in(events, at, *set(State) - {State.LISTEN}):
        others = [s for s in State if s not in (row.state, State.LISTEN, State.CLOSED)]
        rows[i] = evolve(row, state=rng.choice(others), timer=None, seconds_left=None)
        yield rows[i].state.name, _with_rows(events, at, rows)


@_operator
def _row_missing(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    for rows, i, _row in _rows_in(events, at, *set(State) - {State.LISTEN, State.TIME_WAIT}):
        del rows[i]
        yield "", _with_rows(events, at, rows)


@_operator
def _row_from_the_past(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Snapshot):
        now = {(row.local, row.remote) for row in event.rows}
        for earlier in events[:at]:
            if isinstance(earlier, Snapshot):
                for row in earlier.rows:
                    if row.state is not State.LISTEN and (row.local, row.remote) not in now:
                        now.add((row.local, row.remote))
                        yield row.state.name, _with_rows(events, at, [*event.rows, row])


# Segments.


def _segment(events: Events, at: int) -> SegmentSeen | None:
    event = events[at]
    return event if isinstance(event, SegmentSeen) else None


@_operator
def _segment_dropped(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    if _segment(events, at):
        yield "", _replaced(events, at)


@_operator
def _segments_swapped(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event:
        other = _next_of(events, at, SegmentSeen)
        if other is not None and {event.src, event.dst} == {
            events[other].src,  # type: ignore[union-attr]
            events[other].dst,  # type: ignore[union-attr]
        }:
            yield "", _swapped(events, at, other)


@_operator
def _segment_from_the_peer(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event:
        yield "", _replaced(events, at, evolve(event, src=event.dst, dst=event.src))


@_operator
def _sequence_off_by_one(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and not event.flags & SYN:
        for by in (1, -1):
            moved = evolve(event, seq=(event.seq + by) & 0xFFFFFFFF)
            yield f"{by:+d}", _replaced(events, at, moved)


@_operator
def _ack_off_by_one(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & ACK and not event.flags & RST:
        moved = evolve(event, ack=(event.ack - 1) & 0xFFFFFFFF)
        yield "-1", _replaced(events, at, moved)


@_operator
def _ack_of_unsent(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & ACK:
        by = rng.choice((1, 2, 1000))
        moved = evolve(event, ack=(event.ack + by) & 0xFFFFFFFF)
        yield f"+{by}", _replaced(events, at, moved)


@_operator
def _fin_without_ack_flag(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN:
        yield "", _replaced(events, at, evolve(event, flags=event.flags & ~ACK, ack=0))


@_operator
def _fin_removed(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN:
        yield "", _replaced(events, at, evolve(event, flags=event.flags & ~FIN))


@_operator
def _fin_added(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and not event.flags & (FIN | SYN | RST):
        yield "", _replaced(events, at, evolve(event, flags=event.flags | FIN))


@_operator
def _ack_of_fin_dropped(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN:
        end = (event.seq + event.length + 1) & 0xFFFFFFFF
        answers = [
            i
            for i, other in enumerate(events)
            if i > at
            and isinstance(other, SegmentSeen)
            and (other.src, other.dst) == (event.dst, event.src)
            and other.flags & ACK
            and other.ack == end
        ]
        if answers:
            yield "", [e for i, e in enumerate(events) if i not in answers]


@_operator
def _rst_invented(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and not event.flags & RST:
        end = (event.seq + event.length + (event.flags & FIN) + (event.flags >> 1 & 1)) & 0xFFFFFFFF
        extra = evolve(event, flags=RST | ACK, seq=end, length=0)
        yield "", _replaced(events, at, event, extra)


@_operator
def _rst_for_fin(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN:
        yield "", _replaced(events, at, evolve(event, flags=RST | ACK))


@_operator
def _syn_again(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and not event.flags & (SYN | RST):
        extra = evolve(event, flags=SYN, ack=0, length=0)
        yield "", _replaced(events, at, event, extra)


@_operator
def _fin_again_too_soon(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN and not event.length:
        again = evolve(event, t=event.t + 0.1)
        moved = [_later(e, 0.2) for e in events[at + 1 :]]
        yield "after 0.1 s", [*events[: at + 1], again, *moved]


@_operator
def _acknowledged_too_late(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    before = _segment(events, at - 1) if at else None
    if event and before and not event.flags & (SYN | RST) and not before.flags & (SYN | RST):
        sent = (before.seq + before.length + (before.flags & FIN)) & 0xFFFFFFFF
        if (event.src, event.ack) == (before.dst, sent) and before.seq != sent:
            yield "by 0.7 s", [*events[:at], *(_later(e, 0.7) for e in events[at:])]


def _later(event: Event, by: float) -> Event:
    if isinstance(event, Called) and event.began is not None:
        return evolve(event, t=event.t + by, began=event.began + by)
    return evolve(event, t=event.t + by)


@_operator
def _text_invented(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = _segment(events, at)
    if event and event.flags & FIN:
        after = (event.seq + event.length + 1) & 0xFFFFFFFF
        extra = evolve(event, flags=ACK | PSH, seq=after, length=10)
        yield "after the FIN", _replaced(events, at, event, extra)


# Calls.


@_operator
def _close_not_called(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call in ("close", "shutdown") and event.remote:
        yield event.call, _replaced(events, at)


@_operator
def _close_called_earlier(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "close" and event.remote and event.began:
        for i in range(at - 1, -1, -1):
            other = events[i]
            if isinstance(other, Snapshot):
                t = other.t - 1e-6
                moved = evolve(event, t=t, began=t - 1e-6)
                yield "before a snapshot", [*events[:i], moved, *events[i:at], *events[at + 1 :]]
                break


@_operator
def _end_of_stream_early(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "recv" and event.result:
        yield "", _replaced(events, at, evolve(event, result=0))
    if isinstance(event, Called) and event.call in ("connect", "accept") and event.errno is None:
        early = evolve(event, call="recv", result=0, began=event.t)
        yield "at once", _replaced(events, at, event, early)


@_operator
def _error_invented(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "recv" and event.errno is None:
        yield "", _replaced(events, at, evolve(event, errno="ECONNRESET", result=None))


@_operator
def _connect_refused(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "connect" and event.errno is None:
        yield "and no RST", _replaced(events, at, evolve(event, errno="ECONNREFUSED"))


@_operator
def _call_after_close(events: Events, at: int, rng: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "close" and event.remote and event.socket:
        call = rng.choice(("close", "recv", "send", "shutdown"))
        result = 5 if call in ("recv", "send") else None
        extra = evolve(event, call=call, result=result, t=event.t + 1e-6, began=event.t)
        yield call, _replaced(events, at, event, extra)


@_operator
def _read_more_than_sent(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Called) and event.call == "recv" and event.result:
        yield "by 1", _replaced(events, at, evolve(event, result=event.result + 1))


@_operator
def _linger_changed(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if not isinstance(event, Called) or not event.remote or event.began is None:
        return
    if event.call == "setsockopt" and event.result == {"SO_LINGER": [1, 0]}:
        yield "not set", _replaced(events, at)
    if event.call == "close":
        t = event.began - 1e-6
        linger = evolve(event, t=t, began=t, call="setsockopt", result={"SO_LINGER": [1, 0]})
        before = events[at - 1] if at else None
        if not (isinstance(before, Called) and before.call == "setsockopt"):
            yield "set", _replaced(events, at, linger, event)


# Binds.


@_operator
def _bind_should_fail(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if (
        isinstance(event, Called)
        and event.errno == "EADDRINUSE"
        and event.call in ("bind", "listen")
    ):
        done = evolve(event, errno=None)
        out = _replaced(events, at, done)
        yield (
            event.call,
            [
                evolve(e, ok=True, errno=None, call=None, free_after=0.0)
                if isinstance(e, Restart) and abs(e.t - event.t) < 0.1
                else e
                for e in out
            ],
        )


@_operator
def _bind_should_succeed(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    earlier = any(isinstance(e, Called) and e.call == "bind" for e in events[:at])
    if isinstance(event, Called) and event.errno is None and event.call == "bind" and earlier:
        yield event.call, _replaced(events, at, evolve(event, errno="EADDRINUSE"))


@_operator
def _free_too_early(events: Events, at: int, _: random.Random) -> Iterator[Any]:
    event = events[at]
    if isinstance(event, Restart) and not event.ok and event.free_after and event.free_after > 2:
        yield "", _replaced(events, at, evolve(event, free_after=event.free_after - 2.0))


# Running them.


def mutants(
    events: Events, seed: int = 0, operators: Iterable[str] = OPERATORS
) -> Iterator[Mutant]:
    """Every mutant of these events, operator by operator."""
    rng = random.Random(seed)
    for name in operators:
        operator = OPERATORS[name]
        for at in range(len(events)):
            for what, changed in operator(events, at, rng):
                if changed != list(events):
                    yield Mutant(name, at, what, changed)


@define
class Outcome:
    """One operator's mutants: how many, how many rejected, the others by why TCP allows them."""

    made: int = 0
    rejected: int = 0
    allowed: dict[str, int] = field(factory=dict)
    examples: dict[str, str] = field(factory=dict)

    @property
    def unexplained(self) -> int:
        """Accepted mutants without a class."""
        return self.allowed.get(UNEXPLAINED, 0)


UNEXPLAINED: Final = "not explained"


@define
class Result:
    """What became of all mutants, by operator."""

    outcomes: dict[str, Outcome] = field(factory=dict)

    @property
    def made(self) -> int:
        """All mutants."""
        return sum(outcome.made for outcome in self.outcomes.values())

    @property
    def rejected(self) -> int:
        """Those that the check rejects."""
        return sum(outcome.rejected for outcome in self.outcomes.values())

    @property
    def unexplained(self) -> int:
        """Those that it accepts, and nobody knows why TCP would."""
        return sum(outcome.unexplained for outcome in self.outcomes.values())

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "mutants": self.made,
            "rejected": self.rejected,
            "allowed": self.made - self.rejected - self.unexplained,
            "unexplained": self.unexplained,
            "operators": {
                name: {
                    "mutants": outcome.made,
                    "rejected": outcome.rejected,
                    "allowed": [
                        {"why": why, "mutants": n, "example": outcome.examples[why]}
                        for why, n in outcome.allowed.items()
                    ],
                }
                for name, outcome in self.outcomes.items()
            },
        }

    def add(self, mutant: Mutant, verdict: Verdict, why: str | None) -> None:
        """Count one mutant."""
        outcome = self.outcomes.setdefault(mutant.operator, Outcome())
        outcome.made += 1
        if not verdict:
            outcome.rejected += 1
            return
        why = why or UNEXPLAINED
        outcome.allowed[why] = outcome.allowed.get(why, 0) + 1
        outcome.examples.setdefault(why, f"event {mutant.at} {mutant.what}".strip())


def run(
    events: Events,
    *,
    seed: int = 0,
    profiles: dict[str, Any] | None = None,
    result: Result | None = None,
) -> Result:
    """Check every mutant of a trace. The trace itself must conform, or `ValueError`."""
    whole = check(events, profiles=profiles)
    if not whole:
        raise ValueError(
            "the trace itself does not conform: nothing can be learnt from its mutants"
        )
    result = result or Result()
    for mutant in mutants(events, seed):
        checker = Checker(profiles, window=float("inf"), explain=False)
        for event in mutant.events:
            checker.feed(event)
        verdict = checker.verdict()
        result.add(mutant, verdict, None if not verdict else why_allowed(mutant, events))
    return result


def why_allowed(mutant: Mutant, events: Events) -> str | None:
    """The class of an accepted mutant: why TCP allows it, or the observers cannot know."""
    event = events[mutant.at]
    if isinstance(event, Called):
        return _call_without_effect(event, events)
    if isinstance(event, SegmentSeen):
        return _segment_class(mutant, events, event)
    if isinstance(event, Transition):
        listener_turned = mutant.operator == "transition-of-the-peer" and not event.remote[1]
        if (
            mutant.operator == "transition-dropped" or listener_turned  # to nobody's address
        ) and _next_of_connection(events, mutant.at) is None:
            return "nothing follows: it may have happened after the observer stopped"
        if event.cause == USED_AGAIN:
            return "no record of the kernel's: it is inferred when the addresses are used again"
        tracepoint = event.source in ("tracepoint", "sock_diag")
        if tracepoint and State.FIN_WAIT_2 in (event.old, event.new):
            return "an orphan's FIN_WAIT_2 is a small socket: the tracepoint says little of its end"
        return None
    if isinstance(event, Snapshot):
        return _shortly_before(mutant, events, event)
    return None


def _call_without_effect(event: Called, events: Events) -> str | None:
    began = event.t if event.began is None else event.began
    during = [e for e in events if began <= e.t <= event.t and e is not event]
    if any(isinstance(e, SegmentSeen) and e.flags & RST and e.src == event.local for e in during):
        return "the close resets the connection with SO_LINGER and without"
    if any(
        isinstance(e, Transition) and e.local == event.local and e.new is State.CLOSED
        for e in during
    ):
        return "the close resets the connection with SO_LINGER and without"
    acted = [
        e
        for e in during
        if isinstance(e, Transition)
        and e.local == event.local
        and (e.source != "model" or e.cause in ("CLOSE", "CLOSE_UNREAD", "ABORT", "SHUTDOWN"))
    ]
    return None if acted else "the call changed nothing: the connection was over, or half closed"


def _shortly_before(mutant: Mutant, events: Events, snapshot: Snapshot) -> str | None:
    """Whether the one row that was changed, or is gone, was so within the last 50 ms."""
    changed = mutant.events[mutant.at]
    assert isinstance(changed, Snapshot)
    was = next((row for row in snapshot.rows if row not in changed.rows), None)
    if was is None:
        return None
    if mutant.operator == "row-missing" and not was.inode:
        if was.state is State.SYN_RECEIVED:
            return "a table need not show an embryo: its listener may keep it in a SYN cookie"
        if was.state is State.FIN_WAIT_2:
            return _ORPHAN
    is_now = {(row.local, row.remote): row.state for row in changed.rows}
    state = is_now.get((was.local, was.remote), State.CLOSED)
    if any(
        isinstance(e, Transition)
        and (e.local, e.remote) == (was.local, was.remote)
        and state in (e.old, State.CLOSED if e.old is State.LISTEN else e.old)
        and 0 <= snapshot.t - e.t < 0.05
        for e in events
    ):
        return "a look is timed when the table has been read: it was so a moment before"
    return None


# How long a segment may wait for the processor in whose queue another has overtaken it.
_OVERTAKEN: Final = 0.02
_TWICE: Final = 0.001  # a capture of several interfaces shows a segment twice, so far apart


def _segment_class(mutant: Mutant, events: Events, event: SegmentSeen) -> str | None:
    """Why TCP allows it, from the segments of its connection alone."""
    before = _of_the_same(event, reversed(events[: mutant.at]))
    before.reverse()
    after = _of_the_same(event, events[mutant.at + 1 :])
    explain = _CLASSES.get(mutant.operator)
    why = explain(mutant, event, before, after) if explain else None
    if why is None and _apart(event):
        why = _why_between_hosts(mutant, event, before, after)
    return why


def _apart(event: SegmentSeen) -> bool:
    """Whether the two ends are on different machines, as far as their addresses tell."""
    hosts = {event.src[0], event.dst[0]}
    return len(hosts) == 2 and not all(host.startswith("127.") for host in hosts)


def _why_between_hosts(
    mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    """What a network, and a capture of it that lacks segments, may show."""
    changed = mutant.events[mutant.at]
    others = before + after
    match mutant.operator:
        case "segment-dropped" | "fin-removed" | "ack-of-fin-dropped":
            return _LACKS
        case "ack-of-unsent":
            assert isinstance(changed, SegmentSeen)
            peers = [e for e in after if e.src == event.dst and _space(e) != e.seq]
            behind = not peers or seq_diff(peers[0].seq, changed.ack) >= 0
            seen_late = peers and seq_diff(changed.ack, _space(peers[0])) >= 0
            sent = any(e.src == event.dst and seq_diff(_space(e), changed.ack) >= 0 for e in others)
            return _LACKS if behind or seen_late or sent else None
        case "segment-from-the-peer":
            return _LACKS
        case "syn-again":
            return _ANEW
        case "sequence-off-by-one":
            return _LACKS if abs(_off_by(mutant, event)) == 1 else None
        case "fin-added":
            assert isinstance(changed, SegmentSeen)
            again = any(e.src == event.src and _same_fin(e, changed) for e in others)
            return _LATE_OR_TWICE if again else None
        case "segments-swapped" | "fin-again-too-soon" | "acknowledged-too-late":
            return _LATE_OR_TWICE
        case "rst-for-fin" | "rst-invented":
            # What its sender sent before the RST may come after it, but nothing sent later.
            reset = changed if mutant.operator == "rst-for-fin" else mutant.events[mutant.at + 1]
            assert isinstance(reset, SegmentSeen)
            late = [
                e
                for e in after
                if e.src == event.src
                and e.t - event.t >= _ON_ITS_WAY
                and not e.flags & (SYN | RST)
                and not _sent_again(e, [*before, event])
            ]
            if not any(e.src == event.dst for e in before):
                return "the capture may show one direction only: what it is about is not seen"
            return _LATE_OR_TWICE if not late else None
    return None


def _same_fin(one: SegmentSeen, other: SegmentSeen) -> bool:
    return bool(one.flags & other.flags & FIN) and _space(one) == _space(other)


def _off_by(mutant: Mutant, event: SegmentSeen) -> int:
    moved = mutant.events[mutant.at]
    assert isinstance(moved, SegmentSeen)
    return seq_diff(moved.seq, event.seq)


def _of_the_same(event: SegmentSeen, events: Iterable[Event]) -> list[SegmentSeen]:
    """The segments of its connection, from it on, either way: a new SYN begins another."""
    found: list[SegmentSeen] = []
    for other in events:
        if isinstance(other, SegmentSeen) and {other.src, other.dst} == {event.src, event.dst}:
            found.append(other)
            if other.flags & (SYN | ACK) == SYN:
                break
    return found


def _space(event: SegmentSeen) -> int:
    """The number after the segment's last octet, SYN and FIN counted."""
    used = event.length + (event.flags & FIN) + (event.flags >> 1 & 1)
    return event.seq + used & 0xFFFFFFFF


def _plain(event: SegmentSeen) -> bool:
    return not event.flags & (SYN | FIN | RST) and not event.length


def _same(a: SegmentSeen, b: SegmentSeen) -> bool:
    return (a.src, a.flags, a.seq, a.ack, a.length) == (b.src, b.flags, b.seq, b.ack, b.length)


def _sent_again(event: SegmentSeen, others: list[SegmentSeen]) -> bool:
    """Whether the octets of a segment that has any were sent in another one too."""
    return _space(event) != event.seq and any(
        e.src == event.src
        and e.flags & SYN == event.flags & SYN
        and seq_diff(e.seq, event.seq) <= 0 <= seq_diff(_space(e), _space(event))
        for e in others
    )


def _answers(later: SegmentSeen, event: SegmentSeen) -> bool:
    """Whether one side's segment acknowledges what the other's brings."""
    brings = _space(event) != event.seq
    return bool(brings and later.flags & ACK and seq_diff(later.ack, event.seq) > 0)


def _closed(event: SegmentSeen, before: list[SegmentSeen]) -> bool:
    """Whether the sender of `event` has sent its FIN and may have had its peer's."""
    return {e.src for e in (*before, event) if e.flags & FIN} == {event.src, event.dst}


_Segments: TypeAlias = list[SegmentSeen]


def _why_dropped(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    if _plain(event):
        return _CUMULATIVE
    if not after:
        return "nothing follows: it may have been sent after the capture ended"
    if not before:
        return "the first of its connection: a capture may begin in the middle of one"
    if _sent_again(event, before + after) or any(_same(event, e) for e in before + after):
        return "sent more than once: a timer is bounded from below only (RFC 6298 §2.4)"
    if event.length and after[0].flags & (RST | ACK) == RST and after[0].src == event.dst:
        return _ORPHAN
    if event.length and any(
        e.src == event.dst and e.flags & ACK and seq_diff(e.ack, _space(event)) >= 0 for e in after
    ):
        return "a capture may drop text: it is acknowledged, its sender goes on, and that is told"
    return None


def _why_swapped(
    mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    other = after[0]
    if _same(event, other):
        return "the two are one segment, sent again"
    if event.flags & SYN and not before:
        return (
            "a handshake that began before the capture: what is seen of it was sent again, and "
            "may cross"
        )
    if other.flags & (SYN | ACK) == SYN:
        return _GONE if _closed(other, [*before, event]) else None
    if other.src == event.src:
        if _plain(event) and _filled(event, after):
            return _FILLED
        if other.t - event.t < _OVERTAKEN and seq_diff(event.ack, other.ack) <= 0:
            return _OVERTOOK
        return _ONE_MORE if _plain(event) and _sent_again(other, before) else None
    if not _answers(other, event):
        return "segments of the two sides cross: neither answers the other"
    if _sent_again(event, before):
        return "what it answers had been sent before"
    return None


def _why_moved(
    mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    moved = mutant.events[mutant.at]
    assert isinstance(moved, SegmentSeen)
    if event.flags & RST:
        asked = any(e.src == event.dst and e.ack == moved.seq for e in before)
        return (
            "a reset answers whichever acknowledgment was on its way (RFC 9293 §3.5.2)"
            if asked and not event.flags & ACK
            else None
        )
    if event.length and _sent_again(event, [e for e in before + after if e.length]):
        return _IN_PART
    if event.length and any(
        e.src == event.src
        and e.length
        and seq_diff(moved.seq, _space(e)) < 0 <= seq_diff(moved.seq, e.seq)
        for e in before
    ):
        return _IN_PART
    if _plain(event) and _filled(event, after):
        return _FILLED
    if event.length == 1 and before and event.t - before[-1].t >= PROBE_AFTER:
        return "a keep-alive repeats the last octet (RFC 9293 §3.8.4)"
    near = [
        e
        for e in before + after
        if e.src == event.src and abs(e.t - event.t) < _OVERTAKEN and e.ack == event.ack
    ]
    if _plain(event) and any(moved.seq in (e.seq, _space(e)) for e in near):
        return _OVERTOOK
    return None


def _filled(event: SegmentSeen, after: _Segments) -> bool:
    """Whether the octet that would have been skipped is sent so late that it may be again."""
    return any(
        e.src == event.src and e.length and e.seq == event.seq and e.t - event.t >= PROBE_AFTER
        for e in after
    )


def _why_less(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    if any(
        e.src == event.dst and e.flags & FIN and _space(e) == event.ack and not e.flags & RST
        for e in before
    ):
        later = [e for e in after if e.src == event.src and not e.flags & (SYN | RST)]
        if all(e.ack == event.ack for e in later):
            return (
                "the peer's FIN had not arrived yet: it is acknowledged later, or nothing follows"
            )
        return None
    return _CUMULATIVE


def _why_fin(mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    added = mutant.events[mutant.at]
    assert isinstance(added, SegmentSeen)
    if any(_same(added, e) and abs(e.t - event.t) < _TWICE for e in before + after):
        return "the same within a millisecond: a capture of several interfaces shows it twice"
    number = event.seq + event.length & 0xFFFFFFFF
    if event.length and any(e.src == event.dst and e.ack == number for e in after):
        return (
            "its text was acknowledged without the FIN, which was beyond the window "
            "(RFC 9293 §3.10.7.4) and is sent again"
        )
    if event.length and any(e.src == event.src and _space(e) == _space(added) for e in after):
        return _PROBE
    if _sent_again(event, after):
        return _IN_PART
    if all(e.flags & RST for e in after if e.src == event.src):
        return "its user may have closed then: nothing that follows shows that it had not"
    return None


def _why_no_fin(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    if _only_resets(after):
        return "a reset ended it: its FIN need not have been sent by then"
    if not any(
        e.src == event.src and e.flags & FIN and _space(e) == _space(event) for e in before + after
    ):
        return None
    return _IN_PART if event.length else _ONE_MORE


def _only_resets(after: _Segments) -> bool:
    mine = [e for e in after if e.flags & (SYN | ACK) != SYN]
    return bool(mine) and all(e.flags & RST for e in mine)


def _why_reset_too(
    _: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    return _ABORT if _only_resets(after) else None


def _why_sent(mutant: Mutant, event: SegmentSeen, before: _Segments, _: _Segments) -> str | None:
    changed = mutant.events[mutant.at]
    assert isinstance(changed, SegmentSeen)
    if any(
        e.src == event.dst and e.length and seq_diff(_space(e), changed.ack) >= 0 for e in before
    ):
        return "it had been sent by then: a part of a segment may be acknowledged"
    return None


def _why_unanswered(
    mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    kept = [e for e in mutant.events if isinstance(e, SegmentSeen)]
    left = [e for e in after if e in kept and e.flags & (SYN | ACK) != SYN]
    again = [i for i, e in enumerate(left) if e.src == event.src and _sent_again(event, [e])]
    if not any(e.src == event.dst for e in left[again[-1] if again else 0 :]):
        return "nothing of the peer's follows: it may have answered after the capture ended"
    return None


def _why_reset(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    mine = [e for e in after if e.src == event.src]
    if event.flags & SYN or not all(e.flags & RST for e in mine):
        return None
    return _ABORT


def _why_syn(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    return _GONE if _closed(event, before) else None


def _why_soon(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    told = [e.ack for e in before if e.src == event.dst and e.flags & ACK]
    if told and told[-1] == event.seq and not _sent_again(event, before):
        return None
    return _PROBE


def _why_late(_: Mutant, event: SegmentSeen, before: _Segments, after: _Segments) -> str | None:
    if _sent_again(before[-1], before[:-1]):
        return "sent more than once: which of them is acknowledged cannot be told"
    return None


def _why_turned(
    mutant: Mutant, event: SegmentSeen, before: _Segments, after: _Segments
) -> str | None:
    turned = mutant.events[mutant.at]
    assert isinstance(turned, SegmentSeen)
    if all(e.src == turned.src for e in before + after):
        return "one direction is left: what the other side sent is not seen"
    return None


_ON_ITS_WAY: Final = 1.0  # s: how long a segment may be on its way between two hosts
_LACKS: Final = (
    "between hosts a segment may be lost before the capture, sent again and cut otherwise, or be "
    "missed by the capture: what shows it is told, and what follows agrees"
)
_LATE_OR_TWICE: Final = (
    "between hosts a segment may come late, twice, or after others that were sent later (RFC 9293 "
    "§3.4)"
)
_CUMULATIVE: Final = "acknowledgments of text are cumulative: one may be missing, or be of less"
_PROBE: Final = "text was on its way with it: a probe may follow at once (RFC 8985 §7)"
_IN_PART: Final = "sent again in part: a retransmission need not be what was sent (RFC 9293 §3.8.1)"
_ORPHAN: Final = (
    "an orphan's FIN_WAIT_2 may be over at any time (TCP_LINGER2), and what comes then is reset"
)
_ANEW: Final = (
    "between hosts, one that has lost its connection may begin anew from the same port (RFC 9293 "
    "§3.5.1)"
)
_ABORT: Final = (
    "its user may abort at any time (SO_LINGER 0, or text unread): nothing but a RST follows"
)
_FILLED: Final = "it may have been lost before: what is missing is sent later, as if again"
_ONE_MORE: Final = (
    "an acknowledgment more: an open socket may send one at any time (RFC 9293 §3.8.6)"
)
_OVERTOOK: Final = (
    "one overtook the other, from different processors' queues (measured on Linux 6.18)"
)
_GONE: Final = (
    "after both FINs the socket may be gone: TIME_WAIT is left for a new connection (RFC 1122 "
    "§4.2.2.13), and Linux aborts in silence from LAST_ACK and CLOSING (tcp_disconnect)"
)
_CLASSES: Final[dict[str, Callable[[Mutant, SegmentSeen, _Segments, _Segments], str | None]]] = {
    "segment-dropped": _why_dropped,
    "segments-swapped": _why_swapped,
    "segment-from-the-peer": _why_turned,
    "sequence-off-by-one": _why_moved,
    "ack-off-by-one": _why_less,
    "fin-added": _why_fin,
    "fin-removed": _why_no_fin,
    "ack-of-fin-dropped": _why_unanswered,
    "rst-invented": _why_reset,
    "rst-for-fin": _why_reset_too,
    "ack-of-unsent": _why_sent,
    "syn-again": _why_syn,
    "fin-again-too-soon": _why_soon,
    "acknowledged-too-late": _why_late,
}


def _next_of_connection(events: Events, at: int) -> int | None:
    event = events[at]
    assert isinstance(event, Transition)
    return _next_of(events, at, Transition, local=event.local, remote=event.remote)

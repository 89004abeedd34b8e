"""One connection followed: what each observation of it leaves possible, until nothing is left.

Here a connection's set of explanations meets the clock: which timers may have
fired, what must have arrived or been reported by now, and in which other orders
what several observers saw may have happened.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from attrs import define, field

from timewait.check import explanations as ex
from timewait.check import reasons
from timewait.check.binds import Options
from timewait.check.explanations import Explanations
from timewait.check.order import Entry, in_any_order, lane
from timewait.check.sequence import Sequence
from timewait.check.verdict import Divergence, address_text, diagram, event_text
from timewait.events import Address, Called, Event, Row, SegmentSeen
from timewait.tcp.profiles import Profile
from timewait.tcp.states import State

__all__ = ["DIVERGENCES_KEPT", "LATE", "Begun", "Connection", "Findings"]

LATE: Final = 0.18  # the shortest retransmission timeout (Linux: TCP_RTO_MIN, less a jiffy)
KEPT: Final = 32  # events kept per connection for the story of a divergence
# Linux's timer wheel fires up to a step late: 512 ticks of 4 ms for 60 s at HZ=250.
_TIMER_STEP: Final = 0.05
_WHEEL: Final = 2.2
CLOCKS: Final = 0.05  # how far two observers' clocks and looks may be apart
BEHIND_BY: Final = 0.005  # after so long a tracepoint has reported what segments show
DIVERGENCES_KEPT: Final = 1000


@define(eq=False)
class Findings:
    """What the connections of one stream have in common."""

    explains: bool
    may_end: Callable[[Connection], None]
    sources: set[str] = field(factory=set)
    divergences: list[Divergence] = field(factory=list)


class Begun(NamedTuple):
    """A call at the time when it was made."""

    t: float
    call: Called


@define(eq=False)
class Connection:
    """What is known of one connection; `ends[0]` is the server's address."""

    ends: tuple[Address, Address]
    model: Explanations
    profiles: tuple[Profile, Profile]
    mode: int
    number: int  # the set of explanations
    findings: Findings
    facts: int = 0
    sequence: Sequence | None = None
    last: float = 0.0
    # When an end can have entered TIME_WAIT (or become an orphan) at the earliest, and when it
    # must have at the latest.
    since: list[float] = field(factory=lambda: [0.0] * 6)
    timed: bool = False
    segments: list[SegmentSeen] = field(factory=list)  # the last few
    waiting: tuple[Event, int, int] | None = None  # a look at one end; the other's may follow
    divergence: Divergence | None = None
    sees: int = 0
    ending: bool = False
    presumed: bool = False  # that nothing went before the first segment, a SYN
    sent: list[int] = field(factory=lambda: [0, 0])
    read: list[int] = field(factory=lambda: [0, 0])
    closed: list[str | None] = field(factory=lambda: [None, None])  # by name, once close() is done
    # What was seen since a quiet moment, after which set; and what is not explained yet.
    base: int = 0
    untangled: bool = False  # the last observation was put into another order
    history: list[Entry] = field(factory=list)
    held: list[Entry] = field(factory=list)
    elsewhere: bool = False  # in another network namespace, as far as can be told
    lossy: bool = False  # some of its segments were missed
    forged: bool = False  # a segment came that neither end had sent: nothing is known from then on
    suspect: SegmentSeen | None = None  # a gap before it, and no sign that segments get lost
    stuck: bool = False  # something is held, or it has diverged
    expires: list[float] = field(factory=lambda: [0.0, 0.0])  # by its timer, when last looked at
    options: list[Options] = field(factory=lambda: [frozenset(), frozenset()])
    queued: list[int] = field(factory=lambda: [0, 0])  # unread, when last looked at

    @property
    def name(self) -> str:
        """Both addresses, the server's first."""
        return f"{address_text(self.ends[0])} <-> {address_text(self.ends[1])}"

    def pairs(self) -> frozenset[ex.Pair]:
        """What the last observation left, before anything unseen may have followed."""
        if not self.history or self.untangled:
            return self.model.members(self.number)
        _, mode, symbol, _, number = self.history[-1]
        return self.model.just_after(mode, number, symbol)

    def time_wait_span(self, end: int) -> tuple[float, float | None]:
        """When this end's TIME_WAIT is over: at the earliest and, if known, at the latest."""
        lasts = self.profiles[end].parameters.time_wait
        latest = None
        if self.facts >> 8 * end & ex.MUST_TIME_WAIT:
            latest = self.since[4 + end] + lasts + _WHEEL
        return self.since[end] + lasts, latest

    def begin_anywhere(self, mode: int) -> None:
        """Follow it from here on as one of which nothing is known."""
        self.mode = mode
        self.number = self.base = self.model.anywhere(mode)
        self.history.clear()

    def may_be_over(self, number: int, due: int = 0, end: int = 0) -> bool:
        """Whether neither end may have a connection any more, and `end` has nothing `due`."""
        over = (ex.CLOSED, ex.TIME_WAIT)
        return any(
            pair[0] & 15 in over and pair[1] & 15 in over and not pair[end] & due
            for pair in self.model.members(number)
        )

    def look(self, end: int, state: State, event: Event, row: Row | None = None) -> None:
        """An end was looked at. The other end may have been looked at a moment before or after."""
        if state is not State.CLOSED:
            self.sees |= 1 << end
        if row is not None and state in _READS:
            # A FIN counts as one octet of the receive queue.
            self.queued[end] = row.recv_q - (state is State.CLOSE_WAIT)
        if row is not None and row.seconds_left is not None and row.timer == "time_wait":
            self._timer(end, row, event)
        waiting = self.waiting
        if waiting is not None:
            other, first, was = waiting
            if first != end and abs(other.t - event.t) < 0.002:
                self.waiting = None
                states = (int(state), was) if end == 0 else (was, int(state))
                self.advance(ex.both_in(*states), event)
                return
            self.settle()
        self.waiting = (event, end, int(state))

    def settle(self) -> None:
        """No look at the other end came: take the one that waits by itself."""
        if self.waiting is not None:
            event, end, state = self.waiting
            self.waiting = None
            self.advance(ex.seen_in(end, state), event)

    def advance(self, symbol: int, event: Event | Begun) -> None:
        """Follow one observation of it."""
        if self.forged:
            return
        t = event.t
        if self.stuck:
            if self.divergence is None:
                self.held.append((t, self.mode, symbol, event, 0))
                self.untangle(t)
            return
        mode = self.mode
        model = self.model
        number = self.number
        if self.timed:
            number = self.clock(number, t)
            mode = self.mode
        quiet = t - self.last
        if quiet > BEHIND_BY:
            if mode & BEHIND == BEHIND:
                number = self.all_reported(number, event)
                if not number:
                    return
            if quiet > LATE:
                number = self.all_delivered(number, event)
                if not number:
                    return
                number = model.close(mode | ex.LATE, number)
            if quiet > CLOCKS:
                self.base = number
                self.history.clear()
        elif len(self.history) >= KEPT:
            self._forget_half(number)
        self.last = t
        after = model.next.get((mode, number, symbol))
        if after is None:
            after = model.follow(mode, number, symbol)
        if not after and self.presumed:
            self.presumed = False
            number = model.anywhere(mode)
            after = model.follow(mode, number, symbol)
        if not after:
            if not self._again(number, symbol):
                self.number = number
                self.held.append((t, mode, symbol, event, 0))
                self.stuck = True
                self.untangle(t)
                return
            number = model.start(mode)
            after = self.number
        self.history.append((t, mode, symbol, event, number))
        self.untangled = False
        self.number = after
        facts = model.facts(after)
        if facts != self.facts:
            self._note(facts, t)

    def _forget_half(self, number: int) -> None:
        """Begin the history later; a look that is still to come may be of a moment before."""
        kept = self.history[KEPT // 2 :]
        if not all(entry[4] for entry in kept):  # some had to be put into another order
            kept = []
        self.base = kept[0][4] if kept else number
        self.history[:] = kept

    def untangle(self, now: float) -> None:
        """Two observers' clocks differ a little: try what they saw in other orders.

        Each observer's own order stands, and nothing is moved by more than
        `timewait.check.order` has it. What is not explained so far may be by what is still to come.
        """
        t, _, symbol, event, _ = self.held[0]
        entries = [*self.history, *self.held]
        # The model's own clock is nobody else's: what it reports is in order.
        if self.mode & _IN_ORDER or len({lane(e[2]) for e in entries}) == 1:
            self.held.clear()
            self._explain(self.number, symbol, event)
            return
        orders = (entries, _in_two_looks(entries, 0), _in_two_looks(entries, 1))
        tries = (in_any_order(self.model, self.base, each) for each in orders)
        if number := next(filter(None, tries), 0):
            self.history.extend(self.held)
            self.held.clear()
            self.stuck = False
            self.untangled = True
            self.last = now
            self.number = self.model.close(self.mode, number)
            facts = self.model.facts(self.number)
            if facts != self.facts:
                self._note(facts, now)
        elif now - t > CLOCKS:
            self.held.clear()
            self._explain(self.number, symbol, event)

    def all_reported(self, number: int, event: Event | Begun | None) -> int:
        """Transitions that segments have shown have been reported by now."""
        model, mode = self.model, self.mode
        for end in (0, 1):
            symbol = ex.told(end, ex.ALL_REPORTED)
            after = model.follow(mode, number, symbol)
            if not after:
                self._explain(number, symbol, event or self.history[-1][3])
                return 0
            number = after
        return number

    def all_delivered(self, number: int, event: Event | Begun | None) -> int:
        """What was sent long ago and not lost has arrived."""
        if self.sequence is None or not self.sequence.exact:
            return number
        after = self.model.follow(self.mode, number, ex.ALL_DELIVERED)
        if not after:
            self._explain(number, ex.ALL_DELIVERED, event or self.history[-1][3])
        return after

    def _again(self, number: int, symbol: int) -> bool:
        """Whether this is a new connection between the same addresses, seen when already open.

        Where segments are reported its SYN would have been.
        """
        mode = self.mode
        if mode & (ex.SEES_A | ex.SEES_B | ex.SEGMENTS) or symbol not in ex.SEEN_OPEN:
            return False
        model = self.model
        if not self.may_be_over(number):
            return False
        after = model.follow(mode, model.start(mode), symbol)
        if after:
            self.number = after
            self.facts = 0
            self.sent, self.read = [0, 0], [0, 0]
        return bool(after)

    def clock(self, number: int, t: float) -> int:
        """Let the timers fire that can have fired by `t`, and those that must have."""
        since, facts = self.since, self.facts
        mode = self.mode
        for end in (0, 1):
            parameters = self.profiles[end].parameters
            bits = facts >> 8 * end
            if bits & ex.MAY_TIME_WAIT and t >= since[end] + parameters.time_wait - 0.005:
                mode |= ex.TW_OVER_A << end
            limit = parameters.fin_wait_2
            if bits & ex.MAY_ORPHAN and limit is not None:
                over = since[2 + end] + limit
                if parameters.linux_checks and not mode & ex.CALLS_A << end:
                    # Its user may have set a shorter one (TCP_LINGER2): a look at its timer tells.
                    over = min(over, self.expires[end])
                if t >= over - 0.005:
                    mode |= ex.F2_OVER_A << end
        if mode != self.mode:
            self.mode = mode
            number = self.model.close(mode, number)
        for end in (0, 1):
            over = since[4 + end] + self.profiles[end].parameters.time_wait + _WHEEL + CLOCKS
            if facts >> 8 * end & ex.MUST_TIME_WAIT and t > over:
                number = self.model.follow(mode, number, ex.told(end, ex.NOT_TIME_WAIT))
        return number

    def _note(self, facts: int, t: float) -> None:
        new = facts & ~self.facts
        self.facts = facts
        for end in (0, 1):
            bits = new >> 8 * end
            if bits & ex.MAY_TIME_WAIT:
                self.since[end] = t
                self.mode &= ~(ex.TW_OVER_A << end)
            if bits & ex.MAY_ORPHAN:
                self.since[2 + end] = t
                self.mode &= ~(ex.F2_OVER_A << end)
            if bits & ex.MUST_TIME_WAIT:
                self.since[4 + end] = t
        timed = ex.MAY_TIME_WAIT | ex.MAY_ORPHAN
        self.timed = bool(facts & (timed | timed << 8))
        self.findings.may_end(self)

    def _timer(self, end: int, row: Row, event: Event) -> None:
        """The time a small socket has left must agree with when it can have come to be."""
        left = row.seconds_left
        parameters = self.profiles[end].parameters
        limit = parameters.time_wait if row.state is State.TIME_WAIT else parameters.fin_wait_2
        if left is None or limit is None or self.divergence is not None:
            return
        over = self.expires[end] = event.t + left
        if left > limit + _TIMER_STEP:
            why = f"{row.state} has {left:.3f} s left, and lasts {limit:g} s"
        elif row.state is not State.TIME_WAIT or not self.facts >> 8 * end & ex.MAY_TIME_WAIT:
            return
        elif over < self.since[end] + limit - CLOCKS:
            why = (
                f"TIME_WAIT would be over at {over:.3f} s, and began at "
                f"{self.since[end]:.3f} s at the earliest"
            )
        else:
            return
        self.diverge(event, why, self.time_wait_rule(end))

    def time_wait_rule(self, end: int) -> str:
        """How long TIME_WAIT lasts for this end, as a rule to cite."""
        chosen = self.profiles[end]
        return (
            f"{chosen.name} profile, TIME_WAIT lasts {chosen.parameters.time_wait:g} s "
            "(RFC 9293 §3.6.1: 2MSL)"
        )

    def _explain(self, number: int, symbol: int, event: Event | Begun) -> None:
        """Nothing explains the observation: say why not, and what would."""
        if self._is_elsewhere():
            return
        event = event.call if isinstance(event, Begun) else event
        model, mode = self.model, self.mode
        if not self.findings.explains:
            self.diverge(event, "not allowed", "")
            return
        why, rule = reasons.reason(
            model, number, symbol, (self.profiles[0].name, self.profiles[1].name)
        )
        self.diverge(
            event,
            why,
            rule,
            reasons.allowed(model, mode, number, symbol),
            reasons.story(model, mode, number, symbol),
        )

    def _is_elsewhere(self) -> bool:
        """Whether only the tracepoint has ever seen this connection.

        It sees every network namespace, and what is in another one no capture,
        table or call of this one's shows: it is followed by its transitions alone.
        """
        calls = ex.CALLS_A | ex.CALLS_B
        if (
            self.elsewhere
            or self.sequence is not None
            or self.sees
            or self.mode & calls
            or not (self.mode & ex.SEGMENTS or "states at instants" in self.findings.sources)
        ):
            return False
        self.elsewhere = True
        self.lossy = True
        self.stuck = False
        self.begin_anywhere(self.mode & ~ex.SEGMENTS)
        self.held.clear()
        self.findings.sources.add("transitions in another network namespace (tracepoint)")
        return True

    def diverge(
        self,
        event: Event,
        why: str,
        rule: str,
        allowed: tuple[str, ...] = (),
        story: tuple[str, ...] = (),
    ) -> None:
        """This is the first thing that cannot have been."""
        self.stuck = True
        segments = self.segments[-8:]
        self.divergence = Divergence(
            event.t,
            self.name,
            event_text(event),
            why,
            rule,
            allowed,
            story,
            diagram(
                self.ends[1],
                self.ends[0],
                segments,
                event if isinstance(event, SegmentSeen) else None,
            ),
        )
        if len(self.findings.divergences) < DIVERGENCES_KEPT:
            self.findings.divergences.append(self.divergence)


def _in_two_looks(entries: list[Entry], first: int) -> list[Entry]:
    """The same with each look at both ends as two, `first` the end that was looked at first.

    A table is read row by row: whatever is between the two has happened meanwhile.
    """
    found = []
    for entry in entries:
        t, mode, symbol, event, number = entry
        states = ex.states_of_both(symbol)
        if states is None:
            found.append(entry)
        else:
            looks = (ex.seen_in(end, states[end]) for end in (first, 1 - first))
            found += [(t, mode, look, event, number) for look in looks]
    return found


_IN_ORDER: Final = ex.EVERY | ex.EVERY << 2
BEHIND: Final = ex.SEGMENTS | ex.FULL_SOCKETS  # a tracepoint reports after what it sends
_READS: Final = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSE_WAIT})

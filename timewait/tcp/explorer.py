"""Every state that two endpoints and a bad network can reach, looked at one by one.

A `World` is a pair of connections under one profile, what their users may do,
and how bad the network may be: a segment may be delivered in any order, and so
many of them lost or delivered twice. `explore` walks everything reachable,
breadth first, so that a violation comes with a shortest trace.

Time is not simulated but *ordered*: any running timer may fire at any moment,
with two exceptions that are what the timers are for. A retransmission happens
when nothing else of that side is under way; and 2MSL outlasts every segment in
flight and a peer that still retransmits (but for an answer to an old SYN, which
is no part of the connection), so that when TIME_WAIT is over the network is
empty. `World.time_wait=False` lets TIME_WAIT end at once, and old
duplicates live on: that is the counter-example which TIME_WAIT exists for.

What is checked (`CHECKS`): each endpoint's variables fit its state; nothing is
stuck, so that from everywhere both ends can reach CLOSED once the network
behaves and the users close; TIME_WAIT ends by a named rule only; an orderly
close leaves TIME_WAIT on the side that closed first, on both only if both did;
every byte arrives once and in order; nothing of an old incarnation enters a new
one. A machine that raises has failed as well.

Connections are restored from snapshots, stepped, and interned; a step once
taken is remembered, so that most of the walk is table lookups.
"""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from attrs import evolve, field, frozen

from timewait.tcp.connection import Connection
from timewait.tcp.profiles import Profile
from timewait.tcp.segment import RST, Segment
from timewait.tcp.states import Event, State, Timer
from timewait.tcp.transitions import Row, ignored

__all__ = [
    "CHECKS",
    "WORLDS",
    "Breakage",
    "Found",
    "Violation",
    "World",
    "breakages",
    "excuse",
    "explore",
]

CHECKS: Final = MappingProxyType(
    {
        "inconsistent": "an endpoint's variables do not fit its state",
        "raised": "the machine met what its table says cannot happen",
        "stuck": "both ends can no longer reach CLOSED, though nothing is lost any more",
        "time-wait-cut": "TIME_WAIT ended before 2MSL, and no rule says so",
        "no-time-wait": "an orderly close, and nobody passed TIME_WAIT",
        "both-time-wait": "both sides passed TIME_WAIT, but only one closed first",
        "bytes": "a byte was lost, repeated, or out of order",
        "old-duplicate": "something of an old incarnation entered the new one",
    }
)

# Rules by which TIME_WAIT may end before 2MSL (RFC 9293 §3.10.7.4, §3.10.5; RFC 6191 §2).
_ENDS_TIME_WAIT: Final = frozenset(
    (Event.TIME_WAIT_OVER, Event.RST_EXACT, Event.SYN_REOPENS, Event.ABORT)
)


@frozen
class World:
    """What is explored: the users, and how bad the network may be.

    `calls` are what each user may do, once each, in this order per side: "send"
    (one byte), "shutdown", "close", "abort". Users read whatever comes, unless
    `reading` is false. At most `in_flight` segments are under way at a time:
    what would send more waits until one has arrived. `both_open` has both open
    actively. `reopens` lets the client open a second time, with sequence
    numbers that may be the same again.
    """

    name: str
    client: tuple[str, ...] = ("close",)
    server: tuple[str, ...] = ("close",)
    losses: int = 1
    duplicates: int = 1
    in_flight: int = 4
    reading: bool = True
    both_open: bool = False
    reopens: bool = False
    time_wait: bool = True


WORLDS: Final = (
    World("open-close", losses=1, duplicates=1),
    World("two-losses", losses=2, duplicates=0),
    World("text", ("send", "close"), ("close",), losses=1, duplicates=0),
    World("text-twice", ("send", "close"), ("close",), losses=0, duplicates=1),
    World("text-both-ways", ("send", "shutdown"), ("send", "shutdown"), losses=0, duplicates=0),
    World("half-close", ("shutdown", "close"), ("send", "close"), losses=1, duplicates=0),
    World("abort", ("abort",), ("close",), losses=1, duplicates=1),
    World(
        "abort-text",
        ("send", "abort"),
        ("send", "close"),
        duplicates=0,
        in_flight=3,
        reading=False,
    ),
    World("unread", ("send", "close"), ("close",), reading=False, losses=1, duplicates=0),
    World("both-open", ("close",), ("close",), both_open=True, losses=1, duplicates=0),
    World(
        "both-open-text",
        ("send", "close"),
        ("send", "close"),
        both_open=True,
        losses=0,
        duplicates=0,
        in_flight=3,
    ),
    World("again", ("send", "close"), ("close",), reopens=True, losses=0, duplicates=1),
)


@frozen
class Violation:
    """Something that must not be: which check, in which world, and a shortest way there."""

    check: str
    world: str
    what: str
    trace: tuple[str, ...] = field(repr=False)

    def __str__(self) -> str:
        return "\n".join((f"{self.check}: {self.what} (world: {self.world})", "", *self.trace))


@frozen
class Found:
    """What an exploration met: how many states and transitions, how deep, and what was wrong."""

    states: int
    transitions: int
    depth: int
    seconds: float
    violations: tuple[Violation, ...]
    rows: frozenset[tuple[State, Event]] = field(repr=False)
    complete: bool = True


# A world's state is (client, server, network, history): numbers of interned snapshots,
# a sorted tuple of segments under way, and the bits below.
_SIDE: Final = 1  # segment number * 2 + the side that sent it
_TW, _ACTIVE = (1, 2), (4, 8)
_DISORDERLY, _SECOND = 16, 32
_DONE = (6, 9)  # how many of its calls a side has made: 3 bits each
_GOT = (12, 14)  # how many bytes a side has received: 2 bits each
_LOST, _DOUBLED = 16, 19  # 3 bits each

_CALL, _TIMER, _REOPEN, _NEW = 0, 8, 16, 24  # a step's input, below the segments' numbers
_CALLS: Final = ("send", "shutdown", "close", "abort")
_LEAVES: Final = ("close", "abort")  # whoever has called that reads no more
_ISS: Final = (100, 300)
# Of the second incarnation. The client's: the same again, or above all that was used.
# The server's: others while the client is not done, or the same again.
_SECOND_ISS: Final = ((100, 2100), (1300, 300))
_BYTES: Final = (b"a", b"b")


class _Endpoints:
    """Interned snapshots and segments, and every step taken so far."""

    def __init__(self, profile: Profile, world: World) -> None:
        # No clock runs: what depends on one is held still, so that states meet again.
        steady = evolve(
            profile.parameters,
            rto_initial=1.0,
            rto_after_lost_syn=1.0,
            rto_min=1.0,
            rto_max=1.0,
            synack_rto_max=1.0,
            orphan_until_rto_max=False,
            rto_floor_on_variance=False,
            challenge_interval=0.0,
            challenge_most=1,
            retries=float("inf"),
            quick_acks=0,
            tail_loss_probe=False,
            syn_give_up_after=float("inf"),
            timestamps=False,
        )
        self.profile = evolve(profile, parameters=steady)
        self.world = world
        self.sends = (world.client.count("send"), world.server.count("send"))
        self.snapshots: list[tuple[Any, ...]] = []
        self.states: list[State] = []
        self.numbers: dict[tuple[Any, ...], int] = {}
        self.segments: list[Segment] = []
        self.segment_numbers: dict[Segment, int] = {}
        self.steps: list[dict[int, Any]] = []
        self.timers: list[tuple[int, ...]] = []
        self.rows: set[tuple[State, Event]] = set()
        self._note_rows()
        self._changes: list[tuple[State, State, Event]] = []

    def _note_rows(self) -> None:
        """Let every cell of the table say when it is used."""
        Connection(self.profile, iss=0)  # compiles the table
        for state, cells in zip(State, self.profile.compiled, strict=True):
            for event in Event:
                new, onwards, perform, changes = cells[event]
                noting = partial(_note, self.rows, (state, event), perform)
                cells[event] = (new, onwards, noting, changes)

    def intern(self, connection: Connection) -> int:
        connection.retransmits = 0
        connection.srtt = connection.first_sent = connection._rtt_seq = None
        connection.rttvar = connection._rtt_at = 0.0
        connection.rto = 1.0
        connection._recover = None
        connection._ends = ()
        connection._flow = False  # there is never so much in flight
        connection._frto = False
        connection.last_challenge = connection._last_text = connection.heard = -1.0
        connection.challenges = 0
        if connection.state is State.CLOSED:
            # Nothing of it matters any more but that it answers with RSTs.
            bare = Connection(self.profile, iss=0)
            bare.orphaned = connection.orphaned
            bare.error = connection.error
            bare.fin_received = connection.fin_received
            bare.snd_nxt = connection.snd_nxt
            bare.write_shut = True
            connection = bare
        snapshot = connection.snapshot()
        number = self.numbers.get(snapshot)
        if number is None:
            number = self.numbers[snapshot] = len(self.snapshots)
            self.snapshots.append(snapshot)
            self.states.append(connection.state)
            self.steps.append({})
            self.timers.append(tuple(int(timer) for timer in connection.timers))
        return number

    def number_of(self, segment: Segment) -> int:
        number = self.segment_numbers.get(segment)
        if number is None:
            number = self.segment_numbers[segment] = len(self.segments)
            self.segments.append(segment)
        return number

    def fresh(self, side: int, iss: int) -> Connection:
        return Connection(self.profile, iss=iss, mss=1000, rcv_buf=4000)

    def take(self, snapshot: int, what: int, side: int) -> Any:
        """One step of one endpoint: (snapshot, sent, history bits, read, wrong), or None."""
        connection = Connection.restore(self.profile, self.snapshots[snapshot])
        old = connection.state
        changes = self._changes
        changes.clear()
        connection.on_transition = lambda a, b, event, _now: changes.append((a, b, event))
        wrong: str | None = None
        read = b""
        try:
            if what >= _NEW:
                connection.segment(self.segments[what - _NEW], 0.0)
            elif what >= _REOPEN:
                return self._again(connection, side, what - _REOPEN)
            elif what >= _TIMER:
                self._fire(connection, Timer(what - _TIMER))
            else:
                self._call(connection, what, side)
            if self.world.reading and connection.readable_bytes:
                read = connection.receive(100, 0.0)
        except OSError:
            return None  # the call is refused: nothing has changed
        except AssertionError as impossible:
            wrong = f"raised: {impossible}"
        bits = 0
        for before, after, event in changes:
            if after is State.TIME_WAIT:
                bits |= _TW[side]
            elif after is State.FIN_WAIT_1:
                bits |= _ACTIVE[side]
            if before is State.TIME_WAIT and event not in _ENDS_TIME_WAIT:
                wrong = wrong or f"time-wait-cut: {before} -> {after} ({event})"
        sent = []
        for segment in connection.out:
            if segment.flags & RST:
                bits |= _DISORDERLY
            sent.append(self.number_of(segment) * 2 + side)
        if wrong is None:
            inconsistency = _inconsistency(connection, self.sends[side], self.sends[1 - side])
            if connection.state is State.CLOSED and what >= _TIMER and not inconsistency:
                inconsistency = _silent_end(connection, old)
            if what < _TIMER and _CALLS[what] in _LEAVES and not connection.orphaned:
                inconsistency = "its user has gone, which it does not know"
            if inconsistency:
                wrong = f"inconsistent: {old} -> {connection.state}: {inconsistency}"
        return (self.intern(connection), tuple(sent), bits, read, wrong)

    def _again(self, connection: Connection, side: int, choice: int) -> Any:
        again = self.fresh(side, _SECOND_ISS[side][choice])
        if side:
            again.open_passive(0.0)
        else:
            again.open_active(0.0)
        sent = tuple(self.number_of(segment) * 2 + side for segment in again.out)
        return (self.intern(again), sent, 0, b"", None)

    def _call(self, connection: Connection, what: int, side: int) -> None:
        name = _CALLS[what]
        if name == "send":
            if connection.state not in (State.ESTABLISHED, State.CLOSE_WAIT):
                raise OSError
            connection.send(_BYTES[side], 0.0)
        elif connection.state is State.LISTEN:
            raise OSError
        else:
            getattr(connection, name)(0.0)

    def _fire(self, connection: Connection, timer: Timer) -> None:
        # One timeout is like another: it never comes to giving up.
        connection.first_sent = None
        connection.timeout(timer, 0.0)


def _note(
    rows: set[tuple[State, Event]],
    cell: tuple[State, Event],
    perform: Callable[..., None],
    *given: object,
) -> None:
    rows.add(cell)
    perform(*given)


_INF: Final = float("inf")
_FIN_SEEN: Final = (State.CLOSE_WAIT, State.CLOSING, State.LAST_ACK, State.TIME_WAIT)
_FIN_OURS: Final = (
    State.FIN_WAIT_1,
    State.FIN_WAIT_2,
    State.CLOSING,
    State.LAST_ACK,
    State.TIME_WAIT,
)


def _inconsistency(c: Connection, sends: int, receives: int) -> str | None:
    """What does not fit the connection's state, None where all does.

    `sends` and `receives` are how many bytes can go either way.
    """
    state = c.state
    flight = (c.snd_nxt - c.snd_una) & 0xFFFFFFFF
    if state is State.LISTEN and not c.passive:
        return "nobody asked it to listen"
    if state is State.CLOSED or state is State.LISTEN:
        return "a timer runs" if c.timers else None
    if state is State.SYN_SENT or state is State.SYN_RECEIVED:
        if c.t_retransmit == _INF:
            return "nothing would send the SYN again"
        return None if c.snd_una == c.iss else "its SYN is acknowledged already"
    if c.fin_received != (state in _FIN_SEEN):
        return "the peer's FIN has been received" if c.fin_received else "no FIN was received"
    if c.write_shut != (state in _FIN_OURS):
        return "it is closed" if c.write_shut else "the user has not closed"
    if not 0 <= ((c.rcv_nxt - c.irs) & 0xFFFFFFFF) - 1 - c.fin_received <= receives:
        return "RCV.NXT counts more than came"
    if not 0 <= ((c.snd_nxt - c.iss) & 0xFFFFFFFF) - 1 - (c._fin == 2) <= sends:
        return "SND.NXT counts more than was sent"
    if state is State.TIME_WAIT:
        if c.t_wait != c.profile.parameters.time_wait:
            return "2MSL does not run"
        return "our FIN is not acknowledged" if flight else None
    if state is State.FIN_WAIT_2:
        if flight:
            return "our FIN is not acknowledged"
        limited = c.orphaned and c.profile.parameters.fin_wait_2 is not None
        if limited and c.t_wait == c.t_keepalive == _INF:
            return "an orphan's limit does not run"
    elif c.t_wait != _INF:
        return "2MSL or an orphan's limit runs"
    if flight and c.t_retransmit == _INF:
        return "nothing would retransmit"
    if not flight and c.t_retransmit != _INF:
        return "it retransmits what is acknowledged"
    if state in (State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK) and not flight:
        return "its FIN is neither under way nor waited for"
    if flight > 100 or (c.snd_una == c.iss and state is not State.FIN_WAIT_1):
        return "its SYN is not acknowledged"
    return None


def _silent_end(c: Connection, old: State) -> str | None:
    """A connection that ends by itself ends in both directions, or the user is told why."""
    told = c.orphaned or c.error is not None or (c.fin_received and c.write_shut)
    embryo = c.passive and old is State.SYN_RECEIVED
    return None if told or embryo or old is State.CLOSED else "it is over, and nobody was told"


_PROGRAMS = {name: number for number, name in enumerate(_CALLS)}
_TIME_WAIT_TIMER = int(Timer.WAIT)
_TIMER_RETRANSMIT = int(Timer.RETRANSMIT)


def explore(
    profile: Profile, world: World, *, most: int = 1_000_000, first_only: bool = False
) -> Found:
    """Walk everything reachable in `world`, at most `most` states.

    `first_only` stops at the first violation.
    """
    with _nothing_collected():
        return _explore(profile, world, most, first_only)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Everything here is kept to the end and nothing is cyclic: looking for garbage is in vain."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _explore(profile: Profile, world: World, most: int, first_only: bool) -> Found:
    started = time.perf_counter()
    ends = _Endpoints(profile, world)
    take, all_steps, states, timers = ends.take, ends.steps, ends.states, ends.timers
    client, server = ends.fresh(0, _ISS[0]), ends.fresh(1, _ISS[1])
    if world.both_open:
        server.open_active(0.0)
    else:
        server.open_passive(0.0)
    client.open_active(0.0)
    net = sorted(
        ends.number_of(segment) * 2 + side
        for side, end in enumerate((client, server))
        for segment in end.out
    )
    programs = tuple(
        tuple(_PROGRAMS[name] for name in program) for program in (world.client, world.server)
    )
    start = (ends.intern(client), ends.intern(server), tuple(net), 0)
    numbers = {start: 0}
    order = [start]
    parents, labels, depths = array("l", [-1]), array("l", [0]), array("h", [0])
    good_from, good_to = array("l"), array("l")
    goals: list[int] = []
    transitions, in_flight = 0, world.in_flight
    violations: list[Violation] = []
    blamed: set[str] = set()
    complete = True

    def blame(number: int, label: int, what: str) -> None:
        check, _, why = what.partition(": ")
        if check in blamed:
            return
        blamed.add(check)
        path = [] if label < 0 else [(number, label)]
        while number > 0:
            path.append((parents[number], labels[number]))
            number = parents[number]
        trace = _draw(ends, order, path[::-1], world)
        violations.append(Violation(check, world.name, why, trace))

    # Labels: kind * 2**20 + detail.
    deliver, lose, double, call, timer_, reopen = (kind << 20 for kind in range(6))
    number = 0
    while number < len(order):
        here = order[number]
        ids = (here[0], here[1])
        net_now, history = here[2], here[3]
        moves: list[tuple[int, int, Any, tuple[int, ...], int, bool]] = []
        # A move: (label, side that steps, its step, the network before it sends, history, good).
        for packed in net_now:
            side = 1 - (packed & 1)
            steps = all_steps[ids[side]]
            what = _NEW + (packed >> 1)
            step = steps.get(what, 0)
            if step == 0:
                step = steps[what] = take(ids[side], what, side)
            rest = tuple([other for other in net_now if other != packed])
            moves.append((deliver + packed, side, step, rest, history, True))
            if (history >> _LOST & 7) < world.losses:
                moves.append((lose + packed, -1, None, rest, history + (1 << _LOST), False))
            if (history >> _DOUBLED & 7) < world.duplicates:
                moves.append(
                    (double + packed, side, step, net_now, history + (1 << _DOUBLED), False)
                )
        for side in (0, 1):
            steps = all_steps[ids[side]]
            done = history >> _DONE[side] & 7
            if done < len(programs[side]) and not history & _SECOND:
                what = programs[side][done]
                step = steps.get(what, 0)
                if step == 0:
                    step = steps[what] = take(ids[side], what, side)
                if step is not None:
                    label = call + what * 2 + side
                    more = history + (1 << _DONE[side])
                    if what == 3:
                        more |= _DISORDERLY
                    moves.append((label, side, step, net_now, more, True))
                elif what == 0 and states[ids[side]] not in _OPENING:
                    # There is nobody to send to any more: the user goes on to close.
                    more = history + (1 << _DONE[side])
                    moves.append((call + 14 + side, -1, None, net_now, more, True))
            for timer in timers[ids[side]]:
                if timer == _TIMER_RETRANSMIT and any(other & 1 == side for other in net_now):
                    continue
                if timer == _TIME_WAIT_TIMER:
                    before = net_now
                    if world.time_wait or states[ids[side]] is State.FIN_WAIT_2:
                        peer = ids[1 - side]
                        if (
                            _TIMER_RETRANSMIT in timers[peer]
                            and states[peer] is not State.SYN_RECEIVED
                        ):
                            continue  # the peer's retransmissions are not over yet
                        before = ()
                else:
                    before = net_now
                what = _TIMER + timer
                step = steps.get(what, 0)
                if step == 0:
                    step = steps[what] = take(ids[side], what, side)
                moves.append((timer_ + timer * 2 + side, side, step, before, history, True))
            if (
                world.reopens
                and states[ids[side]] is State.CLOSED
                and not history & (_SECOND | _DISORDERLY)
                and history >> _DONE[side] & 7 == len(programs[side])
            ):
                if side == 1:
                    step = take(ids[1], _REOPEN + (states[ids[0]] is State.CLOSED), 1)
                    moves.append((reopen + 1, 1, step, net_now, history, True))
                elif states[ids[1]] in (State.LISTEN, State.TIME_WAIT):
                    # The same numbers come round again only after TIME_WAIT.
                    for choice in (0, 1) if states[ids[1]] is State.LISTEN else (1,):
                        step = take(ids[0], _REOPEN + choice, 0)
                        moves.append(
                            (reopen + 2 * choice, 0, step, net_now, history | _SECOND, True)
                        )
        for label, side, step, before, more, good in moves:
            transitions += 1
            if side < 0:
                there = (ids[0], ids[1], before, more)
                wrong = None
            elif step is None:
                continue
            else:
                new, sent, bits, read, wrong = step
                more |= bits
                if sent:
                    before = tuple(sorted({*before, *sent}))
                    if len(before) > in_flight and len(before) > len(net_now):
                        continue
                if read and wrong is None:
                    wrong, more = _read(read, side, more)
                there = (new, ids[1], before, more) if side == 0 else (ids[0], new, before, more)
            if wrong is not None:
                blame(number, label, wrong)
                if first_only:
                    break
                continue
            seen = numbers.get(there)
            if seen is None:
                if len(order) >= most:
                    complete = False
                    continue
                seen = numbers[there] = len(order)
                order.append(there)
                parents.append(number)
                labels.append(label)
                depths.append(depths[number] + 1)
                one, other = states[there[0]], states[there[1]]
                if one in _OVER and other in _OVER and not before:
                    goals.append(seen)
                    wrong = _at_the_end(there, states, world, programs)
                elif more & _SECOND:
                    if one is other is State.ESTABLISHED:
                        goals.append(seen)
                    wrong = _in_the_second(there, states)
                if wrong is not None:
                    blame(seen, -1, wrong)
            if good:
                good_from.append(number)
                good_to.append(seen)
        if violations and first_only:
            break
        number += 1
    if complete and not violations:
        stuck = _stuck(len(order), goals, good_from, good_to)
        if stuck is not None:
            here = order[stuck]
            blame(stuck, -1, f"stuck: {states[here[0]]} and {states[here[1]]} for ever")
    return Found(
        len(order),
        transitions,
        max(depths),
        time.perf_counter() - started,
        tuple(violations),
        frozenset(ends.rows),
        complete,
    )


_OVER: Final = (State.CLOSED, State.LISTEN)
_OPENING: Final = (State.LISTEN, State.SYN_SENT, State.SYN_RECEIVED)


def _read(read: bytes, side: int, history: int) -> tuple[str | None, int]:
    """Bytes were read: they must be the peer's, each once."""
    if history & _SECOND:
        return f"old-duplicate: the new incarnation received {read!r}", history
    if read != _BYTES[1 - side] or history >> _GOT[side] & 3:
        return f"bytes: {read!r} was received, more than once or never sent", history
    return None, history + (1 << _GOT[side])


def _at_the_end(
    there: tuple[Any, ...], states: list[State], world: World, programs: Any
) -> str | None:
    """Both ends are closed and nothing is under way: was it done properly?"""
    history = there[3]
    if history & (_DISORDERLY | _SECOND) or not history & (_ACTIVE[0] | _ACTIVE[1]):
        return None
    one, other = history & _TW[0], history & _TW[1]
    if not one and not other:
        return "no-time-wait: both are closed"
    if one and other and not (history & _ACTIVE[0] and history & _ACTIVE[1]):
        return "both-time-wait: though only one closed first"
    if world.reading:
        for side in (0, 1):
            sends = sum(1 for what in programs[1 - side] if what == 0)
            if sends and (history >> _GOT[side] & 3) != sends:
                return f"bytes: {'server' if side else 'client'} did not receive all that was sent"
    return None


def _in_the_second(there: tuple[Any, ...], states: list[State]) -> str | None:
    """In the second incarnation nobody has closed: no FIN can have been sent."""
    for side in (0, 1):
        if states[there[side]] in (State.CLOSE_WAIT, State.LAST_ACK):
            return "old-duplicate: the new incarnation took the old one's FIN"
    return None


def _stuck(count: int, goals: list[int], source: array[int], target: array[int]) -> int | None:
    """The first state from which no good move leads to a goal, None where there is none."""
    reachable = bytearray(count)
    heads = array("l", [-1]) * count
    following = array("l", bytes(heads.itemsize * len(source)))
    for edge, to in enumerate(target):
        following[edge] = heads[to]
        heads[to] = edge
    stack = list(goals)
    for goal in goals:
        reachable[goal] = 1
    while stack:
        edge = heads[stack.pop()]
        while edge >= 0:
            before = source[edge]
            if not reachable[before]:
                reachable[before] = 1
                stack.append(before)
            edge = following[edge]
    first = reachable.find(0)
    return None if first < 0 else first


def _draw(
    ends: _Endpoints,
    order: list[tuple[Any, ...]],
    path: list[tuple[int, int]],
    world: World,
) -> tuple[str, ...]:
    """A path as a sequence diagram: the client on the left, the server on the right."""
    width = 44
    lines = [f"{'client':<14}{'':{width}}{'server':>14}"]

    def row(here: tuple[Any, ...], middle: str) -> str:
        one, other = ends.states[here[0]], ends.states[here[1]]
        return f"{one!s:<14}{middle:^{width}}{other!s:>14}"

    lines.append(row(order[0], ""))
    for index, (number, label) in enumerate(path):
        here = order[number]
        after = order[path[index + 1][0]] if index + 1 < len(path) else None
        kind, detail = label >> 20, label & 0xFFFFF
        if kind <= 2:
            text = str(ends.segments[detail >> 1])
            to_server = detail & 1 == 0
            if kind == 1:
                middle = f"--- {text} --X " if to_server else f" X-- {text} ---"
            else:
                again = "(and again) " if kind == 2 else ""
                middle = f"--- {again}{text} -->" if to_server else f"<-- {again}{text} ---"
        elif kind == 3:
            name = "gives up sending" if detail >= 14 else f"{_CALLS[detail >> 1]}()"
            middle = f"{name:<{width}}" if detail & 1 == 0 else f"{name:>{width}}"
        elif kind == 4:
            name = f"[{Timer(detail >> 1)} timeout]"
            middle = f"{name:<{width}}" if detail & 1 == 0 else f"{name:>{width}}"
        else:
            middle = f"{'listens again':>{width}}" if detail == 1 else f"{'opens again':<{width}}"
        if after is not None:
            lines.append(row(after, middle))
        else:
            side = _stepping(kind, detail)
            step = ends.steps[here[side]].get(_input(kind, detail)) if side >= 0 else None
            if step:
                both = [here[0], here[1]]
                both[side] = step[0]
                lines.append(row(tuple(both), middle))
            else:
                lines.append(f"{'':14}{middle:^{width}}")
    return tuple(line.rstrip() for line in lines)


def _stepping(kind: int, detail: int) -> int:
    return 1 - (detail & 1) if kind <= 2 else detail & 1


def _input(kind: int, detail: int) -> int:
    if kind <= 2:
        return _NEW + (detail >> 1)
    return (detail >> 1) + (_TIMER if kind == 4 else _CALL)


@frozen
class Breakage:
    """The table with one row changed: a machine that should be found out."""

    cell: tuple[State, Event]
    change: str
    row: Row

    def __str__(self) -> str:
        return f"{self.cell[0]} x {self.cell[1]}: {self.change}"

    def apply(self, profile: Profile) -> Profile:
        """`profile` with this row in its table."""
        rows = {**profile.differences, self.cell: self.row}
        return evolve(profile, name=f"{profile.name}, broken", differences=rows)


# What the worlds cannot notice, and why: (events or None for any, changes, the reason).
_EXCUSES: Final[tuple[tuple[frozenset[Event] | None, tuple[str, ...], str], ...]] = (
    (
        frozenset((Event.OPEN_PASSIVE, Event.OPEN_ACTIVE)),
        ("",),
        "both OPENs are done when a world begins",
    ),
    (
        frozenset(
            (
                Event.SYN_UNEXPECTED,
                Event.UNACCEPTABLE,
                Event.RST_IN_WINDOW,
                Event.SYN_AGAIN,
                Event.ACK_OF_UNSENT,
                Event.ACK_TOO_OLD,
                Event.FIN_AGAIN,
            )
        ),
        ("ignored", "without ack_", "without challenge", "without reset", "without send_"),
        "this answer only hastens what a retransmission brings about as well",
    ),
    (None, ("without restart_time_wait",), "time is put in order here, not measured"),
    (
        None,
        ("without acknowledge", "without send_ack", "without send_text"),
        "it goes with the next segment, or in answer to the retransmission",
    ),
    (
        frozenset((Event.SEGMENT, Event.ACK_OF_SYN, Event.SYN)),
        ("ignored", "stays"),
        "the next segment does the same",
    ),
    (
        None,
        ("without establish", "without give_text"),
        "it concerns measured times and a nearly full window, which do not occur here",
    ),
    (
        frozenset((Event.RECEIVE,)),
        ("",),
        "it would only tell the peer of a window that was nearly full",
    ),
    (
        frozenset((Event.RST_TO_PASSIVE,)),
        ("to CLOSED",),
        "it is what stacks do: the listener is another socket",
    ),
    (
        frozenset((Event.FIN_AND_ACK_OF_SYN,)),
        ("to LAST_ACK",),
        "both closed first, and the other side's TIME_WAIT is enough",
    ),
    (
        frozenset((Event.RST_EXACT, Event.RST_TO_PASSIVE)),
        ("ignored", "stays"),
        "its own next segment, or its user's close, is answered by another RST",
    ),
    (None, ("without report",), "the user has closed: there is nobody to tell"),
    (None, ("without forget",), "no timer runs and no text waits there in these worlds"),
    (
        None,
        ("without send_rst", "without reset_reply"),
        "the peer's next segment is answered by a RST",
    ),
)


def excuse(breakage: Breakage) -> str | None:
    """Why no world can notice this breakage, None where it should be noticed."""
    for events, changes, reason in _EXCUSES:
        if (events is None or breakage.cell[1] in events) and breakage.change.startswith(changes):
            return reason
    return None


def breakages(profile: Profile, cells: Iterable[tuple[State, Event]]) -> Iterator[Breakage]:
    """Every way to break one of these cells: ignored, led elsewhere, or one action left out."""
    for cell in sorted(cells):
        row = profile.table[cell]
        if row.kind != "go":
            continue
        if row.next is not None or row.actions:
            yield Breakage(cell, "ignored", ignored(row.source))
        if row.next is not None:
            yield Breakage(cell, f"stays, not {row.next}", evolve(row, next=None, via=None))
            for state in State:
                if state not in (row.next, cell[0]):
                    broken = evolve(row, next=state, via=None)
                    yield Breakage(cell, f"to {state}, not {row.next}", broken)
        for action in row.actions:
            actions = tuple(name for name in row.actions if name != action)
            yield Breakage(cell, f"without {action}", evolve(row, actions=actions))

"""Follows a stream of events, connection by connection, and says what cannot have been.

A connection costs a small object while it lasts and is forgotten when it has
ended; what one event costs does not depend on how many others are open. The
protocol's rules are in the profiles' tables, walked by
`timewait.check.explanations`; sequence numbers are `timewait.check.sequence`'s;
here is what ties them to addresses, observers and clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from heapq import heappop, heappush
from itertools import count
from typing import Any, Final, NamedTuple

from attrs import define, field

from timewait.check import explanations as ex
from timewait.check import reasons
from timewait.check.binds import RULE, Binds, Holder, Options
from timewait.check.explanations import Explanations
from timewait.check.order import Entry, in_any_order, lane
from timewait.check.sequence import DROPPED, Contradiction, Sequence
from timewait.check.verdict import (
    Divergence,
    Evidence,
    Verdict,
    address_text,
    diagram,
    event_text,
)
from timewait.events import (
    Address,
    Called,
    Event,
    Lost,
    Restart,
    Row,
    RunStarted,
    SegmentSeen,
    Snapshot,
    Transition,
)
from timewait.tcp.profiles import Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN
from timewait.tcp.states import Event as Tcp
from timewait.tcp.states import State

__all__ = ["Checker", "Connection", "check", "check_events"]

Profiles = Mapping[str, "str | Profile"]

_LATE: Final = 0.18  # the shortest retransmission timeout (Linux: TCP_RTO_MIN, less a jiffy)
_KEPT: Final = 32  # events kept per connection for the story of a divergence
# Linux's timer wheel fires up to a step late: 512 ticks of 4 ms for 60 s at HZ=250.
_TIMER_STEP: Final = 0.05
_WHEEL: Final = 2.2
_CLOCKS: Final = 0.05  # how far two observers' clocks and looks may be apart
_BEHIND_BY: Final = 0.005  # after so long a tracepoint has reported what segments show
_LOOKED_UP: Final = 1.0  # reading a table, twice, may take so long where processors are wanted
_DIVERGENCES_KEPT: Final = 1000


class _Begun(NamedTuple):
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
    # What was seen since a quiet moment, after which set; and what is not explained yet.
    base: int = 0
    untangled: bool = False  # the last observation was put into another order
    history: list[Entry] = field(factory=list)
    held: list[Entry] = field(factory=list)
    elsewhere: bool = False  # in another network namespace, as far as can be told
    lossy: bool = False  # some of its segments were missed
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


class Checker:
    """Feed it events in the order of their times; ask for the verdict when they end.

    `profiles` names the profile of each role ("server", "client"), or is
    those profiles; a `RunStarted` in the stream sets those not given.
    `window` is by how many seconds an observer may report late; without
    `explain` a divergence is found and not explained, which is quicker.
    `on_end` is called with each `Connection` that is finished with.
    """

    def __init__(
        self,
        profiles: Profiles | None = None,
        *,
        window: float = 1.0,
        explain: bool = True,
        on_end: Callable[[Connection], object] | None = None,
    ) -> None:
        self._window = window
        self._explains = explain
        self._waiting: deque[tuple[float, Event | _Begun]] = deque()
        self._done = float("-inf")
        self._ending: list[tuple[float, int, Connection]] = []  # a heap
        self._ended = count()
        self._forgotten = False
        self._given = dict(profiles or {})
        self._on_end = on_end
        self._ends: dict[tuple[Address, Address], tuple[Connection, int]] = {}
        self._listening: set[Address] = set()
        self._listeners: dict[Address, State] = {}
        self._profiles: tuple[Profile, Profile]
        self._model: Explanations
        self._from_start = False
        self._declared = self._declared_segments = 0
        self._count = 0
        self._connections = 0
        self._divergences: list[Divergence] = []
        self._strong = self._partial = 0
        self._lost = 0
        self._problems: list[str] = []
        self._sources: set[str] = set()
        self._blind: tuple[str, ...] = ()
        self._take: dict[type, Callable[[Any], None]] = {
            Transition: self._transition,
            SegmentSeen: self._segment,
            Snapshot: self._snapshot,
            Called: self._called,
            Restart: self._restarted,
            _Begun: self._begun,
            RunStarted: self._started,
            Lost: self._missed,
        }
        self._binds = Binds()
        self._port: int | None = None
        self._choose_profiles({})

    # The stream.

    def feed(self, event: Event) -> None:
        """Take the next event. Observers may report up to a second late (`window`)."""
        self._count += 1
        t = event.t
        waiting = self._waiting
        if type(event) is RunStarted:
            self._drain()  # another run has a clock of its own
            self._done = float("-inf")
        if type(event) is Called and event.began is not None and event.remote is not None:
            self._insert(event.began, _Begun(event.began, event))
        if not waiting or t >= waiting[-1][0]:
            waiting.append((t, event))
        else:
            self._insert(t, event)
        before = waiting[-1][0] - self._window
        while waiting[0][0] < before:
            self._dispatch(*waiting.popleft())

    def _insert(self, t: float, event: Event | _Begun) -> None:
        """Put an event where its time is, behind those of the same time.

        A call's beginning goes before them, as far as the call before: what it
        caused may bear the very same time, where time is virtual.
        """
        waiting = self._waiting
        if t < self._done:
            what = event.call if isinstance(event, _Begun) else event
            self._late(what)
            return
        place = len(waiting)
        first = isinstance(event, _Begun)
        while place and (
            waiting[place - 1][0] > t
            or (first and waiting[place - 1][0] == t and not _is_call(waiting[place - 1][1]))
        ):
            place -= 1
        waiting.insert(place, (t, event))

    def _late(self, event: Event) -> None:
        self._problems.append(
            f"{event_text(event)} at {event.t:.6f} s comes after events of {self._done:.6f} s: "
            "out of order, left out"
        )

    def _dispatch(self, t: float, event: Event | _Begun) -> None:
        self._done = t
        ending = self._ending
        while ending and ending[0][0] < t:
            self._forget(heappop(ending)[2])
        take = self._take.get(type(event))
        if take is not None:
            take(event)

    def _drain(self) -> None:
        while self._waiting:
            self._dispatch(*self._waiting.popleft())

    def verdict(self, problems: Iterable[str] = ()) -> Verdict:
        """What the events so far amount to; `problems` are faults of the evidence to tell of."""
        self._drain()
        self._problems[:0] = problems
        for connection in self.connections():
            self._conclude(connection)
        return Verdict(self._evidence(), tuple(self._divergences))

    def _conclude(self, connection: Connection) -> None:
        """Nothing more will be seen of it."""
        self._settle(connection)
        if connection.held:
            self._untangle(connection, float("inf"))
        if (
            connection.mode & _BEHIND == _BEHIND
            and connection.divergence is None
            and self._done - connection.last > _BEHIND_BY
        ):
            self._all_reported(connection, connection.number, None)
        if connection.divergence is None and self._done - connection.last > _LATE:
            self._all_delivered(connection, connection.number, None)
        self._end(connection)

    def connections(self) -> list[Connection]:
        """The connections not yet forgotten."""
        return list({id(c): c for c, _ in self._ends.values()}.values())

    # Events.

    def _started(self, event: RunStarted) -> None:
        for connection in self.connections():
            self._settle(connection)
            self._end(connection)
        self._ends.clear()
        self._ending.clear()
        self._listening.clear()
        self._listeners.clear()
        self._forgotten = False
        self._choose_profiles(event.profiles)
        self._blind = event.blind
        self._from_start = True
        self._binds = Binds()
        self._port = (event.scenario or {}).get("port")
        words = set(event.observer.replace("+", " ").replace(",", " ").split())
        self._declared = 0
        if "tracepoint" in words:
            self._declared = ex.FULL_SOCKETS
        if event.stack == "model" and "model" in words:
            self._declared = ex.EVERY
        seen = {"model", "capture", "wire"} & words
        self._declared_segments = ex.SEGMENTS if seen else 0

    def _choose_profiles(self, named: Mapping[str, str]) -> None:
        chosen = {"server": "linux", "client": "linux", **named, **self._given}
        server, client = (
            p if isinstance(p, Profile) else profile(p)
            for p in (chosen["server"], chosen["client"])
        )
        self._profiles = (server, client)
        self._model = _model(server, client)

    def _transition(self, event: Transition) -> None:
        found = self._ends.get((event.local, event.remote))
        if found is None:
            if event.remote[1] == 0 or event.local[1] == 0 or event.remote[0] in ("*", ""):
                self._listener(event)
                return
            if event.new == event.old or (event.new is State.LISTEN and event.old is State.CLOSED):
                return
            found = self._begin(
                event.local, event.remote, _passive(event.old, event.new, event.source)
            )
        connection, end = found
        if event.new is State.SYN_SENT and connection.facts:
            connection = self._used_again(connection)
        if event.sampled or event.source not in _EXACT:
            self._sources.add("states at instants")
            self._look(connection, end, event.new, event)
            return
        how = _EXACT[event.source]
        if not connection.mode >> 2 * end & 3:
            connection.mode |= how << 2 * end
            self._sources.add(f"every transition ({event.source})")
        if connection.waiting is not None:
            self._settle(connection)
        self._advance(
            connection,
            512 | end << 8 | _PEERLESS[event.old] << 4 | _PEERLESS[event.new],
            event,
        )

    def _listener(self, event: Transition) -> None:
        """A socket without a peer: it listens, or it does not."""
        if event.local[1] == 0:
            return
        all_seen = self._declared and self._from_start
        known = self._listeners.get(event.local, State.CLOSED if all_seen else event.old)
        self._listeners[event.local] = event.new
        if event.new is State.LISTEN:
            self._listening.add(event.local)
        if known is not event.old:
            why = f"it was {known}, not {event.old}"
        elif not any(
            row.kind == "go" and row.next is event.new
            for (state, what), row in self._profiles[0].table.items()
            if state is event.old and what in _WITHOUT_PEER
        ):
            why = f"no call leads from {event.old} to {event.new}"
        else:
            return
        self._wrong_bind(event, event.local, why, f"{_OPENED} (profile {self._profiles[0].name})")

    def _listens(self, event: Called) -> None:
        """A listener was opened or closed: every transition being seen, this was seen too."""
        assert event.local is not None
        state = State.LISTEN if event.call == "listen" else State.CLOSED
        known = self._listeners.get(event.local, State.CLOSED)
        if self._declared and event.errno is None and known is not state and self._from_start:
            self._wrong_bind(event, event.local, f"its socket is {known}, not {state}", _OPENED)

    def _segment(self, event: SegmentSeen) -> None:
        found = self._ends.get((event.src, event.dst))
        if found is None:
            found = self._begin(
                event.src, event.dst, bool(event.flags & ACK) if event.flags & SYN else None
            )
        connection, end = found
        sequence = connection.sequence
        if (
            event.flags & (SYN | ACK | RST | FIN) == SYN
            and sequence is not None
            and sequence.is_new(end == 1, event.seq)
        ):
            connection = self._used_again(connection, ex.RST_DUE if sequence.whole else 0, end)
            sequence = connection.sequence
        if sequence is None:
            here = _same_host(*connection.ends)
            exact = event.source in ("model", "wire") or (here and self._from_start)
            sequence = connection.sequence = Sequence(
                exact,
                here and not exact,
                (self._profiles[0].parameters.rto_min, self._profiles[1].parameters.rto_min),
                (
                    self._profiles[0].parameters.linux_checks,
                    self._profiles[1].parameters.linux_checks,
                ),
            )
            if event.flags & (SYN | ACK | RST | FIN) == SYN and not connection.history:
                # A SYN is the beginning, unless what follows says otherwise.
                connection.number = self._model.start(connection.mode | ex.SEGMENTS)
                connection.presumed = not self._from_start
            self._sources.add("segments")
        if not sequence.exact and sequence.is_copy(
            end == 1, event.flags, event.seq, event.ack, event.length, event.t
        ):
            return
        connection.segments.append(event)
        if len(connection.segments) > _KEPT:
            del connection.segments[: _KEPT // 2]
        if connection.waiting is not None:
            self._settle(connection)
        if connection.divergence is not None:
            return
        seen = connection.mode & ex.SEGMENTS
        if not connection.lossy:
            connection.mode |= ex.SEGMENTS
        try:
            kind = sequence.take(
                end == 1,
                event.flags,
                event.seq,
                event.ack,
                event.length,
                event.t,
                event.window,
            )
        except Contradiction as wrong:
            self._diverge(connection, event, str(wrong), wrong.rule)
            return
        if sequence.suspicion is not None and connection.suspect is None:
            connection.suspect = event
        if event.lost:
            kind |= DROPPED
        if connection.lossy or (event.flags & RST and not seen and not self._from_start):
            return  # What it is about, or answers, may have been missed.
        if not event.flags & RST and sequence.is_overtaken(end == 1, kind, event.t):
            return
        self._advance(connection, kind, event)
        if kind & (SYN | ACK) == SYN | ACK and connection.divergence is None:
            # The answer to a SYN that was seen: nothing went before it.
            connection.presumed = False

    def _snapshot(self, event: Snapshot) -> None:
        self._sources.add("states at instants")
        looked: set[int] = set()
        for row in event.rows:
            if row.remote[1] == 0:
                if row.state is State.LISTEN:
                    self._listening.add(row.local)
                continue
            found = self._ends.get((row.local, row.remote))
            if found is None:
                found = self._begin(row.local, row.remote, None)
            connection, end = found
            self._look(connection, end, row.state, event, row)
            looked.add(id(connection) << 1 | end)
        for connection in self.connections():
            for end in (0, 1):
                if id(connection) << 1 | end not in looked and self._lists(connection, end):
                    self._look(connection, end, State.CLOSED, event)

    def _lists(self, connection: Connection, end: int) -> bool:
        """Whether a table of this machine's sockets would have this end in it."""
        if connection.elsewhere:
            return False
        return bool(connection.sees >> end & 1) or _same_host(*connection.ends)

    def _begun(self, begun: _Begun) -> None:
        """A call was made: from now on what it does may happen."""
        event = begun.call
        assert event.local is not None
        assert event.remote is not None
        found = self._ends.get((event.local, event.remote))
        if found is None:
            return
        connection, end = found
        what = 0
        match event.call:
            case "send" | "write" | "sendall" if type(event.result) is int:
                connection.sent[end] += event.result
                what = ex.SEND_BEGUN
            case "setsockopt" if event.result == {"SO_LINGER": [1, 0]}:
                what = ex.LINGER_BEGUN
            case "shutdown":
                what = ex.SHUTDOWN_BEGUN
            case "close":
                both = ex.CALLS_A | ex.CALLS_B
                read_all = connection.read[end] == connection.sent[1 - end]
                if read_all and connection.mode & both == both:
                    what = ex.CLOSE_BEGUN_ALL_READ
                else:
                    unread = connection.queued[end] > 0
                    what = ex.CLOSE_BEGUN_UNREAD if unread else ex.CLOSE_BEGUN
        if what and connection.mode & ex.CALLS_A << end:
            self._settle(connection)
            self._advance(connection, ex.told(end, what), begun)

    def _called(self, event: Called) -> None:
        if event.local is None or event.remote is None or event.remote[1] == 0:
            self._called_without_peer(event)
            return
        self._sources.add("calls with their results")
        found = self._ends.get((event.local, event.remote))
        if found is None:
            if event.call not in ("connect", "accept") or event.errno:
                return
            found = self._begin(event.local, event.remote, event.call == "accept")
        connection, end = found
        if event.call in ("connect", "accept") and event.errno is None:
            actor = event.actor if event.call == "connect" else None
            connection.options[end] = self._binds.options_of(event.local, actor)
        what = 0
        if event.errno in ("ECONNRESET", "ETIMEDOUT"):
            what = ex.RESET_READ
        elif event.errno is None:
            what = _TELLS.get(event.call, 0)
            if event.call in ("recv", "read") and type(event.result) is int:
                connection.read[end] += event.result
                connection.queued[end] -= event.result
                what = 0 if event.result else ex.EOF_READ
        if what in (ex.CLOSED_BY_CALL, ex.SHUT_DOWN_BY_CALL) and (
            not connection.mode & ex.CALLS_A << end
        ):
            return
        if what:
            self._settle(connection)
            self._advance(connection, ex.told(end, what), event)
            if what == ex.CONNECTED and event.began is not None and connection.divergence is None:
                connection.mode |= ex.CALLS_A << end
                connection.number = self._model.close(connection.mode, connection.number)

    def _called_without_peer(self, event: Called) -> None:
        if event.local is not None and event.remote is None and event.call in ("listen", "close"):
            self._listens(event)
        if event.local is None or event.call not in ("bind", "listen"):
            self._binds.called(event)
            return
        if event.call == "listen" and event.errno is None:
            self._listening.add(event.local)
        wrong = self._binds.judge(event, self._holders(event.local[1], event), self._from_start)
        self._binds.called(event)
        if wrong:
            self._wrong_bind(event, event.local, wrong, RULE)

    def _holders(self, port: int, event: Event) -> list[Holder]:
        """The ends that have this port, or may have."""
        found = []
        for connection in self.connections():
            for end in (0, 1):
                if connection.ends[end][1] != port or connection.divergence is not None:
                    continue
                self._settle(connection)
                number = connection.number
                if connection.timed:
                    number = self._clock(connection, number, event.t)
                pairs = connection.model.members(number)
                if pairs:  # the timers that may have fired are not asked a second time
                    connection.number = number
                states = {pair[end] & 15 for pair in pairs}
                if states - {ex.CLOSED}:
                    certain = not states & {ex.CLOSED, ex.SYN_RECEIVED, ex.SYN_SENT}
                    holder = Holder(
                        connection.ends[end][0],
                        port,
                        State(max(states)),
                        connection.options[end],
                        certain,
                        connect_bound=end == 1,
                    )
                    found.append(holder)
        return found

    def _restarted(self, event: Restart) -> None:
        """The port is said to be free in so many seconds: is that when its holders let go?"""
        if event.free_after is None or event.ok or self._port is None:
            return
        free = event.t + event.free_after
        expire = []
        for connection in self.connections():
            for end in (0, 1):
                if connection.ends[end][1] == self._port and connection.divergence is None:
                    if connection.expires[end] > event.t:
                        expire.append(connection.expires[end])
                    elif not connection.facts >> 8 * end & ex.MAY_BE_OVER:
                        return
        # Timed before the table was read; the looks that it is held against, after.
        if expire and not -_LOOKED_UP < free - max(expire) < _CLOCKS:
            self._wrong_bind(
                event,
                ("port", self._port),
                f"the port is said to be free at {free:.3f} s, and its last holder's timer runs "
                f"until {max(expire):.3f} s",
                self._time_wait_rule(0),
            )

    def _wrong_bind(self, event: Event, address: Address, why: str, rule: str) -> None:
        if len(self._divergences) < _DIVERGENCES_KEPT:
            self._divergences.append(
                Divergence(
                    event.t, address_text(address), event_text(event), why, rule, kind="bind"
                )
            )

    def _missed(self, event: Lost) -> None:
        """An observer missed events: until its next one, anything it sees may have happened."""
        self._from_start = False
        if not event.count:
            return
        self._lost += event.count
        if event.source != "file":  # whose reader has told of it
            lost = f"{event.source} lost {event.count} events before {event.t:.6f} s"
            self._problems.append(lost)
        self._listeners.clear()
        segments = event.source not in _EXACT or event.source == "model"
        states = event.source in _EXACT or event.source == "file"
        for connection in self.connections():
            self._settle(connection)
            mode = connection.mode
            if segments:
                mode &= ~ex.SEGMENTS
                connection.lossy = True
                if connection.sequence is not None:
                    connection.sequence.forget()
            if states:
                mode &= ~(ex.SEES_A | ex.SEES_B)
            connection.mode = mode
            connection.number = connection.model.unwatched(mode, connection.number)
            connection.base = connection.number
            connection.history.clear()

    # One connection.

    def _begin(
        self, local: Address, remote: Address, passive: bool | None
    ) -> tuple[Connection, int]:
        """A connection not known yet. `passive` is whether `local` is the one that listened."""
        if passive is None:
            if local in self._listening or ("0.0.0.0", local[1]) in self._listening:
                passive = True
            elif remote in self._listening:
                passive = False
            else:
                passive = local[1] < remote[1]
        ends = (local, remote) if passive else (remote, local)
        mode = 0 if _same_host(*ends) else ex.DOUBLES
        if self._declared and _same_host(*ends):
            by = "model" if self._declared == ex.EVERY else "tracepoint"
            self._sources.add(f"every transition ({by})")
            mode = self._declared | self._declared << 2 | self._declared_segments
        elif self._from_start and ends[0][1] == self._port and _same_host(*ends):
            mode = self._declared_segments  # the run's own: no segment of it was before
        # What a run does not make itself may be older than it, or seen in part: a connect() is
        # reported before it has a port.
        known = self._from_start and not self._forgotten and self._port in (None, ends[0][1])
        number = self._model.start(mode) if known else self._model.anywhere(mode)
        connection = Connection(ends, self._model, self._profiles, mode, number)
        connection.base = number
        self._connections += 1
        self._ends[ends] = (connection, 0)
        self._ends[ends[1], ends[0]] = (connection, 1)
        return self._ends[local, remote]

    def _used_again(self, connection: Connection, due: int = 0, end: int = 0) -> Connection:
        """The connection that now begins between the same addresses, if the old one may be over.

        `due` is what `end` cannot still have to send, since it would have been seen.
        """
        self._settle(connection)
        if connection.divergence is not None:
            number = self._model.anywhere(connection.mode)
            sequence = None
        elif connection.stuck or not self._may_be_over(connection.number, due, end):
            return connection
        else:
            number = connection.number
            sequence = connection.sequence and connection.sequence.again()
        self._conclude(connection)
        self._connections += 1
        successor = Connection(
            connection.ends,
            connection.model,
            connection.profiles,
            connection.mode,
            number,
            facts=connection.facts,
            sequence=sequence,
            last=connection.last,
            since=list(connection.since),
            timed=connection.timed,
            sees=connection.sees,
            presumed=connection.presumed or sequence is None,
            base=number,
            lossy=connection.lossy,
        )
        a, b = connection.ends
        self._ends[a, b] = (successor, 0)
        self._ends[b, a] = (successor, 1)
        return successor

    def _may_be_over(self, number: int, due: int = 0, end: int = 0) -> bool:
        over = (ex.CLOSED, ex.TIME_WAIT)
        return any(
            pair[0] & 15 in over and pair[1] & 15 in over and not pair[end] & due
            for pair in self._model.members(number)
        )

    def _look(
        self, connection: Connection, end: int, state: State, event: Event, row: Row | None = None
    ) -> None:
        """An end was looked at. The other end may have been looked at a moment before or after."""
        if state is not State.CLOSED:
            connection.sees |= 1 << end
        if row is not None and state in _READS:
            # A FIN counts as one octet of the receive queue.
            connection.queued[end] = row.recv_q - (state is State.CLOSE_WAIT)
        if row is not None and row.seconds_left is not None and row.timer == "time_wait":
            self._timer(connection, end, row, event)
        waiting = connection.waiting
        if waiting is not None:
            other, first, was = waiting
            if first != end and abs(other.t - event.t) < 0.002:
                connection.waiting = None
                states = (int(state), was) if end == 0 else (was, int(state))
                self._advance(connection, ex.both_in(*states), event)
                return
            self._settle(connection)
        connection.waiting = (event, end, int(state))

    def _settle(self, connection: Connection) -> None:
        """No look at the other end came: take the one that waits by itself."""
        if connection.waiting is not None:
            event, end, state = connection.waiting
            connection.waiting = None
            self._advance(connection, ex.seen_in(end, state), event)

    def _advance(self, connection: Connection, symbol: int, event: Event | _Begun) -> None:
        """Follow one observation of a connection."""
        t = event.t
        if connection.stuck:
            if connection.divergence is None:
                connection.held.append((t, connection.mode, symbol, event, 0))
                self._untangle(connection, t)
            return
        mode = connection.mode
        model = connection.model
        number = connection.number
        if connection.timed:
            number = self._clock(connection, number, t)
            mode = connection.mode
        quiet = t - connection.last
        if quiet > _BEHIND_BY:
            if mode & _BEHIND == _BEHIND:
                number = self._all_reported(connection, number, event)
                if not number:
                    return
            if quiet > _LATE:
                number = self._all_delivered(connection, number, event)
                if not number:
                    return
                number = model.close(mode | ex.LATE, number)
            if quiet > _CLOCKS:
                connection.base = number
                connection.history.clear()
        elif len(connection.history) >= _KEPT:
            connection.base = number
            connection.history.clear()
        connection.last = t
        after = model.next.get((mode, number, symbol))
        if after is None:
            after = model.follow(mode, number, symbol)
        if not after and connection.presumed:
            connection.presumed = False
            number = model.anywhere(mode)
            after = model.follow(mode, number, symbol)
        if not after:
            if not self._again(connection, number, symbol):
                connection.number = number
                connection.held.append((t, mode, symbol, event, 0))
                connection.stuck = True
                self._untangle(connection, t)
                return
            number = model.start(mode)
            after = connection.number
        connection.history.append((t, mode, symbol, event, number))
        connection.untangled = False
        connection.number = after
        facts = model.facts(after)
        if facts != connection.facts:
            self._note(connection, facts, t)

    def _untangle(self, connection: Connection, now: float) -> None:
        """Two observers' clocks differ a little: try what they saw in other orders.

        Each observer's own order stands, and nothing is moved by more than
        `timewait.check.order` has it. What is not explained so far may be by what is still to come.
        """
        t, _, symbol, event, _ = connection.held[0]
        entries = [*connection.history, *connection.held]
        # The model's own clock is nobody else's: what it reports is in order.
        if connection.mode & _IN_ORDER or len({lane(e[2]) for e in entries}) == 1:
            connection.held.clear()
            self._explain(connection, connection.number, symbol, event)
            return
        number = in_any_order(connection.model, connection.base, entries)
        if number:
            connection.history.extend(connection.held)
            connection.held.clear()
            connection.stuck = False
            connection.untangled = True
            connection.last = now
            connection.number = connection.model.close(connection.mode, number)
            facts = connection.model.facts(connection.number)
            if facts != connection.facts:
                self._note(connection, facts, now)
        elif now - t > _CLOCKS:
            connection.held.clear()
            self._explain(connection, connection.number, symbol, event)

    def _all_reported(
        self, connection: Connection, number: int, event: Event | _Begun | None
    ) -> int:
        """Transitions that segments have shown have been reported by now."""
        model, mode = connection.model, connection.mode
        for end in (0, 1):
            symbol = ex.told(end, ex.ALL_REPORTED)
            after = model.follow(mode, number, symbol)
            if not after:
                self._explain(connection, number, symbol, event or connection.history[-1][3])
                return 0
            number = after
        return number

    def _all_delivered(
        self, connection: Connection, number: int, event: Event | _Begun | None
    ) -> int:
        """What was sent long ago and not lost has arrived."""
        if connection.sequence is None or not connection.sequence.exact:
            return number
        after = connection.model.follow(connection.mode, number, ex.ALL_DELIVERED)
        if not after:
            self._explain(connection, number, ex.ALL_DELIVERED, event or connection.history[-1][3])
        return after

    def _again(self, connection: Connection, number: int, symbol: int) -> bool:
        """Whether this is a new connection between the same addresses, seen when already open.

        Where segments are reported its SYN would have been.
        """
        mode = connection.mode
        if mode & (ex.SEES_A | ex.SEES_B | ex.SEGMENTS) or symbol not in ex.SEEN_OPEN:
            return False
        model = connection.model
        if not self._may_be_over(number):
            return False
        after = model.follow(mode, model.start(mode), symbol)
        if after:
            connection.number = after
            connection.facts = 0
            connection.sent, connection.read = [0, 0], [0, 0]
        return bool(after)

    def _clock(self, connection: Connection, number: int, t: float) -> int:
        """Let the timers fire that can have fired by `t`, and those that must have."""
        since, facts = connection.since, connection.facts
        mode = connection.mode
        for end in (0, 1):
            parameters = self._profiles[end].parameters
            bits = facts >> 8 * end
            if bits & ex.MAY_TIME_WAIT and t >= since[end] + parameters.time_wait - 0.005:
                mode |= ex.TW_OVER_A << end
            limit = parameters.fin_wait_2
            if bits & ex.MAY_ORPHAN and limit is not None and t >= since[2 + end] + limit - 0.005:
                mode |= ex.F2_OVER_A << end
        if mode != connection.mode:
            connection.mode = mode
            number = connection.model.close(mode, number)
        for end in (0, 1):
            over = since[4 + end] + self._profiles[end].parameters.time_wait + _WHEEL + _CLOCKS
            if facts >> 8 * end & ex.MUST_TIME_WAIT and t > over:
                number = connection.model.follow(mode, number, ex.told(end, ex.NOT_TIME_WAIT))
        return number

    def _note(self, connection: Connection, facts: int, t: float) -> None:
        new = facts & ~connection.facts
        connection.facts = facts
        for end in (0, 1):
            bits = new >> 8 * end
            if bits & ex.MAY_TIME_WAIT:
                connection.since[end] = t
                connection.mode &= ~(ex.TW_OVER_A << end)
            if bits & ex.MAY_ORPHAN:
                connection.since[2 + end] = t
                connection.mode &= ~(ex.F2_OVER_A << end)
            if bits & ex.MUST_TIME_WAIT:
                connection.since[4 + end] = t
        timed = ex.MAY_TIME_WAIT | ex.MAY_ORPHAN
        connection.timed = bool(facts & (timed | timed << 8))
        self._may_end(connection)

    def _timer(self, connection: Connection, end: int, row: Row, event: Event) -> None:
        """The time a small socket has left must agree with when it can have come to be."""
        left = row.seconds_left
        parameters = self._profiles[end].parameters
        limit = parameters.time_wait if row.state is State.TIME_WAIT else parameters.fin_wait_2
        if left is None or limit is None or connection.divergence is not None:
            return
        over = connection.expires[end] = event.t + left
        if left > limit + _TIMER_STEP:
            why = f"{row.state} has {left:.3f} s left, and lasts {limit:g} s"
        elif row.state is not State.TIME_WAIT or not connection.facts >> 8 * end & ex.MAY_TIME_WAIT:
            return
        elif over < connection.since[end] + limit - _CLOCKS:
            why = (
                f"TIME_WAIT would be over at {over:.3f} s, and began at "
                f"{connection.since[end]:.3f} s at the earliest"
            )
        else:
            return
        self._diverge(connection, event, why, self._time_wait_rule(end))

    def _time_wait_rule(self, end: int) -> str:
        chosen = self._profiles[end]
        return (
            f"{chosen.name} profile, TIME_WAIT lasts {chosen.parameters.time_wait:g} s "
            "(RFC 9293 §3.6.1: 2MSL)"
        )

    def _forget(self, connection: Connection) -> None:
        """Let go of a connection that has ended, unless it has come back to life."""
        a, b = connection.ends
        if self._ends.get((a, b), (None, 0))[0] is not connection:
            return  # another one has taken its addresses
        if connection.last > self._done - self._keeps(connection):
            connection.ending = False
            self._may_end(connection)
            return
        self._forgotten = True
        self._end(connection)
        del self._ends[a, b], self._ends[b, a]

    def _keeps(self, connection: Connection) -> float:
        """For how long a connection is kept that is quiet.

        An ended one while somebody may look at its TIME_WAIT, one that has ended unless its last
        acknowledgment was lost for as long as the other end waits for that.
        """
        certain = connection.facts & _OVER == _OVER
        if not certain and not (
            connection.facts & ex.PERHAPS_OVER and connection.mode & ex.SEGMENTS
        ):
            return float("inf")
        longest = max(p.parameters.time_wait for p in self._profiles)
        if "states at instants" in self._sources:
            return 3 * longest
        return 2.0 if certain else longest

    def _may_end(self, connection: Connection) -> None:
        keeps = self._keeps(connection)
        if keeps < float("inf") and not connection.ending:
            connection.ending = True
            heappush(self._ending, (connection.last + keeps, next(self._ended), connection))

    def _end(self, connection: Connection) -> None:
        suspicion = connection.sequence and connection.sequence.suspicion
        if connection.suspect and suspicion and connection.divergence is None:
            self._diverge(connection, connection.suspect, str(suspicion), suspicion.rule)
        seen = connection.mode
        both = ex.SEES_A & seen and ex.SEES_B & seen
        sequence = connection.sequence
        whole = sequence is not None and not connection.lossy
        if both or (sequence and whole and (sequence.exact or sequence.presumed)):
            self._strong += 1
        elif seen & (ex.SEES_A | ex.SEES_B | ex.SEGMENTS):
            self._partial += 1
        if self._on_end is not None:
            self._on_end(connection)

    # What is said.

    def _explain(
        self, connection: Connection, number: int, symbol: int, event: Event | _Begun
    ) -> None:
        """Nothing explains the observation: say why not, and what would."""
        if self._is_elsewhere(connection):
            return
        event = event.call if isinstance(event, _Begun) else event
        model, mode = connection.model, connection.mode
        if not self._explains:
            self._diverge(connection, event, "not allowed", "")
            return
        why, rule = reasons.reason(
            model, number, symbol, (self._profiles[0].name, self._profiles[1].name)
        )
        self._diverge(
            connection,
            event,
            why,
            rule,
            reasons.allowed(model, mode, number, symbol),
            reasons.story(model, mode, number, symbol),
        )

    def _is_elsewhere(self, connection: Connection) -> bool:
        """Whether only the tracepoint has ever seen this connection.

        It sees every network namespace, and what is in another one no capture,
        table or call of this one's shows: it is followed by its transitions alone.
        """
        calls = ex.CALLS_A | ex.CALLS_B
        if (
            connection.elsewhere
            or connection.sequence is not None
            or connection.sees
            or connection.mode & calls
            or not (connection.mode & ex.SEGMENTS or "states at instants" in self._sources)
        ):
            return False
        connection.elsewhere = True
        connection.mode &= ~ex.SEGMENTS
        connection.lossy = True
        connection.stuck = False
        connection.number = connection.base = connection.model.anywhere(connection.mode)
        connection.history.clear()
        connection.held.clear()
        self._sources.add("transitions in another network namespace (tracepoint)")
        return True

    def _diverge(
        self,
        connection: Connection,
        event: Event,
        why: str,
        rule: str,
        allowed: tuple[str, ...] = (),
        story: tuple[str, ...] = (),
    ) -> None:
        connection.stuck = True
        segments = connection.segments[-8:]
        connection.divergence = Divergence(
            event.t,
            connection.name,
            event_text(event),
            why,
            rule,
            allowed,
            story,
            diagram(
                connection.ends[1],
                connection.ends[0],
                segments,
                event if isinstance(event, SegmentSeen) else None,
            ),
        )
        if len(self._divergences) < _DIVERGENCES_KEPT:
            self._divergences.append(connection.divergence)

    def _evidence(self) -> Evidence:
        total = self._connections
        if total and self._strong == total and not self._lost:
            strength = "strong"
        else:
            strength = "partial" if self._strong or self._partial else "weak"
        sources, inferred, unseen = self._sources, [], list(self._blind)
        states = {"every transition (model)", "every transition (tracepoint)"} & sources
        if "every transition (tracepoint)" in sources:
            inferred.append(
                "TIME_WAIT, from the end of the full socket (a tracepoint shows no more)"
            )
        if "states at instants" in sources and not states:
            inferred.append("the states between two looks")
        if "segments" not in sources:
            inferred.append("what was sent, from the states it led to")
            unseen.append("segments")
        elif not states:
            inferred.append("states, from the segments")
        if "calls with their results" not in sources:
            unseen.append("what the applications called")
        if self._lost:
            events = "1 event" if self._lost == 1 else f"{self._lost} events"
            unseen.append(f"{events} that an observer lost or the file has garbled")
        return Evidence(
            strength,
            total,
            self._count,
            tuple(sorted(sources)),
            tuple(inferred),
            tuple(unseen),
            self._lost,
            tuple(self._problems),
        )


# What was worked out once serves every later check of the same two tables.
_MODELS: dict[tuple[int, int, tuple[bool, bool]], Explanations] = {}


def _model(server: Profile, client: Profile) -> Explanations:
    embryos = (server.parameters.linux_checks, client.parameters.linux_checks)
    key = (id(server.table), id(client.table), embryos)
    if key not in _MODELS:
        if len(_MODELS) >= 32:
            _MODELS.clear()
        _MODELS[key] = Explanations(server.table, client.table, embryos)
    return _MODELS[key]


_EXACT: Final = {"model": ex.EVERY, "tracepoint": ex.FULL_SOCKETS}
_IN_ORDER: Final = ex.EVERY | ex.EVERY << 2
_BEHIND: Final = ex.SEGMENTS | ex.FULL_SOCKETS  # a tracepoint reports after what it sends
_READS: Final = frozenset({State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSE_WAIT})
_WITHOUT_PEER: Final = frozenset({Tcp.OPEN_PASSIVE, Tcp.CLOSE, Tcp.ABORT})
_OPENED: Final = "RFC 9293 §3.10.1, §3.10.4: OPEN makes a listener, CLOSE ends it"
_OVER: Final = ex.MAY_BE_OVER | ex.MAY_BE_OVER << 8
_TELLS: Final = {
    "connect": ex.CONNECTED,
    "accept": ex.CONNECTED,
    "shutdown": ex.SHUT_DOWN_BY_CALL,
    "close": ex.CLOSED_BY_CALL,
}
_PEERLESS: Final = [0 if state is State.LISTEN else int(state) for state in State]


def _is_call(event: Event | _Begun) -> bool:
    return isinstance(event, Called | _Begun)


def _passive(old: State, new: State, source: str) -> bool | None:
    if State.SYN_SENT in (old, new):
        return False
    if new is State.SYN_RECEIVED and old in (State.LISTEN, State.CLOSED):
        return True
    return None


def _same_host(a: Address, b: Address) -> bool:
    return a[0] == b[0] or (a[0].startswith("127.") and b[0].startswith("127."))


def check(events: Iterable[Event], *, profiles: Profiles | None = None) -> Verdict:
    """Does the model allow these events?

    They are taken in the order of their times. `profiles` names each role's
    profile, `{"server": "linux", "client": "freebsd"}`; those not given are as
    the stream's head says, or "linux".

    Raises `ValueError` naming an unknown profile.
    """
    checker = Checker(profiles, window=float("inf"))
    for event in events:
        checker.feed(event)
    return checker.verdict()


check_events = check  # its name in `timewait`, where `check` is this package

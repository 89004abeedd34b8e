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
from typing import Any, Final

from timewait.check import explanations as ex
from timewait.check.binds import RULE, Binds, Holder
from timewait.check.connection import (
    BEHIND,
    BEHIND_BY,
    CLOCKS,
    DIVERGENCES_KEPT,
    KEPT,
    LATE,
    Begun,
    Connection,
    Findings,
)
from timewait.check.explanations import Explanations
from timewait.check.sequence import DROPPED, Contradiction, Sequence
from timewait.check.verdict import (
    Divergence,
    Evidence,
    Verdict,
    address_text,
    event_text,
)
from timewait.events import (
    REST,
    USED_AGAIN,
    Address,
    Called,
    Event,
    Lost,
    Restart,
    RunStarted,
    SegmentSeen,
    Snapshot,
    Transition,
)
from timewait.tcp.profiles import Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, flags_text, seq_diff
from timewait.tcp.states import Event as Tcp
from timewait.tcp.states import State

__all__ = ["Checker", "Connection", "check", "check_events"]

Profiles = Mapping[str, "str | Profile"]

_LOOKED_UP: Final = 0.5  # reading a table, twice, may take so long where processors are wanted


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
        self._findings = Findings(explain, self._may_end)
        self._sources = self._findings.sources
        self._divergences = self._findings.divergences
        self._waiting: deque[tuple[float, Event | Begun]] = deque()
        self._done = float("-inf")
        self._ending: list[tuple[float, int, Connection]] = []  # a heap
        self._ended = count()
        self._forgotten = False
        self._cut = False  # from here on some of what was seen is missing
        self._unended = False  # and so it was in this run, or in one before
        self._misses = False  # the capture has been shown to lack segments
        self._given = dict(profiles or {})
        if unknown := sorted(self._given.keys() - {"server", "client"}):
            raise ValueError(f"profiles: who is {unknown[0]!r}? server or client is expected")
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
        self._strong = self._partial = 0
        self._lost = 0
        self._problems: list[str] = []
        self._blind: tuple[str, ...] = ()
        self._take: dict[type, Callable[[Any], None]] = {
            Transition: self._transition,
            SegmentSeen: self._segment,
            Snapshot: self._snapshot,
            Called: self._called,
            Restart: self._restarted,
            Begun: self._begun,
            RunStarted: self._started,
            Lost: self._missed,
        }
        self._binds = Binds()
        self._port: int | None = None
        self._doubles = False
        # What share of a timeout must be seen to pass: a process that reads a wire may be late.
        self._punctual = 1.0
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
            self._insert(event.began, Begun(event.began, event))
        if not waiting or t >= waiting[-1][0]:
            waiting.append((t, event))
        elif type(event) is Lost:
            self._insert(max(t, self._done), event)
        else:
            self._insert(t, event)
        before = waiting[-1][0] - self._window
        while waiting[0][0] < before:
            self._dispatch(*waiting.popleft())

    def _insert(self, t: float, event: Event | Begun) -> None:
        """Put an event where its time is, behind those of the same time.

        A call's beginning goes before them, as far as the call before: what it
        caused may bear the very same time, where time is virtual.
        """
        waiting = self._waiting
        if t < self._done:
            what = event.call if isinstance(event, Begun) else event
            self._late(what)
            return
        place = len(waiting)
        first = isinstance(event, Begun)
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

    def _dispatch(self, t: float, event: Event | Begun) -> None:
        self._done = t
        ending = self._ending
        while ending and ending[0][0] < t:
            self._forget(heappop(ending)[2])
        take = self._take.get(type(event))
        if take is not None and not (self._cut and isinstance(event, _OF_A_LANE)):
            take(event)

    def _drain(self) -> None:
        while self._waiting:
            self._dispatch(*self._waiting.popleft())

    def verdict(self, problems: Iterable[str] = ()) -> Verdict:
        """What the events so far amount to; `problems` are faults of the evidence to tell of."""
        self._drain()
        self._problems = list(dict.fromkeys([*problems, *self._problems]))
        for connection in self.connections():
            self._conclude(connection)
        return Verdict(self._evidence(), tuple(self._divergences))

    def _conclude(self, connection: Connection) -> None:
        """Nothing more will be seen of it."""
        connection.settle()
        if connection.held:
            connection.untangle(float("inf"))
        if (
            connection.mode & BEHIND == BEHIND
            and connection.divergence is None
            and self._done - connection.last > BEHIND_BY
        ):
            connection.all_reported(connection.number, None)
        if connection.divergence is None and self._done - connection.last > LATE:
            connection.all_delivered(connection.number, None)
        self._end(connection)

    def connections(self) -> list[Connection]:
        """The connections not yet forgotten."""
        return list({id(c): c for c, _ in self._ends.values()}.values())

    # Events.

    def _started(self, event: RunStarted) -> None:
        for connection in self.connections():
            connection.settle()
            self._end(connection)
        self._ends.clear()
        self._ending.clear()
        self._listening.clear()
        self._listeners.clear()
        self._forgotten = False
        self._choose_profiles(event.profiles)
        self._blind = event.blind
        self._from_start = True
        self._misses = False
        self._binds = Binds()
        told = event.scenario or {}
        self._port = told.get("port")
        # A link that does odd things may be one within a host.
        self._doubles = bool(told.get("faults"))
        self._punctual = 0.5 if event.stack == "wire" else 1.0
        words = set(event.observer.replace("+", " ").replace(",", " ").split())
        self._declared = 0
        if "tracepoint" in words:
            self._declared = ex.FULL_SOCKETS
        if event.stack == "model" and "model" in words:
            self._declared = ex.EVERY
        seen = {"model", "capture", "wire"} & words
        self._declared_segments = ex.SEGMENTS if seen else 0
        self._cut = False

    def _choose_profiles(self, named: Mapping[str, str]) -> None:
        chosen = {"server": "linux", "client": "linux", **named, **self._given}
        server, client = (
            p if isinstance(p, Profile) else profile(p)
            for p in (chosen["server"], chosen["client"])
        )
        self._profiles = (server, client)
        self._model = _model(server, client)

    def _transition(self, event: Transition) -> None:
        if event.cause == USED_AGAIN and (event.old, event.new) == (State.TIME_WAIT, State.CLOSED):
            return  # The tracepoint infers it, later than the segment that ended TIME_WAIT.
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
            connection.look(end, event.new, event)
            return
        how = _EXACT[event.source]
        if not connection.mode >> 2 * end & 3:
            connection.mode |= how << 2 * end
            self._sources.add(f"every transition ({event.source})")
        if connection.waiting is not None:
            connection.settle()
        connection.advance(
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
        if event.source == "forged":
            self._forged(connection, event)
            return
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
                here and not exact and not self._misses,
                (
                    self._profiles[0].parameters.rto_min * self._punctual,
                    self._profiles[1].parameters.rto_min * self._punctual,
                ),
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
        if len(connection.segments) > KEPT:
            del connection.segments[: KEPT // 2]
        if connection.waiting is not None:
            connection.settle()
        if connection.divergence is not None or connection.forged:
            return
        seen = connection.mode & ex.SEGMENTS
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
            if sequence.lacking and sequence.ended and _is_far(event, connection.segments):
                self._begun_unseen(connection, end, event)
            else:
                connection.diverge(event, str(wrong), wrong.rule)
            return
        if sequence.missed:
            self._not_captured(connection, event)
        # Where one direction is captured, what the other side does is anybody's guess.
        half = not sequence.exact and not event.flags & SYN and sequence.one_sided
        if half and seen:
            connection.begin_anywhere(connection.mode & ~ex.SEGMENTS)
        elif not half and not seen and not connection.lossy:
            connection.mode |= ex.SEGMENTS
        if sequence.suspicion is not None and connection.suspect is None:
            connection.suspect = event
        if event.lost:
            kind |= DROPPED
            sequence.dropped(end == 1)
        if half or connection.lossy or (event.flags & RST and not seen and not self._from_start):
            return  # What it is about, or answers, may have been missed.
        if sequence.echo and not event.flags & (SYN | RST):
            return  # A network may deliver a segment late, or twice.
        if not (sequence.exact or event.flags & RST) and sequence.is_overtaken(
            end == 1, kind, event.ack, event.t
        ):
            return
        connection.advance(kind, event)
        if kind & (SYN | ACK) == SYN | ACK and connection.divergence is None:
            # The answer to a SYN that was seen: nothing went before it.
            connection.presumed = False

    def _not_captured(self, connection: Connection, event: SegmentSeen) -> None:
        """A capture may lack what shows only by what answers or follows it."""
        assert connection.sequence is not None
        connection.sequence.missed = False
        connection.begin_anywhere(connection.mode)
        if not self._misses:
            self._misses = True
            for each in self.connections():
                if each.sequence is not None and not each.sequence.exact:
                    each.sequence.lacks()
            self._problems.append(
                f"{event_text(event)} at {event.t:.6f} s: the capture lacks segments before it, or "
                "they were never sent"
            )

    def _begun_unseen(self, connection: Connection, end: int, event: SegmentSeen) -> None:
        """The capture lacks how another connection between these addresses began."""
        self._conclude(connection)
        a, b = connection.ends
        del self._ends[a, b], self._ends[b, a]
        self._forgotten = True
        self._begin(event.src, event.dst, end == 0)
        self._segment(event)

    def _forged(self, connection: Connection, event: SegmentSeen) -> None:
        """Neither end sent it, and it may have done anything to the end that it came to."""
        connection.settle()
        self._problems.append(
            f"what the forged {flags_text(event.flags)} at {event.t:.6f} s did is not checked"
        )
        connection.segments.append(event)
        connection.forged = True
        connection.begin_anywhere(connection.mode)

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
            connection.look(end, row.state, event, row)
            looked.add(id(connection) << 1 | end)
        for connection in self.connections():
            for end in (0, 1):
                if id(connection) << 1 | end not in looked and self._lists(connection, end):
                    connection.look(end, State.CLOSED, event)

    def _lists(self, connection: Connection, end: int) -> bool:
        """Whether a table of this machine's sockets would have this end in it."""
        if connection.elsewhere:
            return False
        return bool(connection.sees >> end & 1) or _same_host(*connection.ends)

    def _begun(self, begun: Begun) -> None:
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
            connection.settle()
            connection.advance(ex.told(end, what), begun)

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
        if wrong := self._impossible(connection, end, event):
            connection.diverge(event, *wrong)
            return
        what = 0
        if event.errno in ("ECONNREFUSED", "ECONNRESET", "ETIMEDOUT"):
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
            connection.settle()
            if what == ex.CONNECTED and event.began is not None:
                connection.mode |= ex.CALLS_A << end  # from its return on, not a moment later
            connection.advance(ex.told(end, what), event)

    def _impossible(
        self, connection: Connection, end: int, event: Called
    ) -> tuple[str, str] | None:
        """What no call can do, whatever the connection's state: why not, and the rule."""
        if event.errno is not None or connection.divergence is not None:
            return None
        if event.socket is not None and event.socket == connection.closed[end]:
            return f"{event.call}() succeeded on a socket that was closed", "close(2): EBADF"
        if event.call == "close":
            connection.closed[end] = event.socket
        sent, read = connection.sent[1 - end], connection.read[end]
        if event.call in ("recv", "read") and type(event.result) is int:
            known = connection.mode & ex.CALLS_A << 1 - end and not connection.lossy
            if known and read + event.result > sent:
                return (
                    f"{read + event.result} octets were read, and {sent} sent",
                    "RFC 9293 §3.10.3: RECEIVE returns what was sent",
                )
        return None

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
                connection.settle()
                number = connection.number
                if connection.timed:
                    number = connection.clock(number, event.t)
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
        if expire and not -_LOOKED_UP < free - max(expire) < CLOCKS:
            self._wrong_bind(
                event,
                ("port", self._port),
                f"the port is said to be free at {free:.3f} s, and its last holder's timer runs "
                f"until {max(expire):.3f} s",
                connection.time_wait_rule(0),
            )

    def _wrong_bind(self, event: Event, address: Address, why: str, rule: str) -> None:
        if len(self._divergences) < DIVERGENCES_KEPT:
            self._divergences.append(
                Divergence(
                    event.t, address_text(address), event_text(event), why, rule, kind="bind"
                )
            )

    def _missed(self, event: Lost) -> None:
        """An observer missed events: until its next one, anything it sees may have happened."""
        self._from_start = False
        whole_file = event.source == REST
        if not event.count and not whole_file:
            return
        self._lost += event.count
        if whole_file:
            self._cut = self._unended = True
            self._declared = self._declared_segments = 0
        lost = f"{event.source} lost {event.count} events before {event.t:.6f} s"
        self._problems.append(event.why if event.source in ("file", REST) else lost)
        self._listeners.clear()
        segments = event.source not in _EXACT or event.source == "model"
        states = event.source in _EXACT or event.source == "file" or whole_file
        for connection in self.connections():
            connection.settle()
            mode = connection.mode
            if segments:
                mode &= ~ex.SEGMENTS
                connection.lossy = True
                if connection.sequence is not None:
                    connection.sequence.forget()
            if states:
                mode &= ~(ex.SEES_A | ex.SEES_B)
            if event.source == "file" or whole_file:
                mode &= ~(ex.CALLS_A | ex.CALLS_B)
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
        mode = 0
        if self._declared and _same_host(*ends):
            by = "model" if self._declared == ex.EVERY else "tracepoint"
            self._sources.add(f"every transition ({by})")
            mode = self._declared | self._declared << 2 | self._declared_segments
        elif self._from_start and self._port in (None, ends[0][1]) and _same_host(*ends):
            mode = self._declared_segments  # the run's own: no segment of it was before
        if self._doubles or not _same_host(*ends):
            mode |= ex.DOUBLES
        # What a run does not make itself may be older than it, or seen in part: a connect() is
        # reported before it has a port.
        known = self._from_start and not self._forgotten and self._port in (None, ends[0][1])
        number = self._model.start(mode) if known else self._model.anywhere(mode)
        connection = Connection(ends, self._model, self._profiles, mode, number, self._findings)
        connection.base = number
        if local == remote:
            # Both ends are one socket, which the states of two cannot tell.
            connection.forged = True
            connection.begin_anywhere(mode)
            self._problems.append(f"{address_text(local)} is connected to itself: not checked")
        self._connections += 1
        self._ends[ends] = (connection, 0)
        self._ends[ends[1], ends[0]] = (connection, 1)
        return self._ends[local, remote]

    def _used_again(self, connection: Connection, due: int = 0, end: int = 0) -> Connection:
        """The connection that now begins between the same addresses, if the old one may be over.

        `due` is what `end` cannot still have to send, since it would have been seen.
        """
        connection.settle()
        if connection.divergence is not None:
            number = self._model.anywhere(connection.mode)
            sequence = None
        elif connection.stuck or not connection.may_be_over(connection.number, due, end):
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
            self._findings,
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
        sided = connection.sequence and connection.sequence.one_sided
        if connection.suspect and suspicion and not sided and connection.divergence is None:
            connection.diverge(connection.suspect, str(suspicion), suspicion.rule)
        seen = connection.mode
        both = ex.SEES_A & seen and ex.SEES_B & seen and not connection.forged
        sequence = connection.sequence
        whole = sequence is not None and not connection.lossy and not connection.forged
        if both or (sequence and whole and (sequence.exact or sequence.presumed)):
            self._strong += 1
        elif seen & (ex.SEES_A | ex.SEES_B | ex.SEGMENTS):
            self._partial += 1
        if self._on_end is not None:
            self._on_end(connection)

    # What is said.

    def _evidence(self) -> Evidence:
        total = self._connections
        if total and self._strong == total and not self._lost and not self._unended:
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
        if self._unended:
            unseen.append("what followed where the file breaks off")
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
_WITHOUT_PEER: Final = frozenset({Tcp.OPEN_PASSIVE, Tcp.CLOSE, Tcp.ABORT})
_OPENED: Final = "RFC 9293 §3.10.1, §3.10.4: OPEN makes a listener, CLOSE ends it"
_OF_A_LANE: Final = (Transition, SegmentSeen, Called, Begun)
_OVER: Final = ex.MAY_BE_OVER | ex.MAY_BE_OVER << 8
_TELLS: Final = {
    "connect": ex.CONNECTED,
    "accept": ex.CONNECTED,
    "shutdown": ex.SHUT_DOWN_BY_CALL,
    "close": ex.CLOSED_BY_CALL,
}
_PEERLESS: Final = [0 if state is State.LISTEN else int(state) for state in State]


def _is_call(event: Event | Begun) -> bool:
    return isinstance(event, Called | Begun)


def _passive(old: State, new: State, source: str) -> bool | None:
    if State.SYN_SENT in (old, new):
        return False
    if new is State.SYN_RECEIVED and old in (State.LISTEN, State.CLOSED):
        return True
    return None


def _is_far(event: SegmentSeen, segments: list[SegmentSeen]) -> bool:
    """Whether a segment's numbers are unlike those of all others: of another connection's.

    Out of TIME_WAIT Linux begins 65,537 after the last one (tcp_timewait_state_process).
    """
    return all(
        abs(seq_diff(mine, theirs)) > 0xFFFF
        for other in segments
        if other is not event
        for mine in (event.seq, event.ack)
        for theirs in (other.seq, other.ack)
        if mine and theirs
    )


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

"""What a piece of code does with TCP connections, and assertions about it that explain themselves.

A witness watches from `__enter__` to `__exit__` and blames only its own process tree. It puts
together what it can see without privilege:

- the `Ledger`: every socket call of this process's Python code, with the state the
  kernel had the socket in at that instant;
- the kernel's table (sock_diag): of a connection's two ends whenever one of them
  moves, of everything whenever something is asked, and now and then while this
  process has children, whose calls it does not see;
- `/proc`: whose a socket is.

A TIME_WAIT has no owner; it is this code's when its connection is, or when it
is at a port this code listened on. `blind` says in words what could not be seen.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, SupportsIndex

from attrs import define, field, frozen

from timewait.events import Address, Called, Event, Row, RunStarted, Snapshot, Transition
from timewait.ledger import End, Entry, Ledger, Place
from timewait.port import HeldPort
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.check import Verdict
    from timewait.kernel.sock_diag import SockDiag

__all__ = ["Connection", "Endpoint", "Side", "UnusedPort", "Witness"]

Side = Literal["client", "server"]

_CLOSED_FIRST: Final = {State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.TIME_WAIT}
_CLOSED_SECOND: Final = {State.CLOSE_WAIT, State.LAST_ACK}
_PASSING: Final = {
    State.SYN_SENT,
    State.SYN_RECEIVED,
    State.FIN_WAIT_1,
    State.CLOSING,
    State.LAST_ACK,
}
_LEFT_OPEN: Final = {State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_2}
_OTHER: Final[dict[Side, Side]] = {"client": "server", "server": "client"}
_PATIENCE: Final = 1.0  # seconds that an assertion waits for a close to finish
_STEP: Final = 0.005
_TURNS: Final = 10
_PERIOD: Final = 0.02  # seconds between looks at the children's sockets


class UnusedPort(LookupError):
    """A question about a port on which nothing was seen: most likely the wrong number."""


@frozen
class Endpoint:
    """One side of a connection as it was last seen.

    `state` is None once the kernel has forgotten it; `last_state` is the
    state before that. `since` is when it was first seen in this state, in
    seconds of `time.monotonic`. `pid` and `process` are who opened it, where
    that was this process tree; `held` tells whether a process still has it
    (or a listener of this tree, in its backlog). `created` is the line that
    made it, where this process did. `seconds_left` is what remains of
    TIME_WAIT.
    """

    local: Address
    remote: Address
    side: Side
    state: State | None
    last_state: State | None
    since: float
    pid: int | None = None
    process: str | None = None
    held: bool = False
    created: Place | None = None
    ends: tuple[End, ...] = ()
    seconds_left: float | None = None

    def __str__(self) -> str:
        return f"{_text(self.local)} -> {_text(self.remote)}"


@frozen
class Connection:
    """A connection's two sides and what their ends tell.

    `closed_by` is who closed first: "client", "server", "both" at once, or
    None while it is open or where the evidence does not tell; `how` is "FIN"
    or "RST"; `because` is the evidence in words. `reset_by` names the side
    that sent a RST, and `reset_because` why. A side is None where nothing of
    it was seen (it is another machine's).
    """

    client: Endpoint | None
    server: Endpoint | None
    closed_by: Side | Literal["both"] | None
    how: Literal["FIN", "RST"] | None
    because: str
    reset_by: Side | None = None
    reset_because: str = ""

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """The sides that were seen."""
        return tuple(end for end in (self.client, self.server) if end is not None)

    @property
    def port(self) -> int:
        """The server's port."""
        if self.server is not None:
            return self.server.local[1]
        assert self.client is not None
        return self.client.remote[1]

    @property
    def open(self) -> bool:
        """Whether neither side has closed, as far as was seen."""
        return self.closed_by is None and any(
            end.state is State.ESTABLISHED for end in self.endpoints
        )

    @property
    def time_wait(self) -> Side | Literal["both"] | None:
        """The side in TIME_WAIT now."""
        sides = [end.side for end in self.endpoints if end.state is State.TIME_WAIT]
        return "both" if len(sides) == 2 else sides[0] if sides else None

    def __str__(self) -> str:
        end = self.client or self.server
        assert end is not None
        return f"{_text(end.local)} -> {_text(end.remote)}" if self.client else f"{end}"


@define(eq=False)
class _Seen:
    """An endpoint while it is being watched."""

    local: Address
    remote: Address
    state: State | None
    since: float
    row: Row | None = None
    entry: Entry | None = None
    pid: int | None = None
    history: list[tuple[float, State]] = field(factory=list)

    def move(self, state: State | None, now: float) -> None:
        if state is not self.state or not self.history:
            self.state, self.since = state, now
            if state is not None:
                self.history.append((now, state))

    @property
    def states(self) -> set[State]:
        return {state for _, state in self.history}


_Key = tuple[Address, Address]


class Witness:
    """Watches the TCP connections of this process and its children.

        with Witness() as seen:
            run_the_code()
        seen.assert_closed_by("client", port=9090)

    As a synchronous or an asynchronous context manager. Questions can be
    asked while it watches and afterwards, when the answers are about the
    moment it stopped. With `stacks`, messages show the whole stack that
    created a socket. Assertions wait up to a second for a close that is under
    way; in a coroutine, `await seen.settled()` first, so that the loop can
    do its part.

    Raises `OSError` on entry where the system shows no sockets at all.
    """

    def __init__(self, *, stacks: bool = False) -> None:
        self._ledger = Ledger(stacks=stacks, on_change=self._moved)
        self._look_at = _table()
        self._seen: dict[_Key, _Seen] = {}
        self._past: list[list[_Seen]] = []  # pairs whose addresses were used again
        self._listening: dict[int, bool] = {}  # port -> whether this process tree listens there
        self._before: dict[_Key, Row] = {}
        self._owned: dict[int, int] | None = None  # inode -> pid, as of this look
        self._not_ours: set[int] = set()
        self._children: set[int] = set()
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._poller: threading.Thread | None = None
        self._watching = False
        self._began = 0.0

    # --- watching

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._diag = _sock_diag()
        for row in self._look_at():
            self._before[row.local, row.remote] = row
            if row.state is State.LISTEN:
                self._listening.setdefault(row.local[1], False)
        self._ledger.__enter__()
        self._watching = True
        _watching.add(self)
        self._resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.look()
        self._watching = False
        _watching.discard(self)
        self.pause()
        self._ledger.__exit__(kind, error, trace)
        if self._diag is not None:
            self._diag.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def pause(self) -> None:
        """Stop the background looks until something moves (a fork wants no other threads)."""
        if self._poller is not None:
            self._stop.set()
            self._poller.join()
            self._stop.clear()
            self._poller = None

    def _resume(self) -> None:
        if self._poller is None and self._watching:
            self._poller = threading.Thread(target=self._poll, name="timewait", daemon=True)
            self._poller.start()

    def look(self) -> None:
        """Read the kernel's table now."""
        self._resume()
        with self._lock:
            self._not_ours.clear()
            self._look()

    def _look(self) -> None:
        with self._lock:
            if not self._watching:
                return
            now = time.monotonic()
            self._owned = None
            rows = self._look_at()
            present: set[_Key] = set()
            for row in rows:
                key = row.local, row.remote
                if row.state is State.LISTEN:
                    if not self._listening.get(row.local[1]):
                        self._listening[row.local[1]] = self._owner(row.inode) is not None
                    continue
                before = self._before.get(key)
                if before is not None and row.inode in (before.inode, 0, None):
                    continue  # it was there already
                present.add(key)
                self._note(key, row, now)
            for key, seen in list(self._seen.items()):
                if key not in present:
                    seen.row = None
                    seen.move(None, now)
                    if not self._ours(seen):
                        del self._seen[key]  # a stranger's: it came and went

    def _note(self, key: _Key, row: Row, now: float) -> _Seen:
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = _Seen(*key, None, now)
        seen.row = row
        if seen.pid is None and row.inode:
            seen.pid = self._owner(row.inode)
        seen.move(row.state, now)
        return seen

    def _moved(self, entry: Entry) -> None:
        """A socket of this process moved: look at both of the connection's ends."""
        if entry.side == "listener" and entry.local is not None:
            self._listening[entry.local[1]] = True
        if entry.local is None or entry.remote is None:
            return
        key = entry.local, entry.remote
        self._resume()
        with self._lock:
            self._owned = None
            now = time.monotonic()
            seen = self._seen.get(key)
            if seen is None or (seen.entry is not None and seen.entry is not entry):
                if seen is not None:
                    self._past.append(
                        [self._seen.pop(way) for way in {key, key[::-1]} & {*self._seen}]
                    )
                seen = self._seen[key] = _Seen(*key, None, now)
            seen.entry, seen.pid = entry, os.getpid()
            if entry.ends and entry.ends[-1].state not in (State.CLOSED, None):
                seen.move(entry.ends[-1].state, entry.ends[-1].t)
            if self._diag is None:
                return
            for way in (key, key[::-1]):
                try:
                    row = self._diag.lookup(*way)
                except (OSError, ValueError):
                    continue
                if row is not None:
                    self._note(way, row, now)
                elif way in self._seen:
                    self._seen[way].row = None
                    self._seen[way].move(None, now)

    def _poll(self) -> None:
        """Look now and then while there are children: their calls are not in the ledger."""
        while not self._stop.wait(_PERIOD):
            if _children(os.getpid()):
                began = time.monotonic()
                self._look()
                if self._stop.wait((time.monotonic() - began) * 10):  # at most a tenth of a core
                    return

    def _owner(self, inode: int | None) -> int | None:
        """The process of this tree that has the socket open."""
        if not inode or inode in self._not_ours:
            return None
        if self._owned is None:
            daemons = {pid for pid in self._children if os.path.exists(f"/proc/{pid}")}
            self._children = _tree(os.getpid()) | daemons  # once a child of ours, still ours
            self._owned = _owners(self._children)
        if inode not in self._owned:
            self._not_ours.add(inode)
        return self._owned.get(inode)

    # --- what was seen

    @property
    def connections(self) -> list[Connection]:
        """The connections that this code's process tree had a part in, oldest first."""
        self.look()
        with self._lock:
            return list(self._connections())

    @property
    def time_wait(self) -> list[Endpoint]:
        """The ends of those connections that are in TIME_WAIT."""
        return self._in({State.TIME_WAIT})

    @property
    def leaks(self) -> list[Endpoint]:
        """Ends this process tree still has open: ESTABLISHED, CLOSE_WAIT or FIN_WAIT_2."""
        return [end for end in self._in(_LEFT_OPEN) if end.held]

    @property
    def resets(self) -> list[Connection]:
        """The connections that ended by a RST, as far as was seen."""
        return [each for each in self.connections if each.reset_by is not None]

    @property
    def ports(self) -> list[int]:
        """The servers' ports of the connections, and those this process tree listens on."""
        ports = {each.port for each in self.connections}
        return sorted(ports | {port for port, own in self._listening.items() if own})

    @property
    def opened(self) -> int:
        """How many TCP sockets this process tree was seen to open."""
        own = [seen for seen in self._all() if seen.pid is not None]
        listeners = [e for e in self._ledger.entries if e.side == "listener"]
        return len(own) + len(listeners)

    @property
    def blind(self) -> tuple[str, ...]:
        """What could not be seen, in words."""
        blind = []
        if self._diag is None:
            blind.append("no timers and no state at the moment of a call: psutil shows states only")
        if len(self._children) > 1:
            blind.append(
                f"what child processes did between two looks, {_PERIOD * 1000:.0f} ms apart"
            )
        blind.append("sockets made below Python: their states only when the table is read")
        return tuple(blind)

    def active_closer(self, port: SupportsIndex | None = None) -> str | None:
        """Who closed first: "client", "server", "both" at once, "mixed" where connections differ.

        None where none has closed, or the evidence does not tell.

        Raises `UnusedPort`.
        """
        closers = {each.closed_by for each in self._of(port)} - {None}
        return "mixed" if len(closers) > 1 else closers.pop() if closers else None

    @property
    def events(self) -> list[Event]:
        """The same as a stream of events, for `check` and for a file."""
        self.look()
        events: list[Event] = []
        with self._lock:
            for seen in self._all():
                if self._ours(seen):
                    events += self._events_of(seen)
            rows = tuple(s.row for s in self._seen.values() if s.row and self._ours(s))
        source = "psutil" if self._diag is None else "sock_diag"
        head = RunStarted(0.0, "kernel", source, blind=self.blind)
        tail = Snapshot(time.monotonic() - self._began, "end", rows, source)
        return [head, *sorted(events, key=attrgetter("t")), tail]

    def _events_of(self, seen: _Seen) -> Iterator[Event]:
        source = "psutil" if self._diag is None else "sock_diag"
        actor = self._side(seen)
        if seen.entry is not None:
            if seen.entry.side in ("client", "server"):
                call = "connect" if seen.entry.side == "client" else "accept"
                t = seen.entry.t - self._began
                yield Called(t, actor, call, seen.local, seen.remote, seen.entry.failed)
            for end in seen.entry.ends:
                yield Called(end.t - self._began, actor, end.call, seen.local, seen.remote)
        old = State.CLOSED
        for t, state in seen.history:
            yield Transition(t - self._began, seen.local, seen.remote, old, state, source, True)
            old = state

    def check(self, *, profiles: dict[str, str] | None = None) -> Verdict:
        """Hold what was seen against the model (see `timewait.check.check`)."""
        from timewait.check import check

        return check(self.events, profiles=profiles)

    # --- assertions

    def assert_closed_by(self, side: Side, port: SupportsIndex | None = None) -> None:
        """Every connection (to the server's `port`) was closed first by this side.

        Raises `AssertionError`; `UnusedPort` where there was no connection.
        """
        __tracebackhide__ = True
        if side not in _OTHER:
            raise ValueError(f'closed_by is "client" or "server", not {side!r}')
        self._wait(lambda: [each for each in self._of(port) if each.closed_by is None])
        wrong = [each for each in self._of(port) if each.closed_by != side]
        if wrong:
            raise AssertionError(
                f"{_count(wrong, 'connection')} not closed first by the {side}\n"
                + "\n".join(map(self._tell, wrong))
            )

    def assert_no_time_wait(self, port: SupportsIndex | None = None) -> None:
        """Nothing is left in TIME_WAIT; with `port`, nothing bound to that port (see `bind`).

        Raises `AssertionError`; `UnusedPort` where nothing was seen on the port.
        """
        __tracebackhide__ = True
        self.assert_time_wait_within(0, port)

    def assert_time_wait_within(self, budget: int, port: SupportsIndex | None = None) -> None:
        """At most `budget` sockets are left in TIME_WAIT; see `assert_no_time_wait`."""
        __tracebackhide__ = True
        number = self._used(port)
        self._wait(lambda: [end for end in self._in(_PASSING) if number in (None, *_ports(end))])
        left = [end for end in self.time_wait if number in (None, end.local[1])]
        if len(left) > budget:
            allowed = f", {budget} allowed" if budget else ""
            raise AssertionError(
                f"{_count(left, 'socket')} left in TIME_WAIT{allowed}\n"
                + "\n".join(map(self._tell_end, left))
            )

    def assert_no_leak(self) -> None:
        """This process tree has no connection left in ESTABLISHED, CLOSE_WAIT or FIN_WAIT_2.

        Raises `AssertionError`.
        """
        __tracebackhide__ = True
        left = self._wait(lambda: self.leaks)
        if left:
            raise AssertionError(
                f"{_count(left, 'socket')} left open\n" + "\n".join(map(self._tell_end, left))
            )

    def assert_no_reset(self, port: SupportsIndex | None = None) -> None:
        """No connection (to the server's `port`) ended by a RST, as far as was seen.

        Raises `AssertionError`; `UnusedPort` where nothing was seen on the port.
        """
        __tracebackhide__ = True
        self._used(port)
        wrong = [each for each in self._of(port, none=True) if each.reset_by is not None]
        if wrong:
            raise AssertionError(
                f"{_count(wrong, 'connection')} reset\n" + "\n".join(map(self._tell, wrong))
            )

    def assert_bindable(
        self, port: SupportsIndex, host: str = "0.0.0.0", *, reuse_address: bool = False
    ) -> None:
        """A server could be started on the port now; tried for real, leaving nothing behind.

        Without `reuse_address` as a server that sets no option. A `HeldPort`
        that is still held is released first.

        Raises `AssertionError`; `UnusedPort` where nothing was seen on the port.
        """
        __tracebackhide__ = True
        number = self._used(port)
        assert number is not None
        if isinstance(port, HeldPort):
            port.release()
        self._wait(lambda: self._held_otherwise(number) and _refusal(number, host, reuse_address))
        if refused := _refusal(number, host, reuse_address):
            with self._lock:
                held = [
                    self._endpoint(seen)
                    for seen in self._seen.values()
                    if seen.state is not None and seen.local[1] == number
                ]
            option = "with" if reuse_address else "without"
            raise AssertionError(
                f"port {number} cannot be bound {option} SO_REUSEADDR: {refused}\n"
                + "\n".join([*map(self._tell_end, held), *_why_refused(number, host, bool(held))])
            )

    def _held_otherwise(self, port: int) -> bool:
        """Whether something other than TIME_WAIT has the port, which may end soon."""
        local = [row.state for row in self._look_at() if row.local[1] == port]
        return any(state is not State.TIME_WAIT for state in local)

    # --- waiting

    def settle(self, limit: float = _PATIENCE) -> bool:
        """Wait until no close is under way, at most `limit` seconds; whether that was reached."""
        return not self._wait(self._unsettled, limit)

    async def settled(self, limit: float = _PATIENCE) -> bool:
        """As `settle`, letting the event loop run: closing is often its work. asyncio or trio."""
        import anyio

        deadline = time.monotonic() + limit
        for _ in range(_TURNS):  # asyncio's close() does nothing before the loop runs
            await anyio.sleep(0)
        while self._unsettled():
            if time.monotonic() > deadline:
                return False
            await anyio.sleep(_STEP)
        return True

    def _unsettled(self) -> list[Endpoint]:
        """Ends that move by themselves, and half-closed ones of a close that may go on."""
        return self._in(_PASSING | {State.CLOSE_WAIT, State.FIN_WAIT_2})

    def _wait(self, trouble: Callable[[], Any], limit: float = _PATIENCE) -> Any:
        """What `trouble` finds, giving it time to go away."""
        deadline = time.monotonic() + limit
        while found := trouble():
            if not self._watching or time.monotonic() > deadline:
                return found
            time.sleep(_STEP)
        return found

    # --- putting the evidence together

    def _all(self) -> list[_Seen]:
        return [*(seen for pair in self._past for seen in pair), *self._seen.values()]

    def _of(self, port: SupportsIndex | None, *, none: bool = False) -> list[Connection]:
        number = None if port is None else port.__index__()
        found = [each for each in self.connections if number in (None, each.port)]
        if not found and not none:
            where = (
                "no connection was seen" if number is None else f"no connection to port {number}"
            )
            raise UnusedPort(f"{where}{self._instead()}")
        return found

    def _used(self, port: SupportsIndex | None) -> int | None:
        """The port's number; an error where nothing at all was seen on it."""
        if port is None:
            return None
        number = port.__index__()
        self.look()
        ends = {p for s in self._all() if self._ours(s) for p in _ports(s)}
        if number not in ends and number not in self.ports:
            raise UnusedPort(f"port {number} was never used{self._instead()}")
        return number

    def _instead(self) -> str:
        ports = ", ".join(map(str, self.ports))
        return f"; the ports used were {ports}" if ports else "; no port was used"

    def _in(self, states: set[State]) -> list[Endpoint]:
        self.look()
        with self._lock:
            return [
                self._endpoint(seen)
                for seen in self._seen.values()
                if seen.state in states and self._ours(seen)
            ]

    def _ours(self, seen: _Seen) -> bool:
        """Whether this code had a part in the connection."""
        if seen.pid is not None or self._listening.get(seen.local[1]):
            return True
        mirror = self._seen.get((seen.remote, seen.local))
        return mirror is not None and (
            mirror.pid is not None or self._listening.get(mirror.local[1], False)
        )

    def _held(self, seen: _Seen) -> bool:
        """Whether a process of this tree has it; a connection in a backlog is its listener's."""
        if seen.row is None or seen.state not in _LEFT_OPEN:
            return False
        if seen.row.inode:
            return seen.pid is not None
        waiting = seen.entry is None and seen.pid is None and seen.state is not State.FIN_WAIT_2
        return waiting and self._listening.get(seen.local[1], False)

    def _side(self, seen: _Seen) -> Side:
        if seen.entry is not None and seen.entry.side in ("client", "server"):
            return "client" if seen.entry.side == "client" else "server"
        mirror = self._seen.get((seen.remote, seen.local))
        if mirror is not None and mirror.entry is not None and mirror is not seen:
            if mirror.entry.side == "client":
                return "server"
            if mirror.entry.side == "server":
                return "client"
        here, there = seen.local[1] in self._listening, seen.remote[1] in self._listening
        return "server" if here and not there else "client"

    def _endpoint(self, seen: _Seen) -> Endpoint:
        in_time_wait = seen.state is State.TIME_WAIT and seen.row is not None
        return Endpoint(
            seen.local,
            seen.remote,
            self._side(seen),
            seen.state,
            seen.history[-1][1] if seen.history else None,
            seen.since,
            seen.pid,
            _name(seen.pid),
            self._held(seen),
            seen.entry.created if seen.entry else None,
            tuple(seen.entry.ends) if seen.entry else (),
            seen.row.seconds_left if in_time_wait and seen.row else None,
        )

    def _connections(self) -> Iterator[Connection]:
        done: set[_Key] = set()
        pairs = list(self._past)
        for key, seen in self._seen.items():
            if key not in done and self._ours(seen):
                pairs.append(
                    [
                        self._seen[way]
                        for way in dict.fromkeys((key, key[::-1]))
                        if way in self._seen
                    ]
                )
                done |= {key, key[::-1]}
        for pair in pairs:
            if any(seen.states - {State.SYN_SENT} for seen in pair):
                first = self._side(pair[0])
                yield self._judge(dict(zip((first, _OTHER[first]), pair, strict=False)))

    def _judge(self, sides: dict[Side, _Seen]) -> Connection:
        """Who closed first and how: by the calls where they were seen, else by the states."""
        closed, because = self._closed_by(sides)
        reset, reset_because = self._reset_by(sides)
        if closed is None and reset is not None:
            closed, because = reset, reset_because
        how: Literal["FIN", "RST"] | None = None
        if closed is not None:
            how = "FIN"
            if reset == closed and (because == reset_because or _aborts(_first_end(sides[reset]))):
                how = "RST"
        ends = {side: self._endpoint(seen) for side, seen in sides.items()}
        return Connection(
            ends.get("client"), ends.get("server"), closed, how, because, reset, reset_because
        )

    def _closed_by(self, sides: dict[Side, _Seen]) -> tuple[Side | Literal["both"] | None, str]:
        if len(sides) == 2 and all(
            seen.states & {State.CLOSING, State.TIME_WAIT} for seen in sides.values()
        ):
            return "both", "both sides went to TIME_WAIT"
        calls = [(end.t, side, end) for side, seen in sides.items() if (end := _first_end(seen))]
        for _, side, end in sorted(calls, key=lambda call: call[0]):
            if end.state is State.ESTABLISHED:
                return side, f"the {side} called {end.call} in {end.state}, at {end.place}"
        for _, side, end in calls:
            if end.state in _CLOSED_SECOND:
                return _OTHER[side], f"the {side} was in {end.state} when it called {end.call}"
        for side, seen in sides.items():
            for state in sorted(seen.states & _CLOSED_FIRST):
                return side, f"the {side} was seen in {state}"
            for state in sorted(seen.states & _CLOSED_SECOND):
                return _OTHER[side], f"the {side} was seen in {state}"
        if any(seen.state is not None for seen in sides.values()):
            return None, "neither side has closed"
        return None, "it ended between two looks: this evidence does not tell who closed first"

    def _reset_by(self, sides: dict[Side, _Seen]) -> tuple[Side | None, str]:
        for side, seen in sides.items():
            for end in seen.entry.ends if seen.entry else ():
                if _aborts(end):
                    why = f"{end.unread} bytes unread" if end.unread else "SO_LINGER of 0 s"
                    return side, f"the {side} called {end.call} with {why}, at {end.place}"
        for side, seen in sides.items():
            first = _first_end(seen)
            if first is not None and first.state is State.CLOSED:
                return _OTHER[side], f"the {side}'s socket was dead when it called {first.call}"
        return None, ""

    # --- telling

    def _tell(self, connection: Connection) -> str:
        lines = [f"  {connection}"]
        closer = connection.closed_by
        if closer is not None:
            who = "both sides" if closer == "both" else f"the {closer}"
            lines.append(f"    closed first by {who} ({connection.how}): {connection.because}")
        else:
            lines.append(f"    {connection.because}")
        if connection.reset_by is not None and connection.reset_because != connection.because:
            lines.append(f"    reset by the {connection.reset_by}: {connection.reset_because}")
        for end in connection.endpoints:
            lines.append(f"    {end.side}: {self._condition(end)}")
            lines += [f"      {line}" for line in self._origin(end)]
        return "\n".join(lines)

    def _tell_end(self, end: Endpoint) -> str:
        lines = [f"  {end.side}'s side {end}", f"    {self._condition(end)}"]
        lines += [f"    {line}" for line in self._origin(end)]
        with self._lock:
            for each in self._connections():
                if end.local in (e.local for e in each.endpoints) and each.closed_by:
                    who = "both sides" if each.closed_by == "both" else f"the {each.closed_by}"
                    lines.insert(2, f"    closed first by {who}: {each.because}")
                    break
        return "\n".join(lines)

    def _condition(self, end: Endpoint) -> str:
        if end.state is None:
            last = f", last seen in {end.last_state}" if end.last_state is not None else ""
            return f"gone{last}"
        text = f"{end.state} for {time.monotonic() - end.since:.2f} s"
        if end.seconds_left is not None:
            text += f", {end.seconds_left:.0f} s left"
        elif end.held and end.pid is None:
            text += ", in the listener's backlog: never accepted"
        elif end.held:
            text += f", open in {end.process or 'process'} (pid {end.pid})"
        elif end.pid is not None:
            text += ", closed by its process"
        return text

    def _origin(self, end: Endpoint) -> list[str]:
        if end.created is None:
            return []
        stack = [f"    {file}:{line} in {name}" for file, line, name in end.created.stack]
        return [f"created at {end.created}", *stack]


def _first_end(seen: _Seen) -> End | None:
    return seen.entry.ends[0] if seen.entry and seen.entry.ends else None


def _aborts(end: End | None) -> bool:
    """Whether the call sent a RST: close(2) with unread data or SO_LINGER of 0."""
    return (
        end is not None
        and end.call == "close"
        and end.state not in (State.CLOSED, None)
        and bool(end.abortive or end.unread)
    )


def _ports(end: Endpoint | _Seen) -> tuple[int, int]:
    return end.local[1], end.remote[1]


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _refusal(port: int, host: str, reuse_address: bool) -> str:
    """The error that a server would get there, or an empty string."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        try:
            sock.bind((host, port))
            sock.listen()
        except OSError as refused:
            return errno.errorcode.get(refused.errno or 0, str(refused))
    return ""


def _why_refused(port: int, host: str, told: bool) -> list[str]:
    """The rule in words, and who else holds the port where that was not told."""
    from timewait.explain import explain_bind

    try:
        found = explain_bind(port, host)
    except OSError:
        return []
    lines = [] if told else [f"  held by {holder}" for holder in found.holders]
    if found.rule:
        lines.append(f"  why: {found.rule}")
    if found.free_after:
        lines.append(f"  free in {found.free_after:.0f} s")
    return lines


_watching: Final[weakref.WeakSet[Witness]] = weakref.WeakSet()


def _before_fork() -> None:
    for witness in list(_watching):
        witness.pause()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork)


# --- the system's tables ------------------------------------------------------------------


def _sock_diag() -> SockDiag | None:
    """A netlink socket for exact look-ups, where the system has such."""
    if not sys.platform.startswith("linux"):
        return None
    from timewait.kernel.sock_diag import SockDiag

    try:
        return SockDiag()
    except OSError:
        return None


def _table() -> Callable[[], list[Row]]:
    """How this system's TCP sockets are listed. Raises `OSError` where they are not."""
    if sys.platform.startswith("linux"):
        from timewait.kernel.sock_diag import sockets

        try:
            sockets(1)
        except OSError:
            pass
        else:
            return sockets
    try:
        import psutil
    except ImportError:
        raise OSError(
            errno.ENOTSUP, "no way to list TCP sockets here: neither sock_diag nor psutil"
        ) from None

    def states() -> list[Row]:
        return [
            Row(
                (conn.laddr[0], conn.laddr[1]),
                (conn.raddr[0], conn.raddr[1]) if conn.raddr else ("0.0.0.0", 0),
                State.parse(conn.status),
                inode=conn.fd if conn.pid in _tree(os.getpid()) else 0,
            )
            for conn in psutil.net_connections(kind="tcp")
            if conn.laddr
        ]

    return states


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as listed:
                children += map(int, listed.read().split())
    except OSError:
        pass
    return children


def descendants(pid: int) -> list[int]:
    """The children of a process and theirs, parents first."""
    found = _children(pid)
    for each in found:  # (it grows)
        found += _children(each)
    return found


def _tree(pid: int) -> set[int]:
    return {pid, *descendants(pid)}


_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")


def _owners(pids: Iterable[int]) -> dict[int, int]:
    """Socket inode -> the process among these that has it open."""
    owners: dict[int, int] = {}
    for pid in pids:
        try:
            with os.scandir(f"/proc/{pid}/fd") as fds:
                for fd in fds:
                    try:
                        link = _SOCKET.fullmatch(os.readlink(fd.path))
                    except OSError:
                        continue
                    if link:
                        owners.setdefault(int(link[1]), pid)
        except OSError:
            continue
    return owners


def _name(pid: int | None) -> str | None:
    if pid is None:
        return None
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None

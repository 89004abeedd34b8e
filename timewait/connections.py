"""The connections that were seen, questions about them, and assertions that explain themselves.

Whoever watches (`timewait.witness`, `timewait.watching`) puts in what it sees
of each endpoint: its states in their order, the calls of its process where
they were noted, its row in the kernel's table. Here the endpoints are put
together into connections, and the evidence is judged: by the calls where they
were seen, else by the states.
"""

from __future__ import annotations

import errno
import operator
import os
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, SupportsIndex

from attrs import define, field, frozen

from timewait.events import Address, Row, Transition
from timewait.ledger import End, Entry, Place, clock
from timewait.port import HeldPort
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.check import Verdict

__all__ = ["Connection", "Connections", "Endpoint", "Seen", "Side", "UnusedPort"]

Side = Literal["client", "server"]

CLOSED_FIRST: Final = {State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.TIME_WAIT}
_CLOSED_SECOND: Final = {State.CLOSE_WAIT, State.LAST_ACK}
_PASSING: Final = {
    State.SYN_SENT,
    State.SYN_RECEIVED,
    State.FIN_WAIT_1,
    State.CLOSING,
    State.LAST_ACK,
}
LEFT_OPEN: Final = {State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_2}
_OTHER: Final[dict[Side, Side]] = {"client": "server", "server": "client"}
_PATIENCE: Final = 1.0  # seconds that an assertion waits for a close to finish
_STEP: Final = 0.005
_TURNS: Final = 10


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
    made it, where this process did (its listener, where a library called
    accept()). `seconds_left` is what remains of TIME_WAIT.
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
class Seen:
    """An endpoint while it is being watched; `history` is its states in their order.

    `told` are the transitions as the kernel made them, where it told of them.
    """

    local: Address
    remote: Address
    state: State | None
    since: float
    row: Row | None = None
    entry: Entry | None = None
    pid: int | None = None
    own: bool = False  # a process of interest began it, whichever
    reset: str = ""  # how a RST of this side's was seen, in words
    history: list[tuple[float, State]] = field(factory=list)
    told: list[Transition] = field(factory=list)

    def move(self, state: State | None, now: float) -> None:
        """It was in this state (None: gone) at this time, perhaps before what is known already."""
        if now < self.since and self.history:
            if state is not None:
                self._was(state, now)
        elif state is not self.state or not self.history:
            self.state, self.since = state, now
            if state is not None:
                self.history.append((now, state))

    def _was(self, state: State, then: float) -> None:
        later = next(n for n, (t, _) in enumerate([*self.history, (self.since, None)]) if t > then)
        if later < len(self.history) and self.history[later][1] is state:
            self.history[later] = then, state  # known already, but not since when
            if later == len(self.history) - 1 and state is self.state:
                self.since = then
        else:
            self.history.insert(later, (then, state))

    @property
    def states(self) -> set[State]:
        """All states it was ever in."""
        return {state for _, state in self.history}


Key = tuple[Address, Address]


class Connections(ABC):
    """What was seen of connections so far, and what follows from it.

    Questions can be asked while it is being watched and afterwards, when the
    answers are about the moment the watch ended. Assertions wait up to a
    second for a close that is under way; in a coroutine, `await
    seen.settled()` first, so that the loop can do its part.
    """

    events: Any

    def __init__(self) -> None:
        self._seen: dict[Key, Seen] = {}
        self._past: list[list[Seen]] = []  # pairs whose addresses were used again
        self._listening: dict[int, bool] = {}  # port -> whether a listener of interest is there
        self._lock = threading.RLock()
        self._watching = False

    @abstractmethod
    def look(self) -> None:
        """Read the system's table now."""

    @abstractmethod
    def _table(self) -> list[Row]:
        """The system's table as it is now."""

    @abstractmethod
    def _ours(self, seen: Seen) -> bool:
        """Whether the connection is of interest."""

    @abstractmethod
    def _held(self, seen: Seen) -> bool:
        """Whether somebody of interest still has the endpoint open."""

    # --- what was seen

    @property
    def connections(self) -> list[Connection]:
        """The connections of interest that were seen, oldest first."""
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
        return [end for end in self._in(LEFT_OPEN) if end.held]

    @property
    def resets(self) -> list[Connection]:
        """The connections that ended by a RST, as far as was seen."""
        return [each for each in self.connections if each.reset_by is not None]

    @property
    def ports(self) -> list[int]:
        """The servers' ports of the connections, and those this process tree listens on."""
        ports = {each.port for each in self.connections}
        return sorted(ports | {port for port, own in self._listening.items() if own})

    def active_closer(self, port: SupportsIndex | None = None) -> str | None:
        """Who closed first: "client", "server", "both" at once, "mixed" where connections differ.

        None where none has closed, or the evidence does not tell.

        Raises `UnusedPort`.
        """
        __tracebackhide__ = True
        closers = {each.closed_by for each in self._of(port)} - {None}
        return "mixed" if len(closers) > 1 else closers.pop() if closers else None

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
        self._of(port)
        self._wait(lambda: [each for each in self._of(port) if each.closed_by is None])
        wrong = [each for each in self._of(port) if each.closed_by != side]
        if wrong:
            raise AssertionError(
                f"{_count(wrong, 'connection')} not closed first by the {side}\n"
                + "\n".join(
                    [*map(self._tell, wrong), *_hint(e for c in wrong for e in c.endpoints)]
                )
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

    def assert_no_leak(self, port: SupportsIndex | None = None) -> None:
        """This process tree has no connection left in ESTABLISHED, CLOSE_WAIT or FIN_WAIT_2.

        With `port`, none with that port at either end.

        Raises `AssertionError`; `UnusedPort` where nothing was seen on the port.
        """
        __tracebackhide__ = True
        number = self._used(port)
        left = self._wait(lambda: [end for end in self.leaks if number in (None, *_ports(end))])
        if left:
            raise AssertionError(
                f"{_count(left, 'socket')} left open\n"
                + "\n".join([*map(self._tell_end, left), *_hint(left)])
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
        local = [row.state for row in self._table() if row.local[1] == port]
        return any(state is not State.TIME_WAIT for state in local)

    # --- waiting

    def settle(self, limit: float = _PATIENCE) -> bool:
        """Wait until no close is under way, at most `limit` seconds; whether that was reached."""
        return not self._wait(self._unsettled, limit)

    async def settled(self, limit: float = _PATIENCE) -> bool:
        """As `settle`, letting the event loop run: closing is often its work. asyncio or trio."""
        import anyio

        deadline = clock() + limit
        while True:
            over = clock() > deadline
            for _ in range(_TURNS):  # asyncio's close() does nothing before the loop runs
                await anyio.sleep(0)
            if not self._unsettled():
                return True
            if over:
                return False
            await anyio.sleep(_STEP)

    def _unsettled(self) -> list[Endpoint]:
        """Ends that move by themselves, and half-closed ones of a close that may go on."""
        return self._in(_PASSING | {State.CLOSE_WAIT, State.FIN_WAIT_2})

    def _wait(self, trouble: Callable[[], Any], limit: float = _PATIENCE) -> Any:
        """What `trouble` finds, giving it time to go away."""
        __tracebackhide__ = True
        deadline = clock() + limit
        while True:
            over = clock() > deadline  # before the look, which may take long
            found = trouble()
            if not found or over or not self._watching:
                return found
            time.sleep(_STEP)

    # --- putting the evidence together

    def _take_transition(self, event: Transition, t: float) -> Seen:
        """What a transition at the time `t` tells of a connection's ends; whose it was."""
        if event.old is State.CLOSED and not (event.sampled and self._goes_on(event)):
            self._forget_before(event.local, event.remote, t)
        one = self._endpoint_at(event.local, event.remote, t)
        one.move(None if event.new is State.CLOSED else event.new, t)
        if event.cause == "RST received":
            peer = self._endpoint_at(event.remote, event.local, t)
            peer.reset = f"{_text(event.local)} received a RST in {event.old}"
        return one

    def _goes_on(self, event: Transition) -> bool:
        """Whether the other end, or the table, told before of what is only now noticed here."""
        ends = (event.local, event.remote), (event.remote, event.local)
        known = next((self._seen[key] for key in ends if key in self._seen), None)
        return known is not None and known.state is not None

    def _forget_before(self, local: Address, remote: Address, t: float) -> None:
        """A connection begins: what was seen of these addresses till now was another."""
        pair = {(local, remote), (remote, local)}
        known = [self._seen[key] for key in pair if key in self._seen]
        if any(end.history and t > end.history[-1][0] for end in known):
            if any(map(self._ours, known)):
                self._past.append(known)
            for key in pair:
                self._seen.pop(key, None)

    def _endpoint_at(self, local: Address, remote: Address, t: float) -> Seen:
        return self._seen.setdefault((local, remote), Seen(local, remote, None, t))

    def _all(self) -> list[Seen]:
        return [*(seen for pair in self._past for seen in pair), *self._seen.values()]

    def _of(self, port: SupportsIndex | None, *, none: bool = False) -> list[Connection]:
        __tracebackhide__ = True
        number = None if port is None else _number(port)
        found = [each for each in self.connections if number in (None, each.port)]
        if not found and not none:
            if number in self.ports:
                raise UnusedPort(f"no connection to port {number}: nobody but its listener used it")
            where = (
                "no connection was seen" if number is None else f"no connection to port {number}"
            )
            raise UnusedPort(f"{where}{self._instead()}")
        return found

    def _used(self, port: SupportsIndex | None) -> int | None:
        """The port's number; an error where nothing at all was seen on it."""
        __tracebackhide__ = True
        if port is None:
            return None
        number = _number(port)
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

    def _side(self, seen: Seen) -> Side:
        if seen.entry is not None and seen.entry.side in ("client", "server"):
            return "client" if seen.entry.side == "client" else "server"
        mirror = self._seen.get((seen.remote, seen.local))
        if mirror is not None and mirror.entry is not None and mirror is not seen:
            if mirror.entry.side == "client":
                return "server"
            if mirror.entry.side == "server":
                return "client"
        here, there = seen.local[1] in self._listening, seen.remote[1] in self._listening
        if here != there:
            return "server" if here else "client"
        return self._likely_side(seen)

    def _likely_side(self, seen: Seen) -> Side:
        """Which side it is where no listener was seen that would tell."""
        return "client"

    def _endpoint(self, seen: Seen) -> Endpoint:
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
        done: set[Key] = set()
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

    def _judge(self, sides: dict[Side, Seen]) -> Connection:
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

    def _closed_by(self, sides: dict[Side, Seen]) -> tuple[Side | Literal["both"] | None, str]:
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
            for state in sorted(seen.states & CLOSED_FIRST):
                return side, f"the {side} was seen in {state}"
            for state in sorted(seen.states & _CLOSED_SECOND):
                return _OTHER[side], f"the {side} was seen in {state}"
        if any(seen.state is not None for seen in sides.values()):
            return None, "neither side has closed"
        return None, "it ended between two looks: this evidence does not tell who closed first"

    def _reset_by(self, sides: dict[Side, Seen]) -> tuple[Side | None, str]:
        for side, seen in sides.items():
            for end in seen.entry.ends if seen.entry else ():
                if _aborts(end):
                    why = f"{end.unread} bytes unread" if end.unread else "SO_LINGER of 0 s"
                    return side, f"the {side} called {end.call} with {why}, at {end.place}"
        # (dead after TIME_WAIT: another process that has the socket too had ended it in order)
        in_order = any(State.TIME_WAIT in seen.states for seen in sides.values())
        for side, seen in sides.items():
            first = _first_end(seen)
            if first is not None and first.state is State.CLOSED and not in_order:
                return _OTHER[side], f"the {side}'s socket was dead when it called {first.call}"
        for side, seen in sides.items():
            if seen.reset:
                return side, seen.reset
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
        text = f"{end.state} for {clock() - end.since:.2f} s"
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


def _first_end(seen: Seen) -> End | None:
    return seen.entry.ends[0] if seen.entry and seen.entry.ends else None


def _aborts(end: End | None) -> bool:
    """Whether the call sent a RST: close(2) with unread data or SO_LINGER of 0."""
    return (
        end is not None
        and end.call == "close"
        and end.state not in (State.CLOSED, None)
        and bool(end.abortive or end.unread)
    )


def _number(port: SupportsIndex) -> int:
    __tracebackhide__ = True
    try:
        return operator.index(port)
    except TypeError:
        raise TypeError(f"a port is a number or a HeldPort, not {port!r}") from None


def _ports(end: Endpoint | Seen) -> tuple[int, int]:
    return end.local[1], end.remote[1]


def _text(address: Address) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _count(things: list[Any], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _refusal(port: int, host: str, reuse_address: bool) -> str:
    """The error that a server would get there, or an empty string."""
    __tracebackhide__ = True
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        try:
            sock.bind((host, port))
            sock.listen()
        except socket.gaierror as unknown:
            raise OSError(f"no such address: {host!r} ({unknown.strerror})") from None
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


def _hint(ends: Iterable[Endpoint]) -> list[str]:
    """That a coroutine asked, and waiting kept its loop from closing what it has."""
    import anyio

    try:
        anyio.current_time()
    except RuntimeError:  # no loop runs
        return []
    if all(not end.held or end.pid != os.getpid() for end in ends):
        return []
    return ["  (the event loop had no turn meanwhile: `await settled()` lets it close what it has)"]


def _name(pid: int | None) -> str | None:
    if pid is None:
        return None
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return None

"""Watch a port while something happens to it, and wait until it can be bound.

with watch(9090) as seen:          # or: async with
    run_the_thing()
print(seen.events)

await wait_until_bindable(9090, timeout=90)
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from math import isnan
from types import TracebackType
from typing import Final, Self

import anyio
import anyio.lowlevel

from timewait.bind import addresses, can_bind_all, port_number
from timewait.connections import CLOSED_FIRST, LEFT_OPEN, Connections, Key, Seen, Side
from timewait.events import Event, Row, RunStarted, SegmentSeen, Transition
from timewait.explain import Explanation, explain_bind
from timewait.kernel.observers import Observer, observe
from timewait.owned import Owned
from timewait.report import address
from timewait.tcp.segment import ACK, FIN, RST, SYN
from timewait.tcp.states import State
from timewait.witness import table

__all__ = ["Watch", "wait_until_bindable", "wait_until_bindable_sync", "watch"]

_SOON: Final = 0.005  # seconds between two looks for new events
_FETCH: Final = 0.05  # seconds between two fetches from an observer that records
_LOOK: Final = 0.02  # seconds between two tries to bind: some 20 µs of work each
_TELL: Final = 0.25  # seconds between two reports of progress
_NOT_INSIDE: Final = "a watch sees something inside `with` only"


def watch(port: int | None = None, *, observer: str = "auto") -> Watch:
    """Watch the TCP sockets with `port` at either end (None: all).

    Use the result with `with` or `async with`. `observer` is "auto" (the
    strongest allowed), "tracepoint", "sock_diag", "psutil" or "capture".

    Raises `ValueError` for no port number, `OSError` that says why where there
    is nothing to watch with.
    """
    return Watch(port, observer)


class Watch(Connections):
    """What is seen of a port from `__enter__` to `__exit__`; iterate for events as they come.

    Whoever's the sockets are (but of those that are `owned`, where that is given): their
    connections, and what can be asserted of them, are in the methods of
    `timewait.connections.Connections`.

    `events` are those so far, complete after the end. `observer` names who
    saw them, `why_not` why not a stronger one, `blind` what cannot be seen,
    `lost` how many events were missed. Event times are seconds since the
    watch began. It can be entered once: `RuntimeError` after that.
    """

    def __init__(self, port: int | None, observer: str, owned: Owned | None = None) -> None:
        super().__init__()
        self.port = None if port is None else port_number(port)
        if self.port == 0:
            raise ValueError("port 0 is nobody's: bind() and connect() take it for any")
        self.events: list[Event] = []
        self._before: set[Key] = set()
        self._last: tuple[list[Row], float] = [], 0.0
        self._taken = 0  # events that were put into the table of endpoints
        self._wanted = observer
        self._owned = owned
        self._observer: Observer | None = None
        self._ending = threading.Event()
        self._news = threading.Condition()
        self._looking = threading.Lock()  # observers are not for two threads at once
        self._trouble: BaseException | None = None

    # Entering and leaving

    def __enter__(self) -> Self:
        if self._observer is not None:
            raise RuntimeError("a watch cannot be entered twice: make another")
        ports = None if self.port is None else (self.port,)
        self._observer, self.why_not = observe(ports, self._wanted)
        self.observer = self._observer.name
        self.blind = self._observer.blind
        self.events.append(RunStarted(0.0, "kernel", self.observer, blind=self.blind))
        self._list = table()
        self._began = self._observer.start
        self._watching = True
        self.look()
        self._before = {key for key, one in self._seen.items() if one.state is State.TIME_WAIT}
        for key in self._before:
            del self._seen[key]
        # In a thread, since an observer that looks at instants must look on while the
        # caller is busy, and one that records must be emptied before it overflows.
        self._thread = threading.Thread(target=self._run, name="timewait-watch", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ending.set()
        self._thread.join()
        self._last = self._table(), time.monotonic()
        self._watching = False
        assert self._observer is not None
        self._observer.close()
        if self._trouble is not None and error is None:
            raise self._trouble

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def _run(self) -> None:
        observer = self._observer
        assert observer is not None
        # Nothing waits on the observer's descriptor: to be woken for each event would slow
        # those who are watched down, and the kernel keeps events until they are fetched.
        try:
            while not self._ending.wait(getattr(observer, "period", _FETCH)):
                self._fetch(observer)
            self._fetch(observer)
        except BaseException as trouble:
            self._trouble = trouble
            self._ending.set()
        with self._news:
            self._news.notify_all()

    def _fetch(self, observer: Observer) -> None:
        with self._looking:
            seen = observer.read()
            if self._owned is not None:
                seen = self._owned.among(seen, self._began)
        if seen:
            with self._news:
                self.events += seen
                self._news.notify_all()

    # Looking

    def look(self) -> None:
        """Take in what the observer has, and read the system's table."""
        with self._lock:
            if self._watching:
                if self._observer is not None and not self._ending.is_set():
                    self._fetch(self._observer)
                self._last = self._table(), time.monotonic()
            # Only now that somebody asks: while it watches, it does as little as it can.
            for event in self.events[self._taken :]:
                self._take(event)
                self._taken += 1
            rows, now = self._last
            present: set[Key] = set()
            for row in rows:
                key = row.local, row.remote
                if row.state is State.LISTEN:
                    self._listening[row.local[1]] = True
                elif key not in self._before:
                    present.add(key)
                    one = self._seen.setdefault(key, Seen(*key, None, now))
                    one.row = row
                    one.move(row.state, now)
            for key, one in self._seen.items():
                if key not in present:
                    one.row = None
                    one.move(None, now)

    def _take(self, event: Event) -> None:
        """What an event tells of an endpoint."""
        t = self._began + event.t
        if isinstance(event, Transition) and event.new is State.LISTEN:
            self._listening[event.local[1]] = True
        elif isinstance(event, Transition) and event.remote[1]:
            self._take_transition(event, t)
        elif isinstance(event, SegmentSeen):
            self._take_segment(event, t)

    def _take_segment(self, seen: SegmentSeen, t: float) -> None:
        """The states that a segment tells of, its own sender's and its receiver's."""
        if seen.flags & SYN and not seen.flags & ACK:
            self._forget_before(seen.src, seen.dst, t)
        one = self._endpoint_at(seen.src, seen.dst, t)
        peer = self._endpoint_at(seen.dst, seen.src, t)
        if seen.flags & RST:
            one.reset = f"{address(seen.src)} sent a RST"
            one.move(None, t)
            peer.move(None, t)
        elif seen.flags & SYN:
            one.move(State.SYN_RECEIVED if seen.flags & ACK else State.SYN_SENT, t)
            if seen.flags & ACK:
                self._listening[seen.src[1]] = True
                peer.move(State.ESTABLISHED, t)
        elif seen.flags & FIN:
            one.move(State.LAST_ACK if peer.states & CLOSED_FIRST else State.FIN_WAIT_1, t)
        elif one.state in (None, State.SYN_SENT, State.ESTABLISHED):
            for end in (one, peer):
                if not end.states - {State.SYN_SENT, State.SYN_RECEIVED}:
                    end.move(State.ESTABLISHED, t)

    def _table(self) -> list[Row]:
        return self._list(self.port)

    def _ours(self, seen: Seen) -> bool:
        return True

    def _likely_side(self, seen: Seen) -> Side:
        """As a rule it is a server's port that is watched."""
        mirror = self._seen.get((seen.remote, seen.local), seen)
        if State.SYN_SENT in seen.states | mirror.states:
            return "client" if State.SYN_SENT in seen.states else "server"
        return "server" if seen.local[1] == self.port else "client"

    def _held(self, seen: Seen) -> bool:
        return seen.state in LEFT_OPEN and seen.row is not None and bool(seen.row.inode)

    @property
    def lost(self) -> int:
        """How many events were missed so far."""
        return 0 if self._observer is None else self._observer.lost

    def rows(self) -> list[Row]:
        """The port's sockets as they are now, with their timers where the observer has any.

        Raises `RuntimeError` before the watch and after it.
        """
        if self.port is None:
            raise ValueError("a watch of all ports has no table of one")
        if self._observer is None or not self._watching:
            raise RuntimeError(_NOT_INSIDE)
        with self._looking:
            return self._observer.rows(self.port)

    def __iter__(self) -> Iterator[Event]:
        """Events from the first on, waiting for more until the watch ends."""
        if self._observer is None:
            raise RuntimeError(_NOT_INSIDE)
        at = 0
        while True:
            with self._news:
                while at == len(self.events) and not self._ending.is_set():
                    self._news.wait(0.2)
            if self.over and at == len(self.events):
                return
            while at < len(self.events):
                yield self.events[at]
                at += 1

    def __aiter__(self) -> AsyncIterator[Event]:
        """Events from the first on, waiting for more until the watch ends."""
        if self._observer is None:
            raise RuntimeError(_NOT_INSIDE)
        return _Coming(self)

    @property
    def over(self) -> bool:
        """Whether no more events will come."""
        return self._ending.is_set() and not self._thread.is_alive()


class _Coming:
    """A watch's events for `async for`, which may be left at any time."""

    def __init__(self, seen: Watch) -> None:
        self._seen = seen
        self._next = 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        await anyio.lowlevel.checkpoint()
        while self._next == len(self._seen.events):
            if self._seen.over and self._next == len(self._seen.events):
                raise StopAsyncIteration
            await anyio.sleep(_SOON)
        self._next += 1
        return self._seen.events[self._next - 1]


class _Waiting:
    """The steps of a wait, for both worlds: what to do at each look."""

    def __init__(
        self,
        address: tuple[str, int],
        timeout: float | None,
        options: tuple[bool, bool],
        progress: Callable[[Explanation], object] | None,
    ) -> None:
        if timeout is not None and isnan(timeout):
            raise ValueError(f"not a number of seconds: {timeout}")
        self.began = time.monotonic()
        self._address = address
        host, port = address
        self._port, self._hosts = port_number(port), addresses(host)  # asked of the resolver once
        self._options = options
        self._timeout = timeout
        self._progress = progress
        self._told = -_TELL

    def over(self) -> bool:
        """Whether the port can be bound now; `TimeoutError` where time is up."""
        if can_bind_all(self._port, self._hosts, *self._options):
            return True
        host, port = self._address
        waited = time.monotonic() - self.began
        if self._timeout is not None and waited >= self._timeout:
            raise TimeoutError(f"after {waited:.1f} s {explain_bind(port, host).reason}")
        if self._progress is not None and waited - self._told >= _TELL:
            self._told = waited
            self._progress(explain_bind(port, host))
        return False

    @property
    def pause(self) -> float:
        if self._timeout is None:
            return _LOOK
        return min(_LOOK, max(self.began + self._timeout - time.monotonic(), 0))


async def wait_until_bindable(
    port: int,
    host: str = "0.0.0.0",
    *,
    timeout: float | None = None,
    reuse_address: bool = False,
    reuse_port: bool = False,
    progress: Callable[[Explanation], object] | None = None,
) -> float:
    """Return as soon as a server with these options could bind and listen; seconds it took.

    Really tries, fifty times a second, leaving nothing behind. `progress` is
    called now and then with what is in the way.

    Raises `TimeoutError` that says what is still in the way after `timeout`
    seconds, and at once what no waiting mends: `PermissionError` for a
    privileged port, `OSError` for a host that has no address or not one of
    this machine's.
    """
    waiting = _Waiting((host, port), timeout, (reuse_address, reuse_port), progress)
    while not waiting.over():
        await anyio.sleep(waiting.pause)
    return time.monotonic() - waiting.began


def wait_until_bindable_sync(
    port: int,
    host: str = "0.0.0.0",
    *,
    timeout: float | None = None,
    reuse_address: bool = False,
    reuse_port: bool = False,
    progress: Callable[[Explanation], object] | None = None,
) -> float:
    """`wait_until_bindable` for code that is not async."""
    waiting = _Waiting((host, port), timeout, (reuse_address, reuse_port), progress)
    while not waiting.over():
        time.sleep(waiting.pause)
    return time.monotonic() - waiting.began

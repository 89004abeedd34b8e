"""Times the ways of closing a connection, on the kernel, beside what the model foretells.

A close is over when neither end is in a state that a connection only passes
through. Times run from the close call (the first, where both ends close) to
its return, to the moment when the peer's read tells of it, to the last
segment, and to the settled state, which is looked up in the kernel's table.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import lru_cache, partial
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Final

from attrs import define, evolve, field, frozen

from timewait.bench import Stat
from timewait.bench.ends import RESET, End, Kind, Pair, bare, reset_on_close, streams
from timewait.check import check
from timewait.events import Row, SegmentSeen, Transition
from timewait.kernel.capture import Capture
from timewait.kernel.sock_diag import SockDiag
from timewait.run import Side
from timewait.sim import Network
from timewait.sim import run as simulate
from timewait.tcp.profiles import profile
from timewait.tcp.states import State

__all__ = [
    "COURSES",
    "FAMILIES",
    "TIMES",
    "Close",
    "Foretold",
    "Pace",
    "Trial",
    "closes",
    "counters",
    "foretell",
    "one_way",
]

FAMILIES: Final = {"ipv4": (socket.AF_INET, "127.0.0.1"), "ipv6": (socket.AF_INET6, "::1")}

TIMES: Final = {
    "returned": "call returns",
    "told": "peer is told",
    "last_segment": "last segment",
    "settled": "settled",
}

_PASSING: Final = frozenset({State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK, State.SYN_RECEIVED})
_OPEN: Final = frozenset({State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_2})
_TIME_WAIT_AND_MORE: Final = 130.0  # seconds, an orphan's FIN_WAIT_2 before it included
_PATIENCE: Final = 5.0  # seconds for a close to settle
_TIMED: Final = 50  # connections that are closed in a round of many
_WARMING: Final = 2  # connections closed before any is timed
_WATCHED: Final = 5  # connections open while a capture sees them
_TEXT: Final = 100  # bytes sent where a course sends any
DELAYED_ACK: Final = 0.2  # seconds that Linux delays an ACK at most (TCP_DELACK_MAX, net/tcp.h)


@define
class Watch:
    """The moments of one close, by the monotonic clock: the machine's, or the simulation's."""

    breathe: Callable[[], Awaitable[None]]
    began: float = 0.0
    returned: float = 0.0
    told: float | None = None
    how: str | None = None

    async def close(self, *ends: End) -> None:
        """The close that is timed."""
        self.began = time.monotonic()
        for end in ends:
            await end.close()
        self.returned = time.monotonic()

    async def shutdown(self, end: End) -> None:
        """The same where it begins with a half-close."""
        self.began = time.monotonic()
        await end.shutdown()
        self.returned = time.monotonic()

    async def hears(self, end: End) -> None:
        """The other end reads until it is told that the stream is over, by FIN or RST."""
        try:
            while await end.read():
                pass
            self.how = "FIN"
        except ConnectionResetError:
            self.how = "RST"
        if self.told is None:
            self.told = time.monotonic()


@frozen
class Course:
    """A way to close: `act` does it to one connection; after it, `left` ends are still open.

    Of the connections that are open at once, so many are `timed`.
    """

    name: str
    act: Callable[[Watch, End, End], Awaitable[None]]
    left: int = 0
    timed: int = _TIMED


async def _server_first(watch: Watch, server: End, client: End) -> None:
    await watch.close(server)
    await watch.hears(client)
    await client.close()


async def _clients_first(watch: Watch, server: End, client: End) -> None:
    await _server_first(watch, client, server)


async def _simultaneous(watch: Watch, server: End, client: End) -> None:
    await watch.close(server, client)


async def _half_close(watch: Watch, server: End, client: End) -> None:
    await watch.shutdown(client)
    await watch.hears(server)
    await server.send(bytes(_TEXT))
    await server.close()
    await watch.hears(client)
    await client.close()


async def _abort(watch: Watch, server: End, client: End) -> None:
    reset_on_close(server)
    await _server_first(watch, server, client)


async def _unread(watch: Watch, server: End, client: End) -> None:
    await client.send(bytes(_TEXT))
    for _ in range(5):  # a library that reads ahead has read it by now
        await watch.breathe()
    await _server_first(watch, server, client)


async def _orphan(watch: Watch, server: End, client: End) -> None:
    await watch.close(server)
    await watch.hears(client)


COURSES: Final = {
    course.name: course
    for course in (
        Course("server-first", _server_first),
        Course("clients-first", _clients_first),
        Course("simultaneous", _simultaneous),
        Course("half-close", _half_close),
        Course("abort", _abort),
        Course("unread-data", _unread),
        Course("orphan", _orphan, left=1, timed=5),  # each waits for a timer
    )
}


@frozen
class Foretold:
    """What the model says of one close: times in seconds, and who holds TIME_WAIT.

    `allowed` is the least and the most that it allows for each of the times,
    `holders` are all whom it allows to hold TIME_WAIT (either end may be the
    first of two that close at once), `moves` who entered which state when, to
    the end of TIME_WAIT.
    """

    returned: float
    told: float | None
    last_segment: float
    settled: float
    holders: tuple[Side | None, ...]
    moves: tuple[tuple[float, Side, str], ...]
    allowed: dict[str, tuple[float, float]] = field(factory=dict)


@frozen
class Close:
    """One course as programs of one kind do it, so many times.

    Times are in seconds from the close call; None where there was nothing to
    time (nobody reads in a simultaneous close) or to see it with
    (`last_segment` takes a capture). `how` is what told the peer, "FIN" or
    "RST". `counters` are what the kernel counted meanwhile that should not be.
    """

    course: str
    kind: str
    family: str
    connections: int
    how: str | None
    holder: Side | None
    time_wait: float
    returned: Stat | None
    told: Stat | None
    last_segment: Stat | None
    settled: Stat | None
    model: Foretold
    fault: str | None = None
    counters: dict[str, int] = field(factory=dict)

    @property
    def name(self) -> str:
        """Which one it is, as people read it."""
        return _name(self.course, self.kind, self.family, self.connections)

    @property
    def outside(self) -> tuple[str, ...]:
        """What is not as the model allows: "holder", "segments", or the name of a time.

        Other work on the machine only adds to a time. So it lies outside where
        its least is too little, or its lower quartile too much.
        """
        wrong = [] if self.holder in self.model.holders else ["holder"]
        wrong += ["segments"] if self.fault else []
        for name, (least, most) in self.model.allowed.items():
            stat: Stat | None = getattr(self, name)
            if stat and not (least <= stat.quantiles[0] and stat.quantiles[5] <= most):
                wrong.append(name)
        return tuple(wrong)

    @property
    def marked(self) -> bool:
        """Whether something disturbed it: retransmissions, an overflowing queue."""
        return any(self.counters.values())


def _name(course: str, kind: str, family: str, connections: int) -> str:
    return f"{course} with {kind} over {family}, {connections} open"


def counters() -> Counter[str]:
    """What the kernel counts in this network namespace and a quiet loopback never shows."""
    wanted = {"ListenOverflows", "ListenDrops", "RetransSegs", "TCPTimeWaitOverflow"}
    found: Counter[str] = Counter()
    for path in ("/proc/thread-self/net/netstat", "/proc/thread-self/net/snmp"):
        with suppress(OSError):
            lines = Path(path).read_text().splitlines()
            for names, values in zip(lines[::2], lines[1::2], strict=True):
                for name, value in zip(names.split(), values.split(), strict=True):
                    if name in wanted:
                        found[name] = int(value)
    return found


def one_way(count: int = 500) -> float:
    """The seconds a byte takes from send() to a recv() that has it, on loopback; the median."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as there, listener.accept()[0] as here:
            here.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            taken = []
            for _ in range(count):
                began = time.monotonic()
                here.send(b"x")
                there.recv(1)
                taken.append(time.monotonic() - began)
            here.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)  # leaves no TIME_WAIT
    return median(taken)


@frozen
class Pace:
    """How long a segment takes here, in seconds: at the least, as a rule, at a bad moment.

    `turn` is what a program may take for its part in a close: as it waits for
    nothing, less than a tick of the kernel's clock, by which timers run.
    """

    least: float
    usual: float
    most: float
    turn: float


@lru_cache(maxsize=64)
def foretell(course: Course, pace: Pace, reads_ahead: bool = False) -> Foretold:
    """What the model says of the course where segments take as long as `pace` tells.

    The very same course, done by a program of bare sockets on the simulated
    loop; or, for libraries that read ahead of their program, of streams. What
    is allowed lies between segments that take the least time and are
    acknowledged at once, and segments that take the most and are acknowledged
    as late as Linux ever does it.
    """
    usual = _on_the_model(course, pace.usual, reads_ahead)
    soonest = _on_the_model(course, pace.least, reads_ahead, delayed_ack=0.0)
    latest = _on_the_model(course, pace.most, reads_ahead, delayed_ack=DELAYED_ACK)
    allowed = {
        name: (getattr(soonest, name), getattr(latest, name) + pace.turn)
        for name in TIMES
        if getattr(usual, name) is not None
    }
    return evolve(usual, allowed=allowed)


def _on_the_model(
    course: Course, delay: float, reads_ahead: bool, *, delayed_ack: float | None = None
) -> Foretold:
    network = Network()
    linux = profile("linux")
    if delayed_ack is not None:
        acks = evolve(linux.parameters, first_ack_delay=delayed_ack, delayed_ack=delayed_ack)
        linux = evolve(linux, parameters=acks)
    network.host("machine", profile=linux)
    network.delay("any", delay, times=None)
    watch = Watch(partial(asyncio.sleep, delay))

    async def main() -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port: int = listener.getsockname()[1]
            async with (streams if reads_ahead else bare)(listener, 1) as [(server, client)]:
                await watch.breathe()  # until the handshake's last ACK has arrived
                await course.act(watch, server, client)
                await asyncio.sleep(_TIME_WAIT_AND_MORE)
        return port

    with network.observe() as observer:
        port = simulate(main, hosts=network)
        over = watch.began + _TIME_WAIT_AND_MORE
        seen = [event for event in observer.read() if watch.began <= event.t < over]
    moves = [
        (event.t - watch.began, _side(event, port), event.new)
        for event in seen
        if isinstance(event, Transition) and event.remote[1]
    ]
    segments = [event.t - watch.began for event in seen if isinstance(event, SegmentSeen)]
    waiting = {side for _, side, state in moves if state is State.TIME_WAIT}
    holders: tuple[Side | None, ...] = ("both", "server", "client")
    if course.name != "simultaneous":  # which loopback serialises, in either order
        holders = ("both",) if len(waiting) > 1 else (next(iter(waiting), None),)
    return Foretold(
        watch.returned - watch.began,
        None if watch.told is None else watch.told - watch.began,
        max(t for t in segments if t < _PATIENCE),
        max(t for t, _, _ in moves if t < _PATIENCE),
        holders,
        tuple((t, side, state.name) for t, side, state in moves),
    )


def _side(event: Transition, port: int) -> Side:
    return "server" if event.local[1] == port else "client"


@define
class _Sample:
    watch: Watch
    settled: float
    states: tuple[State | None, State | None]
    ports: tuple[int, int]


@contextmanager
def _quiet() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@define
class Trial:
    """One course as programs of one kind do it, with so many connections open at once.

    They are closed one after the other. `run` makes a pass of so many
    `rounds`, `listen` has a few more seen by a capture, `outcome` is what all
    of them found. Both are done beside a `crowd` of connections that stay
    open, so that not all need be opened for each course anew.
    """

    kind: Kind
    course: Course
    family: str
    connections: int
    rounds: int
    quickest: float | None = field(default=None, init=False)
    _passes: list[list[_Sample]] = field(factory=list, init=False)
    _last: list[float] = field(factory=list, init=False)
    _fault: str | None = field(default=None, init=False)
    _counters: Counter[str] = field(factory=Counter, init=False)

    @property
    def name(self) -> str:
        """Which one it is, as people read it."""
        return _name(self.course.name, self.kind.name, self.family, self.connections)

    @property
    def crowd(self) -> int:
        """How many connections stay open, beside those that are timed."""
        return max(0, self.connections - _TIMED)

    async def run(self) -> None:
        """Make a pass. A few connections before it warm up and are not counted."""
        before = counters()
        with SockDiag() as diag:
            await self._rounds(min(self.connections, _WARMING), 1, diag)
            samples = await self._rounds(self.connections - self.crowd, self.rounds, diag)
        self._counters += counters() - before
        self._passes.append(samples)

    async def listen(self, capture: Capture) -> None:
        """Time the last segments, check all of them, and find the `quickest` answer to one.

        That is the least time in which any segment was answered by another:
        nothing that takes a segment's way can take less.
        """
        capture.read()
        count = min(self.connections, _WATCHED)
        with SockDiag() as diag:
            samples = await self._rounds(count, _WATCHED // count, diag)
        segments = [event for event in capture.read() if isinstance(event, SegmentSeen)]
        seen: dict[frozenset[int], list[SegmentSeen]] = {}
        for segment in segments:
            seen.setdefault(frozenset({segment.src[1], segment.dst[1]}), []).append(segment)
        for sample in samples:
            until = [e.t for e in seen.get(frozenset(sample.ports), []) if e.t <= sample.settled]
            if until:
                self._last.append(max(until) - sample.watch.began)
        answers = [
            later.t - earlier.t
            for each in seen.values()
            for earlier, later in pairwise(each)
            if earlier.src != later.src
        ]
        self.quickest = min(answers, default=None)
        verdict = check(segments)
        if not verdict:
            self._fault = str(verdict.explain().splitlines()[0])

    def outcome(self, pace: Pace) -> Close | None:
        """What was found, beside what the model says at this pace; None before the first pass."""
        samples = [sample for each in self._passes for sample in each]
        if not samples:
            return None

        def stat(value: Callable[[_Sample], float | None]) -> Stat | None:
            known = [[v for s in each if (v := value(s)) is not None] for each in self._passes]
            return Stat.of(*known)

        how = Counter(sample.watch.how for sample in samples).most_common(1)[0][0]
        reads_ahead = self.course.name == "unread-data" and how == "FIN"
        model = foretell(self.course, pace, reads_ahead)
        holder = _holder(sample.states for sample in samples)
        settled = stat(lambda sample: sample.settled - sample.watch.began)
        waiting = sum(state is State.TIME_WAIT for sample in samples for state in sample.states)
        return Close(
            self.course.name,
            self.kind.name,
            self.family,
            self.connections,
            how,
            holder,
            waiting / len(samples),
            stat(lambda s: s.watch.returned - s.watch.began),
            stat(lambda s: None if s.watch.told is None else s.watch.told - s.watch.began),
            Stat.of(self._last),
            settled,
            model,
            self._fault,
            dict(self._counters),
        )

    async def _rounds(self, count: int, rounds: int, diag: SockDiag) -> list[_Sample]:
        """In each round open `count` connections and close them, timing as many as the course."""
        done = []
        for _ in range(rounds):
            async with _opened(self, count) as pairs:
                timed = pairs[: self.course.timed]
                done += [await self._sample(pair, diag) for pair in timed]
                _forget(pairs[self.course.timed :])
        return done

    async def _sample(self, pair: Pair, diag: SockDiag) -> _Sample:
        server, client = pair
        here, there = server.sock.getsockname()[:2], client.sock.getsockname()[:2]
        watch = Watch(self.kind.breathe)
        await self.course.act(watch, server, client)
        while True:
            states = _state(diag.lookup(here, there)), _state(diag.lookup(there, here))
            if not (set(states) & _PASSING) and (self.course.left or not set(states) & _OPEN):
                break
            if time.monotonic() - watch.began > _PATIENCE:
                raise TimeoutError(
                    f"{self.course.name} with {self.kind.name} did not settle in {_PATIENCE:g} s: "
                    f"server {states[0]}, client {states[1]}"
                )
            await self.kind.breathe()
        settled = time.monotonic()
        if self.course.left:
            reset_on_close(client)
            await client.close()
        return _Sample(watch, settled, states, (here[1], there[1]))


@asynccontextmanager
async def _opened(trial: Trial, count: int) -> AsyncIterator[list[Pair]]:
    family, host = FAMILIES[trial.family]
    listener = socket.socket(family)
    try:
        listener.bind((host, 0))
        listener.listen(1024)
    except BaseException:
        listener.close()
        raise
    async with trial.kind.open(listener, count) as pairs:
        yield pairs


def _forget(pairs: Iterable[Pair]) -> None:
    """Have them leave nothing behind when they are closed."""
    for pair in pairs:
        for end in pair:
            reset_on_close(end)


def closes(
    trials: Iterable[Trial],
    until: float,
    tick: Callable[[], object],
    pace: list[list[float]],
) -> None:
    """Pass after pass over the trials, as long as the monotonic clock is not at `until`.

    After the first one their segments are looked at, where capturing is
    permitted. Only the first pass, if any, is left unfinished. `pace` gets for
    each pass what a byte took over loopback before each trial, in seconds.
    """
    beside = [
        [*group] for _, group in groupby(trials, lambda t: (t.kind.name, t.family, t.connections))
    ]

    def all_of_them(act: Callable[[Trial], Awaitable[None]]) -> bool:
        return all(_beside_a_crowd(group, act, until, tick) for group in beside)

    async def run(trial: Trial) -> None:
        pace[-1].append(one_way(50))
        await trial.run()

    taken = 0.0
    while time.monotonic() + taken < until:
        began = time.monotonic()
        pace.append([])
        whole = all_of_them(run)
        taken = time.monotonic() - began
        if whole and len(pace) == 1:
            with suppress(PermissionError), Capture(start=0.0) as capture:
                all_of_them(partial(Trial.listen, capture=capture))


def _beside_a_crowd(
    trials: Sequence[Trial],
    act: Callable[[Trial], Awaitable[None]],
    until: float,
    tick: Callable[[], object],
) -> bool:
    """Act on trials of one kind, family and size; whether there was time for all of them."""
    first = trials[0]

    async def main() -> bool:
        async with _opened(first, first.crowd) as crowd:
            _forget(crowd)
            for trial in trials:
                if time.monotonic() >= until:
                    return False
                await act(trial)
                tick()
        return True

    with _quiet():
        return bool(first.kind.run(main))


def _state(row: Row | None) -> State | None:
    return row.state if row else None


def _holder(states: Iterable[tuple[State | None, State | None]]) -> Side | None:
    sides: set[Side] = set()
    for server, client in states:
        sides |= {"server"} if server is State.TIME_WAIT else set()
        sides |= {"client"} if client is State.TIME_WAIT else set()
    return "both" if len(sides) > 1 else next(iter(sides), None)

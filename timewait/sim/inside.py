"""Inside: the simulation in the machine's place, for as long as a program runs in it.

`socket.socket`, names and `time` become the simulation's; what would leave it
(a real socket, a thread, a process) is refused, by audit hooks where Python
raises an event and by standing in the way where it does not. Only the
simulation's own thread is concerned: every replacement asks who calls, and the
other threads of the process go on with the machine. Afterwards everything is
as it was. What is replaced belongs to the whole process, so simulations of
several threads take turns.
"""

from __future__ import annotations

import _posixsubprocess
import _thread
import asyncio
import ctypes.util
import errno
import random
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, NoReturn

from timewait.sim import polling
from timewait.sim.network import Network
from timewait.sim.ports import is_v4
from timewait.sim.socket import SimSocket, WouldBlockForever, current_host

__all__ = ["LeavesSimulation", "getaddrinfo", "inside", "leaves"]

EPOCH: Final = 1_767_225_600.0  # what time.time() says at the start: 2026-01-01T00:00:00Z

_PATIENCE: Final = 100_000  # questions for the time at one instant
_ASKING: Final = 1e-6  # seconds that each takes from then on

_EPOCHS: Final = {  # of clock_gettime(2)'s clocks; the processor's time stays the machine's
    getattr(time, name): epoch
    for name, epoch in (
        ("CLOCK_REALTIME", EPOCH),
        ("CLOCK_MONOTONIC", 0.0),
        ("CLOCK_MONOTONIC_RAW", 0.0),
        ("CLOCK_BOOTTIME", 0.0),
    )
    if hasattr(time, name)
}


class LeavesSimulation(RuntimeError):
    """The program tried to use a real socket, a thread or a process inside a simulation."""


# They keep what they call as attributes, which a function would make methods.
_SELECTORS: Final = (selectors.SelectSelector, selectors.PollSelector, selectors.EpollSelector)
_machine_find_library: Final = ctypes.util.find_library
_machine_fork_exec: Final = _posixsubprocess.fork_exec
_machine_getaddrinfo: Final = socket.getaddrinfo
_machine_getnameinfo: Final = socket.getnameinfo
_turn: Final = threading.Lock()
_machine_socket: Final = socket.socket
_machine_type: Final = socket.SocketType
_thread_inside = 0
_hooked = False
_asking = False  # while the machine itself is asked, whom no program can tell from another


@contextmanager
def inside(network: Network, seed: int | str) -> Iterator[None]:
    """Put the simulation in the place of the machine, and the machine back afterwards.

    Waits for a simulation of another thread to end. Raises `RuntimeError`
    inside a simulation.
    """
    global _thread_inside, _hooked
    if _thread_inside == threading.get_ident():
        raise RuntimeError("a simulation runs already")
    if not _hooked:
        sys.addaudithook(_audit)
        _hooked = True
    clock = network.clock

    asked = 0  # how often the time was asked for at `moment`
    moment = clock.now

    def now() -> float:
        """Virtual time, which stands still: only who asks for it all the time has it pass."""
        nonlocal asked, moment
        asked = asked + 1 if clock.now == moment else 0
        if asked > _PATIENCE:
            sleep(_ASKING)
        moment = clock.now
        return moment

    def sleep(seconds: float) -> None:
        """Nothing of the program runs meanwhile, but its kernel and the network do."""
        until = clock.now + seconds
        while clock.run_until(until):
            pass

    def wait(self: threading.Condition, timeout: float | None = None) -> bool:
        """Where no other thread can notify it, the time is waited."""
        if not self._is_owned():  # type: ignore[attr-defined]
            raise RuntimeError("cannot wait on un-acquired lock")
        if threading.active_count() > 1:
            return machine_wait(self, timeout)  # of the machine's, which do not stand still
        if timeout is None:
            raise WouldBlockForever(
                "this waits for another thread, and inside a simulation there is none: what was "
                "handed to the event loop runs only after this function has returned"
            )
        sleep(max(timeout, 0.0))
        return False

    machine_wait = threading.Condition.wait
    machine_clock, machine_clock_ns = time.clock_gettime, time.clock_gettime_ns

    def clock_gettime(which: int) -> float:
        epoch = _EPOCHS.get(which)
        return machine_clock(which) if epoch is None else epoch + now()

    def clock_gettime_ns(which: int) -> int:
        epoch = _EPOCHS.get(which)
        return machine_clock_ns(which) if epoch is None else int((epoch + now()) * 1e9)

    replaced: list[tuple[Any, str, Any]] = [
        (socket, "getaddrinfo", getaddrinfo),
        (socket, "getnameinfo", _getnameinfo),
        (socket, "gethostbyname", lambda name: _gethostbyname(name)[2][0]),
        (socket, "gethostbyname_ex", _gethostbyname),
        (socket, "gethostbyaddr", _gethostbyaddr),
        (socket, "gethostname", lambda: current_host().name),
        (socket, "getfqdn", _getfqdn),
        (socket, "socketpair", lambda *a, **k: leaves("a socket pair")),
        (socket, "fromfd", _fromfd),
        (select, "select", polling.select),
        (select, "poll", polling.Poll),
        (select, "epoll", polling.Epoll),
        (threading.Thread, "start", _start),
        (threading.Condition, "wait", wait),
        (selectors.SelectSelector, "_select", polling.select),
        (selectors.PollSelector, "_selector_cls", polling.Poll),
        (selectors.EpollSelector, "_selector_cls", polling.Epoll),
        (asyncio, "new_event_loop", lambda: leaves("another event loop")),
        (asyncio.events, "new_event_loop", lambda: leaves("another event loop")),
        (_posixsubprocess, "fork_exec", _fork_exec),
        # Modules that are imported only now look for their libraries, by asking ldconfig.
        (ctypes.util, "find_library", lambda name: _machine(_machine_find_library, name)),
        (_thread, "start_new_thread", lambda *a, **k: leaves("a thread")),
        (time, "monotonic", now),
        (time, "monotonic_ns", lambda: int(now() * 1e9)),
        (time, "perf_counter", now),
        (time, "perf_counter_ns", lambda: int(now() * 1e9)),
        (time, "clock_gettime", clock_gettime),
        (time, "clock_gettime_ns", clock_gettime_ns),
        (time, "time", lambda: EPOCH + now()),
        (time, "time_ns", lambda: int((EPOCH + now()) * 1e9)),
        (time, "sleep", sleep),
    ]
    with _turn:
        originals = [(where, name, getattr(where, name)) for where, name, _ in replaced]
        dice = random.getstate()
        random.seed(f"{seed}/random")
        _thread_inside = threading.get_ident()
        for where, name, ours in replaced:
            call = _for_caller(ours, getattr(where, name))
            setattr(where, name, staticmethod(call) if where in _SELECTORS else call)
        socket.socket = socket.SocketType = _Socket  # type: ignore[assignment, misc]
        try:
            yield
        finally:
            socket.socket = _machine_socket  # type: ignore[misc]
            socket.SocketType = _machine_type
            for where, name, theirs in originals:
                setattr(where, name, theirs)
            _thread_inside = 0
            random.setstate(dice)


def _for_caller(ours: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The simulation's function for its own thread, the machine's for any other."""

    @wraps(theirs)
    def call(*args: Any, **named: Any) -> Any:
        if threading.get_ident() == _thread_inside:
            return ours(*args, **named)
        return theirs(*args, **named)

    return call


class _ByCaller(type):
    """Makes the simulation's sockets for its own thread, the machine's for any other."""

    def __call__(cls, *args: Any, **named: Any) -> Any:
        if cls is not _Socket:
            return super().__call__(*args, **named)
        kind = SimSocket if threading.get_ident() == _thread_inside else _machine_socket
        return kind(*args, **named)

    def __instancecheck__(cls, instance: object) -> bool:
        if cls is not _Socket:
            return super().__instancecheck__(instance)
        return isinstance(instance, (SimSocket, _machine_socket))


class _Socket(SimSocket, metaclass=_ByCaller):
    """What `socket.socket` is while a simulation runs."""

    __slots__ = ()


def _fork_exec(*args: Any) -> Any:
    return _machine_fork_exec(*args) if _asking else leaves("a subprocess")


def _start(thread: threading.Thread) -> None:
    """Refuse a thread, except anyio's workers: they do at once what they are given."""
    if (type(thread).__module__, type(thread).__name__) != _ANYIO_WORKER:
        leaves("a thread")
    thread.queue = _AtOnce(thread)  # type: ignore[attr-defined]


_ANYIO_WORKER: Final = ("anyio._backends._asyncio", "WorkerThread")


class _AtOnce:
    """Stands for the queue of such a worker, as an executor of the loop does."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def put_nowait(self, item: Any) -> None:
        if item is None:
            return  # the worker is to end
        context, function, arguments, future, _scope = item
        result = failure = None
        try:
            result = context.run(function, *arguments)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            failure = error
        report = self._worker._report_result
        self._worker.loop.call_soon(report, future, result, failure)


_REFUSED: Final = {
    "socket.__new__": "a real socket",
    "socket.getaddrinfo": "a real name look-up",
    "socket.gethostbyname": "a real name look-up",
    "socket.gethostbyaddr": "a real name look-up",
    "socket.getnameinfo": "a real name look-up",
    "subprocess.Popen": "a subprocess",
    "os.system": "a subprocess",
    "os.fork": "a subprocess",
    "os.forkpty": "a subprocess",
    "os.posix_spawn": "a subprocess",
    "os.exec": "another program in place of this one",
}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if event in _REFUSED and threading.get_ident() == _thread_inside and not _asking:
        leaves(_REFUSED[event])


def leaves(what: str) -> NoReturn:
    """Refuse what would leave the simulation."""
    raise LeavesSimulation(
        f"{what} would leave the simulation: inside, only simulated TCP sockets "
        "of the event loop's own thread exist"
    )


def getaddrinfo(
    host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[tuple[Any, Any, int, str, Any]]:
    """socket.getaddrinfo over the names of the simulated network.

    All but names is answered by the machine's own, with its errors. Raises
    `socket.gaierror` for a name that the network does not have.
    """
    name = host.decode() if isinstance(host, bytes) else host
    flags &= ~socket.AI_ADDRCONFIG  # it would tell of the machine's interfaces
    found = current_host().named(name) if isinstance(name, str) else []
    if not found or flags & socket.AI_NUMERICHOST:
        flags |= socket.AI_NUMERICHOST
        return list(_machine(_machine_getaddrinfo, host, port, family, type, proto, flags))
    kinds = {0: found, socket.AF_INET: [a for a in found if is_v4(a)]}
    kinds[socket.AF_INET6] = [a for a in found if not is_v4(a)]
    if family in kinds and not kinds[family]:
        raise socket.gaierror(socket.EAI_ADDRFAMILY, "Address family for hostname not supported")
    answers: list[tuple[Any, Any, int, str, Any]] = []
    for address in kinds.get(family, found):
        flags |= socket.AI_NUMERICHOST
        some = _machine(_machine_getaddrinfo, address, port, family, type, proto, flags)
        answers += [(*answer[:3], answer[3] and name, answer[4]) for answer in some]
    return answers


def _machine(function: Callable[..., Any], *args: Any) -> Any:
    """What the machine answers: numeric addresses, or what is installed."""
    global _asking
    _asking = True
    try:
        return function(*args)
    finally:
        _asking = False


def _getnameinfo(sockaddr: Any, flags: int) -> tuple[str, str]:
    """socket.getnameinfo: a host's address has its name, all others are numbers."""
    numbers = socket.NI_NUMERICHOST
    address, service = _machine(
        _machine_getnameinfo, sockaddr, flags & ~socket.NI_NAMEREQD | numbers
    )
    if flags & numbers:
        return address, service
    name = current_host().name_of(address)
    if name is None and flags & socket.NI_NAMEREQD:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return name or address, service


def _gethostbyname(name: str) -> tuple[str, list[str], list[str]]:
    """socket.gethostbyname_ex: IPv4 only."""
    found = getaddrinfo(name, 0, socket.AF_INET, socket.SOCK_STREAM)
    return name, [], [answer[4][0] for answer in found]


def _gethostbyaddr(address: str) -> tuple[str, list[str], list[str]]:
    """socket.gethostbyaddr: who has the address."""
    first = getaddrinfo(address, 0, 0, socket.SOCK_STREAM)[0][4][0]
    name = current_host().name_of(first)
    if name is None:
        raise socket.herror(1, "Unknown host")
    return name, [], [first]


def _getfqdn(name: str = "") -> str:
    """socket.getfqdn: the name of an address' host; what is unknown stays as it is."""
    name = name or current_host().name
    try:
        return _gethostbyaddr(name)[0]
    except OSError:
        return name


def _fromfd(fd: int, family: int, type: int, proto: int = 0) -> SimSocket:
    sock = current_host().network.files.get(fd)
    if sock is None:
        raise OSError(errno.EBADF, "Bad file descriptor")
    first = SimSocket(fileno=fd)
    again = first.dup()
    first.detach()
    return again

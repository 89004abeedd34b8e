"""asyncio's own event loop over modelled sockets, in virtual time.

The loop is asyncio's selector loop, unchanged where it matters: transports,
streams, `sock_*`, servers and TLS are asyncio's code. What differs is below
it. Its selector asks the modelled sockets whether they are ready, and where
asyncio would wait, the clock jumps to what happens next. While a simulation
runs, `socket.socket` and its kin make modelled sockets, `time` tells virtual
time, and what would leave the simulation (a real socket, a thread, a process)
is refused.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import selectors
import signal
import socket
import threading
from asyncio import format_helpers
from asyncio.selector_events import _SelectorSocketTransport  # type: ignore[attr-defined]
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextvars import Context, copy_context
from functools import partial
from heapq import heapify, heappop
from math import ulp
from selectors import _fileobj_to_fd  # type: ignore[attr-defined]
from typing import Any, Final, NoReturn, TypeAlias, TypeVar
from zlib import crc32

from timewait.sim.host import HERE, Host
from timewait.sim.inside import LeavesSimulation, getaddrinfo, inside, leaves
from timewait.sim.network import Network
from timewait.sim.sock import DOWN, OVER, Sock, fail

__all__ = ["Deadlock", "Livelock", "SimLoop", "SimSelector", "run"]

T = TypeVar("T")
M = TypeVar("M", bound=Any)
Named: TypeAlias = Mapping[str, str | list[str] | None] | list[str]  # hosts and their addresses

_SENDFILE: Final = 1 << 18  # bytes read of a file at once
INF: Final = float("inf")
RESOLUTION: Final = 1e-9  # seconds: timers that are closer than this are due at once
PATIENCE: Final = 1_000_000  # iterations in which nothing moves before it is a livelock
GLANCE: Final = 1000  # iterations after which to look whether anything moves
TURN: Final = 1e-5  # seconds that each takes where nothing does, as on a machine


class Deadlock(RuntimeError):
    """Nothing is ready, and nothing will ever happen: the message names who waits for what."""


class Livelock(RuntimeError):
    """Something is always ready, and nothing comes of it: the message names what goes round."""


class _Keys(dict[int, selectors.SelectorKey]):
    """What is watched, by number; asked for a file object too, as asyncio does from 3.13 on."""

    def number(self, file: Any) -> int:
        """Its number; a closed file has none any more, but is known if it was registered."""
        try:
            number: int = _fileobj_to_fd(file)
        except ValueError:
            for key in self.values():
                if key.fileobj is file:
                    return key.fd
            raise
        return number

    def get(self, file: Any, default: Any = None) -> Any:
        return super().get(self.number(file), default)

    def __missing__(self, file: Any) -> selectors.SelectorKey:
        if isinstance(file, int):
            raise KeyError(file)
        return self[self.number(file)]


class SimSelector(selectors.BaseSelector):
    """Readiness from modelled sockets; waiting moves the clock."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._keys = _Keys()
        # Sockets to look at, which were ready when something happened to them or last time.
        self.touched: dict[Sock, None] = {}
        self.stuck: Callable[[], NoReturn] | None = None

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch a modelled socket; `LeavesSimulation` for any other file."""
        fd = self._keys.number(fileobj)
        sock = self.network.files.get(fd)
        if sock is None:
            raise LeavesSimulation(
                f"file {fd} is not a simulated socket: it cannot be watched here"
            )
        if fd in self._keys:
            raise KeyError(f"{fileobj!r} (FD {fd}) is already registered")
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        sock.selector_key = key
        sock.watch = self.touched
        sock.notify()
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Watch it no more."""
        fd = self._keys.number(fileobj)
        key = self._keys.pop(fd)
        sock = self.network.files.get(fd)
        if sock is not None:
            sock.watch = sock.selector_key = None
            self.touched.pop(sock, None)
        return key

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Watch it for something else."""
        fd = self._keys.number(fileobj)
        if fd not in self._keys:
            raise KeyError(f"{fileobj!r} is not registered")
        sock = self.network.files.get(fd)
        if sock is None and events != self._keys[fd].events:
            del self._keys[fd]
            fail(errno.EBADF)
        key = self._keys[fd] = selectors.SelectorKey(fileobj, fd, events, data)
        if sock is not None:
            sock.selector_key = key
            sock.notify()
        return key

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; if nothing is, time passes until something is or `timeout` is over."""
        clock = self.network.clock
        until = clock.now if timeout is not None and timeout <= 0 else None
        while True:
            ready = self._ready() if self.touched else []
            if ready:
                return ready
            if until is None:
                until = INF if timeout is None else clock.now + timeout
            if clock.next > until or clock.next == INF:
                if until == INF:
                    assert self.stuck is not None
                    self.stuck()
                clock.now = max(clock.now, until)
                return ready
            clock.run_until(until)

    def _ready(self) -> list[tuple[selectors.SelectorKey, int]]:
        ready = []
        touched = self.touched
        for sock in list(touched):
            mask = sock.ready()
            if mask:
                assert sock.selector_key is not None
                ready.append((sock.selector_key, mask))
            else:
                del touched[sock]
        return ready

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """The key of a watched socket."""
        return self._keys[self._keys.number(fileobj)]

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """All that is watched, by number."""
        return self._keys

    def close(self) -> None:
        """Watch nothing any more."""
        for fd in list(self._keys):
            self.unregister(fd)


class _Handle(asyncio.Handle):
    """asyncio's, without asking the loop whether it debugs: then it would not be used."""

    __slots__ = ()

    def __init__(self, callback: Any, args: Any, loop: Any, context: Any) -> None:
        self._context = copy_context() if context is None else context
        self._loop = loop
        self._callback = callback
        self._args = args
        self._cancelled = False
        self._repr = None
        self._source_traceback = None


_Handle.__name__ = _Handle.__qualname__ = asyncio.Handle.__name__


class _Transport(_SelectorSocketTransport):  # type: ignore[misc]
    """asyncio's transport, which first tries the short way to and from the simulated socket."""

    _plain = True

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._plain = not isinstance(protocol, asyncio.BufferedProtocol)
        super().set_protocol(protocol)

    def _read_ready(self) -> None:
        sock = self._sock._sock
        if self._plain and sock is not None and not self._conn_lost:
            data = sock.take(self.max_size)
            if data is not None:
                try:
                    self._protocol.data_received(data)
                except (SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self._fatal_error(error, "Fatal error: protocol.data_received() call failed.")
                return
        self._read_ready_cb()

    def write(self, data: Any) -> None:
        if (
            type(data) is bytes
            and not self._buffer
            and not self._conn_lost
            and not self._eof
            and self._empty_waiter is None
        ):
            sock = self._sock._sock
            if sock is not None and sock.pass_text(data):
                return
        super().write(data)


_Transport.__name__ = _Transport.__qualname__ = _SelectorSocketTransport.__name__


class _Info(tuple[Any, ...]):
    """An answer of getaddrinfo whose hash is the same in every process.

    asyncio's create_server() binds them in a set's order.
    """

    __slots__ = ()

    def __hash__(self) -> int:
        return crc32(repr(self).encode())


class SimLoop(asyncio.SelectorEventLoop):
    """asyncio's loop for one network; `time()` is virtual seconds since its start."""

    # asyncio's own, which its type stubs do not tell.
    _debug: bool
    _closed: bool
    _stopping: bool
    _ready: deque[Any]
    _scheduled: list[Any]
    _timer_cancelled_count: int
    _transports: Mapping[int, asyncio.WriteTransport]
    _remove_reader: Callable[[int], bool]
    _remove_writer: Callable[[int], bool]

    def __init__(self, network: Network, *, patience: int = PATIENCE) -> None:
        self.network = network
        self.patience = patience
        self._glance = min(GLANCE, patience)
        self._turns = 0  # iterations since the last look round
        self._idle = 0  # those before in which nothing has moved
        self._found: object = None  # the time and the sockets as they were then
        selector = SimSelector(network)
        selector.stuck = self._stuck
        self._touched = selector.touched
        self._clock = network.clock
        self._thread = threading.get_ident()
        self._handled: set[int] = set()
        self._stopped = False  # the programs were, where they could go on no more
        self._before: dict[int, Any] = {}  # what handled signals when the simulation began
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds since the simulation began."""
        return self.network.clock.now

    def _run_once(self) -> None:
        """Iterate until told to stop, in asyncio's order: sockets, timers, callbacks.

        What asyncio's own iteration does, less what a selector of the kernel's needs.
        """
        if self._debug:
            self._turns += 1
            if self._turns > self._glance:
                self._look_round()
            # asyncio runs what is due *before* now plus this, which must not be lost in rounding.
            self._clock_resolution = max(RESOLUTION, 2 * ulp(self._clock.now))
            super()._run_once()  # type: ignore[misc]
            return
        scheduled, ready, touched, clock = self._scheduled, self._ready, self._touched, self._clock
        take = ready.popleft
        while True:
            if self._timer_cancelled_count:
                self._drop_cancelled()
                scheduled = self._scheduled
            if clock.next <= clock.now:
                clock.run_until(clock.now)
            self._turns += 1
            if self._turns > self._glance:
                self._look_round()
            if touched:
                self._poll(ready)
            if not (ready or self._stopping):
                self._wait(scheduled[0]._when if scheduled else INF)
            if scheduled:
                now = clock.now
                while scheduled and scheduled[0]._when - now < RESOLUTION:
                    handle = heappop(scheduled)
                    handle._scheduled = False
                    ready.append(handle)
            for _ in range(len(ready)):
                handle = take()
                if not handle._cancelled:
                    try:
                        handle._context.run(handle._callback, *handle._args)
                    except (SystemExit, KeyboardInterrupt):
                        raise
                    except BaseException as error:
                        self._failed(handle, error)
            handle = None  # let go of what it refers to
            if self._stopping:
                return

    def _look_round(self) -> None:
        """Called every `GLANCE` iterations: where none has moved anything, they take their time."""
        self._turns = 0
        clock, progress = self._clock, self.network.progress
        found = clock.now, progress()
        if found != self._found:
            self._idle = 0
        else:
            self._idle += self._glance
            if self._idle >= self.patience:
                self._spinning()
            until = clock.now + self._glance * TURN
            if self._scheduled:
                until = min(until, max(clock.now, self._scheduled[0]._when))
            while clock.run_until(until):
                pass
            found = clock.now, progress()
        self._found = found

    def _wait(self, until: float) -> None:
        """Let time pass until a socket is ready, `until` at the latest."""
        clock = self._clock
        while not self._ready:
            if clock.next > until or clock.next == INF:
                if until == INF:
                    self._stuck()
                clock.now = max(clock.now, until)
                return
            clock.run_until(until)
            if self._touched:
                self._poll(self._ready)

    def _failed(self, handle: Any, error: BaseException) -> None:
        self.call_exception_handler(
            {
                "message": "Exception in callback "
                + format_helpers._format_callback_source(handle._callback, handle._args),
                "exception": error,
                "handle": handle,
            }
        )

    def call_soon(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> asyncio.Handle:
        """As any loop's."""
        if self._debug or self._closed:
            asyncios: asyncio.Handle = super().call_soon(callback, *args, context=context)
            return _without_us(asyncios)
        handle = _Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def create_task(self, coro: Any, **options: Any) -> Any:
        """As any loop's; the host on which the task runs knows it."""
        task = _without_us(super().create_task(coro, **options))
        context = options.get("context")
        host = HERE.get(None) if context is None else context.get(HERE)
        if host is not None:
            host.tasks[task] = None
        return task

    def _make_socket_transport(
        self, sock: Any, protocol: Any, waiter: Any = None, *, extra: Any = None, server: Any = None
    ) -> Any:
        return _Transport(self, sock, protocol, waiter, extra, server)

    def _poll(self, ready: deque[Any]) -> None:
        """Add the callbacks of ready sockets."""
        touched = self._touched
        for sock in tuple(touched):
            key = sock.selector_key
            hot = False
            if key is not None:
                events = key.events
                reader, writer = key.data
                if events & 1 and ((sock._conn and sock._conn._rx) or sock.readable()):
                    hot = True
                    if reader._cancelled:
                        self._remove_reader(key.fd)
                    else:
                        ready.append(reader)
                if events & 2 and sock.writable():
                    hot = True
                    if writer._cancelled:
                        self._remove_writer(key.fd)
                    else:
                        ready.append(writer)
            if not hot:
                del touched[sock]

    def _drop_cancelled(self) -> None:
        """As asyncio: from the head always, everywhere if half of many are cancelled."""
        scheduled = self._scheduled
        if len(scheduled) > 100 and self._timer_cancelled_count > len(scheduled) // 2:
            kept = []
            for handle in scheduled:
                if handle._cancelled:
                    handle._scheduled = False
                else:
                    kept.append(handle)
            heapify(kept)
            scheduled[:] = kept
            self._timer_cancelled_count = 0
        else:
            while scheduled and scheduled[0]._cancelled:
                self._timer_cancelled_count -= 1
                heappop(scheduled)._scheduled = False

    # No thread can wake this loop, so there is no pipe to be woken by.

    def _make_self_pipe(self) -> None:
        pass

    def _close_self_pipe(self) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _process_self_data(self, data: bytes) -> None:
        pass

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Any, *args: Any, context: Any = None
    ) -> Any:
        """As `call_soon`; `RuntimeError` from another thread."""
        if threading.get_ident() != self._thread:
            raise RuntimeError("a simulated loop cannot be used from another thread")
        return _without_us(self.call_soon(callback, *args, context=context))

    # Executors run inline.

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> Any:
        """Call `func` at once, in an empty context as in a thread: there are no threads.

        As from a thread, the loop hears of it in its next iteration.
        """
        if self.is_closed():
            raise RuntimeError("Event loop is closed")
        if executor is None:
            self._check_default_executor()  # type: ignore[attr-defined]
        work: Any = concurrent.futures.Future()
        future = asyncio.wrap_future(work, loop=self)
        try:
            work.set_result(_as_in_a_thread(func, *args))
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:
            work.set_exception(error)
        return future

    async def getaddrinfo(self, host: Any, port: Any, **hints: Any) -> Any:
        """Names of the simulated network."""
        return await self.run_in_executor(None, partial(getaddrinfo, host, port, **hints))

    async def _create_server_getaddrinfo(self, *args: Any, **named: Any) -> list[_Info]:
        infos = await super()._create_server_getaddrinfo(*args, **named)  # type: ignore[misc]
        return [_Info(info) for info in infos]

    async def getnameinfo(self, sockaddr: Any, flags: int = 0) -> tuple[str, str]:
        """Names of the simulated network."""
        name: tuple[str, str] = await self.run_in_executor(
            None, socket.getnameinfo, sockaddr, flags
        )
        return name

    async def _sock_sendfile_native(
        self, sock: Any, file: Any, offset: int, count: int | None
    ) -> int:
        """sendfile(2): from the file's number, so that its position counts for nothing."""
        try:
            number = file.fileno()
            size = os.fstat(number).st_size
        except (AttributeError, OSError) as error:
            raise asyncio.SendfileNotAvailableError("not a regular file") from error
        end = offset + (size if count is None else count)
        start = offset
        try:
            while data := os.pread(number, min(end - offset, _SENDFILE), offset):
                await self.sock_sendall(sock, data)
                offset += len(data)
        finally:
            if offset > start:
                os.lseek(number, offset, os.SEEK_SET)
        return offset - start

    # What leaves the simulation.

    async def subprocess_exec(self, *args: Any, **named: Any) -> NoReturn:
        """Refused."""
        leaves("a subprocess")

    async def subprocess_shell(self, *args: Any, **named: Any) -> NoReturn:
        """Refused."""
        leaves("a subprocess")

    async def create_datagram_endpoint(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: only TCP is simulated."""
        leaves("a datagram socket")

    async def create_unix_connection(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: only TCP is simulated."""
        leaves("a Unix socket")

    async def create_unix_server(self, *args: Any, **named: Any) -> NoReturn:
        """Refused: only TCP is simulated."""
        leaves("a Unix socket")

    async def connect_read_pipe(self, *args: Any, **named: Any) -> NoReturn:
        """Refused."""
        leaves("a pipe")

    async def connect_write_pipe(self, *args: Any, **named: Any) -> NoReturn:
        """Refused."""
        leaves("a pipe")

    # Signals come from outside, between two callbacks.

    def add_signal_handler(  # type: ignore[override]
        self, sig: int, callback: Any, *args: Any
    ) -> None:
        """As on any loop, in the main thread."""
        if asyncio.iscoroutine(callback) or asyncio.iscoroutinefunction(callback):
            raise TypeError("coroutines cannot be used with add_signal_handler()")
        self._check_signal(sig)  # type: ignore[attr-defined]
        self._check_closed()  # type: ignore[attr-defined]
        context = copy_context()

        def handle(_number: int, _frame: Any) -> None:
            self.call_soon(callback, *args, context=context)

        try:
            previous = signal.signal(sig, handle)
        except ValueError as error:  # not in the main thread
            raise RuntimeError(str(error)) from error
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise RuntimeError(f"sig {sig} cannot be caught") from error
        self._before.setdefault(sig, previous)
        self._handled.add(sig)

    def remove_signal_handler(self, sig: int) -> bool:
        """Put the default in its place; whether there was a handler."""
        self._check_signal(sig)  # type: ignore[attr-defined]
        if sig not in self._handled:
            return False
        self._handled.remove(sig)
        interrupt = sig == signal.SIGINT
        signal.signal(sig, signal.default_int_handler if interrupt else signal.SIG_DFL)
        return True

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """There is none; from now on nobody may ask for it."""
        self._executor_shutdown_called = True

    def close(self) -> None:
        """Close the loop and put signal handlers back.

        What the programs left open the kernel closes, as it does when a process ends. In debug mode
        Python warns of it, as after `asyncio.run`; not where they were stopped before they could.
        """
        while self._before:
            signal.signal(*self._before.popitem())
        self._handled.clear()
        warn = self._debug and not self._stopped
        for fd, sock in self.network.files.items():
            if not sock.dead:
                sock.close()
                sock.fd, sock.files, sock.dead = fd, 0, OVER if warn else DOWN
        self.network.files.clear()
        for transport in self._transports.values():
            own = transport._sock  # type: ignore[attr-defined]
            if own is not None and own._sock is not None and own._sock.dead == DOWN:
                transport._closing = True  # type: ignore[attr-defined]
                transport._sock = None  # type: ignore[attr-defined]
        super().close()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """As asyncio's, noting the virtual time."""
        error = context.get("exception")
        if error is not None:
            _note(error, self.time())
        super().call_exception_handler(context)

    def _where(self, task: asyncio.Task[Any]) -> str:
        for host in self.network.hosts.values():
            if task in host.tasks:
                return f" on {host.name}"
        return ""

    def _stuck(self) -> NoReturn:
        self._stopped = True
        waiting = [
            f"  {task.get_name()}{self._where(task)}: {_awaited(task)}"
            for task in sorted(asyncio.all_tasks(self), key=lambda t: _number(t.get_name()))
            if not task.done()
        ]
        raise Deadlock(
            f"nothing is ready and no timer runs, {self.time():g} s into the simulation; "
            "waiting are:\n" + "\n".join(waiting or ["  no task at all"])
        )

    def _spinning(self) -> NoReturn:
        self._stopped = True
        turning = []
        keys = [sock.selector_key for sock in self._touched if sock.selector_key is not None]
        watchers = [handle for key in keys for handle in key.data if handle is not None]
        for handle in [*watchers, *self._ready]:
            task = getattr(handle._callback, "__self__", None)
            if isinstance(task, asyncio.Task):
                turning.append(f"  {task.get_name()}{self._where(task)}: {_awaited(task)}")
            elif not handle._cancelled:
                turning.append(f"  {handle!r}")
        raise Livelock(
            f"{self.patience:,} iterations without waiting, and no socket has moved, "
            f"{self.time():g} s into the simulation; ready again are:\n" + "\n".join(turning)
        )


def run(
    main: Coroutine[Any, Any, T] | Callable[[], Coroutine[Any, Any, T]],
    *,
    seed: int | str = 0,
    hosts: Named | Network | None = None,
    profile: Any = "linux",
    debug: bool | None = None,
    patience: int = PATIENCE,
) -> T:
    """Run a coroutine (or an async function) in virtual time and return its result.

    `hosts` names the simulated hosts, with their addresses if you care; the
    program starts on the first. Without it there is one host, "localhost". A
    `Network` made beforehand serves too. `seed` decides all that is left to
    chance, Python's `random` included. `profile` names the hosts' TCP.

    Raises what the program raises, with a note of the virtual time;
    `Deadlock` if it waits for what cannot happen; `Livelock` if the loop turns
    `patience` times without waiting and without a socket having a part in it.
    """
    if patience < 1:
        raise ValueError("the loop has to turn once at least")
    network = network_of(hosts, seed, profile)
    first = next(iter(network.hosts.values()))
    context = copy_context()
    context.run(HERE.set, first)
    with inside(network, seed):
        loop = SimLoop(network, patience=patience)
        runner = asyncio.Runner(loop_factory=lambda: loop, debug=debug)
        try:
            with runner:
                coroutine = main if asyncio.iscoroutine(main) else context.run(main)
                return runner.run(coroutine, context=context)
        except BaseException as error:
            _note(error, network.clock.now)
            raise
        finally:
            loop.close()


def _without_us(made: M) -> M:
    """A handle or task, whose debugging traceback is to end in the program's own code."""
    traceback = made._source_traceback
    if traceback:
        del traceback[-1]
    return made


def _as_in_a_thread(func: Callable[..., T], *args: Any) -> T:
    context = Context()
    context.run(HERE.set, HERE.get())
    return context.run(func, *args)


def network_of(hosts: Named | Network | None, seed: int | str, profile: Any) -> Network:
    """The network of the hosts that `run` is given; `TypeError` or `ValueError` on nonsense."""
    if isinstance(hosts, str):
        raise TypeError(f"hosts are a list of names, or a mapping: [{hosts!r}]")
    network = hosts if isinstance(hosts, Network) else Network(seed)
    if not isinstance(hosts, Network):
        named: Iterable[tuple[str, Any]]
        if isinstance(hosts, Mapping):
            named = hosts.items()
        else:
            named = [(name, []) for name in (["localhost"] if hosts is None else hosts)]
        for name, given in named:
            if name == "localhost":
                network.hosts[name] = Host(network, name, [], profile=profile)
                continue
            addresses = [given] if isinstance(given, str) else given or []
            if not isinstance(addresses, (list, tuple)):
                raise TypeError(f"{name!r} has an address or a list of them, not {given!r}")
            network.host(name, *addresses, profile=profile)
    if not network.hosts:
        raise ValueError("a network without hosts has nowhere to run a program")
    return network


def _note(error: BaseException, now: float) -> None:
    text = f"{now:.6f} s into the simulation"
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)


# Who waits for what.


def _number(name: str) -> tuple[str, int]:
    """Task names in the order people count."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)


def _awaited(task: asyncio.Task[Any]) -> str:
    """What a task waits in, and where its own code called that."""
    coroutine: Any = task.get_coro()
    inner, own = None, None
    while coroutine is not None:
        frame = getattr(coroutine, "cr_frame", None) or getattr(coroutine, "gi_frame", None)
        if frame is not None:
            inner = frame
            if not frame.f_code.co_filename.startswith(_ASYNCIO):
                own = frame
        coroutine = getattr(coroutine, "cr_await", None) or getattr(coroutine, "gi_yieldfrom", None)
    if inner is None:
        return "not started"
    where = own or inner
    text = f"{_qualified(where)} ({where.f_code.co_filename}:{where.f_lineno})"
    return text if inner is where else f"{_qualified(inner)}, from {text}"


def _qualified(frame: Any) -> str:
    return f"{frame.f_code.co_qualname}()"


_ASYNCIO: Final = os.path.dirname(asyncio.__file__)

"""Scripts on the live kernel: a wire in a namespace of their own, and real sockets on it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import queue
import select
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from timewait.kernel.wire import Wire
from timewait.packetdrill.assertions import mem_info, tcp_info
from timewait.packetdrill.calls import CONSTANTS, Calls, Interests, Result, Stream
from timewait.packetdrill.frames import Frame, decode, encode
from timewait.packetdrill.runner import Pending
from timewait.packetdrill.script import Unsupported
from timewait.packetdrill.settings import Settings

__all__ = ["KernelStack", "undisturbed"]


class _KernelSocket(socket.socket):
    """A kernel socket whose blocking mode is the descriptor's own flag, as in C."""

    def accept(self) -> tuple[Any, Any]:
        taken, address = super().accept()
        return _KernelSocket(fileno=taken.detach()), address

    def getblocking(self) -> bool:
        return os.get_blocking(self.fileno())

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self.fileno(), flag)

    def ioctl(self, code: int) -> int:
        (value,) = struct.unpack("i", fcntl.ioctl(self.fileno(), code, bytes(4)))
        return int(value)


class _KernelStream(Stream):
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def recv(self, size: int, _: int = 0) -> bytes:
        return os.read(self._fd, size)

    def send(self, data: bytes, _: int = 0) -> int:
        return os.write(self._fd, data)

    def getblocking(self) -> bool:
        return os.get_blocking(self._fd)

    def setblocking(self, flag: bool) -> None:
        os.set_blocking(self._fd, flag)

    def close(self) -> None:
        os.close(self._fd)


class _KernelInterests(Interests):
    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._data: dict[int, int] = {}

    def change(self, operation: int, live: Any, events: int, data: int) -> None:
        fd = live.fileno()
        if operation == 1:
            self._epoll.register(fd, events)
        elif operation == 2:
            self._epoll.unregister(fd)
        else:
            self._epoll.modify(fd, events)
        self._data[fd] = data

    def wait(self, timeout: int) -> list[tuple[int, int]]:
        ready = self._epoll.poll(timeout / 1000 if timeout >= 0 else None)
        return [(events, self._data[fd]) for fd, events in ready]

    def close(self) -> None:
        self._epoll.close()


class _KernelCalls(Calls):
    def interests(self) -> Interests:
        return _KernelInterests()

    def zeros(self, size: int) -> Stream:
        made = os.memfd_create("zeros")
        os.ftruncate(made, size)
        return _KernelStream(made)

    def pipe(self) -> tuple[Stream, Stream]:
        ends = os.pipe()
        return _KernelStream(ends[0]), _KernelStream(ends[1])

    def splice(
        self, source: Any, target: Any, offsets: tuple[int | None, ...], n: int, how: int
    ) -> int:
        splice: Callable[..., int] = os.splice
        return splice(source.fileno(), target.fileno(), n, *offsets, how)

    def sendfile(self, target: Any, source: Any, offset: int | None, n: int) -> int:
        return os.sendfile(target.fileno(), source.fileno(), offset, n)

    def without_buffer(self, live: Any, name: str, size: int, flags: int) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        flags |= socket.MSG_NOSIGNAL if name == "send" else 0
        moved = getattr(libc, name)(live.fileno(), None, ctypes.c_size_t(size), flags)
        if moved < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return int(moved)

    def with_octets(self, live: Any, name: str, octets: bytes) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if getattr(libc, name)(live.fileno(), octets or None, len(octets)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def poll(self, sockets: list[tuple[Any, int]], timeout: int) -> list[int]:
        poller = select.poll()
        for live, events in sockets:
            if live is not None:
                poller.register(live, events)
        came = dict(poller.poll(timeout if timeout >= 0 else None))
        return [0x20 if live is None else came.get(live.fileno(), 0) for live, _ in sockets]


class KernelStack:
    """The kernel as the stack under test; a context manager, one script each."""

    name = "kernel"
    real = True
    offloads = False

    def __init__(self, settings: Settings) -> None:
        six = settings.ip_version == "ipv6"
        self.wire = Wire(
            ((settings.local, settings.local_prefix),), (settings.remote,), mtu=settings.mtu
        )
        mapped = settings.ip_version == "ipv4-mapped-ipv6"
        self.calls: Calls = _KernelCalls(
            self._socket,
            f"::ffff:{settings.local}" if mapped else settings.local,
            f"::ffff:{settings.remote}" if mapped else settings.remote,
            settings.bind_port,
            settings.connect_port,
            socket.AF_INET6 if six or mapped else socket.AF_INET,
        )
        self.calls.tolerance = settings.tolerance
        self.beyond: set[str] = set()
        self._congestion = b""  # control that the namespace may not have for its default
        self._arrived: deque[Frame] = deque()
        self._started = 0.0
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._orders: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._make_calls, daemon=True)
        self._thread.start()

    def __enter__(self) -> KernelStack:
        return self

    def __exit__(self, *exception: object) -> None:
        self._orders.put(None)
        # A call that still blocks returns when its connection is gone.
        for live in self.calls.fds.values():
            with suppress(OSError, AttributeError):
                live.shutdown(socket.SHUT_RDWR)
        self._thread.join(0.2)
        for live in self.calls.fds.values():
            with suppress(OSError):
                live.close()
        self.wire.close()
        self._thread.join(2)
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _socket(self, family: int, kind: int, protocol: int) -> socket.socket:
        made = self.wire.socket(family, kind, protocol)
        if self._congestion and made.type == socket.SOCK_STREAM:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion)
        return _KernelSocket(fileno=made.detach())

    # -- calls, each made by a thread of its own so that any of them may block

    def _make_calls(self) -> None:
        while (pending := self._orders.get()) is not None:
            try:
                pending.result = pending.do()
            except BaseException as trouble:
                pending.trouble = trouble
            pending.ended = self.now()
            pending.done.set()
            with suppress(OSError):  # a call may outlive the script that made it
                os.write(self._wake_w, b"x")

    def submit(self, do: Callable[[], Result], blocking: bool) -> Pending:
        """Have the calling thread make a call."""
        pending = Pending(do)
        self._orders.put(pending)
        if blocking:
            # Let it get into the kernel before the script goes on.
            pending.done.wait(0.0005)
        return pending

    def finish(self, pending: Pending, deadline: float) -> bool:
        """Wait until a call has returned; false at `deadline`."""
        while not pending.done.is_set():
            left = deadline - self.now()
            if left <= 0:
                return False
            self._listen(left)
        if pending.trouble is not None:
            raise pending.trouble
        return True

    # -- time and packets

    def start(self) -> None:
        """Set the clock to 0."""
        self._started = time.monotonic()
        self.calls.began = time.time()

    def now(self) -> float:
        """Seconds since `start`."""
        return time.monotonic() - self._started

    def _listen(self, timeout: float) -> None:
        """Take in packets and the ends of calls for at most `timeout` seconds."""
        ready = select.select([self.wire.fileno(), self._wake_r], [], [], max(timeout, 0.0))[0]
        if self._wake_r in ready:
            os.read(self._wake_r, 4096)
        if self.wire.fileno() in ready:
            while (octets := self.wire.read()) is not None:
                frame = decode(octets, self.wire.sent_at - self._started)
                if frame is not None:
                    self._arrived.append(frame)

    def wait(self, until: float) -> None:
        """Wait until a time, taking in packets meanwhile."""
        while True:
            left = until - self.now()
            if left <= 0:
                return
            self._listen(left)

    def inject(self, frame: Frame) -> None:
        """Put a packet on the wire."""
        octets = encode(frame)
        try:
            self.wire.send(octets)
        except OSError as trouble:
            if trouble.errno != errno.EMSGSIZE:
                raise
            raise Unsupported(f"a packet of {len(octets)} octets over a veth pair") from None

    def receive(self, deadline: float) -> Frame | None:
        """The next packet of the kernel's, None at `deadline`."""
        while not self._arrived:
            left = deadline - self.now()
            self._listen(left)
            if left <= 0 and not self._arrived:
                return None
        return self._arrived.popleft()

    # -- settings and state

    def sysctl(self, name: str, value: str, line: int, required: bool) -> None:
        """Change a setting of the namespace."""
        congestion = name == "net.ipv4.tcp_congestion_control"
        if congestion:
            with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as listed:
                if value not in listed.read().split():
                    # Setting it would make the kernel look for a module, for the whole machine.
                    if required:
                        raise Unsupported(f"congestion control {value}", line)
                    return
        try:
            self.wire.sysctl(name, value)
            if congestion:
                self._congestion = b""
        except OSError as trouble:
            if congestion and trouble.errno == errno.EPERM:
                # Outside of the first namespace no default but tcp_allowed_congestion_control's
                # may be chosen; whoever has CAP_NET_ADMIN there may choose for each socket.
                self._congestion = value.encode()
            elif required:
                raise Unsupported(f"sysctl {name}={value}: {trouble.strerror}", line) from None

    def tcp_info(self, fd: int) -> Mapping[str, int]:
        """What getsockopt() says of TCP_INFO and of SO_MEMINFO."""
        live = self.calls.fds[fd]
        return {
            **tcp_info(live.getsockopt(socket.IPPROTO_TCP, 11, 512)),
            **mem_info(live.getsockopt(socket.SOL_SOCKET, CONSTANTS["SO_MEMINFO"], 64)),
        }


_quiet = threading.Lock()
_playing = 0
_before = (True, 0.005)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Real-time priority and no garbage collection while times are being kept.

    Scripts beside this one give way to it within a tenth of a millisecond.
    """
    global _playing, _before
    with _quiet:
        if not _playing:
            _before = gc.isenabled(), sys.getswitchinterval()
            gc.disable()
            sys.setswitchinterval(1e-4)
        _playing += 1
    scheduled = os.sched_getscheduler(0), os.sched_getparam(0)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, *scheduled)
        with _quiet:
            _playing -= 1
            if not _playing:
                collecting, interval = _before
                sys.setswitchinterval(interval)
                if collecting:
                    gc.enable()

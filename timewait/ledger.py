"""What this process's own code does with its TCP sockets, noted at the moment it does it.

A table read now and then misses what happened in between. But the code under
test runs in this process, so its socket calls can be noted where they are
made: who created the socket and where, which side it is, and, in the instant
before it closes, what state the kernel has it in. That state decides who
closed first: ESTABLISHED means that we do, CLOSE_WAIT that the peer did. Bytes
left unread, or SO_LINGER of 0, say why there will be a RST.

The methods of `socket.socket` are wrapped while a ledger is open, and are as
before when the last one closes. Sockets that are made below Python (uvloop's,
a C library's) are not noted; the kernel's own table shows them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import sys
import sysconfig
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Final, Self

from attrs import define, field, frozen

from timewait.events import Address
from timewait.tcp.states import State

__all__ = ["End", "Entry", "Ledger", "Place", "clock"]

_LIBRARIES: Final = tuple(
    {os.path.join(sysconfig.get_path(name), "") for name in ("stdlib", "platstdlib", "purelib")}
    | {os.path.join(os.path.dirname(os.path.abspath(__file__)), ""), "<frozen "}
)
_RUNNER: Final = f"{os.sep}_pytest{os.sep}"
_ONLY_TRY: Final = {"timewait.bind", "timewait.connections"}  # whether a port can be had
_WRAPPED: Final = (
    *("__init__", "accept", "connect", "connect_ex", "listen"),
    *("shutdown", "detach", "_real_close"),
)
_INT: Final = struct.Struct("i")
_LINGER: Final = struct.Struct("ii")


def clock() -> float:
    """Seconds as of `time.monotonic`, also where a test has frozen that (freezegun)."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@frozen
class Place:
    """A line of code: the innermost one that is not a library's, if any; `stack` from there on."""

    file: str
    line: int
    function: str
    stack: tuple[tuple[str, int, str], ...] = ()

    def __str__(self) -> str:
        name = os.path.relpath(self.file) if os.path.isabs(self.file) else self.file
        shown = self.file if name.startswith("..") else name
        return f"{shown}:{self.line} in {self.function}"


@frozen
class End:
    """A call that ends a connection, and how the kernel had the socket just before it.

    `call` is "close", "shutdown" or "collected" (closed by the garbage
    collector: then nothing else is known). `unread` is in bytes; `abortive`
    is SO_LINGER of 0.
    """

    t: float
    call: str
    state: State | None = None
    unread: int = 0
    abortive: bool = False
    place: Place | None = None


@define(eq=False)
class Entry:
    """A socket of this process. `side` is "client", "server", "listener", or None so far."""

    t: float
    created: Place
    side: str | None = None
    local: Address | None = None
    remote: Address | None = None
    failed: str | None = None  # why connect() failed: an errno's name
    holders: dict[int, int] = field(factory=dict)  # open descriptor -> id() of its object, or 0
    ends: list[End] = field(factory=list)


class Ledger:
    """Notes the TCP sockets of this process, from `__enter__` until `__exit__`.

    `entries` has them in the order of their making. With `stacks` each keeps
    the whole stack of the code that created it. `on_change` is called after
    each call that moves a connection, in the thread that made it.
    """

    def __init__(
        self, *, stacks: bool = False, on_change: Callable[[Entry], None] | None = None
    ) -> None:
        self.stacks = stacks
        self.on_change = on_change
        self.entries: list[Entry] = []
        self._of: weakref.WeakKeyDictionary[socket.socket, Entry] = weakref.WeakKeyDictionary()
        self._at: dict[int, Entry] = {}  # what `_identity` tells -> its entry

    def __enter__(self) -> Self:
        with _lock:
            if not _open:
                _wrap()
            _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            _open.remove(self)
            if not _open:
                _unwrap()

    def created(self, sock: socket.socket, fileno: int | None) -> None:
        """Note a new socket object; one of a socket that is known carries on its entry."""
        identity, at = _identity(sock.fileno()), sock.fileno()
        entry = self._at.get(identity) if fileno is not None else None
        if entry is None:
            entry = Entry(clock(), _place(self.stacks))
            self.entries.append(entry)
        self._at[identity] = entry
        self._of[sock] = entry
        weakref.finalize(sock, self._collected, entry, identity, at, id(sock)).atexit = False
        entry.holders[at] = id(sock)
        if fileno is not None:
            self._locate(sock, entry)

    def accepted(self, sock: socket.socket, listener: socket.socket | None) -> None:
        """Note that a socket came out of accept(); made where the `listener` was, if given."""
        if entry := self._of.get(sock):
            entry.side = "server"
            if listener is not None and (made := self._of.get(listener)):
                entry.created = made.created
            self._changed(sock, entry)

    def connected(self, sock: socket.socket, address: Any, outcome: int) -> None:
        """Note a connect(), begun or done; `outcome` is its errno."""
        if entry := self._of.get(sock):
            entry.side = "client"
            if outcome not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK, errno.EISCONN):
                entry.failed = errno.errorcode.get(outcome, str(outcome))
            elif isinstance(address, tuple):
                entry.remote = _address(address)
            self._changed(sock, entry)

    def listening(self, sock: socket.socket) -> None:
        """Note a listen()."""
        if entry := self._of.get(sock):
            entry.side = "listener"
            self._changed(sock, entry)

    def ending(self, sock: socket.socket, call: str) -> None:
        """Note the state of a socket that is about to be closed or shut down.

        A close() while a duplicate is open ends nothing.
        """
        entry = self._of.get(sock)
        if entry and (call != "close" or len(entry.holders) == 1):
            self._locate(sock, entry)
            place = _place(False)
            entry.ends.append(End(clock(), call, *_condition(sock), place))

    def ended(self, sock: socket.socket, call: str) -> None:
        """Note that the call came back."""
        entry = self._of.get(sock)
        if entry and self.on_change is not None and (call != "close" or not entry.holders):
            self.on_change(entry)

    def closing(self, sock: socket.socket) -> None:
        """Forget a descriptor whose number is about to be anybody's."""
        entry = self._of.get(sock)
        if entry and entry.holders.pop(sock.fileno(), None) is not None and not entry.holders:
            self._at.pop(_identity(sock.fileno()), None)

    def detaching(self, sock: socket.socket) -> None:
        """Note that the descriptor goes on without this object."""
        entry = self._of.pop(sock, None)
        if entry is not None and entry.holders.get(sock.fileno()) == id(sock):
            entry.holders[sock.fileno()] = 0

    def _collected(self, entry: Entry, identity: int, fileno: int, holder: int) -> None:
        if entry.holders.get(fileno) == holder:
            del entry.holders[fileno]
            if not entry.holders:
                self._at.pop(identity, None)
                entry.ends.append(End(clock(), "collected"))

    def _changed(self, sock: socket.socket, entry: Entry) -> None:
        self._locate(sock, entry)
        if self.on_change is not None:
            self.on_change(entry)

    def _locate(self, sock: socket.socket, entry: Entry) -> None:
        """Take down the addresses, while the kernel still tells."""
        try:
            entry.local = _address(sock.getsockname())
        except OSError:
            return
        try:
            entry.remote = _address(sock.getpeername())
        except OSError:
            pass


def _identity(fileno: int) -> int:
    """What names the socket under each of its descriptors: the inode, where it has one."""
    try:
        return os.fstat(fileno).st_ino or ~fileno
    except OSError:
        return ~fileno


def _condition(sock: socket.socket) -> tuple[State | None, int, bool]:
    """State, unread bytes and whether closing aborts; (None, 0, False) where the system is mum."""
    try:
        # The first byte of struct tcp_info is the state, in Linux's numbers.
        state = State.from_linux(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0])
        on, seconds = _LINGER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))
        if state is State.LISTEN:
            return state, 0, False
        (unread,) = _INT.unpack(fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))
    except (OSError, AttributeError, ValueError):
        return None, 0, False
    return state, unread, bool(on) and seconds == 0


def _address(address: tuple[Any, ...]) -> Address:
    """`(host, port)` as the kernel's table has it: without scope, IPv4 as IPv4."""
    return str(address[0]).partition("%")[0].removeprefix("::ffff:"), address[1]


def _place(whole: bool) -> Place:
    """Where the code that is being run was called from, leaving libraries out."""
    inner: FrameType | None = sys._getframe(2)
    while inner is not None and inner.f_code.co_filename == __file__:
        inner = inner.f_back
    frames = [(f.f_code.co_filename, f.f_lineno, f.f_code.co_name) for f in _outwards(inner)]
    runner = next((n for n, frame in enumerate(frames) if _RUNNER in frame[0]), None)
    frames = frames[: runner or None]  # not how a test came to be called
    if not frames:
        return Place("<unknown>", 0, "?")
    calling = next((n for n, frame in enumerate(frames) if frame[0] != socket.__file__), 0)
    own = next((n for n, f in enumerate(frames) if not f[0].startswith(_LIBRARIES)), calling)
    return Place(*frames[own], stack=tuple(frames) if whole else ())


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


# --- wrapping socket.socket ---------------------------------------------------------------

_lock: Final = threading.RLock()
_open: Final[list[Ledger]] = []
_originals: dict[str, Any] = {}
_target: type[socket.socket] = socket.socket


def _is_tcp(sock: socket.socket) -> bool:
    return sock.family in (socket.AF_INET, socket.AF_INET6) and bool(
        sock.type & socket.SOCK_STREAM and sock.proto in (0, socket.IPPROTO_TCP)
    )


def _wrap() -> None:
    global _target
    _target = socket.socket
    for name in _WRAPPED:
        if name in vars(_target):
            _originals[name] = vars(_target)[name]
    plain = {name: getattr(_target, name) for name in _WRAPPED if hasattr(_target, name)}

    def init(
        self: socket.socket,
        family: int = -1,
        type: int = -1,
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        plain["__init__"](self, family, type, proto, fileno)
        if _is_tcp(self) and sys._getframe(1).f_globals.get("__name__") not in _ONLY_TRY:
            for ledger in _open:
                ledger.created(self, fileno)

    def accept(self: socket.socket) -> tuple[socket.socket, Any]:
        connection, address = plain["accept"](self)
        by_a_library = sys._getframe(1).f_code.co_filename.startswith(_LIBRARIES)  # a loop, say
        for ledger in _open:
            ledger.accepted(connection, self if by_a_library else None)
        return connection, address

    def connect(self: socket.socket, address: Any) -> None:
        outcome = 0
        try:
            plain["connect"](self, address)
        except OSError as error:
            outcome = error.errno or 0
            raise
        finally:
            for ledger in _open:
                ledger.connected(self, address, outcome)

    def connect_ex(self: socket.socket, address: Any) -> int:
        outcome: int = plain["connect_ex"](self, address)
        for ledger in _open:
            ledger.connected(self, address, outcome)
        return outcome

    def listen(self: socket.socket, *backlog: int) -> None:
        plain["listen"](self, *backlog)
        for ledger in _open:
            ledger.listening(self)

    def shutdown(self: socket.socket, how: int) -> None:
        for ledger in _open if how != socket.SHUT_RD else ():
            ledger.ending(self, "shutdown")
        plain["shutdown"](self, how)
        for ledger in _open if how != socket.SHUT_RD else ():
            ledger.ended(self, "shutdown")

    def detach(self: socket.socket) -> int:
        for ledger in _open:
            ledger.detaching(self)
        fileno: int = plain["detach"](self)
        return fileno

    def real_close(self: socket.socket, *rest: Any) -> None:
        for ledger in _open:
            ledger.ending(self, "close")
            ledger.closing(self)
        plain["_real_close"](self, *rest)
        for ledger in _open:
            ledger.ended(self, "close")

    wrappers = (init, accept, connect, connect_ex, listen, shutdown, detach, real_close)
    for name, wrapper in zip(_WRAPPED, wrappers, strict=True):
        if name in plain:
            setattr(_target, name, wrapper)


def _unwrap() -> None:
    for name in _WRAPPED:
        if name in _originals:
            setattr(_target, name, _originals.pop(name))
        elif name in vars(_target):
            delattr(_target, name)


if hasattr(os, "register_at_fork"):  # a child's calls are not this process's
    os.register_at_fork(after_in_child=_open.clear)

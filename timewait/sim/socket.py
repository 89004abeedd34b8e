"""SimSocket: Python's socket object over a modelled host.

It takes `socket.socket`'s place while a simulation runs, with the same
methods, the same argument checks and the same errors; only what a socket can
do is here, what it means is in `timewait.sim.sock`. Options that are not
modelled are refused with ENOPROTOOPT, other kinds of sockets with
EAFNOSUPPORT or ESOCKTNOSUPPORT, and what would have to wait in blocking mode
with `WouldBlockForever`: nothing can block in virtual time.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import warnings
from collections.abc import Iterable
from operator import index
from types import TracebackType
from typing import Any, Final, TypeAlias

from timewait.sim.host import HERE, Host
from timewait.sim.ports import is_v4
from timewait.sim.sock import AF_INET, AF_INET6, CONNECTED, DOWN, Sock, fail

__all__ = ["SimSocket", "WouldBlockForever", "current_host"]

_SOCK_MAX: Final = 10  # SOCK_PACKET
_SOCK_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
# Plain numbers: Python's own are enums, whose `&` is slow. Others mean nothing to TCP.
_OOB, _PEEK, _TRUNC, _DONTWAIT, _WAITALL, _ERRQUEUE, _MORE = map(
    int,
    (
        *(socket.MSG_OOB, socket.MSG_PEEK, socket.MSG_TRUNC, socket.MSG_DONTWAIT),
        *(socket.MSG_WAITALL, socket.MSG_ERRQUEUE, socket.MSG_MORE),
    ),
)
_NOT_SENT: Final = _OOB | int(socket.MSG_FASTOPEN)
_READING_OVER: Final = 0x2000 | 0x8 | 0x10  # POLLRDHUP, POLLERR, POLLHUP
_TCP_INFO: Final = 280  # bytes of Linux 6.18's struct tcp_info
_LINGER_MAX: Final = (1 << 63) // 250  # seconds: MAX_SCHEDULE_TIMEOUT, for a negative time
_SO_MARK, _SO_TIMESTAMPING = 36, (37, 65)
_TX_RECORDS: Final = 0x303  # SOF_TIMESTAMPING_TX_RECORD_MASK


# Python's own, over whatever has a socket's methods.
_machine_makefile: Final[Any] = socket.socket.makefile
_machine_sendfile: Final[Any] = socket.socket._sendfile_use_send  # type: ignore[attr-defined]

_Kind: TypeAlias = type[BaseException] | None


class WouldBlockForever(RuntimeError):
    """A blocking call would have to wait, and nothing waits in virtual time."""


def current_host() -> Host:
    """The host on which the calling code runs.

    Raises `RuntimeError` outside of a simulation.
    """
    try:
        return HERE.get()
    except LookupError:
        raise RuntimeError("no simulated host: this code does not run in a simulation") from None


class SimSocket:
    """A TCP socket of a modelled host; see `socket.socket`."""

    __slots__ = (
        *("__weakref__", "_closed", "_family", "_host", "_inheritable", "_io_refs"),
        *("_proto", "_sock", "_timeout"),
    )

    def __init__(
        self,
        family: int = -1,
        type: int = -1,
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        self._sock: Sock | None = None
        self._io_refs = 0  # files that `makefile` made of it
        self._closed = False
        self._timeout: float | None = socket.getdefaulttimeout()
        host = current_host()
        self._host = host
        family, type, proto = index(family), index(type), index(proto)
        if fileno is not None:
            if index(fileno) < 0:
                raise ValueError("negative file descriptor")
            if fileno not in host.network.files:
                fail(errno.EBADF)
            self._sock = host.network.files[fileno]
            self._family = self._sock.family
            self._proto = int(socket.IPPROTO_TCP)
            return
        self._family = AF_INET if family == -1 else family
        kind = socket.SOCK_STREAM if type == -1 else type
        if self._family not in (AF_INET, AF_INET6):
            raise OSError(
                errno.EAFNOSUPPORT, f"{os.strerror(errno.EAFNOSUPPORT)}: only TCP is simulated"
            )
        if kind & ~_SOCK_FLAGS > _SOCK_MAX:
            fail(errno.EINVAL)
        if kind & ~_SOCK_FLAGS != socket.SOCK_STREAM:
            raise OSError(
                errno.ESOCKTNOSUPPORT,
                f"{os.strerror(errno.ESOCKTNOSUPPORT)}: only TCP is simulated",
            )
        if proto not in (-1, 0, socket.IPPROTO_TCP):
            fail(errno.EPROTONOSUPPORT)
        self._proto = max(proto, 0)
        if kind & socket.SOCK_NONBLOCK:
            self._timeout = 0.0
        self._attach(host.socket(self._family))

    def _attach(self, sock: Sock) -> None:
        network = sock.host.network
        sock.fd = network.next_fd
        sock.files = 1
        network.next_fd += 1
        network.files[sock.fd] = sock
        self._sock = sock

    @classmethod
    def _accepted(cls, sock: Sock) -> SimSocket:
        new = cls.__new__(cls)
        new._family = sock.family
        new._host = sock.host
        new._proto = new._io_refs = 0
        new._closed = False
        new._timeout = socket.getdefaulttimeout()
        new._attach(sock)
        return new

    # What it is.

    @property
    def family(self) -> socket.AddressFamily:
        """AF_INET or AF_INET6."""
        return socket.AddressFamily(self._family)

    @property
    def type(self) -> socket.SocketKind:
        """SOCK_STREAM."""
        return socket.SOCK_STREAM

    @property
    def proto(self) -> int:
        """As it was given: zero, or IPPROTO_TCP, which mean the same."""
        return self._proto

    @property
    def timeout(self) -> float | None:
        """As `gettimeout()`."""
        return self._timeout

    def fileno(self) -> int:
        """A number no real file has; -1 once closed."""
        return -1 if self._sock is None else self._sock.fd

    def _open(self) -> Sock:
        sock = self._sock
        if sock is None:
            fail(errno.EBADF)
        if sock.dead:
            fail(errno.ENETDOWN)
        return sock

    # Blocking.

    def setblocking(self, flag: bool) -> None:
        """Blocking mode is allowed as long as nothing has to wait."""
        self._timeout = None if flag else 0.0
        if self._sock is None:
            fail(errno.EBADF)

    def settimeout(self, value: float | None) -> None:
        """As `setblocking`; a timeout is blocking mode too."""
        if value is not None:
            value = value if isinstance(value, float) else float(index(value))
            if value != value:
                raise ValueError("Invalid value NaN (not a number)")
            if value < 0:
                raise ValueError("Timeout value out of range")
            if value >= 1 << 63:
                raise OverflowError("timestamp out of range for platform time_t")
        self._timeout = value
        if self._sock is None:
            fail(errno.EBADF)

    def gettimeout(self) -> float | None:
        """None: blocking; 0.0: non-blocking."""
        return self._timeout

    def getblocking(self) -> bool:
        """Whether the socket is in blocking mode."""
        return self._timeout != 0.0

    def get_inheritable(self) -> bool:
        """Whether a child process would inherit it."""
        self._open()
        return getattr(self, "_inheritable", False)

    def set_inheritable(self, inheritable: bool) -> None:
        """Remembered: there are no child processes."""
        self._open()
        self._inheritable = bool(inheritable)

    def _wait(self, call: str, flags: int = 0) -> None:
        """Here a blocking socket would wait."""
        if self._timeout != 0.0 and not flags & _DONTWAIT:
            raise WouldBlockForever(
                f"{call}() on a blocking socket would wait, and nothing can block in virtual "
                "time: call setblocking(False) and use the event loop"
            ) from None

    # Addresses.

    def _address(self, address: Any, call: str) -> tuple[str, int]:
        v4 = self._family == AF_INET
        if not isinstance(address, tuple):
            raise TypeError(
                f"{call}(): {'AF_INET' if v4 else 'AF_INET6'} address must be tuple, "
                f"not {address.__class__.__name__}"
            )
        if v4 and len(address) != 2:
            raise TypeError("AF_INET address must be a pair (host, port)")
        if not 2 <= len(address) <= 4:
            raise TypeError("AF_INET6 address must be a tuple (host, port[, flowinfo[, scopeid]])")
        host, *numbers = address
        if isinstance(host, (bytes, bytearray)):
            host = host.decode()
        if not isinstance(host, str):
            raise TypeError("str, bytes or bytearray expected, not " + host.__class__.__name__)
        port, flow, scope, *_ = [*map(index, numbers), 0, 0]
        found = self._resolved(host)
        if scope and "%" not in found and found.startswith("fe80:"):
            found += f"%{scope}"
        if not 0 <= port <= 65535:
            raise OverflowError(f"{call}(): port must be 0-65535.")
        if not 0 <= flow <= 0xFFFFF:
            raise OverflowError(f"{call}(): flowinfo must be 0-1048575.")
        return found, port

    def _resolved(self, host: str) -> str:
        if host == "":
            return "0.0.0.0" if self._family == AF_INET else "::"
        if "\0" in host:
            raise TypeError("host name must not contain null character")
        if host in ("<broadcast>", "255.255.255.255"):
            if self._family != AF_INET:
                raise OSError("address family mismatched")
            return "255.255.255.255"
        host, percent, _link = host.partition("%")  # which link, the address' fourth part tells
        if percent and not host.startswith("fe80:"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        mapped = self._family == AF_INET6 and host.lower().startswith("::ffff:") and "." in host
        found = self._host.resolve(host, AF_INET if mapped else self._family)
        if not found:
            if self._host.resolve(host):
                raise socket.gaierror(
                    socket.EAI_ADDRFAMILY, "Address family for hostname not supported"
                )
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return found[0]

    def _tuple(self, address: str, port: int) -> Any:
        if self._family == AF_INET:
            return address, port
        return (f"::ffff:{address}" if is_v4(address) else address), port, 0, 0

    def getsockname(self) -> Any:
        """The local address; zeros if there is none yet."""
        sock = self._open()
        return self._tuple(sock.address, sock.sport)

    def getpeername(self) -> Any:
        """The remote address; ENOTCONN if there is none, or none any more."""
        sock = self._open()
        if sock.key is None or not sock.peer_known():
            fail(errno.ENOTCONN)
        return self._tuple(sock.key[2], sock.key[3])

    # Calls.

    def bind(self, address: Any) -> None:
        """bind(2)."""
        sock = self._open()
        sock.bind(*self._address(address, "bind"))

    def listen(self, backlog: int = 128) -> None:
        """listen(2)."""
        sock = self._open()
        if index(backlog) >= 1 << 31:
            raise OverflowError("signed integer is greater than maximum")
        sock.listen(max(backlog, 0))

    def accept(self) -> tuple[SimSocket, Any]:
        """accept(2): a new socket and the peer's address."""
        try:
            child = self._open().accept()
        except BlockingIOError:
            self._wait("accept")
            raise
        new = SimSocket._accepted(child)
        new._proto = self._proto
        return new, new._tuple(child.remote, child.remote_port)

    def connect(self, address: Any) -> None:
        """connect(2)."""
        self._connect(address, "connect")

    def _connect(self, address: Any, call: str) -> None:
        sock = self._open()
        try:
            sock.connect(*self._address(address, call))
        except BlockingIOError as error:
            if self._timeout == 0.0 or error.errno != errno.EINPROGRESS:
                raise
            if not sock.writable():
                self._wait("connect")
            number = sock.take_error()
            if self._timeout is None:  # with a timeout Python only looks for the error
                if number:
                    sock.disconnect()
                else:
                    sock.phase = CONNECTED
            if number:
                raise OSError(number, os.strerror(number)) from None

    def connect_ex(self, address: Any) -> int:
        """As `connect`, returning the errno."""
        try:
            self._connect(address, "connect_ex")
        except OSError as error:
            if error.errno is None or isinstance(error, socket.gaierror):
                raise
            return error.errno
        return 0

    def send(self, data: Any, flags: int = 0, /) -> int:
        """send(2): how many bytes were taken."""
        if flags & _NOT_SENT:
            fail(errno.EOPNOTSUPP)
        sock = self._sock
        if sock is None or sock.dead:
            sock = self._open()
        try:
            return sock.send(data if type(data) is bytes else _text(data), flags & _MORE != 0)
        except BlockingIOError:
            self._wait("send", flags)
            raise

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send all or fail."""
        self._open()
        view = memoryview(_text(data))
        while view:
            view = view[self.send(view, flags) :]

    def sendto(self, data: Any, *rest: Any) -> int:
        """As `send`: TCP ignores the address."""
        if not 1 <= len(rest) <= 2:
            raise TypeError(f"sendto() takes 2 or 3 arguments ({1 + len(rest)} given)")
        self._address(rest[-1], "sendto")
        return self.send(data, rest[0] if len(rest) > 1 else 0)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """As a machine's socket, in blocking mode only: sends until the end of the file."""
        sent: int = _machine_sendfile(self, file, offset, count)
        return sent

    _check_sendfile_params = socket.socket._check_sendfile_params  # type: ignore[attr-defined]

    def sendmsg(
        self,
        buffers: Iterable[Any],
        ancdata: Iterable[Any] = (),
        flags: int = 0,
        address: Any = None,
        /,
    ) -> int:
        """sendmsg(2); ancillary data is judged as the kernel does, and means nothing to TCP."""
        self._open()
        if not isinstance(buffers, Iterable):
            raise TypeError("sendmsg() argument 1 must be an iterable")
        text = b"".join(map(_text, buffers))
        for item in ancdata:
            if len(item) != 3:
                raise TypeError(
                    "[sendmsg() ancillary data items]() argument must be sequence of length 3, "
                    f"not {len(item)}"
                )
            level, kind, data = item
            _check_ancillary(level, kind, bytes(data))
        if address is not None:
            self._address(address, "sendmsg")
        return self.send(text, flags)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """recv(2); for no bytes Python does not ask the kernel."""
        if type(bufsize) is not int:
            bufsize = index(bufsize)
        if bufsize < 0:
            raise ValueError("negative buffersize in recv")
        return self._receive(bufsize, flags) if bufsize else b""

    def _receive(self, bufsize: int, flags: int) -> bytes:
        sock = self._sock
        if sock is None or sock.dead:
            sock = self._open()
        if flags & (_OOB | _ERRQUEUE | _WAITALL):
            self._look_first(sock, bufsize, flags)
        try:
            data = sock.receive(bufsize, flags & _PEEK != 0)
            return bytes(len(data)) if flags & _TRUNC else data
        except BlockingIOError:
            self._wait("recv", flags)
            raise

    def _look_first(self, sock: Sock, bufsize: int, flags: int) -> None:
        """What these flags ask for instead of text, or before it."""
        if flags & _ERRQUEUE:
            fail(errno.EAGAIN)
        if flags & _OOB:
            fail(errno.ENOTCONN if sock.listening else errno.EINVAL)
        conn = sock.conn
        if conn is not None and not sock.poll() & _READING_OVER and len(conn._rx) < bufsize:
            self._wait("recv", flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """recv(2) into a buffer."""
        view = _writable(buffer, nbytes, "recv_into")
        data = self.recv(len(view), flags)
        if not flags & _TRUNC:
            view[: len(data)] = data
        return len(data)

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, None]:
        """As `recv`: on TCP there is no address with it."""
        if bufsize < 0:
            raise ValueError("negative buffersize in recvfrom")
        return self._receive(bufsize, flags), None

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, None]:
        """As `recv_into`, without an address."""
        view = _writable(buffer, nbytes, "recvfrom_into")
        data = self._receive(len(view), flags)
        if not flags & _TRUNC:
            view[: len(data)] = data
        return len(data), None

    def recvmsg(
        self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[bytes, list[Any], int, None]:
        """recvmsg(2): never any ancillary data."""
        if bufsize < 0:
            raise ValueError("negative buffer size in recvmsg()")
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        return self._receive(bufsize, flags), [], 0, None

    def recvmsg_into(
        self, buffers: Iterable[Any], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[Any], int, None]:
        """recvmsg(2) into one buffer after the other."""
        try:
            views = [memoryview(buffer).cast("B") for buffer in buffers]
            if any(view.readonly for view in views):
                raise TypeError
        except TypeError:
            raise TypeError(
                "recvmsg_into() argument 1 must be an iterable of single-segment read-write buffers"
            ) from None
        if ancbufsize < 0:
            raise ValueError("invalid ancillary data buffer length")
        data = self._receive(sum(map(len, views)), flags)
        left = b"" if flags & _TRUNC else data
        for view in views:
            n = min(len(view), len(left))
            view[:n] = left[:n]
            left = left[n:]
        return len(data), [], 0, None

    def shutdown(self, how: int) -> None:
        """shutdown(2)."""
        sock = self._open()
        if index(how) not in (socket.SHUT_RD, socket.SHUT_WR, socket.SHUT_RDWR):
            fail(errno.EINVAL)
        sock.shutdown(how)

    def close(self) -> None:
        """close(2), when the last file made of it is closed too; once more does nothing."""
        self._closed = True
        if self._io_refs:
            return
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.files -= 1
            if not sock.files and sock.fd in sock.host.network.files:
                del sock.host.network.files[sock.fd]
                sock.close()
                sock.lingers()

    def detach(self) -> int:
        """Let go of the socket without closing it; returns its number."""
        sock, self._sock = self._sock, None
        self._closed = True
        return -1 if sock is None else sock.fd

    def dup(self) -> SimSocket:
        """Another object for the same socket: closed when both are."""
        sock = self._open()
        new = SimSocket.__new__(SimSocket)
        new._family, new._proto, new._host = self._family, self._proto, self._host
        new._timeout, new._sock = self._timeout, sock
        new._io_refs, new._closed = 0, False
        sock.files += 1
        return new

    # Options.

    def setsockopt(self, level: int, option: int, value: Any, optlen: int | None = None) -> None:
        """setsockopt(2); ENOPROTOOPT for an option that is not modelled."""
        sock = self._open()
        if value is None and optlen is not None:
            fail(errno.EFAULT)
        if isinstance(value, int) and -(1 << 31) <= value < 1 << 31:
            number = int(value)
        else:
            data = _text(value)
            if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
                if len(data) < 8:
                    fail(errno.EINVAL)
                on, seconds = struct.unpack_from("ii", data)
                sock.linger = None if not on else seconds if seconds >= 0 else _LINGER_MAX
                return
            if len(data) < 4:
                fail(errno.EINVAL)
            (number,) = struct.unpack_from("i", data)
        sock.set_option(level, option, number)

    def getsockopt(self, level: int, option: int, buflen: int = 0) -> Any:
        """getsockopt(2); ENOPROTOOPT for an option that is not modelled."""
        sock = self._open()
        if not 0 <= buflen <= 1024:
            raise OSError("getsockopt buflen out of range")
        if (level, option) == (socket.SOL_SOCKET, socket.SO_LINGER):
            data = struct.pack("iI", sock.linger is not None, (sock.linger or 0) & 0xFFFFFFFF)
        elif (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
            data = bytes([sock.linux_state()]).ljust(_TCP_INFO, b"\0")
        else:
            data = struct.pack("I", sock.get_option(level, option) & 0xFFFFFFFF)
        if buflen:
            return data[:buflen]
        return struct.unpack_from("i", data)[0]

    def poll(self) -> int:
        """What poll(2) would report of this socket, as `select.POLLIN` and its kin."""
        return self._open().poll()

    # The object.

    def makefile(self, *args: Any, **named: Any) -> Any:
        """A file over the socket, as a machine's; where it would wait, `WouldBlockForever`."""
        return _machine_makefile(self, *args, **named)

    def _decref_socketios(self) -> None:
        """Such a file was closed (Python's own name)."""
        self._io_refs = max(0, self._io_refs - 1)
        if self._closed:
            self.close()

    def __enter__(self) -> SimSocket:
        return self

    def __exit__(
        self,
        kind: _Kind,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __getstate__(self) -> Any:
        raise TypeError("cannot pickle 'socket' object")

    def __repr__(self) -> str:
        """As a machine's socket, of which programs have seen it in logs and warnings."""
        sock = self._sock
        kind = type(self)
        name = (
            f"{kind.__module__}.{kind.__qualname__}" if kind is not SimSocket else "socket.socket"
        )
        text = f"<{name}{' [closed]' if sock is None else ''} fd={self.fileno()}"
        text += f", family={self._family}, type=1, proto={self._proto}"
        if sock is not None:
            text += f", laddr={self._tuple(sock.address, sock.sport)}"
            if sock.key is not None and (sock.dead or sock.peer_known()):
                text += f", raddr={self._tuple(*sock.key[2:])}"
        return text + ">"

    def __del__(self) -> None:
        sock = getattr(self, "_sock", None)  # where __init__ was called in vain, there is none
        if sock is not None and sock.dead != DOWN:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._io_refs = 0
            self.close()


def _text(data: Any) -> bytes:
    try:
        return bytes(memoryview(data))
    except TypeError:
        kind = data.__class__.__name__
        raise TypeError(f"a bytes-like object is required, not {kind!r}") from None


def _writable(buffer: Any, nbytes: int, call: str) -> memoryview:
    """The part of `buffer` that is to be filled: all of it if `nbytes` is 0."""
    view = memoryview(buffer).cast("B")
    if view.readonly:
        raise TypeError(
            f"{call}() argument 1 must be read-write bytes-like object, "
            f"not {buffer.__class__.__name__}"
        )
    if nbytes < 0:
        raise ValueError(f"negative buffersize in {call}")
    if nbytes > len(view):
        raise ValueError(
            "buffer too small for requested bytes"
            if call == "recv_into"
            else "nbytes is greater than the length of the buffer"
        )
    return view[:nbytes] if nbytes else view


def _check_ancillary(level: int, kind: int, data: bytes) -> None:
    """`__sock_cmsg_send`: EINVAL for what a socket does not know; it asks of its own level only."""
    if level != socket.SOL_SOCKET or kind in (socket.SCM_RIGHTS, socket.SCM_CREDENTIALS):
        return
    if len(data) != 4 or (kind != _SO_MARK and kind not in _SO_TIMESTAMPING):
        fail(errno.EINVAL)
    if kind in _SO_TIMESTAMPING and struct.unpack("I", data)[0] & ~_TX_RECORDS:
        fail(errno.EINVAL)

"""System calls of a script: from its words to the sockets API, and the results held against it.

The calls are made on socket objects with Python's Berkeley methods, so the
same reading of a script drives the kernel's sockets and the modelled ones.
Only calls that stay on sockets of the script's own are known; every other name
is unsupported, and no value of a script reaches anything but a socket.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
from collections.abc import Callable
from typing import Any as Anything
from typing import Final, TypeAlias

from attrs import define, field, frozen

from timewait.packetdrill.script import ANY, Any, Bits, Call, Struct, Unsupported, Value, Word

__all__ = ["CONSTANTS", "ERRNO_NAMES", "Calls", "Interests", "Result"]


def _constants() -> dict[str, int]:
    found: dict[str, int] = {}
    for module, prefixes in (
        (socket, ("AF_", "PF_", "SOCK_", "IPPROTO_", "SOL_", "SO_", "TCP_", "IP_", "IPV6_",
                  "MSG_", "SHUT_", "SOMAXCONN")),
        (select, ("POLL", "EPOLL")),
        (fcntl, ("F_", "FD_")),
        (os, ("O_",)),
        (errno, ("E",)),
    ):  # fmt: skip
        for name in dir(module):
            value = getattr(module, name)
            if name.startswith(prefixes) and isinstance(value, int):
                found[name] = int(value)
    return found


# Numbers that the kernel's own headers give and Python has no name for
# (include/uapi/linux/tcp.h, asm-generic/socket.h, in.h, sockios.h, tcp_states.h).
CONSTANTS: Final[dict[str, int]] = _constants() | {
    "SHUT_RD": 0, "SHUT_WR": 1, "SHUT_RDWR": 2, "NULL": 0,
    "SIOCINQ": 0x541B, "FIONREAD": 0x541B, "SIOCOUTQ": 0x5411, "TIOCOUTQ": 0x5411,
    "SIOCOUTQNSD": 0x894B, "SIOCATMARK": 0x8905, "FIONBIO": 0x5421,
    "SOL_TCP": 6, "SOL_IP": 0, "SOL_IPV6": 41, "SOL_UDP": 17, "PF_INET": 2, "PF_INET6": 10,
    "SO_RCVBUFFORCE": 33, "SO_SNDBUFFORCE": 32, "SO_PRIORITY": 12, "SO_MARK": 36,
    "SO_TIMESTAMP": 29, "SO_TIMESTAMPNS": 35, "SO_TIMESTAMPING": 37, "SO_BUSY_POLL": 46,
    "SO_MAX_PACING_RATE": 47, "SO_INCOMING_CPU": 49, "SO_ZEROCOPY": 60, "SO_PEEK_OFF": 42,
    "SO_MEMINFO": 55, "SO_TXTIME": 61, "SO_ACCEPTCONN": 30, "SO_DOMAIN": 39, "SO_PROTOCOL": 38,
    "TCP_NODELAY": 1, "TCP_MAXSEG": 2, "TCP_CORK": 3, "TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 6, "TCP_SYNCNT": 7, "TCP_LINGER2": 8, "TCP_DEFER_ACCEPT": 9,
    "TCP_WINDOW_CLAMP": 10, "TCP_INFO": 11, "TCP_QUICKACK": 12, "TCP_CONGESTION": 13,
    "TCP_MD5SIG": 14, "TCP_THIN_LINEAR_TIMEOUTS": 16, "TCP_THIN_DUPACK": 17,
    "TCP_USER_TIMEOUT": 18, "TCP_REPAIR": 19, "TCP_REPAIR_QUEUE": 20, "TCP_QUEUE_SEQ": 21,
    "TCP_REPAIR_OPTIONS": 22, "TCP_FASTOPEN": 23, "TCP_TIMESTAMP": 24, "TCP_NOTSENT_LOWAT": 25,
    "TCP_CC_INFO": 26, "TCP_SAVE_SYN": 27, "TCP_SAVED_SYN": 28, "TCP_REPAIR_WINDOW": 29,
    "TCP_FASTOPEN_CONNECT": 30, "TCP_ULP": 31, "TCP_MD5SIG_EXT": 32, "TCP_FASTOPEN_KEY": 33,
    "TCP_FASTOPEN_NO_COOKIE": 34, "TCP_ZEROCOPY_RECEIVE": 35, "TCP_INQ": 36, "TCP_CM_INQ": 36,
    "TCP_TX_DELAY": 37, "TCP_RTO_MAX_MS": 44, "TCP_RTO_MIN_US": 45, "TCP_DELACK_MAX_US": 46,
    "TCP_IS_MPTCP": 43,
    "IP_MTU_DISCOVER": 10, "IP_RECVERR": 11, "IP_MTU": 14, "IPV6_MTU": 24, "IP_FREEBIND": 15,
    "IP_TOS": 1, "IP_TTL": 2, "IP_RECVTOS": 13, "IP_RECVTTL": 12, "IP_MINTTL": 21,
    "IP_TRANSPARENT": 19, "IP_BIND_ADDRESS_NO_PORT": 24, "IP_LOCAL_PORT_RANGE": 51,
    "IP_PMTUDISC_DONT": 0, "IP_PMTUDISC_WANT": 1, "IP_PMTUDISC_DO": 2, "IP_PMTUDISC_PROBE": 3,
    "IPV6_V6ONLY": 26, "IPV6_TCLASS": 67, "IPV6_RECVERR": 25, "IPV6_MTU_DISCOVER": 23,
    "IPV6_FLOWINFO_SEND": 33, "IPV6_AUTOFLOWLABEL": 70, "IPV6_MINHOPCOUNT": 73,
    "SO_EE_ORIGIN_NONE": 0, "SO_EE_ORIGIN_LOCAL": 1, "SO_EE_ORIGIN_ICMP": 2,
    "SO_EE_ORIGIN_ICMP6": 3, "SO_EE_ORIGIN_TIMESTAMPING": 4, "SO_EE_ORIGIN_ZEROCOPY": 5,
    "SO_EE_CODE_ZEROCOPY_COPIED": 1, "SCM_TIMESTAMPING": 37, "SCM_TSTAMP_SND": 0,
    "SCM_TSTAMP_SCHED": 1, "SCM_TSTAMP_ACK": 2, "SCM_TIMESTAMP": 29, "SCM_TIMESTAMPNS": 35,
    "SOF_TIMESTAMPING_TX_HARDWARE": 1, "SOF_TIMESTAMPING_TX_SOFTWARE": 2,
    "SOF_TIMESTAMPING_RX_HARDWARE": 4, "SOF_TIMESTAMPING_RX_SOFTWARE": 8,
    "SOF_TIMESTAMPING_SOFTWARE": 16, "SOF_TIMESTAMPING_SYS_HARDWARE": 32,
    "SOF_TIMESTAMPING_RAW_HARDWARE": 64, "SOF_TIMESTAMPING_OPT_ID": 128,
    "SOF_TIMESTAMPING_TX_SCHED": 256, "SOF_TIMESTAMPING_TX_ACK": 512,
    "SOF_TIMESTAMPING_OPT_CMSG": 1024, "SOF_TIMESTAMPING_OPT_TSONLY": 2048,
    "SOF_TIMESTAMPING_OPT_STATS": 4096, "SOF_TIMESTAMPING_OPT_ID_TCP": 65536,
    "IP_RECVERR_RFC4884": 26,
    "MSG_FASTOPEN": 0x20000000, "MSG_ZEROCOPY": 0x4000000, "MSG_ERRQUEUE": 0x2000,
    "MSG_MORE": 0x8000, "MSG_NOSIGNAL": 0x4000, "MSG_WAITFORONE": 0x10000, "MSG_EOR": 0x80,
    "EPOLL_CTL_ADD": 1, "EPOLL_CTL_DEL": 2, "EPOLL_CTL_MOD": 3,
    "POLLRDHUP": 0x2000, "EPOLLRDHUP": 0x2000, "EPOLLEXCLUSIVE": 1 << 28, "EPOLLET": 1 << 31,
    "TCP_CA_Open": 0, "TCP_CA_Disorder": 1, "TCP_CA_CWR": 2, "TCP_CA_Recovery": 3,
    "TCP_CA_Loss": 4, "TCPI_OPT_TIMESTAMPS": 1, "TCPI_OPT_SACK": 2, "TCPI_OPT_WSCALE": 4,
    "TCPI_OPT_ECN": 8, "TCPI_OPT_ECN_SEEN": 16, "TCPI_OPT_SYN_DATA": 32,
    "TCP_ESTABLISHED": 1, "TCP_SYN_SENT": 2, "TCP_SYN_RECV": 3, "TCP_FIN_WAIT1": 4,
    "TCP_FIN_WAIT2": 5, "TCP_TIME_WAIT": 6, "TCP_CLOSE": 7, "TCP_CLOSE_WAIT": 8,
    "SPLICE_F_MOVE": 1, "SPLICE_F_NONBLOCK": 2, "SPLICE_F_MORE": 4, "SPLICE_F_GIFT": 8,
    "TCP_LAST_ACK": 9, "TCP_LISTEN": 10, "TCP_CLOSING": 11, "TCP_NEW_SYN_RECV": 12,
}  # fmt: skip

# Two names for one number: the one that Python has for it.
ERRNO_NAMES: Final = {
    name: errno.errorcode[n]
    for name, n in CONSTANTS.items()
    if n in errno.errorcode and name[0] == "E" and name[1:].isalnum() and hasattr(errno, name)
}

# A value for these would be a pointer, load a module, or name something outside the script.
_REFUSED_OPTIONS: Final = frozenset(
    {"TCP_ULP", "SO_ATTACH_FILTER", "SO_ATTACH_BPF", "SO_BINDTODEVICE", "SO_ATTACH_REUSEPORT_CBPF",
     "SO_ATTACH_REUSEPORT_EBPF", "TCP_MD5SIG", "TCP_MD5SIG_EXT", "TCP_ZEROCOPY_RECEIVE",
     "TCP_REPAIR_OPTIONS", "TCP_AO_ADD_KEY", "SO_PEERCRED", "SO_PEERSEC"}
)  # fmt: skip
_MOST_OCTETS: Final = 1 << 26
_LEVELS: Final = frozenset({0, 1, 6, 17, 41})
_IOCTLS: Final = frozenset(
    {"SIOCINQ", "FIONREAD", "SIOCOUTQ", "TIOCOUTQ", "SIOCOUTQNSD", "SIOCATMARK", "FIONBIO"}
)


_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
Checks: TypeAlias = "tuple[tuple[str, object, object], ...]"


@frozen
class Result:
    """What a call returned, and what it wrote where the script could see it.

    `checks` are (what, expected, came); `new` is the descriptor's object where
    the call made one.
    """

    value: int
    errno: str | None = None
    checks: tuple[tuple[str, object, object], ...] = ()
    new: Anything = None


class Interests:
    """An epoll instance of a stack."""

    def change(self, operation: int, live: Anything, events: int, data: int) -> None:
        """epoll_ctl(2): 1 adds, 2 removes, 3 changes."""
        raise Unsupported("epoll on the model")

    def wait(self, timeout: int) -> list[tuple[int, int]]:
        """epoll_wait(2): (events, data) of what is ready within `timeout` milliseconds."""
        raise Unsupported("epoll on the model")

    def close(self) -> None:
        """Forget everything."""


class Stream:
    """A file or an end of a pipe: what can be read, written, spliced and closed."""


@define
class Calls:
    """The calls of one script on the sockets of one stack.

    `make` makes a socket; `config` gives the addresses that `...` stands for.
    """

    make: Callable[[int, int, int], Anything]
    local: str
    remote: str
    bind_port: int
    connect_port: int
    family: int
    fds: dict[int, Anything] = field(factory=dict)
    # Those that an exec would close, which none ever does.
    cloexec: set[int] = field(factory=set)
    # The files that the script's commands would have made, and how many zeros are in each.
    files: dict[str, int] = field(factory=dict)
    # What the runner must know: who listens and who connects where.
    listening: dict[int, int] = field(factory=dict)
    ports: dict[int, int] = field(factory=dict)
    connected: dict[int, tuple[str, int]] = field(factory=dict)
    line: int = 0
    # When the script began on the machine's own clock, and how far off a time may be.
    began: float = 0.0
    tolerance: float = 0.004

    def prepare(self, call: Call, line: int) -> Callable[[], Result]:
        """Read a call's arguments; what is returned makes the call, perhaps blocking.

        Raises `Unsupported` where the call, an argument or a constant is not known.
        """
        self.line = line
        method = getattr(self, f"_{call.name}", None)
        if method is None or call.name not in KNOWN:
            raise Unsupported(f"system call {call.name}()", line)
        try:
            do: Callable[[], Result] = method(call)
        except (IndexError, TypeError, ValueError, struct.error, OverflowError) as trouble:
            raise Unsupported(f"the arguments of {call.name}(): {trouble}", line) from None

        def guarded() -> Result:
            try:
                return do()
            except (IndexError, OverflowError, ValueError, TypeError) as trouble:
                raise Unsupported(f"the arguments of {call.name}(): {trouble}", line) from None
            except AttributeError:
                fd = call.arguments[0]
                if isinstance(fd, int) and isinstance(self.fds.get(fd), (Interests, Stream)):
                    return Result(-1, "ENOTSOCK")
                raise
            except OSError as failed:
                return Result(-1, errno.errorcode.get(failed.errno or 0, str(failed.errno)))

        return guarded

    def made(self, fd: int, live: Anything, cloexec: bool = False) -> None:
        """A call made a descriptor, which the script knows as `fd`."""
        self.fds[fd] = live
        (self.cloexec.add if cloexec else self.cloexec.discard)(fd)

    # -- values

    def number(self, value: Value | None, default: int | None = None) -> int:
        """An integer, a constant's number or an OR of those."""
        if isinstance(value, int):
            return value
        if isinstance(value, Word):
            if value.name in CONSTANTS:
                return CONSTANTS[value.name]
            raise Unsupported(f"constant {value.name}", self.line)
        if isinstance(value, Bits):
            total = 0
            for part in value.parts:
                total |= self.number(part)
            return total
        if isinstance(value, (Any, type(None))) and default is not None:
            return default
        raise Unsupported(f"a number was expected, not {value!r}", self.line)

    def socket(self, call: Call, at: int = 0) -> Anything:
        """The live socket of a script's descriptor; one that is none gives EBADF."""
        fd = self.number(call.arguments[at])
        if fd not in self.fds:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self.fds[fd]

    def address(self, value: Value, default: tuple[str, int]) -> tuple[str, int]:
        """An address structure as `(host, port)`; `default` is what `...` stands for."""
        if not isinstance(value, Struct):
            if isinstance(value, (Any, Word)) or value == 0:
                return default
            raise Unsupported(f"address {value!r}", self.line)
        family = self.number(value.get("sa_family", "sin_family", "sin6_family"), self.family)
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise Unsupported(f"address family {family}", self.line)
        host = value.get("sin_addr", "sin6_addr")
        port = self.number(value.get("sin_port", "sin6_port"), default[1])
        if isinstance(host, Word) and host.name in ("INADDR_ANY", "IN6ADDR_ANY"):
            host = "0.0.0.0" if family == socket.AF_INET else "::"
        if host is None:  # strace has inet_pton(AF_INET6, "::1", &sin6_addr) in its place
            host = next((text for name, text in value.fields if not name and text != ANY), None)
        if host in (ANY, Word("in6addr_any")):
            host = None if host is ANY else "::"
        if host is not None and not isinstance(host, str):
            raise Unsupported(f"address {host!r}", self.line)
        return (host or default[0]), port

    def size(self, value: Value) -> int:
        """A number of octets that this process is willing to hold."""
        size = self.number(value)
        if not 0 <= size <= _MOST_OCTETS:
            raise Unsupported(f"a buffer of {size} octets", self.line)
        return size

    def odd_address(self, call: Call, live: Anything) -> bytes | None:
        """The octets of an address that is not of the socket's own family and length.

        None for an ordinary one, which `address` reads.
        """
        value, length = call.arguments[1], self.number(call.arguments[2], 128)
        family = live.family
        if value in (0, Word("NULL")):
            return b""
        if isinstance(value, Struct):
            family = self.number(value.get("sa_family", "sin_family", "sin6_family"), live.family)
        six = family == socket.AF_INET6
        enough = 24 if six else 16
        if family == live.family and length >= enough:
            return None
        host, port = self.address(value, (self.remote, 0)) if family in _FAMILIES else ("", 0)
        rest = b""
        if host and (":" in host) is six:
            rest = struct.pack("!H", port) + (bytes(4) if six else b"")
            rest += socket.inet_pton(socket.AF_INET6 if six else socket.AF_INET, host)
        whole = (struct.pack("=H", family) + rest).ljust(28 if six else 16, b"\0")
        return whole[: max(length, 0)]

    def with_octets(self, live: Anything, name: str, octets: bytes) -> None:
        """bind(2) or connect(2) with an address given as octets."""
        raise Unsupported(f"{name}() with such an address on the model")

    def seen_address(self, value: Value | None, came: Anything) -> Checks:
        """An address that a call gave back, held against the script's."""
        if not isinstance(value, Struct):
            return ()
        host, port = self.address(value, came[:2])
        return (("address", f"{host} port {port}", f"{came[0]} port {came[1]}"),)

    def payload(self, value: Value, size: int) -> bytes:
        """`size` octets to send: a string of the script's, or zeros for `...`."""
        if isinstance(value, str):
            return value.encode("latin-1", "replace")[:size].ljust(size, b"\0")
        return bytes(size)

    # -- calls that make a socket

    def _socket(self, call: Call) -> Callable[[], Result]:
        family = self.number(call.arguments[0], self.family)
        kind = self.number(call.arguments[1])
        protocol = self.number(call.arguments[2], 0)
        plain = kind & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        if family not in (socket.AF_INET, socket.AF_INET6):
            raise Unsupported(f"socket domain {family}", self.line)
        if plain not in (socket.SOCK_STREAM, socket.SOCK_DGRAM) or protocol not in (0, 6, 17):
            words = (word.name for word in call.arguments[1:3] if isinstance(word, Word))
            raise Unsupported(f"a socket of {', '.join(words) or kind}", self.line)
        return lambda: Result(0, new=self.make(family, kind, protocol))

    def _accept(self, call: Call, flags: int = 0) -> Callable[[], Result]:
        def accept() -> Result:
            taken, came = self.socket(call).accept()
            if flags & socket.SOCK_NONBLOCK:
                taken.setblocking(False)
            return Result(0, checks=self.seen_address(call.arguments[1], came), new=taken)

        return accept

    def _accept4(self, call: Call) -> Callable[[], Result]:
        flags = self.number(call.arguments[3])
        if flags & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC):
            return _fails(errno.EINVAL)
        return self._accept(call, flags)

    def _getsockname(self, call: Call, what: str = "getsockname") -> Callable[[], Result]:
        def name() -> Result:
            came = getattr(self.socket(call), what)()
            return Result(0, checks=self.seen_address(call.arguments[1], came))

        return name

    def _getpeername(self, call: Call) -> Callable[[], Result]:
        return self._getsockname(call, "getpeername")

    # -- files and pipes

    def _open(self, call: Call) -> Callable[[], Result]:
        path = call.arguments[0]
        self.number(call.arguments[1])
        if not isinstance(path, str) or path not in self.files:
            raise Unsupported(f"open({path!r}), which the script did not make", self.line)
        return lambda: Result(0, new=self.zeros(self.files[path]))

    def zeros(self, size: int) -> Stream:
        """A file of `size` zeros."""
        raise Unsupported("open() on the model")

    def _pipe(self, call: Call) -> Callable[[], Result]:
        ends = call.arguments[0]
        if not isinstance(ends, tuple) or len(ends) != 2:
            raise Unsupported(f"pipe() of {ends!r}", self.line)

        def pipe() -> Result:
            for end, live in zip(ends, self.pipe(), strict=True):
                self.made(self.number(end), live)
            return Result(0)

        return pipe

    def pipe(self) -> tuple[Stream, Stream]:
        """What to read from and what to write to."""
        raise Unsupported("pipe() on the model")

    def offset(self, value: Value) -> int | None:
        """Where in a file to begin; None is for NULL, where it stands."""
        if value in (0, Word("NULL")):
            return None
        return self.size(value[0] if isinstance(value, tuple) and value else value)

    def _splice(self, call: Call) -> Callable[[], Result]:
        source, before, target, after, size, flags = call.arguments
        del source
        offsets = self.offset(before), self.offset(after)
        count, how = self.size(size), self.number(flags)
        self.number(target)
        return lambda: Result(
            self.splice(self.socket(call), self.socket(call, 2), offsets, count, how)
        )

    def splice(
        self, source: Anything, target: Anything, offsets: tuple[int | None, ...], n: int, how: int
    ) -> int:
        """splice(2)."""
        raise Unsupported("splice() on the model")

    def _sendfile(self, call: Call) -> Callable[[], Result]:
        offset, count = self.offset(call.arguments[2]), self.size(call.arguments[3])
        return lambda: Result(self.sendfile(self.socket(call), self.socket(call, 1), offset, count))

    def sendfile(self, target: Anything, source: Anything, offset: int | None, n: int) -> int:
        """sendfile(2)."""
        raise Unsupported("sendfile() on the model")

    # -- the life of a socket

    def _bind(self, call: Call) -> Callable[[], Result]:
        def bind() -> Result:
            live = self.socket(call)
            octets = self.odd_address(call, live)
            if octets is not None:
                self.with_octets(live, "bind", octets)
                return Result(0)
            where = self.address(call.arguments[1], (self.local, self.bind_port))
            live.bind(where)
            self.ports[self.number(call.arguments[0])] = where[1]
            return Result(0)

        return bind

    def _listen(self, call: Call) -> Callable[[], Result]:
        backlog = self.number(call.arguments[1])

        def listen() -> Result:
            self.socket(call).listen(backlog)
            return Result(0)

        return listen

    def _connect(self, call: Call) -> Callable[[], Result]:
        def connect() -> Result:
            live = self.socket(call)
            octets = self.odd_address(call, live)
            if octets is not None:
                self.with_octets(live, "connect", octets)
            else:
                where = self.address(call.arguments[1], (self.remote, self.connect_port))
                self.connected[self.number(call.arguments[0])] = where
                live.connect(where)
            return Result(0)

        return connect

    def _shutdown(self, call: Call) -> Callable[[], Result]:
        how = self.number(call.arguments[1])

        def shutdown() -> Result:
            self.socket(call).shutdown(how)
            return Result(0)

        return shutdown

    def _close(self, call: Call) -> Callable[[], Result]:
        def close() -> Result:
            self.socket(call).close()
            del self.fds[self.number(call.arguments[0])]
            return Result(0)

        return close

    # -- data

    def _send(self, call: Call, flags_at: int | None = 3) -> Callable[[], Result]:
        size = self.size(call.arguments[2])
        flags = 0 if flags_at is None else self.number(call.arguments[flags_at])
        if call.arguments[1] == Word("NULL"):
            return lambda: Result(self.without_buffer(self.socket(call), "send", size, flags))
        data = self.payload(call.arguments[1], size)
        return lambda: Result(self.socket(call).send(data, flags | socket.MSG_NOSIGNAL))

    def _write(self, call: Call) -> Callable[[], Result]:
        return self._send(call, None)

    def _sendto(self, call: Call) -> Callable[[], Result]:
        if call.arguments[4] in (0, Word("NULL")):
            return self._send(call)
        size = self.size(call.arguments[2])
        flags = self.number(call.arguments[3]) | socket.MSG_NOSIGNAL
        data = self.payload(call.arguments[1], size)
        where = self.address(call.arguments[4], (self.remote, self.connect_port))
        return lambda: Result(self.socket(call).sendto(data, flags, where))

    def _recv(self, call: Call, flags_at: int | None = 3) -> Callable[[], Result]:
        size = self.size(call.arguments[2])
        flags = 0 if flags_at is None else self.number(call.arguments[flags_at])
        wanted = call.arguments[1]
        if wanted == Word("NULL"):
            return lambda: Result(self.without_buffer(self.socket(call), "recv", size, flags))

        def recv() -> Result:
            data = self.socket(call).recv(size, flags)
            checks: tuple[tuple[str, object, object], ...] = ()
            if isinstance(wanted, str):
                checks = (("data", wanted.encode("latin-1", "replace")[: len(data)], data),)
            return Result(len(data), checks=checks)

        return recv

    def _read(self, call: Call) -> Callable[[], Result]:
        return self._recv(call, None)

    def _recvfrom(self, call: Call) -> Callable[[], Result]:
        return self._recv(call)

    def buffers(self, value: Value) -> list[int]:
        """The lengths of an array of `{..., length}`."""
        if not isinstance(value, tuple):
            raise Unsupported(f"array of buffers {value!r}", self.line)
        sizes = []
        for item in value:
            if not isinstance(item, Struct) or len(item.fields) != 2:
                raise Unsupported(f"buffer {item!r}", self.line)
            sizes.append(self.size(item.fields[1][1]))
        return sizes

    def _writev(self, call: Call) -> Callable[[], Result]:
        data = bytes(sum(self.buffers(call.arguments[1])))
        return lambda: Result(self.socket(call).send(data, socket.MSG_NOSIGNAL))

    def _readv(self, call: Call) -> Callable[[], Result]:
        size = sum(self.buffers(call.arguments[1]))
        return lambda: Result(len(self.socket(call).recv(size, 0)))

    def _sendmsg(self, call: Call) -> Callable[[], Result]:
        message, flags = call.arguments[1], self.number(call.arguments[2])
        if not isinstance(message, Struct):
            raise Unsupported(f"message {message!r}", self.line)
        data = bytes(sum(self.buffers(message.get("msg_iov") or ())))
        control = [
            (level, kind, self.octets(value))
            for level, kind, value in self.control(message.get("msg_control"))
        ]
        flags |= socket.MSG_NOSIGNAL
        if flags & CONSTANTS["MSG_FASTOPEN"]:
            where = (self.remote, self.connect_port)
            return lambda: Result(self.socket(call).sendto(data, flags, where))
        if control:
            return lambda: Result(self.socket(call).sendmsg([data], control, flags))
        return lambda: Result(self.socket(call).send(data, flags))

    def control(self, value: Value | None) -> list[tuple[int, int, Value]]:
        """Control messages as (level, type, data)."""
        found = []
        for item in value if isinstance(value, tuple) else ():
            if not isinstance(item, Struct):
                raise Unsupported(f"control message {item!r}", self.line)
            level, kind = item.get("cmsg_level"), item.get("cmsg_type")
            found.append((self.number(level), self.number(kind), item.get("cmsg_data") or 0))
        return found

    def _recvmsg(self, call: Call) -> Callable[[], Result]:
        message, flags = call.arguments[1], self.number(call.arguments[2])
        if not isinstance(message, Struct):
            raise Unsupported(f"message {message!r}", self.line)
        size = sum(self.buffers(message.get("msg_iov") or ()))
        wanted = message.get("msg_flags")
        expected = None if wanted in (None, ANY) else self.number(wanted)
        control = self.control(message.get("msg_control"))

        def recvmsg() -> Result:
            data, ancillary, came, _ = self.socket(call).recvmsg(size, 1024, flags)
            checks: list[tuple[str, object, object]] = []
            if expected is not None:
                checks.append(("msg_flags", expected, came & ~socket.MSG_CMSG_CLOEXEC))
            if control:
                want = [(level, kind, self.wanted(what)) for level, kind, what in control]
                got = [
                    (level, kind, self.content(octets, *(w[2] for w in want[n : n + 1])))
                    for n, (level, kind, octets) in enumerate(ancillary)
                ]
                checks.append(("msg_control", want, got[: len(want)]))
            return Result(len(data), checks=tuple(checks))

        return recvmsg

    def wanted(self, value: Value) -> tuple[float, ...]:
        """A control message's data as numbers; a timestamp in seconds since the script began."""
        if isinstance(value, Struct):
            if value.get("scm_sec") is not None:
                nanoseconds = self.number(value.get("scm_nsec"), 0)
                return (self.number(value.get("scm_sec")) + nanoseconds / 1e9,)
            return tuple(self.number(part, 0) for _, part in value.fields)
        return (self.number(value, 0),)

    def content(self, octets: bytes, wanted: tuple[float, ...] = ()) -> tuple[float, ...]:
        """What came as a control message: an integer, an error or timestamps.

        A `struct sock_extended_err` is its six numbers; a timestamp near enough
        to the one that is `wanted` is taken for it.
        """
        if len(octets) == 48:
            stamps = struct.unpack("=6q", octets)
            pairs = zip(stamps[::2], stamps[1::2], strict=True)
            came = next((s + n / 1e9 for s, n in pairs if s), 0.0)
            came -= self.began
            near = wanted and abs(came - wanted[0]) <= self.tolerance
            return wanted if near else (came,)
        if len(octets) >= 16:
            return struct.unpack_from("=IBBBxII", octets)
        return (int.from_bytes(octets[:4], "little"),)

    def without_buffer(self, live: Anything, name: str, size: int, flags: int) -> int:
        """send(2) or recv(2) with a NULL pointer for a buffer."""
        raise Unsupported("a NULL buffer on the model")

    # -- options and control

    def option(self, call: Call) -> tuple[int, int]:
        """Level and name of a socket option that may be touched."""
        for word in call.arguments[2:3]:
            if word == Word("SO_BINDTODEVICE") and call.arguments[3] in ("tun0", "lo", ""):
                continue
            if isinstance(word, Word) and word.name in _REFUSED_OPTIONS:
                raise Unsupported(f"socket option {word.name}", self.line)
        level, name = self.number(call.arguments[1]), self.number(call.arguments[2])
        if level not in _LEVELS or (level == 6 and name == 31):
            raise Unsupported(f"socket options of level {level}", self.line)
        return level, name

    def _setsockopt(self, call: Call) -> Callable[[], Result]:
        level, name = self.option(call)
        octets = self.octets(call.arguments[3])
        if call.arguments[3] == Word("NULL"):
            size = self.number(call.arguments[4])

            def without_value() -> Result:
                self.socket(call).setsockopt(level, name, None, size)
                return Result(0)

            return without_value
        length = self.number(call.arguments[4], len(octets))
        if length < 0 or length > 4096:
            raise Unsupported(f"an option of {length} octets", self.line)
        if (level, name) == (6, 13) and octets.rstrip(b"\0").decode() not in _congestion_controls():
            # Setting it could make the kernel load a module, for the whole machine.
            raise Unsupported(f"congestion control {octets.rstrip(bytes(1)).decode()}", self.line)
        octets = octets[:length].ljust(length, b"\0")

        def setsockopt() -> Result:
            self.socket(call).setsockopt(level, name, octets)
            return Result(0)

        return setsockopt

    def octets(self, value: Value) -> bytes:
        """An option's value as the C struct that a script's notation stands for."""
        if isinstance(value, str):
            return value.encode("latin-1", "replace") + b"\0"
        if isinstance(value, Struct):
            parts = [part for _, part in value.fields]
            if value.get("tv_sec", "tv_usec") is not None:  # a struct timeval is of longs
                numbers = (self.number(value.get(name), 0) for name in ("tv_sec", "tv_usec"))
                return struct.pack("=qq", *numbers)
        elif isinstance(value, tuple):
            if len(value) == 1 and not isinstance(value[0], (int, Word, Bits)):
                return self.octets(value[0])
            parts = list(value)
        else:
            parts = [value]
        return b"".join((self.number(part, 0) & 0xFFFFFFFF).to_bytes(4, "little") for part in parts)

    def _getsockopt(self, call: Call) -> Callable[[], Result]:
        level, name = self.option(call)
        wanted = call.arguments[3]
        expected = None if wanted is ANY or wanted == (ANY,) else self.octets(wanted)
        size = call.arguments[4]
        if isinstance(size, tuple):
            size = size[0] if size else 4
        length = self.number(size, 256)

        def getsockopt() -> Result:
            got = self.socket(call).getsockopt(level, name, length)
            checks: tuple[tuple[str, object, object], ...] = ()
            if expected is not None:
                if isinstance(wanted, str):
                    checks = (("value", expected.rstrip(b"\0"), got.rstrip(b"\0")),)
                else:
                    checks = (("value", _ints(expected[: len(got)]), _ints(got[: len(expected)])),)
            return Result(0, checks=checks)

        return getsockopt

    def _fcntl(self, call: Call) -> Callable[[], Result]:
        command = self.number(call.arguments[1])
        value = self.number(call.arguments[2]) if len(call.arguments) > 2 else 0
        fd = self.number(call.arguments[0])
        if command not in (fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETFD, fcntl.F_SETFD):
            raise Unsupported(f"fcntl() command {call.arguments[1]!r}", self.line)

        def control() -> Result:
            target = self.socket(call)
            if command == fcntl.F_GETFL:
                flags = os.O_RDWR | (0 if target.getblocking() else os.O_NONBLOCK)
                return Result(flags)
            if command == fcntl.F_SETFL:
                target.setblocking(not value & os.O_NONBLOCK)
            if command == fcntl.F_SETFD:
                (self.cloexec.add if value & fcntl.FD_CLOEXEC else self.cloexec.discard)(fd)
            return Result(int(command == fcntl.F_GETFD and fd in self.cloexec))

        return control

    def _ioctl(self, call: Call) -> Callable[[], Result]:
        request = call.arguments[1]
        if not isinstance(request, Word) or request.name not in _IOCTLS:
            raise Unsupported(f"ioctl() request {request!r}", self.line)
        code = CONSTANTS[request.name]
        wanted = call.arguments[2]
        if isinstance(wanted, tuple) and len(wanted) == 1:
            wanted = wanted[0]
        expected = None if wanted is ANY else self.number(wanted)

        def ioctl() -> Result:
            target = self.socket(call)
            if request.name == "FIONBIO":
                target.setblocking(not expected)
                return Result(0)
            came = target.ioctl(code)
            checks = () if expected is None else ((request.name, expected, came),)
            return Result(0, checks=checks)

        return ioctl

    # -- readiness

    def _poll(self, call: Call) -> Callable[[], Result]:
        asked = call.arguments[0]
        if asked in (0, Word("NULL")):
            asked = ()
        if not isinstance(asked, tuple):
            raise Unsupported(f"poll() of {asked!r}", self.line)
        timeout = self.number(call.arguments[2])
        rows: list[tuple[int, int, int]] = []
        for item in asked:
            if not isinstance(item, Struct):
                raise Unsupported(f"poll() of {item!r}", self.line)
            rows.append(
                (
                    self.number(item.get("fd")),
                    self.number(item.get("events")),
                    self.number(item.get("revents"), 0),
                )
            )

        def poll() -> Result:
            sockets = [(self.fds.get(fd), events) for fd, events, _ in rows]
            came = self.poll(sockets, timeout)
            checks = tuple(
                (f"revents of {fd}", _poll_text(wanted), _poll_text(got))
                for (fd, _, wanted), got in zip(rows, came, strict=True)
            )
            return Result(sum(map(bool, came)), checks=checks)

        return poll

    def poll(self, sockets: list[tuple[Anything, int]], timeout: int) -> list[int]:
        """poll(2): the events that came for each socket, within `timeout` milliseconds."""
        raise NotImplementedError

    def interests(self) -> Interests:
        """A new epoll instance."""
        return Interests()

    def _epoll_create(self, call: Call) -> Callable[[], Result]:
        return lambda: Result(0, new=self.interests())

    def _epoll_create1(self, call: Call) -> Callable[[], Result]:
        return self._epoll_create(call)

    def _epoll_ctl(self, call: Call) -> Callable[[], Result]:
        operation = self.number(call.arguments[1])
        fd = self.number(call.arguments[2])
        event = call.arguments[3]
        events = self.number(event.get("events")) if isinstance(event, Struct) else 0
        data = (
            self.number(event.get("fd", "ptr", "u32", "u64"), 0) if isinstance(event, Struct) else 0
        )

        def control() -> Result:
            interests = self.socket(call)
            if fd not in self.fds:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if not isinstance(interests, Interests):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            interests.change(operation, self.fds[fd], events, data)
            return Result(0)

        return control

    def _epoll_wait(self, call: Call) -> Callable[[], Result]:
        wanted = call.arguments[1]
        asked = wanted if isinstance(wanted, tuple) else (wanted,)
        expected = [
            (self.number(e.get("events"), 0), self.number(e.get("fd", "ptr", "u32", "u64"), 0))
            for e in asked
            if isinstance(e, Struct)
        ]
        timeout = self.number(call.arguments[3])

        def wait() -> Result:
            interests = self.socket(call)
            if not isinstance(interests, Interests):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            ready = interests.wait(timeout)
            checks = tuple(
                (f"event {n}", f"{_poll_text(e[0])} of {e[1]}", f"{_poll_text(g[0])} of {g[1]}")
                for n, (e, g) in enumerate(zip(expected, ready, strict=False), 1)
            )
            return Result(len(ready), checks=checks)

        return wait


KNOWN: Final = frozenset(
    name[1:] for name, what in vars(Calls).items()
    if name[0] == "_" and name[1].isalpha() and callable(what)
)  # fmt: skip


def _fails(number: int) -> Callable[[], Result]:
    return lambda: Result(-1, errno.errorcode[number])


def _ints(octets: bytes) -> list[int]:
    whole = octets.ljust(-(-len(octets) // 4) * 4, b"\0")
    return [n for (n,) in struct.iter_unpack("<i", whole)]


def _poll_text(events: int) -> str:
    names = ("POLLIN", "POLLPRI", "POLLOUT", "POLLERR", "POLLHUP", "POLLNVAL", "POLLRDNORM",
             "POLLRDBAND", "POLLWRNORM", "POLLWRBAND", "POLLMSG", "POLLRDHUP")  # fmt: skip
    return "|".join(n for n in names if events & CONSTANTS.get(n, 0)) or "0"


def _congestion_controls() -> frozenset[str]:
    try:
        with open("/proc/sys/net/ipv4/tcp_available_congestion_control") as listed:
            return frozenset(listed.read().split())
    except OSError:
        return frozenset({"cubic", "reno"})

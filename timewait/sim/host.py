"""One host's kernel: its sockets, their timers, and who gets what arrives.

`Sock` is the kernel's side of a socket (Linux's `struct sock` and `struct
socket` in one). It outlives the file that named it: an orphan goes on closing
when nobody can see it any more, and a TIME_WAIT is what is left of it. The
protocol is `timewait.tcp.connection`'s; what is decided here is what Linux
decides outside the protocol: addresses, ports, the accept queue, who is
reset when a listener goes, and which error a call reports.

Errors are raised as `OSError` with Linux's errno. A call that would have to
wait raises `BlockingIOError`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections import Counter, deque
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar, copy_context
from ipaddress import ip_address
from selectors import SelectorKey
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

from timewait.events import Row, Transition
from timewait.sim.express import pass_text, read_all
from timewait.sim.network import Key, canonical
from timewait.sim.ports import ANY4, ANY6, PortTable, is_v4
from timewait.tcp.connection import Connection, Hook, SocketOptions
from timewait.tcp.profiles import Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment, seq_add
from timewait.tcp.states import Event, State, Timer
from timewait.tcp.time_wait import TimeWait

if TYPE_CHECKING:
    from timewait.sim.network import Network

__all__ = ["HERE", "Host", "Remnant", "Sock", "fail"]

T = TypeVar("T")

HERE: ContextVar[Host] = ContextVar("host")  # on which host the running code runs

AF_INET: Final = socket.AF_INET
AF_INET6: Final = socket.AF_INET6

# What the file, not the protocol, remembers (Linux's socket_state).
UNCONNECTED, CONNECTING, CONNECTED, DISCONNECTING = range(4)

INF: Final = float("inf")
_LOOPBACK_MSS: Final = 32741  # lo's MTU of 65536, halved by Linux's window rule, less timestamps
_KEEP: Final = (7200.0, 75.0, 9)
_NO_OPTIONS: Final = SocketOptions()
_SOMAXCONN: Final = 4096
_RMEM_MAX: Final = 4194304
_WMEM_MAX: Final = 4194304
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP, _POLLRDHUP = 0x1, 0x4, 0x8, 0x10, 0x2000
_TIMER_NAMES: Final = {
    Timer.RETRANSMIT: "retransmit",
    Timer.PROBE: "probe",
    Timer.KEEPALIVE: "keepalive",
    Timer.WAIT: "time_wait",
}
_LINUX_STATES: Final = {
    State.ESTABLISHED: 1,
    State.SYN_SENT: 2,
    State.SYN_RECEIVED: 3,
    State.FIN_WAIT_1: 4,
    State.FIN_WAIT_2: 5,
    State.TIME_WAIT: 6,
    State.CLOSED: 7,
    State.CLOSE_WAIT: 8,
    State.LAST_ACK: 9,
    State.LISTEN: 10,
    State.CLOSING: 11,
}


def fail(number: int) -> NoReturn:
    """Raise the error the kernel would return."""
    raise OSError(number, os.strerror(number))


class Sock:
    """A socket as its kernel knows it."""

    __slots__ = (
        "accepted",
        "address",
        "backlog",
        "bind_address_no_port",
        "bound_address",
        "bound_port",
        "clean",
        "clock",
        "conn",
        "connect_bound",
        "dead",
        "embryos",
        "error",
        "family",
        "fd",
        "files",
        "host",
        "in_reuse_port_group",
        "keep",
        "keepalive",
        "key",
        "linger",
        "linger2",
        "listening",
        "local_port_range",
        "network",
        "no_delay",
        "parent",
        "peer",
        "peer_key",
        "phase",
        "port",
        "rcvbuf",
        "remote",
        "remote_port",
        "reuse_address",
        "reuse_port",
        "selector_key",
        "shut",
        "sndbuf",
        "sport",
        "uid",
        "user_timeout",
        "v6only",
        "waker",
        "watch",
    )

    def __init__(self, host: Host, family: int) -> None:
        self.host = host
        self.network = host.network
        self.clock = host.network.clock
        self.clean = False  # nothing but `pass_text` has touched the connection since it last did
        self.dead = False  # its host went down
        self.family = family
        self.address = ANY4 if family == AF_INET else ANY6
        self.port = 0
        self.sport = 0  # what getsockname() tells: it outlives the port
        self.remote = self.address
        self.remote_port = 0
        self.key: Key | None = None
        self.peer_key: Key | None = None
        self.conn: Connection | None = None
        self.phase = UNCONNECTED
        self.error = 0
        self.shut = 0  # bit 0: nothing more to read, bit 1: nothing more to send; without a conn
        self.listening = False
        self.backlog = 0
        self.accepted: deque[Sock] = deque()
        self.embryos: dict[Sock, None] = {}
        self.parent: Sock | None = None
        self.peer: Sock | None = None  # the other end, where it is on this host too
        self.bound_address = False
        self.bound_port = False
        self.connect_bound = False
        self.in_reuse_port_group = False
        self.v6only = False
        self.reuse_address = False
        self.reuse_port = False
        self.uid = host.uid
        self.linger: int | None = None
        self.linger2: int | None = None
        self.keepalive = False
        self.keep: tuple[float, float, int] = _KEEP  # idle, interval, probes
        self.no_delay = False
        self.user_timeout = 0
        self.rcvbuf: int | None = None
        self.sndbuf: int | None = None
        self.bind_address_no_port = False
        self.local_port_range = 0
        self.files = 0
        self.fd = -1
        # A selector's: whose readiness to look at again, and what it is watched for.
        self.watch: dict[Sock, None] | None = None
        self.selector_key: SelectorKey | None = None
        self.waker: float | None = None  # when the clock will look at the timers

    @property
    def state(self) -> State:
        """The state netstat would show."""
        if self.listening:
            return State.LISTEN
        return State.CLOSED if self.conn is None else self.conn.state

    # What user calls come down to.

    def bind(self, address: str, port: int) -> None:
        """bind(2): `inet_bind`, `inet6_bind`."""
        host = self.host
        mapped = self.family == AF_INET6 and is_v4(address)
        if mapped and self.v6only:
            fail(errno.EINVAL)
        if address not in (ANY4, ANY6) and not host.is_local(address):
            fail(errno.EADDRNOTAVAIL)
        if 0 < port < host.unprivileged_port_start and host.uid != 0:
            fail(errno.EACCES)
        if self.state is not State.CLOSED or self.port:
            fail(errno.EINVAL)
        v6only = self.v6only
        self.address = address
        if self.family == AF_INET6 and address != ANY6 and not mapped:
            self.v6only = True
        self.bound_address = address not in (ANY4, ANY6)
        if port or not self.bind_address_no_port:
            try:
                self.port = host.ports.bind(self, port, self._span())
            except OSError:
                self.address = ANY4 if self.family == AF_INET else ANY6
                self.v6only = v6only
                self.bound_address = False
                raise
            self.bound_port = port != 0
            self.connect_bound = False
        self.sport = self.port

    def listen(self, backlog: int) -> None:
        """listen(2): `inet_listen`; the port is checked once more."""
        if self.phase != UNCONNECTED or self.state not in (State.CLOSED, State.LISTEN):
            fail(errno.EINVAL)
        self.backlog = min(backlog & 0xFFFFFFFF, _SOMAXCONN)
        if self.listening:
            return
        self.listening = True
        try:
            self.port = self.host.ports.bind(self, self.port, self._span())
        except BaseException:
            self.listening = False
            raise
        self.sport = self.port
        self.host.listen(self)

    def connect(self, address: str, port: int) -> None:
        """connect(2), non-blocking: EINPROGRESS, and what follows from calling again."""
        if self.phase == DISCONNECTING:
            fail(errno.EINVAL)
        if self.phase == CONNECTED:
            fail(errno.EISCONN)
        if self.phase == UNCONNECTED:
            if self.state is not State.CLOSED:
                fail(errno.EISCONN)
            self._start(address, port)
            self.phase = CONNECTING
            self.network.drain()
            fail(errno.EINPROGRESS)
        state = self.state
        if state in (State.SYN_SENT, State.SYN_RECEIVED):
            fail(errno.EALREADY)
        if state is State.CLOSED:
            number = self.take_error() or errno.ECONNABORTED
            self.disconnect()
            fail(number)
        self.phase = CONNECTED

    def _start(self, address: str, port: int) -> None:
        """Choose the addresses and the port, and send the SYN (`tcp_v4_connect`)."""
        host = self.host
        mapped = is_v4(address)
        if self.family == AF_INET6:
            if mapped and self.v6only:
                fail(errno.ENETUNREACH)
            if not mapped and is_v4(self.address):
                if address != ANY6:
                    fail(errno.EAFNOSUPPORT)
                address = "127.0.0.1"
        if address in (ANY4, ANY6):
            unset = self.address in (ANY4, ANY6)
            loopback = "127.0.0.1" if is_v4(address) else "::1"
            address = self.address if not unset and mapped else loopback
        source = self.address
        if source in (ANY4, ANY6):
            source = host.source_for(address)
        elif not host.is_local(address) and ip_address(source).is_loopback:
            fail(errno.EINVAL)
        elif not host.is_local(address) and host.network.find(address) is None:
            fail(errno.ENETUNREACH)
        before = self.address
        self.address = source
        try:
            if self.port:
                if host.taken((source, self.port, address, port), False):
                    fail(errno.EADDRNOTAVAIL)
            else:
                self.port = host.ports.connect(
                    self,
                    (address, port),
                    lambda chosen: host.taken((source, chosen, address, port), True),
                    self._span(),
                )
                self.connect_bound = True
        except OSError:
            self.address = before
            raise
        self.remote, self.remote_port = address, port
        self.key = (source, self.port, address, port)
        self.peer_key = (address, port, source, self.port)
        self.sport = self.port
        self.conn = host.connection(self)
        self.tell_options()
        self.conn.read_shut = bool(self.shut & 1)
        host.tcp[self.key] = self
        host.counters["ActiveOpens"] += 1
        self.conn.open_active(self.clock.now)
        self.after(State.CLOSED)

    def accept(self) -> Sock:
        """accept(2): the connection that waits longest."""
        if not self.listening:
            fail(errno.EINVAL)
        if not self.accepted:
            fail(errno.EAGAIN)
        child = self.accepted.popleft()
        child.parent = None
        child.phase = CONNECTED
        return child

    def send(self, data: bytes) -> int:
        """send(2): bytes taken; EAGAIN if there is no room, EPIPE after the end."""
        conn = self.conn
        if conn is None:
            fail(self.take_error() or errno.EPIPE)
        if self.peer is not None and self.pass_text(data):
            return len(data)
        old = conn.state
        if conn.error or self.error:
            fail(self.take_error())
        if self.shut & 2 and old is not State.SYN_SENT:
            fail(errno.EPIPE)
        try:
            taken = conn.send(data, self.clock.now)
        finally:
            self.after(old)
        if self.network.queue:
            self.network.drain()
        if taken == 0 and data:
            fail(errno.EAGAIN)
        return taken

    def pass_text(self, data: bytes) -> bool:
        """Send all of `data` to the other end on this host the short way, if that may be."""
        peer = self.peer
        if peer is None:
            return False
        network = self.network
        if network.observers or network.faults:
            return False
        conn, other = self.conn, peer.conn
        clean = self.clean and peer.clean
        if conn is None or other is None:
            return False
        if not clean and (self.error or self.shut or self.dead):
            return False
        if not pass_text(conn, other, data, self.clock.now, clean):
            return False
        self.clean = peer.clean = True
        if self.waker is None or conn.t_retransmit < self.waker:
            self._set_waker(conn.t_retransmit)
        if peer.waker is None or other.t_ack < peer.waker:
            peer._set_waker(other.t_ack)
        if peer.watch is not None:
            peer.watch[peer] = None
        return True

    def receive(self, size: int, peek: bool = False) -> bytes:
        """recv(2): b"" at the end; EAGAIN if nothing is there yet."""
        conn = self.conn
        if conn is None:
            if self.listening:
                fail(errno.ENOTCONN)
            if self.error:
                fail(self.take_error())
            if self.shut & 1:
                return b""
            fail(errno.ENOTCONN)
        if conn._rx:
            if not peek and len(conn._rx) <= size:
                text = read_all(conn)
                if text is not None:
                    return text
            old = conn.state
            data = conn.receive(size, self.clock.now, peek)
            self.after(old)
            if self.network.queue:
                self.network.drain()
            return data
        if conn.fin_received:
            return conn.receive(size, self.clock.now)  # b"", whatever else went wrong since
        if conn.error or self.error:
            fail(self.take_error())
        if conn.eof or conn.state is State.CLOSED:
            return b""
        fail(errno.EAGAIN)

    def shutdown(self, how: int) -> None:
        """shutdown(2): `inet_shutdown`, with its odd ways on sockets that are not connected."""
        bits = how + 1
        now = self.clock.now
        state = self.state
        if state is State.LISTEN:
            if bits & 1:
                self._stop_listening()
                self.shut = 0
                if not self.bound_address:
                    self.address = ANY4 if self.family == AF_INET else ANY6
            return
        if state is State.SYN_SENT:
            self.disconnect()
            self.error = errno.ECONNRESET
            self.notify()
            return
        if self.phase == CONNECTING:
            closed = state in (State.SYN_RECEIVED, State.CLOSED)
            self.phase = DISCONNECTING if closed else CONNECTED
        conn = self.conn
        self.shut |= bits
        if conn is None or state is State.CLOSED:
            self.notify()
            fail(errno.ENOTCONN)
        if bits & 1:
            conn.shutdown_read(now)
        if bits & 2:
            conn.shutdown(now)
        self.after(state)
        self.network.drain()
        self.notify()

    def close(self) -> None:
        """The last file is closed: `inet_release`, `tcp_close`."""
        self.watch = None
        self.fd = -1
        if self.dead:
            return
        if self.listening:
            self._stop_listening()
        conn = self.conn
        if conn is not None:
            old = conn.state
            now = self.clock.now
            if old is State.CLOSED:
                self.host.forget(self)
            elif self.linger == 0 or (old is State.FIN_WAIT_2 and self.linger2 == -1):
                conn.abort(now)
                self.after(old)
            else:
                conn.close(now)
                self.after(old)
                if old is State.FIN_WAIT_2:
                    self.host.orphaned(self)
        if self.state is State.CLOSED:
            self.host.ports.release(self)
        self.network.drain()

    def disconnect(self) -> None:
        """`tcp_disconnect`: back to a socket that was never connected, its bind(2) kept."""
        conn = self.conn
        self.clean = False
        if conn is not None:
            old = conn.state
            conn.on_transition = None
            if old is not State.CLOSED:
                conn.abort(self.clock.now)
            if conn.out and self.peer_key is not None:
                self.host.flush(self.peer_key)
            if old is not State.CLOSED:
                assert self.key is not None
                self.host.moved(self.key, old, State.CLOSED, "DISCONNECT")
                self.host.forget(self)
        self.conn = None
        self.phase = UNCONNECTED
        if not self.bound_address:
            self.address = ANY4 if self.family == AF_INET else ANY6
        self.remote_port = 0
        self.shut = 0
        self.network.drain()

    def take_error(self) -> int:
        """SO_ERROR: what went wrong, told once."""
        conn = self.conn
        number = self.error or (0 if conn is None else conn.error or 0)
        self.error = 0
        if conn is not None:
            conn.error = None
        return number

    # Readiness (`tcp_poll`, as epoll and Python's selectors read it).

    def readable(self) -> bool:
        """Whether a selector would report EVENT_READ."""
        if self.dead:
            return False
        if self.listening:
            return bool(self.accepted)
        conn = self.conn
        if conn is None or conn._rx:
            return True
        return bool(conn.eof or conn.error or self.error) or conn.state is State.CLOSED

    def writable(self) -> bool:
        """Whether a selector would report EVENT_WRITE."""
        if self.dead:
            return False
        if self.listening:
            return False
        conn = self.conn
        if conn is None or conn.error or self.error:
            return True
        state = conn.state
        if state is State.SYN_SENT or state is State.SYN_RECEIVED:
            return False
        if state is State.ESTABLISHED or state is State.CLOSE_WAIT:
            return conn.writable
        return True

    # Options.

    def set_option(self, level: int, option: int, value: int) -> None:
        """setsockopt(2) with a number; ENOPROTOOPT for what is not modelled."""
        match level, option:
            case socket.SOL_SOCKET, socket.SO_REUSEADDR:
                self.reuse_address = bool(value)
            case socket.SOL_SOCKET, socket.SO_REUSEPORT:
                self.reuse_port = bool(value)
            case socket.SOL_SOCKET, socket.SO_KEEPALIVE:
                started = bool(value) and not self.keepalive
                self.keepalive = bool(value)
                if self.conn is not None and self.conn.state not in (State.CLOSED, State.SYN_SENT):
                    if started:
                        self.conn.t_keepalive = self.clock.now + self.keep[0]
                    elif not value:
                        self.conn.t_keepalive = INF
            case socket.IPPROTO_TCP, socket.TCP_KEEPIDLE if 1 <= value <= 32767:
                self.keep = (value, *self.keep[1:])
            case socket.IPPROTO_TCP, socket.TCP_KEEPINTVL if 1 <= value <= 32767:
                self.keep = (self.keep[0], value, self.keep[2])
            case socket.IPPROTO_TCP, socket.TCP_KEEPCNT if 1 <= value <= 127:
                self.keep = (*self.keep[:2], value)
            case (
                socket.IPPROTO_TCP,
                socket.TCP_KEEPIDLE | socket.TCP_KEEPINTVL | socket.TCP_KEEPCNT,
            ):
                fail(errno.EINVAL)
            case socket.SOL_SOCKET, socket.SO_RCVBUF:
                self.rcvbuf = max(2304, 2 * min(value, _RMEM_MAX))
            case socket.SOL_SOCKET, socket.SO_SNDBUF:
                self.sndbuf = max(4608, 2 * min(value, _WMEM_MAX))
            case socket.IPPROTO_TCP, socket.TCP_NODELAY:
                self.no_delay = bool(value)
            case socket.IPPROTO_TCP, socket.TCP_LINGER2:
                self.linger2 = None if value == 0 else -1 if value < 0 else min(value, 120)
            case socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT:
                if value < 0:
                    fail(errno.EINVAL)
                self.user_timeout = value
            case socket.IPPROTO_IP, 24:  # IP_BIND_ADDRESS_NO_PORT
                self.bind_address_no_port = bool(value)
            case socket.IPPROTO_IP, 51:  # IP_LOCAL_PORT_RANGE
                low, high = value & 0xFFFF, value >> 16 & 0xFFFF
                if low and high and low > high:
                    fail(errno.EINVAL)
                self.local_port_range = value & 0xFFFFFFFF
            case socket.IPPROTO_IPV6, socket.IPV6_V6ONLY if self.family == AF_INET6:
                if self.port:
                    fail(errno.EINVAL)
                self.v6only = bool(value)
            case _:
                fail(errno.ENOPROTOOPT)
        if self.conn is not None:
            self.tell_options()

    def tell_options(self) -> None:
        """Have the connection know what the user wants of it."""
        conn = self.conn
        assert conn is not None
        if self.rcvbuf is not None:
            conn.rcv_buf = self.rcvbuf // 2
        if self.sndbuf is not None:
            conn.snd_buf = self.sndbuf // 2
        if self.keepalive or self.no_delay or self.user_timeout or self.linger2 is not None:
            conn.options = SocketOptions(
                nodelay=self.no_delay,
                user_timeout=self.user_timeout / 1000 or None,
                linger2=None if self.linger2 is None else float(self.linger2),
                keepalive=self.keep if self.keepalive else None,
            )
        else:
            conn.options = _NO_OPTIONS
        self.after(conn.state)

    def get_option(self, level: int, option: int) -> int:
        """getsockopt(2) of a number; ENOPROTOOPT for what is not modelled."""
        match level, option:
            case socket.SOL_SOCKET, socket.SO_ERROR:
                number = self.take_error()
                self.notify()
                return number
            case socket.SOL_SOCKET, socket.SO_TYPE:
                return socket.SOCK_STREAM
            case socket.SOL_SOCKET, socket.SO_DOMAIN:
                return self.family
            case socket.SOL_SOCKET, socket.SO_PROTOCOL:
                return socket.IPPROTO_TCP
            case socket.SOL_SOCKET, socket.SO_ACCEPTCONN:
                return int(self.listening)
            case socket.SOL_SOCKET, socket.SO_REUSEADDR:
                return int(self.reuse_address)
            case socket.SOL_SOCKET, socket.SO_REUSEPORT:
                return int(self.reuse_port)
            case socket.SOL_SOCKET, socket.SO_KEEPALIVE:
                return int(self.keepalive)
            case socket.SOL_SOCKET, socket.SO_RCVBUF:
                return self.rcvbuf or 131072
            case socket.SOL_SOCKET, socket.SO_SNDBUF:
                return self.sndbuf or 16384
            case socket.IPPROTO_TCP, socket.TCP_NODELAY:
                return int(self.no_delay)
            case socket.IPPROTO_TCP, socket.TCP_KEEPIDLE:
                return int(self.keep[0])
            case socket.IPPROTO_TCP, socket.TCP_KEEPINTVL:
                return int(self.keep[1])
            case socket.IPPROTO_TCP, socket.TCP_KEEPCNT:
                return self.keep[2]
            case socket.IPPROTO_TCP, socket.TCP_LINGER2:
                return 60 if self.linger2 is None else self.linger2
            case socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT:
                return self.user_timeout
            case socket.IPPROTO_IP, 24:  # IP_BIND_ADDRESS_NO_PORT
                return int(self.bind_address_no_port)
            case socket.IPPROTO_IP, 51:  # IP_LOCAL_PORT_RANGE
                return self.local_port_range
            case socket.IPPROTO_IPV6, socket.IPV6_V6ONLY if self.family == AF_INET6:
                return int(self.v6only)
        # ip_getsockopt's answer to another level, unlike ip_setsockopt's.
        if level == socket.IPPROTO_IPV6 and self.family == AF_INET:
            fail(errno.EOPNOTSUPP)
        fail(errno.ENOPROTOOPT)

    def linux_state(self) -> int:
        """The state as TCP_INFO's first byte has it."""
        return _LINUX_STATES[self.state]

    def peer_known(self) -> bool:
        """Whether getpeername() has an answer: not before connect(), not after the end."""
        state = self.state
        return self.remote_port != 0 and state not in (State.CLOSED, State.SYN_SENT)

    def poll(self) -> int:
        """poll(2)'s bits: `tcp_poll`."""
        if self.listening:
            return _POLLIN if self.accepted else 0
        conn = self.conn
        state = self.state
        reading_over = writing_over = False
        mask = 0
        if conn is not None:
            reading_over = conn.read_shut or conn.fin_received or state is State.CLOSED
            writing_over = conn.write_shut
        shut = self.shut | reading_over | writing_over << 1
        if shut == 3 or state is State.CLOSED:
            mask |= _POLLHUP
        if shut & 1:
            mask |= _POLLIN | _POLLRDHUP
        if state not in (State.SYN_SENT, State.SYN_RECEIVED):
            if conn is not None and conn.readable_bytes:
                mask |= _POLLIN
            if shut & 2 or conn is None or state is State.CLOSED or conn.writable:
                mask |= _POLLOUT
        if self.error or (conn is not None and conn.error):
            mask |= _POLLERR
        return mask

    def notify(self) -> None:
        """Have the selector look at this socket again."""
        if self.watch is not None:
            self.watch[self] = None

    # What follows any input to the connection.

    def after(self, old: State) -> None:
        """Send what the connection wants sent, set its timers, follow its state."""
        conn = self.conn
        assert conn is not None
        self.clean = False
        if conn.out:
            assert self.peer_key is not None
            self.host.flush(self.peer_key)
        state = conn.state
        if state is not old:
            self.host.changed(self, old, state)
        deadline = conn.deadline
        if deadline is not None and (self.waker is None or deadline < self.waker):
            self._set_waker(deadline)

    def _set_waker(self, deadline: float) -> None:
        self.waker = deadline
        self.clock.at(deadline, self.wake, deadline)

    def wake(self, asked: float) -> None:
        """The clock calls: a timer is due, or was put off meanwhile."""
        if self.waker != asked:
            return
        self.waker = None
        conn = self.conn
        if conn is None:
            return
        deadline = conn.deadline
        if deadline is None:
            return
        now = self.clock.now
        if deadline > now:
            self._set_waker(deadline)
            return
        old = conn.state
        conn.expire(now)
        self.after(old)
        self.notify()
        self.network.drain()

    def arrive(self, segment: Segment) -> None:
        """A segment for this connection."""
        conn = self.conn
        assert conn is not None
        old = conn.state
        if (
            old is State.SYN_RECEIVED
            and self.parent is not None
            and segment.flags & (ACK | SYN | RST) == ACK
            and len(self.parent.accepted) > self.parent.backlog
        ):
            self.host.counters["ListenOverflows"] += 1
            self.host.counters["ListenDrops"] += 1
            return
        conn.segment(segment, self.clock.now)
        self.after(old)
        if self.watch is not None:
            self.watch[self] = None

    def _stop_listening(self) -> None:
        """`inet_csk_listen_stop`: half-open connections are forgotten, waiting ones reset."""
        self.host.unlisten(self)
        self.listening = False
        for embryo in list(self.embryos):
            self.host.forget(embryo)
            embryo.conn = None
        self.embryos.clear()
        now = self.clock.now
        for child in self.accepted:
            child.parent = None
            assert child.conn is not None
            old = child.conn.state
            child.conn.abort(now)
            child.after(old)
        self.accepted.clear()
        if not self.bound_port:
            self.host.ports.release(self)
            self.port = 0
        self.network.drain()

    def _span(self) -> tuple[int, int] | None:
        """IP_LOCAL_PORT_RANGE within the host's own (`inet_sk_get_local_port_range`)."""
        if not self.local_port_range:
            return None
        first, last = self.host.ports.ephemeral
        low, high = self.local_port_range & 0xFFFF, self.local_port_range >> 16
        return (
            low if first <= low <= last else first,
            high if first <= high <= last else last,
        )


class Remnant:
    """What is left of a connection when TIME_WAIT begins, or FIN_WAIT_2 without a user.

    Linux replaces the socket by a small one (`struct inet_timewait_sock`);
    whoever still has the old one open sees it closed. `record` is what the
    protocol needs, `since` when TIME_WAIT (or FIN_WAIT_2) began.
    """

    __slots__ = ("_terms", "host", "key", "record", "since")

    # Both are TCP_TIME_WAIT to the port table, and neither ever listened.
    state = State.TIME_WAIT
    in_reuse_port_group = False

    def __init__(self, sock: Sock, record: bytes, since: float) -> None:
        assert sock.key is not None
        self.host = sock.host
        self.key = sock.key
        self.record = record
        self.since = since
        self._terms = (
            (sock.family == AF_INET6)
            | sock.v6only << 1
            | sock.reuse_address << 2
            | sock.reuse_port << 3
            | sock.connect_bound << 4
            | sock.uid << 5
        )

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return AF_INET6 if self._terms & 1 else AF_INET

    @property
    def address(self) -> str:
        """The local address."""
        return self.key[0]

    @property
    def port(self) -> int:
        """The local port."""
        return self.key[1]

    @property
    def v6only(self) -> bool:
        """IPV6_V6ONLY of the socket that was."""
        return bool(self._terms & 2)

    @property
    def reuse_address(self) -> bool:
        """SO_REUSEADDR of the socket that was."""
        return bool(self._terms & 4)

    @property
    def reuse_port(self) -> bool:
        """SO_REUSEPORT of the socket that was."""
        return bool(self._terms & 8)

    @property
    def connect_bound(self) -> bool:
        """Whether connect() had chosen the port."""
        return bool(self._terms & 16)

    @property
    def uid(self) -> int:
        """Whose the socket was."""
        return self._terms >> 5

    @property
    def left(self) -> TimeWait:
        """What is left, to be asked."""
        return TimeWait(self.record)

    def arrive(self, segment: Segment) -> None:
        """A segment for the old connection, or a SYN for a new one."""
        host = self.host
        now = host.network.clock.now
        conn = self.left.thaw(host.profile, now, host.out)
        old = conn.state
        # Whether a SYN may end it depends on whether anybody listens now.
        conn.passive = host.listener(self.key) is not None
        iss = conn.next_iss
        if host.network.observers:
            conn.on_transition = _reporter(host, self.key)
        conn.segment(segment, now)
        if conn.state is State.SYN_RECEIVED:
            host.out.clear()
            host.end(self)
            host.next_iss = iss
            host.arrive(self.key, segment)
            host.next_iss = None
            return
        host.flush((self.key[2], self.key[3], self.key[0], self.key[1]))
        if conn.state is State.CLOSED:
            host.end(self)
            return
        if conn.state is not old:
            self.since = now
        self.record = bytes(TimeWait.freeze(conn))
        if conn.state is not old:
            host.await_end(self)

    def over(self) -> None:
        """Its time is up, unless a segment has started it again."""
        host = self.host
        if host.tcp.get(self.key) is not self:
            return
        clock = host.network.clock
        left = self.left
        if left.deadline > clock.now:
            clock.at(left.deadline, Remnant.over, self)
            return
        shown = left.state
        cause = "TIME_WAIT_OVER" if shown is State.TIME_WAIT else "FIN_WAIT_2_OVER"
        host.moved(self.key, shown, State.CLOSED, cause)
        host.end(self)


class Host:
    """A host of the network; made by `Network.host`.

    `profile` names its TCP (a name or a `Profile`), `uid` who runs its
    programs (ports below 1024 are root's), `ephemeral` is
    `net.ipv4.ip_local_port_range`, `tw_reuse` and `tw_reuse_delay` (seconds)
    are `net.ipv4.tcp_tw_reuse` and its delay, `max_tw_buckets` bounds
    TIME_WAIT, `timestamps` is `net.ipv4.tcp_timestamps`, `mtu` that of its links.
    """

    def __init__(
        self,
        network: Network,
        name: str,
        addresses: Iterable[str],
        *,
        profile: str | Profile = "linux",
        uid: int = 0,
        ephemeral: tuple[int, int] = (32768, 60999),
        reserved_ports: Iterable[int] = (),
        tw_reuse: int = 2,
        tw_reuse_delay: float = 1.0,
        max_tw_buckets: int = 131072,
        timestamps: bool = True,
        mtu: int = 1500,
    ) -> None:
        self.network = network
        self.name = name
        self.addresses = tuple(addresses)
        self.profile = _profile(profile)
        self.uid = uid
        self.unprivileged_port_start = 1024
        self.ephemeral = ephemeral
        self.reserved_ports = frozenset(reserved_ports)
        self.tw_reuse = tw_reuse
        self.tw_reuse_delay = tw_reuse_delay
        self.max_tw_buckets = max_tw_buckets
        self.timestamps = timestamps
        self.mtu = mtu
        self.up = True
        self.counters: Counter[str] = Counter()
        self.tasks: WeakKeyDictionary[asyncio.Task[Any], None] = WeakKeyDictionary()
        self.boots = 0
        self._boot()

    def _boot(self) -> None:
        self.boots += 1
        seed = f"{self.network.seed}/{self.name}/{self.boots}"
        self._seed = seed
        self.ports = PortTable(seed, ephemeral=self.ephemeral, reserved=self.reserved_ports)
        self.tcp: dict[Key, Sock | Remnant] = {}
        self.out: list[Segment] = []  # every connection's, emptied after each thing it is told
        self.listeners: dict[tuple[str, int], list[Sock]] = {}
        self.time_waits = 0
        self.waiting: deque[Remnant] = deque()
        self._drawn = 0
        self.next_iss: int | None = None  # above everything an ended TIME_WAIT had sent

    # Programs.

    def run(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run part of a program on this host: a task, whose sockets are this host's.

        What it starts in turn runs here too. Await it, or let it run. Raises
        `RuntimeError` where no simulated loop runs.
        """
        loop = asyncio.get_running_loop()
        if getattr(loop, "network", None) is not self.network:
            coroutine.close()
            raise RuntimeError(f"{self.name} belongs to a network that is not being run")
        context = copy_context()
        context.run(HERE.set, self)
        return loop.create_task(coroutine, context=context)

    # Addresses.

    def is_local(self, address: str) -> bool:
        """Whether the (canonical) address is this host's."""
        return address in self.addresses or address == "::1" or address.startswith("127.")

    def source_for(self, address: str) -> str:
        """The address from which this host speaks to another; ENETUNREACH if there is no way."""
        if self.is_local(address):
            if address.startswith("127."):
                return "127.0.0.1"
            return address
        if self.network.find(address) is not None:
            for own in self.addresses:
                if is_v4(own) == is_v4(address):
                    return own
        fail(errno.ENETUNREACH)

    def resolve(self, name: str, family: int = 0) -> list[str]:
        """The addresses of a name, IPv6 first as `getaddrinfo` orders them; [] if unknown."""
        if name == "localhost":
            found = ["::1", "127.0.0.1"]
        elif name in self.network.hosts:
            found = list(self.network.hosts[name].addresses)
            if name == self.name and not found:
                found = ["127.0.0.1"]
        else:
            try:
                found = [canonical(name)]
            except ValueError:
                return []
        if family == AF_INET:
            return [a for a in found if is_v4(a)]
        if family == AF_INET6:
            return [a for a in found if not is_v4(a)]
        return sorted(found, key=is_v4)

    # Sockets.

    def socket(self, family: int = AF_INET) -> Sock:
        """socket(2), TCP."""
        return Sock(self, family)

    def _draw_iss(self, key: Key) -> int:
        """An initial sequence number above earlier connections' (RFC 6528, RFC 9293 §3.4.1).

        It grows with time, every 64 ns as on Linux, and with each connection
        made, since in a simulation many are made at one instant.
        """
        self._drawn += 1
        secret = crc32(f"{self._seed}/{key}".encode())
        return (secret + int(self.network.clock.now * 15_625_000) + 4096 * self._drawn) & 0xFFFFFFFF

    def connection(self, sock: Sock) -> Connection:
        """The protocol's part of a new connection."""
        assert sock.key is not None
        iss, self.next_iss = self.next_iss, None
        headers = 40 if is_v4(sock.remote) else 60
        conn = Connection(
            self.profile,
            iss=self._draw_iss(sock.key) if iss is None else iss,
            mss=_LOOPBACK_MSS if self.is_local(sock.remote) else self.mtu - headers,
            timestamps=self.timestamps,
            outbox=self.out,
        )
        if self.network.observers:
            conn.on_transition = _reporter(self, sock.key)
        return conn

    def listen(self, sock: Sock) -> None:
        """A socket listens: what arrives for its address is its own."""
        group = self.listeners.setdefault((sock.address, sock.port), [])
        group.append(sock)
        sock.in_reuse_port_group = sock.reuse_port
        self.moved(_listening(sock), State.CLOSED, State.LISTEN, "OPEN_PASSIVE")

    def unlisten(self, sock: Sock) -> None:
        """It does so no more."""
        group = self.listeners[sock.address, sock.port]
        group.remove(sock)
        if not group:
            del self.listeners[sock.address, sock.port]
        self.moved(_listening(sock), State.LISTEN, State.CLOSED, "CLOSE")

    def listener(self, key: Key) -> Sock | None:
        """Who listens for `key`: the exact address before the wildcard, IPv4 before IPv6."""
        address, port = key[0], key[1]
        wild = ANY4 if is_v4(address) else ANY6
        for candidates in (
            self.listeners.get((address, port)),
            self.listeners.get((wild, port)),
            self.listeners.get((ANY6, port)) if wild == ANY4 else None,
        ):
            if not candidates:
                continue
            fit = [s for s in candidates if not (s.v6only and is_v4(address))]
            if wild == ANY4:
                fit = [s for s in fit if s.family == AF_INET] or fit
            if len(fit) == 1:
                return fit[0]
            if fit:
                return fit[crc32(repr(key).encode()) % len(fit)]
        return None

    def taken(self, key: Key, choosing: bool) -> bool:
        """Whether a 4-tuple is in use; a TIME_WAIT that may be reused is ended.

        Unless the port is being chosen, it was bound by bind(2), and
        tcp_tw_reuse and its delay are not asked (`tcp_twsk_unique`). Without
        timestamps an old segment could be taken for a new one.
        """
        old = self.tcp.get(key)
        if old is None:
            return False
        if not isinstance(old, Remnant) or not old.left.timestamps or not self.timestamps:
            return True
        shown = old.left.state
        if choosing and (
            shown is not State.TIME_WAIT
            or self.tw_reuse == 0
            or (self.tw_reuse == 2 and not (_is_loopback(key[0]) or _is_loopback(key[2])))
            or self.network.clock.now <= old.since + self.tw_reuse_delay
        ):
            return True
        self.next_iss = old.left.next_iss
        self.moved(key, shown, State.CLOSED, "REUSED")
        self.end(old)
        return False

    def shrink(self, sock: Sock) -> None:
        """TIME_WAIT begins, or a FIN_WAIT_2 that nobody owns: only a remnant stays."""
        conn = sock.conn
        assert conn is not None
        assert sock.key is not None
        record = TimeWait.freeze(conn)
        conn.on_transition = None
        conn.become(State.CLOSED)
        conn.t_wait = conn.t_ack = conn.t_retransmit = conn.t_probe = INF
        conn.t_keepalive = conn.t_user = INF
        sock.shut = 3
        if self.time_waits >= self.max_tw_buckets:
            self.counters["TCPTimeWaitOverflow"] += 1
            self.moved(sock.key, record.state, State.CLOSED, "OVERFLOW")
            self.forget(sock)
            return
        remnant = Remnant(sock, bytes(record), self.network.clock.now)
        self.ports.inherit(sock, remnant)
        self.forget(sock)
        self.tcp[remnant.key] = remnant
        self.time_waits += 1
        self.await_end(remnant)

    def orphaned(self, sock: Sock) -> None:
        """close(2) came in FIN_WAIT_2."""
        conn = sock.conn
        if (
            conn is not None
            and conn.state is State.FIN_WAIT_2
            and self.profile.parameters.small_sockets
        ):
            self.shrink(sock)

    def await_end(self, remnant: Remnant) -> None:
        """Have its time be up when it is."""
        clock = self.network.clock
        deadline = remnant.left.deadline
        if deadline == clock.now + self.profile.parameters.time_wait:
            # All wait equally long, so one entry of the clock serves the whole queue.
            self.waiting.append(remnant)
            if len(self.waiting) == 1:
                clock.at(deadline, Host.sweep, self)
        elif deadline < INF:
            clock.at(deadline, Remnant.over, remnant)

    def sweep(self) -> None:
        """End the TIME_WAITs whose time is up."""
        clock, waiting = self.network.clock, self.waiting
        span = self.profile.parameters.time_wait
        while waiting:
            due = waiting[0].since + span
            if due > clock.now:
                clock.at(due, Host.sweep, self)
                return
            waiting.popleft().over()

    def end(self, remnant: Remnant) -> None:
        """Nothing is left: the 4-tuple is free, and the port."""
        del self.tcp[remnant.key]
        self.ports.release(remnant)
        self.time_waits -= 1

    # Segments.

    def arrive(self, key: Key, segment: Segment) -> None:
        """A segment has come for one of this host's addresses."""
        if not self.up:
            return
        sock = self.tcp.get(key)
        if sock is not None:
            sock.arrive(segment)
            return
        listener = self.listener(key)
        if listener is None:
            self.refuse(key, segment)
            return
        flags = segment.flags
        if flags & RST:
            return
        if flags & ACK:
            self.refuse(key, segment)
            return
        if not flags & SYN or flags & FIN:
            return
        if len(listener.accepted) > listener.backlog:
            self.counters["ListenOverflows"] += 1
            self.counters["ListenDrops"] += 1
            return
        self._embryo(listener, key, segment)

    def _embryo(self, listener: Sock, key: Key, segment: Segment) -> None:
        """A SYN for a listener: a connection that is nobody's yet."""
        sock = Sock(self, listener.family)
        sock.address, sock.port, sock.remote, sock.remote_port = key
        sock.sport = sock.port
        sock.key = key
        sock.peer_key = (key[2], key[3], key[0], key[1])
        sock.parent = listener
        conn = sock.conn = self.connection(sock)
        now = self.network.clock.now
        report, conn.on_transition = conn.on_transition, None
        conn.open_passive(now)
        conn.on_transition = report
        self.tcp[key] = sock
        listener.embryos[sock] = None
        self.counters["PassiveOpens"] += 1
        old = conn.state
        conn.segment(segment, now)
        sock.after(old)

    def flush(self, peer_key: Key) -> None:
        """Send what a connection wants sent."""
        send = self.network.send
        for segment in self.out:
            if segment.flags & RST:
                self.counters["OutRsts"] += 1
            send(self, peer_key, segment)
        self.out.clear()

    def refuse(self, key: Key, segment: Segment) -> None:
        """Answer a segment that belongs to no connection with a reset (RFC 9293 §3.10.7.1)."""
        if segment.flags & RST:
            return
        if segment.flags & ACK:
            reset = Segment(seq=segment.ack, ack=0, flags=RST)
        else:
            reset = Segment(seq=0, ack=seq_add(segment.seq, segment.length), flags=RST | ACK)
        self.counters["OutRsts"] += 1
        self.network.send(self, (key[2], key[3], key[0], key[1]), reset)

    # States.

    def changed(self, sock: Sock, old: State, new: State) -> None:
        """Keep the tables in step with a connection that changed its state."""
        if sock.parent is not None and old is State.SYN_RECEIVED:
            listener = sock.parent
            listener.embryos.pop(sock, None)
            if new is State.CLOSED:
                self.forget(sock)
                return
            self._inherit(listener, sock)
            listener.accepted.append(sock)
            listener.notify()
        if new is State.ESTABLISHED:
            other = self.tcp.get(sock.peer_key) if sock.peer_key is not None else None
            if isinstance(other, Sock) and self.is_local(sock.remote):
                sock.peer, other.peer = other, sock
        if new is State.TIME_WAIT:
            self.shrink(sock)
        elif new is State.CLOSED:
            self.forget(sock)
        elif new is State.FIN_WAIT_2:
            assert sock.conn is not None
            if sock.conn.orphaned and sock.linger2 == -1:
                sock.conn.abort(self.network.clock.now)
                sock.after(new)
            elif sock.conn.orphaned:
                self.orphaned(sock)
        elif new is State.ESTABLISHED and old is State.SYN_RECEIVED and sock.shut & 2:
            # The socket, or its listener, was shut down beforehand (tcp_rcv_state_process).
            assert sock.conn is not None
            sock.conn.shutdown(self.network.clock.now)
            sock.after(new)

    def _inherit(self, listener: Sock, child: Sock) -> None:
        """What a connection has from its listener (`sk_clone`)."""
        child.v6only = listener.v6only
        child.reuse_address = listener.reuse_address
        child.reuse_port = listener.reuse_port
        child.uid = listener.uid
        child.linger = listener.linger
        child.linger2 = listener.linger2
        child.keepalive = listener.keepalive
        child.keep = listener.keep
        child.no_delay = listener.no_delay
        child.user_timeout = listener.user_timeout
        child.rcvbuf = listener.rcvbuf
        child.sndbuf = listener.sndbuf
        child.bound_address = listener.bound_address
        child.tell_options()
        if child.keepalive and child.conn is not None:
            child.conn.t_keepalive = self.network.clock.now + child.keep[0]
        child.sport = child.port
        child.shut = listener.shut
        if child.conn is not None and child.shut & 1:
            child.conn.read_shut = True
        self.ports.inherit(listener, child)

    def forget(self, sock: Sock) -> None:
        """A connection is over: its 4-tuple is free, and its port unless bind(2) chose it."""
        if sock.key is not None and self.tcp.get(sock.key) is sock:
            del self.tcp[sock.key]
        if not sock.bound_port or not sock.files:
            self.ports.release(sock)
            sock.port = 0

    # Views.

    def rows(self, port: int | None = None) -> list[Row]:
        """What `netstat -tan` shows on this host now: listeners first, oldest first."""
        now = self.network.clock.now
        rows = []
        for group in self.listeners.values():
            for sock in group:
                if port is None or sock.port == port:
                    local = (_shown(sock, sock.address), sock.port)
                    anyone = ("0.0.0.0" if sock.family == AF_INET else "::", 0)
                    rows.append(
                        Row(
                            local,
                            anyone,
                            State.LISTEN,
                            recv_q=len(sock.accepted),
                            send_q=sock.backlog,
                            inode=sock.fd,
                            uid=sock.uid,
                        )
                    )
        for key, owner in self.tcp.items():
            if port is None or port in (key[1], key[3]):
                if isinstance(owner, Remnant):
                    rows.append(_remnant_row(owner, now))
                else:
                    rows.append(_row(owner, key, now))
        return rows

    def moved(self, key: Key, old: State, new: State, cause: str | None) -> None:
        """Tell whoever watches of a transition that no connection reports itself."""
        if self.network.observers:
            self.network.emit(
                Transition(
                    t=self.network.clock.now,
                    local=key[:2],
                    remote=key[2:],
                    old=old,
                    new=new,
                    source="model",
                    cause=cause,
                )
            )

    def report(self, on: bool) -> None:
        """Have this host's connections report their transitions, or stop."""
        for key, owner in self.tcp.items():
            if isinstance(owner, Sock) and owner.conn is not None:
                owner.conn.on_transition = _reporter(self, key) if on else None

    # Bad days.

    def crash(self) -> None:
        """The host is gone: it sends nothing, and its programs are cancelled.

        What they still try with their sockets fails with ENETDOWN.
        """
        self.up = False
        for sock in self.sockets():
            sock.dead = True
            sock.clean = False
            sock.notify()
        self.tcp.clear()
        self.listeners.clear()
        for task in list(self.tasks):
            task.cancel(f"{self.name} crashed")

    def sockets(self) -> list[Sock]:
        """All sockets that programs on this host have open."""
        return [sock for sock in self.network.files.values() if sock.host is self]

    def reboot(self) -> None:
        """The host is back, and remembers nothing: old connections are answered with resets."""
        self.crash()
        self.up = True
        self._boot()


def _reporter(host: Host, key: Key) -> Hook:
    local, remote = key[:2], key[2:]

    def report(old: State, new: State, event: Event, now: float) -> None:
        host.network.emit(
            Transition(
                t=now,
                local=local,
                remote=remote,
                old=old,
                new=new,
                source="model",
                cause=event.name,
            )
        )

    return report


def _remnant_row(remnant: Remnant, now: float) -> Row:
    key, record = remnant.key, remnant.left
    return Row(
        (_shown(remnant, key[0]), key[1]),
        (_shown(remnant, key[2]), key[3]),
        record.state,
        timer="time_wait",
        seconds_left=max(0.0, record.deadline - now),
        inode=0,
        uid=remnant.uid,
    )


def _row(sock: Sock, key: Key, now: float) -> Row:
    conn = sock.conn
    assert conn is not None
    timer, left = None, None
    for running, when in conn.timers.items():
        if running in _TIMER_NAMES:
            timer, left = _TIMER_NAMES[running], max(0.0, when - now)
    return Row(
        (_shown(sock, key[0]), key[1]),
        (_shown(sock, key[2]), key[3]),
        conn.state,
        recv_q=conn.readable_bytes,
        timer=timer,
        seconds_left=left,
        inode=sock.fd if sock.fd >= 0 else 0,
        uid=sock.uid,
    )


def _listening(sock: Sock) -> Key:
    return (sock.address, sock.port, ANY4 if sock.family == AF_INET else ANY6, 0)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _shown(sock: Sock | Remnant, address: str) -> str:
    """An address as the socket's family spells it."""
    return f"::ffff:{address}" if sock.family == AF_INET6 and is_v4(address) else address


def _profile(given: str | Profile) -> Profile:
    return profile(given) if isinstance(given, str) else given

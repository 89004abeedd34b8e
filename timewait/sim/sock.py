"""A socket as its kernel knows it: Linux's `struct socket` and `struct sock` in one.

It outlives the file that named it: an orphan goes on closing when nobody can
see it any more. The protocol is `timewait.tcp.connection`'s; what is decided
here is what Linux decides between a system call and the protocol: which calls
a socket takes in which state, what they return, when it is ready, and which
error is told to whom.

Errors are raised as `OSError` with Linux's errno. A call that would have to
wait raises `BlockingIOError`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from functools import cache
from ipaddress import ip_address
from selectors import EVENT_READ, SelectorKey
from typing import TYPE_CHECKING, Final, NoReturn

from attrs import evolve

from timewait.sim.express import Volley, pass_text, read_all
from timewait.sim.network import Key
from timewait.sim.ports import ANY4, ANY6, is_v4
from timewait.tcp.actions import quick_ack, send_text
from timewait.tcp.connection import Connection, SocketOptions, TCPError
from timewait.tcp.profiles import RMEM_MAX, window_scale
from timewait.tcp.segment import ACK, RST, SYN, Segment
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.sim.host import Host

__all__ = ["AF_INET", "AF_INET6", "CONNECTED", "DOWN", "INF", "OVER", "Sock", "fail"]

AF_INET: Final = socket.AF_INET
AF_INET6: Final = socket.AF_INET6

# What the file, not the protocol, remembers (Linux's socket_state).
UNCONNECTED, CONNECTING, CONNECTED, DISCONNECTING = range(4)

DOWN, OVER = 1, 2  # why a socket is dead: its host went down, the simulation ended

INF: Final = float("inf")
_KEEP: Final = (7200.0, 75.0, 9)
_options: Final = cache(SocketOptions)  # most connections have the same
_NO_OPTIONS: Final = _options()
# Options that change nothing a model has but the header of its packets: default and range, as
# Linux 6.18 has them. Of a range 0 to 1 any number is one or the other.
_INT: Final = (0, -(1 << 31), (1 << 31) - 1)
_SWITCH: Final = (0, 0, 1)
REMEMBERED: Final = {
    (socket.SOL_SOCKET, socket.SO_BROADCAST): _SWITCH,
    (socket.SOL_SOCKET, socket.SO_OOBINLINE): _SWITCH,
    (socket.SOL_SOCKET, socket.SO_PRIORITY): _INT,
    (socket.SOL_SOCKET, socket.SO_MARK): _INT,
    (socket.SOL_SOCKET, 46): (0, 0, (1 << 31) - 1),  # SO_BUSY_POLL
    (socket.IPPROTO_IP, socket.IP_TOS): _INT,
    (socket.IPPROTO_IP, socket.IP_TTL): (64, 1, 255),
    (socket.IPPROTO_IP, 8): _SWITCH,  # IP_PKTINFO
    (socket.IPPROTO_IP, 10): (1, 0, 5),  # IP_MTU_DISCOVER
    (socket.IPPROTO_IP, 12): _SWITCH,  # IP_RECVTTL
    (socket.IPPROTO_IP, socket.IP_RECVTOS): _SWITCH,
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS): (64, 0, 255),
    (socket.IPPROTO_IPV6, 23): (1, 0, 5),  # IPV6_MTU_DISCOVER
    (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO): _SWITCH,
    (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS): _SWITCH,
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS): (0, 0, 255),
}
_CLASS: Final = ((socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, socket.IPV6_TCLASS))
_HEADER: Final = (
    (socket.IPPROTO_IP, socket.IP_TTL),
    (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS),
)
_LOOPBACK_BROADCAST: Final = "127.255.255.255"
_SOMAXCONN: Final = 4096
_LEAST_MSS: Final = 88  # TCP_MIN_MSS
_LOOPBACK_MSS: Final = 65483  # of lo's MTU
_WMEM_MAX: Final = 4194304
_POLLIN, _POLLOUT, _POLLERR, _POLLHUP, _POLLRDHUP = 0x1, 0x4, 0x8, 0x10, 0x2000
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
_PUSHING: Final = (  # what has waiting text sent: __tcp_sock_set_nodelay, __tcp_sock_set_cork
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, True),
    (socket.IPPROTO_TCP, socket.TCP_CORK, False),
)
_LEVELS: Final = (socket.SOL_SOCKET, socket.IPPROTO_TCP, socket.IPPROTO_IP)
_FIN_SENT: Final = (State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK)


def fail(number: int) -> NoReturn:
    """Raise the error the kernel would return."""
    raise OSError(number, os.strerror(number))


def _to_many(address: str) -> bool:
    """Whether it is an address for several that bind(2) takes (inet_addr_valid_or_nonlocal)."""
    return is_v4(address) and (address == "255.255.255.255" or ip_address(address).is_multicast)


def _multicast6(address: str) -> bool:
    return address.startswith("ff") and ":" in address


def _of_a_link(address: str) -> bool:
    """Whether it means nothing without a link (fe80::/10), and names none."""
    return not is_v4(address) and "%" not in address and ip_address(address).is_link_local


class Sock:
    """A socket as its kernel knows it."""

    __slots__ = (
        "_conn",
        "accepted",
        "address",
        "backlog",
        "bind_address_no_port",
        "bound_address",
        "bound_port",
        "clean",
        "clock",
        "connect_bound",
        "cork",
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
        "more",
        "network",
        "no_delay",
        "parent",
        "peer",
        "peer_key",
        "phase",
        "port",
        "rcvbuf",
        "remembered",
        "remote",
        "remote_port",
        "reuse_address",
        "reuse_port",
        "selector_key",
        "shut",
        "sndbuf",
        "soft_error",
        "sport",
        "syn_retries",
        "uid",
        "user_mss",
        "user_timeout",
        "v6only",
        "volley",
        "waker",
        "watch",
    )

    def __init__(self, host: Host, family: int) -> None:
        self.host = host
        self.network = host.network
        self.clock = host.network.clock
        self.clean = False  # nothing but `pass_text` has touched the connection since it last did
        self.dead = 0  # or DOWN, or OVER
        self.family = family
        self.address = ANY4 if family == AF_INET else ANY6
        self.port = 0
        self.sport = 0  # what getsockname() tells: it outlives the port
        self.remote = self.address
        self.remote_port = 0
        self.key: Key | None = None
        self.peer_key: Key | None = None
        self._conn: Connection | None = None
        self.volley: Volley | None = None
        self.phase = UNCONNECTED
        self.error = 0
        self.soft_error = 0  # what ICMP said: it may explain why nothing arrives
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
        self.cork = False
        self.more = False
        # Options that change nothing that a model has, by level and name.
        self.remembered: dict[tuple[int, int], int] = {}
        self.syn_retries = 0  # TCP_SYNCNT; 0: the host's own
        self.user_mss = 0
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
    def conn(self) -> Connection | None:
        """The protocol's part of it."""
        if self.volley is not None:
            self.end_volley()
        return self._conn

    @conn.setter
    def conn(self, conn: Connection | None) -> None:
        self._conn = conn

    def end_volley(self) -> None:
        """From here on everything goes by itself, until `pass_text` finds the next volley."""
        if self.volley is not None:
            assert self.peer is not None
            self.volley.settle()
            self.volley = self.peer.volley = None

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
        if self.family == AF_INET6 and (_of_a_link(address) or _multicast6(address)):
            fail(errno.EINVAL)
        if address not in (ANY4, ANY6) and not host.is_local(address) and not _to_many(address):
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
            if _of_a_link(address):
                fail(errno.EINVAL)
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
        if address == _LOOPBACK_BROADCAST:
            fail(errno.ENETUNREACH)
        source = self.address
        if source in (ANY4, ANY6) or _to_many(source):
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
                    host.reuse_moment(source, address),
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
        self.error = 0  # tcp_connect_init
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

    def send(self, data: bytes, more: bool = False) -> int:
        """send(2): bytes taken; EAGAIN if there is no room, EPIPE after the end.

        `more` is to follow (MSG_MORE): a segment that is not full waits for it.
        """
        if not more and self.peer is not None and self.pass_text(data):
            return len(data)
        conn = self.conn
        if conn is None:
            fail(self.take_error() or errno.EPIPE)
        old = conn.state
        if conn.error or self.error:
            fail(self.take_error())
        if self.shut & 2 and old is not State.SYN_SENT and old is not State.SYN_RECEIVED:
            fail(errno.EPIPE)
        if data and more is not self.more:
            self._hold(more)
        try:
            taken = conn.send(data, self.clock.now)
        except TCPError as error:
            number = error.args[0]
            raise OSError(number, os.strerror(number)) from None  # BrokenPipeError, by the errno
        finally:
            self.after(old)
        if self.network.queue:
            self.network.drain()
        if taken == 0 and (data or old in (State.SYN_SENT, State.SYN_RECEIVED)):
            fail(errno.EAGAIN)  # even with no text, it waits for the connection
        return taken

    def _hold(self, more: bool) -> None:
        """Have text that fills no segment wait, or not any more, as the last send(2) said."""
        assert self._conn is not None
        self.more = more
        self._conn.options = evolve(self._conn.options, cork=more or self.cork, more=more)

    def pass_text(self, data: bytes) -> bool:
        """Send all of `data` to the other end on this host the short way, if that may be."""
        peer = self.peer
        if peer is None:
            return False
        network = self.network
        if network.observers or network.faults:
            return False
        now = self.clock.now
        volley = self.volley
        if volley is not None and volley.now == now and volley.hit(self._conn, data):
            if peer.watch is not None:
                peer.watch[peer] = None
            return True
        conn, other = self.conn, peer.conn
        clean = self.clean and peer.clean
        if conn is None or other is None:
            return False
        if not clean and (self.error or self.shut or self.dead):
            return False
        if not pass_text(conn, other, data, now, clean):
            return False
        if clean:
            self.volley = peer.volley = Volley.begin(other, conn, now)
        self.clean = peer.clean = True
        if self.waker is None or conn.t_retransmit < self.waker:
            self._set_waker(conn.t_retransmit)
        if peer.waker is None or other.t_ack < peer.waker:
            peer._set_waker(other.t_ack)
        if peer.watch is not None:
            peer.watch[peer] = None
        return True

    def take(self, size: int) -> bytes | None:
        """All there is to read, at most `size` bytes, the short way; None where that may not be."""
        conn = self._conn
        if conn is None or self.dead or not 0 < len(conn._rx) <= size:
            return None
        if self.volley is None:
            return read_all(conn)
        data, conn._rx = conn._rx, b""
        key = self.selector_key
        if key is not None and key.events == EVENT_READ:
            assert self.watch is not None
            self.watch.pop(self, None)  # sure not to be readable any more
        return data

    def receive(self, size: int, peek: bool = False) -> bytes:
        """recv(2): b"" at the end; EAGAIN if nothing is there yet."""
        text = None if peek else self.take(size)
        if text is not None:
            return text
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
            old = conn.state
            data = conn.receive(size, self.clock.now, peek)
            self.after(old)
            if self.network.queue:
                self.network.drain()
            return data
        if conn.fin_received:
            return conn.receive(size, self.clock.now, peek)  # b"", whatever else went wrong since
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
                self.notify()
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
        """The last file is closed: `inet_release`, `tcp_close`; epoll forgets it."""
        if self.watch is not None:
            self.watch.pop(self, None)
        self.watch = self.selector_key = None
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

    def lingers(self) -> None:
        """Time passes in close(2) until the FIN is acknowledged, or SO_LINGER's time is over.

        Linux waits there in non-blocking mode too (`sk_stream_wait_close`).
        """
        conn = self.conn
        if not self.linger or self.dead or conn is None:
            return
        until = self.clock.now + self.linger
        while conn.state in _FIN_SENT and self.clock.run_until(until):
            pass

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
        self.conn = self.peer = None
        self.phase = UNCONNECTED
        if not self.bound_address:
            self.address = ANY4 if self.family == AF_INET else ANY6
        self.remote_port = 0
        self.shut = 0
        self.network.drain()

    def refused(self, number: int) -> None:
        """ICMP ends what is being opened (`tcp_done`): no segment tells the peer."""
        conn = self.conn
        assert conn is not None
        assert self.key is not None
        old = conn.state
        conn.become(State.CLOSED)
        conn.t_retransmit = conn.t_user = INF
        conn.write_shut = True
        conn.error = number
        self.host.moved(self.key, old, State.CLOSED, "UNREACHABLE")
        self.host.changed(self, old, State.CLOSED)
        self.notify()

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
            return self.roomy()
        return True

    def roomy(self) -> bool:
        """Whether a third of the send buffer is free (`sk_stream_is_writeable`)."""
        conn = self.conn
        assert conn is not None
        queued = len(conn._tx)
        return conn.snd_buf - queued >= queued >> 1

    # Options.

    def set_option(self, level: int, option: int, value: int) -> None:
        """setsockopt(2) with a number; ENOPROTOOPT for what is not modelled."""
        match level, option:
            case socket.IPPROTO_TCP, socket.TCP_NODELAY:  # first, since asyncio always sets it
                self.no_delay = bool(value)
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
                conn = self.conn
                if self.keepalive and conn and conn.state not in (State.CLOSED, State.SYN_SENT):
                    # tcp_sock_set_keepidle_locked; text that came the short way is heard too.
                    heard = max(conn.heard, conn._last_text)
                    conn.t_keepalive = max(self.clock.now, heard + value)
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
                self.rcvbuf = max(2304, 2 * min(value & 0xFFFFFFFF, RMEM_MAX))
            case socket.SOL_SOCKET, socket.SO_SNDBUF:
                self.sndbuf = max(4608, 2 * min(value & 0xFFFFFFFF, _WMEM_MAX))
            case socket.SOL_SOCKET, socket.SO_LINGER:
                fail(errno.EINVAL)  # a number is too short for a struct linger
            case socket.IPPROTO_TCP, socket.TCP_CORK:
                self.cork = bool(value)
            case socket.IPPROTO_TCP, socket.TCP_MAXSEG:
                if value and not _LEAST_MSS <= value <= 32767:
                    fail(errno.EINVAL)
                self.user_mss = value
            case socket.IPPROTO_TCP, socket.TCP_SYNCNT:
                if not 1 <= value <= 127:
                    fail(errno.EINVAL)
                self.syn_retries = value
            case socket.IPPROTO_TCP, socket.TCP_QUICKACK if self.conn is not None:
                quick_ack(self.conn, value, self.clock.now)
            case socket.IPPROTO_TCP, socket.TCP_QUICKACK if value:
                pass  # so every connection begins
            case socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT if value <= 0:
                pass  # so every listener begins
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
            case _ if (level, option) in REMEMBERED:
                self.remember(level, option, value)
            case _:
                fail(errno.ENOPROTOOPT)
        if self.conn is not None:
            self.tell_options()
            if self.conn._tx and (level, option, bool(value)) in _PUSHING:
                options = self.conn.options
                self.conn.options = evolve(options, cork=False)
                send_text(self.conn, None, self.clock.now)
                self.conn.options = options
                self.after(self.conn.state)
                self.network.drain()

    def remember(self, level: int, option: int, value: int) -> None:
        """Keep an option that only getsockopt(2) and the packets' headers tell of."""
        if level == socket.IPPROTO_IPV6 and self.family != AF_INET6:
            fail(errno.ENOPROTOOPT)
        default, least, most = REMEMBERED[level, option]
        if (least, most) == (0, 1):
            value = int(bool(value))
        elif value == -1 and (level, option) in _HEADER:
            value = default
        elif not least <= value <= most and (level, option) != (0, socket.IP_TOS):
            fail(errno.EINVAL)
        if (level, option) in _CLASS:
            value &= 0xFC  # the other two bits are ECN's
        self.remembered = {**self.remembered, (level, option): value}

    def header(self) -> tuple[int, int]:
        """Traffic class and hop limit of the packets: as setsockopt(2) gave, else 0 and 64."""
        six = not is_v4(self.remote)
        kinds = (_CLASS[1], _HEADER[1]) if six else (_CLASS[0], _HEADER[0])
        tos, ttl = (self.remembered.get(kind) for kind in kinds)
        return tos or 0, 64 if ttl is None else ttl

    def size_buffers(self) -> None:
        """Have the connection's buffers as large as was set; half is for Linux's own overhead."""
        conn = self.conn
        assert conn is not None
        if self.rcvbuf is not None:
            size = self.rcvbuf // 2
            if not size - conn.adv_mss < conn.rcv_buf <= size:  # else it is rounded already
                conn.exact_window |= size < conn.rcv_buf
                conn.rcv_buf = size
            linux = conn.profile.parameters.linux_checks
            if linux and conn.state is State.CLOSED and conn.offers_scale is not None:
                conn.offers_scale = min(conn.offers_scale, window_scale(size))
        if self.sndbuf is not None:
            conn.snd_buf = self.sndbuf // 2

    def tell_options(self) -> None:
        """Have the connection know what the user wants of it."""
        conn = self.conn
        assert conn is not None
        self.size_buffers()
        if (
            self.keepalive
            or self.no_delay
            or self.cork
            or self.more
            or self.user_timeout
            or self.linger2 is not None
            or self.syn_retries
        ):
            conn.options = _options(
                self.no_delay,
                self.cork or self.more,
                self.user_timeout / 1000 or None,
                None if self.linger2 is None else float(self.linger2),
                self.keep if self.keepalive else None,
                self.more,
                self.syn_retries or None,
            )
        else:
            conn.options = _NO_OPTIONS
        self.after(conn.state)

    def get_option(self, level: int, option: int) -> int:
        """getsockopt(2) of a number; ENOPROTOOPT for what is not modelled."""
        match level, option:
            case socket.SOL_SOCKET, socket.SO_ERROR:
                number = self.take_error() or self.soft_error
                self.soft_error = 0
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
                return self.rcvbuf or 2 * self.host.rcv_buf
            case socket.SOL_SOCKET, socket.SO_SNDBUF:
                return self.sndbuf or self._default_sndbuf()
            case socket.IPPROTO_TCP, socket.TCP_NODELAY:
                return int(self.no_delay)
            case socket.IPPROTO_TCP, socket.TCP_CORK:
                return int(self.cork)
            case socket.IPPROTO_TCP, socket.TCP_KEEPIDLE:
                return int(self.keep[0])
            case socket.IPPROTO_TCP, socket.TCP_KEEPINTVL:
                return int(self.keep[1])
            case socket.IPPROTO_TCP, socket.TCP_KEEPCNT:
                return self.keep[2]
            case socket.IPPROTO_TCP, socket.TCP_MAXSEG:
                conn = self.conn
                if conn is None or self.listening:
                    return self.user_mss or 536
                return conn.mss - 12 * conn.timestamps
            case socket.IPPROTO_TCP, socket.TCP_SYNCNT:
                return self.syn_retries or self.host.profile.parameters.syn_retries
            case socket.IPPROTO_TCP, socket.TCP_QUICKACK:
                return int(self.conn is None or not self.conn._pingpong)
            case socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT:
                return 0
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
        if (level, option) in REMEMBERED and (
            level != socket.IPPROTO_IPV6 or self.family == AF_INET6
        ):
            return self.remembered.get((level, option), REMEMBERED[level, option][0])
        # ip_getsockopt's answer to another level, unlike ip_setsockopt's.
        if self.family == AF_INET and level not in _LEVELS:
            fail(errno.EOPNOTSUPP)
        fail(errno.ENOPROTOOPT)

    def _default_sndbuf(self) -> int:
        """What SO_SNDBUF tells unless it was set (`tcp_sndbuf_expand`): room for 20 segments."""
        conn = self.conn
        if conn is None or conn.state in (State.CLOSED, State.SYN_SENT, State.LISTEN):
            return 16384
        mss = _LOOPBACK_MSS if self.host.is_local(self.remote) else conn.adv_mss
        segment = mss + 640  # MAX_TCP_HEADER and struct skb_shared_info
        return min(20 * ((1 << (segment - 1).bit_length()) + 256), _WMEM_MAX)

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
            if shut & 2 or conn is None or state is State.CLOSED or self.roomy():
                mask |= _POLLOUT
        if self.error or (conn is not None and conn.error):
            mask |= _POLLERR
        return mask

    def notify(self) -> None:
        """Have the selector look at this socket, if it is ready for what it is watched for.

        Those wait in the order in which they became so (`ep_poll_callback`).
        """
        if self.watch is not None and self.ready():
            self.watch[self] = None

    def ready(self) -> int:
        """What of it a selector would report: EVENT_READ, EVENT_WRITE, both or nothing."""
        key = self.selector_key
        if key is None:
            return 0
        mask = 1 if key.events & 1 and self.readable() else 0
        return mask | 2 if key.events & 2 and self.writable() else mask

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
        if self.soft_error and conn.error == errno.ETIMEDOUT:
            conn.error = self.soft_error  # tcp_write_err
        self.after(old)
        if old is State.FIN_WAIT_2 and conn.orphaned:
            self.host.orphaned(self)
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
        if self.more and not (
            segment.data
            and segment.ack == conn.snd_una
            and segment.window << conn.snd_scale == conn.snd_wnd
        ):
            self._hold(False)  # tcp_data_snd_check, which header prediction leaves out
        conn.segment(segment, self.clock.now)
        self.after(old)
        self.notify()

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

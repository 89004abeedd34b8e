"""The kernel's table of TCP sockets, asked over netlink (sock_diag(7)).

This is what `netstat` and `ss` show, with what they leave out: timers in
milliseconds, TIME_WAIT and orphans included, all without root. The kernel
filters (by state, and by port with a small program it runs for each socket),
so that one watched port costs nothing for the host's other sockets, and one
known connection is looked up directly.

A table is not a snapshot: the kernel hands it over in pieces while sockets
change. A socket that moves between pieces can be missed or come twice (the
second is dropped here).
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import sys
import time
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from itertools import accumulate
from operator import index
from types import TracebackType
from typing import Any, Final, Self, SupportsIndex, TypeVar

from attrs import define

from timewait.events import Address, Row
from timewait.kernel import bpf
from timewait.kernel.namespace import sysctl
from timewait.tcp.states import State

__all__ = [
    "Destroyed",
    "Details",
    "SockDiag",
    "address_text",
    "details",
    "ends_in",
    "fin_timeout",
    "host_text",
    "lookup",
    "port_number",
    "second_time",
    "sockets",
]

# include/uapi/linux/netlink.h, sock_diag.h, inet_diag.h
_NETLINK_SOCK_DIAG: Final = 4
_TCPDIAG_GETSOCK: Final = 18
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x01
_NLM_F_MULTI: Final = 0x02
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_DUMP: Final = 0x300
_REQ_BYTECODE: Final = 1
_BC_JMP: Final = 1
_BC_S_EQ: Final = 11
_BC_D_EQ: Final = 12
_DESTROY_GROUPS: Final = 1 << 0 | 1 << 2  # SKNLGRP_INET_TCP_DESTROY and _INET6_TCP_DESTROY
_SO_COOKIE: Final = 57
_LATE: Final = 1.0  # seconds, far more than a notice takes
_NO_COOKIE: Final = b"\xff" * 8
_TIME_WAIT, _TIME_WAIT_TIMER = 6, 3
_HOSTS_KEPT: Final = 1 << 16
_TRIES: Final = 8
_MAPPED: Final = bytes(10) + b"\xff\xff"

# nlmsghdr (length, type, flags, seq, pid), then inet_diag_msg: family, state, timer,
# retransmits, ports, addresses, interface, cookie, expires, queues, uid, inode.
_MESSAGE: Final = struct.Struct("=IHHI4xBBBBHH16s16s4xQIIIII")
_FAMILY, _COOKIE = 4, 12
_INTERFACE: Final = 56
_INT: Final = struct.Struct("=i")
_UINT: Final = struct.Struct("=I")
_BOTH_FAMILIES: Final = struct.Struct("=xxxB48xI4x")  # inet_diag_req
_BY_FAMILY: Final = struct.Struct("=BBBxIHH16s16sI8s")  # inet_diag_req_v2
_HEAD: Final = struct.Struct("=IHHI4xBBBB")
_HEADER: Final = struct.Struct("=IHHI4x")
_ATTRIBUTE: Final = struct.Struct("=HH")
_TIMERS: Final = (None, "retransmit", "keepalive", "time_wait", "probe")

# RFC state -> the bits of inet_diag's state mask. SYN_RECEIVED is also the embryonic
# NEW_SYN_RECV; CLOSED is BOUND_INACTIVE: bound, neither listening nor connected (Linux 6.8).
_STATE_BITS: Final[dict[State, int]] = {
    State.ESTABLISHED: 1 << 1,
    State.SYN_SENT: 1 << 2,
    State.SYN_RECEIVED: 1 << 3 | 1 << 12,
    State.FIN_WAIT_1: 1 << 4,
    State.FIN_WAIT_2: 1 << 5,
    State.TIME_WAIT: 1 << 6,
    State.CLOSED: 1 << 13,
    State.CLOSE_WAIT: 1 << 8,
    State.LAST_ACK: 1 << 9,
    State.LISTEN: 1 << 10,
    State.CLOSING: 1 << 11,
}
_CONNECTED: Final = sum(bits for state, bits in _STATE_BITS.items() if state is not State.CLOSED)
_STATES: Final = tuple(State.from_linux(n) if n else State.CLOSED for n in range(14))

T = TypeVar("T")

# include/uapi/linux/inet_diag.h, the attributes worth having, and tcp_info's fields
# (include/uapi/linux/tcp.h), of which a kernel tells those that it has, from the first on.
_EXT_INFO: Final = 1 << 1
_ATTR_INFO: Final = 2
_ATTR_SHUTDOWN: Final = 8
_ATTR_SKV6ONLY: Final = 11
_TCP_INFO_LAYOUT: Final = "B" * 8 + "I" * 24 + "Q" * 4 + "I" * 6 + "Q" * 4 + "IIQQ" + "I" * 6
_TCP_INFO: Final = struct.Struct("=" + _TCP_INFO_LAYOUT)
_TCP_INFO_FIELDS: Final = (
    *("state", "ca_state", "retransmits", "probes", "backoff", "options", "wscale", "flags"),
    *("rto", "ato", "snd_mss", "rcv_mss", "unacked", "sacked", "lost", "retrans", "fackets"),
    *("last_data_sent", "last_ack_sent", "last_data_recv", "last_ack_recv"),
    *("pmtu", "rcv_ssthresh", "rtt", "rttvar", "snd_ssthresh", "snd_cwnd", "advmss"),
    *("reordering", "rcv_rtt", "rcv_space", "total_retrans"),
    *("pacing_rate", "max_pacing_rate", "bytes_acked", "bytes_received"),
    *("segs_out", "segs_in", "notsent_bytes", "min_rtt", "data_segs_in", "data_segs_out"),
    *("delivery_rate", "busy_time", "rwnd_limited", "sndbuf_limited"),
    *("delivered", "delivered_ce", "bytes_sent", "bytes_retrans"),
    *("dsack_dups", "reord_seen", "rcv_ooopack", "snd_wnd", "rcv_wnd", "rehash"),
)
_TCP_INFO_ENDS: Final = tuple(accumulate(map(struct.calcsize, _TCP_INFO_LAYOUT)))


@define
class Details:
    """One socket and all the kernel tells about it. Treat it as immutable, as `Row`.

    `cookie` names the socket as long as it lives, through TIME_WAIT too;
    `family` is `socket.AF_INET` or `AF_INET6` (an IPv6 socket may carry IPv4
    addresses); `v6only` is told of IPv6 sockets that listen or are only bound,
    None otherwise; `shutdown` has bit 1 set for receiving and 2 for sending,
    and is 0 for TIME_WAIT. `interface` is the index of the one it is bound to
    (SO_BINDTODEVICE, or a link-local address's), 0 for none. `info` is
    TCP_INFO by the kernel's names without the `tcpi_` prefix, in the kernel's
    units, the fields that this kernel has; None unless asked for, or where the
    socket has none.
    """

    row: Row
    family: int
    cookie: int
    v6only: bool | None = None
    shutdown: int = 0
    info: dict[str, int] | None = None
    interface: int = 0

    @property
    def connected(self) -> bool | None:
        """Whether this end called connect(): False if accept() gave it, None where not told.

        The kernel does not say, but counts: a SYN that was acknowledged is in
        `bytes_acked` as one byte (tcp_rcv_synsent_state_process: tcp_ack), and
        not in `bytes_sent`; the SYN of an accepted connection is in neither.
        Needs `info`, of Linux 4.19 or newer.
        """
        info = self.info
        sent_fin = {State.ESTABLISHED: 0, State.CLOSE_WAIT: 0, State.FIN_WAIT_2: 1}
        if info is None or "bytes_retrans" not in info or self.row.state not in sent_fin:
            return None
        taken = info["bytes_acked"] + self.row.send_q - info["notsent_bytes"]
        syn = taken - (info["bytes_sent"] - info["bytes_retrans"]) - sent_fin[self.row.state]
        return {0: False, 1: True}.get(syn)


def ends_in(row: Row) -> float | None:
    """Seconds until a timer ends a socket that nobody owns, None where none does.

    An orphan's FIN_WAIT_2 may be timed twice (`second_time`); both are counted.
    """
    if row.timer == "time_wait" or row.seconds_left is None:
        return row.seconds_left
    if row.timer == "keepalive" and row.state is State.FIN_WAIT_2 and row.inode == 0:
        return row.seconds_left + second_time(row.seconds_left)
    return None


def second_time(first: float) -> float:
    """For how many seconds an orphan's FIN_WAIT_2 is timed again, that is timed for `first` yet.

    What net.ipv4.tcp_fin_timeout has above 60 s a whole socket is timed for, and that long again
    a small one (tcp_rcv_state_process, tcp_keepalive_timer; measured: 4 s of 62, 20 s of 70). The
    socket's own TCP_LINGER2 counts instead, and is not shown. Where the setting cannot be what it
    is timed by, the most that TCP_LINGER2 gives is told (TCP_FIN_TIMEOUT_MAX, 120 s).
    """
    above = fin_timeout() - 60
    return above if first <= above else 60.0


def fin_timeout() -> float:
    """net.ipv4.tcp_fin_timeout in seconds; what it is by default where it cannot be read."""
    try:
        return float(sysctl("net.ipv4.tcp_fin_timeout"))
    except OSError:  # (ProcSubset=pid of a systemd unit)
        return 60.0


def sockets(
    port: int | None = None,
    *,
    states: Iterable[State] | None = None,
    family: int | None = None,
) -> list[Row]:
    """All TCP sockets of this network namespace, or those with `port` at either end.

    `states` limits them; without it, all but bound sockets that neither
    listen nor connect, which are asked for as `State.CLOSED` (Linux 6.8 or
    newer shows them). `family` is `socket.AF_INET` or `AF_INET6`; IPv4
    connections of IPv6 sockets are AF_INET6 and show their IPv4 addresses.

    Needs no privilege. Raises `OSError` where the kernel has no sock_diag,
    `ValueError` for no port number.
    """
    with SockDiag() as diag:
        return diag.sockets(port, states=states, family=family)


def details(
    port: int | None = None,
    *,
    states: Iterable[State] | None = None,
    family: int | None = None,
    info: bool = False,
) -> list[Details]:
    """As `sockets`, with each socket's cookie, family and, if asked for, TCP_INFO."""
    with SockDiag() as diag:
        return diag.details(port, states=states, family=family, info=info)


def lookup(local: Address, remote: Address) -> Row | None:
    """The one socket of this connection, found without a walk; None where there is none.

    Raises `ValueError` for an address that is not numeric.
    """
    with SockDiag() as diag:
        return diag.lookup(local, remote)


class SockDiag:
    """A netlink socket kept open for one who asks often: the functions above as methods.

    It asks about the network namespace it was made in, whatever thread uses
    it later. Not for two threads at once.
    """

    def __init__(self) -> None:
        try:
            # (Not socket.socket, which a suite may forbid its tests.)
            self._socket = socket.SocketType(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
            )
        except AttributeError:
            raise OSError(errno.EAFNOSUPPORT, "sock_diag is Linux only") from None
        self._seq = 0
        self._done, self._interrupted = True, False
        # The kernel fills at most 32 KiB a message, and only where the reader showed it
        # would take as much.
        self._buffer = bytearray(1 << 16)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the netlink socket."""
        self._socket.close()

    def sockets(
        self,
        port: int | None = None,
        *,
        states: Iterable[State] | None = None,
        family: int | None = None,
    ) -> list[Row]:
        """See `timewait.kernel.sock_diag.sockets`."""
        return list(self._dump(self._rows, port, states, family).values())

    def table(self, port: int | None = None) -> dict[int, Row]:
        """As `sockets`, by cookie: the number that a socket has for life, TIME_WAIT included."""
        return self._dump(self._rows, port, None, None)

    def details(
        self,
        port: int | None = None,
        *,
        states: Iterable[State] | None = None,
        family: int | None = None,
        info: bool = False,
    ) -> list[Details]:
        """See `timewait.kernel.sock_diag.details`."""
        extensions = _EXT_INFO if info else 0
        return list(self._dump(self._details, port, states, family, extensions).values())

    def lookup(self, local: Address, remote: Address) -> Row | None:
        """See `timewait.kernel.sock_diag.lookup`."""
        family = socket.AF_INET6 if ":" in local[0] else socket.AF_INET
        request = _BY_FAMILY.pack(
            family,
            socket.IPPROTO_TCP,
            0,
            0xFFFFFFFF,
            socket.htons(local[1]),
            socket.htons(remote[1]),
            socket.inet_pton(family, local[0]).ljust(16, b"\0"),
            socket.inet_pton(family, remote[0]).ljust(16, b"\0"),
            0,
            _NO_COOKIE,
        )
        self._send(_SOCK_DIAG_BY_FAMILY, 0, request)
        try:
            rows = self._rows(dump=False)
        except FileNotFoundError:
            return None
        # Without a connection the kernel answers with the listener that would take it.
        return next((row for row in rows.values() if row.remote[1] == remote[1]), None)

    def _dump(
        self,
        parse: Callable[[], dict[int, T]],
        port: int | None,
        states: Iterable[State] | None,
        family: int | None,
        extensions: int = 0,
    ) -> dict[int, T]:
        mask = _CONNECTED
        if states is not None:
            mask = 0
            for state in states:
                mask |= _STATE_BITS[state]
        # The request's first form walks the table once for both families (the walk is most of a
        # small query's time), its second form for one.
        if family is None:
            kind = _TCPDIAG_GETSOCK
            request = _BOTH_FAMILIES.pack(extensions, mask)
        else:
            kind = _SOCK_DIAG_BY_FAMILY
            request = _BY_FAMILY.pack(
                family, socket.IPPROTO_TCP, extensions, mask, 0, 0, b"", b"", 0, b""
            )
        if port is not None:
            program = _port_program(port_number(port))
            request += _ATTRIBUTE.pack(4 + len(program), _REQ_BYTECODE) + program
        for _ in range(_TRIES):
            self._send(kind, _NLM_F_DUMP, request)
            try:
                return parse()
            except InterruptedError:
                continue
        raise OSError(errno.EAGAIN, f"the socket table changed during each of {_TRIES} dumps")

    def _send(self, kind: int, flags: int, request: bytes) -> None:
        if not self._done:
            # An earlier reader gave up midway (Ctrl-C): the kernel takes no new request
            # before it has told the rest.
            for size in self._received(dump=True):
                for _ in self._messages(size):
                    pass
        self._seq += 1
        header = _HEADER.pack(16 + len(request), kind, _NLM_F_REQUEST | flags, self._seq)
        self._socket.sendto(header + request, (0, 0))

    def _received(self, *, dump: bool) -> Iterator[int]:
        """The sizes of the buffers that make up an answer, as each is received."""
        self._done = self._interrupted = False
        while not self._done:
            size, _, flags, sender = self._socket.recvmsg_into([self._buffer])
            if sender[0] != 0:
                continue  # any process may send to a netlink socket; the kernel is pid 0
            if flags & socket.MSG_TRUNC:
                raise OSError(errno.EMSGSIZE, "sock_diag's answer was truncated")
            yield size
            if not dump:
                self._done = True
        if self._interrupted:
            raise InterruptedError(errno.EINTR, "sock_diag: inconsistent dump")

    def _messages(self, size: int) -> Iterator[tuple[int, int]]:
        """Where each socket's message begins and ends in a buffer of `size` bytes.

        Raises `OSError` with the kernel's errno or, for a buffer that makes
        no sense, EBADMSG.
        """
        buffer = self._buffer
        offset = 0
        while offset < size:
            if offset + 16 > size:
                raise OSError(errno.EBADMSG, "sock_diag's answer ends within a header")
            length, kind, flags, seq = _HEADER.unpack_from(buffer, offset)
            end = offset + length
            if length < 16 or end > size:
                raise OSError(errno.EBADMSG, "sock_diag's answer has a wrong length")
            if seq != self._seq:
                return  # not an answer to what was asked last
            self._interrupted = self._interrupted or bool(flags & _NLM_F_DUMP_INTR)
            if kind in (_NLMSG_ERROR, _NLMSG_DONE):
                self._done = True
                code = -_INT.unpack_from(buffer, offset + 16)[0] if length >= 20 else 0
                if code > 0:
                    raise OSError(code, f"sock_diag: {os.strerror(code)}")
                return
            if length < _MESSAGE.size:
                raise OSError(errno.EBADMSG, "sock_diag's answer has a short message")
            yield offset, end
            offset += length + 3 & ~3

    def _rows(self, *, dump: bool = True) -> dict[int, Row]:
        """The answer as rows by cookie, so that a socket seen twice is one."""
        rows: dict[int, Row] = {}
        for size in self._received(dump=dump):
            if self._all_time_wait(size):
                self._add_time_waits(size, rows)
            else:
                for at, _ in self._messages(size):
                    message = _MESSAGE.unpack_from(self._buffer, at)
                    rows[message[_COOKIE]] = _row(message)
        return rows

    def _all_time_wait(self, size: int) -> bool:
        """Whether a buffer holds TIME_WAIT of one family and nothing else.

        They come in masses, as messages that are alike but for addresses and
        time, and are read at a stride: three times as fast as one by one.
        """
        buffer = self._buffer
        stride, kind, flags, seq, _, state, timer, _ = _HEAD.unpack_from(buffer)
        return (
            state == _TIME_WAIT
            and timer == _TIME_WAIT_TIMER
            and (flags, seq) == (_NLM_F_MULTI, self._seq)
            and kind not in (_NLMSG_ERROR, _NLMSG_DONE)
            and stride >= _MESSAGE.size
            and stride % 4 == size % stride == 0
            # Byte i of every head at once: a slice with a stride is one loop in C.
            and all(
                buffer[i:size:stride].count(buffer[i]) == size // stride for i in range(_HEAD.size)
            )
        )

    def _add_time_waits(self, size: int, rows: dict[int, Row]) -> None:
        stride, _, _, _, family, _, _, _ = _HEAD.unpack_from(self._buffer)
        host, ntohs, time_wait = _HOSTS, socket.ntohs, State.TIME_WAIT
        for sport, dport, source, target, cookie, expires in _time_waits(
            stride, family
        ).iter_unpack(memoryview(self._buffer)[:size]):
            local, remote = (host[source], ntohs(sport)), (host[target], ntohs(dport))
            rows[cookie] = Row(
                local, remote, time_wait, 0, 0, "time_wait", expires / 1000, 0, 0, None
            )

    def _details(self) -> dict[int, Details]:
        buffer = self._buffer
        found = {}
        for size in self._received(dump=True):
            for offset, end in self._messages(size):
                message = _MESSAGE.unpack_from(buffer, offset)
                attributes = dict(_attributes(buffer, offset + _MESSAGE.size, end))
                v6only = attributes.get(_ATTR_SKV6ONLY)
                shutdown = attributes.get(_ATTR_SHUTDOWN)
                found[message[_COOKIE]] = Details(
                    row=_row(message),
                    family=message[_FAMILY],
                    cookie=message[_COOKIE],
                    v6only=None if v6only is None else v6only != b"\0",
                    shutdown=shutdown[0] if shutdown else 0,
                    info=_tcp_info(attributes.get(_ATTR_INFO)),
                    interface=_UINT.unpack_from(buffer, offset + _INTERFACE)[0],
                )
        return found


@cache
def _time_waits(stride: int, family: int) -> struct.Struct:
    """What differs between TIME_WAIT messages: ports, addresses, cookie, time left."""
    hosts = "4s12x4s12x" if family == socket.AF_INET else "16s16s"
    return struct.Struct(f"=20xHH{hosts}4xQI{stride - 72}x")


class _Hosts(dict[bytes, str]):
    """Addresses as text, each converted once; all forgotten where they are too many."""

    def __missing__(self, key: bytes) -> str:
        if len(self) >= _HOSTS_KEPT:
            self.clear()
        address = key.removeprefix(_MAPPED)
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        text = socket.inet_ntop(family, address)
        self[key] = text
        return text


_HOSTS: Final = _Hosts()


def host_text(address: bytes) -> str:
    """An address of 4 or 16 bytes as text; an IPv4 address mapped into IPv6 as itself."""
    return _HOSTS[address]


class Destroyed:
    """Notices of sockets as they are destroyed, from now on: those with `port`, or all.

    A connection that came and went between two looks at the table is known
    from these. TIME_WAIT gives none, neither when it begins nor when it ends.
    Needs no privilege. `lost` is how many the kernel has dropped because
    nobody read them in time.
    """

    def __init__(self, port: int | None = None) -> None:
        self.lost = 0
        self._socket = socket.SocketType(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )
        try:
            if port is not None:
                bpf.attach(
                    self._socket,
                    bpf.assemble(
                        [
                            (bpf.LOAD_HALF, 20),  # the source port, and then the destination's
                            (bpf.JUMP_EQUAL, port, "take", ""),
                            (bpf.LOAD_HALF, 22),
                            (bpf.JUMP_EQUAL, port, "take", ""),
                            (bpf.RETURN, 0),
                            "take",
                            (bpf.RETURN, 0xFFFFFFFF),
                        ]
                    ),
                )
            self._socket.setblocking(False)
            self._socket.bind((0, _DESTROY_GROUPS))
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hear no more."""
        self._socket.close()

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._socket.fileno()

    def read(self) -> dict[int, Row]:
        """The sockets destroyed since the last call, by cookie; their state is CLOSED."""
        rows: dict[int, Row] = {}
        while True:
            try:
                data, sender = self._socket.recvfrom(1 << 16)
            except BlockingIOError:
                return rows
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost = max(self._dropped(), self.lost + 1)
                continue
            if sender[0] == 0 and len(data) >= _MESSAGE.size:
                message = _MESSAGE.unpack_from(data)
                rows[message[_COOKIE]] = _row(message)

    def all_so_far(self) -> dict[int, Row]:
        """As `read`, and of all sockets that were destroyed before this call.

        The kernel sends notices a little later, from a work queue of each processor's: those
        of before have come when that of a socket has which is destroyed there now. The thread
        is to be in the network namespace that this began in.
        """
        own: set[int] = set()
        rows, lost = self.read(), self.lost
        processors = os.sched_getaffinity(0)
        try:
            for each in processors:
                with suppress(OSError):  # it has been taken away
                    os.sched_setaffinity(0, {each})
                # (The class below socket.socket, which nobody watches.)
                last = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM)
                cookie = last.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
                own.add(int.from_bytes(cookie, sys.byteorder))
                last.close()
        finally:
            os.sched_setaffinity(0, processors)
        late = time.monotonic() + _LATE
        while not own <= rows.keys() and self.lost == lost and time.monotonic() < late:
            select.select([self], [], [], _LATE)
            rows |= self.read()
        return {cookie: row for cookie, row in rows.items() if cookie not in own}

    def _dropped(self) -> int:
        """As the kernel counts it: the last but one of a netlink socket's columns in /proc."""
        inode = str(os.fstat(self._socket.fileno()).st_ino)
        with open("/proc/thread-self/net/netlink") as table:
            return next((int(row[8]) for row in map(str.split, table) if row[9] == inode), 0)


def address_text(address: Address) -> str:
    """An address as people write it: `"127.0.0.1:9090"`, `"[::1]:9090"`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def port_number(port: SupportsIndex) -> int:
    """A port as a plain number, from 0 to 65535; raises `ValueError` for anything else."""
    try:
        number = index(port)
    except TypeError:
        number = -1
    if not 0 <= number <= 65535:
        raise ValueError(f"not a port: {port!r}")
    return number


def _row(message: tuple[Any, ...]) -> Row:
    # fmt: off
    (_, _, _, _, family, state, timer, retransmits, sport, dport, src, dst,
     _, expires, recv_q, send_q, uid, inode) = message
    # fmt: on
    if family == socket.AF_INET:
        src, dst = src[:4], dst[:4]
    if state >= len(_STATES) or timer >= len(_TIMERS):
        raise OSError(errno.EBADMSG, f"sock_diag tells of an unknown state ({state}, {timer})")
    return Row(
        (_HOSTS[src], socket.ntohs(sport)),
        (_HOSTS[dst], socket.ntohs(dport)),
        _STATES[state],
        recv_q,
        send_q,
        _TIMERS[timer],
        expires / 1000 if timer else None,
        retransmits,
        inode,
        None if timer == _TIME_WAIT_TIMER else uid,  # a TIME_WAIT socket no longer knows
    )


def _attributes(buffer: bytearray, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, offset)
        if length < 4 or offset + length > end:
            raise OSError(errno.EBADMSG, "sock_diag's answer has a wrong attribute length")
        yield kind, bytes(buffer[offset + 4 : offset + length])
        offset += length + 3 & ~3


def _tcp_info(data: bytes | None) -> dict[str, int] | None:
    if data is None:
        return None
    # An older kernel's structure is shorter, a newer one's longer: what is there is used.
    values = _TCP_INFO.unpack(data[: _TCP_INFO.size].ljust(_TCP_INFO.size, b"\0"))
    there = bisect(_TCP_INFO_ENDS, len(data))
    return dict(zip(_TCP_INFO_FIELDS[:there], values[:there], strict=True))


def _port_program(port: int) -> bytes:
    """The kernel's filter for "the port is at either end" (inet_diag_bc_op, inet_diag.c).

    Each operation says how far to go on for yes and for no; ending exactly at
    the program's end accepts, four beyond it rejects.
    """
    operation = struct.Struct("=BBH").pack
    return b"".join(
        (
            operation(_BC_S_EQ, 8, 12),
            operation(0, 0, port),
            operation(_BC_JMP, 4, 12),
            operation(_BC_D_EQ, 8, 12),
            operation(0, 0, port),
        )
    )

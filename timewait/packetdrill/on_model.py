"""Scripts on the model: a modelled host in virtual time, the script at the far end of its link."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final

from attrs import define, field

from timewait.events import Row
from timewait.packetdrill.calls import CONSTANTS, Calls, Interests, Result, Stream
from timewait.packetdrill.frames import Frame
from timewait.packetdrill.runner import Pending
from timewait.packetdrill.script import Option, Unsupported
from timewait.packetdrill.settings import Settings
from timewait.sim.host import HERE, Host, Remnant
from timewait.sim.network import Key, Link, Network
from timewait.sim.sock import Sock
from timewait.sim.socket import SimSocket
from timewait.tcp import congestion
from timewait.tcp.profiles import RMEM_MAX, profile, window_scale
from timewait.tcp.segment import ACK, CWR, ECE, FIN, HALF, MASK, RST, SYN, URG, Options, Segment
from timewait.tcp.states import State
from timewait.tcp.time_wait import TimeWait

__all__ = ["ModelSocket", "ModelStack", "from_options", "to_options"]

# Settings of congestion control after a loss, offload and memory, of which the model has none: a
# script that depends on one fails at the segment where it shows.
_WITHOUT_EFFECT: Final = (
    "tcp_wmem tcp_congestion_control tcp_min_tso_segs tcp_tso_win_divisor "
    "tcp_recovery tcp_reordering tcp_max_reordering tcp_frto tcp_dsack tcp_fack "
    "tcp_pacing_ss_ratio tcp_pacing_ca_ratio tcp_notsent_lowat "
    "tcp_no_metrics_save tcp_no_ssthresh_metrics_save tcp_limit_output_bytes tcp_autocorking "
    "tcp_tso_rtt_log tcp_min_rtt_wlen tcp_syncookies tcp_fastopen_key tcp_adv_win_scale "
    "tcp_ecn_fallback tcp_ecn_option tcp_ecn_option_beacon tcp_shrink_window tcp_moderate_rcvbuf "
    "tcp_comp_sack_nr tcp_comp_sack_delay_ns tcp_comp_sack_slack_ns tcp_backlog_ack_defer "
    "tcp_base_mss tcp_mtu_probe_floor tcp_probe_interval tcp_probe_threshold tcp_app_win "
    "tcp_plb_enabled tcp_plb_cong_thresh tcp_plb_idle_rehash_rounds tcp_plb_rehash_rounds "
    "tcp_plb_suspend_rto_sec tcp_retries1 tcp_fastopen_blackhole_timeout_sec tcp_early_demux "
    "tcp_max_syn_backlog tcp_child_ehash_entries "
    "ip_no_pmtu_disc ip_forward ip_forward_use_pmtu ip_early_demux route.min_pmtu "
    "conf.all.rp_filter conf.default.rp_filter"
)
# Of these the model has what is the default, and nothing else.
_ONLY: Final = {
    "tcp_abort_on_overflow": 0, "tcp_pingpong_thresh": 1, "tcp_thin_linear_timeouts": 0,
    "tcp_retrans_collapse": 1, "tcp_stdurg": 0, "tcp_reflect_tos": 0, "tcp_mtu_probing": 0,
    "tcp_migrate_req": 0, "tcp_workaround_signed_windows": 0, "ip_nonlocal_bind": 0,
    "ip_default_ttl": 64, "ip_autobind_reuse": 0,
}  # fmt: skip
_KEEPALIVE: Final = ("tcp_keepalive_time", "tcp_keepalive_intvl", "tcp_keepalive_probes")


class _Wait(Exception):
    """A blocking call has to go on waiting; it is tried again when something has happened.

    `until` is when it would give up.
    """

    def __init__(self, until: float = math.inf) -> None:
        self.until = until


# Where tcp_disconnect() has nothing to reset.
_NO_RESET: Final = (State.CLOSED, State.CLOSING, State.LAST_ACK, State.TIME_WAIT)
_EDGE: Final = 1 << 31  # EPOLLET
_RECEIVED: Final = (socket.SOL_SOCKET, socket.SO_RCVLOWAT)
_NOTSENT: Final = (socket.IPPROTO_TCP, CONSTANTS["TCP_NOTSENT_LOWAT"])
_INQ: Final = (socket.IPPROTO_TCP, CONSTANTS["TCP_INQ"])
_SEND_FLAGS: Final = ("MSG_OOB", "MSG_FASTOPEN", "MSG_ZEROCOPY")
_LINGERS_IN: Final = (State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK)


class ModelSocket:
    """A modelled socket that can block: as long as it must, `_Wait` is raised."""

    def __init__(self, inner: SimSocket, blocking: bool) -> None:
        inner.setblocking(False)
        self.inner = inner
        self.blocking = blocking
        self._moved = b""  # what a call that still blocks has read or, in its length, sent
        self._since: float | None = None  # when it began
        self._met = 0  # the error that connect() met when it began
        # SO_RCVTIMEO and SO_SNDTIMEO, in seconds; 0 is for ever.
        self._lingering: Sock | None = None  # closed, but close() has yet to return
        self._until = 0.0
        self._patience = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}
        # Octets: what must have come for the socket to be readable, and what must not wait for it
        # to be writable (0: however much).
        self._lowat = {_RECEIVED: 1, _NOTSENT: 0}
        self._tells_rest = False  # TCP_INQ

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""
        return self.inner.family

    def _wait(self, trouble: OSError, side: int, flags: int = 0) -> Exception:
        """What a call that cannot go on raises: `trouble` where it may not wait any longer."""
        if not self.blocking or flags & socket.MSG_DONTWAIT:
            return trouble
        now = self.inner._open().clock.now
        if self._since is None:
            self._since = now
        until = self._since + (self._patience[side] or math.inf)
        if now < until:
            return _Wait(until)
        self._since = None
        return OSError(trouble.errno, os.strerror(trouble.errno or 0))

    def bind(self, address: tuple[str, int]) -> None:
        """As socket.bind."""
        self.inner.bind(address)

    def listen(self, backlog: int) -> None:
        """As socket.listen."""
        self.inner.listen(backlog)

    def accept(self) -> tuple[ModelSocket, Any]:
        """As socket.accept."""
        try:
            taken, address = self.inner.accept()
        except BlockingIOError as trouble:
            raise self._wait(trouble, socket.SO_RCVTIMEO) from None
        self._since = None
        made = ModelSocket(taken, True)
        made._lowat = dict(self._lowat)
        return made, address

    def connect(self, address: tuple[str, int]) -> None:
        """As socket.connect."""
        try:
            self.inner.connect(address)
        except BlockingIOError as trouble:
            if self._since is None:
                self._met = trouble.errno or 0
            # What it is told when it is tried again: that it is trying.
            met = BlockingIOError(self._met, os.strerror(self._met))
            raise self._wait(met, socket.SO_SNDTIMEO) from None
        self._since = None

    def getsockname(self) -> Any:
        """As socket.getsockname."""
        return self.inner.getsockname()

    def getpeername(self) -> Any:
        """As socket.getpeername."""
        return self.inner.getpeername()

    def send(self, data: bytes, flags: int = 0) -> int:
        """As socket.send; a blocking socket sends all."""
        more = flags & socket.MSG_MORE
        if flags & ~(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT | socket.MSG_EOR | more):
            names = [name for name in _SEND_FLAGS if flags & CONSTANTS[name]]
            raise Unsupported(f"{names[0] if names else f'send() flags {flags:#x}'} on the model")
        if self._lowat[_NOTSENT] and self.unsent() + len(data) > self._lowat[_NOTSENT]:
            raise Unsupported("a write() beyond TCP_NOTSENT_LOWAT on the model")
        waits = self.blocking and not flags & socket.MSG_DONTWAIT
        while len(self._moved) < len(data) or not data:
            try:
                sent = self.inner.send(data[len(self._moved) :], more)
                self._moved += bytes(sent)
            except BlockingIOError as trouble:
                if self._moved and not waits:
                    break
                why = self._wait(trouble, socket.SO_SNDTIMEO, flags)
                if self._moved and not isinstance(why, _Wait):
                    break
                raise why from None
            except OSError:
                if self._moved:
                    break  # what was sent before counts; the error is the next call's
                raise
            if not waits or not data:
                break
        moved, self._moved, self._since = self._moved, b"", None
        if flags & socket.MSG_EOR and self.unsent():
            raise Unsupported("MSG_EOR on the model")  # nothing may join what waits
        return len(moved)

    def unsent(self) -> int:
        """Octets of text that were never sent."""
        conn = self.inner._open().conn
        return 0 if conn is None else conn.status().unsent

    def sendto(self, data: bytes, flags: int, address: Any) -> int:
        """As socket.sendto."""
        if flags & CONSTANTS["MSG_FASTOPEN"]:
            raise Unsupported("MSG_FASTOPEN on the model")
        return self.send(data, flags)

    def sendmsg(self, buffers: list[bytes], control: object, flags: int) -> int:
        """As socket.sendmsg, of which the model knows no control messages."""
        raise Unsupported("control messages on the model")

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv. On TCP, MSG_TRUNC only spares the copying."""
        if flags & socket.MSG_OOB:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))  # there is never any
        if flags & socket.MSG_ERRQUEUE:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))  # it is always empty
        peek = flags & socket.MSG_PEEK
        want = size
        conn = self.inner._open().conn
        low = min(self._lowat[_RECEIVED], size)
        if conn is not None and 0 < conn.readable_bytes < low and not (conn.eof or conn.error):
            why = self._wait(BlockingIOError(errno.EAGAIN, ""), socket.SO_RCVTIMEO, flags)
            if isinstance(why, _Wait):
                raise why
        if flags & socket.MSG_WAITALL and not peek:
            want = size - len(self._moved)
        try:
            data = self.inner.recv(want, peek) if size else b""
        except BlockingIOError as trouble:
            why = self._wait(trouble, socket.SO_RCVTIMEO, flags)
            if self._moved and not isinstance(why, _Wait):
                data = b""
            else:
                raise why from None
        except OSError:
            if not self._moved:
                raise
            data = b""
        if want != size or flags & socket.MSG_WAITALL:
            self._moved += data
            if data and len(self._moved) < size and self.blocking:
                return self.recv(size, flags)
            data, self._moved = self._moved, b""
        self._since = None
        return data

    def recvmsg(self, size: int, _: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        """As socket.recvmsg."""
        data = self.recv(size, flags)
        ancillary: list[tuple[int, int, bytes]] = []
        if self._tells_rest:
            conn = self.inner._open().conn
            rest = 0 if conn is None else conn.readable_bytes or conn.eof  # tcp_inq_hint
            ancillary.append((*_INQ, struct.pack("=i", rest)))
        return data, ancillary, 0, None

    def shutdown(self, how: int) -> None:
        """As socket.shutdown."""
        self.inner.shutdown(how)

    def close(self) -> None:
        """As socket.close; it waits for SO_LINGER, in non-blocking mode too.

        The waiting is the script's, not `Sock.lingers`', which would let time pass unseen.
        """
        sock = self.inner._sock
        if sock is not None:
            linger = sock.linger
            if linger:
                sock.linger = None
            self.inner.close()
            if not linger or sock.conn is None:
                return
            self._lingering, self._until = sock, sock.clock.now + linger
        if self._lingering is not None:
            conn, now = self._lingering.conn, self._lingering.clock.now
            if conn is not None and conn.state in _LINGERS_IN and now < self._until:
                raise _Wait(self._until)

    def setsockopt(self, level: int, option: int, value: bytes | None, size: int = 0) -> None:
        """As socket.setsockopt."""
        if level == socket.SOL_SOCKET and option in self._patience and value is not None:
            if len(value) < 16:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            seconds, micros = struct.unpack_from("=qq", value)
            if not 0 <= micros < 1_000_000:
                raise OSError(errno.EDOM, os.strerror(errno.EDOM))
            self._patience[option] = max(seconds + micros / 1e6, 0.0)
            return
        if (level, option) in self._lowat and value is not None and len(value) >= 4:
            (number,) = struct.unpack_from("=i", value)
            most = (1 << 31) - 1
            if option == socket.SO_RCVLOWAT:
                number, most = number or 1, self.inner._open().get_option(1, socket.SO_RCVBUF) // 2
            self._lowat[level, option] = min(number, most) if number >= 0 else most
            return
        if (level, option) == _INQ and value is not None and len(value) >= 4:
            (number,) = struct.unpack_from("=I", value)
            if number > 1:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self._tells_rest = bool(number)
            return
        self.inner.setsockopt(level, option, value, size if value is None else None)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """As socket.getsockopt."""
        if level == socket.SOL_SOCKET and option in self._patience:
            seconds = self._patience[option]
            return struct.pack("=qq", int(seconds), round(seconds % 1 * 1e6))[:size]
        if (level, option) in self._lowat:
            return struct.pack("=i", self._lowat[level, option])[:size]
        if (level, option) == _INQ:
            return struct.pack("=i", self._tells_rest)[:size]
        got: bytes = self.inner.getsockopt(level, option, size)
        return got

    def getblocking(self) -> bool:
        """Whether O_NONBLOCK is off."""
        return self.blocking

    def setblocking(self, flag: bool) -> None:
        """Set O_NONBLOCK or clear it."""
        self.blocking = flag

    def ioctl(self, code: int) -> int:
        """The queues of tcp(7)."""
        sock = self.inner._open()
        conn = sock.conn
        if sock.listening:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if code == 0x541B:  # SIOCINQ
            return 0 if conn is None else conn.readable_bytes
        if code == 0x5411:  # SIOCOUTQ
            if conn is None or conn.state in (State.SYN_SENT, State.SYN_RECEIVED):
                return 0
            status = conn.status()
            return status.unsent + status.unacknowledged + (conn._fin == 1)
        if code == 0x894B:  # SIOCOUTQNSD
            return 0 if conn is None else conn.status().unsent + (conn._fin == 1)
        if code == 0x8905:  # SIOCATMARK
            return 0
        raise OSError(errno.EOPNOTSUPP, "")

    def news(self) -> object:
        """What differs whenever an edge-triggered epoll would have something to tell."""
        sock = self.inner._open()
        conn = sock.conn
        return self.events(), len(sock.accepted), None if conn is None else conn.rcv_nxt

    def events(self) -> int:
        """What poll(2) would report (`tcp_poll`), as SO_RCVLOWAT and TCP_NOTSENT_LOWAT have it."""
        sock = self.inner._open()
        conn = sock.conn
        events = sock.poll()
        if conn is not None and not sock.listening:
            over = events & (select.POLLRDHUP | select.POLLHUP)
            if not over and conn.readable_bytes < self._lowat[_RECEIVED]:
                events &= ~select.POLLIN
            most = self._lowat[_NOTSENT]
            if most and not conn.write_shut and 2 * self.unsent() >= most:
                events &= ~select.POLLOUT
        if events & select.POLLIN:
            events |= select.POLLRDNORM
        if events & select.POLLOUT:
            events |= select.POLLWRNORM
        return events


@define
class _Interest:
    """What an epoll instance watches one socket for; `seen` is what it told last."""

    events: int
    data: int
    seen: object = None


class _ModelInterests(Interests):
    def __init__(self, calls: _ModelCalls) -> None:
        self._calls = calls
        self._of: dict[ModelSocket, _Interest] = {}

    def change(self, operation: int, live: Any, events: int, data: int) -> None:
        if operation == 1 and live in self._of:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if operation != 1 and live not in self._of:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if operation == 2:
            del self._of[live]
        else:
            self._of[live] = _Interest(events, data)

    def wait(self, timeout: int) -> list[tuple[int, int]]:
        told = [
            (live, interest)
            for live, interest in self._of.items()
            if interest.events and not (interest.events & _EDGE and interest.seen == live.news())
        ]
        came = self._calls.poll([(live, i.events & 0xFFFF) for live, i in told], timeout)
        ready = []
        for got, (live, interest) in zip(came, told, strict=True):
            if got:
                ready.append((got, interest.data))
                interest.seen = live.news()
                if interest.events & select.EPOLLONESHOT:
                    interest.events = 0  # until EPOLL_CTL_MOD
        return ready


class _ModelStream(Stream):
    """A file, or both ends of a pipe: octets that are there to be read."""

    def __init__(self, octets: bytes = b"") -> None:
        self.octets = octets
        self.at = 0

    def look(self, size: int, offset: int | None = None) -> bytes:
        """What a read would give."""
        start = self.at if offset is None else offset
        return self.octets[start : start + size]

    def recv(self, size: int, _: int = 0) -> bytes:
        got = self.look(size)
        self.at += len(got)
        return got

    def send(self, data: bytes, _: int = 0) -> int:
        self.octets += data
        return len(data)

    def close(self) -> None:
        """Nothing is kept of it."""


class _ModelCalls(Calls):
    deadline: float | None = None  # when the poll() that waits gives up
    now: Callable[[], float]

    def interests(self) -> Interests:
        return _ModelInterests(self)

    def poll(self, sockets: list[tuple[Any, int]], timeout: int) -> list[int]:
        always = select.POLLERR | select.POLLHUP
        came = [
            0x20 if live is None else live.events() & (events | always) for live, events in sockets
        ]
        if any(came) or timeout == 0:
            self.deadline = None
            return came
        if self.deadline is None and timeout > 0:
            self.deadline = self.now() + timeout / 1000
        if self.deadline is not None and self.now() >= self.deadline:
            self.deadline = None
            return came
        raise _Wait(math.inf if self.deadline is None else self.deadline)

    def zeros(self, size: int) -> Stream:
        return _ModelStream(bytes(size))

    def pipe(self) -> tuple[Stream, Stream]:
        both = _ModelStream()
        return both, both

    def splice(
        self, source: Any, target: Any, offsets: tuple[int | None, ...], n: int, how: int
    ) -> int:
        if isinstance(source, _ModelStream):
            return self.sendfile(target, source, offsets[0], n)
        flags = socket.MSG_DONTWAIT if how & CONSTANTS["SPLICE_F_NONBLOCK"] else 0
        return int(target.send(source.recv(n, flags)))

    def sendfile(self, target: Any, source: Any, offset: int | None, n: int) -> int:
        # As plain text: it is read before it is known how much of it can be sent.
        moved = int(target.send(source.look(n, offset)))
        if offset is None:
            source.at += moved
        return moved

    def with_octets(self, live: Any, name: str, octets: bytes) -> None:
        family = int.from_bytes(octets[:2], "little")
        if not octets:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        if name == "connect" and len(octets) >= 2 and family == socket.AF_UNSPEC:
            sock = live.inner._open()
            if sock.listening:
                sock.shutdown(socket.SHUT_RD)
                return
            reset = sock.state not in _NO_RESET
            sock.disconnect()
            if reset:
                sock.error = errno.ECONNRESET
            return
        short = len(octets) < (24 if live.family == socket.AF_INET6 else 16)
        number = errno.EINVAL if short else errno.EAFNOSUPPORT
        raise OSError(number, os.strerror(number))


@define
class _Tally:
    """What passed of one connection, for `struct tcp_info` and for what the model lacks."""

    segs_in: int = 0
    segs_out: int = 0
    syn_acks: int = 0  # of those sent
    data_in: int = 0
    data_out: int = 0
    bytes_sent: int = 0
    bytes_again: int = 0
    segs_again: int = 0
    highest: int = 0  # the number after everything sent so far
    flight: dict[int, int] = field(factory=dict)  # segments not acknowledged: number, end
    again: set[int] = field(factory=set)  # those of them that were sent again
    last_out: float = 0.0
    last_in: float = 0.0
    last_ack: float = 0.0

    def sent(self, segment: Segment, now: float) -> bool:
        """A segment leaves; whether its text or FIN or SYN was sent before."""
        self.segs_out += 1
        self.syn_acks += segment.flags & (SYN | ACK) == SYN | ACK
        if not segment.length:
            return False
        end = (segment.seq + segment.length) & MASK
        self.bytes_sent += len(segment.data)
        self.data_out += bool(segment.data)
        self.last_out = now
        again = self.segs_out > 1 and bool((segment.seq - self.highest) & HALF)
        if again:
            self.bytes_again += len(segment.data)
            self.segs_again += 1
            self.again.add(segment.seq)
        if self.segs_out == 1 or (self.highest - end) & HALF:
            self.highest = end
        self.flight[segment.seq] = end
        return again

    def came(self, segment: Segment, now: float) -> None:
        """A segment arrives."""
        self.segs_in += 1
        if segment.data:
            self.data_in += 1
            self.last_in = now
        if segment.flags & ACK:
            self.last_ack = now
            for seq in [s for s, end in self.flight.items() if not (segment.ack - end) & HALF]:
                del self.flight[seq]
                self.again.discard(seq)


class ModelStack:
    """A modelled host as the stack under test, in virtual time; one script each.

    `name` is the profile's parameter set, such as "linux".
    """

    name = "model"
    real = False

    def __init__(self, settings: Settings, profile_name: str = "linux") -> None:
        self._profile_name = profile_name
        self._parameters: dict[str, Any] = {}
        self._network = Network(0, link=Link(delay=0.0))
        self.host: Host = self._network.host(
            "stack", settings.local, profile=profile_name, mtu=settings.mtu
        )
        self._far = self._network.host("script", settings.remote)
        self._far.arrive = self._take  # type: ignore[method-assign]
        six = settings.ip_version == "ipv6"
        mapped = settings.ip_version == "ipv4-mapped-ipv6"
        calls = _ModelCalls(
            self.socket,
            f"::ffff:{settings.local}" if mapped else settings.local,
            f"::ffff:{settings.remote}" if mapped else settings.remote,
            settings.bind_port,
            settings.connect_port,
            socket.AF_INET6 if six or mapped else socket.AF_INET,
        )
        calls.now = self.now
        self.calls: Calls = calls
        self.arrived: deque[Frame] = deque()
        self._tallies: dict[Key, _Tally] = {}
        self._pending: list[Pending] = []
        self._due: dict[int, float] = {}  # when the calls that wait give up
        self.beyond: set[str] = set()
        self._asks_for_ecn = False
        self._keep = [7200, 75, 9]  # seconds, seconds, probes
        self._scales, self._scale = True, self.host.profile.parameters.window_scale
        self.offloads = self.host.profile.parameters.linux_checks

    def __enter__(self) -> ModelStack:
        return self

    def __exit__(self, *exception: object) -> None:
        for live in self.calls.fds.values():
            live.inner.close() if isinstance(live, ModelSocket) else live.close()

    def socket(self, family: int, kind: int, protocol: int) -> ModelSocket:
        """A modelled socket of the stack under test."""
        if protocol not in (0, {1: socket.IPPROTO_TCP, 2: socket.IPPROTO_UDP}[kind & 15]):
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
        if kind & 15 != socket.SOCK_STREAM:
            raise Unsupported("UDP on the model")
        token = HERE.set(self.host)
        try:
            made = SimSocket(family, socket.SOCK_STREAM)
        finally:
            HERE.reset(token)
        idle, interval, probes = self._keep
        made._open().keep = float(idle), float(interval), probes
        return ModelSocket(made, not kind & socket.SOCK_NONBLOCK)

    # -- time

    def start(self) -> None:
        """Nothing has begun before the first event."""

    def now(self) -> float:
        """Virtual seconds."""
        return self._network.clock.now

    def _step(self, until: float) -> None:
        """Go to the next thing that is due, `until` at the latest, and try waiting calls again."""
        clock = self._network.clock
        clock.run_until(min(clock.next, until, *self._due.values()))
        self._network.drain()
        self._retry()

    def _retry(self) -> None:
        for pending in list(self._pending):
            try:
                pending.result = pending.do()
            except _Wait as wait:
                self._due[id(pending)] = max(wait.until, self.now())
                continue
            self._due.pop(id(pending), None)
            pending.ended = self.now()
            self._pending.remove(pending)

    def wait(self, until: float) -> None:
        """Let virtual time pass."""
        while self.now() < until:
            self._step(until)
        # What is due at that very instant comes before the script's own event.
        if self._network.clock.next <= until:
            self._step(until)

    # -- calls

    def submit(self, do: Callable[[], Result], blocking: bool) -> Pending:
        """Make a call; one that has to wait is tried again whenever something happens."""
        pending = Pending(do)
        self._pending.append(pending)
        self._retry()
        return pending

    def finish(self, pending: Pending, deadline: float) -> bool:
        """Let time pass until a call has returned."""
        while pending.result is None:
            if self.now() >= deadline:
                return False
            self._step(deadline)
        return True

    # -- packets

    def inject(self, frame: Frame) -> None:
        """Have a segment arrive."""
        if frame.protocol == "icmp":
            self._icmp(frame)
            return
        if frame.protocol != "tcp":
            raise Unsupported(f"{frame.protocol.upper()} on the model")
        if frame.flags & URG or frame.urgent:
            raise Unsupported("urgent data on the model")
        if any(option.kind == 5 for option in frame.options):
            self.beyond.add("recovery by SACK")
        if any(option.kind in (34, 254) for option in frame.options):
            self.beyond.add("TCP Fast Open")
        if frame.flags & (ECE | CWR):
            self.beyond.add("ECN")
        segment = Segment(
            frame.seq,
            frame.ack if frame.flags & ACK else 0,
            frame.flags & 0x3F,
            frame.window,
            frame.body,
            to_options(frame.options),
        )
        key: Key = (frame.dst, frame.ports[1], frame.src, frame.ports[0])
        if segment.flags & (SYN | ACK) == SYN:
            self._tallies[key] = _Tally()
        tally = self._tallies.setdefault(key, _Tally())
        repeated = segment.flags & (ACK | SYN | FIN | RST) == ACK and not segment.data
        if repeated and len(tally.flight) > 1 and segment.ack == next(iter(tally.flight)):
            self.beyond.add("fast retransmission")
        tally.came(segment, self.now())
        self._network.send(self._far, key, segment)
        self._network.drain()
        if segment.data:
            self._watch_window(key)
        self._retry()

    def _watch_window(self, key: Key) -> None:
        """Note when Linux's next ACK waits for the window (`__tcp_ack_snd_check`).

        It grows with whole segments, and shrinks with what unread text takes in memory.
        """
        sock = self.host.tcp.get(key)
        conn = sock.conn if isinstance(sock, Sock) else None
        if conn is not None and not conn._quick and conn.readable_bytes > 2 * conn._rcv_mss:
            self.beyond.add("the receive window's growth")

    def _icmp(self, frame: Frame) -> None:
        """An ICMP error about a segment of ours (`tcp_v4_err`, `tcp_v6_err`)."""
        six = ":" in frame.dst
        head, inner = frame.body[4 : 44 if six else 24], frame.body[44 if six else 24 :]
        if head[6 if six else 9] != socket.IPPROTO_TCP:
            raise Unsupported("ICMP about other than TCP on the model")
        meaning = _icmp_error(frame.icmp, six)
        if meaning == "MTU":
            self.beyond.add("path MTU discovery")
        elif isinstance(meaning, int):
            family, size = (socket.AF_INET6, 16) if six else (socket.AF_INET, 4)
            local = socket.inet_ntop(family, head[-2 * size : -size])
            remote = socket.inet_ntop(family, head[-size:])
            port, to, seq = struct.unpack_from("!HHI", inner)
            # tcp_v6_err goes by icmpv6_err_convert's word, tcp_v4_err by the kinds themselves.
            final = meaning in (errno.EACCES, errno.ECONNREFUSED, errno.EPROTO)
            if not six:
                final = frame.icmp in ((3, 0), (3, 1)) or frame.icmp[0] in (11, 12)
            self.host.unreachable((local, port, remote, to), seq, meaning, final=final)
        self._network.drain()
        self._retry()

    def _take(self, key: Key, segment: Segment) -> None:
        local: Key = (key[2], key[3], key[0], key[1])
        tally = self._tallies.setdefault(local, _Tally())
        again = tally.sent(segment, self.now())
        if self._asks_for_ecn and segment.flags & (SYN | ACK) == SYN:
            self.beyond.add("ECN")
        if again and len(tally.flight) > 2:  # of two, one is the oldest
            self.beyond.add("loss recovery")
        sock = self.host.tcp.get(local)
        conn = sock.conn if isinstance(sock, Sock) else None
        if conn is not None and conn._flow is False and len(tally.flight) > congestion.FIRST:
            self.beyond.add("congestion control")
        tos, ttl = sock.header() if isinstance(sock, Sock) else (0, 64)
        self.arrived.append(
            Frame(
                key[2],
                key[0],
                "tcp",
                (key[3], key[1]),
                segment.flags,
                segment.seq,
                segment.ack,
                segment.window,
                options=from_options(segment),
                body=segment.data,
                tos=tos,
                ttl=ttl,
                t=self.now(),
            )
        )

    def receive(self, deadline: float) -> Frame | None:
        """The next segment of the model's."""
        while not self.arrived:
            if self.now() >= deadline or (
                self._network.clock.next == math.inf and not self._pending and deadline > 3600
            ):
                return None
            self._step(deadline)
        return self.arrived.popleft()

    def rows(self) -> list[Row]:
        """What netstat would show on the modelled host."""
        return self.host.rows()

    def move_edge(self, key: Key, start: int, edge: int | None) -> None:
        """Let a connection's receive window end at `edge`, counted from `start`."""
        sock = self.host.tcp.get(key)
        if edge is None or sock is None:
            return
        if isinstance(sock, Remnant):
            left = sock.left.thaw(self.host.profile, self.now())
        elif sock.conn is not None:
            left = sock.conn
        else:
            return
        edge = (start + edge) & MASK
        if (edge - left.rcv_nxt) & HALF:
            return
        left.rcv_adv = edge
        if isinstance(sock, Remnant):
            sock.record = bytes(TimeWait.freeze(left))

    # -- settings and state

    def sysctl(self, name: str, value: str, line: int, required: bool) -> None:
        """Change the host's profile or the host itself."""
        short = name.removeprefix("net.ipv4.")
        host = self.host
        try:
            match short:
                case "tcp_timestamps":
                    host.timestamps = value != "0"
                case "tcp_tw_reuse":
                    host.tw_reuse = int(value)
                case "tcp_tw_reuse_delay":
                    host.tw_reuse_delay = int(value) / 1000
                case "tcp_max_tw_buckets":
                    host.max_tw_buckets = int(value)
                case "tcp_sack":
                    self._set(sack=value != "0")
                case "tcp_rmem":
                    _, usual, largest = map(int, value.split())
                    self._scale = window_scale(max(largest, RMEM_MAX))
                    self._set(window_scale=self._scale if self._scales else None)
                    host.rcv_buf = usual // 2  # the rest is for overhead
                case "tcp_fin_timeout":
                    self._set(tcp_fin_timeout=float(value))
                case "tcp_invalid_ratelimit":
                    self._set(challenge_interval=int(value) / 1000)
                case "tcp_rfc1337":
                    self._set(tcp_rfc1337=value != "0")
                case "tcp_ecn":
                    # The model never asks for ECN; 0 and 2 do not have it ask.
                    self._asks_for_ecn = int(value, 0) not in (0, 2)
                case "tcp_window_scaling":
                    self._scales = int(value, 0) != 0
                    self._set(window_scale=self._scale if self._scales else None)
                case "tcp_fastopen":
                    int(value, 0)  # what uses it is told from the segments and the calls
                case _ if short in _KEEPALIVE:
                    self._keep[_KEEPALIVE.index(short)] = int(value, 0)
                case _ if short in _WITHOUT_EFFECT.split():
                    pass
                case _ if short in _ONLY and int(value, 0) == _ONLY[short]:
                    pass
                case _:
                    self._set(**{short: int(value, 0)})
        except (ValueError, IndexError, TypeError):
            if required:
                raise Unsupported(f"sysctl {name}={value} on the model", line) from None

    def _set(self, **changes: Any) -> None:
        wanted = self._parameters | changes
        self.host.profile = profile(self._profile_name, **wanted)
        self._parameters = wanted
        for sock in self.host.tcp.values():
            if isinstance(sock, Sock) and sock.conn is not None:
                sock.conn.follow(self.host.profile)

    def tcp_info(self, fd: int) -> Mapping[str, int]:
        """What of `struct tcp_info` the model knows."""
        live = self.calls.fds.get(fd)
        if not isinstance(live, ModelSocket):
            return {}
        sock = live.inner._open()
        found = {"tcpi_state": sock.linux_state()}
        conn = sock.conn
        if conn is None or sock.key is None:
            return found
        tally = self._tallies.setdefault(sock.key, _Tally())
        micro = 1_000_000
        status, now = conn.status(), self.now()
        probing = conn.t_probe != math.inf
        established = conn.state not in (State.SYN_SENT, State.SYN_RECEIVED)
        # Our SYN counts as one of the octets that were acknowledged only where we were active.
        acked = (conn.snd_una - conn.iss - conn.passive) & MASK if conn.snd_una != conn.iss else 0
        received = (conn.rcv_nxt - conn.irs - 1) & MASK if conn.state is not State.SYN_SENT else 0
        if not tally.segs_again or tally.again:
            # When a recovery is over is congestion control's to say, and so not the model's.
            found["tcpi_ca_state"] = 4 if tally.again else 0
        if conn._flow is not False:
            found["tcpi_snd_cwnd"] = (conn._flow or congestion.Flow()).cwnd
            found["tcpi_snd_ssthresh"] = 0x7FFFFFFF
        return found | {
            "tcpi_retransmits": 0 if probing else conn.retransmits,
            "tcpi_probes": conn.retransmits if probing else 0,
            "tcpi_backoff": conn._backoff,
            "tcpi_options": (
                (established and conn.timestamps)
                | (established and conn.sack) << 1
                | (established and bool(conn.rcv_scale or conn.snd_scale)) << 2
            ),
            "tcpi_snd_wscale": conn.snd_scale,
            "tcpi_rcv_wscale": conn.rcv_scale,
            "tcpi_rto": round(conn.rto * micro),
            "tcpi_ato": round(conn._ato * micro),
            "tcpi_snd_mss": conn.mss - 12 * conn.timestamps,
            "tcpi_rcv_mss": conn._rcv_mss,
            "tcpi_advmss": conn.adv_mss - 12 * (established and conn.timestamps),
            "tcpi_pmtu": self.host.mtu,
            "tcpi_unacked": len(tally.flight),
            "tcpi_sacked": 0,
            "tcpi_lost": len(tally.flight) if conn._recover is not None else 0,
            "tcpi_retrans": len(tally.again),
            "tcpi_total_retrans": tally.segs_again,
            "tcpi_fackets": 0,
            "tcpi_reordering": 3,
            "tcpi_rtt": round((conn.srtt or 0.0) * micro),
            "tcpi_bytes_acked": acked,
            "tcpi_bytes_received": received - (conn.fin_received and received > 0),
            "tcpi_bytes_sent": tally.bytes_sent,
            "tcpi_bytes_retrans": tally.bytes_again,
            "tcpi_notsent_bytes": status.unsent,
            "tcpi_segs_out": tally.segs_out - tally.syn_acks * conn.passive,  # a request's
            "tcpi_segs_in": tally.segs_in,
            "tcpi_data_segs_out": tally.data_out,
            "tcpi_data_segs_in": tally.data_in,
            "tcpi_snd_wnd": conn.snd_wnd,
            "tcpi_rcv_wnd": status.rcv_wnd,
            "tcpi_last_data_sent": int((now - tally.last_out) * 1000),
            "tcpi_last_data_recv": int((now - tally.last_in) * 1000),
            "tcpi_last_ack_recv": int((now - tally.last_ack) * 1000),
            "tcpi_dsack_dups": 0,
            "tcpi_delivered_ce": 0,
        }


_ICMP_ERRORS: Final = {
    # icmp_err_convert, by the code of "destination unreachable"
    0: errno.ENETUNREACH, 1: errno.EHOSTUNREACH, 2: errno.ENOPROTOOPT, 3: errno.ECONNREFUSED,
    5: errno.EOPNOTSUPP, 6: errno.ENETUNREACH, 7: errno.EHOSTDOWN, 8: errno.ENONET,
    9: errno.ENETUNREACH, 10: errno.EHOSTUNREACH, 11: errno.ENETUNREACH, 12: errno.EHOSTUNREACH,
    13: errno.EHOSTUNREACH, 14: errno.EHOSTUNREACH, 15: errno.EHOSTUNREACH,
}  # fmt: skip
_ICMP6_ERRORS: Final = {
    # icmpv6_err_convert
    0: errno.ENETUNREACH, 1: errno.EACCES, 2: errno.EHOSTUNREACH, 3: errno.EHOSTUNREACH,
    4: errno.ECONNREFUSED, 5: errno.EACCES, 6: errno.EACCES,
}  # fmt: skip


def _icmp_error(icmp: tuple[int, int], six: bool) -> int | str | None:
    """The errno that an ICMP message means to TCP, "MTU", or None for one it ignores."""
    kind, code = icmp
    if six:
        if kind == 2:
            return "MTU"
        if kind == 1:
            return _ICMP6_ERRORS.get(code, errno.EPROTO)
        return {3: errno.EHOSTUNREACH, 4: errno.EPROTO}.get(kind)
    if (kind, code) == (3, 4):
        return "MTU"
    if kind == 3:
        return _ICMP_ERRORS.get(code)
    return {11: errno.EHOSTUNREACH, 12: errno.EPROTO}.get(kind)


def to_options(options: tuple[Option, ...]) -> Options | None:
    """A script's options as those the model knows; the others are left out."""
    if not options:
        return None
    made = Options()
    for option in options:
        data = option.data
        if option.kind == 2 and len(data) == 2:
            made.mss = int.from_bytes(data, "big")
        elif option.kind == 3 and len(data) == 1:
            made.window_scale = data[0]
        elif option.kind == 4:
            made.sack_permitted = True
        elif option.kind == 8 and len(data) == 8:
            made.ts_val, made.ts_ecr = struct.unpack("!II", data)
    return made


def from_options(segment: Segment) -> tuple[Option, ...]:
    """A segment's options in the order in which Linux writes them (`tcp_options_write`)."""
    given = segment.options
    if given is None:
        return ()
    nop = Option(1)
    found: list[Option] = []
    if given.mss is not None:
        found.append(Option(2, given.mss.to_bytes(2, "big")))
    if given.ts_val is not None:
        found += [Option(4)] if given.sack_permitted else [nop, nop]
        found.append(Option(8, struct.pack("!II", given.ts_val, given.ts_ecr or 0)))
    elif given.sack_permitted:
        found += [nop, nop, Option(4)]
    if given.window_scale is not None:
        found += [nop, Option(3, bytes([given.window_scale]))]
    if given.sack:
        edges = [edge for block in given.sack for edge in block]
        found += [nop, nop, Option(5, struct.pack(f"!{len(edges)}I", *edges))]
    return tuple(found)

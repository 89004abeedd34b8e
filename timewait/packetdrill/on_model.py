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

from timewait.events import Row
from timewait.packetdrill.calls import Calls, Interests, Result
from timewait.packetdrill.frames import Frame
from timewait.packetdrill.runner import Pending
from timewait.packetdrill.script import Option, Unsupported
from timewait.packetdrill.settings import Settings
from timewait.sim.host import HERE, Host, Remnant
from timewait.sim.network import Key, Link, Network
from timewait.sim.socket import SimSocket
from timewait.tcp.profiles import profile
from timewait.tcp.segment import ACK, CWR, ECE, HALF, MASK, URG, Options, Segment
from timewait.tcp.time_wait import TimeWait

__all__ = ["ModelSocket", "ModelStack", "from_options", "to_options"]

# Settings of congestion control, offload and memory, of which the model has none: a script
# that depends on one fails at the segment where it shows.
_WITHOUT_EFFECT: Final = (
    "tcp_wmem tcp_congestion_control tcp_min_tso_segs tcp_tso_win_divisor tcp_early_retrans "
    "tcp_recovery tcp_reordering tcp_max_reordering tcp_frto tcp_dsack tcp_fack "
    "tcp_slow_start_after_idle tcp_pacing_ss_ratio tcp_pacing_ca_ratio tcp_notsent_lowat "
    "tcp_no_metrics_save tcp_no_ssthresh_metrics_save tcp_limit_output_bytes tcp_autocorking "
    "tcp_tso_rtt_log tcp_min_rtt_wlen tcp_syncookies tcp_fastopen_key tcp_adv_win_scale "
    "tcp_ecn_fallback tcp_shrink_window tcp_moderate_rcvbuf "
    "ip_no_pmtu_disc"
)


class _Wait(Exception):
    """A blocking call has to go on waiting; it is tried again when something has happened."""


class ModelSocket:
    """A modelled socket that can block: as long as it must, `_Wait` is raised."""

    def __init__(self, inner: SimSocket, blocking: bool) -> None:
        inner.setblocking(False)
        self.inner = inner
        self.blocking = blocking
        self._sent = 0

    def _would_block(self, trouble: BlockingIOError, flags: int = 0) -> Exception:
        if self.blocking and not flags & socket.MSG_DONTWAIT:
            return _Wait()
        return trouble

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
            raise self._would_block(trouble) from None
        return ModelSocket(taken, True), address

    def connect(self, address: tuple[str, int]) -> None:
        """As socket.connect."""
        try:
            self.inner.connect(address)
        except BlockingIOError as trouble:
            raise self._would_block(trouble) from None

    def send(self, data: bytes, flags: int = 0) -> int:
        """As socket.send; a blocking socket sends all."""
        if flags & ~(socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT):
            raise OSError(errno.EOPNOTSUPP, "")
        while self._sent < len(data) or not data:
            try:
                self._sent += self.inner.send(data[self._sent :])
            except BlockingIOError as trouble:
                if self._sent and not self.blocking:
                    break
                raise self._would_block(trouble, flags) from None
            if not self.blocking or not data:
                break
        sent, self._sent = self._sent, 0
        return sent

    def sendto(self, data: bytes, flags: int, address: Any) -> int:
        """As socket.sendto."""
        if flags & 0x20000000:  # MSG_FASTOPEN
            raise OSError(errno.EOPNOTSUPP, "")
        return self.send(data, flags)

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As socket.recv."""
        try:
            return self.inner.recv(size, flags)
        except BlockingIOError as trouble:
            raise self._would_block(trouble, flags) from None

    def recvmsg(self, size: int, _: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        """As socket.recvmsg."""
        return self.recv(size, flags), [], 0, None

    def shutdown(self, how: int) -> None:
        """As socket.shutdown."""
        self.inner.shutdown(how)

    def close(self) -> None:
        """As socket.close. Time that passes in it would pass in the script unseen."""
        waits = self.inner._open().linger
        self.inner.close()
        if waits:
            raise Unsupported("close() that waits for SO_LINGER on the model")

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        """As socket.setsockopt."""
        self.inner.setsockopt(level, option, value)

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        """As socket.getsockopt."""
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
        if code == 0x5411 and conn is not None:  # SIOCOUTQ
            status = conn.status()
            return status.unsent + status.unacknowledged
        if code == 0x8905:  # SIOCATMARK
            return 0
        raise OSError(errno.EOPNOTSUPP, "")

    def events(self) -> int:
        """What poll(2) would report (`tcp_poll`)."""
        sock = self.inner._open()
        conn = sock.conn
        if sock.listening:
            return select.POLLIN | select.POLLRDNORM if sock.accepted else 0
        if conn is None:
            events = select.POLLOUT | select.POLLWRNORM | select.POLLHUP
            if sock.shut & 1:
                events |= select.POLLIN | select.POLLRDNORM | select.POLLRDHUP
            return events | (select.POLLERR if sock.error else 0)
        events = 0
        closed = conn.state.name in ("CLOSED", "TIME_WAIT")
        if closed or (conn.eof and conn.write_shut):
            events |= select.POLLHUP
        if conn.eof or closed:
            events |= select.POLLIN | select.POLLRDNORM | select.POLLRDHUP
        if conn.readable_bytes:
            events |= select.POLLIN | select.POLLRDNORM
        if conn.state.name not in ("SYN_SENT", "SYN_RECEIVED") and sock.writable():
            events |= select.POLLOUT | select.POLLWRNORM
        if conn.error or sock.error:
            events |= select.POLLERR
        return events


class _ModelInterests(Interests):
    def __init__(self, calls: _ModelCalls) -> None:
        self._calls = calls
        self._of: dict[ModelSocket, tuple[int, int]] = {}

    def change(self, operation: int, live: Any, events: int, data: int) -> None:
        if events & (select.EPOLLET | select.EPOLLONESHOT):
            raise Unsupported("edge-triggered epoll on the model")
        if operation == 1 and live in self._of:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        if operation != 1 and live not in self._of:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if operation == 2:
            del self._of[live]
        else:
            self._of[live] = (events, data)

    def wait(self, timeout: int) -> list[tuple[int, int]]:
        watched = list(self._of.items())
        came = self._calls.poll([(live, events) for live, (events, _) in watched], timeout)
        return [(got, data) for got, (_, (_, data)) in zip(came, watched, strict=True) if got]


class _ModelCalls(Calls):
    deadline: float | None = None
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
        raise _Wait


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
        self._pending: list[Pending] = []
        self.beyond: set[str] = set()

    def __enter__(self) -> ModelStack:
        return self

    def __exit__(self, *exception: object) -> None:
        for live in self.calls.fds.values():
            live.inner.close() if isinstance(live, ModelSocket) else live.close()

    def socket(self, family: int, kind: int, protocol: int) -> ModelSocket:
        """A modelled socket of the stack under test."""
        if protocol not in (0, socket.IPPROTO_TCP) or kind & 15 != socket.SOCK_STREAM:
            raise Unsupported("UDP on the model")
        token = HERE.set(self.host)
        try:
            made = SimSocket(family, socket.SOCK_STREAM)
        finally:
            HERE.reset(token)
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
        due = clock.next
        clock.run_until(until if due is None else min(due, until))
        self._network.drain()
        self._retry()

    def _retry(self) -> None:
        for pending in list(self._pending):
            try:
                pending.result = pending.do()
            except _Wait:
                continue
            pending.ended = self.now()
            self._pending.remove(pending)

    def wait(self, until: float) -> None:
        """Let virtual time pass."""
        while self.now() < until:
            self._step(until)
        # What is due at that very instant comes before the script's own event.
        due = self._network.clock.next
        if due is not None and due <= until:
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
            poll = getattr(self.calls, "deadline", None)
            self._step(min(deadline, poll) if poll is not None else deadline)
        return True

    # -- packets

    def inject(self, frame: Frame) -> None:
        """Have a segment arrive."""
        if frame.protocol != "tcp":
            raise Unsupported(f"{frame.protocol.upper()} on the model")
        if frame.flags & URG or frame.urgent:
            raise Unsupported("urgent data on the model")
        if any(option.kind == 5 for option in frame.options):
            self.beyond.add("SACK blocks")
        if any(option.kind in (34, 254) for option in frame.options):
            self.beyond.add("TCP Fast Open")
        if frame.tos & 3 or frame.flags & (ECE | CWR):
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
        self._network.send(self._far, key, segment)
        self._network.drain()
        self._retry()

    def _take(self, key: Key, segment: Segment) -> None:
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
                t=self.now(),
            )
        )

    def receive(self, deadline: float) -> Frame | None:
        """The next segment of the model's."""
        while not self.arrived:
            if self.now() >= deadline or (
                self._network.clock.next is None and not self._pending and deadline > 3600
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
                    # tcp_select_initial_window: what the largest buffer needs.
                    largest = int(value.split()[2])
                    self._set(window_scale=max(0, min(14, int(math.log2(largest)) - 15)))
                case "tcp_fin_timeout":
                    self._set(tcp_fin_timeout=float(value))
                case "tcp_invalid_ratelimit":
                    self._set(challenge_interval=int(value) / 1000)
                case "tcp_rfc1337":
                    self._set(tcp_rfc1337=value != "0")
                case "tcp_ecn" if value in ("0", "2"):
                    pass  # the model never asks for ECN
                case "tcp_window_scaling" if value == "1":
                    pass
                case "tcp_fastopen" if not required or value == "0":
                    pass
                case _ if short in _WITHOUT_EFFECT.split():
                    pass
                case _:
                    self._set(**{short: int(value)})
        except (ValueError, IndexError, TypeError):
            if required:
                raise Unsupported(f"sysctl {name}={value} on the model", line) from None

    def _set(self, **changes: Any) -> None:
        wanted = self._parameters | changes
        self.host.profile = profile(self._profile_name, **wanted)
        self._parameters = wanted

    def tcp_info(self, fd: int) -> Mapping[str, int]:
        """What of `struct tcp_info` the model knows."""
        live = self.calls.fds.get(fd)
        if not isinstance(live, ModelSocket):
            return {}
        sock = live.inner._open()
        found = {"tcpi_state": sock.linux_state(), "tcpi_ca_state": 0}
        if sock.conn is not None:
            found["tcpi_retransmits"] = found["tcpi_backoff"] = sock.conn.retransmits
            found["tcpi_rto"] = round(sock.conn.rto * 1e6)
        return found


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
    return tuple(found)

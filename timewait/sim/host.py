"""One host: its addresses and ports, its tables of connections, and who gets what arrives.

What is decided here is what Linux decides apart from any one socket: which
address speaks, who listens, whether a 4-tuple is free, what is left of a
connection in TIME_WAIT, and what `netstat` shows.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import Counter, deque
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Final, TypeVar
from weakref import WeakKeyDictionary
from zlib import crc32

from timewait.events import Row, Transition
from timewait.sim.network import Key, canonical
from timewait.sim.ports import ANY4, ANY6, PortTable, is_v4
from timewait.sim.sock import AF_INET, AF_INET6, DOWN, INF, Sock
from timewait.tcp.connection import Connection, Hook
from timewait.tcp.profiles import PROFILES, Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment, seq_add
from timewait.tcp.states import Event, State, Timer
from timewait.tcp.time_wait import TimeWait

if TYPE_CHECKING:
    from timewait.sim.network import Network

__all__ = ["HERE", "Host", "Remnant"]

T = TypeVar("T")

HERE: ContextVar[Host] = ContextVar("host")  # on which host the running code runs

_LOOPBACK_MSS: Final = 32741  # lo's MTU of 65536, halved by Linux's window rule, less timestamps
_MSS: Final = 1448
_TIMER_NAMES: Final = {
    Timer.RETRANSMIT: "retransmit",
    Timer.PROBE: "probe",
    Timer.KEEPALIVE: "keepalive",
    Timer.WAIT: "time_wait",
}


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
    What of these is None is as the profile has it (else as Linux has it).
    Raises `ValueError` where `ephemeral` is no range of ports.
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
        tw_reuse: int | None = None,
        tw_reuse_delay: float | None = None,
        max_tw_buckets: int | None = None,
        timestamps: bool | None = None,
        mtu: int = 1500,
    ) -> None:
        if not 1 <= ephemeral[0] <= ephemeral[1] <= 65535:
            raise ValueError(f"ephemeral ports are from 1 to 65535, the lowest first: {ephemeral}")
        self.network = network
        self.name = name
        self.addresses = tuple(addresses)
        self.profile = _profile(profile)
        self.uid = uid
        self.unprivileged_port_start = 1024
        self.ephemeral = ephemeral
        self.reserved_ports = frozenset(reserved_ports)
        self.tw_reuse: int = self._set(tw_reuse, "tcp_tw_reuse")
        self.tw_reuse_delay: float = (
            self._set(tw_reuse_delay and 1000 * tw_reuse_delay, "tcp_tw_reuse_delay") / 1000
        )
        self.max_tw_buckets: int = self._set(max_tw_buckets, "tcp_max_tw_buckets")
        self.timestamps = self.profile.parameters.timestamps if timestamps is None else timestamps
        self.rcv_buf = 65536  # bytes: half of the second of tcp_rmem, the rest is for overhead
        self.mtu = mtu
        self.up = True
        self.counters: Counter[str] = Counter()
        self.tasks: WeakKeyDictionary[asyncio.Task[Any], None] = WeakKeyDictionary()
        self.boots = 0
        self._boot()

    def _set(self, value: float | None, name: str) -> Any:
        """`value`, or the profile's setting of that name, or Linux's."""
        known = self.profile.settings.get(name) or PROFILES["linux"].settings[name]
        return known.value if value is None else value

    def __repr__(self) -> str:
        return f"<Host {self.name} {' '.join(self.addresses)}>"

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
        self.next_ts_recent = 0  # what it had heard of the peer's clock

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
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    def named(self, name: str) -> list[str]:
        """The addresses of a host's name, IPv6 first as `getaddrinfo` has them; [] if unknown."""
        if name == "localhost":
            return ["::1", "127.0.0.1"]
        if name not in self.network.hosts:
            return []
        found = list(self.network.hosts[name].addresses)
        if name == self.name and not found:
            found = ["127.0.0.1"]
        return sorted(found, key=is_v4)

    def name_of(self, address: str) -> str | None:
        """Whose address it is; None if it is nobody's."""
        if _is_loopback(address):
            return "localhost"
        try:
            owner = self.network.find(canonical(address))
        except ValueError:
            return None
        return None if owner is None else owner.name

    def resolve(self, name: str, family: int = 0) -> list[str]:
        """The addresses of a name, or the address it is; [] if unknown."""
        found = self.named(name)
        if not found:
            try:
                found = [canonical(name)]
            except ValueError:
                return []
        if family == AF_INET:
            return [a for a in found if is_v4(a)]
        if family == AF_INET6:
            return [a for a in found if not is_v4(a)]
        return found

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
        headers, default = (40, 536) if is_v4(sock.remote) else (60, 1220)
        mss = _LOOPBACK_MSS if self.is_local(sock.remote) else self.mtu - headers
        conn = Connection(
            self.profile,
            iss=self._draw_iss(sock.key) if iss is None else iss,
            mss=min(mss, sock.user_mss or mss),
            default_mss=default,
            rcv_buf=self.rcv_buf,
            timestamps=self.timestamps,
            outbox=self.out,
        )
        if self.next_ts_recent:
            conn.ts_recent, self.next_ts_recent = self.next_ts_recent, 0
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
        if not isinstance(old, Remnant) or not self.timestamps:
            return True
        # What costs least is asked first: where ports run out, all of them are asked.
        if choosing and self.reuse_moment(key[0], key[2]) <= old.since + self.tw_reuse_delay:
            return True
        left = old.left
        shown = left.state
        if not left.timestamps or (choosing and shown is not State.TIME_WAIT):
            return True
        self.next_iss, self.next_ts_recent = left.next_iss, left.ts_recent
        self.moved(key, shown, State.CLOSED, "REUSED")
        self.end(old)
        return False

    def reuse_moment(self, source: str, remote: str) -> float:
        """The virtual time if TIME_WAIT between the two may be reused in time; else always -1."""
        never = self.tw_reuse == 0 or (
            self.tw_reuse == 2 and not (_is_loopback(source) or _is_loopback(remote))
        )
        return -1.0 if never or not self.timestamps else self.network.clock.now

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
        none_here = self.profile.settings.get("nolocaltimewait")
        if none_here and none_here.value and self.is_local(sock.key[2]):
            self.moved(sock.key, record.state, State.CLOSED, "NO_LOCAL_TIME_WAIT")
            self.forget(sock)
            return
        if self.time_waits >= self.max_tw_buckets:
            self.counters["TCPTimeWaitOverflow"] += 1
            self.moved(sock.key, record.state, State.CLOSED, "OVERFLOW")
            self.forget(sock)
            return
        remnant = Remnant(sock, bytes(record), self.network.clock.now)
        self.ports.inherit(sock, remnant)
        freed = self.ports.freed
        self.forget(sock)
        self.ports.freed = freed  # nothing is: the remnant takes its place
        self.tcp[remnant.key] = remnant
        self.time_waits += 1
        self.await_end(remnant)

    def orphaned(self, sock: Sock) -> None:
        """close(2) came in FIN_WAIT_2, or its time as a whole socket is up."""
        conn = sock.conn
        if (
            conn is not None
            and conn.state is State.FIN_WAIT_2
            and self.profile.parameters.small_sockets
            and conn.t_keepalive == INF
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

    def damaged(self, key: Key, segment: Segment, how: str) -> None:
        """A segment has come that is no whole one any more: IP or TCP throws it away."""
        self.counters["InErrs" if how == "truncate" else "InCsumErrors"] += 1

    def _embryo(self, listener: Sock, key: Key, segment: Segment) -> None:
        """A SYN for a listener: a connection that is nobody's yet."""
        sock = Sock(self, listener.family)
        sock.address, sock.port, sock.remote, sock.remote_port = key
        sock.sport = sock.port
        sock.key = key
        sock.peer_key = (key[2], key[3], key[0], key[1])
        sock.parent = listener
        sock.rcvbuf, sock.sndbuf = listener.rcvbuf, listener.sndbuf  # the SYN,ACK's window
        sock.user_mss = listener.user_mss
        sock.remembered = listener.remembered
        conn = sock.conn = self.connection(sock)
        sock.size_buffers()
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

    def unreachable(self, key: Key, seq: int, number: int, *, final: bool = True) -> None:
        """ICMP says that a segment of ours did not arrive (`tcp_v4_err`, `tcp_v6_err`).

        `seq` is that segment's, `number` the errno it means. A connect() fails
        with it; a half-open connection is forgotten where it is `final`; on what
        is open it is only told if that times out, since it may pass.
        """
        sock = self.tcp.get(key)
        if not isinstance(sock, Sock) or sock.conn is None:
            return
        conn = sock.conn
        if (seq - conn.snd_una) & 0xFFFFFFFF > (conn.snd_nxt - conn.snd_una) & 0xFFFFFFFF:
            return
        if conn.state is State.SYN_SENT or (conn.state is State.SYN_RECEIVED and not sock.parent):
            sock.refused(number)
        elif conn.state is State.SYN_RECEIVED:
            if final and seq == conn.iss:  # tcp_req_err
                assert sock.parent is not None
                sock.parent.embryos.pop(sock, None)
                self.forget(sock)
                sock.conn = None
        else:
            sock.soft_error = number

    # States.

    def changed(self, sock: Sock, old: State, new: State) -> None:
        """Keep the tables in step with a connection that changed its state."""
        if sock.parent is not None and old is State.SYN_RECEIVED:
            listener = sock.parent
            listener.embryos.pop(sock, None)
            if new is State.CLOSED or new is State.LISTEN:
                self.forget(sock)  # to return to LISTEN is to leave it to the listener
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
            if sock.conn.orphaned:
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
        child.cork = listener.cork
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
            sock.dead = DOWN
            sock.clean = False
            sock.end_volley()
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
        # Not acknowledged yet, our SYN and FIN counted (write_seq - snd_una).
        send_q=len(conn._tx) + bool(conn._fin) + (conn.state is State.SYN_SENT),
        retransmits=conn.retransmits,
        timer=timer,
        seconds_left=left,
        inode=sock.fd if sock.files else 0,
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
    return given if isinstance(given, Profile) else profile(given)

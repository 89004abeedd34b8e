"""Hosts, their names and addresses, and the links between them, good and bad.

A segment travels under the key by which its *receiver* knows the connection:
`(local address, local port, remote address, remote port)`. Within a host, and
over a link without delay, it arrives at once, by way of one queue, so that
nobody's stack is entered twice; over any other link it waits in the clock.

All chance (loss, jitter, duplication, reordering) is drawn from the network's
seed, a generator for each direction of each link, so that what one link does
never depends on another's traffic. A `Fault` is chance taken out: it picks
the one segment to be lost, delayed or repeated.
"""

from __future__ import annotations

import ipaddress
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import permutations
from math import inf
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, Unpack

from attrs import define, evolve, field, frozen

from timewait.events import Event, Row, SegmentSeen, Transition
from timewait.sim.clock import Clock
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment, seq_add, seq_le

if TYPE_CHECKING:
    from timewait.sim.host import Host
    from timewait.sim.sock import Sock

__all__ = ["Aim", "Fault", "Key", "Link", "Network", "Observer", "canonical"]

Key: TypeAlias = tuple[str, int, str, int]
Place: TypeAlias = "Host | str | int | tuple[str, int]"


class Aim(TypedDict, total=False):
    """Which segments of a kind a fault strikes: `times` of them (None: all), from the `nth` on.

    `source` and `target` are a host, its name, an address, a port, or
    `(address, port)`; left out, any. Left out, `nth` and `times` are 1.
    """

    source: Place | None
    target: Place | None
    nth: int
    times: int | None


@lru_cache(4096)
def canonical(address: str) -> str:
    """An IP address as it is kept here: shortest spelling, IPv4-mapped as IPv4.

    Raises `ValueError` where it is no address.
    """
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return sys.intern(str(parsed))


@frozen
class Link:
    """What one direction of a link does to segments.

    `delay` and `jitter` are in seconds (a segment takes `delay` plus up to
    `jitter`); `loss`, `duplicate` and `reorder` are probabilities. Segments
    stay in order unless `reorder` says otherwise, whatever the jitter. `up`
    is false while the link is cut.
    """

    delay: float = 0.001
    jitter: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    up: bool = True

    def __attrs_post_init__(self) -> None:
        if not (0 <= self.delay < inf and 0 <= self.jitter < inf):
            raise ValueError("a link's delay and jitter are finite and not negative")
        for name in ("loss", "duplicate", "reorder"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"a link's {name} is a probability, from 0 to 1")


@define(eq=False)
class Fault:
    """Something that happens to chosen segments. Made by `Network.drop` and its like."""

    act: str
    segments: str
    source: Place | None = None
    target: Place | None = None
    first: int = 1
    times: int | None = 1
    seconds: float = 0.0
    seen: int = field(default=0, init=False)
    done: int = field(default=0, init=False)


@define
class _Flow:
    """What is kept of one direction: the numbers after its FIN and after all it has sent."""

    fin: int | None = None
    acked: bool = False
    next: int | None = None


_KINDS: dict[str, Callable[[Segment], bool]] = {
    "any": lambda s: True,
    "SYN": lambda s: s.flags & (SYN | ACK) == SYN,
    "SYN,ACK": lambda s: s.flags & (SYN | ACK) == SYN | ACK,
    "FIN": lambda s: s.flags & FIN != 0,
    "RST": lambda s: s.flags & RST != 0,
    "ACK": lambda s: s.flags & (SYN | FIN | RST | ACK) == ACK and not s.data,
    "data": lambda s: bool(s.data),
    "last-ack": lambda s: s.flags & (SYN | FIN | RST | ACK) == ACK,
}


class Network:
    """An internet of modelled hosts.

    `seed` decides everything that is left to chance. `link` is what every
    pair of hosts has between them until `connect` says otherwise.
    """

    def __init__(self, seed: int | str = 0, *, link: Link | None = None) -> None:
        self.seed = seed
        self.clock = Clock()
        self.hosts: dict[str, Host] = {}
        self.files: dict[int, Sock] = {}
        self.next_fd = 1 << 20  # no real file has such a number
        self.faults: list[Fault] = []
        self.observers: list[Observer] = []
        self._link = link or Link()
        self._links: dict[tuple[str, str], Link] = {}
        self._random: dict[tuple[str, str], Random] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._by_address: dict[str, Host] = {}
        self._flows: dict[Key, _Flow] = {}
        self.following = False  # whether to keep numbers for `forge` where there are no faults
        self.loopback = 0.0  # seconds that a segment takes within a host
        self.sent_at: float | None = None  # when a real host sent what is sent now
        self._held: dict[tuple[str, int, str, int], list[tuple[Host, Key, Segment]]] = {}
        self.queue: deque[tuple[Host, Key, Segment]] = deque()
        self._draining = False

    # Hosts and names.

    def host(self, name: str, *addresses: str, **settings: Any) -> Host:
        """Add a host; without addresses it gets 10.0.x.y and fd00::x:y. `settings` as `Host`'s.

        Raises `ValueError` where the name or an address is taken, or is none.
        """
        from timewait.sim.host import Host

        if not name:
            raise ValueError("a host has a name")
        if name in self.hosts:
            raise ValueError(f"there is a host {name!r} already")
        number = len(self.hosts) + 1
        given = [canonical(a) for a in addresses]
        if not given:
            given = [f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}", f"fd00::{number:x}"]
        for address in given:
            if address in self._by_address:
                owner = self._by_address[address].name
                raise ValueError(f"{address} is {owner!r}'s address already")
            kind = ipaddress.ip_address(address)
            if kind.is_loopback:
                raise ValueError(f"{address} is every host's own")
            if kind.is_unspecified or kind.is_multicast or address == "255.255.255.255":
                raise ValueError(f"{address} is no host's address")
        host = Host(self, name, given, **settings)
        self.hosts[name] = host
        for address in given:
            self._by_address[address] = host
        return host

    def find(self, address: str) -> Host | None:
        """The host that has the (canonical, not loopback) address."""
        return self._by_address.get(address)

    # Links.

    def connect(self, a: Host | str, b: Host | str, *, both: bool = True, **changes: Any) -> None:
        """Change the link from `a` to `b` (and back): any field of `Link` by name."""
        a, b = self._known(a), self._known(b)
        for pair in [(a, b), (b, a)][: 1 + both]:
            self._links[pair] = evolve(self.link(*pair), **changes)

    def link(self, a: Host | str, b: Host | str) -> Link:
        """The link from `a` to `b` as it is now."""
        return self._links.get((_name(a), _name(b)), self._link)

    def partition(self, *hosts: Host | str, one_way: bool = False) -> None:
        """Cut the hosts off from all others (`one_way`: they still hear, nobody hears them)."""
        if not hosts:
            raise ValueError("a partition has a host at least")
        inside = [self._known(host) for host in hosts]
        for a in inside:
            for b in self.hosts:
                if b not in inside:
                    self._links[a, b] = evolve(self.link(a, b), up=False)
                    if not one_way:
                        self._links[b, a] = evolve(self.link(b, a), up=False)

    def heal(self, *hosts: Host | str) -> None:
        """Mend the cut links of the hosts; of all hosts if none is named."""
        mended = {self._known(host) for host in hosts or self.hosts}
        for pair in list(self._links if self._link.up else permutations(self.hosts, 2)):
            link = self.link(*pair)
            if not link.up and not mended.isdisjoint(pair):
                self._links[pair] = evolve(link, up=True)

    def _known(self, host: Host | str) -> str:
        name = _name(host)
        if name not in self.hosts:
            raise ValueError(f"no host {name!r}")
        return name

    # Faults.

    def drop(self, segments: str = "any", **aim: Unpack[Aim]) -> Fault:
        """Lose segments.

        `segments` is "SYN", "SYN,ACK", "FIN", "RST", "ACK" (nothing else in
        it), "data", "last-ack" (of the close: what the side in TIME_WAIT
        sends) or "any"; `Aim` says which of them.
        """
        return self._aim("drop", segments, **aim)

    def delay(self, segments: str, seconds: float, **aim: Unpack[Aim]) -> Fault:
        """Hold segments up for `seconds` more; chosen as in `drop`. Later ones overtake them."""
        return self._aim("delay", segments, seconds, **aim)

    def duplicate(self, segments: str, seconds: float, **aim: Unpack[Aim]) -> Fault:
        """Deliver segments, and once more `seconds` later; chosen as in `drop`."""
        return self._aim("duplicate", segments, seconds, **aim)

    def corrupt(self, segments: str, **aim: Unpack[Aim]) -> Fault:
        """Deliver segments with an octet changed: the checksum is wrong; chosen as in `drop`."""
        return self._aim("corrupt", segments, **aim)

    def truncate(self, segments: str, **aim: Unpack[Aim]) -> Fault:
        """Deliver only the first half of segments' octets; chosen as in `drop`."""
        return self._aim("truncate", segments, **aim)

    def reorder(self, segments: str, seconds: float = 0.2, **aim: Unpack[Aim]) -> Fault:
        """Deliver segments after the one that follows them, `seconds` later at most."""
        return self._aim("reorder", segments, seconds, **aim)

    def forge(self, key: Key, flags: int, offset: int = 0) -> Segment:
        """Deliver a segment that its sender never sent, as if from `key`'s remote address.

        It has the number that `key`'s host expects next, and `offset` more, and
        with the ACK flag acknowledges all that host has sent. Needs `following`
        (or a fault) to have been set before the connection began. Raises
        `ValueError` where nothing is known of such a connection.
        """
        sent, answered = self._flows.get(key), self._flows.get((key[2], key[3], key[0], key[1]))
        receiver = self._by_address.get(key[0]) or next(
            (host for host in self.hosts.values() if host.is_local(key[0])), None
        )
        if sent is None or sent.next is None or answered is None or receiver is None:
            raise ValueError(f"no segment of {key[2]}:{key[3]} to {key[0]}:{key[1]} was seen")
        ack = (answered.next or 0) if flags & ACK else 0
        window = 0 if flags & RST else 0xFFFF
        segment = Segment(seq_add(sent.next, offset), ack, flags, window)
        self._tap(key, segment, source="forged")
        self.queue.append((receiver, key, segment))
        self.drain()
        return segment

    def cut(
        self, end: tuple[str, int], other: tuple[str, int], *, one_way: bool = False
    ) -> Callable[[], None]:
        """Lose everything between two ends from now on; what is returned mends it.

        With `one_way` only what `other` sends is lost.
        """
        cuts = [
            self.drop("any", source=source, target=target, times=None)
            for source, target in ((other, end), (end, other))[: 2 - one_way]
        ]
        # Before any fault that would strike first.
        self.faults[:] = cuts + self.faults[: -len(cuts)]

        def mend() -> None:
            for fault in cuts:
                self.faults.remove(fault)

        return mend

    def _aim(
        self,
        act: str,
        segments: str,
        seconds: float = 0.0,
        *,
        source: Place | None = None,
        target: Place | None = None,
        nth: int = 1,
        times: int | None = 1,
    ) -> Fault:
        if segments not in _KINDS:
            raise ValueError(f"not a kind of segment: {segments!r} (one of {', '.join(_KINDS)})")
        if nth < 1 or (times is not None and times < 1) or not seconds >= 0:
            raise ValueError("nth and times start at 1, and no fault lies in the past")
        for place in (source, target):
            if isinstance(place, str) and place not in self.hosts:
                try:
                    canonical(place)
                except ValueError:
                    raise ValueError(f"no host and no address: {place!r}") from None
        fault = Fault(act, segments, source, target, nth, times, seconds)
        self.faults.append(fault)
        return fault

    def _struck(self, sender: Host, receiver: Host, key: Key, segment: Segment) -> Fault | None:
        """The first fault that picks this segment."""
        last = self._follow(key, segment)
        struck = None
        for fault in self.faults:
            if (
                _KINDS[fault.segments](segment)
                and (last or fault.segments != "last-ack")
                and _at(fault.source, sender, key[2], key[3])
                and _at(fault.target, receiver, key[0], key[1])
            ):
                fault.seen += 1
                if (
                    struck is None
                    and fault.seen >= fault.first
                    and (fault.times is None or fault.done < fault.times)
                ):
                    fault.done += 1
                    struck = fault
        return struck

    def _follow(self, key: Key, segment: Segment) -> bool:
        """Note FINs and their ACKs; whether this segment is the last ACK of a close."""
        back = (key[2], key[3], key[0], key[1])
        out = self._flows.setdefault(key, _Flow())
        other = self._flows.setdefault(back, _Flow())
        if segment.flags & SYN:
            out.fin, out.acked, out.next = None, False, None
        if segment.flags & FIN:
            out.fin = seq_add(segment.seq, segment.length)
        end = seq_add(segment.seq, segment.length)
        if segment.length and (out.next is None or seq_le(out.next, end)):
            out.next = end
        if segment.flags & ACK and other.fin is not None and seq_le(other.fin, segment.ack):
            other.acked = True
            return out.fin is not None
        return False

    # Carrying.

    def send(self, sender: Host, key: Key, segment: Segment) -> None:
        """Carry a segment to whoever has `key`'s first address; to nobody, if nobody does."""
        target = key[0]
        if sender.is_local(target):
            receiver: Host | None = sender
        else:
            receiver = self._by_address.get(target)
        if receiver is None:
            self._tap(key, segment, lost=True)
            return
        fault = None
        if self.faults:
            fault = self._struck(sender, receiver, key, segment)
        elif self.following:
            self._follow(key, segment)
        if fault is not None and fault.act not in ("delay", "duplicate"):
            if fault.act == "reorder":
                self._tap(key, segment)
                self._held.setdefault(key, []).append((receiver, key, segment))
                self.clock.at(self.clock.now + fault.seconds, self._release, key)
                return
            self._tap(key, segment, lost=True)
            if fault.act != "drop":
                receiver.damaged(key, segment, fault.act)
            return
        extra = fault.seconds if fault is not None and fault.act == "delay" else 0.0
        repeat = fault.seconds if fault is not None and fault.act == "duplicate" else None
        if receiver is sender:
            if self.observers:
                self._tap(key, segment)
            extra += self.loopback
            if extra:
                self.clock.at(self.clock.now + extra, self._arrive, (receiver, key, segment))
            else:
                self.queue.append((receiver, key, segment))
        else:
            self._carry(sender, receiver, key, segment, extra)
        if repeat is not None:
            self.clock.at(self.clock.now + repeat, self._arrive, (receiver, key, segment))
        if self._held:
            # Whatever was held up comes after this one.
            if self.clock.next > self.clock.now and not extra:
                self.queue.extend(self._held.pop(key, ()))
            else:
                self.clock.at(self.clock.now + extra, self._release, key)

    def _release(self, key: Key) -> None:
        self.queue.extend(self._held.pop(key, ()))
        self.drain()

    def _carry(
        self, sender: Host, receiver: Host, key: Key, segment: Segment, extra: float
    ) -> None:
        pair = (sender.name, receiver.name)
        link = self._links.get(pair, self._link)
        if not link.up:
            self._tap(key, segment, lost=True)
            return
        when = self.clock.now + link.delay
        copies = 1
        in_order = True
        if link.loss or link.jitter or link.duplicate or link.reorder:
            dice = self._random.get(pair)
            if dice is None:
                dice = self._random[pair] = Random(f"{self.seed}/{pair[0]}/{pair[1]}")
            if link.loss and dice.random() < link.loss:
                self._tap(key, segment, lost=True)
                return
            if link.jitter:
                when += dice.random() * link.jitter
            if link.duplicate and dice.random() < link.duplicate:
                copies = 2
            if link.reorder and dice.random() < link.reorder:
                in_order = False
                when += link.delay + link.jitter
        if self.observers:
            self._tap(key, segment)
        if extra:
            when += extra
        elif in_order:
            when = self._last[pair] = max(when, self._last.get(pair, 0.0))
        if when <= self.clock.now:
            for _ in range(copies):
                self.queue.append((receiver, key, segment))
            return
        for _ in range(copies):
            self.clock.at(when, self._arrive, (receiver, key, segment))

    def _arrive(self, what: tuple[Host, Key, Segment]) -> None:
        self.queue.append(what)
        self.drain()

    def drain(self) -> None:
        """Deliver what has arrived, and what that sets off, in order."""
        if self._draining:
            return
        self._draining = True
        queue = self.queue
        try:
            while queue:
                host, key, segment = queue.popleft()
                host.arrive(key, segment)
        finally:
            self._draining = False

    def progress(self) -> object:
        """What is the same as before only if no socket has done anything meanwhile."""
        socks = [
            (
                sock.fd,
                len(sock.accepted),
                conn
                and (conn.state, conn.snd_nxt, conn.snd_una, conn.rcv_nxt, conn.readable_bytes),
            )
            for sock in self.files.values()
            for conn in (sock.conn,)
        ]
        return self.next_fd, socks

    # Being watched.

    def observe(self, callback: Callable[[Event], object] | None = None) -> Observer:
        """Watch all hosts: a context manager that yields transitions and segments.

        With `callback`, events go there as they happen; without, `read()`
        returns those since it was last called.
        """
        return Observer(self, callback)

    @property
    def events(self) -> Observer:
        """An observer that is watching already."""
        return Observer(self, None).__enter__()

    def emit(self, event: Event) -> None:
        """Tell every observer."""
        for observer in self.observers:
            observer.tell(event)

    def _tap(self, key: Key, segment: Segment, lost: bool = False, source: str = "model") -> None:
        if not self.observers:
            return
        options = segment.options
        self.emit(
            SegmentSeen(
                t=self.clock.now if self.sent_at is None else self.sent_at,
                src=(key[2], key[3]),
                dst=(key[0], key[1]),
                flags=segment.flags,
                seq=segment.seq,
                ack=segment.ack,
                length=len(segment.data),
                window=segment.window,
                ts=(options.ts_val, options.ts_ecr or 0)
                if options is not None and options.ts_val is not None
                else None,
                source=source,
                lost=lost,
            )
        )

    def watch_connections(self) -> None:
        """Have every connection report its transitions, or none if nobody watches."""
        for host in self.hosts.values():
            host.report(bool(self.observers))


class Observer:
    """Sees every transition and every segment of a network while it is entered."""

    name = "model"
    blind: tuple[str, ...] = ()
    lost = 0

    def __init__(self, network: Network, callback: Callable[[Event], object] | None) -> None:
        self._network = network
        self._seen: list[Event] = []
        self.tell: Callable[[Event], object] = callback or self._seen.append

    def __enter__(self) -> Observer:
        self._network.observers.append(self)
        self._network.watch_connections()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._network.observers.remove(self)
        self._network.watch_connections()

    def read(self) -> list[Event]:
        """All events since the last call."""
        seen = self._seen[:]
        self._seen.clear()
        return seen

    def fileno(self) -> int | None:
        """None: a model is never waited for."""
        return None

    def rows(self, port: int | None = None) -> list[Row]:
        """What netstat would show now, on all hosts."""
        return [row for host in self._network.hosts.values() for row in host.rows(port)]

    def transitions(self) -> Iterator[Transition]:
        """The transitions among what `read` would return next; they stay there."""
        return (event for event in self._seen if isinstance(event, Transition))


def _name(host: Host | str) -> str:
    return host if isinstance(host, str) else host.name


def _at(place: Place | None, host: Host, address: str, port: int) -> bool:
    """Whether a segment's end is at `place`."""
    if place is None or place is host:
        return True
    if isinstance(place, str):
        return place == host.name or place == address
    if isinstance(place, int):
        return place == port
    if isinstance(place, tuple):
        return place == (address, port)
    return False

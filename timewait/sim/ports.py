"""Who may bind, listen and connect: the port table of one host, as Linux keeps it.

Linux (6.18) decides in `inet_csk_get_port()` and, for an outgoing connection
without a port, in `__inet_hash_connect()`. Both are followed here, together
with what makes them surprising:

* A port has one *bucket* with all its owners: bound, listening and connected
  sockets, and TIME_WAIT. Two owners conflict if their addresses overlap,
  unless both set SO_REUSEADDR and the holder is not listening, or both set
  SO_REUSEPORT and belong to one user. The holder's options count as much as
  the newcomer's.
* A bucket remembers that all its owners set the option *when they bound*
  (`fast_reuse`, `fast_port`); while it does, nobody is looked at, so taking an option
  back later changes nothing.
* A port taken by an outgoing connection alone is marked -1: other outgoing
  connections may share it, `bind()` judges it like any other.
* `bind(0)` tries ports of the odd parity (from the range's low end) first,
  `connect()` those of the even one, so that they rarely meet.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from functools import cached_property
from random import Random
from typing import Final, Protocol
from zlib import crc32

from timewait.tcp.states import State

__all__ = ["Bucket", "Holder", "PortTable", "overlap"]

ANY4: Final = "0.0.0.0"
ANY6: Final = "::"

_NEVER, _STRICT, _ANY = 0, 2, 1  # a bucket's fast_port; -1: only outgoing connections


class Holder(Protocol):
    """What owns a port. An IPv4-mapped address is kept as the IPv4 address it maps."""

    @property
    def family(self) -> int:
        """AF_INET or AF_INET6."""

    @property
    def address(self) -> str:
        """Its local address; a wildcard overlaps all."""

    @property
    def port(self) -> int:
        """Its port, 0 if it has none."""

    @property
    def v6only(self) -> bool:
        """IPV6_V6ONLY."""

    @property
    def reuse_address(self) -> bool:
        """SO_REUSEADDR."""

    @property
    def reuse_port(self) -> bool:
        """SO_REUSEPORT."""

    @property
    def uid(self) -> int:
        """Whose it is."""

    @property
    def connect_bound(self) -> bool:
        """Whether connect() chose the port, not bind()."""

    @property
    def in_reuse_port_group(self) -> bool:
        """Whether it listened while SO_REUSEPORT was set."""

    @property
    def state(self) -> State:
        """The holder's state; LISTEN counts, and TIME_WAIT."""


def is_v4(address: str) -> bool:
    """Whether a canonical address is IPv4 (a mapped one is kept as IPv4)."""
    return ":" not in address


def overlap(new: Holder, old: Holder) -> bool:
    """Whether two holders' addresses could receive the same segment (`inet_rcv_saddr_equal`)."""
    a, b = new.address, old.address
    if is_v4(a) and is_v4(b):
        return not old.v6only and (a in (b, ANY4) or b == ANY4)
    if a == b:
        return True
    if new.family == socket.AF_INET:
        # An IPv6 holder counts by its IPV6_V6ONLY alone, wherever it is connected to by now.
        return not old.v6only and (b == ANY6 or a == ANY4)
    if b == ANY6 and not (old.v6only and is_v4(a)):
        return True
    return a == ANY6 and not (new.v6only and is_v4(b))


class Bucket:
    """One port's owners, and what Linux remembers of how they bound."""

    __slots__ = ("fast", "fast_port", "fast_reuse", "owners", "port")

    def __init__(self, port: int) -> None:
        self.port = port
        # A tuple while they are few, as on most ports; a dict where they are many.
        self.owners: tuple[Holder, ...] | dict[Holder, None] = ()
        self.fast_reuse = 0
        self.fast_port = 0
        # The socket whose SO_REUSEPORT is remembered: family, address, v6only, uid.
        self.fast: tuple[int, str, bool, int] | None = None

    def add(self, owner: Holder) -> None:
        """Have one more owner; once more changes nothing."""
        if owner in self.owners:
            return
        if isinstance(self.owners, dict):
            self.owners[owner] = None
        elif len(self.owners) < 4:
            self.owners = (*self.owners, owner)
        else:
            self.owners = dict.fromkeys((*self.owners, owner))

    def remove(self, owner: Holder) -> None:
        """Have one less."""
        if isinstance(self.owners, dict):
            del self.owners[owner]
        else:
            self.owners = tuple(other for other in self.owners if other is not owner)


class PortTable:
    """The ports of one host.

    `ephemeral` is the range `net.ipv4.ip_local_port_range` (both ends
    included), `reserved` what is never chosen by itself, `seed` the secret
    from which the kernel's choices are drawn.
    """

    def __init__(
        self,
        seed: str,
        *,
        ephemeral: tuple[int, int] = (32768, 60999),
        reserved: Iterable[int] = (),
    ) -> None:
        self.ephemeral = ephemeral
        self.reserved = frozenset(reserved)
        self.buckets: dict[int, Bucket] = {}
        self._seed = seed
        self._perturb: dict[int, int] = {}
        self.freed = 0  # counts what may have made a port free
        # For which outgoing connections no port of a parity was free, and when that was.
        self._full: dict[tuple[object, ...], tuple[int, float]] = {}

    @cached_property
    def _dice(self) -> Random:
        return Random(f"{self._seed}/ports")

    # Binding.

    def bind(self, new: Holder, port: int, span: tuple[int, int] | None = None) -> int:
        """Bind `new` to `port` (0: choose one) and return it; EADDRINUSE if it may not.

        Called again by listen() for a port already owned, with `new.state`
        LISTEN: the check is made again. `span` is IP_LOCAL_PORT_RANGE.
        """
        if port == 0:
            port = self._choose(new, span)
            bucket = self._bucket(port)
        else:
            bucket = self._bucket(port)
            if not self._fast(bucket, new) and self._conflict(bucket, new, True, True):
                self._discard_if_empty(bucket)
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self._remember(bucket, new)
        bucket.add(new)
        return port

    def inherit(self, parent: Holder, child: Holder) -> None:
        """An accepted connection owns its listener's port, and a TIME_WAIT its connection's.

        `child.port` is `parent.port` already.
        """
        bucket = self._bucket(parent.port)
        if not bucket.owners:
            self._remember(bucket, child)
        bucket.add(child)

    def release(self, holder: Holder) -> None:
        """Give the port back; harmless if the holder owns none."""
        bucket = self.buckets.get(holder.port)
        if bucket is None or holder not in bucket.owners:
            return
        self.freed += 1
        bucket.remove(holder)
        if bucket.owners:
            if bucket.fast_reuse >= 0 and all(o.connect_bound for o in bucket.owners):
                bucket.fast_reuse = bucket.fast_port = -1
        else:
            del self.buckets[bucket.port]

    # Connecting.

    def connect(
        self,
        new: Holder,
        remote: tuple[str, int],
        taken: Callable[[int], bool],
        span: tuple[int, int] | None = None,
        moment: float = 0.0,
    ) -> int:
        """Choose and take a port for an outgoing connection; EADDRNOTAVAIL if there is none.

        `taken(port)` tells whether the 4-tuple exists already (and settles
        whether a TIME_WAIT there may be reused). What it has told of all ports
        at a `moment` is not asked again until a port is released or the moment is
        another.
        """
        low, high = span or self.ephemeral
        step = 1 if span else 2
        count = high + 1 - low
        if step == 2 and count > 1:
            count &= ~1
        key = f"{self._seed}/{new.address}/{remote[0]}/{remote[1]}".encode()
        index = crc32(key) & 0xFFFF
        offset = (self._perturb.get(index, 0) + crc32(key[::-1])) % count
        starts = [offset] if step == 1 else [offset & ~1, offset | 1]
        if count == 1:
            starts = starts[:1]
        for start in starts:
            wanted = (new.address, remote, low, count, step, start % step)
            if self._full.get(wanted) == (self.freed, moment):
                continue
            for i in range(0, count, step):
                port = low + (start + i) % count
                if port in self.reserved:
                    continue
                bucket = self.buckets.get(port)
                if bucket is None:
                    bucket = self.buckets[port] = Bucket(port)
                    bucket.fast_reuse = bucket.fast_port = -1
                elif bucket.fast_reuse >= 0 or bucket.fast_port >= 0 or taken(port):
                    continue
                bucket.add(new)
                self.buckets[port] = bucket  # gone if the TIME_WAIT reused was its last owner
                moved = max(i, self._dice.randrange(8) * step) + step
                self._perturb[index] = self._perturb.get(index, 0) + moved
                return port
            self._full[wanted] = (self.freed, moment)
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

    # The rule.

    def _conflict(self, bucket: Bucket, new: Holder, relax: bool, reuse_port_ok: bool) -> bool:
        """Whether an owner of the bucket keeps `new` out (`inet_csk_bind_conflict`).

        `relax` lets SO_REUSEADDR count, `reuse_port_ok` SO_REUSEPORT: not
        when a port is chosen, which should be nobody else's.
        """
        group_ok = not new.in_reuse_port_group
        for old in bucket.owners:
            if old is new:
                continue
            same_user = old.state is State.TIME_WAIT or old.uid == new.uid
            if new.reuse_address and old.reuse_address and old.state is not State.LISTEN:
                allowed = relax and not (
                    not reuse_port_ok
                    and new.reuse_port
                    and old.reuse_port
                    and group_ok
                    and same_user
                )
            else:
                allowed = (
                    reuse_port_ok and new.reuse_port and old.reuse_port and group_ok and same_user
                )
            if not allowed and overlap(new, old):
                return True
        return False

    def _fast(self, bucket: Bucket, new: Holder) -> bool:
        """Whether what the bucket remembers lets `new` in unseen."""
        if not bucket.owners:
            return True
        if bucket.fast_reuse > 0 and new.reuse_address and new.state is not State.LISTEN:
            return True
        return self._matches(bucket, new)

    def _matches(self, bucket: Bucket, new: Holder) -> bool:
        """`sk_reuseport_match`: SO_REUSEPORT as the remembered socket had it."""
        if bucket.fast_port <= 0 or not new.reuse_port or new.in_reuse_port_group:
            return False
        assert bucket.fast is not None
        family, address, v6only, uid = bucket.fast
        if uid != new.uid:
            return False
        if bucket.fast_port == _ANY:
            return True
        return _covers(family, address, v6only, new)

    def _remember(self, bucket: Bucket, new: Holder) -> None:
        """`inet_csk_update_fastreuse`."""
        reuse = new.reuse_address and new.state is not State.LISTEN
        terms = (new.family, new.address, new.v6only, new.uid)
        if not bucket.owners:
            bucket.fast_reuse = int(reuse)
            bucket.fast_port = _ANY if new.reuse_port else _NEVER
            bucket.fast = terms
            return
        if not reuse:
            bucket.fast_reuse = 0
        if not new.reuse_port:
            bucket.fast_port = _NEVER
        elif not self._matches(bucket, new):
            bucket.fast_port = _STRICT
            bucket.fast = terms

    def _choose(self, new: Holder, span: tuple[int, int] | None) -> int:
        """bind(0): `inet_csk_find_open_port`; EADDRINUSE if every port is in the way."""
        low, high = span or self.ephemeral
        high += 1
        halves = [(low, high)]
        if new.reuse_address and high - low >= 4:
            half = low + ((high - low) >> 2 << 1)
            halves = [(low, half), (half, high)]
        for first, end in halves:
            count = end - first
            if count > 1:
                count &= ~1
            offset = self._dice.randrange(count) | 1
            for start in (offset, offset - 1):
                for i in range(0, count, 2):
                    port = first + start + i
                    if port >= end:
                        port -= count
                    if port in self.reserved:
                        continue
                    bucket = self.buckets.get(port)
                    if bucket is None or not self._conflict(bucket, new, False, False):
                        return port
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _bucket(self, port: int) -> Bucket:
        bucket = self.buckets.get(port)
        if bucket is None:
            bucket = self.buckets[port] = Bucket(port)
        return bucket

    def _discard_if_empty(self, bucket: Bucket) -> None:
        if not bucket.owners:
            del self.buckets[bucket.port]


def _covers(family: int, address: str, v6only: bool, new: Holder) -> bool:
    """Whether the remembered address is the newcomer's, or a wildcard over it."""
    if is_v4(address) and (is_v4(new.address) or family == socket.AF_INET):
        return not new.v6only and address in (new.address, ANY4)
    if address == new.address:
        return True
    return address == ANY6 and not (v6only and is_v4(new.address))

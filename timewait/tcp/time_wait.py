"""TIME_WAIT in 31 bytes: what is kept of a connection whose user has gone, a million at a time.

As on Linux (`struct inet_timewait_sock`), a connection in TIME_WAIT, or an
orphan in FIN_WAIT_2, needs no buffers and no timer of its own. `freeze` packs
what its future depends on into a `TimeWait`, which is a `bytes`; when a segment
comes for it, `thaw` gives a `Connection` again, so that the same table answers.

`TimeWaits` keeps them by key with their deadlines. All that wait equally long
expire in the order in which they came, so a queue for each span does what a
heap would at ten times the cost (netinet's and Linux's timers do alike).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from heapq import heappop, heappush
from struct import Struct
from typing import Final, Generic, TypeVar

from timewait.tcp.connection import Connection
from timewait.tcp.profiles import Profile
from timewait.tcp.segment import Segment
from timewait.tcp.states import State

__all__ = ["TimeWait", "TimeWaits"]

# 31 bytes and the 33 of an empty `bytes` fill a 64-byte block.
_LAYOUT: Final = Struct("<dIIIIIHB")
_DEADLINE: Final = Struct("<d")
_pack = _LAYOUT.pack
_FLAGS: Final = _LAYOUT.size - 1
_FIN_WAIT_2, _TIMESTAMPS, _PASSIVE = 16, 32, 64
_MASK: Final = 0xFFFFFFFF
_NEVER: Final = 0xFFFFFFFF
_MS, _COUNT = 0x0FFFFFFF, 28  # of challenge ACKs: when the first was sent, and how many
_INF: Final = float("inf")


def _freeze(c: Connection) -> bytes:
    challenged = c.last_challenge
    window = ((c.rcv_adv - c.rcv_nxt) & _MASK) >> c.rcv_scale
    return _pack(
        c.t_wait,
        c.snd_nxt,
        c.rcv_nxt,
        c.ts_recent,
        c.ts_offset,
        _NEVER
        if challenged == -_INF
        else int(challenged * 1000) & _MS | min(c.challenges, 14) << _COUNT,
        window if window < 0xFFFF else 0xFFFF,
        c.rcv_scale
        | (c.state is State.FIN_WAIT_2 and _FIN_WAIT_2)
        | (c.timestamps and _TIMESTAMPS)
        | (c.passive and _PASSIVE),
    )


class TimeWait(bytes):
    """A connection in TIME_WAIT, or an orphan in FIN_WAIT_2, as a value.

    A change (a restarted 2MSL, the FIN that ends FIN_WAIT_2) makes a new one.
    """

    __slots__ = ()

    @classmethod
    def freeze(cls, connection: Connection) -> TimeWait:
        """What is left of `connection`, which is in TIME_WAIT or an orphan in FIN_WAIT_2."""
        return cls(_freeze(connection))

    def thaw(self, profile: Profile, now: float, outbox: list[Segment] | None = None) -> Connection:
        """The connection again, to be told of a segment at `now` (and frozen afterwards)."""
        deadline, snd_nxt, rcv_nxt, ts_recent, ts_offset, challenged, window, flags = (
            _LAYOUT.unpack(self)
        )
        connection = Connection(profile, iss=snd_nxt, outbox=outbox)
        connection.become(State.FIN_WAIT_2 if flags & _FIN_WAIT_2 else State.TIME_WAIT)
        connection.rcv_nxt = connection.rcv_wup = rcv_nxt
        connection.rcv_scale = flags & 15
        connection.rcv_adv = (rcv_nxt + (window << connection.rcv_scale)) & _MASK
        connection.rcv_buf = window << connection.rcv_scale
        connection.ts_recent = ts_recent
        connection.ts_offset = ts_offset
        connection.timestamps = bool(flags & _TIMESTAMPS)
        connection.passive = bool(flags & _PASSIVE)
        connection.orphaned = connection.write_shut = True
        connection.fin_received = not flags & _FIN_WAIT_2
        if challenged != _NEVER:
            connection.last_challenge = now - (int(now * 1000) - challenged & _MS) / 1000
            connection.challenges = challenged >> _COUNT
        connection.t_wait = deadline
        return connection

    @property
    def state(self) -> State:
        """TIME_WAIT or FIN_WAIT_2."""
        return State.FIN_WAIT_2 if self[_FLAGS] & _FIN_WAIT_2 else State.TIME_WAIT

    @property
    def deadline(self) -> float:
        """When it is over, in seconds on the owner's clock."""
        when: float = _DEADLINE.unpack_from(self)[0]
        return when

    @property
    def timestamps(self) -> bool:
        """Whether the connection used timestamps, without which no port is reused early."""
        return bool(self[_FLAGS] & _TIMESTAMPS)

    @property
    def next_iss(self) -> int:
        """An initial sequence number above the old incarnation's (RFC 6191 §2)."""
        snd_nxt: int = _LAYOUT.unpack(self)[1]
        return (snd_nxt + 65537) & _MASK

    @property
    def ts_recent(self) -> int:
        """The newest timestamp that the peer sent."""
        recent: int = _LAYOUT.unpack(self)[3]
        return recent


Key = TypeVar("Key", bound=Hashable)


class TimeWaits(Generic[Key]):
    """Many `TimeWait`s of one stack, by their owner's key (a connection's addresses, say).

    `expire(now)` forgets those that are due, at constant cost each.
    """

    __slots__ = ("_odd", "_queue", "_records", "_stale", "profile")

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        # Plain bytes: an instance of a subclass would cost 24 bytes more.
        self._records: dict[Key, bytes] = {}
        # Keys in TIME_WAIT, all for the same span: the oldest is the first to go.
        self._queue: deque[Key] = deque()
        # How many of a key's entries in the queue no longer mean anything.
        self._stale: dict[Key, int] = {}
        # FIN_WAIT_2 may last differently long: (deadline, key).
        self._odd: list[tuple[float, int, Key]] = []

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._records)

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def get(self, key: Key) -> TimeWait | None:
        """The record of that key, None where there is none."""
        record = self._records.get(key)
        return None if record is None else TimeWait(record)

    def items(self) -> Iterator[tuple[Key, TimeWait]]:
        """All records with their keys, oldest first."""
        return ((key, TimeWait(record)) for key, record in self._records.items())

    def add(self, key: Key, connection: Connection) -> None:
        """Keep what is left of a connection in TIME_WAIT, or of an orphan in FIN_WAIT_2.

        Raises `ValueError` for a connection in another state.
        """
        state = connection.state
        if state is not State.TIME_WAIT and state is not State.FIN_WAIT_2:
            raise ValueError(f"a connection in {state} is not to be kept here")
        if key in self._records:
            self.discard(key)
        self._records[key] = _freeze(connection)
        if state is State.TIME_WAIT:
            self._queue.append(key)
        else:
            heappush(self._odd, (connection.t_wait, id(key), key))

    def discard(self, key: Key) -> None:
        """Forget that key before its time: its port is taken over, or the bucket is full."""
        if not self._records.pop(key)[_FLAGS] & _FIN_WAIT_2:
            self._stale[key] = self._stale.get(key, 0) + 1

    def segment(
        self, key: Key, seg: Segment, now: float, outbox: list[Segment], *, listening: bool
    ) -> Connection:
        """Let that key's connection take a segment; `listening`: a SYN may open it anew.

        The answer is the connection as it is afterwards: in TIME_WAIT or
        FIN_WAIT_2 it is still kept here; CLOSED, it is gone; in SYN_RECEIVED it
        is a new incarnation, and the caller's.
        """
        record = TimeWait(self._records[key])
        connection = record.thaw(self.profile, now, outbox)
        connection.passive = listening
        connection.segment(seg, now)
        state = connection.state
        if state is State.CLOSED or state is State.SYN_RECEIVED:
            self.discard(key)
        elif state is not record.state or connection.t_wait != record.deadline:
            self.add(key, connection)
        else:
            self._records[key] = _freeze(connection)
        return connection

    @property
    def deadline(self) -> float | None:
        """When `expire` is due, None while nothing is kept."""
        self._drop_stale()
        times = []
        if self._queue:
            times.append(_DEADLINE.unpack_from(self._records[self._queue[0]])[0])
        if self._odd:
            times.append(self._odd[0][0])
        return min(times, default=None)

    def expire(self, now: float) -> list[Key]:
        """Forget those whose time is over; their keys, the earliest first."""
        over: list[Key] = []
        records, queue = self._records, self._queue
        while True:
            if self._stale or self._odd:
                self._drop_stale()
                while self._odd and self._odd[0][0] <= now:
                    key = heappop(self._odd)[2]
                    del records[key]
                    over.append(key)
                    self._drop_stale()
            if not queue or _DEADLINE.unpack_from(records[queue[0]])[0] > now:
                return over
            key = queue.popleft()
            del records[key]
            over.append(key)

    def _drop_stale(self) -> None:
        """Let no entry stand first whose record is gone or has another deadline."""
        queue, stale = self._queue, self._stale
        while stale and queue and queue[0] in stale:
            key = queue.popleft()
            stale[key] -= 1
            if not stale[key]:
                del stale[key]
        while self._odd:
            deadline, _, key = self._odd[0]
            record = self._records.get(key)
            if record is not None and _DEADLINE.unpack_from(record)[0] == deadline:
                break
            heappop(self._odd)

"""Virtual time and its queue: nothing waits here, the clock jumps to what is due next.

Entries are never cancelled. Whoever asked to be woken looks again when woken
and asks anew if it came too early: a retransmission timer that every
acknowledgment moves costs nothing that way. Timeouts of one constant length
(2MSL above all) are asked for in the order in which they fall due, so they
wait in a deque each, not in the heap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, Final, TypeAlias

__all__ = ["Clock"]

INF: Final = float("inf")

_Entry: TypeAlias = tuple[float, int, Callable[[Any], object], Any]


class Clock:
    """Seconds since the simulation began, and what is due when.

    Entries due at the same instant run in the order they were asked for.
    """

    __slots__ = ("_asked", "_heap", "_lanes", "next", "now")

    now: float
    next: float  # when the next entry is due; infinity if nothing is

    def __init__(self) -> None:
        self.now = 0.0
        self.next = INF
        self._asked = 0
        self._heap: list[_Entry] = []
        self._lanes: dict[float, deque[_Entry]] = {}

    def at(self, when: float, callback: Callable[[Any], object], argument: Any) -> None:
        """Call `callback(argument)` at `when` seconds (at once if that is past)."""
        self._asked += 1
        heappush(self._heap, (when, self._asked, callback, argument))
        if when < self.next:
            self.next = when

    def after(self, seconds: float, callback: Callable[[Any], object], argument: Any) -> None:
        """Call `callback(argument)` in `seconds`, a length that many others wait too."""
        self._asked += 1
        lane = self._lanes.get(seconds)
        if lane is None:
            lane = self._lanes[seconds] = deque()
        when = self.now + seconds
        lane.append((when, self._asked, callback, argument))
        if when < self.next:
            self.next = when

    def run_until(self, when: float) -> bool:
        """Move to the next instant with something due, `when` at the latest, and run it.

        Returns whether anything was run. Time never goes back: with `when` in
        the past, what is due now is run.
        """
        if self.next > when and self.next > self.now:
            self.now = max(self.now, when)
            return False
        self.now = max(self.now, self.next)
        while self.next <= self.now:
            head = self._head()
            assert head is not None
            entry, lane = head
            if lane is None:
                heappop(self._heap)
            else:
                lane.popleft()
            head = self._head()
            self.next = INF if head is None else head[0][0]
            entry[2](entry[3])
        return True

    def _head(self) -> tuple[_Entry, deque[_Entry] | None] | None:
        """The entry due first and the lane it waits in (None: the heap)."""
        first: _Entry | None = self._heap[0] if self._heap else None
        where: deque[_Entry] | None = None
        for lane in self._lanes.values():
            if lane and (first is None or lane[0] < first):
                first, where = lane[0], lane
        return None if first is None else (first, where)

    def __len__(self) -> int:
        return len(self._heap) + sum(map(len, self._lanes.values()))

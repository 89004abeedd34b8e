"""Observers whose clocks differ a little: what they saw, in every order that fits.

Each observer's own order stands. What two of them saw at about the same time
may have happened either way round, so when the order of the stamps explains
nothing, the others are tried.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from timewait.check.explanations import Explanations

__all__ = ["Entry", "in_any_order", "lane"]

# An observation: its time, the mode, the symbol, the event, and the set that it was made of.
Entry: TypeAlias = tuple[float, int, int, Any, int]


def lane(symbol: int) -> int:
    """Whose observation this is: the segments', the transitions', the looks', the calls'."""
    return (0, 1, 2, 2, 3)[symbol >> 9]


# By how much an observation may have been made before one of another lane that has an earlier
# time. A look at a table is given its time when the table has been read; a capture has a clock
# of its own; calls and transitions are timed by one clock.
_EARLIER: Final = (
    # segments, transitions, looks, calls
    (0.0, 0.0002, 0.0002, 0.0002),  # segments
    (0.0002, 0.0, 0.0, 0.0),  # transitions
    (0.05, 0.05, 0.0, 0.0),  # looks
    (0.0002, 0.0, 0.0, 0.0),  # calls
)


def in_any_order(model: Explanations, base: int, entries: list[Entry]) -> int:
    """The set after these observations, each observer's in its own order; 0 if none explains."""
    lanes: dict[int, list[Entry]] = {}
    for entry in entries:
        lanes.setdefault(lane(entry[2]), []).append(entry)
    kinds, queues = list(lanes), list(lanes.values())
    reached: dict[tuple[int, ...], set[int]] = {tuple(0 for _ in queues): {base}}
    for _ in entries:
        following: dict[tuple[int, ...], set[int]] = {}
        for places, numbers in reached.items():
            waiting = [q[i][0] for q, i in zip(queues, places, strict=True) if i < len(q)]
            first = min(waiting)
            for which, queue in enumerate(queues):
                at = places[which]
                if at == len(queue):
                    continue
                t, mode, symbol, _, _ = queue[at]
                if t > first and any(
                    t - other[places[i]][0] > _EARLIER[kinds[which]][kinds[i]]
                    for i, other in enumerate(queues)
                    if i != which and places[i] < len(other)
                ):
                    continue
                found = {model.follow(mode, model.close(mode, n), symbol) for n in numbers} - {0}
                if found:
                    then = (*places[:which], at + 1, *places[which + 1 :])
                    following.setdefault(then, set()).update(found)
        reached = following
    ends = {n for numbers in reached.values() for n in numbers}
    if len(ends) <= 1:
        return ends.pop() if ends else 0
    return model.number(pair for n in ends for pair in model.members(n))

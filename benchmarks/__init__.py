"""The project's own speed, as ratios measured in one run.

Each file here measures one room and exposes `measure(quick) -> Iterator[Figure]`;
`python -m benchmarks` runs them and writes one table. A figure sets ours beside
a peer's *in the same run*, because this and every machine's speed drifts.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from attrs import frozen

__all__ = ["Figure", "rate", "side_by_side"]


@frozen
class Figure:
    """One row: a rate (or, where `lower_is_better`, a cost or size) of ours and of a peer.

    `theirs` is None where the peer is not installed or there is none; `target`
    is the ratio ours/theirs to reach (an upper bound where `lower_is_better`),
    or where there is no peer the value of ours itself.
    """

    what: str
    ours: float
    unit: str
    peer: str = ""
    theirs: float | None = None
    target: float | None = None
    lower_is_better: bool = False
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Ours divided by theirs; None without a peer."""
        return self.ours / self.theirs if self.theirs else None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None where there is none or no peer to hold against."""
        value = self.ratio if self.peer else self.ours
        if self.target is None or value is None:
            return None
        return value <= self.target if self.lower_is_better else value >= self.target


def rate(work: Callable[[int], object], n: int) -> float:
    """How many of `n` units of `work(n)` are done in a second, the collector quiet meanwhile."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        work(n)
        return n / (time.perf_counter() - start)
    finally:
        gc.enable()


def side_by_side(*works: tuple[Callable[[int], object], int], rounds: int = 5) -> tuple[float, ...]:
    """The median rate of each `(work, n)`, run in turn A B B A after one warm-up each.

    In turn, so that a machine that slows down slows all of them, and none comes always first.
    """
    for work, n in works:
        work(max(1, n // 10))
    rates = []
    for number in range(rounds):
        order = works if number % 2 == 0 else works[::-1]
        row = [rate(work, n) for work, n in order]
        rates.append(row if order is works else row[::-1])
    return tuple(sorted(column)[rounds // 2] for column in zip(*rates, strict=True))

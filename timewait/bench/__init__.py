"""`python -m timewait.bench`: what does each way of closing a connection cost?

Closed loop, on this machine's kernel: connections are opened, closed in one of
seven orders, one after the other, and looked at until they have settled. Each
figure stands beside what the model foretells for it.

`ends` is how programs hold connections (plain sockets, asyncio, anyio, uvloop,
trio), `closes` times the seven orders, `ports` asks how long a port stays
unbindable and how many connections a second it bears, `tables`, `plot` and
`__main__` show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import median, quantiles

from attrs import frozen

__all__ = ["Stat"]


@frozen
class Stat:
    """Many measurements of one thing, in seconds: the median and how sure it is.

    They are made in several passes, some time apart. `low` and `high` are what
    the median may be: the notches of a box plot, the median ± 1.57 times the
    interquartile range over the root of `count` (McGill, Tukey and Larsen,
    1978), and no less than where the passes' own medians lie, which tell of a
    machine that is busier at one time than at another. `quantiles` are the
    spread itself, from the least to the greatest in 21 steps of 5 %.
    """

    count: int
    median: float
    low: float
    high: float
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, *passes: Sequence[float]) -> Stat | None:
        """The statistics of some passes' values; None of none."""
        data = sorted(value for each in passes for value in each)
        if not data:
            return None
        middle = median(data)
        cuts = quantiles(data, n=20, method="inclusive") if len(data) > 1 else [middle] * 19
        notch = 1.57 * (cuts[14] - cuts[4]) / sqrt(len(data))
        medians = [median(each) for each in passes if each]
        return cls(
            len(data),
            middle,
            min(middle - notch, *medians),
            max(middle + notch, *medians),
            (data[0], *cuts, data[-1]),
        )

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        half = (self.quantiles[15] - self.quantiles[5]) / 2
        return half / self.median if self.median else 0.0

    def differs(self, other: Stat) -> bool:
        """Whether the medians differ by more than noise explains."""
        return self.high < other.low or other.high < self.low

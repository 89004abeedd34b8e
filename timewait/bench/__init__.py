"""`python -m timewait.bench`: what does each way of closing a connection cost?

Closed loop, on this machine's kernel: connections are opened, closed in one of
seven orders, one after the other, and looked at until they have settled. Each
figure stands beside what the model foretells for it.

`ends` is how programs hold connections (plain sockets, asyncio, anyio, uvloop,
trio), `closes` times the seven orders, `ports` asks how long a port stays
unbindable and how many connections a second it bears, `report`, `compare`
and `plot` show it, `command` is what people call.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, quantiles

from attrs import frozen

__all__ = ["Stat"]


@frozen
class Stat:
    """Many measurements of one thing, in seconds: their median, and how sure it is.

    They are made in several passes, some time apart; `passes` are the medians
    of each, which tell of a machine that is busier at one time than at
    another. `quantiles` are the spread itself, from the least to the greatest
    in 21 steps of 5 %.
    """

    count: int
    median: float
    passes: tuple[float, ...]
    quantiles: tuple[float, ...]

    @classmethod
    def of(cls, *passes: Sequence[float]) -> Stat | None:
        """The statistics of some passes' values; None of none."""
        data = sorted(value for each in passes for value in each)
        if not data:
            return None
        middle = median(data)
        cuts = quantiles(data, n=20, method="inclusive") if len(data) > 1 else [middle] * 19
        medians = tuple(median(each) for each in passes if each)
        return cls(len(data), middle, medians, (data[0], *cuts, data[-1]))

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        half = (self.quantiles[15] - self.quantiles[5]) / 2
        return half / self.median if self.median else 0.0

"""How coarse the kernel's timers are: the tick, and the wheel that keeps long ones.

A TIME_WAIT of 60 s really lasts up to 62.05 s on a kernel with 250 ticks a
second, because Linux keeps its timers in a wheel whose steps grow with the
distance (kernel/time/timer.c), and a timer fires at the end of its step, never
before it is due. A measured span is therefore held against
`[due, due + wheel_step(due)]`.
"""

from __future__ import annotations

import time
from typing import Final

__all__ = ["tick", "wheel_step"]

_COARSE: Final = 6  # CLOCK_MONOTONIC_COARSE, which advances by ticks (clock_getres(2))
_LEVEL_BITS: Final = 6  # LVL_BITS
_LEVEL_SHIFT: Final = 3  # LVL_CLK_SHIFT
_LEVELS: Final = 9  # LVL_DEPTH where HZ > 100


def tick() -> float:
    """The seconds of one tick of this kernel, 1/HZ. Raises `OSError` elsewhere than on Linux."""
    return time.clock_getres(_COARSE)


def wheel_step(seconds: float, of: float | None = None) -> float:
    """By how many seconds a timer set for so many may be late; `of` is the tick's length.

    timer.c, calc_wheel_index(): level n begins at `LVL_START(n)` ticks, 63 << 3(n - 1),
    and its steps are `LVL_GRAN(n)`, 1 << 3n.
    """
    of = of or tick()
    ticks = seconds / of
    level = 0
    while level < _LEVELS - 1 and ticks >= ((1 << _LEVEL_BITS) - 1) << (_LEVEL_SHIFT * level):
        level += 1
    return of * (1 << (_LEVEL_SHIFT * level))

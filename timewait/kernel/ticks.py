"""How coarse the kernel's timers are: the tick, and the wheel that keeps long ones.

A TIME_WAIT of 60 s really lasts up to 62.05 s on a kernel with 250 ticks a
second, because Linux keeps its timers in a wheel whose steps grow with the
distance (kernel/time/timer.c), and a timer fires at the end of its step, never
before it is due. A measured span is therefore held against
`[due, due + wheel_step(due)]`.
"""

from __future__ import annotations

import os
import time
from functools import cache
from math import ceil
from typing import Final

__all__ = ["fires_in", "jiffies", "present", "tick", "wheel_step"]

_COARSE: Final = 6  # CLOCK_MONOTONIC_COARSE, which advances by ticks (clock_getres(2))
_LEVEL_BITS: Final = 6  # LVL_BITS
_LEVEL_SHIFT: Final = 3  # LVL_CLK_SHIFT
_LEVELS: Final = 9  # LVL_DEPTH where HZ > 100


@cache
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


def fires_in(left: float, of: float, now: int | None = None) -> float:
    """When a timer with `left` seconds until it is due, set for `of` seconds, really fires.

    At the end of the step that it is due in: steps are counted from where
    jiffies are 0 (timer.c, calc_index()). `now` is in jiffies, the present if
    not given. Raises `OSError` elsewhere than on Linux.
    """
    second = 1 / tick()
    now = jiffies() if now is None else now
    step = round(wheel_step(of) * second)
    due = now + round(left * second)
    return ((due // step + 1) * step - now) / second


def jiffies() -> int:
    """The kernel's count of its ticks, which its timers are set by."""
    return present()[0]


def present() -> tuple[int, float]:
    """The present tick: its number in jiffies, and when it began, in `time.monotonic`'s seconds."""
    began = time.clock_gettime(_COARSE)
    return round(began / tick()) + _ahead(), began


@cache
def _ahead() -> int:
    """By how many ticks jiffies are ahead of CLOCK_MONOTONIC, which they are counted by.

    times(2) tells jiffies in hundredths of a second, rounded down. Each look at both
    clocks within one tick is a bound, and a few looks leave one number, however long
    it was from one to the next. It may be one too few or too many: the two are counted from
    moments of their own, and a kernel that was idle counts both up when it wakes.
    """
    told_in = 1 / (tick() * os.sysconf("SC_CLK_TCK"))  # ticks
    least, most = -(1 << 63), 1 << 63
    while least != most:
        now = time.clock_gettime(_COARSE)
        told = round(os.times().elapsed * os.sysconf("SC_CLK_TCK"))
        if time.clock_gettime(_COARSE) == now:
            ticks = round(now / tick())
            least = max(least, ceil(round(told * told_in, 3)) - ticks)
            most = min(most, ceil(round((told + 1) * told_in, 3)) - 1 - ticks)
        if least > most:  # a look between the count of a tick and its show on the clock
            least, most = -(1 << 63), 1 << 63
        time.sleep(tick() / 4)
    return least

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from timewait.kernel import ticks
from timewait.kernel.ticks import fires_in, jiffies, tick, wheel_step


@pytest.mark.parametrize(
    ("hz", "step"),
    [(100, 5.12), (250, 2.048), (300, 512 / 300), (1000, 4.096)],
)
def test_a_time_wait_may_be_late_by_a_step_of_the_wheel(hz: int, step: float) -> None:
    assert wheel_step(60, 1 / hz) == pytest.approx(step)


@pytest.mark.parametrize(
    ("ticks", "step"),
    [(1, 1), (62, 1), (63, 8), (503, 8), (504, 64), (4031, 64), (4032, 512), (32255, 512)],
)
def test_the_levels_begin_where_the_kernels_do(ticks: int, step: int) -> None:
    assert wheel_step(ticks, 1.0) == step


def test_the_tick_is_one_of_those_kernels_are_built_with() -> None:
    assert round(1 / tick()) in (100, 250, 300, 1000)


@pytest.mark.parametrize(
    ("due", "now", "fires"),
    [  # at 250 Hz, a timer of 60 s: in steps of 512 ticks, at the end of the one it is due in
        (15_000, 1024, 15_360),
        (512 * 20 - 1, 1024, 512 * 20),
        (512 * 20, 1024, 512 * 21),
        (1024, 1024, 1536),
        (0, 1500, 1536),  # over, and not yet fired
    ],
)
def test_a_timer_fires_at_the_end_of_its_step(
    due: int, now: int, fires: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ticks, "tick", lambda: 0.004)
    left = max(due - now, 0) * 0.004
    assert fires_in(left, 60.0, now) == pytest.approx((fires - now) * 0.004)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not Path("/proc/timer_list").exists(),
    reason="only root is shown the kernel's own jiffies",
)
def test_jiffies_are_the_kernels() -> None:
    ticks._ahead.cache_clear()
    before = jiffies()
    told = Path("/proc/timer_list").read_text().partition("\njiffies:")[2]
    assert before - 2 <= int(told.split()[0]) <= jiffies() + 2


@pytest.mark.skipif(sys.platform != "linux", reason="jiffies are Linux's")
def test_they_are_found_alike_at_any_time() -> None:
    found = set()
    for _ in range(20):
        ticks._ahead.cache_clear()
        found.add(ticks._ahead())
    assert max(found) - min(found) <= 1  # an idle kernel counts the two clocks up when it wakes


@pytest.mark.skipif(sys.platform != "linux", reason="jiffies are Linux's")
def test_a_look_that_contradicts_the_others_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    right, times, wrong = ticks._ahead(), os.times, [0.05]

    def once_too_late() -> SimpleNamespace:
        return SimpleNamespace(elapsed=times().elapsed + (wrong.pop() if wrong else 0))

    monkeypatch.setattr(os, "times", once_too_late)
    ticks._ahead.cache_clear()
    assert abs(ticks._ahead() - right) <= 1

import pytest

from timewait.kernel.ticks import tick, wheel_step


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

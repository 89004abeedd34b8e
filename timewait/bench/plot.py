"""Draws a benchmark: who is in which state when, and how the times are distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from timewait.bench.closes import COURSES, Foretold
from timewait.bench.report import Report

__all__ = ["draw"]

COLOURS: Final = {
    "ESTABLISHED": "#5aa469",
    "FIN_WAIT_1": "#9ecae1",
    "FIN_WAIT_2": "#3182bd",
    "CLOSING": "#756bb1",
    "TIME_WAIT": "#e6a117",
    "CLOSE_WAIT": "#c51b8a",
    "LAST_ACK": "#fbb4b9",
}
_FIRST, _LAST = 1e-6, 100.0  # seconds shown
_BELOW: Final = (0.5, -0.14)  # where the legends are, under the axes


def draw(found: Report, path: str) -> None:
    """Write an SVG or PNG file, as the path's suffix says. Raises `OSError`."""
    courses = [name for name in COURSES if any(c.course == name for c in found.closes)]
    figure = Figure(figsize=(14, 2.5 + 0.9 * max(len(courses), 3)), layout="constrained")
    states, times = figure.subplots(1, 2, width_ratios=(3, 2))
    _states(states, found, courses)
    _times(times, found, courses)
    figure.suptitle(
        f"What each way of closing costs: {found.machine['system']}, "
        f"Python {found.machine['python']}"
    )
    figure.savefig(path)


def _states(axes: Any, found: Report, courses: list[str]) -> None:
    """For each course the states of both ends, as the model goes through them."""
    for row, name in enumerate(reversed(courses)):
        model = next(close.model for close in found.closes if close.course == name)
        for side, height in (("server", row + 0.18), ("client", row - 0.18)):
            for since, until, state in _spans(model, side):
                axes.barh(height, until - since, left=since, height=0.3, color=COLOURS[state])
            axes.text(_FIRST * 1.05, height, side, va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(_FIRST, _LAST)
    axes.set_yticks(range(len(courses)), list(reversed(courses)))
    axes.set_xlabel("seconds since the close call, on the model")
    axes.set_title("who is in which state")
    handles = [Patch(color=colour, label=state) for state, colour in COLOURS.items()]
    axes.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=_BELOW, ncol=4)


def _spans(model: Foretold, side: str) -> Iterator[tuple[float, float, str]]:
    since, state = _FIRST, "ESTABLISHED"
    for t, who, new in model.moves:
        if who == side:
            if state in COLOURS and t > since:
                yield since, t, state
            since, state = max(t, _FIRST), new
    if state in COLOURS:
        yield since, _LAST, state


def _times(axes: Any, found: Report, courses: list[str]) -> None:
    """For each course and kind the time until settled: median, quartiles, 5 % to 95 %."""
    kinds = list(dict.fromkeys(close.kind for close in found.closes))
    palette = matplotlib.colormaps["tab10"]
    for close in found.closes:
        if close.settled is None or close.family != "ipv4":
            continue
        if close.connections != found.shown:
            continue
        colour = palette(kinds.index(close.kind))
        place = len(courses) - 1 - courses.index(close.course)
        y = place + 0.35 - 0.7 * (kinds.index(close.kind) + 0.5) / len(kinds)
        spread = close.settled.quantiles
        axes.plot((spread[1], spread[19]), (y, y), color=colour, lw=1)
        axes.plot((spread[5], spread[15]), (y, y), color=colour, lw=4, alpha=0.6)
        axes.plot(close.settled.median, y, "o", color=colour, ms=4)
    axes.set_xscale("log")
    axes.set_yticks(range(len(courses)), list(reversed(courses)))
    axes.set_xlabel("seconds from the close call until settled, on the kernel")
    axes.set_title(f"{found.shown} connections open, IPv4")
    handles = [Patch(color=palette(number), label=kind) for number, kind in enumerate(kinds)]
    axes.legend(handles=handles, fontsize=7, loc="upper center", bbox_to_anchor=_BELOW, ncol=5)

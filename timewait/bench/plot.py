"""Draws a benchmark: who is in which state when, and how the times are distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullFormatter

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
_BELOW: Final = (0.5, -0.1)  # where the legends are, under the axes
_TICKS: Final = {
    10.0**power: f"{10 ** (power % 3):g} {unit}"
    for power, unit in [(-6, "µs"), (-5, "µs"), (-4, "µs"), (-3, "ms"), (-2, "ms"), (-1, "ms"),
                        (0, "s"), (1, "s"), (2, "s")]
}  # fmt: skip


def draw(found: Report, path: str) -> None:
    """Write an SVG or PNG file, as the path's suffix says. Raises `OSError`."""
    courses = [name for name in COURSES if any(c.course == name for c in found.closes)]
    figure = Figure(figsize=(14, 2.2 + 0.8 * max(len(courses), 3)), layout="constrained", dpi=110)
    states, times = figure.subplots(1, 2, width_ratios=(3, 2))
    _states(states, found, courses)
    _times(times, found, courses)
    for axes in (states, times):
        axes.set_yticks(range(len(courses)), list(reversed(courses)))
        axes.set_ylim(-0.6, len(courses) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"What each way of closing costs: {found.machine['system']}, "
        f"Python {found.machine['python']}"
    )
    figure.savefig(path)


def _logarithmic(axes: Any, first: float, last: float) -> None:
    axes.set_xscale("log")
    ticks = {at: text for at, text in _TICKS.items() if first <= at <= last}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(first, last)


def _states(axes: Any, found: Report, courses: list[str]) -> None:
    """For each course the states of both ends, as the model goes through them."""
    _logarithmic(axes, _FIRST, _LAST)
    refused = {b.course: b.model.blocked for b in found.binds if not b.reuse_address}
    used = set()
    for row, name in enumerate(reversed(courses)):
        model = next(close.model for close in found.closes if close.course == name)
        for side, height in (("server", row + 0.18), ("client", row - 0.18)):
            for since, until, state in _spans(model, side):
                used.add(state)
                axes.barh(height, until - since, left=since, height=0.32, color=COLOURS[state])
            axes.text(_FIRST * 1.1, height, side, va="center", fontsize=7)
        if refused.get(name):
            axes.text(50, row + 0.18, f"port refused for {refused[name]:.0f} s without "
                      "SO_REUSEADDR", va="center", ha="right", fontsize=7)  # fmt: skip
    axes.set_xlabel("since the close call, on the model")
    axes.set_title("who is in which state", fontsize=11)
    handles = [Patch(color=COLOURS[state], label=state) for state in COLOURS if state in used]
    axes.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=_BELOW,
                ncol=4, frameon=False)  # fmt: skip


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
    shown = [c for c in found.closes if c.family == "ipv4" and c.connections == found.shown]
    kinds = list(dict.fromkeys(close.kind for close in shown))
    palette = matplotlib.colormaps["tab10"]
    _logarithmic(axes, _FIRST, 1.0)
    for close in shown:
        row = len(courses) - 1 - courses.index(close.course)
        axes.plot((close.model.settled,) * 2, (row - 0.38, row + 0.38), color="black", lw=1)
        if close.settled is None:
            continue
        colour = palette(kinds.index(close.kind))
        y = row + 0.35 - 0.7 * (kinds.index(close.kind) + 0.5) / len(kinds)
        spread = close.settled.quantiles
        axes.plot((spread[1], spread[19]), (y, y), color=colour, lw=1)
        axes.plot((spread[5], spread[15]), (y, y), color=colour, lw=4, alpha=0.6)
        axes.plot(close.settled.median, y, "o", color=colour, ms=4)
    axes.set_xlabel("from the close call until settled, on the kernel: median, 50 %, 90 %")
    axes.set_title(f"{found.shown} connections open, IPv4", fontsize=11)
    handles: list[Any] = [Patch(color=palette(n), label=kind) for n, kind in enumerate(kinds)]
    handles.append(Line2D([], [], color="black", lw=1, label="the model"))
    axes.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=_BELOW,
                ncol=6, frameon=False)  # fmt: skip

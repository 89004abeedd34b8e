"""What has changed between two benchmarks, noise considered.

What disturbs a machine lasts longer than a close and shorter than a pass, so
the medians of the passes, not the single closes, are what can be counted as
independent. Their logarithms scatter alike whatever is timed; how much, all
figures of both documents tell together. But a run is off as a whole as well,
which two documents cannot tell: the less, the longer it lasts, and how much
is a constant, measured on many.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import exp, log, sqrt
from statistics import NormalDist, fmean, median, variance
from typing import Any, Final

from attrs import frozen
from cattrs import Converter
from rich.console import Group, RenderableType
from rich.text import Text

from timewait.bench import Stat
from timewait.bench.closes import TIMES
from timewait.bench.report import SCHEMA, Report, grid, seconds, titled

__all__ = ["Change", "Comparison", "compare"]

_CONVERTER: Final = Converter(detailed_validation=False)
_RUN: Final = 0.21  # by how much a run of a second is off as a whole (standard deviation)
_ALARMS: Final = 0.05  # how often any figure at all may be said to have changed by mistake


@frozen
class Change:
    """A figure that noise does not explain: medians in seconds, `ratio` now to then."""

    figure: str
    then: float
    now: float
    ratio: float


@frozen
class Comparison:
    """What changed, and how many figures did not; or could not be told to.

    `alike` are as they were, as far as can be told: as a rule what differs by
    the factor `step` would be told (None where nothing was compared).
    `single_pass` were measured in fewer than two passes in one of the two,
    `in_one_only` in only one of them.
    """

    changed: list[Change]
    alike: int
    step: float | None
    single_pass: int
    in_one_only: int
    same_machine: bool

    def table(self) -> RenderableType:
        """For people."""
        if self.step is None:
            lines = ["nothing could be compared"]
        else:
            lines = [
                f"{self.alike} figures are as they were, within the noise "
                f"(as a rule a factor of {self.step:.2f})"
            ]
        if self.single_pass:
            lines.append(
                f"{self.single_pass} were measured in a single pass and are not compared: "
                "give both runs more --seconds"
            )
        if self.in_one_only:
            lines.append(f"{self.in_one_only} are in one of the two only")
        if not self.same_machine:
            lines.append("another machine, kernel or Python: the figures are not of a kind")
        foot = Text("\n" + "\n".join(lines), "dim")
        if not self.changed:
            return foot
        table = grid("", "then", "now", "change")
        for each in self.changed:
            share, style = (each.ratio - 1) * 100, "red" if each.ratio > 1 else "green"
            table.add_row(
                each.figure, seconds(each.then), seconds(each.now), Text(f"{share:+.0f}%", style)
            )
        return Group(*titled("Changed since then", table), foot)


def compare(old: Mapping[str, Any], new: Report) -> Comparison:
    """What changed since an earlier document, where noise does not explain it.

    Two figures differ where the means of their passes' logarithms do, by
    Student's test and Bonferroni's correction for how many are compared. The
    variance is the figure's own or that of all of them, whichever is greater,
    and on top that of whole runs as long as these. Raises `ValueError` where
    the earlier document is none of ours.
    """
    before = dict(_figures(old))
    after = dict(_figures(json.loads(json.dumps(new.to_json()))))
    both = [name for name in after if name in before]
    pairs = {name: (_logs(before[name]), _logs(after[name])) for name in both}
    pairs = {name: pair for name, pair in pairs.items() if min(map(len, pair)) > 1}
    changed, steps = [], []
    if pairs:
        variances = {name: fmean(map(variance, pair)) for name, pair in pairs.items()}
        usual = fmean(variances.values())
        freedom = sum(len(then) + len(now) - 2 for then, now in pairs.values())
        sure = _student(1 - _ALARMS / len(pairs) / 2, freedom)
        lasted = max(1.0, float(old.get("lasted", 1.0))), max(1.0, new.lasted)
        runs = sum(_RUN**2 / each for each in lasted)
        for name, (then, now) in pairs.items():
            noise = max(variances[name], usual) * (1 / len(then) + 1 / len(now))
            step = sure * sqrt(noise + runs)
            change = fmean(now) - fmean(then)
            steps.append(step)
            if abs(change) > step:
                changed.append(Change(name, before[name].median, after[name].median, exp(change)))
    return Comparison(
        changed,
        len(pairs) - len(changed),
        exp(median(steps)) if steps else None,
        len(both) - len(pairs),
        len(after.keys() ^ before.keys()),
        old.get("machine") == new.machine,
    )


def _logs(stat: Stat) -> list[float]:
    return [log(middle) for middle in stat.passes if middle > 0]


def _student(probability: float, freedom: int) -> float:
    """Student's quantile, from the normal one (Abramowitz and Stegun, 26.7.5, two terms)."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, Stat]]:
    if document.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"its schema is {document['schema']}, not {SCHEMA}")
    try:
        float(document.get("lasted", 1.0))
        for close in document["closes"]:
            where = f"{close['course']} {close['kind']} {close['family']} {close['connections']}"
            for time, words in TIMES.items():
                if close[time] and time != "last_segment":  # looked at in a single pass only
                    yield f"{where}: {words}", _CONVERTER.structure(close[time], Stat)
    except (KeyError, TypeError, AttributeError, ValueError) as wrong:
        raise ValueError(f"it is no document of this benchmark ({wrong})") from None

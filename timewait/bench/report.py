"""What a benchmark found, as a document, as tables, and beside an earlier one."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from attrs import define, field
from cattrs import Converter
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import timewait
from timewait.bench import Stat
from timewait.bench.closes import COURSES, TIMES, Close, Pace, Trial
from timewait.bench.ports import Bind, Churn, Outcome
from timewait.kernel.namespace import sysctl
from timewait.kernel.ticks import tick

__all__ = ["SCHEMA", "SETTINGS", "Report", "grid", "machine", "seconds", "settings", "titled"]

SCHEMA: Final = 2
_SHOWN: Final = 4  # of the things that were not measured

SETTINGS: Final = (
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_max_tw_buckets",
    "net.ipv4.tcp_rfc1337",
    "net.ipv4.tcp_timestamps",
    "net.ipv4.tcp_tw_reuse",
)


def machine() -> dict[str, Any]:
    """What this was measured on."""
    cpu = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    return {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "hz": round(1 / tick()),
        "python": platform.python_version(),
        "timewait": timewait.__version__,
    }


def settings() -> dict[str, str]:
    """The kernel settings of this network namespace that matter here."""
    found = {}
    for name in SETTINGS:
        with suppress(OSError):
            found[name] = sysctl(name)
    return found


@define
class Report:
    """All that a benchmark found; `isolated` is whether it had a network namespace of its own.

    `pace` is what a byte takes over loopback here and `quickest` the least
    time in which any segment was answered by another, in seconds; `lasted`
    the seconds for which closes were timed. `left_out` says what was not
    measured, and why.
    """

    machine: dict[str, Any]
    settings: dict[str, str]
    isolated: bool
    pace: Stat | None = None
    quickest: float | None = None
    waited: bool = False
    lasted: float = 0.0
    interrupted: bool = False
    closes: list[Close] = field(factory=list)
    left_out: list[str] = field(factory=list)
    binds: list[Bind] = field(factory=list)
    churns: list[Churn] = field(factory=list)
    schema: int = SCHEMA

    def look_at(self, trials: Sequence[Trial], pace: Sequence[Sequence[float]]) -> None:
        """Take what the trials found, and hold it against the model at this machine's pace."""
        self.pace = Stat.of(*pace)
        if self.pace is None:
            return
        self.quickest = min((t.quickest for t in trials if t.quickest is not None), default=None)
        here = Pace(
            self.quickest or 0.0, self.pace.median, self.pace.quantiles[20], tick() * self.noise
        )
        for trial in trials:
            close = trial.outcome(here)
            if close:
                self.closes.append(close)
            else:
                self.left_out.append(f"{trial.name}: no time was left")
        if self.closes and not any(close.last_segment for close in self.closes):
            self.left_out.append("last segments: no leave to capture here, or no time was left")

    @property
    def noise(self) -> float:
        """How many times longer a byte took at a bad moment (95 %) than at a good one (5 %)."""
        return self.pace.quantiles[19] / self.pace.quantiles[1] if self.pace else 1.0

    @property
    def outside(self) -> list[str]:
        """The figures that are not what the model allows, in words."""
        return [
            *(f"{close.name}: {_wrong(close, what)}"
              for close in self.closes for what in close.outside),
            *(f"{bind.course}, bind: {bind.fault}" for bind in self.binds if bind.fault),
            *(f"tcp_tw_reuse={churn.tw_reuse}: {churn.connections} connections before the ports "
              f"ran out, {churn.model_connections} on the model"
              for churn in self.churns if not churn.inside),
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As the document that docs/bench-schema.json describes."""
        plain: dict[str, Any] = Converter().unstructure(self)
        for close, found in zip(plain["closes"], self.closes, strict=True):
            close["marked"], close["outside"] = found.marked, list(found.outside)
        for each, bind in zip(plain["binds"], self.binds, strict=True):
            each["inside"] = bind.inside
        for each, churn in zip(plain["churns"], self.churns, strict=True):
            each["inside"] = churn.inside
        return plain

    def tables(self) -> RenderableType:
        """For people."""
        parts: list[RenderableType] = [self._head()]
        shown = [c for c in self.closes if c.connections == self.shown and c.family == "ipv4"]
        if shown:
            parts += _model([c for c in shown if c.kind == shown[0].kind])
        for kind in dict.fromkeys(close.kind for close in shown):
            parts += _closes_of([close for close in shown if close.kind == kind])
        if self.binds:
            parts += _binds(self.binds, self.waited)
        if len({(close.connections, close.family) for close in self.closes}) > 1:
            for kind in dict.fromkeys(close.kind for close in self.closes):
                parts += _sizes([close for close in self.closes if close.kind == kind])
        if self.churns:
            parts += _churns(self.churns)
        return Group(*parts, self._foot())

    @property
    def shown(self) -> int:
        """The number of open connections whose figures are shown in full: the middle one."""
        sizes = sorted({close.connections for close in self.closes})
        return sizes[len(sizes) // 2] if sizes else 0

    def _head(self) -> Text:
        on = self.machine
        lines = [
            f"{on['system']} ({on['hz']} ticks a second), {on['cores']} x {on['cpu']}, "
            f"Python {on['python']}",
            "in a network namespace of its own"
            if self.isolated
            else "in this machine's own network namespace",
            ", ".join(f"{n.removeprefix('net.ipv4.')} {v}" for n, v in self.settings.items()),
        ]
        if self.pace:
            lines.append(
                f"a byte takes {seconds(self.pace.median)} over loopback, "
                "and so does a segment in the model's figures"
            )
        return Text("\n".join(line.replace("\t", "-") for line in lines), "dim")

    def _foot(self) -> Text:
        lines = []
        if any(close.marked for close in self.closes):
            lines.append(
                "! disturbed: the kernel counted retransmissions or a full queue meanwhile"
            )
        lines += [f"outside what the model allows: {each}" for each in self.outside]
        if not self.outside and (self.closes or self.binds or self.churns):
            lines.append("every figure lies inside what the model allows")
        lines += [f"not measured: {each}" for each in self.left_out[:_SHOWN]]
        if len(self.left_out) > _SHOWN:
            lines.append(f"not measured: {len(self.left_out) - _SHOWN} more")
        if self.interrupted:
            lines.append("interrupted: this is what there was")
        return Text("\n" + "\n".join(lines), "bold red" if self.outside else "green")


def _wrong(close: Close, what: str) -> str:
    """What is outside, in words."""
    if what == "holder":
        return f"{close.holder or 'nobody'} holds TIME_WAIT"
    if what == "segments":
        return close.fault or ""
    stat: Stat = getattr(close, what)
    least, most = close.model.allowed[what]
    found = f"{seconds(stat.quantiles[0])} to {seconds(stat.quantiles[20])}"
    return f"{TIMES[what]} {found}, allowed {seconds(least)} to {seconds(most)}"


def seconds(value: float) -> str:
    """A time as people read it, in three figures."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "0" if not value else f"{value * 1e9:.3g} ns"


def _time(stat: Stat | None) -> str:
    return seconds(stat.median) if stat else "-"


def grid(*columns: str, gap: int = 2) -> Table:
    """An empty table: the first column holds names, the others figures."""
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def titled(title: str, table: Table) -> list[RenderableType]:
    """The table under its title."""
    return [Text(f"\n{title}", "bold"), table]


def _model(closes: list[Close]) -> list[RenderableType]:
    """What the model foretells, and between what bounds it allows a figure to lie."""
    foretold = grid("", "returns", "peer is told", "last segment", "settled", "TIME_WAIT")
    allowed = grid("", "returns", "peer is told", "last segment", "settled")
    for close in closes:
        model = close.model
        holder = "/".join(each or "-" for each in model.holders)
        foretold.add_row(
            close.course,
            seconds(model.returned),
            "-" if model.told is None else f"{close.how} {seconds(model.told)}",
            seconds(model.last_segment),
            seconds(model.settled),
            holder if len(model.holders) == 1 else "either or both",
        )
        allowed.add_row(close.course, *(_between(model.allowed.get(name)) for name in TIMES))
    return [
        *titled("The model: from the close call until", foretold),
        *titled("The model allows: from the close call until", allowed),
    ]


def _between(bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return "-"
    least, most = bounds
    return f"{seconds(least)}-{seconds(most)}"


def _closes_of(closes: list[Close]) -> list[RenderableType]:
    first = closes[0]
    table = grid(
        "", "returns", "peer is told", "last segment", "settled", "±", "/model", "TIME_WAIT", gap=1
    )
    for close in closes:
        settled = close.settled
        mark = " !" if close.marked else ""
        table.add_row(
            close.course + mark,
            _time(close.returned),
            f"{close.how} {_time(close.told)}" if close.told else "-",
            _time(close.last_segment),
            _time(settled),
            f"{settled.spread * 100:.0f}%" if settled else "",
            f"{settled.median / close.model.settled:.3g}" if settled else "",
            Text(
                f"{close.holder} {close.time_wait:.3g}" if close.holder else "-",
                "bold red" if close.outside else "",
            ),
        )
    return titled(f"{first.kind}, {first.connections} open, IPv4: from the close call until", table)


def _binds(binds: list[Bind], waited: bool) -> list[RenderableType]:
    how = "waited for" if waited else "by the kernel's own timer"
    table = grid("", "kernel", "model", "ratio", "with SO_REUSEADDR", "model")
    by_course = {(bind.course, bind.reuse_address): bind for bind in binds}
    for course in COURSES:
        plain, reusing = by_course.get((course, False)), by_course.get((course, True))
        if plain or reusing:
            table.add_row(
                course,
                *((_blocked(plain.kernel), _blocked(plain.model)) if plain else "--"),
                f"{plain.ratio:.3f}" if plain and plain.ratio else "-",
                *((_blocked(reusing.kernel), _blocked(reusing.model)) if reusing else "--"),
            )
    return titled(f"The port cannot be bound again for ({how})", table)


def _blocked(outcome: Outcome) -> str:
    if outcome.ok:
        return "free"
    return "no timer says" if outcome.blocked is None else f"{outcome.blocked:.2f} s"


def _sizes(closes: list[Close]) -> list[RenderableType]:
    sizes = sorted({close.connections for close in closes})
    families = sorted({close.family for close in closes})
    table = grid("", *(f"{size} {family}" for family in families for size in sizes))
    found = {(c.course, c.family, c.connections): c for c in closes}
    for course in COURSES:
        cells = [found.get((course, family, size)) for family in families for size in sizes]
        if any(cells):
            table.add_row(course, *(_time(cell.settled) if cell else "-" for cell in cells))
    return titled(f"{closes[0].kind}: settled, by how many connections are open", table)


def _churns(churns: list[Churn]) -> list[RenderableType]:
    table = grid("tcp_tw_reuse", "ran out after", "model", "rate", "then", "model", "for ever")
    for churn in churns:
        table.add_row(
            str(churn.tw_reuse),
            "never" if churn.connections is None else str(churn.connections),
            "never" if churn.model_connections is None else str(churn.model_connections),
            f"{churn.rate:,.0f}/s",
            f"{churn.sustained:,.0f}/s",
            f"{churn.model_sustained:,.0f}/s",
            f"{churn.for_ever:,.0f}/s",
        )
    ports, machine = churns[0].ports, churns[0].machine_ports
    return titled(
        f"Connections to one place, {ports} ports (for ever: this machine's {machine})",
        table,
    )

"""What a benchmark found, as a document, as tables, and beside an earlier one."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
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
from timewait.bench.closes import COURSES, Close
from timewait.bench.ports import Bind, Churn, Outcome
from timewait.kernel.namespace import sysctl
from timewait.kernel.ticks import tick

__all__ = ["SETTINGS", "Report", "compare", "machine", "noise", "settings"]

SETTINGS: Final = (
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_max_tw_buckets",
    "net.ipv4.tcp_rfc1337",
    "net.ipv4.tcp_timestamps",
    "net.ipv4.tcp_tw_reuse",
)
_FEW: Final = 5  # measurements that say nothing about noise
TIMES: Final = {
    "returned": "call returns",
    "told": "peer is told",
    "last_segment": "last segment",
    "settled": "settled",
}


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

    `one_way` is the seconds that a byte takes over loopback here, which is
    what a segment takes in the model's figures; `noise` how many times longer
    it took at a bad moment of the run than at a good one (95 % to 5 %).
    """

    machine: dict[str, Any]
    settings: dict[str, str]
    isolated: bool
    one_way: float
    noise: float = 1.0
    waited: bool = False
    interrupted: bool = False
    closes: list[Close] = field(factory=list)
    binds: list[Bind] = field(factory=list)
    churns: list[Churn] = field(factory=list)
    schema: int = 1

    @property
    def outside(self) -> list[str]:
        """The figures that are not what the model allows, in words."""
        return [
            *(f"{_name(close)}: {close.holder or 'nobody'} holds TIME_WAIT, "
              f"settled after {_time(close.settled)}"
              for close in self.closes if not close.inside),
            *(f"{bind.course}, bind: {bind.fault}" for bind in self.binds if bind.fault),
            *(f"tcp_tw_reuse={churn.tw_reuse}: {churn.connections} connections before the ports "
              f"ran out, {churn.model_connections} on the model"
              for churn in self.churns if not churn.inside),
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """As the document that docs/bench-schema.json describes."""
        plain: dict[str, Any] = Converter().unstructure(self)
        for close, found in zip(plain["closes"], self.closes, strict=True):
            close["marked"] = found.marked
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
            parts += _closes_of([c for c in shown if c.kind == shown[0].kind], model=True)
        for kind in dict.fromkeys(close.kind for close in shown):
            parts += _closes_of([close for close in shown if close.kind == kind])
        if self.binds:
            parts += _binds(self.binds, self.waited)
        if len({(close.connections, close.family) for close in self.closes}) > 1:
            parts += _sizes(self.closes)
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
            f"a byte takes {_seconds(self.one_way)} over loopback, and so does a segment in the "
            "model's figures",
        ]
        return Text("\n".join(line.replace("\t", "-") for line in lines), "dim")

    def _foot(self) -> Text:
        lines = []
        if any(close.marked for close in self.closes):
            lines.append(
                "! disturbed: the kernel counted retransmissions or a full queue meanwhile"
            )
        lines += [f"outside what the model allows: {each}" for each in self.outside]
        if not lines and (self.closes or self.binds or self.churns):
            lines.append("every figure lies inside what the model allows")
        if self.interrupted:
            lines.append("interrupted: this is what there was")
        return Text("\n" + "\n".join(lines), "bold red" if self.outside else "green")


def _name(close: Close) -> str:
    return f"{close.course} with {close.kind} over {close.family}, {close.connections} open"


def _seconds(value: float) -> str:
    """A time as people read it, in three figures."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "0" if not value else f"{value * 1e9:.3g} ns"


def _time(stat: Stat | None) -> str:
    return _seconds(stat.median) if stat else "-"


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _titled(title: str, table: Table) -> list[RenderableType]:
    return [Text(f"\n{title}", "bold"), table]


def _closes_of(closes: list[Close], *, model: bool = False) -> list[RenderableType]:
    first = closes[0]
    table = _grid("", "returns", "peer is told", "last segment", "settled", "±", "TIME_WAIT")
    for close in closes:
        if model:
            told = close.model
            holder = "/".join(each or "-" for each in told.holders)
            cells = [
                _seconds(told.returned),
                "-" if told.told is None else f"{close.how} {_seconds(told.told)}",
                _seconds(told.last_segment),
                _seconds(told.settled),
                "",
                holder if len(told.holders) == 1 else "either or both",
            ]
        else:
            settled = close.settled
            cells = [
                _time(close.returned),
                f"{close.how} {_time(close.told)}" if close.told else "-",
                _time(close.last_segment),
                _time(settled),
                f"{settled.spread * 100:.0f}%" if settled else "",
                close.holder or "-",
            ]
        *rest, last = cells
        style = "" if close.inside or model else "bold red"
        mark = " !" if close.marked and not model else ""
        table.add_row(close.course + mark, *rest, Text(last, style))
    who = "The model" if model else f"{first.kind}, {first.connections} open, IPv4"
    return _titled(f"{who}: from the close call until", table)


def _binds(binds: list[Bind], waited: bool) -> list[RenderableType]:
    how = "waited for" if waited else "by the kernel's own timer"
    table = _grid("", "kernel", "model", "ratio", "with SO_REUSEADDR", "model")
    by_course = {(bind.course, bind.reuse_address): bind for bind in binds}
    for course in COURSES:
        plain, reusing = by_course.get((course, False)), by_course.get((course, True))
        if plain:
            table.add_row(
                course,
                _blocked(plain.kernel),
                _blocked(plain.model),
                f"{plain.ratio:.3f}" if plain.ratio else "-",
                _blocked(reusing.kernel) if reusing else "-",
                _blocked(reusing.model) if reusing else "-",
            )
    return _titled(f"The port cannot be bound again for ({how})", table)


def _blocked(outcome: Outcome) -> str:
    if outcome.ok:
        return "free"
    return "no timer says" if outcome.blocked is None else f"{outcome.blocked:.2f} s"


def _sizes(closes: list[Close]) -> list[RenderableType]:
    sizes = sorted({close.connections for close in closes})
    families = sorted({close.family for close in closes})
    kind = closes[0].kind
    table = _grid("", *(f"{size} {family}" for family in families for size in sizes))
    found = {(c.course, c.family, c.connections): c for c in closes if c.kind == kind}
    for course in COURSES:
        cells = [found.get((course, family, size)) for family in families for size in sizes]
        if any(cells):
            table.add_row(course, *(_time(cell.settled) if cell else "-" for cell in cells))
    return _titled(f"{kind}: settled, by how many connections are open", table)


def _churns(churns: list[Churn]) -> list[RenderableType]:
    table = _grid("tcp_tw_reuse", "ran out after", "model", "rate", "then", "model", "for ever")
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
    return _titled(
        f"Connections to one place, {ports} ports (for ever: this machine's {machine})",
        table,
    )


def noise(pace: list[float]) -> float:
    """How many times longer the same thing took at a bad moment (95 %) than at a good (5 %)."""
    steps = Stat.of(pace)
    return steps.quantiles[19] / steps.quantiles[1] if steps else 1.0


def compare(old: Mapping[str, Any], new: Report) -> RenderableType:
    """What changed since an earlier document, where noise does not explain it.

    Two medians differ where their notches do not overlap (see `Stat`), and
    where they are further apart than the machine itself was at its good and
    bad moments in either run. Raises `ValueError` where the earlier document
    is none of ours.
    """
    before = dict(_figures(old))
    factor = max(float(old.get("noise", 1.0)), new.noise)
    after = dict(_figures(json.loads(json.dumps(new.to_json()))))
    table = _grid("", "then", "now", "change")
    same = 0
    for name, now in after.items():
        then = before.get(name)
        if then is None:
            continue
        few = min(now.count, then.count) < _FEW or not now.median or not then.median
        ratio = 1.0 if few else now.median / then.median
        if not now.differs(then) or max(ratio, 1 / ratio) <= factor:
            same += 1
            continue
        change = (ratio - 1) * 100
        style = "red" if change > 0 else "green"
        table.add_row(
            name, _seconds(then.median), _seconds(now.median), Text(f"{change:+.0f}%", style)
        )
    lines = [f"{same} figures are as they were, within the noise (a factor of {factor:.2f})"]
    missing = len(after.keys() ^ before.keys())
    if missing:
        lines.append(f"{missing} are in one of the two only")
    if old.get("machine") != new.machine:
        lines.append("another machine, kernel or Python: the figures are not of a kind")
    foot = Text("\n" + "\n".join(lines), "dim")
    return Group(*_titled("Changed since then", table), foot) if table.row_count else foot


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, Stat]]:
    try:
        if document["schema"] != 1:
            raise ValueError(f"its schema is {document['schema']}, not 1")
        for close in document["closes"]:
            where = f"{close['course']} {close['kind']} {close['family']} {close['connections']}"
            for time, words in TIMES.items():
                if close[time]:
                    yield f"{where}: {words}", Stat(**close[time])
    except (KeyError, TypeError) as wrong:
        raise ValueError(f"it is no document of this benchmark ({wrong})") from None

"""`python -m benchmarks [NAME...] [--quick] [--json]`: every figure, one table."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from importlib import import_module
from pathlib import Path

import click
from attrs import asdict

from benchmarks import Figure
from timewait.cli import Command, answer
from timewait.kernel.namespace import isolate

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def figures(names: Iterable[str], quick: bool) -> Iterator[tuple[str, Figure]]:
    for name in names:
        try:
            for figure in import_module(f"benchmarks.{name}").measure(quick):
                if sys.stderr.isatty():
                    print(f"  {name}: {figure.what}", file=sys.stderr, flush=True)
                yield name, figure
        except (ImportError, PermissionError) as why:
            print(f"{name}: the rest is left out: {why}", file=sys.stderr, flush=True)


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cells(name: str, figure: Figure) -> list[str]:
    sign = "≤" if figure.lower_is_better else "≥"
    theirs = figure.peer and f"{figure.peer}: not installed"
    if figure.theirs is not None:
        theirs = f"{number(figure.theirs)} ({figure.peer})"
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    return [
        name,
        figure.what + (f" ({figure.note})" if figure.note else ""),
        f"{number(figure.ours)} {figure.unit}",
        theirs,
        "" if figure.ratio is None else f"{figure.ratio:.3g}",
        target,
        {True: "yes", False: "**no**", None: ""}[figure.reached],
    ]


@click.command(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="This project's own speed, beside its peers' in the same run. NAME is one of "
    f"{', '.join(NAMES)}; without any, all of them.",
)
@click.argument("names", nargs=-1, metavar="[NAME]...", type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Smaller sizes, noisier figures.")
@click.option("--json", "as_json", is_flag=True, help="One document instead of the table.")
def command(names: tuple[str, ...], quick: bool, as_json: bool) -> None:
    if os.geteuid():
        with suppress(OSError):
            isolate()  # where they may enter further namespaces, as root does anywhere
    rows = list(figures(names or NAMES, quick))
    if as_json:
        keys = ("ratio", "reached")
        documents = [
            {"room": name, **asdict(figure), **{key: getattr(figure, key) for key in keys}}
            for name, figure in rows
        ]
        print(json.dumps(documents, indent=1))
        return
    system = f"{platform.system()} {platform.release()}"
    python = f"Python {platform.python_version()}"
    print(f"{date.today()}: {python}, {system}, {os.cpu_count()} cores\n")
    print("| room | what | ours | peer | ratio | target | reached |")
    print("|---|---|---|---|---|---|---|")
    for name, figure in rows:
        print("| " + " | ".join(cells(name, figure)) + " |")


if __name__ == "__main__":
    answer(lambda: command, "python -m benchmarks")

"""`python -m benchmarks [NAME...] [--quick] [--json]`: every figure, one table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from pathlib import Path

from attrs import asdict

from benchmarks import Figure

NAMES = sorted(
    path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_")
)


def figures(names: list[str], quick: bool) -> Iterator[tuple[str, Figure]]:
    for name in names:
        for figure in import_module(f"benchmarks.{name}").measure(quick):
            if sys.stderr.isatty():
                print(f"  {name}: {figure.what}", file=sys.stderr, flush=True)
            yield name, figure


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


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, noisier figures")
    parser.add_argument("--json", action="store_true", help="one document instead of the table")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    rows = list(figures(options.names or NAMES, options.quick))
    if options.json:
        keys = ("ratio", "reached")
        documents = [
            {"room": name, **asdict(figure), **{key: getattr(figure, key) for key in keys}}
            for name, figure in rows
        ]
        print(json.dumps(documents, indent=1))
        return 0
    system = f"{platform.system()} {platform.release()}"
    python = f"Python {platform.python_version()}"
    print(f"{date.today()}: {python}, {system}, {os.cpu_count()} cores\n")
    print("| room | what | ours | peer | ratio | target | reached |")
    print("|---|---|---|---|---|---|---|")
    for name, figure in rows:
        print("| " + " | ".join(cells(name, figure)) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

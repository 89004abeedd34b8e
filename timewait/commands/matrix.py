"""`timewait matrix`: every way to meet a port that somebody holds, kernel against model."""

from __future__ import annotations

import json
from collections import Counter

import click

from timewait.lab import matrix


@click.command()
@click.option(
    "--on",
    type=click.Choice(["kernel", "model", "both"]),
    default="both",
    show_default=True,
    help="Which stack to ask.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(on: str, as_json: bool) -> int:
    """Try every combination of a port's holder and a newcomer to it.

    A holder (bound, listening, connected, closing, TIME_WAIT ...) with its
    options on one address, and a newcomer with its options on another, that
    binds, listens or connects from the same port. The kernel is asked in a
    private network namespace. Exit status 1 if the two disagree.
    """
    cases = list(matrix.every_case())
    kernel = model = None
    if on in ("kernel", "both"):
        try:
            kernel = matrix.on_kernel(cases)
        except OSError as error:
            raise click.ClickException(f"the kernel cannot be asked: {error.strerror}") from None
    if on in ("model", "both"):
        model = matrix.on_model(cases)
    differ = []
    if kernel is not None and model is not None:
        differ = [
            (case, theirs, ours)
            for case, theirs, ours in zip(cases, kernel, model, strict=True)
            if theirs != ours
        ]
    outcomes = kernel or model
    assert outcomes is not None
    if as_json:
        document = {
            "cases": len(cases),
            "agree": len(cases) - len(differ) if on == "both" else None,
            "disagree": [
                {
                    "state": case.state,
                    "held": case.held,
                    "held_options": case.held_options,
                    "call": case.call,
                    "address": case.address,
                    "options": case.options,
                    "kernel": theirs,
                    "model": ours,
                }
                for case, theirs, ours in differ
            ],
            "on": on,
            "outcomes": dict(sorted(Counter(outcomes).items())),
        }
        print(json.dumps(document, indent=2))
        return 1 if differ else 0
    _print_table(dict(zip(cases, outcomes, strict=True)))
    for outcome, count in sorted(Counter(outcomes).items()):
        print(f"{count:8,}  {outcome}")
    print(f"{len(cases):8,}  combinations", end="")
    if on != "both":
        print(f" on the {on}")
        return 0
    print(f"; kernel and model agree in {len(cases) - len(differ):,}")
    for case, theirs, ours in differ:
        print(f"  {case}: kernel {theirs}, model {ours}")
    return 1 if differ else 0


def _print_table(outcomes: dict[matrix.Case, str]) -> None:
    from rich.table import Table

    from timewait.report import console

    table = Table(
        title="With which options of the holder may the newcomer take the port?\n"
        "Both on 127.0.0.1; A is SO_REUSEADDR, P is SO_REUSEPORT, - neither",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for heading in ("held by", "call", *(f"newcomer {o}" for o in matrix.OPTIONS)):
        table.add_column(heading, no_wrap=True)
    last = ""
    for state, *rest in matrix.allowed(outcomes):
        table.add_row("" if state == last else state, *rest)
        last = state
    console(width=100).print(table)
    print()

"""`timewait mutate`: change one thing in a true trace, many times: does the check notice?"""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from timewait.check import check
from timewait.check.evidence import read
from timewait.events import REST, Lost
from timewait.lab.mutate import Result, run
from timewait.report import console

__all__ = ["command"]


@click.command(
    help="Make every mutant of the traces in FILE... (events as JSON Lines, or captures): one "
    "thing changed in each, by some forty operators. Prints, by operator, how many mutants the "
    "check rejects and why TCP allows the others.",
    epilog="Exit status: 0 every mutant is rejected or explained, 1 some are not, 2 a file cannot "
    "be read or does not conform itself.",
)
@click.argument(
    "files",
    nargs=-1,
    required=True,
    metavar="FILE...",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which random choices.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(files: tuple[Path, ...], seed: int, as_json: bool) -> int:
    """Mutate them, print what became of the mutants, return 0 or 1."""
    result = Result()
    for file in files:
        try:
            seen = read(file, lambda problem: None)
            # What follows a mutant's last event would not be missed if it could have been cut off.
            events = [e for e in seen if not isinstance(e, Lost) or e.source != REST]
            verdict = check(events)
        except (OSError, ValueError) as wrong:
            raise click.ClickException(f"{file}: {wrong}") from None
        if not events:
            raise click.ClickException(f"{file}: no event could be read")
        if not verdict:
            first = verdict.divergence
            raise click.ClickException(f"{file} does not conform itself: {first and first.why}")
        run(events, seed=seed, result=result)
    if as_json:
        click.echo(json.dumps({"seed": seed, "files": [str(f) for f in files], **result.to_json()}))
    else:
        _print(result)
    return 0 if result.unexplained == 0 else 1


def _print(result: Result) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for head in ("mutants", "rejected", "allowed"):
        table.add_column(head, justify="right")
    table.add_column("why TCP allows them")
    for name, outcome in result.outcomes.items():
        allowed = outcome.made - outcome.rejected
        why = "; ".join(f"{n} {text}" for text, n in outcome.allowed.items())
        table.add_row(name, str(outcome.made), str(outcome.rejected), str(allowed or ""), why)
    console(width=110).print(table)
    click.echo(
        f"\n{result.made} mutants by {len(result.outcomes)} operators: {result.rejected} rejected, "
        f"{result.made - result.rejected - result.unexplained} allowed by TCP, "
        f"{result.unexplained} not explained"
    )

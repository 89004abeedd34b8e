"""`timewait scenarios`: the built-in scenarios, a line each."""

from __future__ import annotations

import json
import textwrap
from typing import Final

import click

from timewait.scenario import BUILT_IN, WITH_FAULTS, Scenario

__all__ = ["command"]

_COLUMNS: Final = 80


@click.command(help="List the built-in scenarios; --toml NAME prints one, to make your own of.")
@click.option("--toml", "name", metavar="NAME", help="Print the scenario as TOML.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str | None, as_json: bool) -> int:
    """Print the list, or one scenario."""
    if name is not None:
        if as_json:
            raise click.UsageError("--toml and --json are two forms of an answer: give one")
        try:
            click.echo(Scenario.built_in(name).to_toml(), nl=False)
        except ValueError as wrong:
            raise click.ClickException(str(wrong)) from None
        return 0
    if as_json:
        click.echo(
            json.dumps([Scenario.built_in(name).to_dict() for name in BUILT_IN | WITH_FAULTS])
        )
        return 0
    known = BUILT_IN | WITH_FAULTS
    width = max(map(len, known))
    for each, (about, _) in known.items():
        told = textwrap.wrap(about, _COLUMNS - width - 2)
        click.echo(f"{each:{width}}  " + f"\n{'':{width}}  ".join(told))
    return 0

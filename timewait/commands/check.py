"""`timewait check`: does TCP allow what a file shows?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from timewait.check import Checker, Connection, Verdict, answers
from timewait.check.evidence import read
from timewait.tcp.profiles import PROFILES

__all__ = ["command"]


@click.command(
    help="Say whether TCP allows what FILE shows: events as JSON Lines (timewait run --events), or "
    "a packet capture (pcap, pcapng); - is standard input. Prints a line per connection, then the "
    "verdict with the first divergence explained.",
    epilog="Exit status: 0 it conforms, 1 it diverges, 2 the file cannot be read.",
)
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path)
)
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="ROLE=NAME",
    help="The stack of a role: server=linux, client=windows. Default: as the file says, or linux.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(file: Path, profiles: tuple[str, ...], as_json: bool) -> int:
    """Check it, print the verdict, return 0 or 1."""
    problems: list[str] = []
    found: list[dict[str, object]] = []

    def ended(connection: Connection) -> None:
        told = answers(connection)
        if as_json:
            found.append({**told.to_json(), "conforms": connection.divergence is None})
        else:
            wrong = "DIVERGES; " if connection.divergence else ""
            click.echo(f"{connection.name}  {wrong}{told}")

    checker = Checker(_roles(profiles), on_end=ended)
    try:
        for event in read(file, problems.append):
            checker.feed(event)
        verdict = checker.verdict(problems)
    except BrokenPipeError:  # whoever reads what is printed has seen enough
        raise
    except (OSError, ValueError) as wrong:
        raise click.ClickException(f"{file}: {getattr(wrong, 'strerror', None) or wrong}") from None
    if not verdict.evidence.events:
        why = f" ({'; '.join(problems[:4])})" if problems else ""
        raise click.ClickException(f"{file}: no event could be read{why}")
    if as_json:
        click.echo(json.dumps({"file": str(file), **verdict.to_json(), "connections": found}))
    else:
        _print(verdict)
    return 0 if verdict else 1


def _print(verdict: Verdict) -> None:
    if verdict.evidence.connections:
        click.echo()
    click.echo(verdict.explain())


def _roles(profiles: tuple[str, ...]) -> dict[str, str]:
    roles = {}
    for given in profiles:
        role, _, name = given.partition("=")
        if role not in ("server", "client"):
            raise click.UsageError(f"--profile takes server=NAME or client=NAME, not {given!r}")
        if name not in PROFILES:
            raise click.UsageError(
                f"no profile is called {name!r}; there are {', '.join(PROFILES)}"
            )
        roles[role] = name
    return roles

"""`timewait explain`: why can't I bind, and until when?"""

from __future__ import annotations

import json

import click

from timewait.bind import parse_address
from timewait.explain import Explanation, explain_bind

__all__ = ["command", "explanation"]


@click.command(
    help="Say whether a server could bind [HOST:]PORT (HOST is 0.0.0.0 if not given) with each "
    "choice of options, who holds it, which rule refuses, when it will be free, and what to do. "
    "Really tries, and leaves nothing behind. Needs no privilege.",
    epilog="Exit status: 0 free for a server that sets no option, 1 not free, 2 could not be told.",
)
@click.argument("address", metavar="[HOST:]PORT")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead.")
def command(address: str, as_json: bool) -> int:
    """Explain and say so by the exit status."""
    found = explanation(address)
    click.echo(json.dumps(found.to_json()) if as_json else str(found))
    return 0 if found else 1


def explanation(address: str) -> Explanation:
    """What `explain_bind` says of an address as it was typed; trouble as one line."""
    try:
        host, port = parse_address(address)
        return explain_bind(port, host)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None

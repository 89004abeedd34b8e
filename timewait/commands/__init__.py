"""A file for each subcommand, loaded when it is called; here the option that two of them share."""

import click

__all__ = ["events"]


def _a_file(context: click.Context, option: click.Parameter, name: str | None) -> str | None:
    if name == "-":
        raise click.BadParameter("'-' is no file here: standard output is for the answer")
    return name


events = click.option(
    "--events",
    type=click.Path(dir_okay=False),
    metavar="FILE.jsonl",
    callback=_a_file,
    help="Write every event there as it happens, as JSON Lines.",
)

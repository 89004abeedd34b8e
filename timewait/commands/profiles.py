"""`timewait profiles`: what each stack does otherwise than the RFC, and where that is written."""

from __future__ import annotations

import json
import textwrap
from typing import Any

import click
from attrs import fields

from timewait.tcp.diagram import listing, matrix, mermaid
from timewait.tcp.profiles import PROFILES, Parameters, Profile, profile
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import Row

__all__ = ["command"]


@click.command(
    help="Show the stacks; one, as its differences from RFC 9293; or what two of them differ in."
)
@click.argument("name", required=False, metavar="[NAME")
@click.argument("other", required=False, metavar="[OTHER]]")
@click.option("--diagram", "form", flag_value="diagram", help="Its state diagram, for Mermaid.")
@click.option("--matrix", "form", flag_value="matrix", help="Its states x events, in Markdown.")
@click.option("--rows", "form", flag_value="rows", help="Every row with its source, in Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(name: str | None, other: str | None, form: str | None, as_json: bool) -> int:
    """Print the list, one stack, or the differences of two."""
    if form and (as_json or other is not None or name is None):
        raise click.UsageError(f"--{form} draws one stack: timewait profiles NAME --{form}")
    try:
        stacks = [profile(given) for given in (name, other) if given is not None]
    except ValueError as wrong:
        raise click.ClickException(str(wrong)) from None
    if form:
        click.echo({"diagram": mermaid, "matrix": matrix, "rows": listing}[form](stacks[0]))
    elif not stacks:
        _list(as_json)
    elif len(stacks) == 1:
        _show(stacks[0], as_json)
    else:
        _compare(stacks[0], stacks[1], as_json)
    return 0


def _list(as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_document(stack) for stack in PROFILES.values()]))
        return
    for stack in PROFILES.values():
        wait, orphan = stack.parameters.time_wait, stack.parameters.fin_wait_2
        click.echo(
            f"{stack.name:<9} TIME_WAIT {wait:g} s, an orphan's FIN_WAIT_2 "
            f"{'without limit' if orphan is None else f'{orphan:g} s'}, "
            f"{len(stack.differences)} rows that differ from RFC 9293's\n"
            f"{'':<9} ({stack.basis})"
        )


def _document(stack: Profile) -> dict[str, Any]:
    return {
        "name": stack.name,
        "basis": stack.basis,
        "settings": [
            {
                "name": setting.name,
                "value": setting.value,
                "meaning": setting.meaning,
                "source": setting.source,
                "verified": setting.verified,
            }
            for setting in stack.settings.values()
        ],
        "parameters": _parameters(stack),
        "rows": [
            {"state": str(state), "event": str(event), **_cell(row)}
            for (state, event), row in sorted(stack.differences.items())
        ],
    }


def _parameters(stack: Profile) -> dict[str, Any]:
    return {field.name: getattr(stack.parameters, field.name) for field in fields(Parameters)}


def _cell(row: Row) -> dict[str, Any]:
    return {
        "kind": row.kind,
        "next": None if row.next is None else str(row.next),
        "actions": list(row.actions),
        "errno": row.errno,
        "source": row.source,
        "why": row.why,
    }


def _show(stack: Profile, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(_document(stack)))
        return
    click.echo(f"{stack.name}: {stack.basis}\n\nSettings")
    width = max(len(setting.name) for setting in stack.settings.values())
    for setting in stack.settings.values():
        doubt = "" if setting.verified else " (not verified)"
        value = f"{setting.value:g}" if isinstance(setting.value, float) else str(setting.value)
        _entry(f"  {setting.name:<{width}} = {value:<9} ", f"{setting.meaning}{doubt}")
        _entry(" " * (width + 14), f"[{setting.source}]")
    if stack.differences:
        click.echo("\nRows that differ from RFC 9293's")
        base = profile("rfc9293")
        for cell, row in sorted(stack.differences.items()):
            _difference(cell, ((stack.name, row), (base.name, base.table[cell])))


def _entry(lead: str, text: str) -> None:
    click.echo(textwrap.fill(text, 98, initial_indent=lead, subsequent_indent=" " * len(lead)))


def _difference(cell: tuple[State, Event], rows: tuple[tuple[str, Row], tuple[str, Row]]) -> None:
    click.echo(f"  {cell[0]} x {cell[1]}")
    for name, row in rows:
        _entry(f"    {name:<9} ", f"{row} [{row.source}]" if row.source else str(row))


def _compare(one: Profile, other: Profile, as_json: bool) -> None:
    parameters = {
        name: (value, _parameters(other)[name])
        for name, value in _parameters(one).items()
        if value != _parameters(other)[name]
    }
    cells = [
        cell
        for cell in sorted(one.table)
        if _behaviour(one.table[cell]) != _behaviour(other.table[cell])
    ]
    if as_json:
        document = {
            "profiles": [one.name, other.name],
            "parameters": {name: list(pair) for name, pair in parameters.items()},
            "rows": [
                {
                    "state": str(cell[0]),
                    "event": str(cell[1]),
                    one.name: _cell(one.table[cell]),
                    other.name: _cell(other.table[cell]),
                }
                for cell in cells
            ],
        }
        click.echo(json.dumps(document))
        return
    if not parameters and not cells:
        click.echo(f"{one.name} and {other.name} do not differ")
        return
    if parameters:
        width = max(map(len, parameters))
        click.echo(f"  {'':<{width}}  {one.name:>10} {other.name:>10}")
        for name, (mine, theirs) in parameters.items():
            click.echo(f"  {name:<{width}}  {_value(mine):>10} {_value(theirs):>10}")
    for cell in cells:
        _difference(cell, ((one.name, one.table[cell]), (other.name, other.table[cell])))


def _behaviour(row: Row) -> tuple[object, ...]:
    return (row.kind, row.next, row.actions, row.errno, row.via)


def _value(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

"""`timewait explore`: walk every state that two endpoints and a bad network can reach."""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from attrs import evolve

from timewait.tcp.explorer import (
    CHECKS,
    WORLDS,
    Found,
    Violation,
    World,
    breakages,
    excuse,
    explore,
)
from timewait.tcp.profiles import PROFILES, Profile, profile

__all__ = ["command"]


@click.command(
    help="Walk, exhaustively within stated bounds, every state that two endpoints and a network "
    "which loses, repeats and reorders can reach, and check what must always hold. "
    "Exit status: 0 nothing is wrong, 1 something is."
)
@click.option(
    "--profile",
    "name",
    type=click.Choice(list(PROFILES)),
    default="linux",
    show_default=True,
    metavar="P",
    help=f"The stack of both ends: {', '.join(PROFILES)}.",
)
@click.option(
    "--world",
    "wanted",
    type=click.Choice([world.name for world in WORLDS]),
    multiple=True,
    metavar="W",
    help="Only this world (may be repeated): " + ", ".join(world.name for world in WORLDS) + ".",
)
@click.option("--losses", type=click.IntRange(0, 7), help="So many segments may be lost.")
@click.option("--duplicates", type=click.IntRange(0, 7), help="So many may be delivered twice.")
@click.option("--in-flight", type=click.IntRange(1, 12), help="So many may be under way at once.")
@click.option(
    "--most",
    type=click.IntRange(1),
    default=1_000_000,
    show_default=True,
    help="States per world, after which it is cut short (and says so; nothing found is then no "
    "proof, and still exit status 0).",
)
@click.option(
    "--no-time-wait",
    is_flag=True,
    help="Let TIME_WAIT end at once, to see why it exists.",
)
@click.option(
    "--breakages",
    "break_rows",
    is_flag=True,
    help="Break the table, a row at a time, and count how many breakages are noticed (minutes).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    name: str,
    wanted: tuple[str, ...],
    losses: int | None,
    duplicates: int | None,
    in_flight: int | None,
    most: int,
    no_time_wait: bool,
    break_rows: bool,
    as_json: bool,
) -> int:
    """Explore, and print what was found."""
    changes: dict[str, Any] = {
        key: value
        for key, value in (
            ("losses", losses),
            ("duplicates", duplicates),
            ("in_flight", in_flight),
        )
        if value is not None
    }
    if no_time_wait:
        changes["time_wait"] = False
    worlds = [evolve(world, **changes) for world in WORLDS if not wanted or world.name in wanted]
    stack = profile(name)
    if break_rows:
        return _break(stack, worlds, as_json)
    found: list[tuple[World, Found]] = []
    if not as_json:
        click.echo(f"{name}: two endpoints, a network that loses, repeats and reorders\n")
        click.echo(f"{'world':<20}{'states':>10}{'transitions':>13}{'depth':>7}  found")
    for world in worlds:
        result = explore(stack, world, most=most)
        found.append((world, result))
        if not as_json:
            checks = ", ".join(violation.check for violation in result.violations) or "nothing"
            cut = "" if result.complete else " (cut short)"
            click.echo(
                f"{world.name:<20}{result.states:>10,}{result.transitions:>13,}"
                f"{result.depth:>7}  {checks}{cut}"
            )
    violations = [violation for _, result in found for violation in result.violations]
    if as_json:
        click.echo(json.dumps(_document(name, found, violations)))
    else:
        states = sum(result.states for _, result in found)
        click.echo(
            f"{'together':<20}{states:>10,}"
            f"{sum(result.transitions for _, result in found):>13,}"
            f"{max(result.depth for _, result in found):>7}  {len(violations)} violations"
        )
        for violation in violations:
            click.echo(f"\n{violation}")
            click.echo(f"\n({CHECKS[violation.check]})")
    return 1 if violations else 0


def _document(
    name: str, found: list[tuple[World, Found]], violations: list[Violation]
) -> dict[str, Any]:
    return {
        "profile": name,
        "states": sum(result.states for _, result in found),
        "transitions": sum(result.transitions for _, result in found),
        "depth": max(result.depth for _, result in found),
        "complete": all(result.complete for _, result in found),
        "seconds": round(sum(result.seconds for _, result in found), 3),
        "violations": [
            {
                "check": violation.check,
                "world": violation.world,
                "what": violation.what,
                "trace": list(violation.trace),
            }
            for violation in violations
        ],
        "worlds": [
            {
                "name": world.name,
                "states": result.states,
                "transitions": result.transitions,
                "depth": result.depth,
                "complete": result.complete,
            }
            for world, result in found
        ],
    }


def _break(stack: Profile, worlds: list[World], as_json: bool) -> int:
    """Break one row after the other; a breakage that no world notices is listed."""
    reached = sorted(
        ((explore(stack, world), world) for world in worlds), key=lambda pair: pair[0].states
    )
    cells = frozenset[Any]().union(*(result.rows for result, _ in reached))
    caught: dict[str, int] = {}
    missed: dict[str, list[str]] = {}
    every = list(breakages(stack, cells))
    for number, breakage in enumerate(every, 1):
        if not as_json and sys.stderr.isatty():
            click.echo(f"\r{number}/{len(every)}", nl=False, err=True)
        broken = breakage.apply(stack)
        for result, world in reached:
            if breakage.cell in result.rows:
                seen = explore(broken, world, first_only=True).violations
                if seen:
                    caught[seen[0].check] = caught.get(seen[0].check, 0) + 1
                    break
        else:
            why = excuse(breakage) or "for no known reason"
            missed.setdefault(why, []).append(str(breakage))
    total = sum(caught.values())
    if as_json:
        click.echo(
            json.dumps(
                {
                    "profile": stack.name,
                    "breakages": len(every),
                    "rows": len(cells),
                    "caught": total,
                    "by": caught,
                    "missed": missed,
                }
            )
        )
    else:
        click.echo(f"{total} of {len(every)} breakages of {len(cells)} rows are noticed:")
        for check, count in sorted(caught.items(), key=lambda item: -item[1]):
            click.echo(f"  {count:>4}  {check}: {CHECKS[check]}")
        click.echo(f"{len(every) - total} are not:")
        for why, lines in missed.items():
            click.echo(f"  {len(lines):>4}  {why}")
            for line in lines:
                click.echo(f"        {line}")
    return 0

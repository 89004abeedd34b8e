"""`timewait fuzz`: random programs and segments, the kernel's answers against the model's."""

from __future__ import annotations

import json
import random
import re
import sys
import time
from importlib import import_module
from typing import Any, Final

import click

__all__ = ["command", "seconds_of"]

# Subcommand -> where its click command is, imported when it is called.
_PARTS: Final = {"segments": ("timewait.commands.fuzz_segments", "command")}
_BATCH: Final = 500


def seconds_of(_ctx: click.Context, _param: click.Parameter, text: str | None) -> float | None:
    """A time such as 90, 90s, 10m or 1.5h as seconds; a usage error for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is no duration: say 90s, 10m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"]


class _Fuzzers(click.Group):
    """Fuzzers, each loaded when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *_PARTS})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.commands or name not in _PARTS:
            return super().get_command(ctx, name)
        module, attribute = _PARTS[name]
        try:
            found: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError:
            return None
        return found


@click.group(cls=_Fuzzers)
def command() -> None:
    """Look for differences between the kernel and the model with random input."""


@command.command()
@click.option(
    "--for",
    "seconds",
    callback=seconds_of,
    metavar="TIME",
    help="Go on for so long (90s, 10m, 1h).",
)
@click.option("--count", type=click.IntRange(1), help="So many programs.  [default: 1000]")
@click.option("--seed", help="Repeat the run of that seed.  [default: a new one]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def calls(seconds: float | None, count: int | None, seed: str | None, as_json: bool) -> int:
    """Random programs of socket calls, compared call by call.

    Each is played on the kernel, in a private network namespace, and on the
    model: results, errnos, states and readiness must be the same. What
    differs is shrunk to the shortest program. Exit status 1 if anything does.
    """
    from timewait.lab import calls as lab

    if seed is None:
        seed = str(random.SystemRandom().randrange(10**9))
    if count is None and seconds is None:
        count = 1000
    started = time.monotonic()
    played = made = 0
    differences = []
    try:
        while (count is None or played < count) and (
            seconds is None or time.monotonic() - started < seconds
        ):
            size = _BATCH if count is None else min(_BATCH, count - played)
            programs = [lab.program(seed, played + i) for i in range(size)]
            for difference in lab.compare(programs):
                differences.append(lab.shrink(difference))
                if not as_json:
                    print(lab.show(differences[-1]), end="\n\n", flush=True)
            played += size
            made += sum(map(len, programs))
            if not as_json and sys.stderr.isatty():
                print(f"\r{played:,} programs", end="", file=sys.stderr, flush=True)
    except OSError as error:
        raise click.ClickException(f"the kernel cannot be asked: {error.strerror}") from None
    except KeyboardInterrupt:
        if not played:
            raise
    if sys.stderr.isatty() and not as_json:
        print("\r", end="", file=sys.stderr)
    if as_json:
        document = {
            "programs": played,
            "calls": made,
            "seed": seed,
            "seconds": round(time.monotonic() - started, 3),
            "differences": [
                {
                    "program": [list(call) for call in d.program[: d.at + 1]],
                    "kernel": _shown(d.kernel),
                    "model": _shown(d.model),
                }
                for d in differences
            ],
        }
        print(json.dumps(document, indent=2))
    else:
        print(
            f"{played:,} programs, {made:,} calls, {len(differences)} differences "
            f"(seed {seed}, {time.monotonic() - started:.0f} s)"
        )
    return 1 if differences else 0


def _shown(step: Any) -> dict[str, Any]:
    result, sockets = step
    return {
        "result": len(result) if isinstance(result, bytes) else result,
        "sockets": [
            {"slot": slot, "tcpi_state": state, "poll": mask} for slot, state, mask in sockets
        ],
    }

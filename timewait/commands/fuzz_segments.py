"""`timewait fuzz segments`: random calls and segments, the kernel over a wire against the model."""

from __future__ import annotations

import json
import random
import sys
import time

import click

from timewait.commands.fuzz import seconds_of

__all__ = ["command"]


@click.command(name="segments")
@click.option(
    "--for",
    "seconds",
    callback=seconds_of,
    metavar="TIME",
    help="Go on for so long (90s, 10m, 1h), then end the batch under way (most of a minute).",
)
@click.option("--count", type=click.IntRange(1), help="So many steps.  [default: 5000]")
@click.option("--seed", help="Repeat the run of that seed.  [default: a new one]")
@click.option("--profile", default="linux", show_default=True, help="The model's profile.")
@click.option(
    "--coverage",
    is_flag=True,
    help="Print which cells of the transition table were reached, and how often.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    seconds: float | None,
    count: int | None,
    seed: str | None,
    profile: str,
    coverage: bool,
    as_json: bool,
) -> int:
    """Random calls and segments, compared after each step.

    Connections are played to this machine's kernel over a wire whose other end
    is this process, and then to the model: segments sent, results, states,
    readiness and the end of TIME_WAIT must be the same. What differs, and still
    does when it is run again, is shrunk and printed as a packetdrill script
    that expects what the kernel did. What differs and is explained (see
    docs/differences.md) is counted by its name. Exit status 1 if anything else differs.
    """
    from timewait.lab import coverage as lab
    from timewait.lab.segments import Fuzzer
    from timewait.tcp.profiles import PROFILES

    if profile not in PROFILES:
        raise click.UsageError(f"no such profile: {profile!r} (there are {', '.join(PROFILES)})")
    if seed is None:
        seed = str(random.SystemRandom().randrange(10**9))
    if count is None and seconds is None:
        count = 5000
    started = time.monotonic()
    fuzzer = Fuzzer(seed, profile)
    show = sys.stderr.isatty() and not as_json
    try:
        for difference in fuzzer.run(seconds, count):
            if difference is not None and not as_json:
                click.echo(
                    f"{difference.about}: the kernel {difference.kernel}, "
                    f"the model {difference.model}\n\n{difference.script()}\n"
                )
            if show:
                print(f"\r{fuzzer.steps:,} steps", end="", file=sys.stderr, flush=True)
    except OSError as trouble:
        raise click.ClickException(f"{trouble.strerror or trouble}") from None
    except KeyboardInterrupt:
        if not fuzzer.steps:
            raise
    if show:
        print("\r", end="", file=sys.stderr)
    took = time.monotonic() - started
    if as_json:
        document = {
            "steps": fuzzer.steps,
            "cases": fuzzer.cases,
            "seed": seed,
            "profile": profile,
            "seconds": round(took, 3),
            "kept": dict(fuzzer.kept),
            "differences": [difference.to_json() for difference in fuzzer.differences],
            "reached": {
                f"{state} {event}": times
                for (state, event), times in sorted(fuzzer.reached.items())
            },
        }
        click.echo(json.dumps(document, indent=2))
    else:
        if coverage:
            click.echo(lab.table(fuzzer.reached, PROFILES[profile]) + "\n")
        kept = "".join(f", kept: {name} ({n})" for name, n in fuzzer.kept.items())
        click.echo(
            f"{fuzzer.steps:,} steps in {fuzzer.cases:,} connections, "
            f"{len(fuzzer.differences)} differences{kept} (seed {seed}, {took:.0f} s)"
        )
    return 1 if fuzzer.differences else 0

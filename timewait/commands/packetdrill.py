"""`timewait packetdrill`: run packetdrill scripts on the model, the kernel, or both."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

__all__ = ["command"]


@click.command(name="packetdrill", context_settings={"ignore_unknown_options": True})
@click.argument("files", nargs=-1, required=True, metavar="[--OPTION=VALUE]... FILE...")
@click.option(
    "--on",
    type=click.Choice(["model", "kernel", "both"]),
    default="model",
    show_default=True,
    help="The stack under test: the model in virtual time, the live kernel in a private "
    "network namespace, or one after the other.",
)
@click.option("--profile", default="linux", show_default=True, help="The model's profile.")
@click.option(
    "-D",
    "--define",
    "defines",
    multiple=True,
    metavar="NAME[=VALUE]",
    help="A name for #ifdef, or a word the script uses.",
)
@click.option(
    "-j",
    "--jobs",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    help="Scripts on the kernel at a time, each in a namespace of its own. What fails beside "
    "others is played again alone.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    files: tuple[str, ...],
    on: str,
    profile: str,
    defines: tuple[str, ...],
    jobs: int,
    as_json: bool,
) -> int:
    """Run packetdrill scripts (a directory stands for the .pkt files in it).

    Of packetdrill's own options (--ip_version=ipv6, --tolerance_usecs=10000,
    --mtu=1280, ...) those given here have the last word over a script's.

    Scripts are read, never executed: no command is run, no file written, and
    nothing leaves the namespace. What a script asks beyond the known language
    makes it "unsupported". Exit status: 0 if all passed, 1 if not.
    """
    from timewait.packetdrill import Outcome, play, read
    from timewait.packetdrill.settings import OPTIONS, is_one_for
    from timewait.tcp.profiles import PROFILES

    if profile not in PROFILES:
        raise click.UsageError(f"no such profile: {profile!r} (there are {', '.join(PROFILES)})")
    options = [
        (name, value)
        for name, _, value in (word[2:].partition("=") for word in files if word[:2] == "--")
    ]
    for word in files:
        if word[:1] == "-" and (word[1:2] != "-" or word[2:].partition("=")[0] not in OPTIONS):
            raise click.NoSuchOption(word.partition("=")[0])
    for name, value in options:
        if not is_one_for(name, value):
            raise click.UsageError(f"no value for --{name}: {value!r}")
    scripts = _scripts([Path(word) for word in files if word[:1] != "-"])
    try:  # what is no file may be read but once
        texts = {path: read(path) for path in {*scripts} if not path.is_file()}
    except OSError as trouble:
        raise click.ClickException(f"{trouble.filename}: {trouble.strerror}") from None
    names = dict(item.partition("=")[::2] for item in defines)
    stacks = ("model", "kernel") if on == "both" else (on,)

    def outcome_of(job: tuple[Path, str]) -> Outcome:
        path, stack = job
        return play(
            path, text=texts.get(path), on=stack, profile=profile, defines=names, options=options
        )

    def tell(stack: str, outcome: Outcome) -> None:
        if as_json:
            return
        where = f":{outcome.line}" if outcome.line else ""
        head = f"{outcome.outcome:<12}" + (f"{stack:<8}" if on == "both" else "")
        tail = f": {outcome.why}" if outcome.why else ""
        click.echo(f"{head}{outcome.path}{where}{tail}")
        if outcome.diagram:
            click.echo("\n".join("    " + r for r in outcome.diagram.splitlines()))

    outcomes: dict[tuple[Path, str], Outcome] = {}

    def tell_all(path: Path) -> None:
        for stack in stacks:
            tell(stack, outcomes[path, stack])

    again: list[Path] = []
    try:
        with ThreadPoolExecutor(jobs) as pool:
            # One stack after the other: the kernel keeps time, and the model has this process busy.
            for stack in stacks:
                todo = [(path, stack) for path in scripts]
                for job, outcome in zip(todo, pool.map(outcome_of, todo), strict=True):
                    outcomes[job] = outcome
                    beside = jobs > 1 and len(scripts) > 1 and stack == "kernel"
                    if beside and outcome.outcome == "failed":
                        again.append(job[0])
                    elif stack == stacks[-1]:
                        tell_all(job[0])
        for path in again:
            outcomes[path, "kernel"] = outcome_of((path, "kernel"))
            tell_all(path)
    except OSError as trouble:
        where = f"{trouble.filename}: " if trouble.filename else ""
        raise click.ClickException(f"{where}{trouble.strerror or trouble}") from None
    rows = [(stack, outcomes[path, stack]) for path in scripts for stack in stacks]
    counts = {
        name: sum(outcome.outcome == name for _, outcome in rows)
        for name in ("passed", "failed", "unsupported")
    }
    if as_json:
        click.echo(
            json.dumps(
                {
                    **counts,
                    "scripts": [
                        {
                            "path": outcome.path,
                            "outcome": outcome.outcome,
                            "line": outcome.line,
                            "why": outcome.why or None,
                            "on": stack,
                            "diagram": outcome.diagram or None,
                        }
                        for stack, outcome in rows
                    ],
                },
                indent=2,
                ensure_ascii=False,
            )
        )
    else:
        click.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
    return 0 if counts["passed"] == len(rows) else 1


def _scripts(given: list[Path]) -> list[Path]:
    """The scripts there, all of which can be read. Raises `click.ClickException`."""
    found: list[Path] = []
    for path in given:
        within = [path]
        if path.is_dir():
            every = sorted(path.rglob("*.pkt"))
            within = [each for each in every if each.is_file() or not each.exists()]
        if not within:
            raise click.ClickException(f"{path}: no .pkt files there")
        found += within
    for path in found:
        if not path.is_file():
            continue
        try:
            path.open("rb").close()
        except OSError as trouble:
            raise click.ClickException(f"{path}: {trouble.strerror}") from None
    if not found:
        raise click.UsageError("no scripts given")
    return found

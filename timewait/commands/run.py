"""`timewait run`: do a scenario on the kernel, on the model, or on both, and compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import structlog
from attrs import evolve
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.text import Text

from timewait import commands, report
from timewait.check import Verdict
from timewait.events import Writer
from timewait.kernel.namespace import isolate
from timewait.orchestrator import Waiting
from timewait.run import Run, run_sync
from timewait.scenario import BUILT_IN, WITH_FAULTS, Listen, Scenario, ScenarioError

__all__ = ["command"]


@click.command(
    help="Run SCENARIO, a built-in name (see timewait scenarios) or a TOML file, and show at each "
    "step the table that netstat would print, who closed first, who holds TIME_WAIT and for how "
    "long, what starting the server again did, and whether TCP allows what was seen.",
    epilog="Exit status: 0 what happened is what TCP allows, 1 it is not, 2 could not be run.",
)
@click.argument("scenario", metavar="SCENARIO")
@click.option(
    "--on",
    type=click.Choice(["kernel", "model", "wire", "both"]),
    default="both",
    show_default=True,
    help="The stack: this machine's kernel, the model, a wire between the two (clients on the "
    "kernel, the server modelled), or both kernel and model side by side; where the link has "
    "faults, wire and model.",
)
@click.option("--wait", is_flag=True, help="Really wait until the port is free (about 60 s).")
@click.option("--host", metavar="ADDRESS", help="Listen on this address instead.")
@click.option("--port", type=click.IntRange(0, 65535), help="Use this port; 0 picks a free one.")
@click.option(
    "--clients", type=click.IntRange(1), metavar="N", help="So many clients (built-in scenarios)."
)
@click.option("--reuse-address", is_flag=True, help="The servers set SO_REUSEADDR.")
@click.option("--reuse-port", is_flag=True, help="The servers set SO_REUSEPORT.")
@commands.events
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    metavar="ROLE=NAME",
    help="The model's TCP for server or client, linux if not given; repeatable.",
)
@click.option(
    "--observer",
    default="auto",
    show_default=True,
    metavar="NAME[+NAME]",
    help="Who watches the kernel: sock_diag or psutil, and tracepoint, capture.",
)
@click.option(
    "--isolated",
    is_flag=True,
    help="In a private network namespace, where a capture needs no root.",
)
@click.option("--allow-network", is_flag=True, help="Allow an address beyond loopback.")
@click.option(
    "--backend",
    type=click.Choice(["asyncio", "trio"]),
    default="asyncio",
    show_default=True,
    help="The event loop on the kernel.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log every event to standard error.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    scenario: str,
    on: str,
    wait: bool,
    host: str | None,
    port: int | None,
    clients: int | None,
    reuse_address: bool,
    reuse_port: bool,
    events: str | None,
    profiles: tuple[str, ...],
    observer: str,
    isolated: bool,
    allow_network: bool,
    backend: str,
    verbose: bool,
    as_json: bool,
) -> int:
    """Run it, print what came of it, return 0 or 1."""
    if verbose:
        structlog.configure(
            processors=[structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())],
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
    try:
        chosen = _chosen(scenario, clients)
        named = _profiles(profiles)
        if isolated:
            isolate()
        changes: dict[str, Any] = {"host": host, "port": port}
        chosen = evolve(chosen, **{k: v for k, v in changes.items() if v is not None})
        options: dict[str, Any] = {"reuse_address": True} if reuse_address else {}
        options |= {"reuse_port": True} if reuse_port else {}
        steps = (evolve(s, **options) if isinstance(s, Listen) else s for s in chosen.steps)
        chosen = evolve(chosen, steps=tuple(steps))
        with ExitStack() as stack:
            writer = None if events is None else stack.enter_context(Writer(events))
            runs = []
            real = "kernel" if "kernel" in chosen.stacks else "wire"
            for each in (real, "model") if on == "both" else (on,):
                with _progress(wait and each == "kernel") as waiting:
                    runs.append(
                        run_sync(
                            chosen,
                            each,
                            record=writer,
                            wait=waiting or wait,
                            observer=observer,
                            profiles=named,
                            allow_network=allow_network,
                            backend=backend,
                        )
                    )
                    chosen = runs[0].scenario  # the port that was picked serves both
    except ScenarioError as wrong:
        raise click.ClickException(str(wrong)) from None
    except OSError as wrong:
        what = "" if wrong.filename is None else f"{wrong.filename or repr('')}: "
        raise click.ClickException(f"{what}{wrong.strerror}") from None
    verdicts = [run.check() for run in runs]
    if as_json:
        click.echo(json.dumps(_document(chosen, runs, verdicts)))
    else:
        _show(chosen, runs, verdicts)
    return 0 if all(verdicts) and not any(run.wait_fault for run in runs) else 1


def _chosen(scenario: str, clients: int | None) -> Scenario:
    if scenario not in BUILT_IN | WITH_FAULTS and (
        scenario.endswith(".toml") or Path(scenario).exists()
    ):
        if clients is not None:
            raise ScenarioError("--clients is for built-in scenarios; a file says how many itself")
        return Scenario.load(scenario)
    return Scenario.built_in(scenario, 2 if clients is None else clients)


def _profiles(named: tuple[str, ...]) -> dict[str, str]:
    """The profile of each role, from ROLE=NAME."""
    from timewait.tcp.profiles import profile

    chosen = {}
    for each in named:
        role, _, name = each.partition("=")
        if role not in ("server", "client"):
            raise ScenarioError(f"--profile {each}: server=NAME or client=NAME is expected")
        try:
            profile(name)
        except ValueError as wrong:
            raise ScenarioError(f"--profile {each}: {wrong}") from None
        chosen[role] = name
    return chosen


def _document(scenario: Scenario, runs: list[Run], verdicts: list[Verdict]) -> dict[str, Any]:
    """One JSON document; its verdict is that of the first run that diverges, or of the first."""
    late = next((run.wait_fault for run in runs if run.wait_fault), None)
    worst = next((verdict for verdict in verdicts if not verdict), verdicts[0]).to_json()
    if late and worst["conforms"]:
        worst |= {"conforms": False, "divergence": {"kind": "wait", "why": late}}
    return {
        "scenario": scenario.name,
        "runs": [
            {**run.to_json(), "verdict": verdict.to_json()}
            for run, verdict in zip(runs, verdicts, strict=True)
        ],
        "verdict": worst,
    }


def _show(scenario: Scenario, runs: list[Run], verdicts: list[Verdict]) -> None:
    out = report.console()
    out.print(
        Text.assemble((scenario.name, "bold"), f": {scenario.about}" if scenario.about else "")
    )
    out.print(
        Text(f"everything is on {scenario.host}, the server's port is {scenario.port}", "dim")
    )
    out.print()
    out.print(report.side_by_side(runs, out.width))
    out.print(Rule(style="dim"))
    out.print(report.summary(runs))
    out.print()
    out.print(report.story(runs[0]))
    out.print()
    for run, verdict in zip(runs, verdicts, strict=True):
        out.print(report.verdict(run, verdict))
    if len(runs) > 1 and all(verdicts):
        out.print(report.agreement(*runs))


@contextmanager
def _progress(shown: bool) -> Iterator[Waiting | None]:
    """A bar on standard error that fills until the port is free."""
    if not shown:
        yield None
        return
    bar = Progress(
        TextColumn("waiting until the port is free"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
        console=report.console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None, visible=False, left="")

        def heard(waited: float, left: float | None) -> None:
            total = waited + (left or 0.0)
            text = f"{left:.0f} s by the kernel's timer" if left else "any moment"
            bar.update(task, completed=waited, total=total, visible=True, left=text)

        yield heard

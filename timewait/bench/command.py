"""The command `python -m timewait.bench`: run it, show a bar meanwhile, print what it found."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from attrs import asdict
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from timewait.bench import report
from timewait.bench.closes import COURSES, FAMILIES, Trial, closes, one_way
from timewait.bench.compare import Comparison, compare
from timewait.bench.ends import KINDS, available
from timewait.bench.ports import binds, churn, dealt_out
from timewait.cli import Command
from timewait.commands.wait import Seconds
from timewait.kernel.namespace import isolate
from timewait.report import console
from timewait.scenario import ScenarioError

_A_WAIT = 63.0  # seconds that a TIME_WAIT is waited for, its timer's step included


@click.command(
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="What does each way of closing a TCP connection cost: how long it takes, who holds "
    "TIME_WAIT, how long the port cannot be bound again, how many connections a second can be "
    "held; on this machine's kernel, beside the model.",
    epilog="Exit status: 0 every figure is what the model allows, 1 one is not, 2 could not be "
    "run, 130 interrupted (what there was is printed).",
)
@click.option("--only", multiple=True, type=click.Choice([*COURSES]), help="Only this course.")
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS]), help="Only this kind.")
@click.option("-n", "--connections", type=click.IntRange(1, 10_000), metavar="N",
              help="So many open, beside 1 and 100.  [default: 1000; --quick: 20]")  # fmt: skip
@click.option("--quick", is_flag=True, help="IPv4 only, 1 and N connections: under 10 seconds.")
@click.option("--seconds", type=Seconds(1, 3600), metavar="S",
              help="About so long: the longer, the surer.  [default: 60; --quick: 7]")  # fmt: skip
@click.option(
    "--wait", is_flag=True, help="Really wait for each port: about a minute, all at once."
)
@click.option(
    "--here", is_flag=True, help="Stay in this network namespace; leaves TIME_WAIT there."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--plot", type=click.Path(dir_okay=False), metavar="FILE.svg|png",
              help="Draw the states over time, and the times' distribution.")  # fmt: skip
@click.option("--compare", "old", type=click.Path(dir_okay=False), metavar="OLD.json",
              help="Say what has changed since an earlier --json.")  # fmt: skip
def command(
    only: tuple[str, ...],
    kinds: tuple[str, ...],
    connections: int | None,
    quick: bool,
    seconds: float | None,
    wait: bool,
    here: bool,
    as_json: bool,
    plot: str | None,
    old: str | None,
) -> int:
    """Run the benchmark and print what it found."""
    began = time.monotonic()
    pace: list[list[float]] = []
    earlier = None if old is None else _earlier(old)
    missing = [name for name in kinds if KINDS[name] not in available()]
    if missing:
        raise click.ClickException(f"{missing[0]} is not installed here")
    courses = [name for name in COURSES if not only or name in only]
    chosen = [kind for kind in available() if not kinds or kind.name in kinds]
    n = connections or (20 if quick else 1000)
    sizes = {n: 1, 1: 3} if quick else {n: 1, 100: 1, 1: 10}  # and in how many rounds
    families = ["ipv4"] if quick or not _has_ipv6() else [*FAMILIES]
    own = report.settings()
    isolated = not here and _isolate(own)
    draw = None if plot is None else _drawer(plot)  # after it: a process of threads is not let out
    _allow_descriptors(2 * max(sizes) + 64)
    gc.freeze()  # what is there by now need not be looked at between the trials
    found = report.Report(report.machine(), report.settings(), isolated, waited=wait)
    if earlier is not None:
        _compared(old, earlier, found)  # nobody waits for a run to hear that it is no document
    # What is most telling comes first, should the time not suffice for all.
    trials = [
        Trial(kind, COURSES[name], family, size, rounds)
        for size, rounds in sorted(sizes.items())
        for family in families
        for kind in chosen
        for name in courses
    ]
    lasts = seconds or (7.0 if quick else 60.0)
    with _bar(lasts + (_A_WAIT if wait else 0.0)) as tick:
        try:
            one_way(1)  # whether anything can be measured at all
            binds(courses, wait=wait, tick=tick, record=found.binds.append)
            if not only:
                try:
                    found.churns += churn(500, 1.2 if quick else 3.2, tick)
                except OSError as wrong:
                    found.left_out.append(f"connections a second: {wrong.strerror or wrong}")
            now = time.monotonic()
            waited = now - began if wait else 0.0
            try:
                closes(trials, max(began + waited + lasts, now + lasts / 4), tick, pace)
            finally:
                found.lasted = time.monotonic() - now
        except KeyboardInterrupt:
            found.interrupted = True
        except (OSError, ScenarioError) as wrong:
            raise click.ClickException(_why(wrong)) from None
    found.look_at(trials, pace)
    compared = None if earlier is None else _compared(old, earlier, found)
    if as_json:
        document = found.to_json()
        if compared is not None:
            document["compared"] = asdict(compared)
        click.echo(json.dumps(document))
    else:
        out = console()
        out.width = max(out.width, 80)  # a narrower terminal wraps: cells cut short tell nothing
        out.print(found.tables())
        if compared is not None:
            out.print(compared.table())
    if draw:
        draw(found)
    return 130 if found.interrupted else 1 if found.outside else 0


def _earlier(path: str) -> dict[str, Any]:
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as wrong:
        raise click.ClickException(f"{path}: {wrong.strerror}") from None
    except ValueError:
        raise click.ClickException(f"{path}: not JSON") from None
    if not isinstance(document, dict):
        raise click.ClickException(f"{path}: it is no document of this benchmark")
    return document


def _compared(path: str | None, earlier: Mapping[str, Any], found: report.Report) -> Comparison:
    try:
        return compare(earlier, found)
    except ValueError as wrong:
        raise click.ClickException(f"{path}: {wrong}") from None


def _drawer(path: str) -> Callable[[report.Report], None]:
    if Path(path).suffix not in (".svg", ".png"):
        raise click.ClickException(f"{path}: a name that ends in .svg or .png is expected")
    if not os.access(Path(path).parent, os.W_OK):
        raise click.ClickException(f"{path}: cannot be written there")
    try:
        from timewait.bench.plot import draw
    except ImportError:
        raise click.ClickException(
            "--plot takes matplotlib: pip install 'timewait[plot]'"
        ) from None

    def write(found: report.Report) -> None:
        try:
            draw(found, path)
        except OSError as wrong:
            raise click.ClickException(f"{path}: {wrong.strerror}") from None

    return write


def _isolate(own: dict[str, str]) -> bool:
    """Into a network namespace with the settings of this one; whether that is allowed."""
    try:
        isolate(sysctls=own)
    except OSError:
        return False
    return True


def _why(wrong: OSError | ScenarioError) -> str:
    """Why a connection could not be made, in one line."""
    match wrong:
        case OSError(errno=errno.EADDRNOTAVAIL | errno.EADDRINUSE):
            return (
                f"the {dealt_out()} ephemeral ports ran out (net.ipv4.ip_local_port_range): "
                "fewer --connections, or --only one course"
            )
        case OSError(errno=errno.ENETUNREACH):
            return "loopback is down in this network namespace: ip link set lo up"
        case OSError():
            return wrong.strerror or str(wrong)
    return str(wrong)


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def _allow_descriptors(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise click.ClickException(
                f"{wanted} file descriptors are needed and {hard} allowed: fewer --connections"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


@contextmanager
def _bar(seconds: float) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error, where that is a terminal."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        console=console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        auto_refresh=False,  # a thread of its own would disturb what is measured
    )
    with bar:
        task = bar.add_task("closing connections", total=seconds)
        began = time.monotonic()

        def tick() -> None:
            bar.update(task, completed=min(time.monotonic() - began, seconds))
            bar.refresh()

        tick()
        yield tick

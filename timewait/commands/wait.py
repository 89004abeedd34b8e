"""`timewait wait`: return as soon as a port can be bound; for scripts and start-up units."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isnan
from types import FrameType
from typing import Any, Final

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from timewait.bind import parse_address
from timewait.explain import Explanation, explain_bind
from timewait.watching import wait_until_bindable_sync

__all__ = ["TO_END", "Screen", "Seconds", "command"]


# Windows has no SIGHUP.
TO_END: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class Seconds(click.FloatRange):
    """A number of seconds; nan, which no time is past, is none."""

    name = "number of seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or one line of trouble."""
        seconds: float = super().convert(value, param, ctx)
        if isnan(seconds):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return seconds


class Screen(Console):
    """A terminal whose cursor stays visible: who is killed could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        """Leave it as it is."""
        return False


class _Bar(Progress):
    """The reason for the wait, and under it how much of it is over."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield Text(task.description, overflow="ellipsis", no_wrap=True)
        yield self.make_tasks_table(self.tasks)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have signals to end the program end it as an exit does, so that the bar is taken away."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, end)
        for number in TO_END
        if signal.getsignal(number) is signal.SIG_DFL
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@click.command(
    help="Wait until a server could bind [HOST:]PORT (HOST is 0.0.0.0 if not given) and listen, "
    "and return at once then. On a terminal a bar shows how long yet and what is in the way.",
    epilog="Exit status: 0 it can be bound, 1 the time was up, 2 it could not be tried.",
)
@click.argument("address", metavar="[HOST:]PORT")
@click.option("--timeout", type=Seconds(min=0), metavar="S", help="Give up after S seconds.")
@click.option("--reuse-address", is_flag=True, help="For a server that sets SO_REUSEADDR.")
@click.option("--reuse-port", is_flag=True, help="For a server that sets SO_REUSEPORT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document at the end.")
def command(
    address: str, timeout: float | None, reuse_address: bool, reuse_port: bool, as_json: bool
) -> int:
    """Wait, with a bar on standard error where that is a terminal."""
    try:
        host, port = parse_address(address)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    bar = _Bar(
        BarColumn(bar_width=20),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
        console=Screen(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    task = bar.add_task("", total=None, left="")

    began = time.monotonic()

    def show(found: Explanation) -> None:
        left, passed = found.free_after, time.monotonic() - began
        bar.update(
            task,
            description=found.reason,
            total=None if left is None else passed + left,
            completed=passed,
            left="" if left is None else f"{left:.0f} s left",
        )

    waited, trouble = None, None
    try:
        with _ended_in_order(), bar:
            waited = wait_until_bindable_sync(
                port,
                host,
                timeout=timeout,
                reuse_address=reuse_address,
                reuse_port=reuse_port,
                progress=show if sys.stderr.isatty() else None,
            )
    except TimeoutError as error:
        trouble = str(error)
    except OSError as error:
        raise click.ClickException(error.strerror or str(error)) from None
    if as_json:
        click.echo(
            json.dumps(
                {
                    "bindable": trouble is None,
                    "waited": waited,
                    "reason": trouble,
                    "explanation": explain_bind(port, host).to_json(),
                }
            )
        )
    elif trouble is not None:
        click.echo(f"timewait: {trouble}", err=True)
    return 0 if trouble is None else 1

"""`timewait watch`: a live table of a port's sockets and a feed of what happens to them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from types import FrameType
from typing import Final

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from timewait.bind import addresses, parse_address
from timewait.commands.wait import TO_END, Screen, Seconds
from timewait.events import (
    Address,
    Called,
    Event,
    Lost,
    Note,
    Row,
    RunEnded,
    RunStarted,
    SegmentSeen,
    Transition,
    dump,
)
from timewait.kernel.namespace import isolate
from timewait.kernel.observers import OBSERVERS
from timewait.owned import Owned
from timewait.program import Start, exit_status, none_outlives_us, passing_signals_on
from timewait.report import address as address_text
from timewait.tcp.segment import flags_text
from timewait.tcp.states import State
from timewait.watching import Watch

__all__ = ["command"]

_FEED: Final = 10
_ORDER: Final = {State.LISTEN: 0, State.TIME_WAIT: 2}
_TICK: Final = 0.1  # seconds between two looks at what there is to show


class _WithCommand(click.Command):
    """Takes what stands after `--` as a command line of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.obj = []
        if "--" in args:
            at = args.index("--")
            args, ctx.obj = args[:at], args[at + 1 :]
            if not ctx.obj:
                raise click.UsageError("no command after --", ctx)
        return super().parse_args(ctx, args)


@click.command(
    cls=_WithCommand,
    help="Show the sockets of PORT with their timers, and each transition as it happens, until "
    "Ctrl-C. Where the output is no terminal, and with --json, print the events one a line. With "
    "a COMMAND, run it, watch until it ends, and exit as it does; signals to end are passed on to "
    "it. If no PORT is given, its own connections are watched then, both ends of them, and those "
    "of what it starts.",
    epilog="Exit status: 0 (or COMMAND's own), 2 could not watch.",
)
@click.argument("address", metavar="[HOST:]PORT [-- COMMAND...]", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print the event stream as JSON Lines.")
@click.option(
    "--observer",
    type=click.Choice(["auto", *OBSERVERS]),
    default="auto",
    show_default=True,
    help="Who looks; auto takes the strongest that is allowed, and says why not a better one.",
)
@click.option("--for", "seconds", type=Seconds(min=0), metavar="S", help="End after S seconds.")
@click.option(
    "--isolated",
    is_flag=True,
    help="Run COMMAND in a private network namespace, of which sock_diag (then auto's choice) and "
    "--observer capture see nothing else and need no root.",
)
@click.pass_context
def command(
    ctx: click.Context,
    address: str | None,
    as_json: bool,
    observer: str,
    seconds: float | None,
    isolated: bool,
) -> int:
    """Watch until interrupted, the time is up, or the command has ended."""
    program: list[str] = ctx.obj
    hosts: frozenset[str] = frozenset()
    port = None
    if address is not None:
        try:
            host, port = parse_address(address)
            hosts = _shown_as(host)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        except OSError as error:
            raise click.ClickException(error.strerror or str(error)) from None
    if address is None and not program:
        raise click.UsageError("which port? give [HOST:]PORT, or a command after --")
    if port == 0:
        raise click.UsageError("port 0 is nobody's: bind() and connect() take it for any")
    if isolated and not program:
        raise click.UsageError("--isolated needs a command after --: nothing else is in there")
    told = _Told()
    with ExitStack() as stack:
        start = stack.enter_context(passing_signals_on() if program else _telling(told))
        if isolated:
            rights = isolate()
            stack.enter_context(none_outlives_us())
            if observer == "auto":
                observer = "sock_diag"
                why = (
                    "it tells of every namespace's resets" if rights == "root" else "it takes root"
                )
                click.echo(f"timewait: watching with {observer}, not tracepoint: {why}", err=True)
        theirs = program and port is None and not isolated
        owned = stack.enter_context(Owned()) if theirs else None
        seen = Watch(port, observer, owned)
        status = _watch(seen, _Feed(hosts, as_json), as_json, seconds, program, start, told)
        if owned is not None and owned.unknown:
            why = "were gone before it could be seen whose they were (--isolated has no others)"
            click.echo(f"timewait: {owned.unknown} of these sockets {why}", err=True)
    return status


def _shown_as(host: str) -> frozenset[str]:
    """The addresses to watch, as the kernel shows them; empty for all."""
    shown = {ip_address(each.partition("%")[0]) for each in addresses(host)}
    if any(each.is_unspecified for each in shown):
        return frozenset()
    return frozenset(str(getattr(each, "ipv4_mapped", None) or each) for each in shown)


class _Told:
    """Whether it has been told to end: not by an exception, which would cut a line short."""

    to_end = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.to_end = True


@contextmanager
def _telling(told: _Told) -> Iterator[None]:
    """Have signals tell it, but for those that are ignored, as of a shell's background job."""
    before = {
        number: signal.signal(number, told)
        for number in (signal.SIGINT, *TO_END)
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    seen: Watch,
    feed: _Feed,
    as_json: bool,
    seconds: float | None,
    program: list[str],
    start: Start | None,
    told: _Told,
) -> int:
    process: subprocess.Popen[bytes] | None = None
    with seen:
        for reason in seen.why_not:
            click.echo(f"timewait: watching with {seen.observer}, {reason}", err=True)
        if start is not None:
            # What the command prints must not come between the lines of JSON.
            try:
                process = start(program, sys.stderr.fileno() if as_json else None)
            except OSError as trouble:
                why = f"{program[0] or repr('')}: {trouble.strerror}"
                raise click.ClickException(why) from None
        until = None if seconds is None else time.monotonic() + seconds

        def over() -> bool:
            ended = process is not None and process.poll() is not None
            return told.to_end or ended or (until is not None and time.monotonic() >= until)

        try:
            if as_json or process is not None or not sys.stdout.isatty():
                while not over():
                    feed.print(seen)
                    time.sleep(_TICK)
            else:
                _live(seen, feed, over)
        finally:
            status = _end(process)
    feed.print(seen)
    if as_json:
        click.echo(json.dumps(dump(RunEnded(feed.latest))))
    if seen.lost:
        click.echo(f"timewait: {seen.lost} events were lost", err=True)
    return status


def _end(process: subprocess.Popen[bytes] | None) -> int:
    """The command's exit status as a shell gives it; one that still runs is told to end."""
    if process is None:
        return 0
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
    return exit_status(process)


class _Feed:
    """What has happened, as lines; each event is printed once."""

    def __init__(self, hosts: frozenset[str], as_json: bool) -> None:
        self._hosts = hosts
        self._as_json = as_json
        self.latest = 0.0
        self.last: deque[str] = deque(maxlen=_FEED)

    def take(self, seen: Watch) -> list[Event]:
        """The events that are new, of the hosts asked for.

        They are not kept: a watch may last for days.
        """
        new = seen.events[:]
        del seen.events[: len(new)]
        self.latest = max([self.latest, *(event.t for event in new)])
        return [event for event in new if self._wanted(event)]

    def rows(self, seen: Watch) -> list[Row]:
        """The sockets of the hosts asked for: those that live, then as their time is up."""
        return sorted(
            (row for row in seen.rows() if self.concerns(row.local, row.remote)),
            key=lambda row: (_ORDER.get(row.state, 1), row.seconds_left or 0.0, row.local[1]),
        )

    def concerns(self, *ends: Address) -> bool:
        """Whether one of these is of a host asked for."""
        return not self._hosts or any(host in self._hosts for host, _ in ends)

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, Transition):
            return self.concerns(event.local, event.remote)
        if isinstance(event, SegmentSeen):
            return self.concerns(event.src, event.dst)
        if isinstance(event, Note) and event.local is not None and event.remote is not None:
            return self.concerns(event.local, event.remote)
        return True

    def print(self, seen: Watch) -> None:
        """Print what is new."""
        for event in self.take(seen):
            click.echo(json.dumps(dump(event)) if self._as_json else _line(event))


def _line(event: Event, width: int = 48) -> str:
    return f"{event.t:10.6f}  {_what(event, width)}"


def _what(event: Event, width: int) -> str:
    """In words, a connection's two ends padded to `width`."""
    if isinstance(event, Transition):
        ends = address_text(event.local)
        if event.remote[1]:
            ends += f" \N{RIGHTWARDS ARROW} {address_text(event.remote)}"
        cause = f" ({event.cause})" if event.cause else ""
        about = " about" if event.sampled else ""
        return f"{ends:{width}} {event.old} \N{RIGHTWARDS ARROW} {event.new}{cause}{about}"
    if isinstance(event, SegmentSeen):
        ends = f"{address_text(event.src)} > {address_text(event.dst)}"
        return (
            f"{ends:{width}} {flags_text(event.flags)} seq={event.seq} ack={event.ack} "
            f"len={event.length}"
        )
    if isinstance(event, Lost):
        return f"{event.count} events lost: {event.why}"
    if isinstance(event, Note):
        return event.text
    if isinstance(event, RunStarted):
        return f"watching with {event.observer}"
    assert not isinstance(event, Called)
    return event.kind


def _live(seen: Watch, feed: _Feed, over: Callable[[], bool]) -> None:
    with Live(console=Screen(), auto_refresh=False) as live:
        while sys.stdout.isatty():
            # Where there is room for it, the states are below one another.
            width = min(max(live.console.width - 40, 0), 48)
            feed.last.extend(_line(event, width) for event in feed.take(seen))
            shown = Group(
                _table(feed.rows(seen), live.console.height - len(feed.last)),
                Text("\n".join(feed.last), overflow="ellipsis", no_wrap=True),
            )
            live.update(shown, refresh=True)
            if over():  # only now: the last table shows how it ended
                return
            time.sleep(_TICK)


def _table(rows: list[Row], height: int) -> Table:
    """The first of the rows that there is room for, under a line that counts all of them."""
    count = Counter(row.state.name for row in rows)
    table = Table(
        box=None,
        pad_edge=False,
        title=", ".join(f"{n} {state}" for state, n in count.most_common()) or "no sockets",
        title_justify="left",
    )
    for name in ("Local", "Remote", "State", "Timer", "Left"):
        table.add_column(name, justify="right" if name == "Left" else "left", no_wrap=True)
    for row in rows[: max(height - 3, 1)]:
        table.add_row(
            address_text(row.local),
            address_text(row.remote),
            row.state.name,
            row.timer or "",
            "" if row.seconds_left is None else f"{row.seconds_left:.1f} s",
        )
    return table

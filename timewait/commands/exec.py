"""`timewait exec`: run any program in a private network, see all of its TCP, and judge it.

The namespace is the program's alone, so nothing that is seen is anybody
else's: every segment is captured, the socket table is read again and again,
and at the end the check says whether it was all as TCP allows. That needs no
root where the system allows user namespaces, and no knowledge of the
program's language.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Final

import click

from timewait import commands
from timewait.check import Answers, Checker, Connection, Verdict, answers
from timewait.check.verdict import address_text
from timewait.events import Address, Event, Row, RunStarted, SegmentSeen, Snapshot, Writer
from timewait.kernel.capture import Capture
from timewait.kernel.namespace import isolate
from timewait.kernel.sock_diag import SockDiag
from timewait.program import exit_status, none_outlives_us, passing_signals_on
from timewait.tcp.states import State
from timewait.witness import descendants

__all__ = ["command"]

_PERIOD: Final = 0.005  # seconds between looks at the socket table
_QUIET: Final = 0.05  # seconds without a segment before a look at the table is of one instant
_PATIENCE: Final = 1.0  # seconds for a close that is under way when the program ends
_SUBREAPER: Final = 36  # prctl(2): PR_SET_CHILD_SUBREAPER
_STILL: Final = {State.LISTEN, State.ESTABLISHED, State.CLOSE_WAIT, State.FIN_WAIT_2}
_STILL.add(State.TIME_WAIT)


@click.command(
    help="Run COMMAND in a private network namespace that has only a loopback, without root where "
    "the system allows it. Every TCP segment is captured and the socket table is watched; at the "
    "end a line for each connection (who closed first, who holds TIME_WAIT), what is left, and "
    "whether TCP allows it are printed on standard error. Signals to end are passed on to COMMAND; "
    "what outlives it is ended.",
    epilog="Exit status: COMMAND's own if that is not 0; else 0 what was seen conforms, 1 it "
    "diverges, 2 no private network can be had.",
    context_settings={"ignore_unknown_options": True},
)
@click.option("--as-root", is_flag=True, help="Let COMMAND be root inside its own namespace.")
@commands.events
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON document; COMMAND's own output goes to standard error.",
)
@click.argument(
    "argv", metavar="COMMAND [ARGS]...", nargs=-1, required=True, type=click.UNPROCESSED
)
def command(argv: tuple[str, ...], as_root: bool, events: str | None, as_json: bool) -> int:
    """Run it, print what was seen, return the exit status."""
    told: list[tuple[Connection, Answers]] = []
    checker = Checker(on_end=lambda connection: told.append((connection, answers(connection))))
    with ExitStack() as stack:
        try:
            writer = None if events is None else stack.enter_context(Writer(events))
            isolate(uid=0 if as_root else os.geteuid())
            guard = stack.enter_context(none_outlives_us())
            watch = stack.enter_context(_Watch(checker, writer))
        except OSError as refused:
            where = "" if refused.filename is None else f"{refused.filename or repr('')}: "
            raise click.ClickException(f"{where}{refused.strerror or refused}") from None
        status, outlived, left = _run(argv, watch, sys.stderr.fileno() if as_json else None, guard)
    verdict = checker.verdict()
    if as_json:
        click.echo(json.dumps(_document(argv, status, outlived, left, told, watch, verdict)))
    else:
        for connection, answer in told:
            wrong = "DIVERGES; " if connection.divergence else ""
            click.echo(f"{connection.name}  {wrong}{answer}", err=True)
        click.echo(_in_words(status, outlived, left, told, watch, verdict), err=True)
    return status or (0 if verdict else 1)


class _Watch:
    """Feeds the check everything that happens in this process's network namespace."""

    def __init__(self, checker: Checker, writer: Writer | None) -> None:
        self.rows: list[Row] = []
        self.segments = 0
        self._table: set[tuple[Address, Address, State]] = set()
        self._checker, self._writer = checker, writer
        self._resources = ExitStack()

    def __enter__(self) -> _Watch:
        self._start = self._moved = time.monotonic()
        self._capture = self._resources.enter_context(Capture(start=self._start))
        self._diag = self._resources.enter_context(SockDiag())
        blind = ("states while segments pass (they follow from the segments)",)
        self._tell(RunStarted(0.0, "kernel", "capture and sock_diag", blind=blind))
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def fileno(self) -> int:
        """Readable when segments have come."""
        return self._capture.fileno()

    def look(self) -> None:
        """Take in the segments, and the table if nothing moved while it was read."""
        self._drain()
        began = time.monotonic()
        self.rows = self._diag.sockets()
        now = time.monotonic()
        self._drain()
        if began - self._moved < _QUIET:
            return  # read in pieces while sockets change, it shows no one instant
        table = {(row.local, row.remote, row.state) for row in self.rows}
        if table != self._table:
            self._table = table
            self._tell(Snapshot(now - self._start, "", tuple(self.rows), "sock_diag"))

    def _drain(self) -> None:
        for event in self._capture.read():
            self._moved = self._start + event.t
            if isinstance(event, SegmentSeen):
                self.segments += 1
            self._tell(event)

    def settle(self) -> None:
        """Let a close that is under way come to its end."""
        deadline = time.monotonic() + _PATIENCE
        self.look()
        while time.monotonic() < deadline and (
            time.monotonic() - self._moved < 2 * _QUIET
            or any(row.state not in _STILL for row in self.rows)
        ):
            time.sleep(_PERIOD)
            self.look()

    def _tell(self, event: Event) -> None:
        self._checker.feed(event)
        if self._writer is not None:
            self._writer(event)


def _run(
    argv: tuple[str, ...], watch: _Watch, stdout: int | None, guard: int
) -> tuple[int, list[int], list[Row]]:
    """Run the program to its end; its exit status, and the processes and sockets it left."""
    with passing_signals_on() as start, _no_survivors(guard) as survivors:
        try:
            process = start(argv, stdout)
        except OSError as trouble:
            raise click.ClickException(f"{argv[0] or repr('')}: {trouble.strerror}") from None
        end = os.pidfd_open(process.pid)
        try:
            while not select.select([end], [], [], _PERIOD)[0]:
                watch.look()
        finally:
            os.close(end)
        status = exit_status(process)
        watch.settle()
        outlived, left = survivors(), watch.rows
    watch.settle()
    return status, outlived, left


@contextmanager
def _no_survivors(guard: int) -> Iterator[Callable[[], list[int]]]:
    """End all processes that were started inside, also those whose parents have ended."""

    def survivors() -> list[int]:
        return [pid for pid in descendants(os.getpid()) if pid != guard]

    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SUBREAPER, 1, 0, 0, 0)
    try:
        yield survivors
    finally:
        while left := survivors():
            for pid in left:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        libc.prctl(_SUBREAPER, 0, 0, 0, 0)


def _document(
    argv: tuple[str, ...],
    status: int,
    outlived: list[int],
    left: list[Row],
    told: list[tuple[Connection, Answers]],
    watch: _Watch,
    verdict: Verdict,
) -> dict[str, Any]:
    return {
        "command": list(argv),
        "exit": status,
        "outlived": outlived,
        "segments": watch.segments,
        "connections": [
            {**answer.to_json(), "conforms": connection.divergence is None}
            for connection, answer in told
        ],
        "left": [
            {"local": row.local, "remote": row.remote, "state": str(row.state)} for row in left
        ],
        "verdict": verdict.to_json(),
    }


def _in_words(
    status: int,
    outlived: list[int],
    left: list[Row],
    told: list[tuple[Connection, Answers]],
    watch: _Watch,
    verdict: Verdict,
) -> str:
    by_state: dict[State, list[Row]] = {}
    for row in left:
        by_state.setdefault(row.state, []).append(row)
    counts = ", ".join(f"{len(rows)} in {state}" for state, rows in sorted(by_state.items()))
    lines = [
        f"{_count(len(told), 'connection')}, {_count(watch.segments, 'segment')}; "
        f"left: {counts or 'nothing'}; exit status {status}"
    ]
    lines += [
        f"{address_text(row.local)} <- {address_text(row.remote)}  never closed: CLOSE_WAIT"
        for row in by_state.get(State.CLOSE_WAIT, ())
    ]
    if outlived:
        were = "was" if len(outlived) == 1 else "were"
        processes = _count(len(outlived), "process", "processes")
        lines.append(f"{processes} outlived it, and {were} ended")
    return "\n".join([*lines, verdict.explain()])


def _count(number: int, one: str, more: str = "") -> str:
    return f"{number:,} {one if number == 1 else more or one + 's'}"

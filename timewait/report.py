"""A run as people read it: netstat's tables, stacks side by side, and what it comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from rich.console import Console, Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from timewait.events import Address, Row, Snapshot
from timewait.scenario import Inject, Vanish
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.check import Verdict
    from timewait.run import Run

__all__ = [
    "address",
    "agreement",
    "console",
    "netstat",
    "side_by_side",
    "story",
    "summary",
    "verdict",
]

_COLOURS: Final = {
    State.LISTEN: "blue",
    State.ESTABLISHED: "green",
    State.TIME_WAIT: "bold yellow",
    State.CLOSE_WAIT: "magenta",
    State.FIN_WAIT_2: "cyan",
}
_MANY: Final = 16  # rows from which a table is told in numbers
_WIDE: Final = 54  # columns that a row of netstat with its timer takes
_NARROW: Final = 37  # columns that it takes without addresses, and the gap to the next


def address(where: Address) -> str:
    """As netstat writes it, `"127.0.0.1:9090"`, `"0.0.0.0:*"`; IPv6 in brackets."""
    host, port = where
    return f"{f'[{host}]' if ':' in host else host or '*'}:{port or '*'}"


def netstat(rows: Iterable[Row]) -> str:
    """The rows as `netstat -an` prints them, a line each.

    As there, a listener's second queue is 0: its backlog is not in the table.
    """
    cells = [
        (
            "tcp6" if ":" in row.local[0] else "tcp",
            f"{row.recv_q}  {0 if row.state is State.LISTEN else row.send_q}",
            address(row.local),
            address(row.remote),
            row.state.name,
        )
        for row in rows
    ]
    kind, queues, local, remote = (
        max((len(line[column]) for line in cells), default=0) for column in range(4)
    )
    return "\n".join(
        f"{k:{kind}}  {q:{queues}} {here:{local}}  {there:{remote}}  {state}"
        for k, q, here, there, state in cells
    )


def side_by_side(runs: Sequence[Run], width: int) -> RenderableType:
    """The tables of the runs, step by step, each stack in a column of its own.

    Where there is no room for that, one stack after the other.
    """
    if len(runs) > 1 and width // len(runs) < _NARROW:
        return Group(*(side_by_side([run], width) for run in runs))
    full = width // len(runs) > _WIDE
    lines: list[RenderableType] = [_columns(Text(_seen_by(run), style="bold") for run in runs)]
    for snapshots in zip_longest(*(run.snapshots for run in runs)):
        label = next(snapshot.label for snapshot in snapshots if snapshot)
        lines.append(Rule(Text(label, style="bold"), align="left", style="dim"))
        lines.append(
            _columns(_table(run, each, full) for run, each in zip(runs, snapshots, strict=True))
        )
    return Group(*lines)


def _seen_by(run: Run) -> str:
    how = " and ".join(sorted(set(run.profiles.values()))) if run.stack == "model" else run.observer
    return f"{run.stack} ({how})"


def _columns(cells: Iterable[RenderableType]) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    row = list(cells)
    for _ in row:
        grid.add_column(ratio=1, no_wrap=True, overflow="fold")
    grid.add_row(*row)
    return grid


def _table(run: Run, snapshot: Snapshot | None, full: bool) -> RenderableType:
    rows = snapshot.rows if snapshot else ()
    if not rows:
        return Text("no socket left" if snapshot else "", style="dim")
    if len(rows) > _MANY:
        kinds = Counter((run.side(row), row.state) for row in rows)
        return Text("\n").join(
            Text.assemble(f"{count:6} ", (state.name, _COLOURS.get(state, "")), f" {side}")
            for (side, state), count in kinds.items()
        )
    grid = Table.grid(padding=(0, 2))
    for row in rows:
        where = (row.local, row.remote) if full else (("*", row.local[1]), ("*", row.remote[1]))
        left = f"{row.seconds_left:.1f} s" if row.timer == "time_wait" and row.seconds_left else ""
        grid.add_row(
            *(address(each) if full else address(each)[1:] for each in where),
            Text(row.state.name, style=_COLOURS.get(row.state, "")),
            Text(left, style="dim"),
        )
    return grid


def summary(runs: Sequence[Run]) -> RenderableType:
    """Who closed first, who holds TIME_WAIT, what the restart did: a line each."""
    grid = Table.grid(padding=(0, 2))
    grid.add_row("", *(Text(run.stack, style="bold") for run in runs))
    answers = [dict(_answers(run)) for run in runs]
    for question in max(answers, key=len):
        grid.add_row(question, *(Text(each.get(question, "")) for each in answers))
    return grid


def _answers(run: Run) -> Iterator[tuple[str, str]]:
    held, again = run.time_wait, run.restart
    yield "closed first", run.active_closer or "nobody"
    holder = f"{held.holder}, {_sockets(held.sockets)}" if held.holder else "nobody"
    if held.seconds_left is not None:
        holder += f", {held.seconds_left:.1f} s left"
    yield "holds TIME_WAIT", holder
    if again.ok is None:
        yield "restart", "not tried"
    else:
        yield "restart", "succeeds" if again.ok else f"{again.name} from {again.call}()"
    if again.free_after is None:
        free = "no timer says" if again.ok is False else "-"
    else:
        free = "at once" if not again.free_after else f"in {again.free_after:.1f} s"
    yield "port is free", free
    if again.waited is not None and run.wait_allowed:
        least, most = run.wait_allowed
        allowed = f"{least:.1f}" if least == most else f"{least:.1f} to {most:.1f}"
        yield "waited", f"{again.waited:.2f} s (allowed: {allowed})"


def _time_wait(table: Sequence[Snapshot]) -> bool:
    return any(row.state is State.TIME_WAIT for snapshot in table for row in snapshot.rows)


def _sockets(count: int) -> str:
    return "1 socket" if count == 1 else f"{count} sockets"


def story(run: Run) -> str:
    """What happened, and why it had to, in a sentence or two."""
    held, again = run.time_wait, run.restart
    # A port that was waited for is free in the last table, and the one before it tells why not.
    table = run.snapshots[-1 if again.waited is None else -2 :][:1]
    last = {(run.side(row), row.state) for snapshot in table for row in snapshot.rows}
    steps = run.scenario.steps
    match held.holder:
        case _ if any(isinstance(step, Vanish) and not step.back for step in steps):
            text = "What vanished ends nothing: its peers wait until their own timers give up."
        case "both":
            text = "Both ends closed, so each side holds TIME_WAIT."
        case "server" | "client":
            who = "server" if held.holder == "server" else "clients"
            text = f"The {who} closed first, so TIME_WAIT is on the {who}' side.".replace(
                "server'", "server's"
            )
        case _ if ("server", State.FIN_WAIT_2) in last:
            text = "The server's sockets are orphans in FIN_WAIT_2: the clients never close."
        case _ if ("server", State.CLOSE_WAIT) in last:
            text = "The clients closed and the server did not: its sockets stay in CLOSE_WAIT."
        case _ if run.active_closer:
            text = "A reset ended the connections: no TIME_WAIT on either side."
        case _:
            text = "Nobody closed."
    if any(isinstance(step, Inject) for step in steps) and held.holder and not _time_wait(table):
        text += " A segment that nobody sent has ended it."
    if again.ok is None:
        return text
    if again.ok:
        why = "nothing holds" if not _on_port(run) else "the sockets' options let it share"
        return f"{text} The server starts again at once: {why} its port."
    until = (
        "until the sockets that hold its port are closed"
        if again.free_after is None
        else f"for {again.free_after:.0f} s"
    )
    return f"{text} The server cannot start again {until}: {again.call}() fails with {again.name}."


def _on_port(run: Run) -> bool:
    rows = run.snapshots[-1].rows if run.snapshots else ()
    return any(run.side(row) == "server" and row.state is not State.LISTEN for row in rows)


def verdict(run: Run, verdict: Verdict) -> Text:
    """Whether TCP allows what was seen on the stack, and on what evidence."""
    head, *rest = verdict.explain().splitlines()
    told = Text.assemble(
        (f"{run.stack}: ", "bold"),
        (head, "green" if verdict else "bold red"),
        *(f"\n{line}" for line in rest),
    )
    if run.wait_fault:
        told.append(f"\n{run.stack}: {run.wait_fault}", "bold red")
    return told


def agreement(kernel: Run, model: Run) -> Text:
    """Whether the tables of two runs are the same, ephemeral ports and timers aside."""
    for ours, theirs in zip(kernel.snapshots, model.snapshots, strict=False):
        if _states(kernel, ours) != _states(model, theirs):
            return Text(
                f"the tables differ at {ours.label!r}: each is a course that TCP allows", "yellow"
            )
    return Text("the tables of the two are the same, ephemeral ports and timers aside", "green")


def _states(run: Run, snapshot: Snapshot) -> Counter[tuple[str, State]]:
    return Counter((run.side(row), row.state) for row in snapshot.rows)


class _Console(Console):
    """A console that leaves it to the command line what a reader's going away means."""

    def on_broken_pipe(self) -> None:
        raise


def console(stderr: bool = False, width: int | None = None) -> Console:
    """A console that colours only on a terminal and never wraps a word in two.

    Printing on it raises `BrokenPipeError` where nobody reads on.
    """
    return _Console(stderr=stderr, width=width, highlight=False, soft_wrap=False)

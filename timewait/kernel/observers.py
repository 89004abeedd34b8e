"""The ways to watch the kernel, behind one interface, and the choice of the best one allowed.

An observer yields the same typed events whichever it is, says in `blind` what
it cannot see, and counts in `lost` what it missed.

| observer | sees | needs |
|---|---|---|
| tracepoint | every transition, when it happens | root |
| sock_diag | the table at instants, with timers | nothing (Linux) |
| psutil | the table at instants, states only | the psutil package |
| capture | every segment, and no state | CAP_NET_RAW |
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from importlib import import_module
from itertools import count
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias

from timewait.events import Address, Event, Lost, Note, Row, Transition
from timewait.kernel.sock_diag import Destroyed, SockDiag, address_text, port_number
from timewait.tcp.states import State

__all__ = ["OBSERVERS", "Observer", "Sampled", "observe", "psutil_rows"]

_Look: TypeAlias = Callable[[], dict[object, Row]]


class Observer(Protocol):
    """What every observer can do; each is a context manager."""

    @property
    def name(self) -> str:
        """Which one it is."""

    @property
    def blind(self) -> tuple[str, ...]:
        """In words, what it cannot see."""

    @property
    def lost(self) -> int:
        """How many events it missed and knows of."""

    @property
    def start(self) -> float:
        """When event times are 0, in seconds of `time.monotonic`."""

    def read(self) -> list[Event]:
        """All events since the last call; never waits. Raises `ValueError` once closed."""

    def fileno(self) -> int | None:
        """A descriptor that is readable when there is something to read; None where none is."""

    def rows(self, port: int) -> list[Row]:
        """The sockets with this port at either end, now."""

    def close(self) -> None:
        """Stop, leaving nothing behind."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Sampled:
    """An observer that compares the table of sockets with what it was at the last look.

    Each `read` looks once. `period` is when it would look again, in seconds:
    soon while things change, seldom while they do not, and never so often
    that looking takes more than a twentieth of the time. `ended` tells which
    sockets have been destroyed meanwhile, where anything does, and how many
    such notices have been lost so far.
    """

    SOONEST: Final = 0.001
    LATEST: Final = 0.1

    def __init__(
        self,
        name: str,
        blind: tuple[str, ...],
        look: _Look,
        rows: Callable[[int], list[Row]],
        *,
        start: float | None = None,
        ended: Callable[[], tuple[dict[int, Row], int]] = lambda: ({}, 0),
        resources: ExitStack | None = None,
    ) -> None:
        self.name = name
        self.blind = blind
        self.lost = 0
        self.start = time.monotonic() if start is None else start
        self.period = self.SOONEST
        self.rows = rows
        self._look = look
        self._ended = ended
        self._resources = resources or ExitStack()
        self._closed = False
        self._table = look()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop looking."""
        self._closed = True
        self._resources.close()

    def fileno(self) -> int | None:
        """None: nothing says when the table has changed."""
        return None

    def read(self) -> list[Event]:
        """What has changed since the last look, as transitions marked `sampled`."""
        if self._closed:
            raise ValueError("the observer is closed")
        began = time.monotonic()
        table = self._look()
        took = time.monotonic() - began
        ended, lost = self._ended()
        events: list[Event] = list(self._changes(table, began - self.start))
        for cookie, row in ended.items():
            if cookie not in table and cookie not in self._table and row.remote[1] != 0:
                ends = f"{address_text(row.local)} \N{RIGHTWARDS ARROW} {address_text(row.remote)}"
                text = f"{ends} came and went between two looks"
                events.append(Note(began - self.start, text, row.local, row.remote))
        if lost > self.lost:
            why = "notices of destroyed sockets came faster than they were read"
            events.append(Lost(began - self.start, self.name, lost - self.lost, why))
            self.lost = lost
        self._table = table
        wanted = self.period / 2 if events else self.period * 1.5
        self.period = min(max(wanted, self.SOONEST, 20 * took), max(self.LATEST, 20 * took))
        return events

    def _changes(self, table: dict[object, Row], t: float) -> Iterable[Transition]:
        before = self._table
        gone = {key: row for key, row in before.items() if key not in table}
        # A socket may change its identity: a request becomes a connection.
        by_ends: dict[tuple[Address, Address], object] = {
            (row.local, row.remote): key for key, row in gone.items()
        }
        moved: list[tuple[Row, State]] = []
        for key, row in table.items():
            old = before.get(key)
            if old is None:
                earlier = by_ends.get((row.local, row.remote))
                if earlier is not None and gone[earlier].state is State.SYN_RECEIVED:
                    old = gone.pop(earlier)
            moved.append((row, State.CLOSED if old is None else old.state))
        for row in gone.values():
            yield self._moved(t, row, row.state, State.CLOSED)
        for row, was in moved:
            if was is not row.state:
                yield self._moved(t, row, was, row.state)

    def _moved(self, t: float, row: Row, old: State, new: State) -> Transition:
        return Transition(t, row.local, row.remote, old, new, self.name, sampled=True)


_BETWEEN: Final = "states between two looks at the table"


def _sock_diag(ports: frozenset[int] | None, start: float | None) -> Observer:
    with ExitStack() as resources:
        diag = resources.enter_context(SockDiag())

        def look() -> dict[object, Row]:
            table: dict[object, Row] = {}
            for port in [None] if ports is None else ports:
                table.update(diag.table(port).items())
            return table

        notices = [Destroyed(port) for port in ([None] if ports is None else ports)]
        for each in notices:
            resources.callback(each.close)

        def ended() -> tuple[dict[int, Row], int]:
            rows = {cookie: row for each in notices for cookie, row in each.read().items()}
            return rows, sum(each.lost for each in notices)

        return Sampled(
            *("sock_diag", (_BETWEEN,), look, diag.sockets),
            start=start,
            ended=ended,
            resources=resources.pop_all(),
        )


def _tracepoint(ports: frozenset[int] | None, start: float | None) -> Observer:
    from timewait.kernel.tracepoint import Tracepoint

    return Tracepoint(ports, start=start)


def _capture(ports: frozenset[int] | None, start: float | None) -> Observer:
    from timewait.kernel.capture import Capture

    return Capture(ports, start=start)


def psutil_rows() -> list[tuple[Row, int | None]]:
    """The table as psutil shows it, states only, and the process that has each socket.

    Without the right to see all of it (macOS), the sockets of this process
    and its children. Raises `OSError` where psutil is not installed.
    """
    try:
        psutil: Any = import_module("psutil")
    except ImportError:
        raise OSError("the psutil package is not installed") from None
    try:
        found = [(each, each.pid) for each in psutil.net_connections(kind="tcp")]
    except psutil.AccessDenied:
        found = []
        for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
            listed = getattr(process, "net_connections", None) or process.connections  # before 6
            with suppress(psutil.Error):
                found += [(each, process.pid) for each in listed(kind="tcp")]
    rows = []
    for each, pid in found:
        local, remote = _end(each.laddr), _end(each.raddr)
        if not each.raddr:  # as netstat shows the other end of a listener
            remote = ("::" if ":" in local[0] else "0.0.0.0"), 0
        rows.append((Row(local, remote, State.parse(each.status)), pid))
    return rows


def _end(address: Any) -> Address:
    """An address of psutil's; an IPv4 address mapped into IPv6 as itself."""
    host, port = address or ("0.0.0.0", 0)
    return host.removeprefix("::ffff:") if "." in host else host, port


def _psutil(ports: frozenset[int] | None, start: float | None) -> Observer:
    def look() -> dict[object, Row]:
        table: dict[object, Row] = {}
        for row, _ in psutil_rows():
            if ports is None or row.local[1] in ports or row.remote[1] in ports:
                # Nothing names a socket but its addresses, which several listeners may have.
                again = next(n for n in count() if (row.local, row.remote, n) not in table)
                table[row.local, row.remote, again] = row
        return table

    def rows(port: int) -> list[Row]:
        return [row for row, _ in psutil_rows() if port in (row.local[1], row.remote[1])]

    blind = (_BETWEEN, "timers", "sockets that no process owns, on some systems")
    return Sampled("psutil", blind, look, rows, start=start)


_MAKERS: Final[dict[str, Callable[[frozenset[int] | None, float | None], Observer]]] = {
    "tracepoint": _tracepoint,
    "sock_diag": _sock_diag,
    "psutil": _psutil,
    "capture": _capture,
}
OBSERVERS: Final = tuple(_MAKERS)
_STRONGEST_FIRST: Final = ("tracepoint", "sock_diag", "psutil")


def observe(
    ports: Iterable[int] | None = None, observer: str = "auto", *, start: float | None = None
) -> tuple[Observer, tuple[str, ...]]:
    """An observer of `ports` (None: all), and why it is not a stronger one, in words.

    `observer` is one of `OBSERVERS`, or "auto" for the strongest that is
    allowed here (of those that see states). `start` is the time.monotonic()
    that event times count from.

    Raises `OSError` that says why where the one asked for, or any, cannot be
    had; `ValueError` for an unknown name and for no port number.
    """
    chosen = None if ports is None else frozenset(map(port_number, ports))
    if observer != "auto":
        try:
            return _MAKERS[observer](chosen, start), ()
        except KeyError:
            known = ", ".join(("auto", *OBSERVERS))
            raise ValueError(f"no such observer: {observer!r} (there are {known})") from None
    why: list[str] = []
    for name in _STRONGEST_FIRST:
        try:
            return _MAKERS[name](chosen, start), tuple(why)
        except OSError as error:
            of = f" ({error.filename})" if error.filename else ""
            why.append(f"not {name}: {error.strerror or error}{of}")
    raise OSError("nothing to observe with: " + "; ".join(why))

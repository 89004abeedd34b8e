"""One typed record for each thing that happened, whoever saw it.

Observers of the real kernel, the modelled host and the orchestrator all speak
in these records; they go to structlog (`log`), to JSON Lines and back (`Writer`,
`read`), and the check reads nothing else. A record's `t` is in seconds since
the run began, on a monotonic clock; an address is `(host, port)`, port 0 or
host `"*"` meaning any.

The schema is versioned (`SCHEMA`): a field may be added without a new number,
none changes its meaning. Since 2 a stream that was written to its end says so
with a `RunEnded`; one of schema 1 does not tell whether it is whole.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from types import TracebackType
from typing import IO, Any, ClassVar, Final, NoReturn, TypeAlias, get_args

from attrs import define, field, fields_dict, frozen
from cattrs import Converter
from cattrs.gen import make_dict_unstructure_fn

from timewait.tcp.states import State

__all__ = [
    "REST",
    "SCHEMA",
    "USED_AGAIN",
    "Address",
    "Called",
    "Event",
    "Lost",
    "Note",
    "Problem",
    "Restart",
    "Row",
    "RunEnded",
    "RunStarted",
    "SegmentSeen",
    "Snapshot",
    "Transition",
    "Writer",
    "dump",
    "load",
    "log",
    "read",
    "strict_converter",
]

SCHEMA: Final = 2
REST: Final = "rest of the file"  # the observer that has lost what was never written
# Why a TIME_WAIT is over that nobody saw end: a cause of its transition.
USED_AGAIN: Final = "the connection's addresses are used again"

Address: TypeAlias = tuple[str, int]


@define(unsafe_hash=True)
class Row:
    """One socket as netstat would print it, with what netstat does not tell.

    Treat it as immutable: it is not frozen because that makes the tables of
    busy hosts (tens of thousands of rows at a time) five times slower.

    `timer` is "retransmit", "keepalive", "time_wait", "probe" or None;
    `seconds_left` is until that timer fires, None where the observer cannot
    tell. `inode` is 0 for a socket that no process owns (TIME_WAIT, orphans),
    None where unknown. Queues are in bytes (for a listener: connections
    waiting, and the backlog). `uid` is the owner's, None where unknown.
    """

    local: Address
    remote: Address
    state: State
    recv_q: int = 0
    send_q: int = 0
    timer: str | None = None
    seconds_left: float | None = None
    retransmits: int = 0
    inode: int | None = None
    uid: int | None = None


@frozen
class RunStarted:
    """The head of a stream: what was run, on which stack, seen by whom.

    `blind` lists in words what the observer cannot see; `profiles` names the
    model's profile for each role; `scenario` is the scenario as its TOML dict.
    """

    kind: ClassVar[str] = "run"
    t: float
    stack: str
    observer: str
    scenario: dict[str, Any] | None = None
    profiles: dict[str, str] = field(factory=dict)
    blind: tuple[str, ...] = ()
    schema: int = SCHEMA


@frozen
class Called:
    """A socket call and what it returned.

    `actor` is who called ("server", "client-1"), `call` its name in the
    sockets API, `errno` the error's name ("EADDRINUSE") or None for success,
    `result` a small JSON value (bytes moved, an option's value). `socket`
    distinguishes an actor's sockets where it has several. `t` is when the
    call returned and `began` when it was made, so that whatever the call
    caused lies between the two.
    """

    kind: ClassVar[str] = "call"
    t: float
    actor: str
    call: str
    local: Address | None = None
    remote: Address | None = None
    errno: str | None = None
    result: Any = None
    socket: str | None = None
    began: float | None = None


@define(unsafe_hash=True)
class Transition:
    """A socket went from `old` to `new`.

    `source` is the observer: "model", "tracepoint", "sock_diag", "psutil".
    `sampled` is true where the observer looks at instants, so that states in
    between may have been passed unseen and `t` is when it was noticed.
    `cause` is the model's event or the observer's own word for it.
    """

    kind: ClassVar[str] = "transition"
    t: float
    local: Address
    remote: Address
    old: State
    new: State
    source: str = "model"
    sampled: bool = False
    cause: str | None = None


@define(unsafe_hash=True)
class SegmentSeen:
    """A TCP segment on the wire, from `src` to `dst`.

    `length` is the text's octets (SYN and FIN not counted); `seq`, `ack` and
    `window` are as on the wire. `ts` is (TSval, TSecr) or None. `source` is
    "model", "capture" or "wire", or "forged" where `src` never sent it; `lost`
    is true where the link dropped it.
    """

    kind: ClassVar[str] = "segment"
    t: float
    src: Address
    dst: Address
    flags: int
    seq: int
    ack: int
    length: int = 0
    window: int = 0
    ts: tuple[int, int] | None = None
    source: str = "capture"
    lost: bool = False


@frozen
class Snapshot:
    """All sockets of the scenario's port at one instant, under a step's label."""

    kind: ClassVar[str] = "snapshot"
    t: float
    label: str
    rows: tuple[Row, ...]
    source: str = "model"


@frozen
class Restart:
    """The server was started again: did it bind, and when is the port free?

    `errno` is the error's name or None; `call` the call that failed ("bind"
    or "listen"); `free_after` in seconds from `t` (0.0 where it bound), None
    where the observer cannot tell. Where a refused restart was waited for,
    `held_until` of the one that succeeded is when the port was last seen held.
    """

    kind: ClassVar[str] = "restart"
    t: float
    ok: bool
    errno: str | None = None
    call: str | None = None
    free_after: float | None = None
    held_until: float | None = None


@frozen
class Lost:
    """The observer `source` missed `count` events just before `t`."""

    kind: ClassVar[str] = "lost"
    t: float
    source: str
    count: int
    why: str = ""


@frozen
class Note:
    """Something worth reading that is none of the above: a step's label, a time limit reached.

    Where it is about a socket, `local` and `remote` are its ends.
    """

    kind: ClassVar[str] = "note"
    t: float
    text: str
    local: Address | None = None
    remote: Address | None = None


@frozen
class RunEnded:
    """The last record of a stream: its writer was not stopped before. `t` is the latest of all."""

    kind: ClassVar[str] = "end"
    t: float


Event: TypeAlias = (
    RunStarted | Called | Transition | SegmentSeen | Snapshot | Restart | Lost | Note | RunEnded
)


@frozen
class Problem:
    """What was wrong with line `line` (from 1) of an event file, in words."""

    line: int
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}"


def strict_converter() -> Converter:
    """A cattrs converter that takes no string for a number and no number for a string.

    Whole numbers are accepted where a float is asked for. States are names in
    any spelling that `State.parse` knows.
    """
    converter = Converter(detailed_validation=False, omit_if_default=True)

    def exactly(kind: type, *also: type) -> Callable[[Any, Any], Any]:
        def take(value: Any, _: Any) -> Any:
            if type(value) is kind or type(value) in also:
                return kind(value)
            raise ValueError(f"{_WORDS[kind]} is expected, not {json.dumps(value, default=str)}")

        return take

    for kind in (str, int, bool):
        converter.register_structure_hook(kind, exactly(kind))
    converter.register_structure_hook(float, exactly(float, int))
    converter.register_structure_hook(State, lambda value, _: State.parse(str(value)))
    converter.register_unstructure_hook(State, lambda state: state.name)
    return converter


_WORDS: Final = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

_KINDS: Final[dict[str, type]] = {event.kind: event for event in get_args(Event)}
_FIELDS: Final = {kind: frozenset(fields_dict(event)) for kind, event in _KINDS.items()}


@cache
def _converter() -> Converter:
    converter = strict_converter()
    for event in _KINDS.values():
        # The head is written whole: a reader must see the schema's number.
        head = event is RunStarted
        converter.register_unstructure_hook(
            event, make_dict_unstructure_fn(event, converter, _cattrs_omit_if_default=not head)
        )
    return converter


def dump(event: Event) -> dict[str, Any]:
    """The event as a JSON object: its `kind`, then every field that is not its default."""
    return {"kind": event.kind, **_converter().unstructure(event)}


def load(record: Mapping[str, Any]) -> Event:
    """The event of a JSON object; unknown fields are ignored.

    Raises `ValueError` saying what is wrong: an unknown kind, a missing field,
    a value of the wrong type.
    """
    kind = record.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"unknown kind of event {json.dumps(kind)}")
    try:
        event: Event = _converter().structure(record, _KINDS[kind])
    except KeyError as missing:
        raise ValueError(f"{kind} without {missing.args[0]!r}") from None
    except AttributeError as wrong:  # (cattrs asks a dict's items of whatever is there)
        given = json.dumps(wrong.obj, default=str)
        raise ValueError(f"{kind}: an object is expected, not {given}") from None
    except (TypeError, ValueError, OverflowError) as wrong:
        raise ValueError(f"{kind}: {wrong}") from None
    if not math.isfinite(event.t):
        raise ValueError(f"{kind}: t is in seconds, not {event.t}")
    return event


class Writer:
    """Writes events to a file as JSON Lines, each line whole and flushed as it happens.

    An interrupted run keeps what it saw. What `close` writes last, a
    `RunEnded`, tells such a file from a whole one; leaving the context by an
    exception closes the file without. A head that follows other events begins
    another stream, after the end of the one before.

    Raises `OSError` with its name where the file cannot be opened or written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115
        self._latest: float | None = None

    def __call__(self, event: Event) -> None:
        """Write one event."""
        if self._latest is not None and isinstance(event, RunStarted):
            self._write(RunEnded(self._latest))
            self._latest = None
        self._write(event)
        self._latest = event.t if self._latest is None else max(event.t, self._latest)

    def _write(self, event: Event) -> None:
        line = json.dumps(dump(event), separators=(",", ":")).encode() + b"\n"
        try:
            self._file.write(line)
        except OSError as wrong:
            wrong.filename = self._file.name
            raise

    def close(self) -> None:
        """Write the stream's end and close the file; closing twice does nothing."""
        if self._file.closed:
            return
        with self._file:
            if self._latest is not None:
                self._write(RunEnded(self._latest))

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._file.close()
        self.close()


def read(
    lines: Iterable[bytes | str], problem: Callable[[Problem], object] | None = None
) -> Iterator[Event]:
    """The events of JSON Lines, such as an open file.

    What is wrong with a line goes to `problem`, and what can be read still
    comes: a field or a schema of the future is told and passed over, a line
    that is no event, or only half of one, is told and left out. Without
    `problem` the first one raises `ValueError` naming the line.

    What is left out was seen by somebody, and so was what a stopped writer had
    no time to write: in its place there is a `Lost`, by "file" or, at the end
    of a stream that does not say that nothing follows, by `REST`.
    """

    def fail(what: Problem) -> NoReturn:
        raise ValueError(str(what))

    tell = problem or fail
    last: dict[tuple[str, str], float] = {}  # of each observer
    left_out = cut = ""
    ended = False

    def rest() -> Iterator[Event]:
        """Each observer writes when it has been read: of the others the last moments are lost."""
        if (cut or not ended) and last:
            lanes = [t for (kind, _), t in last.items() if kind in _LANES]
            yield Lost(min(lanes, default=0.0), REST, 0, cut or _NO_END)

    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event, odd = _event(line)
        except ValueError as wrong:
            why = Problem(number, str(wrong))
            tell(why)
            if line[-1:] in ("\n", b"\n"):
                left_out = str(why)
            else:
                cut = str(why)
            continue
        for name in odd:
            tell(Problem(number, f"{event.kind} has an unknown field {name!r}, passed over"))
        if isinstance(event, RunStarted):
            if event.schema > SCHEMA:
                tell(Problem(number, f"schema {event.schema} is newer than this one's {SCHEMA}"))
            yield from rest()
            last = dict.fromkeys(_declared(event), event.t)
        source = (event.kind, getattr(event, "source", ""))
        if left_out:
            yield Lost(min(last.get(source, event.t), event.t), "file", 1, left_out)
            left_out = ""
        ended = isinstance(event, RunEnded)
        if not ended:
            last[source] = max(event.t, last.get(source, event.t))
        yield event
    yield from rest()


_LANES: Final = frozenset({"call", "transition", "segment"})
_NO_END: Final = (
    "the file does not say where it ends: its writer was stopped, or wrote schema 1, which has no "
    "such record"
)


def _event(line: bytes | str) -> tuple[Event, Iterable[str]]:
    """The event of one line, and its unknown fields. Raises `ValueError` saying what is wrong."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        whole = line[-1:] in ("\n", b"\n")
        raise ValueError(
            "not JSON" if whole else "cut off in the middle (its writer was stopped)"
        ) from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    event = load(record)
    return event, record.keys() - _FIELDS[event.kind] - {"kind"}


def _declared(head: RunStarted) -> Iterator[tuple[str, str]]:
    """Who will report, as far as the head says."""
    if head.scenario is not None:
        yield "call", ""
    for word, kind in (("tracepoint", "transition"), ("capture", "segment")):
        if word in head.observer:
            yield kind, word


def log(event: Event) -> None:
    """Hand the event to structlog, at level debug, where the program has configured it.

    Unconfigured structlog prints to standard output, which belongs to the
    program; nothing is said there. A run's `stack` is logged as `on`, since
    structlog means a stack trace by that name.
    """
    # Who has not imported it has not configured it, and need not wait for it to load.
    structlog = sys.modules.get("structlog")
    if structlog is not None and structlog.is_configured():
        fields = _converter().unstructure(event)
        if "stack" in fields:
            fields["on"] = fields.pop("stack")
        structlog.get_logger("timewait").debug(event.kind, **fields)

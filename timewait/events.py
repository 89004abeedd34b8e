"""One typed record for each thing that happened, whoever saw it.

Observers of the real kernel, the modelled host and the orchestrator all speak
in these records; they go to structlog, to JSON Lines and back (`write`,
`read`), and the check reads nothing else. A record's `t` is in seconds since
the run began, on a monotonic clock; an address is `(host, port)`, port 0 or
host `"*"` meaning any.

The schema is versioned (`SCHEMA`): a field may be added without a new number,
none changes its meaning.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, TypeAlias

from attrs import field, frozen

from timewait.tcp.states import State

__all__ = [
    "SCHEMA",
    "Address",
    "Called",
    "Event",
    "Lost",
    "Note",
    "Restart",
    "Row",
    "RunStarted",
    "SegmentSeen",
    "Snapshot",
    "Transition",
]

SCHEMA: Final = 1

Address: TypeAlias = tuple[str, int]


@frozen
class Row:
    """One socket as netstat would print it, with what netstat does not tell.

    `timer` is "retransmit", "keepalive", "time_wait", "probe" or None;
    `seconds_left` is until that timer fires, None where the observer cannot
    tell. `inode` is 0 for a socket that no process owns (TIME_WAIT, orphans),
    None where unknown. Queues are in bytes (for a listener: connections
    waiting, and the backlog).
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
    distinguishes an actor's sockets where it has several.
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


@frozen
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


@frozen
class SegmentSeen:
    """A TCP segment on the wire, from `src` to `dst`.

    `length` is the text's octets (SYN and FIN not counted); `seq`, `ack` and
    `window` are as on the wire. `ts` is (TSval, TSecr) or None. `source` is
    "model", "capture" or "wire"; `lost` is true where the link dropped it.
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
    where the observer cannot tell.
    """

    kind: ClassVar[str] = "restart"
    t: float
    ok: bool
    errno: str | None = None
    call: str | None = None
    free_after: float | None = None


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
    """Something worth reading that is none of the above: a step's label, a time limit reached."""

    kind: ClassVar[str] = "note"
    t: float
    text: str


Event: TypeAlias = RunStarted | Called | Transition | SegmentSeen | Snapshot | Restart | Lost | Note

"""What the evidence of one connection answers: who closed first and why, who holds TIME_WAIT
until when, who owes the next segment, what was delivered; None where it cannot be told.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from timewait.check import explanations as ex
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.check.checker import Connection

__all__ = ["Answers", "answers"]

_SIDES: Final = ("server", "client")
_HOW: Final = {
    ex.BY_FIN: ("FIN", "its application closed"),
    ex.BY_FIN_AFTER: ("FIN", "its application closed"),
    ex.BY_RST_UNREAD: ("RST", "its application closed with data unread"),
    ex.BY_RST_ABORT: ("RST", "its application aborted (SO_LINGER 0)"),
    ex.BY_RST_NOBODY: ("RST", "data came after its application had closed"),
    ex.BY_SILENCE: ("timeout", "it gave up retransmitting"),
    ex.BY_RST_NO_SOCKET: ("RST", "there was no socket"),
}
_RESETS: Final = frozenset({ex.BY_RST_UNREAD, ex.BY_RST_ABORT, ex.BY_SILENCE, ex.BY_RST_NO_SOCKET})


@frozen
class Answers:
    """What one connection's evidence tells; each is None where it cannot be told from it.

    `closed_first` is "server", "client", "both" (at the same time) or
    "nobody"; `how` "FIN", "RST" or "timeout", with `why` in words.
    `time_wait` is "server", "client", "both" or "nobody", `until` the earliest
    and the latest end of it in seconds (the latest None where something could
    prolong it). `owes` says whose turn it is, "" where it is nobody's.
    `delivered` is the octets that the server's and the client's peer
    acknowledged or read.
    """

    connection: str
    states: tuple[str | None, str | None]
    closed_first: str | None
    how: str | None
    why: str | None
    time_wait: str | None
    until: tuple[float, float | None] | None
    owes: str | None
    delivered: tuple[int | None, int | None]

    def __str__(self) -> str:
        if self.closed_first is None:
            closed = "who closed first cannot be told"
        elif self.closed_first == "nobody":
            closed = "still open"
        else:
            both = self.closed_first == "both"
            closed = f"{'both' if both else 'the ' + self.closed_first} closed first"
            closed += f" ({self.how or 'how cannot be told'}{': ' + self.why if self.why else ''})"
        if self.time_wait is None:
            held = "TIME_WAIT cannot be told"
        elif self.time_wait == "nobody":
            held = "no TIME_WAIT"
        else:
            held = f"TIME_WAIT: {self.time_wait}"
            if self.until:
                held += f" until {self.until[0]:.1f} s"
                if self.until[1] is not None and self.until[1] - self.until[0] >= 0.1:
                    held += f" to {self.until[1]:.1f} s"
        return "; ".join(text for text in (closed, held, self.owes) if text)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "connection": self.connection,
            "states": {"server": self.states[0], "client": self.states[1]},
            "closed_first": self.closed_first,
            "how": self.how,
            "why": self.why,
            "time_wait": {
                "holder": None if self.time_wait == "nobody" else self.time_wait,
                "known": self.time_wait is not None,
                "until": list(self.until) if self.until else None,
            },
            "owes": self.owes,
            "delivered": {"server": self.delivered[0], "client": self.delivered[1]},
        }


def _one(values: set[Any]) -> Any:
    return next(iter(values)) if len(values) == 1 else None


def _closed_first(a: int, b: int) -> tuple[str, str | None, str | None]:
    causes = (a >> 28 & 15, b >> 28 & 15)
    active = [
        cause == ex.BY_FIN or (cause in _RESETS and not x & ex.FIN_IN)
        for x, cause in zip((a, b), causes, strict=True)
    ]
    if all(active):
        kinds = {_HOW[c] for c in causes}
        return ("both", *(kinds.pop() if len(kinds) == 1 else (None, None)))
    for end in (0, 1):
        if active[end]:
            return (_SIDES[end], *_HOW[causes[end]])
    return ("nobody", None, None)


def _by_the_wire(
    connection: Connection, pairs: frozenset[ex.Pair]
) -> tuple[str, str, str | None] | None:
    """Whose RST came first, or whose FIN without knowing of the other's."""
    sequence = connection.sequence
    if sequence is None or (sequence.one_sided and not sequence.exact):
        return None
    if sequence.a.isn is None and sequence.b.isn is None:
        # A FIN that comes first here may be one of two, unless the other is sent in answer to it.
        if sequence.a.fin_after == sequence.b.fin_after:
            return None
        return (_SIDES[sequence.a.fin_after], *_HOW[ex.BY_FIN])
    end = sequence.reset_by
    if end is not None:
        causes = [_HOW.get(cause) for cause in sorted({pair[end] >> 28 & 15 for pair in pairs})]
        reasons = [cause[1] for cause in causes if cause and cause[0] == "RST"]
        return (_SIDES[end], "RST", ", or ".join(reasons) or None)
    first = [flow.fin is not None and not flow.fin_after for flow in (sequence.a, sequence.b)]
    who = {(True, False): "server", (False, True): "client", (True, True): "both"}.get(
        (first[0], first[1])
    )
    return (who, *_HOW[ex.BY_FIN]) if who else None


def answers(connection: Connection) -> Answers:
    """What can be told of this connection by now."""
    pairs = connection.pairs()
    firsts = {_closed_first(a, b) for a, b in pairs}
    if {_closed_first(a, b)[0] for a, b in ex.at_rest(pairs, connection.mode)} == {"nobody"}:
        firsts = {("nobody", None, None)}
    who = _one({first[0] for first in firsts})
    how = _one({first[1] for first in firsts}) if who else None
    why = _one({first[2] for first in firsts}) if how else None
    if how == "FIN" or who is None:
        who, how, why = _by_the_wire(connection, pairs) or (who, how, why)
    now = [{p[end] & 15 for p in ex.at_rest(pairs, connection.mode)} for end in (0, 1)]
    states = tuple(map(_one, now))
    held = _one({(a & 15 == ex.TIME_WAIT, b & 15 == ex.TIME_WAIT) for a, b in pairs})
    holder, until = None, None
    if held is not None:
        holder = {(1, 0): "server", (0, 1): "client", (1, 1): "both"}.get(held, "nobody")
        until = _until(connection, held)
    return Answers(
        connection.name,
        tuple(None if s is None else State(s).name for s in states),  # type: ignore[arg-type]
        who,
        how,
        why,
        holder,
        until,
        _owes(*now),
        (_delivered(connection, 0), _delivered(connection, 1)),
    )


def _until(connection: Connection, held: tuple[bool, bool]) -> tuple[float, float | None] | None:
    spans = [connection.time_wait_span(end) for end in (0, 1) if held[end]]
    if not spans:
        return None
    latest = [span[1] for span in spans]
    last = max((t for t in latest if t is not None), default=None)
    return max(span[0] for span in spans), None if None in latest else last


def _owes(a: set[int], b: set[int]) -> str | None:
    for who, states, others in (("server", a, b), ("client", b, a)):
        if states == {ex.CLOSE_WAIT}:
            waits = "; the peer waits in FIN_WAIT_2" if others == {ex.FIN_WAIT_2} else ""
            return f"the {who}'s application has not closed (CLOSE_WAIT){waits}"
    if a | b <= {ex.SYN_RECEIVED, ex.ESTABLISHED}:
        return ""
    if len(a) != 1 or len(b) != 1:
        return None
    for who, states in (("server", a), ("client", b)):
        if states <= {ex.FIN_WAIT_1, ex.CLOSING, ex.LAST_ACK}:
            peer = "client" if who == "server" else "server"
            return f"the {peer} owes an acknowledgment of the {who}'s FIN"
    return ""


def _delivered(connection: Connection, end: int) -> int | None:
    """Octets of this end's that its peer has acknowledged, or read."""
    sequence = connection.sequence
    if sequence is not None:
        x, y = (sequence.b, sequence.a) if end else (sequence.a, sequence.b)
        if x.isn is None or y.ack is None:
            return None
        done = (y.ack - x.isn - 1) & 0xFFFFFFFF
        return done - (1 if x.fin is not None and (y.ack - x.fin) & 0xFFFFFFFF == 1 else 0)
    return connection.read[1 - end] if connection.mode & ex.CALLS_A << (1 - end) else None

"""Why a set of explanations became empty, in words: what was possible, by which rule, and the
nearest course of events that would have led where the observer looked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from timewait.check import explanations as ex
from timewait.check.explanations import Explanations, Pair, Step
from timewait.check.sequence import ACKS_FIN, FROM_B, TEXT, kind_text
from timewait.tcp.segment import FIN, RST, SYN
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import Row

__all__ = ["allowed", "reason", "story"]

_SIDES = ("server", "client")
_TOLD = {
    ex.EOF_READ: "read the end of the stream, and the peer's FIN cannot have arrived",
    ex.RESET_READ: "was told of a reset or timeout, and neither can have happened",
    ex.CONNECTED: "was told that the connection is established, and it cannot have been",
    ex.CLOSED_BY_CALL: "closed its socket, and its connection shows nothing of it",
    ex.SHUT_DOWN_BY_CALL: "shut down its sending side, and no FIN followed",
    ex.ALL_REPORTED: "'s segments show a transition that was never reported",
    ex.NOT_TIME_WAIT: "is still in TIME_WAIT, long after 2MSL",
}


def _states(pairs: Iterable[Pair], end: int) -> str:
    states = sorted({ex.shown(pair[end]) for pair in pairs})
    names = ["LISTEN or CLOSED" if s == 0 else State(s).name for s in states]
    return " or ".join(names)


def _rows(table: Mapping[tuple[State, Event], Row], old: int, new: int) -> list[tuple[Event, Row]]:
    return [
        (event, row)
        for (state, event), row in table.items()
        if state == old and row.kind == "go" and new in (row.next, row.via)
    ]


def _rule(rows: list[tuple[Event, Row]], old: int) -> str:
    return "; ".join(f"({State(old).name}, {event.name}): {row.source}" for event, row in rows[:4])


def _unreported(pairs: Iterable[Pair], looked_at: dict[int, int]) -> str:
    """Transitions to what was seen, shown by segments and reported by nobody, in words."""
    found: dict[str, None] = {}
    for pair in pairs:
        for end in (0, 1):
            if pair[end] & ex.UNREPORTED:
                old, new = pair[end] >> 40 & 15, pair[end] >> 36 & 15
                if looked_at.get(end) == new:
                    found[f"the {_SIDES[end]}'s {_state(old)} -> {_state(new)}"] = None
    return f"; nobody reported {' or '.join(found)}" if found else ""


def reason(
    model: Explanations, number: int, symbol: int, profiles: tuple[str, str]
) -> tuple[str, str]:
    """What is wrong with an observation after this set, and the rule that says so."""
    pairs = model.members(number)
    what = symbol >> 9
    if what == 0:
        return _segment_reason(model, pairs, symbol)
    if what == 1:
        end, old, new = symbol >> 8 & 1, symbol >> 4 & 15, symbol & 15
        who, profile = _SIDES[end], profiles[end]
        if not any(
            p[end] & 15 in (old, ex.LISTEN) or (not old and p[end] & ex.SMALL) for p in pairs
        ):
            was = _states(pairs, end)
            return (
                f"the {who} was in {was} there, not in {State(old).name}",
                f"{profile} profile, what leads to {was}",
            )
        rows = _rows(model.table(end), old, new)
        if not rows:
            return (
                f"nothing leads from {State(old).name} to {State(new).name}",
                f"{profile} profile, every row of {State(old).name} (RFC 9293 §3.3.2, figure 5)",
            )
        events = " or ".join(event.name for event, _ in rows)
        return (
            f"{State(old).name} -> {State(new).name} takes {events}, "
            f"which cannot have happened to the {who}",
            f"{profile} profile, {_rule(rows, old)}",
        )
    if what == 2:
        end, state = symbol >> 4 & 1, symbol & 15
        was = _states(pairs, end)
        rows = [
            pair
            for old in sorted({p[end] & 15 for p in pairs})
            for pair in _rows(model.table(end), old, state)
        ]
        rule = (
            _rule(rows, min((p[end] & 15 for p in pairs), default=0))
            if rows
            else (f"what leads to {was}")
        )
        return (
            f"the {_SIDES[end]} can only be in {was}, not in {_state(state)}"
            + _unreported(pairs, {end: state}),
            f"{profiles[end]} profile, {rule}",
        )
    if what == 3:
        a, b = symbol >> 4 & 15, symbol & 15
        together = sorted({(ex.shown(p[0]), ex.shown(p[1])) for p in pairs})
        could = ", ".join(f"{_state(x)} with {_state(y)}" for x, y in together[:6])
        return (
            f"the server in {_state(a)} and the client in {_state(b)} do not go together; "
            f"possible: {could}{', ...' if len(together) > 6 else ''}"
            + _unreported(pairs, {0: a, 1: b}),
            "RFC 9293 §3.6, §3.10",
        )
    if symbol == ex.ALL_DELIVERED:
        return (
            "a RST has been received, and the connection is still there: "
            f"the server in {_states(pairs, 0)}, the client in {_states(pairs, 1)}",
            _delivery_rule(model, pairs, profiles),
        )
    end, told = symbol >> 4 & 1, symbol & 15
    words = _TOLD[told]
    gap = "" if words.startswith("'") else " "
    return f"the {_SIDES[end]}{gap}{words}", "RFC 9293 §3.10.1 to §3.10.8 (calls and their results)"


def _delivery_rule(model: Explanations, pairs: frozenset[Pair], profiles: tuple[str, str]) -> str:
    found: dict[str, None] = {}
    for pair in pairs:
        for end in (0, 1):
            row = model.row_of_reset(pair, end)
            if row is not None:
                state = State(pair[end] & 15).name
                found[f"{profiles[end]} profile, {state} and a RST: {row.source}"] = None
    return "; ".join(found)


def _state(state: int) -> str:
    return State(state).name if state else "CLOSED"


def _segment_reason(model: Explanations, pairs: frozenset[Pair], kind: int) -> tuple[str, str]:
    end = 1 if kind & FROM_B else 0
    who = _SIDES[end]
    was = _states(pairs, end)
    ends = [pair[end] for pair in pairs]
    if kind & RST:
        return (
            f"nothing has happened to the {who} (in {was}) that makes it send a RST",
            "RFC 9293 §3.5.2: when a reset is sent",
        )
    if kind & SYN:
        return f"the {who} is in {was}, and does not send this there", "RFC 9293 §3.5"
    if kind & ACKS_FIN and not any(x & ex.FIN_IN_ACK for x in ends):
        return (
            f"the {who} acknowledges a FIN that it cannot have received",
            "RFC 9293 §3.10.7.4, eighth: check the FIN bit",
        )
    if kind & FIN and not any(x & ex.FIN_OUT for x in ends):
        return (f"the {who} sends a FIN, and its user cannot have closed", "RFC 9293 §3.10.4")
    if kind & FIN and all(x & ex.FIN_ACKED for x in ends):
        return (
            f"the {who} sends its FIN again, and knows that it was acknowledged",
            "RFC 9293 §3.8.1: only what is not acknowledged is retransmitted",
        )
    if not kind & ACKS_FIN and all(x & ex.FIN_IN for x in ends):
        return (
            f"the {who} has received the FIN, and does not acknowledge it",
            "RFC 9293 §3.10.7.4, eighth: check the FIN bit",
        )
    if kind & TEXT:
        return f"the {who} sends text in {was}", "RFC 9293 §3.10.2"
    return f"the {who} is in {was}, and sends no {kind_text(kind)} there", "RFC 9293 §3.10.7"


def _step_text(pair: Pair, step: Step) -> str:
    old, new = pair[step.end] & 15, step.after & 15
    who = _SIDES[step.end]
    if step.event is None or step.row is None:
        return f"{who}: Linux replaces its socket"
    moves = f"{State(old).name} -> {State(new).name}" if old != new else f"stays in {_state(old)}"
    return f"{who}: {step.event.name}, {moves} ({step.row.source})"


def allowed(model: Explanations, mode: int, number: int, symbol: int) -> tuple[str, ...]:
    """What could have been seen there instead, by the same observer."""
    pairs = model.members(number)
    what = symbol >> 9
    found: dict[str, None] = {}
    if what in (2, 3):
        end = symbol >> 4 & 1 if what == 2 else 0
        for pair in sorted(pairs):
            text = f"{_SIDES[end]} in {_state(ex.shown(pair[end]))}"
            if what == 3:
                text += f", client in {_state(ex.shown(pair[1]))}"
            found[text] = None
    elif what == 0:
        end = 1 if symbol & FROM_B else 0
        for kind in _KINDS:
            if any(ex.emit(pair[end], kind) is not None for pair in pairs):
                found[f"{_SIDES[end]} sends {kind_text(kind)}"] = None
    else:
        for pair in sorted(pairs):
            for end in (0, 1):
                how = mode >> 2 * end & 3
                for step in model.steps(mode, pair, end):
                    if how and None not in ex.reports(how, pair[end], step.after):
                        found[_step_text(pair, step)] = None
    return tuple(found)[:8]


_KINDS = (
    SYN,
    SYN | 0x10,
    0x10,
    0x10 | TEXT,
    0x10 | FIN,
    0x10 | FIN | ACKS_FIN,
    0x10 | ACKS_FIN,
    RST,
)


def story(model: Explanations, mode: int, number: int, symbol: int) -> tuple[str, ...]:
    """The fewest steps, seen or not, after which the observation would have been allowed."""
    unseen = mode & ~(ex.SEES_A | ex.SEES_B | ex.SEGMENTS | ex.CALLS_A | ex.CALLS_B)
    begin = {(ex.send(a), ex.send(b)) for a, b in model.members(number)}
    came: dict[Pair, tuple[Pair, Step] | None] = dict.fromkeys(sorted(begin))
    queue: deque[tuple[Pair, int]] = deque((pair, 0) for pair in came)
    while queue and len(came) < _STORIES:
        pair, length = queue.popleft()
        if length and model.agrees(unseen, pair, symbol):
            return (*_told(came, pair), "and then what was seen")
        if length == _LONGEST:
            continue
        for end in (0, 1):
            for step in model.steps(unseen, pair, end):
                following = ex.after(pair, step)
                if following not in came:
                    came[following] = (pair, step)
                    queue.append((following, length + 1))
    return ()


_STORIES = 20_000
_LONGEST = 5


def _told(came: dict[Pair, tuple[Pair, Step] | None], pair: Pair) -> list[str]:
    steps: list[str] = []
    before = came[pair]
    while before is not None:
        steps.insert(0, _step_text(*before))
        before = came[before[0]]
    return steps

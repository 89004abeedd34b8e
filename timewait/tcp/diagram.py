"""The transition table drawn: as a Mermaid state diagram, as a matrix, as a list with sources.

The documentation's diagrams are the output of these, so that none can be
stale without a test noticing.
"""

from __future__ import annotations

from collections.abc import Iterator

from timewait.tcp.profiles import Profile
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import Row

__all__ = ["listing", "matrix", "mermaid"]

# Ways out that nearly every state has: named once, under the diagram.
_ABRUPT = frozenset(
    (
        Event.ABORT,
        Event.CLOSE_UNREAD,
        Event.RST_EXACT,
        Event.RST_AFTER_FIN,
        Event.GIVE_UP,
        Event.UNANSWERED,
        Event.TEXT_AFTER_CLOSE,
    )
)
_CALLS = frozenset(Event(number) for number in range(Event.STATUS + 1))
_ANSWERS = {
    "send_syn": "SYN",
    "send_syn_ack": "SYN,ACK",
    "queue_fin": "FIN",
    "send_ack": "ACK",
    "acknowledge_fin": "ACK",
    "reset_reply": "RST",
    "send_rst": "RST",
}


def mermaid(profile: Profile) -> str:
    """The state diagram in Mermaid's language, RFC 9293 figure 5 as this profile has it.

    Left out are the abrupt ends (RST, ABORT, giving up), which every state has,
    and what changes no state.
    """
    edges: dict[tuple[State, State], list[str]] = {}
    for (state, event), row in sorted(profile.table.items()):
        if row.next is None or row.next is state or event in _ABRUPT:
            continue
        what = f"{event}()" if event in _CALLS else str(event)
        answers = [_ANSWERS[action] for action in row.actions if action in _ANSWERS]
        label = f"{what} / {', '.join(answers)}" if answers else what
        edges.setdefault((state, row.next), []).append(label)
    lines = ["stateDiagram-v2", "    [*] --> CLOSED"]
    for (state, following), labels in edges.items():
        lines.append(f"    {state} --> {following}: {'<br/>'.join(labels)}")
    return "\n".join(lines)


def matrix(profile: Profile) -> str:
    """States x events as a Markdown table.

    A cell is the next state (`same` where it only acts), the errno of a refused
    call, `·` for "ignored" and nothing for "cannot happen".
    """
    lines = [
        "| event | " + " | ".join(str(state) for state in State) + " |",
        "|---|" + "---|" * len(State),
    ]
    for event in Event:
        cells = [_cell(profile.table[state, event]) for state in State]
        lines.append(f"| {event} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    if row.kind == "never":
        return ""
    if row.kind == "ignored":
        return "·"
    if row.kind == "error":
        return f"_{row.errno}_"
    answers = [_ANSWERS.get(action, "ACK?") for action in row.actions if _answers(action)]
    text = f"**{row.next}**" if row.next is not None else "same"
    return f"{text} / {answers[0]}" if answers else text


def _answers(action: str) -> bool:
    return action in _ANSWERS or action in ("challenge_ack", "ack_unacceptable")


def listing(profile: Profile) -> str:
    """Every row that can happen, by state, with its source, as Markdown."""
    return "\n".join(_listing(profile))


def _listing(profile: Profile) -> Iterator[str]:
    for state in State:
        yield f"\n### {state}\n"
        for event in Event:
            row = profile.table[state, event]
            if row.kind != "never":
                yield f"- `{event}`: {row}. <sub>{row.source}</sub>"

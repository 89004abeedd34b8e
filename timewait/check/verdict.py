"""What the check answers: whether TCP allows it, on what evidence, and if not, where and why."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attrs import field, frozen

from timewait.events import Address, Event, SegmentSeen
from timewait.tcp.segment import ACK, flags_text

__all__ = ["Divergence", "Evidence", "Verdict", "address_text", "diagram", "event_text"]


@frozen
class Divergence:
    """The first thing on a connection (or of a bind) that the model does not allow.

    `t` is the event's time in seconds, `event` it in words, `why` what is
    wrong with it, `allowed` what could have been seen there instead, `rule`
    the RFC section or profile row it breaks, `story` the nearest course of
    events that would be allowed, `segments` a diagram of the last segments
    with the offending one marked ("" where none were seen).
    """

    t: float
    connection: str
    event: str
    why: str
    rule: str
    allowed: tuple[str, ...] = ()
    story: tuple[str, ...] = ()
    segments: str = ""
    kind: str = "connection"

    def __str__(self) -> str:
        lines = [
            f"{self.connection}: diverges at {self.t:.6f} s",
            f"  seen     {self.event}",
            f"  but      {self.why}",
            f"  rule     {self.rule}",
        ]
        lines += _listed("  allowed  ", self.allowed)
        lines += _listed("  nearest  ", self.story)
        if self.segments:
            lines += ["", *("  " + line for line in self.segments.splitlines())]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "kind": self.kind,
            "t": round(self.t, 9),
            "connection": self.connection,
            "event": self.event,
            "why": self.why,
            "rule": self.rule,
            "allowed": list(self.allowed),
            "story": list(self.story),
            "segments": self.segments,
        }


def _listed(head: str, lines: Iterable[str]) -> list[str]:
    return [(" " * len(head) if i else head) + line for i, line in enumerate(lines)]


@frozen
class Evidence:
    """What the verdict rests on.

    `strength` is "strong" (every transition or every segment of both ends was
    seen), "partial" (one end, or only some of the connections) or "weak"
    (states at instants, or less). `seen`, `inferred` and `unseen` say in words
    what was observed, what only follows from it, and what nobody could see.
    `problems` are faults of the evidence itself.
    """

    strength: str
    connections: int
    events: int
    seen: tuple[str, ...] = ()
    inferred: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    lost: int = 0
    problems: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "strength": self.strength,
            "connections": self.connections,
            "events": self.events,
            "seen": list(self.seen),
            "inferred": list(self.inferred),
            "unseen": list(self.unseen),
            "lost": self.lost,
            "problems": list(self.problems),
        }


@frozen
class Verdict:
    """Whether the model allows what was seen. True where it does.

    `divergence` is the first one, `divergences` the first of each connection
    (as far as they were kept); `evidence` says how much was seen.
    """

    evidence: Evidence
    divergences: tuple[Divergence, ...] = field(default=())

    @property
    def conforms(self) -> bool:
        """Whether everything seen is allowed."""
        return not self.divergences

    @property
    def divergence(self) -> Divergence | None:
        """The first divergence in time."""
        return min(self.divergences, key=lambda d: d.t, default=None)

    def __bool__(self) -> bool:
        return self.conforms

    def explain(self) -> str:
        """The verdict in words."""
        seen = self.evidence
        lines = []
        if self.conforms:
            lines.append(f"conforms, on {seen.strength} evidence")
        else:
            first = self.divergence
            assert first is not None
            lines.append(str(first))
            more = len(self.divergences) - 1
            if more:
                lines.append(f"({more} more divergence{'s'[: more != 1]})")
        for head, words in (
            ("seen", seen.seen),
            ("inferred", seen.inferred),
            ("not seen", seen.unseen),
            ("trouble", seen.problems),
        ):
            if words:
                lines += _listed(f"  {head:<9}", words)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object: `conforms`, `divergence` (or null), `divergences`, `evidence`."""
        first = self.divergence
        return {
            "conforms": self.conforms,
            "divergence": first.to_json() if first else None,
            "divergences": [d.to_json() for d in self.divergences],
            "evidence": self.evidence.to_json(),
        }


def address_text(address: Address) -> str:
    """`127.0.0.1:80`, `[::1]:80`."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def event_text(event: Event) -> str:
    """One event in one line."""
    match event.kind:
        case "segment":
            assert isinstance(event, SegmentSeen)
            text = f"{flags_text(event.flags)} seq={event.seq}"
            if event.flags & ACK:
                text += f" ack={event.ack}"
            if event.length:
                text += f" len={event.length}"
            return f"{address_text(event.src)} > {address_text(event.dst)} {text}"
        case "transition":
            how = f"{event.source}, at an instant" if event.sampled else event.source  # type: ignore
            return f"{address_text(event.local)} {event.old} -> {event.new} ({how})"  # type: ignore
        case "call":
            outcome = event.errno or ("ok" if event.result is None else event.result)  # type: ignore
            return f"{event.actor} {event.call}() = {outcome}"  # type: ignore
        case "snapshot":
            return f"snapshot {event.label!r}"  # type: ignore
        case "restart":
            return f"restart: {'ok' if event.ok else event.errno}"  # type: ignore
        case _:
            return event.kind


def diagram(
    left: Address, right: Address, segments: Iterable[SegmentSeen], marked: SegmentSeen | None
) -> str:
    """Segments between two addresses as a sequence diagram, the offending one marked."""
    left_text, right_text = address_text(left), address_text(right)
    rows = []
    for seen in segments:
        text = f"{flags_text(seen.flags)} seq={seen.seq}"
        if seen.flags & ACK:
            text += f" ack={seen.ack}"
        if seen.length:
            text += f" len={seen.length}"
        rows.append((seen, f" {text} "))
    if not rows:
        return ""
    width = max(len(text) for _, text in rows) + 4
    pad = len(left_text) // 2
    lines = [f"{'':14}{left_text}{right_text:>{max(width + 2, 1)}}"]
    for seen, text in rows:
        arrow = f"{text:-^{width}}>" if seen.src == left else f"<{text:-^{width}}"
        lost = "  (lost)" if seen.lost else ""
        mark = "  <== this one" if seen is marked else ""
        lines.append(f"{seen.t:12.6f}  {'':{pad}}|{arrow}|{lost}{mark}")
    return "\n".join(lines)

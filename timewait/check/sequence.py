"""What the sequence numbers of a connection's segments amount to, and when they cannot be true.

Each side's segments are followed against what that side and its peer have
sent before (RFC 9293 §3.4): where the next octet belongs, where the FIN is,
what has been acknowledged. A segment comes out as its *kind*, a small number
without any sequence number in it, which is all that the states depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from attrs import define, field

from timewait.tcp.segment import ACK, FIN, RST, SYN, seq_add, seq_diff

__all__ = [
    "ACKS_FIN",
    "DROPPED",
    "FROM_B",
    "OLD",
    "PROBE_AFTER",
    "RST_AT",
    "RST_BEFORE",
    "RST_CERTAIN",
    "RST_OWN",
    "RST_REPLY",
    "TEXT",
    "Contradiction",
    "Sequence",
    "kind_text",
]

# A kind's bits beside FIN, SYN, RST and ACK. TEXT takes PSH's place.
TEXT: Final = 0x08
ACKS_FIN: Final = 0x20  # it acknowledges the peer's FIN
OLD: Final = 0x40  # nothing in it that its sender had not sent before
# A reset's kind says where it is, from its receiver's side.
RST_AT: Final = 0x20  # it may be at RCV.NXT
RST_BEFORE: Final = 0x40  # it may be at RCV.NXT - 1, before the FIN that was received
RST_CERTAIN: Final = 0x08  # it is there for certain
# Linux's tells whether a segment asked for it.
RST_OWN: Final = 0x10
RST_REPLY: Final = 0x01
DROPPED: Final = 0x80  # the link lost it after it was seen
FROM_B: Final = 0x100

# A probe (keep-alive, zero window) repeats the last octet, and only of a connection that has
# been quiet for the shortest retransmission timeout that anybody uses (Linux: TCP_RTO_MIN).
PROBE_AFTER: Final = 0.18

# One-sided bounds on time, where both ends are on the observer's machine. A clock tick, and a
# timer's rounding, may take a tenth from the shortest retransmission timeout.
_TIMER_EARLY: Final = 0.9
_COPIED: Final = 0.001  # a capture of all interfaces may show a segment twice, this far apart
_RTO_MAX: Final = 60.0  # RFC 6298 §2.5: backing off may stop there
_ACK_DELAY: Final = 0.5
_OVERTAKEN: Final = 0.02  # a segment may wait so long for the processor in whose queue it is
_ANSWERED: Final = 0.5  # an answer is sent at once

# What a capture between hosts may lack: so much at once, and what a wire of 100 Gbit/s carries.
_AT_ONCE: Final = 1 << 20
_PER_SECOND: Final = 12.5e9
_LONGEST: Final = 0xFFFF  # no segment has more octets
_NEVER: Final = -1e9
_REMEMBERED: Final = 64
_NO_ACK = "RFC 9293 §3.10.7.4: every segment after the SYN carries an acknowledgment"
_UNSENT = "RFC 9293 §3.4: an acknowledgment is of something sent, SND.UNA < SEG.ACK =< SND.NXT"
_SEQUENCE = "RFC 9293 §3.4: octets are numbered one after the other from SND.NXT"
_HANDSHAKE = "RFC 9293 §3.5: a connection begins with a SYN from each side, and its acknowledgment"
_BACKWARDS = "RFC 9293 §3.4: RCV.NXT never goes back"
_AFTER_FIN = "RFC 9293 §3.6: nothing follows a FIN"
_BACKOFF = "RFC 6298 §5.5: every retransmission waits twice as long as the one before"
_DELAYED = "RFC 9293 §3.8.6.3: an acknowledgment is delayed by less than 0.5 s"
_RESET = "RFC 9293 §3.5.2: a reset takes its number from the ACK that caused it, or is at SND.NXT"


def kind_text(kind: int) -> str:
    """A kind in words: `"FIN, acknowledging the peer's FIN"`."""
    if kind & RST:
        return "RST"
    if kind & SYN:
        text = "SYN,ACK" if kind & ACK else "SYN"
        return text + (" with text" if kind & TEXT else "")
    words = [name for bit, name in ((FIN, "FIN"), (TEXT, "text")) if kind & bit] or ["ACK"]
    text = " with ".join(words)
    if kind & OLD:
        text += " sent again"
    return text + (", acknowledging the peer's FIN" if kind & ACKS_FIN else "")


class Contradiction(Exception):
    """A segment that no TCP sends after what was seen. Carries the rule it breaks."""

    def __init__(self, why: str, rule: str) -> None:
        super().__init__(why)
        self.rule = rule


@define(eq=False)
class Flow:
    """What one side has been seen to send."""

    isn: int | None = None
    next: int | None = None  # after the last octet sent, SYN and FIN counted
    guessed: bool = False  # that `next` is what the peer acknowledged: nothing was seen yet
    syn_again: bool = False
    opened: bool = False  # by a SYN of its own, not one that answers
    shut: bool = False  # its window is closed
    fin: int | None = None  # the FIN's own number
    fin_after: bool = False  # it was sent first when the peer's FIN had been received
    fin_at: float = 0.0  # when it was last sent
    fin_again: int = -1  # how often it was sent again; -1: not alone, other text was on its way
    due: int | None = None  # what the peer has to acknowledge in time: all before it was, and it
    due_at: float = 0.0  # was sent once, then
    ack: int | None = None  # the last acknowledgment it sent
    ack_at: int | None = None  # where the segment was that first acknowledged so much
    acks: list[int] = field(factory=list)  # it and those before
    gaps: list[tuple[int, int]] = field(factory=list)  # octets that have not been seen
    missed: list[int] = field(factory=list)  # where those gaps began when they were noticed
    gap_at: float = 0.0  # when the last gap was noticed
    gap_ack: int = 0  # what the segment after it acknowledged
    gap: Contradiction | None = None  # the suspicion that the first of them raised
    torn: bool = False  # behind a gap, some octets were sent twice
    gap_told: bool = False  # the peer has asked for it since, or it was long ago
    claimed: int | None = None  # up to where the peer acknowledged more than was seen,
    claim: Contradiction | None = None  # which is wrong unless the capture lacks it
    ends: list[int] = field(factory=list)  # where its last segments ended
    last: float = _NEVER  # when it last sent anything
    reset_at: float = _NEVER  # when it sent a RST,
    reset_ack: int | None = None  # and what it had acknowledged by then
    probed: float = _NEVER  # when it last repeated an octet that was acknowledged
    former: Flow | None = None  # the flow that its newest SYN wants to follow
    recent: list[tuple[float, int, int, int, int]] = field(factory=list)  # its last segments

    @property
    def probes(self) -> bool:
        """Whether nothing was seen but acknowledgments, which may be probes, one before SND.NXT."""
        return self.isn is None and self.fin is None and not self.ends and not self.guessed


class Sequence:
    """The two flows of one connection, seen together. `exact` is where each side is seen as
    it sends; elsewhere segments may be lost or overtaken before they are seen.
    """

    __slots__ = (
        "a",
        "b",
        "echo",
        "exact",
        "latency",
        "linux",
        "missed",
        "presumed",
        "reset_by",
        "rto_min",
        "suspicion",
        "whole",
    )

    def __init__(
        self,
        exact: bool,
        presumed: bool = False,
        rto_min: tuple[float, float] = (0.2, 0.2),
        linux: tuple[bool, bool] = (True, True),
    ) -> None:
        self.rto_min = rto_min
        self.linux = linux  # which ends are Linux's
        # It was seen from its SYN on, and nothing of it can have been missed.
        self.whole: bool | None = None
        self.latency: float | None = None  # of the SYN, if it was sent once
        self.a = Flow()
        self.b = Flow()
        self.exact = exact
        # Presumably exact: a gap is a contradiction unless a retransmission fills it.
        self.presumed = presumed
        self.suspicion: Contradiction | None = None
        self.echo = False  # the last segment, between hosts, shows nothing that was not known
        self.missed = False  # the last segment shows that others before it were not captured
        self.reset_by: int | None = None  # which end sent a RST before any FIN was seen

    def is_new(self, from_b: bool, seq: int) -> bool:
        """Whether a SYN with this number is not the one that this side sent before."""
        return (self.b if from_b else self.a).isn not in (None, seq)

    def again(self) -> Sequence:
        """The same for the next connection between these addresses, which knows of this one."""
        again = Sequence(self.exact, self.presumed, self.rto_min, self.linux)
        again.a, again.b = self.a, self.b
        if self.lacking:
            # Its SYN may not have been captured: what is seen next may be the new one's.
            for flow in (self.a, self.b):
                flow.former = None
            again.a, again.b = Flow(former=self.a), Flow(former=self.b)
        again.whole = False
        return again

    @property
    def lacking(self) -> bool:
        """Whether a capture of it, between hosts, may lack segments."""
        return not (self.exact or self.presumed)

    @property
    def one_sided(self) -> bool:
        """Whether only one side has been seen to send: the capture may show one direction."""
        return (self.a.last == _NEVER) != (self.b.last == _NEVER)

    def lacks(self) -> None:
        """The capture has been shown to lack segments: nothing is missed from now on."""
        self.presumed = False
        self.whole = False
        self.suspicion = None
        for flow in (self.a, self.b):
            flow.due = None

    def forget(self) -> None:
        """Segments were missed: begin again with whatever comes next."""
        self.whole = False
        self.a = Flow(fin=self.a.fin)
        self.b = Flow(fin=self.b.fin)

    def is_copy(self, from_b: bool, flags: int, seq: int, ack: int, length: int, t: float) -> bool:
        """Whether this side was seen to send the very same within the last millisecond.

        A capture of several interfaces shows a segment on each that it passes.
        """
        recent = (self.b if from_b else self.a).recent
        while recent and recent[0][0] < t - _COPIED:
            del recent[0]
        what = (flags, seq, ack, length)
        if any(seen[1:] == what for seen in recent):
            return True
        recent.append((t, *what))
        return False

    @property
    def ended(self) -> bool:
        """Whether both sides have sent a FIN, or one a RST."""
        a, b = (flow.former or flow for flow in (self.a, self.b))
        return None not in (a.fin, b.fin) or max(a.reset_at, b.reset_at) > _NEVER

    def is_overtaken(self, from_b: bool, kind: int, ack: int, t: float) -> bool:
        """Whether this was sent before the RST that it came in after (see `_overtaken`)."""
        x = self.b if from_b else self.a
        nothing_new = kind & OLD or not kind & (SYN | FIN | RST | TEXT)
        within = _OVERTAKEN if self.presumed else 1.0
        if not nothing_new or self.exact or t - x.reset_at >= within:
            return False
        return x.reset_ack is None or seq_diff(ack, x.reset_ack) <= 0

    def take(
        self,
        from_b: bool,
        flags: int,
        seq: int,
        ack: int,
        length: int,
        t: float,
        window: int = 1,
    ) -> int:
        """The kind of this segment. Raises `Contradiction` where it cannot be."""
        x, y = (self.b, self.a) if from_b else (self.a, self.b)
        quiet = t - max(y.last, x.probed)
        since = x.last
        if self.whole is None:
            self.whole = flags & (SYN | ACK | RST) == SYN and (self.exact or self.presumed)
        x.last = t
        x.shut = not window
        if self.whole and x.isn is None and y.isn is not None and flags & (SYN | ACK) == ACK:
            self._without_a_syn(x, y, flags, seq, ack)
        if flags & (SYN | RST):
            kind = self._reset(x, y, flags, seq, ack, from_b) if flags & RST else 0
            if not kind:
                kind = self._syn(x, y, flags, seq, ack, length, from_b)
            return kind | FROM_B if from_b else kind
        if not flags & ACK:
            raise Contradiction("it carries no acknowledgment", _NO_ACK)
        kind = ACK | FROM_B if from_b else ACK
        end = seq + length + (flags & FIN) & 0xFFFFFFFF
        late = False
        placed = x.next is not None and not x.guessed
        if x.next is None or (x.guessed and seq_diff(end, x.next) >= 0):
            x.next = end
            x.guessed = False
        else:
            new = ((end - x.next + 0x80000000) & 0xFFFFFFFF) - 0x80000000
            # (All of what was acknowledged may be seen late, being sent again, or doubled.)
            if (
                x.claim is not None
                and x.claimed is not None
                and new > 0
                and seq_diff(seq, x.claimed) < 0
                and (self.presumed or seq_diff(end, x.claimed) > 0)
            ):
                raise x.claim
            if seq != x.next:
                # Not seen yet, and sent before what has overtaken it.
                late = bool(x.gaps) and x.ack is not None and seq_diff(ack, x.ack) < 0
                new = self._out_of_place(x, y, seq, ack, end, new, length, quiet, since)
            if new > 0:
                if seq_diff(end, x.next) > 0:
                    x.next = end
                if length:
                    _remember(x.ends, end)
            elif length or flags & FIN or seq != x.next:
                kind |= OLD
        if length:
            kind |= TEXT
            if x.isn is not None and seq == x.isn and quiet < PROBE_AFTER and self.whole:
                raise Contradiction(f"text at {seq}, where its SYN was", _SEQUENCE)
            if x.fin is not None and seq_diff(seq + length, x.fin) > 0:
                raise Contradiction(f"text after the FIN at {x.fin}", _AFTER_FIN)
        if flags & FIN:
            kind |= FIN
            at = end - 1 & 0xFFFFFFFF
            if x.fin is None:
                seen_all = x.isn is not None and not self.lacking
                if kind & OLD and (seen_all or at + 1 & 0xFFFFFFFF != x.next):
                    raise Contradiction(
                        f"a FIN at {at}, where other octets were sent before", _SEQUENCE
                    )
                x.fin = at
            elif x.fin != at:
                raise Contradiction(f"a FIN at {at}, and one was at {x.fin} already", _SEQUENCE)
            if self.exact or self.presumed:
                self._fin_in_time(x, y, kind, length, t, self.rto_min[from_b])
        if y.due is not None:
            self._acknowledged_in_time(y, ack, t)
        if length or flags & FIN:
            if kind & OLD or not (self.exact or self.presumed):
                x.due = None
            elif y.ack == seq:
                x.due, x.due_at = end, t
        if late:
            kind |= OLD
        news = False
        if ack != x.ack:
            news = self._acknowledge(x, y, seq, ack, kind)
            if not news:
                kind |= OLD
        self.echo = self.lacking and bool(kind & OLD) and not news
        if y.fin is not None and (ack - y.fin & 0xFFFFFFFF) == 1:
            kind |= ACKS_FIN
            if flags & FIN and placed and not kind & OLD:
                x.fin_after = True
        return kind

    def _missed(self, why: str, rule: str) -> None:
        """Something that has not been seen: it was missed, unless nothing can have been."""
        if self.exact:
            raise Contradiction(why, rule)
        if self.suspicion is None:
            self.suspicion = Contradiction(why, rule)

    def _without_a_syn(self, x: Flow, y: Flow, flags: int, seq: int, ack: int) -> None:
        """A side that was seen from its peer's SYN on, and has sent none, takes part."""
        assert y.isn is not None
        if flags & RST and not seq:
            return
        # What is left of a former connection does not acknowledge the new one's SYN.
        if seq_diff(ack, y.isn) > 0 and not (x.former and x.former.next == seq):
            self._missed("its SYN,ACK was not seen", _HANDSHAKE)

    def dropped(self, from_b: bool) -> None:
        """The segment just taken never arrives: nobody can acknowledge it in time."""
        (self.b if from_b else self.a).due = None

    def _fin_in_time(
        self, x: Flow, y: Flow, kind: int, length: int, t: float, rto_min: float
    ) -> None:
        """A FIN that is sent alone is not sent again before its timer, which backs off.

        The first time it may be a probe's (RFC 8985), which does not yet back off.
        """
        if not kind & OLD:
            x.fin_again = 0 if not length and y.ack == x.fin else -1
        elif x.fin_again >= 0:
            after = t - x.fin_at
            least = min(rto_min * 2 ** max(x.fin_again - 1, 0), _RTO_MAX)
            x.fin_again += 1
            if after < least * _TIMER_EARLY:
                raise Contradiction(
                    f"its FIN is sent again {after:.3f} s after the last time, and not before "
                    f"{least:g} s have passed would it be",
                    _BACKOFF,
                )
        x.fin_at = t

    def _acknowledged_in_time(self, y: Flow, ack: int, t: float) -> None:
        """What was sent once, and nothing else with it, was not waited for any longer."""
        assert y.due is not None
        late = t - y.due_at
        if self.latency is not None and late > _ACK_DELAY + 4 * self.latency:
            raise Contradiction(
                f"what was sent up to {y.due} at {y.due_at:.6f} s, and only once, is "
                f"{'acknowledged' if seq_diff(ack, y.due) >= 0 else 'unacknowledged'} "
                f"{late:.3f} s later",
                _DELAYED,
            )
        if seq_diff(ack, y.due) >= 0:
            y.due = None

    def _out_of_place(
        self,
        x: Flow,
        y: Flow,
        seq: int,
        ack: int,
        end: int,
        new: int,
        length: int,
        quiet: float,
        since: float,
    ) -> int:
        """A segment that does not begin at SND.NXT; how many new octets it brings."""
        assert x.next is not None
        gap = seq_diff(seq, x.next)
        if gap == 1 and x.probes:
            return max(new, 1)
        if gap > 0:
            wrong = Contradiction(
                f"it begins {gap} octet{'s'[: gap != 1]} after the last one sent "
                f"(at {seq}, not {x.next})",
                _SEQUENCE,
            )
            if self.exact or (self.lacking and gap > _most_in(x.last - since)):
                raise wrong
            if self.presumed and self.suspicion is None and gap <= _LONGEST:
                self.suspicion = x.gap = wrong
            low = x.next
            if x.claimed is not None and seq_diff(seq, x.claimed) >= 0:
                # The peer had it, and its sender goes on behind it: the capture has not seen it.
                low, x.claimed, x.claim = x.claimed, None, None
                self.missed = True
            if low != seq:
                x.gaps.append((low, seq))
                _remember(x.missed, low)
                del x.gaps[:-_REMEMBERED]
            x.gap_at, x.gap_ack = x.last, ack
            x.gap_told = False
            return max(new, 1)
        if x.gaps:
            x.torn = x.torn or 0 < new < length
            if x.gap_told or x.last - x.gap_at >= PROBE_AFTER:
                # It was sent again as if it had been lost: segments do get lost here.
                self.presumed = False
                self.suspicion = None
            if end == seq and any(
                seq_diff(seq, low) > 0 and seq_diff(high, seq) > 0 for low, high in x.gaps
            ):
                return 1  # an acknowledgment alone, sent between octets that were not seen
            before = x.gaps
            x.gaps = [piece for low, high in x.gaps for piece in _without(low, high, seq, end)]
            if not x.gaps:
                x.missed.clear()
                overtaken = new <= 0 and seq_diff(ack, x.gap_ack) <= 0
                if overtaken and x.last - x.gap_at < _OVERTAKEN and self.suspicion is x.gap:
                    self.suspicion = None
            if x.gaps != before:
                return 1  # it was sent before, but it is new to the observer
        if end == seq:  # An acknowledgment alone stands at SND.NXT; only a probe goes back.
            later = x.ack is not None and seq_diff(ack, x.ack) > 0
            if later and seq == x.fin == y.ack and quiet < PROBE_AFTER:
                raise Contradiction(f"an acknowledgment from before the FIN at {seq}", _AFTER_FIN)
            probe = y.last == _NEVER or (y.ack is not None and seq_diff(seq, y.ack) == -1)
            if (self.exact or (self.presumed and not self._overtaken(x, y, seq, ack))) and not (
                probe and quiet >= PROBE_AFTER
            ):
                raise Contradiction(
                    f"an acknowledgment alone at {seq}, {-gap} before SND.NXT {x.next}", _SEQUENCE
                )
            if probe:
                x.probed = x.last
        elif (
            (self.exact or self.presumed)
            and length
            and y.ack is not None
            and seq_diff(seq, y.ack) < 0
            and seq_diff(end, y.ack) > 0
            and quiet < PROBE_AFTER
        ):
            raise Contradiction(
                f"it begins at {seq}, inside what was acknowledged up to {y.ack}", _SEQUENCE
            )
        return new

    def _overtaken(self, x: Flow, y: Flow, seq: int, ack: int) -> bool:
        """Whether an acknowledgment at this number may be one that others have overtaken.

        Coming in on the loopback interface it may be: each processor has a queue there. Those
        that overtook it acknowledge as much.
        """
        if x.isn is None or not self.whole:
            return True
        known = seq in x.ends or seq in (x.fin, seq_add(x.isn, 1))
        if y.ack is not None and y.ack_at is not None and seq_diff(seq, y.ack) < 0:
            # The peer had more than this by then, and what it sent afterwards is acknowledged.
            known = known and seq_diff(ack, y.ack_at) <= 0
        return known and (x.ack is None or seq_diff(ack, x.ack) <= 0)

    def _acknowledge(self, x: Flow, y: Flow, seq: int, ack: int, kind: int) -> bool:
        """Take in what it acknowledges; false if it was sent before others that are known."""
        if y.next is None or y.guessed:
            if y.next is None or seq_diff(ack, y.next) > 0:
                y.next = ack
            y.guessed = True
        else:
            ahead = seq_diff(ack, y.next)
            if x.isn is None and y.isn is not None and y.next == seq_add(y.isn, 1) != ack:
                # What is left of a former connection, older than the capture, answers a SYN.
                x.ack = ack
                _remember(x.acks, ack)
                return True
            if ahead == 1 and y.probes:
                y.next = ack
            elif ahead > 0 and not (
                # A half-open side answers a new SYN with what it knows of the former connection.
                y.former is not None and y.former.next == ack
            ):
                wrong = Contradiction(
                    f"it acknowledges {ack}, {ahead} octet{'s'[: ahead != 1]} more than was sent",
                    _UNSENT,
                )
                # (One octet more is a FIN's, and the capture of a machine shows who has closed.)
                fin = self.presumed and ahead == 1
                if y.fin is not None or self.exact or fin or ahead > _most_in(x.last - y.last):
                    raise wrong
                if y.isn is None:
                    y.next = ack
                else:  # Its sender will tell: it goes on behind what was acknowledged, or before.
                    y.claimed, y.claim = ack, y.claim or wrong
                if self.presumed and ahead <= _LONGEST:
                    self.suspicion = self.suspicion or wrong
                else:
                    self.missed = True
            for low, _ in y.gaps:
                if ack == low and kind & ~FROM_B == ACK:
                    y.gap_told = y.gap_told or low in y.missed
                elif seq_diff(ack, low) > 0 and not (
                    self.lacking or (self.presumed and ack in y.ends and not y.torn)
                ):
                    raise Contradiction(
                        f"it acknowledges {ack}, and the octets from {low} were never seen",
                        _UNSENT,
                    )
                elif seq_diff(ack, low) > 0:
                    self.missed = True
            if self.missed:
                y.gaps = [gap for gap in y.gaps if seq_diff(ack, gap[0]) <= 0]
        known = x.ack if x.ack is not None or y.isn is None else seq_add(y.isn, 1)
        if known is not None and seq_diff(ack, known) < 0:
            if x.former is not None and x.former.ack == ack:
                return True
            overtaken = y.isn is None or ack in y.ends or ack == seq_add(y.isn, 1)
            if self.exact or (self.presumed and self.whole and not overtaken):
                raise Contradiction(
                    f"it acknowledges {ack}, and {known} was acknowledged already", _BACKWARDS
                )
            if not self.lacking and not kind & OLD and kind & (FIN | TEXT):
                raise Contradiction(
                    f"it acknowledges {ack} anew, and {known} was acknowledged already",
                    _BACKWARDS,
                )
            return False
        x.ack, x.ack_at = ack, seq
        _remember(x.acks, ack)
        return True

    def _syn(
        self, x: Flow, y: Flow, flags: int, seq: int, ack: int, length: int, from_b: bool
    ) -> int:
        kind = SYN | TEXT if length else SYN
        if x.isn != seq:
            if flags & ACK and x.isn is not None and ack == seq_add(x.isn, 1):
                raise Contradiction(f"a SYN,ACK acknowledges its own sender's SYN {x.isn}", _UNSENT)
            if flags & ACK and self.whole:
                if x.opened and not (y.opened and y.former):
                    raise Contradiction(f"a SYN,ACK at {seq}, and its SYN is at {x.isn}", _SEQUENCE)
                if x.isn is None and y.ack == seq_add(seq, 1):
                    self._missed(
                        f"it was acknowledged ({y.ack}) before it was seen to be sent", _UNSENT
                    )
            fresh = Flow(isn=seq, next=seq_add(seq, 1 + length), last=x.last)
            fresh.opened = not flags & ACK
            if length:
                _remember(fresh.ends, seq_add(seq, 1 + length))
            fresh.former = x.former
            if x.next is not None:
                fresh.former = x
                x.former = None
            if from_b:
                self.b = fresh
            else:
                self.a = fresh
            x = fresh
        elif not flags & ACK:
            x.syn_again = True
        if flags & ACK:
            kind |= ACK
            # (A SYN may carry text, RFC 7413, of which all or nothing is acknowledged.)
            if y.isn is not None and ack not in (seq_add(y.isn, 1), *y.ends):
                raise Contradiction(
                    f"a SYN,ACK acknowledges {ack}, and the SYN is at {y.isn}", _UNSENT
                )
            if y.next is None:
                y.next, y.guessed = ack, True
            elif x.ack is None and y.isn is not None:
                self.latency = None if y.syn_again else x.last - y.last
            x.ack = ack
            _remember(x.acks, ack)
        return kind

    def _reset(self, x: Flow, y: Flow, flags: int, seq: int, ack: int, from_b: bool) -> int:
        # An answer to what is left of a former connection does not end the one that begins.
        begins = x.isn is not None and x.next == seq_add(x.isn, 1) != seq
        if x.fin is None and y.fin is None and self.reset_by is None and not begins:
            self.reset_by = 1 if x is self.b else 0
        x.reset_at = x.last
        x.reset_ack = ack if flags & ACK else x.ack
        here = self.exact or self.presumed
        own = [flow.next for flow in (x, x.former) if flow is not None and flow.next is not None]
        if x.probes and x.next is not None:
            own.append(seq_add(x.next, 1))
        answers = list(y.acks)
        if x.former is not None:
            answers += x.former.acks
        if y.former is not None:
            answers += y.former.acks
        if not flags & ACK:
            # It answers an acknowledgment: Linux sends none of these otherwise.
            replies = self.whole and self.linux[from_b]
            at = answers if replies else own + answers
            if (
                replies
                and y.last != _NEVER
                and x.last - y.last > _ANSWERED + 4 * (self.latency or 0.0)
            ):
                raise Contradiction(
                    f"a reset without ACK answers a segment, and the last came "
                    f"{x.last - y.last:.3f} s before",
                    _RESET,
                )
        else:
            # One with ACK is at SND.NXT (or the edge of a window that was taken back), or it
            # answers a segment without ACK.
            at = own if here and own and not y.shut else own + answers
            at.append(0)
            ahead = 0 if y.next is None or y.guessed else seq_diff(ack, y.next)
            if 0 < ahead < _AT_ONCE and self.lacking:
                self.missed = True
            elif ahead > 0:
                raise Contradiction(f"a reset acknowledges {ack}, sent is up to {y.next}", _UNSENT)
            if self.whole and y.next is None:
                self._missed(f"a reset acknowledges {ack}, and nothing was sent", _UNSENT)
        heard = y.last != _NEVER or flags & ACK
        if self.lacking and x.next is not None and 0 < seq_diff(seq, x.next) < _AT_ONCE:
            self.missed = True
        elif self.lacking and not flags & ACK and (x.isn is None or seq_diff(seq, x.isn) > 0):
            pass  # the acknowledgment that it answers may not have been captured
        elif heard and at and (self.whole or at != [0]) and seq not in at:
            due = _or(list(dict.fromkeys(at))[-4:])
            raise Contradiction(f"a reset at {seq}; {due} was due", _RESET)
        kind = RST
        if here and self.linux[from_b] and seq:
            kind |= RST_OWN if flags & ACK else RST_REPLY
        if y.ack is None or not seq:
            return kind | RST_AT
        if seq_diff(seq, y.ack) >= 0:
            kind |= RST_AT
            if seq == y.ack == x.next:
                kind |= RST_CERTAIN
        if x.fin == seq:
            kind |= RST_BEFORE
            if y.ack == seq_add(seq, 1):
                kind |= RST_CERTAIN
        return kind


def _most_in(seconds: float) -> float:
    """How many octets can have passed in this time without being captured."""
    return _AT_ONCE + max(seconds, 0.0) * _PER_SECOND


def _without(low: int, high: int, seq: int, end: int) -> Iterator[tuple[int, int]]:
    """What is left of the octets from `low` to `high` without those from `seq` to `end`."""
    before = seq if seq_diff(seq, high) < 0 else high
    after = end if seq_diff(end, low) > 0 else low
    if after == low and before == high:
        yield low, high
        return
    if seq_diff(before, low) > 0:
        yield low, before
    if seq_diff(high, after) > 0:
        yield after, high


def _remember(numbers: list[int], number: int) -> None:
    """Keep the last few (a list is a tenth of a deque, and there are many)."""
    numbers.append(number)
    if len(numbers) > _REMEMBERED:
        del numbers[: _REMEMBERED // 2]


def _or(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))

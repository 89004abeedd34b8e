"""The set of explanations: every pair of endpoint configurations that what was seen allows.

Theory of operation
===================

Both ends of a connection are followed together. An end's configuration is a
small whole number: its state, what it has been asked and told (closed by its
user, FIN queued, FIN acknowledged, peer's FIN received, ...), and what it has
put on the wire. No sequence number and no time is in it, so that there are few
(`timewait.check.sequence` and `timewait.check.checker` see to those).

What an end can do next is read from *its profile's transition table*, row by
row, and from nowhere else: a user's call, the reception of a segment that its
peer has put on the wire, a timeout. Segments may be lost, delayed and doubled,
so what is on the wire stays there.

An observer sees some of these steps. A *mode* says which: its bits tell which
ends' transitions are all reported, whether segments are, and which timeouts
could have fired by now. A set is always closed under the steps that the mode
cannot see. An observation keeps, and moves, what agrees with it. An empty set
is a divergence. Sets are numbered, and every (mode, set, observation) is
worked out once: what remains is a look-up in a dictionary per event.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from timewait.check.sequence import (
    ACKS_FIN,
    DROPPED,
    FROM_B,
    OLD,
    RST_AT,
    RST_BEFORE,
    RST_CERTAIN,
    RST_OWN,
    RST_REPLY,
    TEXT,
)
from timewait.tcp.segment import ACK, FIN, RST, SYN
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import Row

__all__ = ["Explanations", "Step", "Table"]

Table: TypeAlias = Mapping[tuple[State, Event], Row]
Pair: TypeAlias = tuple[int, int]

# An end's configuration: the state in the low four bits, and
ORPHAN: Final = 1 << 4  # close(2) was called
FIN_OUT: Final = 1 << 5  # our FIN is queued or sent
FIN_ACKED: Final = 1 << 6  # and acknowledged
FIN_IN: Final = 1 << 7  # the peer's FIN was received
FIN_IN_ACK: Final = 1 << 8  # and its acknowledgment is due or sent
RST_DUE: Final = 1 << 9  # a RST is to be sent
FAILED: Final = 1 << 10  # the connection ended by the peer's RST, or by silence
PASSIVE: Final = 1 << 11
CHILD: Final = 1 << 12  # Linux has made the socket of a passive open (its third segment came)
SMALL: Final = 1 << 13  # Linux has replaced the socket by a small one
HALF: Final = 1 << 14  # in the `via` state of a row that does two things
REPLACES: Final = 1 << 15  # in SYN_SENT: a TIME_WAIT, unless connect() fails (EADDRNOTAVAIL)
# what it has put on the wire:
W_SYN: Final = 1 << 16
W_SYN_ACK: Final = 1 << 17
W_ACK: Final = 1 << 18
W_FIN: Final = 1 << 19
W_FIN_ACK: Final = 1 << 20  # a FIN that acknowledges the peer's
W_ACK_FIN: Final = 1 << 21  # an acknowledgment of the peer's FIN
W_TEXT: Final = 1 << 22
W_RST: Final = 1 << 23
W_RST_BEFORE: Final = 1 << 45  # a RST at its receiver's RCV.NXT - 1
W_RST_CERTAIN: Final = 1 << 46  # a RST, whose place is certain, has still to be delivered
REPLY_DUE: Final = 1 << 47  # and that RST is an answer
WIRE: Final = 0xFF << 16 | W_RST_BEFORE | W_RST_CERTAIN
_RSTS: Final = W_RST | W_RST_BEFORE | W_RST_CERTAIN
# and what its user may do, having begun a call that does it.
MAY_CLOSE: Final = 1 << 24
MAY_CLOSE_ALL_READ: Final = 1 << 25  # and nothing can be left unread
MAY_SHUT_DOWN: Final = 1 << 26
LINGER: Final = 1 << 27  # SO_LINGER {1, 0} is set
MAY_CLOSE_UNREAD: Final = 1 << 32  # and something is certainly left unread
TOLD: Final = 1 << 33  # Linux has reported the end of the full socket
SENT: Final = 1 << 34  # its user has sent text
RESENT: Final = 1 << 35  # it had reason to send its FIN again
# A transition that Linux has still to report: it sends a segment first. Bit 44, old, new.
UNREPORTED: Final = 0x1FF << 36
_MAY_CLOSE: Final = MAY_CLOSE | MAY_CLOSE_ALL_READ | MAY_CLOSE_UNREAD
_MAY: Final = _MAY_CLOSE | MAY_SHUT_DOWN | LINGER
# How it came to close its side, kept to the end (four bits; see `cause`).
CAUSE: Final = 15 << 28
BY_FIN: Final = 1  # its user closed or shut down, first or at the same time
BY_FIN_AFTER: Final = 2  # the same, after the peer's FIN
BY_RST_UNREAD: Final = 3  # close() with text unread
BY_RST_ABORT: Final = 4  # SO_LINGER {1, 0}
BY_RST_NOBODY: Final = 5  # text came, and its user had closed
BY_SILENCE: Final = 6  # it gave up retransmitting
BY_PEER: Final = 7  # the peer's RST
BY_RST_NO_SOCKET: Final = 8  # there never was a socket

CLOSED, LISTEN, SYN_SENT, SYN_RECEIVED = 0, 1, 2, 3
ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK, TIME_WAIT = range(4, 11)
_SYNCHRONIZED: Final = frozenset(range(4, 11))
_ENDED: Final = FIN_IN | FIN_ACKED
# What is still true of an end that has no connection any more.
_OUTLIVES: Final = _ENDED | FAILED | RST_DUE | REPLY_DUE | WIRE | CAUSE | RESENT | UNREPORTED

# Modes. How an end's transitions are reported:
UNSEEN: Final = 0
EVERY: Final = 1  # every one, as the model reports them
FULL_SOCKETS: Final = 2  # as Linux's tracepoint: no embryos, no TIME_WAIT, no small sockets
SEES_A: Final = 3  # two bits for A,
SEES_B: Final = 3 << 2  # two for B
SEGMENTS: Final = 1 << 4  # every segment is reported
TW_OVER_A: Final = 1 << 5  # 2MSL may have passed
TW_OVER_B: Final = 1 << 6
F2_OVER_A: Final = 1 << 7  # an orphan's limit may have passed
F2_OVER_B: Final = 1 << 8
LATE: Final = 1 << 9  # a retransmission may have been given up
CALLS_A: Final = 1 << 10  # every call of A's user is reported, as it is made and as it returns
CALLS_B: Final = 1 << 11
DOUBLES: Final = 1 << 12  # the network may deliver a segment twice
ANYTHING: Final = TW_OVER_A | TW_OVER_B | F2_OVER_A | F2_OVER_B | LATE | DOUBLES

# Symbols: what was observed, as one number.
_SEG: Final = 0  # a segment's kind (9 bits)
_MOVE: Final = 1 << 9  # a transition: end, old, new
_IS: Final = 2 << 9  # a state at an instant: end, state
_BOTH: Final = 3 << 9  # both ends' states at about one instant, in either order
_TOLD: Final = 4 << 9  # what a call's result tells of an end

EOF_READ: Final = 1  # the peer's FIN was received
RESET_READ: Final = 2  # the peer's RST was received, or the connection timed out
CONNECTED: Final = 3  # the handshake was completed
CLOSE_BEGUN: Final = 4
CLOSE_BEGUN_ALL_READ: Final = 5
SHUTDOWN_BEGUN: Final = 6
LINGER_BEGUN: Final = 7
CLOSED_BY_CALL: Final = 8
SHUT_DOWN_BY_CALL: Final = 9
NOT_TIME_WAIT: Final = 10
CLOSE_BEGUN_UNREAD: Final = 11
SEND_BEGUN: Final = 12
ALL_REPORTED: Final = 13  # what Linux has done, it has reported by now


ALL_DELIVERED: Final = _TOLD | 15  # what was on the wire and not lost has arrived


def moved(end: int, old: int, new: int) -> int:
    """The symbol of an end's reported transition (LISTEN is CLOSED here: it has no peer)."""
    return _MOVE | end << 8 | (0 if old == LISTEN else old) << 4 | (0 if new == LISTEN else new)


def seen_in(end: int, state: int) -> int:
    """The symbol of an end's state at an instant."""
    return _IS | end << 4 | (0 if state == LISTEN else state)


def both_in(a: int, b: int) -> int:
    """The symbol of both ends' states, looked at one after the other, either first."""
    return _BOTH | (0 if a == LISTEN else a) << 4 | (0 if b == LISTEN else b)


def states_of_both(symbol: int) -> tuple[int, int] | None:
    """The states that `both_in` made this symbol of; None for another kind of symbol."""
    return (symbol >> 4 & 15, symbol & 15) if symbol >> 9 == _BOTH >> 9 else None


# Every look that finds a connection.
SEEN_OPEN: Final = frozenset(
    {seen_in(end, state) for end in (0, 1) for state in range(SYN_SENT, TIME_WAIT + 1)}
    | {both_in(a, b) for a in range(TIME_WAIT + 1) for b in range(TIME_WAIT + 1) if max(a, b) > 1}
)


def told(end: int, what: int) -> int:
    """The symbol of what a call's result tells."""
    return _TOLD | end << 4 | what


class Step(NamedTuple):
    """One thing that an end can do: `row` is the table's reason, None for Linux's bookkeeping."""

    end: int
    event: Event | None
    row: Row | None
    after: int  # the end's configuration afterwards


_WORKED_OUT: Final = 300_000
_CALLS: Final = (Event.SHUTDOWN, Event.CLOSE, Event.CLOSE_UNREAD, Event.ABORT)
_AT_ONCE: Final = frozenset({*_CALLS, Event.OPEN_ACTIVE})  # reported before anything is sent
_RESETS: Final = frozenset({"reset_reply", "send_rst"})
_ACKS: Final = frozenset({"acknowledge_fin", "send_ack", "acknowledge"})


class Explanations:
    """The automaton of one pair of tables, worked out as far as it has been needed.

    `a` and `b` are the transition tables of the two ends, `embryos` says which
    of them give their user no socket before the handshake is done. A set of
    configurations is known by its number; 0 is the empty set.
    """

    def __init__(self, a: Table, b: Table, embryos: tuple[bool, bool] = (True, True)) -> None:
        self._tables = (a, b)
        self._embryos = embryos
        self._numbers: dict[frozenset[Pair], int] = {frozenset(): 0}
        self._sets: list[frozenset[Pair]] = [frozenset()]
        self._facts: list[int] = [0]
        self.next: dict[tuple[int, int, int], int] = {}
        self._steps: dict[tuple[int, int, int, int], tuple[Step, ...]] = {}
        self._closed: dict[tuple[int, int], int] = {}

    # Sets.

    def number(self, pairs: Iterable[Pair]) -> int:
        """The number of a set of pairs."""
        key = frozenset(pairs)
        number = self._numbers.get(key)
        if number is None:
            number = self._numbers[key] = len(self._sets)
            self._sets.append(key)
            self._facts.append(_facts(key))
        return number

    def members(self, number: int) -> frozenset[Pair]:
        """The pairs of a set."""
        return self._sets[number]

    def facts(self, number: int) -> int:
        """What holds of a set, as `FACT_...` bits."""
        return self._facts[number]

    def start(self, mode: int) -> int:
        """The set in which neither end has a connection yet."""
        return self.close(mode, self.number({(CLOSED, CLOSED)}))

    def anywhere(self, mode: int) -> int:
        """The set of everything that could have happened before the first observation."""
        return self.close(mode, self.start(ANYTHING))

    def close(self, mode: int, number: int) -> int:
        """The set and everything that unseen steps make of it."""
        key = (mode, number)
        closed = self._closed.get(key)
        if closed is None:
            found = set(self._sets[number])
            queue = list(found)
            while queue:
                pair = queue.pop()
                for reached in self._unseen(mode, pair):
                    if reached not in found:
                        found.add(reached)
                        queue.append(reached)
            closed = self._closed[key] = self.number(found)
            self._closed[mode, closed] = closed
        return closed

    def unwatched(self, mode: int, number: int) -> int:
        """The set where segments may have passed, or transitions happened, that nobody saw."""
        pairs = self._sets[number]
        sent = {(send(a & ~UNREPORTED), send(b & ~UNREPORTED)) for a, b in pairs}
        return self.close(mode, self.number(pairs | sent))

    def follow(self, mode: int, number: int, symbol: int) -> int:
        """The set after one observation; 0 if nothing explains it."""
        key = (mode, number, symbol)
        number_after = self.next.get(key)
        if number_after is None:
            if len(self.next) > _WORKED_OUT:  # Evidence of every kind, for days: begin again.
                self.next.clear()
                self._steps.clear()
                self._closed.clear()
            pairs = self._after(mode, self._sets[number], symbol)
            number_after = self.next[key] = self.close(mode, self.number(pairs))
        return number_after

    def agrees(self, mode: int, pair: Pair, symbol: int) -> bool:
        """Whether an observation can be of this pair, or of its next step."""
        return any(True for _ in self._after(mode, frozenset({pair}), symbol))

    def table(self, end: int) -> Table:
        """The transition table of an end."""
        return self._tables[end]

    # Steps.

    def steps(self, mode: int, pair: Pair, end: int) -> tuple[Step, ...]:
        """Everything that an end can do next, whoever sees it."""
        x, y = (pair[1], pair[0]) if end else pair
        # Only these of the mode's bits decide what can be done.
        timers = mode >> (6 if end else 5) & 1 | (mode >> (8 if end else 7) & 1) << 1
        calls = mode >> (11 if end else 10) & 1 | (mode >> (10 if end else 11) & 1) << 1
        context = timers | (mode >> 9 & 1) << 2 | (mode >> 4 & 1) << 3 | calls << 4
        context |= (mode >> 12 & 1) << 6
        key = (context, end, x, y)
        known = self._steps.get(key)
        if known is None:
            known = self._steps[key] = tuple(self._work_out(context, end, x, y))
        return known

    def _work_out(self, context: int, end: int, x: int, y: int) -> Iterator[Step]:
        table = self._tables[end]
        segments = context & 8
        state = x & 15
        # What shows that the peer has sent text, or may have.
        text = W_TEXT if segments else SENT if context & 32 else W_ACK

        def by(event: Event, set_bits: int = 0) -> Iterator[Step]:
            row = table[State(state), event]
            if row.kind == "go":
                yield from self._apply(end, event, row, x, set_bits, segments)

        if x & HALF:
            event = Event.FIN_AND_ACK_OF_FIN if x & FIN_OUT else Event.FIN_AND_ACK_OF_SYN
            origin = FIN_WAIT_1 if x & FIN_OUT else SYN_RECEIVED
            row = table[State(origin), event]
            yield from self._apply(end, event, row, x, FIN_IN, segments)
            return
        # The user.
        if state == CLOSED:
            if not (x & RST_DUE and segments and not context & 64):
                yield from self._open(end, table[State.CLOSED, Event.OPEN_ACTIVE], segments)
            if y & W_SYN and not x & (_ENDED | FAILED):
                # Perhaps somebody listens. A listener is not followed: it has no peer.
                listening = table[State.CLOSED, Event.OPEN_PASSIVE].next
                if listening is not None:
                    row = table[listening, Event.SYN]
                    yield from self._apply(end, Event.SYN, row, CLOSED, PASSIVE, segments)
        elif not (self._embryos[end] and state == SYN_RECEIVED and x & PASSIVE and not x & CHILD):
            for event in _CALLS:
                if x & ORPHAN or (event is Event.SHUTDOWN and x & FIN_OUT):
                    continue
                if event is Event.CLOSE_UNREAD and not y & text:
                    continue
                if context & 16 and not _licensed(x, event):
                    continue
                if event is Event.ABORT and segments and _fin_unsent(x, y):
                    # tcp_disconnect: in silence only where the FIN has been sent
                    row = table[State.FIN_WAIT_1, event]
                    yield from self._apply(end, event, row, x, 0, segments)
                    continue
                yield from by(event)
        if state == TIME_WAIT or (state == FIN_WAIT_2 and x & SMALL):
            # A new connect() may take the place of an old TIME_WAIT (RFC 6191, tcp_tw_reuse),
            # and from a port it is bound to that of a small FIN_WAIT_2 too (tcp_twsk_unique).
            opened = table[State.CLOSED, Event.OPEN_ACTIVE]
            yield from self._open(end, opened, segments, REPLACES if state == TIME_WAIT else 0)
        # Linux's bookkeeping, which only its tracepoint shows.
        if x & REPLACES:
            yield Step(end, None, None, TIME_WAIT | _ENDED)
        # (Text in the SYN makes the socket at once: RFC 7413.)
        if state == SYN_RECEIVED and x & PASSIVE and not x & CHILD and y & (W_ACK | W_TEXT):
            yield Step(end, None, None, x | CHILD)
        if state == FIN_WAIT_2 and x & ORPHAN and not x & SMALL:
            yield Step(end, None, None, x | SMALL)
            yield Step(end, None, None, x | SMALL | TOLD)
        # Timeouts.
        if context & 1 and state == TIME_WAIT:
            yield from by(Event.TIME_WAIT_OVER)
        if context & 2 and state == FIN_WAIT_2 and x & ORPHAN:
            yield from by(Event.FIN_WAIT_2_OVER)
        if context & 4 and state in (2, 3, 4, 5, 7, 8, 9):
            yield from by(Event.GIVE_UP, FAILED)
            if x & FIN_OUT and not x & (FIN_ACKED | RESENT):
                yield from by(Event.RETRANSMIT, RESENT)
        if context & 4 and state in (4, 5, 6, 7, 8, 9):
            yield from by(Event.UNANSWERED, FAILED)
        # Segments.
        for event, bits in _arrivals(x, y, text, context & 64, segments):
            yield from by(event, bits)

    def _open(self, end: int, row: Row, segments: int, bits: int = 0) -> Iterator[Step]:
        if row.next is not None:
            sent = W_SYN if "send_syn" in row.actions and not segments else 0
            yield Step(end, Event.OPEN_ACTIVE, row, int(row.next) | sent | bits)

    def _apply(
        self, end: int, event: Event, row: Row, x: int, bits: int, segments: int
    ) -> Iterator[Step]:
        """The row performed: what the end's configuration is afterwards."""
        half = x & HALF
        if row.via is not None and not half:
            first = x & ~15 | int(row.via) | HALF
            if event is Event.FIN_AND_ACK_OF_FIN:
                first |= FIN_ACKED
            yield Step(end, event, row, first if segments else send(first))
        x = (x | bits) & ~HALF
        if event is Event.SYN_REOPENS:
            x = x & UNREPORTED | PASSIVE  # nothing of the old incarnation is true of the new one
        if row.next is not None:
            x = x & ~(15 | REPLACES) | int(row.next)
        acts = row.actions
        if "orphan" in acts:
            x = (x | ORPHAN) & ~_MAY
        if event is Event.SHUTDOWN:
            x &= ~MAY_SHUT_DOWN
        if "queue_fin" in acts:
            x |= FIN_OUT
        if bits & FIN_IN and not _ACKS.isdisjoint(acts):
            x |= FIN_IN_ACK
        if not _RESETS.isdisjoint(acts):
            x |= RST_DUE if "send_rst" in acts else RST_DUE | REPLY_DUE
        if event is Event.SYN and "send_syn_ack" not in acts:
            return
        if x & 15 in (CLOSED, LISTEN):
            x &= _OUTLIVES
        elif x & 15 == TIME_WAIT:
            x &= ~(CHILD | SMALL | PASSIVE | TOLD)
        elif x & 15 != SYN_RECEIVED:
            x &= ~(CHILD | PASSIVE)
        if not x & CAUSE:
            x |= _cause(event, acts, x) << 28
        yield Step(end, event, row, x if segments else send(x))

    # Observations.

    def _unseen(self, mode: int, pair: Pair) -> Iterator[Pair]:
        for end in (0, 1):
            how = mode >> 2 * end & 3
            before = pair[end]
            for step in self.steps(mode, pair, end):
                # Addresses are not thought to be used again unless that is seen.
                if step.event is Event.OPEN_ACTIVE and before:
                    continue
                if how == UNSEEN:
                    yield after(pair, step)
                    continue
                for report in reports(how, before, step.after):
                    if report is None:
                        yield after(pair, step)
                    elif (
                        how == FULL_SOCKETS
                        and mode & SEGMENTS
                        and step.event not in _AT_ONCE
                        and not before & UNREPORTED
                    ):
                        due = (256 | report[0] << 4 | report[1]) << 36
                        yield after(pair, step._replace(after=step.after | due))

    def _after(self, mode: int, pairs: frozenset[Pair], symbol: int) -> Iterator[Pair]:
        what = symbol & 7 << 9
        end = symbol >> 4 & 1
        if what == _SEG:
            if symbol & 0xFF == SYN and not mode >> 2 * (symbol >> 8 & 1) & 3:
                pairs = pairs.union(self._reopened(mode, pairs, symbol >> 8 & 1))
            yield from _after_segment(pairs, symbol)
        elif what == _MOVE:
            yield from self._after_move(mode, pairs, symbol)
        elif what == _IS:
            yield from _keep(pairs, end, symbol & 15)
        elif symbol == ALL_DELIVERED:
            yield from self._after_delivery(pairs)
        elif what == _TOLD:
            yield from _after_told(pairs, end, symbol & 15)
        else:
            for first, then in ((0, 1), (1, 0)):
                states = (symbol >> 4 & 15, symbol & 15)
                seen = self.close(mode, self.number(_keep(pairs, first, states[first])))
                yield from _keep(self._sets[seen], then, states[then])

    def _reopened(self, mode: int, pairs: frozenset[Pair], end: int) -> Iterator[Pair]:
        """The pairs in which this end has just begun a new connection."""
        for pair in pairs:
            for step in self.steps(mode, pair, end):
                if step.event is Event.OPEN_ACTIVE:
                    yield after(pair, step)

    def just_after(self, mode: int, number: int, symbol: int) -> frozenset[Pair]:
        """What an observation leaves, before anything unseen may follow."""
        return frozenset(self._after(mode, self._sets[number], symbol))

    def _after_delivery(self, pairs: frozenset[Pair]) -> Iterator[Pair]:
        """The pairs in which no RST waits to do what it must."""
        for pair in pairs:
            for end in (0, 1):
                row = self.row_of_reset(pair, end)
                if row is not None and row.kind == "go" and row.next not in (None, pair[end] & 15):
                    break
            else:
                yield pair[0] & ~W_RST_CERTAIN, pair[1] & ~W_RST_CERTAIN

    def row_of_reset(self, pair: Pair, end: int) -> Row | None:
        """The row for a RST that certainly reaches this end, if there is one."""
        peer = pair[1 - end]
        if not peer & W_RST_CERTAIN:
            return None
        event = Event.RST_EXACT if peer & W_RST else Event.RST_AFTER_FIN
        return self._tables[end][State(pair[end] & 15), event]

    def _after_move(self, mode: int, pairs: frozenset[Pair], symbol: int) -> Iterator[Pair]:
        end = symbol >> 8 & 1
        what = (symbol >> 4 & 15, symbol & 15)
        how = mode >> 2 * end & 3 or EVERY
        for pair in pairs:
            if pair[end] & UNREPORTED:
                if pair[end] >> 36 & 255 == symbol & 255:
                    x = pair[end] & ~UNREPORTED
                    yield (pair[0], x) if end else (x, pair[1])
                continue
            for step in self.steps(mode, pair, end):
                if what in reports(how, pair[end], step.after):
                    yield after(pair, step)


def _after_segment(pairs: frozenset[Pair], symbol: int) -> Iterator[Pair]:
    end = 1 if symbol & FROM_B else 0
    for a, b in pairs:
        sender = emit(b if end else a, symbol)
        if sender is not None:
            yield (a, _still_useful(sender, a)) if end else (_still_useful(sender, b), b)


def after(pair: Pair, step: Step) -> Pair:
    a, b = pair
    if step.event is Event.OPEN_ACTIVE:
        # A new connection: what the peer sent in an older one is not for it.
        peer = a if step.end else b
        kept = W_SYN if peer & 15 == SYN_SENT else 0  # unless both open at the same time
        peer = 0 if peer & 15 == CLOSED else peer & ~(WIRE & ~kept)
        return (peer, step.after) if step.end else (step.after, peer)
    a, b = (a, step.after) if step.end else (step.after, b)
    return _still_useful(a, b), _still_useful(b, a)


def _still_useful(x: int, y: int) -> int:
    """`x` without what it has on the wire and `y` has already got, or has no use for."""
    if not y & 15:
        wire = W_SYN if x & 15 == SYN_SENT and x & W_SYN else 0
        if x & (WIRE & ~(_RSTS | W_SYN)):
            wire |= W_ACK
        return x & ~WIRE | wire
    if y & 15 >= ESTABLISHED:
        x &= ~W_SYN_ACK if x & 15 == SYN_SENT else ~(W_SYN | W_SYN_ACK)
        if y & FIN_IN:
            x &= ~(W_FIN | W_FIN_ACK)
        if y & FIN_ACKED:
            x &= ~W_ACK_FIN
    return x


def send(x: int) -> int:
    """Put on the wire what is due, where nobody watches the wire."""
    state = x & 15
    if state in _SYNCHRONIZED:
        x |= W_ACK
    elif state == SYN_RECEIVED:
        x |= W_SYN_ACK
    elif state == SYN_SENT:
        x |= W_SYN
    if x & FIN_OUT and not x & FIN_ACKED:
        x |= W_FIN_ACK if x & FIN_IN_ACK else W_FIN
    if x & FIN_IN_ACK:
        x |= W_ACK_FIN
    if x & RST_DUE:
        x = x & ~(RST_DUE | REPLY_DUE) | W_RST | W_RST_BEFORE
    return x


def _cause(event: Event, acts: tuple[str, ...], x: int) -> int:
    if "queue_fin" in acts:
        return BY_FIN_AFTER if x & FIN_IN else BY_FIN
    if event in (Event.CLOSE_UNREAD, Event.ABORT):
        return BY_RST_UNREAD if event is Event.CLOSE_UNREAD else BY_RST_ABORT
    if "reset_reply" in acts and not x & 15:
        return BY_RST_NOBODY if event is Event.TEXT_AFTER_CLOSE else BY_RST_NO_SOCKET
    if x & FAILED:
        return BY_SILENCE if event in (Event.GIVE_UP, Event.UNANSWERED) else BY_PEER
    return 0


def _arrivals(
    x: int, y: int, text: int, doubles: int, segments: int
) -> Iterator[tuple[Event, int]]:
    """What the segments that `y` has put on the wire can amount to for `x`, and what it then
    knows: RFC 9293 §3.10.7 in terms of what matters here.
    """
    state = x & 15
    if y & W_RST:
        if state == SYN_RECEIVED and x & PASSIVE:
            yield Event.RST_TO_PASSIVE, FAILED
        else:
            yield Event.RST_EXACT, FAILED
    if y & W_RST_BEFORE and x & FIN_IN:
        yield Event.RST_AFTER_FIN, FAILED
    if state == CLOSED:
        # After an orderly end all of the peer's segments have arrived; only an answer to a FIN
        # that was sent again finds nobody.
        if x & RST_DUE or (x & _ENDED == _ENDED and not (x & RESENT or doubles)):
            return
        if y & W_SYN and y & 15 == SYN_SENT:
            yield Event.NO_ACK, 0
        if y & (WIRE & ~(_RSTS | W_SYN)):
            yield Event.ACK_OF_UNSENT, 0
        return
    if y & W_SYN:
        if state == SYN_SENT:
            if x & W_SYN or doubles or not segments:  # its own was seen first
                yield Event.SYN, 0
        elif state == TIME_WAIT and y & 15 == SYN_SENT:
            yield Event.SYN_REOPENS, 0
    if y & W_SYN_ACK:
        if state == SYN_SENT:
            yield Event.SYN_ACK, 0
        elif state == SYN_RECEIVED:
            yield Event.ACK_OF_SYN, 0
    if state == SYN_SENT and y & W_ACK and not y & W_SYN_ACK:
        yield Event.ACK_OF_UNSENT, 0
    if state == SYN_RECEIVED:
        if y & W_ACK:
            yield Event.ACK_OF_SYN, 0
        if y & (W_FIN | W_FIN_ACK):
            yield Event.FIN_AND_ACK_OF_SYN, FIN_IN
    if state not in _SYNCHRONIZED:
        return
    waits = x & FIN_OUT and not x & FIN_ACKED
    if not x & FIN_IN:
        if y & W_FIN_ACK and waits:
            yield Event.FIN_AND_ACK_OF_FIN, FIN_IN | FIN_ACKED
        elif y & (W_FIN | W_FIN_ACK):
            yield Event.FIN, FIN_IN
        if y & W_FIN and y & W_FIN_ACK and waits:
            yield Event.FIN, FIN_IN
    if waits and y & W_ACK_FIN:
        yield Event.ACK_OF_FIN, FIN_ACKED
    if x & ORPHAN and y & text and state in (FIN_WAIT_1, FIN_WAIT_2):
        yield Event.TEXT_AFTER_CLOSE, 0


def _fin_unsent(x: int, y: int) -> bool:
    """Whether a FIN that follows the peer's is queued and has not been seen to be sent."""
    sent = x & (W_FIN | W_FIN_ACK | FIN_ACKED) or y & FIN_IN
    return x & 15 in (CLOSING, LAST_ACK) and not sent


def at_rest(pairs: frozenset[Pair], mode: int) -> frozenset[Pair]:
    """Those in which nothing is still to be sent or reported that a moment later would be seen."""

    def waits(x: int, y: int) -> bool:
        unsent = x & FIN_OUT and not (x & (W_FIN | W_FIN_ACK | FIN_ACKED) or y & FIN_IN)
        due = mode & SEGMENTS and (x & (RST_DUE | W_RST_CERTAIN) or unsent)
        return bool(x & (UNREPORTED | HALF) or due)

    return frozenset(p for p in pairs if not (waits(*p) or waits(p[1], p[0]))) or pairs


def reports(how: int, before: int, after: int) -> tuple[tuple[int, int] | None, ...]:
    """What an observer may report of a step: transitions, or None for nothing at all."""
    old, new = before & 15, after & 15
    old, new = (0 if old == LISTEN else old), (0 if new == LISTEN else new)
    if how == EVERY:
        return ((old, new),) if old != new else (None,)
    # Linux's tracepoint, whose end of a full socket may have been looked up in sock_diag.
    if after & CHILD and not before & CHILD:
        return ((CLOSED, SYN_RECEIVED),)
    if after & SMALL and not before & SMALL:
        # What it became is looked up: too late, it is in TIME_WAIT already.
        return ((FIN_WAIT_2, CLOSED), (FIN_WAIT_2, TIME_WAIT)) if after & TOLD else (None,)
    if old == new:
        return (None,)
    if new == SYN_RECEIVED and after & PASSIVE:
        return (None,)
    if old == SYN_RECEIVED and before & PASSIVE and not before & CHILD:
        return (None,) if new == CLOSED else ()
    if before & SMALL:
        return (None,) if before & TOLD else (None, (old, new))
    if old == TIME_WAIT:
        if new == SYN_SENT:
            return ((CLOSED, SYN_SENT),)
        return (None, (old, new))
    if new == TIME_WAIT:
        return ((old, CLOSED),) if old == SYN_SENT else ((old, CLOSED), (old, TIME_WAIT))
    return ((old, new),)


def emit(x: int, kind: int) -> int | None:
    """The end after sending a segment of this kind; None if it does not send such a one."""
    state = x & 15
    if kind & RST:
        if not x & RST_DUE or kind & (RST_OWN if x & REPLY_DUE else RST_REPLY):
            return None
        x &= ~(RST_DUE | REPLY_DUE)
        sent = W_RST if kind & RST_AT else 0
        if kind & RST_BEFORE:
            sent |= W_RST_BEFORE
        if kind & RST_CERTAIN:
            sent |= W_RST_CERTAIN
    elif kind & SYN:
        if kind & ACK:
            if state != SYN_RECEIVED and not kind & OLD:
                return None
            sent = W_SYN_ACK
        else:
            if state != SYN_SENT:
                return None
            x &= ~REPLACES
            sent = W_SYN | W_TEXT if kind & TEXT else W_SYN
    else:
        if state not in _SYNCHRONIZED and state != SYN_RECEIVED:
            return None
        sent = W_ACK
        if kind & ACKS_FIN:
            if not x & FIN_IN_ACK:
                return None
            sent |= W_ACK_FIN
        elif x & FIN_IN and not kind & OLD:
            return None
        if kind & FIN:
            if not x & FIN_OUT or x & FIN_ACKED:
                return None
            sent |= W_FIN_ACK if kind & ACKS_FIN else W_FIN
        if kind & TEXT:
            if state in (FIN_WAIT_2, TIME_WAIT) or (state == SYN_RECEIVED and not x & CHILD):
                return None
            sent |= W_TEXT
    return x if kind & DROPPED else x | sent


def shown(x: int) -> int:
    """The state that a look finds: Linux makes a transition when it reports it, no earlier."""
    return x >> 40 & 15 if x & UNREPORTED else x & 15


def _keep(pairs: Iterable[Pair], end: int, state: int) -> Iterator[Pair]:
    """Those in which a look at this end finds it in this state."""
    for pair in pairs:
        is_in = shown(pair[end])
        if is_in == state or (
            # A listener has no row of its own for this peer, and a new socket perhaps not yet.
            state == CLOSED and (is_in == LISTEN or (is_in == SYN_RECEIVED and pair[end] & PASSIVE))
        ):
            yield pair


def _after_told(pairs: Iterable[Pair], end: int, what: int) -> Iterator[Pair]:
    for pair in pairs:
        x = pair[end]
        state = x & 15
        gone = state in (CLOSED, TIME_WAIT)
        if what == EOF_READ:
            true = bool(x & (FIN_IN | FAILED))
        elif what == RESET_READ:
            true = bool(x & FAILED)
        elif what == CONNECTED:
            # The user has the socket now, and cannot have closed it yet.
            true = (
                state not in (SYN_SENT, SYN_RECEIVED)
                and not x & (ORPHAN | FIN_OUT)
                and bool(state or x & FAILED)
            )
        elif what == CLOSED_BY_CALL:
            true = bool(x & ORPHAN or gone)
            x &= ~_MAY
        elif what == SHUT_DOWN_BY_CALL:
            true = bool(x & FIN_OUT or gone)
            x &= ~MAY_SHUT_DOWN
        elif what == NOT_TIME_WAIT:
            true = state != TIME_WAIT
        elif what == ALL_REPORTED:
            true = not x & UNREPORTED
        else:
            true = True
            x |= _LICENCE[what]
        if true:
            yield (pair[0], x) if end else (x, pair[1])


_LICENCE: Final = {
    CLOSE_BEGUN: MAY_CLOSE,
    CLOSE_BEGUN_ALL_READ: MAY_CLOSE_ALL_READ,
    CLOSE_BEGUN_UNREAD: MAY_CLOSE_UNREAD,
    SHUTDOWN_BEGUN: MAY_SHUT_DOWN,
    LINGER_BEGUN: LINGER,
    SEND_BEGUN: SENT,
}


def _licensed(x: int, event: Event) -> bool:
    """Whether the calls that this end's user is in allow this."""
    if event is Event.SHUTDOWN:
        return bool(x & MAY_SHUT_DOWN)
    if not x & _MAY_CLOSE or (event is Event.ABORT) != bool(x & LINGER):
        return False
    if event is Event.CLOSE_UNREAD:
        return not x & MAY_CLOSE_ALL_READ
    return event is Event.ABORT or not x & MAY_CLOSE_UNREAD


# What holds of a set: for A in the low bits, for B the same shifted by 8.
MAY_TIME_WAIT: Final = 1
MUST_TIME_WAIT: Final = 2  # and its peer has no FIN left to repeat
MAY_ORPHAN: Final = 4  # may be an orphan in FIN_WAIT_2
MAY_BE_OVER: Final = 8  # in no other state than CLOSED or TIME_WAIT
PERHAPS_OVER: Final = 1 << 16  # it may be that neither is, and no RST is still to be sent
_GONE: Final = (CLOSED, TIME_WAIT)


def _facts(pairs: frozenset[Pair]) -> int:
    facts = 0
    for end in (0, 1):
        bits = 0
        if any(p[end] & 15 == TIME_WAIT for p in pairs):
            bits |= MAY_TIME_WAIT
        if pairs and all(
            p[end] & 15 == TIME_WAIT and not (p[1 - end] & FIN_OUT and not p[1 - end] & FIN_ACKED)
            for p in pairs
        ):
            bits |= MUST_TIME_WAIT
        if any(p[end] & 15 == FIN_WAIT_2 and p[end] & ORPHAN for p in pairs):
            bits |= MAY_ORPHAN
        if all(p[end] & 15 in (CLOSED, TIME_WAIT) for p in pairs):
            bits |= MAY_BE_OVER
        facts |= bits << 8 * end
    if any(a & 15 in _GONE and b & 15 in _GONE and not (a | b) & RST_DUE for a, b in pairs):
        facts |= PERHAPS_OVER
    return facts

"""One endpoint of a connection: sequence variables around the transition table.

Theory of operation
===================

A `Connection` is told what happens (the user's calls, segments, the passing of
time) and keeps the variables of RFC 9293 §3.3.1. Whatever happens it turns
into one `Event`, in the order of §3.10.7.4: the sequence number is looked at,
then RST, SYN, ACK, the text, FIN. By then acknowledged text has left the send
buffer and text in order has reached the receive buffer, and the event says what
the whole segment amounts to (`ACK_OF_FIN`, `FIN_AND_ACK_OF_FIN`, ...). The
profile's table says what follows: the next state, and actions, each of which is
one of the small methods below.

It does no I/O and knows no clock. Segments are appended to `out`; `deadline`
says when `expire` wants to be called; every input takes `now`, in seconds on
any clock that does not go backwards. So the same object serves in a simulation,
in an exhaustive exploration (`snapshot`, `restore`), and as the live peer of a
kernel.

There is no congestion control: text is sent as the peer's window allows.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from attrs import frozen

from timewait.tcp.profiles import Profile
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, Options, Segment
from timewait.tcp.states import Event, State, Timer
from timewait.tcp.transitions import Row

__all__ = ["Connection", "Hook", "Status", "TCPError"]

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
INF: Final = float("inf")

Hook: TypeAlias = Callable[[State, State, Event, float], None]

_EVENTS = tuple(Event)
_TIMERS = ("t_retransmit", "t_ack", "t_probe", "t_keepalive", "t_wait", "t_user")

# Plain ints and module globals: the classification runs for every segment.
_OPEN_PASSIVE, _OPEN_ACTIVE = int(Event.OPEN_PASSIVE), int(Event.OPEN_ACTIVE)
_SEND, _RECEIVE = int(Event.SEND), int(Event.RECEIVE)
_SHUTDOWN, _CLOSE = int(Event.SHUTDOWN), int(Event.CLOSE)
_CLOSE_UNREAD, _ABORT = int(Event.CLOSE_UNREAD), int(Event.ABORT)
_RST_EXACT, _RST_TO_PASSIVE = int(Event.RST_EXACT), int(Event.RST_TO_PASSIVE)
_RST_AFTER_FIN, _RST_IN_WINDOW = int(Event.RST_AFTER_FIN), int(Event.RST_IN_WINDOW)
_RST_OUTSIDE, _SYN, _SYN_ACK = int(Event.RST_OUTSIDE), int(Event.SYN), int(Event.SYN_ACK)
_SYN_TO_PASSIVE, _SYN_AGAIN = int(Event.SYN_TO_PASSIVE), int(Event.SYN_AGAIN)
_SYN_UNEXPECTED, _SYN_REOPENS = int(Event.SYN_UNEXPECTED), int(Event.SYN_REOPENS)
_UNACCEPTABLE, _NO_ACK = int(Event.UNACCEPTABLE), int(Event.NO_ACK)
_ACK_OF_UNSENT, _ACK_TOO_OLD = int(Event.ACK_OF_UNSENT), int(Event.ACK_TOO_OLD)
_SEGMENT, _ACK_OF_SYN = int(Event.SEGMENT), int(Event.ACK_OF_SYN)
_ACK_OF_FIN, _FIN = int(Event.ACK_OF_FIN), int(Event.FIN)
_FIN_AND_ACK_OF_SYN = int(Event.FIN_AND_ACK_OF_SYN)
_FIN_AND_ACK_OF_FIN = int(Event.FIN_AND_ACK_OF_FIN)
_FIN_AGAIN, _TEXT_AFTER_CLOSE = int(Event.FIN_AGAIN), int(Event.TEXT_AFTER_CLOSE)
_RETRANSMIT, _GIVE_UP = int(Event.RETRANSMIT), int(Event.GIVE_UP)
_PROBE, _KEEPALIVE = int(Event.PROBE), int(Event.KEEPALIVE)
_DELAYED_ACK = int(Event.DELAYED_ACK)
_TIME_WAIT_OVER, _FIN_WAIT_2_OVER = int(Event.TIME_WAIT_OVER), int(Event.FIN_WAIT_2_OVER)

CLOSED, LISTEN, SYN_SENT = State.CLOSED, State.LISTEN, State.SYN_SENT
SYN_RECEIVED, ESTABLISHED = State.SYN_RECEIVED, State.ESTABLISHED
FIN_WAIT_1, FIN_WAIT_2 = State.FIN_WAIT_1, State.FIN_WAIT_2
CLOSE_WAIT, CLOSING = State.CLOSE_WAIT, State.CLOSING
LAST_ACK, TIME_WAIT = State.LAST_ACK, State.TIME_WAIT


class TCPError(OSError):
    """A user's call was refused, or the connection failed; `errno` says how.

    A call that is refused has changed nothing. A failure of the connection
    (ECONNRESET, ECONNREFUSED, ETIMEDOUT) is reported once.
    """

    def __init__(self, errno: int, why: str = "") -> None:
        text = os.strerror(errno)
        super().__init__(errno, f"{text}: {why}" if why else text)


@frozen
class Status:
    """What RFC 9293 §3.10.6 tells a user who asks for the connection's status."""

    state: State
    snd_una: int
    snd_nxt: int
    snd_wnd: int
    rcv_nxt: int
    rcv_wnd: int
    unsent: int
    unacknowledged: int
    readable: int
    eof: bool
    orphaned: bool
    retransmits: int
    rto: float
    error: int | None
    timers: dict[Timer, float]


_Action: TypeAlias = Callable[["Connection", Any, float], None]
# (next state or None, its cells, actions, the row)
_Cell: TypeAlias = tuple[State | None, Any, tuple[_Action, ...], Row]


def _refuse(row: Row) -> _Action:
    number = getattr(errnos, row.errno or "")

    def refuse(connection: Connection, _seg: Any, _now: float) -> None:
        raise TCPError(number, row.why)

    return refuse


def _impossible(state: State, event: Event, row: Row) -> _Action:
    def impossible(connection: Connection, _seg: Any, _now: float) -> None:
        raise AssertionError(f"{event} cannot happen in {state}: {row.why}")

    return impossible


def _compile(profile: Profile) -> list[list[_Cell]]:
    """The table as lists indexed by small numbers, each cell knowing the next state's cells."""
    cells: list[list[_Cell]] = [[] for _ in State]
    for (state, event), row in sorted(profile.table.items()):
        if row.kind == "error":
            actions: tuple[_Action, ...] = (_refuse(row),)
        elif row.kind == "never":
            actions = (_impossible(state, event, row),)
        else:
            actions = tuple(getattr(Connection, f"_{name}") for name in row.actions)
        assert len(cells[state]) == event, "the table is not total"
        onwards = None if row.next is None else cells[row.next]
        cells[state].append((row.next, onwards, actions, row))
    return cells


class Connection:
    """One endpoint (RFC 9293's TCB and the machine around it).

    `out` collects segments to send; `deadline` is when `expire` is due;
    `error` is the errno that the user's next call will get. `on_transition`,
    if set, is called as `(old, new, event, now)` after each change of state.
    """

    __slots__ = (
        "_ack_due",
        "_ato",
        "_cells",
        "_fin",
        "_last_challenge",
        "_out_of_order",
        "_pingpong",
        "_quick",
        "_recover",
        "_rtt_at",
        "_rtt_seq",
        "_rx",
        "_taken",
        "_tx",
        "_tx_seq",
        "error",
        "fin_received",
        "first_sent",
        "irs",
        "iss",
        "max_wnd",
        "mss",
        "nodelay",
        "on_transition",
        "orphaned",
        "out",
        "passive",
        "profile",
        "rcv_adv",
        "rcv_buf",
        "rcv_nxt",
        "rcv_scale",
        "rcv_wup",
        "read_shut",
        "retransmits",
        "rto",
        "rttvar",
        "snd_buf",
        "snd_nxt",
        "snd_scale",
        "snd_una",
        "snd_wl1",
        "snd_wl2",
        "snd_wnd",
        "srtt",
        "state",
        "t_ack",
        "t_keepalive",
        "t_probe",
        "t_retransmit",
        "t_user",
        "t_wait",
        "timestamps",
        "ts_offset",
        "ts_recent",
        "write_shut",
    )

    profile: Profile
    state: State
    error: int | None
    on_transition: Hook | None

    def __init__(
        self,
        profile: Profile,
        *,
        iss: int,
        mss: int = 1460,
        rcv_buf: int = 64240,
        snd_buf: int = 1 << 18,
        timestamps: bool | None = None,
        outbox: list[Segment] | None = None,
    ) -> None:
        parameters = profile.parameters
        self.profile = profile
        self.out: list[Segment] = [] if outbox is None else outbox
        self.state = CLOSED
        cells = profile.compiled
        if not cells:
            cells.extend(_compile(profile))
        self._cells: Any = cells[0]
        self.on_transition = None
        self.error = None
        self.passive = False
        self.orphaned = False
        self.read_shut = False
        self.write_shut = False
        self.fin_received = False
        self.iss = self.snd_una = self.snd_nxt = iss
        self.irs = self.rcv_nxt = self.rcv_wup = self.rcv_adv = 0
        self.snd_wnd = self.max_wnd = 0
        self.snd_wl1 = self.snd_wl2 = 0
        self.mss = mss
        self.rcv_buf = rcv_buf
        self.snd_buf = snd_buf
        self.snd_scale = self.rcv_scale = 0
        self.timestamps: bool = parameters.timestamps if timestamps is None else timestamps
        self.ts_recent = self.ts_offset = 0
        self.nodelay = not parameters.nagle
        self._tx = self._rx = b""
        self._tx_seq = (iss + 1) & MASK
        self._fin = 0  # 1: queued behind the text, 2: sent
        self._out_of_order: tuple[tuple[int, bytes, bool], ...] = ()
        self._taken = 0
        self._recover: int | None = None
        self._rtt_seq: int | None = None
        self._rtt_at = 0.0
        self.srtt: float | None = None
        self.rttvar = 0.0
        self.rto = parameters.rto_initial
        self.retransmits = 0
        self.first_sent: float | None = None
        self._ack_due = 0  # 1: by policy, 2: at once
        self._ato = 0.0
        self._quick = parameters.quick_acks
        self._pingpong = False
        self._last_challenge = -INF
        self.t_retransmit = self.t_ack = self.t_probe = INF
        self.t_keepalive = self.t_wait = self.t_user = INF

    # --- The user's calls ------------------------------------------------------------------

    def open_passive(self, now: float) -> None:
        """Wait for a SYN (RFC 9293 §3.10.1). Raises `TCPError` EINVAL if already connected."""
        self._step(_OPEN_PASSIVE, None, now)
        self.passive = True

    def open_active(self, now: float) -> None:
        """Send a SYN (RFC 9293 §3.10.1). Raises `TCPError` EALREADY or EISCONN."""
        self._step(_OPEN_ACTIVE, None, now)
        self.passive = False

    def send(self, data: bytes, now: float) -> int:
        """Queue text and send what the window allows; returns the bytes taken.

        0 means that the send buffer is full. Raises `TCPError`: EPIPE after a
        shutdown, ENOTCONN before an OPEN, or the connection's failure, once.
        """
        if self.error is not None:
            raise TCPError(self.take_error() or errnos.EPIPE)
        if self.state is CLOSED and (self.write_shut or self.fin_received):
            raise TCPError(errnos.EPIPE)
        self._taken = 0
        self._step(_SEND, data, now)
        return self._taken

    def receive(self, n: int, now: float, peek: bool = False) -> bytes:
        """Up to `n` bytes of text in order; `b""` where there is none (see `eof`).

        Raises `TCPError`: ENOTCONN before an OPEN, or the connection's
        failure, once, after the text received before it.
        """
        if peek:
            if not self._rx:
                self._nothing_to_read(now)
            return self._rx[:n]
        if not self._rx:
            self._nothing_to_read(now)
            return b""
        data = self._rx[:n]
        self._rx = self._rx[n:]
        if self.state is not CLOSED:
            self._step(_RECEIVE, data, now)
        return data

    def _nothing_to_read(self, now: float) -> None:
        if self.fin_received or self.read_shut:
            return
        if self.error is not None:
            raise TCPError(self.take_error() or errnos.ECONNRESET)
        if self.state is CLOSED and self.write_shut:
            return
        self._step(_RECEIVE, b"", now)

    def shutdown(self, now: float) -> None:
        """No more text from here: the RFC's CLOSE, shutdown(2)'s SHUT_WR (§3.10.4).

        Raises `TCPError` ENOTCONN where there is no connection.
        """
        self._step(_SHUTDOWN, None, now)
        if self.state is not LISTEN:
            self.write_shut = True

    def shutdown_read(self, now: float) -> None:
        """Nobody will read any more: shutdown(2)'s SHUT_RD. The peer is not told.

        Raises `TCPError` ENOTCONN where there is no connection.
        """
        if self.state is CLOSED or self.state is TIME_WAIT:
            raise TCPError(errnos.ENOTCONN)
        self.read_shut = True

    def close(self, now: float) -> None:
        """close(2): a FIN after the text; a RST where received text was not read."""
        self._step(_CLOSE_UNREAD if self._rx else _CLOSE, None, now)

    def abort(self, now: float) -> None:
        """The RFC's ABORT (§3.10.5): a RST, and everything is forgotten."""
        self._step(_ABORT, None, now)

    def status(self) -> Status:
        """The RFC's STATUS (§3.10.6)."""
        unsent = len(self._tx) - ((self.snd_nxt - self._tx_seq) & MASK) + (self._fin == 2)
        return Status(
            state=self.state,
            snd_una=self.snd_una,
            snd_nxt=self.snd_nxt,
            snd_wnd=self.snd_wnd,
            rcv_nxt=self.rcv_nxt,
            rcv_wnd=(self.rcv_adv - self.rcv_nxt) & MASK,
            unsent=max(0, unsent),
            unacknowledged=(self.snd_nxt - self.snd_una) & MASK,
            readable=len(self._rx),
            eof=self.eof,
            orphaned=self.orphaned,
            retransmits=self.retransmits,
            rto=self.rto,
            error=self.error,
            timers=self.timers,
        )

    def take_error(self) -> int | None:
        """The pending errno, which is thereby no longer pending (SO_ERROR)."""
        number, self.error = self.error, None
        return number

    @property
    def readable_bytes(self) -> int:
        """How many bytes `receive` would give."""
        return len(self._rx)

    @property
    def eof(self) -> bool:
        """Whether no text will come any more after what is readable now."""
        return self.fin_received or self.read_shut or (self.state is CLOSED and self.write_shut)

    @property
    def writable(self) -> bool:
        """Whether `send` would take text."""
        return (self.state is ESTABLISHED or self.state is CLOSE_WAIT) and len(
            self._tx
        ) < self.snd_buf

    # --- Time ------------------------------------------------------------------------------

    @property
    def deadline(self) -> float | None:
        """When `expire` is due, None while no timer runs."""
        earliest = min(
            self.t_retransmit, self.t_ack, self.t_probe, self.t_keepalive, self.t_wait, self.t_user
        )
        return None if earliest == INF else earliest

    @property
    def timers(self) -> dict[Timer, float]:
        """The running timers and when they fire."""
        return {
            timer: getattr(self, name)
            for timer, name in zip(Timer, _TIMERS, strict=True)
            if getattr(self, name) != INF
        }

    def expire(self, now: float) -> None:
        """Run every timer that is due, the earliest first."""
        while True:
            due = min(
                (getattr(self, name), timer) for timer, name in zip(Timer, _TIMERS, strict=True)
            )
            if due[0] > now:
                return
            self.timeout(due[1], now)

    def timeout(self, timer: Timer, now: float) -> None:
        """Let one timer fire. It is stopped first; what follows may start it again."""
        setattr(self, _TIMERS[timer], INF)
        if timer is Timer.RETRANSMIT:
            event = _GIVE_UP if self._given_up(now) else _RETRANSMIT
        elif timer is Timer.DELAYED_ACK:
            event = _DELAYED_ACK
            # tcp_delack_timer_handler: a delay that was needed is not interactive.
            self._pingpong = False
        elif timer is Timer.PROBE:
            event = _PROBE
        elif timer is Timer.KEEPALIVE:
            event = _KEEPALIVE
        elif timer is Timer.WAIT:
            event = _TIME_WAIT_OVER if self.state is TIME_WAIT else _FIN_WAIT_2_OVER
        else:
            event = _GIVE_UP
        self._step(event, None, now)

    def _given_up(self, now: float) -> bool:
        parameters = self.profile.parameters
        if self.state is SYN_SENT:
            return self.retransmits >= parameters.syn_retries + parameters.syn_linear
        if self.state is SYN_RECEIVED:
            return self.retransmits >= parameters.synack_retries
        if self.first_sent is None:
            return False
        limit = parameters.orphan_give_up_after if self.orphaned else parameters.give_up_after
        return now - self.first_sent >= limit

    # --- Segments: classification ----------------------------------------------------------

    def segment(self, seg: Segment, now: float) -> None:
        """Take a segment that arrived (RFC 9293 §3.10.7)."""
        state = self.state
        if state is TIME_WAIT:
            event = self._in_time_wait(seg, now)
        elif state > SYN_SENT:
            event = self._in_window(seg, now)
        elif state is SYN_SENT:
            event = self._in_syn_sent(seg)
        else:
            flags = seg.flags
            if flags & RST:
                event = _RST_EXACT
            elif flags & ACK:
                event = _ACK_OF_UNSENT
            elif flags & SYN and not flags & FIN:
                event = _SYN
            else:
                event = _NO_ACK
        self._step(event, seg, now)

    def _in_syn_sent(self, seg: Segment) -> int:
        flags = seg.flags
        if flags & ACK:
            acked = (seg.ack - self.snd_una) & MASK
            if not 0 < acked <= (self.snd_nxt - self.snd_una) & MASK:
                return _RST_OUTSIDE if flags & RST else _ACK_OF_UNSENT
            if flags & RST:
                return _RST_EXACT
            return _SYN_ACK if flags & SYN else _NO_ACK
        if flags & RST:
            return _RST_OUTSIDE
        return _SYN if flags & SYN else _NO_ACK

    def _in_time_wait(self, seg: Segment, now: float) -> int:
        """What a segment means to TIME_WAIT, where only sequence numbers are left to tell."""
        flags = seg.flags
        offset = (seg.seq - self.rcv_nxt) & MASK
        length = seg.length
        old = offset & HALF or self._paws(seg, now)
        if flags & RST:
            if offset == 0:
                return _RST_EXACT
            if offset == MASK:
                return _RST_AFTER_FIN
            return _RST_IN_WINDOW if self._acceptable(seg) else _RST_OUTSIDE
        if flags & SYN:
            if not flags & ACK and not flags & FIN:
                options = seg.options
                if self.timestamps and options is not None and options.ts_val is not None:
                    newer = (self.ts_recent - options.ts_val) & HALF
                else:
                    newer = 0
                if newer or (not old and 0 < offset < HALF):
                    return _SYN_REOPENS
            return _SYN_UNEXPECTED
        if flags & FIN and (offset + length) & MASK == 0:
            return _FIN_AGAIN
        if offset == 0 and length == 0 and not old:
            return _SEGMENT if flags & ACK else _NO_ACK
        if not flags & ACK:
            return _NO_ACK
        return _UNACCEPTABLE

    def _in_window(self, seg: Segment, now: float) -> int:
        """§3.10.7.4 for every state from SYN_RECEIVED to LAST_ACK, in its order."""
        flags = seg.flags
        offset = (seg.seq - self.rcv_nxt) & MASK
        state = self.state

        # First, the sequence number (and PAWS, RFC 7323 §5.3).
        if not self._acceptable(seg) or (self._paws(seg, now) and not flags & RST):
            if flags & RST:
                if offset == MASK and self.fin_received:
                    return _RST_AFTER_FIN
                return _RST_OUTSIDE
            if flags & SYN:
                if state is SYN_RECEIVED and seg.seq == self.irs and not flags & ACK:
                    return _SYN_AGAIN
                return _SYN_UNEXPECTED
            if flags & FIN and self.fin_received and (offset + seg.length) & MASK == 0:
                return _FIN_AGAIN
            return _UNACCEPTABLE

        # Second, RST. Fourth, SYN. (Third is security.)
        if flags & RST:
            if state is SYN_RECEIVED and self.passive:
                return _RST_TO_PASSIVE
            return _RST_EXACT if offset == 0 else _RST_IN_WINDOW
        if flags & SYN:
            if state is SYN_RECEIVED:
                if seg.seq == self.irs:
                    return _SYN_AGAIN
                if self.passive:
                    return _SYN_TO_PASSIVE
            return _SYN_UNEXPECTED

        # Fifth, ACK.
        if not flags & ACK:
            return _NO_ACK
        flight = (self.snd_nxt - self.snd_una) & MASK
        acked = (seg.ack - self.snd_una) & MASK
        of_syn = of_fin = False
        if acked > flight:
            if not acked & HALF:
                return _ACK_OF_UNSENT
            if state is SYN_RECEIVED or acked < MASK + 1 - self.max_wnd:
                return _ACK_TOO_OLD
        else:
            of_syn = self.snd_una == self.iss and state <= FIN_WAIT_1
            if of_syn and acked == 0:
                return _ACK_TOO_OLD
            if acked:
                self._acknowledged(seg.ack, acked, flight, now)
                of_fin = self._fin == 2 and acked == flight
        self._update_window(seg)
        if self.timestamps:
            self._note_timestamp(seg)

        # Seventh, the text. Eighth, FIN.
        if seg.data or flags & FIN:
            if seg.data and (self.orphaned or self.read_shut) and not self.fin_received:
                end = (seg.seq + len(seg.data) - self.rcv_nxt) & MASK
                if (
                    0 < end < HALF
                    and self.write_shut
                    and state is not ESTABLISHED
                    and state is not SYN_RECEIVED
                ):
                    return _TEXT_AFTER_CLOSE
            if not self.fin_received and self._take(seg):
                if of_fin:
                    return _FIN_AND_ACK_OF_FIN
                return _FIN_AND_ACK_OF_SYN if of_syn else _FIN
        if of_fin:
            return _ACK_OF_FIN
        return _ACK_OF_SYN if of_syn else _SEGMENT

    def _acceptable(self, seg: Segment) -> bool:
        """The test of RFC 9293 §3.10.7.4, or Linux's own (tcp_sequence)."""
        window = (self.rcv_adv - self.rcv_nxt) & MASK
        offset = (seg.seq - self.rcv_nxt) & MASK
        length = len(seg.data) + (seg.flags & FIN) + ((seg.flags & SYN) >> 1)
        if self.profile.parameters.linux_checks and self.state is not SYN_RECEIVED:
            return not (seg.seq + length - self.rcv_wup) & HALF and (
                offset <= window or offset & HALF != 0
            )
        if length == 0:
            return offset < window or offset == 0
        if window == 0:
            return False
        return offset < window or (offset + length - 1) & MASK < window

    def _paws(self, seg: Segment, now: float) -> bool:
        """Whether the segment's timestamp is older than the last one (RFC 7323 §5)."""
        options = seg.options
        if not self.timestamps or options is None or options.ts_val is None or not self.ts_recent:
            return False
        return (options.ts_val - self.ts_recent) & HALF != 0

    def _note_timestamp(self, seg: Segment) -> None:
        options = seg.options
        if (
            options is not None
            and options.ts_val is not None
            and not (self.rcv_wup - seg.seq) & HALF
            and not (options.ts_val - self.ts_recent) & HALF
        ):
            self.ts_recent = options.ts_val

    # --- Segments: the variables -----------------------------------------------------------

    def _acknowledged(self, ack: int, acked: int, flight: int, now: float) -> None:
        """`acked` of `flight` octets are acknowledged: free them, measure, retime."""
        self.snd_una = ack
        text = (ack - self._tx_seq) & MASK
        if self._tx and text and not text & HALF:
            self._tx = self._tx[text:]
            self._tx_seq = (ack - (1 if self._fin == 2 and acked == flight else 0)) & MASK
        if self._rtt_seq is not None and not (ack - self._rtt_seq) & HALF:
            self._measured(now - self._rtt_at)
            self._rtt_seq = None
        self.retransmits = 0
        self.first_sent = now
        if acked == flight:
            self.t_retransmit = INF
            self._recover = None
        else:
            self.t_retransmit = now + self.rto
            if self._recover is not None:
                if (self._recover - ack) & HALF or ack == self._recover:
                    self._recover = None
                else:
                    self._send_oldest(now)

    def _measured(self, rtt: float) -> None:
        """A round trip was measured: RFC 6298 §2."""
        if self.srtt is None:
            self.srtt, self.rttvar = rtt, rtt / 2
        else:
            self.rttvar += (abs(self.srtt - rtt) - self.rttvar) / 4
            self.srtt += (rtt - self.srtt) / 8
        parameters = self.profile.parameters
        if parameters.rto_floor_on_variance:
            rto = self.srtt + max(parameters.rto_min, 4 * self.rttvar)
        else:
            rto = max(parameters.rto_min, self.srtt + 4 * self.rttvar)
        self.rto = min(rto, parameters.rto_max)

    def _update_window(self, seg: Segment) -> None:
        """SND.WND, unless the segment is older than the last that told it (§3.10.7.4)."""
        newer = (seg.seq - self.snd_wl1) & MASK
        if newer == 0:
            newer = (seg.ack - self.snd_wl2) & MASK
        if not newer & HALF:
            window = seg.window << self.snd_scale
            self.snd_wnd = window
            self.snd_wl1 = seg.seq
            self.snd_wl2 = seg.ack
            if window > self.max_wnd:
                self.max_wnd = window
            if window:
                self.t_probe = INF

    def _take(self, seg: Segment) -> bool:
        """Take the segment's text; whether the peer's FIN is now in order."""
        data = seg.data
        fin = seg.flags & FIN != 0
        offset = (seg.seq - self.rcv_nxt) & MASK
        room = (self.rcv_adv - self.rcv_nxt) & MASK
        if offset & HALF:
            past = MASK + 1 - offset
            if past > len(data) or (past == len(data) and not fin):
                self._ack_due = 2  # all of it was here before
                return False
            data = data[past:]
            offset = 0
        if offset + len(data) > room:
            data = data[: room - offset]
            fin = False
            self._ack_due = 2
        if offset:
            self._ack_due = 2
            kept = {(s, f): d for s, d, f in self._out_of_order}
            kept[(seg.seq, fin)] = data
            self._out_of_order = tuple(
                sorted(
                    ((s, d, f) for (s, f), d in kept.items()),
                    key=lambda piece: (piece[0] - self.rcv_nxt) & MASK,
                )
            )
            return False
        self._accept(data)
        while self._out_of_order and not fin:
            seq, data, fin = self._out_of_order[0]
            past = (self.rcv_nxt - seq) & MASK
            if past & HALF:
                fin = False
                break
            self._out_of_order = self._out_of_order[1:]
            self._ack_due = 2
            if past > len(data):
                fin = False
            else:
                self._accept(data[past:])
        if fin:
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK
            self._out_of_order = ()
        return fin

    def _accept(self, data: bytes) -> None:
        if data:
            self.rcv_nxt = (self.rcv_nxt + len(data)) & MASK
            if not (self.orphaned or self.read_shut):
                self._rx += data
            if self._ack_due == 0:
                self._ack_due = 1
            if self._ato == 0.0:
                self._ato = self.profile.parameters.delayed_ack

    # --- The table -------------------------------------------------------------------------

    def _step(self, event: int, seg: Any, now: float) -> None:
        new, cells, actions, row = self._cells[event]
        if new is None:
            for action in actions:
                action(self, seg, now)
            return
        old = self.state
        self.state = new
        self._cells = cells
        for action in actions:
            action(self, seg, now)
        if self.on_transition is not None:
            if row.via is not None:
                self.on_transition(old, row.via, _EVENTS[event], now)
                old = row.via
            self.on_transition(old, new, _EVENTS[event], now)

    # --- Actions: each is named in the table -----------------------------------------------

    def _send_syn(self, _seg: None, now: float) -> None:
        self.snd_nxt = (self.iss + 1) & MASK
        self._rtt_seq, self._rtt_at = self.snd_nxt, now
        self.first_sent = now
        self._emit_syn(SYN, now)
        self.t_retransmit = now + self.rto

    def _emit_syn(self, flags: int, now: float) -> None:
        parameters = self.profile.parameters
        again = flags & ACK
        window = min(self.rcv_buf, 0xFFFF)
        self.out.append(
            Segment(
                self.iss,
                self.rcv_nxt if again else 0,
                flags,
                window,
                b"",
                Options(
                    self.mss,
                    parameters.window_scale if not again or self.rcv_scale else None,
                    parameters.sack,
                    self._tsval(now) if self.timestamps else None,
                    self.ts_recent if self.timestamps else None,
                ),
            )
        )
        if again:
            self.rcv_wup = self.rcv_nxt
            self.rcv_adv = (self.rcv_nxt + window) & MASK

    def _tsval(self, now: float) -> int:
        return (int(now * 1000) + self.ts_offset) & MASK

    def _note_syn(self, seg: Segment) -> None:
        """Take the peer's SYN: its numbers and options."""
        self.irs = seg.seq
        self.rcv_nxt = self.rcv_wup = (seg.seq + 1) & MASK
        self.snd_wnd = self.max_wnd = seg.window
        self.snd_wl1, self.snd_wl2 = seg.seq, seg.ack
        options = seg.options
        if options is None:
            self.timestamps = False
            self.mss = min(self.mss, 536)
            return
        self.mss = min(self.mss, options.mss or 536)
        if options.window_scale is not None:
            self.snd_scale = min(options.window_scale, 14)
            self.rcv_scale = self.profile.parameters.window_scale
        if options.ts_val is None:
            self.timestamps = False
        elif self.timestamps:
            self.ts_recent = options.ts_val

    def _send_syn_ack(self, seg: Segment, now: float) -> None:
        self._note_syn(seg)
        self.snd_nxt = (self.iss + 1) & MASK
        self._rtt_seq, self._rtt_at = self.snd_nxt, now
        self.first_sent = now
        self._emit_syn(SYN | ACK, now)
        self.t_retransmit = now + self.rto

    def _send_syn_ack_again(self, _seg: Segment, now: float) -> None:
        self._rtt_seq = None
        self._emit_syn(SYN | ACK, now)

    def _synchronize(self, seg: Segment, now: float) -> None:
        self._note_syn(seg)
        self.rcv_adv = (self.rcv_nxt + min(self.rcv_buf, 0xFFFF)) & MASK
        self._acknowledged(seg.ack, 1, 1, now)
        self.rto = max(self.rto, self.profile.parameters.rto_min)
        if seg.data or seg.flags & FIN:
            self._take(Segment((seg.seq + 1) & MASK, seg.ack, seg.flags & ~SYN, 0, seg.data))

    def _establish(self, seg: Segment, now: float) -> None:
        self.snd_wnd = seg.window << self.snd_scale
        self.max_wnd = max(self.max_wnd, self.snd_wnd)
        self.snd_wl1, self.snd_wl2 = seg.seq, seg.ack

    def _return_to_listen(self, _seg: Segment, now: float) -> None:
        self._stop()
        self.snd_una = self.snd_nxt = self.iss
        self.rcv_nxt = self.irs = 0
        self.retransmits = 0

    def _take_text(self, data: bytes, now: float) -> None:
        room = self.snd_buf - len(self._tx)
        self._taken = max(0, min(room, len(data)))
        self._tx += data[: self._taken]

    def _send_text(self, _seg: Any, now: float) -> None:
        """Send what may be sent: text, then the FIN."""
        if not self._tx and self._fin != 1:
            return
        sent = (self.snd_nxt - self._tx_seq) & MASK
        if self._fin == 2 or sent & HALF or self.state is SYN_SENT or self.state is SYN_RECEIVED:
            return
        mss = self.mss - 12 if self.timestamps else self.mss
        while True:
            left = len(self._tx) - sent
            usable = (self.snd_una + self.snd_wnd - self.snd_nxt) & MASK
            if usable & HALF:
                usable = 0
            n = min(left, mss, usable)
            fin = self._fin == 1 and n == left and n < usable
            if not fin:
                if n == 0:
                    break
                small = n < mss
                if small and n < left and self.snd_una != self.snd_nxt:
                    break  # the window would cut it short: wait (RFC 9293 §3.8.6.2.1)
                if small and not self.nodelay and self._fin == 0 and self.snd_una != self.snd_nxt:
                    break  # Nagle (RFC 9293 §3.7.4)
            flags = ACK | (FIN if fin else 0) | (PSH if n and n == left else 0)
            seq = self.snd_nxt
            self.snd_nxt = (seq + n + fin) & MASK
            if self._rtt_seq is None and self._recover is None:
                self._rtt_seq, self._rtt_at = self.snd_nxt, now
            if self.t_retransmit == INF:
                self.first_sent = now
                self.t_retransmit = now + self.rto
            self._emit(flags, now, seq, self._tx[sent : sent + n])
            sent += n
            if fin:
                self._fin = 2
                return
            self._pingpong = True
        if (left or self._fin == 1) and self.snd_una == self.snd_nxt and self.t_probe == INF:
            self.t_probe = now + self.rto

    def _queue_fin(self, _seg: None, now: float) -> None:
        self.write_shut = True
        self._fin = 1
        self._send_text(None, now)

    def _give_text(self, _data: bytes, now: float) -> None:
        """Text was read: tell the peer when that opens a window worth telling."""
        if self.fin_received:
            return
        told = (self.rcv_adv - self.rcv_nxt) & MASK
        if self.rcv_buf - len(self._rx) - told >= min(self.rcv_buf // 2, 2 * self.mss):
            self._emit(ACK, now)

    def _orphan(self, _seg: None, now: float) -> None:
        self.orphaned = True
        self.write_shut = True
        if self.state is FIN_WAIT_2:
            self._start_fin_wait_2(None, now)

    def _send_ack(self, _seg: Any, now: float) -> None:
        self._emit(ACK, now)

    def _acknowledge(self, seg: Segment, now: float) -> None:
        due = self._ack_due
        if not due:
            return
        parameters = self.profile.parameters
        if (
            due == 2
            or not parameters.delayed_ack
            or (self._quick and not self._pingpong)
            or (self.rcv_nxt - self.rcv_wup) & MASK > min(self.mss, 536)
        ):
            self._emit(ACK, now)
        elif self.t_ack == INF:
            self.t_ack = now + self._ato

    def _acknowledge_fin(self, seg: Segment, now: float) -> None:
        parameters = self.profile.parameters
        self._pingpong = True
        if not parameters.first_ack_delay or self._ack_due == 2:
            self._emit(ACK, now)
        else:
            self._ack_due = 1
            self.t_ack = min(self.t_ack, now + (self._ato or parameters.first_ack_delay))

    def _ack_unacceptable(self, seg: Segment, now: float) -> None:
        # Linux answers retransmitted text and FINs without limit (tcp_oow_rate_limited).
        if seg.length and not seg.flags & SYN:
            self._emit(ACK, now)
        else:
            self._challenge_ack(seg, now)

    def _challenge_ack(self, seg: Segment, now: float) -> None:
        if now - self._last_challenge >= self.profile.parameters.challenge_interval:
            self._last_challenge = now
            self._emit(ACK, now)

    def _reset_reply(self, seg: Segment, now: float) -> None:
        if seg.flags & ACK:
            self.out.append(Segment(seg.ack, 0, RST))
        else:
            self.out.append(Segment(0, (seg.seq + seg.length) & MASK, RST | ACK))

    def _send_rst(self, _seg: None, now: float) -> None:
        self._emit(RST | ACK, now)

    def _deliver_eof(self, _seg: Segment, now: float) -> None:
        self.fin_received = True

    def _forget(self, _seg: Any, now: float) -> None:
        self._stop()
        self._tx = b""
        self._fin = 0
        self._out_of_order = ()
        self.write_shut = True

    def _stop(self) -> None:
        self.t_retransmit = self.t_ack = self.t_probe = INF
        self.t_keepalive = self.t_wait = self.t_user = INF

    def _report_refused(self, _seg: Segment, now: float) -> None:
        self.error = errnos.ECONNREFUSED

    def _report_reset(self, _seg: Segment, now: float) -> None:
        self.error = errnos.ECONNRESET

    def _report_pipe(self, _seg: Segment, now: float) -> None:
        self.error = errnos.EPIPE

    def _report_timeout(self, _seg: None, now: float) -> None:
        self.error = errnos.ETIMEDOUT

    def _start_time_wait(self, _seg: Any, now: float) -> None:
        self._stop()
        self.t_wait = now + self.profile.parameters.time_wait

    def _restart_time_wait(self, _seg: Segment, now: float) -> None:
        self.t_wait = now + self.profile.parameters.time_wait

    def _start_fin_wait_2(self, _seg: Any, now: float) -> None:
        limit = self.profile.parameters.fin_wait_2
        if self.orphaned and limit is not None:
            self.t_wait = now + limit

    def _retransmit(self, _seg: None, now: float) -> None:
        """The retransmission timer fired: the oldest again, twice the timeout (RFC 6298 §5)."""
        parameters = self.profile.parameters
        self.retransmits += 1
        self._rtt_seq = None
        if self.state is SYN_SENT:
            self._emit_syn(SYN, now)
            if self.retransmits <= parameters.syn_linear:
                self.t_retransmit = now + self.rto
                return
        elif self.snd_una == self.iss:
            self._emit_syn(SYN | ACK, now)
        else:
            self._recover = self.snd_nxt
            self._send_oldest(now)
        self.rto = min(2 * self.rto, parameters.rto_max)
        self.t_retransmit = now + self.rto

    def _send_oldest(self, now: float) -> None:
        mss = self.mss - 12 if self.timestamps else self.mss
        text = (self.snd_nxt - self.snd_una - (1 if self._fin == 2 else 0)) & MASK
        n = min(text, mss)
        fin = self._fin == 2 and n == text
        flags = ACK | (FIN if fin else 0) | (PSH if n and n == text else 0)
        self._emit(flags, now, self.snd_una, self._tx[:n])

    def _probe(self, _seg: None, now: float) -> None:
        """A segment below the window, which must be answered (RFC 9293 §3.8.6.1)."""
        self.retransmits += 1
        self._emit(ACK, now, (self.snd_una - 1) & MASK)
        self.rto = min(2 * self.rto, self.profile.parameters.rto_max)
        self.t_probe = now + self.rto

    def _emit(self, flags: int, now: float, seq: int | None = None, data: bytes = b"") -> None:
        """Send a segment that carries the current acknowledgment and window."""
        space = self.rcv_buf - len(self._rx)
        told = (self.rcv_adv - self.rcv_nxt) & MASK
        if told & HALF:
            told = 0
        if told > space:
            space = told
        scale = self.rcv_scale
        window = (space + (1 << scale) - 1) >> scale
        if window > 0xFFFF:
            window = 0xFFFF
        self.rcv_adv = (self.rcv_nxt + (window << scale)) & MASK
        self.out.append(
            Segment(
                self.snd_nxt if seq is None else seq,
                self.rcv_nxt,
                flags,
                window,
                data,
                Options(ts_val=self._tsval(now), ts_ecr=self.ts_recent)
                if self.timestamps
                else None,
            )
        )
        self.rcv_wup = self.rcv_nxt
        self.t_ack = INF
        if self._ack_due:
            self._ack_due = 0
            if self._quick:
                self._quick -= 1

    # --- Snapshots -------------------------------------------------------------------------

    def snapshot(self) -> tuple[Any, ...]:
        """Everything that decides this connection's future, as a tuple of plain values."""
        return tuple([getattr(self, name) for name in _STATEFUL])

    @classmethod
    def restore(
        cls, profile: Profile, snapshot: tuple[Any, ...], outbox: list[Segment] | None = None
    ) -> Connection:
        """A connection that goes on where `snapshot` was taken."""
        connection = cls.__new__(cls)
        for name, value in zip(_STATEFUL, snapshot, strict=True):
            setattr(connection, name, value)
        connection.profile = profile
        connection.out = [] if outbox is None else outbox
        connection.on_transition = None
        if not profile.compiled:
            profile.compiled.extend(_compile(profile))
        connection._cells = profile.compiled[connection.state]
        return connection


_STATEFUL = tuple(
    name
    for name in Connection.__slots__
    if name not in ("profile", "out", "on_transition", "_cells")
)

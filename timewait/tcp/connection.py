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
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Final, TypeAlias

from attrs import frozen

from timewait.tcp.profiles import Profile
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, URG, Options, Segment
from timewait.tcp.states import Event, State, Timer
from timewait.tcp.transitions import Row

__all__ = ["Connection", "Hook", "SocketOptions", "Status", "TCPError"]

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
INF: Final = float("inf")

Hook: TypeAlias = Callable[[State, State, Event, float], None]

_EVENTS = tuple(Event)
_CONTROL: Final = SYN | RST | ACK
_LOOK: Final = len(Event)  # after a state's cells: how it looks at a segment
_TIMERS = (
    (Timer.RETRANSMIT, "t_retransmit"),
    (Timer.DELAYED_ACK, "t_ack"),
    (Timer.WAIT, "t_wait"),
    (Timer.PROBE, "t_probe"),
    (Timer.KEEPALIVE, "t_keepalive"),
    (Timer.USER, "t_user"),
)
_WAIT, _TIMER_RETRANSMIT = Timer.WAIT, Timer.RETRANSMIT

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
_ACK_OF_SYN_AFTER_SHUTDOWN = int(Event.ACK_OF_SYN_AFTER_SHUTDOWN)
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
class SocketOptions:
    """What a user may set on a connection. Times in seconds.

    `keepalive` is (idle, interval, probes); `linger2` bounds FIN_WAIT_2 for an
    orphan (TCP_LINGER2); `user_timeout` bounds how long text or a FIN may stay
    unacknowledged (RFC 9293 §3.10.8).
    """

    nodelay: bool = False
    user_timeout: float | None = None
    linger2: float | None = None
    keepalive: tuple[float, float, int] | None = None


_DEFAULT: Final = SocketOptions()


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


_NO_OPTIONS: Final = Options()


@cache
def _syn_options(mss: int, scale: int | None, sack: bool) -> Options:
    return Options(mss, scale, sack)


_Action: TypeAlias = Callable[["Connection", Any, float], None]


def _refuse(row: Row) -> _Action:
    number = getattr(errnos, row.errno or "")

    def refuse(connection: Connection, _seg: Any, _now: float) -> None:
        raise TCPError(number, row.why)

    return refuse


def _impossible(state: State, event: Event, row: Row) -> _Action:
    def impossible(connection: Connection, _seg: Any, _now: float) -> None:
        raise AssertionError(f"{event} cannot happen in {state}: {row.why}")

    return impossible


def _methods(names: tuple[str, ...]) -> Iterator[_Action]:
    """The methods for these actions; two that nearly always follow each other are one call."""
    text = " ".join(names)
    for name in re.sub(r"\bsend_text acknowledge\b", "send_text_and_acknowledge", text).split():
        yield getattr(Connection, f"_{name}")


def _compile(profile: Profile) -> list[list[Any]]:
    """The table as lists indexed by small numbers.

    A cell is (next state or None, that state's cells, actions, the row); after
    a state's cells comes the method by which it looks at a segment.
    """
    cells: list[list[Any]] = [[] for _ in State]
    for (state, event), row in sorted(profile.table.items()):
        if row.kind == "error":
            actions: tuple[_Action, ...] = (_refuse(row),)
        elif row.kind == "never":
            actions = (_impossible(state, event, row),)
        else:
            actions = tuple(_methods(row.actions))
        assert len(cells[state]) == event, "the table is not total"
        onwards = None if row.next is None else cells[row.next]
        cells[state].append((row.next, onwards, actions, row))
    for state, look in _LOOKS.items():
        cells[state].append(look)
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
        "_eof_read",
        "_fin",
        "_last_text",
        "_out_of_order",
        "_pingpong",
        "_probed",
        "_quick",
        "_rcv_mss",
        "_recover",
        "_rtt_at",
        "_rtt_seq",
        "_rx",
        "_small",
        "_tx",
        "adv_mss",
        "error",
        "fin_received",
        "first_sent",
        "irs",
        "iss",
        "last_challenge",
        "max_wnd",
        "mss",
        "on_transition",
        "options",
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
        "sack",
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
        rcv_buf: int = 65536,
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
        self.mss = self.adv_mss = mss
        self.rcv_buf = rcv_buf
        self.snd_buf = snd_buf
        self.snd_scale = self.rcv_scale = 0
        self.timestamps: bool = parameters.timestamps if timestamps is None else timestamps
        self.sack = False
        self.ts_recent = self.ts_offset = 0
        self.options = _DEFAULT
        self._tx = self._rx = b""
        self._eof_read = False
        self._fin = 0  # 1: queued behind the text, 2: sent
        self._out_of_order: tuple[tuple[int, bytes, bool], ...] = ()
        self._recover: int | None = None
        self._probed = not parameters.tail_loss_probe
        self._rtt_seq: int | None = None
        self._rtt_at = 0.0
        self.srtt: float | None = None
        self.rttvar = 0.0
        self.rto = parameters.rto_initial
        self.retransmits = 0
        self.first_sent: float | None = None
        self._ack_due = 0  # 1: by policy, 2: at once
        self._ato = 0.0
        self._quick = 0
        self._pingpong = False
        self._rcv_mss = mss if mss < 536 else 536
        self._last_text = -INF
        self._small = iss  # SND.NXT after the last segment that was not full
        self.last_challenge = -INF
        self.t_retransmit = self.t_ack = self.t_probe = INF
        self.t_keepalive = self.t_wait = self.t_user = INF

    # --- The user's calls ------------------------------------------------------------------

    def open_passive(self, now: float) -> None:
        """Wait for a SYN (RFC 9293 §3.10.1). Raises `TCPError` EINVAL if already connected."""
        if self.state is CLOSED and self.snd_nxt != self.iss:
            self._renew()
        self._step(_OPEN_PASSIVE, None, now)
        self.passive = True
        self.write_shut = False

    def open_active(self, now: float) -> None:
        """Send a SYN (RFC 9293 §3.10.1). Raises `TCPError` EALREADY or EISCONN."""
        if self.state is CLOSED and self.snd_nxt != self.iss:
            self._renew()
        self._step(_OPEN_ACTIVE, None, now)
        self.passive = self.write_shut = False

    def send(self, data: bytes, now: float) -> int:
        """Queue text and send what the window allows; returns the bytes taken.

        0 means that the send buffer is full. Raises `TCPError`: EPIPE after a
        shutdown, ENOTCONN before an OPEN, or the connection's failure, once.
        """
        if self.error is not None:
            raise TCPError(self.take_error() or errnos.EPIPE)
        if self.state is CLOSED and (self.write_shut or self.fin_received):
            raise TCPError(errnos.EPIPE)
        before = len(self._tx)
        self._step(_SEND, data, now)
        return len(self._tx) - before

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
        if self.fin_received:
            self._eof_read = True
            return
        if self.error is not None:
            raise TCPError(self.take_error() or errnos.ECONNRESET)
        if self.read_shut or (self.state is CLOSED and self.write_shut):
            return
        self._step(_RECEIVE, b"", now)

    def shutdown(self, now: float) -> None:
        """No more text from here: the RFC's CLOSE, shutdown(2)'s SHUT_WR (§3.10.4).

        Raises `TCPError` ENOTCONN where there is no connection.
        """
        self._step(_SHUTDOWN, None, now)
        if self.state is not LISTEN:
            self.write_shut = self.state is not CLOSED

    def shutdown_read(self, now: float) -> None:
        """Nobody will read any more: shutdown(2)'s SHUT_RD. The peer is not told.

        Raises `TCPError` ENOTCONN where there is no connection.
        """
        if self.state is CLOSED or self.state is TIME_WAIT:
            raise TCPError(errnos.ENOTCONN)
        if self.state is LISTEN:
            self.abort(now)
        elif self.state is SYN_SENT:
            self.shutdown(now)
        self.read_shut = self.state is not CLOSED

    def close(self, now: float) -> None:
        """close(2): a FIN after the text; a RST where received text was not read."""
        self._step(_CLOSE_UNREAD if self._rx else _CLOSE, None, now)

    def abort(self, now: float) -> None:
        """The RFC's ABORT (§3.10.5): a RST, and everything is forgotten."""
        self._step(_CLOSE_UNREAD if self._rx else _ABORT, None, now)

    def status(self) -> Status:
        """The RFC's STATUS (§3.10.6)."""
        sent = (self.snd_nxt - self.snd_una) & MASK
        in_flight = sent - (self._fin == 2 and sent > 0) - (self.snd_una == self.iss and sent > 0)
        return Status(
            state=self.state,
            snd_una=self.snd_una,
            snd_nxt=self.snd_nxt,
            snd_wnd=self.snd_wnd,
            rcv_nxt=self.rcv_nxt,
            rcv_wnd=(self.rcv_adv - self.rcv_nxt) & MASK,
            unsent=len(self._tx) - in_flight,
            unacknowledged=sent,
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
    def next_iss(self) -> int:
        """An initial sequence number for the incarnation after this one (RFC 6191 §2)."""
        return (self.snd_nxt + 65537) & MASK

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
        earliest = self._earliest()
        return None if earliest == INF else earliest

    def _earliest(self) -> float:
        earliest = self.t_retransmit
        if self.t_ack < earliest:
            earliest = self.t_ack
        if self.t_wait < earliest:
            earliest = self.t_wait
        if self.t_probe < earliest:
            earliest = self.t_probe
        if self.t_keepalive < earliest:
            earliest = self.t_keepalive
        return self.t_user if self.t_user < earliest else earliest

    @property
    def timers(self) -> dict[Timer, float]:
        """The running timers and when they fire."""
        return {timer: getattr(self, name) for timer, name in _TIMERS if getattr(self, name) != INF}

    def expire(self, now: float) -> None:
        """Run every timer that is due, the earliest first."""
        if self.state is TIME_WAIT:
            if self.t_wait <= now:
                self.timeout(_WAIT, now)
            return
        while (due := self._earliest()) <= now:
            for timer, name in _TIMERS:
                if getattr(self, name) == due:
                    self.timeout(timer, now)
                    break

    def timeout(self, timer: Timer, now: float) -> None:
        """Let one timer fire. It is stopped first; what follows may start it again."""
        if timer is _WAIT:
            self.t_wait = INF
            event = _TIME_WAIT_OVER if self.state is TIME_WAIT else _FIN_WAIT_2_OVER
        elif timer is _TIMER_RETRANSMIT:
            self.t_retransmit = INF
            event = _GIVE_UP if self._given_up(now) else _RETRANSMIT
        elif timer is Timer.DELAYED_ACK:
            self.t_ack = INF
            event = _DELAYED_ACK
            # tcp_delack_timer_handler: a delay that was needed is not interactive.
            self._pingpong = False
        elif timer is Timer.PROBE:
            self.t_probe = INF
            most = self.profile.parameters.probe_retries
            event = _PROBE if self.retransmits < most else _GIVE_UP
        elif timer is Timer.KEEPALIVE:
            self.t_keepalive = INF
            most = self.options.keepalive[2] if self.options.keepalive else 0
            event = _KEEPALIVE if self.retransmits < most else _GIVE_UP
        else:
            self.t_user = INF
            event = _GIVE_UP
        self._step(event, None, now)

    def _given_up(self, now: float) -> bool:
        """Whether it was retransmitted long enough (R2, RFC 9293 §3.8.3)."""
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
        if self.t_keepalive != INF:
            self._heard(now)
        event = self._cells[_LOOK](self, seg, seg.flags, now)
        new, onwards, actions, row = self._cells[event]
        # As `_step` does; here because every segment comes this way.
        if new is None:
            for action in actions:
                action(self, seg, now)
            return
        old = self.state
        self.state = new
        self._cells = onwards
        for action in actions:
            action(self, seg, now)
        if self.on_transition is not None:
            self._tell(old, new, event, row, now)

    def _in_closed(self, seg: Segment, flags: int, now: float) -> int:
        """§3.10.7.1 and §3.10.7.2: the flags alone decide."""
        if flags & RST:
            return _RST_EXACT
        if flags & ACK:
            return _ACK_OF_UNSENT
        if flags & SYN and not (flags & FIN and self.profile.parameters.drop_synfin):
            return _SYN
        return _NO_ACK

    def _in_syn_sent(self, seg: Segment, flags: int, now: float) -> int:
        """§3.10.7.3: only an ACK of our SYN tells a segment of this attempt."""
        if flags & ACK:
            acked = (seg.ack - self.snd_una) & MASK
            if not 0 < acked <= (self.snd_nxt - self.snd_una) & MASK:
                hurry = self.profile.parameters.syn_hurry
                if hurry and not self.retransmits:
                    # tcp_rcv_synsent_state_process: what was to end it may have been ignored.
                    self.t_retransmit = now + hurry
                return _RST_OUTSIDE if flags & RST else _ACK_OF_UNSENT
            if self.profile.parameters.linux_checks and self._echoes_another_syn(seg, now):
                return _RST_OUTSIDE if flags & RST else _ACK_OF_UNSENT
            if flags & RST:
                return _RST_EXACT
            if not flags & SYN:
                return _NO_ACK
            return _SYN_ACK
        if flags & RST:
            return _RST_OUTSIDE
        return _SYN if flags & SYN else _NO_ACK

    def _in_syn_received(self, seg: Segment, flags: int, now: float) -> int:
        """After a passive OPEN nobody has been told of this connection yet."""
        if not self.passive:
            return self._in_window(seg, flags, now)
        if flags & _CONTROL == SYN and seg.seq == self.irs and not self._paws(seg, now, 0):
            return _SYN_AGAIN
        if not self.profile.parameters.linux_checks:
            return self._in_window(seg, flags, now)
        # tcp_check_req: the window is the SYN,ACK's, and an ACK is looked at before it.
        self.rcv_adv = (self.rcv_nxt + min(self.rcv_buf, 0xFFFF)) & MASK
        if flags & (ACK | RST) == ACK and seg.ack != self.snd_nxt:
            return _ACK_OF_UNSENT
        if (
            self._paws(seg, now, 0)
            or not self._fits_request(seg)
            or self._echoes_another_syn(seg, now)
        ):
            return _RST_OUTSIDE if flags & RST else _UNACCEPTABLE
        if flags & RST:
            return _RST_TO_PASSIVE if seg.seq == self.rcv_nxt else _RST_IN_WINDOW
        if flags & SYN and seg.seq != self.irs:
            return _SYN_TO_PASSIVE
        if not flags & ACK:
            return _NO_ACK
        return self._in_window(seg, flags & ~SYN, now)

    def _in_fin_wait_2(self, seg: Segment, flags: int, now: float) -> int:
        """An orphan's FIN_WAIT_2 is a small socket on Linux: it knows only sequence numbers."""
        if not self.orphaned or not self.profile.parameters.small_sockets:
            return self._in_window(seg, flags, now)
        if self._paws(seg, now, 0) or not self._fits_request(seg):
            return _UNACCEPTABLE
        if flags & RST:
            return _RST_EXACT
        offset = (seg.seq - self.rcv_nxt) & MASK
        if flags & SYN and not offset & HALF:
            return _SYN_REOPENS
        length = seg.length
        end = (offset + length) & MASK
        if not flags & ACK:
            return _NO_ACK
        if length == 0 or end == 0 or end & HALF:
            return _SEGMENT
        if not flags & FIN or end != 1:
            return _TEXT_AFTER_CLOSE
        self.rcv_nxt = (self.rcv_nxt + 1) & MASK
        self._note_timestamp(seg)
        return _FIN

    def _in_time_wait(self, seg: Segment, flags: int, now: float) -> int:
        """TIME_WAIT: §3.10.7.4, RFC 6191, or tcp_timewait_state_process."""
        offset = (seg.seq - self.rcv_nxt) & MASK
        length = seg.length
        linux = self.profile.parameters.linux_checks
        paws = self._paws(seg, now, 0)
        if flags & RST:
            if offset == 0 and not paws:
                return _RST_EXACT
            if offset == MASK:
                return _RST_AFTER_FIN
            return _RST_IN_WINDOW if self._fits(seg) and not paws else _RST_OUTSIDE
        if offset == 0 and length == 0 and not paws and (flags & ACK or linux):
            if self.timestamps:
                self._note_timestamp(seg)
            return _SEGMENT
        if flags & SYN:
            if not flags & ACK and not paws:
                newer = 0 < offset < HALF
                options = seg.options
                if self.timestamps and options is not None and options.ts_val is not None:
                    newer = newer or (self.ts_recent - options.ts_val) & HALF != 0
                if newer and self.passive:
                    return _SYN_REOPENS
            return _UNACCEPTABLE if linux and (flags & ACK or paws) else _SYN_UNEXPECTED
        if flags & FIN and (offset + length) & MASK == 0 and flags & ACK:
            return _FIN_AGAIN
        if not flags & ACK and not (linux and paws):
            return _NO_ACK
        if not linux and not paws and self._fits(seg):
            return _SEGMENT
        return _UNACCEPTABLE

    def _in_window(self, seg: Segment, flags: int, now: float) -> int:
        """§3.10.7.4 in its order: sequence number, RST, SYN; ACK; the text; FIN."""
        nxt = self.rcv_nxt
        if (
            seg.seq != nxt
            or flags & _CONTROL != ACK
            or (nxt == self.rcv_adv and seg.length)
            or (self.timestamps and self._paws(seg, now, 1))
        ):
            # What hardly any segment is: the first four checks may find something.
            event = self._checked(seg, flags, now)
            if event is not None:
                return event

        # Fifth, ACK.
        flight = (self.snd_nxt - self.snd_una) & MASK
        acked = (seg.ack - self.snd_una) & MASK
        of_syn = of_fin = False
        if acked > flight:
            if not acked & HALF:
                return _ACK_OF_UNSENT
            most = self.max_wnd
            if self.profile.parameters.linux_checks:
                # Nobody can have held back an ACK of what was never acknowledged.
                most = min(most, (self.snd_una - self.iss - self.passive) & MASK)
            if MASK + 1 - acked > most or self.state is SYN_RECEIVED:
                if not self._predicted(seg, flags):
                    return _ACK_TOO_OLD
                self._take(seg, now)
                self._challenge_ack(seg, now)
                return _SEGMENT
        elif acked:
            of_fin = self._fin == 2 and acked == flight
            if self.snd_una == self.iss:
                of_syn = self.state is SYN_RECEIVED or self.state is FIN_WAIT_1
            self._acknowledged(seg.ack, acked, flight, now)
            if of_syn and self.write_shut and self.state is SYN_RECEIVED:
                # The user has shut down already: go on from FIN_WAIT_1.
                self._step(_ACK_OF_SYN_AFTER_SHUTDOWN, seg, now)
                of_syn = False
        elif self.state is SYN_RECEIVED:
            if not self.profile.parameters.linux_checks:
                return _ACK_TOO_OLD
            of_syn = True  # tcp_ack finds nothing wrong with an ACK of nothing
        # SND.WND, unless the segment is older than the last that told it.
        window = seg.window << self.snd_scale
        wl1 = (seg.seq - self.snd_wl1) & MASK
        if (
            acked <= flight
            and not (wl1 or (seg.ack - self.snd_wl2) & MASK) & HALF
            # tcp_may_update_window: what is only smaller is no news.
            and (
                wl1
                or acked
                or window >= self.snd_wnd
                or not (window and self.profile.parameters.linux_checks)
            )
        ):
            self.snd_wl1 = seg.seq
            self.snd_wl2 = seg.ack
            self.snd_wnd = window
            if window > self.max_wnd:
                self.max_wnd = window
            if self.t_probe != INF:
                self._probe_answered(window)
        if self.timestamps and acked <= flight:
            self._note_timestamp(seg)

        data = seg.data
        if flags & FIN or data:
            if self.fin_received:
                again = self._after_fin(seg, flags)
                if again and not of_fin:
                    return again
            else:
                if (self.orphaned or self.read_shut) and (data or seg.seq != nxt):
                    end = (seg.seq + len(data) - self.rcv_nxt) & MASK
                    if 0 < end < HALF and self.write_shut and self.state is not SYN_RECEIVED:
                        return _TEXT_AFTER_CLOSE
                if not data and seg.seq == nxt and not self._out_of_order:
                    self.rcv_nxt = (nxt + 1) & MASK
                    fin = True
                else:
                    fin = self._take(seg, now)
                if fin:
                    if of_fin:
                        return _FIN_AND_ACK_OF_FIN
                    return _FIN_AND_ACK_OF_SYN if of_syn else _FIN
        if of_fin:
            return _ACK_OF_FIN
        return _ACK_OF_SYN if of_syn else _SEGMENT

    def _checked(self, seg: Segment, flags: int, now: float) -> int | None:
        """The first four checks, and whether there is an ACK; None where nothing is wrong."""
        offset = (seg.seq - self.rcv_nxt) & MASK
        state = self.state
        linux = self.profile.parameters.linux_checks
        if linux and not flags & (ACK | RST | SYN):
            return _NO_ACK

        # First, the sequence number, and PAWS (RFC 7323 §5.3: never for a RST).
        if (
            not flags & RST
            and self._paws(seg, now, 1)
            and not (linux and self._repeats_an_ack(seg, flags))
        ):
            if linux and flags & (ACK | SYN | FIN) == ACK and not seg.data and offset & HALF:
                return _NO_ACK  # an ACK overtaken by others (PAWSOldAck)
            return _SYN_UNEXPECTED if flags & SYN else _UNACCEPTABLE
        if not (self._fits_loosely(seg) if linux else self._fits(seg)):
            if flags & RST:
                return _RST_AFTER_FIN if offset == MASK and self.fin_received else _RST_OUTSIDE
            if flags & SYN:
                return None if self._completes_simultaneous_open(seg, flags) else _SYN_UNEXPECTED
            if flags & FIN and self.fin_received and (offset + seg.length) & MASK == 0:
                # The peer repeats its FIN; what it acknowledges is news all the same.
                return None if flags & ACK else _NO_ACK
            return _UNACCEPTABLE

        # Second, RST (RFC 5961 §3.2). Third is security. Fourth, SYN (RFC 5961 §4.2).
        if flags & RST:
            if offset == 0:
                return _RST_TO_PASSIVE if state is SYN_RECEIVED and self.passive else _RST_EXACT
            return _RST_AFTER_FIN if offset == MASK and self.fin_received else _RST_IN_WINDOW
        if flags & SYN and not self._completes_simultaneous_open(seg, flags):
            if state is SYN_RECEIVED and self.passive:
                return _SYN_TO_PASSIVE
            return _SYN_UNEXPECTED
        return None if flags & ACK else _NO_ACK

    def _completes_simultaneous_open(self, seg: Segment, flags: int) -> bool:
        completes = (
            self.state is SYN_RECEIVED
            and flags & ACK != 0
            and seg.seq == self.irs
            and seg.ack == self.snd_nxt
            and not seg.data
        )
        if completes:
            self._ack_due = 2  # its SYN is a repetition, to be acknowledged at once
        return completes

    def _after_fin(self, seg: Segment, flags: int) -> int:
        """Text or a FIN after the peer's FIN: it is told again that all had arrived."""
        past = (self.rcv_nxt - seg.seq) & MASK
        if past == 0 or past & HALF:
            return 0  # beyond the FIN: not this connection's, ignored
        if self.profile.parameters.linux_checks and seg.length > past:
            if len(seg.data) > past:
                return _TEXT_AFTER_CLOSE
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK  # a FIN one later is taken as well
        if flags & FIN and seg.length == past:
            return _FIN_AGAIN
        self._ack_due = 2
        return 0

    def _fits(self, seg: Segment) -> bool:
        """The four cases of RFC 9293 §3.10.7.4: does it overlap the window?"""
        window = (self.rcv_adv - self.rcv_nxt) & MASK
        offset = (seg.seq - self.rcv_nxt) & MASK
        if offset == 0:
            return window != 0 or not (seg.data or seg.flags & FIN)
        return offset < window or 0 < (offset + seg.length) & MASK <= window

    def _fits_request(self, seg: Segment) -> bool:
        """Linux's test where there is no full socket (tcp_in_window): nothing at the edge too."""
        window = (self.rcv_adv - self.rcv_nxt) & MASK
        offset = (seg.seq - self.rcv_nxt) & MASK
        length = seg.length
        if offset == 0 or (offset == window and not length):
            return True
        end = (offset + length) & MASK
        return 0 < end < HALF and (offset & HALF != 0 or offset < window)

    def _fits_loosely(self, seg: Segment) -> bool:
        """Linux's test (tcp_sequence): it may also touch either edge of the window.

        Text beyond the right edge is looked at only while nothing waits to be read.
        """
        if (seg.seq + seg.length - self.rcv_wup) & HALF:
            return False
        room = (self.rcv_adv - self.rcv_nxt) & MASK
        offset = (seg.seq - self.rcv_nxt) & MASK
        if offset & HALF:
            offset -= MASK + 1
        if offset + len(seg.data) <= room:
            return True
        return offset <= room and not self._rx and (not self.fin_received or self._eof_read)

    def _paws(self, seg: Segment, now: float, tolerance: int) -> bool:
        """Whether the segment's timestamp is older than the last one (RFC 7323 §5)."""
        options = seg.options
        if not self.timestamps or options is None or options.ts_val is None or not self.ts_recent:
            return False
        return 0 < (self.ts_recent - tolerance - options.ts_val) & MASK < HALF

    def _predicted(self, seg: Segment, flags: int) -> bool:
        """Whether Linux's short way (tcp_rcv_established) takes the text before the ACK is read.

        It does once the socket has memory at hand, that is after any text either way.
        """
        return (
            self.profile.parameters.linux_checks
            and self.state is ESTABLISHED
            and flags & (ACK | FIN | URG) == ACK
            and bool(seg.data)
            and seg.seq == self.rcv_nxt
            and not self._out_of_order
            and seg.window << self.snd_scale == self.snd_wnd
            and ((self.snd_nxt - self.iss) & MASK > 1 or (self.rcv_nxt - self.irs) & MASK > 1)
        )

    def _repeats_an_ack(self, seg: Segment, flags: int) -> bool:
        """Whether an old timestamp is only a duplicate ACK overtaken (tcp_disordered_ack)."""
        options = seg.options
        window = seg.window << self.snd_scale
        return (
            flags & (ACK | SYN | FIN) == ACK
            and not seg.data
            and seg.seq == self.rcv_nxt == self.snd_wl1
            and seg.ack == self.snd_una
            and 0 < window <= self.snd_wnd
            and options is not None
            and (self.ts_recent - (options.ts_val or 0)) & MASK <= 1200 * self.rto
        )

    def _echoes_another_syn(self, seg: Segment, now: float) -> bool:
        """Whether it echoes a timestamp that no SYN of ours carried (RFC 7323 §3.2)."""
        options = seg.options
        if not self.timestamps or options is None or options.ts_val is None or not options.ts_ecr:
            return False
        first = self._tsval(now if self.first_sent is None else self.first_sent)
        last = self._tsval(now if self.state is SYN_SENT else self._rtt_at)
        return (options.ts_ecr - first) & MASK > (last - first) & MASK

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
        if self._tx:
            text = acked - (self.snd_una == self.iss)
            self._tx = self._tx[text:]  # a FIN, the last, is past its end
        self.snd_una = ack
        if self._rtt_seq is not None:
            if not (ack - self._rtt_seq) & HALF:
                # A round trip was measured: RFC 6298 §2.
                self._rtt_seq = None
                rtt = now - self._rtt_at
                srtt = self.srtt
                if srtt is None:
                    self.srtt = rtt
                    self.rttvar = rtt / 2
                else:
                    error = rtt - srtt
                    self.srtt = srtt + error / 8
                    self.rttvar += ((error if error > 0 else -error) - self.rttvar) / 4
                self._set_rto()
        elif self.retransmits and self.srtt is not None:
            self._set_rto()  # new data acknowledged ends the backoff
        self.retransmits = 0
        if self._probed:
            self._probed = not self.profile.parameters.tail_loss_probe
        if acked == flight:
            self.first_sent = self._recover = None
            self.t_retransmit = self.t_user = INF
        else:
            self.first_sent = now
            self.t_retransmit = now + self.rto
            if self._recover is not None:
                if (ack - self._recover) & HALF:
                    self._send_oldest(now)
                else:
                    self._recover = None

    def _set_rto(self) -> None:
        parameters = self.profile.parameters
        rto = 4 * self.rttvar
        if parameters.rto_floor_on_variance:
            if rto < parameters.rto_min:
                rto = parameters.rto_min
            rto += self.srtt or 0.0
        else:
            rto += self.srtt or 0.0
            if rto < parameters.rto_min:
                rto = parameters.rto_min
        self.rto = rto if rto < parameters.rto_max else parameters.rto_max

    def _probe_answered(self, window: int) -> None:
        self.retransmits = 0
        if window:
            self.t_probe = INF

    def _take(self, seg: Segment, now: float) -> bool:
        """Take the segment's text; whether the peer's FIN is now in order."""
        data = seg.data
        fin = seg.flags & FIN != 0
        offset = (seg.seq - self.rcv_nxt) & MASK
        if offset or self._out_of_order:
            return self._take_out_of_order(seg.seq, data, fin, now)
        if data:
            room = (self.rcv_adv - self.rcv_nxt) & MASK
            if len(data) > room:
                data = data[:room]
                fin = False
                self._ack_due = 2
            self._accept(data, now)
        if fin:
            self.rcv_nxt = (self.rcv_nxt + 1) & MASK
        return fin

    def _take_out_of_order(self, seq: int, data: bytes, fin: bool, now: float) -> bool:
        """Text left of RCV.NXT is trimmed; text to the right waits for what is missing."""
        nxt = self.rcv_nxt
        offset = (seq - nxt) & MASK
        room = (self.rcv_adv - nxt) & MASK
        if offset & HALF:
            past = MASK + 1 - offset
            if past > len(data) or (past == len(data) and not fin):
                self._ack_due = 2
                self._quicken()  # all of it was here before
                return False
            seq, data, offset = nxt, data[past:], 0
        if offset or self._out_of_order:
            self._ack_due = 2
        if offset + len(data) > room:
            self._ack_due = 2
            if offset >= room:
                return False
            data, fin = data[: room - offset], False
        waiting = {*self._out_of_order, (seq, data, fin)}
        pieces = sorted(waiting, key=lambda piece: ((piece[0] - nxt) & MASK, -len(piece[1])))
        while pieces:
            seq, data, fin = pieces[0]
            past = (self.rcv_nxt - seq) & MASK
            if past & HALF:
                break
            del pieces[0]
            if past <= len(data):
                if past < len(data):
                    self._accept(data[past:], now)
                if fin:
                    self._out_of_order = ()
                    self.rcv_nxt = (self.rcv_nxt + 1) & MASK
                    return True
        self._out_of_order = tuple(pieces)
        return False

    def _accept(self, data: bytes, now: float) -> None:
        """Text in order: into the receive buffer, and something to acknowledge."""
        n = len(data)
        self.rcv_nxt = (self.rcv_nxt + n) & MASK
        if not self.orphaned:
            self._rx = self._rx + data if self._rx else data
        if not self._ack_due:
            self._ack_due = 1
        if self._ato == 0.0:
            # tcp_event_data_recv: the first text starts the delayed-ACK engine, quickly.
            self._ato = self.profile.parameters.delayed_ack
            self._quicken(stay_interactive=True)
        elif now - self._last_text > self.rto:
            self._quicken(stay_interactive=True)
        self._last_text = now
        if n > self._rcv_mss:
            self._rcv_mss = min(n, self.mss)

    def _quicken(self, *, stay_interactive: bool = False) -> None:
        """Acknowledge the next few segments at once (tcp_enter_quickack_mode)."""
        most = self.profile.parameters.quick_acks
        window = (self.rcv_adv - self.rcv_nxt) & MASK
        quick = min(window // (2 * self._rcv_mss) or 2, most)
        if quick > self._quick:
            self._quick = quick
        if not stay_interactive:
            self._pingpong = False
            self._ato = self.profile.parameters.delayed_ack

    # --- The table -------------------------------------------------------------------------

    def _step(self, event: int, seg: Any, now: float) -> None:
        new, onwards, actions, row = self._cells[event]
        if new is None:
            for action in actions:
                action(self, seg, now)
            return
        old = self.state
        self.state = new
        self._cells = onwards
        for action in actions:
            action(self, seg, now)
        if self.on_transition is not None:
            self._tell(old, new, event, row, now)

    def _tell(self, old: State, new: State, event: int, row: Row, now: float) -> None:
        assert self.on_transition is not None
        if row.via is not None:
            self.on_transition(old, row.via, _EVENTS[event], now)
            old = row.via
        self.on_transition(old, new, _EVENTS[event], now)

    def become(self, state: State) -> None:
        """Be in that state, whatever was before (for those who restore a connection)."""
        self.state = state
        self._cells = self.profile.compiled[state]

    # --- Actions: each is named in the table -----------------------------------------------

    def _send_syn(self, _seg: None, now: float) -> None:
        self.snd_nxt = (self.iss + 1) & MASK
        self._rtt_seq = self.snd_nxt
        self._start_retransmitting(now)
        self._emit_syn(SYN, now)

    def _start_retransmitting(self, now: float) -> None:
        self.first_sent = now
        self.t_retransmit = now + self.rto
        if self.options.user_timeout is not None:
            self.t_user = now + self.options.user_timeout

    def _emit_syn(self, flags: int, now: float) -> None:
        """Our SYN, or SYN,ACK: the window unscaled, all options offered or answered."""
        parameters = self.profile.parameters
        answer = flags & ACK
        self._rtt_at = now
        if parameters.linux_checks:
            # tcp_select_initial_window: whole segments.
            whole = self.adv_mss - 12 if answer and self.timestamps else self.adv_mss
            if self.rcv_buf > whole and (self.passive or not answer):
                self.rcv_buf -= self.rcv_buf % whole
        window = self.rcv_buf if self.rcv_buf < 0xFFFF else 0xFFFF
        self.rcv_adv = (self.rcv_nxt + window) & MASK
        scale: int | None = parameters.window_scale
        if answer:
            self.rcv_wup = self.rcv_nxt
            if not self.rcv_scale:
                scale = None
        sack = self.sack if answer else parameters.sack
        if self.timestamps:
            options = Options(self.adv_mss, scale, sack, self._tsval(now), self.ts_recent)
        else:
            options = _syn_options(self.adv_mss, scale, sack)
        self.out.append(
            Segment(self.iss, self.rcv_nxt if answer else 0, flags, window, b"", options)
        )

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
            options = _NO_OPTIONS
        theirs = options.mss or 536
        if theirs < self.mss:
            self.mss = theirs
        self.sack = options.sack_permitted and self.profile.parameters.sack
        if options.window_scale is None:
            self.snd_scale = self.rcv_scale = 0
        else:
            self.snd_scale = options.window_scale if options.window_scale < 14 else 14
            self.rcv_scale = self.profile.parameters.window_scale
        if options.ts_val is None:
            self.timestamps = False
        elif self.timestamps:
            self.ts_recent = options.ts_val

    def _send_syn_ack(self, seg: Segment, now: float) -> None:
        self._note_syn(seg)
        self.snd_nxt = (self.iss + 1) & MASK
        self._rtt_seq = self.snd_nxt
        self.rto = self.profile.parameters.rto_initial
        self.retransmits = 0
        self._start_retransmitting(now)
        self._emit_syn(SYN | ACK, now)

    def _send_syn_ack_again(self, _seg: Segment, now: float) -> None:
        if self._may_challenge(now):
            self._rtt_seq = None
            self._emit_syn(SYN | ACK, now)

    def _synchronize(self, seg: Segment, now: float) -> None:
        self._note_syn(seg)
        window = self.rcv_buf if self.rcv_buf < 0xFFFF else 0xFFFF
        self.rcv_adv = (self.rcv_nxt + window) & MASK
        self._acknowledged(seg.ack, 1, 1, now)
        self._establish(seg, now)

    def _establish(self, seg: Segment, now: float) -> None:
        self.retransmits = 0
        self._last_text = now
        if self.passive:
            self.last_challenge = -INF
        if self.srtt is None:
            self.rto = self.profile.parameters.rto_initial
        if self.options.keepalive:
            self.t_keepalive = now + self.options.keepalive[0]

    def _return_to_listen(self, _seg: Segment, now: float) -> None:
        self.t_retransmit = self.t_user = INF
        self.snd_una = self.snd_nxt = self.iss
        self.rcv_nxt = self.irs = 0
        self.retransmits = 0

    def _reopen(self, _seg: Segment, now: float) -> None:
        """TIME_WAIT ends in a new incarnation, above every sequence number of the old."""
        self._renew()
        self.passive = True

    def _renew(self) -> None:
        """Begin anew, with what the user and the host have set."""
        again = Connection(
            self.profile,
            iss=self.next_iss,
            mss=self.adv_mss,
            rcv_buf=self.rcv_buf,
            snd_buf=self.snd_buf,
        )
        for name in _STATEFUL:
            if name not in ("state", "ts_offset", "options"):
                setattr(self, name, getattr(again, name))

    def _take_text(self, data: bytes, now: float) -> None:
        self._tx += data[: max(0, self.snd_buf - len(self._tx))]

    def _send_text(self, _seg: Any, now: float) -> None:
        """Send what may be sent: text, then the FIN."""
        if not self._tx and self._fin != 1:
            return
        if self._fin == 2 or self.state is SYN_SENT or self.state is SYN_RECEIVED:
            return
        if self._recover is not None:
            return  # nothing new until what was retransmitted is acknowledged
        sent = (self.snd_nxt - self.snd_una - (self.snd_una == self.iss)) & MASK
        tx = self._tx
        mss = self._effective_mss() if tx else 1
        end = self.snd_una + self.snd_wnd
        left = len(tx) - sent
        while True:
            usable = (end - self.snd_nxt) & MASK
            if usable & HALF:
                usable = 0
            n = left if left < mss else mss
            last = n == left
            fin = self._fin == 1 and last
            if not (n or fin) or n + fin > usable:
                if n and usable >= n:
                    fin = False  # room for the text only
                else:
                    break
            if n < mss and not fin and not self.options.nodelay and self._held_by_nagle():
                break
            seq = self.snd_nxt
            self.snd_nxt = (seq + n + fin) & MASK
            if n < mss:
                self._small = self.snd_nxt
            if self._rtt_seq is None and self._recover is None:
                self._rtt_seq, self._rtt_at = self.snd_nxt, now
            if self.t_retransmit == INF:
                self._start_retransmitting(now)
            if n:
                if now - self._last_text < self._ato:
                    self._pingpong = True
                self._emit(
                    ACK | (FIN if fin else 0) | (PSH if last else 0), now, seq, tx[sent : sent + n]
                )
            else:
                self._emit(ACK | FIN, now, seq)
            if fin:
                self._fin = 2
                return
            sent += n
            left -= n
        if sent > mss and self.srtt is not None and not self._probed and self.sack:
            self.t_retransmit = min(self.t_retransmit, now + 2 * self.srtt + 0.008)
        if (left or self._fin == 1) and self.snd_una == self.snd_nxt and self.t_probe == INF:
            self.t_probe = now + self.rto

    def _effective_mss(self) -> int:
        """The text a segment may carry: less its options, and at most half the peer's window."""
        mss = self.mss - 12 if self.timestamps else self.mss
        most = self.max_wnd >> 1 if self.max_wnd > 536 else self.max_wnd
        return mss if mss <= most or not most else max(most, 48)

    def _held_by_nagle(self) -> bool:
        """RFC 9293 §3.7.4; Linux waits only for a segment that was itself small."""
        if self.snd_una == self.snd_nxt:
            return False
        if self.profile.parameters.linux_checks:
            return (self.snd_una - self._small) & HALF != 0
        return True

    def _queue_fin(self, _seg: None, now: float) -> None:
        self.write_shut = True
        self._fin = 1
        if self._tx or not self.snd_wnd:
            self._send_text(None, now)
            return
        self._fin = 2
        # No round trip is measured: nothing that follows would use it.
        seq = self.snd_nxt
        self.snd_nxt = (seq + 1) & MASK
        if self.t_retransmit == INF:
            self.first_sent = now
            self.t_retransmit = now + self.rto
            if self.options.user_timeout is not None:
                self.t_user = now + self.options.user_timeout
        self._emit(ACK | FIN, now, seq)

    def _give_text(self, _data: bytes, now: float) -> None:
        """Text was read: tell the peer when that opens a window worth telling."""
        if self.fin_received:
            return
        told = (self.rcv_adv - self.rcv_nxt) & MASK
        if self.rcv_buf - len(self._rx) - told >= min(self.rcv_buf // 2, 2 * self.mss):
            self._emit(ACK, now)

    def _orphan(self, _seg: None, now: float) -> None:
        self.orphaned = self.write_shut = True
        self._rx = b""
        if self.state is FIN_WAIT_2:
            self._start_fin_wait_2(None, now)

    def _send_ack(self, _seg: Any, now: float) -> None:
        self._emit(ACK, now)

    def _send_text_and_acknowledge(self, seg: Segment, now: float) -> None:
        if self._tx or self._fin == 1:
            self._send_text(seg, now)
        if self._ack_due:
            self._acknowledge(seg, now)

    def _acknowledge(self, seg: Segment, now: float) -> None:
        due = self._ack_due
        if not due:
            return
        delay = self.profile.parameters.delayed_ack
        if (
            due == 2
            or not delay
            or (self._quick and not self._pingpong)
            or (self.rcv_nxt - self.rcv_wup) & MASK > self._rcv_mss
        ):
            self._emit(ACK, now)
        elif self.t_ack == INF:
            self.t_ack = now + self._ato

    def _acknowledge_fin(self, seg: Segment, now: float) -> None:
        if self.rcv_wup == self.rcv_nxt:
            return  # text of ours has carried it
        at_once = self.profile.parameters.first_ack_delay
        if not at_once or self._ack_due == 2:
            self._emit(ACK, now)
            return
        self._pingpong = True
        self._ack_due = 1
        if (self.rcv_nxt - self.rcv_wup) & MASK > self._rcv_mss:
            self._emit(ACK, now)
        else:
            due = now + (self._ato or at_once)
            if due < self.t_ack:
                self.t_ack = due

    def _ack_unacceptable(self, seg: Segment, now: float) -> None:
        # Text without a SYN is no part of a loop of ACKs: no limit (tcp_oow_rate_limited).
        if (seg.data or seg.flags & FIN) and not seg.flags & SYN:
            if seg.seq != self.rcv_nxt and self.state is not TIME_WAIT:
                self._quicken()
            self._emit(ACK, now)
        elif self._may_challenge(now):
            self._emit(ACK, now)

    def _challenge_ack(self, seg: Segment, now: float) -> None:
        if self._may_challenge(now):
            self._emit(ACK, now)

    def _may_challenge(self, now: float) -> bool:
        if now - self.last_challenge < self.profile.parameters.challenge_interval:
            return False
        self.last_challenge = now
        return True

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
        self.t_retransmit = self.t_ack = self.t_probe = INF
        self.t_keepalive = self.t_wait = self.t_user = INF
        self._tx = b""
        self._fin = 0
        self._out_of_order = ()
        self.write_shut = True

    def _report_refused(self, _seg: Segment, now: float) -> None:
        self.error = errnos.ECONNREFUSED

    def _report_reset(self, _seg: Segment, now: float) -> None:
        self.error = errnos.ECONNRESET

    def _report_pipe(self, _seg: Segment, now: float) -> None:
        self.error = errnos.EPIPE

    def _report_timeout(self, _seg: None, now: float) -> None:
        self.error = errnos.ETIMEDOUT

    def _start_time_wait(self, _seg: Any, now: float) -> None:
        self.t_retransmit = self.t_ack = self.t_probe = self.t_keepalive = self.t_user = INF
        self.last_challenge = -INF
        self.t_wait = now + self.profile.parameters.time_wait

    def _restart_time_wait(self, _seg: Segment, now: float) -> None:
        self.t_wait = now + self.profile.parameters.time_wait

    def _start_fin_wait_2(self, seg: Any, now: float) -> None:
        limit = self.profile.parameters.fin_wait_2
        if self.orphaned and limit is not None:
            if self.options.linger2:
                limit = self.options.linger2
            if self.profile.parameters.small_sockets:
                limit = max(limit, 3.5 * self.rto)  # tcp_fin_time
                self.last_challenge = -INF
                if seg is None or not seg.flags & FIN:
                    self._ack_due = 0  # what came with the ACK is not looked at
            self.t_wait = now + limit

    def _retransmit(self, _seg: None, now: float) -> None:
        """The retransmission timer fired: the oldest again, twice the timeout (RFC 6298 §5)."""
        if not self._probed and self.sack and self._recover is None and self.snd_una != self.iss:
            self._probe_tail(now)
            return
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

    def _probe_tail(self, now: float) -> None:
        """Something new, else the last segment again; the timeout proper follows (RFC 8985 §7)."""
        self._probed = True
        self._rtt_seq = None
        mss = self._effective_mss()
        text = (self.snd_nxt - self.snd_una - (self._fin == 2)) & MASK
        left = len(self._tx) - text
        if left > 0 and min(left, mss) <= self.snd_wnd - text:
            seq, n = self.snd_nxt, min(left, mss)
            self.snd_nxt = (seq + n) & MASK
            self._emit(ACK | PSH, now, seq, self._tx[text : text + n])
        else:
            start = max(0, text - 1) // mss * mss
            fin = FIN if self._fin == 2 else 0
            self._emit(
                ACK | fin | (PSH if text else 0),
                now,
                (self.snd_una + start) & MASK,
                self._tx[start:text],
            )
        self.t_retransmit = now + self.rto

    def _send_oldest(self, now: float) -> None:
        """Retransmit one segment from SND.UNA, the FIN with it where it fits."""
        text = (self.snd_nxt - self.snd_una - (self._fin == 2)) & MASK
        n = min(text, self._effective_mss())
        last = n == text
        flags = ACK | (FIN if last and self._fin == 2 else 0) | (PSH if n and last else 0)
        self._emit(flags, now, self.snd_una, self._tx[:n])

    def _probe(self, _seg: None, now: float) -> None:
        """A segment that must be answered: what fits the window, else one below it."""
        self.retransmits += 1
        sent = (self.snd_nxt - self.snd_una) & MASK
        n = min(len(self._tx) - sent, self.snd_wnd, self._effective_mss()) if self._tx else 0
        if n > 0 and self.snd_una == self.snd_nxt:
            seq, self.snd_nxt = self.snd_nxt, (self.snd_nxt + n) & MASK
            self._start_retransmitting(now)
            self._emit(ACK | PSH, now, seq, self._tx[sent : sent + n])
            return
        self._emit(ACK, now, (self.snd_una - 1) & MASK)
        self.rto = min(2 * self.rto, self.profile.parameters.rto_max)
        self.t_probe = now + self.rto

    def _ask(self, _seg: None, now: float) -> None:
        """Keep-alive (RFC 9293 §3.8.4): nothing was heard for long enough."""
        if self.options.keepalive:
            self.retransmits += 1
            self._emit(ACK, now, (self.snd_una - 1) & MASK)
            self.t_keepalive = now + self.options.keepalive[1]

    def _heard(self, now: float) -> None:
        if self.options.keepalive:
            self.retransmits = 0
            self.t_keepalive = now + self.options.keepalive[0]

    def _emit(self, flags: int, now: float, seq: int | None = None, data: bytes = b"") -> None:
        """Send a segment that carries the current acknowledgment and window."""
        nxt = self.rcv_nxt
        scale = self.rcv_scale
        if self._rx or not scale:
            window = self._window_to_tell(nxt, scale)
        else:
            # Nothing waits to be read: the whole buffer, rounded up, is never less than before.
            window = (self.rcv_buf + (1 << scale) - 1) >> scale
        if window > 0xFFFF:
            window = 0xFFFF
        self.rcv_adv = (nxt + (window << scale)) & MASK
        if seq is None:
            seq = self.snd_nxt
            if (self.snd_una + self.snd_wnd - seq) & HALF:
                seq = self._within_window()
        self.out.append(
            Segment(
                seq,
                nxt,
                flags,
                window,
                data,
                Options(None, None, False, self._tsval(now), self.ts_recent)
                if self.timestamps
                else None,
            )
        )
        self.rcv_wup = nxt
        self.t_ack = INF
        if self._ack_due:
            self._ack_due = 0
            if self._quick:
                self._quick -= 1

    def _window_to_tell(self, nxt: int, scale: int) -> int:
        """The window field: what room there is, but never less than was told."""
        window = (self.rcv_adv - nxt) & MASK
        space = self.rcv_buf - len(self._rx)
        if window & HALF:
            window = 0
        if space > window:
            if scale or not self.profile.parameters.linux_checks:
                window = space
            elif space >= window + self._rcv_mss:
                # __tcp_select_window: an unscaled window grows by whole segments.
                window = space - space % self._rcv_mss
        return (window + (1 << scale) - 1) >> scale

    def _within_window(self) -> int:
        """Where to send an ACK from when the peer's window has shrunk (tcp_acceptable_seq)."""
        beyond = (self.snd_nxt - self.snd_una - self.snd_wnd) & MASK
        if not self.profile.parameters.linux_checks or beyond < 1 << self.rcv_scale > 1:
            return self.snd_nxt
        return (self.snd_una + self.snd_wnd) & MASK

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
        connection.become(connection.state)
        return connection


_STATEFUL = tuple(
    name
    for name in Connection.__slots__
    if name not in ("profile", "out", "on_transition", "_cells")
)

_LOOKS: Final = {
    CLOSED: Connection._in_closed,
    LISTEN: Connection._in_closed,
    SYN_SENT: Connection._in_syn_sent,
    SYN_RECEIVED: Connection._in_syn_received,
    ESTABLISHED: Connection._in_window,
    FIN_WAIT_1: Connection._in_window,
    FIN_WAIT_2: Connection._in_fin_wait_2,
    CLOSE_WAIT: Connection._in_window,
    CLOSING: Connection._in_window,
    LAST_ACK: Connection._in_window,
    TIME_WAIT: Connection._in_time_wait,
}

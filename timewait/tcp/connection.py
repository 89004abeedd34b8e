"""One endpoint of a connection: its variables, the user's calls, the passing of time.

Theory of operation
===================

A `Connection` is told what happens (the user's calls, segments, the passing of
time) and keeps the variables of RFC 9293 §3.3.1. Whatever happens it turns
into one `Event`: a call or a timeout is one as it stands, and what a segment
amounts to is found out in `timewait.tcp.arrival`. The profile's table says what
follows: the next state, and actions, each a small function of
`timewait.tcp.actions`.

It does no I/O and knows no clock. Segments are appended to `out`; `deadline`
says when `expire` wants to be called; every input takes `now`, in seconds on
any clock that does not go backwards. So the same object serves in a simulation,
in an exhaustive exploration (`snapshot`, `restore`), and as the live peer of a
kernel.

Of congestion control there is what holds until something is lost
(`timewait.tcp.congestion`), on Linux; else text is sent as the peer's window allows.
"""

from __future__ import annotations

import errno as errnos
import os
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from math import inf
from typing import Any, Final, Literal, TypeAlias

from attrs import frozen

from timewait.tcp import actions
from timewait.tcp.arrival import LOOKS
from timewait.tcp.congestion import Flow
from timewait.tcp.profiles import Profile, linux_time_of
from timewait.tcp.segment import MASK, Segment
from timewait.tcp.states import (
    CLOSE_WAIT,
    CLOSED,
    ESTABLISHED,
    FIN_WAIT_2,
    LISTEN,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
    Event,
    State,
    Timer,
)
from timewait.tcp.transitions import Row

__all__ = ["Connection", "Hook", "SocketOptions", "Status", "TCPError"]

Hook: TypeAlias = Callable[[State, State, Event, float], None]

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

# Plain ints: cells are found by them.
_OPEN_PASSIVE, _OPEN_ACTIVE = int(Event.OPEN_PASSIVE), int(Event.OPEN_ACTIVE)
_SEND, _RECEIVE, _SHUTDOWN = int(Event.SEND), int(Event.RECEIVE), int(Event.SHUTDOWN)
_CLOSE, _CLOSE_UNREAD, _ABORT = int(Event.CLOSE), int(Event.CLOSE_UNREAD), int(Event.ABORT)
_RETRANSMIT, _GIVE_UP, _PROBE = int(Event.RETRANSMIT), int(Event.GIVE_UP), int(Event.PROBE)
_KEEPALIVE, _UNANSWERED = int(Event.KEEPALIVE), int(Event.UNANSWERED)
_DELAYED_ACK = int(Event.DELAYED_ACK)
_SHUTDOWN_QUEUED, _CLOSE_QUEUED = int(Event.SHUTDOWN_QUEUED), int(Event.CLOSE_QUEUED)
_TIME_WAIT_OVER, _FIN_WAIT_2_OVER = int(Event.TIME_WAIT_OVER), int(Event.FIN_WAIT_2_OVER)


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
    unacknowledged (RFC 9293 §3.10.8). `nodelay` sends small segments at once;
    `cork` holds what does not fill one (TCP_CORK, MSG_MORE), for a timeout at most;
    with `more` what is sent is not pushed either (MSG_MORE). `syn_retries` is how often
    its SYN is sent again (TCP_SYNCNT), where not as often as the profile has it.
    """

    nodelay: bool = False
    cork: bool = False
    user_timeout: float | None = None
    linger2: float | None = None
    keepalive: tuple[float, float, int] | None = None
    more: bool = False
    syn_retries: int | None = None


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


@cache
def _in_order(names: tuple[str, ...]) -> _Action:
    """These actions as one function, which calls them faster than a loop would."""
    if len(names) == 1:
        only: _Action = getattr(actions, names[0])
        return only
    lines = [f" if {actions.ONLY_IF.get(name, True)}: {name}(c, seg, now)" for name in names]
    made: dict[str, _Action] = {}
    exec("\n".join(["def perform(c, seg, now):", *lines, " pass"]), vars(actions), made)
    return made["perform"]


def _compile(profile: Profile) -> list[list[Any]]:
    """The table as lists indexed by small numbers.

    A cell is (next state or None, that state's cells, what to do, changes of state
    to tell); after a state's cells comes the function by which it looks at a
    segment.
    """
    cells: list[list[Any]] = [[] for _ in State]
    for (state, event), row in sorted(profile.table.items()):
        if row.kind == "error":
            perform = _refuse(row)
        elif row.kind == "never":
            perform = _impossible(state, event, row)
        else:
            perform = _in_order(row.actions)
        assert len(cells[state]) == event, "the table is not total"
        onwards = None if row.next is None else cells[row.next]
        passed = [place for place in (state, row.via, row.next) if place is not None]
        changes = tuple((old, new, event) for old, new in pairwise(passed))
        cells[state].append((row.next, onwards, perform, changes))
    for state, look in LOOKS.items():
        cells[state].append(look)
    return cells


class Connection:
    """One endpoint (RFC 9293's TCB and the machine around it).

    `mss` is what it can receive, `default_mss` what a peer can that tells nothing
    (RFC 9293 §3.7.1: 536 over IPv4, 1220 over IPv6), in bytes. Raises `ValueError`
    where `iss` does not fit into 32 bits, or `mss` is not above 0.
    `out` collects segments to send; `deadline` is when `expire` is due;
    `error` is the errno that the user's next call will get. `on_transition`,
    if set, is called as `(old, new, event, now)` after each change of state.
    """

    __slots__ = (
        "_ack_due",
        "_ato",
        "_backoff",
        "_cells",
        "_cuts",
        "_ends",
        "_eof_read",
        "_fin",
        "_fin_apart",
        "_flow",
        "_frto",
        "_last_size",
        "_last_text",
        "_out_of_order",
        "_pingpong",
        "_probed",
        "_pushed",
        "_quick",
        "_rcv_mss",
        "_recover",
        "_rtt_at",
        "_rtt_seq",
        "_rx",
        "_sacking",
        "_small",
        "_tx",
        "adv_mss",
        "challenges",
        "default_mss",
        "error",
        "exact_window",
        "fin_received",
        "first_sent",
        "heard",
        "irs",
        "iss",
        "last_challenge",
        "max_wnd",
        "mss",
        "offers_scale",
        "offers_timestamps",
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
    srtt: float | None
    first_sent: float | None
    _recover: int | None
    _rtt_seq: int | None
    _flow: Flow | Literal[False] | None
    _probed: tuple[int, bool] | Literal[False] | None

    def __init__(
        self,
        profile: Profile,
        *,
        iss: int,
        mss: int = 1460,
        default_mss: int = 536,
        rcv_buf: int = 65536,
        snd_buf: int = 1 << 18,
        timestamps: bool | None = None,
        outbox: list[Segment] | None = None,
    ) -> None:
        if iss >> 32 or mss < 1:
            raise ValueError(f"iss={iss} and mss={mss}: not 32 bits, or not above 0")
        parameters = profile.parameters
        self.profile = profile
        self.out: list[Segment] = [] if outbox is None else outbox
        cells = profile.compiled
        if not cells:
            cells.extend(_compile(profile))
        self._cells: Any = cells[0]
        self.state = CLOSED
        self.iss = self.snd_una = self.snd_nxt = iss
        self._small = iss  # SND.NXT after the last segment that was not full
        self.mss = self.adv_mss = mss
        self.default_mss = default_mss
        self._rcv_mss = mss if mss < 536 else 536
        self.rcv_buf = rcv_buf
        self.snd_buf = snd_buf
        self.timestamps: bool = parameters.timestamps if timestamps is None else timestamps
        # Whatever the peer's SYN says of them.
        self.offers_timestamps = self.timestamps
        self.offers_scale: int | None = parameters.window_scale
        # SND.NXT after the last probe, and whether that sent something again; None: never probes.
        self._probed = False if parameters.tail_loss_probe else None
        self._flow = None if parameters.slow_start else False
        self.rto = parameters.rto_initial
        self.options = _DEFAULT
        self._tx = self._rx = b""
        self._out_of_order: tuple[tuple[int, bytes, bool], ...] = ()
        # On Linux, where the pieces of text not sent yet end, but the last, and whether pushed.
        self._cuts: tuple[tuple[int, bool], ...] = ()
        # On Linux, of each segment in flight but the first: where it begins, and when it was sent.
        self._ends: tuple[tuple[int, float], ...] = ()
        self._rtt_at = self._ato = self.rttvar = 0.0
        # Together, because a new connection costs as much as three segments.
        (
            self.passive,
            self.orphaned,
            self.read_shut,
            self.write_shut,
            self.fin_received,
            self._eof_read,
            self._fin_apart,  # the peer's FIN came early, and is queued without text
            self._pingpong,
            self.sack,
            self._frto,  # nothing new was tried yet since the timeout (RFC 5682)
            self.exact_window,  # more may have been told than all of `rcv_buf`, rounded up
        ) = (False,) * 11
        (
            self.irs,
            self.rcv_nxt,
            self.rcv_wup,
            self.rcv_adv,
            self.snd_wnd,
            self.max_wnd,
            self.snd_wl1,
            self.snd_scale,
            self.rcv_scale,
            self.ts_recent,
            self.ts_offset,
            self.retransmits,
            self._backoff,  # doublings since a round trip was measured
            self._fin,  # 1: queued behind the text, 2: sent
            self._ack_due,  # 1: by policy, 2: at once
            self._quick,
            self._pushed,  # small segments since the last ACK, at most 2 (ICSK_ACK_PUSHED)
            self._last_size,  # of the last of them, if that may be all that the peer sends
            self.challenges,  # challenge ACKs sent since `last_challenge`
        ) = (0,) * 19
        # What the next segments' SACK option tells: blocks, the latest first, and whether the
        # first is text that came twice.
        self._sacking: tuple[tuple[tuple[int, int], ...], bool] | None = None
        (
            self.error,
            self.on_transition,
            self._recover,
            self._rtt_seq,
            self.srtt,
            self.first_sent,
        ) = (None,) * 6
        self.last_challenge = self._last_text = self.heard = -inf
        self.t_retransmit = self.t_ack = self.t_probe = inf
        self.t_keepalive = self.t_wait = self.t_user = inf

    # --- The user's calls ------------------------------------------------------------------

    def open_passive(self, now: float) -> None:
        """Wait for a SYN (RFC 9293 §3.10.1). Raises `TCPError` EINVAL if already connected."""
        if self.snd_nxt != self.iss and self.state is CLOSED:
            self._renew()
        self._step(_OPEN_PASSIVE, None, now)
        self.passive = True
        self.write_shut = False

    def open_active(self, now: float) -> None:
        """Send a SYN (RFC 9293 §3.10.1). Raises `TCPError` EALREADY or EISCONN."""
        if self.snd_nxt != self.iss and self.state is CLOSED:
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
        if (self.state is CLOSED and (self.write_shut or self.fin_received)) or (
            self.write_shut and self._text_waits()
        ):
            raise TCPError(errnos.EPIPE)
        before = len(self._tx)
        self._step(_SEND, data, now)
        return len(self._tx) - before

    def receive(self, n: int, now: float, peek: bool = False) -> bytes:
        """Up to `n` bytes of text in order; `b""` where there is none (see `eof`).

        Raises `TCPError`: ENOTCONN before an OPEN, or the connection's
        failure, once, after the text received before it; `ValueError` for a negative `n`.
        """
        if n < 0:
            raise ValueError(f"cannot receive {n} bytes")
        if peek:
            if not self._rx and not self.fin_received:
                self._nothing_to_read(now)
            return self._rx[:n]
        if not self._rx:
            self._nothing_to_read(now)
            return b""
        data = self._rx[:n]
        self._rx = self._rx[n:]
        if self.fin_received and not self._rx and not self._fin_apart:
            self._eof_read = True  # a FIN is queued with the text that it follows
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
        self._step(_SHUTDOWN_QUEUED if self._text_waits() else _SHUTDOWN, None, now)
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
        if self._rx or (self._out_of_order and self._came_with_the_syn()):
            event = _CLOSE_UNREAD
        else:
            event = _CLOSE_QUEUED if self._tx and self._text_waits() else _CLOSE
        self._step(event, None, now)

    def _text_waits(self) -> bool:
        return self._tx != b"" and self.state is SYN_RECEIVED

    def _came_with_the_syn(self) -> bool:
        return self.state is SYN_RECEIVED and self._out_of_order[0][1] != b""

    def abort(self, now: float) -> None:
        """The RFC's ABORT (§3.10.5): a RST, and everything is forgotten."""
        # tcp_disconnect: a RST also where a FIN that the peer waits for was not sent yet.
        waiting = self._fin == 1 and self.fin_received and self.profile.parameters.linux_checks
        self._step(_CLOSE_UNREAD if self._rx or waiting else _ABORT, None, now)

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
        return None if earliest == inf else earliest

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
        return {timer: getattr(self, name) for timer, name in _TIMERS if getattr(self, name) != inf}

    def expire(self, now: float) -> None:
        """Run every timer that is due, the earliest first."""
        if self.state is TIME_WAIT:
            if self.t_wait <= now:
                self.t_wait = inf
                self._step(_TIME_WAIT_OVER, None, now)
            return
        while (due := self._earliest()) <= now:
            for timer, name in _TIMERS:
                if getattr(self, name) == due:
                    self.timeout(timer, now)
                    break

    def timeout(self, timer: Timer, now: float) -> None:
        """Let one timer fire. It is stopped first; what follows may start it again."""
        if timer is _WAIT:
            self.t_wait = inf
            event = _TIME_WAIT_OVER if self.state is TIME_WAIT else _FIN_WAIT_2_OVER
        elif timer is _TIMER_RETRANSMIT:
            self.t_retransmit = inf
            event = _GIVE_UP if self._given_up(now) else _RETRANSMIT
        elif timer is Timer.DELAYED_ACK:
            self.t_ack = inf
            event = _DELAYED_ACK
            # tcp_delack_timer_handler: a delay that was needed is not interactive, or too short.
            usual = self.profile.parameters.delayed_ack
            if self._pingpong or not self.profile.parameters.linux_checks:
                self._ato = usual
            else:
                self._ato = min(2 * self._ato, self.rto)
            self._pingpong = False
        elif timer is Timer.PROBE:
            self.t_probe = inf
            parameters = self.profile.parameters
            most = parameters.probe_retries
            if self.orphaned:
                spent = parameters.orphan_until_rto_max and actions.probe_slowest(self)
                most = 0 if spent else parameters.orphan_probe_retries
            event = _PROBE if self.retransmits < most else _GIVE_UP
        elif timer is Timer.KEEPALIVE:
            self.t_keepalive = inf
            spent = not self._shrinks() and self._deaf(now)
            event = _UNANSWERED if spent else _KEEPALIVE
        else:
            self.t_user = inf
            event = _GIVE_UP
        self._step(event, None, now)

    def _shrinks(self) -> bool:
        """Whether its keepalive timer waits for nothing but to make it a small socket."""
        return self.orphaned and self.state is FIN_WAIT_2 and self.profile.parameters.small_sockets

    def _deaf(self, now: float) -> bool:
        """Whether enough keep-alives went unanswered (tcp_keepalive_timer)."""
        if self.options.keepalive is None or self.snd_una != self.snd_nxt or self._tx:
            return False
        idle, _, most = self.options.keepalive
        silent = now - self.heard
        limit = self.options.user_timeout
        if limit is not None and self.profile.parameters.linux_checks:
            return silent >= idle and silent >= limit and self.retransmits > 0
        return silent >= idle and self.retransmits >= most

    def _given_up(self, now: float) -> bool:
        """Whether it was retransmitted long enough (R2, RFC 9293 §3.8.3)."""
        parameters = self.profile.parameters
        if self.state is SYN_SENT:
            return self._unanswered(now)
        if self.state is SYN_RECEIVED:
            return self.retransmits >= parameters.synack_retries
        if self.first_sent is None or (parameters.linux_checks and not self.retransmits):
            return False
        if parameters.retries != inf:
            return self.retransmits >= parameters.retries
        limit = parameters.give_up_after
        if self.orphaned:
            if parameters.orphan_until_rto_max and self.rto >= parameters.rto_max:
                return True
            limit = parameters.orphan_give_up_after
        return now - self.first_sent >= limit

    def _unanswered(self, now: float) -> bool:
        """Whether the SYN was sent often enough, or (tcp_write_timeout) for long enough."""
        parameters = self.profile.parameters
        most = self.options.syn_retries or parameters.syn_retries
        if self.retransmits >= most + parameters.syn_linear:
            return True
        if not (parameters.linux_checks and self.retransmits) or self.options.user_timeout:
            return False
        assert self.first_sent is not None
        # What a clock in floats is short of an exact second is not a time that a timer has.
        spent = now - self.first_sent + 1e-6
        return spent >= linux_time_of(most, parameters.rto_max, parameters.rto_initial)

    # --- Segments ----------------------------------------------------------------------

    def segment(self, seg: Segment, now: float) -> None:
        """Take a segment that arrived (RFC 9293 §3.10.7)."""
        event = self._cells[_LOOK](self, seg, seg.flags, now)
        new, onwards, perform, changes = self._cells[event]
        # As `_step` does; here because every segment comes this way.
        if new is None:
            perform(self, seg, now)
            return
        self.state = new
        self._cells = onwards
        perform(self, seg, now)
        if self.on_transition is not None:
            for old, new, what in changes:
                self.on_transition(old, new, what, now)

    # --- The table -------------------------------------------------------------------------

    def _step(self, event: int, seg: Any, now: float) -> None:
        new, onwards, perform, changes = self._cells[event]
        if new is None:
            perform(self, seg, now)
            return
        self.state = new
        self._cells = onwards
        perform(self, seg, now)
        if self.on_transition is not None:
            for old, new, what in changes:
                self.on_transition(old, new, what, now)

    def become(self, state: State) -> None:
        """Be in that state, whatever was before (for those who restore a connection)."""
        self.state = state
        self._cells = self.profile.compiled[state]

    def follow(self, profile: Profile) -> None:
        """Go by other parameters from here on; what was negotiated stays."""
        self.profile = profile
        if not profile.compiled:
            profile.compiled.extend(_compile(profile))
        self.become(self.state)

    def _renew(self) -> None:
        """Begin anew, with what the user and the host have set."""
        again = Connection(
            self.profile,
            iss=self.next_iss,
            mss=self.adv_mss,
            default_mss=self.default_mss,
            rcv_buf=self.rcv_buf,
            snd_buf=self.snd_buf,
        )
        for name in _STATEFUL:
            if name not in ("state", "ts_offset", "options"):
                setattr(self, name, getattr(again, name))

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
        connection.out = [] if outbox is None else outbox
        connection.on_transition = None
        connection.follow(profile)
        return connection


_STATEFUL = tuple(
    name
    for name in Connection.__slots__
    if name not in ("profile", "out", "on_transition", "_cells")
)

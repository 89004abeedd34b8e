"""What a segment that arrived amounts to: one `Event`, in the order of RFC 9293 §3.10.7.

`LOOKS` has a function for each state. It looks at the sequence number, then
RST, SYN, ACK, the text and the FIN; what it finds goes into the connection's
variables on the way (acknowledged text leaves the send buffer, text in order
reaches the receive buffer), and the event says what the *whole* segment
amounts to. What follows from it, the table says.

Where Linux looks in another order or with another measure, the kernel's
function is named.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

from timewait.tcp.actions import (
    acknowledged,
    challenge_ack,
    expect_segments,
    probe_answered,
    probe_repeated,
    quicken,
    synchronized,
    tell_repeated,
    tsval,
)
from timewait.tcp.segment import ACK, FIN, HALF, MASK, PSH, RST, SYN, URG, Options, Segment
from timewait.tcp.states import (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    LISTEN,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
    Event,
)

if TYPE_CHECKING:
    from timewait.tcp.connection import Connection

__all__ = ["LOOKS"]

_CONTROL: Final = SYN | RST | ACK
# Where tcp_fin acknowledges before it forgets what came early, and so tells of that once more.
_ACKS_FIN: Final = (FIN_WAIT_1, FIN_WAIT_2)

# Plain ints and module globals: this runs for every segment.
_RST_EXACT, _RST_TO_PASSIVE = int(Event.RST_EXACT), int(Event.RST_TO_PASSIVE)
_RST_AFTER_FIN, _RST_IN_WINDOW = int(Event.RST_AFTER_FIN), int(Event.RST_IN_WINDOW)
_RST_OUTSIDE, _SYN, _SYN_ACK = int(Event.RST_OUTSIDE), int(Event.SYN), int(Event.SYN_ACK)
_SYN_TO_PASSIVE, _SYN_AGAIN = int(Event.SYN_TO_PASSIVE), int(Event.SYN_AGAIN)
_SYN_UNEXPECTED, _SYN_REOPENS = int(Event.SYN_UNEXPECTED), int(Event.SYN_REOPENS)
_UNACCEPTABLE, _NO_ACK = int(Event.UNACCEPTABLE), int(Event.NO_ACK)
_ACK_OF_UNSENT, _ACK_TOO_OLD = int(Event.ACK_OF_UNSENT), int(Event.ACK_TOO_OLD)
_SEGMENT, _ACK_OF_SYN = int(Event.SEGMENT), int(Event.ACK_OF_SYN)
_ACK_OF_FIN, _FIN = int(Event.ACK_OF_FIN), int(Event.FIN)
_FIN_AND_SYN_ACK, _FIN_AND_ACK_OF_SYN = int(Event.FIN_AND_SYN_ACK), int(Event.FIN_AND_ACK_OF_SYN)
_FIN_AND_ACK_OF_FIN, _FIN_AGAIN = int(Event.FIN_AND_ACK_OF_FIN), int(Event.FIN_AGAIN)
_TEXT_AFTER_CLOSE = int(Event.TEXT_AFTER_CLOSE)
_ACK_OF_SYN_AFTER_SHUTDOWN = int(Event.ACK_OF_SYN_AFTER_SHUTDOWN)

# --- How each state looks at a segment --------------------------------------------------------


def _in_closed(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """§3.10.7.1 and §3.10.7.2: the flags alone decide."""
    if flags & RST:
        return _RST_EXACT
    if flags & ACK:
        return _ACK_OF_UNSENT
    if flags & SYN and not (flags & FIN and c.profile.parameters.drop_synfin):
        return _SYN
    return _NO_ACK


def _in_syn_sent(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """§3.10.7.3: only an ACK of our SYN tells a segment of this attempt."""
    if flags & ACK:
        acked = (seg.ack - c.snd_una) & MASK
        if not 0 < acked <= (c.snd_nxt - c.snd_una) & MASK:
            hurry = c.profile.parameters.syn_hurry
            if hurry and not c.retransmits:
                # tcp_rcv_synsent_state_process: what was to end it may have been ignored.
                c.t_retransmit = now + hurry
            return _RST_OUTSIDE if flags & RST else _ACK_OF_UNSENT
        if c.profile.parameters.linux_checks and _echoes_another_syn(c, seg, now):
            return _RST_OUTSIDE if flags & RST else _ACK_OF_UNSENT
        if flags & RST:
            return _RST_EXACT
        if not flags & SYN:
            return _NO_ACK
        synchronized(c, seg, now)
        if (seg.data or flags & FIN) and c.profile.parameters.syn_ack_text:
            fin = _take_out_of_order(c, c.rcv_nxt, seg.data, flags & FIN != 0)
            if seg.data:
                _hear_text(c, seg, now)
            return _FIN_AND_SYN_ACK if fin else _SYN_ACK
        return _SYN_ACK
    if flags & RST:
        return _RST_OUTSIDE
    return _SYN if flags & SYN else _NO_ACK


def _in_syn_received(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """After a passive OPEN nobody has been told of this connection yet."""
    if not c.passive:
        return _in_window(c, seg, flags, now)
    if flags & _CONTROL == SYN and seg.seq == c.irs and not _paws(c, seg, now):
        return _SYN_AGAIN
    if not c.profile.parameters.linux_checks:
        return _in_window(c, seg, flags, now)
    # tcp_check_req: the window is the SYN,ACK's, and an ACK is looked at before it.
    c.rcv_adv = (c.rcv_nxt + min(c.rcv_buf, 0xFFFF)) & MASK
    if flags & (ACK | RST) == ACK and seg.ack != c.snd_nxt:
        return _ACK_OF_UNSENT
    if _paws(c, seg, now) or not _fits_request(c, seg) or _echoes_another_syn(c, seg, now):
        return _RST_OUTSIDE if flags & RST else _UNACCEPTABLE
    if flags & RST:
        return _RST_TO_PASSIVE if seg.seq == c.rcv_nxt else _RST_IN_WINDOW
    if flags & SYN and seg.seq != c.irs:
        return _SYN_TO_PASSIVE
    if not flags & ACK:
        return _NO_ACK
    return _in_window(c, seg, flags & ~SYN, now)


def _in_fin_wait_2(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """An orphan's FIN_WAIT_2 is a small socket on Linux: it knows only sequence numbers."""
    if not c.orphaned or not c.profile.parameters.small_sockets or c.t_keepalive != inf:
        return _in_window(c, seg, flags, now)
    if _paws(c, seg, now) or not _fits_request(c, seg):
        return _UNACCEPTABLE
    if flags & RST:
        return _RST_EXACT
    offset = (seg.seq - c.rcv_nxt) & MASK
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
    c.rcv_nxt = (c.rcv_nxt + 1) & MASK
    _note_timestamp(c, seg, now)
    return _FIN


def _in_time_wait(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """TIME_WAIT: §3.10.7.4, RFC 6191, or tcp_timewait_state_process."""
    offset = (seg.seq - c.rcv_nxt) & MASK
    length = seg.length
    if c.profile.parameters.bsd_time_wait:
        return _in_time_wait_of_bsd(c, seg, flags, offset, length)
    linux = c.profile.parameters.linux_checks
    paws = (linux or not flags & RST) and _paws(c, seg, now)
    if flags & RST:
        if offset == 0 and not paws:
            _note_timestamp(c, seg, now)  # it may be ignored (tcp_rfc1337), its timestamp is not
            return _RST_EXACT
        if offset == MASK:
            return _RST_AFTER_FIN
        return _RST_IN_WINDOW if _fits(c, seg) and not paws else _RST_OUTSIDE
    if offset == 0 and length == 0 and not paws and (flags & ACK or linux):
        if c.timestamps:
            _note_timestamp(c, seg, now)
        return _SEGMENT
    if flags & SYN:
        if not flags & ACK and not paws:
            newer = 0 < offset < HALF
            options = seg.options
            if options is not None and options.ts_val is not None:
                if c.timestamps:
                    newer = newer or (c.ts_recent - options.ts_val) & HALF != 0
                elif c.offers_timestamps and not linux:
                    newer = True  # RFC 6191 §2: no old duplicate can carry one
            if newer:
                if c.passive:
                    return _SYN_REOPENS
                if c.profile.parameters.time_wait_yields:
                    return _SYN
                c._ack_due = 2  # tcp_v4_rcv: where nobody listens, at no limited rate
        return _UNACCEPTABLE if linux and (flags & ACK or paws) else _SYN_UNEXPECTED
    if flags & FIN and (offset + length) & MASK == 0 and flags & ACK:
        return _FIN_AGAIN
    if linux:
        return _UNACCEPTABLE if flags & ACK or paws else _NO_ACK
    if paws and not seg.data and c.profile.parameters.paws_silent:
        return _NO_ACK
    if paws or not _fits(c, seg):
        return _UNACCEPTABLE
    return _SEGMENT if flags & ACK else _NO_ACK


def _in_time_wait_of_bsd(c: Connection, seg: Segment, flags: int, offset: int, length: int) -> int:
    """FreeBSD's tcp_twcheck: no window, and no timestamps."""
    if flags & RST:
        return _RST_IN_WINDOW if offset else _RST_EXACT
    if not flags & ACK:
        if not flags & SYN:
            return _NO_ACK
        if not 0 < offset < HALF:
            return _SYN_UNEXPECTED
        return _SYN_REOPENS if c.passive else _SYN
    if flags & FIN and (offset + length) & MASK == 0:
        return _FIN_AGAIN
    nothing_new = flags == ACK and not length and not offset and seg.ack == c.snd_nxt
    return _SEGMENT if nothing_new else _UNACCEPTABLE


def _in_window(c: Connection, seg: Segment, flags: int, now: float) -> int:
    """§3.10.7.4 in its order: sequence number, RST, SYN; ACK; the text; FIN."""
    nxt = c.rcv_nxt
    data = seg.data
    if (
        seg.seq != nxt
        or flags & _CONTROL != ACK
        or (data and len(data) > (c.rcv_adv - nxt) & MASK)
        or (flags & FIN and nxt == c.rcv_adv)
        or (c.timestamps and _paws(c, seg, now, True))
    ):
        # What hardly any segment is: the first four checks may find something.
        event = _checked(c, seg, flags, now)
        if event is not None:
            return event

    # Fifth, ACK.
    una = c.snd_una
    acked = 0
    of_syn = of_fin = False
    if seg.ack != una:
        acked = (seg.ack - una) & MASK
        flight = (c.snd_nxt - una) & MASK
        if acked <= flight:
            of_fin = c._fin == 2 and acked == flight
            if una == c.iss:
                of_syn = c.state is SYN_RECEIVED or c.state is FIN_WAIT_1
            if c._recover is not None and c.profile.parameters.linux_checks:
                c.snd_wnd = seg.window << c.snd_scale  # what the ACK lets go looks at it
                c.max_wnd = max(c.max_wnd, c.snd_wnd)
            acknowledged(c, seg.ack, acked, flight, now, seg.options)
            if of_fin and c.options.linger2 and _never_lingers(c):
                return _TEXT_AFTER_CLOSE
        else:
            event = _acks_none_in_flight(c, seg, flags, acked, now)
            if event is not None:
                return event
            acked = -1  # older than others: it tells nothing
    elif c._probed:
        window = seg.window << c.snd_scale
        if seg.seq == c.snd_wl1 and not seg.length and 0 < window <= c.snd_wnd:
            probe_repeated(c)
    elif c.state is SYN_RECEIVED:
        if not c.profile.parameters.linux_checks:
            return _ACK_TOO_OLD
        of_syn = True  # tcp_ack finds nothing wrong with an ACK of nothing
    if of_syn and c.write_shut and c.state is SYN_RECEIVED:
        # The user has shut down already: go on from FIN_WAIT_1.
        c.snd_wnd = seg.window << c.snd_scale
        told = c._sacking
        if flags & SYN:
            c._sacking = None
        c._step(_ACK_OF_SYN_AFTER_SHUTDOWN, seg, now)
        if flags & SYN:
            # tcp_data_queue: its SYN is told to be a repetition when the FIN has gone.
            c._ack_due, c._sacking = 2, told
        of_syn = False
    if acked >= 0:
        # SND.WND, unless the segment is older than the last that told it. (SND.WL2 would add
        # nothing: what it acknowledged is never beyond SND.UNA.)
        window = seg.window << c.snd_scale
        news = window != c.snd_wnd
        if news or seg.seq != c.snd_wl1 or window > c.max_wnd:
            later = (seg.seq - c.snd_wl1) & MASK
            linux = c.profile.parameters.linux_checks
            if (
                # tcp_may_update_window: what is only smaller is no news.
                (later < HALF and (later or acked or not linux or not 0 < window < c.snd_wnd))
                # Nor is a new ACK ever old.
                or (acked and linux)
            ):
                c.snd_wl1 = seg.seq
                c.snd_wnd = window
                if window > c.max_wnd or (of_syn and c.passive and linux):
                    c.max_wnd = window  # tcp_create_openreq_child: not the SYN's
            elif later & HALF and seg.data and _predicted(c, seg, flags) and (c._rx or c._tx):
                c.snd_wl1 = seg.seq  # tcp_rcv_established: the last to tell it, though older
        if c.timestamps:
            _note_timestamp(c, seg, now)
        c.heard = now
        if c.t_probe != inf:
            # tcp_rcv_established looks at no ACK of nothing that comes with predicted text.
            if acked or news or not (data and (c._rx or c._tx) and _predicted(c, seg, flags)):
                probe_answered(c, now)
        elif c.retransmits and c.t_keepalive != inf:
            c.retransmits = 0

    if of_syn:
        expect_segments(c)
    if flags & FIN or data or (of_syn and c._out_of_order and c.state is SYN_RECEIVED):
        if c.fin_received:
            # Of what acknowledges our FIN too, CLOSING and LAST_ACK look at nothing else.
            again = 0 if of_fin else _after_fin(c, seg, flags)
            if again:
                return again
        else:
            if not data and seg.seq == nxt and not c._out_of_order:
                c.rcv_nxt = (nxt + 1) & MASK
                fin = True
            elif (c.orphaned or c.read_shut) and _comes_too_late(c, seg):
                return _TEXT_AFTER_CLOSE
            else:
                fin = _take(c, seg, now)
            if fin:
                if of_fin:
                    return _FIN_AND_ACK_OF_FIN
                return _FIN_AND_ACK_OF_SYN if of_syn else _FIN
    if of_fin:
        return _ACK_OF_FIN
    return _ACK_OF_SYN if of_syn else _SEGMENT


def _never_lingers(c: Connection) -> bool:
    """Whether nobody is to wait for the peer's FIN (TCP_ABORT_ON_LINGER)."""
    return c.orphaned and c.state is FIN_WAIT_1 and (c.options.linger2 or 0) < 0


def _acks_none_in_flight(
    c: Connection, seg: Segment, flags: int, acked: int, now: float
) -> int | None:
    """What is acknowledged was never sent, or long ago; None if the segment is still of use."""
    if not acked & HALF:
        return _ACK_OF_UNSENT
    predicted = _predicted(c, seg, flags)
    if predicted and c.timestamps and c.rcv_wup == c.rcv_nxt:
        _note_timestamp(c, seg, now)
    most = c.max_wnd
    if c.profile.parameters.linux_checks:
        # Nobody can have held back an ACK of what was never acknowledged.
        most = min(most, (c.snd_una - c.iss - c.passive) & MASK)
    if MASK + 1 - acked <= most and c.state is not SYN_RECEIVED:
        return None
    if not (predicted and seg.data and (c._rx or c._tx)):
        return _ACK_TOO_OLD
    _take(c, seg, now)
    challenge_ack(c, seg, now)
    return _SEGMENT


# --- The first four checks --------------------------------------------------------------------


def _checked(c: Connection, seg: Segment, flags: int, now: float) -> int | None:
    """The first four checks, and whether there is an ACK; None where nothing is wrong."""
    offset = (seg.seq - c.rcv_nxt) & MASK
    linux = c.profile.parameters.linux_checks
    if linux and not flags & (ACK | RST | SYN):
        return _NO_ACK

    # First, the sequence number, and PAWS (RFC 7323 §5.3: never for a RST).
    if (
        not flags & RST
        and _paws(c, seg, now, True)
        and not (linux and _repeats_an_ack(c, seg, flags))
    ):
        if linux and flags & (ACK | SYN | FIN) == ACK and not seg.data and offset & HALF:
            return _NO_ACK  # an ACK overtaken by others (PAWSOldAck)
        if flags & SYN:
            return _SYN_UNEXPECTED
        return _NO_ACK if c.profile.parameters.paws_silent and not seg.data else _UNACCEPTABLE
    if not (_fits_loosely(c, seg) if linux else _fits(c, seg)):
        if flags & RST:
            return _RST_AFTER_FIN if offset == MASK and c.fin_received else _RST_OUTSIDE
        if flags & SYN:
            return None if _completes_simultaneous_open(c, seg, flags) else _SYN_UNEXPECTED
        if flags & FIN and c.fin_received and (offset + seg.length) & MASK == 0:
            # The peer repeats its FIN; what that acknowledges may be news all the same.
            if flags & ACK and c.profile.parameters.old_fin_acks:
                return None
            c._ack_due = 2
            return _FIN_AGAIN
        return _UNACCEPTABLE

    # Second, RST (RFC 5961 §3.2). Third is security. Fourth, SYN (RFC 5961 §4.2).
    if flags & RST:
        if offset == 0 or (linux and seg.seq == _sacked_to(c)):
            return _RST_TO_PASSIVE if _would_listen(c) else _RST_EXACT
        return _RST_AFTER_FIN if offset == MASK and c.fin_received else _RST_IN_WINDOW
    if flags & SYN and not _completes_simultaneous_open(c, seg, flags):
        return _SYN_TO_PASSIVE if _would_listen(c) else _SYN_UNEXPECTED
    return None if flags & ACK else _NO_ACK


def _would_listen(c: Connection) -> bool:
    """Whether a passive open has not come further, and its user has not closed."""
    return c.state is SYN_RECEIVED and c.passive and not c.write_shut


def _sacked_to(c: Connection) -> int | None:
    """Where the rightmost SACK block ends: a RST there is as good (tcp_validate_incoming)."""
    if not c.sack or not c._out_of_order:
        return None
    ends = ((seq + len(data) + fin) & MASK for seq, data, fin in c._out_of_order)
    return max(ends, key=lambda end: (end - c.rcv_nxt) & MASK)


def _completes_simultaneous_open(c: Connection, seg: Segment, flags: int) -> bool:
    completes = (
        c.state is SYN_RECEIVED
        and not c.passive
        and flags & ACK != 0
        and seg.seq == c.irs
        and seg.ack == c.snd_nxt
        and not seg.data
        and not (flags & FIN and c.profile.parameters.linux_checks)
    )
    if completes:
        c._ack_due = 2  # its SYN is a repetition, to be acknowledged at once
        tell_repeated(c, seg.seq, c.rcv_nxt)
    return completes


def _comes_too_late(c: Connection, seg: Segment) -> bool:
    """Whether there is new text in it, and nobody is left to read it or to answer."""
    end = (seg.seq + len(seg.data) - c.rcv_nxt) & MASK
    return 0 < end < HALF and c.write_shut and c.state is not SYN_RECEIVED


def _after_fin(c: Connection, seg: Segment, flags: int) -> int:
    """Text or a FIN after the peer's FIN: it is told again that all had arrived."""
    past = (c.rcv_nxt - seg.seq) & MASK
    if past == 0 or past & HALF:
        return 0  # beyond the FIN: not this connection's, ignored
    tell_repeated(c, seg.seq, (seg.seq + seg.length) & MASK)
    if c.profile.parameters.linux_checks and seg.length > past:
        if len(seg.data) > past:
            return _TEXT_AFTER_CLOSE
        c.rcv_nxt = (c.rcv_nxt + 1) & MASK  # a FIN one later is taken as well
    c._ack_due = 2
    if seg.length <= past:
        quicken(c)
    return _FIN_AGAIN if flags & FIN and seg.length == past else 0


# --- Does it fit, and is it old? --------------------------------------------------------------


def _fits(c: Connection, seg: Segment) -> bool:
    """The four cases of RFC 9293 §3.10.7.4: does it overlap the window?"""
    window = (c.rcv_adv - c.rcv_nxt) & MASK
    offset = (seg.seq - c.rcv_nxt) & MASK
    if offset == 0:
        return window != 0 or not (seg.data or seg.flags & FIN)
    length = seg.length
    return offset < window or (length != 0 and 0 < (offset + length) & MASK <= window)


def _fits_request(c: Connection, seg: Segment) -> bool:
    """Linux's test where there is no full socket (tcp_in_window): nothing at the edge too."""
    window = (c.rcv_adv - c.rcv_nxt) & MASK
    offset = (seg.seq - c.rcv_nxt) & MASK
    length = seg.length
    if offset == 0 or (offset == window and not length):
        return True
    end = (offset + length) & MASK
    return 0 < end < HALF and (offset & HALF != 0 or offset < window)


def _fits_loosely(c: Connection, seg: Segment) -> bool:
    """Linux's test (tcp_sequence): it may also touch either edge of the window.

    Text beyond the right edge is looked at only while nothing waits to be read.
    """
    if (seg.seq + seg.length - c.rcv_wup) & HALF:
        return False
    room = (c.rcv_adv - c.rcv_nxt) & MASK
    offset = (seg.seq - c.rcv_nxt) & MASK
    if offset & HALF:
        offset -= MASK + 1
    if offset + seg.length - (seg.flags & FIN) <= room:
        return True
    return offset <= room and not c._rx and (not c.fin_received or c._eof_read)


def _paws(c: Connection, seg: Segment, now: float, tolerant: bool = False) -> bool:
    """Whether the segment's timestamp is older than the last one, which is valid (RFC 7323 §5)."""
    options = seg.options
    if not c.timestamps or options is None or options.ts_val is None:
        return False
    age = (c.ts_recent - options.ts_val) & MASK
    if not 0 < age < HALF:
        return False
    parameters = c.profile.parameters
    if (tolerant and age <= parameters.paws_window) or not (c.ts_recent or parameters.paws_zero):
        return False
    return not -inf < c.heard < now - parameters.paws_idle


def _predicted(c: Connection, seg: Segment, flags: int) -> bool:
    """Whether Linux's short way (tcp_rcv_established) is taken before the ACK is read.

    Text is taken where the socket has memory at hand, that is while any is queued either way.
    """
    return (
        c.profile.parameters.linux_checks
        and c.state is ESTABLISHED
        and flags & (ACK | FIN | URG) == ACK
        and seg.seq == c.rcv_nxt
        and not c._out_of_order
        and seg.window << c.snd_scale == c.snd_wnd
        and (seg.options is not None and seg.options.ts_val is not None) == c.timestamps
    )


def _repeats_an_ack(c: Connection, seg: Segment, flags: int) -> bool:
    """Whether an old timestamp is only a duplicate ACK overtaken (tcp_disordered_ack)."""
    options = seg.options
    window = seg.window << c.snd_scale
    return (
        flags & (ACK | SYN | FIN) == ACK
        and not seg.data
        and seg.seq == c.rcv_nxt == c.snd_wl1
        and seg.ack == c.snd_una
        and 0 < window <= c.snd_wnd
        and options is not None
        and (c.ts_recent - (options.ts_val or 0)) & MASK <= 1200 * c.rto
    )


def _echoes_another_syn(c: Connection, seg: Segment, now: float) -> bool:
    """Whether it echoes a timestamp that no SYN of ours carried (RFC 7323 §3.2)."""
    options = seg.options
    if not c.timestamps or options is None or options.ts_val is None or not options.ts_ecr:
        return False
    first = tsval(c, now if c.first_sent is None else c.first_sent)
    last = tsval(c, now if c.state is SYN_SENT else c._rtt_at)
    return (options.ts_ecr - first) & MASK > (last - first) & MASK


def _note_timestamp(c: Connection, seg: Segment, now: float) -> None:
    options = seg.options
    if (
        options is not None
        and options.ts_val is not None
        and not (c.rcv_wup - seg.seq) & HALF
        and not _paws(c, seg, now)
    ):
        c.ts_recent = options.ts_val


# --- The text ---------------------------------------------------------------------------------


def _take(c: Connection, seg: Segment, now: float) -> bool:
    """Take the segment's text; whether the peer's FIN is now in order."""
    data = seg.data
    fin = seg.flags & FIN != 0
    nxt = c.rcv_nxt
    offset = (seg.seq - nxt) & MASK
    if offset or c._out_of_order:
        fin = _take_out_of_order(c, seg.seq, data, fin)
        if data and c.rcv_nxt != nxt:
            _hear_text(c, seg, now)
        return fin
    if data:
        room = (c.rcv_adv - nxt) & MASK
        if len(data) > room and not c.profile.parameters.linux_checks:
            data = data[:room]
            fin = False
            c._ack_due = 2
        _accept(c, data)
        _hear_text(c, seg, now)
    if fin:
        c.rcv_nxt = (c.rcv_nxt + 1) & MASK
    return fin


def _take_out_of_order(c: Connection, seq: int, data: bytes, fin: bool) -> bool:
    """Text left of RCV.NXT is trimmed; text to the right waits for what is missing."""
    nxt = c.rcv_nxt
    offset = (seq - nxt) & MASK
    room = (c.rcv_adv - nxt) & MASK
    if offset & HALF:
        past = MASK + 1 - offset
        tell_repeated(c, seq, (seq + len(data) + fin) & MASK)
        if past > len(data) or (past == len(data) and not fin):
            c._ack_due = 2
            quicken(c)  # all of it was here before
            return False
        seq, data, offset = nxt, data[past:], 0
    if offset or (c._out_of_order and not fin):  # tcp_fin empties the queue
        c._ack_due = 2
    if offset and offset >= room:
        return False  # a FIN at the edge too
    if offset + len(data) > room:
        c._ack_due = 2
        if offset >= room:
            return False
        if not c.profile.parameters.linux_checks:  # which takes what it takes whole
            data, fin = data[: room - offset], False
    if offset and c.sack:
        _note_block(c, seq, (seq + len(data) + fin) & MASK)
    waiting = {*c._out_of_order, (seq, data, fin)}
    if offset and c.profile.parameters.linux_checks:
        waiting = _uncovered(c, seq, data, fin)
    arrived = seq
    pieces = sorted(waiting, key=lambda piece: ((piece[0] - nxt) & MASK, -len(piece[1])))
    while pieces:
        seq, data, fin = pieces[0]
        past = (c.rcv_nxt - seq) & MASK
        if past & HALF:
            break
        del pieces[0]
        if past <= len(data):
            if past < len(data):
                _accept(c, data[past:])
            if fin:
                c._out_of_order = ()
                linux = c.profile.parameters.linux_checks
                if not linux or c.state not in _ACKS_FIN:
                    c._sacking = None
                c.rcv_nxt = (c.rcv_nxt + 1) & MASK
                c._fin_apart = linux and not data and seq != arrived
                return True
    c._out_of_order = tuple(pieces)
    if c._sacking is not None:
        # tcp_sack_remove: what is in order now needs no telling, unless it came twice.
        blocks, repeated = c._sacking
        left = blocks[:repeated] + tuple(
            block for block in blocks[repeated:] if pieces and (c.rcv_nxt - block[0]) & HALF
        )
        c._sacking = (left, repeated) if left else None
    return False


def _uncovered(c: Connection, seq: int, data: bytes, fin: bool) -> set[tuple[int, bytes, bool]]:
    """What waits, with a segment that came early (tcp_data_queue_ofo).

    Of two of which one has all the numbers of the other that one stays, the first of two alike.
    So a FIN is lost under text that reaches beyond it.
    """

    def span(piece: tuple[int, bytes, bool]) -> tuple[int, int]:
        start = (piece[0] - c.rcv_nxt) & MASK
        return start, start + len(piece[1]) + piece[2]

    left, right = span((seq, data, fin))
    spans = {piece: span(piece) for piece in c._out_of_order}
    if any(start <= left and right <= end for start, end in spans.values()):
        return {*spans}
    kept = {piece for piece, (start, end) in spans.items() if start < left or right < end}
    return {*kept, (seq, data, fin)}


def _note_block(c: Connection, left: int, right: int) -> None:
    """Text out of order: its block comes first, with those it touches (RFC 2018 §4)."""
    blocks, repeated = c._sacking or ((), False)
    if c.profile.parameters.linux_checks:
        for seq, data, fin in c._out_of_order:
            # tcp_data_queue_ofo: what waits already came twice (RFC 2883 §4.2).
            end = (seq + len(data) + fin) & MASK
            if (left - end) & HALF and (seq - right) & HALF:
                first = left if (seq - left) & HALF else seq
                last = right if (right - end) & HALF else end
                blocks, repeated = ((first, last), *blocks[repeated:]), True
                break
    apart = []
    for block in blocks[repeated:]:
        if (right - block[0]) & HALF or (block[1] - left) & HALF:
            apart.append(block)
            continue
        left = block[0] if (block[0] - left) & HALF else left
        right = block[1] if (right - block[1]) & HALF else right
    c._sacking = ((*blocks[:repeated], (left, right), *apart[:3]), repeated)


def _accept(c: Connection, data: bytes) -> None:
    """Text in order: into the receive buffer."""
    c.rcv_nxt = (c.rcv_nxt + len(data)) & MASK
    if not c.orphaned:
        c._rx = c._rx + data if c._rx else data


def _hear_text(c: Connection, seg: Segment, now: float) -> None:
    """A segment with text in order is to be acknowledged: when (tcp_event_data_recv)."""
    parameters = c.profile.parameters
    if not c._ack_due:
        c._ack_due = 1
    n = len(seg.data)
    if n < 484 and seg.flags & PSH and n < c._rcv_mss and parameters.linux_checks:
        c._last_size = 0  # as most often
        c._pushed = 2 if c._pushed else 1
    else:
        _measure(c, seg, n)
    usual, elapsed = parameters.delayed_ack, now - c._last_text
    if c._ato == 0.0:
        # The first text starts the delayed-ACK engine, quickly.
        c._ato = usual
        quicken(c, stay_interactive=True)
    elif elapsed <= usual / 2:
        c._ato = (c._ato + usual) / 2
    elif elapsed < c._ato:
        if parameters.linux_checks:
            c._ato = min(c._ato / 2 + elapsed, c.rto)
    elif elapsed > c.rto:
        quicken(c, stay_interactive=True)
    c._last_text = c.heard = now


def _measure(c: Connection, seg: Segment, n: int) -> None:
    """How long the peer's segments are when they are full (tcp_measure_rcv_mss)."""
    if not c.profile.parameters.linux_checks:
        if n > c._rcv_mss:
            c._rcv_mss = min(n, c.mss)
        return
    last, c._last_size = c._last_size, 0
    if n >= c._rcv_mss:
        c._rcv_mss = min(n, c.adv_mss - 12 if c.timestamps else c.adv_mss)
        if seg.flags & PSH and not c._pushed:
            c._pushed = 1
        return
    header = 20 if seg.options is None else _header(seg.options)
    if n + header >= 556 or (n + header >= 108 and not seg.flags & (FIN | URG | SYN | PSH)):
        n += header - (32 if c.timestamps else 20)
        c._last_size = n
        if n == last:
            c._rcv_mss = n
            return
    c._pushed = 2 if c._pushed else 1


def _header(options: Options) -> int:
    """Octets of a header with these options, of a segment without SYN."""
    blocks = len(options.sack)
    return 20 + (12 if options.ts_val is not None else 0) + (4 + 8 * blocks if blocks else 0)


LOOKS: Final = {
    CLOSED: _in_closed,
    LISTEN: _in_closed,
    SYN_SENT: _in_syn_sent,
    SYN_RECEIVED: _in_syn_received,
    ESTABLISHED: _in_window,
    FIN_WAIT_1: _in_window,
    FIN_WAIT_2: _in_fin_wait_2,
    CLOSE_WAIT: _in_window,
    CLOSING: _in_window,
    LAST_ACK: _in_window,
    TIME_WAIT: _in_time_wait,
}

"""What follows from an event: the actions that rows of the table name.

Each is a function of the connection, what came with the event (the segment, or
the user's text), and now. `timewait.tcp.transitions.ACTIONS` explains them,
for the docs too; the few others here are what they are made of.
"""

from __future__ import annotations

import errno as errnos
from functools import cache
from math import inf
from typing import TYPE_CHECKING, Any, Final

from timewait.tcp import congestion
from timewait.tcp.profiles import linux_fin_wait_2
from timewait.tcp.segment import ACK, FIN, HALF, MASK, PSH, RST, SYN, Options, Segment
from timewait.tcp.states import (
    CLOSE_WAIT,
    ESTABLISHED,
    FIN_WAIT_2,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
)

if TYPE_CHECKING:
    from timewait.tcp.connection import Connection

# Most often there is nothing for them to do: then a row's actions go without them.
ONLY_IF: Final = {"send_text": "c._tx or c._fin == 1", "acknowledge": "c._ack_due"}

_NO_OPTIONS: Final = Options()
_GSO_MOST: Final = 65215  # octets that a piece of text may have (sk_dst_gso_max_size)
# What a class's call does, without its cost, which is half of what a segment costs.
_new: Final = object.__new__


@cache
def _syn_options(mss: int, scale: int | None, sack: bool) -> Options:
    return Options(mss, scale, sack)


# --- Opening ----------------------------------------------------------------------------------


def send_syn(c: Connection, _seg: None, now: float) -> None:
    c.snd_nxt = c._rtt_seq = (c.iss + 1) & MASK
    _start_retransmitting(c, now)
    give_up = now + c.profile.parameters.syn_give_up_after
    if give_up < c.t_user:
        c.t_user = give_up
    _emit_syn(c, SYN, now)


def _start_retransmitting(c: Connection, now: float) -> None:
    c.first_sent = now
    c.t_retransmit = now + c.rto
    c.t_probe = inf  # Linux has one timer for both
    if c._probed is False and c.sack and c.snd_una != c.iss:
        c.t_retransmit = now + min(c.rto, _until_probe(c))
    if c.options.user_timeout is None:
        return
    c.t_user = now + c.options.user_timeout
    if c.profile.parameters.linux_checks:
        # retransmits_timed_out asks once a retransmission was sent, and counts from it; from
        # the first SYN, though.
        c.t_user = max(c.t_user, c.t_retransmit) if c.snd_una == c.iss else inf


def _until_probe(c: Connection) -> float:
    """Two round trips, and where one segment is in flight the wait for a delayed ACK.

    (tcp_schedule_loss_probe; the timeout proper may be due before.)
    """
    return 1.0 if c.srtt is None else 2 * c.srtt + (0.002 if c._ends else 0.2)


def _emit_syn(c: Connection, flags: int, now: float) -> None:
    """Our SYN, or SYN,ACK: the window unscaled, all options offered or answered."""
    parameters = c.profile.parameters
    answer = flags & ACK
    c._rtt_at = now
    if parameters.linux_checks:
        # tcp_select_initial_window: whole segments.
        stamped = c.timestamps and (answer or c.ts_recent)  # a SYN that is, over a TIME_WAIT
        whole = c.adv_mss - 12 if stamped else c.adv_mss
        if c.rcv_buf > whole and (c.passive or not answer):
            c.rcv_buf -= c.rcv_buf % whole
    window = c.rcv_buf if c.rcv_buf < 0xFFFF else 0xFFFF
    c.rcv_adv = (c.rcv_nxt + window) & MASK
    if answer:
        c.rcv_wup = c.rcv_nxt
    sack = c.sack if answer else parameters.sack
    timestamps = c.timestamps
    if answer and not c.passive and parameters.linux_checks:
        # tcp_send_synack repeats the SYN of a simultaneous open, with all that it offered.
        sack, timestamps = parameters.sack, c.offers_timestamps
    if timestamps:
        options = _stamp(c, now)
        options.mss = c.adv_mss
        options.window_scale = c.offers_scale
        options.sack_permitted = sack
    else:
        options = _syn_options(c.adv_mss, c.offers_scale, sack)
    seg = _new(Segment)
    seg.seq = c.iss
    seg.ack = c.rcv_nxt if answer else 0
    seg.flags = flags
    seg.window = window
    seg.data = b""
    seg.options = options
    c.out.append(seg)


def tsval(c: Connection, now: float) -> int:
    return (int(now * 1000) + c.ts_offset) & MASK


def _stamp(c: Connection, now: float) -> Options:
    """The options of a segment with timestamps (RFC 7323 §3.2)."""
    options = _new(Options)
    options.mss = options.window_scale = None
    options.sack_permitted = False
    options.ts_val = tsval(c, now)
    options.ts_ecr = c.ts_recent
    options.sack = ()
    return options


def _note_syn(c: Connection, seg: Segment) -> None:
    """Take the peer's SYN: its numbers and options."""
    c.irs = c.snd_wl1 = irs = seg.seq
    c.rcv_nxt = c.rcv_wup = (irs + 1) & MASK
    c.snd_wnd = c.max_wnd = seg.window
    options = seg.options
    if options is None:
        options = _NO_OPTIONS
    parameters = c.profile.parameters
    theirs = options.mss or c.default_mss
    if theirs < c.mss:
        c.mss = max(theirs, parameters.least_mss)
    c.sack = options.sack_permitted and parameters.sack
    scale = options.window_scale
    if scale is None or c.offers_scale is None:
        c.snd_scale = c.rcv_scale = 0
        if c.passive or not parameters.linux_checks:
            c.offers_scale = None
    else:
        c.snd_scale = scale if scale < 14 else 14
        c.rcv_scale = c.offers_scale
    if not c.rcv_scale:
        c.exact_window = True
    if options.ts_val is None:
        c.timestamps = False
    elif c.timestamps:
        c.ts_recent = options.ts_val


def send_syn_ack(c: Connection, seg: Segment, now: float) -> None:
    _note_syn(c, seg)
    if (seg.data or seg.flags & FIN) and c.profile.parameters.syn_text:
        c._out_of_order = ((c.rcv_nxt, seg.data, seg.flags & FIN != 0),)
    c.snd_nxt = (c.iss + 1) & MASK
    if c.passive or not c.profile.parameters.linux_checks:
        # In a simultaneous open Linux goes on as its SYN began (tcp_rcv_synsent_state_process).
        c._rtt_seq = c.snd_nxt
        c.rto = c.profile.parameters.rto_initial
        c.retransmits = 0
        _start_retransmitting(c, now)
    _emit_syn(c, SYN | ACK, now)


def send_syn_ack_again(c: Connection, _seg: Segment, now: float) -> None:
    if _may_challenge(c, now):
        c._rtt_seq = None
        if c.profile.parameters.linux_checks:
            c.t_retransmit = now + c.rto  # tcp_check_req
        _emit_syn(c, SYN | ACK, now)


def synchronized(c: Connection, seg: Segment, now: float) -> None:
    """Note the peer's SYN and its acknowledgment of ours."""
    _note_syn(c, seg)
    window = c.rcv_buf if c.rcv_buf < 0xFFFF else 0xFFFF
    c.rcv_adv = (c.rcv_nxt + window) & MASK
    acknowledged(c, seg.ack, 1, 1, now, seg.options)
    expect_segments(c)


def expect_segments(c: Connection) -> None:
    """Guess how long the peer's segments will be (tcp_initialize_rcv_mss)."""
    window = (c.rcv_adv - c.rcv_nxt) & MASK
    small = c.max_wnd < 1072 or window < 1072 or c.mss < 548  # else it is 536, as it was
    if small and c.profile.parameters.linux_checks:
        c._rcv_mss = max(min(c.adv_mss, 536, window >> 1, _mss_cache(c)), 88)


def establish(c: Connection, seg: Segment, now: float) -> None:
    if c.retransmits <= 1:
        c._recover = None  # tcp_init_transfer: a SYN sent again once costs nothing
    c.retransmits = 0
    c._last_text = c.heard = now
    if c.passive:
        c.last_challenge = -inf
    if c.srtt is None:
        options = seg.options
        if c.timestamps and options is not None and options.ts_ecr:
            # An ACK of nothing completes a simultaneous open, and measures (tcp_synack_rtt_meas).
            c.srtt = ((tsval(c, now) - options.ts_ecr) & MASK) / 1000
            c.rttvar = c.srtt / 2
            _set_rto(c)
        else:
            c.rto = c.profile.parameters.rto_after_lost_syn
    if c.options.keepalive:
        c.t_keepalive = now + c.options.keepalive[0]


def return_to_listen(c: Connection, _seg: Segment, now: float) -> None:
    c.t_retransmit = c.t_user = inf
    c.snd_una = c.snd_nxt = c.iss
    c.rcv_nxt = c.irs = 0
    c._out_of_order = ()
    c.retransmits = 0


def reopen(c: Connection, _seg: Segment, now: float) -> None:
    """TIME_WAIT ends in a new incarnation, above every sequence number of the old."""
    c._renew()
    c.passive = True


# --- Text, and the FIN after it ---------------------------------------------------------------


def take_text(c: Connection, data: bytes, now: float) -> None:
    data = data[: max(0, c.snd_buf - len(c._tx))]
    have = len(c._tx)
    size = have + len(data)
    if c._cuts and c._cuts[-1][0] == _number_of(c, have):
        c._cuts = c._cuts[:-1]  # the end that was not pushed is none any more
    if (size > c.max_wnd >> 2 or size > 32_000) and c.profile.parameters.linux_checks:
        _cut(c, have, len(data))
    if c.options.more and c.profile.parameters.linux_checks:
        c._cuts += ((_number_of(c, size), False),)  # tcp_push
    c._tx += data


def _number_of(c: Connection, at: int) -> int:
    """The sequence number of what stands `at` so many octets in the queue."""
    return (c.snd_una + (c.snd_una == c.iss) + at) & MASK


def _cut(c: Connection, have: int, n: int) -> None:
    """Queue `n` octets behind those there are, in pieces that stay so (tcp_sendmsg_locked).

    A piece has room for half the largest window so far, in whole segments
    (tcp_xmit_size_goal); where it ends far from the last that was, it is pushed.
    """
    mss = _effective_mss(c)
    goal = _bound_to_half_window(c, _GSO_MOST)
    goal = max(goal - goal % mss, mss)
    base = c.snd_una + (c.snd_una == c.iss)
    last = ((c._cuts[-1][0] if c._cuts else c.snd_nxt) - base) & MASK
    ends = range(max(have, last + goal), have + n, goal)
    pushed = have
    for end in ends:
        far = end - pushed > c.max_wnd >> 1  # forced_push
        if far:
            pushed = end
        c._cuts += (((base + end) & MASK, far),)


def send_text(c: Connection, given: Any, now: float) -> None:
    """Send what may be sent: text, then the FIN. `given` is a segment, or the text of a SEND."""
    if c._fin == 2 or c.state is SYN_SENT or c.state is SYN_RECEIVED:
        return
    if c._recover is not None:
        return  # nothing new until what was retransmitted is acknowledged
    _send_new(c, now, MASK, given is None and c._fin == 1, type(given) is bytes)


def _send_new(
    c: Connection, now: float, most: int, hurry: bool = False, queued: bool = False
) -> None:
    """Up to `most` segments of what was not sent yet (tcp_write_xmit).

    In a `hurry` at a FIN; what was `queued` just now goes piece by piece.
    """
    sent = (c.snd_nxt - c.snd_una - (c.snd_una == c.iss)) & MASK
    tx = c._tx
    mss = _effective_mss(c) if tx else 1
    end = c.snd_una + c.snd_wnd
    left = len(tx) - sent
    linux = c.profile.parameters.linux_checks
    first = c.snd_nxt
    oldest = c._rtt_at  # when that was sent, if a probe has been since
    flow = c._flow
    counted = flow is not False and (
        left > 5 * mss or ((left or c._fin == 1) and (flow is not None or sent > 0))
    )
    held = False
    if counted:
        most = min(most, congestion.room(c, now))
    while most > 0:
        usable = (end - c.snd_nxt) & MASK
        if usable & HALF:
            usable = 0
        n, push = left, True
        if c._cuts:
            n, push = _first_piece(c, left, 0 if queued else 2 * mss)
        whole = n
        last = n == left
        fin = c._fin == 1 and last
        if not (n or fin):
            break
        if n <= mss:
            if n + fin > usable:
                if not fin or usable < n or not n or linux:
                    break
                fin = False  # room for the text only: tcp_snd_wnd_test looks at the whole
            if n < mss and last and not (fin or c._recover) and _held_back(c):
                break
        elif mss > usable:
            break
        elif not linux:
            n = mss
        elif counted and most * mss < n and most * mss <= usable:
            n = congestion.burst(c, now, mss, most) * mss
            held = n < most * mss
            most = n // mss
            if not n:
                break
        else:
            n = min(n, usable, most * mss)  # tcp_mss_split_point
            if n % mss and not (hurry or c._recover) and _held_back(c):
                n -= n % mss
        fin = fin and n == left
        push = (push and n == whole) or (linux and n > mss)  # __tcp_transmit_skb
        if c._cuts and n == whole:
            c._cuts = c._cuts[1:]
        if n and now - c._last_text < c._ato:
            c._pingpong = True
        if c._rtt_seq is None and c._recover is None:
            c._rtt_seq, c._rtt_at = (c.snd_nxt + min(n, mss) + (fin and n <= mss)) & MASK, now
        while True:
            size = n if n < mss else mss
            n -= size
            seq = c.snd_nxt
            if linux and seq != c.snd_una:
                c._ends += ((seq, now),)
            c.snd_nxt = (seq + size + (fin and not n)) & MASK
            if size < mss:
                c._small = c.snd_nxt
            if c.t_retransmit == inf:
                _start_retransmitting(c, now)
            flags = ACK
            if not n:
                flags = ACK | (FIN if fin else 0) | (PSH if push and size else 0)
            emit(c, flags, now, seq, tx[sent : sent + size])
            sent += size
            left -= size
            most -= 1
            if not n:
                break
        if fin:
            c._fin = 2
            break
    if c._cuts and queued:
        _first_piece(c, left, 2 * mss)
    if counted:
        congestion.sent(c, now, c.snd_nxt != first, held)
    if c._ends and c.snd_nxt != first and c.srtt is not None and c._probed is False and c.sack:
        # tcp_schedule_loss_probe: anew from each that is sent, but by the timeout of the oldest.
        due = c.t_retransmit if c._rtt_seq is None else c._rtt_at + c.rto
        c.t_retransmit = min(due if due > now else inf, now + _until_probe(c))
    elif c._probed and c._ends and c.snd_nxt != first and c._recover is None:
        # There is no second probe: the timeout of the oldest follows (tcp_rearm_rto).
        due = oldest + c.rto
        c.t_retransmit = due if due > now else now + _until_probe(c)
    if (left or c._fin == 1) and c.snd_una == c.snd_nxt and c.t_probe == inf:
        c.t_probe = now + _probe_base(c)


def _first_piece(c: Connection, left: int, most: int) -> tuple[int, bool]:
    """How long the first of `left` unsent octets' pieces is, and whether it is pushed.

    Where that is less than `most` it takes from the next (tcp_grow_skb, with
    `tcp_min_tso_segs`).
    """
    if not c._cuts:
        return left, True
    (cut, push), *others = c._cuts
    n = (cut - c.snd_nxt) & MASK
    if n < most and n < left:
        end, pushed = others[0] if others else ((c.snd_nxt + left) & MASK, True)
        end = (end - c.snd_nxt) & MASK
        if most < end:
            n = most
        else:
            n, push, others = end, push or pushed, others[1:]
            if end == left:
                c._cuts = ()
                return left, push
        c._cuts = (((c.snd_nxt + n) & MASK, push), *others)
    return n, push


def _go_past(c: Connection, n: int) -> None:
    c.snd_nxt = (c.snd_nxt + n) & MASK
    if c._cuts and c._cuts[0][0] == c.snd_nxt:
        c._cuts = c._cuts[1:]


def _effective_mss(c: Connection) -> int:
    """The text a segment may carry: less its options, and at most half the peer's window."""
    mss = _mss_cache(c)
    if c._sacking is not None:
        mss -= 4 + 8 * min(len(c._sacking[0]), 3 if c.timestamps else 4)
    return mss if mss > 0 else 1


def _mss_cache(c: Connection) -> int:
    """What segments usually carry (tcp_sync_mss)."""
    mss = c.mss - 12 if c.timestamps else c.mss
    return mss if 2 * mss <= c.max_wnd else _bound_to_half_window(c, mss)


def _bound_to_half_window(c: Connection, size: int) -> int:
    """At most half the peer's largest window; a small one may be filled (tcp_bound_to_half_wnd)."""
    most = c.max_wnd >> 1 if c.max_wnd > 536 else c.max_wnd
    return size if size <= most or not most else max(most, 36 if c.timestamps else 48)


def _held_back(c: Connection) -> bool:
    """Whether a small segment waits: RFC 9293 §3.7.4; on Linux only for one that was small too."""
    options = c.options
    if options.cork:
        return True
    if options.nodelay or c.snd_una == c.snd_nxt:
        return False
    if c.profile.parameters.linux_checks:
        return (c.snd_una - c._small) & HALF != 0
    return True


def queue_fin(c: Connection, _seg: None, now: float) -> None:
    seq = c.snd_nxt
    if c._tx or (seq - c.snd_una) & MASK >= c.snd_wnd or c._recover is not None:
        c._fin = 1
        send_text(c, None, now)
        return
    c._fin = 2
    if c._rtt_seq is None and (
        c._backoff
        or c.srtt is None
        or c.options.linger2
        or (c.profile.parameters.fin_wait_2 or 60.0) < 60.0
    ):
        # Little that follows would use a round trip, but that it ends the backoff, and that an
        # orphan's FIN_WAIT_2 takes 3.5 timeouts at least.
        c._rtt_seq, c._rtt_at = (seq + 1) & MASK, now
    if seq != c.snd_una and c.profile.parameters.linux_checks:
        c._ends += ((seq, now),)
    c.snd_nxt = (seq + 1) & MASK
    if c.t_retransmit == inf:
        _start_retransmitting(c, now)
    elif c.snd_una == c.iss and c.sack and c._probed is False:
        # tcp_schedule_loss_probe: the timeout counts from the SYN,ACK.
        after = _until_probe(c)
        left = c._rtt_at + c.rto - now
        c.t_retransmit = now + (min(after, left) if left > 0 else after)
    emit(c, ACK | FIN, now, seq)


def give_text(c: Connection, data: bytes, now: float) -> None:
    """Text was read: send the ACK that waited for it, or one that opens a window worth telling.

    Not that after SHUT_RD (`__tcp_cleanup_rbuf`): nothing more is wanted.
    """
    if c._ack_due and (
        (c.rcv_nxt - c.rcv_wup) & MASK > c._rcv_mss
        or (
            data
            and c._pushed > c._pingpong
            and not (c._rx or c._out_of_order or (c.fin_received and not c._eof_read))
        )
    ):
        emit(c, ACK, now)
        return
    if c.fin_received or c.read_shut:
        return
    told = (c.rcv_adv - c.rcv_nxt) & MASK
    space = c.rcv_buf - len(c._rx)
    if not c.profile.parameters.linux_checks:
        worth = space - told >= min(c.rcv_buf // 2, 2 * c.mss)
    elif 2 * told > c.rcv_buf:
        return
    else:  # twice as much, and not so little that __tcp_select_window calls it none
        worth = space >= max(2 * told, c.rcv_buf >> 4, c._rcv_mss)
    if worth:
        emit(c, ACK, now)


def orphan(c: Connection, _seg: None, now: float) -> None:
    c.orphaned = c.write_shut = True
    c._eof_read = c.fin_received
    c._rx = b""
    if c.state is FIN_WAIT_2:
        start_fin_wait_2(c, None, now)


# --- Acknowledgments --------------------------------------------------------------------------


def send_ack(c: Connection, _seg: Any, now: float) -> None:
    emit(c, ACK, now)


def acknowledge(c: Connection, seg: Segment, now: float) -> None:
    due = c._ack_due
    delay = c.profile.parameters.delayed_ack
    if (
        due == 2
        or not delay
        or (c._quick and not c._pingpong)
        or (c.rcv_nxt - c.rcv_wup) & MASK > c._rcv_mss
    ):
        emit(c, ACK, now)
    elif c.t_ack == inf and c._ato == delay:
        c.t_ack = now + delay  # most often
    else:
        _delay_ack(c, now)


def _delay_ack(c: Connection, now: float) -> None:
    """Acknowledge later (tcp_send_delayed_ack): by a round trip where that is more than usual."""
    parameters = c.profile.parameters
    usual, tick = parameters.delayed_ack, parameters.first_ack_delay
    ato = c._ato or tick
    if ato > usual:
        most = inf if c.srtt is None else max(c.srtt, usual)
        ato = min(ato, most, parameters.rto_min - tick)
    if tick and c.t_ack <= now + ato / 4:
        emit(c, ACK, now)
    elif now + ato < c.t_ack:
        c.t_ack = now + ato


def quick_ack(c: Connection, value: int, now: float) -> None:
    """TCP_QUICKACK (`__tcp_sock_set_quickack`): an ACK that waits goes if nothing is to be read."""
    c._pingpong = not value
    if value and c._ack_due and (c.state is ESTABLISHED or c.state is CLOSE_WAIT):
        c._pushed = c._pushed or 1
        give_text(c, b"as if read", now)
        c._pingpong = not value & 1


def acknowledge_fin(c: Connection, seg: Segment, now: float) -> None:
    if c.rcv_wup == c.rcv_nxt:
        return  # text of ours has carried it
    if not c.profile.parameters.first_ack_delay or c._ack_due == 2:
        emit(c, ACK, now)
        return
    c._pingpong = True
    c._ack_due = 1
    if (c.rcv_nxt - c.rcv_wup) & MASK > c._rcv_mss:
        emit(c, ACK, now)
    else:
        _delay_ack(c, now)


def quicken(c: Connection, *, stay_interactive: bool = False) -> None:
    """Acknowledge the next few segments at once (tcp_enter_quickack_mode)."""
    most = c.profile.parameters.quick_acks
    window = (c.rcv_adv - c.rcv_wup) & MASK
    quick = min(window // (2 * c._rcv_mss) or 2, most)
    if quick > c._quick:
        c._quick = quick
    if not stay_interactive:
        c._pingpong = False
        c._ato = c.profile.parameters.delayed_ack


def ack_unacceptable(c: Connection, seg: Segment, now: float) -> None:
    # Text without a SYN is no part of a loop of ACKs: no limit (tcp_oow_rate_limited).
    text = (seg.data or seg.flags & FIN) and not seg.flags & SYN
    if text or c._ack_due == 2:
        if text and seg.seq != c.rcv_nxt and c.state is not TIME_WAIT:
            quicken(c)
            tell_repeated(c, seg.seq, (seg.seq + seg.length) & MASK)
        emit(c, ACK, now)
    elif not c.profile.parameters.linux_checks or _may_challenge(c, now):
        emit(c, ACK, now)


def tell_repeated(c: Connection, left: int, right: int) -> None:
    """Text left of RCV.NXT came again: let the next segment say so (tcp_dsack_set)."""
    if not c.sack or not c.profile.parameters.linux_checks or not (left - c.rcv_nxt) & HALF:
        return
    if (c.rcv_nxt - right) & HALF:
        right = c.rcv_nxt
    blocks, repeated = c._sacking or ((), False)
    c._sacking = (((left, right), *blocks[repeated:]), True)


def challenge_ack(c: Connection, seg: Segment, now: float) -> None:
    if _may_challenge(c, now):
        emit(c, ACK, now)


def _may_challenge(c: Connection, now: float) -> bool:
    parameters = c.profile.parameters
    if now - c.last_challenge >= parameters.challenge_interval:
        c.last_challenge = now
        c.challenges = 0
    if c.challenges >= parameters.challenge_most:
        return False
    c.challenges += 1
    return True


# --- Resets, and the end ----------------------------------------------------------------------


def reset_reply(c: Connection, seg: Segment, now: float) -> None:
    if seg.flags & ACK:
        c.out.append(Segment(seg.ack, 0, RST))
    else:
        c.out.append(Segment(0, (seg.seq + seg.length) & MASK, RST | ACK))


def send_rst(c: Connection, _seg: None, now: float) -> None:
    emit(c, RST | ACK, now)


def deliver_eof(c: Connection, _seg: Segment, now: float) -> None:
    c.fin_received = True


def forget(c: Connection, _seg: Any, now: float) -> None:
    c.t_retransmit = c.t_ack = c.t_probe = inf
    c.t_keepalive = c.t_wait = c.t_user = inf
    c._tx = b""
    c._cuts = ()
    c._fin = 0
    c._out_of_order = ()
    c._sacking = None
    c.write_shut = True


def report_refused(c: Connection, _seg: Segment, now: float) -> None:
    c.error = errnos.ECONNREFUSED


def report_reset(c: Connection, _seg: Segment, now: float) -> None:
    c.error = errnos.ECONNRESET


def report_pipe(c: Connection, _seg: Segment, now: float) -> None:
    c.error = errnos.EPIPE


def report_timeout(c: Connection, _seg: None, now: float) -> None:
    c.error = errnos.ETIMEDOUT


# --- Waiting ----------------------------------------------------------------------------------


def start_time_wait(c: Connection, _seg: Any, now: float) -> None:
    c.t_retransmit = c.t_ack = c.t_probe = c.t_keepalive = c.t_user = inf
    if c.t_wait == inf:
        c.last_challenge = -inf  # a new small socket; an orphan's FIN_WAIT_2 was one already
    c.t_wait = now + c.profile.parameters.time_wait


def restart_time_wait(c: Connection, _seg: Segment, now: float) -> None:
    c.t_wait = now + c.profile.parameters.time_wait


def start_fin_wait_2(c: Connection, seg: Any, now: float) -> None:
    parameters = c.profile.parameters
    limit = parameters.fin_wait_2
    if not c.orphaned or limit is None:
        return
    if not parameters.small_sockets:
        c.t_wait = now + (c.options.linger2 or limit)
        return
    whole, small = _small_after(c, limit)
    if not whole and seg is not None and seg.flags & FIN:
        whole = max(small, 3.5 * c.rto)  # even an old FIN would be lost to a small socket
    if whole:
        c.t_keepalive = now + whole
        return
    _shrink(c, small, now)
    c._ack_due = 0  # what came with the ACK is not looked at


def shrink_or_ask(c: Connection, _seg: None, now: float) -> None:
    limit = c.profile.parameters.fin_wait_2
    if not c.orphaned or limit is None:
        ask(c, None, now)
        return
    whole, small = _small_after(c, limit)
    if whole:
        _shrink(c, small, now)
    else:
        c.abort(now)  # tcp_keepalive_timer


def _small_after(c: Connection, limit: float) -> tuple[float, float]:
    if c.options.linger2:
        return linux_fin_wait_2(c.options.linger2)
    whole = c.profile.parameters.fin_wait_2_whole
    return whole, limit - whole


def _shrink(c: Connection, limit: float, now: float) -> None:
    """An orphan becomes a small socket (tcp_time_wait), which knows only sequence numbers."""
    c.t_keepalive = inf
    c.last_challenge = -inf
    c.t_wait = now + max(limit, 3.5 * c.rto)


# --- Retransmission ---------------------------------------------------------------------------


def retransmit(c: Connection, _seg: None, now: float) -> None:
    """The retransmission timer fired: the oldest again, twice the timeout (RFC 6298 §5)."""
    if (
        c._probed is False
        and c.sack
        and c._recover is None
        and (c.snd_una != c.iss or (c._fin == 2 and not c.retransmits))
    ):
        _probe_tail(c, now)
        return
    if c._probed:
        c._probed = False
    parameters = c.profile.parameters
    c.retransmits += 1
    c._rtt_seq = None
    if parameters.linux_checks and not c.passive and c.snd_una == c.iss:
        if c._fin == 2 and c._recover is None:
            c.first_sent = now
        c._recover = c.snd_nxt  # a FIN behind it waits (tcp_enter_loss)
    if c.state is SYN_SENT:
        _emit_syn(c, SYN, now)
        if c.t_user == inf and c.options.user_timeout is not None and c.first_sent is not None:
            c.t_user = max(now, c.first_sent + c.options.user_timeout)
        if c.retransmits <= parameters.syn_linear:
            c.t_retransmit = now + c.rto
            return
    elif c.snd_una == c.iss:
        _emit_syn(c, SYN | ACK, now)
    else:
        c._frto = c._recover is None
        if c._frto and parameters.linux_checks:
            c.first_sent = now  # retransmits_timed_out counts from the first retransmission
        c._recover = c.snd_nxt
        c._flow = False
        _send_oldest(c, now)
        if c.t_user == inf and c.options.user_timeout is not None:
            since = now if c.first_sent is None else c.first_sent
            c.t_user = max(now, since + c.options.user_timeout)
    most = parameters.rto_max
    if c.state is SYN_RECEIVED and c.passive:
        most = parameters.synack_rto_max
    if c.rto < most:
        c._backoff += 1
        c.rto = min(2 * c.rto, most)
    c.t_retransmit = now + c.rto


def _probe_tail(c: Connection, now: float) -> None:
    """Something new, else the last segment again; the timeout proper follows (RFC 8985 §7)."""
    mss = _effective_mss(c)
    syn = c.snd_una == c.iss
    text = (c.snd_nxt - c.snd_una - (c._fin == 2) - syn) & MASK
    n = min(_first_piece(c, len(c._tx) - text, mss)[0], mss)
    fin = c._fin == 1 and n == len(c._tx) - text
    new = 0 < n + fin <= c.snd_wnd - text
    if new:
        seq = c.snd_nxt
        c._ends += ((seq, now),)
        _go_past(c, n)
        if n < mss:
            c._small = c.snd_nxt
        flags = ACK | (PSH if n else 0)
        if fin:
            flags |= FIN
            c._fin = 2
            c.snd_nxt = (c.snd_nxt + 1) & MASK
        emit(c, flags, now, seq, c._tx[text : text + n])
    else:
        c._flow = False  # what is acknowledged then may have been lost (tcp_process_tlp_ack)
        c._rtt_seq = None
        start = (c._ends[-1][0] - c.snd_una - syn) & MASK if c._ends else 0
        emit(
            c,
            ACK | (FIN if c._fin == 2 else 0) | (PSH if text > start else 0),
            now,
            (c.snd_una + start + syn) & MASK,
            c._tx[start:text],
        )
    c._probed = (c.snd_nxt, not new)
    c.t_retransmit = now + c.rto


def probe_repeated(c: Connection) -> None:
    """An ACK came twice: the probe came too, and nothing was lost (tcp_process_tlp_ack)."""
    if c._probed and c._probed[0] == c.snd_una:
        c._probed = False


def _send_oldest(c: Connection, now: float) -> None:
    """Retransmit one segment from SND.UNA, the FIN with it where it fits.

    On Linux those that fit into one together become one (tcp_retrans_try_collapse), but
    nothing joins a full one, not even a FIN that was sent behind it.
    """
    text = (c.snd_nxt - c.snd_una - (c._fin == 2)) & MASK
    mss = _effective_mss(c)
    n = min(text, mss)
    full = False
    cut = c.profile.parameters.linux_checks and 0 < c.snd_wnd < n
    if cut:
        n = c.snd_wnd  # __tcp_retransmit_skb splits what no longer fits the window
        end = (c.snd_una + n) & MASK
        if not c._ends or (end - c._ends[0][0]) & HALF:
            c._ends = ((end, now), *c._ends)
    elif c._ends:
        fit = [end for end, _ in c._ends if (end - c.snd_una) & MASK <= n]
        if (c._ends[0][0] - c.snd_una) & MASK == mss:
            full = True
        elif n == text:
            c._ends = ()
        elif fit:
            c._ends = c._ends[len(fit) - 1 :]
            n = (fit[-1] - c.snd_una) & MASK
    last = n == text
    flags = (
        ACK
        | (FIN if last and c._fin == 2 and not full else 0)
        | (PSH if n and (last or n < mss) and not cut else 0)
    )
    emit(c, flags, now, c.snd_una, c._tx[:n])


def acknowledged(
    c: Connection, ack: int, acked: int, flight: int, now: float, options: Options | None = None
) -> None:
    """`acked` of `flight` octets are acknowledged: free them, measure, retime.

    `options` are those of the segment that says so. Linux measures and retimes
    only where a whole segment is acknowledged (tcp_clean_rtx_queue).
    """
    if c._tx:
        text = acked - (c.snd_una == c.iss)
        c._tx = c._tx[text:]  # a FIN, the last, is past its end
    c.snd_una = ack
    oldest = None  # when what is now the oldest in flight was sent
    if acked == flight:
        if c._flow:
            congestion.acknowledged(c, len(c._ends) + 1, now)
        c._ends = ()
    elif c.profile.parameters.linux_checks:
        whole = sum(not (ack - end) & HALF for end, _ in c._ends)
        if not whole:
            c.retransmits = 0
            return
        oldest = c._ends[whole - 1][1]
        if c._flow:
            congestion.acknowledged(c, whole, now)
        c._ends = c._ends[whole:]
    if c._rtt_seq is None and c.timestamps and c.profile.parameters.linux_checks:
        echo = options.ts_ecr if options is not None else None
        if echo:
            # What was sent again has no round trip of its own: its echo tells (RFC 7323 §4.3).
            c._rtt_seq, c._rtt_at = ack, now - ((tsval(c, now) - echo) & MASK) / 1000
    timed = c._rtt_seq
    if timed is not None:
        if ack == timed or not (ack - timed) & HALF:
            # A round trip was measured: RFC 6298 §2.
            c._rtt_seq = None
            rtt = now - c._rtt_at
            srtt = c.srtt
            if srtt is None:
                c.srtt = rtt
                c.rttvar = rtt / 2
            else:
                error = rtt - srtt
                c.srtt = srtt + error / 8
                c.rttvar += ((error if error > 0 else -error) - c.rttvar) / 4
            _set_rto(c)
    elif c.retransmits and c.srtt is not None and not c.profile.parameters.linux_checks:
        _set_rto(c)  # new data acknowledged ends the backoff; on Linux only a round trip does
    c.retransmits = 0
    if c._probed:
        # tcp_process_tlp_ack: of text sent again a later ACK, or a second one, tells.
        end, again = c._probed
        if not (ack - end) & HALF and (ack != end or not again):
            c._probed = False
    if acked == flight:
        c.first_sent = c._recover = None
        c.t_retransmit = c.t_user = inf
    else:
        since = c.first_sent
        _start_retransmitting(c, now)
        if c._recover is not None:
            if not (ack - c._recover) & HALF:
                c._recover = None
            else:
                if c.profile.parameters.linux_checks:
                    c.first_sent = since  # tp->retrans_stamp stays until the loss is made good
                if not (c._frto and _try_new(c, now)):
                    _send_oldest(c, now)
        if oldest is not None and c._recover is None and not (c._probed and c._probed[1]):
            # Whatever is acknowledged next, Linux measures by its oldest segment.
            c._rtt_seq, c._rtt_at = (c._ends[0][0] if c._ends else c.snd_nxt), oldest


def _try_new(c: Connection, now: float) -> bool:
    """Was the timeout needless? Linux sends something new first (RFC 5682 §2.1, 2b)."""
    c._frto = False
    before = c.snd_nxt
    if c._fin == 1 or (c._tx and not c._fin):
        _send_new(c, now, 2)
    return c.snd_nxt != before


def _set_rto(c: Connection) -> None:
    parameters = c.profile.parameters
    rto = 4 * c.rttvar
    if parameters.rto_floor_on_variance:
        if rto < parameters.rto_min:
            rto = parameters.rto_min
        rto += c.srtt or 0.0
    else:
        rto += c.srtt or 0.0
        if rto < parameters.rto_min:
            rto = parameters.rto_min
    c.rto = rto if rto < parameters.rto_max else parameters.rto_max
    c._backoff = 0


# --- Probes -----------------------------------------------------------------------------------


def probe(c: Connection, _seg: None, now: float) -> None:
    """A segment that must be answered: what fits the window, else one below it."""
    c.retransmits += 1
    if c.options.user_timeout is not None and c.t_user == inf:
        c.t_user = now + c.options.user_timeout  # icsk_probes_tstamp
    sent = (c.snd_nxt - c.snd_una) & MASK
    n = 0
    if c._tx:
        n = min(_first_piece(c, len(c._tx) - sent, 0)[0], c.snd_wnd, _effective_mss(c))
    if n > 0 and c.snd_una == c.snd_nxt:
        c.retransmits = c._backoff = 0
        seq = c.snd_nxt
        _go_past(c, n)
        _start_retransmitting(c, now)
        emit(c, ACK | PSH, now, seq, c._tx[sent : sent + n])
        return
    emit(c, ACK, now, (c.snd_una - 1) & MASK)
    if not probe_slowest(c):
        c._backoff += 1
    c.t_probe = now + _probe_after(c)


def _probe_after(c: Connection) -> float:
    """How long a probe waits (tcp_probe0_when): doubled apart from the retransmission timeout."""
    return min(_probe_base(c) * 2.0**c._backoff, c.profile.parameters.rto_max)


def _probe_base(c: Connection) -> float:
    """What it doubles (tcp_probe0_base): not less than TCP_RTO_MIN, whatever is set."""
    return max(c.rto, 0.2) if c.profile.parameters.linux_checks else c.rto


def probe_slowest(c: Connection) -> bool:
    """Whether probes cannot come more seldom than now."""
    return _probe_after(c) >= c.profile.parameters.rto_max


def probe_answered(c: Connection, now: float) -> None:
    """An ACK came while nothing was in flight: is what waits too much still (tcp_ack_probe)?"""
    c.retransmits = 0
    if len(c._tx) + (c._fin == 1) <= c.snd_wnd:
        c._backoff = 0
        c.t_probe = c.t_user = inf
    else:
        c.t_probe = now + _probe_after(c)


def ask(c: Connection, _seg: None, now: float) -> None:
    """Keep-alive (RFC 9293 §3.8.4): nothing was heard for long enough."""
    if c.options.keepalive:
        idle, interval, _ = c.options.keepalive
        if c.snd_una != c.snd_nxt or c._tx:
            c.t_keepalive = now + idle  # what is to be acknowledged asks by itself
        elif now < c.heard + idle:
            c.t_keepalive = c.heard + idle
        else:
            c.retransmits += 1
            emit(c, ACK, now, (c.snd_una - 1) & MASK)
            c.t_keepalive = now + interval


# --- A segment leaves -------------------------------------------------------------------------


def emit(c: Connection, flags: int, now: float, seq: int | None = None, data: bytes = b"") -> None:
    """Send a segment that carries the current acknowledgment and window."""
    nxt = c.rcv_nxt
    scale = c.rcv_scale
    # Where nothing waits to be read, all of the buffer is free.
    window = _window_to_tell(c, nxt, scale) if c._rx or c.exact_window else -(-c.rcv_buf >> scale)
    if window > 0xFFFF:
        window = 0xFFFF
    c.rcv_adv = (nxt + (window << scale)) & MASK
    if seq is None:
        seq = c.snd_nxt
        if seq != c.snd_una and (c.snd_una + c.snd_wnd - seq) & HALF:
            seq = _within_window(c)
    options = _stamp(c, now) if c.timestamps else None
    seg = _new(Segment)
    seg.seq = seq
    seg.ack = nxt
    seg.flags = flags
    seg.window = window
    seg.data = data
    seg.options = options if c._sacking is None else _with_sack(c, options)
    c.out.append(seg)
    c.rcv_wup = nxt
    c.t_ack = inf
    if c._ack_due:
        c._ack_due = c._pushed = 0
        if c._quick:
            c._quick -= 1
            if not c._quick:
                c._ato = c.profile.parameters.delayed_ack  # tcp_dec_quickack_mode


def _with_sack(c: Connection, options: Options | None) -> Options:
    """The options with the blocks that arrived out of order (RFC 2018 §4), as many as fit."""
    assert c._sacking is not None
    blocks, repeated = c._sacking
    options = Options() if options is None else options
    options.sack = blocks[: 3 if c.timestamps else 4]
    if c.fin_received:
        c._sacking = None
    elif repeated:
        blocks = blocks[1:]  # what came twice is told once (RFC 2883 §4)
        c._sacking = (blocks, False) if blocks else None
    return options


def _window_to_tell(c: Connection, nxt: int, scale: int) -> int:
    """The window field: what room there is, but never less than was told."""
    window = (c.rcv_adv - nxt) & MASK
    space = c.rcv_buf - len(c._rx)
    if window & HALF:
        window = 0
    if space > window:
        if scale or not c.profile.parameters.linux_checks:
            window = space
        elif space >= window + c._rcv_mss:
            # __tcp_select_window: an unscaled window grows by whole segments.
            window = space - space % c._rcv_mss
    return (window + (1 << scale) - 1) >> scale


def _within_window(c: Connection) -> int:
    """Where to send an ACK from when the peer's window has shrunk (tcp_acceptable_seq)."""
    beyond = (c.snd_nxt - c.snd_una - c.snd_wnd) & MASK
    if c.state is SYN_RECEIVED and c.passive:
        return c.snd_nxt  # there is no full socket yet (tcp_v4_reqsk_send_ack)
    if not c.profile.parameters.linux_checks or beyond < 1 << c.rcv_scale > 1:
        return c.snd_nxt
    return (c.snd_una + c.snd_wnd) & MASK

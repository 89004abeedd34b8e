"""The usual case, done at once: text between two connections of one host with nothing in the way.

Most of what a simulation does is to pass text over a loopback: both ends are
ESTABLISHED, nothing is in flight, nobody watches, and no ACK is due at once.
Then all that a segment would change is known, and is changed here without
making one (`pass_text`). It is `Connection`'s own work, in its own order, and
the tests hold the two against each other, variable by variable; whatever is
not this very case is refused, nothing having been touched, and goes the long
way.

Where two ends take turns at one instant, a question and its answer leave all
but the sequence numbers as the last did. A `Volley` therefore only counts, and
`settle` works out the variables when anybody looks at them.
"""

from __future__ import annotations

from typing import Final

from timewait.tcp.actions import acknowledged
from timewait.tcp.connection import Connection
from timewait.tcp.states import State

__all__ = ["Volley", "pass_text", "read_all"]

ESTABLISHED: Final = State.ESTABLISHED
MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
INF: Final = float("inf")
_SMALL: Final = 523  # bytes of a text by which no receiver measures the sender's segments


def pass_text(a: Connection, b: Connection, data: bytes, now: float, clean: bool = False) -> bool:
    """Have `a` send `data` and `b` receive it; False, and nothing done, if that is not simple.

    `clean` says that nothing but this function, in either direction, and
    `read_all` have touched the two since it last returned true: then what
    only others change need not be looked at.
    """
    n = len(data)
    if a._tx or not n:
        return False
    seq = a.snd_nxt
    ack = a.rcv_nxt
    flight = (ack - b.snd_una) & MASK
    mss = a.mss - 12 if a.timestamps else a.mss
    # With nothing in flight, no timer of a's runs but that of a delayed ACK or a probe.
    if not clean and (
        a.state is not ESTABLISHED
        or b.state is not ESTABLISHED
        or a is b
        or a.snd_una != seq
        or b.rcv_nxt != seq
        or b.snd_nxt != ack
        or len(b._tx) != flight
        or (a.max_wnd >> 1 if a.max_wnd > 536 else a.max_wnd) < mss
        or not a.rcv_scale
        or a.error is not None
        or a.t_probe != INF
        or a.t_keepalive != INF
        or a.options.user_timeout is not None
        or b.options.user_timeout is not None
        or a.options.cork
        or b.options.cork
        or a._flow
        or b._flow
        or b.read_shut
        or b._out_of_order
        or b.t_probe != INF
        or b.t_keepalive != INF
        or b.snd_una == b.iss
        # The same of the other direction, for the next time.
        or (b.max_wnd >> 1 if b.max_wnd > 536 else b.max_wnd) < b.mss
        or not b.rcv_scale
        or b.error is not None
        or a.read_shut
        or a._out_of_order
        or a.snd_una == a.iss
    ):
        return False
    if n > mss or n > a.snd_wnd or n > a.snd_buf or n > (b.rcv_adv - seq) & MASK:
        return False
    scale = a.rcv_scale
    # Whether the receiver would answer at once.
    unacknowledged = (seq + n - b.rcv_wup) & MASK
    parameters = b.profile.parameters
    header = 32 if b.timestamps else 20
    largest, pushed, last = b._rcv_mss, b._pushed, 0
    if not parameters.linux_checks:
        largest = largest if n <= largest else n if n < b.mss else b.mss
    elif n >= largest:
        largest = min(n, b.adv_mss + 20 - header)
        pushed = pushed or 1
    elif n + header >= 556 and n == b._last_size:
        largest = last = n
    else:
        last = n if n + header >= 556 else 0
        pushed = 2 if pushed else 1
    elapsed, usual = now - b._last_text, parameters.delayed_ack
    if (
        b._ack_due == 2
        or b._ato == 0.0
        or b._ato > usual
        or (b._quick and not b._pingpong)
        or unacknowledged > largest
        or (elapsed and (elapsed > parameters.rto_min or usual / 2 < elapsed < usual))
        or b.t_ack <= now + usual / 4
    ):
        return False
    if a.timestamps:
        stamp = (int(now * 1000) + a.ts_offset) & MASK
        if (stamp - b.ts_recent) & HALF:
            return False
        if not (b.rcv_wup - seq) & HALF:
            b.ts_recent = stamp

    # What a's segment does to a.
    after = (seq + n) & MASK
    a._tx = data
    a.snd_nxt = after
    if n < mss:
        a._small = after
    if a._rtt_seq is None:
        a._rtt_seq = after
        a._rtt_at = now
    a.first_sent = now
    a.t_retransmit = now + a.rto
    if now - a._last_text < a._ato:
        a._pingpong = True
    window = (a.rcv_adv - ack) & MASK
    space = a.rcv_buf - len(a._rx)
    if window & HALF:
        window = 0
    if space > window:
        window = space
    window = (window + (1 << scale) - 1) >> scale
    if window > 0xFFFF:
        window = 0xFFFF
    a.rcv_adv = (ack + (window << scale)) & MASK
    a.rcv_wup = ack
    a.t_ack = INF
    if a._ack_due:
        a._ack_due = a._pushed = 0
        if a._quick:
            a._quick -= 1
            if not a._quick:
                a._ato = a.profile.parameters.delayed_ack

    # And to b.
    if flight:
        if clean and b.srtt == 0.0 and b.rttvar == 0.0 and b._rtt_at == now and b._rtt_seq:
            # A round trip of no time, again: the estimate stays what it is.
            b._tx = b""
            b.snd_una = ack
            b._rtt_seq = b.first_sent = None
            b.t_retransmit = INF
        else:
            acknowledged(b, ack, flight, flight, now)
    b.snd_wl1 = seq
    b.snd_wnd = window = window << b.snd_scale
    if window > b.max_wnd:
        b.max_wnd = window
    b.rcv_nxt = after
    b._rx = b._rx + data if b._rx else data
    if not b._ack_due:
        b._ack_due = 1
    b._last_text = b.heard = now
    b._rcv_mss, b._pushed, b._last_size = largest, pushed, last
    if b.t_ack == INF:
        b.t_ack = now + b._ato
    return True


def read_all(c: Connection) -> bytes | None:
    """All that is readable; None, and nothing done, if reading it would tell the peer something."""
    if c.state is not ESTABLISHED:
        return None
    space = c.rcv_buf - ((c.rcv_adv - c.rcv_nxt) & MASK)
    if space >= c.rcv_buf >> 1 or space >= 2 * c.mss or (c._ack_due and c._pushed > c._pingpong):
        return None
    data, c._rx = c._rx, b""
    return data


class Volley:
    """Two connections that answer each other at one instant, each short text read before the next.

    While it lasts, `snd_nxt`, `rcv_nxt`, `_rx` and the `_tx` of who sent last
    are kept; all else of the two is out of date until `settle`.
    """

    __slots__ = ("limit", "now", "turn", "waits")

    now: float
    limit: int  # bytes of a text
    turn: Connection  # whose text is next
    waits: Connection

    @classmethod
    def begin(cls, a: Connection, b: Connection, now: float) -> Volley | None:
        """The volley that `b`'s answer to `a` has begun; None if the next could differ from it.

        `pass_text` has just passed both texts, and nothing has happened since.
        """
        for c in (a, b):
            if (
                c._last_text != now
                or not c._pingpong
                or c._quick
                or (c is b and c._rx)
                or c._ato != c.profile.parameters.delayed_ack
                or c._last_size
                or c.srtt != 0.0
                or c.rttvar != 0.0
                or (c.rcv_adv - c.rcv_wup) & MASK != _whole(c)
            ):
                return None
        a._tx = bytes((b.rcv_nxt - b.snd_wl1) & MASK)  # as long as what was acknowledged
        volley = cls()
        volley.now = now
        volley.turn = a
        volley.waits = b
        # Never the segment that fills a window or a maximum, nor one that must be acknowledged.
        volley.limit = min(
            min(c.mss - 13, c.snd_wnd, c.snd_buf, c._rcv_mss, (c.rcv_buf >> 1) - 1, _SMALL)
            for c in (a, b)
        )
        return volley

    def hit(self, sender: Connection | None, text: bytes) -> bool:
        """Pass `text` on; False, and nothing done, if that would be no part of the volley."""
        length = len(text)
        if sender is None or sender is not self.turn or sender._rx or not 0 < length <= self.limit:
            return False
        receiver = self.waits
        self.turn = receiver
        self.waits = sender
        sender._tx = receiver._rx = text
        sender.snd_nxt = receiver.rcv_nxt = (sender.snd_nxt + length) & MASK
        return True

    def settle(self) -> None:
        """Have all variables of both what they would be had each text gone by itself."""
        now = self.now
        a, b = self.turn, self.waits  # b has sent last, answering a
        asked = (a.snd_nxt - len(a._tx)) & MASK
        answered = (b.snd_nxt - len(b._tx)) & MASK
        for c in (a, b):
            c._small = c.snd_una = c.snd_nxt
        b.snd_una = answered
        a.snd_wl1, b.snd_wl1 = answered, asked
        a.rcv_wup, b.rcv_wup = answered, b.rcv_nxt
        for c in (a, b):
            c.rcv_adv = (c.rcv_wup + _whole(c)) & MASK
        a._tx = b""
        a._rtt_seq = a.first_sent = None
        a.t_retransmit = b.t_ack = INF
        a._ack_due, b._ack_due = 1, 0
        a._pushed, b._pushed = int(a.profile.parameters.linux_checks), 0
        a._last_size = b._last_size = 0
        a.t_ack = now + a._ato
        b._rtt_seq = b.snd_nxt
        b._rtt_at = b.first_sent = now
        b.t_retransmit = now + b.rto


def _whole(c: Connection) -> int:
    """The window that an empty receive buffer makes, in whole units of its scale."""
    return min(-(-c.rcv_buf >> c.rcv_scale), 0xFFFF) << c.rcv_scale

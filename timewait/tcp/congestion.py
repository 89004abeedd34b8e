"""How many segments may be in flight until something is lost: slow start, as Linux counts.

RFC 5681. Few connections send so much that it matters: `Connection._flow` is None while the window
is the first one (RFC 6928) and not half of it was ever in flight. It is False from when something
may have been lost, or where a profile knows no such window: then the peer's alone holds text back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from timewait.tcp.segment import HALF

if TYPE_CHECKING:
    from timewait.tcp.connection import Connection

__all__ = ["FIRST", "Flow", "acknowledged", "burst", "room", "sent"]

FIRST: Final = 10  # TCP_INIT_CWND
_RECENT = _SOON = 0.001  # seconds
_AT_ONCE: Final = 65536  # octets, if a round trip takes no time; half for each 512 µs of it


class Flow(NamedTuple):
    """The variables of congestion control, in segments.

    `limited` says that the window held something back when it was last looked at, in the round
    that ends at the sequence number `until`, and `most` how many segments were in flight in that.
    `used` are the most that were in flight since `since`, if it holds nothing back; `last` is when
    something was sent.
    """

    cwnd: int = FIRST
    limited: bool = False
    most: int = 0
    until: int = 0
    used: int = 0
    since: float = 0.0
    last: float = 0.0

    @property
    def holds_back(self) -> bool:
        """Whether it is the window that keeps more from being sent (tcp_is_cwnd_limited)."""
        return self.limited or self.cwnd < 2 * self.most


def room(c: Connection, now: float) -> int:
    """How many segments may be sent now."""
    flow = c._flow
    if c.snd_nxt != c.snd_una:
        return (flow.cwnd if flow else FIRST) - len(c._ends) - 1
    if not flow:
        return FIRST
    idle = now - flow.last
    if idle > c.rto and c.profile.parameters.slow_start_after_idle:
        # tcp_cwnd_restart: half of it for each timeout of silence, but never less than the first.
        cwnd = flow.cwnd
        while (idle := idle - c.rto) > 0 and cwnd > FIRST:
            cwnd >>= 1
        c._flow = flow = flow._replace(cwnd=max(cwnd, FIRST), since=now, used=0)
    return flow.cwnd


def burst(c: Connection, now: float, mss: int, most: int) -> int:
    """How many of `most` segments go at once, the next being of more than these.

    They go by twos, or more where a round trip is short (tcp_tso_autosize). What is left of the
    room waits for the next ACK if that is expected soon, as it is from a round trip after the
    oldest was sent on (tcp_tso_should_defer, since 6.18).
    """
    srtt = c.srtt or 0.0
    rest = most % max((_AT_ONCE >> min(int(srtt * 1e6) >> 9, 31)) // mss, 2)
    if not rest or c.snd_nxt == c.snd_una:
        return most
    last = c._ends[-1][1] if c._ends else c._rtt_at
    window = min(c.snd_wnd, (c._flow.cwnd if c._flow else FIRST) * mss)
    if (
        (rest == most and now - last > _RECENT)
        or rest * mss >= window // 3
        or now - c._rtt_at < srtt - min(srtt / 2, _SOON)
    ):
        return most
    return most - rest


def sent(c: Connection, now: float, any_was: bool, held: bool) -> None:
    """Note what is in flight after all was sent that may be, if `any_was` (tcp_cwnd_validate).

    `held` says that some of it waits, though there was room.
    """
    flow = c._flow or Flow()
    out = 0 if c.snd_nxt == c.snd_una else len(c._ends) + 1
    held = held or out >= flow.cwnd
    if not (any_was or held) or (c._flow is None and 2 * out <= FIRST):
        return
    if held or not (c.snd_una - flow.until) & HALF or (not flow.limited and out > flow.most):
        flow = flow._replace(limited=held, most=out, until=c.snd_nxt)
    if flow.holds_back:
        flow = flow._replace(used=0, since=now)
    else:
        flow = flow._replace(used=max(flow.used, out))
        if now - flow.since >= c.rto and c.profile.parameters.slow_start_after_idle:
            # tcp_cwnd_application_limited
            used = min(max(flow.used, FIRST), flow.cwnd)
            flow = flow._replace(cwnd=(flow.cwnd + used) >> 1, used=0, since=now)
    c._flow = flow._replace(last=now) if any_was else flow


def acknowledged(c: Connection, n: int, now: float) -> None:
    """So many segments were acknowledged: the window grows by them if it held others back."""
    flow = c._flow
    if flow:
        c._flow = flow._replace(cwnd=flow.cwnd + n * flow.holds_back, since=now)

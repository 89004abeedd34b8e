"""RFC 7323 and RFC 6191 read line by line: PAWS at its edges, and TIME_WAIT opened anew."""

from __future__ import annotations

import pytest

from timewait.tcp.connection import Connection
from timewait.tcp.profiles import profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Options, Segment
from timewait.tcp.states import State

DAY = 86400.0
WINDOW = 500


def established(name: str, recent: int | None) -> Connection:
    c = Connection(profile(name, timestamps=True), iss=1000)
    c.open_active(0.0)
    c.segment(Segment(5000, 1001, SYN | ACK, WINDOW, b"", Options(1460, ts_val=recent)), 0.0)
    c.out.clear()
    return c


def in_time_wait(name: str, recent: int | None) -> Connection:
    c = established(name, recent)
    c.shutdown(0.0)
    c.segment(Segment(5001, 1002, FIN | ACK, WINDOW, b"", Options(ts_val=recent)), 0.0)
    assert c.state is State.TIME_WAIT
    c.passive = True  # somebody listens
    c.out.clear()
    return c


@pytest.mark.parametrize(
    ("name", "recent", "ts_val", "taken"),
    [
        # §5.2: s < t where 0 < (t - s) < 2^31.
        ("rfc9293", 1000, 1000, True),
        ("rfc9293", 1000, 999, False),
        ("rfc9293", 1000, 1000 - 2**31 + 1, False),
        ("rfc9293", 1000, 1000 - 2**31, True),
        ("rfc9293", 0, -1, False),
        # tcp_paws_check; the scripts paws-*.pkt say so of the live kernel.
        ("linux", 1000, 999, True),
        ("linux", 1000, 998, False),
        ("linux", 1000, 1000 - 2**31, True),
        ("linux", 0, -1, True),
        # tcp_do_segment: strictly older, and 0 is none.
        ("freebsd", 1000, 999, False),
        ("freebsd", 0, -1, True),
    ],
)
def test_a_timestamp_is_too_old(name: str, recent: int, ts_val: int, taken: bool) -> None:
    c = established(name, recent)
    stamp = Options(ts_val=ts_val % 2**32, ts_ecr=0)
    c.segment(Segment(5001, 1001, ACK, WINDOW, b"x", stamp), 1.0)
    assert c.readable_bytes == taken


def test_a_reset_is_never_too_old() -> None:
    """§5.3 R1: "and if the RST bit is not set"."""
    for c in (established("rfc9293", 1000), in_time_wait("rfc9293", 1000)):
        c.segment(Segment(c.rcv_nxt, 0, RST, 0, b"", Options(ts_val=1)), 1.0)
        assert c.state is State.CLOSED


@pytest.mark.parametrize(("days", "taken"), [(23, False), (25, True)])
def test_after_24_days_without_a_segment_no_timestamp_is_too_old(days: int, taken: bool) -> None:
    """§5.5: the peer's clock, of a tick a millisecond, has changed its sign by then."""
    c = established("rfc9293", 1000)
    for number in (1, 2):  # and goes on from the new one
        stamp = Options(ts_val=(1000 + 2**31 + number * 1000) % 2**32, ts_ecr=0)
        c.segment(Segment(5000 + number, 1001, ACK, WINDOW, b"x", stamp), days * DAY + number)
    assert c.readable_bytes == 2 * taken


@pytest.mark.parametrize(
    ("before", "after", "seq", "opens"),
    [
        # The old connection used timestamps, the new one would:
        (1000, 1001, 4000, True),  # later
        (1000, 1000, 9000, True),  # the same, and a later number
        (1000, 1000, 4000, False),
        (1000, 999, 9000, False),  # earlier
        # Only the old one did:
        (1000, None, 9000, True),
        (1000, None, 4000, False),
        # Only the new one would: no old duplicate can carry one.
        (None, 1, 4000, True),
        # Neither:
        (None, None, 9000, True),
        (None, None, 4000, False),
    ],
)
def test_a_syn_reopens_time_wait(
    before: int | None, after: int | None, seq: int, opens: bool
) -> None:
    """RFC 6191 §2."""
    c = in_time_wait("rfc9293", before)
    c.segment(Segment(seq, 0, SYN, WINDOW, b"", Options(1460, ts_val=after)), 1.0)
    assert c.state is (State.SYN_RECEIVED if opens else State.TIME_WAIT)

"""Sequence numbers that cannot be, and those that can although they look odd."""

from __future__ import annotations

import pytest

from timewait.check.sequence import ACKS_FIN, FROM_B, OLD, TEXT, Contradiction, Sequence
from timewait.tcp.segment import ACK, FIN, RST, SYN


def opened(*, exact: bool = True, presumed: bool = False) -> Sequence:
    """A at 101, B at 501 after the handshake."""
    seen = Sequence(exact, presumed)
    seen.take(False, SYN, 100, 0, 0, 0.0)
    seen.take(True, SYN | ACK, 500, 101, 0, 0.1)
    seen.take(False, ACK, 101, 501, 0, 0.2)
    return seen


def test_an_orderly_close_is_two_fins_and_their_acknowledgments() -> None:
    seen = opened()
    kinds = [
        seen.take(False, FIN | ACK, 101, 501, 0, 1.0),
        seen.take(True, ACK, 501, 102, 0, 1.1),
        seen.take(True, FIN | ACK, 501, 102, 0, 1.2),
        seen.take(False, ACK, 102, 502, 0, 1.3),
    ]
    assert kinds == [
        ACK | FIN,
        ACK | ACKS_FIN | FROM_B,
        ACK | FIN | ACKS_FIN | FROM_B,
        ACK | ACKS_FIN,
    ]


@pytest.mark.parametrize(
    ("from_b", "flags", "seq", "ack", "length", "why"),
    [
        (False, ACK, 102, 501, 0, "after the last one sent"),
        (False, ACK, 101, 502, 0, "1 octet more than was sent"),
        (True, ACK, 501, 100, 0, "acknowledged already"),
        (False, FIN, 101, 0, 0, "no acknowledgment"),
        (False, RST, 103, 0, 0, "a reset at 103"),
        (False, ACK, 100, 501, 0, "before SND.NXT"),
    ],
)
def test_what_no_tcp_sends(
    from_b: bool, flags: int, seq: int, ack: int, length: int, why: str
) -> None:
    with pytest.raises(Contradiction, match=why) as caught:
        opened().take(from_b, flags, seq, ack, length, 0.25)
    assert "RFC 9293" in caught.value.rule


def test_nothing_follows_a_fin() -> None:
    seen = opened()
    seen.take(False, FIN | ACK, 101, 501, 10, 1.0)
    with pytest.raises(Contradiction, match="text after the FIN"):
        seen.take(False, ACK, 112, 501, 10, 1.1)


def test_a_keep_alive_goes_one_back_after_a_while_only() -> None:
    seen = opened()
    seen.take(False, ACK, 101, 501, 5, 1.0)
    seen.take(True, ACK, 501, 106, 0, 1.1)
    assert seen.take(False, ACK, 105, 501, 0, 3.0) & OLD
    with pytest.raises(Contradiction):
        seen.take(False, ACK, 105, 501, 0, 3.01)


def test_sequence_numbers_wrap() -> None:
    seen = Sequence(True)
    seen.take(False, SYN, 0xFFFFFFFF, 0, 0, 0.0)
    seen.take(True, SYN | ACK, 0xFFFFFFF0, 0, 0, 0.1)
    assert seen.take(False, ACK, 0, 0xFFFFFFF1, 100, 0.2) & ~OLD
    seen.take(True, ACK, 0xFFFFFFF1, 100, 30, 0.3)
    assert seen.take(False, ACK, 100, 15, 0, 0.4) == ACK


def test_where_segments_may_be_lost_a_gap_is_nothing_until_it_is_acknowledged() -> None:
    seen = opened(exact=False)
    seen.take(False, ACK, 111, 501, 10, 1.0)
    seen.take(True, ACK, 501, 101, 0, 1.1)
    seen.take(False, ACK, 101, 501, 10, 1.2)
    seen.take(True, ACK, 501, 121, 0, 1.3)
    seen.take(False, ACK, 131, 501, 10, 1.4)
    assert not seen.missed
    seen.take(True, ACK, 501, 141, 0, 1.5)
    assert seen.missed  # the capture lacks it


def test_a_gap_in_the_octets_may_be_where_their_numbers_wrap() -> None:
    seen = Sequence(False)
    seen.take(False, ACK, 0xFFFFFF00, 501, 0x80, 1.0)
    for again in range(40):
        seen.take(False, ACK, 0x10 + again, 501, 1, 1.1 + again)  # what is between is missing
        seen.take(False, ACK, 0xFFFFFF00, 501, 0x80, 1.2 + again)
    assert seen.a.gaps == [(0xFFFFFF80, 0x10)]


def test_what_is_acknowledged_and_was_not_seen_is_decided_by_how_its_sender_goes_on() -> None:
    missed = opened(exact=False)
    missed.take(True, ACK, 501, 111, 0, 1.0)
    assert missed.missed
    assert missed.take(False, ACK, 111, 501, 10, 1.1) == ACK | TEXT
    never_sent = opened(exact=False)
    never_sent.take(True, ACK, 501, 111, 0, 1.0)
    with pytest.raises(Contradiction, match="10 octets more than was sent"):
        never_sent.take(False, ACK, 101, 501, 11, 1.1)


def test_a_gap_on_one_machine_is_suspicious_until_a_retransmission_fills_it() -> None:
    seen = opened(exact=False, presumed=True)
    seen.take(False, ACK, 111, 501, 10, 1.0)
    assert seen.suspicion is not None
    seen.take(True, ACK, 501, 101, 0, 1.1)  # the peer asks for it
    seen.take(False, ACK, 101, 501, 10, 1.2)
    assert seen.suspicion is None


def test_a_capture_may_begin_anywhere() -> None:
    seen = Sequence(True)
    seen.take(True, ACK, 900, 5000, 0, 0.0)
    seen.take(True, ACK, 900, 7000, 0, 0.1)  # of octets sent before the capture began
    assert seen.take(False, FIN | ACK, 9000, 900, 100, 0.2) == ACK | FIN | 0x08

"""What the stacks do otherwise than RFC 9293, each as its own source has it."""

from __future__ import annotations

import errno

import pytest

from timewait.tcp.connection import Connection, SocketOptions
from timewait.tcp.profiles import PROFILES, Parameters, profile
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, Options, Segment
from timewait.tcp.states import State
from timewait.tcp.time_wait import TimeWaits

WINDOW = 500


def established(name: str) -> Connection:
    c = Connection(profile(name), iss=1000, timestamps=False)
    c.open_active(0.0)
    c.segment(Segment(5000, 1001, SYN | ACK, WINDOW, b"", Options(1460)), 0.0)
    c.out.clear()
    return c


def in_time_wait(name: str) -> Connection:
    c = established(name)
    c.shutdown(0.0)
    c.segment(Segment(5001, 1002, FIN | ACK, WINDOW), 0.0)
    assert c.state is State.TIME_WAIT
    c.out.clear()
    return c


def told(c: Connection) -> list[str]:
    lines = [str(seg) for seg in c.out]
    c.out.clear()
    return lines


# --- FreeBSD's tcp_twcheck: netinet/tcp_timewait.c ----------------------------------------------


@pytest.mark.parametrize(
    ("seg", "answered"),
    [
        (Segment(5002, 0, RST), False),
        (Segment(5102, 1002, RST | ACK), False),
        (Segment(4902, 0, SYN), False),  # not above RCV.NXT, and no ACK
        (Segment(5002, 0, 0, 0, b"x"), False),  # no ACK
        (Segment(4990, 0, FIN), False),
        (Segment(5002, 1002, ACK), False),  # a duplicate ACK
        (Segment(5002, 1001, ACK), True),  # an ACK, but not of all
        (Segment(5002, 1002, ACK | PSH), True),
        (Segment(5001, 1002, ACK), True),
        (Segment(5002, 1002, ACK, 0, b"x"), True),
        (Segment(5002, 1002, FIN | ACK), True),  # another FIN than the one that was received
        (Segment(9000, 1002, SYN | ACK), True),
    ],
    ids=str,
)
def test_freebsd_acknowledges_in_time_wait_what_is_not_a_duplicate_ack(
    seg: Segment, answered: bool
) -> None:
    c = in_time_wait("freebsd")
    over = c.deadline
    c.segment(seg, 10.0)
    assert told(c) == (["ACK seq=1002 ack=5002"] if answered else [])
    assert c.state is State.TIME_WAIT
    assert c.deadline == over


def test_freebsd_waits_anew_after_the_fin_again() -> None:
    c = in_time_wait("freebsd")
    c.segment(Segment(5001, 1002, FIN | ACK, WINDOW), 10.0)
    assert told(c) == ["ACK seq=1002 ack=5002"]
    assert c.deadline == 70.0


def test_freebsd_gives_time_wait_up_for_a_newer_syn_though_nobody_listens() -> None:
    """tcp_twcheck closes it; tcp_input looks again and finds nobody."""
    c = in_time_wait("freebsd")
    c.segment(Segment(9000, 0, SYN, WINDOW), 10.0)
    assert told(c) == ["RST,ACK seq=0 ack=9001"]
    assert (c.state, c.deadline) == (State.CLOSED, None)


# --- Who gives up, and whether the peer is told: tcp_drop, tcp_keepalive_timer ------------------

RESET = ["RST,ACK seq=1001 ack=5001"]


@pytest.mark.parametrize(
    ("name", "answer"), [("rfc9293", []), ("linux", RESET), ("freebsd", RESET), ("windows", [])]
)
def test_keep_alives_that_nobody_answers(name: str, answer: list[str]) -> None:
    c = established(name)
    c.options = SocketOptions(keepalive=(10.0, 5.0, 2))
    c.t_keepalive = 10.0
    asked = []
    for now in (10.0, 15.0):
        c.expire(now)
        asked += told(c)
    assert asked == ["ACK seq=1000 ack=5001"] * 2
    c.expire(20.0)
    assert told(c) == answer
    assert (c.state, c.error) == (State.CLOSED, errno.ETIMEDOUT)


@pytest.mark.parametrize(("name", "told_so"), [("rfc9293", 0), ("linux", 0), ("freebsd", 1)])
def test_text_that_nobody_acknowledges(name: str, told_so: int) -> None:
    c = established(name)
    c.send(b"text", 0.0)
    while c.state is State.ESTABLISHED:
        c.out.clear()
        assert c.deadline is not None
        c.expire(c.deadline)
    assert sum(seg.flags & RST != 0 for seg in c.out) == told_so
    assert c.error == errno.ETIMEDOUT


# --- The limit of challenge ACKs: RFC 5961 §7, tcp_oow_rate_limited ------------------------------


@pytest.mark.parametrize(
    ("name", "burst", "most", "span"),
    [("rfc9293", 5, 10, 5.0), ("linux", 1, 1, 0.5), ("freebsd", 5, 5, 1.0), ("macos", 10, 10, 1.0)],
)
def test_challenge_acks_are_limited(name: str, burst: int, most: int, span: float) -> None:
    c = established(name)
    times = []
    for number in range(400):  # four together, every 0.1 s
        now = 10.0 + number // 4 / 10
        c.segment(Segment(5011, 0, SYN if number % 2 else RST, WINDOW), now)
        times += [now] * len(told(c))
    assert times.count(times[0]) == min(burst, 4)
    # Of a stack's own windows the last answers of one and the first of the next may be close.
    slack = 1 if name in ("rfc9293", "linux") else 2
    assert all(sum(t <= other < t + span - 1e-6 for other in times) <= most * slack for t in times)


def test_time_wait_counts_its_challenge_acks_as_a_value_too() -> None:
    c = in_time_wait("rfc9293")
    waits = TimeWaits[str](c.profile)
    waits.add("it", c)
    out: list[Segment] = []
    for number in range(20):
        waits.segment("it", Segment(5012, 0, RST), number / 10, out, listening=False)
    assert len(out) == 5
    with pytest.raises(ValueError, match="ESTABLISHED is not to be kept"):
        waits.add("other", established("rfc9293"))


# --- macOS: XNU's tcp_input ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seg", "answer", "state"),
    [
        (Segment(5002, 0, RST), [], State.TIME_WAIT),
        (Segment(5012, 0, RST), ["ACK seq=1002 ack=5002"], State.TIME_WAIT),
        (Segment(4902, 0, SYN), ["ACK seq=1002 ack=5002"], State.TIME_WAIT),
        (Segment(9000, 0, SYN), ["RST,ACK seq=0 ack=9001"], State.CLOSED),
        (Segment(5001, 1002, FIN | ACK), ["ACK seq=1002 ack=5002"], State.TIME_WAIT),
    ],
    ids=str,
)
def test_macos_in_time_wait(seg: Segment, answer: list[str], state: State) -> None:
    c = in_time_wait("macos")
    c.segment(seg, 10.0)
    assert (told(c), c.state) == (answer, state)


def test_macos_takes_a_reset_of_before_the_fin() -> None:
    c = established("macos")
    c.segment(Segment(5001, 1001, FIN | ACK, WINDOW), 0.0)
    c.segment(Segment(5001, 0, RST), 1.0)
    assert (c.state, c.error) == (State.CLOSED, errno.ECONNRESET)


@pytest.mark.parametrize("name", ["freebsd", "macos"])
def test_bsd_answers_only_text_that_is_too_old(name: str) -> None:
    """tcp_do_segment, tcp_input: if (tlen) goto dropafterack."""
    c = Connection(profile(name), iss=1000)
    c.open_active(0.0)
    c.segment(Segment(5000, 1001, SYN | ACK, WINDOW, b"", Options(1460, ts_val=1000)), 0.0)
    told(c)
    c.segment(Segment(5001, 1001, ACK, WINDOW, b"", Options(ts_val=900)), 1.0)
    c.segment(Segment(5001, 1001, FIN | ACK, WINDOW, b"", Options(ts_val=900)), 1.0)
    assert told(c) == []
    c.segment(Segment(5001, 1001, ACK, WINDOW, b"x", Options(ts_val=900)), 1.0)
    assert told(c) == ["ACK seq=1001 ack=5001"]


def test_the_rfc_does_not_limit_other_acknowledgments() -> None:
    c = established("rfc9293")
    for _ in range(3):
        c.segment(Segment(4000, 1001, ACK, WINDOW), 1.0)
    assert len(c.out) == 3


# --- Where it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PROFILES if name != "rfc9293"])
def test_every_parameter_that_differs_belongs_to_a_setting_with_a_source(name: str) -> None:
    stack = PROFILES[name]
    assert all(setting.source and setting.meaning for setting in stack.settings.values())
    given: dict[str, object] = {}
    for setting in stack.settings.values():
        if setting.effect is not None:
            setting.effect(setting.value, given, {})
    assert Parameters(**given) == stack.parameters


# --- Linux's sysctls at their ends, as the live kernel (6.18) had it -----------------------------


@pytest.mark.parametrize(("stamped", "size"), [(False, 48), (True, 36)])
def test_linux_believes_no_mss_below_48(stamped: bool, size: int) -> None:
    c = Connection(profile("linux"), iss=1000, timestamps=stamped)
    c.open_active(0.0)
    offer = Options(1, ts_val=1 if stamped else None)
    c.segment(Segment(5000, 1001, SYN | ACK, 65535, b"", offer), 0.0)
    c.out.clear()
    c.send(b"a" * 100, 0.0)
    assert [len(seg.data) for seg in c.out] == [size, size, 100 - 2 * size]


def test_linux_doubles_the_timeout_of_a_syn_ack_beyond_tcp_rto_max_ms() -> None:
    c = Connection(profile("linux", tcp_rto_max_ms=1000), iss=1000)
    c.open_passive(0.0)
    c.segment(Segment(5000, 0, SYN, WINDOW), 0.0)
    times = []
    for _ in range(3):
        assert c.deadline is not None
        times.append(c.deadline)
        c.expire(c.deadline)
    assert times == [1.0, 3.0, 7.0]


@pytest.mark.parametrize("value", [-1, "5", None, float("nan")])
def test_a_setting_is_a_number_from_0_on(value: object) -> None:
    with pytest.raises(ValueError, match=r"tcp_fin_timeout=.* is not a number from 0 on"):
        profile("linux", tcp_fin_timeout=value)

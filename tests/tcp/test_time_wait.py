"""The small objects of TIME_WAIT answer as the connection they came from would."""

import sys

import pytest

from timewait.tcp.connection import Connection, SocketOptions
from timewait.tcp.profiles import profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Options, Segment
from timewait.tcp.states import State, Timer
from timewait.tcp.time_wait import TimeWait, TimeWaits

LINUX = profile("linux")


def closed_first(*, timestamps: bool = True, orphan_only: bool = False) -> Connection:
    """A connection that closed first and whose peer's FIN has come (or not yet)."""
    c = Connection(LINUX, iss=1000, timestamps=timestamps)
    ts = (lambda v: Options(ts_val=v, ts_ecr=1)) if timestamps else (lambda v: None)
    c.open_active(0.0)
    syn_options = Options(mss=1460, window_scale=7, ts_val=50 if timestamps else None)
    c.segment(Segment(5000, 1001, SYN | ACK, 64240, b"", syn_options), 0.0)
    c.close(1.0)
    c.segment(Segment(5001, 1002, ACK, 500, b"", ts(51)), 1.0)
    if not orphan_only:
        c.segment(Segment(5001, 1002, FIN | ACK, 500, b"", ts(52)), 1.0)
    c.out.clear()
    return c


def segments() -> list[Segment]:
    """Whatever could come: around the edges of the window, old and new timestamps."""
    made = []
    for seq in (5000, 5001, 5002, 5003, 9000, 4000, 5002 + 70000):
        for flags in (ACK, FIN | ACK, RST, RST | ACK, SYN, SYN | ACK, 0, FIN):
            for data in (b"", b"x"):
                for ts in (None, 10, 52, 99):
                    options = None if ts is None else Options(ts_val=ts, ts_ecr=1)
                    ack = 1002 if flags & ACK else 0
                    made.append(Segment(seq, ack, flags, 500, data, options))
    return made


@pytest.mark.parametrize("orphan_only", [False, True])
@pytest.mark.parametrize("timestamps", [False, True])
def test_a_thawed_record_answers_as_the_connection_does(
    timestamps: bool, orphan_only: bool
) -> None:
    """Every segment, twice over, so that rate limits and restarts are held against each other."""
    for first in segments():
        for second in (first, Segment(5001, 1002, FIN | ACK, 500)):
            whole = closed_first(timestamps=timestamps, orphan_only=orphan_only)
            small = TimeWaits[str](LINUX)
            small.add("key", closed_first(timestamps=timestamps, orphan_only=orphan_only))
            answers: list[Segment] = []
            for now, segment in ((2.0, first), (2.1, second)):
                if whole.state not in (State.TIME_WAIT, State.FIN_WAIT_2):
                    break
                whole.segment(segment, now)
                after = small.segment("key", segment, now, answers, listening=False)
                assert after.state is whole.state, f"{first} then {second}"
                assert answers == whole.out, f"{first} then {second}"
                record = small.get("key")
                if whole.state is State.CLOSED:
                    assert record is None
                else:
                    assert record is not None
                    assert record.state is whole.state
                    assert record.deadline == whole.deadline


def test_a_record_is_small() -> None:
    assert len(TimeWait.freeze(closed_first())) + sys.getsizeof(b"") <= 64


def test_records_expire_in_their_order_and_not_before() -> None:
    waits = TimeWaits[int](LINUX)
    for key in range(5):
        connection = closed_first()
        connection.t_wait = 61.0 + key
        waits.add(key, connection)
    assert waits.deadline == 61.0
    assert waits.expire(60.9) == []
    assert waits.expire(62.5) == [0, 1]
    assert waits.deadline == 63.0


def test_a_retransmitted_fin_restarts_one_without_holding_up_the_others() -> None:
    waits = TimeWaits[int](LINUX)
    for key in range(3):
        waits.add(key, closed_first())
    answers: list[Segment] = []
    waits.segment(0, Segment(5001, 1002, FIN | ACK), 30.0, answers, listening=False)
    assert [str(a) for a in answers] == ["ACK seq=1002 ack=5002"]
    assert waits.expire(61.0) == [1, 2]
    assert waits.deadline == 90.0
    assert waits.expire(90.0) == [0]
    assert waits.deadline is None


def test_an_orphan_in_fin_wait_2_goes_at_its_own_limit() -> None:
    waits = TimeWaits[str](profile("linux", tcp_fin_timeout=5.0))
    orphan = Connection(waits.profile, iss=1000)
    orphan.open_active(0.0)
    orphan.segment(Segment(5000, 1001, SYN | ACK, 64240), 0.0)
    waits.add("long", closed_first())
    orphan.close(1.0)
    orphan.segment(Segment(5001, 1002, ACK, 500), 1.0)
    waits.add("orphan", orphan)
    assert waits.deadline == 6.0
    assert waits.expire(10.0) == ["orphan"]
    assert list(waits) == ["long"]


def test_a_syn_above_the_old_connection_opens_a_new_one_where_somebody_listens() -> None:
    syn = Segment(9000, 0, SYN, 64240, b"", Options(mss=1460, ts_val=99))
    for listening, state in ((True, State.SYN_RECEIVED), (False, State.TIME_WAIT)):
        waits = TimeWaits[str](LINUX)
        waits.add("key", closed_first())
        answers: list[Segment] = []
        after = waits.segment("key", syn, 2.0, answers, listening=listening)
        assert after.state is state
        assert ("key" in waits) is not listening
        assert answers[0].seq == (1002 + 65537 if listening else 1002)


@pytest.mark.parametrize(
    ("settings", "linger2"), [({"tcp_fin_timeout": 70.0}, None), ({}, 70.0), ({}, None)]
)
def test_what_an_orphan_has_above_a_minute_it_waits_twice(
    settings: dict[str, float], linger2: float | None
) -> None:
    """As measured: a whole socket with the keepalive timer for 10 s, then small for 10 s."""
    orphan = Connection(profile("linux", **settings), iss=1000)
    orphan.options = SocketOptions(linger2=linger2, keepalive=(2.0, 1.0, 1))
    orphan.open_active(0.0)
    orphan.segment(Segment(5000, 1001, SYN | ACK, 64240), 0.0)
    orphan.close(1.0)
    orphan.segment(Segment(5001, 1002, ACK, 500), 1.0)
    if not settings and linger2 is None:
        assert orphan.timers == {Timer.WAIT: 61.0}
        return
    assert orphan.timers == {Timer.KEEPALIVE: 11.0}
    orphan.out.clear()
    orphan.segment(Segment(5005, 0, RST), 2.0)  # within the window: a whole socket asks back
    assert [str(segment) for segment in orphan.out] == ["ACK seq=1002 ack=5001"]
    orphan.expire(11.0)
    assert orphan.timers == {Timer.WAIT: 21.0}
    orphan.out.clear()
    small = Connection.restore(orphan.profile, orphan.snapshot())
    small.segment(Segment(5005, 0, RST), 12.0)  # a small one believes it
    assert (small.state, small.out) == (State.CLOSED, [])
    orphan.expire(20.9)
    assert (orphan.state, orphan.out) == (State.FIN_WAIT_2, [])
    orphan.expire(21.0)
    assert orphan.state is State.CLOSED

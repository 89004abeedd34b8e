"""Any sequence of calls, segments and timeouts leaves a connection in order."""

from __future__ import annotations

import errno
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timewait.tcp.connection import Connection, TCPError
from timewait.tcp.profiles import PROFILES, profile
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, Options, Segment, seq_add, seq_diff
from timewait.tcp.states import State
from timewait.tcp.time_wait import TimeWait

DOCUMENTED = {
    errno.EPIPE,
    errno.ENOTCONN,
    errno.EISCONN,
    errno.EALREADY,
    errno.EINVAL,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.ETIMEDOUT,
}

calls = st.sampled_from(
    [
        "open_active",
        "open_passive",
        "send",
        "receive",
        "shutdown",
        "shutdown_read",
        "close",
        "abort",
        "status",
        "expire",
    ]
)
flags = st.sampled_from(
    [ACK, ACK | PSH, FIN | ACK, SYN, SYN | ACK, RST, RST | ACK, FIN, 0, SYN | FIN]
)
near = st.sampled_from([0, 0, 0, 0, 1, -1, 2, 700, -700, 65160, 64240, 70000, 1 << 31])
arrivals = st.tuples(
    flags,
    near,
    near,
    st.sampled_from([b"", b"", b"x", b"text" * 100]),
    st.sampled_from([0, 1, 500, 65535]),
    st.sampled_from([None, 0, 5, -5]),
)
steps = st.lists(
    st.tuples(st.one_of(calls, arrivals), st.sampled_from([0.0, 0.001, 0.05, 1.0, 70.0])),
    max_size=30,
)


def segment_for(c: Connection, what: tuple[int, int, int, bytes, int, int | None]) -> Segment:
    """A segment near where the connection expects one: the interesting ones."""
    bits, seq, ack, data, window, ts = what
    options = None
    if bits & SYN or ts is not None:
        options = Options(1460, 7 if bits & SYN else None, True)
        if ts is not None:
            options.ts_val, options.ts_ecr = (c.ts_recent + ts + 100) & 0xFFFFFFFF, 0
    return Segment(
        seq_add(c.rcv_nxt, seq),
        seq_add(c.snd_nxt, ack) if bits & ACK else 0,
        bits,
        window,
        data,
        options,
    )


def in_order(c: Connection) -> None:
    """RFC 9293 §3.3.1: SND.UNA =< SND.NXT, RCV.NXT =< RCV.NXT + RCV.WND."""
    if c.state in (State.CLOSED, State.LISTEN):
        assert c.deadline is None
        return
    flight = seq_diff(c.snd_nxt, c.snd_una)
    assert 0 <= flight <= c.snd_buf + 2
    assert 0 <= seq_diff(c.rcv_adv, c.rcv_nxt) <= c.rcv_buf + (1 << c.rcv_scale)
    assert 0 <= c.readable_bytes <= c.rcv_buf + (1 << c.rcv_scale)
    if flight:
        assert c.deadline is not None, "nothing would retransmit"
    if c.state is State.TIME_WAIT:
        assert flight == 0
    status = c.status()
    assert status.state is c.state
    assert status.unsent >= 0


def changed_nothing_but_the_error(c: Connection, before: tuple[object, ...], number: int) -> None:
    assert number in DOCUMENTED
    if c.snapshot() != before:
        # A failure of the connection was reported: it is no longer pending.
        reported = Connection.restore(c.profile, before)
        assert reported.take_error() == number
        assert reported.snapshot() == c.snapshot()


@pytest.mark.parametrize("name", list(PROFILES))
@settings(max_examples=150)
@given(iss=st.integers(0, 0xFFFFFFFF), program=steps)
def test_whatever_happens_the_variables_stay_in_order(
    name: str, iss: int, program: list[tuple[object, float]]
) -> None:
    c = Connection(profile(name), iss=iss)
    now = 0.0
    for what, pause in program:
        now += pause
        before = c.snapshot()
        try:
            if isinstance(what, tuple):
                c.segment(segment_for(c, what), now)
            elif what == "send":
                assert 0 <= c.send(b"d" * 500, now) <= 500
            elif what == "receive":
                c.receive(300, now)
            elif what == "status":
                c.status()
            else:
                getattr(c, str(what))(now)
        except TCPError as refused:
            changed_nothing_but_the_error(c, before, refused.errno)
        in_order(c)
        if c.state is State.TIME_WAIT:
            record = TimeWait.freeze(c)
            assert record.state is State.TIME_WAIT
            assert record.deadline == c.deadline


@given(program=steps)
@settings(max_examples=100)
def test_a_restored_connection_goes_on_as_the_original(
    program: list[tuple[object, float]],
) -> None:
    c = Connection(profile("linux"), iss=77)
    now = 0.0
    for what, pause in program:
        now += pause
        twin = Connection.restore(c.profile, c.snapshot())
        c.out.clear()
        outcomes = []
        for each in (c, twin):
            try:
                if isinstance(what, tuple):
                    each.segment(segment_for(each, what), now)
                elif what == "send":
                    each.send(b"d" * 500, now)
                elif what == "receive":
                    each.receive(300, now)
                else:
                    getattr(each, str(what))(*() if what == "status" else (now,))
                outcomes.append(None)
            except TCPError as refused:
                outcomes.append(refused.errno)
        assert outcomes[0] == outcomes[1]
        assert c.snapshot() == twin.snapshot()
        assert c.out == twin.out


@given(
    sizes=st.lists(st.integers(1, 4000), min_size=1, max_size=8),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60)
def test_text_arrives_once_and_in_order_over_a_bad_network(sizes: list[int], seed: int) -> None:
    """Loss, duplication and reordering; retransmission mends all of it."""
    order = Random(seed)
    chunks = [order.randbytes(size) for size in sizes]
    sender = Connection(profile("linux"), iss=0xFFFFFF00)
    receiver = Connection(profile("linux"), iss=5)
    receiver.open_passive(0.0)
    sender.open_active(0.0)
    now, got, left = 0.0, b"", list(chunks)
    net: list[tuple[Connection, Segment]] = []
    for _ in range(4000):
        net += [(receiver, segment) for segment in sender.out]
        net += [(sender, segment) for segment in receiver.out]
        sender.out.clear()
        receiver.out.clear()
        if left and sender.state is State.ESTABLISHED:
            taken = sender.send(left[0], now)
            left[0] = left[0][taken:]
            if not left[0]:
                del left[0]
            if not left:
                sender.shutdown(now)
        if receiver.readable_bytes:
            got += receiver.receive(3000, now)
        if receiver.eof and not receiver.readable_bytes and receiver.state is State.CLOSE_WAIT:
            break
        if net:
            pick = order.randrange(len(net))
            fate = order.random()
            end, segment = net[pick] if fate < 0.1 else net.pop(pick)
            if fate < 0.85:
                end.segment(segment, now)
        else:
            now += 0.05
            sender.expire(now)
            receiver.expire(now)
    assert got == b"".join(chunks)

"""The short way must leave both connections exactly as the long way does."""

import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timewait.sim.clock import Clock
from timewait.sim.express import Volley, pass_text, read_all
from timewait.sim.network import Network
from timewait.tcp.connection import _STATEFUL, Connection
from timewait.tcp.profiles import profile

sizes = st.integers(1, 3000) | st.sampled_from([1, 12, 536, 32_000, 40_000])
actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 1), st.integers(1, 500)),
        st.tuples(st.just("ask"), st.integers(0, 1), st.integers(1, 500)),
        st.tuples(st.just("send"), st.integers(0, 1), sizes),
        st.tuples(st.just("read"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("wait"), st.just(0), st.integers(1, 90)),
        st.tuples(st.just("shut"), st.integers(0, 1), st.just(0)),
    ),
    max_size=40,
)


def connected(name: str, timestamps: bool) -> list[Connection]:
    client = Connection(profile(name), iss=0xFFFFFF00, mss=32741, timestamps=timestamps)
    server = Connection(profile(name), iss=7, mss=32741, timestamps=timestamps)
    server.open_passive(0.0)
    client.open_active(0.0)
    deliver([client, server], 0.0)
    assert client.state.name == server.state.name == "ESTABLISHED"
    return [client, server]


def deliver(pair: list[Connection], now: float) -> None:
    while pair[0].out or pair[1].out:
        for here, there in (pair, pair[::-1]):
            segments, here.out[:] = here.out[:], []
            for segment in segments:
                there.segment(segment, now)


def variables(connection: Connection) -> dict[str, object]:
    return dict(zip(_STATEFUL, connection.snapshot(), strict=True))


@settings(max_examples=400)
@given(
    actions,
    st.booleans(),
    st.sampled_from(["linux", "linux", "linux", "rfc9293", "freebsd"]),
    st.sampled_from([True, True, False]),
)
def test_the_short_way_is_the_long_way(script, timestamps, name, warm):
    pair = connected(name, timestamps)
    now = 0.5
    if warm:
        # A conversation, until the first ACKs, which are sent at once, are used up.
        for turn in range(30):
            pair[turn % 2].send(b"x", now)
            deliver(pair, now)
            pair[1 - turn % 2].receive(10, now)
    clean = False
    steps = [
        step
        for what, who, number in script
        for step in (
            # A question and its answer, both read.
            [
                ("send", who, number),
                ("read", 1 - who, 0),
                ("send", 1 - who, number),
                ("read", who, 0),
            ]
            if what == "ask"
            else [(what, who, number)]
        )
    ]
    for what, who, number in steps:
        here = pair[who]
        if what == "wait":
            now += number / 1000
            clean = clean and all(end.deadline is None or end.deadline > now for end in pair)
            for end in pair:
                end.expire(now)
        elif what == "shut" and not here.write_shut:
            here.shutdown(now)
            clean = False
        elif what == "read" and here.readable_bytes:
            twin = Connection.restore(here.profile, here.snapshot())
            text = read_all(twin)
            assert here.receive(1 << 20, now) == (text if text is not None else twin._rx)
            if text is None:
                assert twin.snapshot() != here.snapshot()
                clean = False
            else:
                assert not here.out
                assert variables(twin) == variables(here)
        elif what == "send" and not here.write_shut:
            twins = [Connection.restore(end.profile, end.snapshot()) for end in pair]
            text = bytes(number)
            short = pass_text(twins[who], twins[1 - who], text, now, clean)
            clean = short
            assert not twins[0].out
            assert not twins[1].out
            if not short:
                assert [variables(t) for t in twins] == [variables(end) for end in pair]
            taken = here.send(text, now)
            if short:
                assert taken == len(text)
                assert len(here.out) == 1
                pair[1 - who].segment(here.out.pop(), now)
                assert not pair[1 - who].out
                assert [variables(t) for t in twins] == [variables(end) for end in pair]
        deliver(pair, now)


@pytest.mark.parametrize("timestamps", [True, False])
def test_a_conversation_soon_takes_the_short_way(timestamps):
    pair = connected("linux", timestamps)
    short = 0
    for turn in range(40):
        a, b = (pair[0], pair[1]) if turn % 2 == 0 else (pair[1], pair[0])
        if pass_text(a, b, b"x" * 100, 1.0):
            short += 1
        else:
            a.send(b"x" * 100, 1.0)
            deliver(pair, 1.0)
        assert (read_all(b) or b.receive(100, 1.0)) == b"x" * 100
    assert short >= 30


class Ends:
    """Two connected sockets of one host, which can be told never to go the short way."""

    def __init__(self, short: bool, **settings: bool) -> None:
        self.short = short
        self.network = Network()
        host = self.network.host("one", **settings)
        listener, client = host.socket(), host.socket()
        listener.bind("127.0.0.1", 80)
        listener.listen(1)
        with pytest.raises(BlockingIOError):
            client.connect("127.0.0.1", 80)
        self.socks = [client, listener.accept()]
        self.volleys = 0

    def send(self, who: int, text: bytes) -> int:
        sock = self.socks[who]
        if not self.short:
            sock.peer = None  # nobody to hand it to
        taken = sock.send(text)
        self.volleys += sock.volley is not None
        return taken

    def read(self, who: int, size: int) -> bytes:
        try:
            return self.socks[who].receive(size)
        except BlockingIOError:
            return b""

    def take(self, who: int) -> bytes:
        """As the loop's transport reads."""
        sock = self.socks[who]
        if sock._conn._rx:
            return (sock.take(1 << 18) if self.short else None) or self.read(who, 1 << 18)
        return b""

    def variables(self) -> list[object]:
        return [variables(sock.conn) for sock in self.socks]


volleys = st.lists(
    st.one_of(
        st.tuples(st.just("volley"), st.integers(0, 1), st.integers(1, 600)),
        st.tuples(st.just("volley"), st.integers(0, 1), st.integers(1, 600)),
        st.tuples(st.just("send"), st.integers(0, 1), sizes),
        st.tuples(st.just("take"), st.integers(0, 1), st.just(0)),
        st.tuples(st.just("read"), st.integers(0, 1), sizes),
        st.tuples(st.just("wait"), st.just(0), st.integers(1, 90)),
        st.tuples(st.just("buffer"), st.integers(0, 1), st.integers(-60_000, 60_000)),
        st.tuples(st.just("look"), st.just(0), st.just(0)),
    ),
    max_size=30,
)


def play(ends: Ends, script: list[tuple[str, int, int]], warm: bool) -> list[object]:
    """What the calls returned, and all variables whenever somebody looked."""
    told: list[object] = []
    steps = [("volley", 0, 30)] * 20 * warm + script + [("look", 0, 0)]
    for what, who, number in steps:
        if what == "volley":
            for turn in (who, 1 - who):
                told += [ends.send(turn, bytes(number)), ends.take(1 - turn)]
        elif what == "send":
            try:
                told.append(ends.send(who, b"x" * number))
            except BlockingIOError:
                told.append("full")
        elif what == "take":
            told.append(ends.take(who))
        elif what == "read":
            told.append(ends.read(who, number))
        elif what == "buffer":
            sock = ends.socks[who]
            sock.set_option(socket.SOL_SOCKET, socket.SO_RCVBUF, sock.conn.rcv_buf + number)
        elif what == "wait":
            clock: Clock = ends.network.clock
            until = clock.now + number / 1000
            while clock.run_until(until):
                pass
        elif what == "look":
            told += ends.variables()
    return told


@settings(max_examples=300)
@given(volleys, st.booleans(), st.booleans())
def test_a_volley_leaves_what_single_texts_would(script, timestamps, warm):
    short, long = Ends(True, timestamps=timestamps), Ends(False, timestamps=timestamps)
    assert play(short, script, warm) == play(long, script, warm)
    assert not long.volleys
    assert short.volleys or not warm


def test_whoever_looks_at_a_connection_ends_its_volley():
    ends = Ends(True)
    play(ends, [], warm=True)
    client, server = ends.socks
    for _ in range(2):
        ends.send(0, b"question")
        ends.take(1)
        ends.send(1, b"answer")
        ends.take(0)
    assert isinstance(client.volley, Volley)
    assert server.volley is client.volley
    before = client._conn.snd_una
    ends.send(0, b"question")
    ends.take(1)
    ends.send(1, b"answer")
    assert client._conn.snd_una == before, "out of date as long as nobody looks"
    assert ends.network.hosts["one"].rows(80)[1].recv_q == len(b"answer")
    assert client.volley is server.volley is None
    assert client.conn.snd_una == client.conn.snd_nxt

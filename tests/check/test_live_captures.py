"""Captures of two Linux hosts doing what is rare on a quiet machine: they conform, however taken.

Each is captured at both ends of a wire that loses, doubles, delays and marks
packets; then one thing in it is altered, which no capture can show.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from attrs import evolve

from timewait.check import check
from timewait.check.evidence import read
from timewait.events import Event, SegmentSeen
from timewait.kernel.namespace import why_not
from timewait.lab.two_hosts import CLIENT, SERVER, Fault, Packet, TwoHosts, pcap, tcp
from timewait.tcp.segment import ACK, FIN, RST, SYN

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no private namespace: {why_not()}"),
]

_REPAIR: Final = (19, 20, 21)  # TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ (tcp.h)
_OFF: Final = -1


def flags(octets: bytes) -> int:
    return octets[(tcp(octets) or 0) + 13]


def length(octets: bytes) -> int:
    at = tcp(octets) or 0
    return len(octets) - at - (octets[at + 12] >> 4) * 4


def losing(which: Callable[[int, bool, bytes], object], times: int = 1) -> Fault:
    """A wire that drops the first packets for which this holds."""
    left = [times]

    def fault(number: int, by_client: bool, octets: bytes) -> Iterable[Packet]:
        if left[0] and which(number, by_client, octets):
            left[0] -= 1
            return []
        return [(0.0, octets)]

    return fault


def at_random(seed: int, lost: float, doubled: float = 0.0, late: float = 0.0) -> Fault:
    """A wire with these chances, once the connection is open."""
    rng = random.Random(seed)

    def fault(number: int, _: bool, octets: bytes) -> Iterable[Packet]:
        chance = rng.random() if number > 3 else 1.0
        if chance < lost:
            return []
        if chance < lost + doubled:
            return [(0.0, octets), (rng.random() * 0.01, octets)]
        if chance < lost + doubled + late:
            return [(rng.random() * 0.02, octets)]
        return [(0.0, octets)]

    return fault


def congested(number: int, by_client: bool, octets: bytes) -> Iterable[Packet]:
    """A router that marks a packet now and then, if its ends can tell (RFC 3168)."""
    if by_client or number % 7 != 3 or not octets[1] & 3:
        return [(0.0, octets)]
    marked = bytearray(octets)
    marked[1] |= 3
    marked[10:12] = b"\0\0"
    total = sum(struct.unpack(">10H", marked[:20]))
    total = (total & 0xFFFF) + (total >> 16)
    marked[10:12] = struct.pack(">H", 0xFFFF & ~((total & 0xFFFF) + (total >> 16)))
    return [(0.0, bytes(marked))]


def drain(sock: socket.socket, octets: int = 1 << 40) -> None:
    while octets > 0:
        got = len(sock.recv(1 << 16))
        if not got:
            return
        octets -= got


def bulk(server: socket.socket, client: socket.socket, down: int, up: int) -> None:
    jobs: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (server.sendall, (b"d" * down,)),
        (client.sendall, (b"u" * up,)),
        (drain, (client, down)),
        (drain, (server, up)),
    ]
    threads = [threading.Thread(target=work, args=args) for work, args in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def finish(server: socket.socket, client: socket.socket, quiet: float = 0.1) -> None:
    server.shutdown(socket.SHUT_WR)
    drain(client)
    client.close()
    drain(server)
    server.close()
    time.sleep(quiet)


def talk(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    client.sendall(b"q" * 500)
    server.recv(999)
    server.sendall(b"r" * 3000)
    drain(client, 3000)
    finish(server, client, 0.7)


def exchange(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    bulk(server, client, 150_000, 60_000)
    finish(server, client, 0.5)


def zero_window(hosts: TwoHosts) -> None:
    server, client = hosts.pair(SO_RCVBUF=4096)
    sender = threading.Thread(target=client.sendall, args=(b"x" * 100_000,))
    sender.start()
    time.sleep(1.2)  # the window is closed, and probed
    drain(server, 100_000)
    sender.join()
    finish(server, client)


def keep_alive(hosts: TwoHosts) -> None:
    server, client = hosts.pair(SO_KEEPALIVE=1, TCP_KEEPIDLE=1, TCP_KEEPINTVL=1)
    client.sendall(b"hello")
    server.recv(9)
    time.sleep(2.3)
    finish(server, client)


def keep_alive_unanswered(hosts: TwoHosts) -> None:
    server, client = hosts.pair(SO_KEEPALIVE=1, TCP_KEEPIDLE=1, TCP_KEEPINTVL=1, TCP_KEEPCNT=2)
    client.sendall(b"hello")
    server.recv(9)
    time.sleep(0.1)
    hosts.fault = lambda number, by_client, octets: []
    time.sleep(3.5)
    server.close()
    client.close()


def given_up(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    hosts.fault = lambda number, by_client, octets: []
    client.sendall(b"x" * 3000)
    time.sleep(3.5)
    hosts.fault = lambda number, by_client, octets: [(0.0, octets)]
    server.sendall(b"y")
    time.sleep(0.1)
    server.close()
    client.close()


def simultaneous_open(hosts: TwoHosts) -> None:
    ends = (SERVER[socket.AF_INET], 5000), (CLIENT[socket.AF_INET], 5001)
    server, client = hosts.server.socket(socket.AF_INET), hosts.client.socket(socket.AF_INET)
    for sock, here, there in ((server, *ends), (client, *ends[::-1])):
        sock.bind(here)
        sock.setblocking(False)
        sock.connect_ex(there)
    time.sleep(0.4)
    for sock in (server, client):
        sock.settimeout(5)
        sock.sendall(b"abc")
    server.recv(9)
    finish(server, client, 0.3)


def simultaneous_close(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    time.sleep(0.1)
    server.close()
    client.close()
    time.sleep(0.3)


def wrapping(hosts: TwoHosts) -> None:
    with hosts.listener() as listener:
        client = hosts.client.socket(socket.AF_INET)
        on, queue, number = _REPAIR
        for option, value in ((on, 1), (queue, 2), (number, 0xFFFFFFFF - 3000 - 2**32), (on, _OFF)):
            client.setsockopt(socket.IPPROTO_TCP, option, value)
        client.settimeout(5)
        client.connect((SERVER[socket.AF_INET], 80))
        server, _ = listener.accept()
    server.settimeout(5)
    bulk(server, client, 1000, 40_000)
    finish(server, client, 0.3)


def urgent(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    for text in (b"one", b"two"):
        client.sendall(text)
        client.send(b"!", socket.MSG_OOB)
        time.sleep(0.02)
    server.recv(99)
    finish(server, client)


def ipv6(hosts: TwoHosts) -> None:
    with hosts.listener(socket.AF_INET6) as listener:
        client = hosts.dial(socket.AF_INET6)
        server, _ = listener.accept()
    bulk(server, client, 50_000, 20_000)
    finish(server, client)


def keeping_alive_http(hosts: TwoHosts) -> None:
    for server_closes in (True, False):
        server, client = hosts.pair()
        for size in (0, 3000, 9000):
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            server.recv(999)
            server.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * size)
            drain(client, 19 + size)
            time.sleep(0.05)
        first, second = (server, client) if server_closes else (client, server)
        first.close()
        time.sleep(0.02)
        second.close()
        time.sleep(0.02)


def half_close(hosts: TwoHosts) -> None:
    server, client = hosts.pair()
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    drain(server)
    for _ in range(3):
        server.sendall(b"x" * 5000)
        time.sleep(0.02)
    server.close()
    drain(client)
    client.close()
    time.sleep(0.1)


def resets(hosts: TwoHosts) -> None:
    now = struct.pack("ii", 1, 0)
    for how in range(4):
        server, client = hosts.pair()
        client.sendall(b"a" * 100)
        time.sleep(0.02)
        if how in (0, 1):
            (server, client)[how].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            (server, client)[how].close()
        elif how == 2:
            server.close()  # with text unread
        else:
            client.close()
            time.sleep(0.02)
            server.sendall(b"late")
        time.sleep(0.05)
        for sock in (server, client):
            sock.close()
        time.sleep(0.02)


def refused(hosts: TwoHosts) -> None:
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            hosts.dial()


def fast_open(hosts: TwoHosts) -> None:
    with hosts.listener() as listener:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5)
        for _ in range(2):
            client = hosts.client.socket(socket.AF_INET)
            client.sendto(b"hello", socket.MSG_FASTOPEN, (SERVER[socket.AF_INET], 80))
            server, _ = listener.accept()
            server.recv(99)
            server.sendall(b"x" * 2000)
            finish(server, client)


def multipath(hosts: TwoHosts) -> None:
    mptcp = 262
    listener = hosts.server.socket(socket.AF_INET, socket.SOCK_STREAM, mptcp)
    client = hosts.client.socket(socket.AF_INET, socket.SOCK_STREAM, mptcp)
    with listener:
        listener.bind((SERVER[socket.AF_INET], 80))
        listener.listen()
        client.connect((SERVER[socket.AF_INET], 80))
        server, _ = listener.accept()
    client.sendall(b"a" * 3000)
    drain(server, 3000)
    server.sendall(b"b" * 3000)
    drain(client, 3000)
    server.close()
    client.close()
    time.sleep(0.3)


PLAIN: Final = {
    "net.ipv4.tcp_sack": 0,
    "net.ipv4.tcp_timestamps": 0,
    "net.ipv4.tcp_window_scaling": 0,
}
CASES: dict[str, tuple[Callable[[TwoHosts], None], dict[str, Any]]] = {
    "zero window": (zero_window, {}),
    "keep-alive": (keep_alive, {}),
    "keep-alive that nobody answers": (keep_alive_unanswered, {}),
    "given up": (given_up, {"sysctls": {"net.ipv4.tcp_retries2": 3}}),
    "simultaneous open": (simultaneous_open, {"delay": 0.1}),
    "simultaneous close": (simultaneous_close, {"delay": 0.03}),
    "numbers wrap": (wrapping, {"fault": partial(at_random, 2, lost=0.1)}),
    "loss (SACK)": (exchange, {"fault": partial(at_random, 4, lost=0.04)}),
    "loss without options": (
        exchange,
        {"fault": partial(at_random, 8, lost=0.02), "sysctls": PLAIN},
    ),
    "late": (exchange, {"fault": partial(at_random, 6, lost=0.0, late=0.2)}),
    "doubled (DSACK)": (exchange, {"fault": partial(at_random, 7, lost=0.0, doubled=0.3)}),
    "chaos": (exchange, {"fault": partial(at_random, 5, lost=0.03, doubled=0.03, late=0.06)}),
    "congestion (ECN)": (
        exchange,
        {"fault": lambda: congested, "sysctls": {"net.ipv4.tcp_ecn": 1}},
    ),
    "urgent": (urgent, {}),
    "IPv6": (ipv6, {}),
    "HTTP": (keeping_alive_http, {}),
    "half-close": (half_close, {}),
    "resets": (resets, {}),
    "refused": (refused, {}),
    "Fast Open": (fast_open, {"sysctls": {"net.ipv4.tcp_fastopen": 3}}),
    "Multipath": (multipath, {}),
}
CASES |= {
    f"{what} lost": (talk, {"fault": fault})
    for what, fault in {
        "SYN": partial(losing, lambda n, by_client, p: flags(p) & 0x12 == SYN),
        "SYN twice": partial(losing, lambda n, by_client, p: flags(p) & 0x12 == SYN, 2),
        "SYN,ACK": partial(losing, lambda n, by_client, p: flags(p) & 0x12 == SYN | ACK),
        "third segment": partial(losing, lambda n, by_client, p: by_client and n == 1),
        "text": partial(losing, lambda n, by_client, p: by_client and length(p) == 500),
        "text three times": partial(
            losing, lambda n, by_client, p: by_client and length(p) == 500, 3
        ),
        "last text": partial(
            losing, lambda n, by_client, p: not by_client and 0 < length(p) < 1400
        ),
        "FIN": partial(losing, lambda n, by_client, p: flags(p) & FIN),
        "FIN three times": partial(losing, lambda n, by_client, p: flags(p) & FIN, 3),
        "ACK of the FIN": partial(losing, lambda n, by_client, p: by_client and flags(p) & FIN, 2),
        "last ACK": partial(
            losing, lambda n, by_client, p: not by_client and n > 5 and not flags(p) & 7
        ),
    }.items()
}


def _probes(seen: list[SegmentSeen]) -> int:
    """How many segments carry nothing, and the number before the next to be sent."""
    ends: dict[object, int] = {}
    found = 0
    for e in seen:
        found += e.flags == ACK and not e.length and e.seq == ends.get(e.src, 0) - 1
        ends[e.src] = max(ends.get(e.src, 0), e.seq + e.length + bool(e.flags & (SYN | FIN)))
    return found


def _crossing(seen: list[SegmentSeen]) -> bool:
    """Whether both sent a FIN that does not acknowledge the other's."""
    fins = {e.src: e for e in reversed(seen) if e.flags & FIN}
    return len(fins) == 2 and all(
        e.ack <= other.seq for e in fins.values() for other in fins.values() if e is not other
    )


# What a case is named for, where only time brings it about: it must be in a capture.
HAPPENED: Final[dict[str, Callable[[list[SegmentSeen]], bool]]] = {
    "zero window": lambda seen: any(not e.window for e in seen) and _probes(seen) > 1,
    "keep-alive": lambda seen: _probes(seen) > 1,
    "keep-alive that nobody answers": lambda seen: _probes(seen) > 1,
    "given up": lambda seen: sum(e.length > 0 and e.src[1] != 80 for e in seen) > 4,
    "simultaneous open": lambda seen: len({e.src for e in seen if e.flags & 0x12 == SYN}) == 2,
    "simultaneous close": _crossing,
}


def captured(name: str) -> TwoHosts:
    perform, options = CASES[name]
    if make := options.get("fault"):
        options = options | {"fault": make()}
    with TwoHosts(**options) as hosts:
        perform(hosts)
        return hosts


def segments(capture: bytes, where: Path) -> list[Event]:
    where.write_bytes(capture)
    faults: list[str] = []
    events = list(read(where, faults.append))
    assert not faults
    return events


def unstamped(event: Event) -> Event:
    """Without what is in the options, of which 64 octets of IPv6 show none."""
    assert isinstance(event, SegmentSeen)
    return evolve(event, ts=None)


def abused(events: list[Event], seed: int) -> Iterator[tuple[str, list[Event]]]:
    """The same as others would have captured it."""
    rng = random.Random(seed)
    at = rng.randrange(len(events))
    yield "segments missed", [event for event in events if rng.random() > 0.03 + 0.1 * (seed & 1)]
    yield "a burst missed", events[:at] + events[at + rng.randrange(1, 9) :]
    yield "began later", events[at:]
    yield "stopped earlier", events[:at]
    yield (
        "one direction",
        [e for e in events if isinstance(e, SegmentSeen) and (e.src[1] == 80) == bool(seed & 1)],
    )
    copies = [evolve(e, t=e.t + 0.0009 * rng.random()) for e in events if rng.random() < 0.5]
    yield "shown twice", sorted(events + copies, key=lambda event: event.t)


def altered(events: list[Event], rng: random.Random) -> Iterator[tuple[str, list[Event]]]:
    """One thing changed that nobody can have sent."""
    for at, event in enumerate(events):
        if isinstance(event, SegmentSeen) and event.flags & FIN:
            for what, wrong in (
                ("a FIN without ACK", evolve(event, flags=FIN, ack=0)),
                (
                    "text after a FIN",
                    evolve(event, flags=ACK, seq=event.seq + event.length + 1, length=9),
                ),
            ):
                yield what, [*events[:at], event, wrong, *events[at + 1 :]]
        if isinstance(event, SegmentSeen) and event.flags & RST and event.flags & ACK:
            if event.seq:
                moved = evolve(event, seq=event.seq - 77 & 0xFFFFFFFF)
                yield "a reset elsewhere", [*events[:at], moved, *events[at + 1 :]]
            else:
                both = evolve(event, flags=SYN | ACK, seq=1, ack=event.ack + 5 & 0xFFFFFFFF)
                yield "an answer to another SYN", [*events[:at], both, *events[at:]]
        if isinstance(event, SegmentSeen) and event.flags & (SYN | ACK) == SYN | ACK:
            moved = evolve(event, ack=event.ack + 1 & 0xFFFFFFFF)
            yield "a SYN,ACK of another SYN", [*events[:at], moved, *events[at + 1 :]]


@pytest.mark.parametrize("name", CASES)
def test_it_conforms_however_it_was_taken_and_altered_it_does_not(
    name: str, tmp_path: Path, undisturbed: Callable[..., None]
) -> None:
    def conforms() -> None:
        hosts = captured(name)
        if name in HAPPENED:
            ends = (segments(hosts.captured(end), tmp_path / end) for end in hosts.seen)
            assert any(
                HAPPENED[name]([e for e in end if isinstance(e, SegmentSeen)]) for end in ends
            )
        for end in ("server", "client"):
            whole = segments(hosts.captured(end), tmp_path / f"{end}.pcap")
            verdict = check(whole)
            assert verdict, f"{end}: {verdict.explain()}"
            assert not verdict.evidence.problems
            for snap in (64, 96):
                cut = segments(pcap(hosts.seen[end], snap=snap), tmp_path / "cut.pcap")
                assert [unstamped(e) for e in cut] == [unstamped(e) for e in whole]
            for seed in range(4):
                for how, events in abused(whole, seed):
                    verdict = check(events)
                    assert verdict, f"{end}, {how}, {seed}: {verdict.explain()}"
            made = list(altered(whole, random.Random(0)))
            assert made
            for what, events in made:
                assert not check(events), f"{end}: {what}"

    undisturbed(conforms)

"""Segments live and from files, with tcpdump's files and tshark's reading of them as judges."""

import contextlib
import io
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from timewait.events import Event, Lost, SegmentSeen
from timewait.kernel import capture
from timewait.kernel.capture import Capture, CaptureError, read
from timewait.kernel.namespace import Namespace
from timewait.tcp.packet import Packet, encode
from timewait.tcp.segment import ACK, FIN, PSH, SYN, Options, Segment

root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root for a namespace"
)

CLIENT, SERVER = ("192.0.2.1", 40000), ("192.0.2.2", 9090)
CLIENT6, SERVER6 = ("2001:db8::1", 40000), ("2001:db8::2", 9090)
STAMPS = Options(ts_val=7, ts_ecr=9)


def story(client: tuple[str, int], server: tuple[str, int]) -> list[bytes]:
    there = [
        Segment(100, 0, SYN, 64240, b"", Options(1460, 7, True, 7, 0)),
        Segment(101, 501, ACK, 502, b"", STAMPS),
        Segment(101, 501, PSH | ACK, 502, b"hello", STAMPS),
        Segment(106, 501, FIN | ACK, 502),
    ]
    return [encode(Packet(client, server, segment)) for segment in there]


PACKETS = story(CLIENT, SERVER) + story(CLIENT6, SERVER6)


def expected(*, t: Callable[[int], float]) -> list[SegmentSeen]:
    seen = []
    for i, (src, dst) in enumerate([(CLIENT, SERVER)] * 4 + [(CLIENT6, SERVER6)] * 4):
        flags, seq, ack, length, window, ts = [
            (SYN, 100, 0, 0, 64240, (7, 0)),
            (ACK, 101, 501, 0, 502, (7, 9)),
            (PSH | ACK, 101, 501, 5, 502, (7, 9)),
            (FIN | ACK, 106, 501, 0, 502, None),
        ][i % 4]
        seen.append(SegmentSeen(t(i), src, dst, flags, seq, ack, length, window, ts))
    return seen


def ethertype(packet: bytes) -> bytes:
    return b"\x08\x00" if packet[0] >> 4 == 4 else b"\x86\xdd"


LINKS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "ethernet": (1, lambda p: bytes(12) + ethertype(p) + p.ljust(46, b"\0")),
    "vlan": (1, lambda p: bytes(12) + b"\x81\x00\x00\x05" + ethertype(p) + p),
    "double vlan": (1, lambda p: bytes(12) + b"\x88\xa8\0\1\x81\0\0\2" + ethertype(p) + p),
    "cooked": (113, lambda p: bytes(14) + ethertype(p) + p),
    "cooked v2": (276, lambda p: ethertype(p) + bytes(18) + p),
    "raw": (101, lambda p: p),
    "raw (old number)": (12, lambda p: p),
    "null, little-endian": (0, lambda p: bytes([2 if p[0] >> 4 == 4 else 24, 0, 0, 0]) + p),
    "null, big-endian": (0, lambda p: bytes([0, 0, 0, 2 if p[0] >> 4 == 4 else 30]) + p),
    "loop": (108, lambda p: bytes([0, 0, 0, 2 if p[0] >> 4 == 4 else 24]) + p),
}


def pcap(frames: list[bytes], link: int, *, order: str = "<", nano: bool = False) -> bytes:
    out = struct.pack(
        f"{order}IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, 65535, link
    )
    for i, frame in enumerate(frames):
        fraction = 250_000 * i * (1000 if nano else 1)
        unit = 10**9 if nano else 10**6
        seconds = 1_700_000_000 + fraction // unit
        out += struct.pack(f"{order}IIII", seconds, fraction % unit, len(frame), len(frame)) + frame
    return out


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    length = struct.pack(f"{order}I", 12 + len(body))
    return struct.pack(f"{order}I", kind) + length + body + length


def section(order: str = "<") -> bytes:
    return block(0x0A0D0D0A, struct.pack(f"{order}IHHq", 0x1A2B3C4D, 1, 0, -1), order)


def interface(link: int, *options: tuple[int, bytes], order: str = "<") -> bytes:
    body = struct.pack(f"{order}HHI", link, 0, 0)
    for code, value in options:
        body += struct.pack(f"{order}HH", code, len(value)) + value + bytes(-len(value) % 4)
    return block(1, body + bytes(4), order)


def enhanced(index: int, stamp: int, frame: bytes, *, order: str = "<") -> bytes:
    head = struct.pack(
        f"{order}IIIII", index, stamp >> 32, stamp & 0xFFFFFFFF, len(frame), len(frame)
    )
    return block(6, head + frame, order)


def run(data: bytes) -> tuple[list[Event], list[str]]:
    faults: list[str] = []
    frames = capture._frames(capture._Input(io.BytesIO(data)), faults.append)
    return list(capture._segments(frames, faults.append, None)), faults


def near(events: list[Event]) -> list[Event]:
    """Times rounded to the microsecond, for the arithmetic of floats."""
    from attrs import evolve

    return [evolve(e, t=round(e.t, 6)) for e in events]


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("nano", [False, True])
def test_pcap_of_every_link_order_and_precision(link: str, order: str, nano: bool) -> None:
    number, frame = LINKS[link]
    events, faults = run(pcap([frame(p) for p in PACKETS], number, order=order, nano=nano))
    assert near(events) == expected(t=lambda i: i / 4)
    assert faults == []


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("order", ["<", ">"])
def test_pcapng_of_every_link_and_order(link: str, order: str) -> None:
    number, frame = LINKS[link]
    data = section(order) + interface(number, order=order)
    for i, packet in enumerate(PACKETS):
        data += enhanced(0, 1_700_000_000_000_000 + 250_000 * i, frame(packet), order=order)
    events, faults = run(data)
    assert near(events) == expected(t=lambda i: i / 4)
    assert faults == []


def test_pcapng_interfaces_have_their_own_links_and_clocks() -> None:
    nano = (9, b"\x09")
    binary = (9, b"\x8a")  # units of 2**-10 s
    later = (14, struct.pack("<q", 1000))
    data = section() + interface(101) + interface(1, nano) + interface(276, binary, later)
    data += enhanced(0, 2000 * 10**6, PACKETS[0])
    data += enhanced(1, 2001 * 10**9 + 1, LINKS["ethernet"][1](PACKETS[1]))
    data += enhanced(2, 1002 * 1024 + 512, LINKS["cooked v2"][1](PACKETS[2]))
    # A new section forgets them and may be of the other order.
    data += section(">") + interface(113, order=">")
    data += enhanced(0, 2003 * 10**6, LINKS["cooked"][1](PACKETS[3]), order=">")
    events, faults = run(data)
    assert [e.t for e in events] == [0, pytest.approx(1 + 1e-9, abs=1e-12), 2.5, 3]
    assert [e.seq for e in events] == [100, 101, 101, 106]  # type: ignore[union-attr]
    assert faults == []


def test_other_pcapng_blocks_are_packets_losses_or_passed_over() -> None:
    data = section() + interface(101)
    data += block(3, struct.pack("<I", len(PACKETS[0])) + PACKETS[0])
    data += block(4, b"names") + block(0xBAD, b"unknown, and not a multiple of 4")
    old = struct.pack("<HHIIII", 0, 0, 0, 5, len(PACKETS[1]), len(PACKETS[1]))
    data += block(2, old + PACKETS[1])
    for total in (3, 5):
        data += block(5, struct.pack("<IIIHHQ", 0, 0, 9, 5, 8, total))
    events, faults = run(data)
    assert [type(e).__name__ for e in events] == ["SegmentSeen", "SegmentSeen", "Lost", "Lost"]
    assert [e.count for e in events if isinstance(e, Lost)] == [3, 2]
    assert faults == []


def test_a_short_snap_length_keeps_what_was_captured() -> None:
    packet = encode(Packet(CLIENT, SERVER, Segment(1, 1, ACK, 9, bytes(1000), STAMPS)))
    head = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 60, 101)
    events, faults = run(head + struct.pack("<IIII", 0, 0, 60, len(packet)) + packet[:60])
    assert [(e.length, e.ts) for e in events] == [(1000, (7, 9))]  # type: ignore[union-attr]
    events, faults = run(head + struct.pack("<IIII", 0, 0, 45, len(packet)) + packet[:45])
    assert [(e.length, e.ts) for e in events] == [(1000, None)]  # type: ignore[union-attr]
    events, faults = run(head + struct.pack("<IIII", 0, 0, 39, len(packet)) + packet[:39])
    assert (events, faults) == ([], ["1 frame not read: a packet cut off within its headers"])


def test_frames_that_are_no_segments_are_passed_over_or_told() -> None:
    udp = b"\x45\0\0\x1c" + bytes(5) + b"\x11" + bytes(18)
    udp6 = b"\x60\0\0\0\0\x08\x11\x40" + bytes(40)
    arp = bytes(12) + b"\x08\x06" + bytes(28)
    strays = [LINKS["ethernet"][1](p) for p in (udp, udp6)] + [arp, b""]
    events, faults = run(pcap([*strays, LINKS["ethernet"][1](PACKETS[0])], 1))
    assert (len(events), faults) == (1, [])
    events, faults = run(pcap(strays, 1))
    assert (events, faults) == ([], ["2 frames not TCP but IP protocol 17", "2 frames not IP"])
    fragment = bytearray(PACKETS[0])
    fragment[6] = 0x20
    events, faults = run(pcap([bytes(fragment), bytes(fragment), PACKETS[0][:30]], 101))
    assert (events, faults) == (
        [],
        [
            "2 frames not read: a fragment of an IPv4 packet",
            "1 frame not read: a packet cut off within its headers",
        ],
    )


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (pcap(PACKETS[:1], 105), "frames of link type 105 are not understood"),
        (pcap(PACKETS[:2], 101)[:-3], "record 2 is cut off: 49 of its 52 bytes are there"),
        (pcap(PACKETS[:2], 101) + b"123", "record 3 is cut off within its header"),
        (pcap([], 101)[:20], "the file ends within its header"),
        (
            pcap([], 101) + struct.pack("<IIII", 0, 0, 1 << 31, 60) + bytes(99),
            "record 1 says it has 2147483648 bytes; nothing after it can be read",
        ),
        (
            section() + struct.pack("<III", 6, 3, 0),
            "block 2 says it has 3 bytes; nothing after it can be read",
        ),
        (section() + interface(1)[:-4], "block 2 is cut off: 20 of its 24 bytes are there"),
        (section() + enhanced(0, 0, b""), "block 2 is of an interface that was never described"),
        (
            section() + interface(1) + block(6, struct.pack("<IIIII", 0, 0, 0, 99, 99)),
            "block 3 makes no sense: says its frame has 99 bytes",
        ),
        (
            b"\x0a\x0d\x0d\x0a" + struct.pack("<II", 28, 0x12345678) + bytes(16),
            "block 1 has no byte order; nothing after it can be read",
        ),
    ],
)
def test_each_fault_is_told(data: bytes, fault: str) -> None:
    assert run(data)[1] == [fault]


@pytest.mark.parametrize("data", [b"", b"abc", b"\x7fELF" + bytes(100), b'{"kind": "run"}\n'])
def test_what_is_no_capture_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(CaptureError, match="not a capture"):
        list(read(path))


WHOLE_PCAP = pcap([LINKS["ethernet"][1](p) for p in PACKETS], 1)
WHOLE_PCAPNG = section() + interface(101, (9, b"\x09"))
for number, packet in enumerate(PACKETS):
    WHOLE_PCAPNG += enhanced(0, number, packet)
WHOLE_PCAPNG += block(5, struct.pack("<IIIHHQ", 0, 0, 9, 5, 8, 1))


@given(st.sampled_from([WHOLE_PCAP, WHOLE_PCAPNG]), st.data())
def test_a_file_cut_anywhere_gives_what_came_before(whole: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(4, len(whole)))
    everything, _ = run(whole)
    events, faults = run(whole[:cut])
    assert events == everything[: len(events)]
    assert len(faults) <= 1


@settings(max_examples=400)
@given(
    st.sampled_from([WHOLE_PCAP, WHOLE_PCAPNG]),
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=6),
)
def test_lengths_that_lie_never_crash_or_hang(whole: bytes, lies: list[tuple[int, bytes]]) -> None:
    data = bytearray(whole)
    for where, lie in lies:
        where %= len(data)
        data[where : where + len(lie)] = lie
    with contextlib.suppress(CaptureError):
        events, faults = run(bytes(data))
        assert len(events) <= 64
        assert len(faults) <= 64


@given(st.binary(max_size=300), st.sampled_from([WHOLE_PCAP[:24], section() + interface(1)]))
def test_any_bytes_after_a_good_head(data: bytes, head: bytes) -> None:
    run(head + data)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    body = WHOLE_PCAP[24:]
    peaks = []
    for times in (2_000, 10_000):
        path = tmp_path / "long.pcap"
        path.write_bytes(WHOLE_PCAP[:24] + body * times)
        tracemalloc.start()
        count = sum(1 for _ in read(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 8 * times
    assert peaks[1] < peaks[0] * 1.1 < 2_000_000


FIELDS = (
    *("ip.src", "ipv6.src", "tcp.srcport", "ip.dst", "ipv6.dst", "tcp.dstport", "tcp.flags"),
    *("tcp.seq_raw", "tcp.ack_raw", "tcp.len", "tcp.window_size_value"),
    *("tcp.options.timestamp.tsval", "tcp.options.timestamp.tsecr"),
)


def by_tshark(path: Path) -> list[tuple[object, ...]]:
    fields = [argument for name in FIELDS for argument in ("-e", name)]
    done = subprocess.run(
        ["tshark", "-r", path, "-Y", "tcp", "-T", "fields", *fields],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = []
    for line in done.stdout.splitlines():
        ip, ip6, sport, dip, dip6, dport, flags, *rest = line.split("\t")
        seq, ack, length, window, tsval, tsecr = (int(x) if x else None for x in rest)
        ts = None if tsval is None else (tsval, tsecr)
        there = (ip or ip6, int(sport)), (dip or dip6, int(dport))
        rows.append((*there, int(flags, 16), seq, ack, length, window, ts))
    return rows


def churn(port: int, count: int) -> None:
    for host, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
        with socket.create_server((host, port), family=family, backlog=64) as listener:
            for i in range(count):
                client = socket.create_connection((host, port))
                server, _ = listener.accept()
                client.sendall(bytes(i * 1000))
                client.shutdown(socket.SHUT_WR)
                while server.recv(1 << 20):
                    pass
                server.close()
                client.close()


@root
@pytest.mark.skipif(
    not (shutil.which("tcpdump") and shutil.which("tshark")), reason="needs tcpdump and tshark"
)
@pytest.mark.parametrize(
    "options",
    [("-i", "lo"), ("-i", "any"), ("-i", "any", "-y", "LINUX_SLL"), ("-i", "lo", "-s", "80")],
)
def test_a_real_capture_reads_as_tshark_reads_it(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "seen.pcap"
    with Namespace() as ns, ns.entered():
        dump = subprocess.Popen(
            [
                "tcpdump",
                *options,
                "--immediate-mode",
                "-B",
                "65536",
                "-U",
                "-Z",
                "root",
                "-w",
                path,
            ],
            stderr=subprocess.PIPE,
        )
        assert dump.stderr is not None
        while b"listening" not in dump.stderr.readline():
            pass
        churn(9090, 5)
        until = time.monotonic() + 30  # it writes when it has time
        while sum(1 for _ in read(path)) <= 60 and time.monotonic() < until:
            time.sleep(0.1)
        dump.terminate()
        dump.communicate()
    ng = tmp_path / "seen.pcapng"
    subprocess.run(["editcap", "-F", "pcapng", path, ng], check=True)
    truth = by_tshark(path)
    assert len(truth) > 60
    for file in (path, ng):
        faults: list[str] = []
        ours = [
            (e.src, e.dst, e.flags, e.seq, e.ack, e.length, e.window, e.ts)
            for e in read(file, faults.append)
            if isinstance(e, SegmentSeen)
        ]
        assert ours == truth
        assert faults == []


def conversation(port: int, host: str) -> tuple[tuple[str, int], tuple[str, int]]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        socket.create_server((host, port), family=family) as listener,
        socket.create_connection((host, port)) as client,
    ):
        server, _ = listener.accept()
        ends = server.getsockname()[:2], client.getsockname()[:2]
        client.sendall(b"hello")
        assert server.recv(9) == b"hello"
        server.close()
        assert client.recv(1) == b""
    return ends


@root
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_is_captured_live_once_and_in_order(host: str) -> None:
    began = time.monotonic()
    with Namespace() as ns, ns.entered(), Capture([9090], start=began) as seen:
        conversation(9091, host)  # not asked for
        assert select.select([seen], [], [], 0) == ([], [], [])
        server, client = conversation(9090, host)
        assert select.select([seen], [], [], 5) == ([seen], [], [])
        events = seen.read()
        took = time.monotonic() - began
        assert seen.lost == 0
        assert seen.read() == []
    segments = [e for e in events if isinstance(e, SegmentSeen)]
    assert segments == events
    forward = [e for e in segments if e.src == client]
    assert [e.src for e in segments if e not in forward] == [server] * (len(events) - len(forward))
    assert [e.flags for e in forward][:2] == [SYN, ACK]
    assert forward[-1].flags in (ACK, FIN | ACK)
    assert sum(e.length for e in forward) == 5
    assert [e.flags & FIN for e in segments].count(FIN) == 2
    assert all(0 < e.t < took for e in segments)
    assert forward[0].ts is not None


@root
def test_what_the_ring_cannot_hold_is_counted() -> None:
    with (
        Namespace() as ns,
        ns.entered(),
        Capture(None, buffer=256 << 10) as small,
        Capture(None) as large,
    ):
        churn(9090, 120)
        everything = large.read()
        partly = small.read()
        assert large.lost == 0
        assert small.lost > 0
        seen = [e for e in partly if isinstance(e, SegmentSeen)]
        (lost,) = [e for e in partly if isinstance(e, Lost)]
        assert lost.count == small.lost == len(everything) - len(seen)
        assert (
            [(e.src, e.seq, e.flags) for e in seen]
            == [
                (e.src, e.seq, e.flags)  # type: ignore[union-attr]
                for e in everything[: len(seen)]
            ]
        )
        # and it goes on afterwards
        conversation(9090, "127.0.0.1")
        assert len(small.read()) >= 7


@root
def test_an_interface_may_be_chosen() -> None:
    with Namespace() as ns, ns.entered():
        with Capture([9090], interface="lo") as seen:
            conversation(9090, "127.0.0.1")
            assert seen.read()
        with pytest.raises(OSError, match="no interface with this name"):
            Capture([9090], interface="nonesuch")


@root
def test_without_rights_the_reason_is_said(importable: Path, nobody: tuple[str, ...]) -> None:
    program = (
        "from timewait.kernel.capture import Capture\n"
        "try: Capture([9090])\n"
        "except PermissionError as error: print(error.strerror)\n"
    )
    done = subprocess.run(
        [*nobody, sys.executable, "-c", program],
        env={"PYTHONPATH": str(importable)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == (
        "capturing needs CAP_NET_RAW (root, or a private network namespace)\n"
    ), done.stderr


@root
def test_anybody_captures_in_a_namespace_of_their_own(
    importable: Path, nobody: tuple[str, ...]
) -> None:
    program = (
        "import socket\n"
        "from timewait.kernel.namespace import isolate\n"
        "from timewait.kernel.capture import Capture\n"
        "isolate()\n"
        "with Capture([9090]) as seen:\n"
        "    server = socket.create_server(('127.0.0.1', 9090))\n"
        "    client = socket.create_connection(('127.0.0.1', 9090))\n"
        "    print([e.flags for e in seen.read()])\n"
    )
    done = subprocess.run(
        [*nobody, sys.executable, "-c", program],
        env={"PYTHONPATH": str(importable)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[2, 18, 16]\n", done.stderr


def test_many_ports_fit_and_too_many_are_refused() -> None:
    assert len(capture._program(frozenset(range(1, 50)))) % 8 == 0
    with pytest.raises(ValueError, match="too many ports"):
        capture._program(frozenset(random.sample(range(65536), 1000)))

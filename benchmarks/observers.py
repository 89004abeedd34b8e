"""Watching the kernel: what a look at the table costs, what watching slows, how fast files read.

Everything happens in private network namespaces; as an ordinary user only the
file reader is measured.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks import Figure, side_by_side
from timewait.kernel.capture import read
from timewait.kernel.namespace import Namespace
from timewait.kernel.sock_diag import sockets
from timewait.tcp.packet import Packet, encode
from timewait.tcp.segment import ACK, FIN, PSH, SYN, Options, Segment
from timewait.watching import watch

PORT = 9090
TIME_WAITS = 28_000
ROOM = {"net.ipv4.tcp_tw_reuse": 0, "net.ipv4.tcp_max_tw_buckets": 1_000_000}

CHURN = f"""
import ctypes, os, socket, sys, time

def churn(address, count):
    for _ in range(count):
        client = socket.socket()
        client.connect(address)
        server, _ = listener.accept()
        client.close()
        server.close()

for line in sys.stdin:
    namespace, host, count = line.split()
    fd = os.open(namespace, os.O_RDONLY)
    assert ctypes.CDLL(None).setns(fd, 0) == 0
    os.close(fd)
    with socket.create_server((host, {PORT}), backlog=128) as listener:
        churn((host, {PORT}), 100)
        start = time.perf_counter()
        churn((host, {PORT}), int(count))
        took = time.perf_counter() - start
    print(took / int(count), flush=True)
"""


def measure(quick: bool) -> Iterator[Figure]:
    yield from _files(quick)
    yield from _dumps(quick)
    for name, bound in (("tracepoint", 1.05), ("sock_diag", 1.05), ("capture", 1.15)):
        yield _overhead(name, bound, quick)  # takes root


# A dump of the table


def _dumps(quick: bool) -> Iterator[Figure]:
    with Namespace(sysctls=ROOM) as ns, ns.entered(), _churning() as churn:
        # To two addresses: connect() slows down a hundredfold once half the ports are used.
        for host in ("127.0.0.1", "127.0.0.2"):
            churn(TIME_WAITS // 2 - 100, host)
        count = len(sockets())
        peers: list[tuple[str, Callable[[int], object] | None, float | None]] = [
            ("ss -tan", _ss if shutil.which("ss") else None, 1.0),
            ("/proc/net/tcp, read and split", _proc, None),
            ("psutil", _psutil(), None),
            ("pyroute2", _pyroute2(), None),
        ]
        for name, peer, target in peers:
            works = [(lambda n: sockets(), 1), *([(peer, 1)] if peer else [])]
            ours, *theirs = side_by_side(*works, rounds=3 if quick else 9)
            yield Figure(
                f"dump of {count:,} sockets in TIME_WAIT", ours, "/s", name, *theirs, target=target
            )
        works = [(lambda n: sockets(PORT + 1), 1), *([(_ss_port, 1)] if shutil.which("ss") else [])]
        ours, *theirs = side_by_side(*works, rounds=5)
        what = f"one other port among {count:,} sockets"
        yield Figure(what, ours, "/s", "ss with a filter", *theirs, target=1.0)


def _ss(_: int) -> None:
    subprocess.run(["ss", "-tan"], stdout=subprocess.DEVNULL, check=True)


def _ss_port(_: int) -> None:
    condition = ["sport", "=", f":{PORT + 1}", "or", "dport", "=", f":{PORT + 1}"]
    subprocess.run(["ss", "-tan", *condition], stdout=subprocess.DEVNULL, check=True)


def _proc(_: int) -> list[list[str]]:
    with open("/proc/thread-self/net/tcp") as table:
        return [line.split() for line in table]


def _psutil() -> Callable[[int], object] | None:
    try:
        import psutil
    except ImportError:
        return None
    return lambda _: psutil.net_connections("tcp")


def _pyroute2() -> Callable[[int], object] | None:
    try:
        from pyroute2 import DiagSocket
    except ImportError:
        return None

    def dump(_: int) -> object:
        with DiagSocket() as diag:
            diag.bind()
            return list(diag.get_sock_stats(family=socket.AF_INET))

    return dump


# What watching costs those who are watched


def _overhead(name: str, bound: float, quick: bool) -> Figure:
    """By the clock, watched and unwatched rounds in turn, each in a namespace of its own."""
    count, rounds = (1_000, 15) if quick else (2_000, 60)
    watched, alone = [], []
    seen = lost = 0
    with _undisturbed(), _churning() as churn:
        for each in range(2 * rounds):
            with Namespace(sysctls=ROOM) as ns, ns.entered():
                if each % 4 in (0, 3):
                    alone.append(churn(count))
                    continue
                with watch(PORT, observer=name) as witness:
                    watched.append(churn(count))
            seen += len(witness.events)
            lost += witness.lost
    return Figure(
        f"a connection's time, by the clock, while its port is watched by {name}",
        median(watched) * 1e6,
        "µs",
        "unwatched",
        median(alone) * 1e6,
        bound,
        lower_is_better=True,
        note=f"{rounds} rounds of {count:,} either way in turn; {seen:,} events, {lost} lost",
    )


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Run, with those started meanwhile, before anything else that wants a processor."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


@contextmanager
def _churning() -> Iterator[Callable[..., float]]:
    """Another process that opens and closes connections in the namespace this thread is in."""
    with subprocess.Popen(
        [sys.executable, "-c", CHURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def churn(count: int, host: str = "127.0.0.1") -> float:
            """The seconds a connection took."""
            namespace = f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net"
            print(namespace, host, count, file=commands, flush=True)
            return float(answers.readline())

        yield churn


# Files

FIELDS = (
    *("frame.time_epoch", "ip.src", "ip.dst", "tcp.srcport", "tcp.dstport", "tcp.flags"),
    *("tcp.seq_raw", "tcp.ack_raw", "tcp.len", "tcp.window_size_value"),
    *("tcp.options.timestamp.tsval", "tcp.options.timestamp.tsecr"),
)


def _files(quick: bool) -> Iterator[Figure]:
    connections = 2_000 if quick else 20_000
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "capture.pcap")
        count = _write(path, connections)
        ours = _cpu_rate(lambda: sum(1 for _ in read(path)), count)
        what = "segments read from a pcap file (CPU)"
        theirs = _cpu_rate(lambda: _tshark(path), count) if shutil.which("tshark") else None
        yield Figure(what, ours, "/s", "tshark -T fields", theirs, 0.5)
        try:
            import dpkt
        except ImportError:
            theirs = None
        else:
            theirs = _cpu_rate(lambda: _dpkt(path, dpkt), count)
        yield Figure(what, ours, "/s", "dpkt", theirs)


def _write(path: Path, connections: int) -> int:
    client, server = ("192.0.2.1", 0), ("192.0.2.2", 443)
    stamps = Options(ts_val=1, ts_ecr=2)
    course = [
        (0, Segment(1, 0, SYN, 64240, b"", Options(1460, 7, True, 1, 0))),
        (1, Segment(1, 2, SYN | ACK, 65160, b"", Options(1460, 7, True, 1, 1))),
        (0, Segment(2, 2, ACK, 502, b"", stamps)),
        (0, Segment(2, 2, PSH | ACK, 502, bytes(200), stamps)),
        (1, Segment(2, 202, PSH | ACK, 509, bytes(1200), stamps)),
        (0, Segment(202, 1202, FIN | ACK, 501, b"", stamps)),
        (1, Segment(1202, 203, FIN | ACK, 509, b"", stamps)),
        (0, Segment(203, 1203, ACK, 501, b"", stamps)),
    ]
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1))
        for n in range(connections):
            ends = (client[0], 1024 + n % 60000), server
            for i, (direction, segment) in enumerate(course):
                src, dst = ends if direction == 0 else reversed(ends)
                frame = bytes(12) + b"\x08\x00" + encode(Packet(src, dst, segment))
                file.write(struct.pack("<IIII", 1_700_000_000 + n, i, len(frame), len(frame)))
                file.write(frame)
    return connections * len(course)


def _cpu_rate(work: Callable[[], object], count: int) -> float:
    """Per second of processor time, children's included: other work there does not count."""
    before = sum(os.times()[:4])
    work()
    return count / max(sum(os.times()[:4]) - before, 1e-9)


def _tshark(path: Path) -> None:
    fields = [argument for name in FIELDS for argument in ("-e", name)]
    subprocess.run(
        ["tshark", "-r", path, "-T", "fields", *fields],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )


def _dpkt(path: Path, dpkt: object) -> None:
    with path.open("rb") as file:
        for _, frame in dpkt.pcap.Reader(file):  # type: ignore[attr-defined]
            ip = dpkt.ethernet.Ethernet(frame).data  # type: ignore[attr-defined]
            tcp = ip.data
            _ = (ip.src, ip.dst, tcp.sport, tcp.dport, tcp.seq, tcp.ack, tcp.flags, tcp.win)
            _ = dpkt.tcp.parse_opts(tcp.opts)  # type: ignore[attr-defined]

"""The wire: a kernel in a namespace of its own, and this process at its other end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from timewait.kernel.capture import ahead_of_monotonic
from timewait.kernel.wire import Wire, WireError
from timewait.packetdrill.frames import Frame, decode, encode
from timewait.tcp.segment import ACK, RST, SYN


@pytest.fixture(params=["tun", "veth"])
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    try:
        made = Wire(device=request.param)
    except WireError as why:
        pytest.skip(str(why))
    with made:
        yield made


def answer(wire: Wire, wanted: str = "tcp") -> Frame:
    while wire.wait(2):
        octets = wire.read()
        frame = None if octets is None else decode(octets)
        if frame is not None and frame.protocol == wanted:
            return frame
    raise AssertionError("the kernel sent nothing")


@pytest.mark.parametrize(
    ("ours", "theirs"), [("192.0.2.1", "192.168.0.1"), ("2001:db8::1", "fd3d:fa7b:d17d::1")]
)
def test_a_syn_to_a_closed_port_is_reset(wire: Wire, ours: str, theirs: str) -> None:
    wire.send(encode(Frame(ours, theirs, ports=(1234, 9090), flags=SYN, seq=100, window=1000)))
    came = answer(wire)
    assert (came.src, came.dst, came.ports) == (theirs, ours, (9090, 1234))
    assert came.flags == RST | ACK
    assert came.ack == 101


def test_the_kernel_connects_to_nobody_and_its_syn_arrives_here(wire: Wire) -> None:
    with wire.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        client.connect_ex(("192.0.2.1", 80))
        came = answer(wire)
    assert (came.dst, came.ports[1], came.flags) == ("192.0.2.1", 80, SYN)


def test_a_packet_read_late_tells_when_it_was_sent(wire: Wire) -> None:
    with wire.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        before = time.monotonic()
        client.connect_ex(("192.0.2.1", 80))
        after = time.monotonic()
        time.sleep(0.2)
        assert answer(wire).flags == SYN
    assert before - 0.01 < wire.sent_at < after + 0.01


def test_packets_were_sent_in_the_order_in_which_they_come(
    wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a look at two clocks was interrupted: 2 ms between the two were seen."""
    ahead = ahead_of_monotonic()
    tries = iter([ahead - 5_000_000, ahead])
    monkeypatch.setattr("timewait.kernel.wire.ahead_of_monotonic", lambda: next(tries))
    stamps = []
    with wire.socket(kind=socket.SOCK_DGRAM) as sock:
        for octets in (b"a", b"b"):
            sock.sendto(octets, ("192.0.2.1", 9))
            assert wire.wait(2)
            assert wire.read()
            stamps.append(wire.sent_at)
    assert stamps == sorted(stamps)


def test_a_segment_with_a_wrong_checksum_is_not_answered(wire: Wire) -> None:
    sound = encode(Frame("192.0.2.1", "192.168.0.1", ports=(1, 2), flags=SYN))
    wire.send(sound[:-1] + bytes([sound[-1] ^ 1]))
    wire.send(encode(Frame("192.0.2.1", "192.168.0.1", ports=(3, 4), flags=SYN)))
    assert answer(wire).ports == (4, 3)


def test_settings_are_the_namespaces_own(wire: Wire) -> None:
    outside = Path("/proc/sys/net/ipv4/tcp_fin_timeout").read_text().strip()
    wire.sysctl("net.ipv4.tcp_fin_timeout", 7)
    assert wire.sysctl("net.ipv4.tcp_fin_timeout") == "7"
    assert Path("/proc/sys/net/ipv4/tcp_fin_timeout").read_text().strip() == outside


@pytest.mark.skipif(os.geteuid() != 0, reason="this is the ordinary user already")
def test_an_ordinary_user_has_a_wire_too(importable: Path, nobody: tuple[str, ...]) -> None:
    program = """
        import socket
        from timewait.kernel.wire import Wire

        with Wire() as wire:
            client = wire.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            client.connect_ex(("192.0.2.1", 80))
            assert wire.wait(2)
            print(wire.namespace.how, wire.device, len(wire.read()))
            client.close()
    """
    ran = subprocess.run(
        [*nobody, sys.executable, "-c", textwrap.dedent(program)],
        env={"PYTHONPATH": str(importable), "PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    closed = os.stat("/dev/net/tun").st_mode & 0o006 != 0o006
    assert ran.stdout.split() == ["user", "veth" if closed else "tun", "60"], ran.stderr


def test_a_killed_wire_leaves_nothing() -> None:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from timewait.kernel.wire import Wire\n"
        "wire = Wire(); print(wire.namespace.inode, flush=True)\n"
        "import time; time.sleep(60)"
    )
    with ExitStack() as opened:
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as lab:
            assert lab.stdout is not None
            inode = int(lab.stdout.readline())
            for fd in Path(f"/proc/{lab.pid}/fd").iterdir():
                if fd.stat().st_ino == inode:  # is kept, or the next namespace has this number
                    opened.enter_context(fd.open())
            lab.kill()
            lab.wait()
        held = set()
        for process in Path("/proc").glob("[0-9]*/task/*/ns/net"):
            try:
                held.add(process.stat().st_ino)
            except OSError:
                continue
        assert inode not in held

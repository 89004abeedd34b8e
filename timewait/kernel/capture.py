"""Segments as they pass: live from the network interfaces, or from pcap and pcapng files.

A capture shows what was on the wire and no state of any socket; live it needs
CAP_NET_RAW, which anybody has inside a private network namespace
(`timewait.kernel.namespace`).

Files are read in one pass with bounded memory, whatever their length. What is
wrong with a file is told once, in words with the record's number, and what
came before it is kept. The reader is our own because the packaged one (dpkt)
neither keeps up nor keeps what is needed: the length on the wire, nanoseconds,
interfaces of different kinds (`benchmarks/observers.py`).

Sources: draft-ietf-opsawg-pcap and -pcapng, the link types of
tcpdump.org/linktypes.html, packet(7), bpf filters as in Linux's
Documentation/networking/filter.rst and packet_mmap.rst.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self, TypeAlias

from attrs import define, field

from timewait.events import Event, Lost, Row, SegmentSeen
from timewait.kernel import bpf
from timewait.tcp.packet import NotTCP, decode, host_text

__all__ = ["Capture", "CaptureError", "ahead_of_monotonic", "read"]

Tell: TypeAlias = Callable[[str], object]
# When in ns, link type, buffer, where the frame begins and ends in it, its length on the wire.
_Frame: TypeAlias = tuple[int, int, bytes, int, int, int]


class CaptureError(ValueError):
    """A file that is no capture at all; the message says why."""


def read(
    file: Path | str | BinaryIO,
    tell: Tell = lambda problem: None,
    *,
    ports: Container[int] | None = None,
) -> Iterator[Event]:
    """The TCP segments in a pcap or pcapng file, in its order; `t` is since its first frame.

    The file may be open already. `ports` limits the segments. `tell` hears of
    each fault: where the file is cut off or makes no sense (what follows is
    then not read), which link types are not understood, how many frames were
    not whole TCP segments, how many were something else where none was TCP.

    Raises `OSError`, and `CaptureError` for a file that is no capture.
    """
    if isinstance(file, (Path, str)):
        with open(file, "rb", buffering=0) as opened:
            yield from read(opened, tell, ports=ports)
    else:
        yield from _segments(_frames(_Input(file), tell), tell, ports)


def _segments(
    frames: Iterator[_Frame], tell: Tell, ports: Container[int] | None
) -> Iterator[Event]:
    origin: int | None = None
    unknown: set[int] = set()
    unreadable: dict[str, int] = {}
    others: dict[str, int] = {}
    found = False
    for ns, link, buffer, at, end, wire in frames:
        if origin is None:
            origin = ns
        if link < 0:  # not a frame but the count of those that were lost
            yield Lost((ns - origin) * 1e-9, "capture", wire, "as the capture file says")
            continue
        find = _LINKS.get(link)
        if find is None:
            if link not in unknown:
                unknown.add(link)
                tell(f"frames of link type {link} are not understood")
            continue
        start = find(buffer, at, end)
        if start < 0:
            others["not IP"] = others.get("not IP", 0) + 1
            continue
        try:
            seen = _segment(buffer, start, end, wire - (start - at), (ns - origin) * 1e-9)
        except NotTCP as what:
            others[str(what)] = others.get(str(what), 0) + 1
            continue
        except ValueError as why:
            unreadable[str(why)] = unreadable.get(str(why), 0) + 1
            continue
        found = True
        if ports is None or seen.src[1] in ports or seen.dst[1] in ports:
            yield seen
    for reason, count in unreadable.items():
        tell(f"{count} frame{'s' if count > 1 else ''} not read: {reason}")
    for reason, count in others.items():
        # Beside TCP it is of no interest, unless TCP may be inside.
        tunnel = next((name for name in _TUNNELS if reason.endswith(f"protocol {name}")), None)
        if tunnel or not found:
            inside = f" ({_TUNNELS[tunnel]}: what is inside is not read)" if tunnel else ""
            tell(f"{count} frame{'s' if count > 1 else ''} {reason}{inside}")


_TUNNELS: Final = {"4": "IP in IP", "41": "IPv6 in IP", "47": "GRE", "50": "ESP"}


# IPv4 without options, then TCP: as nearly all segments are. A look at the whole of it at
# once is what makes the reader fast; anything else goes through `timewait.tcp.packet`.
_IPV4_TCP: Final = struct.Struct(">BxHxxHxB2x4s4sHHIIBBH")
_IPV6_TCP: Final = struct.Struct(">BxxxHBx16s16sHHIIBBH")
_TIMESTAMPS: Final = struct.Struct(">III")
_NOP_NOP_TIMESTAMPS: Final = 0x0101080A
_ACK: Final = 0x10


def _segment(buffer: bytes, at: int, end: int, wire: int, t: float) -> SegmentSeen:
    """The segment in the IP packet at `at`.

    Raises `ValueError` for what is not a whole one, `NotTCP` for another protocol.
    """
    first = buffer[at] if at < end else 0
    plain = False
    if first == 0x45 and end - at >= 40:
        (_, total, fragment, protocol, source, target, sport, dport, seq, ack, offset, flags,
         window) = _IPV4_TCP.unpack_from(buffer, at)  # fmt: skip
        head = 20
        plain = protocol == 6 and total > 0 and not fragment & 0x3FFF
    elif first >> 4 == 6 and end - at >= 60:
        (_, payload, protocol, source, target, sport, dport, seq, ack, offset, flags, window) = (
            _IPV6_TCP.unpack_from(buffer, at)
        )
        head, total = 40, payload + 40
        plain = protocol == 6 and payload > 0
    if plain:
        options = offset >> 4 << 2
        length = total - head - options
        stamps = None
        if options == 32 and end - at >= head + 32:
            layout, *both = _TIMESTAMPS.unpack_from(buffer, at + head + 20)
            if layout == _NOP_NOP_TIMESTAMPS:
                stamps = both[0], both[1]
        if length >= 0 and (options == 20 or stamps is not None):
            src, dst = (host_text(source), sport), (host_text(target), dport)
            ack = ack if flags & _ACK else 0
            return SegmentSeen(t, src, dst, flags, seq, ack, length, window, stamps)
    packet = decode(bytes(buffer[at:end]), truncated=True, wire_length=wire)
    segment = packet.segment
    known = segment.options
    return SegmentSeen(
        t,
        packet.src,
        packet.dst,
        segment.flags,
        segment.seq,
        segment.ack,
        packet.length,
        segment.window,
        None if known is None or known.ts_val is None else (known.ts_val, known.ts_ecr or 0),
    )


# Link types: where in a frame the IP packet begins; negative where there is none


def _ethernet(buffer: bytes, at: int, end: int) -> int:
    at += 12
    while at + 2 <= end:
        kind = buffer[at] << 8 | buffer[at + 1]
        if kind in _IP:
            return at + 2
        if kind not in _VLAN:
            return -1
        at += 4
    return -1


def _cooked(buffer: bytes, at: int, end: int) -> int:
    return _after_type(buffer, at + 14, at + 16, end)


def _cooked2(buffer: bytes, at: int, end: int) -> int:
    return _after_type(buffer, at, at + 20, end)


def _after_type(buffer: bytes, at: int, start: int, end: int) -> int:
    if start > end:
        return -1
    kind = buffer[at] << 8 | buffer[at + 1]
    while kind in _VLAN and start + 4 <= end:
        kind = buffer[start + 2] << 8 | buffer[start + 3]
        start += 4
    return start if kind in _IP else -1


def _null(buffer: bytes, at: int, end: int) -> int:
    # The family is in the byte order of the machine that captured, and IPv6's number is
    # that of its system: what follows tells better.
    return at + 4 if end - at > 4 and buffer[at + 4] >> 4 in (4, 6) else -1


def _raw(buffer: bytes, at: int, end: int) -> int:
    return at if end > at and buffer[at] >> 4 in (4, 6) else -1


_IP: Final = frozenset((0x0800, 0x86DD))
_VLAN: Final = frozenset((0x8100, 0x88A8, 0x9100, 0x9200))
_LINKS: Final[dict[int, Callable[[bytes, int, int], int]]] = {
    0: _null,  # NULL: BSD loopback
    1: _ethernet,
    12: _raw,  # RAW as most systems number it in files,
    14: _raw,  # as OpenBSD does,
    101: _raw,  # and as it should be
    108: _null,  # LOOP: OpenBSD loopback
    113: _cooked,  # LINUX_SLL
    228: _raw,  # IPV4
    229: _raw,  # IPV6
    276: _cooked2,  # LINUX_SLL2
}


# Files

_CHUNK: Final = 1 << 18
_LONGEST: Final = 1 << 24  # no frame and no block is longer; one that says so lies


class _Input:
    """A file as one moving buffer: `need(n)` bytes are in `buffer` at `at`, or the file ends."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.buffer = b""
        self.at = 0

    def need(self, count: int) -> bool:
        left = len(self.buffer) - self.at
        if left >= count:
            return True
        parts = [self.buffer[self.at :]]
        while left < count:
            part = self._file.read(max(_CHUNK, count - left))
            if not part:
                break
            parts.append(part)
            left += len(part)
        self.buffer = b"".join(parts)
        self.at = 0
        return left >= count

    @property
    def left(self) -> int:
        return len(self.buffer) - self.at


def _frames(data: _Input, tell: Tell) -> Iterator[_Frame]:
    if not data.need(4):
        raise CaptureError("not a capture: shorter than any")
    magic = data.buffer[:4]
    if magic == _SECTION_MAGIC:
        return _pcapng(data, tell)
    for order in "<", ">":
        for number, unit in ((0xA1B2C3D4, 1000), (0xA1B23C4D, 1)):
            if magic == struct.pack(f"{order}I", number):
                return _pcap(data, tell, order, unit)
    raise CaptureError("not a capture: neither pcap nor pcapng")


def _pcap(data: _Input, tell: Tell, order: str, unit: int) -> Iterator[_Frame]:
    if not data.need(24):
        tell("the file ends within its header")
        return
    # The upper bits of the link type hold the length of the frame check sequence.
    link = struct.unpack_from(f"{order}I", data.buffer, data.at + 20)[0] & 0xFFFFFFF
    data.at += 24
    head = struct.Struct(f"{order}IIII")
    number = 0
    while data.need(16):
        number += 1
        seconds, fraction, length, wire = head.unpack_from(data.buffer, data.at)
        if length > _LONGEST:
            tell(f"record {number} says it has {length} bytes; nothing after it can be read")
            return
        if not data.need(16 + length):
            tell(f"record {number} is cut off: {data.left - 16} of its {length} bytes are there")
            return
        start = data.at + 16
        data.at = end = start + length
        ns = seconds * 1_000_000_000 + fraction * unit
        yield ns, link, data.buffer, start, end, wire
    if data.left:
        tell(f"record {number + 1} is cut off within its header")


_SECTION_MAGIC: Final = b"\x0a\x0d\x0d\x0a"
_SECTION, _INTERFACE, _OLD_PACKET, _SIMPLE, _STATISTICS, _PACKET = 0x0A0D0D0A, 1, 2, 3, 5, 6
_BLOCK: Final = {order: struct.Struct(f"{order}II") for order in "<>"}


@define
class _Interface:
    """A pcapng interface: its link type, and how its time stamps count."""

    link: int
    snap: int
    per_second: int = 1_000_000
    offset: int = 0
    dropped: int = field(default=0)

    def ns(self, stamp: int) -> int:
        return stamp * 1_000_000_000 // self.per_second + self.offset * 1_000_000_000


def _pcapng(data: _Input, tell: Tell) -> Iterator[_Frame]:
    order = "<"
    interfaces: list[_Interface] = []
    number = 0
    last = 0
    while data.need(12):
        number += 1
        if data.buffer[data.at : data.at + 4] == _SECTION_MAGIC:
            mark = data.buffer[data.at + 8 : data.at + 12]
            if mark not in _BYTE_ORDERS:
                tell(f"block {number} has no byte order; nothing after it can be read")
                return
            order = _BYTE_ORDERS[mark]
            interfaces = []
        kind, length = _BLOCK[order].unpack_from(data.buffer, data.at)
        if length < 12 or length > _LONGEST:
            tell(f"block {number} says it has {length} bytes; nothing after it can be read")
            return
        padded = length + 3 & ~3
        if not data.need(padded):
            tell(f"block {number} is cut off: {data.left} of its {length} bytes are there")
            return
        start, end = data.at, data.at + length - 4
        data.at += padded
        body = start + 8
        try:
            if kind in (_PACKET, _OLD_PACKET):
                form = "IIIII" if kind == _PACKET else "HHIIII"
                fields = struct.unpack_from(order + form, data.buffer, body)
                interface = interfaces[fields[0]]
                high, low, captured, wire = fields[-4:]
                frame = body + 20
                if frame + captured > end:
                    raise ValueError(f"says its frame has {captured} bytes")
                last = interface.ns(high << 32 | low)
                yield last, interface.link, data.buffer, frame, frame + captured, wire
            elif kind == _SIMPLE:
                (wire,) = struct.unpack_from(f"{order}I", data.buffer, body)
                interface = interfaces[0]
                captured = min(wire, interface.snap or wire)
                frame = body + 4
                if frame + captured > end:
                    raise ValueError(f"says its frame has {captured} bytes")
                yield last, interface.link, data.buffer, frame, frame + captured, wire
            elif kind == _INTERFACE:
                interfaces.append(_interface(data.buffer, body, end, order))
            elif kind == _STATISTICS:
                (index,) = struct.unpack_from(f"{order}I", data.buffer, body)
                interface = interfaces[index]
                dropped = _dropped(data.buffer, body + 12, end, order)
                if dropped > interface.dropped:
                    yield last, -1, b"", 0, 0, dropped - interface.dropped
                    interface.dropped = dropped
        except IndexError:
            tell(f"block {number} is of an interface that was never described")
        except (ValueError, struct.error) as why:
            tell(f"block {number} makes no sense: {why}")
    if data.left:
        tell(f"block {number + 1} is cut off within its header")


_BYTE_ORDERS: Final = {b"\x1a\x2b\x3c\x4d": ">", b"\x4d\x3c\x2b\x1a": "<"}


def _options(buffer: bytes, at: int, end: int, order: str) -> Iterator[tuple[int, bytes]]:
    while at + 4 <= end:
        code, length = struct.unpack_from(f"{order}HH", buffer, at)
        if code == 0 or at + 4 + length > end:
            return
        yield code, buffer[at + 4 : at + 4 + length]
        at += 4 + (length + 3 & ~3)


def _interface(buffer: bytes, at: int, end: int, order: str) -> _Interface:
    link, _, snap = struct.unpack_from(f"{order}HHI", buffer, at)
    interface = _Interface(link, snap)
    for code, value in _options(buffer, at + 8, end, order):
        if code == 9 and len(value) == 1:  # if_tsresol: a power of 10, or of 2
            exponent = value[0] & 0x7F
            interface.per_second = 2**exponent if value[0] & 0x80 else 10**exponent
        elif code == 14 and len(value) == 8:  # if_tsoffset
            (interface.offset,) = struct.unpack(f"{order}q", value)
    return interface


def _dropped(buffer: bytes, at: int, end: int, order: str) -> int:
    for code, value in _options(buffer, at, end, order):
        if code == 5 and len(value) == 8:  # isb_ifdrop
            return int(struct.unpack(f"{order}Q", value)[0])
    return 0


# Live

_SOL_PACKET: Final = 263
_PACKET_RX_RING: Final = 5
_PACKET_STATISTICS: Final = 6
_PACKET_VERSION: Final = 10
_TPACKET_V2: Final = 1
_ETH_P_ALL: Final = 3
_TP_STATUS_USER: Final = 1
_FRAME: Final = 256  # room for an IPv6 and a TCP header with all its options
_RING_BLOCK: Final = 1 << 16
_RING_HEAD: Final = struct.Struct("=IIIHHII")


class Capture:
    """An observer of the segments that pass this network namespace's interfaces.

    `ports` limits them to those with one of these at either end (None: all
    TCP), in the kernel, before anything is copied; `interface` to one by
    name. A context manager. Event times are seconds since `start`, a value of
    `time.monotonic()`. `buffer` is in bytes, of which a segment takes 256.

    Raises `PermissionError` that says why where it is not allowed.
    """

    name = "capture"
    blind: tuple[str, ...] = (
        "states (only what passes on the wire is seen)",
        "TIME_WAIT that lasts or ends in silence",
        "segments of other network namespaces",
    )

    def __init__(
        self,
        ports: Iterable[int] | None = None,
        *,
        start: float | None = None,
        interface: str | None = None,
        buffer: int = 16 << 20,
    ) -> None:
        self.start = time.monotonic() if start is None else start
        self.lost = 0
        self._ports = None if ports is None else frozenset(ports)
        self._next = 0
        # Stamps are of the wall clock; ours run on the monotonic one.
        self._behind = ahead_of_monotonic()
        self._closed = False
        self._resources = ExitStack()
        try:
            self._open(interface, buffer)
        except PermissionError:
            self._resources.close()
            raise PermissionError(
                errno.EPERM, "capturing needs CAP_NET_RAW (root, or a private network namespace)"
            ) from None
        except AttributeError:
            raise OSError(errno.EAFNOSUPPORT, "live capture is Linux only") from None
        except BaseException:
            self._resources.close()
            raise

    def _open(self, interface: str | None, buffer: int) -> None:
        from timewait.kernel.sock_diag import SockDiag  # which who reads a file has no need of

        self._diag = self._resources.enter_context(SockDiag())
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket = self._resources.enter_context(sock)
        bpf.attach(sock, _program(self._ports))
        sock.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V2)
        blocks = max(buffer // _RING_BLOCK, 1)
        self._frames = blocks * (_RING_BLOCK // _FRAME)
        ring = struct.pack("=IIII", _RING_BLOCK, blocks, _FRAME, self._frames)
        sock.setsockopt(_SOL_PACKET, _PACKET_RX_RING, ring)
        self._ring = self._resources.enter_context(
            mmap.mmap(sock.fileno(), blocks * _RING_BLOCK, mmap.MAP_SHARED)
        )
        _bind(sock, socket.if_nametoindex(interface) if interface else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop capturing; what was not read is lost."""
        self._closed = True
        self._resources.close()

    def fileno(self) -> int:
        """Readable when there is something to `read`."""
        return self._socket.fileno()

    def rows(self, port: int) -> list[Row]:
        """A capture has no table: what sock_diag shows."""
        return self._diag.sockets(port)

    def read(self) -> list[Event]:
        """Every segment captured since the last call, and a `Lost` where the ring was full."""
        if self._closed:
            raise ValueError("the observer is closed")
        events: list[Event] = []
        ring, frames = self._ring, self._frames
        origin = self._behind + int(self.start * 1e9)
        ports = self._ports
        while True:
            at = self._next * _FRAME
            status, wire, length, _, net, seconds, ns = _RING_HEAD.unpack_from(ring, at)
            if not status & _TP_STATUS_USER:
                break
            start = at + net
            frame = ring[start : start + length]
            ring[at : at + 4] = b"\0\0\0\0"  # hands the frame back to the kernel
            self._next = (self._next + 1) % frames
            t = (seconds * 1_000_000_000 + ns - origin) * 1e-9
            try:
                seen = _segment(frame, 0, length, wire, t)
            except ValueError:
                continue
            if seen is not None and (ports is None or seen.src[1] in ports or seen.dst[1] in ports):
                events.append(seen)
        statistics = self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8)
        _, dropped = struct.unpack("=II", statistics)
        if dropped:
            self.lost += dropped
            t = time.monotonic() - self.start
            events.append(Lost(t, self.name, dropped, "the capture ring was full"))
        return events


def ahead_of_monotonic() -> int:
    """Nanoseconds that the wall clock is ahead, from the try that was least interrupted."""
    tries = []
    for _ in range(8):
        before = time.monotonic_ns()
        wall = time.time_ns()
        after = time.monotonic_ns()
        tries.append((after - before, wall - (before + after) // 2))
    return min(tries)[1]


def _bind(sock: socket.socket, index: int) -> None:
    """Start capturing: all protocols, on one interface or (0) all, for which Python has no word."""
    address = struct.pack(
        "=HHiHBB8s", socket.AF_PACKET, socket.htons(_ETH_P_ALL), index, 0, 0, 0, b""
    )
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.bind(sock.fileno(), address, len(address)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


# Where a packet's kind and its interface are found (SKF_AD_PKTTYPE, SKF_AD_IFINDEX).
_PACKET_TYPE, _INTERFACE_INDEX = 0xFFFFF000 + 4, 0xFFFFF000 + 8
_OUTGOING, _LOOPBACK = 4, 1
_MOST_PORTS: Final = 50


def _program(ports: frozenset[int] | None) -> bytes:
    """A filter over IP packets: TCP of these ports, the first 160 bytes of each.

    On the loopback interface each packet passes twice, going out and coming
    in; it is taken when it goes out. Coming in it may have been overtaken:
    it waits in the queue of the processor that sent it.
    """
    if ports is not None and len(ports) > _MOST_PORTS:
        raise ValueError(f"too many ports for one capture: {len(ports)} (at most {_MOST_PORTS})")
    wanted = sorted(ports or ())
    otherwise = (bpf.JUMP_EQUAL, 0, *(("take",) * 2 if ports is None else ("drop",) * 2))
    lines: list[bpf.Line] = [
        (bpf.LOAD_WORD, _INTERFACE_INDEX),
        (bpf.JUMP_EQUAL, _LOOPBACK, "", "family"),
        (bpf.LOAD_WORD, _PACKET_TYPE),
        (bpf.JUMP_EQUAL, _OUTGOING, "family", "drop"),
        "family",
        (bpf.LOAD_BYTE, 0),
        (bpf.AND, 0xF0),
        (bpf.JUMP_EQUAL, 0x40, "ipv4", ""),
        (bpf.JUMP_EQUAL, 0x60, "ipv6", "drop"),
        "ipv4",
        (bpf.LOAD_BYTE, 9),
        (bpf.JUMP_EQUAL, socket.IPPROTO_TCP, "", "drop"),
        (bpf.LOAD_HALF, 6),
        (bpf.JUMP_SET, 0x1FFF, "drop", ""),
        (bpf.IP_HEADER_LENGTH, 0),
    ]
    for at in (0, 2):
        lines.append((bpf.LOAD_HALF_INDEXED, at))
        lines += [(bpf.JUMP_EQUAL, port, "take", "") for port in wanted]
    # Behind IPv6's extension headers the ports are looked for by the reader.
    lines += [otherwise, "ipv6", (bpf.LOAD_BYTE, 6)]
    lines += [(bpf.JUMP_EQUAL, header, "take", "") for header in (0, 43, 44, 51, 60)]
    lines.append((bpf.JUMP_EQUAL, socket.IPPROTO_TCP, "", "drop"))
    for at in (40, 42):
        lines.append((bpf.LOAD_HALF, at))
        lines += [(bpf.JUMP_EQUAL, port, "take", "") for port in wanted]
    lines += [otherwise, "drop", (bpf.RETURN, 0), "take", (bpf.RETURN, 160)]
    return bpf.assemble(lines)

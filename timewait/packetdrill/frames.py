"""IP packets as octets with every field in reach, sound or not.

`timewait.tcp.packet` speaks `Segment`, what a TCP endpoint understands. A
script may ask for more (urgent pointers, SACK blocks, Fast Open cookies, ECN
codepoints, ICMP), so it has this wider form, read from and written to the wire.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

from attrs import field, frozen

from timewait.packetdrill.script import Option

__all__ = ["Frame", "decode", "encode", "flags_letters", "option_text"]

_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "icmp": 1}


@frozen
class Frame:
    """One IP packet as seen or to be sent, `t` seconds into the script.

    `flags` holds nine bits (AE is 0x100); `body` is the payload, or what
    follows the first four octets of an ICMP message. `piece` is set for what is left
    of a run of segments.
    """

    src: str
    dst: str
    protocol: str = "tcp"
    ports: tuple[int, int] = (0, 0)
    flags: int = 0
    seq: int = 0
    ack: int = 0
    window: int = 0
    urgent: int = 0
    options: tuple[Option, ...] = ()
    body: bytes = field(default=b"", repr=False)
    tos: int = 0
    ttl: int = 64
    flow_label: int = 0
    icmp: tuple[int, int] = (0, 0)
    t: float = 0.0
    piece: bool = False


def _checksum(data: bytes) -> int:
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) >> 1}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _options_octets(options: tuple[Option, ...]) -> bytes:
    octets = b"".join(
        bytes([o.kind]) if o.kind < 2 else bytes([o.kind, 2 + len(o.data)]) + o.data
        for o in options
    )
    return octets + b"\0" * (-len(octets) % 4)


def encode(frame: Frame) -> bytes:
    """The octets of a frame, checksums filled in."""
    six = ":" in frame.src
    family = socket.AF_INET6 if six else socket.AF_INET
    addresses = socket.inet_pton(family, frame.src) + socket.inet_pton(family, frame.dst)
    if frame.protocol == "tcp":
        options = _options_octets(frame.options)
        upper = (
            struct.pack(
                "!HHIIHHHH",
                *frame.ports,
                frame.seq,
                frame.ack,
                (20 + len(options)) << 10 | frame.flags,
                frame.window,
                0,
                frame.urgent,
            )
            + options
            + frame.body
        )
        protocol, at = 6, 16
    elif frame.protocol == "udp":
        upper = struct.pack("!HHHH", *frame.ports, 8 + len(frame.body), 0) + frame.body
        protocol, at = 17, 6
    else:
        upper = struct.pack("!BBH", *frame.icmp, 0) + frame.body
        protocol, at = (58 if six else 1), 2
    pseudo = addresses + struct.pack("!II" if six else "!HH", *(
        (len(upper), protocol) if six else (protocol, len(upper))
    ))  # fmt: skip
    over = upper if protocol == 1 else pseudo + upper
    upper = upper[:at] + struct.pack("!H", _checksum(over)) + upper[at + 2 :]
    if six:
        first = 6 << 28 | frame.tos << 20 | frame.flow_label
        return struct.pack("!IHBB", first, len(upper), protocol, frame.ttl) + addresses + upper
    head = (
        struct.pack(
            "!BBHHHBBH", 0x45, frame.tos, 20 + len(upper), 0, 0x4000, frame.ttl, protocol, 0
        )
        + addresses
    )
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + upper


def _options(octets: bytes) -> Iterator[Option]:
    at = 0
    while at < len(octets):
        kind = octets[at]
        if kind < 2:
            yield Option(kind)
            at += 1
            continue
        length = octets[at + 1] if at + 1 < len(octets) else 0
        if length < 2 or at + length > len(octets):
            return
        yield Option(kind, octets[at + 2 : at + length])
        at += length


def decode(octets: bytes, t: float = 0.0) -> Frame | None:
    """The frame in `octets`, or None where there is no TCP, UDP or ICMP in it."""
    try:
        if octets[0] >> 4 == 4:
            head = (octets[0] & 15) * 4
            tos, total, ttl, protocol = (
                octets[1],
                int.from_bytes(octets[2:4], "big") or len(octets),
                octets[8],
                octets[9],
            )
            src, dst = socket.inet_ntop(2, octets[12:16]), socket.inet_ntop(2, octets[16:20])
            upper, label = octets[head:total], 0
        else:
            first, length, protocol, ttl = struct.unpack_from("!IHBB", octets)
            tos, label = first >> 20 & 0xFF, first & 0xFFFFF
            six = socket.AF_INET6
            src, dst = socket.inet_ntop(six, octets[8:24]), socket.inet_ntop(six, octets[24:40])
            upper = octets[40 : 40 + length] if length else octets[40:]
        if protocol == 6:
            sport, dport, seq, ack, offset, window, _, urgent = struct.unpack_from(
                "!HHIIHHHH", upper
            )
            end = (offset >> 12) * 4
            return Frame(
                src, dst, "tcp", (sport, dport), offset & 0x1FF, seq, ack, window, urgent,
                tuple(_options(upper[20:end])), upper[end:], tos, ttl, label, t=t,
            )  # fmt: skip
        if protocol == 17:
            return Frame(
                src, dst, "udp", struct.unpack_from("!HH", upper),
                body=upper[8:], tos=tos, ttl=ttl, flow_label=label, t=t,
            )  # fmt: skip
        if protocol in (1, 58):
            return Frame(
                src, dst, "icmp", icmp=(upper[0], upper[1]), body=upper[4:], tos=tos, ttl=ttl,
                flow_label=label, t=t,
            )  # fmt: skip
    except (struct.error, IndexError, ValueError):
        pass
    return None


_LETTERS: Final = (
    (0x02, "S"), (0x01, "F"), (0x04, "R"), (0x08, "P"), (0x20, "U"), (0x40, "E"), (0x80, "W"),
    (0x100, "A"), (0x10, "."),
)  # fmt: skip


def flags_letters(flags: int) -> str:
    """Flags as a script writes them: `S.`, `FP.`, `-` for none."""
    return "".join(letter for bit, letter in _LETTERS if flags & bit) or "-"


def option_text(option: Option) -> str:
    """An option as a script writes it."""
    data = option.data
    match option.kind:
        case 0:
            return "eol"
        case 1:
            return "nop"
        case 2:
            return f"mss {int.from_bytes(data, 'big')}"
        case 3:
            return f"wscale {int.from_bytes(data, 'big')}"
        case 4:
            return "sackOK"
        case 5:
            edges = struct.unpack(f"!{len(data) // 4}I", data[: len(data) // 4 * 4])
            pairs = zip(edges[::2], edges[1::2], strict=False)
            return "sack " + " ".join(f"{a}:{b}" for a, b in pairs)
        case 8 if len(data) == 8:
            return "TS val {} ecr {}".format(*struct.unpack("!II", data))
        case 172 | 174 if len(data) % 3 == 0:
            names = ("e0b", "ceb", "e1b") if option.kind == 172 else ("e1b", "ceb", "e0b")
            counters = (int.from_bytes(data[at : at + 3], "big") for at in range(0, len(data), 3))
            return "ECN " + " ".join(f"{n} {c}" for n, c in zip(names, counters, strict=False))
        case 34:
            return f"FO {data.hex()}".strip()
        case 254 if data[:2] == b"\xf9\x89":
            return f"FOEXP {data[2:].hex()}".strip()
    return f"option {option.kind} {data.hex()}"

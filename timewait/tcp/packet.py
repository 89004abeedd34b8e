"""Segments inside IP packets: bytes from a wire or a capture, and back.

Reading never trusts a length: a packet that says it is longer than it is, or
whose parts do not fit into each other, is a `ValueError` with the reason.
TCP options are the exception, since TCP itself must live with bad ones: what
cannot be read is ignored, as Linux does.

Sources: RFC 791 §3.1 and RFC 8200 §3, §4 (IP), RFC 9293 §3.1 (the TCP header
and checksum), RFC 7323 and RFC 2018 (options).
"""

from __future__ import annotations

from functools import lru_cache
from socket import AF_INET, AF_INET6, IPPROTO_TCP, inet_ntop, inet_pton
from struct import Struct
from struct import error as StructError
from typing import Final

from attrs import define, field

from timewait.tcp.segment import ACK, Options, Segment

__all__ = ["NotTCP", "Packet", "checksum", "decode", "encode", "host_text"]

_IPV4: Final = Struct(">BBHHHBBH4s4s")
_IPV6: Final = Struct(">IHBB16s16s")
_TCP: Final = Struct(">HHIIBBHHH")
_DONT_FRAGMENT: Final = 0x4000
_FRAGMENT: Final = 0x3FFF  # "more fragments" and the offset

# RFC 8200 §4: hop-by-hop options, routing, fragment, authentication, destination options.
_FRAGMENT_HEADER: Final = 44
_AUTHENTICATION_HEADER: Final = 51
_EXTENSION_HEADERS: Final = frozenset((0, 43, _FRAGMENT_HEADER, _AUTHENTICATION_HEADER, 60))


class NotTCP(ValueError):
    """An IP packet that carries something else."""


@define(unsafe_hash=True)
class Packet:
    """A segment with its addresses: `src` and `dst` are (numeric host, port).

    `length` is the text's octets as the IP header counts them, more than
    `segment.data` has where a capture kept only the beginning. `raw_options`
    are the TCP options as on the wire, padding included; where given they are
    written in place of `segment.options`. `traffic_class` holds DSCP and ECN.
    Two packets that differ in `ident` or `raw_options` alone are equal.
    """

    src: tuple[str, int]
    dst: tuple[str, int]
    segment: Segment
    length: int = -1
    hop_limit: int = 64
    traffic_class: int = 0
    ident: int = field(default=0, eq=False)
    raw_options: bytes | None = field(default=None, eq=False)

    def __attrs_post_init__(self) -> None:
        if self.length < 0:
            self.length = len(self.segment.data)

    def __str__(self) -> str:
        (src, sport), (dst, dport) = self.src, self.dst
        return f"{src}:{sport} > {dst}:{dport} {self.segment}"


def decode(
    data: bytes, *, verify: bool = False, truncated: bool = False, wire_length: int | None = None
) -> Packet:
    """The TCP packet that `data`, an IPv4 or IPv6 packet, holds.

    `verify` checks the IPv4 and TCP checksums (what a kernel hands to its
    local captures often has none yet). `truncated` allows text and TCP
    options to be missing at the end. `wire_length` is the packet's length
    where the IP header gives none (0), as in the over-long packets of
    segmentation offload; it defaults to `len(data)`.

    Raises `ValueError` where that is no whole TCP segment, saying why, and
    `NotTCP`, which is one, where it is another protocol's.
    """
    size = len(data)
    version = data[0] >> 4 if size else 0
    if version == 4:
        if size < 20:
            raise ValueError("a packet cut off within its headers")
        first, tos, total, ident, fragment, hop_limit, protocol, _, source, target = (
            _IPV4.unpack_from(data)
        )
        start = (first & 15) * 4
        if start < 20 or start > size:
            raise ValueError(f"an IPv4 header that says it has {start} bytes")
        if fragment & _FRAGMENT:
            raise ValueError("a fragment of an IPv4 packet")
        end = total or wire_length or size
    elif version == 6:
        if size < 40:
            raise ValueError("a packet cut off within its headers")
        word, payload, protocol, hop_limit, source, target = _IPV6.unpack_from(data)
        tos = word >> 20 & 0xFF
        ident = 0
        start = 40
        end = 40 + payload if payload else wire_length or size
        if protocol != IPPROTO_TCP:
            protocol, start = _skip_extensions(data, protocol)
    else:
        raise ValueError("not an IP packet" if size else "an empty packet")
    if protocol != IPPROTO_TCP:
        raise NotTCP(f"not TCP but IP protocol {protocol}")
    if end > size and not truncated:
        raise ValueError(f"a packet of {end} bytes of which {size} are there")
    if end < start + 20:
        raise ValueError(f"no room for a TCP header: {end - start} bytes")
    if size < start + 20:
        raise ValueError("a packet cut off within its headers")
    sport, dport, seq, ack, offset, flags, window, _, _ = _TCP.unpack_from(data, start)
    text = start + (offset >> 4) * 4
    if text < start + 20 or text > end:
        raise ValueError(f"a TCP header that says it has {text - start} bytes")
    if text > size and not truncated:
        raise ValueError("a packet cut off within its headers")
    if verify:
        if version == 4 and checksum(data[: (data[0] & 15) * 4]) != 0:
            raise ValueError("a wrong IPv4 header checksum")
        if end <= size and _tcp_checksum(source, target, data[start:end]) != 0:
            raise ValueError("a wrong TCP checksum")
    raw_options = data[start + 20 : text] if text > start + 20 else b""
    return Packet(
        (host_text(source), sport),
        (host_text(target), dport),
        Segment(
            seq,
            ack if flags & ACK else 0,
            flags,
            window,
            bytes(data[text:end]) if text < end else b"",
            _decode_options(raw_options) if raw_options else None,
        ),
        end - text,
        hop_limit,
        tos,
        ident,
        raw_options,
    )


def encode(packet: Packet, *, tcp_checksum: int | None = None) -> bytes:
    """The packet's bytes, IPv4 or IPv6 as its addresses are, with right checksums.

    `tcp_checksum` is written in place of the right one. Options are laid out
    as Linux does. Raises `ValueError` for addresses that are not numeric or
    not of one family, and for what does not fit into the headers.
    """
    try:
        return _encode(packet, tcp_checksum)
    except (StructError, OverflowError) as error:
        raise ValueError(f"cannot be a packet: {packet} ({error})") from None


def _encode(packet: Packet, tcp_checksum: int | None) -> bytes:
    segment = packet.segment
    family = AF_INET6 if ":" in packet.src[0] else AF_INET
    try:
        source, target = inet_pton(family, packet.src[0]), inet_pton(family, packet.dst[0])
    except OSError:
        raise ValueError(f"not addresses of one family: {packet.src}, {packet.dst}") from None
    options = packet.raw_options
    if options is None:
        options = _encode_options(segment.options) if segment.options else b""
    if len(options) % 4 or len(options) > 40:
        raise ValueError(f"TCP options of {len(options)} bytes")
    size = 20 + len(options) + len(segment.data)
    if size > (0xFFFF if family == AF_INET6 else 0xFFFF - 20):
        raise ValueError(f"too long for an IP packet: {len(segment.data)} bytes of text")
    tcp = bytearray(
        _TCP.pack(
            packet.src[1],
            packet.dst[1],
            segment.seq,
            segment.ack,
            (5 + len(options) // 4) << 4,
            segment.flags,
            segment.window,
            0,
            0,
        )
    )
    tcp += options
    tcp += segment.data
    if tcp_checksum is None:
        tcp_checksum = _tcp_checksum(source, target, tcp)
    tcp[16:18] = tcp_checksum.to_bytes(2, "big")
    if family == AF_INET6:
        head = _IPV6.pack(
            6 << 28 | packet.traffic_class << 20,
            size,
            IPPROTO_TCP,
            packet.hop_limit,
            source,
            target,
        )
        return head + tcp
    fields = (
        *(0x45, packet.traffic_class, 20 + size, packet.ident, _DONT_FRAGMENT),
        *(packet.hop_limit, IPPROTO_TCP),
    )
    head_sum = checksum(_IPV4.pack(*fields, 0, source, target))
    return _IPV4.pack(*fields, head_sum, source, target) + tcp


def checksum(data: bytes | bytearray) -> int:
    """The Internet checksum (RFC 1071); 0 over data that holds its own right one."""
    if len(data) % 2:
        data = bytes(data) + b"\0"
    # 2**16 is 1 modulo 2**16 - 1, so that the one's complement sum of the words is the
    # remainder of the whole: one division in C in place of a loop.
    number = int.from_bytes(data, "big")
    total = number % 0xFFFF
    return 0 if number and not total else 0xFFFF - total


def _tcp_checksum(source: bytes, target: bytes, tcp: bytes | bytearray) -> int:
    # The pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1); both versions' sums are the same.
    pseudo = source + target + len(tcp).to_bytes(4, "big") + b"\0\0\0\x06"
    return checksum(pseudo + tcp)


@lru_cache(maxsize=1 << 16)
def host_text(address: bytes) -> str:
    """An address of 4 or 16 bytes as text."""
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def _skip_extensions(data: bytes, protocol: int) -> tuple[int, int]:
    """The protocol after IPv6's extension headers, and where it starts."""
    start = 40
    while protocol in _EXTENSION_HEADERS:
        if start + 8 > len(data):
            raise ValueError("a packet cut off within its headers")
        following, length = data[start], data[start + 1]
        if protocol == _FRAGMENT_HEADER:
            if int.from_bytes(data[start + 2 : start + 4], "big") & 0xFFF9:
                raise ValueError("a fragment of an IPv6 packet")
            start += 8
        elif protocol == _AUTHENTICATION_HEADER:
            start += (length + 2) * 4
        else:
            start += (length + 1) * 8
        protocol = following
    return protocol, start


def _decode_options(data: bytes) -> Options | None:
    options = Options()
    offset, size = 0, len(data)
    while offset < size:
        kind = data[offset]
        if kind == 0:
            break
        if kind == 1:
            offset += 1
            continue
        length = data[offset + 1] if offset + 1 < size else 0
        if length < 2 or offset + length > size:
            break
        value = data[offset + 2 : offset + length]
        if kind == 2 and length == 4:
            options.mss = int.from_bytes(value, "big")
        elif kind == 3 and length == 3:
            options.window_scale = value[0]
        elif kind == 4 and length == 2:
            options.sack_permitted = True
        elif kind == 5 and length >= 10 and length % 8 == 2:
            edges = [int.from_bytes(value[i : i + 4], "big") for i in range(0, len(value), 4)]
            options.sack = tuple(zip(edges[::2], edges[1::2], strict=True))
        elif kind == 8 and length == 10:
            options.ts_val = int.from_bytes(value[:4], "big")
            options.ts_ecr = int.from_bytes(value[4:], "big")
        offset += length
    return None if options == _NO_OPTIONS else options


_NO_OPTIONS: Final = Options()


def _encode_options(options: Options) -> bytes:
    # In the order and with the padding of Linux's tcp_options_write (net/ipv4/tcp_output.c).
    out = b""
    if options.mss is not None:
        out += b"\x02\x04" + options.mss.to_bytes(2, "big")
    if options.ts_val is not None:
        out += b"\x04\x02" if options.sack_permitted else b"\x01\x01"
        out += b"\x08\x0a" + options.ts_val.to_bytes(4, "big")
        out += (options.ts_ecr or 0).to_bytes(4, "big")
    elif options.sack_permitted:
        out += b"\x01\x01\x04\x02"
    if options.window_scale is not None:
        out += b"\x01\x03\x03" + options.window_scale.to_bytes(1, "big")
    if options.sack:
        out += b"\x01\x01\x05" + (2 + 8 * len(options.sack)).to_bytes(1, "big")
        for left, right in options.sack:
            out += left.to_bytes(4, "big") + right.to_bytes(4, "big")
    return out

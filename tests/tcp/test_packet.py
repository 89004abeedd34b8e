"""Packets to bytes and back, with the kernel as judge of the bytes."""

import contextlib
import os
import socket
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timewait.kernel.namespace import Namespace
from timewait.tcp.packet import Packet, checksum, decode, encode
from timewait.tcp.segment import ACK, FIN, PSH, SYN, Options, Segment

u8, u16, u32 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32))
hosts = {
    4: st.binary(min_size=4, max_size=4).map(lambda a: socket.inet_ntop(socket.AF_INET, a)),
    6: st.binary(min_size=16, max_size=16).map(lambda a: socket.inet_ntop(socket.AF_INET6, a)),
}
timestamps = st.none() | st.tuples(u32, u32)
options = st.builds(
    lambda mss, scale, permitted, ts, sack: Options(
        mss, scale, permitted, *(ts or (None, None)), sack=tuple(sack)
    ),
    st.none() | u16,
    st.none() | u8,
    st.booleans(),
    timestamps,
    st.lists(st.tuples(u32, u32), max_size=1),
)
segments = st.builds(
    lambda seq, ack, flags, *rest: Segment(seq, ack if flags & ACK else 0, flags, *rest),
    *(u32, u32, u8, u16),
    st.binary(max_size=60),
    st.none() | options.filter(lambda o: o != Options()),
)
packets = st.sampled_from([4, 6]).flatmap(
    lambda v: st.builds(
        Packet,
        st.tuples(hosts[v], u16),
        st.tuples(hosts[v], u16),
        segments,
        hop_limit=u8,
        traffic_class=u8,
        ident=u16 if v == 4 else st.just(0),
    )
)


@given(packets)
def test_what_is_written_is_read_again(packet: Packet) -> None:
    data = encode(packet)
    again = decode(data, verify=True)
    assert again == packet
    assert again.ident == packet.ident
    assert encode(again) == data


@given(packets, st.integers(0, 10_000), u8)
def test_one_wrong_byte_is_noticed_by_the_checksums(packet: Packet, where: int, value: int) -> None:
    data = bytearray(encode(packet))
    where %= len(data)
    if data[where] ^ value in (0, 0xFF):
        value ^= 1  # 0 and 0xFFFF are the same number to the one's complement sum
    if value == 0:
        return
    data[where] ^= value
    unprotected = ":" in packet.src[0] and (where < 4 or where == 7)
    with contextlib.suppress(ValueError):
        assert unprotected or decode(bytes(data), verify=True) is None


@given(packets, st.data())
def test_a_packet_cut_anywhere_is_an_error(packet: Packet, data: st.DataObject) -> None:
    whole = encode(packet)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    with pytest.raises(ValueError, match=r"cut off|says it has|of which|empty|no room"):
        decode(cut)
    try:
        kept = decode(cut, truncated=True)
    except ValueError:
        return
    assert kept.length == len(packet.segment.data)
    assert packet.segment.data.startswith(kept.segment.data)
    assert (kept.src, kept.dst) == (packet.src, packet.dst)
    if kept.segment.data:
        assert kept.segment.options == packet.segment.options


@given(st.binary(max_size=120), st.booleans(), st.booleans())
def test_any_bytes_are_a_packet_or_a_value_error(
    data: bytes, verify: bool, truncated: bool
) -> None:
    with contextlib.suppress(ValueError):
        decode(data, verify=verify, truncated=truncated)


@given(packets, st.lists(st.tuples(st.integers(0, 80), u8), max_size=4))
def test_lying_headers_are_a_packet_or_a_value_error(
    packet: Packet, lies: list[tuple[int, int]]
) -> None:
    data = bytearray(encode(packet))
    for where, value in lies:
        data[where % len(data)] = value
    with contextlib.suppress(ValueError):
        found = decode(bytes(data))
        assert found.length == len(found.segment.data)


@given(st.binary(max_size=64))
def test_the_checksum_is_the_sum_of_rfc_1071(data: bytes) -> None:
    total = 0
    for i in range(0, len(data), 2):
        total += int.from_bytes(data[i : i + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    assert checksum(data) == total ^ 0xFFFF


SYN_PACKET = Packet(("10.0.0.1", 1), ("10.0.0.2", 2), Segment(1, 0, SYN, 1000, b"", Options(1460)))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({0: b""}, None),
        ({0: b"\x50"}, "not an IP packet"),
        ({0: b"\x44"}, "IPv4 header that says it has 16"),
        ({0: b"\x4f"}, "IPv4 header that says it has 60"),
        ({2: b"\xff\xff"}, "65535 bytes of which 44"),
        ({2: b"\x00\x15"}, "no room for a TCP header"),
        ({6: b"\x20\x00"}, "fragment"),
        ({9: b"\x11"}, "IP protocol 17"),
        ({32: b"\x40"}, "TCP header that says it has 16"),
        ({32: b"\xf0"}, "TCP header that says it has 60"),
        ({10: b"\0\0"}, "IPv4 header checksum"),
        ({36: b"\0\0"}, "TCP checksum"),
    ],
)
def test_each_lie_is_named(change: dict[int, bytes], complaint: str | None) -> None:
    data = bytearray(encode(SYN_PACKET))
    for where, value in change.items():
        data[where : where + len(value)] = value
    if complaint is None:
        assert decode(bytes(data), verify=True) == SYN_PACKET
    else:
        with pytest.raises(ValueError, match=complaint):
            decode(bytes(data), verify=True)


@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ("020405b4 00000000", Options(1460)),
        ("02030005 00000000", None),  # an MSS of the wrong length, then rubbish
        ("0101 080a 00000001 00000002", Options(ts_val=1, ts_ecr=2)),
        ("0101 0512 00000001 00000002 00000005 00000006", Options(sack=((1, 2), (5, 6)))),
        ("02000000", None),  # a length that would never end
        ("fe041234 020405b4", Options(1460)),  # an unknown option before it
        ("020405b4 02ff0000", Options(1460)),
    ],
)
def test_options_are_read_as_far_as_they_make_sense(raw: str, read: Options | None) -> None:
    packet = Packet(("::1", 1), ("::2", 2), Segment(1, 0, SYN), raw_options=bytes.fromhex(raw))
    found = decode(encode(packet), verify=True)
    assert found.segment.options == read
    assert found.raw_options == packet.raw_options


def test_ipv6_extension_headers_are_stepped_over() -> None:
    plain = encode(Packet(("::1", 1), ("::2", 2), Segment(1, 0, SYN)))
    hop_by_hop = bytes([60, 0, 1, 4, 0, 0, 0, 0])
    destination = bytes([6, 1, 1, 12]) + bytes(12)
    extended = plain[:4] + (24 + 20).to_bytes(2, "big") + b"\0" + plain[7:40]
    extended += hop_by_hop + destination + plain[40:]
    assert decode(extended, verify=True).segment == Segment(1, 0, SYN)
    fragment = plain[:4] + (28).to_bytes(2, "big") + b"\x2c" + plain[7:40]
    fragment += bytes([6, 0, 0, 1, 0, 0, 0, 9]) + plain[40:]
    with pytest.raises(ValueError, match="fragment of an IPv6"):
        decode(fragment)


def test_an_overlong_packet_has_the_length_of_its_frame() -> None:
    data = bytearray(encode(Packet(("::1", 1), ("::2", 2), Segment(1, 1, ACK, 9, b"text"))))
    data[4:6] = b"\0\0"
    assert decode(bytes(data)).segment.data == b"text"
    kept = decode(bytes(data), wire_length=100_000 + 60, truncated=True)
    assert (kept.length, kept.segment.data) == (100_000, b"text")


@pytest.mark.parametrize(
    "packet",
    [
        Packet(("10.0.0.1", 1), ("::2", 2), Segment(1, 0, SYN)),
        Packet(("server", 1), ("client", 2), Segment(1, 0, SYN)),
        Packet(("10.0.0.1", 70000), ("10.0.0.2", 2), Segment(1, 0, SYN)),
        Packet(("10.0.0.1", 1), ("10.0.0.2", 2), Segment(2**32, 0, SYN)),
        Packet(("10.0.0.1", 1), ("10.0.0.2", 2), Segment(1, 1, ACK, 1, bytes(65_500))),
        Packet(("10.0.0.1", 1), ("10.0.0.2", 2), Segment(1, 0, SYN), raw_options=b"\1"),
        Packet(("::1", 1), ("::2", 2), Segment(1, 0, SYN, 1, b"", Options(70000))),
    ],
)
def test_what_fits_in_no_packet_is_a_value_error(packet: Packet) -> None:
    with pytest.raises(ValueError):
        encode(packet)


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs raw sockets in a namespace"
)
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_the_kernel_accepts_what_is_written_and_its_answers_are_read(host: str) -> None:
    """A SYN written here is answered by the kernel's own SYN,ACK; with a wrong sum it is not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        Namespace() as ns,
        ns.entered(),
        socket.create_server((host, 9090), family=family),
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as out,
        socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3)) as seen,
    ):
        seen.bind(("lo", 0))
        seen.settimeout(10)

        def exchange(flags: int, *, tcp_checksum: int | None = None) -> None:
            syn = Packet(
                (host, 5000),
                (host, 9090),
                Segment(1000, 0, flags, 4096, b"", Options(1400, 7, True, 5, 0)),
            )
            out.sendto(encode(syn, tcp_checksum=tcp_checksum), (host, 0))

        def next_from(port: int) -> Packet:
            while True:
                packet = decode(seen.recv(2000))
                if packet.src[1] == port:
                    return packet

        def bad_sums() -> int:
            text = Path("/proc/net/snmp").read_text()
            names, values = (line.split() for line in text.splitlines() if line.startswith("Tcp:"))
            return int(dict(zip(names, values, strict=True))["InCsumErrors"])

        exchange(SYN, tcp_checksum=0xDEAD)
        assert next_from(5000).segment.flags == SYN
        exchange(SYN)
        answer = next_from(9090)
        assert bad_sums() == 1
        assert (answer.src, answer.dst) == ((host, 9090), (host, 5000))
        assert (answer.segment.flags, answer.segment.ack) == (SYN | ACK, 1001)
        assert answer.segment.options is not None
        assert answer.segment.options.sack_permitted
        assert answer.segment.options.ts_ecr == 5
        # Its layout of options is ours.
        raw = answer.raw_options
        answer.raw_options = None
        assert decode(encode(answer)).raw_options == raw


def test_text_of_a_packet_is_what_an_engineer_writes() -> None:
    packet = Packet(("::1", 1), ("::2", 2), Segment(5, 6, FIN | PSH | ACK, 9, b"abc"))
    assert str(packet) == "::1:1 > ::2:2 FIN,PSH,ACK seq=5 ack=6 len=3"

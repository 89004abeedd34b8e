"""Devices, addresses and routes of the network namespace that the calling thread is in.

Just enough of rtnetlink(7) to give a namespace one wire: functions for
`Namespace.call`, which runs them inside.
"""

from __future__ import annotations

import fcntl
import io
import os
import socket
import struct
import time

__all__ = ["address", "default_route", "link_up", "neighbour", "tap", "tun", "veth"]

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
IFF_TUN, IFF_NO_PI = 0x1, 0x1000
# TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN: the kernel hands over segments as TCP
# made them, not cut into MTU-sized pieces.
OFFLOAD = 0x1 | 0x2 | 0x4 | 0x8

# Hardware addresses: the near end of a veth pair, and one that no device has.
NEAR, FAR = b"\x02\x00\x00\x00\x00\x01", b"\x02\x00\x00\x00\x00\x63"

SO_TIMESTAMPNS = 35

RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 16, 20, 24, 28
NLM_REQUEST, NLM_ACK, NLM_CREATE, NLM_REPLACE = 0x1, 0x4, 0x400, 0x100


def attribute(kind: int, data: bytes) -> bytes:
    """A netlink attribute, padded to four octets."""
    return struct.pack("HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def request(kind: int, flags: int, body: bytes) -> None:
    """One rtnetlink request, its acknowledgment awaited; raises OSError as the kernel says."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as rtnetlink:
        header = struct.pack("IHHII", 16 + len(body), kind, NLM_REQUEST | NLM_ACK | flags, 1, 0)
        rtnetlink.send(header + body)
        answer = rtnetlink.recv(65536)
    (error,) = struct.unpack_from("i", answer, 16)
    if error:
        raise OSError(-error, os.strerror(-error))


def link_up(name: str, mtu: int | None = None, mac: bytes | None = None) -> None:
    """Bring a device up, with its MTU and hardware address where they are given."""
    extra = b"" if mtu is None else attribute(4, struct.pack("I", mtu))
    if mac is not None:
        extra += attribute(1, mac)
    body = struct.pack("BxHiII", 0, 0, socket.if_nametoindex(name), 1, 1) + extra
    request(RTM_NEWLINK, 0, body)


def address(name: str, host: str, prefix: int) -> None:
    """Give a device an address, usable at once (IPv6: without duplicate detection)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    octets = socket.inet_pton(family, host)
    body = struct.pack("BBBBI", family, prefix, 0x02, 0, socket.if_nametoindex(name))
    body += attribute(2, octets) + attribute(1, octets)
    request(RTM_NEWADDR, NLM_CREATE | NLM_REPLACE, body)
    if family == socket.AF_INET6:
        # A worker of the kernel's makes it usable a moment later, with a route to itself.
        route = f"{octets.hex()} 80 "
        deadline = time.monotonic() + 2
        while not _has_route(route) and time.monotonic() < deadline:
            time.sleep(0.001)


def _has_route(start: str) -> bool:
    with open("/proc/thread-self/net/ipv6_route") as routes:
        return any(route.startswith(start) for route in routes)


def default_route(name: str, family: int) -> None:
    """Send everything that is not local through a device."""
    scope = 253 if family == socket.AF_INET else 0
    body = struct.pack("BBBBBBBBI", family, 0, 0, 0, 254, 3, scope, 1, 0)
    request(
        RTM_NEWROUTE,
        NLM_CREATE | NLM_REPLACE,
        body + attribute(4, struct.pack("I", socket.if_nametoindex(name))),
    )


def tun(name: str, offload: bool) -> io.FileIO:
    """Open a TUN device; the file is its wire."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOAD if offload else 0)
    except OSError:
        os.close(fd)
        raise
    return io.FileIO(fd, "r+")


def veth(name: str, far: str) -> socket.socket:
    """Make a veth pair and a packet socket on its far end: a wire where TUN is closed.

    The far end has no address, so it takes in what passes and answers nothing.
    """
    peer = struct.pack("BxHiII", 0, 0, 0, 0, 0) + attribute(3, far.encode() + b"\0")
    info = attribute(1, b"veth\0") + attribute(2, attribute(1, peer))
    body = struct.pack("BxHiII", 0, 0, 0, 0, 0) + attribute(3, name.encode() + b"\0")
    request(RTM_NEWLINK, NLM_CREATE, body + attribute(18, info))
    link_up(far)
    link_up(name, mac=NEAR)
    everything = 0x0003
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(everything))
    wire.bind((far, everything))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    wire.setblocking(False)
    return wire


def tap(name: str) -> socket.socket:
    """A packet socket that sees what passes a device, and when (SO_TIMESTAMPNS), as IP packets.

    The first that asks for stamps has a worker of the kernel's begin to stamp
    (net_enable_timestamp()); until it did, a packet's stamp is when it was read.
    """
    everything = 0x0003
    seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    seen.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    seen.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    seen.setblocking(False)
    seen.bind((name, everything))
    _until_stamped()
    return seen


def _until_stamped() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        probe.bind(("127.0.0.1", 0))
        while True:
            probe.sendto(b"", probe.getsockname())
            sent = time.time_ns()
            _, extra, _, _ = probe.recvmsg(1, 64)
            seconds, ns = struct.unpack("=qq", extra[0][2])
            if seconds * 1_000_000_000 + ns < sent:
                return


def neighbour(name: str, host: str) -> None:
    """Say that a host beyond the near end has the hardware address of nobody (`FAR`)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    body = struct.pack("BxxxiHBB", family, socket.if_nametoindex(name), 0x80, 0, 1)
    body += attribute(1, socket.inet_pton(family, host)) + attribute(2, FAR)
    request(RTM_NEWNEIGH, NLM_CREATE | NLM_REPLACE, body)

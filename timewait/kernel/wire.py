"""A wire whose other end is this process: it alone decides what the kernel gets to see.

A `Wire` is a private network namespace with one device, whose packets this
process reads and writes as octets: TUN, or for a user to whom `/dev/net/tun` is
closed a veth pair and a packet socket. The kernel's sockets on it are real ones.
When this process ends, however it ends, so does the namespace.
"""

from __future__ import annotations

import errno
import io
import os
import select
import socket
import struct
import time
from contextlib import suppress
from types import TracebackType
from typing import Final

from timewait.kernel import links
from timewait.kernel.capture import ahead_of_monotonic
from timewait.kernel.namespace import Namespace, sysctl

__all__ = ["Wire", "WireError"]

_STAMP: Final = struct.Struct("qq")  # struct timespec
_ETHERTYPES: Final = {4: b"\x08\x00", 6: b"\x86\xdd"}


class WireError(OSError):
    """There can be no wire here; the message says what is not permitted."""


class Wire:
    """A private network namespace with one device, whose far end is this process.

    `local` and `remote` are the addresses of the kernel's end and of ours, each
    a tuple of one for IPv4 and one for IPv6 as given. `device` is "tun", "veth"
    or None for whichever is permitted. With `offload` a TUN device hands over text
    as TCP made it, up to 64 KiB at a time; without, in segments of the MSS.

    Raises `WireError` where neither device nor namespace is to be had, `ValueError`
    for another `device`.
    """

    def __init__(
        self,
        local: tuple[tuple[str, int], ...] = (
            ("192.168.0.1", 16),
            ("fd3d:fa7b:d17d::1", 48),
        ),
        remote: tuple[str, ...] = ("192.0.2.1", "2001:db8::1"),
        *,
        mtu: int = 1500,
        device: str | None = None,
        offload: bool = True,
    ) -> None:
        if device not in ("tun", "veth", None):
            raise ValueError(f"a wire's device is 'tun' or 'veth', not {device!r}")
        self.name = "tun0"  # whatever it is: that is what public scripts call it
        self.sent_at = 0.0
        self._file: io.FileIO | socket.socket | None = None
        self._tap: socket.socket | None = None
        try:
            self.namespace = Namespace()
        except OSError as trouble:
            raise WireError(trouble.errno, f"no wire: {trouble.strerror}") from None
        try:
            self.sysctl("net.ipv4.conf.all.rp_filter", "0")
            self._make(device, offload)
            self._link(local, remote, mtu)
            self._tap = self.namespace.call(links.tap, self.name)
        except OSError as trouble:
            self.close()
            raise WireError(trouble.errno, f"no wire: {trouble.strerror}") from None

    # -- the namespace

    def _make(self, device: str | None, offload: bool) -> None:
        call = self.namespace.call
        self.device = device or "tun"
        if self.device == "tun":
            try:
                self._file = call(links.tun, self.name, offload)
                return
            except OSError as trouble:
                if device is not None:
                    raise OSError(trouble.errno, f"/dev/net/tun: {trouble.strerror}") from None
        self.device = "veth"
        self._file = call(links.veth, self.name, "far0")

    def _link(self, local: tuple[tuple[str, int], ...], remote: tuple[str, ...], mtu: int) -> None:
        call = self.namespace.call
        with suppress(OSError):  # no IPv6 in this kernel
            for setting in ("router_solicitations", "accept_ra", "accept_dad"):
                self.sysctl(f"net.ipv6.conf.{self.name}.{setting}", "0")
        call(links.link_up, self.name, mtu)
        for host, prefix in local:
            call(links.address, self.name, host, prefix)
        for family in {socket.AF_INET6 if ":" in host else socket.AF_INET for host, _ in local}:
            call(links.default_route, self.name, family)
        if self.device == "veth":
            for host in remote:
                call(links.neighbour, self.name, host)

    def sysctl(self, name: str, value: str | int | None = None) -> str:
        """Change a `net.` setting of the namespace, or read it where `value` is None.

        Raises `OSError` where there is none of that name, or the kernel refuses.
        """
        return self.namespace.call(sysctl, name, value)

    def socket(
        self,
        family: int = socket.AF_INET,
        kind: int = socket.SOCK_STREAM,
        protocol: int = 0,
    ) -> socket.socket:
        """A real socket of the namespace, blocking unless `SOCK_NONBLOCK` is in `kind`."""
        made = self.namespace.socket(int(family), int(kind), protocol)
        made.setblocking(not kind & socket.SOCK_NONBLOCK)
        return made

    # -- the wire

    def fileno(self) -> int:
        """The device's descriptor: readable when the kernel has sent something."""
        return -1 if self._file is None else self._file.fileno()

    def send(self, packet: bytes) -> None:
        """Let an IP packet arrive at the kernel. Raises `OSError` EINVAL for what is none.

        A veth pair takes none beyond its MTU (EMSGSIZE), a TUN device does.
        """
        if not isinstance(packet, (bytes, bytearray, memoryview)):
            raise TypeError(f"a packet is octets, not {packet!r}")
        if not packet or packet[0] >> 4 not in _ETHERTYPES:
            raise OSError(errno.EINVAL, "neither an IPv4 nor an IPv6 packet")
        if self.device == "veth":
            packet = links.NEAR + links.FAR + _ETHERTYPES[packet[0] >> 4] + packet
        os.write(self.fileno(), packet)

    def read(self) -> bytes | None:
        """The next IP packet the kernel has sent, None where there is none.

        `sent_at` is then when the kernel sent it, in `time.monotonic`'s
        seconds, however late it is read.
        """
        while True:
            try:
                packet = os.read(self.fileno(), 1 << 17)
            except BlockingIOError:
                return None
            if self.device == "veth":
                # The far end also sees what we send, and other protocols.
                if packet[12:14] not in _ETHERTYPES.values() or packet[:6] != links.FAR:
                    continue
                packet = packet[14:]
            # Packets come here in the order in which they were sent; clocks may say otherwise.
            self.sent_at = max(self.sent_at, self._stamp(packet))
            return packet

    def _stamp(self, packet: bytes) -> float:
        """When the near device sent that packet, by the kernel's own clock."""
        assert self._tap is not None
        ahead = ahead_of_monotonic()
        while True:
            try:
                seen, extra, _, (_, _, kind, *_) = self._tap.recvmsg(1 << 17, 64)
            except BlockingIOError:
                return time.monotonic()
            if kind == socket.PACKET_OUTGOING and seen == packet:
                stamp: tuple[int, int] = _STAMP.unpack(extra[0][2])
                return (stamp[0] * 1_000_000_000 + stamp[1] - ahead) / 1e9

    def wait(self, timeout: float | None) -> bool:
        """Whether a packet can be read, after at most `timeout` seconds."""
        return bool(select.select([self.fileno()], [], [], timeout)[0])

    def close(self) -> None:
        """End the namespace and everything in it; sockets handed out are the caller's."""
        for file in (self._file, self._tap):
            if file is not None:
                file.close()
        self._file = self._tap = None
        self.namespace.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

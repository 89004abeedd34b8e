"""Two Linux hosts, each in a namespace, and a wire between them that does as it is told.

What the kernel sends into one TUN device comes out of the other, unless `fault`
drops, doubles, delays or alters it. Either end of the wire is captured, as a
file of raw IP packets.
"""

from __future__ import annotations

import heapq
import io
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from itertools import count
from types import TracebackType
from typing import Final, Self, TypeAlias

from timewait.kernel.links import address, default_route, link_up, tun
from timewait.kernel.namespace import Namespace

__all__ = ["CLIENT", "SERVER", "Fault", "Packet", "TwoHosts", "pcap", "tcp"]

Packet: TypeAlias = tuple[float, bytes]  # when, and the octets
# The number of the packet among those of its direction (from 0), whether the client sent it, its
# octets: what arrives instead, after how many seconds.
Fault: TypeAlias = Callable[[int, bool, bytes], Iterable[Packet]]

SERVER: Final = {socket.AF_INET: "10.9.0.1", socket.AF_INET6: "fd09::1"}
CLIENT: Final = {socket.AF_INET: "10.9.0.2", socket.AF_INET6: "fd09::2"}


def _as_it_is(_: int, __: bool, octets: bytes) -> Iterable[Packet]:
    return [(0.0, octets)]


def _end(hosts: Mapping[int, str]) -> io.FileIO:
    device = tun("wire0", offload=False)
    link_up("lo")
    link_up("wire0", 1500)
    for family, host in hosts.items():
        address("wire0", host, 128 if family == socket.AF_INET6 else 32)
        default_route("wire0", family)
    return device


class TwoHosts:
    """A context manager; `delay` is the wire's, in seconds, either way."""

    def __init__(
        self,
        fault: Fault = _as_it_is,
        delay: float = 0.002,
        sysctls: Mapping[str, object] | None = None,
    ) -> None:
        self.fault = fault
        self.delay = delay
        self.seen: dict[str, list[Packet]] = {"server": [], "client": []}
        self._stop = threading.Event()
        with ExitStack() as resources:
            self.server = resources.enter_context(Namespace(sysctls=sysctls))
            self.client = resources.enter_context(Namespace(sysctls=sysctls))
            self._wires = (
                resources.enter_context(self.server.call(_end, SERVER)),
                resources.enter_context(self.client.call(_end, CLIENT)),
            )
            self._resources = resources.pop_all()
        self._pump = threading.Thread(target=self._carry, daemon=True)
        self._pump.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._pump.join()
        self._resources.close()

    def _carry(self) -> None:
        numbers = (count(), count())
        order = count()
        waiting: list[tuple[float, int, bool, bytes]] = []
        server, client = self._wires
        while not self._stop.is_set():
            now = time.monotonic()
            while waiting and waiting[0][0] <= now:
                _, _, by_client, octets = heapq.heappop(waiting)
                here, wire = ("server", server) if by_client else ("client", client)
                self.seen[here].append((now, octets))
                wire.write(octets)
            pause = min(waiting[0][0] - now, 0.02) if waiting else 0.02
            for wire in select.select(self._wires, [], [], max(pause, 0))[0]:
                octets = wire.read(65536)
                by_client = wire is client
                if not octets or tcp(octets) is None:
                    continue
                now = time.monotonic()
                self.seen["client" if by_client else "server"].append((now, octets))
                for after, what in self.fault(next(numbers[by_client]), by_client, octets):
                    due = now + self.delay + after
                    heapq.heappush(waiting, (due, next(order), by_client, what))

    def listener(self, family: int = socket.AF_INET, **options: int) -> socket.socket:
        """A socket that listens on the server's port 80; `options` are of SOL_SOCKET or TCP."""
        sock = self.server.socket(family)
        _set(sock, options)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((SERVER[socket.AddressFamily(family)], 80))
        sock.listen()
        return sock

    def dial(self, family: int = socket.AF_INET, **options: int) -> socket.socket:
        """A socket of the client's, connected to the server's port 80."""
        sock = self.client.socket(family)
        sock.settimeout(20)
        _set(sock, options)
        try:
            sock.connect((SERVER[socket.AddressFamily(family)], 80))
        except OSError:
            sock.close()
            raise
        return sock

    def pair(self, **options: int) -> tuple[socket.socket, socket.socket]:
        """A connection: the server's socket and the client's."""
        with self.listener(**options) as listener:
            client = self.dial(**options)
            server, _ = listener.accept()
        server.settimeout(20)
        return server, client

    def captured(self, at: str) -> bytes:
        """What passed at the "server"'s end or the "client"'s, as a pcap file."""
        return pcap(self.seen[at])


def _set(sock: socket.socket, options: Mapping[str, int]) -> None:
    for name, value in options.items():
        level = socket.IPPROTO_TCP if name.startswith("TCP_") else socket.SOL_SOCKET
        sock.setsockopt(level, getattr(socket, name), value)


def tcp(octets: bytes) -> int | None:
    """Where the TCP header of an IP packet begins; None where there is none."""
    if octets[0] >> 4 == 4 and octets[9] == socket.IPPROTO_TCP:
        return (octets[0] & 15) * 4
    return 40 if octets[0] >> 4 == 6 and octets[6] == socket.IPPROTO_TCP else None


def pcap(packets: Iterable[Packet], link: int = 101, snap: int = 1 << 18) -> bytes:
    """A pcap file (nanoseconds) of these packets, each cut off after `snap` octets."""
    out = [struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, snap, link)]
    for t, octets in packets:
        kept = octets[:snap]
        head = struct.pack("<IIII", int(t), int(t % 1 * 1e9), len(kept), len(octets))
        out += [head, kept]
    return b"".join(out)

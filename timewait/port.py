"""A port nobody can take between asking for it and using it.

The usual "free port" idiom binds port 0, notes the number, closes the socket
and hopes. Here the port stays bound until it is used, and the number comes
from outside the range the kernel deals out by itself
(`net.ipv4.ip_local_port_range`), so that even after `release` only somebody
who asks for that very number can have it.

The holder is bound without SO_REUSEADDR, which proves that nothing at all has
the port, not even a TIME_WAIT; then the option is set on it. Linux compares
the options as they are when the next socket binds (`inet_csk_bind_conflict`),
so a server that sets SO_REUSEADDR, as most do, binds and listens while the
port is still held. Only a server that does not needs `release`, or the socket.
"""

from __future__ import annotations

import errno
import random
import socket
import sys
from pathlib import Path
from socket import socket as Socket
from types import TracebackType
from typing import Final, Self

__all__ = ["HeldPort", "hold_port"]

_DEALT_OUT: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_RESERVED: Final = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
_LOWEST: Final = 10_000  # below live the well-known services
_TRIES: Final = 1_000


class HeldPort:
    """A TCP port that is held bound until it is handed over or released.

    `number` is the port; `str()`, `int()` and formatting give it too, and it
    equals that number. (It is not itself an `int`: `getaddrinfo` takes no
    subclass of it.) As a context manager it releases at the end.
    """

    def __init__(self, holder: Socket) -> None:
        self.number: Final[int] = holder.getsockname()[1]
        self._holder: Socket | None = holder

    @property
    def held(self) -> bool:
        """Whether the port is still held here."""
        return self._holder is not None

    def release(self) -> int:
        """Let go, for a server that binds by number without SO_REUSEADDR; returns the number."""
        if self._holder is not None:
            self._holder.close()
            self._holder = None
        return self.number

    def socket(
        self, host: str = "127.0.0.1", *, reuse_address: bool = False, reuse_port: bool = False
    ) -> Socket:
        """The port as a bound socket of the caller's, who closes it.

        There is no instant in between at which the port is free. The socket
        has SO_REUSEADDR and SO_REUSEPORT as asked, whatever it took to get it.

        Raises `RuntimeError` where the port was released or handed over
        already, `OSError` where `host` is not an address of this machine.
        """
        if self._holder is None:
            raise RuntimeError(f"port {self.number} is no longer held: it was released before")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6 and host != "::":
                bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if sys.platform != "linux":  # elsewhere two bound sockets do not share by this option
                self._holder.close()
            bound.bind((host, self.number))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(reuse_address))
            if reuse_port:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except BaseException:
            bound.close()
            raise
        self.release()
        return bound

    def listen(
        self,
        host: str = "127.0.0.1",
        backlog: int = 128,
        *,
        reuse_address: bool = False,
        reuse_port: bool = False,
    ) -> Socket:
        """As `socket`, and listening."""
        listener = self.socket(host, reuse_address=reuse_address, reuse_port=reuse_port)
        listener.listen(backlog)
        return listener

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"<HeldPort {self.number} {'held' if self.held else 'released'}>"

    def __str__(self) -> str:
        return str(self.number)

    def __format__(self, spec: str) -> str:
        return format(self.number, spec)

    def __index__(self) -> int:
        return self.number

    def __eq__(self, other: object) -> bool:
        return self.number == other

    def __hash__(self) -> int:
        return hash(self.number)


def hold_port() -> HeldPort:
    """Hold a TCP port of this machine that is free on every address, IPv4 and IPv6.

    Raises `OSError` (EADDRINUSE) where none was found.
    """
    for number in _candidates():
        try:
            holder = _bind_everywhere(number)
        except OSError as refused:
            if refused.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        return HeldPort(holder)
    raise OSError(errno.EADDRINUSE, "no port found that is free on every address")


def _bind_everywhere(number: int) -> Socket:
    """A socket bound to the port on every address, which others may share by SO_REUSEADDR."""
    try:
        holder = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        host = "::"
    except OSError:  # no IPv6 here
        holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        host = "0.0.0.0"
    try:
        if holder.family == socket.AF_INET6:
            holder.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        holder.bind((host, number))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    except BaseException:
        holder.close()
        raise
    return holder


def _candidates() -> list[int]:
    """Numbers to try: those the kernel never deals out, in random order; else 0, its own choice."""
    try:
        low, high = map(int, _DEALT_OUT.read_text().split())
        reserved = _ranges(_RESERVED.read_text())
    except OSError:  # not Linux: the IANA's dynamic range
        low, high, reserved = 49_152, 65_535, set()
    apart = [
        number
        for number in (*range(_LOWEST, low), *range(high + 1, 65_536))
        if number not in reserved
    ]
    return [*random.sample(apart, min(len(apart), _TRIES)), *[0] * 10]


def _ranges(text: str) -> set[int]:
    """The numbers of "8080,9000-9010"."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first:
            numbers.update(range(int(first), int(last or first) + 1))
    return numbers

"""select(2), poll(2) and epoll(7) over modelled sockets, for programs that ask them directly.

Connection pools do, to see whether an idle connection was closed meanwhile.
A call that has to wait lets virtual time pass, as `time.sleep` does: nothing
of the program runs meanwhile, but its kernel and the network do. Where nothing
can ever happen it raises `WouldBlockForever`.
"""

from __future__ import annotations

import errno
import math
import select as machine
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn

from timewait.sim.sock import Sock, fail
from timewait.sim.socket import WouldBlockForever, current_host

__all__ = ["Epoll", "Poll", "select"]

_READ: Final = machine.POLLIN | machine.POLLHUP | machine.POLLERR
_WRITE: Final = machine.POLLOUT | machine.POLLERR
_ALWAYS: Final = machine.POLLERR | machine.POLLHUP
_ONESHOT: Final = 1 << 30
_EDGE: Final = 1 << 31


def _number(file: Any) -> int:
    if not isinstance(file, int) and not hasattr(file, "fileno"):
        raise TypeError("argument must be an int, or have a fileno() method.")
    number = file if isinstance(file, int) else file.fileno()
    if number < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({number})")
    return int(number)


def _sock(number: int) -> Sock:
    """The socket of that number; EBADF where there is none in this simulation."""
    sock = current_host().network.files.get(number)
    if sock is None:
        fail(errno.EBADF)
    return sock


def _wait(look: Callable[[], Any], seconds: float | None) -> Any:
    """What `look` finds, as soon as it finds anything, or when `seconds` are over."""
    clock = current_host().network.clock
    until = math.inf if seconds is None else clock.now + seconds
    while not (found := look()):
        if until == math.inf and clock.next == math.inf:
            raise WouldBlockForever("nothing will ever be ready, and nothing else runs meanwhile")
        if not clock.run_until(until):
            return look()
    return found


def select(
    readers: Iterable[Any], writers: Iterable[Any], others: Iterable[Any], timeout: Any = None
) -> tuple[list[Any], list[Any], list[Any]]:
    """As `select.select`; there is never anything exceptional."""
    if timeout is not None and timeout < 0:
        raise ValueError("timeout must be non-negative")
    wanted = [
        [(file, _sock(_number(file)), mask) for file in files]
        for files, mask in ((readers, _READ), (writers, _WRITE), (others, 0))
    ]

    def look() -> list[list[Any]]:
        ready = [[file for file, sock, mask in group if sock.poll() & mask] for group in wanted]
        return ready if any(ready) else []

    ready = _wait(look, timeout) or [[], [], []]
    return ready[0], ready[1], ready[2]


class Poll:
    """As `select.poll()`: what is watched, by number; milliseconds."""

    def __init__(self) -> None:
        self._watched: dict[int, int] = {}

    def register(
        self, fd: Any, eventmask: int = machine.POLLIN | machine.POLLPRI | machine.POLLOUT
    ) -> None:
        """Watch a socket, or change what it is watched for."""
        self._watched[_number(fd)] = eventmask

    def modify(self, fd: Any, eventmask: int) -> None:
        """Change what it is watched for; ENOENT if it is not."""
        if _number(fd) not in self._watched:
            fail(errno.ENOENT)
        self._watched[_number(fd)] = eventmask

    def unregister(self, fd: Any) -> None:
        """Watch it no more; `KeyError` if it is not."""
        del self._watched[_number(fd)]

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        """Which are ready for what; POLLNVAL for a number that is no socket any more."""
        seconds = None if timeout is None or timeout < 0 else timeout / 1000
        ready: list[tuple[int, int]] = _wait(self._look, seconds)
        return ready

    def _look(self) -> list[tuple[int, int]]:
        files = current_host().network.files
        ready = []
        for number, mask in self._watched.items():
            sock = files.get(number)
            found = machine.POLLNVAL if sock is None else sock.poll() & (mask | _ALWAYS)
            if found:
                ready.append((number, found))
        return ready


class Epoll:
    """As `select.epoll()`, level-triggered; seconds."""

    def __init__(self, sizehint: int = -1, flags: int = 0) -> None:
        self._watched: dict[Sock, tuple[int, int]] = {}
        self.closed = False

    def register(self, fd: Any, eventmask: int = machine.EPOLLIN | machine.EPOLLOUT) -> None:
        """Watch a socket; EEXIST if it is watched already."""
        sock = self._find(fd)
        if sock in self._watched:
            fail(errno.EEXIST)
        self._set(sock, _number(fd), eventmask)

    def modify(self, fd: Any, eventmask: int) -> None:
        """Change what it is watched for; ENOENT if it is not."""
        sock = self._find(fd)
        if sock not in self._watched:
            fail(errno.ENOENT)
        self._set(sock, _number(fd), eventmask)

    def unregister(self, fd: Any) -> None:
        """Watch it no more; ENOENT if it is not."""
        sock = self._find(fd)
        if sock not in self._watched:
            fail(errno.ENOENT)
        del self._watched[sock]

    def poll(self, timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
        """Which are ready for what; a closed socket is watched no more."""
        self._open()
        if maxevents == 0 or maxevents < -1:
            raise ValueError(f"maxevents must be greater than 0, got {maxevents}")
        ready: list[tuple[int, int]] = _wait(
            self._look, None if timeout is None or timeout < 0 else timeout
        )
        return ready if maxevents < 0 else ready[:maxevents]

    def _look(self) -> list[tuple[int, int]]:
        ready = []
        for sock, (number, mask) in list(self._watched.items()):
            if sock.fd < 0:
                del self._watched[sock]
                continue
            found = sock.poll() & (mask | _ALWAYS)
            if found:
                ready.append((number, found))
                if mask & _ONESHOT:
                    self._watched[sock] = (number, 0)
        return ready

    def _set(self, sock: Sock, number: int, mask: int) -> None:
        if mask & _EDGE:
            raise NotImplementedError("EPOLLET is not simulated")
        self._watched[sock] = (number, mask)

    def _find(self, fd: Any) -> Sock:
        self._open()
        return _sock(_number(fd))

    def _open(self) -> None:
        if self.closed:
            raise ValueError("I/O operation on closed epoll object")

    def fileno(self) -> NoReturn:
        """Refused: it is no file, and can itself not be watched."""
        raise NotImplementedError("a simulated epoll object has no number")

    def close(self) -> None:
        """Watch nothing any more."""
        self.closed = True
        self._watched.clear()

    def __enter__(self) -> Epoll:
        self._open()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

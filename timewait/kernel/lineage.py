"""Which listeners and connections this process and those it starts have begun.

The socket table tells whose a socket is while both are there. What a child did
between two looks is nobody's by then. But listen() and connect() are made in
the context of the process that calls them, and the kernel can record a
tracepoint for a process and all that descend from it: it follows them itself,
at each fork, daemons too.
Source: Documentation/trace/ftrace.rst (set_event_pid, event-fork).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from timewait.events import Transition
from timewait.kernel import tracefs
from timewait.tcp.states import State

__all__ = ["Lineage"]

_EVENT: Final = Path("events/sock/inet_sock_set_state")
_BEGINNINGS: Final = "protocol == 6 && oldstate == 7 && (newstate == 2 || newstate == 10)"
_LINE: Final = re.compile(
    r"\s(\d+\.\d+): inet_sock_set_state: .*sport=(\d+) dport=(\d+) .*newstate=TCP_(\w+)"
)
_LOST: Final = re.compile(r"\[LOST (\d+) EVENTS\]")
_ROUNDED: Final = 1e-6  # seconds by which the text's times are too late at most
_SAME: Final = 0.001  # seconds at most between two records of one transition
_PATIENCE: Final = 1.0  # seconds until the other record of a transition will not come


class Lineage:
    """Tells which transitions began in these processes or in what descends from them, from now on.

    `tree` lists them. `buffer` bytes, for each processor, hold a hundredth as many beginnings. To
    be opened before what records the transitions themselves. `lost` counts
    those that the kernel had no room for. Needs root, and the first PID
    namespace. Raises `OSError` that says why it cannot be had.
    """

    def __init__(self, tree: Callable[[], Iterable[int]], *, buffer: int = 1 << 17) -> None:
        if not tracefs.in_first_pid_namespace():
            raise OSError(errno.ESRCH, "the kernel knows this process by another number")
        self.lost = 0
        self._begun: list[tuple[float, int, int, State]] = []  # when, the ports, and LISTEN or not
        self._text = ""
        self._resources = ExitStack()
        try:
            self._open(tree, buffer)
        except BaseException:
            self._resources.close()
            raise

    def _open(self, tree: Callable[[], Iterable[int]], buffer: int) -> None:
        home = tracefs.instance(tracefs.root(self._resources), self._resources)
        (home / "trace_options").write_text("event-fork")
        (home / "buffer_size_kb").write_text(str(buffer >> 10))
        (home / _EVENT / "filter").write_text(_BEGINNINGS)
        self._followed = home / "set_event_pid"
        self._follow(tree)
        self._pipe = os.open(home / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._resources.callback(os.close, self._pipe)
        (home / _EVENT / "enable").write_text("1")

    def _follow(self, tree: Callable[[], Iterable[int]]) -> None:
        followed: set[str] = set()
        while new := _threads(tree()) - followed:  # they go on meanwhile
            with self._followed.open("r+b", buffering=0) as following:
                following.write(" ".join(new).encode())
            followed |= new

    def close(self) -> None:
        """Follow nobody any more."""
        self._resources.close()

    def daemons(self, tree: Iterable[int]) -> set[int]:
        """The threads that descend from these processes and are not of the tree any more."""
        followed = {*self._followed.read_text().split()}
        return {int(thread) for thread in followed - _threads(tree)}

    def follow_only(self, tree: Callable[[], Iterable[int]]) -> None:
        """Leave those to themselves that are not of the tree any more: daemons, of before."""
        if any(os.path.exists(f"/proc/{thread}") for thread in self.daemons(tree())):
            self._followed.write_text("")  # (this takes some 20 ms)
            self._follow(tree)

    def among(self, events: Iterable[Transition]) -> list[Transition]:
        """Those of these events, in order of time (`time.monotonic`), that began here.

        Of events that happened before this call, each given once.
        """
        self._read()
        found = []
        for event in events:
            if event.new not in (State.SYN_SENT, State.LISTEN):
                continue
            self._begun = [begun for begun in self._begun if event.t - begun[0] < _PATIENCE]
            for begun in reversed(self._begun):
                t, sport, dport, new = begun
                if (
                    -_ROUNDED < event.t - t < _SAME
                    and (new, dport) == (event.new, event.remote[1])
                    and sport in (0, event.local[1])
                ):
                    found.append(event)
                    self._begun.remove(begun)
                    break
        return found

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while part := os.read(self._pipe, 1 << 16):
                self._text += part.decode()
        *lines, self._text = self._text.split("\n")
        for line in lines:
            if event := _LINE.search(line):
                t, sport, dport, new = event.groups()
                state = State.LISTEN if new == "LISTEN" else State.SYN_SENT
                self._begun.append((float(t), int(sport), int(dport), state))
            elif lost := _LOST.search(line):
                self.lost += int(lost[1])


def _threads(processes: Iterable[int]) -> set[str]:
    threads: set[str] = set()
    for process in processes:
        with suppress(OSError):  # it has ended
            threads.update(os.listdir(f"/proc/{process}/task"))
    return threads

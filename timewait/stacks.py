"""What answers the socket calls: this machine's kernel, or a modelled host.

A stack gives the orchestrator sockets, a clock, and what can be seen of the
connections; nothing above this file knows which one it has.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from attrs import evolve

from timewait.events import Event, Row
from timewait.port import hold_port
from timewait.scenario import Scenario, ScenarioError
from timewait.tcp.states import State

__all__ = ["KernelStack"]

_NONE_TO_SPARE: Final = 16  # descriptors that an event loop and observers want for themselves


class KernelStack:
    """The machine's own kernel: real sockets, its clock, its table of sockets.

    The table comes from sock_diag; where there is none, from psutil, which
    has no timers, and `blind` says so. Raises `ScenarioError` where neither works.
    """

    name = "kernel"
    profiles: dict[str, str] = {"server": "linux", "client": "linux"}  # noqa: RUF012

    def __init__(self) -> None:
        self._opened = ExitStack()
        self.observer, self._table, self.blind = _table(self._opened)
        self._origin = time.monotonic()

    def close(self) -> None:
        """Close what it sees with."""
        self._opened.close()

    def now(self) -> float:
        """Seconds since this stack was made, on the machine's monotonic clock."""
        return time.monotonic() - self._origin

    def socket(self, actor: str, family: int) -> socket.socket:
        """A non-blocking socket of the machine's, whoever the actor is."""
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        return sock

    def rows(self, port: int) -> list[Row]:
        """The kernel's table, limited to the port."""
        return self._table(port)

    def seen(self) -> list[Event]:
        """Nothing beyond the table's instants."""
        return []

    def prepare(self, scenario: Scenario) -> Scenario:
        """Choose the port and see that there are file descriptors for all the clients."""
        wanted = 2 * scenario.clients + _NONE_TO_SPARE
        left = _descriptors_left()
        if left is not None and wanted > left:
            raise ScenarioError(
                f"{scenario.clients} clients need {wanted} file descriptors and this process "
                f"has {left} left (see ulimit -n)"
            )
        if scenario.port:
            return scenario
        try:
            return evolve(scenario, port=hold_port().release())
        except OSError as wrong:
            raise ScenarioError(f"no free port: {wrong.strerror}") from None


def _descriptors_left() -> int | None:
    try:
        import resource

        return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/proc/self/fd"))
    except (ImportError, OSError):  # not a Unix, or one without /proc
        return None


def _table(opened: ExitStack) -> tuple[str, Callable[[int], list[Row]], tuple[str, ...]]:
    """The best table of sockets there is here: its name, a look at it, what it cannot tell."""
    try:
        from timewait.kernel.sock_diag import SockDiag

        diag = opened.enter_context(SockDiag())
        diag.sockets(1)
    except OSError as missing:
        why = f"no sock_diag here ({missing.strerror})"
    except ImportError:
        why = "no sock_diag here"
    else:
        return "sock_diag", diag.sockets, ("states between two looks at the table",)
    try:
        import psutil
    except ImportError:
        raise ScenarioError(f"{why}, and psutil is not installed: nothing to see with") from None

    def look(port: int) -> list[Row]:
        found: list[Any]
        try:
            found = list(psutil.net_connections("tcp"))
        except psutil.AccessDenied:
            found = list(psutil.Process().net_connections("tcp"))
        return [
            Row(tuple(each.laddr), tuple(each.raddr) or ("", 0), State.parse(each.status))
            for each in found
            if port in (each.laddr.port, each.raddr and each.raddr.port)
        ]

    blind = (f"timers: {why}, and psutil tells none", "states between two looks at the table")
    return "psutil", look, blind

"""What answers the socket calls: this machine's kernel, or a modelled host.

A stack gives the orchestrator sockets, a clock, and what can be seen of the
connections; nothing above this file knows which one it has.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from importlib import import_module
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, cast

import anyio
from attrs import evolve

from timewait.events import Event, Row
from timewait.explain import explain_bind
from timewait.port import hold_port
from timewait.scenario import Scenario, ScenarioError

if TYPE_CHECKING:
    from timewait.kernel.capture import Capture
    from timewait.kernel.tracepoint import Tracepoint
    from timewait.sim.network import Network

__all__ = ["OBSERVERS", "KernelStack", "ModelStack", "aim"]

_NONE_TO_SPARE: Final = 16  # descriptors that an event loop and observers want for themselves
_BETWEEN: Final = "states between two looks at the table"
_RING: Final = 1 << 20  # bytes for captured segments between two of a run's own events
_PORT: Final = 9090  # on a modelled host every port is free


OBSERVERS: Final = ("sock_diag", "psutil", "tracepoint", "capture")


class KernelStack:
    """The machine's own kernel: real sockets, its clock, and who watches them.

    `observer` names observers, joined by "+": a table of the sockets,
    "sock_diag" or "psutil" (which has no timers, and serves where there is no
    sock_diag), and besides it "capture", which sees every segment, and
    "tracepoint", which sees every transition. "auto" is the table and a
    capture, if that is permitted. `observer` and `blind` say who really
    watches, and what nobody sees and why.

    Raises `ScenarioError` for an observer that is unknown or not permitted.
    """

    name = "kernel"
    virtual = False
    network: Network | None = None

    def __init__(self, observer: str = "auto") -> None:
        self.profiles = {"server": "linux", "client": "linux"}
        self._asked = () if observer == "auto" else tuple(observer.split("+"))
        unknown = [name for name in self._asked if name not in OBSERVERS]
        if unknown:
            raise ScenarioError(
                f"no observer is called {unknown[0]!r}; there are auto, {', '.join(OBSERVERS)}"
            )
        self._opened = ExitStack()
        self.observer, self._table, self.blind = _table(self._opened, "psutil" in self._asked)
        self._watching: list[Tracepoint | Capture] = []
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

    def run(self, main: Callable[[], Coroutine[Any, Any, None]], backend: str = "asyncio") -> None:
        """Run it on a loop of the machine's own: anyio's backend "asyncio" or "trio".

        Raises `ScenarioError` where trio is not installed, or no descriptors are left.
        """
        if backend not in ("asyncio", "trio"):
            raise ScenarioError(f"no backend is called {backend!r}; there are asyncio, trio")
        try:
            import_module(backend)
        except ImportError:
            raise ScenarioError(
                f"{backend} is not installed: pip install 'timewait[{backend}]'"
            ) from None
        left = _descriptors_left()
        if left is not None and left < _NONE_TO_SPARE:  # a loop half made complains of itself
            raise ScenarioError(
                f"a run needs {_NONE_TO_SPARE} file descriptors and this process has {left} left "
                "(see ulimit -n)"
            )
        anyio.run(main, backend=backend)

    def seen(self) -> list[Event]:
        """What the observers beside the table have seen since they were last asked."""
        return [event for observer in self._watching for event in observer.read()]

    def why_taken(self, scenario: Scenario) -> str:
        """Who has the port, as `timewait explain` says it."""
        try:
            found = explain_bind(scenario.port, scenario.host)
        except OSError:
            return ""
        free = "" if found.free_after is None else f", free in {found.free_after:.0f} s"
        return f"{found.title}{free}"

    def prepare(self, scenario: Scenario) -> Scenario:
        """Choose the port and see that there are file descriptors for all the clients."""
        wanted = 2 * scenario.clients + _NONE_TO_SPARE
        left = _descriptors_left()
        if left is not None and wanted > left:
            raise ScenarioError(
                f"{scenario.clients} clients need {wanted} file descriptors and this process "
                f"has {left} left (see ulimit -n)"
            )
        if not scenario.port:
            try:
                scenario = evolve(scenario, port=hold_port().release())
            except OSError as wrong:
                raise ScenarioError(f"no free port: {wrong.strerror}") from None
        for name in self._asked or ("capture",):
            if name in ("tracepoint", "capture"):
                self._watch(name, scenario.port)
        return scenario

    def _watch(self, name: str, port: int) -> None:
        from timewait.kernel.capture import Capture
        from timewait.kernel.tracepoint import Tracepoint

        observer: Tracepoint | Capture
        try:
            if name == "tracepoint":
                observer = Tracepoint([port], start=self._origin)
            else:
                observer = Capture([port], start=self._origin, buffer=_RING)
        except OSError as refused:
            if self._asked:
                raise ScenarioError(f"no {name} here: {refused.strerror or refused}") from None
            self.blind += (f"segments ({refused.strerror or refused})",)
            return
        self._opened.callback(observer.close)
        self._watching.append(observer)
        self.observer += f"+{name}"
        if name == "tracepoint":
            self.blind = tuple(each for each in self.blind if each != _BETWEEN)


class ModelStack:
    """A modelled host, or two: `SimSocket`, virtual time, and every event seen.

    On a loopback address both ends live on one host, as they do on the
    kernel; on any other the server has a host and the clients have one. A
    segment takes `delay` seconds either way: even loopback takes time, and it
    is what makes a simultaneous close possible. `profiles` names the TCP of
    each role; two different ones take two hosts.
    """

    name = "model"
    observer = "model"
    virtual = True
    blind: tuple[str, ...] = ()

    def __init__(
        self,
        scenario: Scenario,
        profiles: dict[str, str] | None = None,
        *,
        seed: int = 0,
        delay: float = 0.000_02,
    ) -> None:
        from timewait.sim import Network

        self.profiles = {"server": "linux", "client": "linux"} | (profiles or {})
        self.network = Network(seed)
        server, client = self.profiles["server"], self.profiles["client"]
        if ip_address(scenario.host).is_loopback and server == client:
            both = self.network.host("machine", profile=server)
            self._hosts = {"server": both, "client": both}
        else:
            self._hosts = {
                "server": self.network.host("server", *_beyond(scenario.host), profile=server),
                "client": self.network.host("client", profile=client),
            }
            self.network.connect("server", "client", delay=delay)
        # No fault: it would be the first to strike, and so the only one.
        self.network.loopback = delay
        self._observer = self.network.observe()

    def close(self) -> None:
        """Nothing is held."""

    def now(self) -> float:
        """Virtual seconds."""
        return self.network.clock.now

    def socket(self, actor: str, family: int) -> socket.socket:
        """A non-blocking modelled socket on the actor's host."""
        from timewait.sim.host import HERE
        from timewait.sim.socket import SimSocket

        there = copy_context()
        there.run(HERE.set, self._hosts["server" if actor == "server" else "client"])
        sock = there.run(SimSocket, family)
        sock.setblocking(False)
        return cast(socket.socket, sock)

    def rows(self, port: int) -> list[Row]:
        """The tables of the modelled hosts, limited to the port."""
        return [row for host in set(self._hosts.values()) for row in host.rows(port)]

    def seen(self) -> list[Event]:
        """Every transition and segment since this was last asked."""
        return self._observer.read()

    def prepare(self, scenario: Scenario) -> Scenario:
        """Choose the port, and an address for a server that has a host of its own."""
        host = scenario.host
        if len(set(self._hosts.values())) > 1:
            host = next(iter(_beyond(host)), self._hosts["server"].addresses[0])
        chosen = evolve(scenario, host=host, port=scenario.port or _PORT)
        aim(self.network, chosen)
        return chosen

    def why_taken(self, scenario: Scenario) -> str:
        """On a modelled host nobody else has a port."""
        return ""

    def run(self, main: Callable[[], Coroutine[Any, Any, None]], backend: str = "asyncio") -> None:
        """Run it on the simulated loop, whatever loop the caller may be on."""
        from timewait.sim import run

        with _outside_any_loop(), self._observer:
            run(main, hosts=self.network)


def aim(network: Network, scenario: Scenario) -> None:
    """Have a modelled network do what the scenario says of its link.

    Raises `ScenarioError` for segments of an unknown kind.
    """
    network.following = True  # for `Network.forge`
    for fault in scenario.faults:
        place: dict[str, int] = {}
        if fault.source:
            place = {"source" if fault.source == "server" else "target": scenario.port}
        often: dict[str, Any] = {"nth": fault.nth, "times": fault.times or None, **place}
        try:
            act = getattr(network, fault.act)
            if fault.act in ("delay", "duplicate", "reorder"):
                act(fault.segments, fault.seconds, **often)
            else:
                act(fault.segments, **often)
        except ValueError as wrong:
            raise ScenarioError(f"fault: {wrong}") from None


def _beyond(host: str) -> tuple[str, ...]:
    """The address if it can be one host's own among several."""
    plain = ip_address(host)
    return () if plain.is_loopback or plain.is_unspecified else (host,)


@contextmanager
def _outside_any_loop() -> Iterator[None]:
    """Step out of the event loop this code may be on, which stands still meanwhile.

    A simulation takes no real time to wait, so it can be done between two
    steps of the caller's loop; asyncio only has to be told that this is meant.
    """
    outer = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    marks = _loop_marks()
    library = marks and marks.name
    if marks:
        marks.name = "asyncio"
    try:
        yield
    finally:
        if marks:
            marks.name = library
        asyncio._set_running_loop(outer)


def _loop_marks() -> Any:
    """Where trio leaves the mark that anyio goes by; None where there is no trio."""
    try:
        from sniffio import thread_local
    except ImportError:
        return None
    return thread_local


def _descriptors_left() -> int | None:
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return max(limit - len(os.listdir("/proc/self/fd")), 0)
    except (ImportError, OSError) as wrong:  # not a Unix, one without /proc, or none left
        return 0 if isinstance(wrong, OSError) and wrong.errno == errno.EMFILE else None


def _table(
    opened: ExitStack, psutil_wanted: bool
) -> tuple[str, Callable[[int], list[Row]], tuple[str, ...]]:
    """The best table of sockets there is here: its name, a look at it, what it cannot tell."""
    try:
        if psutil_wanted:
            raise ImportError
        from timewait.kernel.sock_diag import SockDiag

        diag = opened.enter_context(SockDiag())
        diag.sockets(1)
    except OSError as missing:
        why = f"no sock_diag here ({missing.strerror})"
    except ImportError:
        why = "asked for" if psutil_wanted else "no sock_diag here"
    else:
        return "sock_diag", diag.sockets, (_BETWEEN,)
    from timewait.kernel.observers import psutil_rows

    try:
        psutil_rows()
    except OSError:
        raise ScenarioError(f"{why}, and psutil is not installed: nothing to see with") from None

    def look(port: int) -> list[Row]:
        return [row for row, _ in psutil_rows() if port in (row.local[1], row.remote[1])]

    blind = (f"timers ({why}, and psutil tells none)", _BETWEEN)
    return "psutil", look, blind

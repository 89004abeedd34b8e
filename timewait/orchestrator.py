"""Does what a scenario says, on whichever stack it is handed.

This is ordinary async code over non-blocking sockets, with anyio to wait for
them, so it runs on asyncio and trio over the kernel and on the simulated loop
over the model; there is no second interpreter of scenarios. It makes the
sockets itself: the servers of the stories do not set SO_REUSEADDR, which is
the whole trouble, and every async library's listener does.

After each step it waits until the step has settled, and never merely sleeps:
a delayed ACK can show FIN_WAIT_1 for 40 ms, and that is no step's outcome.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Coroutine
from functools import partial
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import anyio
import anyio.abc
from attrs import define, evolve, field

from timewait import events
from timewait.events import Address, Called, Event, Note, Row, RunStarted, Snapshot
from timewait.kernel.sock_diag import ends_in
from timewait.scenario import (
    Abort,
    Close,
    Connect,
    Eof,
    Inject,
    Listen,
    Pause,
    Restart,
    Scenario,
    ScenarioError,
    Send,
    Shutdown,
    Step,
    Vanish,
)
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.sim.network import Network

__all__ = ["Orchestrator", "Stack", "StepHung", "Waiting"]

T = TypeVar("T")

# Called while a port is waited for: seconds waited, and seconds left where they are known.
Waiting = Callable[[float, float | None], object]

# States that a connection only passes through; a step has not settled while one is there.
_PASSING: Final = frozenset(
    {State.SYN_SENT, State.SYN_RECEIVED, State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK}
)
_LOOK_FIRST, _LOOK_AT_MOST = 0.0002, 0.02  # seconds between two looks at the table
_BLOCK: Final = 1 << 20  # bytes that are offered to one send()
_WILDCARDS: Final = frozenset({"0.0.0.0", "::", "*"})
_RESET: Final = struct.pack("ii", 1, 0)
_A_MOMENT: Final = 0.02


class Stack(Protocol):
    """What answers the socket calls, and what can be seen of it.

    `blind` says in words what its observers cannot see; `virtual` whether its
    time is, so that waiting takes none.
    """

    name: str
    observer: str
    blind: tuple[str, ...]
    profiles: dict[str, str]
    virtual: bool

    @property
    def network(self) -> Network | None:
        """The link between the two ends, where it is ours."""

    def now(self) -> float:
        """Seconds since the run began."""

    def socket(self, actor: str, family: int) -> socket.socket:
        """A non-blocking TCP socket on the actor's host. Raises `OSError`."""

    def rows(self, port: int) -> list[Row]:
        """Every socket with that port at either end."""

    def seen(self) -> list[Event]:
        """What the observers have seen since they were last asked."""

    def prepare(self, scenario: Scenario) -> Scenario:
        """The scenario with its port chosen. Raises `ScenarioError` where it cannot run here."""

    def why_taken(self, scenario: Scenario) -> str:
        """Who has the scenario's port, in words; "" where nothing can be told."""

    def run(self, main: Callable[[], Coroutine[Any, Any, None]], backend: str = "asyncio") -> None:
        """Run it on a loop of the stack's own."""

    def close(self) -> None:
        """Give back what the stack itself holds."""


class StepHung(ScenarioError):
    """A step did not settle within the scenario's time limit.

    `step` is its number from 1, `label` what it does, `states` how many of the
    scenario's sockets are in which state, `waiting_for` what never happened.
    """

    def __init__(
        self, step: int, label: str, limit: float, states: dict[State, int], waiting_for: list[str]
    ) -> None:
        self.step, self.label, self.states, self.waiting_for = step, label, states, waiting_for
        table = ", ".join(f"{count} {state}" for state, count in states.items()) or "no socket left"
        why = f": {waiting_for[0]}" if waiting_for else ""
        super().__init__(f"step {step} ({label}) hung for {limit:g} s{why} [{table}]")


@define(eq=False)
class _End:
    """One end of one connection, with what its application has done so far."""

    actor: str
    number: int
    sock: socket.socket
    local: Address
    remote: Address
    reads: bool
    at_eof: str
    sent: int = 0
    received: int = 0
    eof: bool = False
    open: bool = True
    over: bool = False  # it sends no more: closed, or shut down
    gone: bool = False  # its machine vanished
    back: bool = False  # and is there again
    deaf: bool = False  # nothing has ever reached it

    @property
    def name(self) -> str:
        return self.actor if self.actor != "server" else f"server-{self.number}"


@define(eq=False)
class Orchestrator:
    """One performance of a scenario on a stack.

    Every event goes to `record` as it happens. With `wait`, a restart that is
    refused is tried until it succeeds, and `wait` hears how long that takes.
    """

    scenario: Scenario
    stack: Stack
    record: Callable[[Event], object]
    wait: Waiting | None = None

    _options: Listen = field(factory=Listen, init=False)
    _listener: socket.socket | None = field(default=None, init=False)
    _servers: list[_End] = field(factory=list, init=False)
    _clients: list[_End] = field(factory=list, init=False)
    _peers: dict[tuple[Address, Address], _End] = field(factory=dict, init=False)
    _former: set[tuple[Address, Address]] = field(factory=set, init=False)
    _tasks: anyio.abc.TaskGroup = field(init=False)

    @property
    def _address(self) -> Address:
        return (self.scenario.host, self.scenario.port)

    async def perform(self) -> None:
        """Do all the steps; whatever happens, every socket is closed at the end.

        Raises `StepHung`, or `ScenarioError` where a step cannot be done here
        (the port is taken, the address is not this machine's).
        """
        trouble: ScenarioError | None = None
        try:
            self._begin()
            async with anyio.create_task_group() as self._tasks:
                try:
                    for number, step in enumerate(self.scenario.steps, 1):
                        await self._step(number, step)
                except ScenarioError as wrong:
                    trouble = wrong
                self._tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _alone(group) from None
        finally:
            if trouble:
                self._record(Note(self.stack.now(), str(trouble)))
            # What is still open is closed unseen: it is no part of the scenario.
            self._leave_nothing()
        if trouble:
            raise trouble

    # The steps

    def _begin(self) -> None:
        self.scenario = self.stack.prepare(self.scenario)
        self._former = {(row.local, row.remote) for row in self.stack.rows(self.scenario.port)}
        self._record(
            RunStarted(
                self.stack.now(),
                self.stack.name,
                self.stack.observer,
                self.scenario.to_dict(),
                self.stack.profiles,
                self.stack.blind,
            )
        )

    async def _step(self, number: int, step: Step) -> None:
        limit = self.scenario.time_limit
        pause = step.seconds if isinstance(step, Pause) else 0.0
        with anyio.move_on_after(limit + pause) as scope:
            await self._do(step)
            await self._settle(step)
        if scope.cancelled_caught:
            rows = self._rows()
            states = dict(sorted(Counter(row.state for row in rows).items()))
            raise StepHung(number, str(step), limit, states, self._unsettled(step, rows))
        self._snapshot(str(step))
        if isinstance(step, Restart) and not self._listener and self.wait:
            await self._wait_until_free(self.wait)

    async def _do(self, step: Step) -> None:
        match step:
            case Listen():
                self._options = step
                failed = self._try_to_listen()
                if failed:
                    raise ScenarioError(_cannot(failed, self.scenario, self.stack))
            case Connect():
                for _ in range(step.clients):
                    await self._connect(step)
            case Send():
                for end in self._ends(step.who):
                    await self._send(end, step.size)
            case Shutdown():
                for end in self._ends(step.who):
                    end.over = True
                    self._call(end, "shutdown", partial(end.sock.shutdown, socket.SHUT_WR))
            case Close():
                self._close_all(step.who)
            case Abort():
                self._close_all(step.who, reset=True)
            case Pause():
                await anyio.sleep(step.seconds)
            case Restart():
                self._restart(step)
            case Vanish():
                self._vanish(step)
            case Inject():
                self._inject(step)
            case Eof():
                pass  # all of it is waiting, see _unsettled

    def _listen(self) -> None:
        options = self._options
        sock = self._socket("server", options)
        for call, function, result in (
            ("bind", partial(sock.bind, self._address), None),
            ("listen", partial(sock.listen, options.backlog), options.backlog),
        ):
            began, failed = self.stack.now(), None
            try:
                function()
            except OSError as wrong:
                failed = wrong
            self._called(
                "server", call, began, failed, socket="listener", local=self._address, result=result
            )
            if failed:
                sock.close()
                failed.filename = call
                raise failed
        self._listener = sock
        self._tasks.start_soon(self._accept, sock)

    def _socket(self, actor: str, options: Listen | Connect) -> socket.socket:
        family = socket.AF_INET6 if ":" in self.scenario.host else socket.AF_INET
        sock = self.stack.socket(actor, family)
        wanted = {"SO_REUSEADDR": options.reuse_address, "SO_REUSEPORT": options.reuse_port}
        for name in (name for name, on in wanted.items() if on):
            began = self.stack.now()
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), 1)
            self._called(actor, "setsockopt", began, result={name: 1})
        return sock

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                await anyio.wait_readable(listener)
                began = self.stack.now()
                sock, remote = listener.accept()
            except BlockingIOError:
                continue
            except (anyio.ClosedResourceError, OSError):
                return  # the listener was closed
            sock.setblocking(False)
            end = _End(
                "server",
                len(self._servers) + 1,
                sock,
                sock.getsockname()[:2],
                remote[:2],
                self._options.reads,
                self._options.at_eof,
            )
            self._servers.append(end)
            self._start(end)
            self._ended(end, "accept", began)

    async def _connect(self, step: Connect) -> None:
        number = len(self._clients) + 1
        actor = f"client-{number}"
        sock = self._socket(actor, step)
        server = (_reachable(self.scenario.host), self.scenario.port)
        began = self.stack.now()
        if step.deaf:
            self._connect_deaf(_End(actor, number, sock, server, server, False, step.at_eof), began)
            return
        try:
            try:
                sock.connect(server)
            except BlockingIOError:
                await anyio.wait_writable(sock)
                code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code)) from None
            local = sock.getsockname()[:2]
        except OSError as wrong:
            sock.close()
            self._called(actor, "connect", began, wrong, remote=server)
            why = _errno_name(wrong)
            if wrong.errno == errno.ENETUNREACH and ip_address(server[0]).is_loopback:
                why += " (loopback is down: ip link set lo up, or --isolated)"
            raise ScenarioError(f"{actor} cannot connect: {why}") from None
        except BaseException:
            sock.close()
            raise
        end = _End(actor, number, sock, local, server, step.reads, step.at_eof)
        self._clients.append(end)
        self._former -= {(local, server), (server, local)}
        self._start(end)
        self._ended(end, "connect", began)

    def _connect_deaf(self, end: _End, began: float) -> None:
        network = self.stack.network
        assert network is not None
        unanswered = network.drop("SYN,ACK", source=end.remote, times=None)
        try:
            end.sock.connect(end.remote)
        except BlockingIOError as wrong:
            end.local = end.sock.getsockname()[:2]
            network.cut(end.local, end.remote, one_way=True)
            self._clients.append(end)
            end.gone = end.deaf = True
            self._ended(end, "connect", began, wrong)
        network.faults.remove(unanswered)

    async def _send(self, end: _End, size: int) -> None:
        block = memoryview(bytes(min(size, _BLOCK)))
        while size:
            try:
                sent = self._call(end, "send", partial(end.sock.send, block[:size]))
            except BlockingIOError:
                await anyio.wait_writable(end.sock)
                continue
            if sent is None:
                return
            end.sent += sent
            size -= sent

    def _close_all(self, who: str, reset: bool = False) -> None:
        if who == "both":
            for client in self._clients:
                if server := self._peers.get((client.remote, client.local)):
                    self._close(server)
                self._close(client)
        elif who != "listener":
            for end in self._ends(who):
                self._close(end, reset)
        if who in ("server", "listener", "both"):
            self._close_listener()

    def _close(self, end: _End, reset: bool = False) -> None:
        if end.open:
            end.open, end.over = False, True
            anyio.notify_closing(end.sock)
            if reset:
                linger = partial(end.sock.setsockopt, socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                self._call(end, "setsockopt", linger, result={"SO_LINGER": [1, 0]})
            self._call(end, "close", end.sock.close)

    def _vanish(self, step: Vanish) -> None:
        network = self.stack.network
        assert network is not None
        for end in self._ends(step.who, closed=True):
            mend = network.cut(end.local, end.remote, one_way=step.deaf)
            end.gone, end.back = True, step.back
            if step.deaf:
                continue
            self._close(end, reset=True)  # of which nobody hears
            if step.back:
                mend()

    def _inject(self, step: Inject) -> None:
        network = self.stack.network
        assert network is not None
        for end in self._ends(step.who, closed=True):
            self._record(Note(self.stack.now(), f"{step}: {end.name}"))
            network.forge((*end.local, *end.remote), step.bits, step.offset)

    def _close_listener(self) -> None:
        if self._listener:
            anyio.notify_closing(self._listener)
            began = self.stack.now()
            self._listener.close()
            self._called("server", "close", began, socket="listener", local=self._address)
            self._listener = None

    def _restart(self, step: Restart) -> None:
        self._close_listener()
        was = self._options
        self._options = evolve(
            was,
            reuse_address=was.reuse_address if step.reuse_address is None else step.reuse_address,
            reuse_port=was.reuse_port if step.reuse_port is None else step.reuse_port,
        )
        began = self.stack.now()
        failed = self._try_to_listen()
        looked, left, _ = self._in_a_moment(self._free_after if failed else lambda: 0.0)
        self._record(
            events.Restart(
                began,
                failed is None,
                _errno_name(failed) if failed else None,
                str(failed.filename) if failed else None,
                left and left + looked - began,
            )
        )

    def _try_to_listen(self) -> OSError | None:
        try:
            self._listen()
        except OSError as wrong:
            return wrong
        return None

    def _free_after(self) -> float | None:
        """Seconds until nothing has the port, 0.0 where nothing does, None where none can tell."""
        longest = 0.0
        for row in self._holders():
            left = ends_in(row)
            if left is None:
                return None
            longest = max(longest, left)
        return longest

    def _holders(self) -> list[Row]:
        """The sockets on the port whose address overlaps the server's (a wildcard overlaps all)."""
        host, port = self._address
        return [
            row
            for row in self.stack.rows(port)
            if row.local[1] == port and (row.local[0] == host or {row.local[0], host} & _WILDCARDS)
        ]

    async def _wait_until_free(self, wait: Waiting) -> None:
        """Wait until nothing has the port and then really bind it.

        Gives up at once where nothing says that the port will ever be free.
        """
        began = held = self.stack.now()
        while self._holders() or self._try_to_listen():
            left = self._free_after()
            if left is None:
                self._record(Note(self.stack.now(), "no timer will free the port: not waited for"))
                return
            held = self.stack.now()
            wait(held - began, left)
            await anyio.sleep(min(0.25, max(left / 2, 0.005)))
        now = self.stack.now()
        wait(now - began, 0.0)
        self._record(events.Restart(now, ok=True, free_after=0.0, held_until=held))
        self._snapshot("the port is free again")

    # The applications at the two ends

    def _start(self, end: _End) -> None:
        self._peers[end.local, end.remote] = end
        if end.reads:
            self._tasks.start_soon(self._read, end)

    async def _read(self, end: _End) -> None:
        """Read until the end of the stream, then do what this end does there."""
        while end.open and not end.eof:
            try:
                await anyio.wait_readable(end.sock)
                size = self._call(end, "recv", lambda: len(end.sock.recv(65536)))
            except BlockingIOError:
                continue
            except anyio.ClosedResourceError:
                return  # its own side closed it
            end.received += size or 0
            end.eof = not size  # a FIN, or a reset
        if end.at_eof == "close":
            self._close(end)

    # What is recorded

    def _record(self, event: Event) -> None:
        """Record it, after everything that the stack's observers have seen before it."""
        for seen in self.stack.seen():
            self.record(seen)
        self.record(event)

    def _call(
        self, end: _End, call: str, function: Callable[[], T], result: object = None
    ) -> T | None:
        """Make a call and record it; None where it failed. Only BlockingIOError passes."""
        began = self.stack.now()
        value, failed = None, None
        try:
            value = function()
        except BlockingIOError:
            raise
        except OSError as wrong:
            failed = wrong
        self._ended(end, call, began, failed, value if result is None else result)
        return value

    def _ended(
        self,
        end: _End,
        call: str,
        began: float,
        failed: OSError | None = None,
        result: object = None,
    ) -> None:
        self._called(
            end.actor,
            call,
            began,
            failed,
            result=result,
            socket=end.name,
            local=end.local,
            remote=end.remote,
        )

    def _called(
        self, actor: str, call: str, began: float, failed: OSError | None = None, **what: Any
    ) -> None:
        name = _errno_name(failed) if failed else None
        self._record(Called(self.stack.now(), actor, call, errno=name, began=began, **what))

    def _snapshot(self, label: str) -> None:
        _, rows, t = self._in_a_moment(self._rows)
        self._record(Snapshot(t, label, tuple(rows), self.stack.observer))

    def _in_a_moment(self, look: Callable[[], T]) -> tuple[float, T, float]:
        """What a look finds, between which two times: a look that took long is made again.

        On a busy machine a second may pass between a table's being read and the clock's.
        """
        quickest: tuple[float, T, float] | None = None
        for _ in range(5):
            began = self.stack.now()
            found = look()
            took = (began, found, self.stack.now())
            if quickest is None or took[2] - began < quickest[2] - quickest[0]:
                quickest = took
            if quickest[2] - quickest[0] < _A_MOMENT:
                break
        assert quickest is not None
        return quickest

    def _rows(self) -> list[Row]:
        """The scenario's sockets as netstat would list them: listener, server's side, clients'.

        What was there before the run began is not the scenario's.
        """
        port = self.scenario.port
        rows = [row for row in self.stack.rows(port) if (row.local, row.remote) not in self._former]

        def place(row: Row) -> tuple[bool, bool, int]:
            end = self._peers.get((row.local, row.remote))
            return row.state != State.LISTEN, row.local[1] != port, end.number if end else 0

        return sorted(rows, key=place)

    # When a step has settled

    def _ends(self, who: str, closed: bool = False) -> list[_End]:
        side, _, number = who.partition("-")
        ends = self._servers if side == "server" else self._clients
        return [end for end in ends if (closed or end.open) and number in ("", str(end.number))]

    async def _settle(self, step: Step) -> None:
        look = _LOOK_FIRST
        while self._unsettled(step, self._rows()):
            await anyio.sleep(look)
            look = min(look * 2, _LOOK_AT_MOST)

    def _unsettled(self, step: Step, rows: list[Row]) -> list[str]:
        """What is still to come before the step is done, in words."""
        table = {(row.local, row.remote): row for row in rows}
        waits = []
        awaited = set(self._ends(step.who)) if isinstance(step, Eof) else set()
        if self._listener and len(self._servers) < sum(not end.deaf for end in self._clients):
            waits.append(f"the server has not accepted client-{len(self._servers) + 1}")
        for end in (*self._servers, *self._clients):
            row = table.get((end.local, end.remote))
            peer = self._peers.get((end.remote, end.local))
            over = peer is not None and peer.over
            if end.gone or (peer is not None and peer.gone):
                if peer is not None and peer.back and end.open and end.sent > peer.received:
                    waits.append(f"{end.name} has not been reset by what came back")
                continue
            if row and (row.state in _PASSING or (row.state is State.FIN_WAIT_2 and over)):
                waits.append(f"{end.name} is still in {row.state}")
            elif end.open and not end.eof:
                if end in awaited:
                    waits.append(f"nothing ended the stream that {end.name} reads")
                elif over and (end.reads or (row and row.state is State.ESTABLISHED)):
                    waits.append(f"{end.name} has not noticed that the other end closed")
                came = end.received if end.reads else row.recv_q if row else None
                if peer and came is not None and came < peer.sent:
                    waits.append(f"{end.name} has got {came} of {peer.sent} bytes")
        return waits

    def _leave_nothing(self) -> None:
        """Close what is still open; with a reset, so that nothing lingers in the kernel."""
        if self._listener:
            self._listener.close()
        for end in (*self._servers, *self._clients):
            if end.open:
                try:
                    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                finally:
                    end.sock.close()


def _errno_name(wrong: OSError) -> str:
    return errno.errorcode.get(wrong.errno or 0, str(wrong))


def _reachable(host: str) -> str:
    """Where a client finds a server bound to `host`: loopback for a wildcard."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _alone(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one exception in a group of one, as it was before a task group wrapped it."""
    wrong: BaseException = group
    while isinstance(wrong, BaseExceptionGroup) and len(wrong.exceptions) == 1:
        wrong = wrong.exceptions[0]
    return wrong


def _cannot(wrong: OSError, scenario: Scenario, stack: Stack) -> str:
    """Why the server cannot listen at all, in one line."""
    port = scenario.port
    match wrong.errno:
        case errno.EADDRINUSE:
            why = stack.why_taken(scenario)
            return f"port {port} is taken" + (f": {why}" if why else "")
        case errno.EACCES:
            return f"port {port} is privileged: to bind it takes root or CAP_NET_BIND_SERVICE"
        case errno.EADDRNOTAVAIL:
            return f"{scenario.host} is not an address of this machine"
        case _:
            return f"cannot listen on {scenario.host} port {port}: {wrong.strerror}"

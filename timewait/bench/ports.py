"""How long a close keeps its port from being bound, and how many connections ports bear."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from collections.abc import Callable, Iterable

import anyio
from attrs import define, evolve, frozen

from timewait.kernel.namespace import Namespace, sysctl
from timewait.run import Run, Side
from timewait.scenario import Listen, Scenario
from timewait.sim import Network
from timewait.sim import run as simulate

__all__ = ["Bind", "Churn", "Outcome", "binds", "churn", "dealt_out"]

_FIRST: int = 20_000  # the lowest of the ephemeral ports in a churn's own namespace
_PATIENCE: float = 30.0  # seconds for the ports to run out, well below TIME_WAIT's
_TIME_WAIT: float = 60.0  # TCP_TIMEWAIT_LEN, include/net/tcp.h


@frozen
class Outcome:
    """What starting the server again did on one stack; see `timewait.run.RestartOutcome`."""

    ok: bool | None
    errno: str | None
    free_after: float | None
    waited: float | None
    holder: Side | None
    sockets: int

    @classmethod
    def of(cls, run: Run) -> Outcome:
        """What the run's restart did."""
        again, held = run.restart, run.time_wait
        return cls(again.ok, again.name, again.free_after, again.waited, held.holder, held.sockets)

    @property
    def blocked(self) -> float | None:
        """For how many seconds the port was or will be refused."""
        return self.free_after if self.waited is None else self.waited


@frozen
class Bind:
    """When a course of closing lets the server's port be bound again.

    `reuse_address` is whether both the former and the new server set
    SO_REUSEADDR. `ratio` is kernel to model, None where either is no time;
    `fault` says why what the kernel did is not what the model allows.
    """

    course: str
    reuse_address: bool
    kernel: Outcome
    model: Outcome
    ratio: float | None
    fault: str | None

    @property
    def inside(self) -> bool:
        """Whether the model allows it."""
        return self.fault is None


def binds(
    courses: Iterable[str],
    *,
    wait: bool = False,
    tick: Callable[[], object] = lambda: None,
    record: Callable[[Bind], object],
) -> None:
    """Start the server again after each course, without and with SO_REUSEADDR.

    With `wait` each is really waited for, all side by side. `record` gets each
    as it is known, `tick` is called now and then. Raises `ScenarioError` where
    one cannot be done here.
    """

    async def one(course: str, reuse: bool) -> None:
        scenario = _restarting(course, reuse)
        kernel = await scenario.run(on="kernel", wait=wait)
        model = await scenario.run(on="model", wait=wait)
        verdict = kernel.check()
        fault = kernel.wait_fault
        if not verdict:
            fault = str(verdict.explain().splitlines()[0])
        elif kernel.restart.name != model.restart.name:
            fault = f"{kernel.restart.name or 'success'}, the model {model.restart.name}"
        ours, theirs = Outcome.of(kernel), Outcome.of(model)
        ratio = ours.blocked / theirs.blocked if ours.blocked and theirs.blocked else None
        record(Bind(course, reuse, ours, theirs, ratio, fault))

    async def side_by_side() -> None:
        async with anyio.create_task_group() as clock:
            clock.start_soon(_ticking, tick)
            async with anyio.create_task_group() as tasks:
                for course in courses:
                    for reuse in (False, True):
                        tasks.start_soon(one, course, reuse)
            clock.cancel_scope.cancel()

    try:
        anyio.run(side_by_side)
    except BaseExceptionGroup as group:
        wrong: BaseException = group
        while isinstance(wrong, BaseExceptionGroup):  # the first of them says it for all
            wrong = wrong.exceptions[0]
        raise wrong from None


async def _ticking(tick: Callable[[], object]) -> None:
    while True:
        tick()
        await anyio.sleep(0.2)


def _restarting(course: str, reuse: bool) -> Scenario:
    story = Scenario.built_in(course, clients=1)
    first = story.steps[0]
    assert isinstance(first, Listen)
    return evolve(story, steps=(evolve(first, reuse_address=reuse), *story.steps[1:]))


@frozen
class Churn:
    """Connections to one destination as fast as they go, each closed by its client first.

    `ports` are the ephemeral ports there are, `connections` how many were made
    before they ran out (None: they never did) at `rate` a second,
    `sustained` how many a second went on afterwards. `for_ever` is the rate that the
    ports of this machine (`machine_ports`) bear without end. The model's
    figures are for the same ports.
    """

    tw_reuse: int
    ports: int
    connections: int | None
    rate: float
    sustained: float
    model_connections: int | None
    model_sustained: float
    machine_ports: int
    for_ever: float

    @property
    def inside(self) -> bool:
        """Whether the ports, if they ran out, did so when the model allows it.

        That is at the very connection of the model's; but no sooner, where
        ports are used again while the rest is being used up.
        """
        if self.connections is None or self.model_connections is None:
            return True
        if self.tw_reuse:
            return self.connections >= self.model_connections
        return self.connections == self.model_connections


@define
class _Tally:
    """Counts a churn: made so far, when the ports ran out, and made since."""

    began: float
    ends: float
    made: int = 0
    ran_out: int | None = None
    since: float | None = None
    busy: float = 0.0

    def goes_on(self, now: float) -> bool:
        """Whether there is time left, or the ports have not run out as they soon must."""
        return now < self.ends or (self.ran_out is None and now < self.began + _PATIENCE)

    def refused(self, now: float) -> None:
        """No port is left."""
        if self.ran_out is None:
            self.ran_out, self.since, self.busy = self.made, now, now - self.began

    def outcome(self, now: float) -> tuple[int | None, float, float]:
        """Made before they ran out, their rate, the rate since."""
        if self.ran_out is None or self.since is None:
            rate = self.made / (now - self.began)
            return None, rate, rate
        after = (self.made - self.ran_out) / (now - self.since) if now > self.since else 0.0
        return self.ran_out, self.ran_out / self.busy if self.busy else 0.0, after


def churn(ports: int, seconds: float, tick: Callable[[], object] = lambda: None) -> list[Churn]:
    """Churn with `net.ipv4.tcp_tw_reuse` off and on, each in a namespace of its own.

    Raises `PermissionError` where no namespace is allowed.
    """
    machine = dealt_out()
    found = []
    for reuse in (0, 1):
        settings = {
            "net.ipv4.ip_local_port_range": f"{_FIRST} {_FIRST + ports - 1}",
            "net.ipv4.tcp_tw_reuse": reuse,
        }
        with Namespace(sysctls=settings) as place:
            made, rate, after = place.call(_churn, seconds if reuse else seconds / 4)
        tick()
        model_made, _, model_after = _churn_on_the_model(ports, reuse, seconds)
        tick()
        for_ever = machine / _TIME_WAIT if not reuse else min(rate, machine / 1.0)
        found.append(
            Churn(reuse, ports, made, rate, after, model_made, model_after, machine, for_ever)
        )
    return found


def dealt_out() -> int:
    """How many ephemeral ports this network namespace has."""
    low, high = map(int, sysctl("net.ipv4.ip_local_port_range").split())
    return high - low + 1


def _churn(seconds: float) -> tuple[int | None, float, float]:
    with socket.create_server(("127.0.0.1", 9090), backlog=1024) as listener:
        address = listener.getsockname()
        now = time.monotonic()
        tally = _Tally(now, now + seconds)
        while tally.goes_on(now := time.monotonic()):
            with socket.socket() as client:
                try:
                    client.connect(address)
                except OSError as error:
                    if error.errno != errno.EADDRNOTAVAIL:
                        raise
                    tally.refused(now)
                    time.sleep(0.001)
                    continue
                server, _ = listener.accept()
                client.close()
                server.close()
                tally.made += 1
        return tally.outcome(time.monotonic())


def _churn_on_the_model(ports: int, reuse: int, seconds: float) -> tuple[int | None, float, float]:
    network = Network()
    network.host("machine", ephemeral=(_FIRST, _FIRST + ports - 1), tw_reuse=reuse)

    async def main() -> tuple[int | None, float, float]:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 9090), backlog=1024) as listener:
            listener.setblocking(False)
            tally = _Tally(loop.time(), loop.time() + seconds)
            while tally.goes_on(loop.time()):
                with socket.socket() as client:
                    client.setblocking(False)
                    try:
                        await loop.sock_connect(client, ("127.0.0.1", 9090))
                    except OSError as error:
                        if error.errno != errno.EADDRNOTAVAIL:
                            raise
                        tally.refused(loop.time())
                        await asyncio.sleep(0.01)
                        continue
                    server, _ = await loop.sock_accept(listener)
                    client.close()
                    server.close()
                    tally.made += 1
                    if not tally.made % 64:
                        await asyncio.sleep(0.001)  # 64,000 a second
            return tally.outcome(loop.time())

    return simulate(main, hosts=network)

"""The wire lab: a real kernel at one end, a modelled host or a script at the other.

`wire()` gives it to async code: the kernel's real sockets, segments composed,
sent and awaited by hand, and beside them, if wanted, a modelled host that is
the kernel's live peer. Whatever the model's network can do to a segment it
does here to real ones: lose the first FIN, hold up the last ACK, deliver a SYN
again a minute later. `WireStack` is the same as a stack for scenarios, so that
a scenario runs with the kernel as client and the model as server, or the other
way round.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from ipaddress import ip_address
from socket import AF_INET, SOCK_STREAM
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import anyio
from attrs import evolve

from timewait.events import Event, Row
from timewait.kernel.sock_diag import sockets
from timewait.kernel.wire import Wire
from timewait.scenario import Scenario, ScenarioError
from timewait.sim.host import HERE, Host
from timewait.sim.loop import SimSelector
from timewait.sim.network import Key, Link, Network
from timewait.sim.socket import SimSocket
from timewait.stacks import aim
from timewait.tcp.packet import NotTCP, Packet, decode, encode
from timewait.tcp.segment import Segment

if TYPE_CHECKING:
    from timewait.kernel.tracepoint import Tracepoint

__all__ = ["WireLab", "WireStack", "wire"]

KERNEL: Final = ("192.168.0.1", "fd3d:fa7b:d17d::1")
FAR: Final = ("192.0.2.1", "2001:db8::1")


class WireLab:
    """A kernel in a namespace of its own, and what is at the other end of its wire.

    `peer` is a modelled host with the far addresses, or None where the test
    itself is the peer. `network` carries segments between the two: its faults
    (`drop`, `delay`, `duplicate`, `reorder`, `corrupt`, `truncate`) apply to
    real segments, `source="kernel"` or `source="peer"`, and `forge` and `cut`
    do what nobody sent. `packets` holds every packet the kernel has sent so far.
    """

    def __init__(self, profile: str | None = "linux", *, device: str | None = None) -> None:
        self.wire = Wire(((KERNEL[0], 16), (KERNEL[1], 48)), FAR, device=device, offload=False)
        self.network = Network(0, link=Link(delay=0.0))
        self._kernel = self.network.host("kernel", *KERNEL)
        self._kernel.arrive = self._to_kernel  # type: ignore[method-assign]
        self._kernel.damaged = self._damaged  # type: ignore[method-assign]
        self.peer: Host | None = None
        if profile is not None:
            self.peer = self.network.host("peer", *FAR, profile=profile)
        self.packets: list[Packet] = []
        self._taken = 0
        self.origin = time.monotonic()

    def now(self) -> float:
        """Seconds since the lab was made."""
        return time.monotonic() - self.origin

    def socket(
        self, family: int = AF_INET, kind: int = SOCK_STREAM, *, blocking: bool = False
    ) -> socket.socket:
        """A real socket of the kernel's in the namespace."""
        made = self.wire.socket(family, kind)
        made.setblocking(blocking)
        return made

    def peer_socket(self, family: int = AF_INET) -> SimSocket:
        """A non-blocking socket of the modelled peer's.

        Raises `RuntimeError` where there is no modelled peer.
        """
        if self.peer is None:
            raise RuntimeError("this lab has no modelled peer: wire(profile=...) makes one")
        token = HERE.set(self.peer)
        try:
            made = SimSocket(family)
        finally:
            HERE.reset(token)
        made.setblocking(False)
        return made

    def rows(self, port: int | None = None) -> list[Row]:
        """The tables of the kernel and of the modelled peer."""
        rows = self.wire.namespace.call(sockets, port)
        return rows + (self.peer.rows(port) if self.peer is not None else [])

    # -- segments

    def send(self, packet: Packet | bytes, *, tcp_checksum: int | None = None) -> None:
        """Put a packet on the wire: one composed, or octets as they are."""
        if isinstance(packet, Packet):
            packet = encode(packet, tcp_checksum=tcp_checksum)
        self.wire.send(packet)

    async def receive(
        self, matches: Callable[[Packet], bool] = lambda packet: True, *, timeout: float = 2.0
    ) -> Packet:
        """The next packet of the kernel's, from where the last call left off, that matches.

        Raises `TimeoutError` where none came in time, which says what came instead.
        """
        begun = self._taken
        with anyio.move_on_after(timeout):
            while True:
                while self._taken < len(self.packets):
                    packet = self.packets[self._taken]
                    self._taken += 1
                    if matches(packet):
                        return packet
                await anyio.sleep(0.0005)
        others = self.packets[begun : self._taken]
        instead = f"{len(others)} others, the last {others[-1]}" if others else "nothing"
        raise TimeoutError(f"no such packet of the kernel's in {timeout} s, but {instead}")

    async def until(self, condition: Callable[[], bool], *, timeout: float = 2.0) -> None:
        """Wait until something holds. Raises `TimeoutError`."""
        with anyio.move_on_after(timeout):
            while not condition():
                await anyio.sleep(0.0005)
            return
        raise TimeoutError(f"it does not hold after {timeout} s")

    def _to_kernel(self, key: Key, segment: Segment) -> None:
        self.wire.send(encode(Packet((key[2], key[3]), (key[0], key[1]), segment)))

    def _damaged(self, key: Key, segment: Segment, how: str) -> None:
        octets = encode(Packet((key[2], key[3]), (key[0], key[1]), segment))
        if how == "truncate":
            octets = octets[: len(octets) // 2]
        else:
            octets = octets[:-1] + bytes([octets[-1] ^ 0xFF])
        with suppress(OSError):  # too short to be a packet at all
            self.wire.send(octets)

    def pump(self) -> None:
        """Bring the modelled side up to now, and hand it what the kernel has sent."""
        self._advance()
        while (octets := self.wire.read()) is not None:
            self._advance()  # what answers it comes after it
            with suppress(NotTCP, ValueError):
                packet = decode(octets)
                self.packets.append(packet)
                if self.peer is not None:
                    key = (*packet.dst, *packet.src)
                    self.network.sent_at = self.wire.sent_at - self.origin
                    self.network.send(self._kernel, key, packet.segment)
                    self.network.sent_at = None
            self.network.drain()

    def _advance(self) -> None:
        clock, now = self.network.clock, self.now()
        while clock.next <= now:
            clock.run_until(now)
        clock.now = max(clock.now, now)

    @property
    def due(self) -> float:
        """When the modelled side has something to do next; infinity for never."""
        return self.network.clock.next

    def close(self) -> None:
        """End the namespace."""
        self.wire.close()


@asynccontextmanager
async def wire(
    profile: str | None = "linux", *, device: str | None = None
) -> AsyncIterator[WireLab]:
    """A wire lab for async code, under asyncio or trio.

    `profile` is the modelled peer's TCP ("linux", "freebsd", ...); None for no
    peer: then every segment is the test's own. `device` is "tun", "veth" or
    None for what is permitted. Raises `WireError` where neither is.
    """
    lab = WireLab(profile, device=device)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_pump, lab)
            try:
                yield lab
            finally:
                tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        # The caller's own exception, as it was before the task group wrapped it.
        if len(group.exceptions) > 1:
            raise
        raise group.exceptions[0] from None
    finally:
        lab.close()


async def _pump(lab: WireLab) -> None:
    while True:
        lab.pump()
        wait = lab.due - lab.now()
        with anyio.move_on_after(None if wait == math.inf else max(wait, 0.0)):
            await anyio.wait_readable(lab.wire.fileno())


class _WireSelector(selectors.BaseSelector):
    """Readiness of real files and of modelled sockets, in real time."""

    def __init__(self, lab: WireLab) -> None:
        self._lab = lab
        self._real = selectors.DefaultSelector()
        self._sim = SimSelector(lab.network)
        self._real.register(lab.wire.fileno(), selectors.EVENT_READ)

    def _of(self, fileobj: Any) -> selectors.BaseSelector:
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        return (
            self._sim if fd in self._lab.network.files or fd in self._sim.get_map() else self._real
        )

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._of(fileobj).register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._of(fileobj).unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._of(fileobj).modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._of(fileobj).get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return {**self._real.get_map(), **self._sim.get_map()}

    def close(self) -> None:
        self._real.close()
        self._sim.close()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        until = math.inf if timeout is None else self._lab.now() + max(timeout, 0.0)
        while True:
            self._lab.pump()
            ready = self._sim._ready() if self._sim.touched else []
            wait = 0.0 if ready else min(until, self._lab.due) - self._lab.now()
            wire_fd = self._lab.wire.fileno()
            real = self._real.select(None if wait == math.inf else max(wait, 0.0))
            ready += [found for found in real if found[0].fd != wire_fd]
            if ready or self._lab.now() >= until:
                return ready


class WireStack:
    """A stack for scenarios with the kernel at one end and the model at the other.

    `kernel` says which side is the kernel's; `profiles` names the other's TCP.
    With `tracepoint`, which takes root, the kernel's transitions are seen as
    they happen; None is where it is permitted.
    Raises `ScenarioError` where there can be no wire.
    """

    name = "wire"
    observer = "model+sock_diag"
    virtual = False
    blind: tuple[str, ...] = ("the kernel's states between two looks at the table",)

    def __init__(
        self,
        scenario: Scenario,
        profiles: dict[str, str] | None = None,
        *,
        kernel: Literal["client", "server"] = "client",
        tracepoint: bool | None = None,
    ) -> None:
        self.kernel = kernel
        self._tracepoint = tracepoint
        other = "server" if kernel == "client" else "client"
        self.profiles = {kernel: "linux", other: (profiles or {}).get(other, "linux")}
        try:
            self._lab = WireLab(self.profiles[other])
        except OSError as trouble:
            raise ScenarioError(str(trouble.strerror or trouble)) from None
        self.network: Network | None = self._lab.network
        self._seen = self._lab.network.observe()
        self._transitions: Tracepoint | None = None

    def close(self) -> None:
        """End the namespace, and stop looking."""
        if self._transitions is not None:
            self._transitions.close()
        self._lab.close()

    def now(self) -> float:
        """Seconds since this stack was made; whatever passed the wire before has been seen."""
        self._lab.pump()
        return self._lab.network.clock.now

    def socket(self, actor: str, family: int) -> socket.socket:
        """A non-blocking socket, real or modelled as the actor's side is."""
        side = "server" if actor == "server" else "client"
        if side == self.kernel:
            return self._lab.socket(family)
        return cast(socket.socket, self._lab.peer_socket(family))

    def rows(self, port: int) -> list[Row]:
        """The kernel's table and the modelled host's."""
        return self._lab.rows(port)

    def seen(self) -> list[Event]:
        """The model's transitions, every segment that passed, the kernel's own transitions."""
        seen = self._seen.read()
        if self._transitions is not None:
            seen += self._lab.wire.namespace.call(self._transitions.read)
        return sorted(seen, key=lambda event: event.t)

    def _watch(self, port: int) -> None:
        """See the kernel's transitions as they happen."""
        from timewait.kernel.tracepoint import Tracepoint

        try:
            self._transitions = self._lab.wire.namespace.call(
                partial(Tracepoint, [port], start=self._lab.origin, resets=False, guarded=True)
            )
        except OSError as refused:
            if self._tracepoint is None:
                return
            raise ScenarioError(f"no tracepoint here: {refused.strerror or refused}") from None
        self.observer += "+tracepoint"
        self.blind = self._transitions.blind

    def prepare(self, scenario: Scenario) -> Scenario:
        """Put the server where it is: every port is free there."""
        addresses = KERNEL if self.kernel == "server" else FAR
        host = addresses[ip_address(scenario.host).version == 6]
        chosen = evolve(scenario, host=host, port=scenario.port or 9090)
        aim(self._lab.network, chosen)
        if self._tracepoint is not False:
            self._watch(chosen.port)
        return chosen

    def why_taken(self, scenario: Scenario) -> str:
        """Nobody else has a port in a namespace of its own."""
        return ""

    def run(self, main: Callable[[], Coroutine[Any, Any, None]], backend: str = "asyncio") -> None:
        """Run it on an asyncio loop that waits for both ends."""
        loop = asyncio.SelectorEventLoop(_WireSelector(self._lab))
        with self._seen, asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(main())

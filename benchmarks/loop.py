"""The simulated loop: asyncio streams against the kernel's loopback and other simulated loops.

The same program everywhere: a server that echoes lines, a client that asks
and waits. Then sizes: many hosts, many idle connections, many hours.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import suppress
from importlib import import_module
from typing import Any

from benchmarks import Figure, side_by_side
from timewait import sim

LINE = b"hello, world\n"


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int) -> None:
    for _ in range(n):
        writer.write(LINE)
        await reader.readline()
    writer.close()
    await writer.wait_closed()


async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(asyncio.CancelledError):  # which the streams of Python 3.12.1 stumble over
        await reader.read()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


# Where the same program runs: each world listens in its own way, and tells where it does.

Address = tuple[str, int]
Listen = Callable[[Any], Awaitable[tuple[asyncio.Server, Address]]]


async def round_trips(n: int, listen: Listen) -> None:
    server, address = await listen(echo)
    await ask(*await asyncio.open_connection(*address), n)
    server.close()
    await asyncio.sleep(0.001)  # the echoing task ends by itself


async def lifecycles(n: int, listen: Listen) -> None:
    server, address = await listen(hang_up)
    for _ in range(n):
        reader, writer = await asyncio.open_connection(*address)
        assert not await reader.read()
        writer.close()
    server.close()
    await asyncio.sleep(0.001)


async def on_loopback(handle: Any) -> tuple[asyncio.Server, Address]:
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, server.sockets[0].getsockname()


async def on_solipsism(handle: Any) -> tuple[asyncio.Server, Address]:
    address = ("::1", 1234)
    listener = import_module("async_solipsism").ListenSocket(address)
    return await asyncio.start_server(handle, sock=listener), address


async def on_simloop(handle: Any) -> tuple[asyncio.Server, Address]:
    loop: Any = asyncio.get_running_loop()
    server = loop.net.host("server").create_task(asyncio.start_server(handle, port=1234))
    return await server, ("server", 1234)


Factory = Callable[[], asyncio.AbstractEventLoop]


def _solipsism() -> Factory:
    factory: Factory = import_module("async_solipsism").EventLoop
    return factory


def _simloop() -> Factory:
    loop_class: Any = import_module("simloop").SimLoop

    async def nothing(timeout: float | None = None) -> None:
        pass

    def factory() -> asyncio.AbstractEventLoop:
        made: Any = loop_class()
        # What asyncio.Runner asks for at its end and simloop refuses.
        made.shutdown_asyncgens = made.shutdown_default_executor = nothing
        loop: asyncio.AbstractEventLoop = made
        return loop

    return factory


def _looptime() -> Factory:
    kind: Any = import_module("looptime").make_event_loop_class(asyncio.SelectorEventLoop)
    return lambda: kind(start=0)  # type: ignore[no-any-return]


def _uvloop() -> Factory:
    factory: Factory = import_module("uvloop").new_event_loop
    return factory


# Each with what it is to be known by in a row, and how it listens.
KERNEL = ("asyncio, on the kernel's loopback", lambda: asyncio.new_event_loop, on_loopback)
UVLOOP = ("uvloop, on the kernel's loopback", _uvloop, on_loopback)
SOLIPSISM = ("async-solipsism", _solipsism, on_solipsism)
SIMLOOP = ("simloop", _simloop, on_simloop)
LOOPTIME = ("looptime, on the kernel's loopback", _looptime, on_loopback)

World = tuple[str, Callable[[], Factory], Listen]


def beside(
    what: str,
    program: Callable[[int, Listen], Coroutine[Any, Any, None]],
    world: World,
    target: float | None,
    n: int,
    rounds: int,
) -> Figure:
    """The program on the simulated loop, and on the loop of a peer."""
    name, made, listen = world
    try:
        factory = made()
    except ImportError:
        ours = side_by_side((lambda n: sim.run(program(n, on_loopback)), n), rounds=rounds)[0]
        older = name == "simloop" and sys.version_info < (3, 12)
        return Figure(what, ours, "/s", name, None, target,
                      note="simloop needs Python 3.12" if older else "")  # fmt: skip

    def theirs(n: int) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(program(n, listen))

    def ours_on(n: int) -> None:
        sim.run(program(n, on_loopback))

    few = n // 20
    started = time.perf_counter()
    theirs(few)
    in_time = int(few * 0.2 / (time.perf_counter() - started))  # some take very long
    ours, rate = side_by_side((ours_on, n), (theirs, min(n, max(few, in_time))), rounds=rounds)
    return Figure(what, ours, "/s", name, rate, target)


async def sleeps(n: int, listen: Listen) -> None:
    for _ in range(n):
        await asyncio.sleep(1)


async def timers(n: int, listen: Listen) -> None:
    loop = asyncio.get_running_loop()
    unit = 1e-6  # seconds: some of these loops really wait
    over = loop.create_future()
    for number in range(n):
        loop.call_later(number * 7919 % n * unit, int)
    loop.call_later(n * unit, over.set_result, None)
    await over


def measure(quick: bool) -> Iterator[Figure]:
    # Many short rounds: what else the machine does meets both alike.
    n, rounds = (1_000, 7) if quick else (3_000, 15)
    what = "asyncio streams echo, round trips"
    yield beside(what, round_trips, KERNEL, 2.0, n, rounds)
    yield beside(what, round_trips, UVLOOP, None, n, rounds)
    for world in (SOLIPSISM, SIMLOOP, LOOPTIME):
        yield beside(what, round_trips, world, 1.0, n, rounds)
    rounds = 5 if quick else 9
    what = "asyncio streams, connections opened and closed"
    for world, target in ((KERNEL, None), (UVLOOP, None), (SOLIPSISM, None), (SIMLOOP, None)):
        yield beside(what, lifecycles, world, target, n // 10, rounds)
    for world in (SOLIPSISM, SIMLOOP, LOOPTIME):
        yield beside("sleeps of a second", sleeps, world, 1.0, n, rounds)
    for world in (SOLIPSISM, SIMLOOP, LOOPTIME):
        yield beside("timers, all at once", timers, world, 1.0, n, rounds)
    for world in (KERNEL, UVLOOP):
        yield beside("timers, all at once", timers, world, None, n, rounds)

    hours = 1_000 if quick else 10_000
    yield Figure("hours of an idle-timeout server, one client an hour", hours / idle(hours), "h/s",
                 note=f"{hours:,} hours")  # fmt: skip

    hosts = 1_000 if quick else 10_000
    seconds, memory = many_hosts(hosts)
    yield Figure("hosts made, each calling the first", hosts / seconds, "1/s",
                 note=f"{hosts:,} hosts in one process")  # fmt: skip
    yield Figure("memory of a host with a connection", memory / hosts, "B",
                 lower_is_better=True)  # fmt: skip
    pairs = 500 if quick else 2_000
    yield Figure("memory of an idle pair of asyncio streams", idle_pairs(pairs, streams=True), "B",
                 lower_is_better=True, note=f"{pairs:,} pairs, both ends")  # fmt: skip
    yield Figure("memory of an idle pair of sockets", idle_pairs(pairs, streams=False), "B",
                 lower_is_better=True, note=f"{pairs:,} pairs, both ends")  # fmt: skip
    yield Figure("memory of a TIME_WAIT", time_waits(4 * pairs), "B",
                 lower_is_better=True, note="with its place in every table")  # fmt: skip


def idle(hours: int) -> float:
    """Wall seconds for a server that ends connections after 90 idle seconds, called hourly."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(90):
                await reader.readline()
                await reader.readline()
        except TimeoutError:
            pass
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 80)
        for _ in range(hours):
            reader, writer = await asyncio.open_connection("127.0.0.1", 80)
            writer.write(LINE)
            assert await reader.read() == b""
            writer.close()
            await asyncio.sleep(3510)
        server.close()
        assert asyncio.get_running_loop().time() >= 3599 * hours

    started = time.perf_counter()
    sim.run(main)
    return time.perf_counter() - started


def many_hosts(count: int) -> tuple[float, float]:
    """Seconds and bytes to make so many hosts, each with a connection to the first."""
    network = sim.Network()
    first = network.host("first")

    async def main() -> float:
        async def call() -> Any:
            return await asyncio.open_connection("first", 80)

        await first.run(_serve(take))
        before = _memory()
        kept = [await network.host(f"host-{number}").run(call()) for number in range(count)]
        assert len(kept) == count
        assert len(first.tcp) == count
        return _memory() - before

    started = time.perf_counter()
    sim.run(main, hosts=network)
    seconds = time.perf_counter() - started
    network = sim.Network()
    first = network.host("first")
    tracemalloc.start()
    try:
        return seconds, sim.run(main, hosts=network)
    finally:
        tracemalloc.stop()


async def _serve(handle: Any) -> asyncio.Server:
    return await asyncio.start_server(handle, None, 80, backlog=4096)


def idle_pairs(count: int, *, streams: bool) -> float:
    """Bytes for each established pair of ends."""
    import socket

    async def main() -> float:
        loop = asyncio.get_running_loop()
        kept: list[Any] = []
        if streams:
            await asyncio.start_server(take, "127.0.0.1", 80)
        else:
            listener = socket.create_server(("127.0.0.1", 80))
            listener.setblocking(False)
        before = _memory()
        for _ in range(count):
            if streams:
                kept.append(await asyncio.open_connection("127.0.0.1", 80))
            else:
                client = socket.create_connection(("127.0.0.1", 80))
                kept.append((client, await loop.sock_accept(listener)))
        await asyncio.sleep(1)
        return (_memory() - before) / count

    return _traced(main)


def time_waits(count: int) -> float:
    """Bytes for each TIME_WAIT."""
    import socket

    async def main() -> float:
        listener = socket.create_server(("127.0.0.1", 80))

        def close_one() -> None:
            client = socket.create_connection(("127.0.0.1", 80))
            server, _ = listener.accept()
            server.close()
            client.close()

        close_one()
        before = _memory()
        for _ in range(count):
            close_one()
        await asyncio.sleep(5)  # for timers that are not needed any more
        # Fewer than were made: a port that is chosen again ends the TIME_WAIT it had.
        return (_memory() - before) / (sim.current_host().time_waits - 1)

    return _traced(main)


def _traced(main: Callable[[], Any]) -> float:
    tracemalloc.start()
    try:
        return float(sim.run(main))
    finally:
        tracemalloc.stop()


def _memory() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0] if tracemalloc.is_tracing() else 0

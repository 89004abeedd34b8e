"""The simulated loop: asyncio streams against the kernel's loopback and other simulated loops.

The same program everywhere: a server that echoes lines, a client that asks
and waits. Then sizes: many hosts, many idle connections, many hours.
"""

from __future__ import annotations

import asyncio
import gc
import time
import tracemalloc
from collections.abc import Callable, Iterator
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


async def round_trips(n: int) -> None:
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    await ask(*await asyncio.open_connection("127.0.0.1", port), n)
    server.close()
    await asyncio.sleep(0.001)  # the echoing task ends by itself


def on_kernel(n: int) -> None:
    asyncio.run(round_trips(n))


def on_model(n: int) -> None:
    sim.run(round_trips(n))


def with_solipsism() -> Callable[[int], None] | None:
    try:
        solipsism: Any = import_module("async_solipsism")
    except ImportError:
        return None

    async def main(n: int) -> None:
        listener = solipsism.ListenSocket(("::1", 1234))
        server = await asyncio.start_server(echo, sock=listener)
        await ask(*await asyncio.open_connection("::1", 1234), n)
        server.close()
        await asyncio.sleep(0.001)

    def run(n: int) -> None:
        with asyncio.Runner(loop_factory=solipsism.EventLoop) as runner:
            runner.run(main(n))

    return run


def with_uvloop() -> Callable[[int], None] | None:
    factory = _factory("uvloop", "new_event_loop")
    return None if factory is None else _runner(factory, round_trips)


def _factory(package: str, name: str) -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = getattr(import_module(package), name)
    except ImportError:
        return None
    return factory


def _looptime() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        looptime: Any = import_module("looptime")
    except ImportError:
        return None
    kind = looptime.make_event_loop_class(asyncio.SelectorEventLoop)
    return lambda: kind(start=0)  # type: ignore[no-any-return]


def _runner(
    factory: Callable[[], asyncio.AbstractEventLoop], work: Callable[[int], Any]
) -> Callable[[int], None]:
    def run(n: int) -> None:
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(work(n))

    return run


async def sleeps(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(1)


async def timers(n: int, unit: float = 1.0) -> None:
    loop = asyncio.get_running_loop()
    over = loop.create_future()
    for number in range(n):
        loop.call_later(number * 7919 % n * unit, int)
    loop.call_later(n * unit, over.set_result, None)
    await over


def measure(quick: bool) -> Iterator[Figure]:
    # Many short rounds: what else the machine does meets both alike.
    n, rounds = (1_000, 7) if quick else (4_000, 25)
    ours, kernel = side_by_side((on_model, n), (on_kernel, n), rounds=rounds)
    yield Figure("asyncio streams echo, round trips", ours, "1/s",
                 "the same on the kernel's loopback", kernel, 2.0)  # fmt: skip

    solipsism = with_solipsism()
    if solipsism is None:
        yield Figure("asyncio streams echo, round trips", ours, "1/s", "async-solipsism",
                     None, 1.0, note="not installed")  # fmt: skip
    else:
        ours, theirs = side_by_side((on_model, n), (solipsism, n), rounds=rounds)
        yield Figure("asyncio streams echo, round trips", ours, "1/s", "async-solipsism",
                     theirs, 1.0, note="which has no TCP")  # fmt: skip

    for name, theirs_on in (("uvloop, on the kernel's loopback", with_uvloop()),):
        rate = None
        if theirs_on is not None:
            ours, rate = side_by_side((on_model, n), (theirs_on, n), rounds=rounds)
        yield Figure("asyncio streams echo, round trips", ours, "1/s", name, rate)
    yield Figure("asyncio streams echo, round trips", ours, "1/s", "simloop", None,
                 note="simloop needs Python 3.12: not measured")  # fmt: skip

    for what, work in (("sleeps of a second", sleeps), ("timers, all at once", timers)):
        for name, factory in (
            ("async-solipsism", _factory("async_solipsism", "EventLoop")),
            ("looptime", _looptime()),
        ):
            rate = None
            if factory is not None:
                ours, rate = side_by_side(
                    (lambda n, work=work: sim.run(work(n)), n),  # type: ignore[misc]
                    (_runner(factory, work), n),
                )
            yield Figure(what, ours, "1/s", name, rate, 1.0)
        if work is timers:
            ours, rate = side_by_side(
                (lambda n: sim.run(timers(n)), n), (lambda n: asyncio.run(timers(n, 1e-6)), n)
            )
            yield Figure(what, ours, "1/s", "asyncio, which really waits a moment", rate)

    hours = 1_000 if quick else 10_000
    yield Figure("hours of an idle-timeout server, one client an hour", hours / idle(hours), "h/s",
                 note=f"{hours:,} hours")  # fmt: skip

    hosts = 1_000 if quick else 10_000
    seconds, memory = many_hosts(hosts)
    yield Figure("hosts made, each calling the first", hosts / seconds, "1/s",
                 note=f"{hosts:,} hosts in one process")  # fmt: skip
    yield Figure("memory of a host with a connection", memory / hosts, "B",
                 lower_is_better=True)  # fmt: skip
    pairs = 500 if quick else 5_000
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
        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()

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

            async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await reader.read()

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

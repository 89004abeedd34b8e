"""A server's restart in virtual time, as the kernel would have it (shared facts, measured)."""

import asyncio
import errno
import socket

import pytest

import timewait.sim as sim
from timewait.events import SegmentSeen, Transition
from timewait.tcp.profiles import profile
from timewait.tcp.states import State


def listening(port: int, **options: bool) -> socket.socket:
    sock = socket.socket()
    if options.get("reuse_address"):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
        sock.listen(5)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()
    writer.close()


def states(port: int) -> list[tuple[int, int, str]]:
    return [(row.local[1], row.remote[1], row.state.name) for row in sim.current_host().rows(port)]


def test_a_server_that_closes_first_cannot_restart_for_sixty_seconds():
    async def main() -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello\n")
            writer.close()

        server = await asyncio.start_server(greet, sock=listening(9090))
        reader, writer = await asyncio.open_connection("127.0.0.1", 9090)
        assert await reader.read() == b"hello\n"
        writer.close()
        server.close()
        await asyncio.sleep(0.1)
        client = writer.get_extra_info("sockname")[1]
        assert states(9090) == [(9090, client, "TIME_WAIT")]
        with pytest.raises(OSError) as refused:
            listening(9090)
        assert refused.value.errno == errno.EADDRINUSE
        with pytest.raises(OSError) as refused:  # the holder's own option counts
            listening(9090, reuse_address=True)
        assert refused.value.errno == errno.EADDRINUSE
        (left,) = [row.seconds_left for row in sim.current_host().rows(9090)]
        await asyncio.sleep(left - 0.001)
        with pytest.raises(OSError):
            listening(9090)
        await asyncio.sleep(0.002)
        listening(9090).close()

    sim.run(main())


def test_a_server_whose_clients_close_first_restarts_at_once():
    async def main() -> None:
        server = await asyncio.start_server(echo, sock=listening(9090))
        reader, writer = await asyncio.open_connection("127.0.0.1", 9090)
        client = writer.get_extra_info("sockname")[1]
        writer.write(b"one\n")
        assert await reader.readline() == b"one\n"
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.1)
        server.close()
        assert states(9090) == [(client, 9090, "TIME_WAIT")]
        listening(9090).close()

    sim.run(main())


def test_what_happened_is_told_as_it_happens():
    async def main() -> None:
        server = await asyncio.start_server(echo, sock=listening(9090))
        network = sim.current_host().network
        with network.observe() as seen:
            _, writer = await asyncio.open_connection("127.0.0.1", 9090)
            client = writer.get_extra_info("sockname")
            writer.close()
            await asyncio.sleep(61)
            events = seen.read()
        server.close()
        mine = [e.new for e in events if isinstance(e, Transition) and e.local == client]
        assert mine == [
            State.SYN_SENT,
            State.ESTABLISHED,
            State.FIN_WAIT_1,
            State.FIN_WAIT_2,
            State.TIME_WAIT,
            State.CLOSED,
        ]
        assert [e.flags for e in events if isinstance(e, SegmentSeen)][:3] == [2, 18, 16]

    sim.run(main())


def test_an_orphan_that_is_to_wait_over_a_minute_shows_as_on_the_kernel():
    """Measured with tcp_fin_timeout=70: keepalive 9.9 s left, then time_wait 9.9 s, then gone."""

    async def main() -> None:
        listener = listening(9090)
        client = socket.socket()
        client.connect(("127.0.0.1", 9090))
        server, _ = listener.accept()
        client.close()
        await asyncio.sleep(0.1)
        host = sim.current_host()

        def orphan() -> list[tuple[str | None, int]]:
            rows = (row for row in host.rows(9090) if row.state is State.FIN_WAIT_2)
            return [(row.timer, round(row.seconds_left or 0.0)) for row in rows]

        assert orphan() == [("keepalive", 10)]
        await asyncio.sleep(9.8)
        assert orphan() == [("keepalive", 0)]
        await asyncio.sleep(0.2)
        assert orphan() == [("time_wait", 10)]
        await asyncio.sleep(9.8)
        assert orphan() == [("time_wait", 0)]
        await asyncio.sleep(0.2)
        assert orphan() == []
        assert server.recv(1) == b""
        server.close()
        listener.close()

    sim.run(main, profile=profile("linux", tcp_fin_timeout=70))

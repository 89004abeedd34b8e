"""Programs that know nothing of this project, on the kernel and on the model alike.

Each serves, is asked, shuts down with one side closing first, and is started
again at once. What is left of the connection, and whether the port can be
bound (without and with SO_REUSEADDR), must be the same on both stacks; the
expectation was taken from the kernel.
"""

import asyncio
import contextlib
import errno
import socket
import ssl

import pytest

from timewait import sim
from timewait.kernel.namespace import Namespace, why_not
from timewait.kernel.sock_diag import sockets

PORT = 8080
WHY_NOT = why_not()
ON_KERNEL = pytest.param(
    "kernel", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
)


def run_on(stack, main):
    if stack == "model":
        return sim.run(main)
    with Namespace() as namespace:
        return namespace.call(asyncio.run, main())


def left() -> list[str]:
    """Whose sockets are left in which state: "server TIME_WAIT"."""
    try:
        rows = sim.current_host().rows(PORT)
    except RuntimeError:
        rows = sockets(PORT)
    return sorted(
        f"{'server' if row.local[1] == PORT else 'client'} {row.state.name}" for row in rows
    )


def restart() -> tuple[str, str]:
    """Whether a new server could take the port: without and with SO_REUSEADDR."""
    outcome = []
    for reuse in (0, 1):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            try:
                sock.bind(("127.0.0.1", PORT))
                sock.listen(5)
            except OSError as error:
                outcome.append(errno.errorcode[error.errno])
            else:
                outcome.append("ok")
    return outcome[0], outcome[1]


async def outcome():
    await asyncio.sleep(0.15)  # a delayed ACK of a FIN
    return left(), restart()


SERVER_HOLDS = (["server TIME_WAIT"], ("EADDRINUSE", "ok"))
SERVER_HOLDS_BARE = (["server TIME_WAIT"], ("EADDRINUSE", "EADDRINUSE"))
CLIENT_HOLDS = (["client TIME_WAIT"], ("ok", "ok"))


async def asyncio_streams(first):
    served = asyncio.Event()

    async def handle(reader, writer):
        assert await reader.readline() == b"ping\n"
        writer.write(b"pong\n")
        if first == "client":
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
        served.set()

    server = await asyncio.start_server(handle, "127.0.0.1", PORT)
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.write(b"ping\n")
    assert await reader.readline() == b"pong\n"
    if first == "server":
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await served.wait()
    server.close()
    await server.wait_closed()


async def asyncio_protocols(first):
    loop = asyncio.get_running_loop()
    over = loop.create_future()

    class Server(asyncio.Protocol):
        def connection_made(self, transport):
            self.transport = transport

        def data_received(self, data):
            self.transport.write(data.upper())
            if first == "server":
                self.transport.close()

        def connection_lost(self, error):
            over.set_result(error)

    class Client(asyncio.Protocol):
        def __init__(self):
            self.answer = loop.create_future()
            self.lost = loop.create_future()

        def data_received(self, data):
            self.answer.set_result(data)

        def connection_lost(self, error):
            self.lost.set_result(error)

    server = await loop.create_server(Server, "127.0.0.1", PORT)
    transport, client = await loop.create_connection(Client, "127.0.0.1", PORT)
    transport.write(b"ping")
    assert await client.answer == b"PING"
    if first == "client":
        transport.close()
    assert await client.lost is None
    assert await over is None
    server.close()


async def loop_sockets(first):
    """loop.sock_*: no SO_REUSEADDR, which asyncio's servers set and plain sockets do not."""
    loop = asyncio.get_running_loop()
    with socket.socket() as listener, socket.socket() as client:
        listener.setblocking(False)
        client.setblocking(False)
        listener.bind(("127.0.0.1", PORT))
        listener.listen(1)
        await loop.sock_connect(client, ("127.0.0.1", PORT))
        conn, _ = await loop.sock_accept(listener)
        await loop.sock_sendall(client, b"x" * 5000)
        got = b""
        while len(got) < 5000:
            got += await loop.sock_recv(conn, 4096)
        ends = [conn, client] if first == "server" else [client, conn]
        ends[0].close()
        assert await loop.sock_recv(ends[1], 1) == b""
        ends[1].close()


async def tls_echo(first):
    import trustme

    authority = trustme.CA()
    inside, outside = (
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
        ssl.create_default_context(),
    )
    authority.issue_cert("localhost").configure_cert(inside)
    authority.configure_trust(outside)
    served = asyncio.Event()

    async def handle(reader, writer):
        writer.write(await reader.readline())
        await writer.drain()
        if first == "client":
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        served.set()

    server = await asyncio.start_server(handle, "127.0.0.1", PORT, ssl=inside)
    reader, writer = await asyncio.open_connection(
        "127.0.0.1", PORT, ssl=outside, server_hostname="localhost"
    )
    writer.write(b"secret\n")
    assert await reader.readline() == b"secret\n"
    if first == "server":
        assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await served.wait()
    server.close()


async def anyio_listener(first):
    import anyio

    async def handle(stream):
        async with stream:
            await stream.send((await stream.receive()).upper())
            if first == "client":
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=PORT)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, handle)
        stream = await anyio.connect_tcp("127.0.0.1", PORT)
        await stream.send(b"ping")
        assert await stream.receive() == b"PING"
        if first == "server":
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        await stream.aclose()
        await asyncio.sleep(0.05)
        tasks.cancel_scope.cancel()


async def app(scope, receive, send):
    """The smallest ASGI application."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    headers = [(b"content-length", b"5")]
    if scope["path"] == "/close":
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello"})


async def ask_with_httpx(first):
    import httpx

    async with httpx.AsyncClient(trust_env=False) as client:
        path = "/close" if first == "server" else "/"
        answer = await client.get(f"http://127.0.0.1:{PORT}{path}")
        assert answer.text == "hello"
        await asyncio.sleep(0.05)


async def uvicorn_and_httpx(first):
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=PORT, log_level="error", lifespan="on")
    )
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    await ask_with_httpx(first)
    server.should_exit = True
    await serving


async def hypercorn_and_httpx(first):
    from hypercorn.asyncio import serve
    from hypercorn.config import Config

    config = Config()
    config.bind = [f"127.0.0.1:{PORT}"]
    config.errorlog = None
    stop = asyncio.Event()
    serving = asyncio.create_task(serve(app, config, shutdown_trigger=stop.wait))
    while "server LISTEN" not in left():
        await asyncio.sleep(0.01)
    await ask_with_httpx(first)
    stop.set()
    await serving


async def aiohttp_both(first):
    from aiohttp import ClientSession, TCPConnector, web

    async def hello(request):
        response = web.Response(text="hello")
        if first == "server":
            response.force_close()
        return response

    application = web.Application()
    application.router.add_get("/", hello)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", PORT).start()
    async with ClientSession(connector=TCPConnector()) as session:
        async with session.get(f"http://127.0.0.1:{PORT}/") as answer:
            assert await answer.text() == "hello"
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.05)
    await runner.cleanup()


async def websockets_echo(first):
    from websockets.asyncio.client import connect
    from websockets.asyncio.server import serve

    async def echo(websocket):
        async for message in websocket:
            await websocket.send(message)
            if first == "server":
                await websocket.close()

    async with (
        serve(echo, "127.0.0.1", PORT),
        connect(f"ws://127.0.0.1:{PORT}", proxy=None) as websocket,
    ):
        await websocket.send("ping")
        assert await websocket.recv() == "ping"
        if first == "server":
            await websocket.wait_closed()
        else:
            await websocket.close()


PROGRAMS = [
    (asyncio_streams, "server", SERVER_HOLDS),
    (asyncio_streams, "client", CLIENT_HOLDS),
    (asyncio_protocols, "server", SERVER_HOLDS),
    (asyncio_protocols, "client", CLIENT_HOLDS),
    (loop_sockets, "server", SERVER_HOLDS_BARE),
    (loop_sockets, "client", CLIENT_HOLDS),
    # asyncio's TLS waits for the other's close_notify: who says goodbye first closes TCP last.
    (tls_echo, "server", CLIENT_HOLDS),
    (tls_echo, "client", SERVER_HOLDS),
    (anyio_listener, "server", SERVER_HOLDS),
    (anyio_listener, "client", CLIENT_HOLDS),
    (uvicorn_and_httpx, "server", SERVER_HOLDS),
    (uvicorn_and_httpx, "client", CLIENT_HOLDS),
    (hypercorn_and_httpx, "server", SERVER_HOLDS),
    (hypercorn_and_httpx, "client", CLIENT_HOLDS),
    (aiohttp_both, "server", SERVER_HOLDS),
    (aiohttp_both, "client", CLIENT_HOLDS),
    (websockets_echo, "server", SERVER_HOLDS),
    # RFC 6455 §7.1.1: the server closes TCP first, whoever says goodbye.
    (websockets_echo, "client", SERVER_HOLDS),
]


@pytest.mark.parametrize(
    ("program", "first", "expected"), PROGRAMS, ids=[f"{p.__name__}-{f}" for p, f, _ in PROGRAMS]
)
@pytest.mark.parametrize("stack", [ON_KERNEL, "model"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_unmodified_programs(stack, program, first, expected, undisturbed):
    async def main():
        await program(first)
        return await outcome()

    def as_expected():
        assert run_on(stack, main) == expected

    if stack == "model":
        as_expected()
    else:
        undisturbed(as_expected)

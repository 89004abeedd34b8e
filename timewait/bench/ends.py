"""How programs hold the two ends of a connection: plain sockets, asyncio, anyio, uvloop, trio.

Each kind does with its own library's means what a program written for it
would do. All of them start from a listener made here, without SO_REUSEADDR,
since they would all set it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.util import find_spec
from typing import Any, Final, Protocol, TypeAlias

import anyio
import anyio.abc
from attrs import define

__all__ = ["KINDS", "RESET", "End", "Kind", "available", "bare", "streams"]

RESET: Final = struct.pack("ii", 1, 0)
_MOST: Final = 65536


class End(Protocol):
    """One end of a connection as a program of some kind holds it.

    `sock` is the socket underneath (or its like: it has `getsockname`,
    `getpeername` and `setsockopt`).
    """

    sock: Any

    async def close(self) -> None:
        """Close it as programs of this kind do."""

    async def shutdown(self) -> None:
        """End what it sends."""

    async def send(self, data: bytes) -> None:
        """Send it all."""

    async def read(self) -> bytes:
        """What has come; b"" at the end. Raises `ConnectionResetError`."""


Pair: TypeAlias = tuple[End, End]  # the server's end and the client's
Opener: TypeAlias = Callable[[socket.socket, int], AbstractAsyncContextManager[list[Pair]]]


@define
class Kind:
    """A way to hold connections.

    `run` runs an async function as programs of the kind are run, `open` makes
    so many connections to a listener, which it takes over, `breathe` lets
    whatever loop there is take a turn.
    """

    name: str
    needs: str | None
    open: Opener
    run: Callable[[Callable[[], Coroutine[Any, Any, Any]]], Any]
    breathe: Callable[[], Awaitable[None]]


def reset_on_close(end: End) -> None:
    """SO_LINGER {1, 0}: its close will be a reset."""
    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


# Plain blocking sockets. The coroutines never wait, so one step runs them to their end.


@define
class _Plain:
    sock: socket.socket

    async def close(self) -> None:
        self.sock.close()

    async def shutdown(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    async def read(self) -> bytes:
        return self.sock.recv(_MOST)


@asynccontextmanager
async def _plain(listener: socket.socket, count: int) -> AsyncIterator[list[Pair]]:
    ends: list[socket.socket] = [listener]
    try:
        pairs: list[Pair] = []
        for _ in range(count):
            ends.append(client := socket.socket(listener.family))
            client.connect(listener.getsockname())
            server, _peer = listener.accept()
            ends.append(server)
            pairs.append((_Plain(server), _Plain(client)))
        yield pairs
    finally:
        for sock in ends:
            sock.close()


def _step(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    try:
        main().send(None)
    except StopIteration as over:
        return over.value
    raise RuntimeError("a program of plain sockets waited for a loop")


async def _at_once() -> None:
    pass


# Sockets that do not block, on whatever loop: what the model's programs are made of.


@define
class _Bare:
    sock: socket.socket

    async def close(self) -> None:
        self.sock.close()

    async def shutdown(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def read(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.sock, _MOST)


@asynccontextmanager
async def bare(listener: socket.socket, count: int) -> AsyncIterator[list[Pair]]:
    """So many connections held by nothing but sockets, on a loop of asyncio's kind."""
    loop = asyncio.get_running_loop()
    listener.setblocking(False)
    ends: list[socket.socket] = [listener]
    try:
        pairs: list[Pair] = []
        for _ in range(count):
            ends.append(client := socket.socket(listener.family))
            client.setblocking(False)
            await loop.sock_connect(client, listener.getsockname())
            server, _peer = await loop.sock_accept(listener)
            ends.append(server)
            pairs.append((_Bare(server), _Bare(client)))
        yield pairs
    finally:
        for sock in ends:
            sock.close()


# asyncio's streams, on asyncio's own loop and on uvloop's.


@define
class _Streams:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sock: Any

    async def close(self) -> None:
        self.writer.close()

    async def shutdown(self) -> None:
        self.writer.write_eof()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read(self) -> bytes:
        return await self.reader.read(_MOST)


@asynccontextmanager
async def streams(listener: socket.socket, count: int) -> AsyncIterator[list[Pair]]:
    """So many connections held by asyncio's streams."""
    accepted: asyncio.Queue[_Streams] = asyncio.Queue()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(_Streams(reader, writer, writer.get_extra_info("socket")))

    host, port = listener.getsockname()[:2]
    server = await asyncio.start_server(take, sock=listener)
    ends: list[_Streams] = []
    try:
        pairs: list[Pair] = []
        for _ in range(count):
            reader, writer = await asyncio.open_connection(host, port)
            client = _Streams(reader, writer, writer.get_extra_info("socket"))
            ends += client, (there := await accepted.get())
            pairs.append((there, client))
        yield pairs
    finally:
        server.close()
        for end in ends:
            end.writer.transport.abort()
        await asyncio.sleep(0)


# anyio, with its default backend.


@define
class _AnyIO:
    stream: anyio.abc.SocketStream
    sock: Any

    async def close(self) -> None:
        await self.stream.aclose()

    async def shutdown(self) -> None:
        await self.stream.send_eof()

    async def send(self, data: bytes) -> None:
        await self.stream.send(data)

    async def read(self) -> bytes:
        try:
            return await self.stream.receive(_MOST)
        except anyio.EndOfStream:
            return b""
        except anyio.BrokenResourceError as broken:
            raise ConnectionResetError from broken


@asynccontextmanager
async def _anyio(listener: socket.socket, count: int) -> AsyncIterator[list[Pair]]:
    host, port = listener.getsockname()[:2]
    raw = anyio.abc.SocketAttribute.raw_socket
    send, receive = anyio.create_memory_object_stream[anyio.abc.SocketStream](count)
    ends: list[_AnyIO] = []
    async with (
        await anyio.abc.SocketListener.from_socket(listener) as server,
        anyio.create_task_group() as tasks,
        send,
        receive,
    ):
        tasks.start_soon(server.serve, send.send)
        try:
            pairs: list[Pair] = []
            for _ in range(count):
                client = await anyio.connect_tcp(host, port)
                there = await receive.receive()
                mine, theirs = (_AnyIO(each, each.extra(raw)) for each in (client, there))
                ends += mine, theirs
                pairs.append((theirs, mine))
            yield pairs
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                for end in ends:
                    await anyio.aclose_forcefully(end.stream)


# trio.


@define
class _Trio:
    stream: Any
    sock: Any

    async def close(self) -> None:
        await self.stream.aclose()

    async def shutdown(self) -> None:
        await self.stream.send_eof()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def read(self) -> bytes:
        import trio

        try:
            return bytes(await self.stream.receive_some(_MOST))
        except trio.BrokenResourceError as broken:
            raise ConnectionResetError from broken


@asynccontextmanager
async def _trio(listener: socket.socket, count: int) -> AsyncIterator[list[Pair]]:
    import trio

    host, port = listener.getsockname()[:2]
    listener.setblocking(False)
    server = trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    ends: list[_Trio] = []
    try:
        pairs: list[Pair] = []
        for _ in range(count):
            client = await trio.open_tcp_stream(host, port)
            there = await server.accept()
            mine, theirs = (_Trio(each, each.socket) for each in (client, there))
            ends += mine, theirs
            pairs.append((theirs, mine))
        yield pairs
    finally:
        await server.aclose()
        for end in ends:
            await trio.aclose_forcefully(end.stream)


def _on_uvloop(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return anyio.run(main, backend_options={"use_uvloop": True})


def _on_trio(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return anyio.run(main, backend="trio")


async def _turn() -> None:
    await anyio.sleep(0)


KINDS: Final = {
    kind.name: kind
    for kind in (
        Kind("plain", None, _plain, _step, _at_once),
        Kind("asyncio", None, streams, anyio.run, _turn),
        Kind("anyio", None, _anyio, anyio.run, _turn),
        Kind("uvloop", "uvloop", streams, _on_uvloop, _turn),
        Kind("trio", "trio", _trio, _on_trio, _turn),
    )
}


def available() -> list[Kind]:
    """The kinds whose library is installed."""
    return [kind for kind in KINDS.values() if not kind.needs or find_spec(kind.needs)]

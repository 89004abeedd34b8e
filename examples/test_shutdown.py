"""What the pytest plugin says about a server and its clients: `pytest examples/test_shutdown.py`.

The first test passes; the other two fail, to show what a failure looks like.
"""

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest


@pytest.fixture
def echo_server(tcp_port) -> Iterator[int]:
    """A server that answers a line, and closes when its client has."""
    listener = tcp_port.listen()

    def serve() -> None:
        try:
            while True:
                connection, _ = listener.accept()
                with connection, connection.makefile("rwb") as stream:
                    for line in stream:
                        stream.write(line)
                        stream.flush()
        except OSError:  # the listener was closed
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield tcp_port.number
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.mark.tcp(no_leaks=True, closed_by="client")
def test_the_client_closes_first(echo_server: int) -> None:
    with socket.create_connection(("localhost", echo_server)) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"hello\n"


def test_the_server_can_be_restarted(tcp, tcp_port) -> None:
    with tcp_port.listen() as listener, socket.create_connection(listener.getsockname()) as client:
        listener.accept()[0].close()  # the server does not wait for its client
        assert client.recv(1) == b""
    tcp.assert_bindable(tcp_port)


def test_nothing_is_left_open(tcp, tcp_port) -> None:
    async def main() -> None:
        busy: list[asyncio.StreamWriter] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            busy.append(writer)
            await reader.read()  # until the client closes, and then: nothing

        server = await asyncio.start_server(answer, sock=tcp_port.listen())
        _, writer = await asyncio.open_connection("127.0.0.1", tcp_port.number)
        writer.close()
        await tcp.settled()
        server.close()
        tcp.assert_no_leak()

    asyncio.run(main())

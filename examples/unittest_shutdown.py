"""The same questions from unittest: `python -m unittest examples.unittest_shutdown`."""

import asyncio
import socket
import unittest

from timewait import Witness, hold_port


class Shutdown(unittest.TestCase):
    def test_the_client_closes_first(self) -> None:
        port = self.enterContext(hold_port())
        seen = self.enterContext(Witness())
        with port.listen() as listener:
            client = socket.create_connection(listener.getsockname())
            server, _ = listener.accept()
            client.close()
            server.close()
        seen.assert_closed_by("client", port=port)
        seen.assert_no_leak()
        seen.assert_bindable(port)


class AsyncShutdown(unittest.IsolatedAsyncioTestCase):
    async def test_the_server_closes_first(self) -> None:
        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello")
            writer.close()

        port = self.enterContext(hold_port())
        async with Witness() as seen:
            server = await asyncio.start_server(greet, sock=port.listen())
            reader, writer = await asyncio.open_connection("127.0.0.1", port.number)
            assert await reader.read() == b"hello"
            writer.close()
            await seen.settled()  # the loop closes, so let it run
            seen.assert_closed_by("server", port=port)
            assert len(seen.time_wait) == 1
            server.close()


if __name__ == "__main__":
    unittest.main()

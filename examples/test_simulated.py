"""An ordinary asyncio server and client on the simulated network: an hour passes at once."""

import asyncio

import pytest


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for line in reader:
        writer.write(line)
    writer.close()


@pytest.mark.tcp_sim(seeds=20)
async def test_time_wait_is_the_clients_and_over_in_a_minute(tcp_sim) -> None:
    server = await asyncio.start_server(echo, "localhost", 9090)
    reader, writer = await asyncio.open_connection("localhost", 9090)
    writer.write(b"hello\n")
    assert await reader.readline() == b"hello\n"
    writer.close()
    await asyncio.sleep(1)
    states = {str(row.state): row.remote[1] for row in tcp_sim.host.rows()}
    assert states["TIME_WAIT"] == 9090
    await asyncio.sleep(3600)
    assert {str(row.state) for row in tcp_sim.host.rows()} == {"LISTEN"}
    server.close()

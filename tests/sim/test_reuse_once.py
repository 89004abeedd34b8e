import asyncio
import socket

from timewait.sim import Network, run


def test_a_port_reused_from_time_wait_is_not_reused_again_before_its_delay() -> None:
    """Linux 6.18 with two ephemeral ports and tcp_tw_reuse=1: two connections a second."""
    network = Network()
    network.host("machine", ephemeral=(20000, 20001), tw_reuse=1)
    made: list[float] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 9090)) as listener:
            listener.setblocking(False)
            while loop.time() < 2.5:
                with socket.socket() as client:
                    client.setblocking(False)
                    try:
                        await loop.sock_connect(client, ("127.0.0.1", 9090))
                    except OSError:
                        await asyncio.sleep(0.01)
                        continue
                    server, _ = await loop.sock_accept(listener)
                    made.append(round(loop.time(), 1))
                    client.close()
                    server.close()

    run(main, hosts=network)
    assert made == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]

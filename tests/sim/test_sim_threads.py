"""A simulation is its own thread's business: the others go on with the machine."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from timewait import sim
from timewait.sim import SimSocket


def test_other_threads_keep_the_machine() -> None:
    begun, over = threading.Event(), threading.Event()
    seen: list[object] = []

    def stranger() -> None:
        begun.wait(10)
        first = time.monotonic()
        with socket.create_server(("127.0.0.1", 0)) as server:
            with socket.create_connection(server.getsockname()) as client:
                accepted, _ = server.accept()
                accepted.sendall(b"real")
                accepted.close()
                seen.append(client.recv(10))
            seen.append(isinstance(server, socket.socket))
            seen.append(isinstance(server, SimSocket))
        time.sleep(0.01)
        seen.append(0.01 <= time.monotonic() - first < 10)
        worker = threading.Thread(target=seen.append, args=("a thread",))
        worker.start()
        worker.join()
        over.set()

    thread = threading.Thread(target=stranger)
    thread.start()

    async def main() -> tuple[bool, float]:
        start = time.monotonic()
        await asyncio.sleep(1000)
        begun.set()
        over.wait(10)  # an Event of the machine: the simulation stands still meanwhile
        with socket.socket() as ours:
            return isinstance(ours, SimSocket) and isinstance(ours, socket.socket), (
                time.monotonic() - start
            )

    assert sim.run(main) == (True, 1000)
    thread.join()
    assert seen == [b"real", True, False, True, "a thread"]
    with socket.socket() as afterwards:
        assert not isinstance(afterwards, SimSocket)


def test_simulations_of_several_threads_take_turns() -> None:
    async def main() -> float:
        await asyncio.sleep(60)
        return asyncio.get_running_loop().time()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: sim.run(main), range(8))) == [60.0] * 8


def test_a_simulation_inside_a_simulation_is_refused() -> None:
    async def inner() -> None: ...

    async def main() -> None:
        sim.run(inner)

    with pytest.raises(RuntimeError, match="simulation"):
        sim.run(main)

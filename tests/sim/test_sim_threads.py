"""A simulation is its own thread's business: the others go on with the machine."""

import asyncio
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import anyio
import anyio.from_thread
import anyio.to_thread
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


async def with_to_thread(work):
    return await asyncio.to_thread(work)


async def with_an_executor(work):
    with ThreadPoolExecutor(2) as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, work)


async def with_anyio(work):
    return await anyio.to_thread.run_sync(work)


@pytest.mark.parametrize("hand_over", [with_to_thread, with_an_executor, with_anyio])
def test_work_for_a_thread_is_done_at_once_on_the_same_host(hand_over):
    name = ContextVar("name", default="the task's")

    def work():
        name.set("the thread's")
        time.sleep(5)
        return threading.get_ident(), sim.current_host().name

    def fail():
        raise LookupError("mine")

    async def main():
        answers = [await hand_over(work) for _ in range(3)]
        assert name.get() == "the task's"
        assert asyncio.get_running_loop().time() == 15
        with pytest.raises(LookupError, match="mine"):
            await hand_over(fail)
        return answers

    assert sim.run(main, hosts=["web"]) == [(threading.get_ident(), "web")] * 3


def test_work_for_anyio_threads_keeps_to_its_limiter_and_cannot_call_back():
    async def main():
        limiter = anyio.CapacityLimiter(1)
        taken = []
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(
                    lambda: anyio.to_thread.run_sync(
                        lambda: taken.append(limiter.borrowed_tokens), limiter=limiter
                    )
                )
        assert taken == [1, 1, 1]
        # Waiting for the loop in the loop's own thread would be for ever.
        with pytest.raises(RuntimeError, match="worker thread"):
            await anyio.to_thread.run_sync(anyio.from_thread.run, anyio.sleep, 1)

    sim.run(main)


def test_a_thread_of_the_program_itself_is_refused():
    async def main():
        with pytest.raises(sim.LeavesSimulation, match="a thread"):
            threading.Thread(target=print).start()
        with ThreadPoolExecutor(1) as pool, pytest.raises(sim.LeavesSimulation, match="a thread"):
            pool.submit(print)

    sim.run(main)

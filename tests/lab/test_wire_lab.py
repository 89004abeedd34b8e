"""The wire lab: a real kernel and a modelled host, or a test, at the two ends of a wire."""

from __future__ import annotations

import errno
import socket

import anyio
import pytest

import timewait
from timewait.events import SegmentSeen, Transition
from timewait.kernel.wire import WireError
from timewait.lab.wire import FAR, KERNEL, WireStack
from timewait.scenario import BUILT_IN, WITH_FAULTS, Scenario, ScenarioError
from timewait.tcp.packet import Packet
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment
from timewait.tcp.states import State

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _wired() -> None:
    try:
        timewait.WireLab(None).close()
    except WireError as why:
        pytest.skip(str(why))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stack(scenario: Scenario, kernel: str) -> WireStack:
    return WireStack(scenario, kernel="client" if kernel == "client" else "server")


@pytest.mark.parametrize("kernel", ["client", "server"])
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_scenario_conforms_with_the_kernel_on_either_side(name: str, kernel: str) -> None:
    scenario = Scenario.built_in(name)
    run = scenario.run_sync(on=stack(scenario, kernel))
    verdict = run.check()
    assert verdict, verdict.explain()
    if name != "simultaneous":  # whose FINs may or may not cross
        modelled = scenario.run_sync(on="model")
        assert run.time_wait.holder == modelled.time_wait.holder
        assert run.restart.error == modelled.restart.error


@pytest.mark.parametrize("kernel", ["client", "server"])
@pytest.mark.parametrize("name", WITH_FAULTS)
def test_what_only_a_wire_can_do(name: str, kernel: str) -> None:
    scenario = Scenario.built_in(name, clients=1)
    assert Scenario.from_toml(scenario.to_toml()) == scenario
    run = scenario.run_sync(on=stack(scenario, kernel))
    verdict = run.check()
    assert verdict, verdict.explain()
    segments = [event for event in run.events if isinstance(event, SegmentSeen)]
    fins = [s for s in segments if s.flags & FIN]
    states = [event.new for event in run.events if isinstance(event, Transition)]
    match name:
        case "last-ack-lost":
            assert [s.lost for s in segments if not s.flags & FIN][-2:] == [True, False]
            assert len(fins) == 3
        case "fin-lost":
            assert [s.lost for s in fins] == [True, False, False]
        case "duplicate-fin-in-time-wait":
            answers = [s for s in segments if s.t > fins[-1].t + 0.1]
            assert [s.flags for s in answers] == [ACK, RST]  # RFC 1337
        case "simultaneous-close":
            assert State.CLOSING in states
            assert run.time_wait.holder == "both"
        case "old-duplicate":
            late = [s.flags for s in segments if s.t > fins[-1].t + 0.1]
            assert late == [ACK, RST]


def test_a_link_with_faults_is_not_the_kernels_own() -> None:
    with pytest.raises(ScenarioError, match="runs on 'model' and 'wire'"):
        Scenario.built_in("fin-lost").run_sync(on="kernel")


async def test_a_run_on_the_wire_from_async_code() -> None:
    run = await Scenario.built_in("server-first").run(on="wire")
    assert (run.time_wait.holder, run.restart.error) == ("server", errno.EADDRINUSE)


@pytest.mark.parametrize("family", [4, 6])
async def test_time_wait_assassination_by_hand(family: int) -> None:
    """RFC 1337: a RST at RCV.NXT ends TIME_WAIT, one beside it does not."""
    n = family == 6
    async with timewait.wire(None) as lab:
        kernel, us = (KERNEL[n], 9090), (FAR[n], 40000)
        with lab.socket(socket.AF_INET6 if n else socket.AF_INET) as listener:
            listener.bind(kernel)
            listener.listen()
            lab.send(Packet(us, kernel, Segment(100, 0, SYN, 65535)))
            answer = (await lab.receive(lambda p: bool(p.segment.flags & SYN))).segment
            lab.send(Packet(us, kernel, Segment(101, answer.seq + 1, ACK, 65535)))
            await lab.until(lambda: len(lab.rows(9090)) == 2)
            connection, _ = listener.accept()
            connection.close()
            fin = (await lab.receive(lambda p: bool(p.segment.flags & FIN))).segment
            lab.send(Packet(us, kernel, Segment(101, fin.seq + 1, FIN | ACK, 65535)))
            await lab.until(lambda: lab.rows(9090)[-1].state is State.TIME_WAIT)

            lab.send(Packet(us, kernel, Segment(103, 0, RST)))
            await anyio.sleep(0.02)
            assert lab.rows(9090)[-1].state is State.TIME_WAIT
            lab.send(Packet(us, kernel, Segment(102, 0, RST)))
            await lab.until(lambda: [row.state for row in lab.rows(9090)] == [State.LISTEN])


async def test_a_modelled_peer_talks_to_the_kernel() -> None:
    async with timewait.wire("freebsd") as lab:
        with lab.socket() as client, lab.peer_socket() as server:
            server.bind((FAR[0], 80))
            server.listen()
            with pytest.raises(BlockingIOError):
                client.connect((FAR[0], 80))
            await lab.until(lambda: server._open().readable())
            accepted, _ = server.accept()
            with accepted:
                client.send(b"hello")
                await lab.until(lambda: accepted._open().readable())
                assert accepted.recv(10) == b"hello"


async def test_waiting_in_vain_ends() -> None:
    async with timewait.wire(None) as lab:
        with pytest.raises(TimeoutError):
            await lab.receive(timeout=0.01)

"""The wire lab: a real kernel and a modelled host, or a test, at the two ends of a wire."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeGuard

import anyio
import pytest

import timewait
from timewait import Run
from timewait.events import Called, Event, SegmentSeen, Transition
from timewait.kernel import tracefs
from timewait.kernel.wire import WireError
from timewait.lab.wire import FAR, KERNEL, WireStack
from timewait.scenario import BUILT_IN, WITH_FAULTS, Scenario, ScenarioError
from timewait.tcp.packet import Packet
from timewait.tcp.segment import ACK, FIN, RST, SYN, Segment
from timewait.tcp.states import State

pytestmark = pytest.mark.anyio
Undisturbed: TypeAlias = Callable[..., None]


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
def test_every_scenario_conforms_with_the_kernel_on_either_side(
    name: str, kernel: str, undisturbed: Undisturbed
) -> None:
    scenario = Scenario.built_in(name)
    modelled = scenario.run_sync(on="model")

    def conforms() -> None:
        run = scenario.run_sync(on=stack(scenario, kernel))
        verdict = run.check()
        assert verdict, verdict.explain()
        if name != "simultaneous":  # whose FINs may or may not cross
            assert run.time_wait.holder == modelled.time_wait.holder
            assert run.restart.error == modelled.restart.error

    undisturbed(conforms)


@pytest.mark.parametrize("kernel", ["client", "server"])
@pytest.mark.parametrize("name", WITH_FAULTS)
def test_what_only_a_wire_can_do(name: str, kernel: str, undisturbed: Undisturbed) -> None:
    scenario = Scenario.built_in(name, clients=1)
    assert Scenario.from_toml(scenario.to_toml()) == scenario
    undisturbed(lambda: does_what_only_a_wire_can(name, scenario, kernel))


def does_what_only_a_wire_can(name: str, scenario: Scenario, kernel: str) -> None:
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
            assert states.count(State.CLOSING) == (1 if os.geteuid() else 2)
            assert run.time_wait.holder == "both"
        case "old-duplicate":
            late = [s.flags for s in segments if s.t > fins[-1].t + 0.1]
            assert late == [ACK, RST]
        case "rst-in-time-wait":
            assert [(s.source, s.flags) for s in segments][-1] == ("forged", RST)
            assert run.time_wait.holder == "server"
            assert run.restart.ok
        case "syn-in-time-wait":
            at = next(n for n, s in enumerate(segments) if s.source == "forged")
            answered = segments[at + 1]
            assert (answered.flags, answered.ack) == (SYN | ACK, segments[at].seq + 1)
            assert segments[-1].flags & RST  # the client's machine knows of no such connection
            assert run.restart.ok
        case "half-open":
            resets = [s for s in segments if s.flags & RST]
            assert [s.lost for s in resets] == [True, False]
            read = [e for e in run.events if isinstance(e, Called) and e.call == "recv"]
            assert [e.errno for e in read] == ["ECONNRESET"]
            assert (run.time_wait.holder, run.restart.ok) == (None, True)
        case "peer-vanishes":
            left = {row.state for row in run.snapshots[-2].rows if run.side(row) == "server"}
            assert {state.name for state in left} == {
                "LISTEN", "SYN_RECEIVED", "ESTABLISHED", "FIN_WAIT_1", "FIN_WAIT_2",
                "CLOSE_WAIT", "CLOSING", "LAST_ACK",
            }  # fmt: skip
            assert run.restart.error == errno.EADDRINUSE


@pytest.mark.parametrize("name", WITH_FAULTS)
def test_the_model_does_on_one_host_what_it_does_on_the_wire(
    name: str, undisturbed: Undisturbed
) -> None:
    scenario = Scenario.built_in(name, clients=1)
    modelled = scenario.run_sync(on="model")
    assert modelled.check(), modelled.check().explain()

    def told(run: Run) -> Counter[tuple[int, bool, bool]]:
        return Counter(
            (s.flags & (SYN | FIN | RST | ACK), s.lost, s.source == "forged")
            for s in run.events
            if _is_segment(s) and (s.lost or s.flags & (SYN | FIN | RST))
        )

    def alike() -> None:
        wired = scenario.run_sync(on="wire")
        ours, theirs = modelled.restart, wired.restart
        assert wired.time_wait.holder == modelled.time_wait.holder
        assert (theirs.ok, theirs.error) == (ours.ok, ours.error)
        # Every fault has struck alike; ACKs by themselves come as clocks have it.
        if name != "peer-vanishes":  # whose FINs are sent again as time has it
            assert told(wired) == told(modelled)

    undisturbed(alike)
    assert any(lost or forged for _, lost, forged in told(modelled)) or scenario.faults


def _is_segment(event: Event) -> TypeGuard[SegmentSeen]:
    return isinstance(event, SegmentSeen)


@pytest.mark.parametrize("on", ["model", "wire"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("act", ["corrupt", "truncate", "reorder"])
def test_a_damaged_or_late_segment_is_made_good(
    act: str, host: str, on: str, undisturbed: Undisturbed
) -> None:
    story = Scenario(host=host).listen().connect().send("client", 3000).close("server")
    scenario = story.fault(act, "data", "client", seconds=0.3)
    if on == "model":
        makes_good(act, scenario, on)
    else:
        undisturbed(lambda: makes_good(act, scenario, on))


def makes_good(act: str, scenario: Scenario, on: str) -> None:
    run = scenario.run_sync(on=on)
    assert run.check(), run.check().explain()
    data = [s for s in run.events if isinstance(s, SegmentSeen) and s.length]
    if act == "reorder":
        assert not any(s.lost for s in data)
        acks = [s for s in run.events if _is_segment(s) and s.ack == data[0].seq and s.t]
        assert acks  # the receiver told that something was missing
    else:
        assert data[0].lost
        assert [s.seq for s in data[1:]].count(data[0].seq) == 1  # sent again
    assert sum(e.result for e in run.events if _is_recv(e) and isinstance(e.result, int)) == 3000


def _is_recv(event: Event) -> TypeGuard[Called]:
    return isinstance(event, Called) and event.call == "recv" and event.actor == "server"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("device", [None, "veth"])
@pytest.mark.parametrize("act", ["corrupt", "truncate"])
def test_the_kernel_counts_what_is_damaged(
    act: str, device: str | None, family: int, undisturbed: Undisturbed
) -> None:
    """It is the kernel that finds the damage: the segment really arrives."""
    undisturbed(lambda: counts_damage(act, device, family))


def counts_damage(act: str, device: str | None, family: int) -> None:
    lab = timewait.WireLab(device=device)
    try:
        six = family == 6
        at = socket.AF_INET6 if six else socket.AF_INET
        with lab.socket(at) as listener, lab.peer_socket(at) as client:
            listener.bind((KERNEL[six], 9090))
            listener.listen()
            getattr(lab.network, act)("SYN", target="kernel")
            before = _counted(lab)
            with pytest.raises(BlockingIOError):
                client.connect((KERNEL[six], 9090))
            assert [row.state for row in lab.rows(9090)] == [State.LISTEN, State.SYN_SENT]
            assert _counted(lab) == before + 1
    finally:
        lab.close()


def _counted(lab: timewait.WireLab) -> int:
    """Packets that IP or TCP of the namespace has thrown away."""

    def read() -> str:
        files = ("snmp", "netstat", "snmp6")
        return "".join(Path(f"/proc/thread-self/net/{name}").read_text() for name in files)

    rows = [line.split() for line in lab.wire.namespace.call(read).splitlines()]
    counters = {row[0]: int(row[1]) for row in rows if len(row) == 2}
    for names, values in pairwise(rows):
        if names[0] == values[0] and values[1].lstrip("-").isdigit():
            counters |= {names[0] + n: int(v) for n, v in zip(names[1:], values[1:], strict=True)}
    return sum(
        counters[n] for n in ("Tcp:InCsumErrors", "IpExt:InTruncatedPkts", "Ip6InTruncatedPkts")
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="a tracepoint needs root")
def test_the_kernels_transitions_are_seen_where_permitted() -> None:
    scenario = Scenario.built_in("clients-first", clients=1)
    run = scenario.run_sync(on="wire")
    kernel = [e for e in run.events if isinstance(e, Transition) and e.source == "tracepoint"]
    assert [e.new.name for e in kernel if e.local[0] == KERNEL[0]][:4] == [
        "SYN_SENT", "ESTABLISHED", "FIN_WAIT_1", "FIN_WAIT_2"
    ]  # fmt: skip
    assert run.observer == "model+sock_diag+tracepoint"
    assert scenario.run_sync(on="wire", observer="sock_diag").observer == "model+sock_diag"
    with pytest.raises(ScenarioError, match="no observer 'psutil'"):
        scenario.run_sync(on="wire", observer="psutil")


@pytest.mark.skipif(os.geteuid() != 0, reason="a tracepoint needs root")
@pytest.mark.parametrize("how", ["closed", "killed"])
def test_a_lab_that_sees_transitions_leaves_no_tracefs_instance(how: str) -> None:
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from timewait import Scenario\n"
        "from timewait.lab.wire import WireStack\n"
        "scenario = Scenario.built_in('server-first')\n"
        "lab = WireStack(scenario, tracepoint=True)\n"
        "lab.prepare(scenario)\n"
        "print(flush=True); input(); lab.close(); print(flush=True); input()"
    )
    with (
        ExitStack() as opened,
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as lab,
    ):
        instances = tracefs.root(opened) / "instances"
        assert lab.stdin is not None
        assert lab.stdout is not None
        lab.stdout.readline()
        assert [*instances.glob(f"timewait-{lab.pid}-*")]
        if how == "killed":
            os.kill(lab.pid, signal.SIGKILL)
            while [*instances.glob(f"timewait-{lab.pid}-*")]:  # the test's own limit ends this
                time.sleep(0.01)
        else:
            print(file=lab.stdin, flush=True)
            lab.stdout.readline()
            assert not [*instances.glob(f"timewait-{lab.pid}-*")]
            lab.kill()


def test_what_cannot_be_forged_is_refused() -> None:
    lab = timewait.WireLab()
    try:
        with pytest.raises(ValueError, match="no segment of"):
            lab.network.forge((KERNEL[0], 1, FAR[0], 2), RST)
    finally:
        lab.close()


def test_a_fin_overtaken_by_an_ack_is_told_in_order(undisturbed: Undisturbed) -> None:
    """The kernel's answer has its own time, not that of the segment that it answers."""
    story = Scenario().listen().connect(2).close("both").restart()
    story = story.fault("delay", "FIN", times=0, seconds=0.05)

    def in_order() -> None:
        verdict = story.run_sync(on=stack(story, "server")).check()
        assert verdict, verdict.explain()

    for _ in range(3):
        undisturbed(in_order)


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


async def test_waiting_in_vain_ends_and_says_what_came_instead() -> None:
    async with timewait.wire(None) as lab:
        with pytest.raises(TimeoutError, match=r"in 0\.01 s, but nothing"):
            await lab.receive(timeout=0.01)
        with pytest.raises(TimeoutError, match=r"after 0\.01 s"):
            await lab.until(lambda: False, timeout=0.01)
        with lab.socket() as client:
            with suppress(BlockingIOError):
                client.connect((FAR[0], 80))
            await lab.until(lambda: lab.packets != [])
            with pytest.raises(TimeoutError, match=r"but \d+ others, the last .* SYN seq"):
                await lab.receive(lambda packet: packet.segment.flags & RST != 0, timeout=0.01)
    with pytest.raises(ValueError, match="'tun' or 'veth'"):
        async with timewait.wire(None, device="tap"):
            pass


@pytest.mark.parametrize("device", [None, "veth"])
async def test_octets_that_are_no_packet_are_refused(device: str | None) -> None:
    async with timewait.wire(None, device=device) as lab:
        for octets in (b"", bytes(20)):
            with pytest.raises(OSError, match="neither an IPv4 nor an IPv6 packet"):
                lab.send(octets)


EXAMPLES = re.findall(
    r"```python\n(.*?)```",
    Path(__file__).parents[2].joinpath("docs/wire.md").read_text(),
    re.DOTALL,
)


@pytest.mark.parametrize("who", ["root", "nobody"])
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_documented_examples_run(
    number: int, who: str, importable: Path, nobody: tuple[str, ...]
) -> None:
    """Every fault by hand, on TUN and, for an ordinary user, on a veth pair."""
    become = nobody if who == "nobody" else ()
    if who == "nobody" and subprocess.run([*become, "unshare", "-Urn", "true"]).returncode:
        pytest.skip("an ordinary user may have no user namespace here")
    ran = subprocess.run(
        [*become, sys.executable, "-c", EXAMPLES[number]],
        capture_output=True,
        text=True,
        timeout=150,
        env={"PYTHONPATH": str(importable), "PATH": os.environ["PATH"]},
        cwd="/",
        check=False,
    )
    assert (ran.stderr, ran.stdout) == ("", "3000\nTrue\nFalse\n" if number else "")

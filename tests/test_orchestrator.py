"""The orchestrator on this machine's kernel, under both of anyio's backends."""

import errno
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attrs import evolve

from timewait import Scenario, ScenarioError, State, StepHung, events, hold_port
from timewait.check import check
from timewait.events import Called, Event, Lost, Note, Snapshot, Transition
from timewait.kernel.namespace import Namespace
from timewait.kernel.sock_diag import sockets
from timewait.run import run_sync
from timewait.scenario import BUILT_IN
from timewait.tcp.profiles import profile
from timewait.tcp.transitions import go

# A stack that ends where TCP says TIME_WAIT.
LINUX = profile("linux")
WRONG = evolve(
    LINUX,
    differences={
        **LINUX.differences,
        **{
            cell: go(State.CLOSED, source="nobody")
            for cell, row in LINUX.table.items()
            if row.next is State.TIME_WAIT
        },
    },
)

both_backends = pytest.mark.parametrize("backend", ["asyncio", "trio"])


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@both_backends
@pytest.mark.parametrize(
    ("name", "closer", "holder", "count", "error"),
    [
        ("server-first", "server", "server", 2, errno.EADDRINUSE),
        ("clients-first", "client", "client", 2, None),
        ("half-close", "client", "client", 2, None),
        ("abort", "server", None, 0, None),
        ("unread-data", "server", None, 0, None),
        ("orphan", "server", None, 0, errno.EADDRINUSE),
        ("close-wait-leak", "client", None, 0, errno.EADDRINUSE),
    ],
)
def test_the_stories_on_the_kernel(
    name: str, closer: str, holder: str | None, count: int, error: int | None, backend: str
) -> None:
    run = Scenario.built_in(name).run_sync(on="kernel", backend=backend)
    assert run.active_closer == closer
    assert (run.time_wait.holder, run.time_wait.sockets) == (holder, count)
    assert run.restart.error == error
    assert run.restart.ok is (error is None)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace")
def test_an_orphan_that_waits_twice_is_free_after_both() -> None:
    with Namespace(sysctls={"net.ipv4.tcp_fin_timeout": 70}) as ns, ns.entered():
        run = Scenario.built_in("orphan").run_sync(on="kernel")
    assert run.restart.error == errno.EADDRINUSE
    assert run.restart.free_after is not None
    assert 15 < run.restart.free_after <= 20.01  # 10 s by the keepalive timer, and 10 s more


@both_backends
def test_a_simultaneous_close_takes_one_of_its_two_courses(backend: str) -> None:
    run = Scenario.built_in("simultaneous").run_sync(on="kernel", backend=backend)
    assert run.time_wait.holder in ("server", "client", "both")
    assert run.active_closer == run.time_wait.holder
    held = {state for _, state in states(run.snapshots[-1])}
    assert held <= {State.TIME_WAIT, State.LISTEN}


def states(snapshot: Snapshot) -> list[tuple[int, State]]:
    return [(row.local[1], row.state) for row in snapshot.rows]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1"])
def test_every_loopback_address_serves(host: str) -> None:
    run = Scenario(host).listen().connect(2).close("server").restart().run_sync()
    assert run.snapshots[0].rows[0].local == (host, run.port)
    assert run.restart.error == errno.EADDRINUSE


def test_the_tables_of_server_first_step_by_step() -> None:
    run = Scenario.built_in("server-first").run_sync()
    listens, connect, closes, again = (states(snapshot) for snapshot in run.snapshots)
    port = run.port
    assert listens == [(port, State.LISTEN)]
    assert connect[:3] == [(port, State.LISTEN)] + [(port, State.ESTABLISHED)] * 2
    assert [state for _, state in connect[3:]] == [State.ESTABLISHED] * 2
    assert closes == again == [(port, State.TIME_WAIT)] * 2


@pytest.mark.parametrize("observer", ["sock_diag", "auto", "sock_diag+tracepoint"])
@pytest.mark.parametrize("side", ["server", "client"])
def test_a_deliberately_wrong_model_is_caught(side: str, observer: str) -> None:
    story = Scenario.built_in("server-first" if side == "server" else "clients-first")
    run = story.run_sync(on="kernel", observer=observer)
    assert run.check()
    verdict = run.check(profiles={side: WRONG})
    assert not verdict
    if observer == "sock_diag":
        assert "TIME_WAIT" in verdict.explain()


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_model_does_as_the_kernel_does(name: str) -> None:
    kernel = Scenario.built_in(name).run_sync(on="kernel")
    model = Scenario.built_in(name).run_sync(on="model")
    assert kernel.check()
    assert model.check()
    if name != "simultaneous":
        assert model.active_closer == kernel.active_closer
        assert model.time_wait.holder == kernel.time_wait.holder
        assert model.restart.error == kernel.restart.error
        for ours, theirs in zip(kernel.snapshots, model.snapshots, strict=True):
            assert [row.state for row in ours.rows] == [row.state for row in theirs.rows]


def test_on_the_model_a_simultaneous_close_is_truly_simultaneous() -> None:
    run = Scenario.built_in("simultaneous").run_sync(on="model")
    assert (run.active_closer, run.time_wait.holder, run.time_wait.sockets) == ("both", "both", 4)
    assert State.CLOSING in {event.new for event in run.events if isinstance(event, Transition)}


def test_sixty_seconds_pass_at_once_on_the_model() -> None:
    run = Scenario.built_in("server-first").run_sync(on="model", wait=True)
    assert run.restart.waited == pytest.approx(60, abs=0.01)
    assert run.wait_fault is None
    assert run.snapshots[-1].rows[0].state is State.LISTEN


def test_a_restart_after_a_pause_on_the_model() -> None:
    story = Scenario().listen().connect().close("server")
    assert story.pause(59.9).restart().run_sync(on="model").restart.ok is False
    assert story.pause(60.1).restart().run_sync(on="model").restart.ok is True


@pytest.mark.parametrize("server", ["rfc9293", "windows"])
def test_a_reset_opener_is_left_to_the_listener(server: str) -> None:
    """What goes back to LISTEN (RFC 9293 §3.10.7.4) is no connection for accept() to hand out."""
    story = Scenario.built_in("syn-in-time-wait", clients=1)
    run = story.run_sync(on="model", profiles={"server": server})
    assert run.check()
    assert run.restart.ok


def test_two_profiles_live_on_two_hosts() -> None:
    story = Scenario().listen().connect().close("client").close("server")
    run = story.run_sync(on="model", profiles={"client": "freebsd"})
    assert run.time_wait.seconds_left == pytest.approx(60, abs=0.1)  # 2 x MSL of 30 s
    assert len({row.local[0] for row in run.snapshots[1].rows}) == 2
    assert run.check()


def test_the_same_seed_gives_the_same_events() -> None:
    first, second = (Scenario.built_in("half-close").run_sync(on="model") for _ in range(2))
    assert first.events == second.events


def test_the_strongest_observer_that_is_permitted_watches() -> None:
    run = Scenario.built_in("server-first").run_sync()
    assert run.observer == "sock_diag+capture"
    assert run.check().evidence.strength == "strong"


def test_psutil_serves_and_says_what_it_cannot_tell() -> None:
    run = Scenario.built_in("server-first").run_sync(observer="psutil")
    assert run.observer == "psutil"
    assert any(each.startswith("timers") for each in run.blind)
    assert (run.time_wait.holder, run.time_wait.seconds_left) == ("server", None)
    assert (run.restart.error, run.restart.free_after) == (errno.EADDRINUSE, None)
    assert run.check()


def test_an_unknown_observer_is_named() -> None:
    with pytest.raises(ScenarioError, match="no observer is called 'crystal-ball'"):
        Scenario.built_in("abort").run_sync(observer="crystal-ball")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv is not installed")
def test_without_permission_a_capture_is_refused_in_one_line() -> None:
    bare = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"]
    command = [*bare, sys.executable, "-m", "timewait", "run", "abort", "--on", "kernel"]
    asked = subprocess.run([*command, "--observer", "capture"], capture_output=True, text=True)
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "no capture here: " in asked.stderr
    assert asked.stderr.count("\n") == 1
    auto = subprocess.run(command, capture_output=True, text=True)
    assert auto.returncode == 0
    assert "conforms, on weak evidence" in auto.stdout


def test_reuse_address_on_both_servers_lets_the_second_start() -> None:
    story = Scenario().listen(reuse_address=True).connect().close("server")
    assert story.restart().run_sync().restart.ok


def test_reuse_address_on_the_second_server_alone_does_not_help() -> None:
    story = Scenario().listen().connect().close("server")
    assert story.restart(reuse_address=True).run_sync().restart.error == errno.EADDRINUSE


def test_every_call_is_recorded_with_its_outcome() -> None:
    run = Scenario.built_in("server-first", clients=1).run_sync()
    calls = [
        (event.actor, event.call, event.errno) for event in run.events if isinstance(event, Called)
    ]
    assert calls[:2] == [("server", "bind", None), ("server", "listen", None)]
    assert sorted(calls[2:4]) == [("client-1", "connect", None), ("server", "accept", None)]
    assert calls[4:] == [
        ("server", "close", None),
        ("server", "close", None),
        ("client-1", "recv", None),
        ("client-1", "close", None),
        ("server", "bind", "EADDRINUSE"),
    ]
    for event in run.events:
        if isinstance(event, Called):
            assert event.began is not None
            assert 0 <= event.began <= event.t


def test_a_reset_shows_in_the_clients_read() -> None:
    run = Scenario.built_in("abort", clients=1).run_sync()
    reads = [e.errno for e in run.events if isinstance(e, Called) and e.call == "recv"]
    assert reads == ["ECONNRESET"]


def test_what_was_there_before_the_run_is_not_the_runs() -> None:
    first = Scenario.built_in("clients-first").run_sync()
    again = Scenario(port=first.port).listen().connect(1).close("client").close("server").restart()
    assert again.run_sync().time_wait.sockets == 1


def test_a_socket_on_another_address_does_not_hold_the_port() -> None:
    with hold_port() as held:
        port = held.release()
    with socket.socket() as other:
        other.bind(("127.0.0.9", port))
        other.listen()
        story = Scenario(port=port).listen().connect().close("server").restart()
        began = time.monotonic()
        left = story.run_sync().restart.free_after
    assert left is not None
    assert 60 - (time.monotonic() - began) <= left <= 60.1


@both_backends
def test_a_step_that_never_completes_is_named_with_its_states(backend: str) -> None:
    seen: list[Event] = []
    before = descriptors()
    story = Scenario(time_limit=1).listen().connect(2).eof("server")
    with pytest.raises(StepHung) as hung:
        run_sync(story, backend=backend, record=seen.append)
    assert hung.value.step == 3
    assert hung.value.states == {State.LISTEN: 1, State.ESTABLISHED: 4}
    assert "step 3 (server sees the end of the stream) hung for 1 s" in str(hung.value)
    assert isinstance(seen[-1], Note)
    assert descriptors() <= before


def test_a_taken_port_says_by_what() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ScenarioError, match=f"port {port} is taken: .*listens on it"):
            Scenario(port=port).listen().run_sync()


def test_more_clients_than_descriptors_are_refused_before_anything_is_done() -> None:
    seen: list[Event] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
    try:
        with pytest.raises(ScenarioError, match="file descriptors"):
            Scenario().listen().connect(1000).run_sync(record=seen.append)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert seen == []


@both_backends
@pytest.mark.parametrize("name", BUILT_IN)
def test_nothing_is_left_open(name: str, backend: str) -> None:
    before = descriptors()
    run = Scenario.built_in(name).run_sync(backend=backend)
    assert descriptors() <= before
    left = {row.state for row in sockets(run.port)}
    assert left <= {State.TIME_WAIT}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_interrupted_it_closes_its_sockets_and_leaves_the_file_whole(
    tmp_path: Path, backend: str
) -> None:
    story, log = tmp_path / "wait.toml", tmp_path / "run.jsonl"
    Scenario(time_limit=50).listen().connect(2).eof("server").save(story)
    command = [sys.executable, "-m", "timewait", "run", str(story), "--on", "kernel"]
    child = subprocess.Popen(
        [*command, "--events", str(log), "--backend", backend],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (log.exists() and b"clients connect" in log.read_bytes()):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=150)
    assert (child.returncode, out, err.strip()) == (130, "", "timewait: interrupted")
    with log.open("rb") as lines:
        *_, seen, rest = events.read(lines)
    assert isinstance(seen, Snapshot)
    assert isinstance(rest, Lost)
    assert not [row for row in sockets(seen.rows[0].local[1]) if row.state != State.TIME_WAIT]


@pytest.mark.parametrize("stack", ["kernel", "model"])
def test_more_can_be_sent_than_memory_holds(stack: str) -> None:
    story = Scenario(time_limit=2).listen(reads=False).connect().send("client", 10**14)
    with pytest.raises(StepHung, match="clients send 100000000000000 bytes"):
        story.run_sync(on=stack)
    story = Scenario().listen().connect().send("client", 3_000_000).close("client")
    run = story.run_sync(on=stack)
    sent = [e.result for e in run.events if isinstance(e, Called) and e.call == "send"]
    assert sum(sent) == 3_000_000


@pytest.mark.parametrize("stack", ["kernel", "model"])
def test_a_scenario_without_steps_is_not_run(stack: str) -> None:
    with pytest.raises(ScenarioError, match="scenario has no steps"):
        Scenario().run_sync(on=stack)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace")
def test_a_loopback_that_is_down_is_named() -> None:
    run = ["unshare", "-n", sys.executable, "-m", "timewait", "run", "server-first"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ENETUNREACH (loopback is down: ip link set lo up, or --isolated)" in done.stderr


def test_a_backend_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trio", None)
    with pytest.raises(ScenarioError, match=r"trio is not installed: pip install 'timewait\[trio"):
        Scenario.built_in("server-first").run_sync(backend="trio")


def test_a_backend_or_a_role_that_is_none_is_named() -> None:
    story = Scenario.built_in("server-first")
    with pytest.raises(ScenarioError, match="no backend is called 'curio'"):
        story.run_sync(backend="curio")
    with pytest.raises(ScenarioError, match="who is 'peer'"):
        story.run_sync(on="model", profiles={"peer": "linux"})
    with pytest.raises(ValueError, match="who is 'peer'"):
        check([], profiles={"peer": "linux"})


def test_too_few_descriptors_for_a_loop_are_one_line() -> None:
    run = [sys.executable, "-m", "timewait", "run", "server-first"]
    shell = ["sh", "-c", 'ulimit -n 6; exec "$@"', "sh", *run]
    done = subprocess.run(shell, capture_output=True, text=True)
    assert done.returncode == 2
    assert "file descriptors" in done.stderr
    assert done.stderr.count("\n") == 1

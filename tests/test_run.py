"""What a run answers, read from events made by hand: each story told by somebody else."""

import errno

import anyio
import pytest

from timewait import Run, Scenario, ScenarioError, State
from timewait.events import Called, Event, Restart, Row, RunStarted, Snapshot, Transition

SERVER, CLIENT, OTHER = ("127.0.0.1", 9090), ("127.0.0.1", 47788), ("127.0.0.1", 47787)
STORY = Scenario(port=9090).listen().connect(2).close("server").restart()


def told(*events: Event) -> Run:
    return Run.from_events([RunStarted(0.0, "kernel", "sock_diag", STORY.to_dict()), *events])


def table(t: float, *rows: tuple[tuple[str, int], tuple[str, int], State]) -> Snapshot:
    return Snapshot(
        t,
        "a step",
        tuple(
            Row(local, remote, state, seconds_left=60 - t if state is State.TIME_WAIT else None)
            for local, remote, state in rows
        ),
    )


def test_time_wait_on_the_servers_port_is_the_servers() -> None:
    run = told(table(1, (SERVER, CLIENT, State.TIME_WAIT), (SERVER, OTHER, State.TIME_WAIT)))
    assert (run.time_wait.holder, run.time_wait.sockets, run.time_wait.seconds_left) == (
        "server",
        2,
        59,
    )
    assert run.active_closer == "server"


def test_time_wait_on_the_other_port_is_the_clients() -> None:
    run = told(table(1, (CLIENT, SERVER, State.TIME_WAIT)))
    assert (run.time_wait.holder, run.active_closer) == ("client", "client")


def test_time_wait_on_both_is_both() -> None:
    run = told(table(1, (CLIENT, SERVER, State.TIME_WAIT), (SERVER, CLIENT, State.TIME_WAIT)))
    assert (run.time_wait.holder, run.active_closer) == ("both", "both")


def test_the_last_table_that_had_time_wait_tells_who_held_it() -> None:
    run = told(table(1, (CLIENT, SERVER, State.TIME_WAIT)), table(61.5))
    assert (run.time_wait.holder, run.time_wait.seconds_left) == ("client", 59)


def test_who_waits_in_close_wait_was_not_the_first_to_close() -> None:
    run = told(table(1, (SERVER, CLIENT, State.CLOSE_WAIT)))
    assert run.active_closer == "client"


def test_a_transition_between_the_tables_tells_too() -> None:
    run = told(Transition(1, CLIENT, SERVER, State.ESTABLISHED, State.FIN_WAIT_1))
    assert run.active_closer == "client"


def test_of_a_reset_the_first_closing_call_tells() -> None:
    run = told(
        Called(1, "client-1", "close", CLIENT, SERVER), Called(2, "server", "close", SERVER, CLIENT)
    )
    assert (run.active_closer, run.time_wait.holder) == ("client", None)


def test_closing_the_listener_closes_no_connection() -> None:
    assert told(Called(1, "server", "close", SERVER)).active_closer is None


def test_a_restart_that_was_not_tried() -> None:
    assert told().restart.ok is None


def test_a_refused_restart_has_its_errno_and_when_the_port_is_free() -> None:
    again = told(Restart(1, False, "EADDRINUSE", "bind", 59.5)).restart
    assert (again.ok, again.error, again.name) == (False, errno.EADDRINUSE, "EADDRINUSE")
    assert (again.free_after, again.waited) == (59.5, None)


def test_a_restart_that_was_waited_for_says_how_long() -> None:
    run = told(Restart(1, False, "EADDRINUSE", "bind", 59.5), Restart(62, True, held_until=61.9))
    again = run.restart
    assert (again.ok, again.free_after, again.waited, again.held) == (False, 59.5, 61, 60.9)
    assert run.wait_fault is None


@pytest.mark.parametrize(
    ("free", "held", "why"),
    [(60.9, 60.8, "free after 59.90 s"), (66.5, 66.4, "held for 65.40 s")],  # a step is <= 5.12 s
)
def test_a_port_free_too_early_or_too_late_is_told(free: float, held: float, why: str) -> None:
    refused = Restart(1, False, "EADDRINUSE", "bind", 60.0)
    fault = told(refused, Restart(free, True, held_until=held)).wait_fault
    assert fault is not None
    assert why in fault


def test_netstat_is_what_netstat_prints() -> None:
    run = told(
        Snapshot(
            1,
            "clients connect",
            (
                Row(("0.0.0.0", 9090), ("0.0.0.0", 0), State.LISTEN, send_q=128),
                Row(SERVER, CLIENT, State.ESTABLISHED),
                Row(SERVER, OTHER, State.ESTABLISHED),
                Row(CLIENT, SERVER, State.TIME_WAIT, timer="time_wait", seconds_left=60),
            ),
        )
    )
    assert run.netstat() == (
        "# clients connect\n"
        "tcp  0  0 0.0.0.0:9090     0.0.0.0:*        LISTEN\n"
        "tcp  0  0 127.0.0.1:9090   127.0.0.1:47788  ESTABLISHED\n"
        "tcp  0  0 127.0.0.1:9090   127.0.0.1:47787  ESTABLISHED\n"
        "tcp  0  0 127.0.0.1:47788  127.0.0.1:9090   TIME_WAIT"
    )


def test_json_has_the_documented_keys() -> None:
    run = told(
        table(1, (SERVER, CLIENT, State.TIME_WAIT)), Restart(1, False, "EADDRINUSE", "bind", 59.5)
    )
    assert run.to_json() == {
        "stack": "kernel",
        "observer": "sock_diag",
        "active_closer": "server",
        "time_wait": {"holder": "server", "sockets": 1, "seconds_left": 59},
        "restart": {"ok": False, "errno": "EADDRINUSE", "free_after": 59.5, "waited": None},
        "snapshots": [
            {
                "label": "a step",
                "rows": [
                    {"local": "127.0.0.1:9090", "remote": "127.0.0.1:47788", "state": "TIME_WAIT"}
                ],
            }
        ],
    }


def test_events_without_a_head_are_no_run() -> None:
    for events in ([], [Restart(1, True)]):
        with pytest.raises(ValueError, match="run's head"):
            Run.from_events(events)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_scenario_runs_from_async_code(backend: str) -> None:
    story = Scenario.built_in("server-first")

    async def main() -> tuple[Run, Run]:
        model = await story.run(on="model")
        await anyio.sleep(0)  # the caller's own loop goes on
        return model, await story.run(on="kernel")

    for run in anyio.run(main, backend=backend):
        assert run.restart.error == errno.EADDRINUSE


def test_a_stack_that_the_scenario_does_not_know_is_named() -> None:
    with pytest.raises(ScenarioError, match="does not run on 'moon'"):
        STORY.run_sync(on="moon")

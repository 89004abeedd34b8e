import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from timewait import Run, Scenario, State, events
from timewait.check import check
from timewait.commands.run import command
from timewait.scenario import BUILT_IN, WITH_FAULTS
from timewait.tcp.profiles import profile
from timewait.tcp.transitions import go


def timewait(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *args],
        capture_output=True,
        text=True,
        timeout=150,  # a real wait takes a minute; pytest has its own limit
        cwd=cwd,
    )


def document(*args: str) -> Any:
    done = timewait("run", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_list_has_each_scenario_in_eighty_columns() -> None:
    lines = timewait("scenarios").stdout.splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [*BUILT_IN, *WITH_FAULTS]
    assert max(map(len, lines)) <= 80


def test_server_first_on_the_kernel_as_json() -> None:
    told = document("server-first", "--on", "kernel")
    assert told["scenario"] == "server-first"
    (run,) = told["runs"]
    assert (run["stack"], run["active_closer"]) == ("kernel", "server")
    assert (run["time_wait"]["holder"], run["time_wait"]["sockets"]) == ("server", 2)
    assert (run["restart"]["ok"], run["restart"]["errno"]) == (False, "EADDRINUSE")
    assert 55 < run["restart"]["free_after"] <= 60.1
    assert [row["state"] for row in run["snapshots"][-1]["rows"]] == ["TIME_WAIT"] * 2


def test_both_is_the_wire_where_the_kernel_alone_will_not_do() -> None:
    told = document("half-open", "--on", "both", "--clients", "1")
    assert [run["stack"] for run in told["runs"]] == ["wire", "model"]
    assert [run["restart"]["ok"] for run in told["runs"]] == [True, True]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["nonsense"], "no scenario is called 'nonsense'"),
        (["missing.toml"], "missing.toml: No such file"),
        (["server-first", "--host", "192.0.2.1"], "beyond loopback"),
        (["server-first", "--host", "192.0.2.1", "--allow-network"], "not an address of this"),
        (["server-first", "--clients", "0"], "0"),
        (["server-first", "--profile", "peer=linux"], "server=NAME or client=NAME"),
        (["server-first", "--profile", "server=beos"], "beos"),
        (["server-first", "--clients", "65535"], "file descriptors"),
        (["server-first", "--clients", "10000000"], "<= 65535"),
        (["server-first", "--events", "/nowhere/run.jsonl"], "/nowhere/run.jsonl: No such file"),
        (["server-first", "--events", ""], "'': No such file"),
        (["server-first", "--events", "-"], "'-' is no file here"),
        (["server-first", "--events", "/dev/full"], "/dev/full: No space left on device"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], why: str) -> None:
    done = timewait("run", *args, "--on", "kernel")
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "why"),
    [(["--toml", ""], "no scenario is called ''"), (["--toml", "abort", "--json"], "give one")],
)
def test_what_scenarios_cannot_print_is_one_line(args: list[str], why: str) -> None:
    done = timewait("scenarios", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert why in done.stderr


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_scenario_conforms_on_both_stacks(name: str) -> None:
    told = document(name)
    kernel, model = told["runs"]
    assert (kernel["stack"], model["stack"]) == ("kernel", "model")
    assert told["verdict"]["conforms"] is True
    assert told["verdict"]["divergence"] is None
    if name != "simultaneous":  # loopback serialises it, a link that takes time does not
        assert kernel["active_closer"] == model["active_closer"]
        assert kernel["time_wait"]["holder"] == model["time_wait"]["holder"]
        assert kernel["time_wait"]["sockets"] == model["time_wait"]["sockets"]
        assert kernel["restart"]["errno"] == model["restart"]["errno"]
        assert [states(each) for each in kernel["snapshots"]] == [
            states(each) for each in model["snapshots"]
        ]


def states(snapshot: Any) -> tuple[str, list[str]]:
    return snapshot["label"], [row["state"] for row in snapshot["rows"]]


def test_both_side_by_side_fit_eighty_columns() -> None:
    done = timewait("run", "server-first")
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout
    for words in (
        "kernel (sock_diag+capture)",
        "model (linux)",
        "closed first",
        "EADDRINUSE from bind()",
        "kernel: conforms",
        "model: conforms",
        "the tables of the two are the same",
    ):
        assert words in done.stdout


def test_a_run_is_kept_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    assert timewait("run", "half-close", "--on", "model", "--events", str(path)).returncode == 0
    with path.open("rb") as lines:
        run = Run.from_events(events.read(lines))
    assert run.time_wait.holder == "client"
    assert run.check()


def test_both_runs_are_kept_in_one_file_and_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "both.jsonl"
    assert timewait("run", "clients-first", "--events", str(path)).returncode == 0
    with path.open("rb") as lines:
        runs = list(Run.each_from_events(events.read(lines)))
    assert [run.stack for run in runs] == ["kernel", "model"]
    assert [run.time_wait.holder for run in runs] == ["client", "client"]
    assert all(run.check() for run in runs)
    assert timewait("check", str(path)).returncode == 0


def test_servers_that_set_the_option_start_again() -> None:
    for option in ("--reuse-address", "--reuse-port"):
        told = document("server-first", option)
        assert [run["restart"]["ok"] for run in told["runs"]] == [True, True]
        assert told["verdict"]["conforms"]


def test_every_event_is_logged_when_asked_for() -> None:
    done = timewait("run", "abort", "--on", "model", "-v", "--json")
    assert json.loads(done.stdout)["verdict"]["conforms"]
    words = {line.split()[0] for line in done.stderr.splitlines()}
    assert words == {"run", "call", "transition", "segment", "snapshot", "restart"}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(timewait("scenarios", "--toml", "abort").stdout.replace("abort", "my-abort", 1))
    told = document(str(path), "--on", "model")
    assert told["scenario"] == "my-abort"
    assert told["runs"][0]["restart"]["ok"] is True


def test_a_divergence_is_status_1_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is held against a model whose TIME_WAIT does not exist."""
    linux = profile("linux")
    over = go(State.CLOSED, source="nobody")
    gone = {cell: over for cell, row in linux.table.items() if row.next is State.TIME_WAIT}
    wrong = evolve(linux, differences={**linux.differences, **gone})
    monkeypatch.setattr(Run, "check", lambda run: check(run.events, profiles={"server": wrong}))
    for args in (["--json"], []):
        arguments = ["server-first", "--on", "kernel", "--observer", "sock_diag", *args]
        assert command.main(arguments, standalone_mode=False) == 1
    first, text = capsys.readouterr().out.split("\n", 1)
    told = json.loads(first)["verdict"]
    assert told["conforms"] is False
    assert "TIME_WAIT" in told["divergence"]["why"]
    assert "diverges at" in text


def test_a_step_that_hangs_is_one_line_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "hang.toml"
    Scenario(time_limit=1).listen().connect().eof("server").save(path)
    done = timewait("run", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "step 3 (server sees the end of the stream) hung" in done.stderr
    assert "[1 LISTEN, 2 ESTABLISHED]" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.wall
@pytest.mark.slow
def test_waiting_for_the_port_takes_what_the_timer_wheel_allows() -> None:
    told = document("server-first", "--wait")
    kernel, model = told["runs"]
    assert 59.9 < kernel["restart"]["waited"] < 70
    assert abs(model["restart"]["waited"] - 60) < 0.01
    assert told["verdict"]["conforms"]

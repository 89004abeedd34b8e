import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from timewait.scenario import BUILT_IN


def timewait(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *args],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
    )


def document(*args: str) -> Any:
    done = timewait("run", *args, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_list_has_a_line_for_each_scenario() -> None:
    lines = timewait("scenarios").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(BUILT_IN)


def test_server_first_on_the_kernel_as_json() -> None:
    told = document("server-first", "--on", "kernel")
    assert told["scenario"] == "server-first"
    (run,) = told["runs"]
    assert (run["stack"], run["active_closer"]) == ("kernel", "server")
    assert (run["time_wait"]["holder"], run["time_wait"]["sockets"]) == ("server", 2)
    assert (run["restart"]["ok"], run["restart"]["errno"]) == (False, "EADDRINUSE")
    assert 55 < run["restart"]["free_after"] <= 60.1
    assert [row["state"] for row in run["snapshots"][-1]["rows"]] == ["TIME_WAIT"] * 2


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["nonsense"], "no scenario is called 'nonsense'"),
        (["missing.toml"], "missing.toml: No such file"),
        (["server-first", "--host", "192.0.2.1"], "beyond loopback"),
        (["server-first", "--host", "192.0.2.1", "--allow-network"], "not an address of this"),
        (["server-first", "--clients", "0"], "0"),
        (["server-first", "--clients", "10000000"], "file descriptors"),
        (["server-first", "--events", "/nowhere/run.jsonl"], "/nowhere/run.jsonl: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], why: str) -> None:
    done = timewait("run", *args, "--on", "kernel")
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1

"""The project's own speed: the one table. Rates are not asserted, only what is made of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import Figure, side_by_side
from benchmarks.__main__ import NAMES, cells

ROOT = Path(__file__).parent.parent


def benchmarks(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT)


def test_a_figure_is_held_against_its_peer() -> None:
    assert Figure("echo", 30, "/s", "kernel", 10, 3).reached is True
    assert Figure("echo", 29, "/s", "kernel", 10, 3).reached is False
    assert Figure("dump", 2, "s", "ss", 4, 0.4, lower_is_better=True).reached is False
    assert Figure("dump", 2, "s", "ss", 4, 0.5, lower_is_better=True).reached is True


def test_without_a_peer_it_is_held_against_itself_and_with_a_missing_one_against_nothing() -> None:
    assert Figure("check", 200_000, "/s", target=200_000).reached is True
    missing = Figure("echo", 30, "/s", "simloop", None, 1, note="simloop needs Python 3.12")
    assert (missing.ratio, missing.reached) == (None, None)
    row = cells("loop", missing)
    assert row[1] == "echo (simloop needs Python 3.12)"
    assert row[3] == "simloop: not installed"


def test_peers_take_turns() -> None:
    seen: list[str] = []
    works = [(lambda n, name=name: seen.append(name), 10) for name in "ab"]
    side_by_side(*works, rounds=3)  # type: ignore[arg-type]
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"


def test_each_room_is_measured_by_name() -> None:
    assert {"machine", "loop", "observers", "checker", "events", "imports", "plugin"} == {*NAMES}
    done = benchmarks("imports", "--quick", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert {row["room"] for row in rows} == {"imports"}
    assert rows[0]["what"] == "import timewait"


def test_a_room_that_is_none_is_refused() -> None:
    done = benchmarks("kitchen")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'kitchen' is not one of" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_room_whose_peer_is_all_it_is_about_is_left_out_where_that_is_missing() -> None:
    alone = (
        "import importlib.metadata as m, runpy, sys\n"
        "def none(name): raise m.PackageNotFoundError(name)\n"
        "m.distribution = none\n"
        "sys.argv[1:] = ['plugin', '--quick', '--json']\n"
        "runpy.run_module('benchmarks', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n")
    assert done.stderr == "plugin: the rest is left out: No package metadata was found for pytest\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_every_room(name: str) -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert f"| {name} |" in page

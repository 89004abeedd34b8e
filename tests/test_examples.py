"""The examples do what they say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from timewait.kernel.namespace import why_not

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "NO_COLOR": "1"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_pytest_on_the_kernel() -> None:
    done = python("pytest", "-p", "timewait.pytest_plugin", "-c", "/dev/null", "--rootdir", ".",
                  "-p", "no:cacheprovider", "-q", "examples/test_shutdown.py")  # fmt: skip
    assert "2 failed, 1 passed" in done.stdout
    assert "cannot be bound without SO_REUSEADDR: EADDRINUSE" in done.stdout
    assert "1 socket left open" in done.stdout
    assert "3 tests watched: 9 sockets opened" in done.stdout


def test_pytest_on_the_simulation() -> None:
    done = python("pytest", "-p", "timewait.pytest_plugin", "-c", "/dev/null", "--rootdir", ".",
                  "-p", "no:cacheprovider", "-q", "examples/test_simulated.py")  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_unittest() -> None:
    done = python("unittest", "examples.unittest_shutdown")
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr


def test_nose2() -> None:
    pytest.importorskip("nose2")
    done = python("nose2", "-s", "examples", "unittest_shutdown")
    assert done.returncode == 0, done.stderr
    assert "Ran 2 tests" in done.stderr


@pytest.mark.parametrize("side", ["client", "server"])
def test_robot_framework(side: str, tmp_path: Path) -> None:
    pytest.importorskip("robot")
    shutil.copy(ROOT / "examples/TcpKeywords.py", tmp_path)
    suite = (ROOT / "examples/shutdown.robot").read_text()
    assert suite.count("    client\n") == 1
    (tmp_path / "shutdown.robot").write_text(suite.replace("    client\n", f"    {side}\n"))
    quiet = ("--output", "NONE", "--log", "NONE", "--report", "NONE")
    done = python("robot", *quiet, "--pythonpath", str(ROOT), str(tmp_path / "shutdown.robot"))
    if side == "client":
        assert "1 test, 1 passed, 0 failed" in done.stdout
    else:
        assert "1 test, 0 passed, 1 failed" in done.stdout
        assert "closed first by the client (FIN): the client called close" in done.stdout


@pytest.mark.skipif(why_not() is not None, reason=f"no private network namespace: {why_not()}")
def test_shell_script(tmp_path: Path) -> None:
    (tmp_path / "timewait").write_text(f'#!/bin/sh\nexec {sys.executable} -m timewait "$@"\n')
    (tmp_path / "timewait").chmod(0o755)
    done = subprocess.run(
        ["examples/restart.sh"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "TIMEWAIT": str(tmp_path / "timewait")},
    )
    assert done.returncode == 0, done.stderr
    assert "restarted" in done.stdout
    assert "the server closed first (FIN" in done.stderr
    assert "conforms, on strong evidence" in done.stderr

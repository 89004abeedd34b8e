"""Instances of tracefs: whose they are, who removes them, and what is said where there are none."""

import errno
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

from timewait.kernel import tracefs
from timewait.kernel.tracepoint import Tracepoint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="tracefs needs root"
)

PORT = 599  # which nothing here uses


def instances(seen: Tracepoint) -> set[str]:
    return {name for name in os.listdir(seen.home.parent) if name.startswith("timewait-")}


def test_nothing_is_left_and_the_leavings_of_the_killed_are_removed() -> None:
    program = (
        "import os, signal\n"
        "from timewait.kernel.tracepoint import Tracepoint\n"
        f"seen = Tracepoint([{PORT}])\n"
        "print(seen.home.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    left = killed.stdout.strip()
    assert left.startswith("timewait-")
    with Tracepoint([PORT]) as first:
        assert left not in instances(first)
        with Tracepoint([PORT]) as second:  # does not take the living for leavings
            assert {first.home.name, second.home.name} <= instances(first)
        name = second.home.name
        assert name not in instances(first)


def test_nobody_of_another_pid_namespace_is_taken_for_killed() -> None:
    """Instances that are still being made are as safe as those in use, which cannot be removed."""
    program = (
        "from pathlib import Path\n"
        "from timewait.kernel.tracepoint import Tracepoint\n"
        f"with Tracepoint([{PORT}]) as seen: print(*Path(seen.home.parent).iterdir())\n"
    )
    with ExitStack() as opened:
        root = tracefs.root(opened)
        made = root / "instances" / f"timewait-{os.getpid()}-999999"
        made.mkdir()
        opened.callback(made.rmdir)
        lock = tracefs._lock(made)
        assert lock is not None
        opened.callback(os.close, lock)
        inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        there = subprocess.check_output([*inside, sys.executable, "-c", program], text=True)
        assert made.name in there
        assert made.exists()


def test_a_kernel_without_tracefs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def mount() -> int:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(tracefs, "_mount", mount)
    with pytest.raises(OSError, match="this kernel has no tracefs"):
        Tracepoint([1])


def test_without_root_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefs.os, "geteuid", lambda: 65534)
    monkeypatch.setattr(tracefs.os, "access", lambda *_: False)
    fds = {*os.listdir("/proc/self/fd")}
    with pytest.raises(PermissionError, match="tracepoints need root"):
        Tracepoint([1])
    assert {*os.listdir("/proc/self/fd")} <= fds

"""A program that is watched gets the signals meant for it, and does not outlive its watch."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from timewait.kernel.namespace import why_not

WHY_NOT = why_not()
APART = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
WATCHES = [
    pytest.param(("watch", "--observer", "sock_diag"), id="watch"),
    pytest.param(("watch", "--isolated"), id="isolated", marks=APART),
    pytest.param(("exec",), id="exec", marks=APART),
]
OBEDIENT = """
import signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: (time.sleep(0.2), sys.exit(number)))
print("ready", flush=True)
time.sleep(1000)
"""

APART_FROM_THE_TERMINAL = """
import os, signal, sys, time
os.setpgid(0, 0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: sys.exit(number))
print("ready", flush=True)
time.sleep(1000)
"""


def begin(watch: tuple[str, ...], *program: str, **how: object) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "timewait", *watch, "--", *program],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who tests may ignore it
        **how,
    )


def until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if word in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("watch", WATCHES)
def test_a_signal_is_passed_on_and_what_follows_is_watched(
    watch: tuple[str, ...], number: signal.Signals
) -> None:
    with begin(watch, sys.executable, "-c", OBEDIENT) as process:
        until(process, "ready")
        process.send_signal(number)
        assert process.wait() == number  # as the program chose: it was let finish


@pytest.mark.parametrize("watch", WATCHES)
def test_killed_it_takes_the_program_along(watch: tuple[str, ...]) -> None:
    with begin(watch, "sh", "-c", "echo ready $$; exec sleep 1000") as process:
        pid = until(process, "ready").split()[1]
        process.kill()
    status = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 30
    while status.exists() and ") Z " not in status.read_text():  # (its new parent may be slow)
        assert time.monotonic() < deadline
        time.sleep(0.01)


@APART
@pytest.mark.parametrize("watch", [("exec",), ("watch", "--isolated")])
def test_killed_it_takes_all_along_that_is_in_its_private_network(watch: tuple[str, ...]) -> None:
    script = "(sleep 1000 & setsid sleep 1000 & echo ready $!; wait) & wait"
    with begin(watch, "sh", "-c", script) as process:
        until(process, "ready")
        assert process.stdout is not None
        process.kill()
        assert "ready" not in process.stdout.read()  # it ends: nobody has it any more


@APART
def test_begun_without_standard_input_it_is_not_taken_for_killed() -> None:
    line = (sys.executable, "-m", "timewait", "exec", "--", "sh", "-c", "sleep 0.2; echo done >&2")
    without = ("sh", "-c", 'exec "$@" <&-', "sh", *line)
    ended = subprocess.run(without, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.startswith("done\n")


def test_the_terminals_ctrl_c_is_not_passed_on_as_well() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        watch = ("watch", "--observer", "sock_diag", "--", sys.executable, "-c")
        os.execv(
            sys.executable, [sys.executable, "-m", "timewait", *watch, APART_FROM_THE_TERMINAL]
        )
    todo = [
        (b"ready", lambda: os.write(terminal, b"\x03")),
        # That was sent to all in the foreground, which the program is not.
        (b"^C", lambda: os.kill(pid, signal.SIGTERM)),
    ]
    out = b""
    with suppress(OSError):  # how a terminal says that nobody has it any more
        while part := os.read(terminal, 1000):
            out += part
            if todo and todo[0][0] in out:
                todo.pop(0)[1]()
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == signal.SIGTERM

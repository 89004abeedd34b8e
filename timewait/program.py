"""A program that is run to be watched: what signals it is its own affair, and it ends with us.

A signal to end is passed on, and what the program then does is watched to its
end. Ctrl-C is not: a terminal sends it to the program as well.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD, fcntl
from types import FrameType
from typing import Final, TypeAlias

__all__ = ["Start", "exit_status", "none_outlives_us", "passing_signals_on"]

Start: TypeAlias = Callable[[Sequence[str], int | None], subprocess.Popen[bytes]]

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
_PATIENCE: Final = 10.0  # seconds for killed processes to be gone
_STEP: Final = 0.01
_TERMINAL_SENDS: Final = ("SIGINT", "SIGQUIT", "SIGHUP")  # Windows has not all of them
_PASSED_ON: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", *_TERMINAL_SENDS) if hasattr(signal, name)
)


@contextmanager
def passing_signals_on() -> Iterator[Start]:
    """Pass signals to end on to the program that is started inside, from now on.

    Yields what starts it: `start(argv, stdout)`, which raises `OSError` where
    it cannot. If this process is killed so is the program (Linux).
    """
    programs: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        if number != signal.SIGTERM and _in_foreground():
            return
        early.extend(() if programs else (number,))
        for program in programs:
            program.send_signal(number)

    def start(argv: Sequence[str], stdout: int | None) -> subprocess.Popen[bytes]:
        program = subprocess.Popen(argv, stdout=stdout, preexec_fn=_killed_with_parent())
        programs.append(program)
        for number in early:
            program.send_signal(number)
        return program

    before = {
        number: signal.signal(number, pass_on)
        for number in _PASSED_ON
        if signal.getsignal(number) is not signal.SIG_IGN  # as of a shell's background job
    }
    try:
        yield start
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def none_outlives_us() -> Iterator[int]:
    """If this process is killed inside, end all others in its network namespace, a private one.

    Yields the process that sees to it, a child of this one. Linux only, and
    before there are threads.
    """
    theirs, ours = os.pipe()
    guard = os.fork()
    if not guard:
        try:
            os.close(ours)
            _guard(theirs)
        finally:
            os._exit(0)
    os.close(theirs)
    try:
        yield guard
    finally:
        os.write(ours, b"\n")
        os.close(ours)
        os.waitpid(guard, 0)


def _guard(line: int) -> None:
    line = fcntl(line, F_DUPFD, 3)  # (it is below where this process began without them)
    os.setsid()  # what a terminal sends is not for it
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    if os.read(line, 1):
        return  # it has ended, and not been killed
    here, until = os.readlink("/proc/self/ns/net"), time.monotonic() + _PATIENCE
    left = True
    while left and time.monotonic() < until:
        left = False
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with suppress(OSError):  # ended, or somebody else's
                if pid != os.getpid() and os.readlink(f"/proc/{pid}/ns/net") == here:
                    os.kill(pid, signal.SIGKILL)
                    left = True
        time.sleep(_STEP)


def exit_status(program: subprocess.Popen[bytes]) -> int:
    """How it ended, as a shell tells it: 128 + n where signal n killed it."""
    status = program.wait()
    return status if status >= 0 else 128 - status


def _in_foreground() -> bool:
    """Whether a terminal's Ctrl-C goes to this process, and so to its program."""
    try:
        with open("/dev/tty") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _killed_with_parent() -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def between_fork_and_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it is dead already
            os.kill(os.getpid(), signal.SIGKILL)

    return between_fork_and_exec

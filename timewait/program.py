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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Final, TypeAlias

__all__ = ["Start", "exit_status", "passing_signals_on"]

Start: TypeAlias = Callable[[Sequence[str], int | None], subprocess.Popen[bytes]]

_PR_SET_PDEATHSIG: Final = 1  # prctl(2)
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

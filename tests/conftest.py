"""What tests share: an ordinary user, a copy of the package that one can read, and patience."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import timewait

# A shell's background job ignores Ctrl-C, and so would every command that is interrupted here.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No property takes longer for what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session")
def importable() -> Iterator[Path]:
    """A copy of the package that any user can read.

    Not in pytest's own folders, which any pytest that begins meanwhile closes to other users.
    """
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o755)
        shutil.copytree(
            Path(timewait.__file__).parent,
            home / "timewait",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        yield home


@pytest.fixture(scope="session")
def nobody() -> tuple[str, ...]:
    """The beginning of a command line that runs the rest as an ordinary user."""
    become = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    tried = subprocess.run([*become, sys.executable, "-c", ""], capture_output=True, text=True)
    if tried.returncode:  # (a Python in somebody's home, whose library nobody else can read)
        pytest.skip(f"user nobody cannot run this Python: {tried.stderr.strip()}")
    return become


@contextmanager
def _watched_for_stops() -> Iterator[list[float]]:
    """For how many seconds a processor kept this process waiting whenever it wanted to go on."""
    stops, over = [0.0], threading.Event()

    def beat(processor: int) -> None:
        with suppress(OSError):  # (it was taken away)
            os.sched_setaffinity(0, {processor})
        while not over.is_set():
            before = time.monotonic()
            time.sleep(0.005)
            stops.append(time.monotonic() - before - 0.005)

    some = sorted(os.sched_getaffinity(0))[:4]
    beats = [threading.Thread(target=beat, args=(each,)) for each in some]
    for each in beats:
        each.start()
    try:
        yield stops
    finally:
        over.set()
        for each in beats:
            each.join()


@pytest.fixture(scope="session")
def undisturbed() -> Callable[..., None]:
    """Does what the clocks of the kernel run beside, and asserts what came of it.

    Where that fails and a processor stood still meanwhile, for longer than `within` seconds, it
    was not the act that failed: it is done again.
    """

    def do(act: Callable[[], object], within: float = 0.01, times: int = 8) -> None:
        for again in reversed(range(times)):
            try:
                with _watched_for_stops() as stops:
                    act()
            except Exception:
                if max(stops) <= within or not again:
                    raise
            else:
                return

    return do

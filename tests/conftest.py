"""What tests share: an ordinary user, and a copy of the package that one can read."""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
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

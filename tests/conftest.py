"""What tests share: an ordinary user, and a copy of the package that one can read."""

import shutil
from pathlib import Path

import pytest

import timewait


@pytest.fixture(scope="session")
def importable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package that any user can read."""
    home = tmp_path_factory.mktemp("home")
    for path in (home, *home.parents[:2]):
        path.chmod(0o755)
    shutil.copytree(
        Path(timewait.__file__).parent,
        home / "timewait",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return home


@pytest.fixture(scope="session")
def nobody() -> tuple[str, ...]:
    """The beginning of a command line that runs the rest as an ordinary user."""
    return ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")

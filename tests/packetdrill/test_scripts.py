"""The suite of scripts beside this file, on each stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from timewait.kernel.wire import Wire, WireError
from timewait.packetdrill import play

SCRIPTS = sorted(Path(__file__).parent.glob("*.pkt"))
STACKS = ["kernel"]


@pytest.fixture(scope="session")
def can_wire() -> None:
    try:
        Wire().close()
    except WireError as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.usefixtures("can_wire")
def test_script(path: Path, stack: str) -> None:
    outcome = play(path, on=stack)
    assert outcome.outcome == "passed", f"{outcome.line}: {outcome.why}\n{outcome.diagram}"

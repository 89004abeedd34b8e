"""The suite of scripts beside this file, on each stack."""

from __future__ import annotations

from pathlib import Path

import pytest

from timewait.kernel.wire import WireError
from timewait.packetdrill import play

SCRIPTS = sorted(Path(__file__).parent.glob("*.pkt"))
STACKS = ["model", "kernel"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stack", STACKS)
def test_script(path: Path, stack: str) -> None:
    try:
        outcome = play(path, on=stack)
    except WireError as why:
        pytest.skip(str(why))
    assert outcome.outcome == "passed", f"{outcome.line}: {outcome.why}\n{outcome.diagram}"

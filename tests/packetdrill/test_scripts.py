"""The suite of scripts beside this file, on each stack."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from timewait.kernel.wire import WireError
from timewait.packetdrill import Outcome, play

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("*.pkt"))
STATES = sorted((HERE / "grid").iterdir())
STACKS = ["model", "kernel"]


def wrong(outcome: Outcome) -> str | None:
    if outcome.outcome == "passed":
        return None
    return f"{outcome.path}:{outcome.line}: {outcome.why}\n{outcome.diagram}"


def played(path: Path, stack: str) -> Outcome:
    """What becomes of a script; on the kernel, in real time, a late one plays again."""
    outcome = play(path, on=stack)
    for _ in range(2):
        if stack == "kernel" and "(tolerance " in outcome.why:
            outcome = play(path, on=stack)
    return outcome


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stack", STACKS)
def test_script(path: Path, stack: str) -> None:
    try:
        assert wrong(played(path, stack)) is None
    except WireError as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("state", STATES, ids=lambda path: path.name)
@pytest.mark.parametrize("stack", STACKS)
def test_grid(state: Path, stack: str) -> None:
    """Every kind of segment at every place of the window, in one state."""
    scripts = sorted(state.glob("*.pkt"))
    try:
        # On the kernel most of a script is waiting: several wait at once.
        with ThreadPoolExecutor(6 if stack == "kernel" else 1) as pool:
            outcomes = list(pool.map(lambda path: played(path, stack), scripts))
    except WireError as why:
        pytest.skip(str(why))
    assert [text for outcome in outcomes if (text := wrong(outcome))] == []


def test_the_grid_is_whole() -> None:
    """Ten states and more, nine kinds of segments, five places where a window has them."""
    assert len(STATES) == 13
    windows = [s for s in STATES if s.name not in ("closed", "listen", "syn-sent")]
    for state in windows:
        places = {path.stem for path in state.glob("*.pkt")}
        for segment in (
            "fin",
            "fin-ack",
            "ack",
            "rst",
            "rst-ack",
            "syn",
            "syn-ack",
            "syn-fin",
            "data",
        ):
            for place in ("left", "left-edge", "inside", "right-edge", "right"):
                assert f"{segment}-{place}" in places

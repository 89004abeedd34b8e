"""No false pass: mutants of real traces are rejected, or TCP allows them for a named reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from timewait.check import check
from timewait.check.evidence import read
from timewait.events import Event
from timewait.lab.mutate import OPERATORS, Result, mutants, run
from timewait.tcp.profiles import profile

HERE = Path(__file__).parent / "traces"
TRACES = sorted(HERE.glob("*.jsonl"))
OTHERS = [HERE / "loopback.pcap", *sorted(HERE.glob("*/*.jsonl"))]


def trace(path: Path) -> list[Event]:
    return list(read(path, lambda problem: None))


def held_to(paths: list[Path]) -> Result:
    result = Result()
    for path in paths:
        run(trace(path), result=result)
    kinds = {name: outcome.examples for name, outcome in result.outcomes.items()}
    assert result.unexplained == 0, kinds
    return result


def test_one_run_of_the_kernel() -> None:
    result = held_to([path for path in TRACES if path.stem == "server-first"])
    assert len(result.outcomes) >= 20
    assert result.rejected > 0.95 * result.made


@pytest.mark.slow
@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_segments_alone_looks_alone_and_every_other_trace(path: Path) -> None:
    result = held_to([path])
    assert result.rejected > 0.75 * result.made


@pytest.mark.slow
def test_all_of_them_two_thousand_mutants_by_more_than_twenty_operators() -> None:
    result = held_to(TRACES)
    assert result.made >= 2000
    assert len(result.outcomes) >= 20
    assert result.rejected > 0.95 * result.made


@pytest.mark.parametrize(
    "operator",
    [
        "time-wait-on-the-wrong-side",
        "time-wait-two-seconds-short",
        "time-wait-missing",
        "rst-invented",
        "sequence-off-by-one",
        "ack-of-unsent",
        "bind-should-fail",
        "ack-of-fin-dropped",
    ],
)
def test_none_of_these_passes(operator: str) -> None:
    made = 0
    for path in TRACES:
        if path.stem in ("server-first", "unread-data"):
            for mutant in mutants(trace(path), operators=[operator]):
                made += 1
                assert not check(mutant.events), f"{path.stem} event {mutant.at} {mutant.what}"
    assert made > 0


@pytest.mark.parametrize("operator", ["segment-dropped", "segments-swapped", "time-wait-missing"])
def test_none_of_these_passes_a_capture_and_looks(operator: str) -> None:
    events = trace(Path(__file__).parent / "traces" / "observers" / "capture.jsonl")
    made = list(mutants(events, operators=[operator]))
    assert made
    for mutant in made:
        assert not check(mutant.events), f"event {mutant.at} {mutant.what}"


def test_every_operator_changes_something_somewhere() -> None:
    used = {m.operator for path in TRACES for m in mutants(trace(path))}
    assert used == set(OPERATORS)


def test_a_trace_that_does_not_conform_teaches_nothing() -> None:
    events = trace(TRACES[0])
    slow = {"server": profile("rfc9293"), "client": profile("rfc9293")}
    wrong = next(m for m in mutants(events) if m.operator == "transition-dropped")
    with pytest.raises(ValueError, match="does not conform"):
        run(wrong.events, profiles=slow)

"""The port table against the kernel's: one combination in fifteen, and that a wrong rule shows."""

import json
import random

import pytest

from timewait.cli import main as timewait
from timewait.kernel.namespace import why_not
from timewait.lab import matrix
from timewait.sim import ports

WHY_NOT = why_not()
needs_namespace = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def some_cases(count: int) -> list[matrix.Case]:
    return random.Random("ports").sample(list(matrix.every_case()), count)


@needs_namespace
def test_kernel_and_model_agree_on_who_may_take_a_held_port():
    cases = some_cases(2500)
    kernel, model = matrix.on_kernel(cases), matrix.on_model(cases)
    assert [
        f"{case}: kernel {theirs}, model {ours}"
        for case, theirs, ours in zip(cases, kernel, model, strict=True)
        if theirs != ours
    ] == []
    # All kinds of outcome are among them, so that agreement means something.
    assert {"ok", "bind: EADDRINUSE", "listen: EADDRINUSE", "connect: EADDRNOTAVAIL"} <= set(kernel)


@needs_namespace
def test_a_model_that_forgets_the_holders_option_is_found_out(monkeypatch):
    def only_the_newcomer_counts(self, bucket, new, relax, reuse_port_ok):
        return bool(set(bucket.owners) - {new}) and not new.reuse_address

    monkeypatch.setattr(ports.PortTable, "_conflict", only_the_newcomer_counts)
    cases = some_cases(300)
    assert matrix.on_kernel(cases) != matrix.on_model(cases)


def test_there_are_more_than_ten_thousand_combinations():
    cases = list(matrix.every_case())
    assert len(cases) == len(set(cases)) == 38_416


def test_the_command_prints_one_document(capsys, monkeypatch):
    cases = some_cases(200)
    monkeypatch.setattr(matrix, "every_case", lambda: iter(cases))
    with pytest.raises(SystemExit) as done:
        timewait(["matrix", "--on", "model", "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["cases"] == 200
    assert document["disagree"] == []
    assert document["agree"] is None  # one stack alone agrees with nobody


def test_the_table_is_printed_for_reading(capsys, monkeypatch):
    cases = [
        matrix.Case("time-wait-server", "127.0.0.1", held, "listen", "127.0.0.1", new)
        for held in matrix.OPTIONS
        for new in matrix.OPTIONS
    ]
    monkeypatch.setattr(matrix, "every_case", lambda: iter(cases))
    with pytest.raises(SystemExit):
        timewait(["matrix", "--on", "model"])
    line = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("time-wait-server")
    )
    # The rule of the shared facts: both had SO_REUSEADDR, or both SO_REUSEPORT.
    assert line.split("  ")[1].strip() == "listen"
    assert line.split()[2:] == ["none", "A", "AP", "P", "AP", "A", "P", "AP"]

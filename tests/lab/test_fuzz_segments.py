"""The differential machine: a kernel and a model that differ are told apart, and how."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TypeAlias

import pytest
from attrs import evolve

from timewait.kernel.wire import WireError
from timewait.lab.coverage import counted, table
from timewait.lab.segment_cases import View
from timewait.lab.segments import (
    Case,
    Fuzzer,
    Step,
    _goes_after_timeout,
    _in_smaller_pieces,
    _Kernel,
    _script,
    _Sent,
    _Trace,
    _waits_after_timeout,
)
from timewait.packetdrill import play
from timewait.tcp.connection import Connection
from timewait.tcp.profiles import profile
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN, Segment
from timewait.tcp.states import Event, State

Undisturbed: TypeAlias = Callable[..., None]
HANDSHAKE = (
    Step("", 0, SYN),
    Step("", 0, ACK, 1, 0, 1),
    Step("accept"),
)
# RFC 5961: in the window but not at RCV.NXT, and so challenged.
CHALLENGED = Case(False, False, (*HANDSHAKE, Step("", 0, RST, 101)))


@pytest.fixture
def kernel() -> Iterator[_Kernel]:
    try:
        made = _Kernel()
    except WireError as why:
        pytest.skip(str(why))
    yield made
    made.close()


def test_kernel_and_model_agree_on_a_challenge(kernel: _Kernel, undisturbed: Undisturbed) -> None:
    fuzzer = Fuzzer(1)

    def agree() -> None:
        ((case, trace),) = kernel.run([(CHALLENGED, None)], gaps=(0.03, 0.03))
        assert [str(sent) for sent in trace.sent] == ["S. 0:0(0) ack 1", ". 1:1(0) ack 1"]
        assert trace.states == ["SYN_RECEIVED", "ESTABLISHED", "ESTABLISHED", "ESTABLISHED"]
        assert fuzzer._judge(case, trace) is None

    undisturbed(agree)


def test_another_profile_is_found_out_and_its_script_passes_on_the_kernel(
    kernel: _Kernel, tmp_path: object, undisturbed: Undisturbed
) -> None:
    """An ACK far beyond what was sent: another stack answers it at once, every time."""
    flood = tuple(Step("", 0, RST, 101) for _ in range(4))
    noise = (Step("recv", 10), Step("send", 10), Step("", 0, ACK, 1, 0, 11))
    fuzzer = Fuzzer(1, "windows")

    def found_out() -> None:
        case = Case(False, False, (*HANDSHAKE, *noise, *flood))
        ((played, trace),) = kernel.run([(case, None)], gaps=(0.03, 0.03))
        assert fuzzer._judge(played, trace) is not None
        assert fuzzer._confirmed(kernel, [played]) == [played]
        found = fuzzer._shrunk(kernel, played)
        assert found is not None
        assert (found.about, found.kernel) == ("segment", "nothing")  # Linux limits the rate
        assert len(found.case.steps) < len(case.steps)
        path = f"{tmp_path}/found.pkt"
        with open(path, "w") as script:
            script.write(found.script())
        outcome = play(path, on="kernel")
        assert outcome.outcome == "passed", outcome.why

    undisturbed(found_out)


def test_a_script_echoes_what_the_stack_told(
    kernel: _Kernel, tmp_path: Path, undisturbed: Undisturbed
) -> None:
    """An ACK that echoes another's timestamp would complete no handshake."""
    steps = (*HANDSHAKE, Step("send", 10), Step("", 0, ACK, 1, 0, 11), Step("", 0, RST, 101))
    case = Case(False, True, tuple(evolve(step, ts="" if step.call else "now") for step in steps))
    path = tmp_path / "echo.pkt"

    def passes() -> None:
        ((played, trace),) = kernel.run([(case, None)], gaps=(0.03, 0.03))
        path.write_text("\n".join(_script(played, trace)))
        assert "ESTABLISHED" in path.read_text()
        for stack in ("kernel", "model"):
            outcome = play(path, on=stack)
            assert outcome.outcome == "passed", outcome.why

    undisturbed(passes)


def test_a_seed_decides_what_is_tried() -> None:
    def steps(seed: str) -> list[str]:
        dice, view = Random(seed), View()
        case = Case.fresh(dice, "")
        beginning = [case.begin(dice, n) for n in range(3)]
        return [str(s) for s in beginning] + [
            str(view.step(dice, case, "ESTABLISHED", True)) for _ in range(20)
        ]

    assert steps("a") == steps("a") != steps("b")


def test_the_command_counts_its_steps() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "timewait", "fuzz", "segments", "--count", "64", "--seed", "5",
         "--json"],
        capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    if ran.returncode == 2:
        pytest.skip(ran.stderr)
    told = json.loads(ran.stdout)
    assert told["steps"] >= 64
    assert told["seed"] == "5"
    assert ran.returncode == bool(told["differences"])


def test_the_models_window_ends_where_the_kernel_said(
    kernel: _Kernel, undisturbed: Undisturbed
) -> None:
    """Text out of order, then much of it: where the window ends is the kernel's memory's."""
    far = Step("", 0, ACK | PSH, 64240, 100, 1)
    near = Step("", 0, ACK | PSH, 1, 1000, 1)

    def ends_there() -> None:
        case = Case(False, False, (*HANDSHAKE, far, near))
        ((played, trace),) = kernel.run([(case, None)], gaps=(0.03, 0.03))
        assert trace.edges[-1] is not None
        beyond = Step("", 0, ACK, trace.edges[-1] + 1, 0, 1)
        case = Case(False, False, (*HANDSHAKE, far, near, beyond, Step("wait", 100)))
        ((played, trace),) = kernel.run([(case, None)], gaps=(0.03, 0.03))
        assert Fuzzer(1)._judge(played, trace) is None
        trace.edges = [edge and edge + 500 for edge in trace.edges]
        assert Fuzzer(1)._judge(played, trace) is not None

    undisturbed(ends_there)


def test_what_was_reached_is_counted() -> None:
    reached: Counter[tuple[State, Event]] = Counter()
    linux = counted(profile("linux"), reached)
    connection = Connection(linux, iss=0)
    connection.open_active(0.0)
    connection.segment(Segment(seq=0, ack=1, flags=SYN | ACK, window=1000), 0.1)
    connection.close(0.2)
    assert reached == {
        (State.CLOSED, Event.OPEN_ACTIVE): 1,
        (State.SYN_SENT, Event.SYN_ACK): 1,
        (State.ESTABLISHED, Event.CLOSE): 1,
    }
    lines = table(reached, linux).splitlines()
    assert lines[1 + Event.OPEN_ACTIVE].split()[1:3] == ["1", "."]
    assert lines[1 + Event.SYN_ACK].split() == ["SYN_ACK", "1"]  # elsewhere it cannot happen


CUT = (
    Step("connect"),
    Step("", 0, SYN | ACK, 0, 0, 1, 100),
    Step("send", 500),
    Step("", 0, ACK, 1, 0, 101),
    Step("wait", 100),
)
DELAYED = (
    Step("", 0, SYN, wscale=7),
    *HANDSHAKE[1:],
    Step("", 0, FIN | PSH | ACK, 1, 1000, 1),
    Step("wait", 100),
)


def test_what_is_kept_is_told_by_its_name_and_nothing_else_is(
    kernel: _Kernel, undisturbed: Undisturbed
) -> None:
    fuzzer = Fuzzer(1)

    def kept(case: Case, trace: _Trace) -> str | None:
        found = fuzzer._judge(case, trace)
        return None if found is None else found.kept

    def told() -> None:
        (cut, trace), (delayed, ack) = fuzzer._play(
            kernel, [(Case(True, False, CUT), None), (Case(False, False, DELAYED), None)]
        )
        assert kept(cut, trace) is None  # text is cut when it is queued
        # The same pieces, but no window had been small.
        wide = evolve(cut, steps=(CUT[0], evolve(CUT[1], window=65535), *CUT[2:]))
        assert kept(wide, trace) == ""
        assert fuzzer._confirmed(kernel, [delayed]) == []  # it is not unexplained
        at_once = ack.times[3]
        for after, name in ((0.050, "ACK of text and a FIN delayed"), (0.08, ""), (0.0, None)):
            ack.sent[-1] = evolve(ack.sent[-1], t=at_once + after)
            assert kept(delayed, ack) == name

    undisturbed(told)


def sent(t: float, seq: int, length: int) -> _Sent:
    return _Sent(t, ACK, seq, 1, length, False, False)


def test_what_congestion_control_holds_or_lets_go_is_told_narrowly() -> None:
    acked = Case(False, False, (Step("", 0, ACK, 1, 0, 101),))
    after = [sent(0.0, 1, 100), sent(0.3, 1, 100), sent(0.5, 101, 300), sent(0.5, 401, 200)]
    trace = _Trace(times=[0.51], sent=after)
    third = sent(0.51, 601, 200)
    assert _waits_after_timeout(acked, trace, third, None)
    assert not _waits_after_timeout(acked, trace, evolve(third, length=0), None)
    all_acked = Case(False, False, (Step("", 0, ACK, 1, 0, 601),))
    assert not _waits_after_timeout(all_acked, trace, third, None)
    assert not _waits_after_timeout(acked, _Trace(times=[0.51], sent=after[1:]), third, None)

    pieces = _Trace(sent=[*after, sent(0.8, 601, 200), sent(0.8, 801, 200)])
    assert _in_smaller_pieces(pieces, pieces.sent[-2], sent(0.8, 601, 300))
    assert not _in_smaller_pieces(pieces, pieces.sent[-2], sent(0.8, 601, 500))
    assert not _in_smaller_pieces(pieces, pieces.sent[-2], sent(0.9, 601, 300))
    assert not _in_smaller_pieces(_Trace(sent=pieces.sent[-2:]), pieces.sent[-2], pieces.sent[-1])

    joined = _Trace(sent=[sent(0.0, 1, 100), sent(0.5, 101, 100), sent(0.6, 1, 200)])
    new = sent(0.7, 201, 100)
    assert _goes_after_timeout(joined, new, None)
    assert not _goes_after_timeout(joined, new, new)
    alone = _Trace(sent=[sent(0.0, 1, 100), sent(0.5, 101, 100), sent(0.6, 1, 100)])
    assert not _goes_after_timeout(alone, new, None)


def test_sack_blocks_take_room_of_text(kernel: _Kernel, undisturbed: Undisturbed) -> None:
    """While something that came early is told of in a SACK block, text is 12 octets shorter."""
    early = Step("", 0, ACK | PSH, 101, 100, 1)
    steps = (*HANDSHAKE, early, *(Step("send", 1000) for _ in range(3)))

    def shorter() -> None:
        ((case, trace),) = kernel.run([(Case(False, False, steps, sack=True), None)])
        assert [sent.length for sent in trace.sent if sent.length] == [1000, 1448]
        assert Fuzzer(1)._judge(case, trace) is None

    undisturbed(shorter)

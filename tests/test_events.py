import json
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import assume, given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from timewait import State, events
from timewait.events import (
    Called,
    Event,
    Lost,
    Note,
    Problem,
    Restart,
    Row,
    RunEnded,
    RunStarted,
    SegmentSeen,
    Snapshot,
    Transition,
)

SERVER, CLIENT = ("127.0.0.1", 9090), ("127.0.0.1", 47788)
STREAM: list[Event] = [
    RunStarted(0.0, "kernel", "sock_diag", blind=("timers",)),
    Called(0.1, "server", "bind", SERVER, began=0.05),
    Snapshot(0.2, "server listens", (Row(SERVER, ("*", 0), State.LISTEN, inode=7),)),
    Transition(0.3, SERVER, CLIENT, State.LISTEN, State.SYN_RECEIVED, cause="SYN"),
    Note(0.4, "over"),
]


def written(path: Path) -> bytes:
    with events.Writer(path) as write:
        for event in STREAM:
            write(event)
    return path.read_bytes()


def read(data: bytes) -> tuple[list[Event], list[Problem]]:
    problems: list[Problem] = []
    return list(events.read(data.splitlines(keepends=True), problems.append)), problems


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read(written(tmp_path / "run.jsonl")) == ([*STREAM, RunEnded(0.4)], [])


def test_every_stream_of_a_file_that_was_written_to_its_end_says_so(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    with events.Writer(path) as write:
        for event in STREAM * 2:
            write(event)
    write.close()
    assert read(path.read_bytes()) == ([*STREAM, RunEnded(0.4)] * 2, [])


def test_a_file_whose_writer_failed_has_no_end(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write = events.Writer(path)
    write(STREAM[0])
    write.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    (head, lost), problems = read(path.read_bytes())
    assert (head, problems) == (STREAM[0], [])
    assert isinstance(lost, Lost)
    assert (lost.source, lost.t) == (events.REST, 0.0)
    with events.Writer(path):
        pass
    assert path.read_bytes() == b""


number = st.floats(allow_nan=False, allow_infinity=False)
address = st.tuples(st.text(), st.integers(0, 65535))


@given(
    st.one_of(
        st.builds(Called, t=number, local=address, remote=address, result=st.integers()),
        st.builds(Transition, t=number, local=address, remote=address),
        st.builds(Snapshot, t=number, rows=st.lists(st.from_type(Row)).map(tuple)),
        st.builds(Restart, t=number, free_after=number),
        st.builds(SegmentSeen, t=number, ts=st.none() | st.tuples(st.integers(), st.integers())),
        st.builds(Lost, t=number),
    )
)
def test_every_kind_of_event_survives_json(event: Event) -> None:
    assume("nan" not in repr(event))  # which is not equal to itself
    assert events.load(json.loads(json.dumps(events.dump(event)))) == event


def test_every_line_is_in_the_file_before_the_next_event(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    write = events.Writer(path)
    for count, event in enumerate(STREAM, 1):
        write(event)
        assert path.read_bytes().count(b"\n") == count
    write.close()


def test_half_a_line_at_the_end_is_named_and_the_rest_kept(tmp_path: Path) -> None:
    seen, problems = read(written(tmp_path / "run.jsonl")[:-5])
    (told,) = problems
    assert told == Problem(6, "cut off in the middle (its writer was stopped)")
    assert seen == [*STREAM, Lost(0.1, events.REST, 0, str(told))]  # since the last call


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"nonsense\n", "not JSON"),
        (b"[1]\n", "not a JSON object"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b"\xff\xfe\n", "not JSON"),
        (b'{"kind":"party","t":1}\n', 'unknown kind of event "party"'),
        (b'{"kind":"note","t":1}\n', "note without 'text'"),
        (b'{"kind":"note","t":"1","text":""}\n', 'note: a number is expected, not "1"'),
        (b'{"kind":"note","t":Infinity,"text":""}\n', "note: t is in seconds, not inf"),
        (b'{"kind":"note","t":NaN,"text":""}\n', "note: t is in seconds, not nan"),
        (
            b'{"kind":"run","t":0,"stack":"","observer":"","scenario":"x"}\n',
            'run: an object is expected, not "x"',
        ),
        (
            b'{"kind":"run","t":0,"stack":"","observer":"","profiles":[1]}\n',
            "run: an object is expected, not [1]",
        ),
        (
            b'{"kind":"transition","t":1,"local":["a",1],"remote":["b",1],"old":"X","new":"X"}\n',
            "transition: not a TCP state: 'X'",
        ),
    ],
)
def test_a_line_that_is_no_event_is_named_and_left_out(line: bytes, why: str) -> None:
    good = b'{"kind":"note","t":1,"text":"over"}\n'
    over, end = Note(1.0, "over"), RunEnded(1.0)
    told = Problem(2, why)
    lines = good + line + good + json.dumps(events.dump(end)).encode() + b"\n"
    assert read(lines) == ([over, Lost(1.0, "file", 1, str(told)), over, end], [told])
    with pytest.raises(ValueError, match="line 2: "):
        list(events.read([good, line, good]))


def test_fields_and_schemas_of_the_future_are_told_and_passed_over() -> None:
    record: dict[str, Any] = events.dump(STREAM[0]) | {"mood": "good", "schema": 9}
    seen, problems = read(json.dumps(record).encode() + b"\n")
    assert [event.kind for event in seen] == ["run", "lost"]  # what it says, and no end
    assert {problem.why for problem in problems} == {
        "run has an unknown field 'mood', passed over",
        "schema 9 is newer than this one's 2",
    }


def test_events_go_to_a_configured_structlog_and_nowhere_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    structlog.reset_defaults()
    events.log(STREAM[3])
    assert capsys.readouterr() == ("", "")
    structlog.configure()
    try:
        with capture_logs() as logged:
            events.log(STREAM[3])
    finally:
        structlog.reset_defaults()
    assert logged[0]["event"] == "transition"
    assert logged[0]["new"] == "SYN_RECEIVED"

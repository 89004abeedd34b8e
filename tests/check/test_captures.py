"""Captures as they are made: late, of one direction, overtaken, with text in the SYN."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from attrs import evolve

from timewait.check import Answers, Checker, Connection, Verdict, answers, check
from timewait.check.evidence import read
from timewait.events import (
    USED_AGAIN,
    Address,
    Called,
    Event,
    Restart,
    SegmentSeen,
    Snapshot,
    Transition,
)
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN
from timewait.tcp.states import State

TRACES = Path(__file__).parent / "traces"
LOCAL = (("127.0.0.1", 9090), ("127.0.0.1", 40000))
APART = (("10.2.0.1", 9090), ("10.1.0.1", 40000))
FLAGS = {"SYN": SYN, "RST": RST, "ACK": ACK, "FIN": FIN | ACK, "TXT": PSH | ACK}
FLAGS |= {"SYNACK": SYN | ACK, "RSTACK": RST | ACK, "FINTXT": FIN | PSH | ACK}


def seen(lines: str, ends: tuple[Address, Address] = LOCAL) -> list[Event]:
    """Segments: a time in ms, whose (c, s), flags, seq, ack, and how much text."""
    found: list[Event] = []
    for line in lines.split("|"):
        t, who, what, seq, ack, *length = line.split()
        src, dst = ends if who == "s" else ends[::-1]
        octets = int(length[0]) if length else 0
        found.append(
            SegmentSeen(float(t) / 1000, src, dst, FLAGS[what], int(seq), int(ack), octets, 512)
        )
    return found


def told(events: Iterable[Event]) -> tuple[Verdict, list[Answers]]:
    found: list[Answers] = []

    def ended(connection: Connection) -> None:
        found.append(answers(connection))

    checker = Checker(on_end=ended)
    for event in events:
        checker.feed(event)
    return checker.verdict(), found


OVER = "1 s FIN 9 5|2 c FIN 5 10|3 s ACK 10 6"
OPEN = "0 c SYN 4 0|0.01 s SYNACK 8 5|0.02 c ACK 5 9|"


@pytest.mark.parametrize(
    ("ends", "lines"),
    [
        # As tcpdump showed them on Linux 6.18, both processors busy.
        (LOCAL, "1 c FIN 5 9|1.9 c ACK 5 9|2 s FIN 9 6|2.1 c ACK 6 10"),
        (LOCAL, "1 c TXT 5 9 4|1.1 c FIN 9 9|9 s TXT 9 10 7|9.1 c RST 10 0|11 c FIN 9 9"),
        (LOCAL, "1 s FIN 9 5|1.1 c ACK 652 10|3 c FINTXT 5 9 646|3.1 s ACK 10 652"),
        (APART, "1 s TXT 9 5 100|1.1 c RSTACK 5 109|1.13 c ACK 5 109"),
        # A probe comes when the peer has been silent, even if its last was acknowledged late.
        (LOCAL, "1 c TXT 5 9 100|42 s ACK 9 105|206 s ACK 8 105|206.1 c ACK 105 9"),
        # Text that tcpdump's buffer had no room for: the peer has it, and its sender goes on.
        (LOCAL, "1 c TXT 5 9 9|2 s ACK 9 105|3 c TXT 105 9 4|3.1 s ACK 9 109"),
        (LOCAL, "1 c TXT 5 9 9|2 c TXT 114 9 5|3 s ACK 9 119"),
        (LOCAL, "1 c TXT 5 9 9|2 s ACK 9 999999|3 c FIN 999999 9"),
        # An orphan whose FIN_WAIT_2 was over after a second (tcp_fin_timeout, TCP_LINGER2).
        (LOCAL, "1 c FIN 5 9|1.1 s ACK 9 6|1350 s FIN 9 6|1350.1 c RST 6 0"),
    ],
)
def test_what_overtakes_what_or_repeats_it_conforms(
    ends: tuple[Address, Address], lines: str
) -> None:
    verdict, _ = told(seen(OPEN + lines, ends))
    assert verdict, verdict.explain()


@pytest.mark.parametrize(
    "lines",
    [
        # Windows and browsers: a reset ends what was said, or answers what comes after the close.
        "1 s FIN 9 5|1.1 c ACK 5 10|500 c RSTACK 5 10",
        "1 c TXT 5 9 200|20 s TXT 9 205 1000|60 c ACK 205 1009|900 c RSTACK 205 1009",
        "1 c FIN 5 9|1.1 s ACK 9 6|2 s TXT 9 6 31|2.1 c RSTACK 6 40",
        "1 c FIN 5 9|2 s TXT 9 6 31|2.1 s FIN 40 6|3 c RST 6 0|3.1 c RST 6 0",
        "1 s FIN 9 5|2 c FIN 5 10|3 s ACK 10 6|3.1 c RSTACK 6 10",
        # A keep-alive with an octet of garbage.
        "1 c TXT 5 9 9|2 s ACK 9 14|9000 c ACK 13 9 1|9001 s ACK 9 14|9500 c FIN 14 9",
        # Segments larger than any MTU, as before and after segmentation by the hardware.
        "1 c TXT 5 9 65000|1.2 c TXT 65005 9 64240|2 s ACK 9 1453|3 s ACK 9 129245",
        # Text that the capture missed: before what follows, at the end, and a FIN.
        "1 s ACK 9 105|2 c TXT 105 9 20|3 s ACK 9 125",
        "1 c TXT 5 9 20|2 s ACK 9 125|3 s FIN 9 125|4 c ACK 125 10",
        "1 s ACK 9 6|2 s FIN 9 6|3 c ACK 6 10",
        "1 s ACK 9 6|2 c ACK 6 9|220 c FIN 5 9|221 s ACK 9 6",
        # Acknowledgments that others have overtaken, and a copy of text from long before.
        "1 c TXT 5 9 50|1.1 c TXT 55 9 50|2 s ACK 9 105|2.1 s ACK 9 55|2.2 s ACK 9 30",
        "1 c TXT 5 9 50|2 s ACK 9 55|3 c FIN 55 9|4 s ACK 9 56|4.1 c TXT 5 9 50|5 s FIN 9 56",
        # How another connection between the addresses began: its SYN,ACK missed, the SYN, or both.
        f"{OVER}|1000 c SYN 900000 0|1002 c ACK 900001 65548|1003 c TXT 900001 65548 5",
        f"{OVER}|1000 s SYNACK 65547 900001|1002 c ACK 900001 65548|1003 c TXT 900001 65548 5",
        f"{OVER}|1002 c ACK 900001 65548|1003 c TXT 900001 65548 5|1004 s ACK 65548 900006",
        "1 s FIN 9 5|2 c FIN 5 10|1002 c ACK 900001 65548|1003 c TXT 900001 65548 5",
    ],
)
def test_what_captures_between_hosts_often_show_conforms(lines: str) -> None:
    verdict = check(seen(OPEN + lines, APART))
    assert verdict, verdict.explain()


@pytest.mark.parametrize(
    "lines",
    [
        "1 s ACK 9 105|2 c TXT 5 9 120",  # acknowledged, and its sender begins before
        "1 s ACK 9 99999999|2 c ACK 5 9",  # more than can have passed
        "1 c TXT 99999999 9 20|2 s ACK 9 5",
        "1 c FIN 5 9|2 s ACK 9 7",  # after the FIN
        "1 c FIN 5 9|1.1 c TXT 6 9 5",
        "1 s FIN 9 5|2 c FIN 5 10|3 s ACK 10 6|1000 c ACK 6 11",
    ],
)
def test_what_no_capture_between_hosts_can_show(lines: str) -> None:
    assert not check(seen(OPEN + lines, APART))


def test_where_the_capture_lacks_segments_is_told_once() -> None:
    lines = "1 s ACK 9 105|2 c TXT 105 9 20|3 s ACK 9 225|4 c TXT 225 9 20|5 s ACK 9 245"
    (problem,) = check(seen(OPEN + lines, APART)).evidence.problems
    assert problem.endswith(
        "ACK seq=9 ack=105 at 0.001000 s: the capture lacks segments before it, or they were "
        "never sent"
    )


def test_addresses_used_again_out_of_time_wait_and_a_connect_that_finds_it_there() -> None:
    # Linux 6.18 without timestamps: connect() fails, and its SYN_SENT has replaced nothing.
    events = list(read(TRACES / "captured" / "addresses-used-again.jsonl", print))
    assert {e.cause for e in events if isinstance(e, Transition)} == {None, USED_AGAIN}
    verdict = check(events)
    assert verdict, verdict.explain()


def test_a_socket_connected_to_itself_is_told_and_not_checked() -> None:
    here = ("127.0.0.1", 6500)
    lines = "0 c SYN 4 0|1 c SYNACK 4 5|2 c ACK 5 5|3 c TXT 5 5 9|4 c ACK 14 14"
    way = [State.SYN_SENT, State.SYN_RECEIVED, State.ESTABLISHED]
    states: list[Event] = [
        Transition(0.001, here, here, *two, "tracepoint") for two in pairwise(way)
    ]
    verdict = check([*seen(lines, (here, here)), *states])
    assert verdict.evidence.problems == ("127.0.0.1:6500 is connected to itself: not checked",)
    assert verdict


def test_a_capture_may_begin_with_a_probe_of_the_window() -> None:
    verdict = check(seen("0 s ACK 8 5|0.1 c ACK 5 9|300 s RSTACK 9 5"))
    assert verdict, verdict.explain()


def test_a_table_is_read_row_by_row() -> None:
    """Of two rows one may be from before the close that was made meanwhile, one from after."""
    trace = read(TRACES / "server-first.jsonl", print)
    # Without what else tells when the table was read.
    events = [e for e in trace if not (isinstance(e, Called) or getattr(e, "sampled", False))]
    at, table = next(
        (i, e) for i, e in enumerate(events) if isinstance(e, Snapshot) and "closes" in e.label
    )

    def read_as(state: State) -> Verdict:
        rows = tuple(
            row if row.state is State.LISTEN else evolve(row, state=state, seconds_left=None)
            for row in table.rows
        )
        return check([*events[:at], evolve(table, rows=rows), *events[at + 1 :]])

    assert {row.state for row in table.rows} <= {State.LISTEN, State.TIME_WAIT}  # the server's
    assert read_as(State.ESTABLISHED), read_as(State.ESTABLISHED).explain()
    assert not read_as(State.LAST_ACK)


def test_text_in_the_syn_conforms() -> None:
    # RFC 7413, as Linux 6.18 does it: the server answers before the handshake is done.
    lines = (
        "0 c SYN 4 0 150|0.01 s SYNACK 8 155|0.015 s TXT 9 155 500|0.02 c ACK 155 9|"
        "0.03 c ACK 155 509|1 s FIN 509 155|2 c FIN 155 510|2.1 s ACK 510 156"
    )
    verdict, (answer,) = told(seen(lines))
    assert verdict, verdict.explain()
    assert answer.closed_first == "server"
    half = lines.replace("SYNACK 8 155", "SYNACK 8 100")  # all of the text, or none
    assert not check(seen(half))


def test_a_socket_bound_to_the_port_connects_out_of_an_orphans_fin_wait_2() -> None:
    # As Linux 6.18 did it: the number goes on from the small socket's, the old server objects.
    lines = (
        "1 c FIN 5 9|42 s ACK 9 6|47 c SYN 65543 0|47.1 s ACK 9 6|47.2 c RST 6 0|"
        "1047 c SYN 65543 0|1047.1 s SYNACK 700 65544|1047.2 c ACK 65544 701"
    )
    verdict = check(seen(OPEN + lines))
    assert verdict, verdict.explain()
    unacknowledged = OPEN + "1 c FIN 5 9|47 c SYN 65543 0"  # FIN_WAIT_1 is nobody's to take
    assert not check(seen(unacknowledged))


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ("0 c SYN 4 0|0.02 c ACK 5 9|1 s FIN 9 5|1.1 c ACK 5 10", "RFC 9293 §3.5:"),
        ("0 c SYN 4 0|0.01 c ACK 5 9|0.02 s SYNACK 8 5|1 s FIN 9 5", "RFC 9293 §3.4"),
        ("0 s SYN 4 0|0.01 s SYNACK 8 5|0.02 c ACK 5 9", "RFC 9293 §3.4"),
        (OPEN + "1 s FIN 9 5|1.1 s RST 10 0|1.2 c ACK 5 10", "RFC 9293 §3.5.2"),  # in answer to?
        (OPEN + "1 s FIN 9 5|2 c ACK 5 10|700 s RST 10 0", "RFC 9293 §3.5.2"),  # so late?
        (OPEN + "1 s FIN 9 5|1.1 c ACK 5 10|2 s RSTACK 9 5", "RFC 9293 §3.5.2"),  # not SND.NXT
        ("0 c SYN 4 0|0.01 s RSTACK 1 5", "RFC 9293 §3.5.2"),
        (OPEN + "1 c TXT 4 9 1|1.1 s ACK 9 5", "RFC 9293 §3.4"),  # where the SYN was
        (OPEN + "1 c TXT 5 9 9|1.1 c ACK 13 9|1.2 s ACK 9 14", "RFC 9293 §3.4"),
        (OPEN + "1 s FIN 9 5|1.1 c FIN 5 10|1.2 s ACK 9 6", "RFC 9293 §3.4"),
        (OPEN + "1 c FIN 5 9|1.5 c FIN 5 9|2 s FIN 9 6|2.1 c FIN 5 10", "RFC 6298"),
        (OPEN + "1 c TXT 5 9 9|1.1 c TXT 14 9 9|900 s ACK 9 23", "RFC 9293 §3.8.6.3"),
        ("0 c SYN 4 0|0.01 s SYNACK 8 5|0.02 s FIN 9 5|0.03 c ACK 5 9", "RFC 9293 §3.10.4"),
        (OPEN + "1 c ACK 5 9|1.1 c SYN 99 0|1.2 s RSTACK 9 5", "RFC 9293 §3.5"),
        (OPEN + "1 c TXT 5 9 9|2 s ACK 9 105", "RFC 9293 §3.4"),  # and nothing shows that it was
        (OPEN + "1 c TXT 5 9 9|2 s ACK 9 105|3 c TXT 14 9 4", "RFC 9293 §3.4"),
        (OPEN + "1 c TXT 6 9 9|2 c TXT 14 9 9|3 s ACK 9 23", "RFC 9293 §3.4"),
        (OPEN + "1 c TXT 5 9 9|2 s ACK 9 15|3 c ACK 15 9", "RFC 9293 §3.4"),  # a FIN?
    ],
)
def test_what_a_capture_of_one_machine_cannot_show(lines: str, rule: str) -> None:
    verdict = check(seen(lines))
    assert verdict.divergence is not None
    assert verdict.divergence.rule.startswith(rule), verdict.explain()


@pytest.mark.parametrize("ends", [LOCAL, APART])
@pytest.mark.parametrize(
    ("lines", "closed_first", "owes"),
    [
        ("1 c FIN 5 9|1.1 s ACK 9 6", "client", "the server's application has not closed"),
        ("1 s FIN 9 5|1.1 c ACK 5 10", "server", "the client's application has not closed"),
        ("1 c TXT 5 9 3|1.1 s ACK 9 8", "nobody", ""),
    ],
)
def test_a_capture_tells_how_things_stood_when_it_ended(
    lines: str, closed_first: str, owes: str, ends: tuple[Address, Address]
) -> None:
    _, (answer,) = told(seen(OPEN + lines, ends))
    assert answer.closed_first == closed_first
    assert answer.owes is not None
    assert answer.owes.startswith(owes)
    assert bool(answer.owes) == bool(owes)


@pytest.mark.parametrize("side", [0, 1])
def test_one_direction_alone_conforms_and_tells_nothing_of_who_closed_first(side: int) -> None:
    listening: set[Address] = set()
    half: list[Event] = []
    for event in read(TRACES / "loopback.pcap", lambda problem: None):
        assert isinstance(event, SegmentSeen)
        if event.flags & (SYN | ACK) == SYN:
            listening.add(event.dst)
        if (event.src in listening) == bool(side):
            half.append(event)
    verdict, found = told(half)
    assert verdict, verdict.explain()
    assert {answer.closed_first for answer in found} <= {None, "nobody"}


def test_an_interface_that_shows_each_segment_twice_changes_nothing() -> None:
    once = list(read(TRACES / "loopback.pcap", lambda problem: None))
    twice = [copy for event in once for copy in (event, evolve(event, t=event.t + 0.000_005))]
    verdict, found = told(sorted(twice, key=lambda event: event.t))
    assert verdict, verdict.explain()
    assert found == told(once)[1]


def test_a_port_is_free_from_the_attempt_on_even_if_the_table_was_read_late() -> None:
    events = list(read(TRACES / "server-first.jsonl", lambda problem: None))
    for early, conforms in ((0.4, True), (1.0, False)):
        moved = [
            evolve(e, free_after=e.free_after - early)
            if isinstance(e, Restart) and e.free_after
            else e
            for e in events
        ]
        assert bool(check(moved)) is conforms


@pytest.mark.parametrize("name", ["abort", "orphan", "server-first", "unread-data"])
def test_a_file_whose_writer_was_stopped_conforms_wherever_it_ends(
    name: str, tmp_path: Path
) -> None:
    lines = (TRACES / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
    cut = tmp_path / "cut.jsonl"
    for number in range(2, len(lines)):
        for part in (lines[number][: len(lines[number]) // 2], b""):
            cut.write_bytes(b"".join(lines[:number]) + part)
            faults: list[str] = []
            verdict = check(read(cut, faults.append))
            assert verdict, f"{number} lines: {verdict.explain()}"
            (fault,) = faults
            assert fault.startswith(f"line {number + 1}: cut off" if part else "the file does not")
            assert verdict.evidence.strength != "strong"


def test_a_file_of_the_schema_without_ends_is_read_as_one_that_may_be_cut(tmp_path: Path) -> None:
    head, *lines, _ = (TRACES / "server-first.jsonl").read_text().splitlines()
    old = tmp_path / "old.jsonl"
    for kept, missing in ((lines, 0), (lines[:-20], 20)):
        old.write_text("\n".join([head.replace('"schema":2', '"schema":1'), *kept]) + "\n")
        faults: list[str] = []
        assert check(read(old, faults.append)), missing
        (fault,) = faults
        assert "schema 1, which has no such record" in fault


def test_what_is_missing_at_the_end_is_missed_only_if_the_file_says_that_it_is_whole(
    tmp_path: Path,
) -> None:
    *lines, end = (TRACES / "abort.jsonl").read_text().splitlines()
    less = tmp_path / "less.jsonl"
    rejected = {True: 0, False: 0}
    for number in range(2, len(lines)):
        for whole in (True, False):
            less.write_text("\n".join([*lines[:number], *[end] * whole]) + "\n")
            rejected[whole] += not check(read(less, lambda problem: None))
    assert rejected[True] > 10
    assert rejected[False] == 0

"""Files good and bad: each fault is named with its line, what can be checked still is."""

from __future__ import annotations

import gzip
import json
import random
import socket
import struct
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from timewait import Run, events
from timewait.check import check
from timewait.check.evidence import read
from timewait.commands.check import command as check_command
from timewait.commands.mutate import command as mutate_command
from timewait.lab.two_hosts import pcap

TRACES = Path(__file__).parent / "traces"
GOOD = TRACES / "server-first.jsonl"


def timewait_check(*args: object) -> Result:
    return CliRunner().invoke(check_command, [str(arg) for arg in args], standalone_mode=False)


def problems(lines: list[str], where: Path) -> tuple[list[str], bool]:
    """What is said of a file of these lines, and whether what is left of it conforms."""
    where.write_text("\n".join(lines) + "\n")
    told: list[str] = []
    verdict = check(read(where, told.append))
    return told, bool(verdict)


def test_a_line_per_connection_and_then_the_verdict() -> None:
    done = timewait_check(GOOD)
    assert done.return_value == 0
    first, second, _, verdict, *_ = done.output.splitlines()
    assert "the server closed first" in first
    assert "the server closed first" in second
    assert verdict == "conforms, on strong evidence"


def test_a_capture_is_read_like_events() -> None:
    done = timewait_check(TRACES / "loopback.pcap")
    assert done.return_value == 0
    assert done.output.count("closed first") == 9


@pytest.mark.parametrize("file", [GOOD, TRACES / "loopback.pcap"], ids=lambda file: file.suffix)
def test_a_compressed_file_is_read_like_a_file(file: Path, tmp_path: Path) -> None:
    whole = gzip.compress(file.read_bytes())
    (tmp_path / "whole.gz").write_bytes(whole)
    assert list(read(tmp_path / "whole.gz", print)) == list(read(file, print))
    for damaged in (whole[: len(whole) // 2], whole[:2], whole[:-8] + bytes(8), whole + b"more"):
        (tmp_path / "damaged.gz").write_bytes(damaged)
        with pytest.raises(OSError, match="not a whole gzip file"):
            list(read(tmp_path / "damaged.gz", print))


def test_a_reader_that_has_seen_enough_is_no_fault_of_the_file() -> None:
    done = subprocess.run(
        f"{sys.executable} -m timewait check {TRACES / 'loopback.pcap'} | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
    )
    assert (done.stdout.count("\n"), done.stderr) == (1, "")


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
@pytest.mark.parametrize("file", [GOOD, TRACES / "loopback.pcap"], ids=lambda file: file.suffix)
def test_a_pipe_is_read_like_a_file(file: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "timewait", "check", name, "--json"],
        input=file.read_bytes(),
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    known = json.loads(timewait_check(file, "--json").output)
    assert json.loads(done.stdout) == {**known, "file": name}


def test_json_is_one_document() -> None:
    done = timewait_check(GOOD, "--json")
    document = json.loads(done.output)
    assert document["conforms"] is True
    assert document["divergence"] is None
    assert document["evidence"]["strength"] == "strong"
    assert [c["closed_first"] for c in document["connections"]] == ["server", "server"]


def test_another_profile_diverges_and_says_where() -> None:
    done = timewait_check(GOOD, "--profile", "server=windows", "--json")
    assert done.return_value == 1
    divergence = json.loads(done.output)["divergence"]
    assert divergence["rule"].startswith("windows profile, TIME_WAIT lasts 120 s")
    assert "snapshot" in divergence["event"]


def test_half_a_line_at_the_end(tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(GOOD.read_bytes()[:-100])
    told: list[str] = []
    assert check(read(cut, told.append))
    (only,) = told
    assert only.startswith(f"line {len(GOOD.read_text().splitlines()) - 1}: cut off")


@pytest.mark.parametrize("octets", [5000, 9000])
def test_the_run_of_a_cut_file_says_what_the_command_says(octets: int, tmp_path: Path) -> None:
    cut = tmp_path / "cut.jsonl"
    whole_lines, _, half = GOOD.read_bytes()[:octets].rpartition(b"\n")
    for text in (whole_lines + b"\n", whole_lines + b"\n" + half):
        cut.write_bytes(text)
        done = timewait_check(cut)
        with cut.open("rb") as lines:
            run = Run.from_events(events.read(lines, lambda problem: None))
        assert done.output.endswith(run.check().explain() + "\n")
        assert "not seen what followed where the file breaks off" in done.output


def test_unknown_fields_states_and_schemas_are_named_by_line(tmp_path: Path) -> None:
    lines = GOOD.read_text().splitlines()
    lines[0] = lines[0].replace('"schema":2', '"schema":3')
    lines[5] = lines[5].replace("{", '{"colour":"blue",', 1)
    at = next(i for i, line in enumerate(lines) if '"new":"CLOSE_WAIT"' in line)
    lines[at] = lines[at].replace("CLOSE_WAIT", "HALF_OPEN")
    told, conforms = problems(lines, tmp_path / "odd.jsonl")
    assert [text.split(":")[0] for text in told] == ["line 1", "line 6", f"line {at + 1}"]
    assert "HALF_OPEN" in told[2]
    assert conforms  # what was left out was not missed


def test_events_out_of_order_are_named_and_left_out(tmp_path: Path) -> None:
    lines = GOOD.read_text().splitlines()
    moves = [i for i, line in enumerate(lines) if '"transition"' in line]
    lines.insert(-1, lines.pop(moves[3]))
    told, conforms = problems(lines, tmp_path / "disorder.jsonl")
    (only,) = told
    assert only.startswith(f"line {len(lines) - 1}: out of order")
    assert conforms


@pytest.mark.parametrize("seed", range(8))
def test_lines_in_any_order_are_held_against_nobody(tmp_path: Path, seed: int) -> None:
    head, *lines, end = GOOD.read_text().splitlines()
    random.Random(seed).shuffle(lines)
    told, conforms = problems([head, *lines, end], tmp_path / "shuffled.jsonl")
    assert told
    assert all("out of order" in text for text in told)
    assert conforms


def test_two_runs_in_one_file(tmp_path: Path) -> None:
    lines = GOOD.read_text().splitlines() + (TRACES / "abort.jsonl").read_text().splitlines()
    told, conforms = problems(lines, tmp_path / "two.jsonl")
    (only,) = told
    assert only.startswith(f"line {len(GOOD.read_text().splitlines()) + 1}: another run begins")
    assert conforms


def test_what_is_no_such_file_is_one_line(tmp_path: Path) -> None:
    empty, noise = tmp_path / "empty", tmp_path / "noise"
    empty.write_text("")
    noise.write_bytes(bytes(range(128, 256)))
    for wrong, why in (
        (empty, "no event could be read"),
        (noise, "no event could be read (line 1: cut off in the middle"),
        (tmp_path, "is a directory"),
        (tmp_path / "none", "does not exist"),
    ):
        done = timewait_check(wrong)
        assert done.exception is not None
        assert why in str(done.exception)


def test_a_capture_without_tcp_is_one_line_that_says_what_is_in_it(tmp_path: Path) -> None:
    tunnel = struct.pack(">BBHHHBBH8x", 0x45, 0, 24, 1, 0, 64, socket.IPPROTO_GRE, 0) + bytes(4)
    other = struct.pack(">BBHHHBBH8x", 0x45, 0, 28, 1, 0, 64, socket.IPPROTO_UDP, 0) + bytes(8)
    wrong = tmp_path / "gre.pcap"
    wrong.write_bytes(pcap([(0.0, tunnel), (1.0, other), (2.0, other)]))
    done = timewait_check(wrong)
    assert str(done.exception) == (
        f"{wrong}: no event could be read (1 frame not TCP but IP protocol 47 (GRE: what is inside "
        "is not read); 2 frames not TCP but IP protocol 17)"
    )


def test_a_profile_that_is_none_is_one_line(tmp_path: Path) -> None:
    first, *rest = GOOD.read_text().splitlines()
    wrong = tmp_path / "wrong.jsonl"
    head = {**json.loads(first), "profiles": {"server": "nosuch"}}
    wrong.write_text("\n".join([json.dumps(head), *rest]) + "\n")
    for command in (check_command, mutate_command):
        done = CliRunner().invoke(command, [str(wrong)], standalone_mode=False)
        assert isinstance(done.exception, click.ClickException)
        assert f"{wrong}: no such profile: 'nosuch'" in str(done.exception)


def test_mutate_as_a_command() -> None:
    done = CliRunner().invoke(mutate_command, [str(GOOD), "--json"], standalone_mode=False)
    assert done.return_value == 0
    document = json.loads(done.output)
    assert document["unexplained"] == 0
    assert document["mutants"] == document["rejected"] + document["allowed"]
    assert set(document["operators"]["rst-invented"]) == {"mutants", "rejected", "allowed"}


def test_two_runs_in_one_file_have_lost_nothing(tmp_path: Path) -> None:
    file = tmp_path / "twice.jsonl"
    file.write_text(GOOD.read_text() + (TRACES / "abort.jsonl").read_text())
    done = timewait_check(file)
    assert done.return_value == 0
    assert "conforms, on strong evidence" in done.output
    assert "another run begins here; it is checked by itself" in done.output
    assert "lost" not in done.output


@pytest.mark.parametrize(("garbled", "words"), [(1, "1 event that"), (2, "2 events that")])
def test_what_a_file_has_garbled_weakens_the_evidence(
    tmp_path: Path, garbled: int, words: str
) -> None:
    lines = GOOD.read_text().splitlines()
    for i in range(garbled):
        lines[1 + 2 * i] = "{"  # before any connection
    file = tmp_path / "garbled.jsonl"
    file.write_text("\n".join(lines) + "\n")
    done = timewait_check(file)
    assert "conforms, on partial evidence" in done.output
    assert f"{words} an observer lost or the file has garbled" in done.output

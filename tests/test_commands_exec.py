"""`timewait exec` runs a program in a private network and tells what its TCP did."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from timewait.check import Checker
from timewait.commands import exec as exec_command
from timewait.events import Event, Row, SegmentSeen
from timewait.kernel.namespace import why_not
from timewait.tcp.states import State

if reason := why_not():
    pytest.skip(f"no private network namespace: {reason}", allow_module_level=True)

# A server and a client in one process: who closes first, or what goes wrong, is the argument.
PROGRAM = """
import socket, sys
story = sys.argv[1]
listener = socket.create_server(("127.0.0.1", 9090))
client = socket.create_connection(("127.0.0.1", 9090))
server, _ = listener.accept()
client.sendall(b"hello")
first, second = (client, server) if story == "client" else (server, client)
if story != "unread":
    server.recv(5)
first.close()
if story != "leak":
    second.close()
listener.close()
print("said by the program")
"""


def timewait(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize(
    ("story", "holder", "left"),
    [
        ("server", "server", ["TIME_WAIT"]),
        ("client", "client", ["TIME_WAIT"]),
        ("unread", None, []),
    ],
)
def test_a_story_as_json(story: str, holder: str | None, left: list[str]) -> None:
    done = timewait("exec", "--json", "--", sys.executable, "-c", PROGRAM, story)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "said by the program\n"
    document = json.loads(done.stdout)
    assert document["command"] == [sys.executable, "-c", PROGRAM, story]
    assert document["exit"] == 0
    assert document["outlived"] == []
    assert document["segments"] >= 5
    (connection,) = document["connections"]
    assert connection["time_wait"]["holder"] == holder
    assert connection["closed_first"] == (holder or "server")
    assert connection["how"] == ("FIN" if holder else "RST")
    assert connection["conforms"] is True
    assert [row["state"] for row in document["left"]] == left
    assert document["verdict"]["conforms"] is True
    assert document["verdict"]["evidence"]["strength"] == "strong"


def test_a_story_in_words() -> None:
    done = timewait("exec", "--", sys.executable, "-c", PROGRAM, "client")
    assert done.returncode == 0
    assert done.stdout == "said by the program\n"
    first, second, third, *_ = done.stderr.splitlines()
    assert "the client closed first" in first
    assert second.startswith("1 connection, ")
    assert second.endswith("left: 1 in TIME_WAIT; exit status 0")
    assert third == "conforms, on strong evidence"


def test_its_exit_status_is_the_programs() -> None:
    assert timewait("exec", "--", "sh", "-c", "exit 7").returncode == 7
    assert timewait("exec", "--", "sh", "-c", "kill -TERM $$").returncode == 128 + 15


def test_the_program_gets_its_arguments_and_input_as_they_are() -> None:
    done = timewait("exec", "--", "sh", "-c", 'cat; echo "$@"', "sh", "--json", "-x", input="in\n")
    assert done.stdout == "in\n--json -x\n"


def test_nothing_can_be_reached_from_inside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}))"
        done = timewait("exec", "--", sys.executable, "-c", code)
    assert done.returncode == 1
    assert "ConnectionRefusedError" in done.stderr


def test_what_outlives_the_program_is_ended() -> None:
    forgotten = "sleep 1000 & echo $!"
    done = timewait("exec", "--", "sh", "-c", f"({forgotten}) 2>&1")
    pid = int(done.stdout)
    assert "1 process outlived it, and was ended" in done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_connection_never_closed_is_named() -> None:
    server = (
        "import socket, time; l = socket.create_server(('127.0.0.1', 9090)); c, _ = l.accept();"
        "c.recv(1); time.sleep(1000)"
    )
    client = "import socket; socket.create_connection(('127.0.0.1', 9090)).close()"
    script = f"""
        {sys.executable} -c "{server}" &
        until {sys.executable} -c "{client}" 2> /dev/null; do sleep 0.05; done
    """
    done = timewait("exec", "--", "sh", "-c", script)
    assert "127.0.0.1:9090 <- 127.0.0.1:" in done.stderr
    assert "never closed: CLOSE_WAIT" in done.stderr
    assert "1 process outlived it, and was ended" in done.stderr


def test_events_go_to_a_file_that_the_check_reads(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    run = [sys.executable, "-c", PROGRAM, "server"]
    assert timewait("exec", "--events", str(file), "--", *run).returncode == 0
    kinds = {json.loads(line)["kind"] for line in file.read_text().splitlines()}
    assert kinds == {"run", "segment", "snapshot", "end"}
    assert timewait("check", str(file)).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--", "no-such-program"], "no-such-program: No such file or directory"),
        ([], "Missing argument 'COMMAND [ARGS]...'"),
        (["--events", "", "--", "true"], "'': No such file"),
        (["--events", "/no/such/folder/file", "--", "true"], "/no/such/folder/file: No such file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], word: str) -> None:
    done = timewait("exec", *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert word in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
@pytest.mark.parametrize(("option", "uid"), [((), "65534"), (("--as-root",), "0")])
def test_anybody_may(
    importable: Path, nobody: tuple[str, ...], option: tuple[str, ...], uid: str
) -> None:
    program = f"import os, sys; print(os.geteuid()); sys.argv[1:] = ['client']\n{PROGRAM}"
    done = subprocess.run(
        [*nobody, sys.executable, "-m", "timewait", "exec", *option, "--", "/usr/bin/python3",
         "-c", program],
        env={**os.environ, "PYTHONPATH": str(importable)},
        cwd="/",
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == f"{uid}\nsaid by the program\n", done.stderr
    assert "the client closed first" in done.stderr
    assert "conforms, on strong evidence" in done.stderr


def test_a_table_during_whose_reading_segments_came_is_not_looked_at() -> None:
    """Linux hands it out in pieces: a look of 0.2 s held a TIME_WAIT that a SYN had ended."""
    told: list[Event] = []
    checker = Checker()
    watch = exec_command._Watch(checker, told.append)  # type: ignore[arg-type]
    a, b = ("127.0.0.1", 9090), ("127.0.0.1", 40000)
    segments: list[list[Event]] = [[], []]

    class Diag:
        def sockets(self) -> list[Row]:
            t = time.monotonic() - watch._start
            segments.append([SegmentSeen(t, b, a, 2, 1, 0)])
            time.sleep(3 * exec_command._QUIET)
            return [Row(a, b, State.TIME_WAIT)]

    class Segments:
        def read(self) -> list[Event]:
            return segments.pop()

    watch._start = watch._moved = time.monotonic() - 1
    watch._diag, watch._capture = Diag(), Segments()  # type: ignore[assignment]
    watch.look()
    assert [event.kind for event in told] == ["segment"]


def test_addresses_used_again_and_again_conform() -> None:
    program = Path(__file__).parent / "check" / "address_reuse.py"
    done = timewait("exec", "--json", "--", sys.executable, str(program), "1600", "1")
    answer = json.loads(done.stdout)
    assert done.returncode == 0, answer["verdict"]["divergence"]
    names = [connection["connection"] for connection in answer["connections"]]
    assert len(names) > len(set(names))

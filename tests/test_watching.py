"""Watching a port and waiting for it, in Python and from the command line."""

import fcntl
import json
import math
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import anyio
import pytest

import timewait
from timewait import State
from timewait.commands.watch import _Feed
from timewait.events import Event, RunStarted, Transition
from timewait.kernel.namespace import Namespace
from timewait.watching import wait_until_bindable, wait_until_bindable_sync, watch

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root for a namespace"
)

PORT = 9090


@pytest.fixture(autouse=True)
def private() -> Iterator[None]:
    with Namespace() as ns, ns.entered():
        yield


def converse(port: int = PORT, *, reuse: bool = False) -> None:
    """A connection that the server closes first."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()
        client.close()


def moves(events: list[Event]) -> list[tuple[State, State]]:
    return [(e.old, e.new) for e in events if isinstance(e, Transition)]


def test_a_watch_has_everything_when_it_ends() -> None:
    with timewait.watch(PORT) as seen:
        converse()
    assert seen.observer == "tracepoint"
    assert isinstance(seen.events[0], RunStarted)
    assert (State.FIN_WAIT_2, State.TIME_WAIT) in moves(seen.events)
    assert (seen.lost, seen.why_not) == (0, ())


def test_a_weaker_watch_sees_what_stays() -> None:
    with watch(PORT, observer="sock_diag") as seen:
        converse()
        assert [row.state for row in seen.rows()] == [State.TIME_WAIT]
    assert (State.CLOSED, State.TIME_WAIT) in moves(seen.events) or (
        moves(seen.events)[-1][1] is State.TIME_WAIT
    )


def test_the_watched_port_is_a_servers_where_no_listener_was_seen() -> None:
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        client = socket.create_connection(("127.0.0.1", PORT))
        server, _ = listener.accept()
    with watch(PORT, observer="sock_diag") as seen:
        server.close()
        client.close()
    seen.assert_closed_by("server", PORT)
    (connection,) = seen.connections
    assert connection.time_wait == "server"


def test_a_watch_is_entered_once() -> None:
    with watch(PORT) as seen:
        pass
    before = list(seen.events)
    with pytest.raises(RuntimeError, match="entered twice"), seen:
        pass
    assert seen.events == before


def test_outside_of_it_a_watch_has_nothing_to_show() -> None:
    seen = watch(PORT)
    for ask in (seen.rows, seen.__iter__().__next__, seen.__aiter__):
        with pytest.raises(RuntimeError, match="inside"):
            ask()
    with seen:
        assert seen.rows() == []
    with pytest.raises(RuntimeError, match="inside"):
        seen.rows()


def test_events_come_while_watching() -> None:
    with watch(PORT) as seen:
        threading.Thread(target=converse).start()
        for event in seen:
            if isinstance(event, Transition) and event.new is State.TIME_WAIT:
                break
    assert list(seen) == seen.events


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_events_come_while_watching_asynchronously(backend: str) -> None:
    async def main() -> None:
        async with watch(PORT) as seen:
            # (A thread of its own: trio's pool keeps one that may be in another namespace.)
            threading.Thread(target=converse).start()
            async for event in seen:
                if isinstance(event, Transition) and event.new is State.TIME_WAIT:
                    break
        assert [event async for event in seen] == seen.events

    anyio.run(main, backend=backend)


def test_the_command_keeps_nothing_that_it_has_printed(capsys: pytest.CaptureFixture[str]) -> None:
    feed = _Feed(frozenset(), as_json=False)
    with watch(PORT) as seen:
        converse()
    feed.print(seen)
    assert "TIME_WAIT" in capsys.readouterr().out
    assert seen.events == []
    assert feed.latest > 0


def test_all_ports_may_be_watched() -> None:
    with watch() as seen:
        converse(1234)
    assert any(isinstance(e, Transition) and e.local[1] == 1234 for e in seen.events)
    with pytest.raises(ValueError, match="all ports"):
        seen.rows()


@pytest.mark.parametrize("backend", ["sync", "asyncio", "trio"])
def test_a_wait_ends_when_the_port_is_let_go(backend: str) -> None:
    listener = socket.create_server(("127.0.0.1", PORT))
    let_go: list[float] = []
    reasons: list[str] = []

    def close() -> None:
        let_go.append(time.monotonic())
        listener.close()

    def progress(found: timewait.Explanation) -> None:
        if not reasons:
            threading.Timer(0.05, close).start()
        reasons.append(found.situation)

    if backend == "sync":
        waited = wait_until_bindable_sync(PORT, timeout=20, progress=progress)
    else:

        async def main() -> float:
            return await wait_until_bindable(PORT, timeout=20, progress=progress)

        waited = anyio.run(main, backend=backend)
    assert time.monotonic() >= let_go[0]
    assert waited >= 0.05
    assert reasons[0] == "specific-under-wildcard"
    socket.create_server(("127.0.0.1", PORT), reuse_port=False).close()


def test_a_free_port_is_not_waited_for() -> None:
    began = time.monotonic()
    waited = wait_until_bindable_sync(PORT, timeout=0)
    assert 0 <= waited <= time.monotonic() - began


@pytest.mark.parametrize(
    ("host", "why"),
    [
        ("192.0.2.1", "not an address of this machine"),
        ("2001:db8::1", "not an address of this machine"),
        ("fe80::1", "needs its interface"),
    ],
)
def test_what_no_waiting_mends_is_not_waited_for(host: str, why: str) -> None:
    with pytest.raises(OSError, match=why):
        wait_until_bindable_sync(PORT, host, timeout=1)
    trouble = command("wait", f"[{host}]:{PORT}", "--timeout", "9")
    assert (trouble.returncode, trouble.stdout) == (2, "")
    assert why in trouble.stderr
    assert trouble.stderr.count("\n") == 1


@pytest.mark.parametrize("port", ["80", 99999, -1, 1.5])
def test_what_is_no_port_is_refused_by_all_alike(port: int) -> None:
    for ask in (watch, timewait.explain_bind, wait_until_bindable_sync, timewait.explain.can_bind):
        with pytest.raises(ValueError, match="not a port: "):
            ask(port)
    with pytest.raises(ValueError, match="port 0 is nobody's"):
        watch(0)
    with pytest.raises(ValueError, match="not a number of seconds: nan"):
        wait_until_bindable_sync(PORT, timeout=math.nan)


def test_a_wait_is_for_the_options_that_the_server_sets() -> None:
    converse(reuse=True)
    wait_until_bindable_sync(PORT, timeout=0, reuse_address=True)
    with pytest.raises(TimeoutError, match="TIME_WAIT"):
        wait_until_bindable_sync(PORT, timeout=0.1)


@pytest.mark.slow
@pytest.mark.wall
def test_a_wait_through_a_whole_time_wait_takes_as_long_as_the_timer_said() -> None:
    start = time.monotonic()
    converse()
    asked = time.monotonic()
    found = timewait.explain_bind(PORT)
    waited = wait_until_bindable_sync(PORT, timeout=80)
    free = time.monotonic()
    assert found.free_after is not None
    # The kernel's timer wheel adds up to a step of 2.05 s (HZ=250), which is counted in.
    assert free - start >= 60
    assert free - asked >= max(found.free_after - 0.02, waited)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
    )


def test_wait_answers_by_its_exit_status() -> None:
    free = command("wait", str(PORT))
    assert (free.returncode, free.stdout, free.stderr) == (0, "", "")
    converse()
    late = command("wait", str(PORT), "--timeout", "0.2")
    assert (late.returncode, late.stdout) == (1, "")
    assert re.match(
        r"timewait: after \d\.\d s 0\.0\.0\.0:9090 is not free: one connection", late.stderr
    )
    late = command("wait", str(PORT), "--timeout", "0", "--json")
    assert (late.returncode, late.stderr) == (1, "")
    assert json.loads(late.stdout)["bindable"] is False
    for wrong in (
        ["x"],
        ["80", "--timeout", "-1"],
        ["80", "--timeout", "nan"],
        ["no-such-host.invalid:80"],
    ):
        trouble = command("wait", *wrong)
        assert (trouble.returncode, trouble.stdout) == (2, "")
        assert trouble.stderr.count("\n") == 1


def test_the_end_of_a_watched_process_is_seen() -> None:
    program = (
        "import os, socket\n"
        f"s = socket.create_server(('127.0.0.1', {PORT}))\n"
        f"c = socket.create_connection(('127.0.0.1', {PORT}))\n"
        "a, _ = s.accept(); c.send(b'unread'); os.kill(os.getpid(), 9)\n"
    )
    with watch(PORT) as seen:
        subprocess.run([sys.executable, "-c", program], check=False)
    assert seen.lost == 0
    ends = [e for e in seen.events if isinstance(e, Transition) and e.new is State.CLOSED]
    assert {(e.old, e.cause) for e in ends} == {
        (State.LISTEN, None),
        (State.ESTABLISHED, None),
        (State.ESTABLISHED, "RST received"),
    }


def test_watch_runs_a_command_and_keeps_its_status() -> None:
    program = (
        "import socket, sys\n"
        f"s = socket.create_server(('127.0.0.1', {PORT}))\n"
        f"c = socket.create_connection(('127.0.0.1', {PORT}))\n"
        "a, _ = s.accept(); a.close(); c.close(); print('hello'); sys.exit(7)\n"
    )
    done = command("watch", "--json", "--", sys.executable, "-c", program)
    assert done.returncode == 7
    assert done.stderr == "hello\n"
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert records[0]["kind"] == "run"
    assert {"FIN_WAIT_2", "TIME_WAIT"} <= {record.get("new") for record in records}
    assert records[-1]["kind"] != "run"
    isolated = command("watch", str(PORT), "--isolated", "--observer", "capture", "--",
                       sys.executable, "-c", program)  # fmt: skip
    assert isolated.returncode == 7
    assert "SYN,ACK" in isolated.stdout


@pytest.mark.parametrize("observer", ["tracepoint", "sock_diag", "capture"])
def test_of_a_commands_connections_alone_is_told(observer: str) -> None:
    program = (
        "import socket\n"
        "input()\n"
        f"s = socket.create_server(('127.0.0.1', {PORT + 1}))\n"
        f"c = socket.create_connection(('127.0.0.1', {PORT + 1}))\n"
        "a, _ = s.accept(); a.close(); c.close()\n"
        f"c = socket.create_connection(('127.0.0.1', {PORT}), source_address=('127.0.0.1', 7777))\n"
    )
    with (
        socket.create_server(("127.0.0.1", PORT)) as server,
        subprocess.Popen(
            [sys.executable, "-m", "timewait", "watch", "--json", "--observer", observer, "--",
             sys.executable, "-c", program],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as watching,
    ):  # fmt: skip
        assert watching.stdin is not None
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["kind"] == "run"
        with socket.create_connection(("127.0.0.1", PORT)) as stranger, server.accept()[0]:
            out, _ = watching.communicate("\n")
            _, port = stranger.getsockname()
    records = [json.loads(line) for line in out.splitlines()]
    ends = [record.get(end) for record in records for end in ("local", "remote", "src", "dst")]
    ports = {end[1] for end in ends if end is not None}
    assert ports >= {7777, PORT, PORT + 1}
    assert port not in ports


def test_watch_isolated_tells_of_nothing_outside() -> None:
    with socket.create_server(("127.0.0.1", 0)) as outside:
        port = outside.getsockname()[1]
        # The program inside outlasts a connection outside.
        watching = subprocess.Popen(
            [sys.executable, "-m", "timewait", "watch", "--json", "--isolated", "--", "cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdin is not None
        assert watching.stdout is not None
        head = json.loads(watching.stdout.readline())
        with socket.create_connection(("127.0.0.1", port)):
            outside.accept()[0].close()
        rest, _ = watching.communicate("")
    assert watching.returncode == 0
    assert head["observer"] == "sock_diag"
    assert str(port) not in rest


def test_watch_ends_after_its_time_and_on_bad_input() -> None:
    done = command("watch", str(PORT), "--for", "0.2", "--observer", "sock_diag")
    assert (done.returncode, done.stderr) == (0, "")
    assert "watching with sock_diag" in done.stdout
    for wrong in (
        [],
        ["x"],
        ["--"],
        ["80", "--isolated"],
        ["0"],
        ["nowhere.invalid:80"],
        ["80", "--for", "nan"],
        ["--", "/no/such/program"],
        ["--", ""],
    ):
        trouble = command("watch", *wrong)
        assert (trouble.returncode, trouble.stdout) == (2, ""), wrong
        assert trouble.stderr.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_watch_prints_all_there_was_and_exits_0(number: signal.Signals) -> None:
    ours, theirs = os.pipe()
    room = fcntl.fcntl(ours, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(
        [sys.executable, "-m", "timewait", "watch", str(PORT), "--json"],
        stdout=theirs,
        stderr=subprocess.PIPE,
    ) as process:
        os.close(theirs)
        until_readable(ours)
        for _ in range(5):
            converse(reuse=True)
        while waiting(ours) < room - 500:  # it is in the middle of printing
            time.sleep(0.01)
        process.send_signal(number)
        with open(ours) as printed:
            records = [json.loads(line) for line in printed]
        _, errors = process.communicate(timeout=150)
    assert (process.returncode, errors) == (0, b"")
    assert (records[0]["kind"], records[-1]["kind"]) == ("run", "end")
    assert [record.get("new") for record in records].count("TIME_WAIT") >= 5


def until_readable(descriptor: int) -> None:
    assert select.select([descriptor], [], [], 20)[0]


def waiting(descriptor: int) -> int:
    """How many bytes wait to be read."""
    (count,) = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4))
    return int(count)


@pytest.mark.parametrize("seconds", ["0.6", "0"])  # (0: as where it began late)
def test_the_live_table_leaves_the_terminal_as_it_was(seconds: str) -> None:
    terminal, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    converse()
    with subprocess.Popen(
        [sys.executable, "-m", "timewait", "watch", str(PORT), "--for", seconds],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        out = b""
        while process.poll() is None or select.select([terminal], [], [], 0)[0]:
            if select.select([terminal], [], [], 0.1)[0]:
                out += os.read(terminal, 65536)
    assert process.returncode == 0
    assert termios.tcgetattr(theirs) == before
    assert b"TIME_WAIT" in out
    assert b" s" in out
    assert b"\x1b[?25l" not in out  # the cursor was never hidden
    os.close(terminal)
    os.close(theirs)


@pytest.mark.parametrize("words", [["watch", str(PORT)], ["wait", f"127.0.0.1:{PORT}"]])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_whatever_ends_it_the_terminal_is_as_it_was(
    words: list[str], number: signal.Signals
) -> None:
    import termios

    terminal, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    with (
        socket.create_server(("127.0.0.1", PORT)),
        subprocess.Popen(
            [sys.executable, "-m", "timewait", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "120"},
        ) as process,
    ):
        out = b""
        while b"LISTEN" not in out and b"listens on it" not in out:
            out += os.read(terminal, 65536)
        process.send_signal(number)
        while process.poll() is None or select.select([terminal], [], [], 0)[0]:
            if select.select([terminal], [], [], 0.1)[0]:
                out += os.read(terminal, 65536)
    status = 0 if words[0] == "watch" else 128 + number
    assert process.returncode == (-number if number is signal.SIGKILL else status)
    assert termios.tcgetattr(theirs) == before
    assert b"\x1b[?25l" not in out  # nobody is left to show a cursor again
    os.close(terminal)
    os.close(theirs)


def test_a_narrow_terminal_has_room_for_the_reason_and_for_the_bar() -> None:
    converse()
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "timewait", "wait", str(PORT)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "60"},
    ) as process:
        shown = screen(terminal, process, b" s left")
        process.kill()
    assert "0.0.0.0:9090 is not free: one connection of a former" in shown
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" * 9 in shown
    os.close(terminal)
    os.close(theirs)


@pytest.mark.parametrize("host", ["127.1", "[::ffff:127.0.0.1]", "0.0.0.0"])
def test_a_watch_of_a_host_tells_of_its_sockets_and_no_others(host: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "timewait", "watch", f"{host}:{PORT}", "--json"],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        converse()
        with socket.create_server(("127.0.0.2", PORT)):
            pass
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        records = [json.loads(line) for line in process.stdout]
    seen = {tuple(record["local"]) for record in records if record["kind"] == "transition"}
    assert ("127.0.0.1", PORT) in seen
    assert (("127.0.0.2", PORT) in seen) == (host == "0.0.0.0")


def screen(terminal: int, process: subprocess.Popen[bytes], until: bytes) -> str:
    """What a terminal was given, up to `until`."""
    out = b""
    while until not in out and process.poll() is None:
        if select.select([terminal], [], [], 0.1)[0]:
            out += os.read(terminal, 65536)
    return out.decode(errors="ignore")  # (it may end within a character)


def test_many_sockets_leave_room_for_what_happens() -> None:
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with socket.create_server(("127.0.0.1", PORT), backlog=64) as listener, ExitStack() as opened:
        for _ in range(1000):
            opened.enter_context(socket.create_connection(listener.getsockname()))
            opened.enter_context(listener.accept()[0])
        with subprocess.Popen(
            [sys.executable, "-m", "timewait", "watch", f"127.1:{PORT}"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"TERM": "xterm"},
        ) as process:
            screen(terminal, process, b"watching with")
            socket.create_connection(listener.getsockname()).close()
            shown = screen(terminal, process, "\N{RIGHTWARDS ARROW} CLOSE_WAIT".encode())
            process.terminate()
            out = b""
            while process.poll() is None or select.select([terminal], [], [], 0)[0]:
                if select.select([terminal], [], [], 0.1)[0]:
                    out += os.read(terminal, 65536)
            shown += out.decode(errors="ignore")
    assert "CLOSE_WAIT" in shown
    assert "2000 ESTABLISHED" in shown
    *frames, _ = shown.split("\x1b[2K")  # after the last one comes what nobody had time to show
    assert 20 < max(frame.count("\n") for frame in frames) <= 24
    os.close(terminal)
    os.close(theirs)


def test_a_watch_ends_when_its_terminal_goes() -> None:
    terminal, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "timewait", "watch", str(PORT)],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that no SIGHUP tells it
        env=os.environ | {"TERM": "xterm"},
    ) as process:
        os.close(theirs)
        screen(terminal, process, b"watching with")
        os.close(terminal)
        _, errors = process.communicate(timeout=150)
    assert process.returncode == 2
    assert errors == b"timewait: Input/output error\n"

"""What a watch of a port answers, whoever has the sockets and whichever observer sees them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from timewait.connections import UnusedPort
from timewait.events import SegmentSeen
from timewait.kernel.namespace import Namespace
from timewait.watching import watch

# The tracepoint sees this port in every namespace: not one that other tests use.
PORT = 20_000 + os.getpid() % 10_000

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="needs root for a namespace"
)

# In another process, which the watch knows nothing of.
STORY = f"""
import socket, sys
story = sys.argv[1]
listener = socket.create_server(("127.0.0.1", {PORT}))
client = socket.create_connection(("127.0.0.1", {PORT}))
server, _ = listener.accept()
if story == "unread":
    client.sendall(b"hello")
if story != "none":
    (client if story == "client" else server).close()
print(flush=True)
input()
"""


@pytest.fixture(autouse=True)
def private() -> Iterator[None]:
    with Namespace() as ns, ns.entered():
        yield


@pytest.fixture(params=["tracepoint", "sock_diag", "capture"])
def observer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def play(story: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STORY, story],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first close is done
    return process


@pytest.mark.parametrize("side", ["server", "client"])
def test_who_closed_first(observer: str, side: str) -> None:
    other = {"server": "client", "client": "server"}[side]
    with watch(PORT, observer=observer) as seen:
        with play(side) as process:
            (connection,) = seen.connections
            assert (connection.port, connection.closed_by, connection.how) == (PORT, side, "FIN")
            (held,) = seen.leaks  # the other side has not closed yet
            assert (held.side, str(held.state)) == (other, "CLOSE_WAIT")
            process.communicate("\n")
        seen.assert_closed_by(side)  # type: ignore[arg-type]
        seen.assert_no_leak()
        seen.assert_no_reset()
        assert [end.side for end in seen.time_wait] == [side]
        with pytest.raises(AssertionError, match=f"not closed first by the {other}"):
            seen.assert_closed_by(other, PORT)  # type: ignore[arg-type]
        if side == "server":
            with pytest.raises(AssertionError, match="1 socket left in TIME_WAIT"):
                seen.assert_no_time_wait(PORT)
        else:
            seen.assert_no_time_wait(PORT)
            seen.assert_bindable(PORT)
    assert seen.active_closer() == side


def test_what_the_table_showed_before_is_no_other_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with watch(PORT, observer="sock_diag") as seen, monkeypatch.context() as patch:
        patch.setattr(seen, "_fetch", lambda _: None)  # the observer looks later
        with play("none"):
            assert len(seen.connections) == 1
            patch.undo()
            assert len(seen.connections) == 1


def test_a_reset_is_told_where_it_can_be_seen(observer: str) -> None:
    with watch(PORT, observer=observer) as seen, play("unread") as process:
        process.communicate("\n")
    resets = [connection.reset_by for connection in seen.resets]
    assert resets == ([] if observer == "sock_diag" else ["server"])


def test_a_connection_that_nobody_closes(observer: str) -> None:
    with watch(PORT, observer=observer) as seen, play("none") as process:
        (connection,) = seen.connections
        assert connection.open
        assert seen.active_closer(PORT) is None
        assert len(seen.leaks) == 2
        process.communicate("\n")


def test_time_wait_from_before_is_not_counted(observer: str) -> None:
    with play("server") as process:
        process.communicate("\n")
    with watch(PORT, observer=observer) as seen:
        assert seen.time_wait == []
        with pytest.raises(UnusedPort, match="no connection was seen; no port was used"):
            seen.assert_closed_by("client")


def test_the_check_reads_a_watch(observer: str) -> None:
    with watch(PORT, observer=observer) as seen, play("client") as process:
        process.communicate("\n")
    verdict = seen.check()
    assert verdict, verdict.explain()
    segments = [event for event in seen.events if isinstance(event, SegmentSeen)]
    assert bool(segments) is (observer == "capture")


@pytest.mark.parametrize("observer", ["tracepoint", "capture"])  # not one that sees instants
def test_the_same_addresses_used_again_are_another_connection(observer: str) -> None:
    with watch(PORT, observer=observer) as seen:
        with socket.create_server(("127.0.0.1", PORT)) as listener:
            address = ("127.0.0.1", 40_000)
            for _ in range(2):
                client = socket.socket()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(address)
                client.connect(("127.0.0.1", PORT))
                server, _ = listener.accept()
                client.sendall(b"x")
                server.close()  # a reset: the addresses are free at once
                client.close()
        assert [connection.reset_by for connection in seen.connections] == ["server"] * 2

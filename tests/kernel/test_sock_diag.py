"""The socket table as the kernel gives it, against what the sockets themselves say."""

import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from timewait import State
from timewait.events import Row
from timewait.kernel import sock_diag
from timewait.kernel.namespace import Namespace
from timewait.kernel.sock_diag import Destroyed, SockDiag, details, lookup, sockets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sock_diag is Linux's")


@pytest.fixture(autouse=True)
def private() -> Iterator[None]:
    """Nobody else's sockets in the table, where that may be had."""
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            stack.enter_context(stack.enter_context(Namespace()).entered())
        yield


@pytest.fixture(params=["127.0.0.1", "::1"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, ...]]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with (
        socket.create_server((request.param, 0), family=family) as listener,
        socket.create_connection(listener.getsockname()[:2]) as client,
    ):
        server, _ = listener.accept()
        with server:
            yield listener, server, client


def end(sock: socket.socket) -> tuple[str, int]:
    host, port = sock.getsockname()[:2]
    return host, port


def test_a_port_shows_its_listener_and_both_ends(pair: tuple[socket.socket, ...]) -> None:
    listener, server, client = pair
    rows = sockets(end(listener)[1])
    assert {(row.local, row.remote[1], row.state, row.inode) for row in rows} == {
        (end(listener), 0, State.LISTEN, os.fstat(listener.fileno()).st_ino),
        (end(server), end(client)[1], State.ESTABLISHED, os.fstat(server.fileno()).st_ino),
        (end(client), end(server)[1], State.ESTABLISHED, os.fstat(client.fileno()).st_ino),
    }
    assert {row.uid for row in rows} == {os.getuid()}


def test_the_active_closer_is_left_in_time_wait_with_its_timer(
    pair: tuple[socket.socket, ...],
) -> None:
    listener, server, client = pair
    ends = end(server), end(client)
    server.close()
    assert client.recv(1) == b""
    client.close()
    (row,) = sockets(end(listener)[1], states=[State.TIME_WAIT])
    assert (row.local, row.remote) == ends
    assert row.timer == "time_wait"
    assert row.seconds_left is not None
    assert 55 < row.seconds_left <= 62.1
    assert (row.inode, row.uid) == (0, None)
    assert lookup(*ends) is not None
    assert lookup(ends[1], ends[0]) is None


def test_states_and_family_are_filtered(pair: tuple[socket.socket, ...]) -> None:
    listener, _, _ = pair
    port = end(listener)[1]
    assert [row.state for row in sockets(port, states=[State.LISTEN])] == [State.LISTEN]
    other = socket.AF_INET if listener.family == socket.AF_INET6 else socket.AF_INET6
    assert sockets(port, family=other) == []
    assert len(sockets(port, family=listener.family)) == 3


def test_lookup_is_the_connection_and_never_the_listener(pair: tuple[socket.socket, ...]) -> None:
    listener, server, client = pair
    found = lookup(end(server), end(client))
    assert found is not None
    assert (found.local, found.remote) == (end(server), end(client))
    assert found.inode == os.fstat(server.fileno()).st_ino
    assert lookup(end(listener), (end(client)[0], 1)) is None
    with pytest.raises(OSError, match="illegal IP address"):
        lookup(("localhost", 1), ("localhost", 2))


def test_unread_and_unsent_bytes_are_queues(pair: tuple[socket.socket, ...]) -> None:
    _, server, client = pair
    server.sendall(b"seven b")
    row = lookup(end(client), end(server))
    assert row is not None
    assert row.recv_q == 7


def test_an_ipv4_client_of_an_ipv6_server_shows_its_ipv4_addresses() -> None:
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        port = end(listener)[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            with server:
                row = lookup(("127.0.0.1", port), end(client))
                assert row is not None
                assert row.inode == os.fstat(server.fileno()).st_ino
                families = {d.row.local: d.family for d in details(port)}
                assert families[("::", port)] == socket.AF_INET6
                assert families[("127.0.0.1", port)] == socket.AF_INET6
                assert families[end(client)] == socket.AF_INET


def test_details_tell_tcp_info_shutdown_and_v6only(pair: tuple[socket.socket, ...]) -> None:
    listener, server, client = pair
    client.sendall(b"x" * 1000)
    assert len(server.recv(1000)) == 1000
    client.shutdown(socket.SHUT_WR)
    by_local = {d.row.local: d for d in details(end(server)[1], info=True)}
    mine = by_local[end(client)]
    assert mine.shutdown == 2
    assert mine.info is not None
    assert mine.info["bytes_acked"] in (1001, 1002)  # SYN and FIN count
    (v6only,) = {d.v6only for d in details(end(listener)[1], states=[State.LISTEN])}
    assert v6only is (True if client.family == socket.AF_INET6 else None)  # as Python made it
    # getsockopt's look at the same structure
    raw = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    assert (mine.info["snd_mss"], mine.info["rcv_mss"]) == struct.unpack_from("II", raw, 16)
    assert details(end(server)[1])[0].info is None


def test_a_socket_keeps_its_cookie_into_time_wait(pair: tuple[socket.socket, ...]) -> None:
    _, server, client = pair
    port, local = end(server)[1], end(server)
    before = {d.cookie for d in details(port, states=[State.ESTABLISHED]) if d.row.local == local}
    server.close()
    client.close()
    (after,) = details(port, states=[State.TIME_WAIT])
    assert {after.cookie} == before


def test_bound_only_is_shown_when_asked_for() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = end(bound)[1]
        assert sockets(port) == []
        (row,) = sockets(port, states=[State.CLOSED])
        assert row.inode == os.fstat(bound.fileno()).st_ino


@pytest.mark.skipif(os.geteuid() != 0, reason="this is the ordinary user already")
def test_an_ordinary_user_sees_the_same_table(
    pair: tuple[socket.socket, ...], importable: Path, nobody: tuple[str, ...]
) -> None:
    listener, _, _ = pair
    host, port = end(listener)
    program = (
        "from timewait.kernel.sock_diag import sockets\n"
        f"print(sum(row.local[0] == {host!r} for row in sockets({port})))"
    )
    seen = subprocess.run(
        [*nobody, sys.executable, "-c", program],
        env={"PYTHONPATH": str(importable)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (seen.stdout, seen.stderr) == ("3\n", "")


class Scripted:
    """A netlink socket that answers from a list."""

    def __init__(self, *answers: bytes, flags: int = 0, sender: int = 0) -> None:
        self.answers = list(answers)
        self.flags = flags
        self.sender = sender
        self.seq = 0

    def sendto(self, request: bytes, _address: object) -> None:
        self.seq = struct.unpack_from("=I", request, 8)[0]

    def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[object], int, object]:
        answer = self.answers.pop(0)
        if len(answer) >= 12:
            answer = answer[:8] + struct.pack("=I", self.seq) + answer[12:]
        buffers[0][: len(answer)] = answer
        return len(answer), [], self.flags, (self.sender, 0)


def message(kind: int, payload: bytes, *, flags: int = 2, length: int | None = None) -> bytes:
    return struct.pack("=IHHII", length or 16 + len(payload), kind, flags, 0, 0) + payload


DONE = message(3, bytes(4))
ROW = message(20, bytes([2, 10]) + bytes(70))


def scripted(*answers: bytes, flags: int = 0, sender: int = 0) -> SockDiag:
    diag = SockDiag()
    diag.close()
    diag._socket = Scripted(*answers, flags=flags, sender=sender)  # type: ignore[assignment]
    return diag


def test_an_interrupted_dump_is_taken_again() -> None:
    interrupted = message(3, bytes(4), flags=0x12)
    assert len(scripted(ROW, interrupted, ROW, DONE).sockets()) == 1
    with pytest.raises(OSError, match="changed during each of 8"):
        scripted(*[ROW, interrupted] * 8).sockets()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (ROW[:10], "ends within a header"),
        (message(20, bytes(72), length=200), "wrong length"),
        (message(20, bytes(72), length=3), "wrong length"),
        (message(20, bytes(8)), "short message"),
        (message(2, struct.pack("=i", -1)), "Operation not permitted"),
        (message(3, struct.pack("=i", -22)), "Invalid argument"),
    ],
)
def test_a_malformed_answer_is_an_error(answer: bytes, complaint: str) -> None:
    with pytest.raises(OSError, match=complaint):
        scripted(answer, DONE).sockets()


def test_a_truncated_answer_is_an_error() -> None:
    with pytest.raises(OSError, match="truncated"):
        scripted(ROW, flags=socket.MSG_TRUNC).sockets()


def test_the_rest_of_an_abandoned_answer_is_skipped() -> None:
    diag = SockDiag()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = end(listener)[1]
        diag._send(18, 0x300, sock_diag._BOTH_FAMILIES.pack(0, 1 << 10))
        next(diag._received(dump=True))
        assert [row.local[1] for row in diag.sockets(port)] == [port]
    diag.close()


def test_the_destroyed_are_told_by_their_port(pair: tuple[socket.socket, ...]) -> None:
    _, server, client = pair
    port = end(server)[1]
    cookies = {d.cookie: d.row.local for d in details(port, states=[State.ESTABLISHED])}
    with (
        contextlib.closing(Destroyed(port)) as told,
        contextlib.closing(Destroyed(port + 1)) as not_told,
    ):
        assert told.read() == {}
        server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.close()
        client.close()
        dead: dict[int, Row] = {}
        while len(dead) < 2:
            assert select.select([told], [], [], 10)[0]
            dead |= told.read()
        assert {cookie: row.local for cookie, row in dead.items()} == cookies
        assert {row.state for row in dead.values()} == {State.CLOSED}
        assert not_told.read() == {}
        assert told.lost == 0


def test_all_that_were_destroyed_before_are_heard_of_without_a_wait() -> None:
    processors = os.sched_getaffinity(0)
    with contextlib.closing(Destroyed()) as told:
        for _ in range(150):
            with (
                socket.create_server(("127.0.0.1", 0)) as listener,
                socket.create_connection(listener.getsockname()) as client,
            ):
                ports = [end(listener)[1]] * 2 + [end(client)[1]]
                listener.accept()[0].close()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            dead = [row.local[1] for row in told.all_so_far().values()]
            assert sorted(dead) == sorted(ports)
    assert os.sched_getaffinity(0) == processors


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace")
def test_notices_that_nobody_read_are_counted_as_lost() -> None:
    with (
        Namespace() as ns,
        ns.entered(),
        contextlib.closing(Destroyed()) as all_told,
        contextlib.closing(Destroyed()) as told,  # the last to ask is the first to be told
    ):
        told._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(40):
            with (
                socket.create_server(("127.0.0.1", 0)) as listener,
                socket.create_connection(listener.getsockname()),
            ):
                pass
        everything: dict[int, Row] = {}
        while len(everything) < 3 * 40:  # listeners, clients, and servers that were not accepted
            assert select.select([all_told], [], [], 10)[0]
            everything |= all_told.read()
        heard = told.read()
        assert len(heard) + told.lost == len(everything)
        assert told.lost > 0 == all_told.lost


@given(st.binary(max_size=400))
def test_any_answer_is_rows_or_an_error(data: bytes) -> None:
    with contextlib.suppress(OSError):
        scripted(data, DONE, *[DONE] * 8).sockets()


@example([(17, 200)], 1)
@example([(18, 9)], 1)
@given(st.lists(st.tuples(st.integers(0, 87), st.integers(0, 255)), max_size=4), st.integers(1, 6))
def test_a_lying_answer_is_rows_or_an_error(lies: list[tuple[int, int]], times: int) -> None:
    time_wait = message(18, bytes([2, 6, 3, 0]) + bytes(68))
    data = bytearray(time_wait * times)
    for where, value in lies:
        data[where] = value
    with contextlib.suppress(OSError):
        assert len(scripted(bytes(data), *[DONE] * 9).sockets()) <= times


def test_tcp_info_tells_the_receive_window() -> None:
    with socket.socket() as listener, socket.socket() as client:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        client.connect(listener.getsockname())
        for each in details(listener.getsockname()[1], info=True):
            if each.row.local == client.getsockname():
                info = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 300)
                assert each.info is not None
                assert each.info["rcv_wnd"] == int.from_bytes(info[232:236], sys.byteorder) > 0
                break
        else:
            raise AssertionError("the connection is not in the table")


@pytest.mark.skipif(shutil.which("ss") is None, reason="needs ss")
def test_tcp_info_is_what_ss_tells(pair: tuple[socket.socket, ...]) -> None:
    _, server, client = pair
    client.sendall(b"x" * 5000)
    server.sendall(b"y" * 700)
    assert len(client.recv(700)) == 700
    renamed = {"mss": "snd_mss", "rcvmss": "rcv_mss", "cwnd": "snd_cwnd"}
    same = "pmtu advmss bytes_sent bytes_acked bytes_received segs_out segs_in data_segs_out"
    same += " data_segs_in delivered rcv_space rcv_ssthresh snd_wnd"
    names = {name: name for name in same.split()} | renamed
    port = end(server)[1]

    def ours_now() -> dict[int, dict[str, int]]:
        every = details(port, states=[State.ESTABLISHED], info=True)
        return {
            d.row.local[1]: {name: (d.info or {})[name] for name in names.values()} for d in every
        }

    ours, before = ours_now(), None
    while ours != before:  # an ACK may be delayed, and come meanwhile
        before = ours
        printed = subprocess.run(
            ["ss", "-tniOH", "state", "established", f"( sport = :{port} or dport = :{port} )"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        ours = ours_now()
    assert len(printed.splitlines()) == len(ours) == 2
    for line in printed.splitlines():
        info = ours[int(line.split()[2].rpartition(":")[2])]
        told = dict(word.split(":", 1) for word in line.split()[4:] if ":" in word)
        assert {name: int(told[name]) for name in names} == {
            name: info[field] for name, field in names.items()
        }


def test_an_older_kernels_tcp_info_has_fewer_fields() -> None:
    assert list(sock_diag._tcp_info(bytes(248)) or {})[-1] == "rehash"
    # As of Linux 4.6, and a part of the next field.
    assert list(sock_diag._tcp_info(bytes(146)) or {})[-1] == "segs_in"


@pytest.mark.parametrize("sent", [0, 1000, 300_000])
def test_who_called_connect_is_known_from_what_the_kernel_counts(
    pair: tuple[socket.socket, ...], sent: int
) -> None:
    _, server, client = pair
    port = end(server)[1]

    def told() -> dict[tuple[str, int], tuple[bool | None, State]]:
        full = [d for d in details(port, info=True) if d.row.remote[1] and d.row.inode]
        return {d.row.local: (d.connected, d.row.state) for d in full}

    for each in (server, client):  # 300,000 is more than the window takes: some of it waits
        each.setblocking(False)
        assert sent == 0 or each.send(bytes(sent)) > 0
    assert told() == {
        end(server): (False, State.ESTABLISHED),
        end(client): (True, State.ESTABLISHED),
    }
    server.shutdown(socket.SHUT_WR)
    client.setblocking(True)
    while client.recv(1 << 20):
        pass
    while told()[end(server)][1] is State.FIN_WAIT_1:  # its FIN's ACK may be delayed
        time.sleep(0.001)
    assert told() == {
        end(server): (False, State.FIN_WAIT_2),
        end(client): (True, State.CLOSE_WAIT),
    }

"""What is read and written, and what full buffers do: the same on the kernel and on the model."""

import contextlib
import select
import socket
import struct
import time

import pytest

from timewait import sim
from timewait.events import SegmentSeen
from timewait.kernel.capture import Capture
from timewait.kernel.namespace import Namespace, why_not

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

AT = ("127.0.0.1", 9000)


@pytest.fixture
def alike(undisturbed):
    """What a program returns on the model, having made sure that it is the same on the kernel."""

    def told(play):
        async def main():
            return play()

        def same():
            with Namespace() as namespace:
                assert namespace.call(play) == ours

        ours = sim.run(main)
        undisturbed(same)
        return ours

    return told


def connected():
    """A listener, a client and the server's end, none of which blocks."""
    listener = socket.create_server(AT)
    client = socket.socket()
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        client.connect(AT)
    server, _ = listener.accept()
    server.setblocking(False)
    return listener, client, server


def outcome(call, *arguments):
    try:
        return call(*arguments)
    except (OSError, ValueError, TypeError) as error:
        return type(error).__name__


def test_the_ways_to_read_and_the_bytes_they_want(alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            alone = stack.enter_context(socket.socket())
            server.send(b"0123456789")
            buffer, half = bytearray(4), bytearray(2)
            return [
                outcome(client.recv_into, buffer, 5),
                outcome(client.recv_into, buffer, -1),
                outcome(client.recv_into, b"1234"),
                outcome(client.recvmsg, -1),
                outcome(client.recv, 3, socket.MSG_PEEK),  # nothing was lost so far
                (outcome(client.recv_into, buffer, 3), bytes(buffer)),
                (outcome(client.recvfrom_into, buffer), bytes(buffer)),
                (outcome(client.recvmsg_into, [half, buffer]), bytes(half), bytes(buffer)),
                # Of the ways to ask for nothing, Python lets only some reach the kernel.
                outcome(client.recv, 0),
                outcome(client.recv_into, b""),
                outcome(client.recvfrom, 0),
                outcome(alone.recv, 0),
                outcome(alone.recvfrom, 0),
                outcome(client.send, 5),
                outcome(client.send, "text"),
                outcome(client.send, b""),
                outcome(client.sendmsg, [b"a", bytearray(b"b"), memoryview(b"c")]),
                outcome(server.recv, 10),
            ]

    assert alike(play)[-1] == b"abc"


def fill(sock):
    """Send until nothing more is taken, for good."""
    total = 0
    for _ in range(2):
        with contextlib.suppress(BlockingIOError):
            while True:
                total += sock.send(bytes(65536))
        time.sleep(0.06)
    return total


def drain(sock):
    """Read until nothing more comes."""
    while True:
        try:
            while sock.recv(1 << 20):
                pass
        except BlockingIOError:
            time.sleep(0.06)
            if not readable(sock):
                return "later"
        else:
            return "end"


def poll(sock):
    if isinstance(sock, sim.SimSocket):
        return sock.poll()
    asked = select.poll()
    asked.register(sock, select.POLLIN | select.POLLOUT)
    return dict(asked.poll(0)).get(sock.fileno(), 0)


def state(sock):
    """As TCP_INFO has it."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def readable(sock):
    return bool(poll(sock) & select.POLLIN)


def writable(sock):
    return bool(poll(sock) & select.POLLOUT)


def test_a_connection_has_its_listeners_buffers_from_the_first_window_on(alike):
    def play():
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 10_000)
            listener.bind(AT)
            listener.listen()
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)
            with contextlib.suppress(BlockingIOError):
                client.connect(AT)
            # Linux counts the memory that text takes, not its bytes.
            return 10_000 < fill(client) < 60_000

    assert alike(play)


def test_a_socket_is_writable_again_when_a_third_of_its_buffer_is_free(alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 300_000)
            fill(client)
            seen = [writable(client), outcome(client.send, b"x")]
            while not writable(client):
                server.recv(10_000)
                time.sleep(0.001)
            room = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    room += client.send(bytes(1000))
            return [*seen, room > 90_000, writable(client), drain(server), writable(client)]

    assert alike(play) == [False, "BlockingIOError", True, False, "later", True]


@pytest.mark.parametrize(
    ("full", "seconds", "waited"), [(False, 2, 0), (True, 1, 1), (True, 0, 0)], ids=str
)
def test_close_lingers_while_its_fin_waits(full, seconds, waited, alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            if full:
                fill(client)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, seconds))
            started = time.monotonic()
            client.close()
            spent = round(time.monotonic() - started)
            return spent, outcome(drain, server)

    ending = "ConnectionResetError" if full and not seconds else "end"
    assert alike(play) == (waited, ending)


def watching():
    """An observer of all segments, on either stack."""
    try:
        return sim.current_host().network.observe()
    except RuntimeError:
        return Capture([AT[1]])


def test_a_smaller_receive_buffer_takes_no_window_back(alike):
    def play():
        with contextlib.ExitStack() as stack:
            seen = stack.enter_context(watching())
            _, client, server = map(stack.enter_context, connected())
            server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 5000)
            for size in (30_000, 10_000):
                client.send(bytes(size))
                time.sleep(0.06)
                server.recv(1 << 20)
                server.send(b"x")
            segments = [event for event in seen.read() if isinstance(event, SegmentSeen)]
            told = [event for event in segments if event.src == AT][1:]  # not the SYN,ACK
            return [(event.ack - told[0].ack, event.window) for event in told]

    assert alike(play) == [(0, 35), (0, 35), (10_000, 26), (10_000, 26)]  # in units of 1024


def test_reading_after_shutdown_of_it_opens_no_window(alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            fill(client)
            server.shutdown(socket.SHUT_RDWR)
            ending = drain(server)
            time.sleep(0.06)  # a delayed ACK of the FIN
            return ending, writable(client), state(server), state(client)

    assert alike(play) == ("end", False, 5, 8)  # FIN_WAIT_2, CLOSE_WAIT


@pytest.mark.parametrize("timeout", [1, 300])
def test_the_user_timeout_waits_for_a_timer_to_notice_it(timeout, alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, _server = map(stack.enter_context, connected())
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
            started = time.monotonic()
            outcome(fill, client)
            while not poll(client) & select.POLLERR and time.monotonic() < started + 9:
                time.sleep(0.01)
            spent = time.monotonic() - started
            # The first probe of the closed window begins the count. (The error is told before
            # the state changes; send() waits for both.)
            return spent - timeout / 1000 > 0.2, outcome(client.send, b"x"), state(client)

    assert alike(play) == (True, "TimeoutError", 7)  # CLOSED


def test_the_user_timeout_does_not_end_what_is_only_acknowledged_late(alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1)
            client.close()
            time.sleep(0.06)
            return state(server)

    assert alike(play) == 8  # CLOSE_WAIT


def test_what_flags_ask_of_a_reader(alike):
    def play():
        with contextlib.ExitStack() as stack:
            listener, client, server = map(stack.enter_context, connected())
            buffer = bytearray(4)
            said = []

            def ask(size, flags):
                said.append(outcome(client.recv, size, flags))

            server.send(b"0123456789")
            ask(3, socket.MSG_WAITALL | socket.MSG_PEEK)
            said.append((client.recv_into(buffer, 0, socket.MSG_TRUNC), bytes(buffer)))
            said.append(client.recv_into(buffer, 0, socket.MSG_TRUNC | socket.MSG_PEEK))
            ask(2, socket.MSG_MORE | socket.MSG_EOR)
            for flags in (socket.MSG_OOB, socket.MSG_ERRQUEUE, socket.MSG_WAITALL):
                ask(10, flags)
            said.append(outcome(listener.recv, 1, socket.MSG_OOB))
            ask(10, socket.MSG_WAITALL)
            client.settimeout(9)
            server.send(b"abcde")
            ask(5, socket.MSG_WAITALL)
            server.send(b"fg")
            server.close()
            ask(5, socket.MSG_WAITALL)
            return said

    assert alike(play) == [
        *(b"012", (4, bytes(4)), 4, b"45", "OSError", "BlockingIOError", b"6789", "OSError"),
        *("BlockingIOError", b"abcde", b"fg"),
    ]


@pytest.mark.parametrize("cork", [False, True], ids=["MSG_MORE", "TCP_CORK"])
def test_text_waits_for_more_a_fifth_of_a_second_at_most(cork, alike):
    def play():
        with contextlib.ExitStack() as stack:
            _, client, server = map(stack.enter_context, connected())
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, cork)
            more = 0 if cork else socket.MSG_MORE
            seen = []

            def ask():
                seen.append(outcome(server.recv, 99))

            client.send(b"half ", more)
            ask()
            if cork:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
            else:
                client.send(b"whole")
            ask()
            time.sleep(0.06)
            client.send(b"pushed", more)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            ask()
            time.sleep(0.06)
            client.send(b"late", more)
            for _ in range(2):
                time.sleep(0.15)
                ask()
            client.send(b"last", more)
            client.shutdown(socket.SHUT_WR)
            ask()
            return seen

    asked = [b"half " if cork else b"half whole", b"pushed", "BlockingIOError", b"late", b"last"]
    assert alike(play) == ["BlockingIOError", *asked]


def test_a_port_range_is_told_as_it_was_set(alike):
    def play():
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_IP, 51, struct.pack("I", 40_001 << 16 | 40_000))
            sock.bind(("127.0.0.1", 0))
            return (
                sock.getsockopt(socket.IPPROTO_IP, 51),
                sock.getsockopt(socket.IPPROTO_IP, 51, 4),
                sock.getsockname()[1] in (40_000, 40_001),
            )

    assert alike(play)[2]

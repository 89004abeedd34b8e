"""Small programs that ask for everything around a socket: they must see the same on both stacks.

Each returns what it saw, errors among it, and what asyncio logged meanwhile is
compared too. Nothing is expected here but what the kernel, and CPython's asyncio
over it, answered in the same run.
"""

import asyncio
import contextvars
import ctypes.util
import errno
import gc
import logging
import os
import re
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import warnings
from functools import partial

import pytest

from timewait import sim
from timewait.kernel.namespace import Namespace, why_not
from timewait.kernel.sock_diag import sockets

PORT = 8080
WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


def told(error):
    number = getattr(error, "errno", None)
    return f"{type(error).__name__}: {errno.errorcode.get(number) if number else error}"


def attempt(call, *args, **named):
    try:
        return call(*args, **named)
    except BaseException as error:
        return told(error)


async def attempted(awaitable):
    try:
        return await awaitable
    except BaseException as error:
        return told(error)


def pair():
    listener = socket.create_server(("127.0.0.1", PORT))
    client = socket.create_connection(("127.0.0.1", PORT))
    conn, _ = listener.accept()
    return listener, client, conn


async def names():
    loop = asyncio.get_running_loop()
    stream, numeric = socket.SOCK_STREAM, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
    asked = [
        ("127.0.0.1", 80),
        ("127.0.0.1", "http", 0, stream),
        (b"127.0.0.1", b"80", 0, stream),
        ("::1", 80, 0, stream),
        ("::ffff:127.0.0.1", 80, 0, stream),
        ("1.2.3", 80, 0, stream),
        ("::1%lo", 80, 0, stream),
        (None, 80, 0, stream, 0, socket.AI_PASSIVE),
        (None, None),
        ("127.0.0.1", 80, socket.AF_INET6),
        ("127.0.0.1", 80, 99),
        ("127.0.0.1", 80, 0, 99),
        ("127.0.0.1", "no such service"),
        ("127.0.0.1", -1),
        ("127.0.0.1", 70000, 0, stream),
        ("127.0.0.1", 80.5),
        (3, 80),
        ("a" * 70, 80),
        ("localhost", 80, 0, stream, 0, socket.AI_NUMERICHOST),
        ("127.0.0.1", 80, 0, stream, 0, socket.AI_CANONNAME),
    ]
    seen = [attempt(socket.getaddrinfo, *query) for query in asked]
    for address, flags in (
        (("127.0.0.1", 80), numeric),
        (("127.0.0.1", 80), socket.NI_NUMERICHOST),
        (("127.0.0.1", 80), 0),
        (("::1", 80, 0, 0), numeric),
        (("localhost", 80), numeric),
    ):
        seen.append(await attempted(loop.getnameinfo(address, flags)))
    seen += [attempt(socket.gethostbyname, "127.0.0.1")]
    seen += [attempt(socket.gethostbyname_ex, "127.0.0.1")]
    return [*seen, await attempted(asyncio.open_connection("", PORT))]


async def selecting():
    listener, client, conn = pair()
    seen = [tuple(map(len, select.select([conn, listener], [client], [client], 0.01)))]
    poll = select.poll()
    poll.register(conn, select.POLLIN)
    seen += [poll.poll(0), attempt(poll.modify, listener, 1)]
    with pytest.raises(KeyError):
        poll.unregister(listener)
    with selectors.DefaultSelector() as selector:
        selector.register(conn, selectors.EVENT_READ | selectors.EVENT_WRITE)
        seen.append([mask for _, mask in selector.select(0)])
        client.send(b"x")
        seen.append([mask for _, mask in selector.select(1)])
    client.close()
    await asyncio.sleep(0.01)
    wanted = select.POLLIN | select.POLLRDHUP
    poll.register(conn, wanted)
    seen.append([mask for _, mask in poll.poll(0)])
    with select.epoll() as epoll:
        epoll.register(conn, wanted | select.EPOLLONESHOT)
        seen += [attempt(epoll.register, conn)]
        seen += [[mask for _, mask in epoll.poll(0)], epoll.poll(0), attempt(epoll.poll, 0, 0)]
    with selectors.SelectSelector() as selector:
        seen.append(selector.select(0))
    conn.close()
    seen.append([mask for _, mask in poll.poll(0)])
    listener.close()
    return [
        *seen,
        attempt(select.select, [], [], [], -1),
        attempt(select.select, [listener], [], []),
    ]


async def watching():
    """By the socket, not its number."""
    loop = asyncio.get_running_loop()
    listener, client, conn = pair()
    seen = []
    for data in (b"one", b"two"):
        loop.add_reader(conn, lambda: seen.append(conn.recv(10)))
        loop.add_reader(conn, lambda: seen.append((2, conn.recv(10))))
        loop.add_writer(conn, lambda: (seen.append("writable"), loop.remove_writer(conn)))
        client.send(data)
        await asyncio.sleep(0.01)
        seen.extend([loop.remove_reader(conn), loop.remove_reader(conn)])
        seen.append(loop.remove_writer(conn))
    for sock in (listener, client, conn):
        sock.close()
    return sorted(map(str, seen))


async def files():
    loop = asyncio.get_running_loop()
    seen, sizes = [], []

    async def count(reader, writer):
        sizes.append(len(await reader.read()))
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.1", PORT)
    for fallback in (True, False):
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 300_000)
            for offset, size in ((100, 200_000), (0, None), (299_999, None), (300_000, None)):
                sent = loop.sendfile(writer.transport, file, offset, size, fallback=fallback)
                seen += [await attempted(sent), file.tell()]
        writer.close()
        await reader.read()
    with socket.create_connection(("127.0.0.1", PORT)) as client:
        client.setblocking(False)
        with tempfile.TemporaryFile() as file:
            file.write(b"x" * 3000)
            seen += [await loop.sock_sendfile(client, file, 1000, fallback=False), file.tell()]
    await asyncio.sleep(0.05)
    server.close()
    return [*seen, sizes]


async def signals():
    loop = asyncio.get_running_loop()
    got = loop.create_future()

    async def coroutine():
        pass

    seen = [
        attempt(loop.add_signal_handler, number, handler)
        for number, handler in (
            (signal.SIGKILL, print),
            (9999, print),
            ("x", print),
            (signal.SIGUSR1, coroutine),
        )
    ]
    loop.add_signal_handler(signal.SIGUSR1, got.set_result, "caught")
    os.kill(os.getpid(), signal.SIGUSR1)
    seen += [await got, loop.remove_signal_handler(signal.SIGUSR1)]
    seen += [loop.remove_signal_handler(signal.SIGUSR1), signal.getsignal(signal.SIGUSR1)]
    loop.add_signal_handler(signal.SIGINT, print)
    loop.remove_signal_handler(signal.SIGINT)
    return [*seen, signal.getsignal(signal.SIGINT)]


async def contexts():
    variable = contextvars.ContextVar("variable", default="default")
    variable.set("set")
    loop = asyncio.get_running_loop()
    return [
        await loop.run_in_executor(None, variable.get),
        await asyncio.to_thread(variable.get),
    ]


async def errors_in_callbacks():
    loop = asyncio.get_running_loop()

    async def fail(reader, writer):
        writer.close()
        raise ValueError("in a handler")

    class Failing(asyncio.Protocol):
        def data_received(self, data):
            raise KeyError("in a protocol")

    servers = [
        await asyncio.start_server(fail, "127.0.0.1", PORT),
        await loop.create_server(Failing, "127.0.0.1", PORT + 1),
    ]
    seen = []
    for port in (PORT, PORT + 1):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"x")
        seen.append(await attempted(reader.read()))
        writer.close()
        await attempted(writer.wait_closed())
    loop.call_soon(lambda: 1 / 0)
    await asyncio.sleep(0.01)
    for server in servers:
        server.close()
    return seen


async def left_open():
    """A protocol whose transport is open when the program ends is not told so."""
    seen = []

    class Server(asyncio.Protocol):
        def connection_lost(self, error):
            seen.append(error)

    loop = asyncio.get_running_loop()
    await loop.create_server(Server, "127.0.0.1", PORT)
    await loop.create_connection(Server, "127.0.0.1", PORT)
    await asyncio.sleep(0.01)
    return ["lost", seen]


async def use_after_close():
    with socket.socket() as sock:
        pass
    calls = [
        lambda: sock.sendall(b""),
        lambda: sock.send(b""),
        lambda: sock.sendmsg([b""]),
        lambda: sock.recv(1),
        lambda: sock.get_inheritable(),
        lambda: sock.setblocking(False),
        lambda: sock.getblocking(),
        lambda: sock.connect_ex(("127.0.0.1", PORT)),
        lambda: sock.dup(),
        lambda: sock.detach(),
    ]
    return [attempt(call) for call in calls]


async def odd_addresses():
    seen = []
    for address in ("ff02::1", "ff0e::1", "fe80::1", "febf::1", "2001:db8::1", "::ffff:224.0.0.1"):
        with socket.socket(socket.AF_INET6) as sock:
            seen.append(attempt(sock.bind, (address, 0)))
    with socket.socket(socket.AF_INET6) as sock:
        sock.setblocking(False)
        seen.append(attempt(sock.connect, ("fe80::1", PORT)))
    return seen


async def arguments():
    """What Python itself finds wrong with them, and in which order."""
    seen = []
    four, six = socket.socket(), socket.socket(socket.AF_INET6)
    listener = socket.create_server(("127.0.0.1", PORT))
    with four, six, listener:
        for address in (
            *("127.0.0.1", None, ["127.0.0.1", 80], ("127.0.0.1",), ("127.0.0.1", 80, 0)),
            *((1, 2), ("127.0.0.1", "80"), ("127.0.0.1", 1.5), ("127.0.0.1", -1)),
            *(("127.0.0.1", 70000), ("::1", 70000), (bytearray(b"127.0.0.1"), 70000)),
        ):
            seen += [attempt(four.bind, address), attempt(four.connect, address)]
        for address in (
            *(("::1",), ("::1", 0, 0, 0, 0), ("::1", 0, 1 << 20), ("::1", 0, -1)),
            *(("::1", 0, 0, "x"), ("::1", -1, -1), ("127.0.0.1", -1)),
        ):
            seen.append(attempt(six.bind, address))
        for value in (b"x", "x", None, 1 << 31, 1.5):
            seen.append(attempt(four.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEADDR, value))
        for sock in (four, six):
            for level in (socket.IPPROTO_IP, socket.IPPROTO_TCP, 999):
                seen += [attempt(sock.getsockopt, level, 999)]
                seen += [attempt(sock.setsockopt, level, 999, 1)]
        seen += [attempt(socket.socket, socket.AF_INET, kind) for kind in (11, 99)]
        seen += [attempt(socket.create_server, ("127.0.0.1", 1), dualstack_ipv6=True)]
        seen += [attempt(socket.create_connection, ("127.0.0.1", 1), all_errors=True)]
        # With a timeout Python connects as if it did not block: connect(2) can be asked once more.
        for timeout in (None, 5):
            client = socket.create_connection(("127.0.0.1", PORT), timeout)
            with client:
                seen += [client.gettimeout(), attempt(client.connect, ("127.0.0.1", PORT))]
        with socket.socket() as client:
            client.settimeout(5)
            for port in (1, 1, PORT):
                seen.append(attempt(client.connect, ("127.0.0.1", port)))
        plain = socket.SocketType()
        seen += [isinstance(sock, socket.SocketType) for sock in (four, plain)]
        plain.close()
    return seen


async def order_of_readiness():
    """Callbacks run in the order in which sockets became ready: an ACK makes none so."""
    loop = asyncio.get_running_loop()
    seen, transports = [], []

    class Peer(asyncio.Protocol):
        def __init__(self, name):
            self.name = name

        def connection_made(self, transport):
            transports.append(transport)

        def data_received(self, data):
            seen.append((self.name, data))

    names = iter(("server 0", "server 1"))
    server = await loop.create_server(lambda: Peer(next(names)), "127.0.0.1", PORT)
    clients = []
    for name in ("client 0", "client 1"):
        clients += [(await loop.create_connection(partial(Peer, name), "127.0.0.1", PORT))[0]]
        while len(transports) < 2 * len(clients):
            await asyncio.sleep(0.01)
    servers = [transport for transport in transports if transport not in clients]
    for number, transport in enumerate((servers[0], servers[1], clients[1], clients[0])):
        transport.write(b"%d" % number)
    while len(seen) < 4:
        await asyncio.sleep(0.01)
    for transport in transports:
        transport.abort()
    server.close()
    return seen


async def wrong_types():
    """Of what is sent, received and set: their errors in Python's own words."""
    listener, client, conn = pair()
    buffer = bytearray(4)
    with listener, client, conn:
        calls = [
            *(lambda: client.send("x"), lambda: client.sendall(5), lambda: client.sendmsg(["x"])),
            *(lambda: client.sendmsg(None), lambda: client.sendto(b"x")),
            *(lambda: client.sendto(b"x", ("::1", 1)), lambda: client.sendto(b"x", None)),
            *(lambda: conn.recv(1.5), lambda: conn.recv("x"), lambda: conn.recvmsg(1, -1)),
            *(lambda: conn.recvfrom_into(buffer, 5), lambda: conn.recv_into(buffer, 5)),
            *(lambda: conn.recvmsg_into([b"x"]), lambda: conn.recvmsg_into(["x"])),
            *(lambda: client.settimeout("x"), lambda: client.settimeout(float("nan"))),
            *(lambda: client.settimeout(1e30), lambda: client.settimeout(-1)),
            *(lambda: client.shutdown("x"), lambda: listener.listen("x")),
            *(lambda: client.connect_ex(("127.0.0.1", -1)), lambda: listener.listen(1 << 40)),
            *(lambda: client.connect(("a\0b", 1)), lambda: select.select(["x"], [], [])),
            *(lambda: socket.socket(fileno=-1), lambda: socket.socket(fileno="x")),
            *(lambda: socket.socket("x"), lambda: client.makefile("z")),
            lambda: client.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, -1)
            ),
            lambda: client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8),
            lambda: client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0)),
        ]
        seen = [attempt(call) for call in calls]
        client.settimeout(3)
        client.set_inheritable(True)
        return [*seen, client.gettimeout(), client.get_inheritable(), conn.get_inheritable()]


async def broken_pipes():
    """EPIPE is a BrokenPipeError, whichever call meets it first."""
    seen = []
    for send in ("send", "sendall", "sendmsg"):
        listener, client, conn = pair()
        with listener, client:
            conn.close()
            client.send(b"reset")
            await asyncio.sleep(0.01)
            text = [b"x"] if send == "sendmsg" else b"x"
            seen += [attempt(getattr(client, send), text) for _ in range(3)]
            with socket.socket() as never:
                seen.append(attempt(getattr(never, send), text))
    return seen


async def files_of_sockets():
    listener, client, conn = pair()
    with listener, client.makefile("w") as writing, conn.makefile("rb") as reading:
        writing.write("one\ntwo\n")
        client.close()
        writing.flush()
        conn.close()
        seen = [reading.readline(), conn.fileno() > 0, client.fileno() > 0]
        writing.close()
        seen += [reading.read(), client.fileno()]
    return [*seen, conn.fileno()]


async def work_elsewhere():
    """It is done when the loop comes round again, and may be cancelled until then."""
    loop = asyncio.get_running_loop()
    seen = []

    async def meanwhile():
        seen.append("meanwhile")

    task = asyncio.create_task(meanwhile())
    await asyncio.to_thread(int)
    seen.append("done")
    await task
    call = asyncio.create_task(asyncio.to_thread(int))
    await asyncio.sleep(0)
    call.cancel()
    seen.append(await attempted(call))
    await loop.shutdown_default_executor()
    return [*seen, attempt(loop.run_in_executor, None, int), repr(loop.call_soon(int))[:8]]


async def watched_numbers():
    """What loops are given to watch: numbers that are none, and sockets closed meanwhile."""
    loop = asyncio.get_running_loop()
    seen = []
    for number in (-1, 1.5):
        seen += [attempt(call, number, print) for call in (loop.add_reader, loop.add_writer)]
        seen += [attempt(loop.remove_reader, number), attempt(loop.remove_writer, number)]
    listener, client, conn = pair()
    hits = []
    with listener, conn:
        loop.add_reader(client, hits.append, "closed")
        client.close()
        conn.close()
        await asyncio.sleep(0.01)
        seen += [hits, attempt(loop.add_reader, client, print)]
        seen += [attempt(loop.remove_reader, client) for _ in range(2)]
        client = socket.create_connection(("127.0.0.1", PORT))
        loop.add_reader(client, print)
        client.close()
        seen += [attempt(loop.add_writer, client, print), attempt(loop.remove_reader, client)]
    return seen


async def ancillary_data():
    number = struct.pack("i", 0)
    listener, client, conn = pair()
    seen = [
        attempt(client.sendmsg, [b"x", b"y"], [(level, kind, data)])
        for level, kind, data in (
            (socket.SOL_SOCKET, socket.SCM_RIGHTS, number),
            (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, number * 3),
            (socket.SOL_SOCKET, 36, number),  # SO_MARK
            (socket.SOL_SOCKET, 36, b""),
            (socket.SOL_SOCKET, 37, number),  # SO_TIMESTAMPING
            (socket.SOL_SOCKET, 37, struct.pack("I", 1 << 4)),
            (socket.SOL_SOCKET, 37, number * 2),
            (socket.SOL_SOCKET, 999, b""),
            (socket.IPPROTO_IP, socket.IP_TTL, number),
            (999, 8, b""),
        )
    ]
    seen.append(conn.recvmsg(100, 100))
    for flag in (socket.MSG_DONTROUTE, socket.MSG_EOR, socket.MSG_CTRUNC, socket.MSG_CONFIRM):
        seen += [attempt(client.send, b"flag", flag), attempt(conn.recv, 10, flag)]
    for sock in (listener, client, conn):
        sock.close()
    return seen


async def sending_nothing():
    """It waits for a connection all the same."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", PORT))
        listener.listen(0)
        seen = []
        for sock in (first, second):
            sock.setblocking(False)
            seen.append(attempt(sock.send, b""))
            seen.append(sock.connect_ex(("127.0.0.1", PORT)))
            await asyncio.sleep(0.01)
            seen.append(attempt(sock.send, b""))
        return seen


async def options():
    with socket.socket() as sock:
        seen = [
            attempt(sock.getsockopt, level, option)
            for level, option in (
                (socket.SOL_SOCKET, socket.SO_RCVBUF),
                (socket.SOL_SOCKET, socket.SO_SNDBUF),
                (socket.SOL_SOCKET, socket.SO_PROTOCOL),
                (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
            )
        ]
        seen.append((sock.proto, len(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1000))))
    listener, client, conn = pair()
    seen += [(sock.proto, sock.family) for sock in (listener, client, conn)]
    again = socket.socket(fileno=client.detach())
    seen.append((again.proto, again.type))
    for sock in (listener, again, conn):
        sock.close()
    return seen


async def keepalive():
    """An interval longer than the idle time: after a probe the interval counts."""
    listener, client, conn = pair()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 4)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seen = []
    for seconds in (0.5, 1.0):
        await asyncio.sleep(seconds)
        try:
            rows = sim.current_host().rows(PORT)
        except RuntimeError:
            rows = sockets(PORT)
        (row,) = (row for row in rows if row.remote[1] == PORT)
        seen.append((row.timer, round(row.seconds_left / 2)))
    for sock in (listener, client, conn):
        sock.close()
    return seen


class Log(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        line = re.sub(r"<_Selector.*", "<a transport", record.getMessage())
        self.lines.append((line.partition("\n")[0], record.exc_info and told(record.exc_info[1])))


def on(stack, program):
    log, logger = Log(), logging.getLogger("asyncio")
    logger.addHandler(log)
    try:
        if stack == "model":
            return sim.run(program), log.lines
        with Namespace() as namespace:
            return namespace.call(asyncio.run, program()), log.lines
    finally:
        logger.removeHandler(log)
        gc.collect()  # what a program left open is complained of here, not in another test


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "program",
    [
        names,
        selecting,
        watching,
        files,
        signals,
        contexts,
        errors_in_callbacks,
        left_open,
        use_after_close,
        odd_addresses,
        arguments,
        order_of_readiness,
        wrong_types,
        broken_pipes,
        files_of_sockets,
        work_elsewhere,
        watched_numbers,
        ancillary_data,
        sending_nothing,
        options,
        keepalive,
    ],
)
def test_a_program_sees_the_same_on_both_stacks(program, undisturbed):
    ours, log = on("model", program)
    assert ours

    def same():
        assert (ours, log) == on("kernel", program)

    undisturbed(same)


async def left_behind():
    """A connection and two sockets."""
    loop = asyncio.get_running_loop()
    await loop.create_server(asyncio.Protocol, "127.0.0.1", PORT)
    _, writer = await asyncio.open_connection("127.0.0.1", PORT)
    await asyncio.sleep(0.01)
    socket.socket(socket.AF_INET6)
    socket.create_server(("127.0.0.1", 0))
    return writer


def test_python_warns_of_what_is_left_open_as_on_the_kernel():
    """In debug mode at the end too; else a simulation ends as a process does."""

    def warned(run):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
            gc.collect()
        # A connection's socket is warned of only if it goes before its transport.
        texts = {str(warning.message) for warning in caught if "raddr" not in str(warning.message)}
        return sorted(re.sub(r"fd=\d+|\d{5}", "N", text) for text in texts)

    with Namespace() as namespace:
        kernel = warned(lambda: namespace.call(partial(asyncio.run, debug=True), left_behind()))
    assert warned(lambda: sim.run(left_behind, debug=True)) == kernel
    assert len(kernel) >= 4
    assert [text[:25] for text in warned(lambda: sim.run(left_behind))] == 2 * [
        "unclosed <socket.socket N"
    ]


def test_a_module_that_is_imported_inside_finds_its_libraries():
    """trio does so when httpx first sends a request: it asks ldconfig, in a subprocess."""

    async def find():
        return ctypes.util.find_library("pthread")

    assert sim.run(find) == ctypes.util.find_library("pthread")


def test_waiting_for_another_thread_is_an_error_that_says_so():
    """In a process of its own: where there are other threads, they may be waited for."""
    script = """
import asyncio, queue, threading, time
from timewait import sim

async def main():
    loop = asyncio.get_running_loop()

    def work():
        return asyncio.run_coroutine_threadsafe(asyncio.sleep(1), loop).result()

    for wait in (work, threading.Event().wait, queue.Queue().get):
        try:
            await loop.run_in_executor(None, wait)
        except sim.WouldBlockForever as error:
            print("refused:", "another thread" in str(error))
    print(threading.Event().wait(3), time.monotonic())

sim.run(main)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=150
    )
    assert done.stdout.splitlines() == ["refused: True"] * 3 + ["False 3.0"], done.stderr

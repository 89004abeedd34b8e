"""Hosts, names, links and bad days, all in virtual time and from one seed."""

import asyncio
import contextlib
import errno
import multiprocessing
import os
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from timewait import sim
from timewait.events import SegmentSeen, Transition
from timewait.sim.ports import PortTable
from timewait.sim.sock import REMEMBERED
from timewait.tcp.profiles import profile
from timewait.tcp.segment import FIN
from timewait.tcp.states import State


async def greeter(port: int = 80) -> None:
    """A server that says hello, reads until the end, and closes."""

    async def handle(reader, writer):
        writer.write(b"hello\n")
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()

    await (await asyncio.start_server(handle, None, port)).serve_forever()


def two_hosts(main, **settings):
    network = sim.Network(settings.pop("seed", 0), link=settings.pop("link", None))
    client = network.host("client", **settings)
    web = network.host("web", **settings)

    async def start():
        serving = web.run(greeter())
        await asyncio.sleep(0.001)
        try:
            return await main(client, web)
        finally:
            serving.cancel()

    return sim.run(start, hosts=network)


def now() -> float:
    return asyncio.get_running_loop().time()


# Hosts and names.


def test_hosts_are_known_by_name_and_reached_at_the_speed_of_their_link():
    async def main(client, web):
        reader, writer = await asyncio.open_connection("web", 80)
        assert now() == pytest.approx(0.041)  # a SYN and its SYN,ACK, 20 ms each
        assert writer.get_extra_info("peername")[:2] == ("fd00::2", 80)  # IPv6 comes first
        assert await reader.readline() == b"hello\n"
        assert web.rows(80)[-1].state is State.ESTABLISHED
        writer.close()
        await writer.wait_closed()

    two_hosts(main, link=sim.Link(delay=0.020))


def test_what_cannot_be_reached_fails_as_on_linux():
    async def main(client, web):
        with pytest.raises(socket.gaierror, match="Name or service not known"):
            await asyncio.open_connection("nowhere", 80)
        with pytest.raises(OSError) as unreachable:
            await asyncio.open_connection("192.0.2.1", 80)
        assert unreachable.value.errno == errno.ENETUNREACH
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("web", 81, family=socket.AF_INET)
        with socket.socket() as sock, pytest.raises(OverflowError):
            sock.bind(("", 65536))

    two_hosts(main)


def test_hosts_are_found_by_name_and_by_address():
    async def main():
        assert socket.gethostname() == socket.getfqdn() == "client"
        assert socket.gethostbyname("web") == "10.0.0.2"
        assert socket.gethostbyaddr("10.0.0.2") == ("web", [], ["10.0.0.2"])
        assert [socket.getfqdn(name) for name in ("10.0.0.2", "::1", "x.y")] == [
            *("web", "localhost", "x.y")
        ]

    sim.run(main, hosts=["client", "web"])


def test_addresses_and_names_are_checked():
    network = sim.Network()
    network.host("a", "192.0.2.1", "2001:DB8::1")
    assert network.hosts["a"].addresses == ("192.0.2.1", "2001:db8::1")
    for name, address in (("a", "192.0.2.9"), ("b", "192.0.2.1"), ("b", "127.0.0.1"), ("b", "x")):
        with pytest.raises(ValueError, match=r"."):
            network.host(name, address)
    with pytest.raises(ValueError, match="no host 'c'"):
        network.connect("a", "c", delay=1)
    with pytest.raises(ValueError, match="lowest first"):
        network.host("d", ephemeral=(60999, 32768))
    with pytest.raises(ValueError, match="probability"):
        sim.Link(loss=1.5)
    with pytest.raises(ValueError, match="not a kind of segment"):
        network.drop("PUSH")
    with pytest.raises(ValueError, match="no host and no address"):
        network.drop("FIN", source="nobody")


# Links.


def test_a_lost_fin_is_sent_again_and_a_lost_last_ack_keeps_the_other_side_waiting():
    async def main(client, web):
        network = client.network
        network.drop("FIN", source="client")
        network.drop("last-ack", source=client)
        with network.observe() as seen:
            reader, writer = await asyncio.open_connection("web", 80)
            await reader.readline()
            writer.close()
            await asyncio.sleep(30)
            events = seen.read()
        fins = [e for e in events if isinstance(e, SegmentSeen) and e.flags & FIN]
        assert [(e.src[1] == 80, e.lost) for e in fins] == [
            (False, True),
            (False, False),
            (True, False),
            (True, False),  # the server's, whose ACK was lost
        ]
        ends = [e.t for e in events if isinstance(e, Transition) and e.old is State.LAST_ACK]
        assert len(ends) == 1
        assert ends[0] > fins[-1].t

    two_hosts(main)


def test_a_duplicate_of_an_old_syn_does_not_disturb_what_came_after():
    async def main(client, web):
        client.network.duplicate("SYN", 90, source="client")
        reader, writer = await asyncio.open_connection("web", 80)
        await reader.readline()
        await asyncio.sleep(100)  # the old SYN has come: it drew a challenge ACK
        assert [row.state for row in web.rows(80)[-1:]] == [State.ESTABLISHED]
        writer.close()

    two_hosts(main)


def test_a_partition_is_waited_out_and_healed():
    async def main(client, web):
        network = client.network
        reader, writer = await asyncio.open_connection("web", 80)
        await reader.readline()
        network.partition(web)
        writer.write(b"lost")
        writer.write_eof()
        await asyncio.sleep(1)
        (row,) = client.rows(80)
        assert (str(row.state), row.send_q, row.timer) == ("FIN_WAIT_1", 5, "retransmit")
        assert row.retransmits > 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 5)
        network.heal()
        assert await reader.read() == b""
        assert 5 < now() < 20
        writer.close()

    two_hosts(main)


def test_a_partition_is_of_hosts_that_there_are():
    network = sim.Network()
    network.host("client")
    network.host("web")
    for call in (network.partition, network.heal):
        with pytest.raises(ValueError, match="no host 'wev'"):
            call("wev")
    with pytest.raises(ValueError, match="a host at least"):
        network.partition()
    network.partition("web", one_way=True)
    assert not network.link("web", "client").up
    assert network.link("client", "web").up
    network.heal("client")
    assert network.link("web", "client").up
    apart = sim.Network(link=sim.Link(up=False))
    for name in "abc":
        apart.host(name)
    apart.heal("a")
    assert apart.link("b", "a").up
    assert not apart.link("b", "c").up


def test_what_a_simulation_cannot_be_run_with_is_told_at_once():
    async def main():
        pass

    with pytest.raises(TypeError, match=r"\['web'\]"):
        sim.run(main, hosts="web")
    with pytest.raises(ValueError, match="once at least"):
        sim.run(main, patience=0)


def test_a_connection_to_nobody_times_out_as_tcp_syn_retries_has_it():
    async def main(client, web):
        client.network.partition(web)
        started = now()
        with pytest.raises(TimeoutError):
            await asyncio.open_connection("web", 80, family=socket.AF_INET)
        assert now() - started == pytest.approx(131, abs=1)  # 4 linear timeouts, then doubling

    two_hosts(main)


@pytest.mark.parametrize("seed", range(5))
def test_a_bad_link_loses_nothing_that_tcp_repairs(seed):
    async def main(client, web):
        async def take(reader, writer):
            received.append(await reader.read())
            writer.close()

        received = []

        async def serve():
            await asyncio.start_server(take, None, 90)

        await web.run(serve())
        _, writer = await asyncio.open_connection("web", 90)
        text = bytes(range(256)) * 200
        writer.write(text)
        writer.write_eof()
        await asyncio.sleep(300)
        assert received == [text]
        writer.close()

    bad = sim.Link(delay=0.01, jitter=0.02, loss=0.05, duplicate=0.05, reorder=0.1)
    two_hosts(main, seed=seed, link=bad)


# Crashes.


def test_a_crashed_host_is_silent_and_a_rebooted_one_resets():
    async def main(client, web):
        reader, writer = await asyncio.open_connection("web", 80)
        await reader.readline()
        web.crash()
        writer.write(b"anybody?")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(), 60)
        web.reboot()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert web.counters["OutRsts"] == 1
        writer.close()
        again = web.run(greeter())
        await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection("web", 80)
        assert await reader.readline() == b"hello\n"
        writer.close()
        again.cancel()

    two_hosts(main)


def test_a_program_on_a_crashed_host_is_cancelled_and_its_sockets_are_dead():
    async def main(client, web):
        failures = []

        async def program():
            with socket.socket() as sock:
                try:
                    await asyncio.Event().wait()
                finally:
                    try:
                        sock.bind(("", 99))
                    except OSError as error:
                        failures.append(error.errno)

        task = web.run(program())
        await asyncio.sleep(1)
        web.crash()
        with pytest.raises(asyncio.CancelledError, match="web crashed"):
            await task
        assert failures == [errno.ENETDOWN]

    two_hosts(main)


# The accept queue.


def test_a_full_accept_queue_makes_clients_wait_and_is_counted():
    async def main():
        host = sim.current_host()
        listener = socket.socket()
        listener.bind(("127.0.0.1", 70))
        listener.listen(1)
        clients = [socket.socket() for _ in range(4)]
        for client in clients:
            client.setblocking(False)
            with pytest.raises(BlockingIOError):
                client.connect(("127.0.0.1", 70))
        # Linux takes backlog + 1; later SYNs are dropped.
        assert host.rows(70)[0].recv_q == 2
        assert [str(row.state) for row in host.rows(70) if row.remote[1] == 70] == [
            "ESTABLISHED",
            "ESTABLISHED",
            "SYN_SENT",
            "SYN_SENT",
        ]
        assert host.counters["ListenOverflows"] == 2
        listener.setblocking(False)
        accepted = [listener.accept()[0] for _ in range(2)]
        await asyncio.sleep(1.1)  # their SYNs are sent again
        accepted += [listener.accept()[0] for _ in range(2)]
        listener.close()
        for sock in clients + accepted:
            sock.close()

    sim.run(main)


def test_a_listener_that_goes_resets_who_was_waiting():
    async def main():
        listener = socket.create_server(("127.0.0.1", 70))
        reader, writer = await asyncio.open_connection("127.0.0.1", 70)
        listener.close()
        with pytest.raises(ConnectionResetError):
            await reader.read()
        assert sim.current_host().rows(70) == []
        writer.close()

    sim.run(main)


# Ports.


def test_ephemeral_ports_run_out_as_on_linux():
    async def main(client, web):
        made = []
        for _ in range(8):
            sock = socket.socket()
            sock.setblocking(False)
            with pytest.raises(BlockingIOError):
                sock.connect(("10.0.0.2", 80))
            made.append(sock)
        ports = [sock.getsockname()[1] for sock in made]
        assert sorted(ports) == list(range(40000, 40008))
        # connect() takes the parity of the range's low end first, bind(0) the other.
        assert [port % 2 for port in ports] == [0, 0, 0, 0, 1, 1, 1, 1]
        with socket.socket() as late, pytest.raises(OSError) as failure:
            late.connect(("10.0.0.2", 80))
        assert failure.value.errno == errno.EADDRNOTAVAIL
        with socket.socket() as late, pytest.raises(OSError) as failure:
            late.bind(("", 0))
        assert failure.value.errno == errno.EADDRINUSE
        with socket.socket() as late, pytest.raises(sim.WouldBlockForever):
            late.connect(("10.0.0.2", 81))  # another destination has all ports again
        for sock in made:
            sock.close()

    two_hosts(main, ephemeral=(40000, 40007))


def test_bind_to_zero_takes_the_odd_ports_first():
    table = PortTable("seed", ephemeral=(40000, 40007))
    host = sim.Network().host("x")
    ports = [table.bind(host.socket(), 0) for _ in range(8)]
    assert [port % 2 for port in ports] == [1, 1, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tw_reuse", "wait", "outcome"), [(2, 0.5, False), (2, 1.5, True), (0, 1.5, False)]
)
def test_a_loopback_time_wait_is_reused_by_connect_after_its_delay(tw_reuse, wait, outcome):
    network = sim.Network()
    network.host("one", ephemeral=(40000, 40000), tw_reuse=tw_reuse)

    async def main():
        with socket.create_server(("127.0.0.1", 80)) as listener:
            first = socket.create_connection(("127.0.0.1", 80))
            accepted, _ = listener.accept()
            first.close()
            accepted.close()
            assert [row.state for row in sim.current_host().rows(40000)] == [State.TIME_WAIT]
            await asyncio.sleep(wait)
            if outcome:
                socket.create_connection(("127.0.0.1", 80)).close()
            else:
                with pytest.raises(OSError) as failure:
                    socket.create_connection(("127.0.0.1", 80))
                assert failure.value.errno == errno.EADDRNOTAVAIL

    sim.run(main, hosts=network)


def test_more_time_waits_than_allowed_are_skipped_and_counted():
    network = sim.Network()
    host = network.host("one", max_tw_buckets=3)

    async def main():
        with socket.create_server(("127.0.0.1", 80)) as listener:
            for _ in range(5):
                sock = socket.create_connection(("127.0.0.1", 80))
                accepted, _ = listener.accept()
                sock.close()
                accepted.close()
        assert sum(row.state is State.TIME_WAIT for row in host.rows()) == 3
        assert host.counters["TCPTimeWaitOverflow"] == 2
        await asyncio.sleep(60.1)
        assert host.rows() == []

    sim.run(main, hosts=network)


@pytest.mark.parametrize(
    ("stack", "settings", "left", "overflows"),
    [
        ("linux", {"tcp_max_tw_buckets": 1}, 1, 1),
        ("linux", {"tcp_max_tw_buckets": 0}, 0, 2),
        ("freebsd", {}, 2, 0),
        ("freebsd", {"nolocaltimewait": 1}, 0, 0),
    ],
)
def test_a_host_has_what_its_profile_sets(stack, settings, left, overflows):
    network = sim.Network()
    host = network.host("one", profile=profile(stack, **settings))

    async def main():
        with socket.create_server(("127.0.0.1", 80)) as listener:
            for _ in range(2):
                sock = socket.create_connection(("127.0.0.1", 80))
                accepted, _ = listener.accept()
                sock.close()
                accepted.close()
        assert sum(row.state is State.TIME_WAIT for row in host.rows()) == left
        assert host.counters["TCPTimeWaitOverflow"] == overflows

    sim.run(main, hosts=network)


def test_a_client_can_connect_to_itself():
    network = sim.Network()
    network.host("one", ephemeral=(40000, 40000))

    async def main():
        sock = socket.create_connection(("127.0.0.1", 40000))
        assert sock.getsockname() == sock.getpeername()
        sock.send(b"echo")
        assert sock.recv(10) == b"echo"
        with pytest.raises(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", 40000))
        sock.close()

    sim.run(main, hosts=network)


# The edges of a simulation.


def test_blocking_mode_is_refused_where_it_would_have_to_wait():
    async def main():
        with socket.create_server(("127.0.0.1", 80)) as listener:
            with pytest.raises(sim.WouldBlockForever, match="setblocking"):
                listener.accept()
            with socket.create_connection(("127.0.0.1", 80)) as sock:
                with pytest.raises(sim.WouldBlockForever):
                    sock.recv(1)
                with sock.makefile() as file, pytest.raises(sim.WouldBlockForever):
                    file.read()

    sim.run(main)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_options_that_are_only_remembered_are_so_as_on_this_kernel(family):
    def transcript():
        told = []
        for level, option in sorted(REMEMBERED):
            for value in (None, -2, -1, 0, 1, 2, 4, 7, 63, 255, 256, 1000):
                with socket.socket(family) as sock:
                    try:
                        if value is not None:
                            sock.setsockopt(level, option, value)
                        told.append((level, option, value, sock.getsockopt(level, option)))
                    except OSError as refused:
                        told.append((level, option, value, errno.errorcode[refused.errno]))
        return told

    async def main():
        return transcript()

    assert sim.run(main) == transcript()


def test_what_is_not_modelled_is_never_silently_accepted():
    async def main():
        with socket.socket() as sock:
            for level, option in (
                (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
                (socket.IPPROTO_TCP, socket.TCP_FASTOPEN),
                (socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP),
            ):
                with pytest.raises(OSError) as refused:
                    sock.setsockopt(level, option, 1)
                assert refused.value.errno == errno.ENOPROTOOPT
            with pytest.raises(OSError) as refused:
                sock.send(b"x", socket.MSG_OOB)
            assert refused.value.errno == errno.EOPNOTSUPP
            assert struct.unpack("ii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == (
                0,
                0,
            )
        with pytest.raises(OSError) as refused:
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        assert refused.value.errno == errno.ESOCKTNOSUPPORT
        with pytest.raises(OSError) as refused:
            socket.socket(socket.AF_UNIX)
        assert refused.value.errno == errno.EAFNOSUPPORT
        with pytest.raises(OSError) as refused:
            sock.recv(1)
        assert refused.value.errno == errno.EBADF

    sim.run(main)


def test_nothing_leaves_the_simulation():
    real = socket.socket

    async def main():
        with pytest.raises(sim.LeavesSimulation, match="a real socket"):
            real()
        with pytest.raises(sim.LeavesSimulation, match="a thread"):
            threading.Thread(target=print).start()
        with pytest.raises(sim.LeavesSimulation, match="a subprocess"):
            subprocess.run(["true"])
        with pytest.raises(sim.LeavesSimulation, match="a subprocess"):
            await asyncio.create_subprocess_exec("true")
        for method in multiprocessing.get_all_start_methods():
            with pytest.raises(sim.LeavesSimulation, match="a subprocess"):
                multiprocessing.get_context(method).Process(target=print).start()
        with pytest.raises(sim.LeavesSimulation, match="another program"):
            os.execv(sys.executable, [sys.executable, "-c", "raise SystemExit('outside')"])
        with pytest.raises(sim.LeavesSimulation, match="a socket pair"):
            socket.socketpair()
        with pytest.raises(sim.LeavesSimulation, match="datagram"):
            await asyncio.get_running_loop().create_datagram_endpoint(asyncio.DatagramProtocol)
        return await asyncio.get_running_loop().run_in_executor(None, threading.get_ident)

    assert sim.run(main) == threading.get_ident()  # executors run inline
    real().close()
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()


def test_time_is_virtual_inside_and_real_outside():
    async def main():
        before = time.time(), time.monotonic()
        await asyncio.sleep(3600)
        assert time.time() - before[0] == pytest.approx(3600)
        assert time.monotonic() - before[1] == pytest.approx(3600)
        time.sleep(10)
        async with asyncio.timeout(1):
            await asyncio.sleep(0.5)
        return now()

    started = time.monotonic()
    assert sim.run(main) == pytest.approx(3610.5)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["delay", "jitter"])
def test_a_links_times_are_finite(name, seconds):
    with pytest.raises(ValueError, match="finite and not negative"):
        sim.Link(**{name: seconds})


@pytest.mark.parametrize("hosts", [["a", "a"], [""], {"a": "0.0.0.0"}, {"a": "224.0.0.1"}])
def test_hosts_have_names_and_addresses_of_their_own(hosts):
    with pytest.raises(ValueError, match=r"already|has a name|no host's address"):
        sim.run(lambda: asyncio.sleep(0), hosts=hosts)


def test_every_clock_a_program_asks_is_virtual():
    def clocks():
        return {
            "perf_counter": time.perf_counter(),
            "perf_counter_ns": time.perf_counter_ns() / 1e9,
            "CLOCK_MONOTONIC": time.clock_gettime(time.CLOCK_MONOTONIC),
            "CLOCK_MONOTONIC ns": time.clock_gettime_ns(time.CLOCK_MONOTONIC) / 1e9,
            "CLOCK_REALTIME": time.clock_gettime(time.CLOCK_REALTIME) - time.time(),
        }

    async def main():
        await asyncio.sleep(3600)
        return clocks(), time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)

    found, cpu = sim.run(main)
    assert found == dict.fromkeys(found, 3600) | {"CLOCK_REALTIME": 0}
    assert 0 < cpu < 3600  # the processor's time is the machine's
    assert clocks()["perf_counter"] != 3600


def test_a_deadlock_names_who_waits_for_what():
    async def forgotten():
        await asyncio.Event().wait()

    async def main():
        with socket.create_server(("127.0.0.1", 80)) as listener:
            listener.setblocking(False)
            other = asyncio.create_task(forgotten(), name="other")
            await asyncio.get_running_loop().sock_accept(listener)
            await other

    with pytest.raises(sim.Deadlock) as stuck:
        sim.run(main)
    text = str(stuck.value)
    assert "other on localhost: Event.wait(), from " in text
    assert "forgotten() (" in text
    assert "sock_accept()" in text


@pytest.mark.parametrize("debug", [False, True])
def test_a_livelock_names_what_goes_round(debug):
    async def impatient():
        while asyncio.get_running_loop().time() < 5:
            await asyncio.sleep(0)

    def again():
        asyncio.get_running_loop().call_soon(again)

    async def main():
        await asyncio.sleep(3)
        loop = asyncio.get_running_loop()
        again()
        spinning = asyncio.create_task(impatient(), name="spinning")
        await asyncio.wait([spinning, loop.create_future()])

    with pytest.raises(sim.Livelock) as stuck:
        sim.run(main, debug=debug, patience=500)
    text = str(stuck.value)
    assert text.startswith("500 iterations without waiting, and no socket has moved, 3 s into")
    assert "spinning on localhost: sleep(), from " in text or "__sleep0(), from " in text
    assert "impatient() (" in text
    assert "again() at " in text
    assert "Task-1" not in text  # it does wait


@pytest.mark.parametrize("debug", [False, True])
def test_a_reader_that_never_reads_is_a_livelock_too(debug):
    async def main():
        listener = socket.create_server(("127.0.0.1", 80))
        client = socket.create_connection(("127.0.0.1", 80))
        conn, _ = listener.accept()
        with listener, client, conn:
            asyncio.get_running_loop().add_reader(conn, idle_reader)
            client.send(b"x")
            await asyncio.sleep(1)

    def idle_reader():
        pass

    with pytest.raises(sim.Livelock) as stuck:
        sim.run(main, debug=debug, patience=100)
    assert "idle_reader()" in str(stuck.value)


@pytest.mark.parametrize("debug", [False, True])
def test_a_program_that_turns_until_something_happens_lives_to_see_it(debug):
    """On a machine turning takes time: 10 us an iteration here, once nothing else moves."""

    async def main():
        loop = asyncio.get_running_loop()
        happened = asyncio.Event()
        loop.call_later(0.02, happened.set)
        while not happened.is_set():
            await asyncio.sleep(0)
        seen = [loop.time()]
        while loop.time() < 0.05:
            await asyncio.sleep(0)
        server = await asyncio.start_server(greet, "127.0.0.1", 80)
        reader, writer = await asyncio.open_connection("127.0.0.1", 80)
        reading = asyncio.create_task(reader.read())
        while not reading.done():
            await asyncio.sleep(0)
        writer.close()
        server.close()
        return [*seen, loop.time(), reading.result()]

    async def greet(_reader, writer):
        await asyncio.sleep(0.02)
        writer.write(b"hello")
        writer.close()

    *times, greeting = sim.run(main, debug=debug)
    assert times == [0.02, pytest.approx(0.08, abs=0.01)]
    assert greeting == b"hello"


def test_asking_for_the_time_until_it_is_over_ends():
    async def main():
        started = time.perf_counter()
        while time.perf_counter() < started + 0.01:
            pass
        return time.perf_counter() - started

    assert sim.run(main) == pytest.approx(0.01, abs=1e-5)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("moment", [3e7, 4e8])
def test_timers_run_however_late_it_is(debug, moment):
    """Where the clock's steps are greater than the resolution that asyncio works with."""

    async def main():
        loop = asyncio.get_running_loop()
        await asyncio.sleep(moment)
        for seconds in (1, 0.1, 1e-3, 1e-9, 60):
            await asyncio.sleep(seconds)
        async with await asyncio.start_server(echo, "127.0.0.1", 80):
            reader, writer = await asyncio.open_connection("127.0.0.1", 80)
            with contextlib.closing(writer), pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await reader.read()
        await asyncio.sleep(1e-4)  # the server closes too
        return loop.time() - moment

    async def echo(reader, writer):
        await reader.read()
        writer.close()

    assert sim.run(main, debug=debug) == pytest.approx(61.401, abs=1e-3)


def test_turning_at_one_instant_is_no_livelock_while_sockets_or_time_move():
    async def echo(reader, writer):
        with contextlib.closing(writer):
            while line := await reader.readline():
                writer.write(line)

    async def main():
        async with await asyncio.start_server(echo, "localhost", 80):
            reader, writer = await asyncio.open_connection("localhost", 80)
            for _ in range(100):  # all without any time, on a loopback
                writer.write(b"x\n")
                assert await reader.readline() == b"x\n"
            writer.close()
        for _ in range(100):
            await asyncio.sleep(0.001)
            await asyncio.sleep(0)

    sim.run(main, patience=50)


def test_an_exception_surfaces_as_itself_with_the_virtual_time():
    async def main():
        await asyncio.sleep(12.5)
        raise KeyError("mine")

    with pytest.raises(KeyError) as raised:
        sim.run(main)
    assert raised.value.__notes__ == ["12.500000 s into the simulation"]


def test_one_simulation_at_a_time_and_only_from_its_own_thread():
    async def main():
        with pytest.raises(RuntimeError, match="runs already"):
            sim.run(asyncio.sleep(0))

    with pytest.warns(RuntimeWarning, match="never awaited"):
        sim.run(main)
    with pytest.raises(RuntimeError, match="no simulated host"):
        sim.current_host()
    loop = sim.SimLoop(sim.Network())
    trouble = []

    def elsewhere():
        try:
            loop.call_soon_threadsafe(print)
        except RuntimeError as error:
            trouble.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    loop.close()
    assert trouble == ["a simulated loop cannot be used from another thread"]


PROGRAM = textwrap.dedent(
    """
    import asyncio, random, sys
    from timewait import sim

    async def handle(reader, writer):
        writer.write(await reader.readline())
        await asyncio.sleep(random.random())
        writer.close()

    async def serve():
        await asyncio.start_server(handle, None, 80)

    async def ask(number):
        await asyncio.sleep(random.random())
        reader, writer = await asyncio.open_connection("web", 80)
        writer.write(b"%d\\n" % number)
        await reader.read()
        writer.close()

    async def main():
        network = sim.current_host().network
        bad = dict(jitter=0.01, loss=0.1, duplicate=0.1, reorder=0.1)
        network.connect("client", "web", **bad)
        with network.observe(lambda event: print(event)):
            await network.hosts["web"].run(serve())
            await asyncio.gather(*[ask(number) for number in range(5)])
            await asyncio.sleep(130)

    sim.run(main, seed=int(sys.argv[1]), hosts=["client", "web"])
    """
)


UVICORN = textwrap.dedent(
    """
    import asyncio, random, sys
    import httpx, uvicorn
    from timewait import sim

    async def app(scope, receive, send):
        await asyncio.sleep(random.random() / 10)
        headers = [(b"content-length", b"5000")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x" * 5000})

    async def ask():
        await asyncio.sleep(random.random())
        async with httpx.AsyncClient(timeout=60) as client:
            for _ in range(2):
                try:
                    response = await client.get("http://web:8000/")
                except httpx.RemoteProtocolError as error:  # its request met the server's FIN
                    print("got none:", error)
                else:
                    print("got", len(response.content), asyncio.get_running_loop().time())
                await asyncio.sleep(3 * random.random())

    async def main():
        network = sim.current_host().network
        clients = [host for host in network.hosts.values() if host.name != "web"]
        for host in clients:
            network.connect(host, "web", jitter=0.05, loss=0.05, duplicate=0.05, reorder=0.05)
        config = uvicorn.Config(app, host="0.0.0.0", port=8000, log_level="error", lifespan="off")
        config.timeout_keep_alive = 2
        server = uvicorn.Server(config)
        with network.observe(print):
            serving = asyncio.create_task(server.serve())
            await asyncio.gather(*[host.run(ask()) for host in clients])
            server.should_exit = True
            await serving
            await asyncio.sleep(130)

    sim.run(main, seed=int(sys.argv[1]), hosts=["web", *(f"client-{n}" for n in range(10))])
    """
)


def event_log(program: str, seed: int, hash_seed: str) -> bytes:
    return subprocess.run(
        [sys.executable, "-c", program, str(seed)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("program", [PROGRAM, pytest.param(UVICORN, marks=pytest.mark.slow)])
def test_the_same_seed_is_the_same_run_in_every_process(program):
    first = event_log(program, 4, "1")
    assert first.count(b"\n") > 50
    assert first == event_log(program, 4, "2") == event_log(program, 4, "random")
    assert first != event_log(program, 5, "1")

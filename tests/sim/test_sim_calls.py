"""Random programs of socket calls: the model answers as the kernel does, and a wrong one shows."""

import asyncio
import errno
import json
import socket

import pytest

from timewait import sim
from timewait.cli import main as timewait
from timewait.kernel.namespace import why_not
from timewait.lab import calls
from timewait.sim.sock import Sock

WHY_NOT = why_not()
needs_namespace = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@needs_namespace
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kernel_and_model_answer_random_programs_alike(seed):
    programs = [calls.program(seed, number) for number in range(250)]
    found = [calls.show(calls.shrink(d)) for d in calls.compare(programs)]
    assert found == [], "\n\n".join(found)


@needs_namespace
def test_a_wrong_model_is_found_and_its_error_shrunk(monkeypatch):
    honest = Sock.shutdown

    def forgetful(self, how):
        if self.listening:
            return  # a listener survives SHUT_RD: it does not on Linux
        honest(self, how)

    monkeypatch.setattr(Sock, "shutdown", forgetful)
    programs = [calls.program("wrong", number) for number in range(150)]
    found = calls.compare([p for p in programs if "fill" not in (call[0] for call in p)])
    assert found
    shortest = calls.shrink(min(found, key=lambda d: d.at))
    assert [call[0] for call in shortest.program[: shortest.at + 1]] == [
        "socket",
        "listen",
        "shutdown",
    ]
    assert "kernel: ok   [" in calls.show(shortest)


@needs_namespace
def test_a_model_whose_buffers_seem_never_full_is_found(monkeypatch):
    monkeypatch.setattr(Sock, "roomy", lambda self: True)
    programs = [calls.program("full", number, length=12) for number in range(800)]
    full = [p for p in programs if any(call[0] == "fill" for call in p)]
    found = calls.compare(full[:4], again=1)
    assert found
    assert {d.program[d.at][0] for d in found} == {"fill"}
    assert {(d.kernel[0], d.model[0]) for d in found} == {("full", "full")}


def test_programs_fill_and_empty_buffers_and_choose_among_ports_of_their_own():
    programs = [calls.program("reach", number) for number in range(300)]
    results = {
        (call[0], str(result))
        for calls_, steps in zip(programs, calls.on_model(programs), strict=True)
        for call, (result, _) in zip(calls_, steps, strict=True)
    }
    assert ("fill", "full") in results
    assert any(name == "drain" and "'end'" in text for name, text in results)
    assert ("name", "('127.0.0.1', 'own ephemeral')") in results
    assert ("range", "EINVAL") in results


def test_programs_are_the_same_for_the_same_seed():
    assert calls.program(7, 3) == calls.program(7, 3)
    assert len({calls.program(7, number) for number in range(50)}) == 50
    assert max(len(calls.program(7, number)) for number in range(200)) == calls.LENGTH


@needs_namespace
def test_the_command_prints_one_document(capsys):
    with pytest.raises(SystemExit) as done:
        timewait(["fuzz", "calls", "--count", "40", "--seed", "5", "--json"])
    assert done.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["programs"] == 40
    assert document["differences"] == []
    assert document["seed"] == "5"


def test_a_duration_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit) as done:
        timewait(["fuzz", "calls", "--for", "soon"])
    assert done.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("run", [sim.run, asyncio.run], ids=["model", "kernel"])
@pytest.mark.parametrize("how", [socket.SHUT_RD, socket.SHUT_RDWR])
def test_shutdown_of_a_listener_wakes_who_waits_to_accept(run, how):
    async def main():
        with socket.socket() as listener:
            listener.setblocking(False)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            accepting = asyncio.create_task(asyncio.get_running_loop().sock_accept(listener))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            listener.shutdown(how)
            with pytest.raises(OSError) as refused:
                await asyncio.wait_for(accepting, 5)
            return refused.value.errno

    assert run(main()) == errno.EINVAL


@pytest.mark.parametrize("run", [sim.run, asyncio.run], ids=["model", "kernel"])
def test_odd_addresses_and_options_are_answered_as_the_kernel_does(run):
    def answer(call, *arguments):
        with socket.socket() as sock:
            sock.setblocking(False)
            try:
                return getattr(sock, call)(*arguments)
            except OSError as error:
                return error.errno or str(error)

    async def main():
        return {
            "bind to broadcast": answer("bind", ("255.255.255.255", 0)),
            "bind to multicast": answer("bind", ("224.0.0.1", 0)),
            "bind to reserved": answer("bind", ("240.0.0.1", 0)),
            "connect to loopback's broadcast": answer("connect", ("127.255.255.255", 9)),
            "SO_LINGER, a number": answer("setsockopt", socket.SOL_SOCKET, socket.SO_LINGER, 1),
            "2,000 bytes": answer("getsockopt", socket.SOL_SOCKET, socket.SO_REUSEADDR, 2000),
        }

    assert run(main()) == {
        "bind to broadcast": None,
        "bind to multicast": None,
        "bind to reserved": errno.EADDRNOTAVAIL,
        "connect to loopback's broadcast": errno.ENETUNREACH,
        "SO_LINGER, a number": errno.EINVAL,
        "2,000 bytes": "getsockopt buflen out of range",
    }

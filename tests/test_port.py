"""A held port cannot be lost between asking and using."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys

import pytest

from timewait.port import HeldPort, hold_port


def bound(port: HeldPort, host: str = "127.0.0.1", *, reuse_address: bool = False) -> str:
    """The outcome of starting a server there: "ok" or the error's name."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
        try:
            sock.bind((host, port.number))
            sock.listen()
        except OSError as refused:
            return errno.errorcode[refused.errno or 0]
    return "ok"


def test_it_is_a_number_wherever_a_number_is_asked_for() -> None:
    with hold_port() as port:
        assert int(port) == port.number
        assert f"--port={port}" == f"--port={port.number:d}" == f"--port={port:d}"
        assert port == port.number == port
        assert port != port.number + 1
        assert {port.number: "a server"}[port] == "a server"  # type: ignore[index]
        assert repr(port) == f"<HeldPort {port.number} held>"
    assert not port.held


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "127.8.8.8", "::1", "::"])
def test_nobody_takes_it_while_it_is_held(host: str) -> None:
    with hold_port() as port:
        assert bound(port, host) == "EADDRINUSE"
        port.release()
        assert bound(port, host) == "ok"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_server_with_reuse_address_starts_while_it_is_held(host: str) -> None:
    with hold_port() as port:
        assert bound(port, host, reuse_address=True) == "ok"
        assert port.held


def test_the_kernel_does_not_deal_it_out() -> None:
    with open("/proc/sys/net/ipv4/ip_local_port_range") as range_:
        low, high = map(int, range_.read().split())
    with hold_port() as port:
        assert not low <= port.number <= high


@pytest.mark.parametrize("reuse_address", [False, True])
def test_it_is_handed_over_as_a_listener_with_the_options_asked_for(reuse_address: bool) -> None:
    with hold_port() as port, port.listen(reuse_address=reuse_address) as listener:
        assert not port.held
        assert bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) is reuse_address
        with socket.create_connection(("127.0.0.1", port.number)) as client, listener.accept()[0]:
            assert client.getpeername() == ("127.0.0.1", port.number)
        assert bound(port, reuse_address=True) == "EADDRINUSE"  # it listens


def test_a_handed_over_port_is_handed_over_once() -> None:
    with (
        hold_port() as port,
        port.socket(),
        pytest.raises(RuntimeError, match="no longer held"),
    ):
        port.socket()


def test_a_wrong_host_leaves_it_held() -> None:
    with hold_port() as port:
        with pytest.raises(OSError, match="assign requested address"):
            port.socket("192.0.2.1")
        assert port.held


def test_many_at_once_never_meet() -> None:
    ports = [hold_port() for _ in range(200)]
    assert len({port.number for port in ports}) == 200
    for port in ports:
        port.release()


def test_a_port_in_time_wait_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        hold_port() as left,
        left.listen() as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        listener.accept()[0].close()
        assert client.recv(1) == b""
    assert bound(left) == "EADDRINUSE"  # the server's side is in TIME_WAIT now
    with hold_port() as free:
        free.release()
        monkeypatch.setattr("timewait.port._candidates", lambda: [left.number, free.number])
        with hold_port() as port:
            assert port.number == free.number


def test_it_reaches_another_process_by_number() -> None:
    code = "import socket,sys; socket.create_server(('127.0.0.1', int(sys.argv[1]))); print('up')"
    with hold_port() as port:
        server = subprocess.run(
            [sys.executable, "-c", code, str(port)], capture_output=True, text=True, check=True
        )
    assert server.stdout == "up\n"


def test_none_free_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_port() as port:
        monkeypatch.setattr("timewait.port._candidates", lambda: [port.number])
        with pytest.raises(OSError, match="no port found"):
            hold_port()

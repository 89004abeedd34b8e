"""Build a refused or treacherous bind in a private network namespace and explain it.

    python docs/situations.py SITUATION [ARGUMENTS of timewait explain]

For why-cant-i-bind.md; nothing outside the namespace is touched.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

from timewait.cli import main
from timewait.kernel.namespace import isolate

PORT = 9090


def _server(host: str = "0.0.0.0", *, reuse_address: int = 0, reuse_port: int = 0) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse_address)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse_port)
    sock.bind((host, PORT))
    sock.listen()
    return sock


def _connected(listener: socket.socket) -> tuple[socket.socket, socket.socket]:
    client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
    accepted, _ = listener.accept()
    listener.close()
    return accepted, client


def _time_wait(reuse_address: int) -> object:
    for end in _connected(_server(reuse_address=reuse_address)):
        end.close()
    return None


def _leak() -> object:
    accepted, client = _connected(_server())
    client.close()
    return accepted


def _outbound() -> object:
    client = socket.socket()
    client.bind(("127.0.0.1", 40000))
    web = socket.create_server(("127.0.0.1", 80))
    client.connect(("127.0.0.1", 80))
    return client, web


SITUATIONS: dict[str, Callable[[], object]] = {
    "time-wait": lambda: _time_wait(0),
    "time-wait-reuse": lambda: _time_wait(1),
    "listener": _server,
    "shared": lambda: (_server(reuse_port=1), _server(reuse_port=1)),
    "ipv6": lambda: _server("::"),
    "close-wait": _leak,
    "outbound": _outbound,
}

if __name__ == "__main__":
    isolate()
    kept = SITUATIONS[sys.argv[1]]()
    main(["explain", *(sys.argv[2:] or [str(PORT)])])

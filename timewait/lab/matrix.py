"""Every way to meet a port that somebody holds, on the kernel and on the model.

One case is a holder (its state, options and address) and a newcomer (its
options, address and call); the outcome is "ok" or the call that failed and
its errno. The same code builds the holders and tries the newcomers on both
stacks: on the kernel in a private network namespace, on the model inside a
simulation, where `socket.socket` and `time.sleep` are the model's. Each case
has a port of its own, so that none sees what another left behind.
"""

from __future__ import annotations

import errno
import itertools
import resource
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from attrs import frozen

__all__ = [
    "ADDRESSES",
    "CALLS",
    "OPTIONS",
    "STATES",
    "Case",
    "allowed",
    "every_case",
    "on_kernel",
    "on_model",
]

STATES: Final = {
    "bound": "bind() and nothing else",
    "listening": "a listener",
    "connected": "ESTABLISHED, by bind() and connect()",
    "connected-auto": "ESTABLISHED, by connect() alone: the port is an ephemeral one",
    "accepted": "ESTABLISHED, accepted; its listener is closed",
    "fin-wait-2": "FIN_WAIT_2, an orphan: closed, and the peer does not close",
    "time-wait-client": "TIME_WAIT after bind() and connect()",
    "time-wait-auto": "TIME_WAIT after connect() alone",
    "time-wait-server": "TIME_WAIT of an accepted connection; its listener is closed",
    "close-wait": "CLOSE_WAIT: the peer has closed, the holder has not",
    "aborted": "closed by a reset of its own",
    "reset": "reset by its peer, and not closed yet",
}
# How the address is written, and its socket's family and IPV6_V6ONLY.
ADDRESSES: Final = {
    "127.0.0.1": (socket.AF_INET, "127.0.0.1", False),
    "127.0.0.2": (socket.AF_INET, "127.0.0.2", False),
    "0.0.0.0": (socket.AF_INET, "0.0.0.0", False),
    "::1": (socket.AF_INET6, "::1", False),
    "::": (socket.AF_INET6, "::", False),
    ":: only": (socket.AF_INET6, "::", True),
    "::ffff:127.0.0.1": (socket.AF_INET6, "::ffff:127.0.0.1", False),
}
# "A" for SO_REUSEADDR, "P" for SO_REUSEPORT.
OPTIONS: Final = ("-", "A", "P", "AP")
CALLS: Final = {
    "bind": "bind()",
    "listen": "bind() and listen()",
    "connect": "bind() and connect() to where the holder is or was connected",
    "connect-auto": "connect() alone, with that port the only one it may choose",
    "race": "bind(), then the holder's listen(), then listen()",
}

_FIRST, _LAST = 1100, 60_900  # the cases' own ports
_CLIENTS: Final = (61_000, 64_900)  # where a holder's peers connect from
_TARGET: Final = 65_100  # what outgoing connections call
SYSCTLS: Final = {"net.ipv4.ip_local_port_range": "1024 65000"}
_BATCH: Final = 1500
IP_BIND_ADDRESS_NO_PORT: Final = 24
IP_LOCAL_PORT_RANGE: Final = 51


@frozen
class Case:
    """Who holds the port how, and who comes how."""

    state: str
    held: str
    held_options: str
    call: str
    address: str
    options: str

    def __str__(self) -> str:
        return (
            f"{self.state} on {self.held} [{self.held_options}], "
            f"then {self.call} on {self.address} [{self.options}]"
        )


def every_case() -> Iterator[Case]:
    """All combinations, in a fixed order."""
    for state, held, held_options, call, address, options in itertools.product(
        STATES, ADDRESSES, OPTIONS, CALLS, ADDRESSES, OPTIONS
    ):
        if call != "race" or state == "bound":
            yield Case(state, held, held_options, call, address, options)


def on_kernel(cases: Sequence[Case]) -> list[str]:
    """The kernel's outcomes. Raises `PermissionError` where no namespace is allowed."""
    from timewait.kernel.namespace import Namespace

    outcomes: list[str] = []
    for part in _parts(cases):
        with Namespace(sysctls=SYSCTLS) as namespace:
            outcomes += namespace.call(_outcomes, part)
    return outcomes


def on_model(cases: Sequence[Case], profile: str = "linux") -> list[str]:
    """The model's outcomes."""
    from timewait import sim

    outcomes: list[str] = []
    for part in _parts(cases):
        network = sim.Network()
        network.host("lab", ephemeral=(1024, 65000), profile=profile)

        async def main(part: Sequence[Case] = part) -> list[str]:
            return _outcomes(part)

        outcomes += sim.run(main, hosts=network)
    return outcomes


def allowed(outcomes: Mapping[Case, str], address: str = "127.0.0.1") -> list[list[str]]:
    """For reading: a row for each state and call, a column for each newcomer's options.

    A cell lists the holder's options with which the call succeeds, both on `address`.
    """
    rows = []
    for state, call in itertools.product(STATES, CALLS):
        cells = []
        for options in OPTIONS:
            found = [
                (held, outcomes[case])
                for held in OPTIONS
                if (case := Case(state, address, held, call, address, options)) in outcomes
            ]
            held_ok = [held for held, outcome in found if outcome == "ok"]
            everyone = bool(found) and len(held_ok) == len(found)
            cells.append("any" if everyone else " ".join(held_ok) or "none" if found else "")
        if any(cells):
            rows.append([state, call, *cells])
    return rows


def _parts(cases: Sequence[Case]) -> Iterator[Sequence[Case]]:
    """As many cases as one stack has ports for."""
    for start in range(0, len(cases), _LAST - _FIRST):
        yield cases[start : start + _LAST - _FIRST]


def _outcomes(cases: Sequence[Case]) -> list[str]:
    """On whatever stack this runs: build, wait until the states have settled, try."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    targets = [_listener(name) for name in ("0.0.0.0", ":: only")]
    outcomes = []
    try:
        for start in range(0, len(cases), _BATCH):
            batch = list(enumerate(cases[start : start + _BATCH], _FIRST + start))
            kept = [_hold(case, port, targets) for port, case in batch]
            time.sleep(0.06)  # the ACK of a FIN may be delayed 40 ms
            outcomes += [
                _come(case, port, holding)
                for (port, case), holding in zip(batch, kept, strict=True)
            ]
            for sock in itertools.chain(*kept):
                _abort(sock)
            for target in targets:
                _drain(target)
    finally:
        for target in targets:
            target.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return outcomes


def _socket(name: str, options: str) -> socket.socket:
    family, _, only = ADDRESSES[name]
    sock = socket.socket(family, socket.SOCK_STREAM)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    if "A" in options:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if "P" in options:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


def _listener(name: str) -> socket.socket:
    sock = _socket(name, "A")
    sock.bind((ADDRESSES[name][1], _TARGET))
    sock.listen(4096)
    sock.setblocking(False)
    return sock


def _target(name: str) -> tuple[str, int]:
    """Whom a socket on this address calls."""
    family, address, _ = ADDRESSES[name]
    if family == socket.AF_INET:
        return "127.0.0.1", _TARGET
    return ("::ffff:127.0.0.1" if address.startswith("::ffff:") else "::1"), _TARGET


def _only_port(sock: socket.socket, port: int, name: str) -> None:
    """Leave connect() no choice but `port`, and its address as it would be by itself or `name`."""
    _range(sock, port, port)
    address = ADDRESSES[name][1]
    if address not in ("0.0.0.0", "::"):
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((address, 0))


def _range(sock: socket.socket, low: int, high: int) -> None:
    sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("=HH", low, high))


def _hold(case: Case, port: int, targets: list[socket.socket]) -> list[socket.socket]:
    """Make the holder; returns the sockets that must stay open."""
    _, address, _ = ADDRESSES[case.held]
    holder = _socket(case.held, case.held_options)
    state = case.state
    if state in ("bound", "listening"):
        holder.bind((address, port))
        if state == "listening":
            holder.listen(8)
        return [holder]
    if state in ("accepted", "time-wait-server"):
        holder.bind((address, port))
        holder.listen(8)
        # A dual-stack listener is called over IPv4, so that its connection is mapped.
        via = {"0.0.0.0": "127.0.0.1", "::": "127.0.0.1", ":: only": "::1"}.get(
            case.held, case.held
        )
        peer = socket.socket(ADDRESSES[via][0], socket.SOCK_STREAM)
        _range(peer, *_CLIENTS)
        peer.connect((ADDRESSES[via][1], port))
        accepted, _ = holder.accept()
        holder.close()
        if state == "accepted":
            return [accepted, peer]
        accepted.close()
        peer.close()
        return []
    if state.endswith("-auto"):
        _only_port(holder, port, case.held)
    else:
        holder.bind((address, port))
    target = _target(case.held)
    holder.connect(target)
    peer, _ = targets[target[0] == "::1"].accept()
    if state in ("connected", "connected-auto"):
        return [holder, peer]
    if state == "fin-wait-2":
        holder.close()
        return [peer]
    if state.startswith("time-wait"):
        holder.close()
        peer.close()
        return []
    if state == "close-wait":
        peer.close()
        return [holder]
    if state == "aborted":
        _abort(holder)
        return [peer]
    assert state == "reset"
    _abort(peer)
    return [holder]


def _come(case: Case, port: int, holding: list[socket.socket]) -> str:
    """Try the newcomer."""
    _, address, _ = ADDRESSES[case.address]
    call = "socket"
    with _socket(case.address, case.options) as sock:
        sock.setblocking(False)
        try:
            call = "bind"
            if case.call == "connect-auto":
                _only_port(sock, port, case.address)
            else:
                sock.bind((address, port))
            if case.call == "race":
                call = "holder's listen"
                holding[0].listen(8)
            if case.call in ("listen", "race"):
                call = "listen"
                sock.listen(8)
            elif case.call.startswith("connect"):
                call = "connect"
                try:
                    sock.connect(_target(case.address))
                except BlockingIOError:
                    number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    if number:
                        return f"connect: {errno.errorcode[number]}"
                _linger_off(sock)
        except OSError as error:
            return f"{call}: {errno.errorcode.get(error.errno or 0, error.errno)}"
    return "ok"


def _linger_off(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _abort(sock: socket.socket) -> None:
    """Close without leaving anything."""
    _linger_off(sock)
    sock.close()


def _drain(listener: socket.socket) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:
            return
        _abort(sock)

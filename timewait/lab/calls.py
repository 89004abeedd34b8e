"""Random programs of socket calls, on the kernel and on the model, compared call by call.

A program is a list of calls on a few sockets of one process: two families, a
few addresses and ports, options, data, partial and full closes. It is played
on both stacks by the same code. After each call its result or errno is
compared, and the state (TCP_INFO) and readiness (poll) of every socket. A
difference is shrunk to the shortest program that still shows it.

Ports that a stack chose itself are compared as "ephemeral". How many bytes
full buffers hold depends on the memory they take, so `fill` tells only that
no more was taken, and `drain` has every socket read to the end before another
call could tell the number. Programs do not
wait, except for `pause`, which is long enough for every delayed ACK; the
kernel's own timers therefore rarely matter, and where a busy machine let one
fire, the program is played again before anything is called a difference.
"""

from __future__ import annotations

import errno
import resource
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from random import Random
from typing import Any, Final, TypeAlias

from attrs import frozen

__all__ = ["Difference", "Program", "compare", "on_kernel", "on_model", "program", "show", "shrink"]

Call: TypeAlias = tuple[Any, ...]
Program: TypeAlias = tuple[Call, ...]
Step: TypeAlias = tuple[Any, tuple[Any, ...]]

LENGTH: Final = 30
SLOTS: Final = 6
PORTS: Final = 3  # a program's own
_FIRST, _LAST = 1100, 32_000
OWN: Final = 3  # ephemeral ports, for IP_LOCAL_PORT_RANGE
_FIRST_OWN: Final = 33_000
_PAUSE: Final = 0.06
_STEP: Final = 0.004
_RANGE: Final = (socket.IPPROTO_IP, 51)  # IP_LOCAL_PORT_RANGE
_ANY: Final = bytes(4)
_PLAIN_POLL: Final = 0x1 | 0x4 | 0x8 | 0x10 | 0x2000  # IN, OUT, ERR, HUP, RDHUP

_V4: Final = ("127.0.0.1", "127.0.0.1", "127.0.0.1", "127.0.0.2", "0.0.0.0")
_V6: Final = ("::1", "::1", "::", "::ffff:127.0.0.1")
_OPTIONS: Final = {
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "SO_REUSEPORT": (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    "SO_KEEPALIVE": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "TCP_NODELAY": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "TCP_CORK": (socket.IPPROTO_TCP, socket.TCP_CORK),
    "IPV6_V6ONLY": (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
    "IP_BIND_ADDRESS_NO_PORT": (socket.IPPROTO_IP, 24),
    "TCP_LINGER2": (socket.IPPROTO_TCP, socket.TCP_LINGER2),
    "TCP_USER_TIMEOUT": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "TCP_KEEPIDLE": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "TCP_KEEPINTVL": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "TCP_KEEPCNT": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
}
_SIZES: Final = {
    "SO_SNDBUF": (socket.SOL_SOCKET, socket.SO_SNDBUF),
    "SO_RCVBUF": (socket.SOL_SOCKET, socket.SO_RCVBUF),
}
_FLAGS: Final = {
    "MSG_MORE": socket.MSG_MORE,
    "MSG_WAITALL": socket.MSG_WAITALL,
    "MSG_TRUNC": socket.MSG_TRUNC,
    "MSG_TRUNC|MSG_PEEK": socket.MSG_TRUNC | socket.MSG_PEEK,
    "MSG_OOB": socket.MSG_OOB,
    "MSG_ERRQUEUE": socket.MSG_ERRQUEUE,
}
_READ_ONLY: Final = {
    "SO_ERROR": (socket.SOL_SOCKET, socket.SO_ERROR),
    "SO_ACCEPTCONN": (socket.SOL_SOCKET, socket.SO_ACCEPTCONN),
    "SO_TYPE": (socket.SOL_SOCKET, socket.SO_TYPE),
    "SO_DOMAIN": (socket.SOL_SOCKET, socket.SO_DOMAIN),
    "SO_PROTOCOL": (socket.SOL_SOCKET, socket.SO_PROTOCOL),
    "SO_LINGER": (socket.SOL_SOCKET, socket.SO_LINGER),
}


@frozen
class Difference:
    """Where the stacks part: after `program`'s call number `at` (from 0)."""

    program: Program
    at: int
    kernel: Step
    model: Step
    seed: str = ""


def program(seed: int | str, index: int, length: int = LENGTH) -> Program:
    """The random program of that seed and number."""
    dice = Random(f"{seed}/calls/{index}")
    calls: list[Call] = []
    families: dict[int, int] = {}
    listeners: list[int] = []
    full = filled = False  # whether a buffer may be full now, or has been
    mapped: dict[int, bool] = {}  # whether an IPv6 socket's first connect() was to a mapped address

    def add(*call: Any) -> None:
        calls.append(call)

    def pair(family: int, small: bool = False) -> list[int]:
        """The common opening, so that programs get somewhere: a listener and its client.

        `small` is what one of them can receive. It is so from the start: what is
        in flight when SO_RCVBUF shrinks Linux may drop, see docs/differences.md.
        """
        ends = sorted(set(range(SLOTS)) - set(families))[:2]
        if len(ends) == 2:
            server, client = ends
            port = dice.choice((1, 2, 3))
            families[server] = families[client] = family
            home = (_V6 if family == 6 else _V4)[0]
            mapped.pop(server, None)
            mapped[client] = False
            add("socket", server, family)
            add("bind", server, home, port)
            add("listen", server, dice.choice((0, 1, 5)))
            add("socket", client, family)
            if small:
                add("size", dice.choice(ends), "SO_RCVBUF", 5000)
            add("connect", client, home, port)
            listeners.append(server)
        return ends

    def accepted(server: int, family: int) -> int:
        """The slot of what that listener accepted."""
        new = min(set(range(SLOTS)) - set(families))
        families[new] = family
        mapped.pop(new, None)
        add("accept", server, new)
        return new

    for _ in range(dice.randint(2, length)):
        slots = list(families)
        if not slots or (len(slots) < SLOTS and dice.random() < 0.2):
            slot = min(set(range(SLOTS)) - set(slots))
            families[slot] = 6 if dice.random() < 0.3 else 4
            mapped.pop(slot, None)
            add("socket", slot, families[slot])
            continue
        slot = dice.choice(slots)
        family = families[slot]
        addresses = _V6 if family == 6 else _V4
        match dice.choices(
            (
                "bind",
                "listen",
                "connect",
                "accept",
                "send",
                "recv",
                "peek",
                "shutdown",
                "close",
                "set",
                "get",
                "linger",
                "name",
                "peer",
                "pause",
                "pair",
                "sendmsg",
                "recv_into",
                "size",
                "range",
                "fill",
                "more",
                "flags",
            ),
            (10, 9, 12, 12, 8, 7, 1, 7, 8, 5, 3, 2, 2, 2, 0.6, 6, 2, 2, 0.5, 1, 0.6, 1.5, 1.5),
        )[0]:
            case "send" | "more" | "recv" | "flags" | "peek" | "sendmsg" | "recv_into" if full:
                if dice.random() < 0.5:
                    add("drain")
                    full = False
            case "bind":
                add("bind", slot, dice.choice(addresses), dice.choice((0, 1, 1, 2, 3)))
            case "listen":
                add("listen", slot, dice.choice((0, 0, 1, 2, 5)))
                listeners.append(slot)
            case "connect":
                address = dice.choice(addresses)
                # Linux leaves a socket that changes between them half of each: see
                # docs/differences.md.
                if family == 6 and mapped.setdefault(slot, "." in address) != ("." in address):
                    continue
                add("connect", slot, address, dice.choice((1, 1, 2, 3)))
            case "accept":
                if len(families) == SLOTS:
                    add("close", slot)
                    del families[slot]
                    continue
                source = dice.choice(listeners or slots)
                if source not in families:
                    continue
                accepted(source, families[source])
                if filled:
                    add("drain")  # what waited in the listener's queue
            case "send":
                add("send", slot, dice.choice((0, 1, 100, 1500, 3000)))
            case "more":
                ends = pair(family)
                if len(ends) == 2 and len(families) < SLOTS:
                    sender, reader = dice.sample((ends[1], accepted(ends[0], family)), 2)
                    for _ in range(dice.randint(1, 3)):
                        add("send", sender, dice.choice((0, 1, 100)), "MSG_MORE")
                        match dice.choice(("send", "answer", "set", "pause", "go on")):
                            case "send":
                                add("send", sender, dice.choice((0, 100)))
                            case "answer":
                                add("send", reader, 1)
                            case "set":
                                option = dice.choice(("TCP_NODELAY", "TCP_CORK"))
                                add("set", sender, option, dice.choice((0, 1)))
                            case "pause":
                                add("pause")
                        add("recv", reader, 100_000)
                    # What comes now would show whether the memory was at hand for it.
                    add("send", sender, 1)
            case "flags":
                add("recv_into", slot, dice.choice((1, 50)), 0, dice.choice(tuple(_FLAGS)))
            case "sendmsg":
                add("sendmsg", slot, dice.choice((0, 1, 1500)), dice.choice((0, 100)))
            case "recv":
                add("recv", slot, dice.choice((0, 1, 50, 100_000, 100_000)))
            case "recv_into":
                add("recv_into", slot, dice.choice((1, 50, 100_000)), dice.choice((0, 0, 10)))
            case "size":
                add("size", slot, dice.choice(tuple(_SIZES)), dice.choice((150_000, 10**8)))
            case "range":
                add("range", slot, *dice.choice(((0, 0), (1, 1), (0, 2), (1, None), (2, 1))))
                if dice.random() < 0.7:
                    add("bind", slot, dice.choice(addresses), 0)
                    add("name", slot)
            case "fill":
                ends = pair(family, small=dice.random() < 0.15)
                if len(ends) == 2:
                    if len(families) < SLOTS and dice.random() < 0.7:
                        ends.append(accepted(ends[0], family))
                    if dice.random() < 0.15:
                        add("size", ends[-1], "SO_SNDBUF", 5000)
                    add("fill", dice.choice(ends[1:]))
                    full = filled = True
            case "peek":
                add("peek", slot, 10)
            case "shutdown":
                add("shutdown", slot, dice.choice((0, 1, 1, 2)))
            case "close":
                add("close", slot)
                del families[slot]
            case "set":
                add("set", slot, dice.choice(tuple(_OPTIONS)), dice.choice((0, 1, 1)))
            case "get":
                add("get", slot, dice.choice((*_OPTIONS, *_READ_ONLY)))
            case "linger":
                add("linger", slot, *dice.choice(((1, 0), (1, 0), (0, 0), (1, 1))))
            case "name":
                add("name", slot)
            case "peer":
                add("peer", slot)
            case "pause":
                add("pause")
            case "pair":
                pair(family)
    return tuple(calls[:length])


# Playing.


def on_kernel(programs: Sequence[Program]) -> list[list[Step]]:
    """What the kernel did. Raises `PermissionError` where no namespace is allowed."""
    from timewait.kernel.namespace import Namespace

    with Namespace() as namespace:
        return namespace.call(_play_on_kernel, programs)


def _play_on_kernel(programs: Sequence[Program]) -> list[list[Step]]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        return [_play(p, ports, _poll) for p, ports in _with_ports(programs)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def on_model(programs: Sequence[Program], profile: str = "linux") -> list[list[Step]]:
    """What the model does."""
    from timewait import sim

    async def main() -> list[list[Step]]:
        return [_play(p, ports, lambda sock: sock.poll()) for p, ports in _with_ports(programs)]

    return sim.run(main, profile=profile)


@frozen
class _Ports:
    """A program's own ports: what another left behind is in nobody's way."""

    base: int  # the first of those it names
    own: int  # the first of its ephemeral ones


def _with_ports(programs: Sequence[Program]) -> Iterator[tuple[Program, _Ports]]:
    if len(programs) > (_LAST - _FIRST) // (PORTS + 1):
        raise ValueError("too many programs for one stack's ports")
    for number, calls in enumerate(programs):
        yield calls, _Ports(_FIRST + number * (PORTS + 1), _FIRST_OWN + number * OWN)


def _poll(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock, _PLAIN_POLL)
    found = poll.poll(0)
    return found[0][1] if found else 0


def _play(calls: Program, ports: _Ports, poll: Callable[[Any], int]) -> list[Step]:
    """Play a program on the stack of wherever this runs; a step for each call."""
    slots: dict[int, socket.socket] = {}
    steps: list[Step] = []
    for call in calls:
        try:
            result = _call(slots, ports, *call)
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, str(error))
        except KeyError:
            result = "no such socket"
        seen = tuple((slot, _state(sock), poll(sock)) for slot, sock in sorted(slots.items()))
        steps.append((result, seen))
    for sock in slots.values():
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    return steps


def _state(sock: socket.socket) -> int:
    info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)
    return info[0]


def _call(slots: dict[int, socket.socket], ports: _Ports, name: str, *rest: Any) -> Any:
    if name == "pause":
        time.sleep(_PAUSE)
        return "ok"
    if name == "drain":
        return _drain(slots)
    slot, *arguments = rest
    if name == "socket":
        family = socket.AF_INET6 if arguments[0] == 6 else socket.AF_INET
        _put(slots, slot, socket.socket(family, socket.SOCK_STREAM))
        return "ok"
    sock = slots[slot]
    match name, *arguments:
        case "bind", address, port:
            sock.bind((address, ports.base + port - 1 if port else 0))
        case "listen", backlog:
            sock.listen(backlog)
        case "connect", address, port:
            sock.connect((address, ports.base + port - 1))
        case "accept", new:
            accepted, peer = sock.accept()
            _put(slots, new, accepted)
            return _place(peer, ports)
        case "send", size, *flags:
            return sock.send(_text(size), *map(_FLAGS.__getitem__, flags))
        case "sendmsg", first, second:
            return sock.sendmsg([_text(first), bytearray(_text(second))])
        case ("fill",):
            return _fill(sock)
        case "recv", size:
            return sock.recv(size)
        case "recv_into", size, limit, *flags:
            buffer = bytearray(size)
            taken = sock.recv_into(buffer, min(limit, size), *map(_FLAGS.__getitem__, flags))
            return bytes(buffer[:taken])
        case "peek", size:
            return sock.recv(size, socket.MSG_PEEK)
        case "shutdown", how:
            sock.shutdown(how)
        case ("close",):
            del slots[slot]
            sock.close()
        case "set", option, value:
            sock.setsockopt(*_OPTIONS[option], value)
        case "get", option:
            return sock.getsockopt(*(_OPTIONS | _READ_ONLY)[option])
        case "size", option, value:
            sock.setsockopt(*_SIZES[option], value)
            return sock.getsockopt(*_SIZES[option])
        case "range", first, last:
            low = ports.own + first if last != 0 else 0
            high = ports.own + last if last else 0
            value = struct.pack("I", high << 16 | low)
            sock.setsockopt(*_RANGE, value)
        case "linger", on, seconds:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", on, seconds))
        case ("name",):
            address = sock.getsockname()
            if ports.own <= address[1] < ports.own + OWN and sock.getsockopt(*_RANGE, 4) != _ANY:
                return address[0], "own ephemeral"
            return _place(address, ports)
        case ("peer",):
            return _place(sock.getpeername(), ports)
        case _:
            raise AssertionError(name)
    return "ok"


def _put(slots: dict[int, socket.socket], slot: int, sock: socket.socket) -> None:
    """Have a socket in its slot; what a shortened program did not close goes now."""
    if slot in slots:
        slots[slot].close()
    sock.setblocking(False)
    slots[slot] = sock


def _text(size: int) -> bytes:
    return bytes(i & 255 for i in range(size))


def _fill(sock: socket.socket) -> str:
    """Send until nothing more is taken, for good."""
    refused = 0
    while refused < _PAUSE / _STEP:
        try:
            sock.send(bytes(65536))
            refused = 0
        except BlockingIOError:
            time.sleep(_STEP)
            refused += 1
    return "full"


def _drain(slots: dict[int, socket.socket]) -> tuple[tuple[int, str], ...]:
    """Have every socket read until nothing more comes; how that ended for each."""
    ends: dict[int, str] = {}
    came = True
    while came:
        came = False
        for slot, sock in slots.items():
            while ends.get(slot, "EAGAIN") == "EAGAIN":
                try:
                    if sock.recv(1 << 20):
                        came = True
                    else:
                        ends[slot] = "end"
                except OSError as error:
                    ends[slot] = errno.errorcode[error.errno or 0]
                    break
        if came:
            time.sleep(_PAUSE)
    return tuple(sorted(ends.items()))


def _place(address: Any, ports: _Ports) -> Any:
    host, port = address[:2]
    if port == 0:
        return host, 0
    return host, port - ports.base + 1 if 0 <= port - ports.base < PORTS else "ephemeral"


# Comparing.


def compare(programs: Sequence[Program], *, again: int = 3) -> list[Difference]:
    """The programs on which the stacks differ; the kernel is asked `again` times to be sure."""
    differences = []
    for calls, theirs, ours in zip(programs, on_kernel(programs), on_model(programs), strict=True):
        if theirs != ours:
            difference = _sure(calls, ours, again)
            if difference is not None:
                differences.append(difference)
    return differences


def _sure(calls: Program, ours: list[Step], again: int) -> Difference | None:
    """The difference, if the kernel insists."""
    difference = None
    for _ in range(again):
        (theirs,) = on_kernel([calls])
        if theirs == ours:
            return None
        at = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        difference = Difference(calls, at, theirs[at], ours[at])
    return difference


def shrink(difference: Difference) -> Difference:
    """The shortest program that still shows a difference (each call left out in turn)."""
    best = difference
    calls = best.program[: best.at + 1]
    while True:
        candidates = [calls[:i] + calls[i + 1 :] for i in range(len(calls))]
        candidates = [c for c in candidates if c]
        if not candidates:
            return best
        found = None
        for shorter in _differing(candidates):
            found = _sure(shorter.program, on_model([shorter.program])[0], 2)
            if found is not None:
                break
        if found is None:
            return best
        best = found
        calls = best.program[: best.at + 1]


def _differing(programs: Sequence[Program]) -> Iterable[Difference]:
    for calls, theirs, ours in zip(programs, on_kernel(programs), on_model(programs), strict=True):
        for at, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            if left != right:
                yield Difference(calls, at, left, right)
                break


_STATES: Final = (
    *("?", "ESTABLISHED", "SYN_SENT", "SYN_RECEIVED", "FIN_WAIT_1", "FIN_WAIT_2", "TIME_WAIT"),
    *("CLOSED", "CLOSE_WAIT", "LAST_ACK", "LISTEN", "CLOSING", "SYN_RECEIVED"),
)
_BITS: Final = {0x1: "IN", 0x4: "OUT", 0x8: "ERR", 0x10: "HUP", 0x2000: "RDHUP"}


def show(difference: Difference) -> str:
    """The program, and what each stack did at the end of it."""
    lines = []
    for number, (name, *rest) in enumerate(difference.program[: difference.at + 1]):
        lines.append(f"  {number + 1:2}. {name}({', '.join(map(str, rest))})")
    for stack, (result, seen) in (("kernel", difference.kernel), ("model", difference.model)):
        text = ", ".join(
            f"{slot}: {_STATES[state]} {'|'.join(n for b, n in _BITS.items() if mask & b) or '-'}"
            for slot, state, mask in seen
        )
        shown = f"{len(result)} bytes" if isinstance(result, bytes) and result else result
        lines.append(f"  {stack + ':':8}{shown}   [{text}]")
    return "\n".join(lines)

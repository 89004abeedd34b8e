"""What the differential machine for segments plays: a connection, and what is done to it.

A `Case` is a connection and a sequence of `Step`s: a call of its user's, or a
segment from its peer. They are made up on the way, since a peer that has seen
what the stack sent can aim: at the edges of the window as often as inside or
outside of it, at what is acknowledged, at a FIN sent already.
"""

from __future__ import annotations

import errno
import fcntl
import random
import socket
import struct
import sys
from typing import Any, Final

from attrs import define, frozen

from timewait.packetdrill.calls import CONSTANTS, ERRNO_NAMES
from timewait.packetdrill.frames import Frame, flags_letters
from timewait.packetdrill.script import Option
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN

__all__ = ["ISN", "MASK", "PORT", "SETTINGS", "Case", "Step", "View", "frame", "perform"]

PORT: Final = 8080
ISN: Final = 1_000_000  # the peer's; the script's numbers count from it
MASK: Final = 0xFFFFFFFF

# Settings of a batch by name: each with its value then, and what it is otherwise.
SETTINGS: Final[dict[str, dict[str, tuple[int, int]]]] = {
    "": {},
    "impatient": {  # what takes minutes takes seconds
        "tcp_syn_retries": (1, 6),
        "tcp_syn_linear_timeouts": (0, 4),
        "tcp_synack_retries": (1, 5),
        "tcp_retries2": (3, 15),
        "tcp_orphan_retries": (1, 0),
        "tcp_fin_timeout": (1, 60),
    },
    "plain": {"tcp_timestamps": (0, 1), "tcp_sack": (0, 1)},
    "rfc1337": {"tcp_rfc1337": (1, 0)},
}

# Options that a step sets: the call's name -> (level, option, what follows from its number).
_OPTIONS: Final[dict[str, tuple[tuple[str, str, int], ...]]] = {
    "nodelay": (("IPPROTO_TCP", "TCP_NODELAY", 1),),
    "keepalive": (
        ("IPPROTO_TCP", "TCP_KEEPIDLE", 1),
        ("IPPROTO_TCP", "TCP_KEEPINTVL", 1),
        ("IPPROTO_TCP", "TCP_KEEPCNT", 2),
        ("SOL_SOCKET", "SO_KEEPALIVE", 1),
    ),
    "linger2": (("IPPROTO_TCP", "TCP_LINGER2", 1),),
    "no_linger2": (("IPPROTO_TCP", "TCP_LINGER2", -1),),
    "user_timeout": (("IPPROTO_TCP", "TCP_USER_TIMEOUT", 700),),
}
# Calls that ask how much is queued: the name -> ioctl(2)'s request.
_QUEUES: Final = {"inq": "SIOCINQ", "outq": "SIOCOUTQ"}


@frozen
class Step:
    """One thing that is done to a connection.

    `call` names a call with `size` its number, or is "" for a segment, whose
    numbers are relative as in a script. `ts` is "" (none), "now", "old" or "new".
    """

    call: str = ""
    size: int = 0
    flags: int = 0
    seq: int = 0
    length: int = 0
    ack: int = 0
    window: int = 65535
    ts: str = ""
    wscale: int | None = None

    def __str__(self) -> str:
        if self.call:
            return f"{self.call}({self.size or ''})"
        text = f"{flags_letters(self.flags)} {self.seq}:{self.seq + self.length}({self.length})"
        return text + (f" ack {self.ack}" if self.flags & ACK else "") + f" win {self.window}"

    def timestamp(self, t: float) -> int:
        """The timestamp of a segment sent `t` seconds into the case."""
        return 100_000 + int(t * 1000) + {"old": -50_000, "new": 50_000}.get(self.ts, 0)


@frozen
class Case:
    """A connection and what is done to it.

    `opening` is how it begins; `six`: over IPv6; `sack`: the peer permits it;
    `mss`: the peer's, in bytes, None where it tells none; `settings`: the stack's, by name.
    """

    active: bool
    timestamps: bool
    steps: tuple[Step, ...] = ()
    opening: str = "usual"
    six: bool = False
    sack: bool = False
    mss: int | None = 1460
    settings: str = ""

    @classmethod
    def fresh(cls, dice: random.Random, settings: str = "") -> Case:
        """A connection to which nothing has been done yet."""
        active = dice.random() < 0.35
        if active:
            opening = dice.choices(["usual", "simultaneous", "refused"], [75, 20, 5])[0]
        else:
            opening = dice.choices(["usual", "text", "early", "twice"], [80, 5, 10, 5])[0]
        return cls(
            active,
            timestamps=dice.random() < 0.4,
            opening=opening,
            six=dice.random() < 0.2,
            sack=dice.random() < 0.3,
            mss=dice.choices([1460, 536, 1000, None], [85, 5, 5, 5])[0],
            settings=settings,
        )

    def begin(self, dice: random.Random, at: int) -> Step | None:
        """The beginning of a case, which one in six leaves."""
        if at and dice.random() < 0.06:
            return None
        ts = "now" if self.timestamps else ""
        scale = dice.choices([None, 7, 0, 2, 14], [45, 40, 5, 5, 5])[0]
        window = dice.choices([65535, 1000, 100], [94, 3, 3])[0]
        syn = Step("", 0, SYN, 0, 0, 0, window, ts, scale)
        ack = Step("", 0, ACK, 1, 0, 1, 65535, ts)
        syn_ack = Step("", 0, SYN | ACK, 0, 0, 1, window, ts, scale)
        accept, connect = Step("accept"), Step("connect")
        text = dice.choice([ACK | PSH, FIN | ACK])
        openings: dict[tuple[bool, str], list[Step | None]] = {
            (True, "usual"): [connect, syn_ack],
            (True, "simultaneous"): [connect, syn, dice.choice([ack, syn_ack, None])],
            (True, "refused"): [connect, Step("", 0, RST | ACK, 0, 0, 1, 0)],
            (False, "usual"): [syn, ack, accept],
            (False, "text"): [Step("", 0, SYN, 0, 10, 0, 65535, ts, scale), ack, accept],
            (False, "early"): [syn, Step("", 0, text, 1, 10, 1, 65535, ts), accept],
            (False, "twice"): [syn, syn, ack, accept],
        }
        steps = openings[self.active, self.opening]
        return steps[at] if at < len(steps) else None


@define
class View:
    """What a peer can know of the connection: enough to aim at the window's edges."""

    snd_una: int = 0  # the stack's numbers
    snd_nxt: int = 0
    rcv_nxt: int = 0
    edge: int = 64240
    scale: int = 0
    offered: int = 0  # the scale in the stack's own SYN
    synchronized: bool = False
    finished: bool = False  # the peer's FIN was sent where it may have been taken

    def scaled(self, step: Step) -> None:
        """An answer to the stack's SYN says whether its scale is in use."""
        if step.flags & (SYN | ACK) == SYN | ACK and step.wscale is not None:
            self.scale = self.offered

    def saw(self, flags: int, seq: int, ack: int, length: int, window: int) -> None:
        """Take note of a segment of the stack's."""
        end = (seq + length + (flags & 1) + (flags >> 1 & 1)) & MASK
        if flags & RST:
            return
        if not (end - self.snd_nxt) & 0x80000000:
            self.snd_nxt = end
        if flags & ACK:
            self.rcv_nxt = ack
            self.edge = ack + (window if flags & SYN else window << self.scale)
            self.synchronized = True

    def step(self, dice: random.Random, case: Case, state: str, has_fd: bool) -> Step | None:
        """Something to do next: a call where there is a socket, or a segment.

        `state` is the stack's; None where that is CLOSED and nothing is left to see.
        """
        if state == "CLOSED" and not has_fd and self.synchronized and dice.random() < 0.7:
            return None
        if has_fd and dice.random() < 0.38:
            return _call(dice)
        if dice.random() < 0.06:
            return Step(
                "wait", dice.choice([300, 1000] if case.settings == "impatient" else [100, 300])
            )
        return self._segment(dice, case, state)

    def _segment(self, dice: random.Random, case: Case, state: str) -> Step:
        closing = state in ("FIN_WAIT_1", "FIN_WAIT_2")
        syn = 12 if state == "TIME_WAIT" else 4
        flags = dice.choices(
            [ACK, ACK | PSH, FIN | ACK, FIN | PSH | ACK, RST, RST | ACK, SYN, SYN | ACK,
             SYN | FIN, SYN | PSH, FIN, 0, PSH, SYN | RST, FIN | RST | ACK],
            [34, 22, 40 if closing else 14, 4, 4, 4, syn, syn, 1, 1, 2, 1, 1, 1, 1],
        )[0]  # fmt: skip
        nxt, edge = self.rcv_nxt, self.edge
        left = [nxt, nxt - 1, nxt - 10, 0]
        right = [nxt + 1, nxt + 100, edge - 1, edge, edge + 1, edge + 500]
        if flags & RST:
            weights = [30, 12, 5, 2, 8, 8, 8, 8, 8, 3]
        elif flags & FIN and self.finished:
            weights = [30, 40, 5, 2, 4, 6, 4, 4, 4, 3]  # the same again
        else:
            weights = [60, 6, 5, 2, 4, 6, 4, 4, 4, 3]
        seq = dice.choices(left + right, weights)[0]
        length = 0
        if flags & PSH or (flags & FIN and dice.random() < 0.3):
            length = dice.choice([1, 10, 100, 1000])
        if flags & FIN:
            if self.finished and seq + length == nxt:
                length = 0  # what a second FIN, one later, leaves unread: see docs/differences.md
            self.finished = self.finished or seq + length >= nxt
        una, snd = self.snd_una, self.snd_nxt
        ack = dice.choices(
            [snd, una, snd - 1, snd + 1, una - 1, snd + 100_000, snd - 100_000],
            [70, 60 if state == "FIN_WAIT_1" else 12, 6, 4, 3, 3, 2],
        )[0]
        if (ack - max(una, 1)) & 0x80000000 and seq == nxt:
            # Whether text in order is taken although its ACK is too old is a matter of the
            # memory at hand (tcp_rcv_established; see docs/differences.md).
            length = 0
        ts = ""
        if case.timestamps:
            ts = dice.choices(["now", "old", "", "new"], [87, 6, 5, 2])[0]
        if flags & ACK and not (ack - una) & 0x80000000 and not (snd - ack) & 0x80000000:
            self.snd_una = ack
        window = dice.choices([65535, 1000, 100, 0, 1], [84, 6, 4, 4, 2])[0]
        return Step("", 0, flags, seq & MASK, length, ack & MASK, window, ts)


def _call(dice: random.Random) -> Step:
    call = dice.choices(
        ["send", "recv", "peek", "shutdown_write", "shutdown_read", "shutdown_both", "close",
         "linger_close", "connect", "so_error", *_QUEUES, *_OPTIONS],
        [28, 24, 2, 12, 4, 2, 12, 3, 1, 2, 2, 3, 3, 3, 2, 1, 2],
    )[0]  # fmt: skip
    return Step(call, dice.choice([1, 100, 1000]) if call in ("send", "recv", "peek") else 0)


def perform(sock: Any, step: Step, remote: tuple[str, int]) -> str:
    """Make a call on either stack's socket: the result, or the error's name."""
    if step.call == "wait":
        return ""
    if sock is None:
        return "EBADF"
    try:
        match step.call:
            case "connect":
                sock.connect(remote)
            case "send":
                return str(sock.send(bytes(step.size), socket.MSG_NOSIGNAL))
            case "recv":
                return str(len(sock.recv(step.size)))
            case "peek":
                return str(len(sock.recv(step.size, socket.MSG_PEEK)))
            case "shutdown_write":
                sock.shutdown(socket.SHUT_WR)
            case "shutdown_read":
                sock.shutdown(socket.SHUT_RD)
            case "shutdown_both":
                sock.shutdown(socket.SHUT_RDWR)
            case "inq" | "outq":
                return str(_queued(sock, CONSTANTS[_QUEUES[step.call]]))
            case "close":
                sock.close()
            case "linger_close":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
            case "so_error":
                got = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR, 4)
                return str(int.from_bytes(got, "little"))
            case _:
                for level, option, value in _OPTIONS[step.call]:
                    number = getattr(socket, option)
                    sock.setsockopt(getattr(socket, level), number, struct.pack("i", value))
    except OSError as failed:
        name = errno.errorcode.get(failed.errno or 0, "?")
        return ERRNO_NAMES.get(name, name)
    return "0"


def _queued(sock: Any, request: int) -> int:
    if not isinstance(sock, socket.socket):
        return int(sock.ioctl(request))
    return int.from_bytes(fcntl.ioctl(sock, request, bytes(4)), sys.byteorder)


def frame(
    case: Case,
    step: Step,
    local: tuple[str, int],
    remote: tuple[str, int],
    isn: int | None,
    ts_seen: int,
    t: float,
) -> Frame:
    """A step's segment with live numbers, `isn` being the stack's first."""
    options: list[Option] = []
    if step.flags & SYN:
        if case.mss is not None:
            options.append(Option(2, case.mss.to_bytes(2, "big")))
        if case.sack:
            options += [Option(1), Option(1), Option(4)]
    if step.ts:
        ecr = ts_seen if step.flags & ACK else 0
        options += [
            Option(1),
            Option(1),
            Option(8, struct.pack("!II", step.timestamp(t), ecr)),
        ]
    if step.flags & SYN and step.wscale is not None:
        options += [Option(1), Option(3, bytes([step.wscale]))]
    seq = (ISN + step.seq) & MASK
    ack = ((isn or 0) + step.ack) & MASK if step.flags & ACK else 0
    return Frame(
        remote[0], local[0], "tcp", (remote[1], local[1]), step.flags, seq, ack, step.window, 0,
        tuple(options), bytes(step.length),
    )  # fmt: skip


def beginning(case: Case, fd: int) -> list[str]:
    """The first lines of a case's script: its settings and its first socket."""
    lines = ["--tolerance_usecs=40000"]
    if case.six:
        lines.append("--ip_version=ipv6")
    lines += [
        f"   +0 `sysctl -q net.ipv4.{name}={value}`"
        for name, (value, _) in SETTINGS[case.settings].items()
    ]
    if case.active:
        return [
            *lines,
            f"   +0 socket(..., SOCK_STREAM|SOCK_NONBLOCK, IPPROTO_TCP) = {fd}",
        ]
    return [
        *lines,
        "   +0 socket(..., SOCK_STREAM|SOCK_NONBLOCK, IPPROTO_TCP) = 3",
        "   +0 bind(3, ..., ...) = 0",
        "   +0 listen(3, 10) = 0",
    ]


def written(
    case: Case, step: Step, result: str, fd: int, gap: float, t: float, echo: int
) -> list[str]:
    """A step as lines of a script, `gap` seconds after the one before, `t` into the case.

    `echo` is the stack's last timestamp.
    """
    at = f"+{gap:.3f}"
    value = f"-1 {result} (error)" if result[:1] == "E" else result
    match step.call:
        case "":
            options = [f"mss {case.mss}"] if step.flags & SYN and case.mss else []
            if step.flags & SYN and case.sack:
                options.append("nop,nop,sackOK")
            if step.ts:
                ecr = echo if step.flags & ACK else 0
                options.append(f"nop,nop,TS val {step.timestamp(t)} ecr {ecr}")
            if step.flags & SYN and step.wscale is not None:
                options.append(f"nop,wscale {step.wscale}")
            tail = f" <{','.join(options)}>" if options else ""
            return [f"{at} < {step}{tail}"]
        case "wait":
            return []
        case "connect":
            return [f"{at} connect({fd}, ..., ...) = {value}"]
        case "accept":
            return [f"{at} accept(3, ..., ...) = {value if value[0] == '-' else fd}"]
        case "send" | "recv":
            return [f"{at} {step.call}({fd}, ..., {step.size}, 0) = {value}"]
        case "peek":
            return [f"{at} recv({fd}, ..., {step.size}, MSG_PEEK) = {value}"]
        case "shutdown_write" | "shutdown_read" | "shutdown_both":
            how = {"write": "SHUT_WR", "read": "SHUT_RD", "both": "SHUT_RDWR"}[step.call[9:]]
            return [f"{at} shutdown({fd}, {how}) = {value}"]
        case "so_error":
            return [f"{at} getsockopt({fd}, SOL_SOCKET, SO_ERROR, [{value}], [4]) = 0"]
        case "inq" | "outq":
            tail = f"[{value}]) = 0" if value.isdecimal() else f"[0]) = {value}"
            return [f"{at} ioctl({fd}, {_QUEUES[step.call]}, {tail}"]
        case "close":
            return [f"{at} close({fd}) = {value}"]
        case "linger_close":
            linger = "{onoff=1, linger=0}"
            return [
                f"{at} setsockopt({fd}, SOL_SOCKET, SO_LINGER, {linger}, 8) = 0",
                f"   +0 close({fd}) = {value}",
            ]
    return [
        f"{at if n == 0 else '   +0'} setsockopt({fd}, {level}, {option}, [{number}], 4) = {value}"
        for n, (level, option, number) in enumerate(_OPTIONS[step.call])
    ]

"""The differential machine for segments: the same calls and segments to kernel and model.

A case is a connection and a random sequence of steps: a call of its user's, or
a segment from its peer, on the edges of the window as often as inside or
outside of it. Many cases run side by side on one wire, each with its own ports,
since most of a case is waiting. What the kernel did, and when, is recorded;
then the model gets the same steps at the same times, and both records are held
against each other: every segment sent (flags, sequence and acknowledgment
numbers, length), every call's result, the state and poll(2)'s answer after
each step, and when TIME_WAIT ends.

Kernel timers have a grain, and a step may come just before one on one stack
and just after it on the other. So a difference counts only if it stays when
the case is run again with other pauses; then it is shrunk to the fewest steps
that show it, and printed as a packetdrill script that expects what the kernel did.
"""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from attrs import define, evolve, field, frozen

from timewait.kernel.sock_diag import Details, details
from timewait.kernel.wire import Wire
from timewait.packetdrill.calls import ERRNO_NAMES, _poll_text
from timewait.packetdrill.frames import Frame, decode, encode, flags_letters
from timewait.packetdrill.on_kernel import undisturbed
from timewait.packetdrill.on_model import ModelSocket, ModelStack
from timewait.packetdrill.script import Option
from timewait.packetdrill.settings import Settings
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN

__all__ = ["Case", "Difference", "Fuzzer", "Step"]

LOCAL, REMOTE, PORT = "192.168.0.1", "192.0.2.1", 8080
_ISN: Final = 1_000_000  # the peer's; the script's numbers count from it
_MASK: Final = 0xFFFFFFFF
_GAPS: Final = (0.060, 0.047, 0.075)  # s between steps: at first, and when run again
_GRAIN: Final = 0.045  # s by which a timer's segment may come earlier or later
_MOST: Final = select.POLLIN | select.POLLOUT | 0x2000


@frozen
class Step:
    """One thing that is done to a connection.

    `call` names a call with `size` its number, or is "" for a segment, whose
    numbers are relative as in a script. `ts` is "" (none), "now" or "old".
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


@frozen
class Case:
    """A connection and what is done to it."""

    active: bool
    timestamps: bool
    steps: tuple[Step, ...] = ()


@frozen
class _Sent:
    """A segment of the stack's, relative numbers."""

    t: float
    flags: int
    seq: int
    ack: int
    length: int
    timestamp: bool
    syn: bool
    edge: int | None = None  # the right edge of the window that it tells

    @property
    def what(self) -> tuple[int, int, int, int, bool]:
        """All that is compared; neither a SYN's options nor PSH (see docs/differences.md)."""
        timestamp = self.timestamp and not self.syn
        return self.flags & ~PSH, self.seq, self.ack, self.length, timestamp

    def __str__(self) -> str:
        text = f"{flags_letters(self.flags)} {self.seq}:{self.seq + self.length}({self.length})"
        return text + (f" ack {self.ack}" if self.flags & ACK else "")


@define
class _Trace:
    """What one stack did in one case, step by step."""

    times: list[float] = field(factory=list)
    results: list[str] = field(factory=list)
    states: list[str] = field(factory=list)
    ready: list[str] = field(factory=list)
    edges: list[int | None] = field(factory=list)
    sent: list[_Sent] = field(factory=list)
    time_wait_ends: float | None = None
    ended: float = 0.0

    def see_edge(self, rcv_wnd: int | None, small: bool) -> None:
        """Note where the receive window ends now: as told, and it never moves left.

        A window field can be too small to tell it all, TCP_INFO's `rcv_wnd` is not.
        """
        edge = ack = None
        for sent in self.sent:
            if sent.edge is not None:
                ack = sent.ack
                edge = sent.edge if edge is None or sent.syn else max(edge, sent.edge)
        if edge is not None and ack is not None and rcv_wnd is not None:
            edge = max(edge, ack + rcv_wnd)
        before = self.edges[-1] if self.edges else None
        if small and before is not None:
            edge = before if edge is None else max(edge, before)
        self.edges.append(edge)


@define
class Difference:
    """Where the two parted: at which step, over what, and what each did."""

    case: Case
    step: int
    about: str
    kernel: str
    model: str
    trace: _Trace = field(repr=False)

    def script(self) -> str:
        """A packetdrill script that expects what the kernel did."""
        return "\n".join(_script(self.case, self.trace))

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "step": self.step,
            "about": self.about,
            "kernel": self.kernel,
            "model": self.model,
            "script": self.script(),
        }


# ------------------------------------------------------------------ making cases


@define
class _View:
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
        end = (seq + length + (flags & 1) + (flags >> 1 & 1)) & _MASK
        if flags & RST:
            return
        if not (end - self.snd_nxt) & 0x80000000:
            self.snd_nxt = end
        if flags & ACK:
            self.rcv_nxt = ack
            self.edge = ack + (window if flags & SYN else window << self.scale)
            self.synchronized = True


def _random_step(dice: random.Random, view: _View, case: Case, has_fd: bool) -> Step:
    if has_fd and dice.random() < 0.35:
        call = dice.choices(
            ["send", "recv", "shutdown_write", "shutdown_read", "close", "linger_close"],
            [30, 30, 14, 4, 14, 4],
        )[0]
        size = dice.choice([1, 100, 1000]) if call in ("send", "recv") else 0
        return Step(call, size)
    if dice.random() < 0.06:
        return Step("wait", dice.choice([100, 300]))
    flags = dice.choices(
        [ACK, ACK | PSH, FIN | ACK, FIN | PSH | ACK, RST, RST | ACK, SYN, SYN | ACK, SYN | FIN,
         FIN, 0, PSH, SYN | RST, FIN | RST | ACK],
        [34, 22, 14, 4, 4, 4, 4, 4, 1, 2, 1, 1, 1, 1],
    )[0]  # fmt: skip
    nxt, edge = view.rcv_nxt, view.edge
    seq = dice.choices(
        [nxt, nxt - 1, nxt - 10, 0, nxt + 1, nxt + 100, edge - 1, edge, edge + 1, edge + 500],
        [60, 6, 5, 2, 4, 6, 4, 4, 4, 3],
    )[0]
    length = 0
    if flags & PSH or (flags & FIN and dice.random() < 0.3):
        length = dice.choice([1, 10, 100, 1000])
    if flags & FIN:
        if view.finished and seq + length == nxt:
            length = 0  # what a second FIN, one later, leaves unread: see docs/differences.md
        view.finished = view.finished or seq + length >= nxt
    una, snd = view.snd_una, view.snd_nxt
    ack = dice.choices(
        [snd, una, snd - 1, snd + 1, una - 1, snd + 100_000, snd - 100_000],
        [70, 12, 6, 4, 3, 3, 2],
    )[0]
    if (ack - max(una, 1)) & 0x80000000:
        # Whether text in order is taken although its ACK is too old is a matter of the
        # memory at hand (tcp_rcv_established; see docs/differences.md).
        length = 0 if seq == nxt else length
    ts = ""
    if case.timestamps:
        ts = dice.choices(["now", "old", ""], [90, 5, 5])[0]
    if flags & ACK and not (ack - una) & 0x80000000 and not (snd - ack) & 0x80000000:
        view.snd_una = ack
    window = dice.choices([65535, 1000, 100], [90, 6, 4])[0]
    return Step("", 0, flags, seq & _MASK, length, ack & _MASK, window, ts)


def _opening(dice: random.Random, case: Case, view: _View, at: int) -> Step | None:
    """The usual beginning of a case, which one in six leaves."""
    ts = "now" if case.timestamps else ""
    if at and dice.random() < 0.06:
        return None
    if case.active:
        usual = [
            Step("connect"),
            Step("", 0, SYN | ACK, 0, 0, 1, 65535, ts, dice.choice([None, 7])),
        ]
    else:
        usual = [
            Step("", 0, SYN, 0, 0, 0, 65535, ts, dice.choice([None, 7])),
            Step("", 0, ACK, 1, 0, 1, 65535, ts),
            Step("accept"),
        ]
    return usual[at] if at < len(usual) else None


# ------------------------------------------------------------------ the kernel


@define
class _Live:
    """A case on the kernel."""

    case: Case
    dice: random.Random | None
    length: int
    local: tuple[str, int]
    remote: tuple[str, int]
    view: _View = field(factory=_View)
    trace: _Trace = field(factory=_Trace)
    sock: socket.socket | None = None
    isn: int | None = None
    ts_seen: int = 0
    steps: list[Step] = field(factory=list)


class _Kernel:
    """All cases of a batch on one wire, in rounds: a step of each, then a pause."""

    def __init__(self) -> None:
        self.wire = Wire(((LOCAL, 16),), (REMOTE,), offload=False)
        self.wire.sysctl("net.ipv4.tcp_syncookies", 0)
        self.wire.sysctl("net.ipv4.tcp_max_syn_backlog", 65535)
        # Else a connection begins with what was learnt of the round trip in those before it.
        self.wire.sysctl("net.ipv4.tcp_no_metrics_save", 1)
        self.listener = self.wire.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.listener.bind((LOCAL, PORT))
        self.listener.listen(4096)
        self.next_port = 20000
        self.accepted: dict[tuple[str, int], socket.socket] = {}
        self.by_ports: dict[tuple[int, int], _Live] = {}

    def close(self) -> None:
        for sock in self.accepted.values():
            sock.close()
        self.listener.close()
        self.wire.close()

    def run(
        self, cases: list[tuple[Case, random.Random | None]], length: int, gap: float
    ) -> list[tuple[Case, _Trace]]:
        """Play cases; those with dice are made up on the way, `length` steps each."""
        start = time.monotonic()
        lives = []
        for case, dice in cases:
            port = self.next_port
            self.next_port += 1
            if self.next_port > 60000:
                self.next_port = 20000
            remote = (REMOTE, port)
            live = _Live(case, dice, length, (LOCAL, 0 if case.active else PORT), remote)
            lives.append(live)
            if case.active:
                self.by_ports[0, port] = live
            else:
                self.by_ports[PORT, port] = live
        rounds = max(length if dice else len(case.steps) for case, dice in cases)
        for number in range(rounds):
            until = time.monotonic() + gap
            for live in lives:
                step = self._next(live, number)
                if step is None:
                    continue
                if step.call == "wait":
                    until = max(until, time.monotonic() + step.size / 1000)
                self._do(live, step, start)
                self._read(start)
            self._pause(until, start)
            self._look(lives, start, number)
        rows = self._rows()
        now = time.monotonic() - start
        for live in lives:
            live.trace.ended = now
            found = rows.get((live.local, live.remote))
            row = None if found is None else found.row
            if row is not None and row.timer == "time_wait" and row.seconds_left is not None:
                live.trace.time_wait_ends = now + row.seconds_left
            if live.sock is not None:
                live.sock.close()
            waiting = self.accepted.pop(live.remote, None)
            if waiting is not None:
                waiting.close()
            self._end(live)
        self.by_ports.clear()
        return [(evolve(live.case, steps=tuple(live.steps)), live.trace) for live in lives]

    def _end(self, live: _Live) -> None:
        """Reset what is left of a connection, so that nothing of it disturbs the next batch."""
        if live.isn is None:
            return
        seq = (_ISN + live.view.rcv_nxt) & _MASK
        ack = (live.isn + live.view.snd_nxt) & _MASK
        self.wire.send(
            encode(
                Frame(REMOTE, LOCAL, "tcp", (live.remote[1], live.local[1]), RST | ACK, seq, ack, 0)
            )
        )

    def _next(self, live: _Live, number: int) -> Step | None:
        if live.dice is None:
            return live.case.steps[number] if number < len(live.case.steps) else None
        if number >= live.length:
            return None
        step = _opening(live.dice, live.case, live.view, number)
        if step is None:
            step = _random_step(live.dice, live.view, live.case, live.sock is not None)
        return step

    def _do(self, live: _Live, step: Step, start: float) -> None:
        live.steps.append(step)
        t = time.monotonic() - start
        live.trace.times.append(t)
        live.trace.results.append(self._call(live, step) if step.call else "")
        if not step.call:
            if live.local[1] == 0 and live.isn is None and live.case.active:
                return  # nobody to send to: it has not connected
            self.wire.send(encode(_frame(step, live.local, live.remote, live.isn, live.ts_seen, t)))
            live.view.scaled(step)

    def _call(self, live: _Live, step: Step) -> str:
        if step.call == "connect":
            live.sock = self.wire.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if step.call == "accept":
            with suppress(BlockingIOError):
                while True:
                    taken, peer = self.listener.accept()
                    taken.setblocking(False)
                    self.accepted[peer] = taken
            live.sock = self.accepted.pop(live.remote, None)
            return "0" if live.sock is not None else "EAGAIN"
        result = _perform(live.sock, step, live.remote)
        if step.call in ("close", "linger_close"):
            live.sock = None
        return result

    def _read(self, start: float) -> None:
        while (octets := self.wire.read()) is not None:
            t = self.wire.sent_at - start
            frame = decode(octets, t)
            if frame is None or frame.protocol != "tcp":
                continue
            local, remote = frame.ports
            live = self.by_ports.get((local, remote))
            if live is None:
                live = self.by_ports.get((0, remote))
                if live is None or not live.case.active:
                    continue
                live.local = (LOCAL, local)
            _note(live, frame, t)

    def _pause(self, until: float, start: float) -> None:
        while (left := until - time.monotonic()) > 0:
            if self.wire.wait(left):
                self._read(start)

    def _rows(self) -> dict[tuple[tuple[str, int], tuple[str, int]], Details]:
        found = self.wire.namespace.call(_with_info)
        return {(each.row.local, each.row.remote): each for each in found}

    def _look(self, lives: list[_Live], start: float, number: int) -> None:
        rows = self._rows()
        self._read(start)
        for live in lives:
            if number >= len(live.steps):
                continue
            found = rows.get((live.local, live.remote))
            state = "CLOSED" if found is None else found.row.state.name
            info = None if found is None else found.info
            live.trace.states.append(state)
            live.trace.see_edge(
                None if info is None else info["rcv_wnd"], state in ("FIN_WAIT_2", "TIME_WAIT")
            )
            live.trace.ready.append(_readiness(live.sock))


def _with_info() -> list[Details]:
    return details(info=True)


def _readiness(sock: Any) -> str:
    if sock is None:
        return ""
    if isinstance(sock, ModelSocket):
        always = select.POLLERR | select.POLLHUP
        return _poll_text(sock.events() & (_MOST | always))
    poller = select.poll()
    poller.register(sock, _MOST)
    return _poll_text(dict(poller.poll(0)).get(sock.fileno(), 0))


def _perform(sock: Any, step: Step, remote: tuple[str, int]) -> str:
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
            case "shutdown_write":
                sock.shutdown(socket.SHUT_WR)
            case "shutdown_read":
                sock.shutdown(socket.SHUT_RD)
            case "close":
                sock.close()
            case "linger_close":
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.close()
    except OSError as failed:
        name = errno.errorcode.get(failed.errno or 0, "?")
        return ERRNO_NAMES.get(name, name)
    return "0"


def _frame(
    step: Step,
    local: tuple[str, int],
    remote: tuple[str, int],
    isn: int | None,
    ts_seen: int,
    t: float,
) -> Frame:
    """A step's segment with live numbers."""
    options: list[Option] = []
    if step.flags & SYN:
        options.append(Option(2, (1460).to_bytes(2, "big")))
    if step.ts:
        now = 100_000 + int(t * 1000)
        val = now if step.ts == "now" else now - 50_000
        ecr = ts_seen if step.flags & ACK else 0
        options += [Option(1), Option(1), Option(8, struct.pack("!II", val, ecr))]
    if step.flags & SYN and step.wscale is not None:
        options += [Option(1), Option(3, bytes([step.wscale]))]
    seq = (_ISN + step.seq) & _MASK
    ack = ((isn or 0) + step.ack) & _MASK if step.flags & ACK else 0
    return Frame(
        REMOTE, LOCAL, "tcp", (remote[1], local[1]), step.flags, seq, ack, step.window, 0,
        tuple(options), bytes(step.length),
    )  # fmt: skip


def _note(live: Any, frame: Frame, t: float) -> None:
    """Record a segment of the stack's in the case's own numbers."""
    if live.isn is None and frame.flags & SYN:
        live.isn = frame.seq
    isn = live.isn or 0
    timestamp = False
    for option in frame.options:
        if option.kind == 8 and len(option.data) == 8:
            live.ts_seen = int.from_bytes(option.data[:4], "big")
            timestamp = True
    if frame.flags & SYN:
        scales = [option.data[0] for option in frame.options if option.kind == 3]
        live.view.offered = scales[0] if scales else 0
        live.view.scale = 0 if live.case.active else live.view.offered
    seq = (frame.seq - isn) & _MASK
    if frame.seq == 0 and frame.flags == RST | ACK:
        seq = 0
    elif frame.flags & SYN and frame.seq != isn:
        # A new incarnation counts from its own first number.
        live.isn, seq = frame.seq, 0
    ack = (frame.ack - _ISN) & _MASK if frame.flags & ACK else 0
    length = len(frame.body)
    edge = None
    if frame.flags & (ACK | RST) == ACK:
        edge = ack + (frame.window if frame.flags & SYN else frame.window << live.view.scale)
    live.trace.sent.append(
        _Sent(t, frame.flags, seq, ack, length, timestamp, bool(frame.flags & SYN), edge)
    )
    live.view.saw(frame.flags, seq, ack, length, frame.window)


# ------------------------------------------------------------------ the model


@define
class _Modelled:
    """A case on the model."""

    case: Case
    view: _View = field(factory=_View)
    trace: _Trace = field(factory=_Trace)
    isn: int | None = None
    ts_seen: int = 0


def _on_model(case: Case, kernel: _Trace, profile: str) -> _Trace:
    """The same steps at the same times; states are looked at just before the next step.

    Before each step the model's window gets the right edge that the kernel's
    had told by then: how that moves after text is a matter of the kernel's
    memory (see docs/differences.md); what is made of it is the protocol's.
    """
    times, looks = kernel.times, kernel.ended
    settings = Settings(local=LOCAL, remote=REMOTE, bind_port=PORT)
    stack = ModelStack(settings, profile)
    live = _Modelled(case)
    remote = (REMOTE, 20000)
    local = (LOCAL, PORT)
    sock: ModelSocket | None = None
    listener: ModelSocket | None = None
    if not case.active:
        listener = stack.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        listener.bind((LOCAL, PORT))
        listener.listen(4096)

    def drain() -> None:
        nonlocal local
        while stack.arrived:
            frame = stack.arrived.popleft()
            if case.active:
                local = (LOCAL, frame.ports[0])
            _note(live, frame, frame.t)

    for number, step in enumerate(case.steps):
        t = times[number]
        stack.wait(t)
        drain()
        if number:
            _look_at_model(stack, live, sock, remote)
        result = ""
        if step.call == "connect":
            sock = stack.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        if step.call == "accept":
            assert listener is not None
            try:
                sock, _ = listener.accept()
                sock.setblocking(False)
                result = "0"
            except BlockingIOError:
                sock, result = None, "EAGAIN"
        elif step.call:
            result = _perform(sock, step, remote)
            if step.call in ("close", "linger_close"):
                sock = None
        elif not case.active or live.isn is not None:
            if number:
                stack.move_edge((*local, *remote), _ISN, kernel.edges[number - 1])
            stack.inject(_frame(step, local, remote, live.isn, live.ts_seen, t))
            live.view.scaled(step)
        live.trace.results.append(result)
        drain()
    stack.wait(looks)
    drain()
    _look_at_model(stack, live, sock, remote)
    for row in stack.rows():
        if row.remote == remote and row.timer == "time_wait" and row.seconds_left is not None:
            live.trace.time_wait_ends = looks + row.seconds_left
    for open_socket in (sock, listener):
        if open_socket is not None:
            open_socket.close()
    return live.trace


def _look_at_model(
    stack: ModelStack, live: _Modelled, sock: ModelSocket | None, remote: tuple[str, int]
) -> None:
    states = [row.state.name for row in stack.rows() if row.remote == remote]
    live.trace.states.append(states[0] if states else "CLOSED")
    live.trace.ready.append(_readiness(sock))


# ------------------------------------------------------------------ comparing


def _split(sent: list[_Sent]) -> tuple[list[_Sent], list[_Sent]]:
    """What is sent for the first time, in order, and FINs and SYNs that a timer sends again.

    Whatever is sent again after text is left out: which, when and in what
    pieces is loss recovery's.
    """
    first, again = [], []
    highest, text = 0, False
    for segment in sent:
        text = text or segment.length > 0
        end = segment.seq + segment.length + bool(segment.flags & (SYN | FIN))
        if end > segment.seq and segment.seq < highest < 0x80000000:
            if not text:
                again.append(segment)
        else:
            first.append(segment)
            highest = max(highest, end)
    return first, again


def _extra(
    kernel: list[_Sent], model: list[_Sent], before: float
) -> Iterator[tuple[float, str, str, str]]:
    """The first segment that only one of them sent, and that in time for the other to send it."""
    both = min(len(kernel), len(model))
    for extra in (kernel[both:] + model[both:])[:1]:
        if extra.t < before:
            said = (str(extra), "nothing") if len(kernel) > both else ("nothing", str(extra))
            yield (extra.t, "segment", *said)


def _compare(case: Case, kernel: _Trace, model: _Trace) -> Difference | None:
    """The first thing on which the two records differ."""
    found: list[tuple[float, str, str, str]] = []
    kernel_sent, kernel_again = _split(kernel.sent)
    model_sent, model_again = _split(model.sent)
    for a, b in zip(kernel_sent, model_sent, strict=False):
        if a.what != b.what:
            found.append((min(a.t, b.t), "segment", str(a), str(b)))
            break
        if abs(a.t - b.t) > _GRAIN:
            found.append((min(a.t, b.t), "time", f"{a} at {a.t:.3f} s", f"{b} at {b.t:.3f} s"))
            break
    else:
        found.extend(_extra(kernel_sent, model_sent, kernel.ended - _GRAIN))
    started = kernel.times[0]
    for a, b in zip(kernel_again, model_again, strict=False):
        if a.flags != b.flags or abs(a.t - b.t) > max(_GRAIN, 0.3 * (a.t - started)):
            found.append((min(a.t, b.t), "time", f"{a} at {a.t:.3f} s", f"{b} at {b.t:.3f} s"))
            break
    else:
        late = 0.7 * kernel.ended
        found.extend(_extra(kernel_again, model_again, late))
    for n, (a_result, b_result) in enumerate(zip(kernel.results, model.results, strict=True)):
        if a_result != b_result:
            found.append((kernel.times[n], f"result of {case.steps[n]}", a_result, b_result))
            break
    for what, seen, modelled in (
        ("state", kernel.states, model.states),
        ("readiness", kernel.ready, model.ready),
    ):
        for n, (a_text, b_text) in enumerate(zip(seen, modelled, strict=True)):
            if a_text != b_text:
                found.append((kernel.times[n], what, a_text, b_text))
                break
    if not found:
        a_end, b_end = kernel.time_wait_ends, model.time_wait_ends
        if (a_end is None) != (b_end is None) or (
            a_end is not None and b_end is not None and abs(a_end - b_end) > 0.1
        ):
            found.append((kernel.ended, "the end of TIME_WAIT", str(a_end), str(b_end)))
    if not found:
        return None
    t, about, said, expected = min(found, key=lambda item: item[0])
    step = sum(when <= t + 1e-9 for when in kernel.times) - 1
    return Difference(case, max(step, 0), about, said, expected, kernel)


def _script(case: Case, trace: _Trace) -> Iterator[str]:
    """A case as a packetdrill script."""
    yield "--tolerance_usecs=40000"
    fd = 4
    if case.active:
        yield f"    0 socket(..., SOCK_STREAM|SOCK_NONBLOCK, IPPROTO_TCP) = {fd}"
    else:
        yield "    0 socket(..., SOCK_STREAM|SOCK_NONBLOCK, IPPROTO_TCP) = 3"
        yield "   +0 bind(3, ..., ...) = 0"
        yield "   +0 listen(3, 10) = 0"
    sent = list(trace.sent)
    for n, step in enumerate(case.steps):
        result = trace.results[n]
        gap = trace.times[n] - (trace.times[n - 1] if n else trace.times[0])
        ms = f"{gap:.3f}"
        if step.call == "wait":
            continue
        value = f"-1 {result} (error)" if result[:1] == "E" else result
        if step.call == "connect":
            yield f"+{ms} connect({fd}, ..., ...) = {value}"
        elif step.call == "accept":
            yield f"+{ms} accept(3, ..., ...) = {value if value[0] == '-' else fd}"
        elif step.call in ("send", "recv"):
            yield f"+{ms} {step.call}({fd}, ..., {step.size}, 0) = {value}"
        elif step.call.startswith("shutdown"):
            how = "SHUT_WR" if step.call.endswith("write") else "SHUT_RD"
            yield f"+{ms} shutdown({fd}, {how}) = {value}"
        elif step.call:
            if step.call == "linger_close":
                yield f"+{ms} setsockopt({fd}, SOL_SOCKET, SO_LINGER, {{onoff=1, linger=0}}, 8) = 0"
                ms = "0"
            yield f"+{ms} close({fd}) = {value}"
        else:
            options = ["mss 1460"] if step.flags & SYN else []
            if step.ts:
                val = 100_000 + int(trace.times[n] * 1000) - (50_000 if step.ts == "old" else 0)
                options.append(f"nop,nop,TS val {val} ecr {1 if step.flags & ACK else 0}")
            if step.flags & SYN and step.wscale is not None:
                options.append(f"nop,wscale {step.wscale}")
            tail = f" <{','.join(options)}>" if options else ""
            yield f"+{ms} < {step}{tail}"
        limit = trace.times[n + 1] if n + 1 < len(trace.times) else float("inf")
        while sent and sent[0].t < limit:
            yield f"    * > {sent.pop(0)} <...>"
        if n < len(trace.states) and trace.ready[n]:
            yield f"    // {trace.states[n]}, poll: {trace.ready[n]}"
        elif n < len(trace.states):
            yield f"    // {trace.states[n]}"


# ------------------------------------------------------------------ the machine


@define
class Fuzzer:
    """Batches of cases from a seed, on the kernel and on a profile of the model.

    `batch` cases run side by side, `length` steps each; `known` says in words
    what a difference is explained by, for those that are kept.
    """

    seed: str | int
    profile: str = "linux"
    batch: int = 120
    length: int = 16
    steps: int = 0
    cases: int = 0
    differences: list[Difference] = field(factory=list)

    def run(self, seconds: float | None, most_steps: int | None) -> Iterator[Difference | None]:
        """Go on for so long or so many steps: each confirmed difference, None after a batch."""
        deadline = None if seconds is None else time.monotonic() + seconds
        kernel = _Kernel()
        number = 0
        batch = self.batch
        if most_steps is not None:
            batch = min(batch, -(-most_steps // self.length))
        try:
            while True:
                dice = [random.Random(f"{self.seed}/{number}/{n}") for n in range(batch)]
                number += 1
                fresh = [(Case(d.random() < 0.35, d.random() < 0.4), d) for d in dice]
                played = self._play(kernel, list(fresh), self.length, _GAPS[0])
                suspects = []
                for case, trace in played:
                    self.cases += 1
                    self.steps += len(case.steps)
                    if self._judge(case, trace) is not None:
                        suspects.append(case)
                for case in self._confirmed(kernel, suspects):
                    difference = self._shrunk(kernel, case)
                    if difference is None:
                        continue
                    self.differences.append(difference)
                    yield difference
                yield None
                if deadline is not None and time.monotonic() >= deadline:
                    return
                if most_steps is not None and self.steps >= most_steps:
                    return
        finally:
            kernel.close()

    def _play(
        self,
        kernel: _Kernel,
        cases: list[tuple[Case, random.Random | None]],
        length: int,
        gap: float,
    ) -> list[tuple[Case, _Trace]]:
        with undisturbed():
            return kernel.run(cases, length, gap)

    def _judge(self, case: Case, trace: _Trace) -> Difference | None:
        model = _on_model(case, trace, self.profile)
        return _compare(case, trace, model)

    def _confirmed(self, kernel: _Kernel, cases: list[Case]) -> list[Case]:
        """Those cases that differ with other pauses too."""
        for gap in _GAPS[1:]:
            if not cases:
                return []
            again = self._play(kernel, [(case, None) for case in cases], 0, gap)
            cases = [case for case, trace in again if self._judge(case, trace) is not None]
        return cases

    def _shrunk(self, kernel: _Kernel, case: Case) -> Difference | None:
        """The shortest form of a case that still differs, and how."""
        while True:
            fewer = [
                evolve(case, steps=case.steps[:n] + case.steps[n + 1 :])
                for n in range(len(case.steps))
                if len(case.steps) > 1
            ]
            still = self._confirmed(kernel, fewer)
            if not still:
                break
            case = min(still, key=lambda c: len(c.steps))
        for _ in range(3):
            ((played, trace),) = self._play(kernel, [(case, None)], 0, _GAPS[0])
            difference = self._judge(played, trace)
            if difference is not None:
                return difference
        return None  # it came and went: a timer's grain

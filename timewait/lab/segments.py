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

import math
import random
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from itertools import combinations, pairwise
from typing import Any, Final

from attrs import define, evolve, field, frozen

from timewait.kernel.sock_diag import Details, details
from timewait.kernel.ticks import fires_in, present, tick
from timewait.kernel.wire import Wire
from timewait.lab.coverage import Cells, counted
from timewait.lab.segment_cases import (
    ISN,
    MASK,
    PORT,
    SETTINGS,
    Case,
    Step,
    View,
    beginning,
    frame,
    perform,
    written,
)
from timewait.packetdrill.calls import _poll_text
from timewait.packetdrill.frames import Frame, decode, encode, flags_letters, option_text
from timewait.packetdrill.on_kernel import undisturbed
from timewait.packetdrill.on_model import ModelSocket, ModelStack
from timewait.packetdrill.script import Option
from timewait.packetdrill.settings import Settings
from timewait.sim.network import Key
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN

__all__ = ["Case", "Difference", "Fuzzer", "Step"]

_LOCAL: Final = ("192.168.0.1", "fd3d:fa7b:d17d::1")  # by whether it is IPv6
_REMOTE: Final = ("192.0.2.1", "2001:db8::1")
_GAP: Final = 0.060  # s between steps
# When run again every pause is another: what differs at one moment only does not stay.
_REPLAYS: Final = 3
_OTHER_GAPS: Final = (0.040, 0.085)
_GRAIN: Final = 0.045  # s by which a timer's segment may come earlier or later
# s by which a timer fires late, those before it having been late too: on the timer wheel one
# of 2 s and more has a grain of 256 ms, one of 256 ms and more 32 ms.
_LONG, _LATE_SOON, _LATE = 2.048, 0.1, 0.45
_MOST: Final = select.POLLIN | select.POLLOUT | 0x2000
# So much of a tick later than where jiffies are counted a processor's own comes (measured).
_OWN: Final = 0.87
_MANY: Final = 16  # pieces of text that may take more room than a send buffer has
_SMALL_PIECES: Final = "room that small pieces take"
_TIMERS: Final = ("t_retransmit", "t_ack", "t_probe", "t_keepalive", "t_user")
_SHARES: Final = {"": 60, "impatient": 20, "plain": 10, "rfc1337": 10}  # of 100 batches


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
    options: tuple[Option, ...] = ()

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
    """What one stack did in one case, step by step.

    `began`: the number of a tick in jiffies, and when that began, on the kernel.
    """

    began: tuple[int, float] = (0, 0.0)
    times: list[float] = field(factory=list)
    looked: list[float] = field(factory=list)
    results: list[str] = field(factory=list)
    states: list[str] = field(factory=list)
    ready: list[str] = field(factory=list)
    # Of the model, each look as it would have been with its timers a little later.
    before: list[tuple[str, str]] = field(factory=list)
    edges: list[int | None] = field(factory=list)
    pieces: list[int] = field(factory=list)  # of the model: in how many the text waits
    sent: list[_Sent] = field(factory=list)
    time_wait_ends: float | None = None
    ended: float = 0.0

    def at(self, t: float) -> int:
        """The number of the step that was the last at `t`."""
        return max(sum(when <= t + 1e-9 for when in self.times) - 1, 0)

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
    """Where the two parted: at which step, over what, and what each did.

    `kept` names what explains it, "" for nothing (see docs/differences.md).
    """

    case: Case
    step: int
    about: str
    kernel: str
    model: str
    trace: _Trace = field(repr=False)
    kept: str = ""

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


# ------------------------------------------------------------------ the kernel


@define
class _Live:
    """A case on the kernel."""

    case: Case
    dice: random.Random | None
    length: int
    local: tuple[str, int]
    remote: tuple[str, int]
    view: View = field(factory=View)
    trace: _Trace = field(factory=_Trace)
    sock: socket.socket | None = None
    isn: int | None = None
    ts_seen: int = 0
    over: bool = False  # nothing more is to be seen
    steps: list[Step] = field(factory=list)


class _Kernel:
    """All cases of a batch on one wire, in rounds: a step of each, then a pause."""

    def __init__(self) -> None:
        self.wire = Wire(((_LOCAL[0], 16), (_LOCAL[1], 48)), _REMOTE, offload=False)
        self.wire.sysctl("net.ipv4.tcp_syncookies", 0)
        self.wire.sysctl("net.ipv4.tcp_max_syn_backlog", 65535)
        # The usual one, which is everywhere, and asks for no pacing.
        self.wire.sysctl("net.ipv4.tcp_congestion_control", "reno")
        # Else a connection begins with what was learnt of the round trip in those before it.
        self.wire.sysctl("net.ipv4.tcp_no_metrics_save", 1)
        self.listeners = []
        for family, local in zip((socket.AF_INET, socket.AF_INET6), _LOCAL, strict=True):
            listener = self.wire.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            listener.bind((local, PORT))
            listener.listen(4096)
            self.listeners.append(listener)
        self.settings = ""
        self.next_port = 20000
        self.accepted: dict[tuple[str, int], socket.socket] = {}
        self.by_ports: dict[tuple[int, int], _Live] = {}

    def close(self) -> None:
        for sock in (*self.accepted.values(), *self.listeners):
            sock.close()
        self.wire.close()

    def _set(self, settings: str) -> None:
        changes = {name: usual for name, (_, usual) in SETTINGS[self.settings].items()}
        changes |= {name: value for name, (value, _) in SETTINGS[settings].items()}
        for name, value in changes.items():
            self.wire.sysctl(f"net.ipv4.{name}", value)
        self.settings = settings

    def run(
        self,
        cases: list[tuple[Case, random.Random | None]],
        length: int = 0,
        gaps: tuple[float, float] = (_GAP, _GAP),
    ) -> list[tuple[Case, _Trace]]:
        """Play cases; those with dice are made up on the way, `length` steps each.

        Between two steps is a pause of some length between `gaps`, in seconds.

        All have the same settings, which are the namespace's.
        """
        (settings,) = {case.settings for case, _ in cases}
        self._set(settings)
        start = time.monotonic()
        number, began = present()
        lives = []
        for case, dice in cases:
            port = self.next_port
            self.next_port += 1
            if self.next_port > 60000:
                self.next_port = 20000
            local, remote = _LOCAL[case.six], (_REMOTE[case.six], port)
            live = _Live(case, dice, length, (local, 0 if case.active else PORT), remote)
            live.trace.began = (number, began - start)
            lives.append(live)
            self.by_ports[0 if case.active else PORT, port] = live
        rounds = max(length if dice else len(case.steps) for case, dice in cases)
        for number in range(rounds):
            until = time.monotonic() + random.uniform(*gaps)
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
        seq = (ISN + live.view.rcv_nxt) & MASK
        ack = (live.isn + live.view.snd_nxt) & MASK
        ports = (live.remote[1], live.local[1])
        self.wire.send(
            encode(Frame(live.remote[0], live.local[0], "tcp", ports, RST | ACK, seq, ack, 0))
        )

    def _next(self, live: _Live, number: int) -> Step | None:
        if live.dice is None:
            return live.case.steps[number] if number < len(live.case.steps) else None
        if number >= live.length or live.over:
            return None
        step = live.case.begin(live.dice, number)
        if step is not None:
            live.view.finished = live.view.finished or step.flags & FIN != 0
        else:
            state = live.trace.states[-1] if live.trace.states else "CLOSED"
            step = live.view.step(live.dice, live.case, state, live.sock is not None)
            live.over = step is None
        return step

    def _do(self, live: _Live, step: Step, start: float) -> None:
        live.steps.append(step)
        t = time.monotonic() - start
        live.trace.times.append(t)
        live.trace.results.append(self._call(live, step) if step.call else "")
        if not step.call:
            if live.local[1] == 0 and live.isn is None and live.case.active:
                return  # nobody to send to: it has not connected
            made = frame(live.case, step, live.local, live.remote, live.isn, live.ts_seen, t)
            self.wire.send(encode(made))
            live.view.scaled(step)

    def _call(self, live: _Live, step: Step) -> str:
        if step.call == "connect" and live.sock is None and live.case.active:
            family = (socket.AF_INET, socket.AF_INET6)[live.case.six]
            live.sock = self.wire.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        if step.call == "accept":
            with suppress(BlockingIOError):
                while True:
                    taken, peer = self.listeners[live.case.six].accept()
                    taken.setblocking(False)
                    self.accepted[peer[:2]] = taken
            live.sock = self.accepted.pop(live.remote, None)
            return "0" if live.sock is not None else "EAGAIN"
        result = perform(live.sock, step, live.remote)
        if step.call in ("close", "linger_close"):
            live.sock = None
        return result

    def _read(self, start: float) -> None:
        while (octets := self.wire.read()) is not None:
            t = self.wire.sent_at - start
            came = decode(octets, t)
            if came is None or came.protocol != "tcp":
                continue
            local, remote = came.ports
            live = self.by_ports.get((local, remote))
            if live is None:
                live = self.by_ports.get((0, remote))
                if live is None or not live.case.active:
                    continue
                live.local = (_LOCAL[live.case.six], local)
            _note(live, came, t)

    def _pause(self, until: float, start: float) -> None:
        while (left := until - time.monotonic()) > 0:
            if self.wire.wait(left):
                self._read(start)

    def _rows(self) -> dict[tuple[tuple[str, int], tuple[str, int]], Details]:
        found = self.wire.namespace.call(_with_info)
        return {(each.row.local, each.row.remote): each for each in found}

    def _look(self, lives: list[_Live], start: float, number: int) -> None:
        now = time.monotonic() - start
        rows = self._rows()
        self._read(start)
        for live in lives:
            if number >= len(live.steps):
                continue
            found = rows.get((live.local, live.remote))
            state = "CLOSED" if found is None else found.row.state.name
            info = None if found is None else found.info
            live.trace.states.append(state)
            live.trace.looked.append(now)
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


def _note(live: Any, came: Frame, t: float) -> None:
    """Record a segment of the stack's in the case's own numbers."""
    if live.isn is None and came.flags & SYN:
        live.isn = came.seq
    isn = live.isn or 0
    timestamp = False
    for option in came.options:
        if option.kind == 8 and len(option.data) == 8:
            live.ts_seen = int.from_bytes(option.data[:4], "big")
            timestamp = True
    if came.flags & SYN:
        scales = [option.data[0] for option in came.options if option.kind == 3]
        live.view.offered = scales[0] if scales else 0
        live.view.scale = 0 if live.case.active else live.view.offered
    seq = (came.seq - isn) & MASK
    if came.seq == 0 and came.flags == RST | ACK:
        seq = 0
    elif came.flags & SYN and came.seq != isn:
        # A new incarnation counts from its own first number.
        live.isn, seq = came.seq, 0
    ack = (came.ack - ISN) & MASK if came.flags & ACK else 0
    length = len(came.body)
    edge = None
    if came.flags & (ACK | RST) == ACK:
        edge = ack + (came.window if came.flags & SYN else came.window << live.view.scale)
    live.trace.sent.append(
        _Sent(
            *(t, came.flags, seq, ack, length, timestamp, bool(came.flags & SYN), edge),
            came.options,
        )
    )
    live.view.saw(came.flags, seq, ack, length, came.window)


# ------------------------------------------------------------------ the model


class _Grained(ModelStack):
    """The model with its timers as late as the kernel's: those fire at the end of a wheel's step.

    `began` is a tick and when it began, in the case's time: steps are counted in jiffies.
    """

    def __init__(self, settings: Settings, profile: str, began: tuple[int, float]) -> None:
        super().__init__(settings, profile)
        self._number, self._began = began
        self._late: dict[tuple[int, str], float] = {}

    def _step(self, until: float) -> None:
        now = self.now()
        for sock in self.host.tcp.values():
            conn = getattr(sock, "conn", None)
            for name in () if conn is None else _TIMERS:
                due = getattr(conn, name)
                if due != math.inf and self._late.get((id(conn), name)) != due:
                    late = self._late[id(conn), name] = self._fires(due, now)
                    setattr(conn, name, late)
        super()._step(until)

    def pieces(self, key: Key) -> int:
        """In how many pieces text is queued that was not acknowledged."""
        conn = getattr(self.host.tcp.get(key), "conn", None)
        return 0 if conn is None else len(conn._cuts) + len(conn._ends)

    def _fires(self, due: float, now: float) -> float:
        passed = int((now - self._began) // tick())
        left = math.ceil((due - now) / tick() - 1e-6) * tick()
        fires = fires_in(left, left, self._number + passed)
        return self._began + (passed + _OWN) * tick() + fires


@define
class _Modelled:
    """A case on the model."""

    case: Case
    view: View = field(factory=View)
    trace: _Trace = field(factory=_Trace)
    isn: int | None = None
    ts_seen: int = 0


def _on_model(case: Case, kernel: _Trace, profile: str, reached: Cells | None = None) -> _Trace:
    """The same steps at the same times, and the same looks at its state.

    Before each step the model's window gets the right edge that the kernel's
    had told by then: how that moves after text is a matter of the kernel's
    memory (see docs/differences.md); what is made of it is the protocol's.
    """
    times, looks = kernel.times, kernel.ended
    here, remote = _LOCAL[case.six], (_REMOTE[case.six], 20000)
    settings = Settings(
        local=here,
        remote=remote[0],
        bind_port=PORT,
        ip_version="ipv6" if case.six else "ipv4",
    )
    stack = _Grained(settings, profile, kernel.began)
    for name, (value, _) in SETTINGS[case.settings].items():
        stack.sysctl(f"net.ipv4.{name}", str(value), 0, required=True)
    if reached is not None:
        stack.host.profile = counted(stack.host.profile, reached)
    family = socket.AF_INET6 if case.six else socket.AF_INET
    live = _Modelled(case)
    local = (here, PORT)
    sock: ModelSocket | None = None
    listener: ModelSocket | None = None
    if not case.active:
        listener = stack.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        listener.bind((here, PORT))
        listener.listen(4096)

    def drain() -> None:
        nonlocal local
        while stack.arrived:
            came = stack.arrived.popleft()
            if case.active:
                local = (here, came.ports[0])
            _note(live, came, came.t)

    for number, step in enumerate(case.steps):
        t = times[number]
        stack.wait(t)
        drain()
        result = ""
        if step.call == "connect" and sock is None and case.active:
            sock = stack.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
        if step.call == "accept":
            assert listener is not None
            try:
                sock, _ = listener.accept()
                sock.setblocking(False)
                result = "0"
            except BlockingIOError:
                sock, result = None, "EAGAIN"
        elif step.call:
            result = perform(sock, step, remote)
            if step.call in ("close", "linger_close"):
                sock = None
        elif not case.active or live.isn is not None:
            if number:
                stack.move_edge((*local, *remote), ISN, kernel.edges[number - 1])
            stack.inject(frame(case, step, local, remote, live.isn, live.ts_seen, t))
            live.view.scaled(step)
        live.trace.results.append(result)
        drain()
        look = kernel.looked[number]
        stack.wait(max(t, look - (_LATE_SOON if look < _LONG else _LATE)))
        drain()
        live.trace.before.append(_look_at_model(stack, sock, remote))
        stack.wait(look)
        drain()
        state, ready = _look_at_model(stack, sock, remote)
        live.trace.pieces.append(stack.pieces((*local, *remote)))
        live.trace.states.append(state)
        live.trace.ready.append(ready)
    stack.wait(looks)
    drain()
    for row in stack.rows():
        if row.remote == remote and row.timer == "time_wait" and row.seconds_left is not None:
            live.trace.time_wait_ends = looks + row.seconds_left
    for open_socket in (sock, listener):
        if open_socket is not None:
            open_socket.close()
    return live.trace


def _look_at_model(
    stack: ModelStack, sock: ModelSocket | None, remote: tuple[str, int]
) -> tuple[str, str]:
    states = [row.state.name for row in stack.rows() if row.remote == remote]
    return states[0] if states else "CLOSED", _readiness(sock)


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
    kernel: list[_Sent], model: list[_Sent], before: float, times: list[float]
) -> Iterator[tuple[float, str, str, str]]:
    """The first segment that only one of them sent.

    After `before` one that a timer sent on the model may only be late on the
    kernel; one that answers a step, at the step's very time, never is.
    """
    both = min(len(kernel), len(model))
    if len(kernel) > both:
        yield (kernel[both].t, "segment", str(kernel[both]), "nothing")
    elif len(model) > both and (model[both].t < before or model[both].t in times):
        yield (model[both].t, "segment", "nothing", str(model[both]))


def _took_first(case: Case, kernel: _Trace, a: _Sent, b: _Sent) -> bool:
    """Whether they differ in nothing but the ACK of the text that came with the very ACK.

    Where memory is at hand Linux takes text in order before it looks at its ACK, and
    after a timeout that has something sent at once (tcp_rcv_established, tcp_xmit_recovery).
    """
    step = case.steps[kernel.at(a.t)]
    before = [sent for sent in kernel.sent if sent.t < a.t and sent.length]
    again = any(one.seq < other.seq + other.length for other, one in pairwise(before))
    return (
        again
        and step.length > 0
        and step.flags & ~PSH == ACK
        and a.ack == b.ack + step.length == step.seq + step.length
        and evolve(a, ack=b.ack).what == b.what
    )


def _delayed_with_text(case: Case, kernel: _Trace, a: _Sent, b: _Sent) -> bool:
    """Whether the kernel delayed an ACK of text and the FIN after it by its 40 ms.

    More than a segment is acknowledged at once only where memory lets the window
    stay as large (__tcp_ack_snd_check, __tcp_select_window).
    """
    step = case.steps[kernel.at(b.t)]
    return (
        step.length > 0
        and step.flags & FIN != 0
        and not a.length
        and a.ack == (step.seq + step.length + 1) & MASK
        and 0.036 < a.t - b.t < 0.06
    )


def _waits_after_timeout(case: Case, kernel: _Trace, b: _Sent, a: _Sent | None) -> bool:
    """Whether the kernel, after a timeout, leaves out text because two segments are in flight.

    So many an ACK allows then (tcp_enter_loss, tcp_slow_start), and the model allows more.
    """
    before = [sent for sent in kernel.sent if sent.t < b.t + _GRAIN and sent.length]
    again = any(one.seq < other.seq + other.length for other, one in pairwise(before))
    acked = 0
    for step, t in zip(case.steps, kernel.times, strict=True):
        end = max((sent.seq + sent.length for sent in before if sent.t < t), default=0)
        if not step.call and step.flags & ACK and acked < step.ack <= end and t <= b.t:
            acked = step.ack
    flight = {sent.seq for sent in before if sent.seq >= acked}
    late = a is None or a.t > b.t + _GRAIN
    return again and late and (b.length > 0 or b.flags & FIN != 0) and len(flight) >= 2


def _in_smaller_pieces(kernel: _Trace, a: _Sent, b: _Sent) -> bool:
    """Whether the kernel, after a timeout, sends at once in more pieces what the model does in one.

    The pieces in which text was queued for a small window grow into the room there is, in segments
    of that window's (tcp_grow_skb), and in the model into the room of two.
    """
    before = [sent for sent in kernel.sent if sent.t < a.t and sent.length]
    again = any(one.seq < other.seq + other.length for other, one in pairwise(before))
    rest = a.seq + a.length, b.length - a.length
    follows = any(
        sent.seq == rest[0] and sent.length >= rest[1] > 0 and sent.t < a.t + _GRAIN
        for sent in kernel.sent
    )
    return again and follows and a.seq == b.seq and abs(a.t - b.t) < _GRAIN


def _goes_after_timeout(kernel: _Trace, a: _Sent, b: _Sent | None) -> bool:
    """Whether the kernel sends something new although a timeout was not made good yet.

    What was sent less than a round trip before it is not lost (tcp_timeout_mark_lost), and
    leaves the room of a segment where it is sent again together with what is.
    """
    before = [sent for sent in kernel.sent if sent.t < a.t and sent.length]
    ends = {sent.seq + sent.length for sent in before}
    joined = any(
        again.seq + again.length in ends and first.seq + first.length in ends
        for first, again in combinations(before, 2)
        if again.seq == first.seq and again.length > first.length
    )
    return joined and a.length > 0 and (b is None or b.t > a.t + _GRAIN)


def _compare(case: Case, kernel: _Trace, model: _Trace) -> Difference | None:
    """The first thing on which the two records differ."""
    found: list[tuple[float, str, str, str, str]] = []
    kernel_sent, kernel_again = _split(kernel.sent)
    model_sent, model_again = _split(model.sent)
    late = 0.0  # the kernel's timers so far, each of which may have started the next
    started = kernel.times[0]
    for a, b in zip(kernel_sent, model_sent, strict=False):
        if a.what != b.what:
            kept = ""
            if _took_first(case, kernel, a, b):
                kept = "text taken before its ACK"
            elif _waits_after_timeout(case, kernel, b, a) or _in_smaller_pieces(kernel, a, b):
                kept = "two segments after a timeout"
            elif _goes_after_timeout(kernel, a, b):
                kept = "something new after a timeout"
            found.append((min(a.t, b.t), "segment", str(a), str(b), kept))
            break
        before, late = late, max(late, a.t - b.t)
        grain = _GRAIN if b.t - started < _LONG else 0.3
        if not -_GRAIN <= a.t - b.t <= before + grain:
            kept = ""
            if _delayed_with_text(case, kernel, a, b):
                kept = "ACK of text and a FIN delayed"
            elif _waits_after_timeout(case, kernel, b, a):
                kept = "two segments after a timeout"
            elif _goes_after_timeout(kernel, a, b):
                kept = "something new after a timeout"
            found.append((min(a.t, b.t), "time", *_when(a, b), kept))
            break
    else:
        end = kernel.ended - (_LATE_SOON if kernel.ended < _LONG else _LATE)
        kept = ""
        ours, theirs = kernel_sent[len(model_sent) :], model_sent[len(kernel_sent) :]
        if ours and _goes_after_timeout(kernel, ours[0], None):
            kept = "something new after a timeout"
        elif theirs and _waits_after_timeout(case, kernel, theirs[0], None):
            kept = "two segments after a timeout"
        found.extend((*extra, kept) for extra in _extra(kernel_sent, model_sent, end, kernel.times))
    for a, b in zip(kernel_again, model_again, strict=False):
        if a.flags != b.flags or abs(a.t - b.t) > max(_GRAIN, 0.3 * (a.t - started)):
            found.append((min(a.t, b.t), "time", *_when(a, b), ""))
            break
    else:
        end = 0.7 * kernel.ended
        found.extend((*extra, "") for extra in _extra(kernel_again, model_again, end, kernel.times))
    for n, (a_result, b_result) in enumerate(zip(kernel.results, model.results, strict=True)):
        after_reset = case.steps[n].call == "outq" and "POLLHUP" in kernel.ready[n]
        if a_result != b_result and not after_reset:
            full = case.steps[n].call == "send" and a_result < b_result
            kept = _SMALL_PIECES if full and model.pieces[n] >= _MANY else ""
            found.append((kernel.times[n], f"result of {case.steps[n]}", a_result, b_result, kept))
            break
    for n, (a_state, a_ready) in enumerate(zip(kernel.states, kernel.ready, strict=True)):
        b_state, b_ready = model.states[n], model.ready[n]
        if (a_state, a_ready) == model.before[n]:
            continue  # the same, or a timer was about to fire
        if a_state != b_state:
            found.append((kernel.times[n], "state", a_state, b_state, ""))
            break
        if a_ready != b_ready:
            full = {*b_ready.split("|")} - {*a_ready.split("|")} == {"POLLOUT"}
            kept = _SMALL_PIECES if full and model.pieces[n] >= _MANY else ""
            found.append((kernel.times[n], "readiness", a_ready, b_ready, kept))
            break
    if not found:
        a_end, b_end = kernel.time_wait_ends, model.time_wait_ends
        if (a_end is None) != (b_end is None) or (
            a_end is not None and b_end is not None and abs(a_end - b_end) > 0.1
        ):
            found.append((kernel.ended, "the end of TIME_WAIT", str(a_end), str(b_end), ""))
    if not found:
        return None
    t, about, said, expected, kept = min(found, key=lambda item: item[0])
    return Difference(case, kernel.at(t), about, said, expected, kernel, kept)


def _when(a: _Sent, b: _Sent) -> tuple[str, str]:
    return f"{a} at {a.t:.3f} s", f"{b} at {b.t:.3f} s"


def _script(case: Case, trace: _Trace) -> Iterator[str]:
    """A case as a packetdrill script."""
    fd = 4
    yield from beginning(case, fd)
    sent = list(trace.sent)
    first, echo = None, 0  # of the stack's timestamps, which count from 1 here
    for n, step in enumerate(case.steps):
        gap = trace.times[n] - (trace.times[n - 1] if n else trace.times[0])
        yield from written(case, step, trace.results[n], fd, gap, trace.times[n], echo)
        limit = trace.times[n + 1] if n + 1 < len(trace.times) else float("inf")
        while sent and sent[0].t < limit:
            segment, tail = sent.pop(0), "..."
            stamp = next((option.data for option in segment.options if option.kind == 8), None)
            if stamp is not None and not any(option.kind == 5 for option in segment.options):
                value, echoed = struct.unpack("!II", stamp)
                first = value if first is None else first
                echo = (value - first + 1) & MASK
                shown = Option(8, struct.pack("!II", echo, echoed))
                tail = ",".join(
                    option_text(shown if option.kind == 8 else option) for option in segment.options
                )
            yield f"    * > {segment} <{tail}>"
        if n < len(trace.states) and trace.ready[n]:
            yield f"    // {trace.states[n]}, poll: {trace.ready[n]}"
        elif n < len(trace.states):
            yield f"    // {trace.states[n]}"


# ------------------------------------------------------------------ the machine


@define
class Fuzzer:
    """Batches of cases from a seed, on the kernel and on a profile of the model.

    `batch` cases run side by side, `length` steps each; `reached` counts which
    cells of the transition table they came to on the model, `kept` the cases that
    ended in a difference that is explained.
    """

    seed: str | int
    profile: str = "linux"
    batch: int = 480
    length: int = 16
    steps: int = 0
    cases: int = 0
    differences: list[Difference] = field(factory=list)
    reached: Cells = field(factory=Counter)
    kept: Counter[str] = field(factory=Counter)

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
                chance = random.Random(f"{self.seed}/{number}")
                (settings,) = chance.choices(list(_SHARES), list(_SHARES.values()))
                number += 1
                fresh = [(Case.fresh(d, settings), d) for d in dice]
                played = self._play(kernel, list(fresh), self.length)
                suspects = []
                for case, trace in played:
                    self.cases += 1
                    self.steps += len(case.steps)
                    suspect = self._judge(case, trace, self.reached)
                    if suspect is not None and suspect.kept:
                        self.kept[suspect.kept] += 1
                    elif suspect is not None:
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
        length: int = 0,
        gaps: tuple[float, float] = (_GAP, _GAP),
    ) -> list[tuple[Case, _Trace]]:
        with undisturbed():
            return kernel.run(cases, length, gaps)

    def _judge(self, case: Case, trace: _Trace, reached: Cells | None = None) -> Difference | None:
        model = _on_model(case, trace, self.profile, reached)
        return _compare(case, trace, model)

    def _confirmed(self, kernel: _Kernel, cases: list[Case]) -> list[Case]:
        """Those cases that differ with other pauses too."""
        for _ in range(_REPLAYS):
            if not cases:
                return []
            again = self._play(kernel, [(case, None) for case in cases], gaps=_OTHER_GAPS)
            cases = [case for case, trace in again if self._unexplained(case, trace)]
        return cases

    def _unexplained(self, case: Case, trace: _Trace) -> bool:
        found = self._judge(case, trace)
        return found is not None and not found.kept

    def _shrunk(self, kernel: _Kernel, case: Case) -> Difference | None:
        """The shortest form of a case that still differs, and how."""
        while len(case.steps) > 1:
            fewer = {
                n: evolve(case, steps=case.steps[:n] + case.steps[n + 1 :])
                for n in range(len(case.steps))
            }
            still = self._confirmed(kernel, list(fewer.values()))
            if not still:
                break
            # Most often all that is needless alone is needless together.
            needed = [n for n, shorter in fewer.items() if shorter not in still]
            least = evolve(case, steps=tuple(case.steps[n] for n in needed))
            together = self._confirmed(kernel, [least]) if needed else []
            case = together[0] if together else still[0]
        for _ in range(3):
            ((played, trace),) = self._play(kernel, [(case, None)])
            difference = self._judge(played, trace)
            if difference is not None and not difference.kept:
                return difference
        return None  # it came and went: a timer's grain

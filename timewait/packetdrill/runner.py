"""What a packetdrill script means: its events in order, on whichever stack it is handed.

The rules are packetdrill's (run.c, run_packet.c): a segment with SYN carries
the script's absolute numbers, every other one numbers relative to the first
SYN; inbound segments are mapped from script to live numbers, outbound ones
back; a relative time counts from the moment the event before was done with;
outbound segments are awaited from at once, so that an early one is an error
too. A stack (`Stack`) has a clock, takes and gives frames, and makes calls.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

from attrs import define, evolve, field, frozen

from timewait.packetdrill.assertions import check as check_code
from timewait.packetdrill.calls import ERRNO_NAMES, Calls, Result
from timewait.packetdrill.frames import Frame, flags_letters, option_text
from timewait.packetdrill.script import (
    ANY,
    Call,
    Code,
    Command,
    Event,
    Option,
    Packet,
    Script,
    Unsupported,
    When,
    Word,
)
from timewait.packetdrill.settings import File, Pause, Settings, meaning
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN

__all__ = ["Failure", "Outcome", "Pending", "Stack", "TooLate", "run"]


class Failure(Exception):
    """The stack did something else than the script says."""

    def __init__(
        self, what: str, line: int, untimely: bool = False, same_text: bool = False
    ) -> None:
        super().__init__(what)
        self.what = what
        self.line = line
        self.untimely = untimely  # the right thing at the wrong time
        self.same_text = same_text  # a segment of the right numbers, wrong in something else


class TooLate(Exception):
    """This process itself missed an event's time: the run says nothing about the stack."""

    def __init__(self, line: int, late: float) -> None:
        super().__init__(f"this machine was {late * 1e3:.1f} ms late for line {line}")
        self.line = line


@frozen
class Outcome:
    """How a script ended: "passed", "failed" or "unsupported", where and why.

    `diagram` shows the last segments, one a line.
    """

    path: str
    outcome: str
    line: int | None = None
    why: str = ""
    diagram: str = field(default="", repr=False)
    untimely: bool = False  # on nothing but a time, or after this process had stood still


@define
class Pending:
    """A call under way: `result` is None until it has returned, at time `ended`."""

    do: Callable[[], Result] = field(repr=False)
    result: Result | None = None
    ended: float = 0.0
    trouble: BaseException | None = None
    done: threading.Event = field(factory=threading.Event)


class Stack(Protocol):
    """A TCP/IP stack under test, and the far end of its wire."""

    name: str
    calls: Calls
    real: bool
    beyond: set[str]  # features the script has used that this stack does not have
    offloads: bool  # it stands for one that hands a run of segments to its device as one

    def start(self) -> None:
        """Set the clock to 0 and begin."""

    def now(self) -> float:
        """Seconds since `start`."""

    def wait(self, until: float) -> None:
        """Let time pass; what the stack sends meanwhile is kept for `receive`."""

    def inject(self, frame: Frame) -> None:
        """Let a packet arrive from the wire."""

    def receive(self, deadline: float) -> Frame | None:
        """The next packet the stack sent, None if none came until `deadline`."""

    def submit(self, do: Callable[[], Result], blocking: bool) -> Pending:
        """Start a call."""

    def finish(self, pending: Pending, deadline: float) -> bool:
        """Let time pass until a call has returned; false at `deadline`."""

    def sysctl(self, name: str, value: str, line: int, required: bool) -> None:
        """Change a setting of the stack; raises `Unsupported` where `required` and it cannot."""

    def tcp_info(self, fd: int) -> Mapping[str, int]:
        """`struct tcp_info` of a script's descriptor, by `tcpi_` names."""


@define
class _Connection:
    """The connection under test: script and live numbers of both ends."""

    live_local: tuple[str, int]
    live_remote: tuple[str, int]
    passive: bool
    answered: bool = False  # whether an active opener has got its first SYN,ACK
    script_local_isn: int = 0
    live_local_isn: int | None = None
    live_remote_isn: int = 0
    ts_live: dict[int, int] = field(factory=dict)
    ts_first: tuple[int, int] | None = None
    flow_label: tuple[int, int] | None = None
    fd: int | None = None
    protocol: str = "tcp"
    mss: int = 536  # of the script's end
    text_came: bool = False


_ICMP4: Final = {
    "unreachable": (3, {"net_unreachable": 0, "host_unreachable": 1, "protocol_unreachable": 2,
        "port_unreachable": 3, "frag_needed": 4, "source_route_failed": 5, "net_unknown": 6,
        "host_unknown": 7, "source_host_isolated": 8, "net_prohibited": 9, "host_prohibited": 10,
        "net_unreachable_for_tos": 11, "host_unreachable_for_tos": 12, "packet_filtered": 13,
        "precedence_violation": 14, "precedence_cutoff": 15}),
    "source_quench": (4, {}),
    "redirect": (5, {"net": 0, "host": 1, "net_for_tos": 2, "host_for_tos": 3}),
    "time_exceeded": (11, {"ttl": 0, "fragment_reassembly": 1}),
    "parameter_problem": (12, {}),
}  # fmt: skip
_ICMP6: Final = {
    "unreachable": (1, {"net_unreachable": 0, "host_prohibited": 1, "host_unreachable": 3,
        "address_unreachable": 3, "port_unreachable": 4, "admin_prohibited": 1, "no_route": 0}),
    "packet_too_big": (2, {}),
    "time_exceeded": (3, {"exceeded_hop_limit": 0, "fragment_reassembly": 1}),
    "parameter_problem": (4, {}),
}  # fmt: skip


def _icmp_numbers(packet: Packet, six: bool) -> tuple[int, int]:
    """Type and code of an ICMP message by the script's names of them."""
    kinds = _ICMP6 if six else _ICMP4
    if packet.icmp_type not in kinds:
        raise Unsupported(f"ICMP type {packet.icmp_type}")
    number, codes = kinds[packet.icmp_type]
    if packet.icmp_code and packet.icmp_code not in codes:
        raise Unsupported(f"ICMP code {packet.icmp_code}")
    return number, codes.get(packet.icmp_code, 0)


# These decide which text is sent (again) and when, and nothing else about a segment.
_WHICH_TEXT: Final = frozenset(
    {"congestion control", "fast retransmission", "loss recovery", "recovery by SACK"}
)
_WAIT_FOR_STAR: Final = 130.0  # s: longer than any retransmission timer of a stack
_LONGEST_WAIT: Final = 600.0  # s, on a stack whose time is real
_CALL_LIMIT: Final = 2.0  # s: what a call that is not said to block may take


@define
class _Log:
    """The last segments, for the diagram."""

    rows: list[tuple[float, bool, str]] = field(factory=list)

    def add(self, t: float, inbound: bool, text: str) -> None:
        self.rows.append((t, inbound, text))
        del self.rows[:-10]

    def diagram(self, stack: str) -> str:
        if not self.rows:
            return ""
        width = max(len(text) for *_, text in self.rows) + 2
        lines = [f"{'time':>10}  {'script':<{width // 2}}{stack:>{width - width // 2 + 6}}"]
        for t, inbound, text in sorted(self.rows, key=lambda row: row[0]):
            arrow = f"──{text:─^{width}}─▶" if inbound else f"◀─{text:─^{width}}──"
            lines.append(f"{t:>10.6f}  {arrow}")
        return "\n".join(lines)


def run(script: Script, stack: Stack, settings: Settings) -> Outcome:
    """Run a script on a stack that was made for `settings`.

    Raises `TooLate` where this process missed a time itself.
    """
    runner = _Runner(script, stack, settings)
    try:
        runner.run()
    except Unsupported as unsupported:
        line = unsupported.line or runner.line or None
        return Outcome(script.path, "unsupported", line, unsupported.what)
    except Failure as failure:
        outcome, why = "failed", failure.what
        beyond = stack.beyond - _WHICH_TEXT if failure.same_text else stack.beyond
        if beyond:
            # Past a feature that the stack does not claim to have, nothing is expected of it.
            outcome, why = "unsupported", f"{', '.join(sorted(beyond))}: {why}"
        return Outcome(
            script.path,
            outcome,
            failure.line,
            why,
            runner.log.diagram(stack.name),
            failure.untimely or (stack.real and runner.stood_still > settings.tolerance),
        )
    except TooLate:
        raise
    except Exception as broken:
        # A script must not be able to end the run of all the others.
        what = "could not be carried out" if stack.real else "the model failed"
        why = f"{what}: {type(broken).__name__}: {broken}"
        return Outcome(script.path, "failed", runner.line, why, runner.log.diagram(stack.name))
    return Outcome(script.path, "passed")


class _Runner:
    def __init__(self, script: Script, stack: Stack, settings: Settings) -> None:
        self.script = script
        self.folder = Path(script.path).parent
        self.stack = stack
        self.settings = settings
        self.connection: _Connection | None = None
        # Those begun by a SYN, by the stack's port and the script's; where a script writes out
        # the ports of more than one, what another one than the latest sends is kept for it.
        self.connections: dict[tuple[int, int], _Connection] = {}
        self.later: deque[Frame] = deque()
        self.listener: int | None = None
        self.connecting: int | None = None
        self.next_port = settings.first_port
        self.pending: tuple[Event, Pending] | None = None
        self.names: dict[str, float] = {}
        self.rest: Frame | None = None  # of a run of segments that came as one
        self.log = _Log()
        self.line = 0
        # What relative times count from, and the time tolerances are a share of.
        self.last_time = 0.0
        self.last_inbound: float | None = None
        # For how long at most this process did nothing where it had something to do: times
        # after that count from too late. And when it last was where it should be.
        self.stood_still = 0.0
        self.busy_at = 0.0

    def run(self) -> None:
        for name, value in self.script.options:
            if name == "init_scripts":
                for command in (value or "").split(","):
                    self.command(Command(command), 1)
        for line, before in self.script.before:
            self.command(before, line)
        for event in self.script.events:
            if isinstance(event.action, Command):
                meaning(event.action.text, event.line, self.folder)  # say at once what is not known
        self.stack.start()
        self.busy_at = self.stack.now()
        for event in self.script.events:
            kind = "packet" if isinstance(event.action, Packet) else "syscall"
            try:
                self.event(event)
            except Failure:
                if kind not in self.settings.non_fatal:
                    raise
        self.await_call()

    # -- time

    def event(self, event: Event) -> None:
        self.line = event.line
        self.stood_still_since(self.busy_at)
        when, action = event.when, event.action
        inbound = isinstance(action, Packet) and action.inbound
        base = 0.0
        if when.relative or when.start is None:
            base = self.stack.now()
            if inbound and self.last_inbound is not None:
                base = self.last_inbound
        start = base + (when.start or 0.0)
        end = None if when.end is None else base + when.end
        if isinstance(action, Packet) and not inbound:
            start = self.expect(event, action, when, start, end)
        else:
            if self.stack.real and start - self.stack.now() > _LONGEST_WAIT:
                raise Unsupported(f"waiting for {start - self.stack.now():.0f} s", event.line)
            self.stack.wait(start)
            late = self.stack.now() - start
            if self.stack.real and late > self.tolerance(start):
                raise TooLate(event.line, late)
            if isinstance(action, Packet):
                self.inject(event, action)
                self.stood_still_since(start)
            elif isinstance(action, Call):
                self.call(event, action, base)
            elif isinstance(action, Code):
                self.code(event, action)
            else:
                self.command(action, event.line)
        self.busy_at = self.stack.now()
        self.last_inbound = start if inbound else None
        self.last_time = start

    def stood_still_since(self, then: float) -> None:
        """What was to be done at once after `then` is done only now."""
        self.stood_still = max(self.stood_still, self.stack.now() - then)

    def tolerance(self, start: float) -> float:
        """How far off `start` an event may be: fixed, or a share of the wait before it."""
        share = self.settings.tolerance_share * (start - self.last_time)
        return max(self.settings.tolerance, share)

    def check_time(
        self, event: Event, came: float, start: float, end: float | None, what: str
    ) -> None:
        tolerance = self.tolerance(start) + 1e-9
        if start - tolerance <= came <= (start if end is None else end) + tolerance:
            return
        expected = f"at {start:.6f} s" if end is None else f"from {start:.6f} to {end:.6f} s"
        raise Failure(
            f"{what} was expected {expected} and came at {came:.6f} s "
            f"(tolerance {tolerance:.6f} s)",
            event.line,
            untimely=True,
        )

    # -- commands and code

    def command(self, command: Command, line: int) -> None:
        for each in meaning(command.text, line, self.folder):
            if isinstance(each, File):
                self.stack.calls.files[each.path] = each.size
            elif isinstance(each, Pause):
                self.stack.wait(self.stack.now() + each.seconds)
            else:
                self.stack.sysctl(each.name, each.value, line, each.required)

    def code(self, event: Event, code: Code) -> None:
        connection = self.connection
        fd = connection.fd if connection and connection.fd is not None else self.any_fd()
        if fd is None:
            raise Unsupported("code before there is a socket", event.line)
        wrong = check_code(code.text, self.stack.tcp_info(fd), self.names, event.line)
        if wrong:
            raise Failure(wrong, event.line)

    def any_fd(self) -> int | None:
        fds = [fd for fd in self.stack.calls.fds if fd != self.listener]
        return fds[-1] if fds else None

    # -- calls

    def await_call(self) -> None:
        """Finish the blocking call under way, and hold it against the script."""
        if self.pending is None:
            return
        event, pending = self.pending
        self.pending = None
        call = event.action
        assert isinstance(call, Call)
        until = self.until
        self.last_time = self.called  # what it waited is its own, whatever came meanwhile
        limit = until + self.tolerance(until) + (_CALL_LIMIT if self.stack.real else 0.001)
        if not self.stack.finish(pending, limit):
            raise Failure(
                f"{call.name}() was expected to return at {until:.6f} s and still blocks",
                event.line,
            )
        self.judge(event, call, pending)
        self.check_time(event, pending.ended, until, None, f"the return of {call.name}()")

    def call(self, event: Event, call: Call, base: float) -> None:
        self.await_call()
        do = self.stack.calls.prepare(call, event.line)
        self.before_call(call)
        pending = self.stack.submit(do, call.until is not None)
        if call.until is not None:
            self.until, self.called = base + call.until, self.stack.now()
            self.pending = (event, pending)
            return
        limit = self.stack.now() + _CALL_LIMIT
        if not self.stack.finish(pending, limit):
            raise Failure(f"{call.name}() does not return", event.line)
        self.judge(event, call, pending)

    def before_call(self, call: Call) -> None:
        """A connect() may put its SYN on the wire before it returns."""
        fast = call.name in ("sendto", "sendmsg") and any(
            "FASTOPEN" in repr(argument) for argument in call.arguments
        )
        if call.name == "connect" or fast:
            fd = call.arguments[0]
            if isinstance(fd, int) and (self.connection is None or self.connection.fd != fd):
                self.connecting = fd

    def judge(self, event: Event, call: Call, pending: Pending) -> None:
        came = pending.result
        assert came is not None
        line = event.line
        expected = call.result
        shown = f"{call.name}() returned {came.value}" + (f" {came.errno}" if came.errno else "")
        if came.new is not None:
            if expected is ANY:
                raise Unsupported(f"{call.name}() = ...", line)
            fd = self.stack.calls.number(expected)
            if fd < 0:
                came.new.close()
                raise Failure(
                    f"{call.name}() succeeded, expected {fd} {call.errno or ''}".rstrip(), line
                )
            if fd in self.stack.calls.fds:
                came.new.close()
                raise Failure(f"{call.name}() = {fd}, a descriptor that is open", line)
            self.stack.calls.made(fd, came.new, "CLOEXEC" in repr(call.arguments))
            if call.name.startswith("accept") and self.connection is not None:
                self.accepted(came.new).fd = fd
        elif expected is not ANY:
            number = self.stack.calls.number(expected)
            wanted = f"{number}" + (f" {call.errno}" if call.errno else "")
            if number != came.value or ERRNO_NAMES.get(call.errno or "", call.errno) != came.errno:
                if came.errno in ("ENOPROTOOPT", "ENOTSUP") and not self.stack.real:
                    words = ", ".join(_words(call))
                    raise Unsupported(f"{call.name}({words}) on the model", line)
                raise Failure(f"{shown}, expected {wanted}", line)
        if expected is not ANY:
            for what, want, got in came.checks:
                if want != got:
                    came_to, wanted = (_short(str(each)) for each in (got, want))
                    raise Failure(f"{call.name}(): {what} is {came_to}, expected {wanted}", line)
        if call.name == "listen" and came.errno is None:
            self.listener, self.connection = self.stack.calls.number(call.arguments[0]), None
        if call.name == "close" and self.connection and self.connection.fd == call.arguments[0]:
            self.connection.fd = None

    def accepted(self, live: Any) -> _Connection:
        """The connection that accept() has handed out."""
        assert self.connection is not None
        with suppress(OSError):
            theirs = live.getpeername()[1]
            for ports, connection in self.connections.items():
                if ports[1] == theirs:
                    return connection
        return self.connection

    # -- packets

    def script_connection(self, event: Event, packet: Packet) -> _Connection:
        """The connection a script's packet belongs to, made where it begins one."""
        settings = self.settings
        if packet.protocol == "udp":
            if self.connection is None or self.connection.protocol != "udp":
                self.connection = _Connection(
                    (settings.local, settings.bind_port),
                    (settings.remote, settings.connect_port),
                    False,
                    protocol="udp",
                )
            return self.connection
        begins = packet.protocol == "tcp" and packet.flags & (SYN | ACK) == SYN
        if packet.ports:
            theirs, ours = packet.ports if packet.inbound else packet.ports[::-1]
            known = self.connections.get((ours, theirs))
            if known is not None or (begins and packet.inbound):
                self.connection = known
        if packet.inbound and packet.protocol == "tcp":
            fresh = self.connection is None
            if fresh and self.connecting is None:
                port = settings.bind_port
                if self.listener is not None:
                    port = self.stack.calls.ports.get(self.listener, port)
                theirs, ours = packet.ports or (self.next_port, port)
                self.connection = _Connection(
                    (settings.local, ours), (settings.remote, theirs), True
                )
                self.next_port += 1
                self.connection.live_remote_isn = packet.seq
                self.connections[ours, theirs] = self.connection
        if not packet.inbound and begins and self.connecting is not None:
            called = self.stack.calls.connected.get(self.connecting)
            remote = settings.remote, called[1] if called else settings.connect_port
            self.connection = _Connection(
                (settings.local, 0), remote, False, script_local_isn=packet.seq, fd=self.connecting
            )
            self.connecting = None
        if self.connection is None:
            raise Failure("no connection that this packet could belong to", event.line)
        return self.connection

    def inject(self, event: Event, packet: Packet) -> None:
        connection = self.script_connection(event, packet)
        frame = self.live(event, packet, connection)
        connection.text_came = connection.text_came or packet.length > 0
        for option in packet.options or ():
            if option.kind == 2 and packet.flags & SYN:
                connection.mss = int.from_bytes(option.data, "big")
        self.log.add(self.stack.now(), True, show(packet))
        self.stack.inject(frame)

    def live(self, event: Event, packet: Packet, connection: _Connection) -> Frame:
        """An inbound packet with live addresses and numbers."""
        (local, local_port), (remote, remote_port) = connection.live_local, connection.live_remote
        ports = (remote_port, local_port)
        if packet.ports:
            ports = (packet.ports[0] or remote_port, packet.ports[1] or local_port)
        ecn = packet.ecn if isinstance(packet.ecn, int) else 0
        tos = packet.tos if packet.tos is not None else ecn
        ttl = packet.ttl or 255
        label = packet.flow_label or 0
        if packet.protocol == "udp":
            return Frame(
                remote, local, "udp", ports, body=bytes(packet.length), tos=tos, ttl=ttl,
                flow_label=label,
            )  # fmt: skip
        if packet.protocol == "icmp":
            return self.icmp(event, packet, connection, tos, ttl)
        syn = bool(packet.flags & SYN)
        if syn and packet.flags & ACK and not connection.passive and not connection.answered:
            connection.answered = True
            connection.live_remote_isn = packet.seq
        seq = packet.seq + (0 if syn else connection.live_remote_isn)
        offset = self.local_offset(connection, syn)
        ack = packet.ack
        if packet.flags & ACK:
            ack += offset
        options = tuple(
            self.live_option(event, option, connection, offset, bool(packet.flags & ACK))
            for option in packet.options or ()
        )
        return Frame(
            remote, local, "tcp", ports, packet.flags, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF,
            packet.window or 0, packet.urgent, options, bytes(packet.length), tos, ttl, label,
        )  # fmt: skip

    def local_offset(self, connection: _Connection, syn: bool) -> int:
        isn = connection.live_local_isn or 0
        return isn - connection.script_local_isn if syn else isn

    def live_option(
        self, event: Event, option: Option, connection: _Connection, offset: int, acks: bool
    ) -> Option:
        if option.kind == 5:
            return _shifted(option, offset)
        if option.kind == 8 and acks:
            val, ecr = struct.unpack("!II", option.data)
            if ecr in connection.ts_live:
                ecr = connection.ts_live[ecr]
            elif self.settings.ecr_scaled and connection.ts_first:
                script, live = connection.ts_first
                ecr = (ecr - script + live) & 0xFFFFFFFF
            elif connection.ts_live:
                raise Failure(f"no outbound segment had the timestamp {ecr} to echo", event.line)
            return Option(8, struct.pack("!II", val, ecr))
        return option

    def icmp(
        self, event: Event, packet: Packet, connection: _Connection, tos: int, ttl: int
    ) -> Frame:
        six = ":" in connection.live_local[0]
        protocol, start, length = packet.echoed or ("tcp", 0, 0)
        local, remote = connection.live_local, connection.live_remote
        seq = (start + self.local_offset(connection, False)) & 0xFFFFFFFF
        inner = struct.pack("!HHI", local[1], remote[1], seq)
        total = length + (20 if protocol == "tcp" else 8)
        if six:
            addresses = socket.inet_pton(socket.AF_INET6, local[0]) + socket.inet_pton(
                socket.AF_INET6, remote[0]
            )
            head = struct.pack("!IHBB", 6 << 28, total, 6 if protocol == "tcp" else 17, 64)
        else:
            addresses = socket.inet_aton(local[0]) + socket.inet_aton(remote[0])
            head = struct.pack(
                "!BBHHHBBH", 0x45, 0, 20 + total, 0, 0x4000, 64, 6 if protocol == "tcp" else 17, 0
            )
        second = struct.pack("!HH", 0, packet.mtu or 0) if not six else struct.pack(
            "!I", packet.mtu or 0
        )  # fmt: skip
        body = second + head + addresses + inner + bytes(12 if six else 0)
        numbers = _icmp_numbers(packet, six)
        return Frame(remote[0], local[0], "icmp", icmp=numbers, body=body, tos=tos, ttl=ttl)

    # -- packets the stack sends

    def expect(
        self, event: Event, packet: Packet, when: When, start: float, end: float | None
    ) -> float:
        if packet.protocol == "icmp" and not self.stack.real:
            raise Unsupported("outbound ICMP messages on the model", event.line)
        connection = self.script_connection(event, packet)
        if when.start is None:
            deadline = self.stack.now() + _WAIT_FOR_STAR
        else:
            latest = start if end is None else end
            slack = 0.25 if self.stack.real else 0.0
            deadline = latest + self.tolerance(start) + slack + 1e-9
        first: Frame | None = None
        length = 0
        while True:
            frame = self.next_frame(connection, packet, deadline)
            if frame is None:
                seen = "" if first is None else f" (only {length} octets of it)"
                raise Failure(f"expected {show(packet)}, nothing came{seen}", event.line)
            # Linux pushes what is more than a segment (__tcp_transmit_skb).
            push = PSH if self.stack.offloads else 0
            first = frame if first is None else _joined(first, frame, push)
            if first is frame and self.stack.real:
                first = frame = self.piece(connection, packet, frame)
            length += len(frame.body)
            came = self.script_frame(first, connection, packet)
            # As packetdrill does outside of --strict_segments: a run of segments may
            # make up the one that the script writes.
            if (
                length >= packet.length
                or not frame.body
                or came.seq != packet.seq
                or self.settings.strict_segments
            ):
                break
        self.log.add(first.t, False, show(came))
        self.compare(event, packet, came, first, connection)
        self.stood_still_since(max(self.busy_at, first.t))
        if when.start is None:
            return first.t
        self.check_time(event, first.t, start, end, f"{show(packet)}")
        return start if end is None else first.t

    def piece(self, connection: _Connection, packet: Packet, frame: Frame) -> Frame:
        """The segment that a script without offloading means, of a run that TCP sent as one.

        The rest is left for the next event. Which of them a device pushes is not compared:
        Linux pushes the last of every run, and how long those are is not the script's.
        """
        size = connection.mss - 12 * any(option.kind == 8 for option in frame.options)
        here = packet.length
        cut = 0 < here < len(frame.body) and not here % size and not self.settings.strict_segments
        if cut:
            rest = frame.seq + here & 0xFFFFFFFF
            self.rest = evolve(frame, seq=rest, body=frame.body[here:], piece=True)
            frame = evolve(frame, flags=frame.flags & ~FIN, body=frame.body[:here])
        if cut or frame.piece:
            frame = evolve(frame, flags=frame.flags & ~PSH | packet.flags & PSH)
        return frame

    def next_frame(self, connection: _Connection, packet: Packet, deadline: float) -> Frame | None:
        """The next live packet of this connection; those of no connection pass by unseen."""
        for kept in self.later:
            if _is_of(kept, connection):
                self.later.remove(kept)
                return kept
        while True:
            frame, self.rest = self.rest or self.stack.receive(deadline), None
            if frame is None:
                return None
            if frame.protocol == "icmp":
                # Of the others, some are a kernel's own business, such as looking for routers.
                if packet.protocol == "icmp" and _is_error(frame):
                    return frame
                continue
            if frame.protocol != connection.protocol:
                continue
            if connection.protocol == "udp":
                connection.live_local = (frame.src, frame.ports[0])
                connection.live_remote = (frame.dst, frame.ports[1])
                return frame
            remote = (frame.dst, frame.ports[1])
            local = (frame.src, frame.ports[0])
            if packet.ports and packet.ports == frame.ports:
                connection.live_local, connection.live_remote = local, remote
            if remote != connection.live_remote:
                if (local[1], remote[1]) in self.connections:
                    self.later.append(frame)
                continue
            begins = frame.flags & (SYN | ACK) == SYN
            if not connection.passive and begins and local != connection.live_local:
                connection.live_local, connection.live_local_isn = local, frame.seq
            if local != connection.live_local:
                continue
            if connection.passive and connection.live_local_isn is None and frame.flags & SYN:
                connection.live_local_isn = frame.seq
                connection.script_local_isn = packet.seq
            return frame

    def script_frame(self, frame: Frame, connection: _Connection, packet: Packet) -> Frame:
        """An outbound packet with the script's numbers."""
        if frame.protocol != "tcp":
            return frame
        syn = bool(frame.flags & SYN)
        seq = frame.seq - self.local_offset(connection, syn)
        if frame.seq == 0 and frame.flags == RST | ACK:
            seq = 0  # a reset by a host that knows of no connection: a number of nobody's
        offset = 0 if syn else connection.live_remote_isn
        ack = frame.ack - offset if frame.flags & ACK else frame.ack
        options = []
        wanted = {o.kind: o for o in packet.options or ()}
        for option in frame.options:
            if option.kind == 5:
                option = _shifted(option, -offset)
            elif option.kind == 8 and len(option.data) == 8:
                val, ecr = struct.unpack("!II", option.data)
                if 8 in wanted:
                    script_val = int.from_bytes(wanted[8].data[:4], "big")
                    connection.ts_live[script_val] = val
                    if connection.ts_first is None:
                        connection.ts_first = (script_val, val)
                    script, live = connection.ts_first
                    val = (val - live + script) & 0xFFFFFFFF
                option = Option(8, struct.pack("!II", val, ecr))
            options.append(option)
        return Frame(
            frame.src, frame.dst, "tcp", frame.ports, frame.flags, seq & 0xFFFFFFFF,
            ack & 0xFFFFFFFF, frame.window, frame.urgent, tuple(options), frame.body, frame.tos,
            frame.ttl, frame.flow_label, t=frame.t,
        )  # fmt: skip

    def compare(
        self, event: Event, want: Packet, came: Frame, live: Frame, connection: _Connection
    ) -> None:
        full = connection.mss - 12 * any(o.kind == 8 for o in came.options)
        if not self.stack.real and len(came.body) >= full:
            # As in `piece`: Linux may push what ends one of its runs, or what a write() did.
            came = evolve(came, flags=came.flags | want.flags & PSH)
        differences = list(self.differences(want, came, connection))
        if not self.stack.real:
            self.stack.beyond |= _beyond(want, came, differences, connection)
        if differences:
            raise Failure(
                f"expected {show(want)}, came {show(came)}: " + "; ".join(differences),
                event.line,
                same_text=came.seq == want.seq and len(came.body) == want.length,
            )

    def differences(self, want: Packet, came: Frame, connection: _Connection) -> list[str]:
        """What sets a packet apart from the one expected, in words."""
        found: list[str] = []

        def same(what: str, expected: object, got: object) -> None:
            if expected != got:
                found.append(f"{what} is {got}, not {expected}")

        if want.ecn == "ect01":
            if came.tos & 3 not in (1, 2):
                found.append(f"ECN codepoint is {came.tos & 3}, not ECT")
        elif want.ecn is not None:
            same("ECN codepoint", want.ecn, came.tos & 3)
        if want.tos is not None:
            same("type of service", want.tos, came.tos)
        if want.ttl:
            same("TTL", want.ttl, came.ttl)
        if want.ports:
            same("ports", want.ports, came.ports)
        if want.protocol != "icmp":
            same("payload", f"{want.length} octets", f"{len(came.body)} octets")
        if want.flow_label and want.protocol == "tcp":
            before = connection.flow_label
            if before is None or (want.flow_label != before[0] and came.flow_label != before[1]):
                connection.flow_label = (want.flow_label, came.flow_label)
            elif (want.flow_label == before[0]) is not (came.flow_label == before[1]):
                found.append("flow label")
        if want.protocol == "icmp":
            same("ICMP message", _icmp_numbers(want, ":" in came.src), came.icmp)
            if want.mtu is not None:
                same("MTU", want.mtu, int.from_bytes(came.body[:4], "big"))
        if want.protocol != "tcp":
            return found
        same("flags", flags_letters(want.flags), flags_letters(came.flags))
        same("seq", want.seq, came.seq)
        same("ack", want.ack, came.ack)
        if want.window is not None:
            same("window", want.window, came.window)
        same("urgent pointer", want.urgent, came.urgent)
        if want.options is None:
            return found
        expected = [self.comparable(o) for o in want.options]
        got = [self.comparable(o) for o in came.options]
        if [o.kind for o in want.options] != [o.kind for o in came.options] or expected != got:
            found.append("options")
        elif self.settings.ts_tick:
            for a, b in zip(want.options, came.options, strict=True):
                if a.kind == 8:
                    val = int.from_bytes(a.data[:4], "big")
                    off = abs(int.from_bytes(b.data[:4], "big") - val) * self.settings.ts_tick
                    if off > self.settings.tolerance:
                        found.append("timestamp")
        return found

    def comparable(self, option: Option) -> bytes:
        # A timestamp is of the kernel's own clock, its echo is the script's.
        return option.data[4:] if option.kind == 8 else option.data


def _is_of(frame: Frame, connection: _Connection) -> bool:
    ends = connection.live_local, connection.live_remote
    return ends == ((frame.src, frame.ports[0]), (frame.dst, frame.ports[1]))


def _is_error(frame: Frame) -> bool:
    """Whether an ICMP message is about a packet, not an echo or a neighbour's."""
    kind = frame.icmp[0]
    return kind < 128 if ":" in frame.src else kind in (3, 4, 5, 11, 12)


def _beyond(want: Packet, came: Frame, differences: list[str], connection: _Connection) -> set[str]:
    """What no model here claims to have, where that alone explains the differences."""
    found = set()
    kinds = {difference.partition(" ")[0] for difference in differences}
    if kinds == {"window"} and connection.text_came:
        found.add("the receive window's growth")
    return found


def _joined(first: Frame, more: Frame, push: int) -> Frame:
    flags = first.flags | more.flags | push
    return Frame(
        first.src, first.dst, first.protocol, first.ports, flags, first.seq,
        more.ack, more.window, more.urgent, first.options, first.body + more.body, first.tos,
        first.ttl, first.flow_label, t=first.t,
    )  # fmt: skip


def _shifted(option: Option, offset: int) -> Option:
    """A SACK option with its edges moved by `offset`."""
    count = len(option.data) // 4
    edges = struct.unpack(f"!{count}I", option.data)
    return Option(5, struct.pack(f"!{count}I", *((e + offset) & 0xFFFFFFFF for e in edges)))


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def _words(call: Call) -> list[str]:
    return [a.name for a in call.arguments if isinstance(a, Word)]


def show(packet: Packet | Frame) -> str:
    """A packet as a script writes it."""
    if packet.protocol == "udp":
        length = packet.length if isinstance(packet, Packet) else len(packet.body)
        return f"udp ({length})"
    if packet.protocol == "icmp":
        if isinstance(packet, Packet):
            return f"icmp {packet.icmp_type} {packet.icmp_code}".rstrip()
        return f"icmp {packet.icmp}"
    length = packet.length if isinstance(packet, Packet) else len(packet.body)
    text = f"{flags_letters(packet.flags)} {packet.seq}:{packet.seq + length}({length})"
    if packet.flags & ACK:
        text += f" ack {packet.ack}"
    if packet.window is not None:
        text += f" win {packet.window}"
    if packet.urgent:
        text += f" urg {packet.urgent}"
    if packet.options is None:
        text += " <...>"
    elif packet.options:
        text += f" <{','.join(option_text(o) for o in packet.options)}>"
    return text

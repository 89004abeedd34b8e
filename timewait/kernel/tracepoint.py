"""Every state transition, as the kernel makes it.

The kernel's tracepoints `sock:inet_sock_set_state` and `tcp:*` are recorded by
the kernel itself into memory, filtered there by port, and read here as whole
binary pages laid out as the kernel's own `format` files say. Nothing is
missed, short of an overrun, which the kernel counts and so do we. Transitions,
by far the most of it, are recorded by a program of ours on the same tracepoint
(`timewait.kernel.recorder`) where the kernel takes it, at a third of the cost.
Where the kernel keeps process 1 apart from such programs (and from perf events),
an instance of its own records what happens while that process has the processor.

Two things a tracepoint does not show are put right here. TIME_WAIT is a small
socket of another kind: the kernel reports the full socket's end
(`FIN_WAIT2 -> CLOSE`) and sock_diag is asked what took its place. And a
connect() is reported before it has a port: the socket's next event tells.

Source: Documentation/trace/{ftrace,events,ring-buffer-map}.rst, kernel/trace/ring_buffer.c.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import re
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, TypeAlias

from attrs import evolve

from timewait.events import USED_AGAIN, Address, Event, Lost, Note, Row, Transition
from timewait.kernel import recorder, tracefs
from timewait.kernel.recorder import Recorder, keeps_init_apart
from timewait.kernel.sock_diag import SockDiag, address_text, host_text
from timewait.tcp.states import State

__all__ = ["ANYWHERE", "Tracepoint"]

ANYWHERE: Final = "which network namespace a socket is in"  # what it may be blind to

# Every kind of event has these; an IPv4 address stands in the IPv6 field too, mapped.
_PORTS: Final = "sport dport"
_HOSTS: Final = "saddr_v6 daddr_v6"
_STATE_EVENT: Final = "events/sock/inet_sock_set_state"
_STATE_FIELDS: Final = f"skaddr oldstate newstate {_PORTS} protocol {_HOSTS}"
_INIT: Final = Path("/proc/1/task")
_STATES: Final = tuple(State.from_linux(n) if n else State.CLOSED for n in range(14))
_BEGINNINGS: Final = frozenset((2, 7, 10))  # SYN_SENT, CLOSE, LISTEN
_UNCONNECTED: Final = frozenset((7, 10))  # CLOSE, LISTEN
_BEFORE_TIME_WAIT: Final = frozenset((State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING))
_LOOKS_FOR_NAMES: Final = 50
_RECORDED: Final = 0  # the kind of our own records; the kernel's numbers begin above
_LOOKS: Final = 64  # at most so many orphans are looked at in one read

_PAGE: Final = struct.Struct("=QQ")
_THREAD: Final = struct.Struct("=4xi")  # of any record: who had the processor
_WORD: Final = struct.Struct("=I")
_MISSED: Final = 1 << 31
_SIZE: Final = (1 << 30) - 1
_FIELD: Final = re.compile(r"field:[^;]*?(\w+)(?:\[\d*\])?;\s*offset:(\d+);\s*size:(\d+)")
_REASONS: Final = re.compile(r"REC->reason,\s*((?:\{[^}]*\},?\s*)+)")
_PAIR: Final = re.compile(r'\{\s*(\d+),\s*"(\w+)"')
_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}

Unpack: TypeAlias = Callable[[bytes, int], tuple[Any, ...]]


class Tracepoint:
    """An observer of every transition on `ports` (None: all), from `start` on.

    A context manager. Event times are seconds since `start`, a value of
    `time.monotonic()`. `buffer` is in bytes for each processor: some 80 bytes
    a transition. `resets` adds a note for each RST sent or received and each
    retransmission. `guarded` has another process remove what is left if this
    one is killed. Needs root.

    Transitions are those of the calling thread's network namespace; where
    `blind` says so, and with resets and retransmissions always, sockets of the
    same port in another namespace are seen as well.

    Raises `PermissionError` or `OSError` that says why it cannot be had.
    """

    name = "tracepoint"
    blind: tuple[str, ...] = (
        "states of connections that the kernel has not accepted yet (request sockets)",
        "the moment TIME_WAIT ends (looked up in sock_diag when it is due)",
    )

    def __init__(
        self,
        ports: Iterable[int] | None = None,
        *,
        start: float | None = None,
        buffer: int = 4 << 20,
        resets: bool = True,
        guarded: bool = False,
    ) -> None:
        self.start = time.monotonic() if start is None else start
        self.lost = 0
        self._ports = None if ports is None else frozenset(ports)
        self._pages: list[bytes] = []
        self._held: list[tuple[int, int, bytes, int]] = []
        self._unnamed: dict[int, int] = {}
        self._overruns: Counter[int] = Counter()
        self._not_run = 0
        self._small: dict[tuple[Address, Address], State] = {}
        self._due: list[tuple[float, tuple[Address, Address]]] = []
        self._connecting: set[tuple[Address, Address]] = set()
        self._causes: dict[int, str] = {}
        self._reasons: dict[int, str] = {}
        self._handlers: dict[int, Callable[[float, bytes, int, list[Event]], None]] = {}
        self._enable: list[Path] = []
        self._recorder: Recorder | None = None
        self._of_init: dict[int, bool] = {}
        self._written: list[bytes] = []
        self._missed: Counter[str] = Counter()
        self._buffers: list[int] = []
        self._bell: list[int] = []
        self._stats: dict[int, str] = {}
        self._epoll: select.epoll | None = None
        self._guard: IO[bytes] | None = None
        self._closed = False
        self._resources = ExitStack()
        try:
            self._open(buffer, resets, guarded)
        except BaseException:
            self._resources.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop recording and remove the instance; what was not read is lost."""
        self._closed = True
        self._resources.close()

    def fileno(self) -> int:
        """Readable when there is something to `read`.

        From the first call on, the kernel wakes whoever waits for it at each
        event, which costs the watched more than the recording does.
        """
        self._open_still()
        if self._epoll is None:
            self._epoll = self._resources.enter_context(select.epoll())
            if self._recorder is not None:  # its ring rings no bell; the kernel's record does
                self._hang_bell()
            for fd in (*self._bell, *self._buffers):
                self._epoll.register(fd, select.EPOLLIN)
        return self._epoll.fileno()

    def _hang_bell(self) -> None:
        """Have the kernel record transitions once more, for nothing but to wake who waits."""
        home = tracefs.instance(self._root, self._resources, self._guard)
        (home / "buffer_size_kb").write_text("8")  # what it cannot hold is not missed
        self._filter(home / _STATE_EVENT)
        self._bell += self._pipes(home).values()
        (home / _STATE_EVENT / "enable").write_text("1")

    def _open_still(self) -> None:
        if self._closed:  # its descriptors' numbers may be another's by now
            raise ValueError("the observer is closed")

    def rows(self, port: int) -> list[Row]:
        """The table as sock_diag has it now."""
        return self._diag.sockets(port)

    def drain(self) -> None:
        """Empty the kernel's buffers into memory, for a later `read`: a twentieth of its work."""
        self._open_still()
        page, pages = self._page, self._pages
        for fd in self._bell:
            with suppress(BlockingIOError):
                while os.readv(fd, [page]) >= _PAGE.size:
                    pass
        for fd in self._buffers:
            try:
                while (size := os.readv(fd, [page])) >= _PAGE.size:
                    pages.append(bytes(memoryview(page)[:size]))
            except BlockingIOError:
                pass
        if self._recorder is not None:
            for processor, (records, lost) in self._recorder.read():
                self._written.append(records)
                self._missed[f"processor {processor}'s buffer overran"] += lost

    def read(self) -> list[Event]:
        """Everything that happened before this call and was not read yet, in order of time."""
        now = time.monotonic_ns()
        self.drain()
        records, self._held = self._held, []
        self._sort_out(records)
        # What came while the buffers were read, one after the other, would be out of order.
        while records and records[-1][0] > now:
            self._held.append(records.pop())
        events: list[Event] = []
        self._count_lost(events)
        for ns, kind, page, at in records:
            self._handlers[kind](ns * 1e-9 - self.start, page, at, events)
        self._name_the_unnamed(events)
        events = self._resolve_ends(events)
        self._follow_small(now * 1e-9, events)
        return events

    def _sort_out(self, records: list[tuple[int, int, bytes, int]]) -> None:
        """Add what was drained, in order of time: when (ns), the kind, and where it is."""
        pages, self._pages = self._pages, []
        for page in pages:
            _parse(page, self._handlers, records)
        written, self._written = self._written, []
        for each in written:
            stamps = recorder.STAMP.iter_unpack(each)
            places = range(0, len(each), recorder.STAMP.size)
            records += [(ns, _RECORDED, each, at) for (ns,), at in zip(stamps, places, strict=True)]
        records.sort(key=_when)

    # Setting up

    def _open(self, buffer: int, resets: bool, guarded: bool) -> None:
        self._diag = self._resources.enter_context(SockDiag())
        self._root = root = tracefs.root(self._resources)
        tracefs.sweep(root)
        if guarded:
            self._guard = self._resources.enter_context(tracefs.guard(root))
        self.home = home = tracefs.instance(root, self._resources, self._guard)
        self._page = bytearray(_subbuffer_size(home, root))
        self._states = home / _STATE_EVENT
        try:
            self._recorder = Recorder(self._ports, buffer)
        except OSError:  # the kernel's own record will do
            self.blind += (ANYWHERE,)
            self._state_kind, self._unpack_state = self._watch(
                self._states, _STATE_FIELDS, self._on_state
            )
        else:
            self._resources.callback(self._recorder.close)
            self._state_kind, self._unpack_state = _RECORDED, recorder.RECORD.unpack_from
            self._handlers[_RECORDED] = partial(self._on_state, self._unpack_state)
            buffer >>= 2  # what is left to the kernel's is seldom
            if keeps_init_apart():
                self._watch_init(root, buffer)
        (home / "buffer_size_kb").write_text(str(max(buffer >> 10, 8)))
        for name, fields, handler in (
            ("tcp_receive_reset", f"skaddr {_PORTS} {_HOSTS}", self._on_reset),
            ("tcp_retransmit_skb", f"skaddr {_PORTS} {_HOSTS}", self._on_retransmit),
            ("tcp_send_reset", "reason saddr daddr", self._on_sent_reset),
        ):
            if not resets:
                break
            try:
                self._watch(home / "events/tcp" / name, fields, handler)
            except FileNotFoundError:  # younger than this kernel
                self.blind += (f"{name.removeprefix('tcp_')} (this kernel does not tell)",)
        self._open_buffers(home)
        for enable in self._enable:
            enable.write_text("1")

    def _watch_init(self, root: Path, buffer: int) -> None:
        """Have the kernel record what happens while a thread of process 1 has the processor."""
        home = tracefs.instance(root, self._resources, self._guard)
        self._watch(home / _STATE_EVENT, _STATE_FIELDS, self._on_state_in_init)
        self.blind += ("of what happens while process 1 has the processor, in which namespace",)
        (home / "buffer_size_kb").write_text(str(max(buffer >> 10, 8)))
        (home / "trace_options").write_text("event-fork")  # new threads too; and children
        while new := _threads_of_init() - self._of_init.keys():
            with (home / "set_event_pid").open("r+b", buffering=0) as followed:
                followed.write(" ".join(map(str, new)).encode())
            self._of_init.update(dict.fromkeys(new, True))
        self._open_buffers(home)

    def _watch(self, event: Path, fields: str, handler: Callable[..., None]) -> tuple[int, Unpack]:
        """Record this event and hand its fields to the handler; its number, and what unpacks it."""
        number, layout, ported, reasons = _format(event / "format", fields)
        self._reasons.update(reasons)
        if ported:
            self._filter(event)
        self._handlers[number] = partial(handler, layout.unpack_from)
        self._enable.append(event / "enable")
        return number, layout.unpack_from

    def _filter(self, event: Path) -> None:
        if self._ports is not None:
            condition = " || ".join(f"sport == {p} || dport == {p}" for p in sorted(self._ports))
            try:
                (event / "filter").write_text(condition or "sport == 0 && dport == 0")
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                many = f"too many ports for the kernel's filter: {len(self._ports)}"
                raise OSError(errno.EINVAL, many) from None

    def _open_buffers(self, home: Path) -> None:
        for cpu, fd in self._pipes(home).items():
            self._buffers.append(fd)
            stats = os.open(cpu / "stats", os.O_RDONLY | os.O_CLOEXEC)
            self._resources.callback(os.close, stats)
            self._stats[stats] = cpu.name.removeprefix("cpu")

    def _pipes(self, home: Path) -> dict[Path, int]:
        """What each processor's pages are read from."""
        pipes = {}
        for cpu in sorted((home / "per_cpu").iterdir()):
            pipes[cpu] = os.open(cpu / "trace_pipe_raw", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            self._resources.callback(os.close, pipes[cpu])
        return pipes

    def _count_lost(self, events: list[Event]) -> None:
        for fd, cpu in self._stats.items():
            text = os.pread(fd, 1000, 0).decode()
            numbers = dict(line.split(": ") for line in text.splitlines() if ": " in line)
            total = sum(int(numbers[n]) for n in ("overrun", "commit overrun", "dropped events"))
            self._missed[f"processor {cpu}'s buffer overran"] += total - self._overruns[fd]
            self._overruns[fd] = total
        if self._recorder is not None:
            total = self._recorder.not_run()
            self._missed["made while another was being recorded"] += total - self._not_run
            self._not_run = total
        missed, self._missed = +self._missed, Counter()
        for why, count in missed.items():
            self.lost += count
            self._connecting.clear()
            events.append(Lost(time.monotonic() - self.start, self.name, count, why))

    # What the records mean

    def _on_state(
        self, unpack: Unpack, at: float, page: bytes, offset: int, events: list[Event]
    ) -> None:
        sock, old, new, sport, dport, protocol, source, target = unpack(page, offset)
        if protocol != socket.IPPROTO_TCP:
            return
        local, remote = (host_text(source), sport), (host_text(target), dport)
        if self._unnamed and (unnamed := self._unnamed.pop(sock, None)) is not None and sport:
            events[unnamed] = _with_local(events[unnamed], local)
        if sport == 0:
            self._unnamed[sock] = len(events)
        elif old in _BEGINNINGS and self._small.pop((local, remote), None) is not None:
            events.append(
                Transition(
                    *(at, local, remote, State.TIME_WAIT, State.CLOSED, self.name),
                    cause=USED_AGAIN,
                )
            )
        was, became = _STATES[old], _STATES[new]
        if self._connecting:
            self._connecting.discard((local, remote))
        if was is not became:
            cause = self._causes.pop(sock, None) if self._causes else None
            if became is not State.CLOSED or old in _UNCONNECTED:
                cause = None  # it was of a socket that had this address in memory before
            events.append(Transition(at, local, remote, was, became, self.name, cause=cause))

    def _on_state_in_init(
        self, unpack: Unpack, at: float, page: bytes, offset: int, events: list[Event]
    ) -> None:
        (thread,) = _THREAD.unpack_from(page, offset)
        if thread not in self._of_init:
            self._of_init[thread] = thread in _threads_of_init()
        if self._of_init[thread]:  # and no child's, of which the program told
            self._on_state(unpack, at, page, offset, events)

    def _on_reset(
        self, unpack: Unpack, at: float, page: bytes, offset: int, events: list[Event]
    ) -> None:
        sock, sport, dport, source, target = unpack(page, offset)
        self._causes[sock] = "RST received"
        local, remote = (host_text(source), sport), (host_text(target), dport)
        text = f"{address_text(local)} received a RST from {address_text(remote)}"
        events.append(Note(at, text, local, remote))

    def _on_retransmit(
        self, unpack: Unpack, at: float, page: bytes, offset: int, events: list[Event]
    ) -> None:
        _, sport, dport, source, target = unpack(page, offset)
        local, remote = (host_text(source), sport), (host_text(target), dport)
        text = f"{address_text(local)} retransmitted to {address_text(remote)}"
        events.append(Note(at, text, local, remote))

    def _on_sent_reset(
        self, unpack: Unpack, at: float, page: bytes, offset: int, events: list[Event]
    ) -> None:
        reason, source, target = unpack(page, offset)
        local, remote = _sockaddr(source), _sockaddr(target)
        if self._ports is None or local[1] in self._ports or remote[1] in self._ports:
            why = self._reasons.get(reason, str(reason))
            text = f"{address_text(local)} sent a RST to {address_text(remote)} ({why})"
            events.append(Note(at, text, local, remote))

    def _name_the_unnamed(self, events: list[Event]) -> None:
        """Give connect()s the port they were dealt after their first event was recorded.

        A socket that still has no second event after a look at the table was
        in SYN_SENT during the look, or had no port yet, or is in another
        namespace and its thread was interrupted just there: then look again,
        and wait a little for the thread.
        """
        for look in range(_LOOKS_FOR_NAMES):
            if not self._unnamed:
                return
            if look > 2:
                time.sleep(0.001)
            waiting = self._diag.sockets(states=[State.SYN_SENT])
            self.drain()
            for sock, local in self._names_to_come():
                if (index := self._unnamed.pop(sock, None)) is not None:
                    events[index] = _with_local(events[index], local)
            for sock, index in list(self._unnamed.items()):
                event = events[index]
                assert isinstance(event, Transition)
                for row in waiting:
                    ends = row.local, row.remote
                    if row.remote == event.remote and ends not in self._connecting:
                        self._connecting.add(ends)
                        events[index] = _with_local(event, row.local)
                        del self._unnamed[sock]
                        break
        self._unnamed.clear()

    def _names_to_come(self) -> Iterator[tuple[int, Address]]:
        """The sockets of the events that are recorded and not read yet, with their own ends."""
        self._sort_out(self._held)
        for _, kind, page, at in self._held:
            if kind == self._state_kind:
                sock, _, _, sport, _, _, source, _ = self._unpack_state(page, at)
                if sport:
                    yield sock, (host_text(source), sport)

    def _resolve_ends(self, events: list[Event]) -> list[Event]:
        """Say TIME_WAIT where a full socket ended in one, and not CLOSED."""
        out: list[Event] = []
        for event in events:
            if (
                isinstance(event, Transition)
                and event.new is State.CLOSED
                and event.old in _BEFORE_TIME_WAIT
                and event.cause is None
            ):
                key = event.local, event.remote
                row = self._diag.lookup(*key)
                if row is not None and row.timer == "time_wait":
                    self._follow(key, row)
                    if row.state is State.FIN_WAIT_2:
                        continue  # an orphan, made small: nothing that TCP knows has happened
                    event = evolve(event, new=row.state)
            out.append(event)
        return out

    def _follow(self, key: tuple[Address, Address], row: Row) -> None:
        self._small[key] = row.state
        left = row.seconds_left or 0.0
        heapq.heappush(self._due, (time.monotonic() + left + 0.005, key))

    def _follow_small(self, now: float, events: list[Event]) -> None:
        """Look after orphans, and after those TIME_WAITs that should have ended by now."""
        orphans = (key for key, state in self._small.items() if state is State.FIN_WAIT_2)
        look = list(itertools.islice(orphans, _LOOKS))
        while self._due and self._due[0][0] <= now:
            look.append(heapq.heappop(self._due)[1])
        for key in dict.fromkeys(look):
            was = self._small.get(key)
            if was is None:
                continue
            row = self._diag.lookup(*key)
            if row is not None and row.timer == "time_wait":
                if row.state is was and was is State.FIN_WAIT_2:
                    continue
                self._follow(key, row)
                became = row.state
            else:
                del self._small[key]
                became = State.CLOSED
            if was is not became:
                at = time.monotonic() - self.start
                events.append(Transition(at, *key, was, became, "sock_diag", sampled=True))


def _when(record: tuple[int, int, bytes, int]) -> int:
    return record[0]


def _with_local(event: Event, local: Address) -> Event:
    assert isinstance(event, Transition)
    return evolve(event, local=local)


def _sockaddr(data: bytes) -> Address:
    family = int.from_bytes(data[:2], "little")
    host = data[4:8] if family == socket.AF_INET else data[8:24]
    return host_text(host), int.from_bytes(data[2:4], "big")


def _parse(page: bytes, kinds: Iterable[int], records: list[tuple[int, int, bytes, int]]) -> None:
    """Add a page's records of these kinds: when (ns), the kind, and where they are.

    A page begins with a time and the length of what follows; each record with
    5 bits of type or length and 27 of time since the one before
    (kernel/trace/ring_buffer.c, struct ring_buffer_event).
    """
    ns, commit = _PAGE.unpack_from(page)
    at = _PAGE.size
    end = min(at + (commit & _SIZE), len(page))
    word = _WORD.unpack_from
    while at + 4 <= end:
        (head,) = word(page, at)
        length, delta = head & 31, head >> 5
        at += 4
        if length > 28 or length == 0:
            if length == 29 and delta == 0:
                return  # the rest of the page is empty
            (more,) = word(page, at)
            if length == 30:
                ns += (more << 27) + delta
                at += 4
                continue
            if length == 31:
                ns = ns & ~((1 << 59) - 1) | (more << 27) + delta
                at += 4
                continue
            ns += delta
            if length == 29:
                at += more
                continue
            size, start = more - 4, at + 4
            at += more
        else:
            ns += delta
            size, start = length * 4, at
            at += size
        if at > end or size < 4:
            return
        kind = page[start] | page[start + 1] << 8
        if kind in kinds:
            records.append((ns, kind, page, start))


def _format(path: Path, names: str) -> tuple[int, struct.Struct, bool, dict[int, str]]:
    """How the kernel lays out an event: its number, a Struct of the fields `names`, whether it
    has ports to filter by, and the names of its reasons.
    """
    text = path.read_text()
    number = re.search(r"^ID: (\d+)", text, re.MULTILINE)
    fields = {name: (int(at), int(size)) for name, at, size in _FIELD.findall(text)}
    code, end = "=", 0
    for name in names.split():
        if name not in fields:
            raise FileNotFoundError(errno.ENOENT, f"this kernel tells no {name}", str(path))
        at, size = fields[name]
        code += f"{at - end}x" + _CODES.get(size, f"{size}s")
        end = at + size
    reasons = _REASONS.search(text)
    named = _PAIR.findall(reasons[1]) if reasons else []
    assert number is not None
    return (
        int(number[1]),
        struct.Struct(code),
        "sport" in fields,
        {int(value): name for value, name in named},
    )


def _subbuffer_size(home: Path, root: Path) -> int:
    try:
        return int((home / "buffer_subbuf_size_kb").read_text()) << 10  # since Linux 6.8
    except FileNotFoundError:
        text = (root / "events/header_page").read_text()
        at, size = {n: (int(a), int(s)) for n, a, s in _FIELD.findall(text)}["data"]
        return at + size


def _threads_of_init() -> set[int]:
    """The threads of process 1, by the numbers that the kernel itself knows them by."""
    if not tracefs.in_first_pid_namespace():
        return {1}  # another is called so here, and only this number is known
    return {int(thread.name) for thread in _INIT.iterdir()}

"""What a piece of code does with TCP connections, and assertions about it that explain themselves.

A witness watches from `__enter__` to `__exit__` and blames only its own process tree. It puts
together what it can see without privilege:

- the `Ledger`: every socket call of this process's Python code, with the state the
  kernel had the socket in at that instant;
- the kernel's table (sock_diag): of a connection's two ends whenever one of them
  moves, of everything whenever something is asked, and now and then while this
  process has children, whose calls it does not see;
- where it is permitted, the kernel's own record of every transition (`Record`);
- `/proc`: whose a socket is.

A TIME_WAIT has no owner; it is this code's when its connection is, or when it
is at a port this code listened on. `blind` says in words what could not be seen.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from operator import attrgetter
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from attrs import evolve

from timewait.connections import LEFT_OPEN, Connections, Key, Seen
from timewait.events import Called, Event, Row, RunStarted, Snapshot, Transition
from timewait.ledger import Entry, Ledger, clock
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.kernel.sock_diag import SockDiag
    from timewait.record import Record

__all__ = ["Witness", "descendants", "looking_on", "sockets_of", "table"]

_PERIOD: Final = 0.02  # seconds between looks at the children's sockets
_BEGINNINGS: Final = {State.CLOSED, State.LISTEN}
_BACKLOG: Final = {State.SYN_RECEIVED, State.ESTABLISHED, State.CLOSE_WAIT}


class Witness(Connections):
    """Watches the TCP connections of this process and its children.

        with Witness() as seen:
            run_the_code()
        seen.assert_closed_by("client", port=9090)

    As a synchronous or an asynchronous context manager. Questions can be
    asked while it watches and afterwards, when the answers are about the
    moment it stopped. With `stacks`, messages show the whole stack that
    created a socket. Assertions wait up to a second for a close that is under
    way; in a coroutine, `await seen.settled()` first, so that the loop can
    do its part.

    Raises `OSError` on entry where the system shows no sockets at all.
    """

    def __init__(self, *, stacks: bool = False) -> None:
        super().__init__()
        self._ledger = Ledger(stacks=stacks, on_change=self._moved)
        self._list = table()
        self._before: dict[Key, Row] = {}
        self._older: set[Entry] = set()  # accepted now, connected before
        self._record: Record | None = None
        self._owned: dict[int, int] | None = None  # inode -> pid, as of this look
        self._not_ours: set[int] = set()
        self._children: set[int] = set()
        self._began = 0.0

    # --- watching

    def __enter__(self) -> Self:
        self._began = clock()
        self._diag = _sock_diag()
        self._record = _record() if self._diag is not None else None
        for row in self._rows():
            self._before[row.local, row.remote] = row
            if row.state is State.LISTEN:
                self._listening.setdefault(row.local[1], False)
        self._ledger.__enter__()
        self._watching = True
        _looks.witnesses.add(self)
        _looks.resume()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.look()
        with self._lock:
            self._watching = False
        _looks.witnesses.discard(self)
        _looks.rest()
        if self._record is not None:
            self._record.close()
        self._ledger.__exit__(kind, error, trace)
        if self._diag is not None:
            self._diag.close()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.__exit__(kind, error, trace)

    def look(self) -> None:
        """Read the kernel's table now."""
        _looks.resume()
        with self._lock:
            self._not_ours.clear()
            self._look()
            if self._record is not None and self._record.waiting:
                self._record.hear()
                self._look()

    def _look(self) -> None:
        with self._lock:
            if not self._watching:
                return
            self._owned = None
            if self._record is not None:
                self._record.read()  # before the table, which is newer then
            rows = self._rows()
            now = clock()  # the connections of these rows began before
            self._take_record({(row.local, row.remote) for row in rows})
            present: set[Key] = set()
            for row in rows:
                key = row.local, row.remote
                if row.state is State.LISTEN:
                    if not self._listening.get(row.local[1]):
                        self._listening[row.local[1]] = self._owner(row.inode) is not None
                    continue
                if self._was_there(key, row):
                    continue
                present.add(key)
                self._note(key, row, now)
            for key, seen in list(self._seen.items()):
                if key not in present:
                    seen.row = None
                    if _unclosed(seen) and self._diag and self._diag.lookup(*key) is None:
                        peer = self._endpoint_at(*key[::-1], now)
                        peer.reset = f"the other end died unclosed in {seen.state}"
                    seen.move(None, now)
                    if not self._ours(seen):
                        del self._seen[key]  # a stranger's: it came and went

    def _rows(self) -> list[Row]:
        """The table of the network namespace that this began in, whatever thread asks."""
        return self._list(None) if self._diag is None else self._diag.sockets()

    def _take_record(self, table: set[Key]) -> None:
        """Take in what the kernel has recorded of connections in this namespace."""
        if self._record is None:
            return
        for event, own in self._record.take(table | {*self._seen}):
            key = event.local, event.remote
            if event.new is State.LISTEN:
                self._listening[event.local[1]] = True
                continue
            if event.old in _BEGINNINGS:
                self._before.pop(key, None)
            elif key in self._before and key not in self._seen:
                continue  # it was there already
            seen = self._take_transition(event, event.t)
            seen.told.append(event)
            seen.own |= own

    def _note(self, key: Key, row: Row, now: float) -> Seen:
        seen = self._seen.get(key)
        if seen is None:
            seen = self._seen[key] = Seen(*key, None, now)
        seen.row = row
        if seen.pid is None and row.inode:
            seen.pid = self._owner(row.inode)
        seen.move(row.state, now)
        return seen

    def _moved(self, entry: Entry) -> None:
        """A socket of this process moved: look at both of the connection's ends."""
        if entry.side == "listener" and entry.local is not None:
            self._listening[entry.local[1]] = True
        if entry.local is None or entry.remote is None:
            return
        key = entry.local, entry.remote
        _looks.resume()
        with self._lock:
            if self._is_older(key, entry):
                return
            self._owned = None
            now = clock()
            seen = self._seen.get(key)
            if self._record is not None and seen is not None and seen.entry not in (None, entry):
                self._record.read()
                self._take_record(set())  # the end of the connection that was
                seen = self._seen.get(key)
            if seen is None or (seen.entry is not None and seen.entry is not entry):
                if seen is not None:
                    self._past.append(
                        [self._seen.pop(way) for way in {key, key[::-1]} & {*self._seen}]
                    )
                seen = self._seen[key] = Seen(*key, None, now)
            seen.entry, seen.pid = entry, os.getpid()
            if entry.ends and entry.ends[-1].state not in (State.CLOSED, None):
                seen.move(entry.ends[-1].state, entry.ends[-1].t)
            if self._diag is None:
                if entry.ends and _children(os.getpid()):
                    for left in self._list(key[0][1]):
                        if (left.local, left.remote) == key:
                            self._reconsider(seen, entry, left)
                return
            if entry.side == "server" and not entry.ends and seen.state:
                return  # (an accepted connection was looked at when its client connected)
            for way in (key, key[::-1]):
                try:
                    row = self._diag.lookup(*way)
                except (OSError, ValueError):
                    continue
                if row is not None:
                    if way == key:
                        self._reconsider(seen, entry, row)
                    self._note(way, row, now)
                elif way in self._seen:
                    self._seen[way].row = None
                    self._seen[way].move(None, now)

    def _was_there(self, key: Key, row: Row) -> bool:
        """Whether the connection is older than the watch."""
        before = self._before.get(key)
        if before is None:
            return False
        if before.inode == 0 and before.state in _BACKLOG:  # it is accepted only now
            before = self._before[key] = row
        return row.inode in (before.inode, 0, None)

    def _is_older(self, key: Key, entry: Entry) -> bool:
        """Whether what was accepted now had been waiting for it before the watch."""
        before = self._before.get(key)
        if entry.side == "server" and before is not None and before.state in _BACKLOG:
            inode = next((os.fstat(at).st_ino for at in entry.holders), 0)
            if inode and before.inode in (0, inode):
                self._before[key] = evolve(before, inode=inode)
                self._older.add(entry)
        return entry in self._older

    def _reconsider(self, seen: Seen, entry: Entry, row: Row) -> None:
        """Strike a close() off after which another descriptor, a forked child's say, is left."""
        if row.inode and entry.ends and entry.ends[-1].call == "close":
            entry.ends.pop()
            seen.pid = self._owner(row.inode) or seen.pid

    def _owner(self, inode: int | None) -> int | None:
        """The process of this tree that has the socket open."""
        if self._diag is None:
            return inode or None  # psutil has told whose it is
        if not inode or inode in self._not_ours:
            return None
        if self._owned is None:
            daemons = {pid for pid in self._children if os.path.exists(f"/proc/{pid}")}
            self._children = _tree(os.getpid()) | daemons  # once a child of ours, still ours
            if self._record is not None:
                self._children |= self._record.daemons(self._children)
            self._owned = sockets_of(self._children)
        if inode not in self._owned:
            self._not_ours.add(inode)
        return self._owned.get(inode)

    @property
    def observer(self) -> str:
        """Who tells of states: "tracepoint", "sock_diag" or "psutil"."""
        if self._record is not None:
            return "tracepoint"
        return "psutil" if self._diag is None else "sock_diag"

    @property
    def opened(self) -> int:
        """How many TCP sockets this process tree was seen to open."""
        ends = [
            seen
            for seen in self._all()
            if seen.pid is not None or seen.own or self._listening.get(seen.local[1])
        ]
        noted = [entry for entry in self._ledger.entries if entry.side == "listener"]
        known = {entry.local[1] for entry in noted if entry.local is not None}
        known |= {row.local[1] for row in self._before.values() if row.state is State.LISTEN}
        childrens = [port for port, own in self._listening.items() if own and port not in known]
        return len(ends) + len(noted) + len(childrens)

    @property
    def blind(self) -> tuple[str, ...]:
        """What could not be seen, in words."""
        blind = []
        if self._diag is None:
            blind.append("timers and queues: psutil shows states only")
            blind.append("states at the moment of a call, but for what the call itself tells")
            blind.append("sockets of other processes, and TIME_WAIT, where psutil lists only ours")
        if self._record is not None:
            if len(self._children) > 1 and not self._record.tells_whose:
                blind.append(
                    "whose a child process's connection is that came and went between two looks, "
                    f"{_PERIOD * 1000:.0f} ms apart, if its listener did as well"
                )
            if self._record.lost:
                blind.append(f"{self._record.lost} transitions that the kernel had no room for")
            return tuple(blind)
        if len(self._children) > 1:
            blind.append(
                f"what child processes did between two looks, {_PERIOD * 1000:.0f} ms apart"
            )
        blind.append("sockets made below Python: their states only when the table is read")
        return tuple(blind)

    @property
    def events(self) -> list[Event]:
        """The same as a stream of events, for `check` and for a file."""
        self.look()
        events: list[Event] = []
        with self._lock:
            for seen in self._all():
                if self._ours(seen):
                    events += self._events_of(seen)
            rows = tuple(s.row for s in self._seen.values() if s.row and self._ours(s))
        head = RunStarted(0.0, "kernel", self.observer, blind=self.blind)
        tail = Snapshot(clock() - self._began, "end", rows, self.observer)
        return [head, *sorted(events, key=attrgetter("t")), tail]

    def _events_of(self, seen: Seen) -> Iterator[Event]:
        actor = self._side(seen)
        if seen.entry is not None:
            if seen.entry.side in ("client", "server"):
                call = "connect" if seen.entry.side == "client" else "accept"
                t = seen.entry.t
                for event in seen.told:  # a connect() that went on in the background
                    if event.new is State.ESTABLISHED or seen.entry.failed:
                        t = max(t, event.t + 1e-6)
                t -= self._began
                yield Called(t, actor, call, seen.local, seen.remote, seen.entry.failed)
            for end in seen.entry.ends:
                yield Called(end.t - self._began, actor, end.call, seen.local, seen.remote)
        if seen.told:
            for event in seen.told:
                yield evolve(event, t=event.t - self._began)
            return
        old = State.CLOSED
        for t, state in seen.history:
            t -= self._began
            yield Transition(t, seen.local, seen.remote, old, state, self.observer, True)
            old = state

    def _table(self) -> list[Row]:
        return self._list(None)

    def _ours(self, seen: Seen) -> bool:
        """Whether this code had a part in the connection."""
        if seen.pid is not None or seen.own or self._listening.get(seen.local[1]):
            return True
        if self._listening.get(seen.remote[1]) and seen.local[0] == seen.remote[0]:
            return True  # its other end, at a port listened on here, was never seen
        mirror = self._seen.get((seen.remote, seen.local))
        return mirror is not None and (
            mirror.pid is not None or mirror.own or self._listening.get(mirror.local[1], False)
        )

    def _held(self, seen: Seen) -> bool:
        """Whether a process of this tree has it; a connection in a backlog is its listener's."""
        if seen.row is None or seen.state not in LEFT_OPEN:
            return False
        if seen.row.inode:
            return seen.pid is not None
        waiting = seen.entry is None and seen.pid is None and seen.state is not State.FIN_WAIT_2
        return waiting and self._listening.get(seen.local[1], False)


def _unclosed(seen: Seen) -> bool:
    """Whether it is in a state that no end but the peer's RST leads out of: none was called."""
    open_still = seen.entry is not None and not seen.entry.ends and any(seen.entry.holders.values())
    return open_still and seen.state in (State.ESTABLISHED, State.CLOSE_WAIT)


def _record() -> Record | None:
    """The kernel's record of transitions, where this process may have it."""
    from timewait.record import record

    try:
        return record(lambda: _tree(os.getpid()))
    except OSError:
        return None


class _Looks:
    """Looks now and then while calls are made that no ledger notes: children's, uvloop's.

    One thread does it for all witnesses, as long as there are any or it is `kept`:
    to start a thread and to end it takes longer than all else that a witness does.
    """

    def __init__(self) -> None:
        self.witnesses: weakref.WeakSet[Witness] = weakref.WeakSet()
        self.kept = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def resume(self) -> None:
        """Start the thread, if there is something to look for and it is not there."""
        if self._thread is None and self.witnesses:
            self._thread = threading.Thread(target=self._run, name="timewait", daemon=True)
            self._thread.start()

    def rest(self) -> None:
        """End the thread if nobody wants it."""
        if not self.witnesses and not self.kept:
            self.pause()

    def pause(self) -> None:
        """End the thread until something moves (a fork wants no other threads)."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._stop.clear()
            self._thread = None

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD):
            if self.witnesses and ("uvloop" in sys.modules or _children(os.getpid())):
                began = clock()
                for witness in list(self.witnesses):
                    with suppress(OSError):  # (no descriptor is left, say; the next look tells)
                        witness._look()
                if self._stop.wait((clock() - began) * 10):  # at most a tenth of a core
                    return


_looks: Final = _Looks()


@contextmanager
def looking_on() -> Iterator[None]:
    """Keep the thread that looks now and then from one witness to the next."""
    _looks.kept += 1
    try:
        yield
    finally:
        _looks.kept -= 1
        _looks.rest()


def _after_fork() -> None:
    """What the witnesses of a child's parent ask with is their own."""
    for witness in list(_looks.witnesses):
        witness._diag, witness._record = _sock_diag(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_looks.pause, after_in_child=_after_fork)


# --- the system's tables ------------------------------------------------------------------


def _sock_diag() -> SockDiag | None:
    """A netlink socket for exact look-ups, where the system has such."""
    if not sys.platform.startswith("linux"):
        return None
    from timewait.kernel.sock_diag import SockDiag

    try:
        return SockDiag()
    except OSError:
        return None


def table() -> Callable[[int | None], list[Row]]:
    """How this system's TCP sockets are listed, all or those of a port.

    Raises `OSError` where they are not.
    """
    if sys.platform.startswith("linux"):
        from timewait.kernel.sock_diag import SockDiag, sockets

        try:
            with SockDiag() as diag:
                diag.sockets(states=())  # whether it knows of TCP; nothing is walked for that
        except OSError:
            pass
        else:
            return sockets
    from timewait.kernel.observers import psutil_rows

    try:
        psutil_rows()
    except OSError:
        raise OSError(
            errno.ENOTSUP, "no way to list TCP sockets here: neither sock_diag nor psutil"
        ) from None

    def states(port: int | None) -> list[Row]:
        tree = _tree(os.getpid())
        return [
            evolve(row, inode=pid if pid in tree else 0)  # it has no better name there
            for row, pid in psutil_rows()
            if port in (None, row.local[1], row.remote[1])
        ]

    return states


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as listed:
                children += map(int, listed.read().split())
    except OSError:
        if not sys.platform.startswith("linux"):
            return _children_by_psutil(pid)
    return children


def _children_by_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.Error:
        return []


def descendants(pid: int) -> list[int]:
    """The children of a process and theirs, parents first."""
    found = _children(pid)
    for each in found:  # (it grows)
        found += _children(each)
    return found


def _tree(pid: int) -> set[int]:
    return {pid, *descendants(pid)}


_SOCKET: Final = re.compile(r"socket:\[(\d+)\]")


def sockets_of(pids: Iterable[int]) -> dict[int, int]:
    """Socket inode -> the process among these that has it open."""
    owners: dict[int, int] = {}
    for pid in pids:
        try:
            with os.scandir(f"/proc/{pid}/fd") as fds:
                for fd in fds:
                    try:
                        link = _SOCKET.fullmatch(os.readlink(fd.path))
                    except OSError:
                        continue
                    if link:
                        owners.setdefault(int(link[1]), pid)
        except OSError:
            continue
    return owners

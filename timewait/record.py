"""The kernel's record of every transition, shared by all witnesses of this process.

Where the kernel's tracepoint is permitted (to root), a witness knows each state
of its children's connections, and of those made below Python, and not only the
states they are in when the table is read. To open it takes some 200 ms and to
close it as much, so it is opened once, and kept until the process ends.

On some kernels the tracepoint tells of all network namespaces and does not say
which. A connection is of this one if its addresses are in this one's table, or
among the sockets that this one's sock_diag tells were destroyed. Which of them
this process's own tree has begun, the kernel tells as well (`Lineage`).
"""

from __future__ import annotations

import atexit
import errno
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Final, TypeAlias

from timewait.connections import Key
from timewait.events import Transition
from timewait.kernel.lineage import Lineage
from timewait.kernel.sock_diag import Destroyed
from timewait.kernel.tracepoint import ANYWHERE, Tracepoint
from timewait.ledger import clock
from timewait.tcp.states import State

__all__ = ["Record", "record"]

Tree: TypeAlias = Callable[[], Iterable[int]]  # the processes of a tree, as they are now

_BUFFER: Final = 1 << 20  # bytes for each processor: some 13,000 transitions between two looks
_PATIENCE: Final = 1.0  # seconds until a transition that was seen nowhere here is another's


class Record:
    """What happens from now on, for one witness."""

    def __init__(self, recorder: _Recorder) -> None:
        self._recorder = recorder
        self._lost_before = recorder.lost
        self._beginnings_lost_before = 0 if recorder.lineage is None else recorder.lineage.lost
        self.waiting: list[Transition] = []
        self.own: set[Transition] = set()  # of those that wait
        self.destroyed: dict[Key, float] = {}  # when it was told
        recorder.readers.append(self)

    def close(self) -> None:
        """Hear no more."""
        self._recorder.readers.remove(self)

    @property
    def lost(self) -> int:
        """How many transitions were missed."""
        return self._recorder.lost - self._lost_before

    @property
    def tells_whose(self) -> bool:
        """Whether it is known which connections this process tree has begun."""
        lineage = self._recorder.lineage
        return lineage is not None and lineage.lost == self._beginnings_lost_before

    def daemons(self, tree: Iterable[int]) -> set[int]:
        """Those of this process's descendants that are not of its tree any more, if it is known."""
        lineage = self._recorder.lineage
        return set() if lineage is None else lineage.daemons(tree)

    def read(self) -> None:
        """Have the kernel's buffers emptied into this record and all others."""
        self._recorder.read()

    def hear(self) -> None:
        """Have each socket heard of that was destroyed before, as `read` and more."""
        self._recorder.read(all_so_far=True)

    def take(self, known: set[Key]) -> list[tuple[Transition, bool]]:
        """The transitions, not taken yet, of connections of this namespace; times are monotonic.

        With each, whether this process or one of its tree made it, as far as it is told: of a
        connect() and of a listen(), of which no others are told. `known` are the connections in
        the namespace's table. Of the others some may turn out to be later.
        """
        known = known | self.destroyed.keys() | {(each.local, each.remote) for each in self.own}
        found, old = [], clock() - _PATIENCE
        waiting, self.waiting = self.waiting, []
        for each in waiting:
            ends = {(each.local, each.remote), (each.remote, each.local)}
            if each.new is State.LISTEN or ends & known:
                found.append((each, each in self.own))
            elif each.t > old:
                self.waiting.append(each)
        self.own.intersection_update(self.waiting)
        # A notice may come before the transitions that it is about.
        self.destroyed = {key: t for key, t in self.destroyed.items() if t > old}
        return found


class _Recorder:
    def __init__(self, tree: Tree) -> None:
        self.namespace = _namespace()
        self.readers: list[Record] = []
        self._lock = threading.Lock()
        self.lineage: Lineage | None = None
        with ExitStack() as undone:
            with suppress(OSError):
                self.lineage = Lineage(tree)  # before the other, whose events it is about
                undone.callback(self.lineage.close)
            self._tracepoint = Tracepoint(None, start=0.0, buffer=_BUFFER)
            if ANYWHERE in self._tracepoint.blind:
                self.lineage = None  # a child may be in another namespace, on the same port
            else:
                undone.pop_all()
        self._notices = Destroyed()

    @property
    def lost(self) -> int:
        return self._tracepoint.lost

    def read(self, *, all_so_far: bool = False) -> None:
        with self._lock:
            events = [each for each in self._tracepoint.read() if isinstance(each, Transition)]
            own = set(() if self.lineage is None else self.lineage.among(events))
            events = [each for each in events if each.remote[1] or each in own]
            now = clock()
            here = _namespace() == self.namespace
            notices = self._notices.all_so_far() if all_so_far and here else self._notices.read()
            gone = {(row.local, row.remote): now for row in notices.values()}
            for reader in self.readers:
                reader.waiting += events
                reader.own |= own
                reader.destroyed |= gone

    def close(self) -> None:
        with suppress(OSError):  # (a forked child may have it open)
            self._tracepoint.close()
        if self.lineage is not None:
            self.lineage.close()
        self._notices.close()


_shared: _Recorder | None = None
_refused: OSError | None = None


def record(tree: Tree) -> Record:
    """A record from now on. Raises `OSError` that says why there is none here.

    `tree` tells which processes are of this one's tree now.
    """
    global _shared, _refused
    if _refused is not None:
        raise _refused
    if _shared is not None and _shared.namespace != _namespace():
        if _shared.readers:
            raise OSError(errno.EBUSY, "another network namespace is being recorded")
        _close()
    if _shared is None:
        try:
            _shared = _Recorder(tree)
        except OSError as refused:
            _refused = refused
            raise
    if _shared.lineage is not None and not _shared.readers:
        _shared.lineage.follow_only(tree)
    _shared.read()  # what happened till now is not this record's
    return Record(_shared)


def _close() -> None:
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


def _namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


atexit.register(_close)
if hasattr(os, "register_at_fork"):  # what is recorded is the parent's; its descriptors are not
    os.register_at_fork(after_in_child=_close)

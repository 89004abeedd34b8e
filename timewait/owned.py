"""Of what is watched, what concerns the connections of this process's children, both ends of them.

Who listens and who connects the kernel tells where root allows it (`Lineage`). Elsewhere the owner
of a socket is looked for when something first happens to it. One that is not there any more is not
left out, since it may be theirs.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Container, Sequence
from contextlib import suppress
from functools import cache
from typing import Final, Self

from attrs import evolve

from timewait.connections import Key
from timewait.events import Address, Event, Note, Row, SegmentSeen, Transition
from timewait.kernel.lineage import Lineage
from timewait.tcp.segment import ACK, SYN
from timewait.tcp.states import State
from timewait.witness import descendants, sockets_of, table

__all__ = ["Owned"]

_BUFFER: Final = 1 << 20  # bytes for each processor: some 10,000 beginnings between two looks


class Owned:
    """Picks the events of this process's children out of all.

    To be made before what observes, and before the children. `unknown` counts the sockets that
    were gone before it could be seen whose they were.
    """

    def __init__(self) -> None:
        self.unknown = 0
        self._lineage: Lineage | None = None
        with suppress(OSError):
            self._lineage = Lineage(lambda: [os.getpid()], buffer=_BUFFER)
        self._list = table()
        self._children: set[int] = set()
        self._listening: set[Address] = set()
        self._own: set[Key] = set()
        self._others: set[Key] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lineage is not None:
            self._lineage.close()

    def among(self, events: Sequence[Event], began: float) -> list[Event]:
        """Those that concern the children. `began` is when their times begin (`time.monotonic`)."""
        begun = self._begun(events, began)
        there: dict[Key, Row] | None = None
        found = []
        for event in events:
            key = _ends(event)
            if key is None:
                found.append(event)
                continue
            if _calls(event):
                self._forget(key, key[::-1])
            if event in begun:
                self._take(key)
            elif not self._knows(key) and key not in self._others and not self._told(event):
                if there is None:
                    there = {(row.local, row.remote): row for row in self._list(None)}
                    sockets = self._sockets(there)
                self._look_up(key, event, there, sockets)
            if self._knows(key):
                found.append(event)
            if isinstance(event, Transition) and event.new is State.CLOSED:
                self._forget(key)
        return found

    def _begun(self, events: Sequence[Event], began: float) -> set[Event]:
        """Those in which a child began to listen, or to connect, by the kernel's word."""
        if self._lineage is None:
            return set()
        told = {
            evolve(event, t=began + event.t): event
            for event in events
            if isinstance(event, Transition) and event.new in (State.LISTEN, State.SYN_SENT)
        }
        return {told[each] for each in self._lineage.among(told)}

    def _told(self, event: Event) -> bool:
        """Whether the kernel would have told that it is a child's."""
        exact = isinstance(event, Transition) and not event.sampled
        return exact and self._lineage is not None and not self._lineage.lost

    def _knows(self, key: Key) -> bool:
        if key[1][1] == 0:
            return key[0] in self._listening
        if key not in self._own and any(map(self._listens, key)):
            self._own |= {key, key[::-1]}
        return key in self._own

    def _listens(self, end: Address) -> bool:
        host, port = end
        possible = {end, ("0.0.0.0", port), ("::", port)}
        return not self._listening.isdisjoint(possible) and _here(host)

    def _take(self, key: Key) -> None:
        local, remote = key
        if remote[1]:
            self._own |= {key, (remote, local)}
        else:
            self._listening.add(local)

    def _look_up(
        self, key: Key, event: Event, there: dict[Key, Row], sockets: Container[int | None]
    ) -> None:
        rows = [there[way] for way in (key, key[::-1]) if way in there]
        if any(row.inode in sockets for row in rows):
            self._take(key)
        elif any(row.inode for row in rows):
            self._others |= {key, key[::-1]}
        elif _calls(event) or (isinstance(event, Transition) and event.old is State.CLOSED):
            self.unknown += 1
            self._take(key)

    def _sockets(self, there: dict[Key, Row]) -> Container[int | None]:
        """The inodes of the children's sockets."""
        if not sys.platform.startswith("linux"):
            return {row.inode for row in there.values() if row.inode}  # others' have none
        daemons = {pid for pid in self._children if os.path.exists(f"/proc/{pid}")}
        self._children = daemons.union(descendants(os.getpid()))  # once a child of ours, still ours
        return sockets_of(self._children)

    def _forget(self, *keys: Key) -> None:
        self._own.difference_update(keys)
        self._others.difference_update(keys)
        self._listening.difference_update(local for local, remote in keys if not remote[1])


def _ends(event: Event) -> Key | None:
    """Its socket's own end and the other, None where it is about no one socket."""
    if isinstance(event, Transition):
        return event.local, event.remote
    if isinstance(event, SegmentSeen):
        return event.src, event.dst
    if isinstance(event, Note) and event.local is not None and event.remote is not None:
        return event.local, event.remote
    return None


def _calls(event: Event) -> bool:
    """Whether somebody calls there: what was known of connections between these ends is over."""
    if isinstance(event, SegmentSeen):
        return event.flags & (SYN | ACK) == SYN
    return isinstance(event, Transition) and event.new is State.SYN_SENT


@cache
def _here(host: str) -> bool:
    """Whether it is an address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with suppress(OSError), socket.socket(family) as any_socket:
        any_socket.bind((host, 0))
        return True
    return False

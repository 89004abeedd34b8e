"""Was this EADDRINUSE due, and was this success? From the sockets seen, by the port table's rule.

Who certainly held the port, and who may have, comes from the connections'
sets of explanations and from the calls seen; the rule is
`timewait.sim.ports`', the one that the modelled host binds by.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable

from attrs import define, field

from timewait.events import Address, Called
from timewait.sim.ports import PortTable
from timewait.tcp.states import State

__all__ = ["Binds", "Holder", "Options"]

Options = frozenset[str]  # those of SO_REUSEADDR and SO_REUSEPORT that are set

RULE = (
    "Linux, inet_csk_bind_conflict: a port in use is refused unless holder and newcomer both set "
    "SO_REUSEADDR and the holder does not listen, or both set SO_REUSEPORT"
)


@define(eq=False)
class Holder:
    """Somebody who has a port, as `timewait.sim.ports` sees it."""

    address: str
    port: int
    state: State
    options: Options
    certain: bool = True
    connect_bound: bool = False
    v6only: bool = False
    uid: int = 0
    in_reuse_port_group: bool = False
    family: int = field(init=False)
    reuse_address: bool = field(init=False)
    reuse_port: bool = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        self.reuse_address = "SO_REUSEADDR" in self.options
        self.reuse_port = "SO_REUSEPORT" in self.options


class Binds:
    """The sockets that calls have bound, and what each later bind should have found."""

    def __init__(self) -> None:
        self._set: dict[str, Options] = {}  # by actor, for the socket it makes next
        self.servers: dict[Address, Holder] = {}
        self._were: dict[Address, Options] = {}  # what was bound there last
        self._worked: set[tuple[int, Options]] = set()  # ports and options with which it worked

    def called(self, event: Called) -> None:
        """Note what a call says of options and of sockets that have no peer."""
        if event.call == "setsockopt" and event.errno is None and isinstance(event.result, dict):
            on = {name for name, value in event.result.items() if value}
            self._set[event.actor] = self.pending(event.actor) | (on & _COUNT)
        elif event.call == "listen" and event.errno is None and event.local in self.servers:
            self.servers[event.local].state = State.LISTEN
        elif event.call == "close" and event.local is not None:
            self.servers.pop(event.local, None)

    def pending(self, actor: str) -> Options:
        """The options an actor has set for the socket it is making."""
        return self._set.get(actor, frozenset())

    def options_of(self, local: Address, actor: str | None = None) -> Options:
        """The options of a connection's end: its listener's, or its own."""
        if actor is not None:
            return self._set.pop(actor, frozenset())
        for address in (local, ("0.0.0.0", local[1]), ("::", local[1])):
            if address in self._were:
                return self._were[address]
        return frozenset()

    def judge(self, event: Called, holders: Iterable[Holder], complete: bool) -> str | None:
        """What is wrong with a bind's or listen's outcome, None if nothing is.

        `holders` are the connections' ends that have or may have the port;
        `complete` is whether nobody else can have it.
        """
        assert event.local is not None
        port = event.local[1]
        options = self.pending(event.actor)
        bound = self.servers.get(event.local)
        if event.call == "listen" and bound is not None:
            options = bound.options
        others = [h for a, h in self.servers.items() if a[1] == port and h is not bound]
        others += holders
        new = Holder(
            event.local[0],
            port,
            State.LISTEN if event.call == "listen" else State.CLOSED,
            options,
        )
        due = _refused(new, [h for h in others if h.certain])
        possible = _refused(new, others)
        wrong = None
        if event.errno is None and due:
            wrong = f"{event.call}() succeeded, and {_who(due)} had the port"
        elif (
            event.errno == "EADDRINUSE"
            and not possible
            and complete
            and (port, options) in self._worked
        ):
            had = "nobody had the port" if not others else "nobody who had the port objects"
            wrong = f"{event.call}() failed with EADDRINUSE, and {had}"
        if event.errno is None:
            if event.call == "bind":
                self.servers[event.local] = new
                self._were[event.local] = options
                self._worked.add((port, options))
            self._set.pop(event.actor, None)
        elif event.call == "listen":
            self.servers.pop(event.local, None)
        if event.errno is not None:
            self._set.pop(event.actor, None)
        return wrong


_COUNT = frozenset({"SO_REUSEADDR", "SO_REUSEPORT"})


def _refused(new: Holder, holders: list[Holder]) -> list[Holder]:
    """Those who keep the newcomer out: empty if it may bind."""
    table = PortTable("check")
    for holder in holders:
        table.inherit(holder, holder)
    try:
        table.bind(new, new.port)
    except OSError:
        return holders
    return []


def _who(holders: list[Holder]) -> str:
    kinds: dict[str, int] = {}
    for holder in holders:
        name = "a bound socket" if holder.state is State.CLOSED else holder.state.name
        kinds[name] = kinds.get(name, 0) + 1
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in kinds.items())

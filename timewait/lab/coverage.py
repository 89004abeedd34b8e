"""Which cells of the transition table something has reached, and how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, SupportsIndex

from attrs import evolve

from timewait.tcp.connection import Connection
from timewait.tcp.profiles import Profile
from timewait.tcp.states import Event, State

__all__ = ["Cells", "counted", "table"]

Cells = Counter[tuple[State, Event]]


class _Counting(list[Any]):
    """A state's cells, noting which is looked up."""

    def __init__(self, state: State, cells: Iterable[Any], reached: Cells) -> None:
        super().__init__(cells)
        self._state = state
        self._reached = reached

    def __getitem__(self, at: SupportsIndex | slice) -> Any:
        found = super().__getitem__(at)
        if isinstance(at, int) and at < len(Event):
            self._reached[self._state, Event(at)] += 1
        return found


def counted(profile: Profile, reached: Cells) -> Profile:
    """The same profile, whose connections add to `reached` what they come to."""
    made = evolve(profile)
    Connection(made, iss=0)  # whose first connection compiles its table
    plain = list(made.compiled)
    counting = [_Counting(state, cells, reached) for state, cells in zip(State, plain, strict=True)]
    place = {id(cells): n for n, cells in enumerate(plain)}
    for cells in counting:
        for at in range(len(Event)):
            new, onwards, performed, row = list.__getitem__(cells, at)
            if onwards is not None:
                cells[at] = (new, counting[place[id(onwards)]], performed, row)
    made.compiled[:] = counting
    return made


def table(reached: Cells, profile: Profile) -> str:
    """States by events: how often each was reached, "." never, blank where it cannot happen."""
    states = list(State)
    width = max(len(event.name) for event in Event)
    heads = [str(state)[:11] for state in states]
    lines = [" " * width + "".join(f"{head:>13}" for head in heads)]
    for event in Event:
        row = f"{event.name:<{width}}"
        for state in states:
            possible = profile.table[state, event].kind != "never"
            times = reached[state, event]
            row += f"{times or ('.' if possible else ''):>13}"
        lines.append(row.rstrip())
    return "\n".join(lines)

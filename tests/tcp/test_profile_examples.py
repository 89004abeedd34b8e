"""The documentation's worked examples show every thing in which two stacks differ."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from attrs import asdict, evolve

from timewait.tcp.profiles import PROFILES, Profile
from timewait.tcp.transitions import Row

_page = spec_from_file_location(
    "profile_examples", Path(__file__).parents[2] / "docs" / "profile_examples.py"
)
assert _page is not None
assert _page.loader is not None
_examples = module_from_spec(_page)
_page.loader.exec_module(_examples)


def done(look: Any, stack: Profile) -> str:
    try:
        return str(look(stack))
    except AssertionError:
        return "it has met what cannot happen"


def shown(one: Profile, other: Profile) -> bool:
    """Whether some example ends otherwise on one than on the other."""
    return any(done(look, one) != done(look, other) for _, look in _examples.SITUATIONS)


def behaviour(row: Row) -> tuple[object, ...]:
    return (row.kind, row.next, row.actions, row.errno, row.via)


RFC = PROFILES["rfc9293"]


# What two other stacks differ in, one of them has otherwise than the RFC.
@pytest.mark.parametrize("name", [name for name in PROFILES if name != RFC.name])
def test_every_difference_has_a_worked_example(name: str) -> None:
    """Put one stack's way into the other by itself: an example must notice."""
    stack = PROFILES[name]
    mine, theirs = asdict(stack.parameters), asdict(RFC.parameters)
    unseen: list[object] = [
        key
        for key in mine
        if mine[key] != theirs[key]
        and not shown(
            stack, evolve(stack, parameters=evolve(stack.parameters, **{key: theirs[key]}))
        )
        and not shown(RFC, evolve(RFC, parameters=evolve(RFC.parameters, **{key: mine[key]})))
    ]
    unseen += [
        cell
        for cell, row in stack.table.items()
        if behaviour(row) != behaviour(RFC.table[cell])
        and not shown(
            stack, evolve(stack, differences={**stack.differences, cell: RFC.table[cell]})
        )
        and not shown(RFC, evolve(RFC, differences={cell: row}))
    ]
    assert unseen == []

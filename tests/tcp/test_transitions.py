"""The table is total, sourced, and means what it says."""

import pytest

from timewait.tcp import actions
from timewait.tcp.profiles import PROFILES
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import ACTIONS, TABLE


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_state_and_event_has_a_row(name: str) -> None:
    table = PROFILES[name].table
    assert set(table) == {(state, event) for state in State for event in Event}


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_row_says_where_it_comes_from(name: str) -> None:
    for cell, row in PROFILES[name].table.items():
        assert row.source if row.kind != "never" else row.why, cell


@pytest.mark.parametrize("name", list(PROFILES))
def test_every_action_is_explained_and_exists(name: str) -> None:
    used = {action for row in PROFILES[name].table.values() for action in row.actions}
    assert used <= ACTIONS.keys()
    for action in used:
        assert callable(getattr(actions, action))


def test_no_action_is_explained_in_vain() -> None:
    used = {
        action
        for stack in PROFILES.values()
        for row in stack.table.values()
        for action in row.actions
    }
    assert used == ACTIONS.keys()


def test_only_the_dead_listen_or_open() -> None:
    """RFC 9293 figure 5: nothing but CLOSED and LISTEN leads into SYN_SENT."""
    into = {cell[0] for cell, row in TABLE.items() if row.next is State.SYN_SENT}
    assert into == {State.CLOSED, State.LISTEN}


def test_time_wait_is_entered_as_in_figure_5() -> None:
    into = {
        (str(cell[0]), str(cell[1])) for cell, row in TABLE.items() if row.next is State.TIME_WAIT
    }
    assert into == {
        ("FIN_WAIT_1", "FIN_AND_ACK_OF_FIN"),
        ("FIN_WAIT_2", "FIN"),
        ("CLOSING", "ACK_OF_FIN"),
    }


def test_a_row_of_a_profile_differs_from_the_rfc_or_is_not_there() -> None:
    for stack in PROFILES.values():
        for cell, row in stack.differences.items():
            assert row != TABLE[cell], (stack.name, cell)

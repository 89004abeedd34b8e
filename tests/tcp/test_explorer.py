"""The explorer finds nothing wrong with the machine, and notices when something is."""

import json

import pytest
from attrs import evolve
from click.testing import CliRunner

from timewait.cli import _timewait
from timewait.tcp.explorer import WORLDS, World, breakages, excuse, explore
from timewait.tcp.profiles import PROFILES, profile
from timewait.tcp.states import Event, State
from timewait.tcp.transitions import go, ignored, stay

BY_NAME = {world.name: world for world in WORLDS}
SMALL = tuple(
    evolve(BY_NAME[name], in_flight=3)
    for name in ("abort", "open-close", "unread", "half-close", "both-open", "again")
)


@pytest.mark.parametrize("name", list(PROFILES))
def test_nothing_is_wrong_with_opening_and_closing(name: str) -> None:
    found = explore(profile(name), BY_NAME["open-close"])
    assert found.violations == ()
    assert found.complete
    assert found.states > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rfc9293", "linux"])
def test_nothing_is_wrong_in_any_world(name: str) -> None:
    for world in WORLDS:
        found = explore(profile(name), evolve(world, in_flight=3))
        assert found.violations == (), world.name
        assert found.complete, world.name


def test_without_time_wait_an_old_duplicate_enters_the_next_connection() -> None:
    world = evolve(BY_NAME["again"], time_wait=False)
    (violation,) = explore(profile("rfc9293"), world, first_only=True).violations
    assert violation.check == "old-duplicate"
    assert violation.what == "the new incarnation received b'a'"
    assert "(and again)" in str(violation)
    assert str(violation).rstrip().endswith("ESTABLISHED")


def test_an_orphan_without_a_limit_hangs_when_the_reset_is_lost() -> None:
    """RFC 793 bounded FIN_WAIT_2 by nothing but the user's own timeout."""
    endless = profile("rfc9293", fin_wait_2=None)
    (violation,) = explore(endless, BY_NAME["unread"]).violations
    assert violation.check == "stuck"
    assert violation.what == "FIN_WAIT_2 and CLOSED for ever"


def test_nothing_is_wrong_with_an_orphan_that_waits_twice() -> None:
    for name in ("open-close", "abort"):
        world = evolve(BY_NAME[name], in_flight=2)
        found = explore(profile("linux", tcp_fin_timeout=90), world)
        assert found.violations == ()
        assert (State.FIN_WAIT_2, Event.KEEPALIVE) in found.rows


@pytest.mark.parametrize(
    ("cell", "row", "world", "check"),
    [
        (
            (State.FIN_WAIT_2, Event.FIN),
            go(State.CLOSED, "deliver_eof", "send_ack", "forget", source="-"),
            "open-close",
            "no-time-wait",
        ),
        (
            (State.LAST_ACK, Event.ACK_OF_FIN),
            go(State.TIME_WAIT, "start_time_wait", source="-"),
            "open-close",
            "both-time-wait",
        ),
        ((State.TIME_WAIT, Event.FIN_AGAIN), ignored("-"), "open-close", "stuck"),
        (
            (State.TIME_WAIT, Event.FIN_AGAIN),
            go(State.CLOSED, "send_ack", "forget", source="-"),
            "open-close",
            "time-wait-cut",
        ),
        ((State.ESTABLISHED, Event.RETRANSMIT), ignored("-"), "text", "inconsistent"),
        (
            (State.CLOSING, Event.ACK_OF_FIN),
            stay("send_text", source="-"),
            "open-close",
            "inconsistent",
        ),
        (
            (State.SYN_SENT, Event.RST_EXACT),
            go(State.CLOSED, "forget", source="-"),
            "both-open",
            "inconsistent",
        ),
    ],
)
def test_a_broken_row_is_found_by_the_check_that_is_meant_for_it(
    cell: tuple[State, Event], row: object, world: str, check: str
) -> None:
    sound = profile("rfc9293")
    broken = evolve(sound, differences={**sound.differences, cell: row})
    found = explore(broken, BY_NAME[world], first_only=True)
    assert [violation.check for violation in found.violations] == [check]


@pytest.mark.slow
def test_most_breakages_of_a_row_are_noticed_and_the_rest_is_explained() -> None:
    """Each row that changes state is ignored, stays, or leads one state too far."""
    stack = profile("rfc9293")
    reached = [(explore(stack, world), world) for world in SMALL]
    cells = {
        cell for found, _ in reached for cell in found.rows if stack.table[cell].next is not None
    }
    caught, missed = 0, []
    for breakage in breakages(stack, cells):
        row = stack.table[breakage.cell]
        assert row.next is not None
        further = f"to {State((row.next + 1) % len(State))},"
        if not breakage.change.startswith(("ignored", "stays", further)):
            continue
        for found, world in reached:
            if breakage.cell in found.rows:
                broken = breakage.apply(stack)
                if explore(broken, world, first_only=True, most=150_000).violations:
                    caught += 1
                    break
        else:
            missed.append(breakage)
    assert [str(breakage) for breakage in missed if excuse(breakage) is None] == []
    assert caught >= 50
    assert caught > 4 * len(missed)


def test_a_world_too_large_is_cut_short_and_says_so() -> None:
    found = explore(profile("linux"), World("large"), most=500)
    assert not found.complete
    assert found.states == 500


def test_the_command_prints_one_document() -> None:
    run = CliRunner().invoke(
        _timewait, ["explore", "--world", "abort", "--profile", "rfc9293", "--json"]
    )
    document = json.loads(run.output)
    assert document["violations"] == []
    assert document["states"] > 1000
    assert document["transitions"] > document["states"]
    assert document["depth"] > 10


def test_the_command_draws_what_it_found() -> None:
    run = CliRunner().invoke(
        _timewait, ["explore", "--world", "again", "--in-flight", "2", "--no-time-wait"]
    )
    assert "old-duplicate" in run.output
    assert "--- (and again) PSH,ACK seq=101" in run.output

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from timewait import Run, Scenario, report


@pytest.fixture(scope="module")
def run() -> Run:
    return Scenario.built_in("server-first").run_sync()


def printed(what: object, width: int, terminal: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, highlight=False).print(what)
    return out.getvalue()


@pytest.mark.parametrize("width", [40, 66, 73, 74, 80, 100, 120, 200])
def test_two_stacks_side_by_side_fit_and_nothing_is_cut(run: Run, width: int) -> None:
    text = printed(report.side_by_side([run, run], width), width)
    assert max(map(len, text.splitlines())) <= width
    closed = text[text.index("server closes") :]
    assert closed.count("TIME_WAIT") == 8  # two sockets, two steps, two stacks
    assert text.count("ESTABLISHED") == 8
    assert text.count(f":{run.port}") >= 2 * (1 + 1 + 4 + 2 + 2)


def test_many_rows_are_told_in_numbers() -> None:
    run = Scenario.built_in("orphan", clients=30).run_sync()
    text = printed(report.side_by_side([run], 80), 80)
    assert "30 FIN_WAIT_2 server" in text
    assert len(text.splitlines()) < 20


def test_colour_is_for_terminals_only(run: Run) -> None:
    what = report.side_by_side([run], 80)
    assert "\x1b[" in printed(what, 80, terminal=True)
    assert "\x1b[" not in printed(what, 80)


def test_the_summary_answers_the_four_questions(run: Run) -> None:
    lines = printed(report.summary([run]), 80).splitlines()
    assert [line[:15].strip() for line in lines] == [
        "",
        "closed first",
        "holds TIME_WAIT",
        "restart",
        "port is free",
    ]
    assert "EADDRINUSE from bind()" in lines[3]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "server-first",
            ["TIME_WAIT is on the server's side", "for 60 s: bind() fails with EADDRINUSE"],
        ),
        ("clients-first", ["on the clients' side", "nothing holds its port"]),
        ("abort", ["A reset ended", "starts again at once"]),
        ("orphan", ["orphans in FIN_WAIT_2", "for 60 s: bind() fails with EADDRINUSE"]),
        ("close-wait-leak", ["CLOSE_WAIT", "until the sockets that hold its port are closed"]),
    ],
)
def test_the_story_says_why(name: str, words: list[str], undisturbed: Callable[..., None]) -> None:
    def says_why() -> None:
        told = report.story(Scenario.built_in(name).run_sync())
        for each in words:
            assert each in told

    undisturbed(says_why)


def test_the_story_of_a_port_that_was_waited_for_is_told_from_before_it_was_free() -> None:
    run = Scenario.built_in("orphan").run_sync(on="model", wait=True)
    assert run.restart.waited is not None
    assert "orphans in FIN_WAIT_2" in report.story(run)

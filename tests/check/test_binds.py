"""Was this EADDRINUSE due, and was this success?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from timewait.check import Verdict, check
from timewait.check.evidence import read
from timewait.events import Called, Event, Restart

TRACES = Path(__file__).parent / "traces"


def trace(name: str) -> list[Event]:
    return list(read(TRACES / f"{name}.jsonl", lambda problem: None))


def changed(events: list[Event], errno: str | None) -> Iterator[Event]:
    """The same, the last bind having had another outcome."""
    binds = [e for e in events if isinstance(e, Called) and e.call == "bind"]
    for event in events:
        if event is binds[-1]:
            yield evolve(event, errno=errno)
        elif isinstance(event, Restart):
            yield evolve(event, ok=errno is None, errno=errno, call="bind", free_after=None)
        elif not (isinstance(event, Called) and event.call == "listen" and event.t > binds[-1].t):
            yield event


def why(verdict: Verdict) -> str:
    assert verdict.divergence is not None
    assert verdict.divergence.kind == "bind"
    return verdict.divergence.why


def test_a_bind_over_time_wait_that_succeeds_and_should_not() -> None:
    verdict = check(changed(trace("server-first"), None))
    assert why(verdict) == "bind() succeeded, and 2 TIME_WAIT had the port"


@pytest.mark.parametrize("name", ["clients-first", "abort", "unread-data"])
def test_a_bind_that_fails_and_should_not(name: str) -> None:
    verdict = check(changed(trace(name), "EADDRINUSE"))
    assert why(verdict) == "bind() failed with EADDRINUSE, and nobody had the port"


def test_the_time_at_which_the_port_is_free_is_the_timers() -> None:
    events = [
        evolve(e, free_after=e.free_after - 2.0) if isinstance(e, Restart) and e.free_after else e
        for e in trace("server-first")
    ]
    assert why(check(events)).startswith("the port is said to be free at")

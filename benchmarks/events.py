"""What recording costs: events to structlog, to JSON Lines and back, and a run with and without."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import structlog

from benchmarks import Figure, side_by_side
from timewait import events
from timewait.events import Transition
from timewait.scenario import Scenario
from timewait.tcp.states import State

EVENT = Transition(
    1.25, ("127.0.0.1", 9090), ("127.0.0.1", 47788), State.FIN_WAIT_2, State.TIME_WAIT
)


def measure(quick: bool) -> Iterator[Figure]:
    n = 5_000 if quick else 50_000

    def unheard(n: int) -> None:
        structlog.reset_defaults()
        for _ in range(n):
            events.log(EVENT)

    def logged(n: int) -> None:
        structlog.configure(
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=structlog.PrintLoggerFactory(io.StringIO()),
            cache_logger_on_first_use=True,
        )
        for _ in range(n):
            events.log(EVENT)
        structlog.reset_defaults()

    def plain(n: int) -> None:
        record = {"kind": "transition", "t": 1.25, "old": "FIN_WAIT_2", "new": "TIME_WAIT"}
        for _ in range(n):
            json.dumps(record)

    silent, heard, bare = side_by_side((unheard, n), (logged, n), (plain, n))
    yield Figure("events handed to structlog, configured for JSON", heard, "1/s",
                 "json.dumps of four fields", bare)  # fmt: skip
    yield Figure("events handed to structlog, not configured", silent, "1/s")

    def lines(n: int) -> None:
        line = json.dumps(events.dump(EVENT)) + "\n"
        for _ in events.read(line for _ in range(n)):
            pass

    (read,) = side_by_side((lines, n))
    yield Figure("events read back from JSON Lines", read, "1/s")

    scenario = Scenario.built_in("server-first")

    def off(n: int) -> None:
        for _ in range(n):
            scenario.run_sync(on="model")

    def on(n: int) -> None:
        with events.Writer("/dev/null") as write:
            for _ in range(n):
                scenario.run_sync(on="model", record=write)

    runs = 20 if quick else 100
    with_lines, without = side_by_side((on, runs), (off, runs))
    yield Figure(
        "server-first on the model, every event to JSON Lines",
        with_lines,
        "runs/s",
        "the same, no file",
        without,
    )

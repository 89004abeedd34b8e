"""How fast the check follows events: complete traces, sampled ones, many at once."""

from __future__ import annotations

from collections.abc import Iterator

from attrs import evolve

from benchmarks import Figure, side_by_side
from timewait import Scenario
from timewait.check import Checker
from timewait.events import Address, Event, RunStarted, SegmentSeen, Transition
from timewait.tcp.states import State

__all__ = ["measure"]


def lifecycle() -> list[Event]:
    """One connection's transitions and segments, from handshake to TIME_WAIT, on the model."""
    run = Scenario(port=9090).listen().connect(1).close("server").run_sync(on="model")
    return [
        event
        for event in run.events
        if isinstance(event, SegmentSeen)
        or (isinstance(event, Transition) and event.remote[1] and event.local[1])
    ]


def sampled(events: list[Event]) -> list[Event]:
    """The same connection by looks at a table: both ends open, then closed, then gone."""
    first = next(e for e in events if isinstance(e, Transition) and e.new is State.SYN_SENT)
    client, server = first.local, first.remote
    gone, there, held = State.CLOSED, State.ESTABLISHED, State.TIME_WAIT
    return [
        Transition(t, local, remote, old, new, "sock_diag", sampled=True)
        for t, local, remote, old, new in (
            (0.01, server, client, gone, there),
            (0.01, client, server, gone, there),
            (0.02, server, client, there, held),
            (0.02, client, server, there, gone),
        )
    ]


def many(events: list[Event], connections: int, apart: float) -> list[Event]:
    """So many copies of a connection, each from an address of its own, begun so far apart."""

    def moved(address: Address, number: int) -> Address:
        if address[1] == 9090:
            return address
        return (f"127.{number >> 16}.{number >> 8 & 255}.{number & 255}", address[1])

    copies: list[Event] = []
    for number in range(connections):
        for event in events:
            t = event.t + number * apart
            if isinstance(event, Transition):
                local, remote = moved(event.local, number), moved(event.remote, number)
                copies.append(evolve(event, t=t, local=local, remote=remote))
            elif isinstance(event, SegmentSeen):
                src, dst = moved(event.src, number), moved(event.dst, number)
                copies.append(evolve(event, t=t, src=src, dst=dst))
    copies.sort(key=lambda event: event.t)
    return copies


def follow(events: list[Event], n: int) -> None:
    checker = Checker()
    checker.feed(RunStarted(0.0, "model", "model" if events[0].source == "model" else "sock_diag"))  # type: ignore[union-attr]
    for event in events[:n]:
        checker.feed(event)
    verdict = checker.verdict()
    assert verdict or n < len(events), verdict.explain()


def measure(quick: bool) -> Iterator[Figure]:
    connections = 2_000 if quick else 10_000
    whole = lifecycle()
    looks = sampled(whole)
    span = max(e.t for e in whole) - min(e.t for e in whole)
    one_by_one = many(whole, connections, span * 2)
    together = many(whole, connections, 1e-9)
    some = many(looks, connections, 0.05)
    complete, sampling, crowded = side_by_side(
        (lambda n: follow(one_by_one, n), len(one_by_one)),
        (lambda n: follow(some, n), len(some)),
        (lambda n: follow(together, n), len(together)),
        rounds=3 if quick else 5,
    )
    yield Figure("check: complete traces", complete, "events/s", target=200_000)
    yield Figure(
        "check: sampled traces", sampling, "events/s", "complete traces", complete, target=0.2
    )
    yield Figure(
        f"check: {connections:,} connections open at once",
        crowded,
        "events/s",
        "one after the other",
        complete,
        target=0.67,
    )

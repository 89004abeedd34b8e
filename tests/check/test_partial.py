"""However little is seen of what TCP allows, and from wherever, it conforms."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve

from timewait.check import Checker, Connection, check
from timewait.check.evidence import read
from timewait.events import Event, Lost, SegmentSeen, Snapshot, Transition
from timewait.lab.campaign import random_scenario
from timewait.orchestrator import Orchestrator
from timewait.scenario import ScenarioError
from timewait.stacks import ModelStack
from timewait.tcp.segment import ACK, FIN, PSH, RST, SYN

TRACES = Path(__file__).parent / "traces"


def test_a_capture_may_begin_at_any_segment() -> None:
    connections: dict[frozenset[object], list[SegmentSeen]] = defaultdict(list)
    for event in read(TRACES / "loopback.pcap", lambda problem: None):
        assert isinstance(event, SegmentSeen)
        connections[frozenset((event.src, event.dst))].append(event)
    for segments in connections.values():
        for start in range(1, len(segments)):
            verdict = check(segments[start:])
            assert verdict, f"from segment {start}: {verdict.explain()}"


@pytest.mark.parametrize("kind", [Transition, SegmentSeen])
def test_what_an_observer_lost_is_not_held_against_anybody(kind: type) -> None:
    for path in sorted(TRACES.glob("*.jsonl")):
        events = list(read(path, lambda problem: None))
        places = [
            i for i, e in enumerate(events) if isinstance(e, kind) and not getattr(e, "sampled", 0)
        ]
        for at in places[:: max(1, len(places) // 6)]:
            lost = events[at]
            source = lost.source  # type: ignore[union-attr]
            left: list[Event] = [*events[:at], Lost(lost.t, source, 1), *events[at + 1 :]]
            verdict = check(left)
            assert verdict, f"{path.stem}, event {at}: {verdict.explain()}"
            assert verdict.evidence.lost == 1


@pytest.mark.parametrize("observers", ["capture", "sock_diag"])
def test_a_time_wait_that_is_gone_at_once_is_not_a_connection_made_anew(observers: str) -> None:
    """Neither a look that finds nothing, nor segments without a SYN, show a new connection."""
    events = list(read(TRACES / "observers" / f"{observers}.jsonl", lambda problem: None))
    assert check(events)
    last = max(i for i, e in enumerate(events) if isinstance(e, Snapshot))
    held = events[last]
    assert isinstance(held, Snapshot)
    assert all(row.seconds_left and row.seconds_left > 59 for row in held.rows)
    gone = [*events[:last], evolve(held, t=held.t + 0.001, rows=()), *events[last + 1 :]]
    verdict = check(gone)
    assert not verdict
    assert "possible: TIME_WAIT with CLOSED" in verdict.explain()


@pytest.mark.parametrize("begins", [0, 3], ids=["whole", "after the handshake"])
def test_whoever_resets_sends_nothing_more(begins: int) -> None:
    """A RST where the receiver must take it, and its sender goes on as if there had been none."""
    connections: dict[frozenset[object], list[SegmentSeen]] = defaultdict(list)
    for event in read(TRACES / "loopback.pcap", lambda problem: None):
        assert isinstance(event, SegmentSeen)
        connections[frozenset((event.src, event.dst))].append(event)
    made = 0
    for whole in connections.values():
        for at in range(begins + 1, len(whole) - 1):
            seen = whole[at]
            goes_on = any(
                e.src == seen.src and e.flags & ~RST & (FIN | PSH) for e in whole[at + 1 :]
            )
            if seen.flags & (SYN | RST | FIN) or not goes_on:
                continue
            at_end = (seen.seq + seen.length) & 0xFFFFFFFF
            reset = evolve(seen, flags=RST | ACK, seq=at_end, length=0)
            made += 1
            assert not check([*whole[begins : at + 1], reset, *whole[at + 1 :]]), f"{reset}"
    assert made > 5


def on_a_bad_network(seed: int) -> list[Event]:
    """A random scenario between two modelled hosts whose link loses, doubles and reorders."""
    rng = random.Random(seed)
    scenario = evolve(random_scenario(rng), host="10.0.0.1", time_limit=500.0)
    stack = ModelStack(scenario, seed=seed, delay=rng.choice([0.001, 0.02]))
    stack.network.connect(
        "server",
        "client",
        delay=0.0,
        loss=rng.choice([0.0, 0.02, 0.1, 0.3]),
        duplicate=rng.choice([0.0, 0.1]),
        reorder=rng.choice([0.0, 0.1]),
    )
    seen: list[Event] = []
    try:
        stack.run(Orchestrator(scenario, stack, seen.append, None).perform)
    except ScenarioError:
        pass  # a step hung: what was seen until then is as true
    return seen


def captured(events: list[Event], *, at: str) -> Iterator[Event]:
    """The segments as a capture would show them beside one of the hosts, or between the two."""
    for event in events:
        if isinstance(event, SegmentSeen) and (not event.lost or event.src[0] == at):
            yield evolve(event, source="capture", lost=False)


@pytest.mark.parametrize("seed", range(12))
def test_bad_networks(seed: int) -> None:
    events = on_a_bad_network(seed)
    for seen in (
        events,
        list(captured(events, at="10.0.0.1")),
        list(captured(events, at="nowhere")),
    ):
        verdict = check(seen)
        assert verdict, verdict.explain()


def test_a_capture_of_any_length_is_followed_in_bounded_memory() -> None:
    first = [
        event
        for event in read(TRACES / "loopback.pcap", lambda problem: None)
        if isinstance(event, SegmentSeen) and 53862 in (event.src[1], event.dst[1])
    ]
    ended: list[Connection] = []
    checker = Checker(on_end=ended.append)

    def moved(event: SegmentSeen, number: int) -> SegmentSeen:
        src, dst = (
            (host, number if port == 53862 else port) for host, port in (event.src, event.dst)
        )
        return evolve(event, t=event.t + number, src=src, dst=dst)

    for number in range(1000):
        for event in first:
            checker.feed(moved(event, number))
    # The last acknowledgment may have been lost, which TIME_WAIT waits for.
    assert len(checker.connections()) < 70
    assert len(ended) > 930
    assert checker.verdict()
    assert len(ended) == 1000


def test_an_idle_connection_is_not_forgotten() -> None:
    events = [
        event
        for event in read(TRACES / "loopback.pcap", lambda problem: None)
        if isinstance(event, SegmentSeen) and 53862 in (event.src[1], event.dst[1])
    ]
    late = [evolve(event, t=event.t + 1000 * (i > 2)) for i, event in enumerate(events)]
    other = [evolve(events[0], t=float(t), src=("127.0.0.1", t), seq=t) for t in range(3, 900)]
    ended: list[str] = []
    checker = Checker(on_end=lambda connection: ended.append(connection.name))
    for event in [*late[:3], *other, *late[3:]]:
        checker.feed(event)
    name = "127.0.0.1:40187 <-> 127.0.0.1:53862"
    assert name not in ended
    assert checker.verdict()
    assert ended.count(name) == 1

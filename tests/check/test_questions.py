"""Who closed first and why, who holds TIME_WAIT: told from what each real observer saw."""

from __future__ import annotations

from pathlib import Path

import pytest
from attrs import evolve

from timewait.check import Answers, Checker, Connection, answers, check
from timewait.check.evidence import read
from timewait.events import Called, Event, RunStarted, SegmentSeen, Snapshot, Transition

TRACES = Path(__file__).parent / "traces"


def trace(name: str) -> list[Event]:
    """What Linux 6.18's observers saw of a built-in scenario on loopback."""
    problems: list[str] = []
    events = list(read(TRACES / name, problems.append))
    assert not problems
    return events


def told(events: list[Event]) -> list[Answers]:
    found: list[Answers] = []

    def ended(connection: Connection) -> None:
        found.append(answers(connection))

    checker = Checker(on_end=ended)
    for event in events:
        checker.feed(event)
    assert checker.verdict()
    return found


def without(events: list[Event], *kinds: type) -> list[Event]:
    """The events as they would be if some observers had not been there, and not been named."""
    head, *rest = events
    assert isinstance(head, RunStarted)
    names = {Transition: "tracepoint", SegmentSeen: "capture"}
    blind = {names[kind] for kind in kinds if kind in names}
    observers = [name for name in head.observer.split("+") if name not in blind]
    kept: list[Event] = [evolve(head, observer="+".join(observers))]
    return kept + [event for event in rest if not isinstance(event, kinds)]


@pytest.mark.parametrize(
    ("name", "who", "how", "why", "holder"),
    [
        ("server-first", "server", "FIN", "its application closed", "server"),
        ("clients-first", "client", "FIN", "its application closed", "client"),
        ("half-close", "client", "FIN", "its application closed", "client"),
        ("abort", "server", "RST", "its application aborted (SO_LINGER 0)", "nobody"),
        ("unread-data", "server", "RST", "its application closed with data unread", "nobody"),
        ("orphan", "server", "FIN", "its application closed", "nobody"),
        ("close-wait-leak", "client", "FIN", "its application closed", "nobody"),
    ],
)
@pytest.mark.parametrize(
    "blind", [(), (SegmentSeen,), (Transition,), (Transition, SegmentSeen)], ids=str
)
def test_who_closed_first_is_told_from_any_mixture_that_has_the_calls(
    name: str, who: str, how: str, why: str, holder: str, blind: tuple[type, ...]
) -> None:
    for answer in told(without(trace(f"{name}.jsonl"), *blind)):
        assert (answer.closed_first, answer.how, answer.why) == (who, how, why)
        assert answer.time_wait == holder


def test_segments_alone_tell_who_closed_first_and_not_always_why() -> None:
    seen = told(trace("loopback.pcap"))
    assert [(a.closed_first, a.how) for a in seen] == [
        ("server", "FIN"),
        ("client", "FIN"),
        ("server", "RST"),  # data was left unread; it could have been an abort
        ("server", "RST"),  # nothing was ever sent: it can only have been an abort
        ("client", "FIN"),
        ("client", "FIN"),
        ("server", "FIN"),
        ("client", "FIN"),
        ("server", "RST"),  # nobody listened
    ]
    assert seen[2].why is not None
    assert "unread" in seen[2].why
    assert "SO_LINGER 0" in seen[2].why
    assert seen[3].why == "its application aborted (SO_LINGER 0)"


def test_looks_without_calls_leave_the_closer_open() -> None:
    events = without(trace("abort.jsonl"), Called, Transition, SegmentSeen)
    assert all(answer.closed_first is None for answer in told(events))


def test_a_forgotten_close_wait_is_named() -> None:
    (first, _) = told(trace("close-wait-leak.jsonl"))
    assert first.owes is not None
    assert first.owes.startswith("the server's application has not closed (CLOSE_WAIT)")


def test_time_wait_lasts_from_60_seconds_to_a_step_of_the_timer_wheel_longer() -> None:
    for answer in told(trace("server-first.jsonl")):
        assert answer.until is not None
        earliest, latest = answer.until
        assert latest is not None
        assert 0 < latest - earliest < 2.3


def test_what_was_delivered_is_counted_from_the_segments() -> None:
    for answer in told(trace("half-close.jsonl")):
        assert answer.delivered == (1000, 0)


def test_every_part_of_the_evidence_conforms_by_itself() -> None:
    for path in sorted(TRACES.glob("*.jsonl")):
        events = trace(path.name)
        for blind in ((Called,), (Snapshot,), (Transition,), (SegmentSeen,), (Called, Snapshot)):
            verdict = check(without(events, *blind))
            assert verdict, f"{path.name} without {blind}: {verdict.explain()}"


def test_the_stronger_the_evidence_the_stronger_the_verdict() -> None:
    events = trace("server-first.jsonl")
    assert check(events).evidence.strength == "strong"
    weak = check(without(events, Transition, SegmentSeen)).evidence
    assert weak.strength == "weak"
    assert "segments" in weak.unseen
    assert "states between two looks" in "; ".join(weak.inferred)


def test_each_connection_between_the_same_addresses_has_its_own_answer() -> None:
    # Linux 6.18: a new SYN, 1.7 s into the server's TIME_WAIT, was let in (RFC 6191).
    old, new = told(trace("captured/time-wait-reused.jsonl"))
    assert old.connection == new.connection
    assert (old.closed_first, old.time_wait) == ("server", "server")
    assert (new.closed_first, new.time_wait) == ("client", "client")
    assert old.until
    assert new.until
    assert (round(old.until[0], 1), round(new.until[0], 1)) == (60.7, 62.4)


def test_a_divergence_does_not_spoil_what_follows_between_the_same_addresses() -> None:
    events = trace("captured/time-wait-reused.jsonl")
    fin = events[8]
    assert isinstance(fin, SegmentSeen)
    events[8] = evolve(fin, seq=fin.seq + 1)
    ended: list[Connection] = []
    checker = Checker(on_end=ended.append)
    for event in events:
        checker.feed(event)
    assert not checker.verdict()
    assert [connection.divergence is None for connection in ended] == [False, True]
    assert answers(ended[1]).closed_first == "client"


APART = {"server": ("10.0.0.1", 9090), "client": ("10.0.0.2", 40000)}


def of_the_wire(*lines: str, ends: dict[str, tuple[str, int]] = APART) -> list[Event]:
    """Segments: a time in ms, who, flags, seq, ack."""
    flags = {"SYN": 2, "RST": 4, "ACK": 16, "FIN": 17, "SYNACK": 18}
    found: list[Event] = []
    for line in lines:
        t, who, what, seq, ack = line.split()
        peer = "client" if who == "server" else "server"
        found.append(
            SegmentSeen(
                float(t) / 1000,
                ends[who],
                ends[peer],
                flags[what],
                int(seq),
                int(ack),
                source="pcap",
            )
        )
    return found


@pytest.mark.parametrize(
    ("lines", "who"),
    [
        # The second FIN is new, and acknowledges the first.
        (
            "0 server ACK 9 5|1 client ACK 5 9|2 server FIN 9 5|3 client FIN 5 10",
            0,
        ),
        (
            "0 client ACK 5 9|1 server ACK 9 5|2 client FIN 5 9|3 server FIN 9 6|4 client ACK 6 10",
            1,
        ),
        # Both had closed before it began: these FINs are sent again.
        ("0 server FIN 9 5|300 client FIN 5 10|301 server ACK 10 6", None),
        ("0 client ACK 6 9|250 client FIN 5 9|251 server ACK 9 6|300 server FIN 9 6", 1),
        ("0 client ACK 6 9|250 client FIN 5 9|251 server ACK 9 6", None),
        ("0 server FIN 9 5|1 client ACK 5 10", None),
    ],
)
def test_a_capture_that_begins_later_tells_who_closed_first_where_a_fin_answers_the_other(
    lines: str, who: int | None
) -> None:
    (answer,) = told(of_the_wire(*lines.split("|")))
    assert answer.closed_first == (None if who is None else ("server", "client")[who])


def test_fins_that_crossed_were_both_first() -> None:
    handshake = "0 client SYN 4 0|1 server SYNACK 8 5|2 client ACK 5 9|"
    crossed = handshake + "3 server FIN 9 5|3.1 client FIN 5 9|4 client ACK 6 10|4 server ACK 10 6"
    (answer,) = told(of_the_wire(*crossed.split("|")))
    assert answer.closed_first == "both"


def test_a_reset_for_a_former_connection_is_not_who_closed_first() -> None:
    # As Linux 6.18 answered a SYN that TIME_WAIT had no use for; the same SYN was then let in.
    lines = (
        "0 client SYN 4 0|0.1 server ACK 90 70|0.2 client RST 70 0|10 client SYN 4 0|"
        "10.1 server SYNACK 8 5|10.2 client ACK 5 9|11 server FIN 9 5|12 client FIN 5 10|"
        "13 server ACK 10 6"
    )
    (answer,) = told(of_the_wire(*lines.split("|")))
    assert (answer.closed_first, answer.how) == ("server", "FIN")


ORDERLY = (
    "0 client SYN 4 0|0.1 server SYNACK 8 5|0.2 client ACK 5 9|5 server FIN 9 5|"
    "{}|{} client ACK 5 10|{} client FIN 5 10|{} server ACK 10 6"
)
LOCAL = {"server": ("127.0.0.1", 9090), "client": ("127.0.0.1", 40000)}


def fins_again(*at: float) -> list[Event]:
    """The server's FIN at 5 ms, sent again at these times, then acknowledged; on one machine."""
    again = "|".join(f"{t} server FIN 9 5" for t in at)
    end = at[-1]
    lines = ORDERLY.format(again, end + 1, end + 2, end + 3).split("|")
    return of_the_wire(*lines, ends=LOCAL)


@pytest.mark.parametrize(
    ("at", "conforms"),
    [
        # Linux 6.18: a probe after 0.2 s, the first timeout, and twice as long each time.
        ((213, 421, 837, 1669), True),
        ((213, 629, 1461), True),  # no probe
        ((105,), False),
        ((213, 321), False),
        ((213, 421, 629), False),
        ((213, 421, 837, 1253), False),
    ],
)
def test_a_fin_is_sent_again_no_sooner_than_its_timer_which_backs_off(
    at: tuple[float, ...], conforms: bool
) -> None:
    verdict = check(fins_again(*at))
    assert bool(verdict) is conforms
    if not conforms:
        assert verdict.divergence
        assert "RFC 6298" in verdict.divergence.rule


@pytest.mark.parametrize(
    ("after", "conforms"), [(40, True), (200, True), (480, True), (600, False)]
)
def test_an_acknowledgment_is_not_delayed_for_longer_than_half_a_second(
    after: float, conforms: bool
) -> None:
    t = 5 + after
    events = of_the_wire(
        *ORDERLY.format("5 server ACK 10 5", t, t + 1, t + 2)
        .replace("5 server ACK 10 5|", "")
        .split("|"),
        ends=LOCAL,
    )
    verdict = check(events)
    assert bool(verdict) is conforms
    if not conforms:
        assert verdict.divergence
        assert "0.5 s" in verdict.divergence.rule


def test_what_linux_keeps_sending_conforms() -> None:
    """Linux 6.18, its peer deaf for 7 s (a socket filter): 0.21, 0.21, 0.44, 0.83, 1.66 s.

    Of the two the second had text on its way when it closed: its FIN was probed for after 6 ms.
    """
    assert check(trace("captured/fin-again.jsonl"))
    events = trace("captured/fin-again.jsonl")
    fins = [e for e in events if isinstance(e, SegmentSeen) and e.flags & 1 and e.src[1] == 9100]
    wait = fins[3].t - fins[2].t
    early = [evolve(e, t=e.t - wait / 2) if e.t >= fins[3].t else e for e in events]
    assert not check(early)

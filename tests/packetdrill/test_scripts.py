"""The suite of scripts beside this file, on each stack."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from timewait.kernel.wire import WireError
from timewait.packetdrill import Outcome, play

HERE = Path(__file__).parent
SCRIPTS = sorted(HERE.glob("*.pkt"))
EVERYDAY = sorted((HERE / "everyday").glob("*.pkt"))
KEPT = sorted((HERE / "kept").glob("*.pkt"))
STATES = sorted((HERE / "grid").iterdir())
STACKS = ["model", "kernel"]


def wrong(outcome: Outcome) -> str | None:
    if outcome.outcome == "passed":
        return None
    return f"{outcome.path}:{outcome.line}: {outcome.why}\n{outcome.diagram}"


def played(
    paths: Iterable[Path], on: str, options: Iterable[tuple[str, str]] = (), at_once: int = 1
) -> list[Outcome]:
    """Play them; on the kernel most of a script is waiting, and several wait at once.

    What failed on nothing but a time, each time, is played again with nobody beside it: the
    scripts hold the kernel to 4 ms, and another process may have both processors for longer.
    """
    one = partial(play, on=on, options=options)
    with ThreadPoolExecutor(at_once if on == "kernel" else 1) as pool:
        outcomes = list(pool.map(one, paths))
    for pause in 1, 3, 6:
        if any(outcome.untimely for outcome in outcomes):
            time.sleep(pause)
            outcomes = [one(each.path) if each.untimely else each for each in outcomes]
    return outcomes


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("stack", STACKS)
def test_script(path: Path, stack: str) -> None:
    try:
        assert [wrong(outcome) for outcome in played([path], stack)] == [None]
    except WireError as why:
        pytest.skip(str(why))


# What the model does not claim to have, and says so.
BEYOND = {
    "defer-accept": "TCP_DEFER_ACCEPT",
    "duplicate-acks": "fast retransmission",
    "ecn": "ECN",
    "icmp-frag-needed": "path MTU discovery",
    "icmp-outbound": "UDP",
    "memory": "SK_MEMINFO",
    "tfo-client": "MSG_FASTOPEN",
    "tfo-server": "TCP Fast Open",
    "udp": "UDP",
    "urgent": "MSG_OOB",
}
# Written for IPv6, and for its names of ICMP's codes, or with IPv4 addresses in them.
OF_ONE_VERSION = {
    "ipv6": {
        "addresses", "bad-calls", "bind-then-connect", "connect-to-port", "header-options",
        "icmp-frag-needed",
        "icmp-frag-needed-opening", "icmp-half-open", "icmp-host-prohibited",
        "icmp-protocol-unreachable", "icmp-time-exceeded", "ipv4-mapped",
    },
    "ipv4-mapped-ipv6": {
        "bad-calls", "bind-then-connect", "connect-to-port", "icmp6-admin", "icmp6-noroute", "ipv6",
    },
}  # fmt: skip


@pytest.mark.parametrize("stack", STACKS)
def test_everyday(stack: str) -> None:
    """What programs do every day, on both stacks; of the model, all that it claims to have."""
    try:
        outcomes = played(EVERYDAY, stack, at_once=6)
    except WireError as why:
        pytest.skip(str(why))
    for outcome in outcomes:
        beyond = BEYOND.get(Path(outcome.path).stem)
        if stack == "model" and beyond:
            assert outcome.outcome == "unsupported"
            assert beyond in outcome.why
        else:
            assert wrong(outcome) is None


@pytest.mark.parametrize("stack", [*STACKS[:1], pytest.param("kernel", marks=pytest.mark.slow)])
@pytest.mark.parametrize("version", list(OF_ONE_VERSION))
def test_everyday_on_ipv6_sockets(version: str, stack: str) -> None:
    """The same scripts with IPv6, whose headers are 20 octets longer, and with mapped addresses."""
    scripts = [
        path
        for path in EVERYDAY
        if path.stem not in OF_ONE_VERSION[version]
        and not (stack == "model" and path.stem in BEYOND)
        and "--ip_version" not in path.read_text()
    ]
    options = [("ip_version", version), ("mtu", "1520" if version == "ipv6" else "1500")]
    try:
        outcomes = played(scripts, stack, options, at_once=6)
    except WireError as why:
        pytest.skip(str(why))
    assert len(outcomes) > 60
    assert [text for outcome in outcomes if (text := wrong(outcome))] == []


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_what_is_kept_of_differences_is_still_one(path: Path) -> None:
    """The kernel does it, the model does not: see docs/differences.md."""
    try:
        assert [wrong(outcome) for outcome in played([path], "kernel")] == [None]
    except WireError as why:
        pytest.skip(str(why))
    assert play(path, on="model").outcome != "passed"


@pytest.mark.parametrize("state", STATES, ids=lambda path: path.name)
@pytest.mark.parametrize("stack", STACKS)
def test_grid(state: Path, stack: str) -> None:
    """Every kind of segment at every place of the window, in one state."""
    scripts = sorted(state.glob("*.pkt"))
    try:
        outcomes = played(scripts, stack, at_once=6)
    except WireError as why:
        pytest.skip(str(why))
    assert [text for outcome in outcomes if (text := wrong(outcome))] == []


def test_the_grid_is_whole() -> None:
    """Ten states and more, nine kinds of segments, five places where a window has them."""
    assert len(STATES) == 13
    windows = [s for s in STATES if s.name not in ("closed", "listen", "syn-sent")]
    for state in windows:
        places = {path.stem for path in state.glob("*.pkt")}
        for segment in (
            "fin",
            "fin-ack",
            "ack",
            "rst",
            "rst-ack",
            "syn",
            "syn-ack",
            "syn-fin",
            "data",
        ):
            for place in ("left", "left-edge", "inside", "right-edge", "right"):
                assert f"{segment}-{place}" in places

"""What came back from a scenario: its events, and what they say.

`run` and `run_sync` do a scenario on a stack and return a `Run`. Everything a
`Run` answers is read from its events, so that one read back from a file of
JSON Lines (`Run.from_events`) answers the same.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import cached_property
from ipaddress import ip_address
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio
import anyio.to_thread
from attrs import define, frozen

from timewait import events, report
from timewait.events import Address, Called, Event, Row, RunStarted, Snapshot, Transition
from timewait.kernel.ticks import tick, wheel_step
from timewait.orchestrator import Orchestrator, Stack, Waiting
from timewait.scenario import Scenario, ScenarioError
from timewait.stacks import KernelStack, ModelStack
from timewait.tcp.states import State

if TYPE_CHECKING:
    from timewait.check import Verdict

__all__ = ["RestartOutcome", "Run", "Side", "TimeWait", "run", "run_sync"]

Side: TypeAlias = Literal["server", "client", "both"]

_SOFTIRQ = 0.1  # seconds that a busy machine may take to run a timer that is due
_ACTIVE = frozenset({State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.TIME_WAIT})
_PASSIVE = frozenset({State.CLOSE_WAIT, State.LAST_ACK})


@frozen
class TimeWait:
    """Who holds TIME_WAIT, in how many sockets, and for how many seconds yet.

    As the last snapshot that had any showed it; `seconds_left` is the longest,
    None where the observer has no timers.
    """

    holder: Side | None
    sockets: int
    seconds_left: float | None


@frozen
class RestartOutcome:
    """What starting the server again did.

    `ok` is None where it was not tried; `error` is the errno (compare with
    `errno.EADDRINUSE`), `name` its name, `call` the call that failed.
    `free_after` is in seconds from the attempt by the kernel's or the model's
    own timers: 0.0 where it bound, None where nothing says when. Where it was
    waited for, `waited` is how long it really took, and `held` how long the
    port was seen held at least; both None where nobody waited.
    """

    ok: bool | None
    error: int | None = None
    name: str | None = None
    call: str | None = None
    free_after: float | None = None
    waited: float | None = None
    held: float | None = None


@define(slots=False)
class Run:
    """One performance of a scenario on one stack."""

    scenario: Scenario
    stack: str
    observer: str
    blind: tuple[str, ...]
    profiles: dict[str, str]
    events: tuple[Event, ...]

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Run:
        """The run that these events, from `timewait.events.read`, tell of; of several the first.

        Raises `ValueError` where they do not begin with a run's head.
        """
        found = next(cls.each_from_events(events), None)
        if found is None:
            raise ValueError("these events do not begin with a run's head")
        return found

    @classmethod
    def each_from_events(cls, events: Iterable[Event]) -> Iterator[Run]:
        """The runs of one stream, one after the other (`timewait run --on both` writes two).

        Raises `ValueError` where they do not begin with a run's head.
        """
        stream = list(events)
        heads = [n for n, event in enumerate(stream) if isinstance(event, RunStarted)]
        if stream and heads[:1] != [0]:
            raise ValueError("these events do not begin with a run's head")
        for head, after in pairwise([*heads, len(stream)]):
            first, *rest = stream[head:after]
            assert isinstance(first, RunStarted)
            yield cls(
                Scenario.from_dict(first.scenario or {}),
                first.stack,
                first.observer,
                first.blind,
                first.profiles,
                (first, *sorted(rest, key=lambda event: event.t)),
            )

    @property
    def port(self) -> int:
        """The server's port."""
        return self.scenario.port

    @cached_property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The tables of sockets, one after each step."""
        return tuple(event for event in self.events if isinstance(event, Snapshot))

    def side(self, row: Row) -> Literal["server", "client"]:
        """Whose socket this row of a snapshot is."""
        return "server" if row.local[1] == self.port else "client"

    @cached_property
    def time_wait(self) -> TimeWait:
        """Who holds TIME_WAIT."""
        for snapshot in reversed(self.snapshots):
            rows = [row for row in snapshot.rows if row.state is State.TIME_WAIT]
            if rows:
                left = [row.seconds_left for row in rows if row.seconds_left is not None]
                holder = _whose({self.side(row) for row in rows})
                return TimeWait(holder, len(rows), max(left, default=None))
        return TimeWait(None, 0, None)

    @cached_property
    def restart(self) -> RestartOutcome:
        """What the (first) restart did."""
        tries = [event for event in self.events if isinstance(event, events.Restart)]
        if not tries:
            return RestartOutcome(ok=None)
        first, last = tries[0], tries[-1]
        waited_for = last.held_until is not None
        return RestartOutcome(
            first.ok,
            getattr(errno, first.errno) if first.errno else None,
            first.errno,
            first.call,
            first.free_after,
            last.t - first.t if waited_for else None,
            last.held_until - first.t if last.held_until is not None else None,
        )

    @cached_property
    def wait_allowed(self) -> tuple[float, float] | None:
        """The least and the most seconds that the wait for the port may take.

        On the model its own timer to the instant; on the kernel never less
        than its timer said, and up to a step of the timer wheel more. None
        where nobody waited.
        """
        due = self.restart.free_after
        if self.restart.waited is None or due is None:
            return None
        if self.stack == "model":
            return due, due
        return due - tick(), due + wheel_step(due) + _SOFTIRQ

    @property
    def wait_fault(self) -> str | None:
        """What is wrong with how long the port was held, in words; None where nothing is."""
        waited, held = self.restart.waited, self.restart.held
        if waited is None or held is None or self.wait_allowed is None:
            return None
        least, most = self.wait_allowed
        if waited < least:
            return f"the port was free after {waited:.2f} s, {least:.2f} s are due"
        if held > most:
            return f"the port was held for {held:.2f} s, {most:.2f} s are the most"
        return None

    @cached_property
    def active_closer(self) -> Side | None:
        """Which side closed first: "both" where they did at once, None where nobody did.

        States tell it (who was in FIN_WAIT_1 closed actively); where a
        connection ended unseen, by a reset, the first of its closing calls does.
        """
        closers: dict[frozenset[Address], set[str]] = {}
        for local, remote, state in self._states():
            if state in _ACTIVE or state in _PASSIVE:
                active = (local[1] == self.port) == (state in _ACTIVE)
                closers.setdefault(frozenset({local, remote}), set()).add(
                    "server" if active else "client"
                )
        for event in self.events:
            if isinstance(event, Called) and event.call in ("close", "shutdown") and event.remote:
                assert event.local is not None
                actor = "server" if event.actor == "server" else "client"
                closers.setdefault(frozenset({event.local, event.remote}), {actor})
        return _whose({side for sides in closers.values() for side in sides})

    def _states(self) -> Iterable[tuple[Address, Address, State]]:
        for event in self.events:
            if isinstance(event, Snapshot):
                for row in event.rows:
                    yield row.local, row.remote, row.state
            elif isinstance(event, Transition):
                yield event.local, event.remote, event.new

    def netstat(self) -> str:
        """The tables step by step, as `netstat -an | grep PORT` would print them."""
        return "\n\n".join(
            f"# {snapshot.label}\n{report.netstat(snapshot.rows)}".rstrip()
            for snapshot in self.snapshots
        )

    def check(self, profiles: dict[str, Any] | None = None) -> Verdict:
        """Does the model allow what was seen? See `timewait.check.check`."""
        from timewait.check import check

        return check(self.events, profiles=profiles or self.profiles)

    def to_json(self) -> dict[str, Any]:
        """What happened, as one JSON object: see `timewait run --json`."""
        held, again = self.time_wait, self.restart
        return {
            "stack": self.stack,
            "observer": self.observer,
            "active_closer": self.active_closer,
            "time_wait": {
                "holder": held.holder,
                "sockets": held.sockets,
                "seconds_left": held.seconds_left,
            },
            "restart": {
                "ok": again.ok,
                "errno": again.name,
                "free_after": again.free_after,
                "waited": again.waited,
            },
            "snapshots": [
                {
                    "label": snapshot.label,
                    "rows": [
                        {
                            "local": report.address(row.local),
                            "remote": report.address(row.remote),
                            "state": row.state.name,
                        }
                        for row in snapshot.rows
                    ],
                }
                for snapshot in self.snapshots
            ],
        }


def _whose(sides: set[Any]) -> Side | None:
    return "both" if len(sides) > 1 else next(iter(sides), None)


def _stack(
    scenario: Scenario,
    on: str | Stack,
    observer: str,
    profiles: dict[str, str] | None,
    allow_network: bool,
) -> Stack:
    if not isinstance(on, str):
        return on
    if not scenario.steps:
        raise ScenarioError(f"{scenario.name} has no steps: there is nothing to run")
    if on not in scenario.stacks:
        where = " and ".join(f"{stack!r}" for stack in scenario.stacks)
        raise ScenarioError(f"{scenario.name} does not run on {on!r}; it runs on {where}")
    if unknown := sorted({*(profiles or ())} - {"server", "client"}):
        raise ScenarioError(f"profiles: who is {unknown[0]!r}? server or client is expected")
    if on == "kernel" and not ip_address(scenario.host).is_loopback and not allow_network:
        raise ScenarioError(
            f"{scenario.host} is beyond loopback: allow it with --allow-network "
            "(allow_network=True)"
        )
    if on == "wire":
        from timewait.lab.wire import WireStack

        tracepoint = {"auto": None, "tracepoint": True, "sock_diag": False}
        if observer not in tracepoint:
            names = ", ".join(tracepoint)
            raise ScenarioError(f"on the wire there is no observer {observer!r}, but {names}")
        return WireStack(scenario, profiles, tracepoint=tracepoint[observer])
    return KernelStack(observer) if on == "kernel" else ModelStack(scenario, profiles)


def _orchestrator(
    scenario: Scenario,
    stack: Stack,
    seen: list[Event],
    record: Callable[[Event], object] | None,
    wait: Waiting | bool,
) -> Orchestrator:
    def take(event: Event) -> None:
        seen.append(event)
        events.log(event)
        if record:
            record(event)

    def unheard(waited: float, left: float | None) -> None:
        pass

    return Orchestrator(scenario, stack, take, unheard if wait is True else wait or None)


async def run(
    scenario: Scenario,
    on: str | Stack = "kernel",
    *,
    record: Callable[[Event], object] | None = None,
    wait: Waiting | bool = False,
    observer: str = "auto",
    profiles: dict[str, str] | None = None,
    allow_network: bool = False,
) -> Run:
    """Do the scenario on a stack, from async code under asyncio or trio.

    `on` is "kernel", "model", "wire" (the kernel's clients, a modelled server)
    or a stack made beforehand. Every event goes to `record` as it happens (an
    `events.Writer`, for one). With `wait`, a refused restart is tried until it
    succeeds; where `wait` is a function it hears the seconds waited and left.
    `observer` names who watches the kernel (`timewait.stacks.KernelStack`).
    `profiles` names the model's TCP for each role, `{"server": "linux", "client":
    "freebsd"}`. The kernel goes beyond loopback only with `allow_network`.

    Raises `ScenarioError` where the scenario cannot be run here, `StepHung`
    (one of those) where a step did not settle within the time limit.
    """
    seen: list[Event] = []
    with closing(_stack(scenario, on, observer, profiles, allow_network)) as stack:
        orchestrator = _orchestrator(scenario, stack, seen, record, wait)
        if stack.virtual:
            stack.run(orchestrator.perform)
        elif stack.name == "wire":
            # Its loop waits for real, so it does so in a thread of its own.
            await anyio.to_thread.run_sync(stack.run, orchestrator.perform)
        else:
            await orchestrator.perform()
    return Run.from_events(seen)


def run_sync(
    scenario: Scenario,
    on: str | Stack = "kernel",
    *,
    record: Callable[[Event], object] | None = None,
    wait: Waiting | bool = False,
    observer: str = "auto",
    profiles: dict[str, str] | None = None,
    allow_network: bool = False,
    backend: str = "asyncio",
) -> Run:
    """As `run`, from ordinary code; `backend` is "asyncio" or "trio"."""
    seen: list[Event] = []
    with closing(_stack(scenario, on, observer, profiles, allow_network)) as stack:
        orchestrator = _orchestrator(scenario, stack, seen, record, wait)
        stack.run(orchestrator.perform, backend)
    return Run.from_events(seen)

"""No false alarms: thousands of real runs, seen by every observer at once, must all conform.

    unshare -n sh -c 'ip link set lo up; python -m timewait.lab.campaign --runs 10000 --busy 4'

Built-in scenarios and random ones, under asyncio and trio by turns, watched by
sock_diag, the tracepoint and a capture together, or by some of them, while
`--busy` processes keep the machine's processors from them. A run that the
check rejects is kept as a file of events, named by its seed. With `--cuts` the
file of each run is cut off at so many places, as by a writer that is killed;
what is left must conform too.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections import Counter
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeAlias

import anyio
import click

from timewait.check import Verdict, check
from timewait.check.evidence import read
from timewait.events import Event, Writer
from timewait.orchestrator import Orchestrator
from timewait.scenario import BUILT_IN, Scenario, ScenarioError
from timewait.stacks import KernelStack, ModelStack

__all__ = ["one", "random_scenario"]

_OBSERVERS: Final = ("tracepoint+capture", "tracepoint", "capture", "")


def random_scenario(rng: random.Random) -> Scenario:
    """A scenario nobody would write: steps at random, as far as they make sense."""
    scenario = Scenario(
        host=rng.choice(["127.0.0.1"] * 3 + ["::1"]), name="random", time_limit=3.0
    ).listen(
        reuse_address=rng.random() < 0.3,
        reuse_port=rng.random() < 0.2,
        reads=rng.random() < 0.8,
        at_eof=rng.choice(["close", "close", "ignore"]),
    )
    clients = rng.randint(1, 4)
    scenario = scenario.connect(
        clients,
        reads=rng.random() < 0.8,
        at_eof=rng.choice(["close", "close", "ignore"]),
    )
    for _ in range(rng.randint(1, 5)):
        n = rng.randint(1, clients)
        who = rng.choice(["server", "client", f"client-{n}", f"server-{n}"])
        what = rng.choice(["send", "send", "shutdown", "close", "close", "abort", "pause"])
        try:
            if what == "send":
                scenario = scenario.send(who, rng.choice([1, 100, 5000, 100_000]))
            elif what == "shutdown":
                scenario = scenario.shutdown(who)
            elif what == "close":
                scenario = scenario.close(rng.choice([who, who, "both"]))
            elif what == "abort":
                scenario = scenario.abort(who)
            else:
                scenario = scenario.pause(rng.choice([0.001, 0.01, 0.05]))
        except ScenarioError:
            continue
    if rng.random() < 0.7:
        scenario = scenario.restart(
            reuse_address=rng.choice([None, True, False]), reuse_port=rng.choice([None, True])
        )
    return scenario


def one(seed: int, on: str = "kernel") -> tuple[Scenario, str, list[Event], Verdict | None]:
    """One run: its scenario, how it was seen, its events, the verdict (None: it did not run)."""
    rng = random.Random(seed)
    names = sorted(BUILT_IN)
    scenario = (
        Scenario.built_in(rng.choice(names), rng.randint(1, 4))
        if rng.random() < 0.5
        else random_scenario(rng)
    )
    observers = rng.choice(_OBSERVERS)
    backend = rng.choice(["asyncio", "trio"])
    seen: list[Event] = []
    how = f"{observers or 'sock_diag alone'}, {backend}"
    with ExitStack() as resources:
        stack: Any
        if on == "kernel":
            stack = KernelStack("+".join(filter(None, ("sock_diag", observers))))
            resources.callback(stack.close)
            orchestrator = Orchestrator(scenario, stack, seen.append, None)
        else:
            how = "model"
            stack = ModelStack(scenario, seed=seed, delay=rng.choice([0.000_02, 0.01, 0.1]))
            orchestrator = Orchestrator(scenario, stack, seen.append, None)
        try:
            if on == "kernel":
                anyio.run(orchestrator.perform, backend=backend)
            else:
                stack.run(orchestrator.perform)
        except ScenarioError as wrong:
            # Another run beside this one may have the port: it sees what that one does with it.
            if len(seen) < 3 or "is taken" in str(wrong):
                return scenario, how, seen, None
    return scenario, how, seen, check(seen, profiles=stack.profiles)


_Job: TypeAlias = tuple[int, str, str, int]


def _work(job: _Job) -> tuple[int, str, str | None]:
    seed, on, keep, cuts = job
    scenario, how, seen, verdict = one(seed, on)
    if verdict is None:
        return seed, "could not be run", None
    path = Path(keep) / f"campaign-{on}-{seed}.jsonl"
    if not verdict or cuts:
        with Writer(path) as write:
            for event in seen:
                write(event)
    if not verdict:
        why = verdict.explain()
        return seed, how, f"seed {seed} ({scenario.name}, {how}), kept in {path}\n{why}"
    rng = random.Random(seed)
    whole = path.read_bytes() if cuts else b""
    for _ in range(cuts):
        # Half of them between two lines, where a cut looks like an end.
        at = rng.randrange(whole.index(b"\n"), len(whole) - 1)
        at = whole.rindex(b"\n", 0, at + 1) + 1 if rng.random() < 0.5 else at
        path.write_bytes(whole[:at])
        verdict = check(read(path, lambda problem: None))
        if not verdict:
            return seed, how, f"seed {seed} ({how}), cut to {path}\n{verdict.explain()}"
    path.unlink(missing_ok=True)
    return seed, f"{scenario.name}, {how}", None


def _spin() -> None:
    while os.getppid() != 1:
        sum(range(100_000))


@click.command()
@click.option("--runs", default=100, help="How many.")
@click.option("--seed", default=0, help="The first run's seed; the others follow.")
@click.option("--on", type=click.Choice(["kernel", "model"]), default="kernel")
@click.option("--jobs", default=2, help="So many at a time.")
@click.option("--busy", default=0, help="So many processes that only use up processors.")
@click.option("--cuts", default=0, help="In so many places each run's file is cut off.")
@click.option(
    "--keep", type=click.Path(file_okay=False), default=".", help="Rejected runs go here."
)
@click.option("--json", "as_json", is_flag=True)
def _main(
    runs: int, seed: int, on: str, jobs: int, busy: int, cuts: int, keep: str, as_json: bool
) -> None:
    """Run them, say how many conform; exit 1 if any does not."""
    context = get_context("fork")
    burners = [context.Process(target=_spin, daemon=True) for _ in range(busy)]
    for burner in burners:
        burner.start()
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    todo = [(n, on, keep, cuts) for n in range(seed, seed + runs)]
    try:
        with context.Pool(jobs, maxtasksperchild=200) as pool:
            for done, (_, kind, trouble) in enumerate(pool.imap_unordered(_work, todo), 1):
                kinds[kind] += 1
                if trouble:
                    wrong.append(trouble)
                    print(trouble, file=sys.stderr, flush=True)
                if done % 500 == 0:
                    print(f"{done} runs, {len(wrong)} rejected", file=sys.stderr, flush=True)
    finally:
        for burner in burners:
            burner.kill()
    ran = runs - kinds["could not be run"]
    if as_json:
        print(json.dumps({"runs": ran, "rejected": len(wrong), "seed": seed, "kinds": kinds}))
    else:
        for kind, count in sorted(kinds.items()):
            print(f"{count:6} {kind}")
        print(f"{ran} runs, {ran - len(wrong)} conform, {len(wrong)} do not")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    _main()

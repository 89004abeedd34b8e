"""What the pytest plugin does once a test asks: limits, bodies on the simulation, the sum.

`timewait.pytest_plugin` is the door that every pytest run passes; this is loaded
behind it by the suites that use it. PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import ExitStack, suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import pytest
from _pytest import runner

from timewait.pytest_plugin import FOUND

if TYPE_CHECKING:
    from timewait.sim import Host, Network
    from timewait.witness import Witness

__all__ = ["Simulated", "check_suite_limits", "prepare", "set_up_first", "summarize", "watch"]

_LIMITS: Final = "no_leaks, no_resets (true or false), closed_by, time_wait_budget, port, stacks"
_ARGUMENTS: Final = {
    "tcp": {"no_leaks", "no_resets", "closed_by", "time_wait_budget", "port", "stacks"},
    "tcp_sim": {"seeds", "hosts", "profile"},
}
_WORST: Final = 5
_LOOKING_ON: Final = pytest.StashKey[ExitStack]()
_LIMITED: Final = pytest.StashKey[bool]()
_BROKEN: Final = pytest.StashKey[BaseException]()  # what told that a limit does not hold
_PASSED: Final = pytest.StashKey[pytest.TestReport | None]()


# --- what is the suite's own --------------------------------------------------------------


def _ours(config: pytest.Config, marks: Iterable[pytest.Mark]) -> list[pytest.Mark]:
    """Leave out markers of a suite that registers one of the same name, by their arguments."""
    lines = [line.partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")]
    return [
        mark
        for mark in marks
        if lines.count(mark.name) < 2
        or (mark.kwargs and not mark.args and mark.kwargs.keys() <= _ARGUMENTS[mark.name])
    ]


def _is_our_fixture(name: str, node: pytest.Collector | pytest.Item) -> bool:
    """Whether the innermost fixture of that name there is ours, or asks for ours."""
    where: Any = node if pytest.version_tuple >= (8, 1) else node.nodeid
    defined = node.session._fixturemanager.getfixturedefs(name, where)
    if not defined:
        return True
    nearest = defined[-1]
    return name in nearest.argnames or nearest.func.__module__ == "timewait.pytest_plugin"


# --- limits -------------------------------------------------------------------------------


def check_suite_limits(config: pytest.Config) -> None:
    """Raise `pytest.UsageError` if the ini file's limits make no sense."""
    _validated(_suite_limits(config), "ini file: tcp_")


def _suite_limits(config: pytest.Config) -> dict[str, Any]:
    limits: dict[str, Any] = {
        name: True for name in ("no_leaks", "no_resets") if config.getini(f"tcp_{name}")
    }
    if side := config.getini("tcp_closed_by"):
        limits["closed_by"] = side
    if budget := config.getini("tcp_time_wait_budget"):
        limits["time_wait_budget"] = int(budget) if budget.isdecimal() else budget
    return limits


def _limits(config: pytest.Config, marks: Iterable[pytest.Mark]) -> dict[str, Any]:
    """The limits on a test; the last marker is the closest. Raises `pytest.UsageError`."""
    limits = _suite_limits(config)
    for mark in marks:
        if mark.args:
            raise pytest.UsageError(f"@pytest.mark.tcp takes names only: {_LIMITS}")
        limits |= _validated(dict(mark.kwargs), "@pytest.mark.tcp: ")
    return limits


def _validated(limits: dict[str, Any], where: str) -> dict[str, Any]:
    for name, value in limits.items():
        if name in ("no_leaks", "no_resets", "stacks"):
            wrong = "is true or false" if not isinstance(value, bool) else ""
        elif name == "closed_by":
            wrong = "" if value in ("client", "server") else 'is "client" or "server"'
        elif name == "time_wait_budget":
            wrong = "" if type(value) is int and value >= 0 else "is a number from 0"
        elif name == "port":
            wrong = "" if type(value) is int and 0 < value < 65_536 else "is a port, 1 to 65535"
        else:
            raise pytest.UsageError(f"{where}{name} is not among {_LIMITS}")
        if wrong:
            raise pytest.UsageError(f"{where}{name} {wrong}, not {value!r}")
    return limits


# --- collection ---------------------------------------------------------------------------


def prepare(
    collector: pytest.Collector, name: str, body: FunctionType, marks: list[pytest.Mark]
) -> None:
    """Prepare a test function with these markers; raises `CollectError` on nonsense."""
    if hasattr(body, "_timewait_simulated") or not collector.istestfunction(body, name):  # type: ignore[attr-defined]
        return
    try:
        _prepare(collector, name, body, marks, inspect.signature(body).parameters)
    except pytest.UsageError as wrong:
        raise pytest.Collector.CollectError(f"{collector.nodeid}::{name}: {wrong}") from None


def _prepare(
    collector: pytest.Collector,
    name: str,
    body: FunctionType,
    marks: list[pytest.Mark],
    arguments: Collection[str],
) -> None:
    marks = _ours(collector.config, marks)
    names = {mark.name for mark in marks}
    names |= {
        name
        for name in ("tcp", "tcp_sim")
        if name in arguments and _is_our_fixture(name, collector)
    }
    watched, simulated = "tcp" in names, "tcp_sim" in names
    if watched and simulated:
        raise pytest.UsageError(
            "tcp watches the kernel's connections, and a test on the simulation has none"
        )
    if watched:
        _limits(collector.config, [mark for mark in marks if mark.name == "tcp"])
        pytest.mark.usefixtures("tcp")(body)
    elif simulated:
        # A plain function in its place, so that plugins that run coroutines let it be.
        seeds, made_of = _simulation(collector.config, marks)
        file = os.path.relpath(collector.path, collector.config.invocation_params.dir)
        if (tried := getattr(body, "hypothesis", None)) is not None:  # once each example
            tried.inner_test = _on_the_simulation(tried.inner_test, file, seeds, made_of)
            vars(body)["_timewait_simulated"] = True
        else:
            setattr(collector.obj, name, _on_the_simulation(body, file, seeds, made_of))  # type: ignore[attr-defined]


def _everywhere(config: pytest.Config) -> bool:
    return bool(config.getoption("tcp") or _suite_limits(config))


def set_up_first(item: pytest.Item) -> None:
    """Have `tcp` set up before the test's own fixtures, and so torn down after them.

    Fixtures of a wider scope come before: what they open is not this test's.
    """
    names: list[str] | None = getattr(item, "fixturenames", None)
    if names is None or hasattr(getattr(item, "obj", None), "_timewait_simulated"):
        return
    if _ours(item.config, item.iter_markers("tcp_sim")):
        raise pytest.UsageError(
            f"{item.nodeid}: tcp_sim runs functions and methods of plain classes only, "
            "and all of them: it is no marker of one parameter"
        )
    marks = _ours(item.config, item.iter_markers("tcp"))
    try:
        limits = _limits(item.config, marks)
    except pytest.UsageError as wrong:
        raise pytest.UsageError(f"{item.nodeid}: {wrong}") from None
    if not marks and "tcp" not in names and not _everywhere(item.config):
        return
    if not _is_our_fixture("tcp", item):
        return
    defined = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    if "tcp" in names:
        names.remove("tcp")
    scopes = [defined[name][-1].scope if name in defined else "function" for name in names]
    names.insert(scopes.index("function") if "function" in scopes else len(names), "tcp")
    if limits:
        item.stash[_LIMITED] = True
        if not item.config.pluginmanager.has_plugin(_Judgement.__name__):
            item.config.pluginmanager.register(_Judgement(), _Judgement.__name__)


# --- watching -----------------------------------------------------------------------------


def watch(request: pytest.FixtureRequest) -> Iterator[Witness | None]:
    """The body of the fixture `tcp`."""
    from timewait.witness import Witness

    item = request.node
    _look_on(request.config)
    marks = _ours(request.config, item.iter_markers("tcp"))[::-1]
    limits = _limits(request.config, marks)
    stacks = limits.get("stacks") or request.config.getoption("tcp_stacks")
    try:
        witness = Witness(stacks=stacks)
        witness.__enter__()
    except OSError as blind:
        if marks or "tcp" in inspect.signature(item.obj).parameters:
            pytest.skip(f"tcp: {blind.strerror or blind}")
        yield None  # the whole suite is watched, where it can be
        return
    try:
        yield witness
        strict = any("closed_by" in mark.kwargs for mark in marks)
        wrong = list(_broken(witness, limits, strict))
    finally:
        witness.__exit__(None, None, None)
        item.user_properties.append((FOUND, _figures(witness)))
    if wrong:
        try:
            pytest.fail("\n".join(wrong), pytrace=False)
        except pytest.fail.Exception as broken:
            item.stash[_BROKEN] = broken
            raise


def _look_on(config: pytest.Config) -> None:
    """Keep the thread of the tests' witnesses until the end of the run."""
    from timewait.witness import looking_on

    if _LOOKING_ON not in config.stash:
        until_the_end = config.stash[_LOOKING_ON] = ExitStack()
        until_the_end.enter_context(looking_on())
        config.add_cleanup(until_the_end.close)


def _broken(witness: Witness, limits: dict[str, Any], strict: bool) -> Iterator[str]:
    """The limits that do not hold, in words; `strict` where a marker wants connections."""
    port = limits.get("port")
    checks: dict[str, Callable[[], object]] = {}
    if limits.get("no_leaks"):
        checks["no_leaks"] = lambda: witness.assert_no_leak(port)
    if limits.get("no_resets"):
        checks["no_resets"] = lambda: witness.assert_no_reset(port)
    if "closed_by" in limits and (strict or witness.connections):
        checks["closed_by"] = lambda: witness.assert_closed_by(limits["closed_by"], port)
    if "time_wait_budget" in limits:
        budget = limits["time_wait_budget"]
        checks["time_wait_budget"] = lambda: witness.assert_time_wait_within(budget, port)
    if port is not None and not checks:
        checks["port"] = lambda: witness._used(port)
    for name, check in checks.items():
        try:
            check()
        except (AssertionError, LookupError) as broken:
            yield f"tcp({name}={limits[name]!r}): {broken}"


class _Judgement:
    """Has a test fail whose limits do not hold, which is known only when it is torn down.

    So it is told of a body that passed after that. Where another plugin runs the test
    and has told already, it is an error at teardown.
    """

    def __init__(self) -> None:
        self._run: pytest.Item | None = None  # by us, as pytest does
        self._told: pytest.TestReport | None = None  # the last one

    @pytest.hookimpl
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> object:
        """In place of pytest's own, and after all other plugins' like that."""
        if _LIMITED not in item.stash:
            return None
        hooks = item.config.hook.pytest_runtest_protocol.get_hookimpls()
        given = {"item": item, "nextitem": nextitem}
        for hook in reversed(hooks[: [hook.plugin for hook in hooks].index(self)]):
            if hook.plugin is not runner and not (hook.wrapper or hook.hookwrapper):
                done: object = hook.function(*(given[name] for name in hook.argnames))
                if done is not None:
                    return done
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self._run = item
        try:
            runner.runtestprotocol(item, log=False, nextitem=nextitem)
        finally:
            self._run = None
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, object, object]:
        """Have a coroutine's loop do the closes that are under way: it may not run afterwards."""
        body = getattr(item, "obj", None)
        if _LIMITED not in item.stash or not inspect.iscoroutinefunction(body):
            return (yield)
        item.obj = _and_settled(body, item.funcargs["tcp"])  # type: ignore[attr-defined]
        try:
            return (yield)
        finally:
            item.obj = body  # type: ignore[attr-defined]

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what has been told."""
        self._told = report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Have a limit that does not hold be the failure of a body that passed."""
        report = yield
        error = call.excinfo.value if call.excinfo is not None else None
        broken = error is not None and error is item.stash.get(_BROKEN, None)
        if call.when == "call" and broken:
            return report  # wanted by `_fail`
        passed = item.stash.get(_PASSED, None) if call.when == "teardown" else None
        item.stash[_PASSED] = report if call.when == "call" and error is None else None
        if passed is not None and passed is not self._told and broken:
            _fail(item, passed, item.stash[_BROKEN])
            report.outcome, report.longrepr = "passed", None
            vars(report).pop("wasxfail", None)
        for each in (passed, report) if item is self._run and not item.stash[_PASSED] else ():
            if each is not None:
                item.ihook.pytest_runtest_logreport(report=each)
        return report


def _and_settled(
    body: Callable[..., Awaitable[object]], witness: Witness | None
) -> Callable[..., Awaitable[object]]:
    @functools.wraps(body)
    async def run(*instance: Any, **arguments: Any) -> object:
        result = await body(*instance, **arguments)
        if witness is not None:
            with suppress(RuntimeError):  # (a loop that is neither asyncio's nor trio's)
                await witness.settled()
        return result

    return run


def _fail(item: pytest.Item, passed: pytest.TestReport, broken: BaseException) -> None:
    """Make it the report of a body that failed so, if that was not expected of it (xfail)."""

    def body() -> None:
        raise broken

    call = pytest.CallInfo.from_call(body, "call")
    failed: pytest.TestReport = item.ihook.pytest_runtest_makereport(item=item, call=call)
    times = {name: vars(passed).get(name) for name in ("start", "stop", "duration")}
    vars(passed).pop("wasxfail", None)
    vars(passed).update(vars(failed) | times)


def _figures(witness: Witness) -> dict[str, int]:
    return {
        "opened": witness.opened,
        "time_wait": len(witness.time_wait),
        "leaks": len(witness.leaks),
        "resets": len(witness.resets),
    }


# --- the simulation -----------------------------------------------------------------------


class Simulated:
    """The `tcp_sim` fixture: what the test's body runs on. `seed` is this run's."""

    seed: int = 0

    @property
    def host(self) -> Host:
        """The simulated host that the body runs on."""
        from timewait.sim import current_host

        try:
            return current_host()
        except RuntimeError:
            raise RuntimeError("tcp_sim's host is there only while the test's body runs") from None

    @property
    def network(self) -> Network:
        """The simulated network: its hosts, and its links to be made worse."""
        return self.host.network


def _simulation(
    config: pytest.Config, marks: list[pytest.Mark]
) -> tuple[list[int], dict[str, Any]]:
    """The seeds of a test and what its simulation is made of. Raises `pytest.UsageError`."""
    ini = config.getini("tcp_sim_seeds") or "1"
    made_of: dict[str, Any] = {"seeds": int(ini) if ini.isdecimal() else ini}
    for mark in marks:
        if mark.args or mark.kwargs.keys() - _ARGUMENTS["tcp_sim"]:
            raise pytest.UsageError("@pytest.mark.tcp_sim takes seeds, hosts and profile, by name")
        made_of |= mark.kwargs
    seeds = made_of.pop("seeds")
    if type(seeds) is int and seeds > 0:
        seeds = range(seeds)
    if not isinstance(seeds, Iterable) or isinstance(seeds, str):
        raise pytest.UsageError(f"tcp_sim: seeds is a number from 1, or numbers, not {seeds!r}")
    seeds = list(seeds)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise pytest.UsageError(f"tcp_sim: seeds are numbers from 0, not {seeds!r}")
    if "profile" in made_of:
        from timewait.tcp.profiles import profile

        try:
            profile(made_of["profile"])
        except (ValueError, TypeError) as unknown:
            raise pytest.UsageError(f"tcp_sim: {unknown}") from None
    if (hosts := made_of.get("hosts")) is not None:
        from timewait.sim import Network
        from timewait.sim.loop import network_of

        named = isinstance(hosts, (list, tuple, Mapping)) and all(isinstance(h, str) for h in hosts)
        if not named and not isinstance(hosts, Network):
            raise pytest.UsageError(f"tcp_sim: hosts are names, or a Network, not {hosts!r}")
        try:
            network_of(hosts, 0, made_of.get("profile", "linux"))
        except (ValueError, TypeError) as nonsense:
            raise pytest.UsageError(f"tcp_sim: {nonsense}") from None
    only = config.getoption("tcp_sim_seed")
    if only is not None and only < 0:
        raise pytest.UsageError(f"--tcp-sim-seed is a number from 0, not {only}")
    return (seeds if only is None else [only]), made_of


def _on_the_simulation(
    body: FunctionType, file: str, seeds: list[int], made_of: dict[str, Any]
) -> Callable[..., None]:
    """A plain function that runs the body once a seed on the simulated loop."""

    @functools.wraps(body)
    def run(*instance: Any, **arguments: Any) -> None:
        from timewait import sim

        async def main() -> None:
            result = body(*instance, **arguments)
            if inspect.isawaitable(result):
                await result

        for seed in seeds:
            if isinstance(arguments.get("tcp_sim"), Simulated):
                arguments["tcp_sim"].seed = seed
            try:
                sim.run(main, seed=seed, **made_of)
            except (pytest.skip.Exception, pytest.exit.Exception) as no_failure:
                vars(no_failure).pop("__notes__", None)  # (its text is a reason, of one line)
                raise
            except BaseException as failure:
                test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].partition("::")[2]
                again = f"pytest {shlex.quote(f'{file}::{test}')} --tcp-sim-seed={seed}"
                failure.add_note(f"tcp_sim: failed with seed {seed}; replay: {again}")
                raise

    run._timewait_simulated = True  # type: ignore[attr-defined]
    # (pytest-asyncio's own marker, as a whole module has it, is in nobody's way here)
    marked = "ignore:The test .* is marked with '@pytest.mark.asyncio'"
    return pytest.mark.filterwarnings(marked)(run)  # type: ignore[no-any-return]


# --- the summary --------------------------------------------------------------------------


def summarize(terminalreporter: Any, found: dict[tuple[str, str], dict[str, int]]) -> None:
    """Write the sum over all watched tests, each of a worker of xdist's, and the worst of them."""
    total = {
        name: sum(each[name] for each in found.values()) for name in next(iter(found.values()))
    }
    terminalreporter.section("tcp")
    terminalreporter.write_line(f"{_plural(len(found), 'test')} watched: {_in_words(total)}")
    bad = ("leaks", "resets", "time_wait")
    worst = sorted(found.items(), key=lambda test: [-test[1][name] for name in bad])
    for (nodeid, _), figures in worst[:_WORST]:
        if any(figures[name] for name in bad):
            terminalreporter.write_line(f"  {nodeid}: {_in_words(figures)}")


def _in_words(figures: dict[str, int]) -> str:
    return (
        f"{_plural(figures['opened'], 'socket')} opened, {figures['time_wait']} left in TIME_WAIT, "
        f"{_plural(figures['leaks'], 'leak')}, {_plural(figures['resets'], 'reset')}"
    )


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"

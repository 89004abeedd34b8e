"""The pytest plugin: per test, which sockets the code leaves behind and who closed first.

    def test_shutdown(tcp, tcp_port):              # fixtures
        serve_and_call(tcp_port.listen())
        tcp.assert_closed_by("client", port=tcp_port)

    @pytest.mark.tcp(no_leaks=True, closed_by="client", time_wait_budget=0)
    @pytest.mark.tcp_sim(seeds=100)                # the body runs on a simulated network

It is loaded into every pytest run where the package is installed, so it imports
nothing but pytest, and does nothing before a test asks for it. Nor need pytest
rewrite its assertions, of which it has none: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import functools
import inspect
import os
import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from timewait.port import HeldPort
    from timewait.sim import Host, Network
    from timewait.witness import Witness

_LIMITS: Final = "no_leaks, no_resets (true or false), closed_by, time_wait_budget, port, stacks"
_FOUND: Final = "timewait"  # the name under which a test's figures travel in its report
_WORST: Final = 5
_AROUND: Final = pytest.StashKey[list[pytest.Mark]]()  # the markers of a module or class


# --- options and markers ------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of the ini file, for a whole suite."""
    group = parser.getgroup("timewait", "TCP connections (timewait)")
    group.addoption(
        "--tcp", action="store_true", help="watch the TCP connections of every test, and sum up"
    )
    group.addoption(
        "--tcp-stacks", action="store_true", help="show the whole stack that created a socket"
    )
    group.addoption(
        "--tcp-sim-seed", type=int, metavar="N", help="run tests on the simulation with this seed"
    )
    parser.addini("tcp_no_leaks", "no test may leave a connection open", type="bool")
    parser.addini("tcp_no_resets", "no connection of a test may be reset", type="bool")
    parser.addini("tcp_closed_by", 'who closes first in every test: "client" or "server"')
    parser.addini("tcp_time_wait_budget", "how many sockets a test may leave in TIME_WAIT")
    parser.addini("tcp_sim_seeds", "how many seeds a test on the simulation runs with (1)")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known; a suite-wide limit that makes no sense ends the run here."""
    config.addinivalue_line(
        "markers",
        'tcp(no_leaks=False, no_resets=False, closed_by="client"|"server", time_wait_budget=N, '
        "port=N, stacks=False): limits on the TCP connections of the test",
    )
    config.addinivalue_line(
        "markers", "tcp_sim(seeds=1): run the test's body on a simulated network, once a seed"
    )
    if limits := _suite_limits(config):
        _validated(limits, "ini file: tcp_")


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


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> None:
    """Prepare a test function that asks for something here; leave all others alone.

    This runs for every name of every test module: first what is cheap.
    """
    if not isinstance(obj, FunctionType) or hasattr(obj, "_timewait_simulated"):
        return
    try:
        around = collector.stash[_AROUND]
    except KeyError:
        around = collector.stash[_AROUND] = list(collector.iter_markers())[::-1]
    own = vars(obj).get("pytestmark")
    variables = obj.__code__.co_varnames
    if own or around:
        marks = [mark for mark in (*around, *(own or ())) if mark.name in ("tcp", "tcp_sim")]
    else:
        marks = []
    if marks or "tcp" in variables or "tcp_sim" in variables:
        arguments = inspect.signature(obj).parameters
        if collector.istestfunction(obj, name):  # type: ignore[attr-defined]
            try:
                _prepare(collector, name, obj, marks, arguments.keys())
            except pytest.UsageError as wrong:
                test = f"{collector.nodeid}::{name}"
                raise pytest.Collector.CollectError(f"{test}: {wrong}") from None


def _prepare(
    collector: pytest.Collector,
    name: str,
    body: FunctionType,
    marks: list[pytest.Mark],
    arguments: Collection[str],
) -> None:
    names = {mark.name for mark in marks}
    watched, simulated = (
        ("tcp" in names or "tcp" in arguments),
        ("tcp_sim" in names or "tcp_sim" in arguments),
    )
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
        setattr(collector.obj, name, _on_the_simulation(body, file, seeds, made_of))  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set `tcp` up first where it is used: everywhere, if the whole suite is watched."""
    everywhere = config.getoption("tcp") or _suite_limits(config)
    for item in items:
        names = getattr(item, "fixturenames", ())
        if "tcp" in names or (everywhere and names != () and not _is_simulated(item)):
            _set_up_first(item)


def _is_simulated(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "obj", None), "_timewait_simulated")


def _set_up_first(item: pytest.Item) -> None:
    """Have `tcp` set up before the test's own fixtures, and so torn down after them.

    Fixtures of a wider scope come before: what they open is not this test's.
    """
    names: list[str] = item.fixturenames  # type: ignore[attr-defined]
    defined = item._fixtureinfo.name2fixturedefs  # type: ignore[attr-defined]
    if "tcp" in names:
        names.remove("tcp")
    scopes = [defined[name][-1].scope if name in defined else "function" for name in names]
    names.insert(scopes.index("function") if "function" in scopes else len(names), "tcp")


# --- fixtures -----------------------------------------------------------------------------


@pytest.fixture
def tcp_port() -> Iterator[HeldPort]:
    """A TCP port nobody can take between asking for it and using it (`timewait.HeldPort`)."""
    from timewait.port import hold_port

    with hold_port() as port:
        yield port


@pytest.fixture
def tcp(request: pytest.FixtureRequest) -> Iterator[Witness | None]:
    """What the test's code does with TCP connections (`timewait.Witness`).

    Limits from markers and the ini file are checked when the test's other
    fixtures have been torn down.
    """
    from timewait.witness import Witness

    item = request.node
    marks = list(item.iter_markers("tcp"))[::-1]
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
        item.user_properties.append((_FOUND, _figures(witness)))
        witness.__exit__(None, None, None)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def _broken(witness: Witness, limits: dict[str, Any], strict: bool) -> Iterator[str]:
    """The limits that do not hold, in words; `strict` where a marker wants connections."""
    port = limits.get("port")
    checks: dict[str, Callable[[], None]] = {}
    if limits.get("no_leaks"):
        checks["no_leaks"] = lambda: witness.assert_no_leak(port)
    if limits.get("no_resets"):
        checks["no_resets"] = lambda: witness.assert_no_reset(port)
    if "closed_by" in limits and (strict or witness.connections):
        checks["closed_by"] = lambda: witness.assert_closed_by(limits["closed_by"], port)
    if "time_wait_budget" in limits:
        budget = limits["time_wait_budget"]
        checks["time_wait_budget"] = lambda: witness.assert_time_wait_within(budget, port)
    for name, check in checks.items():
        try:
            check()
        except (AssertionError, LookupError) as broken:
            yield f"tcp({name}={limits[name]!r}): {broken}"


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


@pytest.fixture
def tcp_sim() -> Simulated:
    """The test's body runs on a simulated network, in virtual time, with a seed."""
    return Simulated()


def _simulation(
    config: pytest.Config, marks: list[pytest.Mark]
) -> tuple[list[int], dict[str, Any]]:
    """The seeds of a test and what its simulation is made of. Raises `pytest.UsageError`."""
    ini = config.getini("tcp_sim_seeds") or "1"
    made_of: dict[str, Any] = {"seeds": int(ini) if ini.isdecimal() else ini}
    for mark in marks:
        if mark.args or mark.kwargs.keys() - {"seeds", "hosts", "profile"}:
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

        named = isinstance(hosts, (list, tuple, Mapping)) and all(isinstance(h, str) for h in hosts)
        if not named and not isinstance(hosts, Network):
            raise pytest.UsageError(f"tcp_sim: hosts are names, or a Network, not {hosts!r}")
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
            except Exception as failure:
                test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" (")[0].partition("::")[2]
                again = f"pytest {shlex.quote(f'{file}::{test}')} --tcp-sim-seed={seed}"
                failure.add_note(f"tcp_sim: failed with seed {seed}; replay: {again}")
                raise

    run._timewait_simulated = True  # type: ignore[attr-defined]
    return run


# --- the summary --------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Sum up the watched tests, if there were any (those of xdist's workers too)."""
    found: dict[str, dict[str, int]] = {
        report.nodeid: figures
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "user_properties", None) and report.when == "teardown"
        for name, figures in report.user_properties
        if name == _FOUND
    }
    if not found:
        return
    total = {
        name: sum(each[name] for each in found.values()) for name in next(iter(found.values()))
    }
    terminalreporter.section("tcp")
    terminalreporter.write_line(f"{_plural(len(found), 'test')} watched: {_in_words(total)}")
    bad = ("leaks", "resets", "time_wait")
    worst = sorted(found.items(), key=lambda test: [-test[1][name] for name in bad])
    for nodeid, figures in worst[:_WORST]:
        if any(figures[name] for name in bad):
            terminalreporter.write_line(f"  {nodeid}: {_in_words(figures)}")


def _in_words(figures: dict[str, int]) -> str:
    return (
        f"{_plural(figures['opened'], 'socket')} opened, {figures['time_wait']} left in TIME_WAIT, "
        f"{_plural(figures['leaks'], 'leak')}, {_plural(figures['resets'], 'reset')}"
    )


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"

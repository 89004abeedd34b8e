"""The pytest plugin: per test, which sockets the code leaves behind and who closed first.

    def test_shutdown(tcp, tcp_port):              # fixtures
        serve_and_call(tcp_port.listen())
        tcp.assert_closed_by("client", port=tcp_port)

    @pytest.mark.tcp(no_leaks=True, closed_by="client", time_wait_budget=0)
    @pytest.mark.tcp_sim(seeds=100)                # the body runs on a simulated network

It is loaded into every pytest run where the package is installed, so it is small,
imports nothing but pytest, and looks only whether a test asks for something; what is
done then is in `timewait.suite`. Nor need pytest rewrite its assertions, of which it
has none: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from types import FunctionType

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from timewait.port import HeldPort
    from timewait.suite import Simulated
    from timewait.witness import Witness

FOUND = "timewait"  # the name under which a test's figures travel in its report
MARKERS = ("tcp", "tcp_sim")
SUITE_LIMITS = ("tcp_no_leaks", "tcp_no_resets", "tcp_closed_by", "tcp_time_wait_budget")
_collector: pytest.Collector | None = None  # whose names came last, and
_around: list[pytest.Mark] = []  # the markers of that module or class


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the command line and of the ini file, for a whole suite."""
    group = parser.getgroup("timewait", "TCP connections (timewait)")
    group.addoption(  # (unnamed, a destination is looked for among those of all other options)
        "--tcp",
        dest="tcp",
        action="store_true",
        help="watch the TCP connections of every test, and sum up",
    )
    group.addoption(
        "--tcp-stacks",
        dest="tcp_stacks",
        action="store_true",
        help="show the whole stack that created a socket",
    )
    group.addoption(
        "--tcp-sim-seed",
        dest="tcp_sim_seed",
        type=int,
        metavar="N",
        help="run tests on the simulation with this seed",
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
    if any(config.getini(name) for name in SUITE_LIMITS):
        from timewait.suite import check_suite_limits

        check_suite_limits(config)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: pytest.Collector, name: str, obj: object) -> None:
    """Prepare a test function that asks for something here; leave all others alone.

    This runs for every name of every test module: first what is cheap.
    """
    global _collector, _around
    if type(obj) is not FunctionType:
        return
    if collector is not _collector:
        _collector, _around = collector, list(collector.iter_markers())[::-1]
    variables = obj.__code__.co_varnames
    if _around or obj.__dict__ or "tcp" in variables or "tcp_sim" in variables:
        marks = [*_around, *getattr(obj, "pytestmark", ())]
        marks = [mark for mark in marks if mark.name in MARKERS]
        if marks or "tcp" in variables or "tcp_sim" in variables:
            from timewait.suite import prepare

            prepare(collector, name, obj, marks)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Set `tcp` up first where it is used: everywhere, if the whole suite is watched."""
    if config.getoption("tcp") or any(config.getini(name) for name in SUITE_LIMITS):
        watched = items
    else:
        # (neither a marker of one parameter, or that a conftest added, nor the methods of
        # unittest's cases have passed pytest_pycollect_makeitem)
        watched = [
            item
            for item in items
            if "tcp" in getattr(item, "fixturenames", ())
            or any(mark.name in MARKERS for mark in item.own_markers)
            or (type(item) is not pytest.Function and any(map(item.get_closest_marker, MARKERS)))
        ]
    if watched:
        from timewait.suite import set_up_first

        for item in watched:
            set_up_first(item)


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
    from timewait.suite import watch

    yield from watch(request)


@pytest.fixture
def tcp_sim() -> Simulated:
    """The test's body runs on a simulated network, in virtual time, with a seed."""
    from timewait.suite import Simulated

    return Simulated()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Sum up the watched tests, if there were any (those of xdist's workers too)."""
    found = {
        (report.nodeid, getattr(report, "worker_id", "")): figures
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "user_properties", None) and report.when == "teardown"
        for name, figures in report.user_properties
        if name == FOUND
    }
    if found:
        from timewait.suite import summarize

        summarize(terminalreporter, found)

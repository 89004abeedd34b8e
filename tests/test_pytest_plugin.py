"""The plugin in other people's suites: each test here writes one, runs it and reads its report."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import timewait
import timewait.port
import timewait.sim
import timewait.witness  # (loaded here, so that suites run inside this process share it)

pytest_plugins = ["pytester"]

Run = Callable[..., pytest.RunResult]

# What a suite under test does with sockets.
HELP = """
import asyncio
import socket
import pytest

async def echo(reader, writer):
    writer.write(await reader.read(100))
    writer.close()

def pair(port):
    listener = port.listen()
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    listener.close()
    return client, server

def client_first(port):
    client, server = pair(port)
    client.close()
    server.close()

def server_first(port):
    client, server = pair(port)
    server.close()
    client.close()

kept = []

@pytest.fixture(autouse=True, scope="session")
def close_what_was_kept():
    yield
    for sock in kept:
        sock.close()

def leak(port):
    client, server = pair(port)
    kept.append(server)
    client.close()
"""


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a suite of one file, with options and an ini file."""
    monkeypatch.setenv("PYTHONPATH", str(Path(timewait.__file__).parent.parent))
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(code: str, *options: str, ini: str = "", inside: bool = True) -> pytest.RunResult:
        pytester.makepyfile(help=HELP, test_suite=f"from help import *\n{textwrap.dedent(code)}")
        pytester.makeini(f"[pytest]\n{ini}")
        start = pytester.runpytest_inprocess if inside else pytester.runpytest_subprocess
        return start("-p", "timewait.pytest_plugin", *options)

    return run


def test_a_suite_that_does_not_use_it_sees_nothing_of_it(suite: Run) -> None:
    code = """
        import sys
        def test_nothing_is_loaded():
            loaded = {name for name in sys.modules if name.startswith("timewait")}
            assert loaded == {"timewait", "timewait.pytest_plugin"}, loaded
        def test_sockets_are_pythons():
            import inspect
            assert inspect.getmodule(socket.socket.accept) is socket
            assert "close" not in vars(socket.socket) or socket.socket.close.__module__ == "socket"
    """
    result = suite(code, inside=False)
    result.assert_outcomes(passed=2)
    assert "tcp" not in result.stdout.str().replace("test_suite.py", "")
    assert result.stderr.lines == []


def test_a_suite_keeps_fixtures_and_markers_of_its_own_by_the_same_names(suite: Run) -> None:
    code = """
        import sys
        @pytest.fixture
        def tcp(): return "theirs"
        @pytest.fixture
        def tcp_sim(tcp): return tcp
        @pytest.mark.tcp("some", level=1)
        @pytest.mark.tcp_sim
        def test_it(tcp_sim, tcp):
            assert tcp_sim == tcp == "theirs"
        @pytest.mark.tcp
        class TestAll:
            async def helper(self): pass
            def test_it(self): pass
    """
    result = suite(code, ini="markers =\n  tcp(kind, level): over TCP\n  tcp_sim: simulated")
    result.assert_outcomes(passed=2)
    assert "watched" not in result.stdout.str()
    for own in ("tcp", "tcp_sim"):  # without the lines in the ini file, and without the fixtures
        result = suite(f"@pytest.mark.{own}('x')\ndef test_it(): pass")
        result.stdout.fnmatch_lines([f"*@pytest.mark.{own} takes *"])


def test_markers_hold_for_the_cases_of_unittest(suite: Run) -> None:
    code = """
        import unittest
        @pytest.mark.tcp({limits})
        class TestCase(unittest.TestCase):
            def test_leak(self):
                listener = socket.create_server(("127.0.0.1", 0))
                kept.extend((socket.create_connection(listener.getsockname()), listener))
        class TestOther(unittest.TestCase):
            def test_unwatched(self): pass
    """
    result = suite(code.format(limits="no_leaks=True"))
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["tcp(no_leaks=True): 2 sockets left open", "1 test watched: *"])
    result = suite(code.format(limits="no_leeks=True"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *TestCase::test_leak: *no_leeks is not among*"])
    result = suite(code.replace("tcp({limits})", "tcp_sim"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: *TestCase::test_leak: tcp_sim runs functions and*"])


def test_markers_hold_for_one_parameter_and_where_a_conftest_adds_them(
    suite: Run, pytester: pytest.Pytester
) -> None:
    pytester.makeconftest("""
        import pytest
        def pytest_collection_modifyitems(items):
            items[0].add_marker(pytest.mark.tcp(no_leaks=True))
    """)
    result = suite("""
        @pytest.mark.parametrize("n", [0, 1, pytest.param(2, marks=pytest.mark.tcp(no_leaks=True))])
        def test_it(n, tcp_port):
            leak(tcp_port)
    """)
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(["*_ test_it[[]0] _*", "*_ test_it[[]2] _*"])


def test_the_fixture_tells_who_closed_first(suite: Run) -> None:
    result = suite("""
        def test_it(tcp, tcp_port):
            server_first(tcp_port)
            assert tcp.active_closer(tcp_port) == "server"
            tcp.assert_no_leak()
            tcp.assert_closed_by("client", port=tcp_port)
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">*tcp.assert_closed_by*",
            "E*AssertionError: 1 connection not closed first by the client",
            "E*closed first by the server (FIN): the server called close in ESTABLISHED, "
            "at *help.py:* in server_first",
            "E*server: TIME_WAIT for * s, * s left",
            "E*created at *help.py:* in pair",
            "*= tcp =*",
            "1 test watched: 3 sockets opened, 1 left in TIME_WAIT, 0 leaks, 0 resets",
            "  test_suite.py::test_it: 3 sockets opened, 1 left in TIME_WAIT*",
        ]
    )
    assert "witness.py:" not in result.stdout.str()  # the failure is the test's line


def test_a_leak_is_told_with_its_stack(suite: Run) -> None:
    result = suite(
        """
        def test_it(tcp, tcp_port):
            leak(tcp_port)
            tcp.assert_no_leak()
        """,
        "--tcp-stacks",
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "E*AssertionError: 1 socket left open",
            "E*server's side 127.0.0.1:*",
            f"E*CLOSE_WAIT for * s, open in * (pid {os.getpid()})",
            "E*closed first by the client*",
            "E*created at *help.py:* in pair",
            "E*help.py:* in leak",
            "E*test_suite.py:* in test_it",
            "1 test watched: 3 sockets opened, 0 left in TIME_WAIT, 1 leak, 0 resets",
        ]
    )
    assert "_pytest" not in result.stdout.str()  # its own calls are not the test's


@pytest.mark.parametrize(
    ("limits", "story", "verdict"),
    [
        ("no_leaks=True", "client_first", None),
        ("no_leaks=True", "leak", "tcp(no_leaks=True): 1 socket left open"),
        ("closed_by='client'", "client_first", None),
        ("closed_by='client'", "server_first", "tcp(closed_by='client'): 1 connection not closed*"),
        ("closed_by='client'", "len", "tcp(closed_by='client'): *no connection was seen*"),
        ("time_wait_budget=0", "server_first", "tcp(time_wait_budget=0): 1 socket left in TIME_W*"),
        ("time_wait_budget=1", "server_first", None),
        ("no_resets=True", "server_first", None),
        ("no_leaks=True, port=1", "client_first", "*: port 1 was never used; the ports used were*"),
        ("port=1", "client_first", "tcp(port=1): port 1 was never used; the ports used were*"),
        ("closed_by='client', port=1", "client_first", "*: *no connection to port 1; the ports*"),
    ],
)
def test_the_marker_sets_limits(suite: Run, limits: str, story: str, verdict: str | None) -> None:
    port = "'ab'" if story == "len" else "tcp_port"
    result = suite(f"""
        @pytest.mark.tcp({limits})
        def test_it(tcp_port):
            {story}({port})
    """)
    if verdict is None:
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(failed=1)
        result.stdout.fnmatch_lines(["*_ test_it _*", verdict])


def test_limits_are_checked_after_the_tests_own_fixtures_are_gone(suite: Run) -> None:
    result = suite("""
        @pytest.fixture
        def connection(tcp_port):
            client, server = pair(tcp_port)
            yield
            client.close()
            server.close()

        @pytest.mark.tcp(no_leaks=True)
        def test_marked(connection): pass

        @pytest.fixture
        def closed_later():
            sockets = []
            yield sockets
            for sock in sockets:
                sock.close()

        @pytest.mark.tcp(no_leaks=True)
        def test_with_the_fixture_asked_for_last(closed_later, tcp_port, tcp):
            closed_later += pair(tcp_port)
            assert len(tcp.leaks) == 2
    """)
    result.assert_outcomes(passed=2)


def test_a_test_whose_limits_do_not_hold_fails_like_any_other(suite: Run) -> None:
    code = """
        @pytest.fixture
        def torn_down_badly():
            yield
            raise RuntimeError("theirs")

        @pytest.mark.tcp(no_leaks=True)
        def test_a_body_that_fails(tcp_port):
            leak(tcp_port)
            raise RuntimeError("in the body")

        @pytest.mark.xfail(strict=True)
        @pytest.mark.tcp(no_leaks=True)
        def test_expected(tcp_port): leak(tcp_port)

        @pytest.mark.xfail(strict=True)
        @pytest.mark.tcp(no_leaks=True)
        def test_not_expected(): pass

        @pytest.mark.tcp(no_leaks=True)
        def test_whose_fixture_fails(torn_down_badly): pass

        @pytest.mark.tcp(no_leaks=True)
        def test_leak(tcp_port): leak(tcp_port)

        def test_more(): pass
    """
    result = suite(code)
    # (what failed in its body has been told when the limits are looked at: an error as well)
    result.assert_outcomes(failed=3, xfailed=1, errors=2, passed=2)
    result = suite(code, "-x", "-k", "leak or more")
    result.assert_outcomes(failed=1, deselected=4)
    result.stdout.fnmatch_lines(["FAILED *::test_leak - Failed: tcp(no_leaks=True): 1 socket *"])


@pytest.mark.parametrize(
    ("log", "outcomes"), [("False", {"passed": 1}), ("True", {"passed": 2, "errors": 1})]
)
def test_another_plugin_may_run_the_tests(
    suite: Run, pytester: pytest.Pytester, log: str, outcomes: dict[str, int]
) -> None:
    """As plugins do that try again: most withhold what they tell, which can be put right."""
    pytester.makeconftest(f"""
        from _pytest.runner import runtestprotocol

        def pytest_runtest_protocol(item, nextitem):
            reports = ()
            while not reports or any(report.failed for report in reports):
                reports = runtestprotocol(item, log={log}, nextitem=nextitem)
            for report in () if {log} else reports:
                item.ihook.pytest_runtest_logreport(report=report)
            return True
    """)
    result = suite("""
        tries = []
        @pytest.mark.tcp(no_leaks=True)
        def test_better_at_the_second_try(tcp_port):
            tries.append(tcp_port)
            if len(tries) == 1:
                leak(tcp_port)
            else:
                assert len(tries) == 2
    """)
    result.assert_outcomes(**outcomes)


def test_what_wider_fixtures_open_is_not_the_tests(suite: Run) -> None:
    result = suite("""
        @pytest.fixture(scope="module")
        def connection():
            from timewait import hold_port
            with hold_port() as port:
                client, server = pair(port)
                yield
                client.close()
                server.close()

        @pytest.mark.tcp(no_leaks=True)
        def test_first(connection): pass
    """)
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("marker", "word"),
    [
        ("tcp(no_leak=True)", "no_leak is not among no_leaks"),
        ("tcp(True)", "takes names only"),
        ("tcp(no_leaks=1)", "no_leaks is true or false, not 1"),
        ("tcp(closed_by='nobody')", 'closed_by is "client" or "server", not \'nobody\''),
        ("tcp(time_wait_budget=-1)", "time_wait_budget is a number from 0, not -1"),
        ("tcp(time_wait_budget=True)", "time_wait_budget is a number from 0, not True"),
        ("tcp(port=70000)", "port is a port, 1 to 65535, not 70000"),
        ("tcp_sim(seeds=0)", "seeds is a number from 1"),
        ("tcp_sim(seeds='many')", "seeds is a number from 1, or numbers, not 'many'"),
        ("tcp_sim(seeds=[1, 'x'])", "seeds are numbers from 0"),
        ("tcp_sim(3)", "takes seeds, hosts and profile, by name"),
        ("tcp_sim(profile='vms')", "vms"),
        ("tcp_sim(hosts=5)", "hosts are names, or a Network, not 5"),
        ("tcp_sim(hosts='ab')", "hosts are names, or a Network, not 'ab'"),
        ("tcp_sim(hosts=[])", "a network without hosts has nowhere to run a program"),
        ("tcp_sim(hosts=['a', 'a'])", "there is a host 'a' already"),
        ("tcp_sim(hosts={'a': 3})", "'a' has an address or a list of them, not 3"),
    ],
)
def test_a_marker_that_makes_no_sense_is_an_error_at_collection(
    suite: Run, marker: str, word: str
) -> None:
    result = suite(f"@pytest.mark.{marker}\ndef test_it(): pass\ndef test_other(): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ERROR collecting test_suite.py*"])
    assert "test_suite.py::test_it: " in result.stdout.str()
    assert word in result.stdout.str()
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_both_markers_make_no_sense_together(suite: Run) -> None:
    result = suite("@pytest.mark.tcp_sim()\ndef test_it(tcp): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*a test on the simulation has none*"])


@pytest.mark.parametrize(
    ("ini", "word"),
    [
        ("tcp_closed_by = nobody", 'closed_by is "client" or "server"'),
        ("tcp_time_wait_budget = few", "time_wait_budget is a number from 0, not 'few'"),
    ],
)
def test_an_ini_file_that_makes_no_sense_ends_the_run(suite: Run, ini: str, word: str) -> None:
    result = suite("def test_it(): pass", ini=ini, inside=False)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert word in result.stderr.str()


def test_limits_for_a_whole_suite(suite: Run) -> None:
    result = suite(
        """
        import unittest

        def test_clean(tcp_port): client_first(tcp_port)
        def test_without_any(): pass
        def test_wrong_way(tcp_port): server_first(tcp_port)
        @pytest.mark.tcp(closed_by="server")
        def test_allowed(tcp_port): server_first(tcp_port)
        class TestOld(unittest.TestCase):
            def test_leak(self):
                from timewait import hold_port
                leak(hold_port())
        """,
        ini="tcp_no_leaks = true\ntcp_closed_by = client",
    )
    result.assert_outcomes(passed=3, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*_ test_wrong_way _*",
            "*_ TestOld.test_leak _*",
            "*= tcp =*",
            "5 tests watched: 12 sockets opened, 3 left in TIME_WAIT, 1 leak, 0 resets",
            "  test_suite.py::TestOld::test_leak: 3 sockets opened, 0 left in TIME_WAIT, 1 leak*",
        ]
    )


def test_the_summary_names_the_worst_five(suite: Run) -> None:
    result = suite(
        """
        @pytest.mark.parametrize("n", range(8))
        def test_it(n):
            from timewait import hold_port
            for _ in range(n):
                server_first(hold_port())
        """,
        "--tcp",
    )
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(
        [
            "8 tests watched: 84 sockets opened, 28 left in TIME_WAIT, 0 leaks, 0 resets",
            *(
                f"  test_suite.py::test_it[[]{n}]: {3 * n} sockets opened, {n} left in TIME_WAIT*"
                for n in (7, 6, 5, 4, 3)
            ),
        ],
        consecutive=True,
    )


def test_the_tests_of_a_suite_share_a_thread_that_ends_with_it(suite: Run) -> None:
    code = """
        import threading
        seen = set()
        @pytest.mark.parametrize("n", range(3))
        def test_it(n):
            seen.update(each for each in threading.enumerate() if each.name == "timewait")
            assert len(seen) == 1
    """
    result = suite(code, "--tcp")
    result.assert_outcomes(passed=3)
    assert "timewait" not in {each.name for each in threading.enumerate()}


def test_under_xdist_each_worker_blames_its_own(suite: Run) -> None:
    result = suite(
        """
        import time
        @pytest.mark.parametrize("n", range(4))
        def test_it(n, tcp, tcp_port):
            client, server = pair(tcp_port)
            time.sleep(0.2)  # both workers have connections now
            assert len(tcp.connections) == 1
            assert len(tcp.leaks) == 2
            client.close()
            server.close()
            tcp.assert_no_leak()
        """,
        "-pxdist.plugin",
        "--tx=2*popen",
        "--dist=each",
        inside=False,
    )
    result.assert_outcomes(passed=8)
    result.stdout.fnmatch_lines(
        ["8 tests watched: 24 sockets opened, 8 left in TIME_WAIT, 0 leaks, 0 resets"]
    )


def test_a_port_the_test_never_used_is_an_error_that_says_so(suite: Run) -> None:
    result = suite("""
        def test_it(tcp, tcp_port):
            client_first(tcp_port)
            tcp.assert_no_time_wait(port=1)
    """)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*UnusedPort: port 1 was never used; the ports used were *"])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (
            "tcp.assert_closed_by('client', tcp_port)",
            "UnusedPort: no connection to port *: nobody*",
        ),
        ("tcp.assert_no_reset(1)", "UnusedPort: port 1 was never used; no port was used"),
        ("tcp.active_closer('http')", "TypeError: a port is a number or a HeldPort, not 'http'"),
        ("tcp.assert_no_leak(port='80')", "TypeError: a port is a number or a HeldPort, not '80'"),
        ("tcp.assert_bindable(tcp_port, host='no.such.invalid')", "OSError: no such address: 'no*"),
    ],
)
def test_a_wrong_question_is_answered_in_the_tests_own_line(
    suite: Run, question: str, answer: str
) -> None:
    listen = "tcp_port.listen().close()" if "tcp_port" in question else "pass"
    result = suite(f"def test_it(tcp, tcp_port):\n    {listen}\n    {question}\n", "--tb=short")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["test_suite.py:*: in test_it*", "E *" + answer])
    assert "connections.py" not in result.stdout.str()


def test_a_simulated_host_is_not_there_for_a_fixture(suite: Run) -> None:
    result = suite("""
        @pytest.fixture
        def host(tcp_sim): return tcp_sim.host
        @pytest.mark.tcp_sim
        def test_it(host): pass
    """)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["E*tcp_sim's host is there only while the test's body runs"])


def test_a_seed_below_0_is_refused(suite: Run) -> None:
    result = suite("def test_it(tcp_sim): pass", "--tcp-sim-seed=-1")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*--tcp-sim-seed is a number from 0, not -1"])


def test_the_held_port_is_bindable_until_something_holds_it(suite: Run) -> None:
    result = suite("""
        def test_free(tcp, tcp_port):
            client_first(tcp_port)
            tcp.assert_bindable(tcp_port)

        def test_kept(tcp, tcp_port):
            server_first(tcp_port)
            tcp.assert_bindable(tcp_port)
    """)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["E*port * cannot be bound without SO_REUSEADDR: EADDRINUSE"])


def test_without_any_observer_the_fixture_skips_and_a_suite_goes_on(
    suite: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> None:
        raise OSError(95, "no way to list TCP sockets here")

    monkeypatch.setattr("timewait.witness.table", nothing)
    code = "def test_asks(tcp): pass\ndef test_does_not(): pass"
    result = suite(code, "-rs", "--tcp")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED*tcp: no way to list TCP sockets here"])


# --- on the simulation --------------------------------------------------------------------


def test_a_test_on_the_simulation_waits_for_nothing(suite: Run) -> None:
    result = suite("""
    @pytest.mark.tcp_sim(seeds=3)
    async def test_coroutine(tmp_path):
        server = await asyncio.start_server(echo, "localhost", 9090)
        reader, writer = await asyncio.open_connection("localhost", 9090)
        writer.write(b"hello")
        assert await reader.read() == b"hello"
        writer.close()
        await asyncio.sleep(3600)
        server.close()

    def test_function_that_returns_one(tcp_sim):
        assert tcp_sim.seed == 0
        async def body():
            await asyncio.sleep(3600)
            assert tcp_sim.host.rows() == []
        return body()

    @pytest.mark.tcp_sim
    class TestMethods:
        async def test_method(self):
            await asyncio.sleep(3600)
    """)
    result.assert_outcomes(passed=3)


def test_a_failing_seed_is_printed_with_its_replay(suite: Run) -> None:
    code = """
    @pytest.mark.tcp_sim(seeds=range(1, 50))
    async def test_it(tcp_sim):
        assert tcp_sim.seed < 7
    """
    result = suite(code)
    result.assert_outcomes(failed=1)
    replay = "pytest test_suite.py::test_it --tcp-sim-seed=7"
    result.stdout.fnmatch_lines([f"E*tcp_sim: failed with seed 7; replay: {replay}"])
    assert suite(code, "--tcp-sim-seed=7").ret == pytest.ExitCode.TESTS_FAILED
    assert suite(code, "--tcp-sim-seed=6").ret == pytest.ExitCode.OK


def test_a_seed_fails_by_whatever_ends_the_body_and_is_no_failure_if_that_is_none(
    suite: Run,
) -> None:
    result = suite(
        """
        def ends(seed, how, what):
            if seed == 2: how(what)
        @pytest.mark.tcp_sim(seeds=3)
        class TestIt:
            async def test_fail(self, tcp_sim): ends(tcp_sim.seed, pytest.fail, "no")
            async def test_exit(self, tcp_sim): ends(tcp_sim.seed, exit, 3)
            async def test_skip(self, tcp_sim): ends(tcp_sim.seed, pytest.skip, "not here")
            async def test_xfail(self, tcp_sim): ends(tcp_sim.seed, pytest.xfail, "not yet")
        """,
        "-rs",
    )
    result.assert_outcomes(failed=2, skipped=1, xfailed=1)
    told = {line.rpartition("::")[2] for line in result.outlines if "with seed 2; replay: " in line}
    assert told == {f"test_{how} --tcp-sim-seed=2" for how in ("fail", "exit")}
    skipped = next(n for n, line in enumerate(result.outlines) if line.startswith("SKIPPED"))
    assert result.outlines[skipped].endswith("not here")
    assert "into the simulation" not in result.outlines[skipped + 1]


def test_hypothesis_has_each_example_run_on_a_simulation_of_its_own(suite: Run) -> None:
    result = suite("""
    from hypothesis import given, settings, strategies
    begun = []

    @pytest.mark.tcp_sim(seeds=[5, 6])
    @settings(max_examples=3, database=None)
    @given(strategies.integers())
    async def test_it(n):
        begun.append(asyncio.get_running_loop().time())
        await asyncio.sleep(3600)

    def test_then():
        assert len(begun) == 6 and len(set(begun)) == 1
    """)
    result.assert_outcomes(passed=2)


def test_the_replay_is_right_where_pytest_was_started(
    suite: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite("")  # for its ini file
    folder = pytester.mkdir("some tests")
    (folder / "test_seeds.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('what', ['a b', \"it's\"])\n"
        "@pytest.mark.tcp_sim(seeds=9)\n"
        "def test_it(what, tcp_sim): assert tcp_sim.seed != 5\n"
    )
    monkeypatch.chdir(folder)
    plugin = ("-p", "timewait.pytest_plugin")
    result = pytester.runpytest_inprocess(*plugin)
    result.assert_outcomes(failed=2)
    # pytest repeats messages in its summary where it finds itself on a CI machine.
    replays = {line.partition("replay: ")[2] for line in result.outlines if "replay: " in line}
    for line in replays:
        command = shlex.split(line)
        assert command[0] == "pytest"
        again = pytester.runpytest_inprocess(*plugin, *command[1:])
        again.assert_outcomes(failed=1)
        again.stdout.fnmatch_lines(["*tcp_sim: failed with seed 5; *"])
    assert len(replays) == 2


def test_the_ini_file_sets_the_seeds(suite: Run) -> None:
    code = """
    seen = []
    def test_it(tcp_sim): seen.append(tcp_sim.seed)
    def test_them(): assert seen == [0, 1, 2, 3]
    """
    suite(code, ini="tcp_sim_seeds = 4").assert_outcomes(passed=2)


def test_anyios_plugin_beside_it(suite: Run) -> None:
    result = suite(
        """
    @pytest.mark.anyio
    async def test_on_the_kernel(tcp, tcp_port, anyio_backend):
        import anyio
        listener = tcp_port.listen()
        client = await anyio.connect_tcp("127.0.0.1", tcp_port.number)
        server, _ = listener.accept()
        listener.close()
        await client.aclose()
        server.close()
        assert await tcp.settled()
        tcp.assert_closed_by("client", port=tcp_port)
        tcp.assert_no_leak()

    @pytest.mark.anyio
    @pytest.mark.tcp_sim
    async def test_on_the_simulation():
        import anyio
        await anyio.sleep(3600)
    """,
        "-panyio.pytest_plugin",
    )
    result.assert_outcomes(passed=4)


@pytest.fixture(scope="session")
def pytest_asyncio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pytest-asyncio in a folder of its own: beside other tests it would change how they run."""
    folder = tmp_path_factory.mktemp("pytest-asyncio")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder)
    if subprocess.run([*pip, "pytest-asyncio>=1.0"], capture_output=True).returncode:
        pytest.skip("pytest-asyncio cannot be installed here (no pip, or no package index)")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_pytest_asyncio_beside_it(
    suite: Run, pytest_asyncio: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(Path(timewait.__file__).parent.parent), str(pytest_asyncio)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    code = """
    pytestmark = pytest.mark.asyncio(loop_scope="module")

    @pytest.mark.tcp(no_leaks=True, closed_by="client")
    async def test_the_loop_does_not_run_afterwards(tcp_port):
        server = await asyncio.start_server(echo, sock=tcp_port.listen())
        _, writer = await asyncio.open_connection("127.0.0.1", tcp_port.number)
        await asyncio.sleep(0.01)
        writer.close()
        server.close()

    @pytest.mark.asyncio
    async def test_on_the_kernel(tcp, tcp_port):
        server = await asyncio.start_server(echo, sock=tcp_port.listen())
        reader, writer = await asyncio.open_connection("127.0.0.1", tcp_port.number)
        writer.write(b"x")
        assert await reader.read() == b"x"
        writer.close()
        assert await tcp.settled()
        tcp.assert_closed_by("server", port=tcp_port)
        tcp.assert_no_leak()
        server.close()

    @pytest.mark.tcp_sim(seeds=2)
    async def test_on_the_simulation():
        await asyncio.sleep(3600)

    @pytest.mark.tcp_sim
    class TestMethods:
        async def test_method(self):
            await asyncio.sleep(3600)
    """
    options = ("-ppytest_asyncio.plugin", f"--asyncio-mode={mode}")
    ini = "asyncio_default_fixture_loop_scope = function\nfilterwarnings = error"
    suite(code, *options, ini=ini, inside=False).assert_outcomes(passed=4)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_ordinary_user_sees_as_much(importable: Path, nobody: tuple[str, ...]) -> None:
    folder = importable / "suite"  # which that user can read as well
    folder.mkdir()
    (folder / "help.py").write_text(HELP)
    (folder / "test_suite.py").write_text(
        textwrap.dedent("""
        from help import *
        @pytest.mark.tcp(closed_by="client", no_leaks=True)
        def test_good(tcp_port): client_first(tcp_port)
        @pytest.mark.tcp(no_leaks=True)
        def test_bad(tcp_port): leak(tcp_port)
        """)
    )
    folder.chmod(0o755)
    done = subprocess.run(
        [*nobody, sys.executable, "-m", "pytest", "-p", "timewait.pytest_plugin", "-p",
         "no:cacheprovider", "test_suite.py"],
        env={
            **os.environ,
            "PYTHONPATH": str(importable),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert "1 failed, 1 passed" in done.stdout, done.stdout
    assert "tcp(no_leaks=True): 1 socket left open" in done.stdout

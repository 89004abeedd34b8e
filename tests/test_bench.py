"""The benchmark users run: its statistics, its courses, its document. No figure is asserted."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from attrs import evolve

from timewait.bench import Stat
from timewait.bench.closes import COURSES, FAMILIES, Close, Pace, Trial, closes, counters, foretell
from timewait.bench.compare import compare
from timewait.bench.ends import KINDS, available
from timewait.bench.ports import Bind, binds, churn
from timewait.bench.report import Report
from timewait.kernel.capture import Capture
from timewait.kernel.namespace import Namespace

PACE = Pace(least=0.0005, usual=0.001, most=0.002, turn=0.004)
DELAY = PACE.usual
SCHEMA = json.loads((Path(__file__).parent.parent / "docs" / "bench-schema.json").read_text())


def bench(*args: str, limit: float = 150, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command; again, where the machine was so slow that something was not measured."""
    command = [sys.executable, "-m", "timewait.bench", *args]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, **options)
        if "no time was left" not in done.stdout:
            break
    return done


def test_a_median_comes_with_its_spread() -> None:
    stat = Stat.of([float(n) for n in range(101)])
    assert stat is not None
    assert (stat.count, stat.median, stat.quantiles[0], stat.quantiles[20]) == (101, 50, 0, 100)
    assert stat.quantiles[5] == 25
    assert stat.spread == 0.5
    assert stat.passes == (50,)
    assert Stat.of() is None
    assert Stat.of([], []) is None


def test_each_pass_keeps_its_own_median() -> None:
    stat = Stat.of([1.0, 1.0, 1.0], [2.0, 4.0, 5.0])
    assert stat is not None
    assert (stat.median, stat.passes) == (1.5, (1, 4))


@pytest.mark.parametrize(
    ("course", "told", "settled", "holders"),
    [
        # In one-way trips: FIN; FIN, FIN of the other, its ACK; what a reset takes.
        ("server-first", 1, 3, ("server",)),
        ("clients-first", 1, 3, ("client",)),
        ("simultaneous", None, 2, ("both", "server", "client")),
        ("half-close", 1, 3, ("client",)),
        ("abort", 1, 1, (None,)),
        ("unread-data", 1, 1, (None,)),
    ],
)
def test_the_model_foretells_trips(
    course: str, told: int | None, settled: int, holders: tuple[Any, ...]
) -> None:
    model = foretell(COURSES[course], PACE)
    assert model.returned == 0
    assert model.told == (None if told is None else pytest.approx(told * DELAY))
    assert model.settled == pytest.approx(settled * DELAY)
    assert model.holders == holders


def test_a_library_that_reads_ahead_leaves_nothing_unread() -> None:
    assert foretell(COURSES["unread-data"], PACE, reads_ahead=True).holders == ("server",)


def test_the_model_follows_a_close_to_the_end_of_time_wait() -> None:
    moves = [(side, state) for _, side, state in foretell(COURSES["server-first"], PACE).moves]
    assert moves == [
        ("server", "FIN_WAIT_1"),
        ("client", "CLOSE_WAIT"),
        ("client", "LAST_ACK"),
        ("server", "FIN_WAIT_2"),
        ("server", "TIME_WAIT"),
        ("client", "CLOSED"),
        ("server", "CLOSED"),
    ]
    last = foretell(COURSES["server-first"], PACE).moves[-1]
    assert last[0] == pytest.approx(60, abs=0.1)


def test_every_kind_is_tried_here() -> None:
    assert [kind.name for kind in available()] == ["plain", "asyncio", "anyio", "uvloop", "trio"]


def found_of(*trials: Trial, passes: int = 1) -> list[Close | None]:
    """What the trials find in so many passes, all of them seen by a capture."""

    async def all_of_it(trial: Trial, capture: Capture) -> None:
        for _ in range(passes):
            await trial.run()
        await trial.listen(capture)

    with Capture() as capture:
        for trial in trials:
            trial.kind.run(lambda trial=trial: all_of_it(trial, capture))  # type: ignore[misc]
    return [trial.outcome(PACE) for trial in trials]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("course", COURSES)
def test_each_course_as_each_kind_of_program_does_it(course: str, kind: str) -> None:
    trial = Trial(KINDS[kind], COURSES[course], "ipv4", 3, 1)
    assert trial.outcome(PACE) is None
    (close,) = found_of(trial)
    assert close is not None
    assert close.holder in close.model.holders
    assert close.fault is None
    reads_ahead = kind in ("asyncio", "anyio", "uvloop")
    resets = course == "abort" or (course == "unread-data" and not reads_ahead)
    told = None if course == "simultaneous" else "RST" if resets else "FIN"
    assert close.how == told
    assert close.settled is not None
    assert close.settled.count == 3
    assert (close.told is None) == (course == "simultaneous")
    assert close.last_segment is not None
    assert close.last_segment.count == 3
    assert trial.quickest is not None
    assert 0 < trial.quickest < 0.1
    if course == "server-first":
        assert (close.holder, close.time_wait) == ("server", 1)


def test_over_ipv6_in_several_passes_and_beside_a_crowd() -> None:
    trial = Trial(KINDS["plain"], COURSES["clients-first"], "ipv6", 52, 2)
    assert trial.crowd == 2
    (close,) = found_of(trial, passes=2)
    assert close is not None
    assert (close.family, close.holder) == ("ipv6", "client")
    assert close.returned is not None
    assert close.returned.count == 2 * 2 * 50
    assert len(close.returned.passes) == 2
    assert FAMILIES["ipv6"][0] == socket.AF_INET6


@pytest.mark.parametrize(
    ("course", "bounds"),
    [
        # In one-way trips, the least and the most: 0.5 and 2 ms; and 4 ms for the program.
        ("server-first", {"returned": (0, 4), "told": (0.5, 6), "last_segment": (1, 8)}),
        ("abort", {"told": (0.5, 6), "last_segment": (0, 4), "settled": (0.5, 6)}),
        ("simultaneous", {"returned": (0, 4), "settled": (1, 8)}),
        # The peer does not close, so that its ACK comes alone: at once, or 200 ms later.
        ("orphan", {"told": (0.5, 6), "settled": (1, 208)}),
    ],
)
def test_what_the_model_allows_has_two_bounds(
    course: str, bounds: dict[str, tuple[float, float]]
) -> None:
    allowed = foretell(COURSES[course], PACE).allowed
    for name, (least, most) in bounds.items():
        assert allowed[name] == pytest.approx((least / 1000, most / 1000), abs=1e-6)


def close_of(*, holder: Any = "server", settled: float = 0.003, told: float = 0.001) -> Close:
    return Close(
        course="server-first", kind="plain", family="ipv4", connections=1, how="FIN",
        holder=holder, time_wait=1.0, returned=None, told=Stat.of([told]), last_segment=None,
        settled=Stat.of([settled]), model=foretell(COURSES["server-first"], PACE),
    )  # fmt: skip


def test_what_the_model_does_not_allow_is_outside() -> None:
    assert close_of().outside == ()
    assert close_of(holder="client").outside == ("holder",)
    assert close_of(holder=None).outside == ("holder",)
    assert close_of(settled=0.04).outside == ("settled",)  # waited for a delayed ACK
    assert close_of(settled=0.001).outside == ("settled",)  # sooner than segments travel
    assert close_of(told=0.0001, settled=0.04).outside == ("told", "settled")
    busy = Stat.of([0.003, 0.003, 0.003, 0.7, 0.7])
    assert evolve(close_of(), settled=busy).outside == ()
    hasty = Stat.of([0.0001, 0.003, 0.003, 0.003])
    assert evolve(close_of(), settled=hasty).outside == ("settled",)
    assert evolve(close_of(), fault="a segment too many").outside == ("segments",)


def test_closes_end_in_time_and_what_is_left_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [
        Trial(KINDS["plain"], COURSES[name], "ipv4", 1, 1) for name in ("abort", "server-first")
    ]
    pace: list[list[float]] = []
    late: list[float] = []  # a trial takes a hundred seconds, and there are as many
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + sum(late))
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("timewait.bench.closes.time", clock)
        closes(trials, time.monotonic() + 100, lambda: late.append(100), pace)
    found = Report({}, {}, False)
    found.look_at(trials, pace)
    assert [close.course for close in found.closes] == ["abort"]
    first, _ = found.left_out
    assert first == "server-first with plain over ipv4, 1 open: no time was left"
    assert found.pace is not None
    assert (found.pace.count, found.quickest) == (1, None)


def found_binds() -> list[Bind]:
    found: list[Bind] = []
    binds(COURSES, record=found.append)
    return found


def test_when_the_port_can_be_bound_again() -> None:
    found = {(bind.course, bind.reuse_address): bind for bind in found_binds()}
    assert len(found) == 14
    assert all(bind.inside for bind in found.values())
    for (course, reuse), bind in found.items():
        refused = not reuse and course in ("server-first", "simultaneous", "orphan")
        assert bind.kernel.errno == bind.model.errno == ("EADDRINUSE" if refused else None)
        if refused:
            assert bind.ratio == pytest.approx(1, abs=0.05)


@pytest.mark.wall
@pytest.mark.slow
def test_waited_for_all_side_by_side_the_ports_are_free_when_they_may_be() -> None:
    found: list[Bind] = []
    binds(["server-first", "simultaneous", "orphan"], wait=True, record=found.append)
    refused = [bind for bind in found if not bind.reuse_address]
    assert [bind.fault for bind in found] == [None] * 6
    for bind in refused:
        assert bind.kernel.waited is not None
        assert 59.9 < bind.kernel.waited < 70
        assert bind.model.waited == pytest.approx(60, abs=0.01)


def test_the_ports_run_out_exactly_when_the_model_says() -> None:
    off, on = churn(50, 0.3)
    assert (off.connections, off.model_connections, off.sustained) == (50, 50, 0)
    assert on.model_connections == 50
    # After a second in TIME_WAIT a port may be used again, before the last has been.
    assert on.connections == 50 or (on.inside and on.rate < 50)
    assert off.inside
    assert off.for_ever == off.machine_ports / 60
    assert not evolve(off, connections=49).inside


def test_counters_see_an_overflow() -> None:
    with Namespace() as place:
        before, after = place.call(_overflow)
    assert after["ListenOverflows"] > before["ListenOverflows"]


def _overflow() -> tuple[Any, Any]:
    before = counters()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        clients = []
        for _ in range(4):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            clients.append(client)
        time.sleep(0.05)
        for client in clients:
            client.close()
    return before, counters()


@pytest.fixture(scope="module")
def document(undisturbed: Callable[..., None]) -> Any:
    only = ("--only", "server-first", "--kind", "plain")
    found: list[Any] = []

    def measured() -> None:
        done = bench("--quick", "--seconds", "2", *only, "--json")
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        found[:] = [json.loads(done.stdout)]

    undisturbed(measured, times=4)
    return found[0]


def test_the_document_is_as_its_schema_says(document: Any) -> None:
    jsonschema.validate(document, SCHEMA)
    assert {close["connections"] for close in document["closes"]} == {1, 20}
    assert document["closes"][0]["holder"] == "server"
    bind, reusing = sorted(document["binds"], key=lambda bind: bind["reuse_address"])
    assert (bind["kernel"]["errno"], reusing["kernel"]["ok"]) == ("EADDRINUSE", True)


def report_of(document: Any) -> Report:
    from cattrs import Converter

    converter = Converter()
    return converter.structure(document, Report)


def scattered(document: Any, factor: float, seed: int) -> Any:
    """The same benchmark made again: each pass is off by chance, by a tenth or so."""
    random = Random(seed)
    again = json.loads(json.dumps(document))
    for close in again["closes"]:
        for name in ("returned", "told", "settled"):
            if stat := close[name]:
                passes = [stat["median"] * random.lognormvariate(0, 0.1) for _ in range(4)]
                stat |= {"passes": passes, "median": median(passes)}
    for key in ("median", "passes"):
        stat = again["closes"][1]["settled"]
        value = stat[key]
        stat[key] = [v * factor for v in value] if key == "passes" else value * factor
    return again


def test_benchmarks_that_are_alike_seldom_differ(document: Any) -> None:
    seeds = range(0, 100, 2)
    alarms = 0
    for seed in seeds:
        old, new = (scattered(document, 1, each) for each in (seed, seed + 1))
        alarms += bool(compare(old, report_of(new)).changed)
    assert alarms <= 6  # 2.5 are expected


def test_a_run_that_is_off_as_a_whole_is_no_change(document: Any) -> None:
    old, new = scattered(document, 1, 1), scattered(document, 1, 2)
    for document, factor in ((old, 1.0), (new, 1.3)):  # in many passes, so that they look sure
        for close in document["closes"]:
            for name in ("returned", "told", "settled"):
                stat = close[name]
                middle = stat["median"] * factor
                stat |= {"passes": [middle, middle * 1.05] * 10, "median": middle}
    assert compare(old, report_of(new)).changed == []


def test_what_became_slower_is_told_among_all_the_rest(document: Any) -> None:
    old, new = scattered(document, 1, 1), scattered(document, 3, 2)
    lines = told(compare(old, report_of(new)).table()).splitlines()
    changed = [line for line in lines if line.endswith("%")]
    assert [line.split(":")[0] for line in changed] == ["server-first plain ipv4 20"]
    assert "settled" in changed[0]
    assert "+" in changed[0]


def test_a_single_pass_says_nothing_about_noise(document: Any) -> None:
    once = json.loads(json.dumps(document))
    for close in once["closes"]:
        for name in ("returned", "told", "settled", "last_segment"):
            if stat := close[name]:
                stat["passes"] = [stat["median"]]
    compared = compare(once, report_of(document))
    assert (compared.step, compared.changed, compared.alike) == (None, [], 0)
    # Last segments, which have one pass in any run, are none of those that more time would help.
    assert compared.single_pass == sum(
        close[name] is not None
        for close in document["closes"]
        for name in ("returned", "told", "settled")
    )
    text = told(compared.table())
    assert "nothing could be compared" in text
    assert f"{compared.single_pass} were measured in a single pass" in text
    assert "--seconds" in text


def told(what: Any) -> str:
    from rich.console import Console

    out = Console(width=100)
    with out.capture() as capture:
        out.print(what)
    return capture.get()


def test_noise_is_the_bad_moments_to_the_good() -> None:
    found = Report({}, {}, False)
    found.look_at([], [[1.0] * 25, [3.0] * 25])
    assert found.noise == 3


def test_the_tables_fit_eighty_columns_and_the_plot_is_drawn(
    tmp_path: Path, undisturbed: Callable[..., None]
) -> None:
    plot = tmp_path / "bench.svg"
    only = ("--only", "abort", "--only", "simultaneous")

    def measured() -> None:
        done = bench("--quick", "--seconds", "2", *only, "--plot", str(plot))
        assert done.returncode == 0, done.stderr
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert "every figure lies inside what the model allows" in done.stdout

    undisturbed(measured, times=4)
    assert plot.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["--only", "party"], "'party' is not one of"),
        (["--plot", "x.pdf"], "ends in .svg or .png"),
        (["--plot", "/nowhere/x.svg"], "/nowhere/x.svg: cannot be written there"),
        (["--compare", "/nowhere.json"], "No such file"),
        (["--compare", "/etc/hostname"], "not JSON"),
        (["-n", "0"], "0 is not in the range"),
        (["--seconds", "0"], "0 is not in the range"),
        (["--seconds", "nan"], "not a number"),
        (["--plot", ""], "ends in .svg or .png"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], why: str) -> None:
    done = bench(*args)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_interrupted_it_prints_what_it_has() -> None:
    command = [sys.executable, "-m", "timewait.bench", "--json", "--kind", "plain"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    here = os.readlink("/proc/self/ns/net")
    while os.readlink(f"/proc/{child.pid}/ns/net") == here:  # until it is on its own
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, _ = child.communicate(timeout=150)
    assert child.returncode == 130
    if out:  # it had got so far as to measure
        told = json.loads(out)
        jsonschema.validate(told, SCHEMA)
        assert told["interrupted"] is True


def test_interrupted_while_it_loads_it_says_so_in_one_line() -> None:
    program = (
        "import runpy, sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'timewait.sim':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "runpy.run_module('timewait.bench', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "python -m timewait.bench: interrupted\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a namespace")
@pytest.mark.parametrize(
    ("prepared", "why"),
    [
        ("true", "loopback is down"),
        ("ip link set lo up; echo 32768 32777 > /proc/sys/net/ipv4/ip_local_port_range",
         "the 10 ephemeral ports ran out"),
    ],
)  # fmt: skip
def test_where_nothing_can_be_measured_one_line_says_why(prepared: str, why: str) -> None:
    here = ["unshare", "-n", "sh", "-c", f'{prepared}; exec "$0" "$@"']
    # (Time enough for the slowest machine: it ends as soon as it is known.)
    command = [
        *here,
        sys.executable,
        "-m",
        "timewait.bench",
        "--here",
        "--quick",
        "--seconds",
        "60",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert why in done.stderr


def test_a_narrow_terminal_cuts_no_cell_short() -> None:
    args = ["--quick", "--seconds", "1", "--only", "abort", "--kind", "plain"]
    done = bench(*args, env={**os.environ, "COLUMNS": "40"})
    assert "…" not in done.stdout
    assert "last segment" in done.stdout


@pytest.mark.parametrize("n", ["1", "2"])
def test_the_number_of_connections_is_what_it_is_said_to_be(n: str) -> None:
    args = ["--quick", "--seconds", "1", "--only", "abort", "--kind", "plain", "-n", n, "--json"]
    closes = json.loads(bench(*args).stdout)["closes"]
    assert {close["connections"]: close["settled"]["count"] > 2 for close in closes}[1]
    assert {close["connections"] for close in closes} == {1, int(n)}


A_CLOSE = dict.fromkeys(("returned", "told", "last_segment", "settled")) | {
    "course": "abort", "kind": "plain", "family": "ipv4", "connections": 1,
}  # fmt: skip
NO_STATISTICS = {"count": 1, "median": 1.0, "passes": ["a", "b"], "quantiles": []}


@pytest.mark.parametrize(
    "document",
    [
        "{}",
        '{"schema": 1, "closes": []}',
        json.dumps({"schema": 2, "closes": [A_CLOSE | {"told": 5}]}),
        json.dumps({"schema": 2, "closes": [A_CLOSE | {"told": NO_STATISTICS}]}),
        json.dumps({"schema": 2, "closes": [A_CLOSE | {"told": NO_STATISTICS | {"passes": 5}}]}),
    ],
)
def test_a_document_that_is_none_is_refused_before_the_run(document: str, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(document)
    # All that is measured would take longer.
    done = bench("--connections", "1000", "--compare", str(old), limit=50)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{old}: it" in done.stderr
    assert done.stderr.count("\n") == 1


SHORT = ("--quick", "--seconds", "1", "--only", "abort", "--kind", "plain")


def test_a_comparison_is_part_of_the_document(document: Any, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document))
    done = bench(*SHORT, "--json", "--compare", str(old))
    again = json.loads(done.stdout)
    jsonschema.validate(again, SCHEMA)
    assert again["compared"]["same_machine"] is True
    assert again["compared"]["in_one_only"] > 0  # another course
    assert again["compared"]["step"] is None
    assert "compared" not in document


def test_a_full_disk_is_one_line_and_a_reader_gone_is_no_fault_of_the_figures() -> None:
    command = [sys.executable, "-m", "timewait.bench", *SHORT]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=150)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "No space left on device" in done.stderr
    read, write = os.pipe()
    os.close(read)
    gone = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=150)
    os.close(write)
    assert (gone.returncode, gone.stderr) == (141, "")


def test_a_plot_takes_no_namespace_from_an_ordinary_user(
    importable: Path, nobody: tuple[str, ...]
) -> None:
    command = [*nobody, sys.executable, "-m", "timewait.bench", *SHORT, "--json"]
    with TemporaryDirectory(dir="/dev/shm") as place:
        os.chmod(place, 0o777)
        isolated = [
            json.loads(
                subprocess.run(
                    [*command, *more],
                    capture_output=True,
                    timeout=150,
                    env={**os.environ, "HOME": place, "PYTHONPATH": str(importable)},
                ).stdout
            )["isolated"]
            for more in ([], ["--plot", f"{place}/x.svg"])
        ]
    assert isolated[0] == isolated[1]

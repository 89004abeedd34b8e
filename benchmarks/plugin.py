"""The pytest plugin where nobody uses it: a suite takes no longer for having it installed.

Installed as its wheel lists it, beside pytest and nothing else: found by its entry point, its
list of files read (to which pip adds the byte code). The tests are empty, which is the worst
case: any real test makes the share smaller. Nearly all of it is pytest's start, so a suite is
held to one per cent, half a second of nothing; and beside it stand thirty tests, which are hardly
more than the start, and an empty module in the plugin's place there: what pytest itself does for
whatever plugin a package of as many files brings.

One per cent is far less than what two runs' times differ by on a machine that others use, so it
is the instructions that are held to it, as valgrind counts them: alike in every run, but for when
the garbage collector happens to come. The times are told beside them, runs with and without
taking turns and the order swapped each time: the median of the pairs' ratios, with the interval
that holds it in 19 of 20 cases.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import median

import timewait
from benchmarks import Figure

SUITE = """
import pytest

@pytest.mark.parametrize("n", range({each}))
def test_parametrized(n):
    pass

class TestMethods:
{methods}

{functions}
"""


def measure(quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as directory:
        without = _installed(Path(directory, "without"), plugin=None)
        with_it = _installed(Path(directory, "with"), plugin="timewait.pytest_plugin")
        empty = _installed(Path(directory, "empty"), plugin="empty")
        small = _suite(Path(directory), 10)
        large = _suite(Path(directory), 150 if quick else 300)
        unused = "plugin installed and unused"
        counted = [
            (large, with_it, unused, 1.01),
            (small, with_it, unused, None),
            (small, empty, "an empty module in its place", None),
        ]
        for suite, site, what, target in counted if shutil.which("valgrind") else ():
            yield Figure(
                f"pytest, {3 * int(suite.name)} empty tests, {what}",
                _instructions(suite, site) / 1e6,
                "million instructions",
                "not installed",
                _instructions(suite, without) / 1e6,
                target=target,
                lower_is_better=True,
            )
        pairs = 5 if quick else 30
        for site in (without, with_it):
            _seconds(large, site)  # byte code and disk caches
        times: dict[Path, list[float]] = {without: [], with_it: []}
        for pair in range(pairs):
            for site in (without, with_it)[:: 1 if pair % 2 else -1]:
                times[site].append(_seconds(large, site))
        ratios = sorted(a / b for a, b in zip(times[with_it], times[without], strict=True))
        # The median lies between these two of the sorted ratios (a binomial at one half).
        low = max(0, int(pairs / 2 - 0.98 * sqrt(pairs)))
        middle = median(times[without])
        yield Figure(
            "the same in time",
            middle * median(ratios),
            "s of CPU",
            "not installed",
            middle,
            target=None if shutil.which("valgrind") else 1.01,
            lower_is_better=True,
            note=f"{pairs} pairs, 95 %: {ratios[low]:.3f} to {ratios[-1 - low]:.3f}",
        )


def _suite(directory: Path, each: int) -> Path:
    suite = directory / str(each)
    suite.mkdir()
    methods = "\n".join(f"    def test_{n}(self): pass" for n in range(each))
    functions = "\n".join(f"def test_{n}(): pass" for n in range(each))
    code = SUITE.format(each=each, methods=methods, functions=functions)
    (suite / "test_suite.py").write_text(code)
    return suite


def _installed(site: Path, plugin: str | None) -> Path:
    """Make this directory one with pytest, and timewait if wanted, as pip leaves them."""
    site.mkdir()
    wanted, found = ["pytest"], set()
    while wanted:
        package = importlib.metadata.distribution(wanted.pop())
        if package.metadata["Name"] in found:
            continue
        found.add(package.metadata["Name"])
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(package.locate_file(top))))
        needs = [line for line in package.requires or () if "extra ==" not in line]
        for name in (re.split(r"[^\w.-]", line)[0] for line in needs):
            try:
                importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # for another system or an older Python
            wanted.append(name)
    if plugin:
        home = Path(timewait.__file__).parent
        (site / "timewait").symlink_to(home)
        (site / "empty.py").touch()
        info = site / f"timewait-{timewait.__version__}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: timewait\nVersion: {timewait.__version__}\n")
        (info / "entry_points.txt").write_text(
            f"[console_scripts]\ntimewait = timewait.cli:main\n\n[pytest11]\ntimewait = {plugin}\n"
        )
        files = [path.relative_to(home.parent) for path in sorted(home.rglob("*.py"))]
        (info / "RECORD").write_text("".join(f"{file},sha256={'0' * 43},4096\n" for file in files))
    return site


@cache
def _instructions(suite: Path, site: Path) -> int:
    """How many instructions of the processor one pytest run takes, its start included."""
    _run(suite, site)  # byte code
    counting = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
    return int(re.findall(r"Collected : (\d+)", _run(suite, site, *counting).stderr)[0])


def _seconds(suite: Path, site: Path) -> float:
    """CPU seconds of one pytest run, its start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(suite, site)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(suite: Path, site: Path, *under: str) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONDONTWRITEBYTECODE", "PYTEST_DISABLE_PLUGIN_AUTOLOAD", "PYTEST_ADDOPTS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {
        "PYTHONPYCACHEPREFIX": str(site.parent / "byte-code"),
        "PYTHONPATH": str(site),
        "PYTHONHASHSEED": "0",  # or the dictionaries differ from run to run, and so their cost
    }
    return subprocess.run(
        [*under, sys.executable, "-S", "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=suite,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )

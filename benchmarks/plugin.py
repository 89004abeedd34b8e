"""The pytest plugin where nobody uses it: a suite takes no longer for having it installed.

The tests are empty, which is the worst case: any real test makes the share smaller.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import timewait
from benchmarks import Figure

SUITE = """
import pytest

@pytest.mark.parametrize("n", range({parameters}))
def test_parametrized(n):
    pass

class TestMethods:
{methods}

{functions}
"""


def measure(quick: bool) -> Iterator[Figure]:
    each, pairs = (150, 5) if quick else (700, 15)
    with tempfile.TemporaryDirectory() as directory:
        code = SUITE.format(
            parameters=each,
            methods="\n".join(f"    def test_{n}(self): pass" for n in range(each)),
            functions="\n".join(f"def test_{n}(): pass" for n in range(each)),
        )
        Path(directory, "test_suite.py").write_text(code)
        _seconds(directory, with_plugin=True)  # byte code and disk caches
        _seconds(directory, with_plugin=False)
        with_it, without = [], []
        for _ in range(pairs):
            with_it.append(_seconds(directory, with_plugin=True))
            without.append(_seconds(directory, with_plugin=False))
    # Noise only ever adds: the quietest run of each side is compared.
    yield Figure(
        f"pytest, {3 * each:,} empty tests, plugin installed and unused",
        min(with_it),
        "s of CPU",
        "without the plugin",
        min(without),
        target=1.01,
        lower_is_better=True,
    )


def _seconds(directory: str, *, with_plugin: bool) -> float:
    """CPU seconds of one pytest run, its start included."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(("-p", "timewait.pytest_plugin") if with_plugin else ()),
        ],
        cwd=directory,
        env={
            **kept,
            "PYTHONPYCACHEPREFIX": os.path.join(directory, "byte-code"),  # as pip would leave it
            "PYTHONPATH": str(Path(timewait.__file__).parent.parent),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        check=True,
        stdout=subprocess.DEVNULL,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

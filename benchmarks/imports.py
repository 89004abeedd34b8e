"""What `import timewait` costs: a library that test suites load must be cheap to load."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from benchmarks import Figure

LOADED = "import sys; old = set(sys.modules); {}; print(len(set(sys.modules) - old))"
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def milliseconds(statement: str, runs: int) -> float:
    command = [sys.executable, "-c", TIMED.format(statement)]
    return 1000 * median(float(subprocess.check_output(command, text=True)) for _ in range(runs))


def modules(statement: str) -> int:
    return int(subprocess.check_output([sys.executable, "-c", LOADED.format(statement)]))


def measure(quick: bool) -> Iterator[Figure]:
    runs = 5 if quick else 15
    yield Figure("import timewait", milliseconds("import timewait", runs), "ms", target=100,
                 lower_is_better=True)  # fmt: skip
    yield Figure(
        "from timewait import Scenario",
        milliseconds("from timewait import Scenario", runs),
        "ms",
        peer="import asyncio",
        theirs=milliseconds("import asyncio", runs),
        lower_is_better=True,
    )
    yield Figure(
        "modules that import timewait loads",
        modules("import timewait"),
        "",
        peer="import asyncio",
        theirs=modules("import asyncio"),
        lower_is_better=True,
    )

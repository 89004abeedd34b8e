"""TCP socket lifecycles: who closed first, who is left in TIME_WAIT, when the port is free.

Public names are loaded when first used, so that `import timewait` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME: dict[str, str] = {
    "Answers": "timewait.check.questions",
    "Checker": "timewait.check.checker",
    "Divergence": "timewait.check.verdict",
    "Evidence": "timewait.check.verdict",
    "Explanation": "timewait.explain",
    "HeldPort": "timewait.port",
    "Run": "timewait.run",
    "Scenario": "timewait.scenario",
    "ScenarioError": "timewait.scenario",
    "State": "timewait.tcp.states",
    "StepHung": "timewait.orchestrator",
    "UnusedPort": "timewait.connections",
    "Witness": "timewait.witness",
    "Verdict": "timewait.check.verdict",
    "Watch": "timewait.watching",
    "WireLab": "timewait.lab.wire",
    "answers": "timewait.check.questions",
    "check_events": "timewait.check.checker",
    "explain_bind": "timewait.explain",
    "hold_port": "timewait.port",
    "wait_until_bindable": "timewait.watching",
    "wait_until_bindable_sync": "timewait.watching",
    "watch": "timewait.watching",
    "wire": "timewait.lab.wire",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    try:
        module = import_module(_HOME[name])
    except KeyError:
        raise AttributeError(f"module 'timewait' has no attribute {name!r}") from None
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

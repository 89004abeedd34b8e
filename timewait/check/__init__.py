"""The check: does TCP allow what was seen, and if not, where did it first go wrong and why?"""

from __future__ import annotations

from timewait.check.checker import Checker, Connection, check, check_events
from timewait.check.questions import Answers, answers
from timewait.check.verdict import Divergence, Evidence, Verdict

__all__ = [
    "Answers",
    "Checker",
    "Connection",
    "Divergence",
    "Evidence",
    "Verdict",
    "answers",
    "check",
    "check_events",
]

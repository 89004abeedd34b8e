"""What has changed between two benchmarks, noise considered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from timewait.bench import Stat
from timewait.bench.closes import TIMES
from timewait.bench.report import SCHEMA, Report

__all__ = ["compare"]


def compare(old: Mapping[str, Any], new: Report) -> RenderableType:
    return Text("")


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[str, Stat]]:
    try:
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, not {SCHEMA}")
        for close in document["closes"]:
            where = f"{close['course']} {close['kind']} {close['family']} {close['connections']}"
            for time, words in TIMES.items():
                if close[time]:
                    yield f"{where}: {words}", Stat(**close[time])
    except (KeyError, TypeError) as wrong:
        raise ValueError(f"it is no document of this benchmark ({wrong})") from None

"""Events from a file: JSON Lines as `timewait run --events` writes them, or pcap and pcapng.

Whatever is wrong with the file is told with its line, and what can be read
is still yielded.
"""

from __future__ import annotations

import errno
import gzip
import zlib
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from typing import Final

from timewait import events
from timewait.events import Event, Lost, RunStarted

__all__ = ["read"]

_JITTER: Final = 0.001  # two processors' stamps may be so far out of order
_GZIP: Final = b"\x1f\x8b"
_MAGIC: Final = frozenset(
    bytes.fromhex(magic) for magic in ("a1b2c3d4", "d4c3b2a1", "a1b23c4d", "4d3cb2a1", "0a0d0d0a")
)


def read(path: Path, tell: Callable[[str], object]) -> Iterator[Event]:
    """The file's events, in its order; `tell` hears of each fault, with its line.

    "-" is standard input. What is read may be a pipe: it is opened and read once.
    It may be compressed with gzip, as captures often are.

    Raises `OSError` where the file cannot be read, or decompressed to its end.
    """
    piped = str(path) == "-"
    with open(0 if piped else path, "rb", closefd=not piped) as file:
        if file.peek(2)[:2] != _GZIP:
            yield from _read(file, tell)
            return
        with gzip.open(file) as whole:
            try:
                yield from _read(whole, tell)
            except (EOFError, zlib.error, gzip.BadGzipFile) as why:
                raise OSError(errno.EBADMSG, f"not a whole gzip file: {why}") from None


def _read(file: BufferedReader | gzip.GzipFile, tell: Callable[[str], object]) -> Iterator[Event]:
    if file.peek(4)[:4] in _MAGIC:
        yield from import_module("timewait.kernel.capture").read(file, tell)
    else:
        yield from _events(file, tell)


def _events(file: BufferedReader | gzip.GzipFile, tell: Callable[[str], object]) -> Iterator[Event]:
    number = 0

    def lines() -> Iterator[bytes]:
        nonlocal number
        for number, line in enumerate(file, 1):  # noqa: B007
            yield line

    said = ""

    def problem(what: events.Problem) -> None:
        nonlocal said
        said = str(what)
        tell(said)

    last: dict[tuple[str, str], float] = {}
    heads = 0
    for event in events.read(lines(), problem):
        if isinstance(event, Lost) and event.source == events.REST and event.why != said:
            tell(event.why)
        if isinstance(event, RunStarted):
            heads += 1
            if heads > 1:
                tell(f"line {number}: another run begins here; it is checked by itself")
                last.clear()
        source = (event.kind, getattr(event, "source", ""))
        before = last.get(source, event.t)
        if event.t < before - _JITTER and not isinstance(event, Lost):
            by = source[1] or source[0]
            late = f"{before - event.t:.6f} s before the last of {by}"
            why = f"line {number}: out of order, {late}; left out"
            tell(why)
            # It was seen by somebody: it must not be missed by the check.
            yield Lost(event.t, "file", 1, why)
            continue
        last[source] = max(event.t, before)
        yield event
        if isinstance(event, RunStarted) and heads > 1:
            # The two may be mixed: nothing is taken to have been seen from its beginning.
            yield Lost(event.t, "file", 0, "another run began before")

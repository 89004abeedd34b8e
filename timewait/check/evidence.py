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
from timewait.events import Event, Lost, RunEnded, RunStarted

__all__ = ["REST", "read"]

REST: Final = "rest of the file"  # the observer that has lost what was never written
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

    left_out = cut = ""

    def problem(what: events.Problem) -> None:
        nonlocal left_out, cut
        tell(str(what))
        if "cut off" in what.why:
            cut = str(what)
        elif "passed over" not in what.why and "newer than" not in what.why:
            left_out = str(what)

    last: dict[tuple[str, str], float] = {}
    heads = 0
    ended = False

    def rest() -> Iterator[Event]:
        """What follows the last event, if the stream does not say that nothing does.

        Each observer writes when it has been read: the others' share of the last moments is lost.
        """
        if (ended and not cut) or not last:
            return
        if not cut:
            tell(_NO_END)
        lanes = [t for (kind, _), t in last.items() if kind in ("call", "transition", "segment")]
        yield Lost(min(lanes, default=0.0), REST, 0, cut or _NO_END)

    for event in events.read(lines(), problem):
        if isinstance(event, RunStarted):
            yield from rest()
            heads += 1
            if heads > 1:
                tell(f"line {number}: another run begins here; it is checked by itself")
                last.clear()
            last.update(dict.fromkeys(_declared(event), event.t))
        source = (event.kind, getattr(event, "source", ""))
        before = last.get(source, event.t)
        if event.t < before - _JITTER:
            by = source[1] or source[0]
            left_out = (
                f"line {number}: out of order, {before - event.t:.6f} s before the last of {by}"
            )
            tell(left_out + "; left out")
        # What is left out was seen by somebody: it must not be missed by the check.
        if left_out:
            yield Lost(min(before, event.t), "file", 1, left_out)
            left_out = ""
        ended = isinstance(event, RunEnded)
        if event.t >= before - _JITTER and not ended:
            last[source] = max(event.t, before)
            yield event
        if isinstance(event, RunStarted) and heads > 1:
            # The two may be mixed: nothing is taken to have been seen from its beginning.
            yield Lost(event.t, "file", 0, "another run began before")
    yield from rest()


_NO_END: Final = (
    "the file does not say where it ends: its writer was stopped, or wrote schema 1, which has no "
    "such record"
)


def _declared(head: RunStarted) -> Iterator[tuple[str, str]]:
    """Who will report, as far as the head says."""
    if head.scenario is not None:
        yield "call", ""
    for word, kind in (("tracepoint", "transition"), ("capture", "segment")):
        if word in head.observer:
            yield kind, word

"""packetdrill scripts, read and run in pure Python: on the model or on the live kernel.

packetdrill (https://github.com/google/packetdrill) is the language in which
TCP stacks are tested. `script` reads it to immutable data, `runner` says what
a script means, `on_kernel` and `on_model` are the two stacks it can mean it to.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from timewait.packetdrill.runner import Outcome, TooLate, run
from timewait.packetdrill.script import Unsupported, parse
from timewait.packetdrill.settings import Settings

__all__ = ["Outcome", "play", "read"]

_TRIES = 3
_LONGEST = 300  # characters of a script that an answer repeats
_MOST_OCTETS = (1 << 22) + 1  # read of a file: those are more characters than a script may have


def read(path: Path | str) -> str:
    """A script's text, as much of it as one may have.

    Raises `OSError`, with the path, where it cannot be read, or is a FIFO that
    nobody writes to.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            begun = b""
            if stat.S_ISFIFO(os.fstat(fd).st_mode):
                try:
                    begun = os.read(fd, 1)
                    if not begun:
                        raise OSError(errno.EPIPE, "a FIFO that nobody writes to")
                except BlockingIOError:
                    pass  # its writer has yet to begin
            os.set_blocking(fd, True)
            return (begun + file.read(_MOST_OCTETS)).decode("utf-8", "replace")
    except OSError as trouble:
        raise OSError(trouble.errno, trouble.strerror, str(path)) from None


def play(
    path: Path | str,
    *,
    text: str | None = None,
    on: str = "model",
    profile: str = "linux",
    defines: Mapping[str, str] | None = None,
    options: Iterable[tuple[str, str]] = (),
) -> Outcome:
    """Run one script on "model" or "kernel" and say how it ended.

    `text` is what is in it where that has been read. `defines` are names for
    `#ifdef` and words of the script, `options` (name, value) what packetdrill's
    own command line takes, such as ("ip_version", "ipv6").

    On the kernel a run in which this process missed an event's time, or saw
    one of the kernel's at a wrong time, may only say that the machine was busy:
    it is repeated, up to three times in all.

    Raises `OSError` where the file cannot be read, or (on the kernel) there can
    be no wire.
    """
    if text is None:
        text = read(path)
    try:
        script = parse(text, str(path), defines, options)
        settings = Settings.of(script)
    except Unsupported as unsupported:
        return Outcome(str(path), "unsupported", unsupported.line, unsupported.what[:_LONGEST])
    except RecursionError:
        return Outcome(str(path), "unsupported", None, "nested too deeply")
    if on == "model":
        from timewait.packetdrill.on_model import ModelStack

        with ModelStack(settings, profile) as model:
            return run(script, model, settings)

    from timewait.packetdrill.on_kernel import KernelStack, undisturbed

    for _ in range(_TRIES):
        try:
            with undisturbed(), KernelStack(settings) as stack:
                outcome = run(script, stack, settings)
        except TooLate as missed:
            outcome = Outcome(str(path), "failed", missed.line, str(missed), untimely=True)
        if not outcome.untimely:
            break
    return outcome

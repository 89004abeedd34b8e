"""tracefs: what the kernel records for us, in instances that are ours alone.

It is mounted for one process and nowhere. An instance carries its owner's
process id and is locked while it is in use, in whichever PID namespace; one
whose owner was killed is removed by the next to start, or at once where a
process was left to wait for that (`guard`).
Sources: Documentation/trace/ftrace.rst (instances), fsopen(2), fsmount(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import itertools
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

__all__ = ["guard", "in_first_pid_namespace", "instance", "root", "sweep"]

# include/uapi/linux/mount.h; these numbers are the same on every architecture.
_FSOPEN: Final = 430
_FSCONFIG: Final = 431
_FSMOUNT: Final = 432
_FSCONFIG_CMD_CREATE: Final = 6

_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO in include/linux/proc_ns.h
_OURS: Final = re.compile(r"timewait-[\d-]+")
# They cannot be removed before the last descriptor of who was killed is closed.
_REMOVE_THEM: Final = """
while read -r each; do set -- "$@" "$each"; done
for _ in 1 2 3 4 5 6 7 8 9; do rmdir "$@" && break; sleep 0.1; done
"""

_serial = itertools.count()


def root(resources: ExitStack) -> Path:
    """Where tracefs is: mounted for us alone and nowhere, or where the system has it.

    Raises `PermissionError` or `OSError` that says why it cannot be had.
    """
    if os.geteuid() == 0:
        try:
            mount = _mount()
        except OSError as error:
            if error.errno == errno.ENODEV:
                raise OSError(errno.ENODEV, "this kernel has no tracefs") from None
        else:
            resources.callback(os.close, mount)
            return Path(f"/proc/self/fd/{mount}")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("tracefs "):
            there = Path(left.split()[4].encode().decode("unicode_escape"))
            if os.access(there / "instances", os.W_OK):
                return there
    who = "root" if os.geteuid() else "root's own rights, CAP_SYS_ADMIN outside of containers"
    raise PermissionError(errno.EPERM, f"tracepoints need {who} (tracefs is closed to this user)")


def instance(root: Path, resources: ExitStack, guard: IO[bytes] | None = None) -> Path:
    """Make an instance that records nothing yet; it is removed with the resources."""
    pid, lock = os.getpid(), None
    while lock is None:  # else there was one of this name, or the sweep of another had it
        home = root / "instances" / f"timewait-{pid}-{next(_serial)}"
        if guard is not None:
            guard.write(b"%s\n" % bytes(home))
        with suppress(FileExistsError):
            home.mkdir()
            lock = _lock(home)
    resources.callback(os.close, lock)
    resources.callback(_remove, home, pid)
    (home / "trace_clock").write_text("mono")
    (home / "trace_options").write_text("norecord-cmd")  # which is noted at each switch
    with suppress(FileNotFoundError):  # since Linux 5.0
        (home / "buffer_percent").write_text("0")  # who waits for it is woken by the first event
    return home


@contextmanager
def guard(root: Path) -> Iterator[IO[bytes]]:
    """What is told here is removed when this process is no more, however it ended."""
    with subprocess.Popen(
        ["/bin/sh", "-c", _REMOVE_THEM],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        pass_fds=[int(root.name)] if root.is_relative_to("/proc/self/fd") else [],
        start_new_session=True,  # a signal to our group is not for it
    ) as process:
        assert process.stdin is not None
        try:
            yield process.stdin
        finally:
            process.kill()


def sweep(root: Path) -> None:
    """Remove what processes left that are no more."""
    for left in (root / "instances").iterdir():
        if _OURS.fullmatch(left.name) and (lock := _lock(left)) is not None:
            with suppress(OSError):
                left.rmdir()
            os.close(lock)


def in_first_pid_namespace() -> bool:
    """Whether processes have here the numbers that the kernel itself knows them by."""
    return os.stat("/proc/self/ns/pid").st_ino == _FIRST_PID_NAMESPACE


def _lock(instance: Path) -> int | None:
    """A descriptor that locks it until its process ends; None where another has it, or it goes."""
    try:
        lock = os.open(instance, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(instance), os.fstat(lock)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _remove(instance: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child lets go of its descriptors only
    with suppress(OSError):
        (instance / "events/enable").write_text("0")
    instance.rmdir()


def _mount() -> int:
    """A descriptor of a tracefs that is mounted nowhere and ends with the descriptor."""
    context = _syscall(_FSOPEN, ctypes.c_char_p(b"tracefs"), 1)
    try:
        _syscall(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


def _syscall(number: int, *arguments: object) -> int:
    result: int = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result

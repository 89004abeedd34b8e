"""Which processes hold a socket, and with which options, as far as this user may look.

sock_diag tells a socket's inode; `/proc/PID/fd` tells who has it open. A
process of another user or another container shows nothing, unless one is root.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import frozen

__all__ = ["Process", "may_be_a_daemon", "owners", "reuse_options", "user_name"]

_PIDFD_GETFD: Final = 438  # since Linux 5.6, the same on every architecture
_FORKED: Final = 0x40  # PF_FORKNOEXEC: forked, and has not called execve(2)
_FLAGS: Final = re.compile(r"^flags:\s*([0-7]+)$", re.MULTILINE)
_LINK: Final = re.compile(r"socket:\[(\d+)\]")


@frozen
class Process:
    """A process that has a socket open, as its descriptor `fd`.

    `inherited` says that it looks like the heir of one that has ended: its
    parent is not of the session or the group that it was born in, or runs
    another program although it was forked and has run none itself, so
    somebody has adopted it. One that has run a program since it was born and
    has a socket that this would have closed made that itself.
    `state` is its letter in proc_pid_stat(5).
    """

    pid: int
    name: str
    fd: int
    inherited: bool = False
    state: str = ""


def owners(inodes: Iterable[int]) -> dict[int, list[Process]]:
    """The processes that hold each of these sockets, by inode; those that may be seen."""
    wanted = frozenset(inodes) - {0}
    found: dict[int, list[Process]] = {}
    if not wanted or not os.path.isdir("/proc/self/fd"):
        return found
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        for directory in _descriptors(f"/proc/{pid}"):
            with suppress(OSError):  # it has ended meanwhile, or is another user's
                for descriptor in os.listdir(directory):
                    with suppress(OSError):  # closed meanwhile
                        link = _LINK.fullmatch(os.readlink(f"{directory}/{descriptor}"))
                        if link is not None and int(link[1]) in wanted:
                            process = _process(int(pid), int(descriptor))
                            found.setdefault(int(link[1]), []).append(process)
    return found


def _descriptors(process: str) -> Iterator[str]:
    """Where a process's descriptors are: at a living thread, where the first has ended."""
    yield f"{process}/fd"
    with suppress(OSError):
        if Path(f"{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            for thread in os.listdir(f"{process}/task"):
                if thread != os.path.basename(process):
                    yield f"{process}/task/{thread}/fd"
                    return


def _process(pid: int, fd: int) -> Process:
    name, state, parent, group, session = _family(pid)
    heir = False
    with suppress(OSError):  # its family may be hidden (hidepid= in proc(5)), or have ended
        heir = (
            pid not in (group, session)
            and (_adopted(parent, group, session) or _forked_by_another(pid, parent))
            and not _made_it(pid, fd)
        )
    return Process(pid, name, fd, heir, state)


def _adopted(parent: int, group: int, session: int) -> bool:
    """Whether its parent is not the one it was born to, as far as that shows.

    It was born in its parent's session, and in its parent's group, unless a
    shell put it into a pipeline's, whose leader is the shell's child as well.
    A first process that never began a session (0) is no such shell.
    """
    its_group, its_session = _family(parent)[3:]
    if its_session != session or its_group == group:
        return its_session != session
    try:
        return (parent == 1 and session == 0) or _family(group)[2] != parent
    except OSError:  # the leader has ended
        return parent == 1


def may_be_a_daemon(pid: int) -> bool:
    """Whether its session's leader has ended, as that of a daemon that has forked twice.

    Such a one looks like the heir of who began the session, whenever it opened its sockets.
    """
    try:
        session = os.getsid(pid)
    except OSError:  # it has ended meanwhile
        return False
    return session != 0 and not os.path.exists(f"/proc/{session}")


def _forked_by_another(pid: int, parent: int) -> bool:
    """Whether it is a plain copy of a process, and that cannot be its parent.

    The kernel puts a program's stack elsewhere each time it is run, and a fork leaves it there.
    Where its parent may not be looked into, nothing is known (a stack at 0).
    """
    _, mine = _stat(pid)
    if not parent or not int(mine[6]) & _FORKED:
        return False
    _, theirs = _stat(parent)
    return 0 not in (int(mine[25]), int(theirs[25])) and mine[25] != theirs[25]


def _made_it(pid: int, fd: int) -> bool:
    """Whether it has opened the descriptor since it began its program: execve(2) would close it."""
    if int(_stat(pid)[1][6]) & _FORKED:
        return False
    flags = _FLAGS.search(Path(f"/proc/{pid}/fdinfo/{fd}").read_text())
    return flags is not None and bool(int(flags[1], 8) & os.O_CLOEXEC)


def _family(pid: int) -> tuple[str, str, int, int, int]:
    """A process's name, state, parent, group and session; zeros for the kernel's own 0."""
    if not pid:
        return "", "", 0, 0, 0
    name, (state, parent, group, session, *_) = _stat(pid)
    return name, state, int(parent), int(group), int(session)


def _stat(pid: int) -> tuple[str, list[str]]:
    """A process's name, and the fields of proc_pid_stat(5) from the third on, its state."""
    # The name is in brackets and may hold any character.
    left, _, right = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    return left.partition("(")[2], right.split()


def user_name(uid: int) -> str:
    """The user's name, or the number where it has none."""
    try:
        import pwd
    except ImportError:  # not a Unix
        return str(uid)
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def reuse_options(process: Process) -> tuple[bool, bool] | None:
    """Whether its socket has SO_REUSEADDR and SO_REUSEPORT; None where we may not look.

    Found by asking a duplicate of its descriptor (pidfd_getfd(2)), which
    changes nothing for the process.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except (OSError, AttributeError):
        return None
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(_PIDFD_GETFD, pidfd, process.fd, 0)
        if fd < 0:
            return None
    finally:
        os.close(pidfd)
    try:
        with socket.socket(fileno=fd) as copy:
            return (
                copy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) != 0,
                copy.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) != 0,
            )
    except OSError:
        return None

"""What happens while process 1 has the processor, where programs of others do not run then.

Some kernels run no BPF program of another process's while process 1 runs, in
the timers of others that interrupt it either. A perf event of that process's
threads is recorded there. It is in its processor's list only while such a
thread has it, so that everybody else pays a few nanoseconds; and it goes with
its descriptors, whatever ends us.
Sources: perf_event_open(2), include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, TypeAlias

__all__ = ["Process1", "is_kept_apart"]

_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_FIRST_PID_NAMESPACE: Final = 0xEFFFFFFC  # PROC_PID_INIT_INO in include/linux/proc_ns.h
_THREADS: Final = Path("/proc/1/task")

_SYS_PERF_EVENT_OPEN: Final = 298  # x86_64, where alone there is a program to stand in for
_TRACEPOINT, _TIME, _RAW, _CLOSE_ON_EXEC = 2, 1 << 2, 1 << 10, 1 << 3
_INHERIT, _USE_CLOCK, _BY_THREADS_ONLY, _MONOTONIC = 1 << 1, 1 << 25, 1 << 35, 1
_SET_OUTPUT, _SET_FILTER = 0x2405, 0x40082406
_PAGES: Final = 16  # of a processor's ring: a power of two
_HEAD, _TAIL = 1024, 1032  # in the page before them
_WORD: Final = struct.Struct("@Q")  # read as a whole
_RECORD: Final = struct.Struct("=I2xHQ")  # its kind and length, then a time or what lost it
_LOST, _SAMPLE = 2, 9

Sample: TypeAlias = tuple[int, bytes, int]  # when (ns), and where the tracepoint's fields are


def is_kept_apart() -> bool:
    """Whether this kernel does so: its `bpf_prog_aux` tells whose a program is.

    What a program misses then is not counted among its `recursion_misses`.
    """
    return b"\0init_owned\0" in _BTF.read_bytes()


class Process1:
    """Records the tracepoint of this number in the threads of process 1 from now on.

    `condition` filters as in tracefs. Needs root (CAP_PERFMON), and the first
    PID namespace: process 1 of another is another. Raises `OSError`.
    """

    def __init__(self, tracepoint: int, condition: str | None) -> None:
        if os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE:
            raise OSError(errno.ESRCH, "process 1 of the system is in another PID namespace")
        self._event = struct.pack(
            "=IIQQQQQ44xi32x",
            *(_TRACEPOINT, 128, tracepoint, 1, _TIME | _RAW, 0),
            *(_INHERIT | _USE_CLOCK | _BY_THREADS_ONLY, _MONOTONIC),
        )
        self._condition = None if condition is None else bytearray(condition.encode() + b"\0")
        self._rings: dict[int, tuple[int, mmap.mmap]] = {}
        self._resources = ExitStack()
        try:
            followed: set[int] = set()
            while new := {int(thread.name) for thread in _THREADS.iterdir()} - followed:
                for thread in new:
                    with suppress(ProcessLookupError):  # one that has ended meanwhile
                        self._follow(thread)
                followed |= new
        except BaseException:
            self._resources.close()
            raise

    def _follow(self, thread: int) -> None:
        # Per processor, since what begets others may have a ring only there.
        for processor in _online():
            fd = _perf_event_open(self._event, thread, processor)
            self._resources.callback(os.close, fd)
            if self._condition is not None:
                fcntl.ioctl(fd, _SET_FILTER, self._condition)
            if processor in self._rings:
                fcntl.ioctl(fd, _SET_OUTPUT, self._rings[processor][0])
            else:
                ring = mmap.mmap(fd, (1 + _PAGES) * mmap.PAGESIZE)
                self._rings[processor] = fd, self._resources.enter_context(ring)

    def close(self) -> None:
        """Record no more; what was not read is lost."""
        self._resources.close()

    def read(self) -> Iterator[tuple[int, list[Sample], int]]:
        """By processor what was recorded since the last call, and how many were lost."""
        for processor, (_, ring) in self._rings.items():
            ((head,), (tail,)) = (_WORD.unpack_from(ring, at) for at in (_HEAD, _TAIL))
            if head == tail:
                continue
            size = _PAGES * mmap.PAGESIZE
            begin, end = (mmap.PAGESIZE + at % size for at in (tail, head))
            data = ring[begin:end] if begin < end else ring[begin:] + ring[mmap.PAGESIZE : end]
            _WORD.pack_into(ring, _TAIL, head)
            samples, lost, at = [], 0, 0
            while at < len(data):
                kind, length, time = _RECORD.unpack_from(data, at)
                if kind == _SAMPLE:
                    samples.append((time, data, at + _RECORD.size + 4))  # (its length is there)
                elif kind == _LOST:
                    lost += _WORD.unpack_from(data, at + _RECORD.size)[0]
                at += length
            yield processor, samples, lost


def _online() -> Iterator[int]:
    for part in Path("/sys/devices/system/cpu/online").read_text().split(","):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _perf_event_open(event: bytes, thread: int, processor: int) -> int:
    attr = ctypes.create_string_buffer(event, len(event))
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(_SYS_PERF_EVENT_OPEN, attr, thread, processor, -1, _CLOSE_ON_EXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"perf_event_open: {os.strerror(code)}")
    return fd

"""A program inside the kernel that writes each transition down in 64 bytes.

The kernel's own record of `sock:inet_sock_set_state` costs those who are
watched about 0.35 µs each, ten times a connection. A BPF program on the same
tracepoint costs a third of that, and knows the socket's network namespace. It
writes into a ring of each processor's that is mapped here: to read it is to
copy memory, and nobody is ever woken.

The kernel describes its structures itself (BTF), which is how the program
knows where their fields are. Where there is no BTF, no right to load a
program, or a processor whose stores may be seen out of order, the caller has
the kernel's own record to fall back on. So has it for what some kernels keep
from programs, and from perf events too: everything that happens while process 1
has the processor, the timers of others that interrupt it included
(`keeps_init_apart`).
Sources: Documentation/bpf/{btf,map_array,standardization/instruction-set}.rst,
include/uapi/linux/{bpf,btf}.h, trace_inet_sock_set_state in net/ipv4/af_inet.c.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Final, TypeAlias

__all__ = ["RECORD", "STAMP", "Recorder", "keeps_init_apart"]

# A record: the time in ns, the socket, its old and new state, ports, protocol and addresses
# (IPv4's mapped). What `RECORD` unpacks is what the kernel's own record is unpacked to.
RECORD: Final = struct.Struct("=8xQBBHHH16s16s8x")
STAMP: Final = struct.Struct("=Q56x")
_SIZE: Final = RECORD.size
_HEAD: Final = struct.Struct("@Q")  # read as a whole ("=Q" is read octet by octet)
_MOST: Final = 1 << 28  # bytes for all rings together; the kernel takes 1 << 29

_SYS_BPF: Final = 321  # x86_64, whose stores are seen in the order they are made
_MAP_CREATE, _PROG_LOAD, _RAW_TRACEPOINT_OPEN = 0, 5, 17
_ARRAY, _TRACING, _RAW_TP, _MMAPABLE = 2, 26, 23, 1 << 10
_NOT_RUN: Final = "recursion_misses:"

# Instructions, by what they do and, of memory, to how many octets.
_LOAD = {1: 0x71, 2: 0x69, 4: 0x61, 8: 0x79}
_STORE = {1: 0x73, 2: 0x6B, 4: 0x63, 8: 0x7B}
_SET, _COPY, _SET_32 = 0xB7, 0xBF, 0xB4
_ADD, _ADD_REGISTER, _TIMES, _AND = 0x07, 0x0F, 0x27, 0x57
_EQUAL, _UNEQUAL_32, _ABOVE, _JUMP, _CALL, _EXIT = 0x15, 0x56, 0x25, 0x05, 0x85, 0x95
_TO_BIG_ENDIAN, _WIDE, _MAP_VALUE = 0xDC, 0x18, 2
_KTIME, _PROCESSOR, _AS_TCP, _KERNEL_FUNCTION = 5, 8, 137, 2  # helper functions, and its own
_Line: TypeAlias = str | tuple[int, int, int, int, int] | tuple[int, int, int, int, int, str]


class Recorder:
    """Records the transitions of TCP sockets with these ports (None: all) from now on.

    Those of the calling thread's network namespace alone. `size` is each
    processor's ring in bytes, or somewhat less. Needs root (CAP_BPF and
    CAP_PERFMON).

    Raises `OSError` where this kernel or this user cannot have it.
    """

    def __init__(self, ports: Iterable[int] | None, size: int) -> None:
        if platform.machine() != "x86_64":
            raise OSError(errno.ENOSYS, "recorded by a program on x86_64 only")
        online = Path("/sys/devices/system/cpu/online").read_text()
        last = int(online.replace(",", "-").split("-")[-1])
        self._rings = 1 << last.bit_length()
        self._slots = 1 << max(min(size, _MOST // self._rings) // _SIZE, 2).bit_length() - 1
        self._heads = self._rings * self._slots * _SIZE
        self._read = [0] * (last + 1)
        self._resources = ExitStack()
        try:
            self._open(ports)
        except BaseException:
            self._resources.close()
            raise

    def _open(self, ports: Iterable[int] | None) -> None:
        length = self._heads + self._rings * _SIZE
        memory = self._own(
            _bpf(_MAP_CREATE, struct.pack("=IIIII", _ARRAY, 4, length, 1, _MMAPABLE))
        )
        self._memory = self._resources.enter_context(
            mmap.mmap(memory, length, mmap.MAP_SHARED, mmap.PROT_READ)
        )
        kernel = _structures()
        code = _assemble(_program(kernel, memory, self._slots, self._rings, ports))
        program = ctypes.create_string_buffer(code, len(code))
        license = ctypes.create_string_buffer(b"GPL")
        at = struct.pack(
            "=IIQQ24x16s4xI36xI",
            *(_TRACING, len(code) // 8, ctypes.addressof(program), ctypes.addressof(license)),
            *(b"timewait", _RAW_TP, kernel["btf_trace_inet_sock_set_state"]),
        )
        self._program = self._own(_bpf(_PROG_LOAD, at))
        self._own(_bpf(_RAW_TRACEPOINT_OPEN, struct.pack("=QI", 0, self._program)))

    def _own(self, fd: int) -> int:
        self._resources.callback(os.close, fd)
        return fd

    def close(self) -> None:
        """Record no more; what was not read is lost."""
        self._resources.close()

    def read(self) -> Iterator[tuple[int, tuple[bytes, int]]]:
        """By processor the records since the last call, and how many were overwritten."""
        for processor, first in enumerate(self._read):
            head = self._head(processor)
            if head == first:
                continue
            oldest = max(first, head - self._slots)
            records = self._copy(processor, oldest, head)
            # What was recorded meanwhile may have run into what was copied.
            kept = min(max(oldest, self._head(processor) - self._slots + 1), head)
            self._read[processor] = head
            yield processor, (records[(kept - oldest) * _SIZE :], kept - first)

    def not_run(self) -> int:
        """How often an interrupt's transition met this program at work, and was not recorded."""
        told = Path(f"/proc/self/fdinfo/{self._program}").read_text().partition(_NOT_RUN)[2]
        return int(told.split()[0]) if told else 0

    def _head(self, processor: int) -> int:
        head: int = _HEAD.unpack_from(self._memory, self._heads + processor * _SIZE)[0]
        return head

    def _copy(self, processor: int, first: int, end: int) -> bytes:
        ring = processor * self._slots
        at, stop = first % self._slots, end % self._slots
        if at < stop:
            return self._memory[(ring + at) * _SIZE : (ring + stop) * _SIZE]
        older = self._memory[(ring + at) * _SIZE : (ring + self._slots) * _SIZE]
        return older + self._memory[ring * _SIZE : (ring + stop) * _SIZE]


def _program(
    kernel: dict[str, int], memory: int, slots: int, rings: int, ports: Iterable[int] | None
) -> Iterator[_Line]:
    """Registers: 6 the socket, 7 and 8 its states, 9 it as inet_sock; then 1 the slot."""
    namespace = os.stat("/proc/thread-self/ns/net").st_ino
    yield from (
        (_LOAD[8], 6, 1, 0, 0),
        (_LOAD[8], 7, 1, 8, 0),
        (_LOAD[8], 8, 1, 16, 0),
        (_LOAD[8], 2, 6, kernel["sock.skc_net"], 0),
        (_LOAD[4], 2, 2, kernel["net.inum"], 0),
        (_UNEQUAL_32, 2, 0, 0, ctypes.c_int32(namespace).value, "end"),
        (_LOAD[2], 2, 6, kernel["sock.sk_protocol"], 0),
        (_UNEQUAL_32, 2, 0, 0, socket.IPPROTO_TCP, "end"),
        (_COPY, 1, 6, 0, 0),
    )
    if "bpf_rdonly_cast" in kernel:  # since Linux 6.2, and no call at all when it runs
        yield (_SET, 2, 0, 0, kernel["inet_sock"])
        yield (_CALL, 0, _KERNEL_FUNCTION, 0, kernel["bpf_rdonly_cast"])
    else:
        yield (_CALL, 0, 0, 0, _AS_TCP)
        yield (_EQUAL, 0, 0, 0, 0, "end")
    yield from (
        (_COPY, 9, 0, 0, 0),
        (_LOAD[2], 2, 9, kernel["inet_sock.inet_sport"], 0),
        (_TO_BIG_ENDIAN, 2, 0, 0, 16),
        (_LOAD[2], 3, 6, kernel["sock.skc_dport"], 0),
        (_TO_BIG_ENDIAN, 3, 0, 0, 16),
    )
    for port in () if ports is None else ports:
        yield (_EQUAL, 2, 0, 0, port, "take")
        yield (_EQUAL, 3, 0, 0, port, "take")
    if ports is not None:
        yield (_JUMP, 0, 0, 0, 0, "end")
    yield from (
        "take",
        (_STORE[2], 10, 2, -2, 0),
        (_STORE[2], 10, 3, -4, 0),
        (_CALL, 0, 0, 0, _KTIME),
        (_STORE[8], 10, 0, -16, 0),
        (_CALL, 0, 0, 0, _PROCESSOR),
        (_ABOVE, 0, 0, 0, rings - 1, "end"),  # one that was not there when this began
        (_WIDE, 1, _MAP_VALUE, 0, memory),
        (0, 0, 0, 0, 0),
        (_COPY, 3, 1, 0, 0),
        (_ADD, 3, 0, 0, rings * slots * _SIZE),
        (_COPY, 2, 0, 0, 0),
        (_TIMES, 2, 0, 0, _SIZE),
        (_ADD_REGISTER, 3, 2, 0, 0),
        (_TIMES, 0, 0, 0, slots * _SIZE),
        (_ADD_REGISTER, 1, 0, 0, 0),
        (_LOAD[8], 4, 3, 0, 0),
        (_COPY, 5, 4, 0, 0),
        (_AND, 5, 0, 0, slots - 1),
        (_TIMES, 5, 0, 0, _SIZE),
        (_ADD_REGISTER, 1, 5, 0, 0),
        (_LOAD[8], 2, 10, -16, 0),
        (_STORE[8], 1, 2, 0, 0),
        (_STORE[8], 1, 6, 8, 0),
        (_STORE[1], 1, 7, 16, 0),
        (_STORE[1], 1, 8, 17, 0),
        (_LOAD[2], 2, 10, -2, 0),
        (_STORE[2], 1, 2, 18, 0),
        (_LOAD[2], 2, 10, -4, 0),
        (_STORE[2], 1, 2, 20, 0),
        (_SET, 2, 0, 0, socket.IPPROTO_TCP),
        (_STORE[2], 1, 2, 22, 0),
        (_LOAD[2], 2, 6, kernel["sock.skc_family"], 0),
        (_EQUAL, 2, 0, 0, socket.AF_INET6, "six"),
        (_SET, 0, 0, 0, 0),
        (_STORE[8], 1, 0, 24, 0),
        (_STORE[8], 1, 0, 40, 0),
        (_SET_32, 0, 0, 0, -0x10000),
        (_STORE[4], 1, 0, 32, 0),
        (_STORE[4], 1, 0, 48, 0),
        (_LOAD[4], 0, 9, kernel["inet_sock.inet_saddr"], 0),
        (_STORE[4], 1, 0, 36, 0),
        (_LOAD[4], 0, 6, kernel["sock.skc_daddr"], 0),
        (_STORE[4], 1, 0, 52, 0),
        (_JUMP, 0, 0, 0, 0, "written"),
        "six",
    )
    for half in 0, 8:
        yield (_LOAD[8], 0, 6, kernel["sock.skc_v6_rcv_saddr"] + half, 0)
        yield (_STORE[8], 1, 0, 24 + half, 0)
        yield (_LOAD[8], 0, 6, kernel["sock.skc_v6_daddr"] + half, 0)
        yield (_STORE[8], 1, 0, 40 + half, 0)
    yield from (
        "written",
        (_ADD, 4, 0, 0, 1),
        (_STORE[8], 3, 4, 0, 0),
        "end",
        (_SET, 0, 0, 0, 0),
        (_EXIT, 0, 0, 0, 0),
    )


def _assemble(lines: Iterable[_Line]) -> bytes:
    code: list[tuple[int, int, int, int, int, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
        else:
            code.append(line if len(line) == 6 else (*line, ""))
    return b"".join(
        struct.pack("=BBhi", what, source << 4 | target, labels[to] - at if to else offset, value)
        for at, (what, target, source, offset, value, to) in enumerate(code, 1)
    )


def _bpf(command: int, attributes: bytes) -> int:
    attr = ctypes.create_string_buffer(attributes, len(attributes))
    fd: int = ctypes.CDLL(None, use_errno=True).syscall(_SYS_BPF, command, attr, len(attributes))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf: {os.strerror(code)}")
    return fd


# Where the kernel's structures have their fields

_BTF: Final = Path("/sys/kernel/btf/vmlinux")
_FIELDS: Final = {
    "sock": "skc_dport skc_family skc_daddr skc_v6_rcv_saddr skc_v6_daddr skc_net sk_protocol",
    "net": "inum",
    "inet_sock": "inet_sport inet_saddr",
}
_INIT_OWNED: Final = b"\0init_owned\0"
_TYPE: Final = struct.Struct("=III")
_STRUCT, _UNION, _TYPEDEF, _FUNCTION = 4, 5, 8, 12
# By kind: the bytes that follow a type's three words, and those for each of its parts.
_AFTER: Final = {1: 4, 3: 12, 14: 4, 17: 4}
_EACH: Final = {4: 12, 5: 12, 6: 8, 13: 8, 15: 12, 19: 12}


def keeps_init_apart() -> bool:
    """Whether this kernel runs programs of others' while process 1 does not run, and no other time.

    Its `bpf_prog_aux` then tells whether a program is process 1's own. What is
    missed so is not counted among the program's `recursion_misses`.
    """
    return _INIT_OWNED in _BTF.read_bytes()


@cache
def _structures() -> dict[str, int]:
    """Offsets of `_FIELDS` as "struct.field", and the numbers of the types that are named."""
    data = _BTF.read_bytes()
    header, types_at, types_length, names_at, names_length = struct.unpack_from("=4xIIIII", data)
    names = data[header + names_at : header + names_at + names_length]
    tracepoint = "btf_trace_inet_sock_set_state"
    named = *_FIELDS, tracepoint, "bpf_rdonly_cast"
    wanted = {names.find(b"\0%s\0" % name.encode()) + 1: name for name in named}
    wanted.pop(0, None)  # of one that is not there, and of what has no name
    start = header + types_at
    places, found = [0], {}
    at, end = start, start + types_length
    while at < end:
        name, info, _ = _TYPE.unpack_from(data, at)
        kind = info >> 24 & 31
        if name in wanted and kind in (_STRUCT, _TYPEDEF, _FUNCTION):
            found[wanted[name]] = len(places)
        places.append(at)
        at += 12 + _AFTER.get(kind, 0) + _EACH.get(kind, 0) * (info & 0xFFFF)

    def fields(number: int, base: int) -> Iterator[tuple[str, int]]:
        """The named fields of a structure and of those without pointers inside it."""
        at = places[number]
        _, info, _ = _TYPE.unpack_from(data, at)
        if info >> 24 & 31 not in (_STRUCT, _UNION):
            return
        for part in range(info & 0xFFFF):
            name, inner, bits = _TYPE.unpack_from(data, at + 12 + 12 * part)
            where = base + ((bits & 0xFFFFFF if info >> 31 else bits) >> 3)
            yield names[name : names.index(b"\0", name)].decode(), where
            yield from fields(inner, where)

    if missing := {*_FIELDS, tracepoint} - set(found):
        raise OSError(errno.ENOENT, f"this kernel does not describe {', '.join(sorted(missing))}")
    kernel = dict(found)
    for name, of_it in _FIELDS.items():
        for field, where in fields(found[name], 0):
            if field in of_it.split():
                kernel.setdefault(f"{name}.{field}", where)
    if missing := {f"{n}.{f}" for n, of_it in _FIELDS.items() for f in of_it.split()} - set(kernel):
        raise OSError(errno.ENOENT, f"this kernel has no {', '.join(sorted(missing))}")
    return kernel

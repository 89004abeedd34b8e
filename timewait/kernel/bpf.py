"""Classic BPF: a filter that the kernel runs before it hands a socket anything.

Source: Linux's Documentation/networking/filter.rst, include/uapi/linux/{bpf_common,filter}.h.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable
from typing import Final, TypeAlias

__all__ = [
    "AND",
    "IP_HEADER_LENGTH",
    "JUMP_EQUAL",
    "JUMP_SET",
    "LOAD_BYTE",
    "LOAD_HALF",
    "LOAD_HALF_INDEXED",
    "LOAD_WORD",
    "RETURN",
    "Line",
    "assemble",
    "attach",
]

LOAD_WORD, LOAD_HALF, LOAD_BYTE, LOAD_HALF_INDEXED = 0x20, 0x28, 0x30, 0x48
IP_HEADER_LENGTH: Final = 0xB1  # into the index: 4 * (byte & 15)
AND, RETURN = 0x54, 0x06
JUMP_EQUAL, JUMP_SET = 0x15, 0x45
_SO_ATTACH_FILTER: Final = 26

# The operation, its operand, and for a jump the labels for yes and for no ("" is the next line).
Line: TypeAlias = str | tuple[int, int] | tuple[int, int, str, str]


def assemble(lines: Iterable[Line]) -> bytes:
    """The program's bytes; a line that is a string is the label of what follows it.

    Raises `ValueError` where a jump goes further than 255 instructions.
    """
    code: list[tuple[int, int, str, str]] = []
    labels: dict[str, int] = {}
    for line in lines:
        if isinstance(line, str):
            labels[line] = len(code)
        else:
            code.append(line if len(line) == 4 else (*line, "", ""))
    out = b""
    for at, (operation, operand, yes, no) in enumerate(code, 1):
        far = [labels[to] - at if to else 0 for to in (yes, no)]
        if max(far) > 255:
            raise ValueError("a filter with a jump that is too long")
        out += struct.pack("=HBBI", operation, *far, operand)
    return out


def attach(sock: socket.SocketType, program: bytes) -> None:
    """Have the kernel run the program on what the socket would receive."""
    code = ctypes.create_string_buffer(program, len(program))
    head = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, head)

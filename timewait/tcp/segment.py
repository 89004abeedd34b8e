"""A TCP segment and the 32-bit arithmetic of its sequence numbers (RFC 9293 §3.1, §3.4).

A segment here is what TCP sees: no addresses, no checksum. `timewait.tcp.packet`
puts it into an IP packet and takes it out again.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

__all__ = [
    "ACK",
    "CWR",
    "ECE",
    "FIN",
    "PSH",
    "RST",
    "SYN",
    "URG",
    "Options",
    "Segment",
    "flags_text",
    "seq_add",
    "seq_diff",
    "seq_le",
    "seq_lt",
]

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
ECE: Final = 0x40
CWR: Final = 0x80

MASK: Final = (1 << 32) - 1
HALF: Final = 1 << 31


def seq_add(a: int, n: int) -> int:
    """`a + n` in sequence space, modulo 2**32."""
    return (a + n) & MASK


def seq_diff(a: int, b: int) -> int:
    """The signed distance from `b` to `a`, in -2**31 .. 2**31 - 1."""
    return ((a - b + HALF) & MASK) - HALF


def seq_lt(a: int, b: int) -> bool:
    """Whether `a` comes before `b` (RFC 9293 §3.4)."""
    return (a - b) & HALF != 0


def seq_le(a: int, b: int) -> bool:
    """Whether `a` comes before `b` or is `b`."""
    return (b - a) & HALF == 0


_LETTERS = (
    (SYN, "SYN"),
    (FIN, "FIN"),
    (RST, "RST"),
    (PSH, "PSH"),
    (ACK, "ACK"),
    (URG, "URG"),
    (ECE, "ECE"),
    (CWR, "CWR"),
)


def flags_text(flags: int) -> str:
    """Flags as people write them: `"SYN,ACK"`; `"none"` where no flag is set."""
    return ",".join(name for bit, name in _LETTERS if flags & bit) or "none"


@define
class Options:
    """The TCP options that matter to a lifecycle (RFC 9293 §3.2, RFC 7323, RFC 2018).

    `None` (or `False`, or no `sack` blocks, each its left and right edge)
    means that the option is absent.
    """

    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False
    ts_val: int | None = None
    ts_ecr: int | None = None
    sack: tuple[tuple[int, int], ...] = ()


@define(unsafe_hash=True)
class Segment:
    """One TCP segment. Treat it as immutable: it may be in flight more than once.

    `seq`, `ack` and `window` are as on the wire (32, 32 and 16 bits, the window
    unscaled); `data` is the text. An `ack` without the ACK flag is 0.
    """

    seq: int
    ack: int
    flags: int
    window: int = 0
    data: bytes = b""
    options: Options | None = field(default=None, hash=False)

    @property
    def length(self) -> int:
        """SEG.LEN: octets of sequence space, SYN and FIN counted (RFC 9293 §3.4)."""
        return len(self.data) + (self.flags & 1) + (self.flags >> 1 & 1)

    def __str__(self) -> str:
        text = f"{flags_text(self.flags)} seq={self.seq}"
        if self.flags & ACK:
            text += f" ack={self.ack}"
        if self.data:
            text += f" len={len(self.data)}"
        return text

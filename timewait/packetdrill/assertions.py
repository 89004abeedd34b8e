"""The Python between `%{` and `}%`: read as a syntax tree, and only arithmetic is done.

Scripts use it to assert things about `struct tcp_info`. Names, numbers,
comparisons, arithmetic, `assert`, assignment and `print` are known; a call, an
attribute or an import is unsupported. Nothing is compiled or evaluated by Python.
"""

from __future__ import annotations

import ast
import operator
import re
import struct
import textwrap
from collections.abc import Callable, Mapping
from typing import Final

from timewait.packetdrill.calls import CONSTANTS
from timewait.packetdrill.script import Unsupported

__all__ = ["check", "mem_info", "tcp_info"]

# struct tcp_info (include/uapi/linux/tcp.h): names in order, with their format.
_FIELDS: Final = (
    "B:state B:ca_state B:retransmits B:probes B:backoff B:options B:wscale B:fastopen "
    "I:rto I:ato I:snd_mss I:rcv_mss I:unacked I:sacked I:lost I:retrans I:fackets "
    "I:last_data_sent I:last_ack_sent I:last_data_recv I:last_ack_recv I:pmtu I:rcv_ssthresh "
    "I:rtt I:rttvar I:snd_ssthresh I:snd_cwnd I:advmss I:reordering I:rcv_rtt I:rcv_space "
    "I:total_retrans Q:pacing_rate Q:max_pacing_rate Q:bytes_acked Q:bytes_received I:segs_out "
    "I:segs_in I:notsent_bytes I:min_rtt I:data_segs_in I:data_segs_out Q:delivery_rate "
    "Q:busy_time Q:rwnd_limited Q:sndbuf_limited I:delivered I:delivered_ce Q:bytes_sent "
    "Q:bytes_retrans I:dsack_dups I:reord_seen I:rcv_ooopack I:snd_wnd I:rcv_wnd I:rehash "
    "H:total_rto H:total_rto_recoveries I:total_rto_time I:received_ce I:delivered_e1_bytes "
    "I:delivered_e0_bytes I:delivered_ce_bytes I:received_e1_bytes I:received_e0_bytes "
    "I:received_ce_bytes"
)


def tcp_info(octets: bytes) -> dict[str, int]:
    """The fields of a `struct tcp_info` by their `tcpi_` names, as many as the kernel gave."""
    found: dict[str, int] = {}
    at = 0
    for item in _FIELDS.split():
        kind, name = item.split(":")
        if at + struct.calcsize(kind) > len(octets):
            break
        (value,) = struct.unpack_from(f"<{kind}", octets, at)
        at += struct.calcsize(kind)
        if name == "wscale":
            found["tcpi_snd_wscale"], found["tcpi_rcv_wscale"] = value & 15, value >> 4
        elif name == "fastopen":
            found["tcpi_delivery_rate_app_limited"] = value & 1
            found["tcpi_fastopen_client_fail"] = value >> 1 & 3
        else:
            found[f"tcpi_{name}"] = value
    return found


_MEMORY: Final = (
    "RMEM_ALLOC", "RCVBUF", "WMEM_ALLOC", "SNDBUF", "FWD_ALLOC", "WMEM_QUEUED", "OPTMEM",
    "BACKLOG", "DROPS",
)  # fmt: skip


def mem_info(octets: bytes) -> dict[str, int]:
    """The numbers of SO_MEMINFO by their names (include/uapi/linux/sock_diag.h)."""
    numbers = struct.unpack(f"<{len(octets) // 4}I", octets)
    return {f"SK_MEMINFO_{name}": number for name, number in zip(_MEMORY, numbers, strict=False)}


# The language's own examples are of Python 2, where print is a statement.
_PRINT: Final = re.compile(r"(?m)^([ \t]*)print[ \t]+(?![(=]).*$")


def _flush_left(code: str) -> str:
    """The code without the indentation of the script that it stands in."""
    first, _, rest = code.strip("\n").partition("\n")
    if rest and first.strip() and len(first) == len(first.lstrip()):
        # It began beside the `%{`, wherever that was.
        return f"{first}\n{textwrap.dedent(rest)}".strip()
    return textwrap.dedent(code).strip()


_BINARY: Final[dict[type, Callable[[int, int], int | float]]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor,
    ast.RShift: operator.rshift,
    ast.LShift: lambda a, b: a << b if 0 <= b < 64 else a // 0,
}  # fmt: skip
_MOST: Final = 1 << 128
_COMPARE: Final[dict[type, Callable[[object, object], bool]]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,  # type: ignore[dict-item]
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,  # type: ignore[dict-item]
    ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,  # type: ignore[operator]
}  # fmt: skip


def check(code: str, info: Mapping[str, int], names: dict[str, float], line: int) -> str | None:
    """Carry out a snippet: None, or the words of the assertion that does not hold.

    `names` keeps what assignments made, from one snippet to the next. Raises
    `Unsupported` for everything that is not simple arithmetic over known names.
    """
    try:
        tree = ast.parse(_PRINT.sub(r"\1pass", _flush_left(code)))
        for statement in tree.body:
            wrong = _statement(statement, info, names, line)
            if wrong:
                return wrong
    except (SyntaxError, RecursionError, MemoryError):
        raise Unsupported("code that is not plain Python", line) from None
    except (ArithmeticError, TypeError, ValueError) as trouble:
        raise Unsupported(f"code: {trouble}", line) from None
    return None


def _statement(
    statement: ast.stmt, info: Mapping[str, int], names: dict[str, float], line: int
) -> str | None:
    def value(node: ast.expr) -> object:
        return _value(node, info, names, line)

    if isinstance(statement, ast.Assert):
        if value(statement.test):
            return None
        used = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
        values = ", ".join(f"{name} is {info[name]}" for name in sorted(used) if name in info)
        return f"assert {ast.unparse(statement.test)}" + (f": {values}" if values else "")
    if isinstance(statement, (ast.Assign, ast.AugAssign)):
        if isinstance(statement, ast.Assign):
            targets, given = statement.targets, statement.value
        else:
            targets = [statement.target]
            given = ast.BinOp(statement.target, statement.op, statement.value)
        wanted = [target.id for target in targets if isinstance(target, ast.Name)]
        if len(wanted) == len(targets):
            got = value(given)
            if isinstance(got, (int, float)):
                names.update(dict.fromkeys(wanted, got))
                return None
    if isinstance(statement, ast.Pass):
        return None
    if isinstance(statement, ast.Expr):
        call = statement.value
        if (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Name)
            and call.func.id == "print"
        ):
            return None
        if isinstance(call, ast.Constant):
            return None
    if isinstance(statement, ast.If):
        branch = statement.body if value(statement.test) else statement.orelse
        for inner in branch:
            wrong = _statement(inner, info, names, line)
            if wrong:
                return wrong
        return None
    raise Unsupported(f"code: {ast.unparse(statement)[:60]}", line)


def _value(
    node: ast.expr, info: Mapping[str, int], names: Mapping[str, float], line: int
) -> object:
    def value(inner: ast.expr) -> object:
        return _value(inner, info, names, line)

    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str)):
        return node.value
    if isinstance(node, ast.Name):
        for known in (names, info, CONSTANTS):
            if node.id in known:
                return known[node.id]
        raise Unsupported(f"{node.id}", line)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(value(item) for item in node.elts)
    if isinstance(node, ast.UnaryOp):
        operand = value(node.operand)
        if isinstance(node.op, ast.Not):
            return not operand
        if isinstance(node.op, ast.Invert) and isinstance(operand, int):
            return ~operand
        if isinstance(operand, (int, float)):
            return -operand if isinstance(node.op, ast.USub) else +operand
    if isinstance(node, ast.BoolOp):
        results = [bool(value(item)) for item in node.values]
        return all(results) if isinstance(node.op, ast.And) else any(results)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = value(node.left), value(node.right)
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            got = _BINARY[type(node.op)](left, right)  # type: ignore[arg-type]
            if abs(got) < _MOST:  # numbers that grow without end would have no end of time
                return got
            raise ValueError("a number without measure")
    if isinstance(node, ast.IfExp):
        return value(node.body if value(node.test) else node.orelse)
    if isinstance(node, ast.Compare):
        left = value(node.left)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            right = value(right_node)
            if type(op) not in _COMPARE:
                raise Unsupported("code: this comparison", line)
            if not _COMPARE[type(op)](left, right):
                return False
            left = right
        return True
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        known_calls: dict[str, Callable[..., object]] = {
            "abs": abs, "min": min, "max": max, "int": int, "round": round, "bool": bool,
        }  # fmt: skip
        if node.func.id in known_calls and node.args:
            return known_calls[node.func.id](*(value(argument) for argument in node.args))
    raise Unsupported(f"code: {ast.unparse(node)[:60]}", line)

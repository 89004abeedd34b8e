"""Why can't I bind, and until when?

Linux decides by the options of both sides and the state of the holder, and
says only EADDRINUSE. Here the binds are really tried, with each combination of
options, and held against the sockets that the kernel shows; the rule that
refused is said in words, with what to do about it.

The rule (net/ipv4/inet_connection_sock.c, inet_csk_bind_conflict): sockets of
the same port conflict where their addresses overlap; a wildcard overlaps all.
A listener shares only if both sides set SO_REUSEPORT and have the same user.
Anything else, TIME_WAIT included, shares also if both set SO_REUSEADDR: the
newcomer now, and the holder when it was made.
"""

from __future__ import annotations

import errno
import os
import socket
import textwrap
import time
from collections.abc import Container, Iterator, Sequence
from functools import cache
from ipaddress import ip_address
from operator import index
from typing import Any, Final, SupportsIndex, TypeAlias

from attrs import define, frozen

from timewait.events import Address, Row
from timewait.kernel.namespace import sysctl
from timewait.kernel.observers import psutil_rows
from timewait.kernel.processes import owners, reuse_options, user_name
from timewait.kernel.sock_diag import Details, address_text, details, ends_in, sockets
from timewait.kernel.ticks import fires_in, jiffies, tick
from timewait.tcp.states import State

__all__ = [
    "Bindable",
    "Explanation",
    "Holder",
    "addresses",
    "can_bind",
    "can_bind_all",
    "explain_bind",
    "parse_address",
    "port_number",
]

_S = State
_TIMED: Final = ("fin-wait-2-orphan", "time-wait", "outbound-time-wait")
_MANY: Final = 12  # holders that are listed one by one
_RUN_LATE: Final = 0.01  # seconds by which the kernel may run a timer after its tick


@frozen
class Bindable:
    """Whether a server could bind and listen: setting nothing, one option, the other, or both."""

    plain: bool
    reuse_address: bool
    reuse_port: bool
    both: bool


@frozen
class Holder:
    """A socket on the port whose address overlaps the one asked for.

    `kind` is one of "listener", "bound", "connection", "outbound-connection",
    "self-connect", "close-wait", "fin-wait-2", "fin-wait-2-orphan",
    "last-ack", "closing", "time-wait", "outbound-time-wait". `seconds_left` is
    until its timer is due, `gone_after` until it has fired, as the kernel's
    timers may up to 2 s later; both None where none ends it. `pid` and `process` are of
    the first process that has it open and may be seen, `pids` of all;
    `process_state` is that process's letter in proc_pid_stat(5), "T" for one
    that was stopped. `reuse_address` and `reuse_port` are the socket's
    options, None where not known, `interface` the one it is bound to
    (SO_BINDTODEVICE), None for all.
    """

    kind: str
    state: State
    local: Address
    remote: Address
    seconds_left: float | None = None
    pid: int | None = None
    process: str | None = None
    user: str | None = None
    pids: tuple[int, ...] = ()
    inherited: bool = False
    reuse_address: bool | None = None
    reuse_port: bool | None = None
    gone_after: float | None = None
    interface: str | None = None
    process_state: str | None = None

    @property
    def where(self) -> str:
        """Its own end as `ss` writes it, with the interface: `"0.0.0.0%eth0:9090"`."""
        return _where(self.local, self.interface)

    def __str__(self) -> str:
        state = "BOUND" if self.kind == "bound" else self.state.name
        there = self.where
        if self.remote[1]:
            there += f" \N{RIGHTWARDS ARROW} {address_text(self.remote)}"
        text = f"{state:12} {there:34}"
        if self.seconds_left is not None:
            text += f" {self.seconds_left:.1f} s left"
        if self.pid is not None:
            text += f" {self.process} (pid {', '.join(map(str, self.pids))}; user {self.user})"
        elif self.user is not None:
            text += f" user {self.user}"
        return f"{text} [{self.kind}]"

    def to_json(self) -> dict[str, Any]:
        """With addresses as text."""
        return {
            "kind": self.kind,
            "state": "BOUND" if self.kind == "bound" else self.state.name,
            "local": self.where,
            "remote": _where(self.remote),
            "seconds_left": self.seconds_left,
            "gone_after": self.gone_after,
            "pid": self.pid,
            "process": self.process,
            "user": self.user,
            "pids": list(self.pids),
            "process_state": self.process_state,
            "reuse_address": self.reuse_address,
            "reuse_port": self.reuse_port,
        }


@frozen
class Explanation:
    """What `explain_bind` found; true where a server that sets nothing can have the port.

    `situation` names what is the matter ("free", "live-listener",
    "time-wait-without-reuse", ...), `title` says it in a line, `rule` says
    which rule refuses. `free_after` is in seconds: 0.0 where the port is
    free, None where only somebody's action frees it. `advice` is what to do
    now and what to change for good; `warnings` are binds that would succeed
    and be bad news. `errno` is the error's name for a server that sets
    nothing, `call` the call that failed.
    """

    address: Address
    situation: str
    title: str
    bindable: Bindable
    holders: tuple[Holder, ...]
    rule: str
    free_after: float | None
    advice: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    errno: str | None = None
    call: str | None = None

    def __bool__(self) -> bool:
        return self.bindable.plain

    @property
    def reason(self) -> str:
        """In one line, what is the matter."""
        where = address_text(self.address)
        return f"{where} is free" if self else f"{where} is not free: {self.title}"

    def __str__(self) -> str:
        """As `timewait explain` prints it."""
        lines = [f"{self.reason}."]
        if not self:
            lines += ["", "A server that sets"]
            lines += [
                f"  {what:34}{'can bind' if can else 'cannot'}"
                for what, can in (
                    (f"nothing ({self.errno} from {self.call})", self.bindable.plain),
                    ("SO_REUSEADDR", self.bindable.reuse_address),
                    ("SO_REUSEPORT", self.bindable.reuse_port),
                    ("SO_REUSEADDR, SO_REUSEPORT", self.bindable.both),
                )
            ]
        if self.holders:
            lines += ["", "Held by"]
            lines += [f"  {holder}" for holder in self.holders[:_MANY]]
            if len(self.holders) > _MANY:
                lines.append(f"  and {len(self.holders) - _MANY} more")
        if not self:
            lines += ["", *_wrapped("Why", self.rule)]
            free = "when its holder lets go; no timer ends it"
            if self.situation in _FREED_BY:
                free = _FREED_BY[self.situation]
            elif self.free_after is not None:
                free = f"in {self.free_after:.1f} s, when the kernel looks at its last timer"
            elif not self.holders:
                free = "when what holds it lets go"
            elif {holder.kind for holder in self.holders} <= {"last-ack", "closing", *_TIMED}:
                free = "when the peer answers, or the kernel gives up (tcp_orphan_retries)"
                if self.holders[0].kind in _TIMED:
                    free = "when a timer ends that cannot be seen from here"
            lines += _wrapped("Free", free)
        for text in self.advice:
            name, _, what = text.partition(": ")
            lines += _wrapped(name, what)
        for text in self.warnings:
            lines += _wrapped("Beware", text)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As `timewait explain --json` prints it."""
        return {
            "address": address_text(self.address),
            "situation": self.situation,
            "title": self.title,
            "bindable": {
                "plain": self.bindable.plain,
                "reuse_address": self.bindable.reuse_address,
                "reuse_port": self.bindable.reuse_port,
                "both": self.bindable.both,
            },
            "errno": self.errno,
            "call": self.call,
            "holders": [holder.to_json() for holder in self.holders],
            "rule": self.rule,
            "free_after": self.free_after,
            "advice": list(self.advice),
            "warnings": list(self.warnings),
        }


def explain_bind(port: int, host: str = "0.0.0.0") -> Explanation:
    """Say whether a TCP server could bind (`host`, `port`) and listen, and if not why.

    Really tries, with each combination of SO_REUSEADDR and SO_REUSEPORT, and
    leaves nothing behind. Where somebody listens already, the trial only
    binds, so that no connection goes astray. `host` is a numeric address or a
    name that has one. Needs no privilege; root is told more about processes.

    Where there is no sock_diag, psutil shows the holders, without timers.

    Raises `OSError` (`socket.gaierror`) for a name that has no address, and
    where there is nothing to look with; `ValueError` for no port number.
    """
    port = port_number(port)
    # Of a name's addresses a server binds all that this machine has: what is in the way of one
    # is in the way of the server.
    return min((_explain(port, each) for each in addresses(host)), key=_urgency)


def _urgency(found: Explanation) -> int:
    if found:
        return 1
    return 2 if found.situation == "address-not-local" else 0


def _explain(port: int, host: str) -> Explanation:
    for _ in range(3):
        found = _sockets(port)
        looked = 0
        if any(one.row.timer for one in found):
            began = time.monotonic()
            looked = jiffies()
            if time.monotonic() - began > tick():  # it takes a while the first time
                found, looked = _sockets(port), jiffies()
        listening = any(one.row.state is _S.LISTEN for one in found)
        trials = {options: _try(host, port, *options, listen=not listening) for options in _OPTIONS}
        # What does not refuse a server that sets nothing holds nothing.
        mine = _shown(host), _interface(host)
        there = [one for one in found if trials[False, False] and _overlapping(*mine, one)]
        holders = list(_holders(there, looked))
        gone = False
        if any(holder.user and not holder.pids for holder in holders):
            # Its process cannot be seen, or closed it before it was looked for.
            gone = not {one.cookie for one in there} <= {one.cookie for one in _sockets(port)}
        if (there and not gone) or trials[False, False] is None or port == 0:
            break  # else what refused may have come just after the look
    stuck = _cannot_listen(list(zip(there, holders, strict=True)), trials)
    # The one that will stay longest decides, and is told of first; of several the nearest.
    holders.sort(key=lambda each: (*_weight(each), each.local[0] != mine[0]))
    age = (jiffies() - looked) * tick() if looked else 0.0
    return _explanation((host, port), trials, tuple(holders), found, stuck, age)


def can_bind(
    port: int, host: str = "0.0.0.0", reuse_address: bool = False, reuse_port: bool = False
) -> bool:
    """Whether a server with these options could bind and listen now, found by trying.

    As `explain_bind`, without a word why not. Raises what no waiting mends:
    `PermissionError` for a privileged port, `OSError` for a host that has no
    address or not one of this machine's, `ValueError` for no port number.
    """
    return can_bind_all(port_number(port), addresses(host), reuse_address, reuse_port)


def can_bind_all(port: int, hosts: Sequence[str], reuse_address: bool, reuse_port: bool) -> bool:
    """As `can_bind`, of all of these numeric addresses that are this machine's."""
    trouble, can = None, False
    for each in hosts:
        failed = _try(each, port, reuse_address, reuse_port, listen=False)
        if failed is None and not any(one.row.state is _S.LISTEN for one in _sockets(port)):
            failed = _try(each, port, reuse_address, reuse_port, listen=True)
        if failed is None:
            can = True
        elif failed[1] == errno.EADDRINUSE:
            return False
        else:
            why = _FOR_GOOD.get(failed[1]) or os.strerror(failed[1])
            trouble = OSError(failed[1], f"{address_text((each, port))}: {why}")
    if can:
        return True
    assert trouble is not None  # a name has an address at least
    raise trouble


def port_number(port: SupportsIndex) -> int:
    """A port as a plain number, from 0 to 65535; raises `ValueError` for anything else."""
    try:
        number = index(port)
    except TypeError:
        number = -1
    if not 0 <= number <= 65535:
        raise ValueError(f"not a port: {port!r}")
    return number


def parse_address(text: str) -> Address:
    """`"9090"`, `"127.0.0.1:9090"`, `"[::1]:9090"`, `"localhost:http"` or `":9090"` as an address.

    A bare port, `:PORT` and `*:PORT` mean all of IPv4. Raises `ValueError`.
    """
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ValueError(f"an IPv6 address goes into brackets, as in [::1]:9090: {text!r}")
    try:
        number = int(port) if port.isdecimal() else socket.getservbyname(port, "tcp")
    except (OSError, ValueError):
        number = -1
    if not port.isascii() or not 0 <= number <= 65535 or host == "[]":
        raise ValueError(f"not [HOST:]PORT: {text!r}")
    if bracketed:
        host = host[1:-1]
    return ("0.0.0.0" if host in ("", "*") else host), number


def addresses(host: str) -> list[str]:
    """The numeric addresses of a host, which may be one already, in the resolver's order.

    Raises `OSError` (`socket.gaierror`) that says so where it has none, or
    names an interface that is not there.
    """
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        _interface(host)
        mapped = getattr(address, "ipv4_mapped", None)
        # As all Pythons but old do.
        return [str(address) if mapped is None else f"::ffff:{mapped}"]
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        raise socket.gaierror(error.errno, f"{host}: {error.strerror}") from None
    except ValueError:  # what the idna codec cannot take: an empty label, too long a one
        raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a host name") from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _interface(host: str) -> int:
    """The index of the interface that a link-local address names, 0 for other addresses."""
    name = host.partition("%")[2]
    if not name or not ip_address(host).is_link_local:
        return 0
    try:
        number = int(name) if name.isdecimal() else socket.if_nametoindex(name)
        socket.if_indextoname(number)
    except (OSError, OverflowError):
        raise OSError(errno.ENODEV, f"{host}: there is no interface {name}") from None
    return number


def _where(end: Address, interface: str | None = None) -> str:
    """As `ss` writes it, port 0 as a star."""
    host, port = end
    text = address_text((host if interface is None else f"{host}%{interface}", port))
    return text if port else f"{text[:-1]}*"


def _wrapped(name: str, text: str) -> list[str]:
    pad = f"{name}: ".ljust(10)
    return textwrap.wrap(text, 96, initial_indent=pad, subsequent_indent=" " * 10)


# Looking

_OPTIONS: Final = ((False, False), (True, False), (False, True), (True, True))
_FOR_GOOD: Final = {
    errno.EACCES: "a privileged port",
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.EAFNOSUPPORT: "this machine has no such addresses",
    errno.EINVAL: "a link-local address needs its interface, as in fe80::1%eth0",
}
_Trials: TypeAlias = dict[tuple[bool, bool], tuple[str, int] | None]


def _sockets(port: int) -> list[Details]:
    """All sockets whose own end is on the port, bound ones included."""
    if port == 0:
        return []
    try:
        found = details(port, states=State, info=True)
    except OSError:  # not Linux, or a kernel without sock_diag
        found = [
            Details(row, socket.AF_INET6 if ":" in row.local[0] else socket.AF_INET, 0)
            for row, _ in psutil_rows()
        ]
    return [one for one in found if one.row.local[1] == port]


def _try(
    host: str, port: int, reuse_address: bool, reuse_port: bool, *, listen: bool
) -> tuple[str, int] | None:
    """The call that failed, and its errno; None where a server could have the port."""
    # By getaddrinfo, since bind() of a tuple of two forgets an address's interface.
    family, _, _, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    call = "socket"
    try:
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            if reuse_address:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if reuse_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            call = "bind"
            sock.bind(address)
            if listen:
                call = "listen"
                sock.listen(0)
    except OSError as error:
        return call, error.errno or 0
    return None


@cache
def _shown(host: str) -> str:
    """An address as the kernel shows it: IPv4's as such where mapped, without its interface."""
    address = ip_address(host.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def _overlapping(host: str, interface: int, one: Details) -> bool:
    """Whether a socket's own address and one on `interface` are or contain each other."""
    theirs = one.row.local[0]
    if interface and one.interface and interface != one.interface:
        return False
    if theirs == host:
        return True
    if host == "::":  # as a server that does not set IPV6_V6ONLY
        return True
    if theirs == "::":
        return ":" in host or one.v6only is not True
    if "0.0.0.0" in (host, theirs):
        return ":" not in host + theirs
    return False


def _cannot_listen(holders: list[tuple[Details, Holder]], trials: _Trials) -> bool:
    """Whether there is a bound socket beside a listener: one that listen() refuses.

    Both have SO_REUSEADDR then. Where both have SO_REUSEPORT, it may listen.
    """
    waiting, listeners = (
        [(one, holder) for one, holder in holders if holder.kind == kind]
        for kind in ("bound", "listener")
    )
    return trials[False, True] is not None and any(
        _meet(one, other) and not (bound.reuse_port and listener.reuse_port)
        for one, bound in waiting
        for other, listener in listeners
    )


def _meet(one: Details, other: Details) -> bool:
    """Whether two sockets' own addresses overlap."""
    mine, theirs = one.row.local[0], other.row.local[0]
    apart = one.v6only and mine == "::" and ":" not in theirs
    return _overlapping(mine, one.interface, other) and not apart


def _holders(found: list[Details], looked: int) -> Iterator[Holder]:
    """Those who hold the port, of sockets that were shown at `looked`, in jiffies."""
    processes = owners(one.row.inode or 0 for one in found)
    served = any(one.row.state is _S.LISTEN for one in found)
    low, high = _dealt_out()
    dealt_out = range(low, high + 1)
    listening = _listening() if found and not served else frozenset()
    for one in found:
        row = one.row
        who = processes.get(row.inode or 0, [])
        options = reuse_options(who[0]) if who else None
        yield Holder(
            kind=_kind(one, served, dealt_out, listening),
            state=row.state,
            local=row.local,
            remote=row.remote,
            seconds_left=ends_in(row),
            pid=who[0].pid if who else None,
            process=who[0].name if who else None,
            user=None if row.uid is None or not row.inode else user_name(row.uid),
            pids=tuple(process.pid for process in who),
            inherited=any(process.inherited for process in who),
            reuse_address=options[0] if options else None,
            reuse_port=options[1] if options else None,
            gone_after=_gone_after(row, looked),
            interface=_interface_name(one.interface),
            process_state=who[0].state if who else None,
        )


def _interface_name(index: int) -> str | None:
    try:
        return socket.if_indextoname(index) if index else None
    except OSError:  # it has gone, or is another namespace's
        return str(index)


def _gone_after(row: Row, looked: int) -> float | None:
    """When its timer has really ended a socket, in seconds from when it was shown."""
    left = ends_in(row)
    if left is None:
        return None
    if row.state is _S.TIME_WAIT:
        return fires_in(left, 60.0, looked)
    whole = float(sysctl("net.ipv4.tcp_fin_timeout"))
    if row.timer == "keepalive":  # it is timed twice, see ends_in()
        whole -= 60.0
        first = fires_in(left - max(whole, 0.0), whole, looked)
        return first + fires_in(whole, whole, looked + round(first / tick()))
    return fires_in(left, max(whole, left), looked)


def _privileged() -> int:
    """The first port that needs no privilege."""
    try:
        return int(sysctl("net.ipv4.ip_unprivileged_port_start"))
    except OSError:
        return 1024


def _dealt_out() -> tuple[int, int]:
    try:
        low, high = sysctl("net.ipv4.ip_local_port_range").split()
    except OSError:
        return 49152, 65535  # RFC 6335 §6, as most systems but Linux have it
    return int(low), int(high)


def _kind(one: Details, served: bool, dealt_out: range, listening: Container[Address]) -> str:
    row = one.row
    if row.state is _S.LISTEN:
        return "listener"
    if row.state is _S.CLOSED:
        return "bound"
    if row.local == row.remote:
        return "self-connect"
    outbound = one.connected
    if outbound is None:
        # Then the kernel does not tell who connected. Somebody here listens where a client's
        # peer is, or its port is one that the kernel deals out, and its peer's is not.
        outbound = row.state is _S.SYN_SENT or (
            not served
            and (
                any((host, row.remote[1]) in listening for host in (row.remote[0], "0.0.0.0", "::"))
                or (row.local[1] in dealt_out and row.remote[1] not in dealt_out)
            )
        )
    if row.state is _S.TIME_WAIT:
        return "outbound-time-wait" if outbound else "time-wait"
    if row.state is _S.FIN_WAIT_2:
        return "fin-wait-2" if row.inode else "fin-wait-2-orphan"
    if row.state in (_S.LAST_ACK, _S.FIN_WAIT_1, _S.CLOSING):
        return "last-ack" if row.state is _S.LAST_ACK else "closing"
    if row.state is _S.CLOSE_WAIT:
        return "close-wait"
    return "outbound-connection" if outbound else "connection"


def _listening() -> frozenset[Address]:
    """The addresses of all listeners here."""
    try:
        return frozenset(row.local for row in sockets(states=[_S.LISTEN]))
    except OSError:  # not Linux
        return frozenset(row.local for row, _ in psutil_rows() if row.state is _S.LISTEN)


# Saying

_ORDER: Final = (
    *("listener", "bound", "self-connect", "close-wait", "connection", "fin-wait-2"),
    *("outbound-connection", "last-ack", "closing", "fin-wait-2-orphan"),
    *("time-wait", "outbound-time-wait"),
)


def _weight(holder: Holder) -> tuple[int, float]:
    return _ORDER.index(holder.kind), -(holder.seconds_left or 0.0)


def _explanation(
    address: Address,
    trials: _Trials,
    holders: tuple[Holder, ...],
    found: list[Details],
    stuck: bool,
    age: float,
) -> Explanation:
    bindable = Bindable(*(trials[options] is None for options in _OPTIONS))
    failed = trials[False, False]
    situation = _situation(address, failed, bindable, holders, stuck)
    free_after = _free_after(situation, bindable, holders, age)
    case = _Case(address, bindable, holders, found, free_after)
    title, rule, advice = getattr(case, situation.replace("-", "_"))()
    return Explanation(
        address=address,
        situation=situation,
        title=title,
        bindable=bindable,
        holders=holders,
        rule=rule,
        free_after=free_after,
        advice=tuple(advice),
        warnings=tuple(case.warnings()),
        errno=errno.errorcode.get(failed[1]) if failed else None,
        call=failed[0] if failed else None,
    )


def _free_after(
    situation: str, bindable: Bindable, holders: tuple[Holder, ...], age: float
) -> float | None:
    """In seconds from now, `age` seconds after the holders were shown."""
    if bindable.plain:
        return 0.0
    left = [holder.gone_after for holder in holders if holder.gone_after is not None]
    if situation in _FREED_BY or not left or len(left) < len(holders):
        return None
    return max(max(left) - age, 0.0) + _RUN_LATE


def _situation(
    address: Address,
    failed: tuple[str, int] | None,
    bindable: Bindable,
    holders: tuple[Holder, ...],
    stuck: bool,
) -> str:
    if failed is None:
        return "free"
    call, code = failed
    if code == errno.EACCES and address[1] < _privileged():
        return "privileged-port"
    if code in (errno.EACCES, errno.EPERM):
        return "forbidden"
    if code in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
        return "address-not-local"
    if code == errno.EINVAL:
        return "link-local-without-interface"
    if code != errno.EADDRINUSE:
        raise OSError(code, f"{address_text(address)}: {call}() fails: {os.strerror(code)}")
    if address[1] == 0:
        return "ephemeral-range-exhausted"
    if not holders:
        return "listen-refused" if call == "listen" else "not-visible"
    first = holders[0]
    if first.kind == "listener":
        return _listener_situation(_shown(address[0]), holders, stuck)
    if call == "listen":
        return "listen-refused"
    if first.kind in ("time-wait", "fin-wait-2", "bound", "close-wait", "connection"):
        return {
            "time-wait": f"time-wait-{'with' if bindable.reuse_address else 'without'}-reuse",
            "fin-wait-2": "fin-wait-2-owned",
            "bound": "bound-not-listening",
            "close-wait": "close-wait-leak",
            "connection": "live-connection",
        }[first.kind]
    return first.kind


def _listener_situation(host: str, holders: tuple[Holder, ...], stuck: bool) -> str:
    listeners = [holder for holder in holders if holder.kind == "listener"]
    first = listeners[0]
    me = user_name(os.geteuid())
    if any(holder.inherited for holder in listeners):
        return "inherited-listener"
    if first.reuse_port and first.user != me:
        return "other-users-listener"
    if stuck:
        return "listen-refused"
    if len({holder.where for holder in listeners}) < len(listeners):
        return "shared-listener"
    theirs = first.local[0]
    if theirs == "::" and ":" not in host:
        return "ipv6-wildcard"
    if host == "::" and ":" not in theirs:
        return "ipv4-under-ipv6-wildcard"
    if theirs != host:
        return (
            "wildcard-over-specific" if theirs in ("0.0.0.0", "::") else "specific-under-wildcard"
        )
    return "live-listener"


_Said: TypeAlias = tuple[str, str, list[str]]

_FREED_BY: Final = {
    "privileged-port": "not for this user, whatever the time",
    "forbidden": "not for this process, whatever the time",
    "address-not-local": "when the address is one of this machine's",
    "link-local-without-interface": "not without an interface",
    "ephemeral-range-exhausted": "when a socket in that range ends",
}
_ONE_ADDRESS: Final = "For good: have each server bind the one address it serves."
_REUSE: Final = (
    "For good: set SO_REUSEADDR before bind() in every run of the server, the first included; "
    "asyncio, trio and most servers do."
)
_CLIENT_CLOSES: Final = (
    "Or: let the clients close first (TIME_WAIT is then theirs, on ports nobody wants)."
)
_RESERVE: Final = (
    "For good: choose a port outside net.ipv4.ip_local_port_range, or add it to "
    "net.ipv4.ip_local_reserved_ports, so that no client is dealt it."
)


@define
class _Case:
    """What is to be said of each situation: a title, the rule, and advice."""

    address: Address
    bindable: Bindable
    holders: tuple[Holder, ...]
    found: list[Details]
    free_after: float | None

    # Words for the parts

    def _who(self, holder: Holder) -> str:
        if holder.pid is None:
            of = f" of user {holder.user}" if holder.user else ""
            whose = "another user's or a container's"
            where = "in a container, or outside this one" if os.geteuid() == 0 else whose
            return f"a process{of} that cannot be seen from here ({where})"
        many = f" and {len(holder.pids) - 1} more" if len(holder.pids) > 1 else ""
        return f"{holder.process} (pid {holder.pid}{many}, user {holder.user})"

    def _stop(self, when: str = "Now") -> str:
        """How to have those that hold it let go."""
        first = self.holders[0]
        pids = {pid for holder in self.holders for pid in holder.pids}
        how, note = "stop that process", ""
        if first.pid is None and os.geteuid() != 0:
            how = "ask as root which process it is (sudo timewait explain) and stop it"
        elif first.process == "systemd":
            how = "stop the socket unit (`systemctl list-sockets` names it)"
            note = " To stop its service alone leaves the port taken."
        elif first.process == "docker-proxy":
            how = f"stop the container (`docker ps --filter publish={self.address[1]}`)"
        elif len(pids) > 1:
            how = "stop all those processes"
            note = " The port is held until the last of them lets go."
        elif first.process_state in ("T", "t"):
            how = f"stop that process (kill -KILL {first.pid})"
            note = " It is suspended, and takes no other signal."
        elif first.process_state == "D":
            note = " It waits uninterruptibly (state D), and ends when that wait does."
        return f"{when}: {how}, or choose another port.{note}"

    def _bound_to(self, holder: Holder) -> str:
        if holder.interface is None or "%" in self.address[0]:
            return ""
        return (
            f" It is bound to interface {holder.interface} (SO_BINDTODEVICE); a server that names "
            "no interface overlaps it, one that names another does not."
        )

    def _count(self, kind: str) -> str:
        count = sum(holder.kind == kind for holder in self.holders)
        return "one connection" if count == 1 else f"{count} connections"

    def _reuse_rule(self, holder: str, owner: str = "the holder") -> str:
        """SO_REUSEADDR's rule for anything but a listener, and what it means here."""
        rule = f"A port is shared with {holder} only if both sides set SO_REUSEADDR"
        if self.bindable.reuse_address:
            return (
                f"{rule} (or both SO_REUSEPORT). Here {owner} has it, so a server that sets it "
                "binds now; one that does not must wait."
            )
        if self.bindable.reuse_port:
            return (
                f"{rule}, or both SO_REUSEPORT. Here {owner} has set SO_REUSEPORT alone, so only "
                "a server that sets that may bind now."
            )
        return (
            f"{rule} (or both SO_REUSEPORT), the holder when it was made. Here {owner} did not "
            "set SO_REUSEADDR, so setting it now does not help."
        )

    def _reuse_now(self, otherwise: str) -> str:
        if self.bindable.reuse_address:
            return "Now: start the server with SO_REUSEADDR set before bind()."
        if self.bindable.reuse_port:
            return "Now: start the server with SO_REUSEPORT set before bind()."
        return otherwise

    def _wait(self, condition: str = "") -> str:
        if self.free_after is None:
            return "Now: wait, or choose another port."
        return (
            f"Now: wait; it is free in {self.free_after:.1f} s{condition}. Or choose another port."
        )

    # The situations

    def free(self) -> _Said:
        if self.address[1] == 0:
            return "it is free", "bind() to port 0 is dealt a port that nothing has.", []
        return "it is free", "Nothing that overlaps this address has the port.", []

    def privileged_port(self) -> _Said:
        start = _privileged()
        return (
            "it is a privileged port",
            f"Ports below {start} (net.ipv4.ip_unprivileged_port_start) may be bound only with "
            "CAP_NET_BIND_SERVICE; whether anybody has it cannot be tried without.",
            [
                f"Now: choose a port from {start} on, or run as root.",
                "For good: give the program the capability (setcap cap_net_bind_service=+ep, or "
                "AmbientCapabilities= in its systemd unit), or let a proxy or socket unit "
                "listen for it.",
            ],
        )

    def forbidden(self) -> _Said:
        return (
            "a security policy forbids it",
            "bind() is refused to this process before the kernel looks who has the port: by "
            "SELinux (name_bind), AppArmor, Landlock, a seccomp filter or a BPF program of its "
            "control group.",
            [
                "Now: look for the denial (`ausearch -m avc`, `dmesg`), or choose a port that the "
                "policy grants.",
                "For good: grant it, as with `semanage port`, or `RestrictAddressFamilies=` and "
                "`SocketBindAllow=` of a systemd unit.",
            ],
        )

    def address_not_local(self) -> _Said:
        return (
            "the address is not this machine's",
            f"bind() takes an address of one of this machine's interfaces (in this network "
            f"namespace), and {self.address[0]} is none.",
            [
                "Now: bind one that `ip address` lists, or 0.0.0.0 or :: for all.",
                "For good: a server that must start before its address is there sets IP_FREEBIND "
                "(or net.ipv4.ip_nonlocal_bind=1).",
            ],
        )

    def link_local_without_interface(self) -> _Said:
        host = self.address[0]
        return (
            "a link-local address goes with an interface",
            f"Every interface has its own {host.partition('%')[0]}: bind() must be told which "
            "(sin6_scope_id), and refuses with EINVAL otherwise.",
            [f"Now: name it, as in [{host}%eth0]:{self.address[1]}, or bind ::."],
        )

    def ephemeral_range_exhausted(self) -> _Said:
        low, high = _dealt_out()
        return (
            "the kernel has no port left to deal out",
            f"bind() to port 0 takes a port of net.ipv4.ip_local_port_range ({low} to {high}), "
            "and each of them is held by a socket that does not share it, TIME_WAIT included.",
            [
                "Now: bind a port outside the range by number; or wait for TIME_WAIT to end.",
                "For good: widen net.ipv4.ip_local_port_range; let clients connect() without "
                "bind(), or with IP_BIND_ADDRESS_NO_PORT, so that a port serves once for each "
                "destination.",
            ],
        )

    def not_visible(self) -> _Said:
        return (
            "something holds it that cannot be seen",
            "The kernel refuses, and shows no socket that overlaps: one that is only bound on a "
            "kernel before 6.8, one of another protocol family's, or one that has just gone.",
            ["Now: try again; as root, look with `ss -tanp` in the other network namespaces."],
        )

    def live_listener(self) -> _Said:
        first = self.holders[0]
        rule = (
            "A listener shares its port only with servers that set SO_REUSEPORT as it did itself, "
            "and of the same user; SO_REUSEADDR does not help."
        )
        if first.user not in (None, user_name(os.geteuid())):
            rule += f" It is {first.user}'s, so not even that helps here."
        return f"{self._who(first)} listens on it", rule + self._bound_to(first), [self._stop()]

    def shared_listener(self) -> _Said:
        listeners = [holder for holder in self.holders if holder.kind == "listener"]
        names = ", ".join(dict.fromkeys(self._who(holder) for holder in listeners))
        return (
            f"{len(listeners)} listeners share it: {names}",
            "All of them set SO_REUSEPORT: the kernel deals each new connection to one of them, "
            "and lets in any further server of the same user that sets it too.",
            [
                "Now: if one is a leftover, stop it: it is still given its share of connections.",
                "For good: set SO_REUSEPORT only where several processes are to serve one port.",
            ],
        )

    def other_users_listener(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on it",
            f"It set SO_REUSEPORT, but shares only with servers of the same user ({first.user}): "
            "so that nobody takes over part of another user's connections.",
            [f"Now: run the server as {first.user}, or stop the other, or choose another port."],
        )

    def inherited_listener(self) -> _Said:
        first = next(holder for holder in self.holders if holder.inherited)
        return (
            f"{self._who(first)} still listens on it, as the heir of a process that has ended",
            "A fork (or an exec without close-on-exec) gives the child a copy of the listening "
            "socket; the port is held until the last copy is closed, and this child lives on.",
            [
                f"Now: stop process {first.pid}.",
                "For good: have the server stop its children when it ends (PR_SET_PDEATHSIG, "
                "process groups), and keep the socket from programs it starts (close-on-exec).",
            ],
        )

    def ipv6_wildcard(self) -> _Said:
        return (
            f"{self._who(self.holders[0])} listens on [::], which takes IPv4 as well",
            "A listener on the IPv6 wildcard that did not set IPV6_V6ONLY overlaps every address "
            "of both families.",
            [self._stop(), "For good: set IPV6_V6ONLY on it, if it is to serve IPv6 alone."],
        )

    def ipv4_under_ipv6_wildcard(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on {first.where}, and [::] takes IPv4 too",
            "The IPv6 wildcard overlaps every address of both families, unless the server that "
            "binds it sets IPV6_V6ONLY." + self._bound_to(first),
            [self._stop()]
            if any(":" in holder.local[0] for holder in self.holders)
            else [
                "Now: set IPV6_V6ONLY before bind(): then [::] has IPv6 alone.",
                self._stop("Or"),
            ],
        )

    def wildcard_over_specific(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on {first.where}, which includes it",
            "A wildcard overlaps every address of its family; being more specific does not help."
            + self._bound_to(first),
            [self._stop(), _ONE_ADDRESS],
        )

    def specific_under_wildcard(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on {first.where}, a part of it",
            "A wildcard overlaps every address of its family: one that is taken refuses them all."
            + self._bound_to(first),
            [self._stop(), _ONE_ADDRESS],
        )

    def listen_refused(self) -> _Said:
        return (
            "bind() can succeed here, and listen() is refused then",
            "Sockets that all set SO_REUSEADDR may be bound to one port as long as none of them "
            "listens. The kernel looks again at listen(): the first to listen has the port, and "
            "the others, bound as they are, get EADDRINUSE from listen().",
            [
                self._stop(),
                "For good: take the error of listen() as seriously as that of bind(); do not "
                "start two copies of the server.",
            ],
        )

    def bound_not_listening(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} has bound it, and neither listens nor connects",
            self._reuse_rule("a socket that is only bound"),
            [
                self._stop(),
                "For good: call listen() soon after bind(), and close what is given up.",
            ],
        )

    def self_connect(self) -> _Said:
        return (
            f"a connection to itself holds it: {self._who(self.holders[0])}",
            "A client that kept calling this port while nobody listened was dealt that very port "
            "as its own and connected to itself (simultaneous open). " + self._reuse_rule("it"),
            [
                self._reuse_now("Now: stop or restart that client."),
                "For good: have clients that retry check getsockname() != getpeername(). "
                + _RESERVE.removeprefix("For good: "),
            ],
        )

    def close_wait_leak(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._count('close-wait')} in CLOSE_WAIT hold it: {self._who(first)}",
            "The peer has closed and this side's application has not: CLOSE_WAIT has no timer and "
            "lasts until it calls close(). " + self._reuse_rule("a connection"),
            [
                self._reuse_now("Now: stop or restart that process."),
                "For good: close a connection when it reports end of file (recv() returns b'').",
            ],
        )

    def fin_wait_2_owned(self) -> _Said:
        return (
            f"{self._count('fin-wait-2')} half closed by {self._who(self.holders[0])} hold it",
            "It shut down its sending side and keeps the socket to read on: FIN_WAIT_2 with an "
            "owner has no timer (net.ipv4.tcp_fin_timeout is for orphans alone). "
            + self._reuse_rule("a connection"),
            [
                self._reuse_now("Now: have that process close the socket, or stop it."),
                "For good: give the wait for the peer's end a time limit of the application's.",
            ],
        )

    def outbound_connection(self) -> _Said:
        first = self.holders[0]
        return (
            f"a client's connection to {address_text(first.remote)} uses it: {self._who(first)}",
            "connect() was dealt this port from net.ipv4.ip_local_port_range, and a client's port "
            "is taken like any other. " + self._reuse_rule("a connection"),
            [self._reuse_now("Now: wait for that connection to end, or end it."), _RESERVE],
        )

    def live_connection(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._count('connection')} of a server that no longer listens: {self._who(first)}",
            "Connections keep the server's port when the listener is gone. "
            + self._reuse_rule("a connection"),
            [self._reuse_now("Now: have that process close them, or stop it."), _REUSE],
        )

    def last_ack(self) -> _Said:
        return (
            f"{self._count('last-ack')} in LAST_ACK: the peer has not acknowledged the end",
            "Both sides have closed; the kernel repeats the last FIN until the peer answers, or "
            "gives up after net.ipv4.tcp_orphan_retries (8 by default: some 100 s at the most, "
            "when the peer has vanished). " + self._reuse_rule("a connection"),
            [self._reuse_now("Now: wait, or choose another port."), _REUSE],
        )

    def closing(self) -> _Said:
        return (
            f"{self._count('closing')} on the way out: this side's end is not acknowledged",
            "The kernel repeats what is unsent and the FIN until the peer answers or it gives up "
            "(net.ipv4.tcp_orphan_retries). " + self._reuse_rule("a connection"),
            [self._reuse_now("Now: wait, or choose another port."), _REUSE],
        )

    def fin_wait_2_orphan(self) -> _Said:
        return (
            f"{self._count('fin-wait-2-orphan')} that the peer has not closed: FIN_WAIT_2",
            "The server closed and nobody owns the socket any more; the kernel waits for the "
            "peer's FIN as long as net.ipv4.tcp_fin_timeout says, and if it comes, 60 s of "
            "TIME_WAIT begin. " + self._reuse_rule("an orphan"),
            [self._reuse_now(self._wait(", if the peer says nothing")), _REUSE],
        )

    def time_wait_with_reuse(self) -> _Said:
        return (
            f"{self._count('time-wait')} of a former server in TIME_WAIT",
            self._reuse_rule("a connection in TIME_WAIT", "the former server"),
            [self._reuse_now(""), _REUSE],
        )

    def time_wait_without_reuse(self) -> _Said:
        return (
            f"{self._count('time-wait')} of a former server in TIME_WAIT",
            self._reuse_rule("a connection in TIME_WAIT", "the former server"),
            [
                self._reuse_now(self._wait()),
                _REUSE,
                _CLIENT_CLOSES,
            ],
        )

    def outbound_time_wait(self) -> _Said:
        first = self.holders[0]
        return (
            f"a client's connection to {address_text(first.remote)} that has ended: TIME_WAIT",
            "connect() was dealt this port and closed first; for 60 s it is taken like a "
            "server's. " + self._reuse_rule("it"),
            [self._reuse_now(self._wait()), _RESERVE],
        )

    # Binds that would succeed, and should not

    def warnings(self) -> Iterator[str]:
        """What goes wrong although a bind succeeds."""
        listeners = [holder for holder in self.holders if holder.kind == "listener"]
        if listeners and (self.bindable.reuse_port or self.bindable.both):
            yield (
                "A server that sets SO_REUSEPORT would bind, and the two would share: each new "
                "connection goes to either of them."
            )
        bound = [holder for holder in self.holders if holder.kind == "bound"]
        if bound and not listeners and self.bindable.reuse_address:
            yield (
                "A server that sets SO_REUSEADDR would bind beside a socket that is only bound; "
                "whichever listens first has the port, and the other's listen() fails."
            )
        if self.bindable.plain:
            for one in self.found:
                if one.row.state is _S.LISTEN:
                    where = _where(one.row.local, _interface_name(one.interface))
                    yield (
                        f"Another server listens on {where}: clients that "
                        "call this machine by another of its addresses reach that one."
                    )

"""Bind a port for real, and see who is in the way.

What `timewait.explain` puts into words: which of a server's choices of options
the kernel lets have the port, found by trying, and which sockets refuse the
others: what kind each is, whose, and when its timer has ended it.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Collection, Container, Iterator, Sequence
from functools import cache
from ipaddress import ip_address
from itertools import count
from typing import Any, Final, TypeAlias

from attrs import frozen

from timewait.events import Address, Row
from timewait.kernel.namespace import sysctl
from timewait.kernel.observers import psutil_rows
from timewait.kernel.processes import owners, reuse_options, user_name
from timewait.kernel.sock_diag import (
    Details,
    address_text,
    details,
    ends_in,
    fin_timeout,
    port_number,
    second_time,
    sockets,
)
from timewait.kernel.ticks import fires_in, jiffies, tick
from timewait.tcp.states import State

__all__ = [
    "Bindable",
    "Found",
    "Holder",
    "addresses",
    "can_bind",
    "can_bind_all",
    "dealt_out",
    "end_text",
    "first_unprivileged",
    "interface_name",
    "look",
    "parse_address",
    "port_number",
    "shown_as",
]

_S = State


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
        return end_text(self.local, self.interface)

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
            "remote": end_text(self.remote),
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
class Found:
    """What a try to bind (`address`) showed.

    `failed` is the call that fails a server that sets nothing, and its errno.
    `holders` are those who refuse it, the one that will stay longest first;
    `sockets` all that are on the port. They were shown `age` seconds ago.
    `cannot_listen` says that one of the holders is bound and its listen()
    would be refused.
    """

    address: Address
    failed: tuple[str, int] | None
    bindable: Bindable
    holders: tuple[Holder, ...]
    sockets: tuple[Details, ...]
    cannot_listen: bool
    age: float


def look(port: int, host: str) -> Found:
    """Try to bind a numeric address with each choice of options, and see who is in the way.

    Again and again for a tenth of a second, where what is seen and what was answered disagree.
    """
    late = time.monotonic() + _PATIENCE
    for again in count(1):
        failed = None if port else _try(host, port, False, False, listen=False)
        some = port == 0 and failed != ("bind", errno.EADDRINUSE)  # are left to be dealt out
        found = [] if some else _sockets(port)
        looked = 0
        if any(one.row.timer for one in found):
            began = time.monotonic()
            looked = jiffies()
            if time.monotonic() - began > tick():  # it takes a while the first time
                found, looked = _sockets(port), jiffies()
        trials = _trials(host, port, listen=all(one.row.state is not _S.LISTEN for one in found))
        mine = shown_as(host), _interface(host), _v6only()
        only = {one.row.local[0] for one in found if one.v6only}
        there = [
            one
            for one in found
            if _overlapping(*mine, one) or _of_both_families(mine[0], one, only)
        ]
        # A server that came or went after the look answered some of the trials, unseen.
        steady = _servers(found) == _servers(_sockets(port, _SERVING)) and _agree(trials, there)
        if trials[False, False] is None:
            there = []  # What does not refuse a server that sets nothing holds nothing.
        last = some or (again >= _LOOKS and time.monotonic() > late)
        if steady or last:
            holders = list(_holders(there, looked))
            hidden = any(holder.user and not holder.pids for holder in holders)
            # Its process cannot be seen, or closed it before it was looked for.
            if last or not hidden or _servers(there, _ALL) <= _servers(_sockets(port), _ALL):
                break
    cannot_listen = _cannot_listen(list(zip(there, holders, strict=True)), trials)
    # The one that will stay longest decides, and is told of first; of several the nearest.
    holders.sort(key=lambda each: (*_weight(each), each.local[0] != mine[0]))
    age = (jiffies() - looked) * tick() if looked else 0.0
    return Found(
        address=(host, port),
        failed=trials[False, False],
        bindable=Bindable(
            plain=trials[False, False] is None,
            reuse_address=trials[True, False] is None,
            reuse_port=trials[False, True] is None,
            both=trials[True, True] is None,
        ),
        holders=tuple(holders),
        sockets=tuple(found),
        cannot_listen=cannot_listen,
        age=age,
    )


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
        if failed is None and (port == 0 or not _sockets(port, [_S.LISTEN])):
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

    An empty one means all of IPv4, as in bind().

    Raises `OSError` (`socket.gaierror`) that says so where it has none, or
    names an interface that is not there.
    """
    host = str(host or "0.0.0.0")
    try:
        address = ip_address(host)
    except ValueError:
        pass
    else:
        _interface(host)
        _resolved(host, socket.AI_NUMERICHOST)
        mapped = getattr(address, "ipv4_mapped", None)
        # As all Pythons but old do.
        return [str(address) if mapped is None else f"::ffff:{mapped}"]
    return _resolved(host)


def _resolved(host: str, flags: int = 0) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
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


def end_text(end: Address, interface: str | None = None) -> str:
    """As `ss` writes it, port 0 as a star."""
    host, port = end
    text = address_text((host if interface is None else f"{host}%{interface}", port))
    return text if port else f"{text[:-1]}*"


_OPTIONS: Final = ((False, False), (True, False), (False, True), (True, True))
_ELSEWHERE: Final = ("127.84.87.0", "::1")  # where hardly anybody is
_LOOKS, _PATIENCE = 3, 0.1  # looks and seconds for a port whose servers come and go
_ALL: Final = tuple(State)
_SERVING: Final = (_S.LISTEN, _S.CLOSED)
_FOR_GOOD: Final = {
    errno.EACCES: "a privileged port",
    errno.EADDRNOTAVAIL: "not an address of this machine",
    errno.EAFNOSUPPORT: "this machine has no such addresses",
    errno.EINVAL: "a link-local address needs its interface, as in fe80::1%eth0",
}
_Trials: TypeAlias = dict[tuple[bool, bool], tuple[str, int] | None]
_ORDER: Final = (
    *("listener", "bound", "self-connect", "close-wait", "connection", "fin-wait-2"),
    *("outbound-connection", "last-ack", "closing", "fin-wait-2-orphan"),
    *("time-wait", "outbound-time-wait"),
)


def _servers(found: list[Details], states: Container[State] = _SERVING) -> set[int]:
    return {one.cookie for one in found if one.row.state in states}


def _trials(host: str, port: int, *, listen: bool) -> _Trials:
    """What became of each choice of SO_REUSEADDR and SO_REUSEPORT.

    A bind with both beside holders with the first has the kernel let in those with the second
    alone from then on (inet_csk_update_fastreuse: FASTREUSEPORT_STRICT), until one with the first
    alone is let in, be it for another address. So one is, before the second alone is tried, for
    what others did, and at the end.
    """
    trials: _Trials = {}
    for options in _OPTIONS:
        trials[options] = _try(host, port, *options, listen=listen)
        if options[0] and port:
            any(_try(each, port, True, False, listen=False) is None for each in (host, *_ELSEWHERE))
    return trials


def _agree(trials: _Trials, there: list[Details]) -> bool:
    """Whether these answers can be of one moment, in which there were these sockets."""
    if any(failed and failed[1] != errno.EADDRINUSE for failed in trials.values()):
        return True  # no socket is in the way
    plain, address, share, both = (trials[options] is None for options in _OPTIONS)
    listens = any(one.row.state is _S.LISTEN for one in there)
    more_is_better = plain <= min(address, share) and max(address, share) <= both
    return more_is_better and bool(plain or there) and not (address and listens)


def _sockets(port: int, states: Collection[State] = _ALL) -> list[Details]:
    """The sockets in these states whose own end is on the port, bound ones as CLOSED.

    On port 0, those on the ports that bind() to it is dealt.
    """
    try:
        found = details(port or None, states=states, info=True)
    except OSError:  # not Linux, or a kernel without sock_diag
        found = [
            Details(row, socket.AF_INET6 if ":" in row.local[0] else socket.AF_INET, 0)
            for row, _ in psutil_rows()
            if row.state in states
        ]
    ports = {port} if port else {*dealt_out()} - _reserved()
    # A request that no connection has come of has no port of its own, and outlives its listener.
    return [
        one
        for one in found
        if one.row.local[1] in ports
        and (one.row.state is not _S.SYN_RECEIVED or one.row.inode != 0)
    ]


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
def shown_as(host: str) -> str:
    """An address as the kernel shows it: IPv4's as such where mapped, without its interface."""
    address = ip_address(host.partition("%")[0])
    return str(getattr(address, "ipv4_mapped", None) or address)


def _overlapping(host: str, interface: int, v6only: bool, one: Details) -> bool:
    """Whether a socket's own address and one on `interface` are or contain each other."""
    theirs = one.row.local[0]
    if interface and one.interface and interface != one.interface:
        return False
    if theirs == host:
        return True
    if host == "::":
        return ":" in theirs or not v6only
    if theirs == "::":
        return ":" in host or one.v6only is not True
    if "0.0.0.0" in (host, theirs):
        return ":" not in host + theirs
    return False


def _of_both_families(host: str, one: Details, only: set[str]) -> bool:
    """Whether an IPv6 socket's IPV6_V6ONLY alone has it meet IPv4's wildcard, as far as known.

    So it is with all but those that were bound to an address, wherever it is connected to by now
    (ipv4_rcv_saddr_equal, of sockets to which __inet6_bind has not given IPV6_V6ONLY). It is not
    told of those that are connected, but of the listener that they may come from: `only` are the
    addresses of those that have it.
    """
    if host != "0.0.0.0" or ":" not in one.row.local[0] or one.row.state in _SERVING:
        return False
    return only.isdisjoint(("::", one.row.local[0]))


def _v6only() -> bool:
    """Whether a server that sets nothing has IPV6_V6ONLY."""
    try:
        return sysctl("net.ipv6.bindv6only") == "1"
    except OSError:
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
    return _overlapping(one.row.local[0], one.interface, one.v6only is True, other)


def _holders(found: list[Details], looked: int) -> Iterator[Holder]:
    """Those who hold the port, of sockets that were shown at `looked`, in jiffies."""
    processes = owners(one.row.inode or 0 for one in found)
    served = {one.row.local[1] for one in found if one.row.state is _S.LISTEN}
    ports = dealt_out()
    clients = {one.row.local[1] for one in found} - served
    listening = _listening() if clients else frozenset()
    for one in found:
        row = one.row
        who = processes.get(row.inode or 0, [])
        options = reuse_options(who[0]) if who else None
        yield Holder(
            kind=_kind(one, row.local[1] in served, ports, listening),
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
            interface=interface_name(one.interface),
            process_state=who[0].state if who else None,
        )


def _weight(holder: Holder) -> tuple[int, float]:
    return _ORDER.index(holder.kind), -(holder.seconds_left or 0.0)


def interface_name(index: int) -> str | None:
    """An interface's name, its number where it has none here, None for no interface."""
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
    if row.timer == "keepalive":
        again = second_time(row.seconds_left or 0.0)
        first = fires_in(left - again, again, looked)
        return first + fires_in(again, again, looked + round(first / tick()))
    whole = fin_timeout()
    return fires_in(left, max(whole - 60.0 if whole > 60 else whole, left), looked)


def first_unprivileged() -> int:
    """The first port that needs no privilege."""
    try:
        return int(sysctl("net.ipv4.ip_unprivileged_port_start"))
    except OSError:
        return 1024


def dealt_out() -> range:
    """The ports that the kernel deals out to those who ask for any."""
    try:
        low, high = map(int, sysctl("net.ipv4.ip_local_port_range").split())
    except OSError:
        low, high = 49152, 65535  # RFC 6335 §6, as most systems but Linux have it
    return range(low, high + 1)


def _reserved() -> set[int]:
    """Those of them that it does not (net.ipv4.ip_local_reserved_ports)."""
    try:
        spans = sysctl("net.ipv4.ip_local_reserved_ports").split(",")
    except OSError:
        return set()
    ends = [each.partition("-") for each in spans if each]
    return {port for low, _, high in ends for port in range(int(low), int(high or low) + 1)}


def _kind(one: Details, served: bool, ports: range, listening: Container[Address]) -> str:
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
                or (row.local[1] in ports and row.remote[1] not in ports)
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

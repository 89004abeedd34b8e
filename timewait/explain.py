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
import textwrap
from collections.abc import Iterator
from math import inf
from typing import Any, Final, TypeAlias

from attrs import define, frozen

from timewait.bind import (
    Bindable,
    Found,
    Holder,
    addresses,
    can_bind,
    can_bind_all,
    dealt_out,
    end_text,
    first_unprivileged,
    interface_name,
    look,
    parse_address,
    port_number,
    shown_as,
)
from timewait.events import Address
from timewait.kernel.processes import may_be_a_daemon, user_name
from timewait.kernel.sock_diag import Details, address_text
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

_TIMED: Final = ("fin-wait-2-orphan", "time-wait", "outbound-time-wait")
_LEAVES_TIME_WAIT: Final = ("connection", "outbound-connection", "self-connect", "fin-wait-2")
_MANY: Final = 12  # holders that are listed one by one
_RUN_LATE: Final = 0.01  # seconds by which the kernel may run a timer after its tick


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
                which = "last" if self.address[1] else "first"
                free = f"in {self.free_after:.1f} s, when the kernel looks at its {which} timer"
            elif self.address[1] == 0:
                free = "when a socket in that range ends"
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
    # is in the way of the server, and what will be so longest is told.
    return min((_explanation(look(port, each)) for each in addresses(host)), key=_urgency)


def _urgency(found: Explanation) -> tuple[int, float]:
    if found:
        return 1, 0.0
    if found.situation == "address-not-local":
        return 2, 0.0
    return 0, -inf if found.free_after is None else -found.free_after


def _wrapped(name: str, text: str) -> list[str]:
    pad = f"{name}: ".ljust(10)
    return textwrap.wrap(text, 96, initial_indent=pad, subsequent_indent=" " * 10)


def _explanation(found: Found) -> Explanation:
    situation = _situation(found)
    free_after = _free_after(situation, found)
    case = _Case(found.address, found.bindable, found.holders, found.sockets, free_after)
    title, rule, advice = getattr(case, situation.replace("-", "_"))()
    advice[1:1] = case.then()
    return Explanation(
        address=found.address,
        situation=situation,
        title=title,
        bindable=found.bindable,
        holders=found.holders,
        rule=rule,
        free_after=free_after,
        advice=tuple(advice),
        warnings=tuple(case.warnings()),
        errno=errno.errorcode.get(found.failed[1]) if found.failed else None,
        call=found.failed[0] if found.failed else None,
    )


def _free_after(situation: str, found: Found) -> float | None:
    """In seconds from now."""
    if found.bindable.plain:
        return 0.0
    if situation in _FREED_BY or not found.holders:
        return None
    ports: dict[int, float] = {}  # when its last socket will have gone
    for holder in found.holders:
        left = inf if holder.gone_after is None else holder.gone_after
        ports[holder.local[1]] = max(left, ports.get(holder.local[1], 0.0))
    first = min(ports.values())
    return None if first == inf else round(max(first - found.age, 0.0) + _RUN_LATE, 3)


def _situation(found: Found) -> str:
    if found.failed is None:
        return "free"
    address, holders, bindable = found.address, found.holders, found.bindable
    call, code = found.failed
    if code == errno.EACCES and address[1] < first_unprivileged():
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
        return _listener_situation(shown_as(address[0]), holders, found.cannot_listen)
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


def _listener_situation(host: str, holders: tuple[Holder, ...], cannot_listen: bool) -> str:
    listeners = [holder for holder in holders if holder.kind == "listener"]
    first = listeners[0]
    me = user_name(os.geteuid())
    if any(holder.inherited for holder in listeners):
        return "inherited-listener"
    if first.reuse_port and first.user != me:
        return "other-users-listener"
    if cannot_listen:
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
    sockets: tuple[Details, ...]
    free_after: float | None

    # Words for the parts

    def _who(self, holder: Holder) -> str:
        if holder.pid is None:
            of = f" of user {holder.user}" if holder.user else ""
            where = "another user's or a container's"
            if os.geteuid() == 0:
                where = "in a container, or outside this one"
            elif holder.user == user_name(os.geteuid()):
                where = "in a container, or with rights that this one has not"
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
        elif first.pid is None:
            how = "find that process outside this container, or in another, and stop it"
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

    def _apart(self, holder: Holder) -> str:
        """What of a listener decides too, besides its address."""
        said = ""
        if holder.user not in (None, user_name(os.geteuid())):
            said = (
                f" It is {holder.user}'s: SO_REUSEPORT, shared by one user's servers, is no help."
            )
        if holder.interface is None or "%" in self.address[0]:
            return said
        return (
            f"{said} It is bound to interface {holder.interface} (SO_BINDTODEVICE); a server that "
            "names no interface overlaps it, one that names another does not."
        )

    def _count(self, kind: str) -> str:
        count = sum(holder.kind == kind for holder in self.holders)
        return "one connection" if count == 1 else f"{count} connections"

    def _hold(self, kind: str) -> str:
        return "holds it" if self._count(kind) == "one connection" else "hold it"

    def _reuse_rule(self, holder: str, owner: str = "the holder") -> str:
        """SO_REUSEADDR's rule for anything but a listener, and what it means here."""
        rule = f"A port is shared with {holder} only if both sides set SO_REUSEADDR"
        if shown_as(self.address[0]) == "0.0.0.0" and any(
            ":" in each.local[0] for each in self.holders
        ):
            rule = (
                "Sockets of IPv6 that did not set IPV6_V6ONLY are in the way of 0.0.0.0 wherever "
                f"they are connected to. {rule}"
            )
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
        if self.bindable.both:
            return (
                f"{rule}, or both SO_REUSEPORT. Here some have set only the one and some only the "
                "other, so a server may bind now that sets both."
            )
        said = (
            f"{rule} (or both SO_REUSEPORT), the holder when it was made. Here {owner} did not "
            "set SO_REUSEADDR, so setting it now does not help."
        )
        theirs = {each.user for each in self.holders if each.reuse_port and each.user is not None}
        for user in sorted(theirs - {user_name(os.geteuid())}):
            said += f" It set SO_REUSEPORT, but shares only with sockets of the same user ({user})."
        return said

    def _reuse_now(self, otherwise: str) -> str:
        if self.bindable.reuse_address:
            return "Now: start the server with SO_REUSEADDR set before bind()."
        if self.bindable.reuse_port:
            return "Now: start the server with SO_REUSEPORT set before bind()."
        if self.bindable.both:
            return "Now: start the server with SO_REUSEADDR and SO_REUSEPORT set before bind()."
        return otherwise

    def _wait(self, condition: str = "") -> str:
        if self.free_after is None:
            return "Now: wait, or choose another port."
        return (
            f"Now: wait; it is free in {self.free_after:.1f} s{condition}. Or choose another port."
        )

    def then(self) -> Iterator[str]:
        """What comes after the first advice, which may not be all that it takes."""
        if self.address[1] == 0:
            return
        if self.free_after and not self.bindable.both:
            states = {holder.state.name.lower().replace("_", "-") for holder in self.holders}
            which = " ".join(f"state {state}" for state in sorted(states))
            yield (
                f"Or: end it at once, as root: ss -K {which} 'sport = :{self.address[1]}' (Linux "
                "6.0, CONFIG_INET_DIAG_DESTROY). What protects the next connections from the "
                "last ones' late segments is lost."
            )
        ended = [holder for holder in self.holders if holder.kind in _LEAVES_TIME_WAIT]
        ended = [holder for holder in ended if holder.state is not State.TIME_WAIT]
        if ended and not self.bindable.reuse_address:
            how = f"wait (timewait wait {self.address[1]})"
            if all(holder.reuse_address for holder in ended):
                how = "start the server with SO_REUSEADDR, or wait"
            yield (
                f"Then: {how}: connections that this side ends first keep the port for a "
                "minute more (TIME_WAIT), or two (FIN_WAIT_2 before it)."
            )

    # The situations

    def free(self) -> _Said:
        if self.address[1] == 0:
            return "it is free", "bind() to port 0 is dealt a port that nothing has.", []
        return "it is free", "Nothing that overlaps this address has the port.", []

    def privileged_port(self) -> _Said:
        start = first_unprivileged()
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
        ports = dealt_out()
        wait = "for a socket in it to end"
        if self.free_after is not None:
            wait = f"{self.free_after:.1f} s, when one is free"
        return (
            "the kernel has no port left to deal out",
            f"bind() to port 0 takes a port of net.ipv4.ip_local_port_range ({ports[0]} to "
            f"{ports[-1]}), and each of them is held by a socket that does not share it, "
            "TIME_WAIT included, or reserved.",
            [
                f"Now: bind a port outside the range by number; or wait {wait}.",
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
        return f"{self._who(first)} listens on it", rule + self._apart(first), [self._stop()]

    def shared_listener(self) -> _Said:
        listeners = [holder for holder in self.holders if holder.kind == "listener"]
        names = ", ".join(dict.fromkeys(self._who(holder) for holder in listeners))
        whose = listeners[0].user
        mine = whose in (None, user_name(os.geteuid()))
        return (
            f"{len(listeners)} listeners share it: {names}",
            "All of them set SO_REUSEPORT: the kernel deals each new connection to one of them, "
            "and lets in any further server of the same user that sets it too."
            + ("" if mine else f" They are {whose}'s, so not even that helps here."),
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
        rule = (
            "A fork (or an exec without close-on-exec) gives the child a copy of the listening "
            "socket; the port is held until the last copy is closed, and this child lives on."
        )
        if first.pid is not None and may_be_a_daemon(first.pid):
            rule += (
                " (Or it is a daemon: one that has forked twice looks the same, and may have "
                "opened the socket itself.)"
            )
        return (
            f"{self._who(first)} still listens on it, as the heir of a process that has ended",
            rule,
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
            "of both families." + self._apart(self.holders[0]),
            [self._stop(), "For good: set IPV6_V6ONLY on it, if it is to serve IPv6 alone."],
        )

    def ipv4_under_ipv6_wildcard(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on {first.where}, and [::] takes IPv4 too",
            "The IPv6 wildcard overlaps every address of both families, unless the server that "
            "binds it sets IPV6_V6ONLY." + self._apart(first),
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
            + self._apart(first),
            [self._stop(), _ONE_ADDRESS],
        )

    def specific_under_wildcard(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._who(first)} listens on {first.where}, a part of it",
            "A wildcard overlaps every address of its family: one that is taken refuses them all."
            + self._apart(first),
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
        first = self.holders[0]
        now, whose = "Now: stop or restart that client.", f"holds it: {self._who(first)}"
        if first.state is State.TIME_WAIT:
            now, whose = self._wait(), "that has ended holds it: TIME_WAIT"
        return (
            f"a connection to itself {whose}",
            "A client that kept calling this port while nobody listened was dealt that very port "
            "as its own and connected to itself (simultaneous open). " + self._reuse_rule("it"),
            [
                self._reuse_now(now),
                "For good: have clients that retry close a connection whose getsockname() is its "
                "getpeername(); " + _RESERVE.removeprefix("For good: "),
            ],
        )

    def close_wait_leak(self) -> _Said:
        first = self.holders[0]
        return (
            f"{self._count('close-wait')} in CLOSE_WAIT {self._hold('close-wait')}: "
            f"{self._who(first)}",
            "The peer has closed and this side's application has not: CLOSE_WAIT has no timer and "
            "lasts until it calls close(). " + self._reuse_rule("a connection"),
            [
                self._reuse_now("Now: stop or restart that process."),
                "For good: close a connection when it reports end of file (recv() returns b'').",
            ],
        )

    def fin_wait_2_owned(self) -> _Said:
        return (
            f"{self._count('fin-wait-2')} half closed by {self._who(self.holders[0])} "
            f"{self._hold('fin-wait-2')}",
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
            "Its process closed and nobody owns the socket any more; the kernel waits for the "
            "peer's FIN as long as net.ipv4.tcp_fin_timeout (or its TCP_LINGER2) says, and if it "
            "comes, 60 s of TIME_WAIT begin. " + self._reuse_rule("an orphan"),
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
        if self.address[1] and listeners and (self.bindable.reuse_port or self.bindable.both):
            beside = "A server that sets SO_REUSEPORT would bind, and "
            asked = shown_as(self.address[0])
            for theirs, where in sorted({(each.local[0], each.where) for each in listeners}):
                if theirs == asked:
                    outcome = "the two would share: each new connection goes to either of them."
                elif theirs == "::" or (theirs == "0.0.0.0" and asked != "::"):
                    outcome = (
                        f"take all new connections to {address_text(self.address)} from the one "
                        f"that listens on {where}: the kernel prefers the more specific."
                    )
                else:
                    outcome = (
                        f"the one that listens on {where} would keep all connections to that: "
                        "the kernel prefers the more specific."
                    )
                yield beside + outcome
        bound = [holder for holder in self.holders if holder.kind == "bound"]
        if self.address[1] and bound and not listeners and self.bindable.reuse_address:
            yield (
                "A server that sets SO_REUSEADDR would bind beside a socket that is only bound; "
                "whichever listens first has the port, and the other's listen() fails."
            )
        if self.bindable.plain:
            for one in self.sockets:
                if one.row.state is State.LISTEN:
                    where = end_text(one.row.local, interface_name(one.interface))
                    yield (
                        f"Another server listens on {where}: clients that "
                        "call this machine by another of its addresses reach that one."
                    )

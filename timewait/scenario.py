"""What a server and its clients do, as immutable data: fluent in Python, TOML on disk.

    Scenario(port=9090).listen().connect(2).close("server").restart()

A scenario says nothing about how it is done or on which stack; that is
`timewait.orchestrator`. It is checked as it is written: a step that cannot
come where it stands raises `ScenarioError` at once, naming the step.

The two ends of a connection are *applications*. Each reads until the end of
the stream and then closes its socket, unless its `reads` or `at_eof` says
otherwise: a client that never closes, a server that forgets to.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from ipaddress import ip_address
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, TypeAlias, get_args, get_type_hints

import tomli_w
from attrs import NOTHING, evolve, field, fields, frozen, validators
from cattrs import Converter

from timewait.events import strict_converter
from timewait.tcp.segment import ACK, FIN, HALF, PSH, RST, SYN, URG

if TYPE_CHECKING:
    from timewait.orchestrator import Stack
    from timewait.run import Run

__all__ = [
    "BUILT_IN",
    "WITH_FAULTS",
    "Abort",
    "Close",
    "Connect",
    "Eof",
    "Fault",
    "Inject",
    "Listen",
    "Pause",
    "Restart",
    "Scenario",
    "ScenarioError",
    "Send",
    "Shutdown",
    "Step",
    "Vanish",
]


class ScenarioError(ValueError):
    """A scenario that makes no sense, or that this machine cannot run; one line says why."""


AtEof: TypeAlias = Literal["close", "ignore"]


def _finite(_: object, attribute: Any, value: float) -> None:
    if not 0 <= value < inf:
        raise ValueError(f"{attribute.name!r} must be 0 or more, and finite: {value}")


def _whole(_: object, attribute: Any, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{attribute.name!r} must be a whole number: {value!r}")


_at_eof = validators.in_(get_args(AtEof))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _does(who: str, verb: str, what: str = "") -> str:
    several = {"client": "clients", "both": "both ends"}.get(who)
    ending = "es" if verb.endswith("sh") else "s"
    done = f"{several} {verb}" if several else f"{who} {verb}{ending}"
    return f"{done} {what}".rstrip()


@frozen
class Listen:
    """The server makes a socket, binds it to the scenario's address and listens.

    `reads` and `at_eof` are how its side of every connection behaves.
    """

    do: ClassVar = "listen"
    reuse_address: bool = False
    reuse_port: bool = False
    backlog: int = field(default=128, validator=[_whole, validators.ge(0), validators.lt(1 << 31)])
    reads: bool = True
    at_eof: AtEof = field(default="close", validator=_at_eof)

    def __str__(self) -> str:
        return "server listens"


@frozen
class Connect:
    """So many further clients connect, one after the other; they are numbered from 1.

    The machine of a `deaf` one hears nothing, so that it does not get beyond its
    SYN, and nobody waits for it. Only where the link is ours: "model" and "wire".
    """

    do: ClassVar = "connect"
    # A client takes a port of its address, so there can be no more.
    clients: int = field(default=1, validator=[_whole, validators.ge(1), validators.le(65535)])
    reuse_address: bool = False
    reuse_port: bool = False
    reads: bool = True
    at_eof: AtEof = field(default="close", validator=_at_eof)
    deaf: bool = False

    def __str__(self) -> str:
        deaf = "deaf " * self.deaf
        if self.clients == 1:
            return f"a {deaf}client connects"
        return f"{self.clients} {deaf}clients connect"


@frozen
class Send:
    """`who` sends `size` bytes on each of its connections."""

    do: ClassVar = "send"
    who: str
    size: int = field(default=100, validator=[_whole, validators.ge(1)])

    def __str__(self) -> str:
        return _does(self.who, "send", _plural(self.size, "byte"))


@frozen
class Shutdown:
    """`who` shuts down its sending side, shutdown(SHUT_WR), and goes on reading."""

    do: ClassVar = "shutdown"
    who: str

    def __str__(self) -> str:
        return _does(self.who, "end", "what they send" if self.who == "client" else "what it sends")


@frozen
class Close:
    """`who` closes: "server" its connections and its listener, "client" all clients,
    "client-2" or "server-2" one end of the second connection, "listener" that alone,
    "both" both ends of every connection in one go, then the listener.
    """

    do: ClassVar = "close"
    who: str

    def __str__(self) -> str:
        return _does(self.who, "close", "at once" if self.who == "both" else "")


@frozen
class Abort:
    """As `Close`, but with SO_LINGER {1, 0}: a RST instead of a FIN."""

    do: ClassVar = "abort"
    who: str

    def __str__(self) -> str:
        return _does(self.who, "abort")


@frozen
class Eof:
    """Wait until every connection of `who` has seen the end of the other's stream."""

    do: ClassVar = "eof"
    who: str

    def __str__(self) -> str:
        return _does(self.who, "see", "the end of the stream")


@frozen
class Pause:
    """Nobody does anything for so many seconds."""

    do: ClassVar = "pause"
    seconds: float = field(validator=_finite)

    def __str__(self) -> str:
        return f"{self.seconds:g} s pass"


@frozen
class Restart:
    """The server starts again at once: its listener, if still open, closes, a new one binds.

    An option that is None is as it was when the server first listened.
    """

    do: ClassVar = "restart"
    reuse_address: bool | None = None
    reuse_port: bool | None = None

    def __str__(self) -> str:
        return "server starts again"


@frozen
class Vanish:
    """The machine of `who` is gone without a word, and its sockets with it.

    Nothing passes between the two ends any more; with `back` the machine is
    there again at once, knows nothing, and answers with resets. With `deaf` it
    is not gone, but hears nothing any more; what it sends still arrives. Nobody waits
    for the other end to notice. Only where the link is ours: "model" and "wire".
    """

    do: ClassVar = "vanish"
    who: str
    back: bool = False
    deaf: bool = False

    def __attrs_post_init__(self) -> None:
        if self.back and self.deaf:
            raise ScenarioError("what is back is not deaf: give one of the two")

    def __str__(self) -> str:
        if self.deaf:
            return _does(self.who, "hear", "nothing any more")
        comes = "come" if self.who == "client" else "comes"
        return _does(self.who, "vanish", f"and {comes} back" if self.back else "")


@frozen
class Inject:
    """A segment that nobody sent arrives at `who`'s end, be it closed or in TIME_WAIT.

    `flags` are written as "RST" or "SYN,ACK". Its number is `offset` more than
    the one that end expects next (RCV.NXT). Only where the link is ours:
    "model" and "wire".
    """

    do: ClassVar = "inject"
    who: str
    flags: str = "RST"
    offset: int = field(default=0, validator=[_whole, validators.le(HALF), validators.gt(-HALF)])

    def __attrs_post_init__(self) -> None:
        self.bits  # noqa: B018

    @property
    def bits(self) -> int:
        """The flags as a segment has them. Raises `ValueError` for a name that is none."""
        total = 0
        for name in self.flags.split(","):
            if name not in _FLAGS:
                raise ValueError(f"flags {self.flags!r}: names of {', '.join(_FLAGS)} are expected")
            total |= _FLAGS[name]
        return total

    def __str__(self) -> str:
        where = f" {self.offset:+d}" if self.offset else ""
        return f"a forged {self.flags}{where} comes to {self.who}"


_FLAGS: Final = {"FIN": FIN, "SYN": SYN, "RST": RST, "PSH": PSH, "ACK": ACK, "URG": URG}

Step: TypeAlias = (
    Listen | Connect | Send | Shutdown | Close | Abort | Eof | Pause | Restart | Vanish | Inject
)


def _takes_a_link(step: Step) -> bool:
    """Whether it takes a link of one's own."""
    return isinstance(step, Vanish | Inject) or (isinstance(step, Connect) and step.deaf)


_ACTS: Final = ("drop", "delay", "duplicate", "reorder", "corrupt", "truncate")
_SEGMENTS: Final = ("any", "SYN", "SYN,ACK", "FIN", "RST", "ACK", "data", "last-ack")


@frozen
class Fault:
    """What the link does to chosen segments; only where the link is ours: "model" and "wire".

    `act` is "drop", "delay", "duplicate", "reorder" (it comes after the next
    one), "corrupt" (its checksum is wrong) or "truncate" (half of it is
    missing); `segments` "SYN", "SYN,ACK", "FIN", "RST", "ACK", "data",
    "last-ack" or "any"; `source` "server", "client" or "" for both. It strikes
    `times` segments (0: all) from the `nth` on; `seconds` is how long they are
    held up at most, or how much later they come again.
    """

    act: str = field(validator=validators.in_(_ACTS))
    segments: str = field(validator=validators.in_(_SEGMENTS))
    source: str = field(default="", validator=validators.in_(("", "server", "client")))
    nth: int = field(default=1, validator=[_whole, validators.ge(1)])
    times: int = field(default=1, validator=[_whole, validators.ge(0)])
    seconds: float = field(default=0.0, validator=[_finite, validators.ge(0)])


_STACKS: Final = ("kernel", "model", "wire")
_STEPS: Final[dict[str, type[Step]]] = {step.do: step for step in get_args(Step)}


@frozen
class Scenario:
    """A server, its clients, and what they do in which order.

    `host` is an address of this machine, IPv4 or IPv6; `port` 0 picks a free
    port when the scenario is run. `time_limit` is how long a step may take to
    settle, in seconds, a pause not counted. `stacks` names where it can run:
    "kernel", "model", "wire"; with `faults` on the link it needs one of the
    last two.

    Raises `ScenarioError` for steps that are out of order.
    """

    host: str = "127.0.0.1"
    port: int = 0
    steps: tuple[Step, ...] = ()
    name: str = "scenario"
    about: str = ""
    time_limit: float = field(default=10.0, validator=[validators.gt(0), validators.lt(inf)])
    stacks: tuple[str, ...] = _STACKS
    faults: tuple[Fault, ...] = ()

    def __attrs_post_init__(self) -> None:
        try:
            ip_address(self.host)
        except ValueError:
            raise ScenarioError(f"host {self.host!r} is not an IPv4 or IPv6 address") from None
        if not isinstance(self.port, int) or not 0 <= self.port <= 65535:
            raise ScenarioError(f"port {self.port!r} is not between 0 and 65535")
        if isinstance(self.stacks, str) or not self.stacks or set(self.stacks) - set(_STACKS):
            named = self.stacks if isinstance(self.stacks, str) else list(self.stacks)
            raise ScenarioError(f"stacks {named!r}: a list of {', '.join(_STACKS)} is expected")
        odd = any(map(_takes_a_link, self.steps))
        if (self.faults or odd) and "kernel" in self.stacks:
            what = "faults take" if self.faults else "vanish, inject and deaf clients take"
            raise ScenarioError(f"{what} a link of one's own: stacks are model and wire")
        listening, clients = False, 0
        ended: dict[str, str] = {}  # an end, and what its application has ended by itself
        for number, step in enumerate(self.steps, 1):
            wrong = _misplaced(step, listening, clients, ended)
            if wrong:
                raise ScenarioError(f"step {number}, {step.do}: {wrong}")
            if isinstance(step, Shutdown | Close | Abort | Vanish) and not (
                isinstance(step, Vanish) and step.deaf
            ):
                what = "sending" if isinstance(step, Shutdown) else "closed"
                ends = _ends(step.who, clients)
                ended |= {end: what for end in ends if ended.get(end) != "closed"}
            if isinstance(step, Listen | Restart):
                listening = True
            elif isinstance(step, Connect):
                clients += step.clients
            elif isinstance(step, Close | Abort) and step.who in ("server", "listener", "both"):
                listening = False

    @classmethod
    def built_in(cls, name: str, clients: int = 2) -> Scenario:
        """A built-in scenario by name, with so many clients ("peer-vanishes": at least 7).

        Raises `ScenarioError` for a name that is not built in, or fewer than one client.
        """
        known = BUILT_IN | WITH_FAULTS
        if name not in known:
            raise ScenarioError(f"no scenario is called {name!r}; there are {', '.join(known)}")
        if clients < 1:
            raise ScenarioError(f"{clients} clients: at least 1 is expected")
        about, build = known[name]
        return evolve(build(clients), name=name, about=about)

    @property
    def clients(self) -> int:
        """How many clients connect in all."""
        return sum(step.clients for step in self.steps if isinstance(step, Connect))

    def fault(
        self,
        act: str,
        segments: str,
        source: str = "",
        *,
        nth: int = 1,
        times: int = 1,
        seconds: float = 0.0,
    ) -> Scenario:
        """This scenario with something that happens to chosen segments (`Fault`)."""
        try:
            struck = Fault(act, segments, source, nth, times, seconds)
        except (TypeError, ValueError) as wrong:
            raise ScenarioError(f"fault: {_plainly(wrong)}") from None
        return evolve(self, faults=(*self.faults, struck), stacks=self._beyond)

    @property
    def _beyond(self) -> tuple[str, ...]:
        """Where it can run if the link must be ours."""
        return tuple(stack for stack in self.stacks if stack != "kernel")

    def then(self, kind: Callable[..., Step], /, *values: Any, **options: Any) -> Scenario:
        """This scenario with one more step; the methods below are this with a name."""
        try:
            step = kind(*values, **options)
        except (TypeError, ValueError) as wrong:
            raise ScenarioError(f"step {len(self.steps) + 1}: {_plainly(wrong)}") from None
        stacks = self._beyond if _takes_a_link(step) else self.stacks
        return evolve(self, steps=(*self.steps, step), stacks=stacks)

    def listen(
        self,
        *,
        reuse_address: bool = False,
        reuse_port: bool = False,
        backlog: int = 128,
        reads: bool = True,
        at_eof: AtEof = "close",
    ) -> Scenario:
        """The server listens (`Listen`)."""
        return self.then(
            Listen,
            reuse_address=reuse_address,
            reuse_port=reuse_port,
            backlog=backlog,
            reads=reads,
            at_eof=at_eof,
        )

    def connect(
        self,
        clients: int = 1,
        *,
        reuse_address: bool = False,
        reuse_port: bool = False,
        reads: bool = True,
        at_eof: AtEof = "close",
        deaf: bool = False,
    ) -> Scenario:
        """Clients connect (`Connect`)."""
        return self.then(
            Connect,
            deaf=deaf,
            clients=clients,
            reuse_address=reuse_address,
            reuse_port=reuse_port,
            reads=reads,
            at_eof=at_eof,
        )

    def send(self, who: str, size: int = 100) -> Scenario:
        """`who` sends `size` bytes (`Send`)."""
        return self.then(Send, who, size)

    def shutdown(self, who: str) -> Scenario:
        """`who` shuts down its sending side (`Shutdown`)."""
        return self.then(Shutdown, who)

    def close(self, who: str) -> Scenario:
        """`who` closes (`Close`)."""
        return self.then(Close, who)

    def abort(self, who: str) -> Scenario:
        """`who` aborts (`Abort`)."""
        return self.then(Abort, who)

    def eof(self, who: str) -> Scenario:
        """Wait until `who` has seen the end of the stream (`Eof`)."""
        return self.then(Eof, who)

    def pause(self, seconds: float) -> Scenario:
        """Nobody does anything for a while (`Pause`)."""
        return self.then(Pause, seconds)

    def restart(
        self, *, reuse_address: bool | None = None, reuse_port: bool | None = None
    ) -> Scenario:
        """The server starts again (`Restart`)."""
        return self.then(Restart, reuse_address=reuse_address, reuse_port=reuse_port)

    def vanish(self, who: str, *, back: bool = False, deaf: bool = False) -> Scenario:
        """`who` is gone without a word (`Vanish`)."""
        return self.then(Vanish, who, back, deaf)

    def inject(self, who: str, flags: str = "RST", offset: int = 0) -> Scenario:
        """A segment that nobody sent comes to `who` (`Inject`)."""
        return self.then(Inject, who, flags, offset)

    async def run(self, on: str | Stack = "kernel", **options: Any) -> Run:
        """Run it from async code (asyncio or trio); see `timewait.run.run` for the options."""
        from timewait.run import run

        return await run(self, on, **options)

    def run_sync(self, on: str | Stack = "kernel", **options: Any) -> Run:
        """Run it from ordinary code; see `timewait.run.run_sync` for the options."""
        from timewait.run import run_sync

        return run_sync(self, on, **options)

    def to_dict(self) -> dict[str, Any]:
        """As plain data; what is as by default is left out."""
        plain = _converter().unstructure(self)
        first = {key: plain.pop(key) for key in ("name", "about") if key in plain}
        return {**first, **plain, "steps": [_step_to_dict(step) for step in self.steps]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Scenario:
        """From what `to_dict` gave. Raises `ScenarioError` naming the step and the key."""
        rest = dict(plain)
        steps = rest.pop("steps", [])
        if not isinstance(steps, list):
            raise ScenarioError("steps: a list of tables is expected ([[steps]])")
        taken = tuple(_step_from_dict(number, step) for number, step in enumerate(steps, 1))
        faults = rest.pop("faults", [])
        if not isinstance(faults, list) or not all(isinstance(each, dict) for each in faults):
            raise ScenarioError("faults: a list of tables is expected ([[faults]])")
        struck = tuple(_structure(each, Fault, f"fault {n}: ") for n, each in enumerate(faults, 1))
        odd = any(map(_takes_a_link, taken))
        if (struck or odd) and "stacks" not in rest:
            rest["stacks"] = ["model", "wire"]
        if isinstance(rest.get("stacks"), str):
            raise ScenarioError("stacks: a list is expected")
        whole: Scenario = _structure(rest, cls, "")
        return evolve(whole, steps=taken, faults=struck)

    def to_toml(self) -> str:
        """As TOML, which `from_toml` reads back to an equal scenario."""
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> Scenario:
        """From TOML. Raises `ScenarioError` saying what is wrong and where."""
        try:
            plain = tomllib.loads(text)
        except tomllib.TOMLDecodeError as wrong:
            raise ScenarioError(f"not TOML: {wrong}") from None
        return cls.from_dict(plain)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scenario:
        """From a TOML file, named after the file unless it names itself.

        Raises `ScenarioError` naming the file.
        """
        stem = os.path.splitext(os.path.basename(path))[0]
        try:
            with open(path, encoding="utf-8") as file:
                found = cls.from_toml(file.read())
        except OSError as wrong:
            raise ScenarioError(f"{os.fspath(path)}: {wrong.strerror}") from None
        except UnicodeDecodeError:
            raise ScenarioError(f"{os.fspath(path)}: not TOML: not UTF-8") from None
        except ScenarioError as wrong:
            raise ScenarioError(f"{os.fspath(path)}: {wrong}") from None
        return found if found.name != "scenario" else evolve(found, name=stem)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as TOML. Raises `OSError`."""
        with open(path, "w", encoding="utf-8") as file:
            file.write(self.to_toml())


def _ends(who: str, clients: int) -> list[str]:
    """The ends of connections that are meant, each by its name."""
    side, _, number = who.partition("-")
    sides = {"both": ("server", "client"), "listener": ()}.get(side, (side,))
    return [
        f"{side}-{n}" for side in sides for n in ([number] if number else range(1, clients + 1))
    ]


def _misplaced(step: Step, listening: bool, clients: int, ended: Mapping[str, str]) -> str | None:
    """Why the step cannot come here, or None."""
    if isinstance(step, Listen):
        return "the server listens already" if listening else None
    if isinstance(step, Connect):
        return None if listening else "nobody listens at this point (listen comes first)"
    if isinstance(step, Pause):
        return None
    if isinstance(step, Restart):
        return None if listening or clients else "the server never ran (listen comes first)"
    side, _, number = step.who.partition("-")
    alone = {Close: ("listener", "both"), Abort: ("listener",)}.get(type(step), ())
    if step.who not in ("server", "client", *alone) and not (
        side in ("server", "client") and number.isdecimal() and str(int(number)) == number
    ):
        choice = ", ".join(("server", "client", "client-1", "server-1", *alone))
        return f"who is {step.who!r}? one of {choice} is expected"
    if step.who == "listener":
        return None if listening else "nobody listens at this point"
    if number and not 1 <= int(number) <= clients:
        return f"there is no {step.who} ({_plural(clients, 'client')} connected before)"
    if isinstance(step, Close | Abort) and step.who == "server" and listening:
        return None  # it closes the listener at least
    if not clients:
        return "nobody is connected at this point (connect comes first)"
    if isinstance(step, Vanish | Inject):
        return None  # of what has closed too
    done = {ended.get(end) for end in _ends(step.who, clients)}
    has = {"client": "the clients have", "both": "both ends have"}.get(step.who, f"{step.who} has")
    if done == {"closed"} and not (step.who == "both" and listening):
        return f"{has} closed before"
    if isinstance(step, Send | Shutdown) and None not in done:
        return f"{has} ended sending before"
    return None


@cache
def _converter() -> Converter:
    converter = strict_converter()
    # The step's own validator says better what is wrong with it.
    converter.register_structure_hook_func(lambda kind: kind == AtEof, lambda value, _: value)
    return converter


def _step_to_dict(step: Step) -> dict[str, Any]:
    return {"do": step.do, **_converter().unstructure(step)}


def _step_from_dict(number: int, plain: object) -> Step:
    where = f"step {number}"
    if not isinstance(plain, dict):
        raise ScenarioError(f"{where}: a table is expected")
    kind = _STEPS.get(str(plain.get("do")))
    if kind is None:
        do = f"unknown step {plain['do']!r}" if "do" in plain else "it says not what to do"
        raise ScenarioError(f"{where}: {do}; do is one of {', '.join(_STEPS)}")
    rest = {key: value for key, value in plain.items() if key != "do"}
    step: Step = _structure(rest, kind, f"{where}, {kind.do}: ")
    return step


def _structure(plain: dict[str, Any], kind: Any, where: str) -> Any:
    known = {each.name: each for each in fields(kind) if each.name not in ("steps", "faults")}
    more = {"steps": None, "faults": None} if kind is Scenario else {}
    for key in plain:
        if key not in known:
            raise ScenarioError(f"{where}unknown key {key!r}; known are {', '.join(known | more)}")
    for key, each in known.items():
        if each.default is NOTHING and key not in plain:
            raise ScenarioError(f"{where}{key!r} is missing")
    values: dict[str, Any] = {}
    for key, value in plain.items():
        try:
            values[key] = _converter().structure(value, _types(kind)[key])
        except (TypeError, ValueError) as wrong:
            raise ScenarioError(f"{where}{key}: {wrong}") from None
    try:
        return kind(**values)
    except ScenarioError:
        raise
    except (TypeError, ValueError) as wrong:
        raise ScenarioError(f"{where}{_plainly(wrong)}") from None


_types = cache(get_type_hints)


def _plainly(wrong: Exception) -> str:
    """An attrs validator's complaint, without the attribute's representation."""
    return str(wrong.args[0]) if wrong.args else str(wrong)


def _server_first(clients: int) -> Scenario:
    return Scenario().listen().connect(clients).close("server").restart()


def _clients_first(clients: int) -> Scenario:
    story = Scenario().listen().connect(clients)
    for number in range(1, min(clients, 3)):
        story = story.close(f"client-{number}")
    story = story.close("client" if clients > 3 else f"client-{clients}")
    return story.close("server").restart()


def _simultaneous(clients: int) -> Scenario:
    return Scenario().listen().connect(clients).close("both").restart()


def _half_close(clients: int) -> Scenario:
    story = Scenario().listen(at_eof="ignore").connect(clients).shutdown("client")
    return story.send("server", 1000).close("server").restart()


def _abort(clients: int) -> Scenario:
    return Scenario().listen().connect(clients).abort("server").restart()


def _unread_data(clients: int) -> Scenario:
    story = Scenario().listen(reads=False).connect(clients).send("client", 100)
    return story.close("server").restart()


def _orphan(clients: int) -> Scenario:
    return Scenario().listen().connect(clients, at_eof="ignore").close("server").restart()


def _close_wait_leak(clients: int) -> Scenario:
    return Scenario().listen(at_eof="ignore").connect(clients).close("client").restart()


BUILT_IN: Final[dict[str, tuple[str, Callable[[int], Scenario]]]] = {
    "server-first": (
        "the server closes first: its side keeps TIME_WAIT and it cannot start again",
        _server_first,
    ),
    "clients-first": (
        "the clients close first: TIME_WAIT is theirs and the server starts again at once",
        _clients_first,
    ),
    "simultaneous": (
        "both ends close at the same moment: both keep TIME_WAIT where links take time",
        _simultaneous,
    ),
    "half-close": (
        "the clients stop sending and read on until the server has said all and closed",
        _half_close,
    ),
    "abort": ("the server resets its connections (SO_LINGER 1, 0): no TIME_WAIT", _abort),
    "unread-data": (
        "the server closes with bytes unread: a reset, no TIME_WAIT",
        _unread_data,
    ),
    "orphan": ("the server closes, the clients never do: FIN_WAIT_2", _orphan),
    "close-wait-leak": (
        "the clients close, the server forgets to: CLOSE_WAIT until it ends",
        _close_wait_leak,
    ),
}


def _last_ack_lost(clients: int) -> Scenario:
    return _server_first(clients).fault("drop", "last-ack")


def _fin_lost(clients: int) -> Scenario:
    return _server_first(clients).fault("drop", "FIN", "server")


def _duplicate_fin(clients: int) -> Scenario:
    story = Scenario().listen().connect(clients).close("server").pause(0.5).restart()
    return story.fault("duplicate", "FIN", "client", seconds=0.2)


def _simultaneous_close(clients: int) -> Scenario:
    # ACKs too, or that of the first FIN overtakes the second one.
    story = _simultaneous(clients).fault("delay", "FIN", times=0, seconds=0.05)
    return story.fault("delay", "ACK", times=0, seconds=0.05)


def _rst_in_time_wait(clients: int) -> Scenario:
    return Scenario().listen().connect(clients).close("server").inject("server", "RST").restart()


def _syn_in_time_wait(clients: int) -> Scenario:
    story = Scenario().listen().connect(clients)
    for number in range(1, clients + 1):
        story = story.close(f"server-{number}")
    return story.inject("server", "SYN", 1000).restart()


def _half_open(clients: int) -> Scenario:
    story = Scenario().listen().connect(clients).vanish("client", back=True)
    return story.send("server", 100).restart()


def _peer_vanishes(clients: int) -> Scenario:
    clients = max(clients, 7)
    deaf = clients // 7  # for SYN_RECEIVED
    story = Scenario().listen(at_eof="ignore").connect(clients - deaf, at_eof="ignore")
    for n in range(1, clients - deaf + 1):
        gone, left = f"client-{n}", f"server-{n}"
        match n % 6:
            case 1:  # ESTABLISHED
                story = story.vanish(gone)
            case 2:  # FIN_WAIT_1
                story = story.vanish(gone).close(left)
            case 3:  # FIN_WAIT_2
                story = story.close(left).vanish(gone)
            case 4:  # CLOSE_WAIT
                story = story.close(gone).vanish(gone)
            case 5:  # LAST_ACK
                story = story.close(gone).vanish(gone).close(left)
            case _:  # CLOSING
                story = story.vanish(gone, deaf=True).close(left).close(gone).vanish(gone)
    story = story.connect(deaf, deaf=True).pause(0.1)
    for n in range(clients - deaf + 1, clients + 1):
        story = story.vanish(f"client-{n}")
    return story.pause(0.5).restart()


def _old_duplicate(clients: int) -> Scenario:
    story = Scenario().listen().connect(clients).send("client", 100)
    story = story.close("server").pause(0.5).restart()
    return story.fault("duplicate", "data", "client", seconds=0.3)


# What only a link of our own can do: these run on "model" and "wire".
WITH_FAULTS: Final[dict[str, tuple[str, Callable[[int], Scenario]]]] = {
    "last-ack-lost": (
        "the last ACK of the close is lost: the FIN comes again, and TIME_WAIT answers it",
        _last_ack_lost,
    ),
    "fin-lost": (
        "the server's first FIN is lost, and sent again",
        _fin_lost,
    ),
    "duplicate-fin-in-time-wait": (
        "the FIN arrives once more in TIME_WAIT: its ACK draws the reset that ends it (RFC 1337)",
        _duplicate_fin,
    ),
    "simultaneous-close": (
        "both FINs are under way at once: both ends pass CLOSING, for certain",
        _simultaneous_close,
    ),
    "old-duplicate": (
        "text arrives once more in TIME_WAIT: its ACK draws the reset that ends it (RFC 1337)",
        _old_duplicate,
    ),
    "rst-in-time-wait": (
        "a forged reset with the right number ends TIME_WAIT: the server starts again at once",
        _rst_in_time_wait,
    ),
    "syn-in-time-wait": (
        "a SYN above the old numbers ends TIME_WAIT, as a new incarnation (RFC 6191)",
        _syn_in_time_wait,
    ),
    "half-open": (
        "the clients' machine crashes and is back: the server learns it when it next sends",
        _half_open,
    ),
    "peer-vanishes": (
        "clients vanish while the server is in ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, "
        "LAST_ACK, CLOSING and SYN_RECEIVED, one each (at least 7 clients)",
        _peer_vanishes,
    ),
}

"""The packetdrill language: from text to immutable data, and nothing is executed.

The grammar is packetdrill's own (its parser.y and lexer.l): options, an
optional command, then events, each with a time and an action: a segment, a
system call, a command in backticks, or Python in `%{ }%`. Commands and Python
are kept as text; `runner` interprets the few forms that are known and safe.

What cannot be read raises `Unsupported`, with the line and the words that say
why: a script from the internet ends as an answer, never as a traceback.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from attrs import define, evolve, field, frozen

from timewait.tcp.segment import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG

__all__ = [
    "ANY",
    "DEFINES",
    "Bits",
    "Call",
    "Code",
    "Command",
    "Event",
    "Option",
    "Packet",
    "Script",
    "Struct",
    "Unsupported",
    "Value",
    "When",
    "Word",
    "parse",
]


class Unsupported(Exception):
    """The script asks for what this interpreter does not do; `line` is where."""

    def __init__(self, what: str, line: int | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.line = line


# ---------------------------------------------------------------- the data


@frozen
class Word:
    """A name: a constant of the sockets API (`SOL_SOCKET`), an errno, a function."""

    name: str

    def __repr__(self) -> str:
        return self.name


@frozen
class Any:
    """`...`: whatever fits there."""

    def __repr__(self) -> str:
        return "..."


ANY: Final = Any()


@frozen
class Bits:
    """`POLLIN | POLLOUT`."""

    parts: tuple[Value, ...]

    def __repr__(self) -> str:
        return "|".join(map(repr, self.parts))


@frozen
class Struct:
    """`{onoff=1, linger=0}` or `{..., 1000}`; an unnamed field has the name `""`."""

    fields: tuple[tuple[str, Value], ...]

    def get(self, *names: str) -> Value | None:
        """The first field with one of `names`, or None."""
        for name, value in self.fields:
            if name in names:
                return value
        return None


Value: TypeAlias = "int | str | Word | Any | Bits | Struct | tuple[Value, ...]"


@frozen
class When:
    """An event's time in seconds: at, or between, and since what.

    `relative` times count from the event before; `start` None is `*`, any time.
    """

    start: float | None
    end: float | None = None
    relative: bool = False


@frozen
class Option:
    """One TCP option by its kind's number; `data` is what follows kind and length.

    A timestamp's or SACK block's numbers are the script's own.
    """

    kind: int
    data: bytes = b""


@frozen
class Packet:
    """A segment, datagram or ICMP message, with the script's own relative numbers.

    `options`, `window` None: any. `ecn` is None (unchecked) or the two bits;
    "ect01" either of the ECT codepoints.
    """

    inbound: bool
    protocol: str = "tcp"
    flags: int = 0
    ace: int | None = None
    seq: int = 0
    length: int = 0
    ack: int = 0
    window: int | None = None
    urgent: int = 0
    options: tuple[Option, ...] | None = ()
    ports: tuple[int, int] | None = None
    ecn: int | str | None = None
    tos: int | None = None
    ttl: int | None = None
    flow_label: int | None = None
    icmp_type: str = ""
    icmp_code: str = ""
    mtu: int | None = None
    echoed: tuple[str, int, int] | None = None


@frozen
class Call:
    """A system call; `until` is the end time where the script expects it to block."""

    name: str
    arguments: tuple[Value, ...]
    result: Value
    errno: str | None = None
    until: float | None = None


@frozen
class Command:
    """A shell command in backticks, as text."""

    text: str


@frozen
class Code:
    """Python between `%{` and `}%`, as text."""

    text: str


@frozen
class Event:
    """Something that happens, or is to happen, at a time."""

    line: int
    when: When
    action: Packet | Call | Command | Code
    text: str


@frozen
class Script:
    """A whole script: options (name, value), and its events in order.

    Commands before the first event and after the last one have no time.
    """

    path: str
    options: tuple[tuple[str, str | None], ...]
    before: tuple[tuple[int, Command], ...]
    events: tuple[Event, ...]
    after: tuple[tuple[int, Command], ...]
    lines: tuple[str, ...] = field(repr=False)


# ---------------------------------------------------------------- the lexer

_SEGMENT = r"[0-9a-fA-F]{1,4}"
_TOKENS: Final = re.compile(
    r"""
    (?P<space>[ \t\r\n]+)
  | (?P<comment>//[^\n]*|/\*.*?\*/|\#[^\n]*)
  | (?P<code>%\{.*?\}%)
  | (?P<command>`(?:\\.|[^`\\])*`)
  | (?P<string>"(?:\\.|[^"\\])*")
  | (?P<option>--[a-zA-Z0-9_]+(?:[ ]*=[ ]*(?:[A-Za-z0-9_]+=)?(?:"[^"\n]*"|`[^`]*`|[^\s"`]+))?)
  | (?P<ipv6>(?:SEG:){7}SEG
      | (?:SEG(?::SEG){0,6})?::(?:ffff:\d+\.\d+\.\d+\.\d+|SEG(?::SEG){0,6})?(?![\w:]))
  | (?P<ipv4>\d+\.\d+\.\d+\.\d+)
  | (?P<dots>\.\.\.)
  | (?P<hex>0[xX][0-9a-fA-F]+(?!\w))
  | (?P<float>-?\d*\.\d+)
  | (?P<int>-?\d+(?!\w))
  | (?P<word>\w+)
  | (?P<mark>.)
    """.replace("SEG", _SEGMENT),
    re.VERBOSE | re.DOTALL,
)


# What these begin is one token, unless its end is missing.
_OPENINGS: Final = (
    ('"', "a string"), ("`", "a command"), ("%{", "code"), ("/*", "a comment"),
)  # fmt: skip
_MOST_DIGITS: Final = 24
_MOST_CHARACTERS: Final = 1 << 20


@frozen
class _Token:
    kind: str
    text: str
    line: int
    start: int
    end: int


def _tokens(text: str) -> Iterator[_Token]:
    line = 1
    position = 0
    while position < len(text):
        found = _TOKENS.match(text, position)
        assert found is not None  # `mark` takes any one character
        kind, word = found.lastgroup or "", found.group()
        if kind == "mark":
            for opening, what in _OPENINGS:
                if text.startswith(opening, position):
                    raise Unsupported(f"{what} that does not end", line)
        elif kind in ("int", "hex", "float") and len(word) > _MOST_DIGITS:
            raise Unsupported(f"a number of {len(word)} digits", line)
        if kind not in ("space", "comment"):
            yield _Token(kind, word, line, position, found.end())
        line += word.count("\n")
        position = found.end()
    yield _Token("end", "end of script", line, position, position)


# "# else the window is ..." is a comment: a directive has nothing after it but one.
_DIRECTIVE: Final = re.compile(
    r"[ \t]*\#[ \t]*(?:(ifdef|ifndef|undef)\b[ \t]*(\w*)|(else|endif)|(if|elif)\b[ \t]*(.*?))"
    r"[ \t]*(?://.*|/\*.*|\#.*)?"
)
_DEFINE: Final = re.compile(r"[ \t]*\#define[ \t]+(\w+)(?:[ \t]+(.*?))?[ \t]*(?://.*|/\*.*)?")
_CONDITION: Final = re.compile(r"(!?)[ \t]*(?:defined[ \t]*\(?[ \t]*(\w+)[ \t]*\)?|(\d{1,18}))")


def _preprocessed(text: str, defines: dict[str, str]) -> str:
    """Blank the lines that `#ifdef` and its kin leave out, keeping line numbers.

    What `#define` says is added to `defines`, as what `-D` says.
    """
    kept: list[str] = []
    # Of each #if: whether it is taken now, and whether any branch has been.
    taken: list[bool] = []
    ever: list[bool] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip()[:1] != "#" or len(line) > 1000:
            kept.append(line if all(taken) else "")
            continue
        directive = _DIRECTIVE.fullmatch(line)
        if directive is None:
            named = _DEFINE.fullmatch(line) if all(taken) else None
            if named is not None:
                defines.setdefault(named[1], named[2] or "")
                line = ""
            kept.append(line if all(taken) else "")
            continue
        what, name, branch, question, condition = directive.groups()
        if question and not _CONDITION.fullmatch(condition) and (question == "if" or not taken):
            kept.append(line if all(taken) else "")  # "# if the peer ...": a comment
            continue
        kept.append("")
        if what == "undef":
            if all(taken):
                defines.pop(name, None)
        elif what:
            if not name:
                raise Unsupported(f"#{what} without a name", number)
            taken.append((name in defines) is (what == "ifdef"))
            ever.append(taken[-1])
        elif question == "if":
            taken.append(_holds(condition, defines, number))
            ever.append(taken[-1])
        elif not taken:
            raise Unsupported(f"#{branch or question} without #ifdef", number)
        elif branch == "endif":
            taken.pop()
            ever.pop()
        else:
            taken[-1] = not ever[-1] and (branch == "else" or _holds(condition, defines, number))
            ever[-1] = ever[-1] or taken[-1]
    if taken:
        raise Unsupported("#ifdef without #endif", len(kept))
    return "\n".join(kept) + "\n"


def _holds(condition: str, defines: Mapping[str, str], line: int) -> bool:
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise Unsupported(f"#if {condition}", line)
    inverted, name, number = found.groups()
    return (name in defines if name else int(number) != 0) is not bool(inverted)


# --------------------------------------------------------------- the parser

_FLAGS: Final = {
    "F": FIN, "S": SYN, "R": RST, "P": PSH, ".": ACK, "U": URG, "E": ECE, "W": CWR, "C": CWR,
    "A": 0x100,
}  # fmt: skip
_ECN: Final[dict[str, int | str]] = {"noecn": 0, "ect1": 1, "ect0": 2, "ce": 3, "ect01": "ect01"}
_ENCAPSULATIONS: Final = frozenset({"ipv4", "ipv6", "gre", "GREv0", "mpls"})


_MOST_REPLACED: Final = 1 << 12  # defined names in a script

# What the public suites' runners define for a script, by IP version.
DEFINES: Final = {
    "ipv4": {
        "TFO_COOKIE": "3021b9d889017eeb",
        "TFO_COOKIE_ZERO": "b7c12350a90dc8f5",
        "CMSG_LEVEL_IP": "SOL_IP",
        "CMSG_TYPE_RECVERR": "IP_RECVERR",
    },
    "ipv6": {
        "TFO_COOKIE": "c1d1e9742a47a9bc",
        "TFO_COOKIE_ZERO": "82af1a8f9a205c34",
        "CMSG_LEVEL_IP": "SOL_IPV6",
        "CMSG_TYPE_RECVERR": "IPV6_RECVERR",
    },
}


def parse(
    text: str,
    path: str = "<script>",
    defines: Mapping[str, str] | None = None,
    options: Iterable[tuple[str, str]] = (),
) -> Script:
    """Read a script. `defines` are the names given with `-D`, as text.

    `options` (name, value) are the command line's; they come after the script's
    own, and so have the last word. Raises `Unsupported` where the text is not
    packetdrill as known here.
    """
    if len(text) > _MOST_CHARACTERS:
        raise Unsupported(f"a script of {len(text)} characters")
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    options = tuple(options)
    version = _IP_VERSION.findall(text) + [v for name, v in options if name == "ip_version"]
    named = {**DEFINES["ipv6" if version[-1:] == ["ipv6"] else "ipv4"], **(defines or {})}
    return _Parser(_preprocessed(text, named), path, named).script(options)


_IP_VERSION: Final = re.compile(r"^[ \t]*--ip_version[ ]*=[ ]*(\S+)", re.MULTILINE)


@define
class _IpInfo:
    """What brackets before a packet's flags say of its IP header."""

    ecn: int | str | None = None
    tos: int | None = None
    ttl: int | None = None
    flow_label: int | None = None


class _Parser:
    def __init__(self, text: str, path: str, defines: dict[str, str]) -> None:
        self.text = text
        self.path = path
        self.defines = defines
        self.tokens = list(_tokens(text))
        self.at = 0
        self.replaced = 0
        self.meanings: dict[str, list[tuple[str, str]]] = {}

    # -- tokens

    @property
    def token(self) -> _Token:
        return self.tokens[self.at]

    def error(self, what: str) -> Unsupported:
        # Of the token before: the next one may be a line further on.
        return Unsupported(what, self.tokens[max(self.at - 1, 0)].line)

    def take(self) -> _Token:
        token = self.tokens[self.at]
        if token.kind != "end":
            self.at += 1
        return token

    def has(self, *texts: str) -> bool:
        """Whether the next token is one of `texts`; takes it if so."""
        if self.token.text in texts and self.token.kind in ("mark", "word", "dots"):
            self.take()
            return True
        return False

    def need(self, text: str) -> None:
        if not self.has(text):
            raise self.error(f"expected {text!r}, found {self.token.text!r}")

    def integer(self, what: str, limit: int = 0xFFFFFFFF) -> int:
        token = self.token
        if token.kind not in ("int", "hex"):
            raise self.error(f"expected {what}, found {token.text!r}")
        number = int(token.text, 0 if token.kind == "hex" else 10)
        if not 0 <= number <= limit:
            raise self.error(f"{what} out of range: {number}")
        self.take()
        return number

    # -- script

    def script(self, given: tuple[tuple[str, str], ...]) -> Script:
        options: list[tuple[str, str | None]] = []
        while self.token.kind == "option":
            name, sign, value = self.take().text[2:].partition("=")
            name, value = name.strip(), value.strip()
            if name == "define":
                symbol, _, meaning = value.partition("=")
                self.defines[symbol] = meaning
            options.append((name, value.strip('"') if sign else None))
        self.tokens[self.at :] = self.expanded(self.tokens[self.at :])
        before = self.commands()
        events: list[Event] = []
        latest = 0.0
        after: tuple[tuple[int, Command], ...] = ()
        while self.token.kind != "end":
            if self.token.kind == "command":
                after = self.commands()
                if self.token.kind != "end":
                    raise Unsupported("a command without a time", after[0][0])
                break
            event = self.event()
            if not event.when.relative and event.when.start is not None:
                if event.when.start < latest:
                    raise Unsupported("a time before that of an event before", event.line)
                latest = event.when.start
            events.append(event)
        if not events:
            raise Unsupported("a script without events", 1)
        return Script(
            self.path,
            (*options, *given),
            before,
            tuple(events),
            after,
            tuple(self.text.splitlines()),
        )

    def expanded(
        self, tokens: Iterable[_Token], within: frozenset[str] = frozenset()
    ) -> list[_Token]:
        """The tokens with defined names replaced by what they stand for."""
        found: list[_Token] = []
        for token in tokens:
            meaning = self.defines.get(token.text, "") if token.kind == "word" else ""
            if not meaning or token.text in within:
                found.append(token)
            elif meaning[0] == "`":
                found.append(evolve(token, kind="string", text=f'"{meaning[1:-1]}"'))
            else:
                if token.text not in self.meanings:
                    self.meanings[token.text] = [
                        (part.kind, part.text) for part in _tokens(meaning) if part.kind != "end"
                    ]
                parts = [
                    _Token(kind, text, token.line, token.start, token.end)
                    for kind, text in self.meanings[token.text]
                ]
                self.replaced += 1
                if self.replaced > _MOST_REPLACED:
                    raise Unsupported("definitions that grow without end", token.line)
                found += self.expanded(parts, within | {token.text})
        return found

    def commands(self) -> tuple[tuple[int, Command], ...]:
        found: list[tuple[int, Command]] = []
        while self.token.kind == "command":
            token = self.take()
            found.append((token.line, Command(token.text[1:-1])))
        return tuple(found)

    def event(self) -> Event:
        line, start = self.token.line, self.token.start
        when = self.when()
        token = self.token
        action: Packet | Call | Command | Code
        if token.kind == "mark" and token.text in "<>":
            action = self.packet()
        elif token.kind == "command":
            action = Command(self.take().text[1:-1])
        elif token.kind == "code":
            action = Code(self.take().text[2:-2])
        else:
            action = self.call()
        waits = isinstance(action, Packet) and not action.inbound
        if not waits and when.start is None:
            raise Unsupported("the time * is for outbound packets only", line)
        if not waits and when.end is not None:
            raise Unsupported("a time range is for outbound packets only", line)
        text = self.text[start : self.tokens[self.at - 1].end]
        return Event(line, when, action, " ".join(text.split()))

    def when(self) -> When:
        if self.has("*"):
            return When(None)
        relative = self.has("+")
        start = self.time()
        end = None
        if self.has("~"):
            if self.has("+") is not relative and relative:
                raise self.error("a range from a relative time to an absolute one")
            end = self.time()
            if end < start:
                raise self.error("a time range that is backwards")
        return When(start, end, relative)

    def time(self) -> float:
        token = self.token
        if token.kind not in ("int", "float"):
            raise Unsupported(f"expected a time, found {token.text!r}", token.line)
        number = float(token.text)
        if not 0 <= number <= 1e9:
            raise self.error(f"a time out of range: {token.text}")
        self.take()
        return number

    # -- packets

    def packet(self) -> Packet:
        inbound = self.take().text == "<"
        while self.token.text in _ENCAPSULATIONS:
            raise self.error(f"packets inside {self.token.text} packets")
        info = self.ip_info()
        if self.token.text == "icmp":
            return self.icmp(inbound, info)
        ports = None
        following = self.tokens[min(self.at + 1, len(self.tokens) - 1)]
        if self.token.kind == "int" and following.text == ">":
            source = self.integer("a port", 0xFFFF)
            self.take()
            ports = (source, self.integer("a port", 0xFFFF))
        if self.token.text == "udp":
            return self.udp(inbound, info, ports)
        flags, ace = self.flags()
        seq, length = self.sequence()
        ack = self.integer("an acknowledgment number") if self.has("ack") else 0
        window = None
        if self.has("win") and (inbound or not self.has("...")):
            window = self.integer("a window", 0xFFFF)
        urgent = self.integer("an urgent pointer", 0xFFFF) if self.has("urg") else 0
        options = self.tcp_options()
        if options is None and inbound:
            raise self.error("<...> for an inbound packet's options")
        if self.token.text == "{":
            raise self.error("fuzzed fields")
        if inbound and window is None:
            window = 0
        return Packet(
            inbound,
            "tcp",
            flags,
            ace,
            seq,
            length,
            ack,
            window,
            urgent,
            options,
            ports,
            info.ecn,
            info.tos,
            info.ttl,
            info.flow_label,
        )

    def ip_info(self) -> _IpInfo:
        info = _IpInfo()
        while self.token.text in ("[", "("):
            close = "]" if self.take().text == "[" else ")"
            while not self.has(close):
                token = self.take()
                if token.text in _ECN:
                    info.ecn = _ECN[token.text]
                elif token.text == "tos":
                    info.tos = self.integer("a type of service", 0xFF)
                elif token.text == "ttl":
                    info.ttl = self.integer("a TTL", 0xFF)
                elif token.text == "flowlabel":
                    info.flow_label = self.integer("a flow label", 0xFFFFF)
                elif token.text != ",":
                    raise Unsupported(f"IP header field {token.text!r}", token.line)
        return info

    def flags(self) -> tuple[int, int | None]:
        token = self.take()
        text = token.text
        if token.kind == "mark" and text == "-":
            return 0, None
        if token.kind == "word":
            # "S." is the word and the dot beside it; "S.5" sets the ACE counter (AccECN).
            beside = self.token
            if beside.text == "." or (beside.kind == "float" and beside.start == token.end):
                text += self.take().text
        elif not (token.kind == "float" and text[0] == ".") and text != ".":
            raise Unsupported(f"TCP flags {text!r}", token.line)
        ace = None
        if text[-1].isdigit():
            ace = int(text[-1], 8) if text[-1] in "01234567" else None
            if ace is None or not text[:-1].endswith("."):
                raise Unsupported(f"TCP flags {text!r}", token.line)
            text = text[:-1]
        flags = 0
        for letter in text:
            if letter not in _FLAGS:
                raise Unsupported(f"TCP flags {text!r}", token.line)
            flags |= _FLAGS[letter]
        if ace is not None:
            flags |= (ace & 1 and ECE) | (ace & 2 and CWR) | (ace & 4 and 0x100)
        return flags, ace

    def sequence(self) -> tuple[int, int]:
        start = self.integer("a sequence number")
        self.need(":")
        end = self.integer("a sequence number")
        self.need("(")
        length = self.integer("a payload size", 0xFFFF)
        self.need(")")
        if end != start + length:
            raise self.error(f"{start}:{end}({length}) does not add up")
        return start, length

    def tcp_options(self) -> tuple[Option, ...] | None:
        if not (self.token.kind == "mark" and self.token.text == "<"):
            return ()
        # "<" may also begin the next event's packet, but an event begins with a time.
        self.take()
        if self.has("..."):
            self.need(">")
            return None
        options = []
        while True:
            options.append(self.tcp_option())
            if self.has(">"):
                break
            self.need(",")
        if sum(2 + len(o.data) if o.kind > 1 else 1 for o in options) > 40:
            raise self.error("TCP options longer than 40 octets")
        return tuple(options)

    def tcp_option(self) -> Option:
        token = self.take()
        match token.text:
            case "nop":
                return Option(1)
            case "eol":
                return Option(0)
            case "mss":
                return Option(2, self.integer("an MSS", 0xFFFF).to_bytes(2, "big"))
            case "wscale":
                return Option(3, self.integer("a window scale", 0xFF).to_bytes(1, "big"))
            case "sackOK":
                return Option(4)
            case "sack":
                blocks = b""
                while self.token.kind == "int":
                    left = self.integer("a SACK edge")
                    self.need(":")
                    right = self.integer("a SACK edge")
                    blocks += left.to_bytes(4, "big") + right.to_bytes(4, "big")
                return Option(5, blocks)
            case "TS":
                self.need("val")
                val = self.integer("a timestamp")
                self.need("ecr")
                ecr = self.integer("a timestamp")
                return Option(8, val.to_bytes(4, "big") + ecr.to_bytes(4, "big"))
            case "FO":
                return Option(34, self.blob())
            case "FOEXP":
                return Option(254, b"\xf9\x89" + self.blob())
            case "ECN":
                return self.accurate_ecn()
            case "md5":
                return Option(19, self.blob())
        raise Unsupported(f"TCP option {token.text!r}", token.line)

    def accurate_ecn(self) -> Option:
        """The counters of AccECN: which of the two orders names the kind (172: e0b first)."""
        names: list[str] = []
        counters = b""
        while self.token.text in ("e0b", "ceb", "e1b"):
            names.append(self.take().text)
            counters += self.integer("a counter of octets", 0xFFFFFF).to_bytes(3, "big")
        for kind, order in ((172, ["e0b", "ceb", "e1b"]), (174, ["e1b", "ceb", "e0b"])):
            if names == order[: len(names)]:
                return Option(kind, counters)
        raise self.error(f"ECN counters in the order {' '.join(names)}")

    def blob(self) -> bytes:
        """Octets in hexadecimal, or none."""
        if self.token.kind not in ("word", "int"):
            return b""
        try:
            return bytes.fromhex(self.token.text)
        except ValueError:
            raise self.error(f"not octets in hexadecimal: {self.token.text!r}") from None
        finally:
            self.take()

    def udp(self, inbound: bool, info: _IpInfo, ports: tuple[int, int] | None) -> Packet:
        self.take()
        if ports is None and self.token.kind == "int":
            source = self.integer("a port", 0xFFFF)
            self.need(">")
            ports = (source, self.integer("a port", 0xFFFF))
        self.need("(")
        length = self.integer("a payload size", 0xFFFF)
        self.need(")")
        return Packet(
            inbound, "udp", length=length, ports=ports, ecn=info.ecn, tos=info.tos, ttl=info.ttl,
            flow_label=info.flow_label,
        )  # fmt: skip

    def icmp(self, inbound: bool, info: _IpInfo) -> Packet:
        self.take()
        kind = self.take().text
        code, mtu = "", None
        echoed: tuple[str, int, int] | None = None
        while True:
            if self.has("mtu"):
                mtu = self.integer("an MTU", 0xFFFFFFFF)
            elif self.has("id"):
                raise self.error("ICMP identifiers")
            elif self.has("["):
                if self.has("udp"):
                    self.need("(")
                    echoed = ("udp", 0, self.integer("a payload size", 0xFFFF))
                    self.need(")")
                elif self.token.text == "raw":
                    raise self.error("raw packets inside ICMP messages")
                else:
                    echoed = ("tcp", *self.sequence())
                self.need("]")
            elif self.token.kind == "word" and not code:
                code = self.take().text
            else:
                break
        return Packet(
            inbound, "icmp", ecn=info.ecn, tos=info.tos, ttl=info.ttl, icmp_type=kind,
            icmp_code=code, mtu=mtu, echoed=echoed,
        )  # fmt: skip

    # -- system calls

    def call(self) -> Call:
        until = None
        if self.has("..."):
            self.has("+")
            until = self.time()
        token = self.take()
        if token.kind != "word":
            raise Unsupported(f"expected an event, found {token.text!r}", token.line)
        self.need("(")
        arguments: list[Value] = []
        if not self.has(")"):
            while True:
                arguments.append(self.value())
                if self.has(")"):
                    break
                self.need(",")
        self.need("=")
        result = self.value()
        errno = None
        if self.token.kind == "word":
            errno = self.take().text
        if self.has("("):
            while not self.has(")"):
                if self.take().kind == "end":
                    raise self.error("a note that does not end")
        return Call(token.text, tuple(arguments), result, errno, until)

    def value(self) -> Value:
        parts = [self.operand()]
        while self.has("|"):
            parts.append(self.operand())
        return parts[0] if len(parts) == 1 else Bits(tuple(parts))

    def operand(self) -> Value:
        token = self.take()
        match token.kind:
            case "dots":
                return ANY
            case "int":
                return int(token.text)
            case "hex":
                return int(token.text, 16)
            case "ipv4" | "ipv6":
                return token.text
            case "string":
                text = _unquote(token.text)
                while self.token.kind == "string":
                    text += _unquote(self.take().text)
                if self.token.kind == "dots":
                    self.take()
                return text
            case "word":
                return self.word(token)
        if token.text == "[":
            return self.items("]")
        if token.text == "{":
            return self.struct()
        raise Unsupported(f"value {token.text!r}", token.line)

    def word(self, token: _Token) -> Value:
        if token.text in ("htons", "htonl", "ntohs", "ntohl"):
            self.need("(")
            number = self.value()
            self.need(")")
            return number
        if token.text in ("inet_addr", "inet6_addr", "inet_pton"):
            self.need("(")
            address = self.value()
            while self.has(","):  # strace has inet_pton(AF_INET6, "::1", &sin6_addr)
                self.has("&")
                more = self.value()
                address = more if isinstance(more, str) else address
            self.need(")")
            try:
                return str(ipaddress.ip_address(address if isinstance(address, str) else ""))
            except ValueError:
                raise Unsupported(f"not an IP address: {address!r}", token.line) from None
        return Word(token.text)

    def items(self, close: str) -> tuple[Value, ...]:
        items: list[Value] = []
        if self.has(close):
            return ()
        while True:
            items.append(self.value())
            if self.has(close):
                return tuple(items)
            self.need(",")

    def struct(self) -> Struct:
        fields: list[tuple[str, Value]] = []
        while not self.has("}"):
            name = ""
            if self.token.kind == "word":
                # name=value, or msg_iov(1)=value: the count is the array's own
                mark = self.at
                name = self.take().text
                if self.token.text == "(" and name.startswith("msg_"):
                    self.take()
                    self.value()
                    self.need(")")
                if not self.has("="):
                    self.at, name = mark, ""
            fields.append((name, self.value()))
            if not self.has(","):
                self.need("}")
                break
        return Struct(tuple(fields))


_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "0": "\0"}


def _unquote(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), text[1:-1], flags=re.DOTALL)

"""What surrounds a script: its options, and the shell commands whose meaning is known.

Public scripts set sysctls through small helper scripts of their own suites.
Nothing is ever executed: the few known forms are read as the settings they
stand for, the rest is unsupported by name.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from attrs import define, evolve, frozen

from timewait.packetdrill.script import Script, Unsupported

__all__ = ["OPTIONS", "File", "Pause", "Setting", "Settings", "is_one_for", "meaning"]

# packetdrill's own options, of its command line and of a script's first lines.
OPTIONS: Final = frozenset(
    {"tolerance_usecs", "tolerance_percent", "ip_version", "local_ip", "remote_ip", "netmask_ip",
     "gateway_ip", "bind_port", "connect_port", "mtu", "mss", "speed", "tcp_ts_tick_usecs",
     "tcp_ts_ecr_scaled", "strict_segments", "non_fatal", "send_omit_free", "define", "is_anyip",
     "verbose", "debug", "dry_run", "code_command", "code_format", "code_sockopt", "tun_dev",
     "persistent_tun_dev", "init_scripts", "udp_encaps", "so_filename", "so_flags",
     "wire_client", "wire_server", "wire_client_dev", "wire_server_dev", "wire_server_ip",
     "wire_server_port", "wire_server_at"}
)  # fmt: skip


@define
class Settings:
    """A script's options, with packetdrill's own defaults (config.c).

    Times are in seconds; `tolerance_share` is a share of the wait before an event.
    """

    tolerance: float = 0.004
    tolerance_share: float = 0.125
    ip_version: str = "ipv4"
    local: str = "192.168.0.1"
    remote: str = "192.0.2.1"
    local_prefix: int = 16
    bind_port: int = 8080
    connect_port: int = 8080
    mtu: int = 1500
    ts_tick: float = 0.0
    ecr_scaled: bool = False
    strict_segments: bool = False
    first_port: int = 33000
    # Kinds of events ("packet", "syscall") whose failure does not end the script.
    non_fatal: frozenset[str] = frozenset()

    @classmethod
    def of(cls, script: Script) -> Settings:
        """The settings a script's options ask for; raises `Unsupported` by name."""
        made = cls()
        given = dict(script.options)
        made.ip_version = given.get("ip_version") or "ipv4"
        if made.ip_version == "ipv6":
            made.local, made.remote = "fd3d:fa7b:d17d::1", "2001:db8::1"
            made.local_prefix = 48
        for name, value in script.options:
            try:
                made._set(name, value or "")
            except ValueError:
                raise Unsupported(f"--{name}={value}", 1) from None
        if made.ip_version == "ipv6" and made.mtu < 1280:
            raise Unsupported(f"--mtu={made.mtu} with IPv6", 1)
        for address in (made.local, made.remote):
            if (":" in address) is not (made.ip_version == "ipv6"):
                raise Unsupported(f"the address {address} with --ip_version={made.ip_version}", 1)
        return made

    def _set(self, name: str, value: str) -> None:
        match name:
            case "ip_version" if value not in ("ipv4", "ipv4-mapped-ipv6", "ipv6"):
                raise ValueError(value)
            case "tolerance_usecs":
                self.tolerance = _number(value, 0, 1 << 40) / 1e6
            case "tolerance_percent":
                self.tolerance_share = _number(value, 0, 1 << 20) / 100
            case "bind_port":
                self.bind_port = int(_number(value, 1, 0xFFFF))
            case "connect_port":
                self.connect_port = int(_number(value, 1, 0xFFFF))
            case "mtu":
                self.mtu = int(_number(value, 68, 0xFFFF))
            case "local_ip":
                self.local = str(ip_address(value.partition("/")[0]))
            case "remote_ip":
                self.remote = str(ip_address(value.partition("/")[0]))
            case "tcp_ts_tick_usecs":
                self.ts_tick = _number(value, 0, 1 << 40) / 1e6
            case "tcp_ts_ecr_scaled":
                self.ecr_scaled = True
            case "strict_segments":
                self.strict_segments = True
            case ("ip_version" | "mss" | "send_omit_free" | "define" | "netmask_ip" | "gateway_ip"
                  | "speed" | "verbose" | "debug" | "code_sockopt" | "is_anyip" | "code_command"
                  | "code_format" | "dry_run" | "tun_dev" | "persistent_tun_dev"
                  | "init_scripts"):  # fmt: skip
                pass  # says nothing about what a stack must do here
            case "non_fatal":
                self.non_fatal = frozenset(value.split(","))
                if not self.non_fatal <= {"packet", "syscall"}:
                    raise ValueError(value)
            case _:
                raise Unsupported(f"--{name}", 1)


def _number(value: str, least: float, most: float) -> float:
    number = float(value)
    if not least <= number <= most:
        raise ValueError(value)
    return number


def is_one_for(name: str, value: str) -> bool:
    """Whether an option of packetdrill's takes that value."""
    try:
        Settings()._set(name, value)
    except ValueError:
        return False
    except Unsupported:
        pass  # whatever it takes, no script is played with it
    return True


# What `defaults.sh` of the public suites sets, as far as a stack still knows it.
_DEFAULTS: Final = {
    "net.ipv4.tcp_rmem": "4096 540000 15728640",
    "net.ipv4.tcp_wmem": "4096 262144 4194304",
    "net.ipv4.tcp_timestamps": "1",
    "net.ipv4.tcp_syn_retries": "5",
    "net.ipv4.tcp_synack_retries": "5",
    "net.ipv4.tcp_frto": "2",
    "net.ipv4.tcp_sack": "1",
    "net.ipv4.tcp_dsack": "1",
    "net.ipv4.tcp_reordering": "3",
    "net.ipv4.tcp_congestion_control": "cubic",
    "net.ipv4.tcp_slow_start_after_idle": "0",
    "net.ipv4.tcp_early_retrans": "3",
    "net.ipv4.tcp_recovery": "1",
    "net.ipv4.tcp_tso_win_divisor": "3",
    "net.ipv4.tcp_ecn": "0",
    "net.ipv4.tcp_pacing_ss_ratio": "200",
    "net.ipv4.tcp_pacing_ca_ratio": "120",
    "net.ipv4.tcp_notsent_lowat": "4294967295",
    "net.ipv4.tcp_fastopen": str(0x70403),
    "net.ipv4.tcp_fastopen_key": "a1a1a1a1-b2b2b2b2-c3c3c3c3-d4d4d4d4",
    "net.ipv4.tcp_syncookies": "1",
}


@frozen
class Setting:
    """A sysctl is given a value; one that is not `required` may be unknown to the stack."""

    name: str
    value: str
    required: bool = True


@frozen
class File:
    """There is to be a file of `size` zeros, for the script to open. It is not on any disk."""

    path: str
    size: int


@frozen
class Pause:
    """`sleep`."""

    seconds: float


_QUIET: Final = re.compile(r"(?:\s*\d?&?>+\s*(?:&\d|/dev/null))+\s*$")
_SETTING: Final = re.compile(r"(?:/proc/sys/)?(net[./][\w./-]+)\s*=\s*(.*)", re.DOTALL)


def meaning(
    command: str, line: int, folder: Path | None = None
) -> Iterator[Setting | File | Pause]:
    """What a shell command stands for.

    A `defaults.sh` that lies beside the script (`folder`) is read, not run, for
    the settings in it. Raises `Unsupported` for every command that is not a
    known, safe form.
    """
    found: list[Setting | File | Pause] = []
    text = re.sub(r"\\\n", " ", command)
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    text = re.sub(r"\$\(\(([\d\s*]+)\)\)", _product, text)
    for part in re.split(r"&&|\|\||;|\n", text):
        part = _QUIET.sub("", part).strip()
        if part:
            found.extend(_one(part, line, folder))
    return iter(found)


def _product(found: re.Match[str]) -> str:
    """`$((15*1024*1024))` as a number."""
    try:
        return str(math.prod(int(factor) for factor in found[1].split("*")) % (1 << 63))
    except ValueError:
        return found[0]


def _defaults(path: str, folder: Path | None) -> Iterator[Setting]:
    """The settings of a suite's `defaults.sh`, its own if it is there to be read."""
    yield from (Setting(name, value, False) for name, value in _DEFAULTS.items())
    if folder is None:
        return
    try:
        if not (folder / path).is_file():  # a pipe might be waited for
            return
        with (folder / path).open(errors="replace") as file:
            text = file.read(1 << 16)
    except (OSError, ValueError):
        return
    for line in text.splitlines():
        try:
            for each in meaning(line, 0):
                if isinstance(each, Setting):
                    yield evolve(each, required=False)
        except Unsupported:
            continue  # what is not a setting has no meaning here


def _one(command: str, line: int, folder: Path | None) -> Iterator[Setting | File | Pause]:
    unknown = Unsupported(f"command {command[:80]!r}", line)
    try:
        words = shlex.split(command)
    except ValueError:
        raise Unsupported(f"command {command!r}", line) from None
    if not words:
        return
    program = words[0].rpartition("/")[2]
    given = [word for word in words[1:] if not word.startswith("-")]
    if "|" in words:
        raise Unsupported(f"a pipe of commands: {command}", line)
    if program in ("defaults.sh", "default.sh"):
        yield from _defaults(words[0], folder)
        # Some suites let defaults.sh take further settings.
        yield from _assignments(words[1:], command, line)
    elif program == "set_sysctls.py":
        yield from _assignments(words[1:], command, line)
    elif program == "sysctl":
        optional = any(word.startswith("-") and "e" in word for word in words[1:])
        for each in _assignments(given, command, line):
            yield evolve(each, required=not optional)
    elif program == "echo" and ">" in words:
        at = words.index(">")
        if len(words) != at + 2 or not words[at + 1].startswith("/proc/sys/net/"):
            raise Unsupported(f"command {command!r}", line)
        value = " ".join(word for word in words[1:at] if word != "-n")
        yield Setting(_name(words[at + 1], command, line), value)
    elif program in ("dd", "truncate", "touch"):
        yield _file(program, words, unknown)
    elif program == "sleep":
        if len(words) != 2 or not re.fullmatch(r"\d{0,3}(\.\d+)?s?", words[1]):
            raise unknown
        yield Pause(float(words[1].rstrip("s") or 0))
    elif program == "rm" and all(re.fullmatch(r"/tmp/[\w.-]+", word) for word in given):
        return  # of a file that never was
    elif program.startswith("sysctl_restore"):
        return  # undoes what its suite's set_sysctls.py did; the namespace ends anyway
    elif words[:4] == ["ip", "tcp_metrics", "flush", "all"]:
        return  # a namespace that has just been made has none
    elif program in ("true", ":", "sync", "nstat") or (program == "echo" and ">" not in command):
        return
    elif words[:2] == ["tc", "qdisc"] and "root" in words and words[-1] in _QUEUES:
        return  # a plain queue is there in any case, and TCP itself paces where none does
    else:
        raise unknown


_QUEUES: Final = frozenset({"pfifo", "pfifo_fast", "fq", "fq_codel", "noqueue"})
_SIZE: Final = re.compile(r"(\d{1,12})([kKMG]?)i?B?")
_MULTIPLES: Final = {"": 1, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MOST_OCTETS: Final = 1 << 26


def _file(program: str, words: list[str], unknown: Unsupported) -> File:
    """The file of zeros that `dd`, `truncate` or `touch` would leave."""
    named = dict(word.partition("=")[::2] for word in words[1:])
    if program == "dd":
        if named.get("if") not in ("/dev/zero", "/dev/urandom", "/dev/random"):
            raise unknown
        sizes, path = [named.get("bs", "512"), named.get("count", "")], named.get("of", "")
    elif program == "truncate":
        if len(words) != 4 or words[1] != "-s":
            raise unknown
        sizes, path = [words[2]], words[3]
    else:
        sizes, path = ["0"], words[-1]
    octets = 1
    for size in sizes:
        found = _SIZE.fullmatch(size)
        if found is None:
            raise unknown
        octets *= int(found[1]) * _MULTIPLES[found[2]]
    if octets > _MOST_OCTETS:
        raise Unsupported(f"a file of {octets} octets", unknown.line)
    return File(path, octets)


def _assignments(words: list[str], command: str, line: int) -> Iterator[Setting]:
    for word in words:
        found = _SETTING.fullmatch(word)
        if found is None or "$" in word:
            raise Unsupported(f"command {command!r}", line)
        yield Setting(_name(found[1], command, line), found[2].strip())


def _name(path: str, command: str, line: int) -> str:
    """A sysctl's dotted name; anything that could leave /proc/sys/net is refused."""
    name = path.removeprefix("/proc/sys/").replace("/", ".")
    if not re.fullmatch(r"net(\.[A-Za-z0-9_-]+)+", name):
        raise Unsupported(f"command {command!r}", line)
    return name

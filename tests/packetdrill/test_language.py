"""The language: what a script's text is read as, and what is refused by name."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from timewait.commands.packetdrill import command
from timewait.kernel.wire import Wire, WireError
from timewait.packetdrill import Outcome, play
from timewait.packetdrill.assertions import check, tcp_info
from timewait.packetdrill.frames import Frame, decode, encode
from timewait.packetdrill.runner import show
from timewait.packetdrill.script import (
    ANY,
    Bits,
    Call,
    Code,
    Command,
    Option,
    Packet,
    Script,
    Struct,
    Unsupported,
    When,
    Word,
    parse,
)
from timewait.packetdrill.settings import File, Pause, Setting, Settings, meaning
from timewait.tcp.segment import ACK, CWR, ECE, FIN, PSH, RST, SYN, URG


def action(text: str) -> Packet | Call | Command | Code:
    return parse(f"0 {text}").events[0].action


def packet(text: str) -> Packet:
    read = action(text)
    assert isinstance(read, Packet)
    return read


def call(text: str) -> Call:
    read = action(text)
    assert isinstance(read, Call)
    return read


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("0", When(0.0)),
        ("0.250", When(0.25)),
        ("+0", When(0.0, None, True)),
        ("+.1", When(0.1, None, True)),
        ("*", When(None)),
        ("0.1~0.3", When(0.1, 0.3)),
        ("+0~+.2", When(0.0, 0.2, True)),
        ("+0.5 ~ +0.6", When(0.5, 0.6, True)),
    ],
)
def test_times(text: str, when: When) -> None:
    assert parse(f"{text} > . 1:1(0) ack 1").events[0].when == when


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("S 0:0(0)", SYN),
        ("S. 0:0(0) ack 1", SYN | ACK),
        ("F. 1:1(0) ack 1", FIN | ACK),
        ("FP. 1:2(1) ack 1", FIN | PSH | ACK),
        ("P. 1:2(1) ack 1", PSH | ACK),
        (". 1:1(0) ack 1", ACK),
        ("R 1:1(0)", RST),
        ("R. 1:1(0) ack 1", RST | ACK),
        ("SEW 0:0(0)", SYN | ECE | CWR),
        ("SE. 0:0(0) ack 1", SYN | ECE | ACK),
        ("EP. 1:2(1) ack 1", ECE | PSH | ACK),
        ("PU. 1:2(1) ack 1", PSH | URG | ACK),
        ("- 1:1(0)", 0),
        ("SF 0:0(0)", SYN | FIN),
        (".5 1:1(0) ack 1", ACK | ECE | 0x100),
        ("P.5 1:2(1) ack 1", ACK | PSH | ECE | 0x100),
        ("SEWA 0:0(0)", SYN | ECE | CWR | 0x100),
    ],
)
def test_flags(text: str, flags: int) -> None:
    assert packet("> " + text).flags == flags


def test_a_segment_in_full() -> None:
    read = packet(
        "< [ect0] P. 1:1001(1000) ack 5 win 257 urg 3 <nop,nop,TS val 7 ecr 8,sack 1:2 3:4>"
    )
    assert (read.inbound, read.ecn, read.flags) == (True, 2, PSH | ACK)
    assert (read.seq, read.length, read.ack, read.window, read.urgent) == (1, 1000, 5, 257, 3)
    assert read.options == (
        Option(1),
        Option(1),
        Option(8, struct.pack("!II", 7, 8)),
        Option(5, struct.pack("!4I", 1, 2, 3, 4)),
    )


def test_what_is_left_out_of_an_outbound_segment_is_not_looked_at() -> None:
    read = packet("> . 1:1(0) ack 1 <...>")
    assert (read.window, read.options, read.ecn) == (None, None, None)
    assert packet("> . 1:1(0) ack 1 win ... <...>") == read
    assert packet("> . 1:1(0) ack 1").options == ()


def test_fast_open_and_other_protocols() -> None:
    assert packet("< S 0:10(10) win 5 <mss 1000,FO 0123abcd,nop>").options == (
        Option(2, b"\x03\xe8"),
        Option(34, bytes.fromhex("0123abcd")),
        Option(1),
    )
    assert packet("< S 0:0(0) win 5 <FO,nop,nop>").options == (Option(34), Option(1), Option(1))
    icmp = packet("< icmp unreachable frag_needed mtu 1200 [1:1461(1460)]")
    assert (icmp.icmp_type, icmp.icmp_code, icmp.mtu) == ("unreachable", "frag_needed", 1200)
    assert icmp.echoed == ("tcp", 1, 1460)
    assert packet("> udp (100)").length == 100


def test_calls_and_their_values() -> None:
    read = call("setsockopt(3, SOL_SOCKET, SO_LINGER, {onoff=1, linger=0}, 8) = 0")
    assert read.arguments[3] == Struct((("onoff", 1), ("linger", 0)))
    read = call("write(4, ..., 1000) = -1 EAGAIN (Resource temporarily unavailable)")
    assert (read.arguments, read.result, read.errno) == ((4, ANY, 1000), -1, "EAGAIN")
    read = call("fcntl(3, F_SETFL, O_RDWR|O_NONBLOCK) = 0")
    assert read.arguments[2] == Bits((Word("O_RDWR"), Word("O_NONBLOCK")))
    read = call("fcntl(3, F_GETFL) = 0x2 (flags O_RDWR)")
    assert read.result == 2
    read = call(
        'bind(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("1.2.3.4")}, 16) = 0'
    )
    assert isinstance(read.arguments[1], Struct)
    assert read.arguments[1].get("sin_addr") == "1.2.3.4"
    read = call("poll([{fd=3, events=POLLIN, revents=POLLIN}], 1, 1000) = 1")
    assert isinstance(read.arguments[0], tuple)
    read = call('read(3, "ab" "c", 10) = 3')
    assert read.arguments[1] == "abc"
    read = call("recvmsg(4, {msg_name(...)=..., msg_iov(1)=[{...,10}], msg_flags=0}, 0) = 10")
    assert isinstance(read.arguments[1], Struct)
    assert read.arguments[1].get("msg_iov") == (Struct((("", ANY), ("", 10))),)


def test_a_blocking_call_has_an_end() -> None:
    event = parse("0 socket(..., SOCK_STREAM, 0) = 3\n 0.100...0.250 connect(3, ..., ...) = 0")
    blocking = event.events[1]
    assert blocking.when == When(0.1)
    assert isinstance(blocking.action, Call)
    assert blocking.action.until == 0.25


def test_comments_options_and_commands() -> None:
    script = parse(
        """--tolerance_usecs=10000 --ip_version=ipv6
        --mss=1000
        // one
        /* two
        */
        # three
        `../common/defaults.sh`
        0 `sysctl -q net.ipv4.tcp_sack=0`
        +0 %{ assert tcpi_state == 1, tcpi_state }%
        `cleanup`"""
    )
    assert script.options[0] == ("tolerance_usecs", "10000")
    assert [c.text for _, c in script.before] == ["../common/defaults.sh"]
    assert [c.text for _, c in script.after] == ["cleanup"]
    assert [event.line for event in script.events] == [8, 9]
    settings = Settings.of(script)
    assert (settings.tolerance, settings.ip_version) == (0.01, "ipv6")


def test_conditions_and_definitions() -> None:
    text = "#ifdef A\n0 > . 1:1(0) ack 1\n#else\n0 > F. 1:1(0) ack 1\n#endif\n+0 close(FD) = 0"
    with_a = parse(text, defines={"A": "", "FD": "4"})
    assert [e.line for e in with_a.events] == [2, 6]
    assert isinstance(with_a.events[1].action, Call)
    assert with_a.events[1].action.arguments == (4,)
    assert [e.line for e in parse(text).events] == [4, 6]


@pytest.mark.parametrize(
    ("text", "why", "line"),
    [
        ("0 < S 0:1(0)", "does not add up", 1),
        ("0 > X. 1:1(0)", "TCP flags", 1),
        ("\n0 > . 1:1(0) <foo>", "TCP option 'foo'", 2),
        ("0 < gre: . 1:1(0)", "gre", 1),
        ("* close(3) = 0", "outbound packets only", 1),
        ("0 close(3 = 0", "expected ','", 1),
        ("#ifdef X\n0 close(3) = 0", "#ifdef without #endif", 2),
        ("", "without events", 1),
        ("0 read(3, 'x') = 0", "value", 1),
        ("0 close(3) = 0\n/* and", "a comment that does not end", 2),
        ("0 close(3) = 0\n+0 `sleep", "a command that does not end", 2),
        ('0 read(3, "x, 1) = 0', "a string that does not end", 1),
        ("0 %{ assert 1", "code that does not end", 1),
        ("0 %{ %{ %{", "code that does not end", 1),
        ("0 < S 0:0(" + "9" * 5000 + ")", "a number of 5000 digits", 1),
        ("1" + "0" * 12 + " close(3) = 0", "a time out of range", 1),
        ("0.5 close(3) = 0\n+0 close(3) = 0\n0.1 close(3) = 0", "a time before", 3),
        ("//" + "x" * (1 << 20), "characters", None),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(text: str, why: str, line: int | None) -> None:
    with pytest.raises(Unsupported, match=why) as refused:
        parse(text)
    assert refused.value.line == line


def test_the_ends_of_lines_do_not_matter() -> None:
    text = "#ifdef A\nbad\n#endif\n#define FD 4\n// a comment\n0 close(FD) = 0\n+0\tclose(5) = 0\n"
    plain = parse(text).events
    assert [event.line for event in plain] == [6, 7]
    for other in (text.replace("\n", "\r\n"), "\ufeff" + text, text.rstrip()):
        assert parse(other).events == plain


@given(st.text(alphabet="0123456789+*~.<>[]{}()SFRP. ackwin,=`%\"'\n/#-", max_size=120))
def test_no_text_is_a_crash(text: str) -> None:
    with suppress(Unsupported):
        assert isinstance(parse(text), Script)


@pytest.mark.parametrize(
    ("command", "settings"),
    [
        ("sysctl -q net.ipv4.tcp_sack=0", {"net.ipv4.tcp_sack": "0"}),
        ("sysctl -w net.ipv4.tcp_rmem='1 2 3' > /dev/null 2>&1", {"net.ipv4.tcp_rmem": "1 2 3"}),
        ("./set_sysctls.py /proc/sys/net/ipv4/tcp_ecn=1", {"net.ipv4.tcp_ecn": "1"}),
        ("echo 5 > /proc/sys/net/ipv4/tcp_fin_timeout", {"net.ipv4.tcp_fin_timeout": "5"}),
        ("sysctl -q net.ipv4.tcp_sack=0\nsysctl -q net.ipv4.tcp_ecn=0", {
            "net.ipv4.tcp_sack": "0", "net.ipv4.tcp_ecn": "0"}),
        ("/tmp/sysctl_restore_${PPID}.sh", {}),
        ("tc qdisc replace dev tun0 root fq", {}),
    ],
)  # fmt: skip
def test_known_commands_are_settings(command: str, settings: dict[str, str]) -> None:
    assert {s.name: s.value for s in meaning(command, 1) if isinstance(s, Setting)} == settings


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf /",
        "sysctl -q kernel.panic=1",
        "echo 1 > /etc/passwd",
        "echo 1 > /proc/sys/net/../kernel/panic",
        "sysctl -q net.ipv4.tcp_sack=$(reboot)",
        "iptables -F",
        "sysctl -q net.ipv4.tcp_sack=0; curl example.com",
        "set_sysctls.py /proc/sys/kernel/panic=1",
        "sysctl -p /etc/evil",
        "tc qdisc add dev tun0 root netem delay 10ms",
    ],
)
def test_every_other_command_is_refused(command: str) -> None:
    with pytest.raises(Unsupported):
        list(meaning(command, 1))


def test_code_is_arithmetic_and_nothing_else() -> None:
    names: dict[str, float] = {}
    info = {"tcpi_snd_cwnd": 10, "tcpi_state": 1}
    assert check("assert tcpi_snd_cwnd == 10, tcpi_snd_cwnd", info, names, 1) is None
    assert check("assert tcpi_state == TCP_ESTABLISHED", info, names, 1) is None
    assert (
        check("x = tcpi_snd_cwnd * 2; assert 10 <= x < 21 and x in (20, 21)", info, names, 1)
        is None
    )
    assert check("assert x == 20\nprint(x)", info, names, 1) is None
    assert check("x += 5; y = z = x / 2\nassert z == 12.5 if x else y", info, names, 1) is None
    wrong = check("assert tcpi_snd_cwnd == 11, 'no'", info, names, 1)
    assert wrong == "assert tcpi_snd_cwnd == 11: tcpi_snd_cwnd is 10"
    for code in ("import os", "assert open('/etc/passwd')", "assert (1).__class__", "9 ** 9 ** 9",
                 "assert unknown", "assert [x for x in (1,)]", "assert 'a' * 10 ** 9", "(" * 300,
                 "assert 1 << 10 ** 9", "x = 1 << 63\n" + "x *= x\n" * 40):  # fmt: skip
        with pytest.raises(Unsupported):
            check(code, info, {}, 1)


def test_tcp_info_is_read_as_far_as_it_goes() -> None:
    octets = bytes([1, 2, 0, 0, 0, 0, 0x87, 0]) + struct.pack("<I", 200000)
    info = tcp_info(octets)
    assert info["tcpi_state"] == 1
    assert (info["tcpi_snd_wscale"], info["tcpi_rcv_wscale"]) == (7, 8)
    assert info["tcpi_rto"] == 200000
    assert "tcpi_ato" not in info


@given(
    six=st.booleans(),
    flags=st.integers(0, 0x1FF),
    seq=st.integers(0, 0xFFFFFFFF),
    ack=st.integers(0, 0xFFFFFFFF),
    body=st.binary(max_size=40),
    options=st.lists(st.builds(Option, st.integers(2, 255), st.binary(max_size=6)), max_size=4).map(
        tuple
    ),
)
def test_a_frame_survives_the_wire(
    six: bool, flags: int, seq: int, ack: int, body: bytes, options: tuple[Option, ...]
) -> None:
    hosts = ("fd00::1", "fd00::2") if six else ("10.0.0.1", "10.0.0.2")
    sent = Frame(*hosts, "tcp", (1, 2), flags, seq, ack, 3, 4, options, body)
    came = decode(encode(sent))
    assert came is not None
    padding = tuple(o for o in came.options if o.kind == 0)
    assert came.options == options + padding
    for name in ("src", "dst", "ports", "flags", "seq", "ack", "window", "urgent", "body"):
        assert getattr(came, name) == getattr(sent, name)


@given(st.binary(max_size=100))
def test_no_octets_are_a_crash(octets: bytes) -> None:
    decode(octets)


def test_a_packet_is_shown_as_it_is_written() -> None:
    text = "P. 1:1001(1000) ack 5 win 257 <nop,nop,TS val 7 ecr 8>"
    assert show(packet("< " + text)) == text


HOSTILE = {
    "a command": ("0 `cp /etc/passwd /tmp/owned`", "command"),
    "a shell in a setting": ("0 `sysctl -q net.ipv4.tcp_sack=0; mkdir /tmp/owned`", "command"),
    "code": ("0 socket(..., SOCK_STREAM, 0) = 3\n+0 %{ __import__('os').system('true') }%", "code"),
    "another family": ("0 socket(AF_UNIX, SOCK_STREAM, 0) = 3", "domain"),
    "a file": ('0 open("/etc/passwd", O_RDONLY) = 3', "open"),
    "much memory": (
        "0 socket(..., SOCK_STREAM, 0) = 3\n+0 write(3, ..., 99999999999) = 1", "octets"),
    "a long wait": ("0 socket(..., SOCK_STREAM, 0) = 3\n+99999 close(3) = 0", "waiting"),
    "a module": (
        "0 socket(..., SOCK_STREAM, 0) = 3\n"
        '+0 setsockopt(3, SOL_TCP, TCP_ULP, "tls", 4) = 0', "TCP_ULP"),
    "another module": (
        "0 socket(..., SOCK_STREAM, 0) = 3\n"
        '+0 setsockopt(3, SOL_TCP, TCP_CONGESTION, "nosuch", 7) = 0', "congestion control"),
    "a number too large": (
        "0 socket(..., SOCK_STREAM, 0) = 3\n+0 listen(3, 99999999999999) = 0", "arguments"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_no_script_reaches_beyond_its_sockets(what: str, tmp_path: Path) -> None:
    text, why = HOSTILE[what]
    path = tmp_path / "hostile.pkt"
    path.write_text(text)
    try:
        outcome = play(path, on="kernel")
    except WireError as missing:
        pytest.skip(str(missing))
    assert outcome.outcome == "unsupported"
    assert why in outcome.why
    assert not Path("/tmp/owned").exists()


FAILING = """\
0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
+0 bind(3, ..., ...) = 0
+0 listen(3, 1) = 0
+0 < S 0:0(0) win 1000 <mss 1000>
+0 > S. 0:0(0) ack 2 <...>
"""


@pytest.mark.parametrize("stack", ["model", "kernel"])
def test_a_failure_names_line_expectation_and_what_came(stack: str, tmp_path: Path) -> None:
    path = tmp_path / "failing.pkt"
    path.write_text(FAILING)
    try:
        outcome = play(path, on=stack)
    except WireError as missing:
        pytest.skip(str(missing))
    assert (outcome.outcome, outcome.line) == ("failed", 5)
    assert "expected S. 0:0(0) ack 2 <...>, came S. 0:0(0) ack 1 win 64240" in outcome.why
    assert "ack is 1, not 2" in outcome.why
    assert "S 0:0(0) win 1000 <mss 1000>" in outcome.diagram
    assert stack in outcome.diagram


def test_the_commands_json_and_status(tmp_path: Path) -> None:
    good, bad, odd = (tmp_path / f"{name}.pkt" for name in ("good", "bad", "odd"))
    good.write_text("0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n+0 close(3) = 0")
    bad.write_text(FAILING)
    odd.write_text("0 < gre: . 1:1(0)")
    command = [sys.executable, "-m", "timewait", "packetdrill", "--json"]
    ran = subprocess.run([*command, good, bad, odd], capture_output=True, text=True, check=False)
    told = json.loads(ran.stdout)
    assert (told["passed"], told["failed"], told["unsupported"]) == (1, 1, 1)
    assert [s["outcome"] for s in told["scripts"]] == ["passed", "failed", "unsupported"]
    assert [s["line"] for s in told["scripts"]] == [None, 5, 1]
    assert ran.returncode == 1
    assert subprocess.run([*command, good], capture_output=True, check=False).returncode == 0
    missing = subprocess.run(
        [*command, "/nowhere.pkt"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1


DEFINED = """\
#define SIZE 1000
#define SOCKET socket(..., SOCK_STREAM, IPPROTO_TCP)
# define nothing: this is a comment, and so is the next line
# else it would not be
#if defined(WIDE)
0 SOCKET = 5
#elif !defined(NARROW)
0 SOCKET = 4
#else
0 SOCKET = 3
#endif
+0 setsockopt(3, SOL_TCP, TCP_MAXSEG, [SIZE], 4) = 0
+0 > S 0:SIZE(SIZE) <mss SIZE>
"""


def test_a_definition_stands_for_any_words() -> None:
    made, option, sent = parse(DEFINED, defines={"NARROW": ""}).events
    assert isinstance(made.action, Call)
    assert (made.line, made.action.name, made.action.result) == (10, "socket", 3)
    assert isinstance(option.action, Call)
    assert option.action.arguments[3] == (1000,)
    assert isinstance(sent.action, Packet)
    assert (sent.action.length, sent.action.options) == (1000, (Option(2, b"\x03\xe8"),))
    assert [e.line for e in parse(DEFINED).events] == [8, 12, 13]
    assert [e.line for e in parse(DEFINED, defines={"WIDE": ""}).events] == [6, 12, 13]


def test_definitions_that_grow_are_refused() -> None:
    text = "#define A B B\n#define B A A A\n0 close(A) = 0"
    with pytest.raises(Unsupported):
        parse(text)
    wide = "\n".join(f"#define A{n} A{n + 1} A{n + 1}" for n in range(40))
    with pytest.raises(Unsupported, match="without end"):
        parse(wide + "\n0 close(A0) = 0")


def test_the_counters_of_accurate_ecn() -> None:
    assert packet("> . 1:1(0) ack 1 <ECN e1b 1 ceb 2 e0b 3,nop>").options == (
        Option(174, bytes([0, 0, 1, 0, 0, 2, 0, 0, 3])),
        Option(1),
    )
    assert packet("> . 1:1(0) ack 1 <ECN e0b 5>").options == (Option(172, bytes([0, 0, 5])),)


def test_addresses_as_strace_writes_them() -> None:
    read = call(
        "connect(3, {sa_family=AF_INET6, sin6_port=htons(80), sin6_flowinfo=htonl(0), "
        'inet_pton(AF_INET6, "fd00::1", &sin6_addr), sin6_scope_id=0}, 28) = 0'
    )
    assert isinstance(read.arguments[1], Struct)
    assert read.arguments[1].get("") == "fd00::1"


def test_code_in_more_than_one_line() -> None:
    info = {"tcpi_unacked": 3}
    indented = "\n      assert tcpi_unacked == 3\n      # and\n      print tcpi_unacked, 'x'\n"
    assert check(indented, info, {}, 1) is None
    assert check("assert tcpi_unacked == 3\n   assert tcpi_unacked & ~1 == 2", info, {}, 1) is None
    assert check("assert 1 << tcpi_unacked == 8 and int(2.5) == 2", info, {}, 1) is None


def test_packetdrills_own_options_come_from_the_command_line_too(tmp_path: Path) -> None:
    script = tmp_path / "six.pkt"
    script.write_text(
        "--ip_version=ipv4\n0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n"
        "+0 getsockopt(3, SOL_SOCKET, SO_DOMAIN, [AF_INET6], [4]) = 0\n"
    )
    command = [sys.executable, "-m", "timewait", "packetdrill"]
    assert subprocess.run([*command, script], capture_output=True, check=False).returncode == 1
    six = [*command, "--ip_version=ipv6", "--tolerance_usecs=10000", script]
    assert subprocess.run(six, capture_output=True, check=False).returncode == 0
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for wrong in (
        ["--ip_versoin=ipv6", script],
        ["--ip_version=ipv5", script],
        ["--mtu=1", script],
        ["-x", script],
        ["--mtu=1500"],
        [tmp_path / "no"],
        [fifo],  # nobody writes to it, and nobody waits for that
    ):
        ran = subprocess.run([*command, *wrong], capture_output=True, text=True, check=False)
        assert (ran.returncode, ran.stdout) == (2, "")
        assert ran.stderr.count("\n") == 1


def test_a_pipe_is_read_once_for_all_its_runs() -> None:
    command = [sys.executable, "-m", "timewait", "packetdrill", "/dev/stdin", "/dev/stdin"]
    text = "--init_scripts=../common/defaults.sh\n" + OPENED
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert ran.stdout.endswith("2 passed, 0 failed, 0 unsupported\n")


def test_a_packet_too_long_for_the_device_is_no_failure_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a veth pair has it, whose packets are no longer than its MTU."""

    def refuse(_: object, packet: bytes) -> None:
        raise OSError(errno.EMSGSIZE, "too long")

    monkeypatch.setattr("timewait.kernel.wire.Wire.send", refuse)
    (tmp_path / "long.pkt").write_text(OPENED)
    try:
        outcome = play(tmp_path / "long.pkt", on="kernel")
    except WireError as why:
        pytest.skip(str(why))
    assert (outcome.outcome, outcome.line) == ("unsupported", 4)
    assert outcome.why == "a packet of 52 octets over a veth pair"


def test_what_fails_beside_others_is_played_again_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (tmp_path / f"{name}.pkt").write_text("0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n")
    played: list[str] = []

    def busy(path: Path, **_: object) -> Outcome:
        played.append(path.stem)
        failed = path.stem == "a" or (played.count(path.stem) == 1 and path.stem == "b")
        return Outcome(str(path), "failed" if failed else "passed")

    monkeypatch.setattr("timewait.packetdrill.play", busy)
    ran = CliRunner().invoke(command, ["--on", "kernel", "--json", str(tmp_path)])
    told = json.loads(ran.output)
    assert (told["passed"], told["failed"], sorted(played)) == (2, 1, ["a", "a", "b", "b", "c"])
    assert [s["outcome"] for s in told["scripts"]] == ["failed", "passed", "passed"]
    played.clear()
    CliRunner().invoke(command, ["--on", "kernel", "-j", "1", str(tmp_path)])
    assert played == ["a", "b", "c"]


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_what_fails_after_this_process_stood_still_may_be_the_machines_fault(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    undisturbed: Callable[..., None],
) -> None:
    def late(self: Wire, octets: bytes) -> None:
        time.sleep(seconds)
        send(self, octets)

    send = Wire.send
    monkeypatch.setattr(Wire, "send", late)
    (tmp_path / "wrong.pkt").write_text(f"{OPENED}+0 > R. 5:5(0) ack 1\n")

    def played() -> None:
        outcome = play(tmp_path / "wrong.pkt", on="kernel")
        assert (outcome.outcome, outcome.untimely) == ("failed", bool(seconds)), outcome.why

    try:
        undisturbed(played, within=0.001)
    except WireError as why:
        pytest.skip(str(why))


def test_the_kernel_is_not_kept_waiting_by_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --on both: all on the model first, and told script by script all the same."""
    for name in "ab":
        (tmp_path / f"{name}.pkt").write_text("0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n")
    played: list[str] = []

    def noted(path: Path, *, on: str, **_: object) -> Outcome:
        played.append(on)
        return Outcome(str(path), "passed")

    monkeypatch.setattr("timewait.packetdrill.play", noted)
    ran = CliRunner().invoke(command, ["--on", "both", str(tmp_path)])
    assert played == ["model", "model", "kernel", "kernel"]
    assert [line.split()[1] for line in ran.output.splitlines()[:4]] == ["model", "kernel"] * 2


@pytest.mark.parametrize("stack", ["model", "kernel"])
def test_the_echo_of_a_timestamp_is_the_scripts_own(stack: str, tmp_path: Path) -> None:
    path = tmp_path / "echo.pkt"
    text = OPENED.partition("+.01")[0]
    text = text.replace("sackOK,nop,nop,nop,wscale 7", "TS val 100 ecr 0")
    outcomes = []
    for ecr in 100, 101:
        path.write_text(text.replace("<...>", f"<mss 1460,nop,nop,TS val 5 ecr {ecr}>"))
        try:
            outcomes.append(play(path, on=stack))
        except WireError as why:
            pytest.skip(str(why))
    assert [(each.outcome, each.line) for each in outcomes] == [("passed", None), ("failed", 5)]
    assert outcomes[1].why.endswith("options")


def test_a_congestion_control_that_no_namespace_may_have_for_its_default(tmp_path: Path) -> None:
    """Where it may not be the default it is chosen for each socket, and inherited."""
    ipv4 = Path("/proc/sys/net/ipv4")
    known, allowed = (
        (ipv4 / f"tcp_{which}_congestion_control").read_text().split()
        for which in ("available", "allowed")
    )
    others = [name for name in known if name not in allowed]
    if not others:
        pytest.skip("every congestion control is allowed here")
    path = tmp_path / "cc.pkt"
    path.write_text(
        f"`sysctl -q net.ipv4.tcp_congestion_control={others[0]}`\n{OPENED}"
        f'+0 getsockopt(4, SOL_TCP, TCP_CONGESTION, "{others[0]}", [16]) = 0\n'
    )
    try:
        assert play(path, on="kernel").why == ""
    except WireError as why:
        pytest.skip(str(why))


def test_commands_that_make_a_file_make_none() -> None:
    made = meaning("rm -f /tmp/x && dd if=/dev/zero of=/tmp/x bs=1k count=3; truncate -s 5 /y", 1)
    assert list(made) == [File("/tmp/x", 3072), File("/y", 5)]
    assert not Path("/y").exists()
    assert list(meaning("sleep .25 > /dev/null", 1)) == [Pause(0.25)]
    for refused in (
        "dd if=/etc/passwd of=/tmp/x",
        "rm -rf /home",
        "cat /etc/passwd",
        "truncate -s 9999999G /x",
        "nstat | grep Syn",
        "echo x > /x",
        "sleep 1e9",
    ):
        with pytest.raises(Unsupported):
            meaning(refused, 1)


def test_a_failure_that_is_not_fatal(tmp_path: Path) -> None:
    path = tmp_path / "goes-on.pkt"
    text = (
        "0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n"
        "+0 listen(3, 1) = -1 EPERM\n"
        "+0 close(3) = {}\n"
    )
    path.write_text("--non_fatal=syscall\n" + text.format("-1 EBADF"))
    assert play(path).outcome == "passed"
    path.write_text("--non_fatal=packet\n" + text.format(0))
    assert (play(path).outcome, play(path).line) == ("failed", 3)


# What Linux 6.18 did with text that nobody reads: the 17th to 20th wait for one ACK.
UNREAD = "".join(
    f"+.001 < P. {seq}:{seq + 1000}(1000) ack 1 win 257\n"
    + (f"* > . 1:1(0) ack {seq + 1000}\n" if seq < 16000 or seq > 19000 else "")
    for seq in range(1, 20001, 1000)
)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ("+0 < F. 1:1(0) ack 1 win 257\n+0 > . 1:1(0) ack 9 win 1", "failed"),
        (UNREAD, "the receive window's growth"),
        (UNREAD.replace("ack 2001\n", "ack 2002\n"), "failed"),
        (
            "+0 write(4, ..., 1000) = 1000\n"
            "* > P. 1:1001(1000) ack 1\n* > P. 1:1001(1000) ack 1\n* > P. 1:1001(1000) ack 1\n"
            "+.1 < . 1:1(0) ack 1001 win 257\n+0 write(4, ..., 20000) = 20000\n"
            "+0 > P. 1001:11001(10000) ack 1\n+.1 < . 1:1(0) ack 11001 win 257\n"
            "+0 > P. 11001:21001(10000) ack 1",
            "congestion control",
        ),
        ("+0 < SEW 1:1(0) win 257\n+0 > SE. 0:0(0) ack 1", "ECN"),
        ("+0 < U. 1:11(10) ack 1 win 257 urg 3\n+0 > . 1:1(0) ack 12", "urgent data"),
        (
            "+0 write(4, ..., 2000) = 2000\n+0 > P. 1:2001(2000) ack 1\n"
            "+.01 < . 1:1(0) ack 1 win 257 <nop,nop,sack 1001:2001>\n+0 > . 1:1001(1000) ack 1",
            "recovery by SACK",
        ),
        ("+0 < udp (10)", "UDP"),
        ("+0 write(4, ..., 9) = 9\n+0 send(4, ..., 9, MSG_EOR) = 9", "MSG_EOR"),
        # Nothing of these is beyond it.
        ("+0 write(4, ..., 1000) = 1000\n+0 > . 1:1001(1000) ack 1", "failed"),
        ("+0 write(4, ..., 10) = 10\n+0 > P. 1:11(10) ack 1 win 9", "failed"),
        ("+0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 4", "failed"),
        ("+0 poll(NULL, 0, 10) = 0\n+0 read(4, ..., 1) = 1", "failed"),
        ("+0 < [ect0] . 1:1(0) ack 1 win 9\n+0 read(4, ..., 1) = 1", "failed"),
    ],
)
def test_what_the_model_has_not_is_no_failure_of_a_stack(
    events: str, why: str, tmp_path: Path
) -> None:
    path = tmp_path / "beyond.pkt"
    path.write_text(OPENED + events + "\n")
    outcome = play(path)
    assert outcome.outcome == ("failed" if why == "failed" else "unsupported")
    assert why == "failed" or why in outcome.why


def test_much_that_differs_is_told_in_short(tmp_path: Path) -> None:
    path = tmp_path / "much.pkt"
    path.write_text(
        f"{OPENED}+0 < P. 1:1001(1000) ack 1 win 257\n* > . 1:1(0) ack 1001\n"
        '+0 read(4, "text", 1000) = 1000\n'
    )
    why = play(path).why
    assert why.startswith("read(): data is b'")
    assert why.endswith("..., expected b'text'")
    assert len(why) < 200


def test_the_last_of_several_segments_is_pushed_though_more_waits(tmp_path: Path) -> None:
    """As Linux 6.18 sends them to a device that takes them one by one."""
    path = tmp_path / "several.pkt"
    path.write_text(
        f"--strict_segments\n{OPENED}+0 send(4, ..., 2500, MSG_MORE) = 2500\n"
        "+0 > . 1:1001(1000) ack 1\n+0 > P. 1001:2001(1000) ack 1\n"
        "+.01 < . 1:1(0) ack 2001 win 257\n+0 > . 2001:2501(500) ack 1\n"
    )
    assert play(path).why == ""


def test_a_wrong_number_is_wrong_in_text_sent_again_too(tmp_path: Path) -> None:
    """Which text is sent again may be beyond the model; what it acknowledges is not."""
    path = tmp_path / "again.pkt"
    script = (
        f"{OPENED}+0 write(4, ..., 3000) = 3000\n+0 > P. 1:3001(3000) ack 1\n"
        "* > P. 2001:3001(1000) ack 1\n* > . 1:1001(1000) ack 1\n"
    )
    path.write_text(script)
    assert play(path).why == ""
    path.write_text(script.replace("* > . 1:1001(1000) ack 1", "* > . 1:1001(1000) ack 2"))
    assert play(path).outcome == "failed"
    path.write_text(script.replace("* > . 1:1001(1000)", "* > . 1001:2001(1000)"))
    assert play(path).why.startswith("loss recovery: ")


OPENED = """\
0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
+0 bind(3, ..., ...) = 0
+0 listen(3, 1) = 0
+0 < S 0:0(0) win 32792 <mss 1000,sackOK,nop,nop,nop,wscale 7>
+0 > S. 0:0(0) ack 1 <...>
+.01 < . 1:1(0) ack 1 win 257
+0 accept(3, ..., ...) = 4
"""


@pytest.mark.parametrize("command", ["packetdrill --on kernel", "run fin-lost --on wire", "fuzz"])
def test_without_a_namespace_the_commands_say_so_in_one_line(
    command: str, importable: Path, tmp_path: Path
) -> None:
    """In a user namespace that allows no further ones, as a "root" without any capability."""
    path = tmp_path / "any.pkt"
    path.write_text("0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3\n")
    words = ["packetdrill", "--on", "kernel", str(path)] if "packetdrill" in command else None
    words = words or ([*command.split()] if command != "fuzz" else ["fuzz", "segments"])
    deny = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set=-all "$@"'
    ran = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", deny, "sh", sys.executable, "-m", "timewait", *words],
        env={"PYTHONPATH": str(importable), "PATH": os.environ["PATH"]},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    if "unshare:" in ran.stderr:
        pytest.skip(ran.stderr.strip())
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1
    assert "user namespaces are disabled here" in ran.stderr

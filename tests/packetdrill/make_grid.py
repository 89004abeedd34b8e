"""Write the grid of scripts: each state × each kind of segment × where it lies in the window.

    python tests/packetdrill/make_grid.py            # write grid/*/*.pkt, as this kernel answers
    python tests/packetdrill/make_grid.py --table    # print the outcomes that the scripts expect

A script brings a connection into a state, lets one segment arrive, and expects
what the live kernel did: the answer, the state after it, what poll(2) and
SO_ERROR say, and the answer to an old octet sent last, which shows that
nothing was sent in between and whether there still is a connection. The model
has no part in this: it is held against these files.
"""

from __future__ import annotations

import select
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final

from timewait.packetdrill.calls import _poll_text
from timewait.packetdrill.frames import Frame
from timewait.packetdrill.on_kernel import KernelStack
from timewait.packetdrill.runner import _Connection, _Runner, show
from timewait.packetdrill.script import Event, Packet, parse
from timewait.packetdrill.settings import Settings
from timewait.tcp.segment import ACK
from timewait.tcp.states import State

GRID: Final = Path(__file__).parent / "grid"

HEAD: Final = """\
--tolerance_usecs=30000
`sysctl -q net.ipv4.tcp_invalid_ratelimit=0`
"""
LISTEN: Final = """\
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 3
   +0 bind(3, ..., ...) = 0
   +0 listen(3, 1) = 0
"""
PASSIVE: Final = (
    LISTEN
    + """\
   +0 < S 0:0(0) win 65535 <mss 1460>
   +0 > S. 0:0(0) ack 1 <mss 1460>
"""
)
ESTABLISHED: Final = (
    PASSIVE
    + """\
   +0 < . 1:1(0) ack 1 win 65535
   +0 accept(3, ..., ...) = 4
   +0 < P. 1:101(100) ack 1 win 65535
    * > . 1:1(0) ack 101
   +0 read(4, ..., 200) = 100
"""
)
FIN_WAIT_1: Final = (
    ESTABLISHED
    + """\
   +0 shutdown(4, SHUT_WR) = 0
   +0 > F. 1:1(0) ack 101
"""
)
CLOSE_WAIT: Final = (
    ESTABLISHED
    + """\
   +0 < F. 101:101(0) ack 1 win 65535
    * > . 1:1(0) ack 102
"""
)
ACTIVE: Final = """\
    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 4
   +0 fcntl(4, F_SETFL, O_RDWR|O_NONBLOCK) = 0
   +0 connect(4, ..., ...) = -1 EINPROGRESS (Operation now in progress)
   +0 > S 0:0(0) <...>
"""
# name -> (how to get there, RCV.NXT, SND.NXT)
STATES: Final = {
    "closed": ("    0 socket(..., SOCK_STREAM, IPPROTO_TCP) = 4\n", 0, 1),
    "listen": (LISTEN, 0, 1),
    "syn-sent": (ACTIVE, 0, 1),
    "syn-received": (PASSIVE, 1, 1),
    "syn-received-active": (
        ACTIVE + "   +0 < S 0:0(0) win 65535 <mss 1460>\n   +0 > S. 0:0(0) ack 1 <...>\n",
        1,
        1,
    ),
    "established": (ESTABLISHED, 101, 1),
    "fin-wait-1": (FIN_WAIT_1, 101, 2),
    "fin-wait-2": (FIN_WAIT_1 + "   +0 < . 101:101(0) ack 2 win 65535\n", 101, 2),
    "fin-wait-2-orphan": (
        ESTABLISHED
        + "   +0 close(4) = 0\n   +0 > F. 1:1(0) ack 101\n   +0 < . 101:101(0) ack 2 win 65535\n",
        101,
        2,
    ),
    "close-wait": (CLOSE_WAIT, 102, 1),
    "closing": (
        FIN_WAIT_1 + "   +0 < F. 101:101(0) ack 1 win 65535\n    * > . 2:2(0) ack 102\n",
        102,
        2,
    ),
    "last-ack": (
        CLOSE_WAIT + "   +0 shutdown(4, SHUT_WR) = 0\n   +0 > F. 1:1(0) ack 102\n",
        102,
        2,
    ),
    "time-wait": (
        FIN_WAIT_1 + "   +0 < F. 101:101(0) ack 2 win 65535\n    * > . 2:2(0) ack 102\n",
        102,
        2,
    ),
}
SEGMENTS: Final = {
    "fin": "F",
    "fin-ack": "F.",
    "ack": ".",
    "rst": "R",
    "rst-ack": "R.",
    "syn": "S",
    "syn-ack": "S.",
    "syn-fin": "SF",
    "data": "P.",
}


def positions(state: str, rcv_nxt: int, segment: str) -> dict[str, tuple[int, int]]:
    """Where a segment may lie: sequence number and length by the position's name."""
    length = 10 if segment == "data" else 0
    if state in ("closed", "listen"):
        return {"any": (100, length)}
    if state == "syn-sent":
        return {"acceptable-ack": (0, length), "unacceptable-ack": (0, length)}
    right = right_edge(state)
    places = {
        "left": (0, min(length, 1)) if rcv_nxt == 1 else (rcv_nxt - 50, length),
        "left-edge": (rcv_nxt, length),
        "inside": (rcv_nxt + 100, length),
        "right-edge": (right, length),
        "right": (right + 10, length),
    }
    if rcv_nxt == 102:
        places["fin-again"] = (101, 0 if segment != "data" else 1)
    return places


class _Recorder(_Runner):
    """A runner that remembers the right edge of the window the kernel has told."""

    edge = 0

    def compare(
        self, event: Event, want: Packet, came: Frame, live: Frame, connection: _Connection
    ) -> None:
        super().compare(event, want, came, live, connection)
        if came.flags & ACK:
            self.edge = max(self.edge, came.ack + came.window)


@cache
def right_edge(state: str) -> int:
    """RCV.NXT + RCV.WND as the setup leaves them."""
    script = parse(HEAD + STATES[state][0])
    settings = Settings.of(script)
    with KernelStack(settings) as stack:
        recorder = _Recorder(script, stack, settings)
        recorder.run()
    return recorder.edge


def write(state: str, segment: str, position: str, seq: int, length: int) -> str:
    """The script, its expectations recorded from the kernel."""
    setup, _, snd_nxt = STATES[state]
    flags = SEGMENTS[segment]
    ack = 100 if position == "unacceptable-ack" else snd_nxt
    text = f"{flags} {seq}:{seq + length}({length})" + (f" ack {ack}" if "." in flags else "")
    text += " win 65535" + (" <mss 1460>" if "S" in flags else "")
    lines = [f"  +.01 < {text}"]
    probe = f"P. 0:1(1) ack {100 if state == 'syn-sent' else snd_nxt} win 65535"

    script = parse(HEAD + setup)
    settings = Settings.of(script)
    with KernelStack(settings) as stack:
        runner = _Runner(script, stack, settings)
        runner.run()

        def play(line: str) -> list[str]:
            runner.last_inbound = None
            runner.event(parse("0 close(0) = 0\n" + line).events[1])
            came = []
            until = stack.now() + 0.06
            connection = runner.connection
            assert connection is not None
            while (frame := runner.next_frame(connection, Packet(False), until)) is not None:
                came.append(answer(runner, frame))
            return [f"+0~+.1 > {c}" for c in came]

        lines += play(f"+.01 < {text}")
        live = stack.calls.fds.get(4)
        if live is not None:
            number = stack.tcp_info(4)["tcpi_state"]
            poller = select.poll()
            poller.register(live, select.POLLIN | select.POLLOUT | 0x2000)
            came = dict(poller.poll(0)).get(live.fileno(), 0)
            lines.append(f"   +0 %{{ assert tcpi_state == {LINUX[number]}, tcpi_state }}%")
            lines.append(
                "   +0 poll([{fd=4, events=POLLIN|POLLOUT|POLLRDHUP, "
                f"revents={_poll_text(came)}}}], 1, 0) = {int(bool(came))}"
            )
            error = live.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            lines.append(f"   +0 getsockopt(4, SOL_SOCKET, SO_ERROR, [{error}], [4]) = 0")
        lines.append(f"  +.01 < {probe}")
        lines += play(f"+.01 < {probe}")
    title = f"{state.upper().replace('-', '_')}: {flags}, {position.replace('-', ' ')}"
    return f"// {title}\n{HEAD}{setup}\n" + "\n".join(lines) + "\n"


LINUX: Final = {
    1: "TCP_ESTABLISHED", 2: "TCP_SYN_SENT", 3: "TCP_SYN_RECV", 4: "TCP_FIN_WAIT1",
    5: "TCP_FIN_WAIT2", 6: "TCP_TIME_WAIT", 7: "TCP_CLOSE", 8: "TCP_CLOSE_WAIT",
    9: "TCP_LAST_ACK", 10: "TCP_LISTEN", 11: "TCP_CLOSING",
}  # fmt: skip


def answer(runner: _Runner, frame: Frame) -> str:
    """A segment the kernel sent, as a script expects it: any window, a SYN's options any."""
    connection = runner.connection
    assert connection is not None
    came = runner.script_frame(frame, connection, Packet(False))
    text = show(came).split(" win ")[0]
    return text + (" <...>" if frame.options else "")


def name(state: str, segment: str, position: str) -> Path:
    """The script's file."""
    return GRID / state / f"{segment}-{position}.pkt"


def table() -> None:
    """Print what the scripts expect, a table for each state."""
    for state, (_, rcv_nxt, _) in STATES.items():
        columns = list(positions(state, rcv_nxt, "ack"))
        print(f"\n{state}")
        rows = [["", *columns]]
        for segment in SEGMENTS:
            rows.append([SEGMENTS[segment]])
            for position in columns:
                rows[-1].append(outcome(name(state, segment, position).read_text()))
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        for row in rows:
            cells = (c.ljust(w) for c, w in zip(row, widths, strict=True))
            print(("  " + "  ".join(cells)).rstrip())


def outcome(script: str) -> str:
    """What became of a segment: the answer's flags, and the state after it if that is known."""
    tail = script[script.rindex("\n\n") :].splitlines()
    answers = []
    state = ""
    for line in tail[3:]:
        if " < " in line:
            break
        if " > " in line:
            answers.append(line.split(" > ")[1].split()[0])
        if "tcpi_state" in line:
            state = State.parse(line.split("== ")[1].split(",")[0]).name
    said = "+".join(answers) or "-"
    gone = tail[-1].split(" > ")[-1].startswith("R") and state != "SYN_SENT"
    if state == "CLOSED" and not gone:
        state = "TIME_WAIT"  # the socket that getsockopt(2) looks at is no longer the connection
    return f"{said} {state or ('gone' if gone else '')}".strip()


def main() -> None:
    """Write the grid, or print its table."""
    if "--table" in sys.argv:
        table()
        return
    jobs = [
        (state, segment, position, *where)
        for state, (_, rcv_nxt, _) in STATES.items()
        for segment in SEGMENTS
        for position, where in positions(state, rcv_nxt, segment).items()
    ]
    with ThreadPoolExecutor(6) as pool:
        for job, text in zip(jobs, pool.map(lambda job: write(*job), jobs), strict=True):
            path = name(*job[:3])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    print(f"{len(jobs)} scripts")


if __name__ == "__main__":
    main()

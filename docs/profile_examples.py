"""One worked example for each thing in which the profiles differ: what each of them does.

Run as `python docs/profile_examples.py`; the output is part of docs/model.md.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from timewait.tcp.connection import Connection, SocketOptions, TCPError
from timewait.tcp.profiles import PROFILES, Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Options, Segment, seq_add
from timewait.tcp.states import State

STACKS: dict[str, Profile] = {
    **PROFILES,
    "linux, tcp_rfc1337=1": profile("linux", tcp_rfc1337=1),
    "freebsd, insecure_rst=1": profile("freebsd", insecure_rst=1),
    "freebsd, insecure_syn=1": profile("freebsd", insecure_syn=1),
    "freebsd, drop_synfin=1": profile("freebsd", drop_synfin=1),
}
PEER = 5000  # the peer's initial sequence number; ours is 1000
WINDOW = 500


def synchronized(stack: Profile, state: State, *, orphan: bool = False) -> Connection:
    """A connection in that state, its segments so far not kept."""
    c = Connection(stack, iss=1000)
    passive = state is State.SYN_RECEIVED
    if passive:
        c.open_passive(0.0)
        c.segment(Segment(PEER, 0, SYN, WINDOW, b"", Options(1460)), 0.0)
    else:
        c.open_active(0.0)
        c.segment(Segment(PEER, 1001, SYN | ACK, WINDOW, b"", Options(1460)), 0.0)
    if state in (State.CLOSE_WAIT, State.LAST_ACK):
        c.segment(Segment(5001, 1001, FIN | ACK, WINDOW), 1.0)
        c.expire(1.1)
    if state in (State.FIN_WAIT_1, State.FIN_WAIT_2, State.TIME_WAIT, State.LAST_ACK):
        (c.close if orphan else c.shutdown)(2.0)
    if state in (State.FIN_WAIT_2, State.TIME_WAIT):
        c.segment(Segment(5001, 1002, ACK, WINDOW), 2.0)
    if state is State.TIME_WAIT:
        c.segment(Segment(5001, 1002, FIN | ACK, WINDOW), 2.0)
    assert c.state is state, c.state
    c.out.clear()
    return c


def outcome(c: Connection, old: State) -> str:
    """What can be seen: the answer, the state, the user's error."""
    answer = " then ".join(str(segment) for segment in c.out) or "no answer"
    c.out.clear()
    state = f"stays {old}" if c.state is old else f"-> {c.state}"
    error = f", the user gets {errno.errorcode[c.error]}" if c.error else ""
    return f"{answer}; {state}{error}"


def arrives(
    state: State, seq: int, bits: int, *, ack: int = 1001, data: bytes = b"", **how: bool
) -> Callable[[Profile], str]:
    """What a segment does in a state. `seq` counts from RCV.NXT."""

    def look(stack: Profile) -> str:
        c = synchronized(stack, state, **how)
        c.passive = c.passive or state is State.TIME_WAIT
        acknowledgment = ack if bits & ACK else 0
        c.segment(Segment(seq_add(c.rcv_nxt, seq), acknowledgment, bits, WINDOW, data), 3.0)
        return outcome(c, state)

    return look


def called(state: State, call: str) -> Callable[[Profile], str]:
    """What a call does before there is a connection."""

    def look(stack: Profile) -> str:
        c = Connection(stack, iss=1000)
        if state is State.LISTEN:
            c.open_passive(0.0)
        elif state is State.SYN_SENT:
            c.open_active(0.0)
        c.out.clear()
        try:
            result = c.send(b"text", 0.0) if call == "send" else getattr(c, call)(0.0)
        except TCPError as refused:
            return f"refused with {errno.errorcode[refused.errno or 0]}"
        taken = "" if result is None else f"takes {result} bytes; "
        return taken + outcome(c, state)

    return look


def restarted(stack: Profile) -> str:
    c = synchronized(stack, State.TIME_WAIT)
    before = c.deadline
    c.segment(Segment(c.rcv_nxt, 1002, ACK, WINDOW), 20.0)
    return "2MSL begins again" if c.deadline != before else "nothing"


def again(stack: Profile) -> str:
    c = synchronized(stack, State.LAST_ACK)
    c.segment(Segment(5001, 1002, FIN | ACK, WINDOW), 3.0)
    return outcome(c, State.LAST_ACK)


def twice(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    for now in (3.0, 3.1):
        c.segment(Segment(c.rcv_nxt + 100, 0, RST, WINDOW), now)
    return f"{len(c.out)} of 2 are answered"


def fin_acknowledged(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    c.segment(Segment(5001, 1001, FIN | ACK, WINDOW), 3.0)
    return "at once" if c.out else f"after {1000 * ((c.deadline or 0.0) - 3.0):.0f} ms"


def text_acknowledged(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    times = []
    for number in range(20):
        now = 3.0 + number / 10
        c.segment(Segment(c.rcv_nxt, 1001, ACK, WINDOW, b"x"), now)
        times.append("0" if c.out else f"{1000 * ((c.deadline or 0.0) - now):.0f}")
        c.expire(now + 0.1)
        c.out.clear()
    first = times.index(next((t for t in times if t != "0"), "0"))
    return (
        f"the first {first} at once, then after {times[-1]} ms"
        if first
        else ("at once" if times[0] == "0" else f"after {times[0]} ms")
    )


def syn_times(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_active(0.0)
    times = []
    while c.state is State.SYN_SENT:
        now = c.deadline or 0.0
        c.out.clear()
        c.expire(now)
        if c.out:
            times.append(f"{now:g}")
    return f"again at {', '.join(times)} s; ETIMEDOUT at {now:g} s"


def hurried(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_active(0.0)
    c.segment(Segment(9000, 7, ACK, WINDOW), 0.5)
    return f"a RST, and the SYN again {1000 * ((c.deadline or 0.0) - 0.5):.0f} ms later"


def syn_to_listener(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_passive(0.0)
    c.segment(Segment(PEER, 0, SYN | FIN, WINDOW), 0.0)
    return outcome(c, State.LISTEN)


def syn_with_text(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_passive(0.0)
    c.segment(Segment(PEER, 0, SYN, WINDOW, b"text"), 0.0)
    c.segment(Segment(c.rcv_nxt, 1001, ACK, WINDOW), 0.0)
    return f"{c.readable_bytes} bytes can be read; {outcome(c, State.SYN_RECEIVED)}"


def syn_ack_with_text(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_active(0.0)
    c.out.clear()
    c.segment(Segment(PEER, 1001, SYN | FIN | ACK, WINDOW, b"text"), 0.0)
    return f"{c.readable_bytes} bytes can be read; {outcome(c, State.SYN_SENT)}"


def kept_alive(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    c.options = SocketOptions(keepalive=(10.0, 5.0, 2))
    c.t_keepalive = 10.0
    while c.state is State.ESTABLISHED:
        c.out.clear()
        c.expire(c.deadline or 0.0)
    return outcome(c, State.ESTABLISHED)


def given_up(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    c.send(b"text", 0.0)
    while c.state is State.ESTABLISHED:
        c.out.clear()
        now = c.deadline or 0.0
        c.expire(now)
    return f"after {now:.0f} s: {outcome(c, State.ESTABLISHED)}"


def offered(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_active(0.0)
    options = c.out[0].options
    assert options is not None
    stamps = "timestamps" if options.ts_val is not None else "no timestamps"
    return f"window {c.out[0].window}, scale {options.window_scale}, {stamps}"


def span(stack: Profile) -> str:
    limit = stack.parameters.fin_wait_2
    orphan = f"{limit:g} s" if limit else "no limit"
    return f"TIME_WAIT {stack.parameters.time_wait:g} s, an orphan's FIN_WAIT_2 {orphan}"


E, C, T, W = State.ESTABLISHED, State.CLOSE_WAIT, State.TIME_WAIT, State.FIN_WAIT_2
SITUATIONS: list[tuple[str, Callable[[Profile], str]]] = [
    ("How long it lasts", span),
    ("A RST at RCV.NXT in TIME_WAIT", arrives(T, 0, RST)),
    ("A RST inside the window in TIME_WAIT", arrives(T, 10, RST)),
    ("A SYN below RCV.NXT in TIME_WAIT", arrives(T, -10, SYN)),
    ("A SYN above RCV.NXT in TIME_WAIT, and somebody listens", arrives(T, 10, SYN)),
    ("A SYN,ACK in TIME_WAIT", arrives(T, -10, SYN | ACK, ack=1002)),
    ("A bare ACK at RCV.NXT in TIME_WAIT", restarted),
    ("Text without an ACK in TIME_WAIT", arrives(T, 0, 0, data=b"x")),
    ("A RST at RCV.NXT in CLOSE_WAIT", arrives(C, 0, RST)),
    ("A RST at RCV.NXT - 1 in CLOSE_WAIT", arrives(C, -1, RST)),
    ("Text across the peer's FIN in CLOSE_WAIT", arrives(C, -1, ACK, data=b"xyz")),
    ("The FIN once more, with an ACK of ours, in LAST_ACK", again),
    ("A RST at RCV.NXT in LAST_ACK", arrives(State.LAST_ACK, 0, RST)),
    ("A RST inside the window in ESTABLISHED", arrives(E, 10, RST)),
    ("Two of them within 0.1 s", twice),
    ("A SYN inside the window in ESTABLISHED", arrives(E, 10, SYN)),
    ("An ACK of what was never sent in ESTABLISHED", arrives(E, 0, ACK, ack=2000)),
    ("A SYN for an orphan in FIN_WAIT_2", arrives(W, 10, SYN, orphan=True)),
    ("A RST outside the window for an orphan in FIN_WAIT_2", arrives(W, -10, RST, orphan=True)),
    ("A RST inside the window for an orphan in FIN_WAIT_2", arrives(W, 10, RST, orphan=True)),
    ("Text for an orphan in FIN_WAIT_2", arrives(W, 0, ACK, ack=1002, data=b"x", orphan=True)),
    ("A RST at RCV.NXT in SYN_RECEIVED, opened passively", arrives(State.SYN_RECEIVED, 0, RST)),
    ("A SYN in the window in SYN_RECEIVED, opened passively", arrives(State.SYN_RECEIVED, 9, SYN)),
    ("The SYN once more in SYN_RECEIVED, opened passively", arrives(State.SYN_RECEIVED, -1, SYN)),
    ("A SYN with a FIN for a listener", syn_to_listener),
    ("A SYN with text for a listener, and the ACK that follows", syn_with_text),
    ("A SYN,ACK with text and a FIN", syn_ack_with_text),
    ("An ACK of something else in SYN_SENT", hurried),
    ("Nobody answers a SYN", syn_times),
    ("Nobody acknowledges text", given_up),
    ("Nobody answers keep-alives", kept_alive),
    ("What a SYN offers", offered),
    ("When text is acknowledged, a byte every 100 ms", text_acknowledged),
    ("When a FIN is acknowledged, no text before it", fin_acknowledged),
    ("send() before connect()", called(State.CLOSED, "send")),
    ("send() while connecting", called(State.SYN_SENT, "send")),
    ("connect() on a listener", called(State.LISTEN, "open_active")),
    ("shutdown(SHUT_WR) on a listener", called(State.LISTEN, "shutdown")),
    ("shutdown(SHUT_WR) while connecting", called(State.SYN_SENT, "shutdown")),
]


def examples() -> str:
    """Every situation, the stacks that do the same together."""
    lines = []
    for title, look in SITUATIONS:
        same: dict[str, list[str]] = {}
        for name, stack in STACKS.items():
            done = look(stack)
            plain = name.partition(",")[0]
            if plain == name or plain not in same.get(done, []):
                same.setdefault(done, []).append(name)
        lines.append(f"{title}:")
        lines += [f"    {', '.join(names)}: {what}" for what, names in same.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(examples())

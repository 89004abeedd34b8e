"""One worked example for each thing in which the profiles differ: what each of them does.

Run as `python docs/profile_examples.py`; the output is part of docs/model.md.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable

from timewait.tcp.connection import Connection, SocketOptions, TCPError
from timewait.tcp.profiles import PROFILES, Profile, profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, Options, Segment, seq_add
from timewait.tcp.states import State, Timer

STACKS: dict[str, Profile] = {
    **PROFILES,
    "linux, tcp_rfc1337=1": profile("linux", tcp_rfc1337=1),
    "freebsd, insecure_rst=1": profile("freebsd", insecure_rst=1),
    "freebsd, insecure_syn=1": profile("freebsd", insecure_syn=1),
    "freebsd, drop_synfin=1": profile("freebsd", drop_synfin=1),
}
CLOSED_FIRST = (State.FIN_WAIT_1, State.FIN_WAIT_2, State.CLOSING, State.TIME_WAIT)
PEER = 5000  # the peer's initial sequence number; ours is 1000
WINDOW = 500


def synchronized(
    stack: Profile, state: State, *, orphan: bool = False, passive: bool = False, window: int = 500
) -> Connection:
    """A connection in that state, its segments so far not kept. `window` is the peer's."""
    c = Connection(stack, iss=1000)
    offer = Options(1460)
    if passive:
        c.open_passive(0.0)
    else:
        c.open_active(0.0)
    if state is State.SYN_RECEIVED:
        c.segment(Segment(PEER, 0, SYN, window, b"", offer), 0.0)
    elif state not in (State.LISTEN, State.SYN_SENT):
        c.segment(Segment(PEER, 1001, SYN | ACK, window, b"", offer), 0.0)
    if state in (State.CLOSE_WAIT, State.LAST_ACK):
        c.segment(Segment(5001, 1001, FIN | ACK, window), 1.0)
        c.expire(1.1)
    if state in (*CLOSED_FIRST, State.LAST_ACK):
        (c.close if orphan else c.shutdown)(2.0)
    if state in (State.FIN_WAIT_2, State.TIME_WAIT):
        c.segment(Segment(5001, 1002, ACK, window), 2.0)
    if state in (State.CLOSING, State.TIME_WAIT):
        c.segment(Segment(5001, c.snd_una, FIN | ACK, window), 2.0)
    assert c.state is state, c.state
    c.out.clear()
    return c


Look = Callable[[Profile], str]


def each(look: Callable[[State], Look], *states: State) -> Look:
    """The same in several states."""

    def tell(stack: Profile) -> str:
        same: dict[str, list[str]] = {}
        for state in states:
            what = look(state)(stack).replace(f"stays {state}", "stays")
            same.setdefault(what, []).append(str(state))
        if len(same) == 1:
            return next(iter(same))
        return "".join(f"\n        {', '.join(names)}: {what}" for what, names in same.items())

    return tell


def outcome(c: Connection, old: State) -> str:
    """What can be seen: the answer, the state, the user's error."""
    answer = " then ".join(str(segment) for segment in c.out) or "no answer"
    c.out.clear()
    state = f"stays {old}" if c.state is old else f"-> {c.state}"
    error = f", the user gets {errno.errorcode[c.error]}" if c.error else ""
    return f"{answer}; {state}{error}"


def arrives(
    state: State, seq: int, bits: int, *, ack: int = 1001, data: bytes = b"", **how: bool
) -> Look:
    """What a segment does in a state. `seq` counts from RCV.NXT."""

    def look(stack: Profile) -> str:
        c = synchronized(stack, state, **how)
        c.passive = c.passive or state is State.TIME_WAIT
        acknowledgment = ack if bits & ACK else 0
        c.segment(Segment(seq_add(c.rcv_nxt, seq), acknowledgment, bits, WINDOW, data), 3.0)
        return outcome(c, state)

    return look


def twice(state: State, seq: int, bits: int, ack: int = 0) -> Look:
    """Whether what tells where we are is answered as often as it is asked for."""

    def look(stack: Profile) -> str:
        c = synchronized(stack, state)
        for now in (3.0, 3.1):
            c.segment(Segment(seq_add(c.rcv_nxt, seq), ack, bits, WINDOW), now)
        if c.state is not state:
            return outcome(c, state)
        return f"{len(c.out)} of 2 are answered"

    return look


def challenged(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    answered = []
    for now in (10.0, 11.0):
        for _ in range(20):
            c.segment(Segment(5101, 0, RST), now)
        answered.append(len(c.out))
        c.out.clear()
    return f"{answered[0]} are answered, and {answered[1]}"


def called(state: State, call: str) -> Look:
    """What a call does in a state."""

    def look(stack: Profile) -> str:
        c = Connection(stack, iss=1000)
        if state is not State.CLOSED:
            c = synchronized(stack, state, passive=state is State.LISTEN)
        try:
            result = c.send(b"text", 0.0) if call == "send" else getattr(c, call)(0.0)
        except TCPError as refused:
            return f"refused with {errno.errorcode[refused.errno or 0]}"
        taken = "" if result is None else f"takes {result} bytes; "
        return taken + outcome(c, state)

    return look


def restarted(seq: int) -> Look:
    def look(stack: Profile) -> str:
        c = synchronized(stack, State.TIME_WAIT)
        before = c.deadline
        c.segment(Segment(seq_add(c.rcv_nxt, seq), 1002, ACK, WINDOW), 20.0)
        return "2MSL begins again" if c.deadline != before else "nothing"

    return look


def again(stack: Profile) -> str:
    c = synchronized(stack, State.LAST_ACK)
    c.segment(Segment(5001, 1002, FIN | ACK, WINDOW), 3.0)
    return outcome(c, State.LAST_ACK)


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


def syn_times(state: State) -> Look:
    """When a SYN, or a SYN,ACK, is sent again."""

    def look(stack: Profile) -> str:
        c = synchronized(stack, state, passive=state is State.SYN_RECEIVED)
        times = []
        while c.state is state:
            now = c.deadline or 0.0
            c.out.clear()
            c.expire(now)
            if c.out:
                times.append(f"{now:g}")
        return f"again at {', '.join(times)} s; given up at {now:g} s"

    return look


def text_again(stack: Profile) -> str:
    c = Connection(stack, iss=1000)
    c.open_active(0.0)
    offer = Options(1460, sack_permitted=True)
    c.segment(Segment(PEER, 1001, SYN | ACK, WINDOW, b"", offer), 0.3)
    c.send(b"text", 1.0)
    times = []
    for _ in range(3):
        times.append((c.deadline or 0.0) - 1.0)
        c.expire(c.deadline or 0.0)
    return f"after {', '.join(f'{time:g}' for time in times)} s"


def probed(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED, window=0)
    c.close(0.0)
    probes = 0
    while c.state is not State.CLOSED:
        c.out.clear()
        now = c.deadline or 0.0
        c.expire(now)
        probes += bool(c.out)
    return f"given up after {probes} probes, {now:.0f} s"


def lingers(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    c.options = SocketOptions(linger2=70.0)
    c.close(0.0)
    c.segment(Segment(5001, 1002, ACK, WINDOW), 0.0)
    while c.deadline is not None:
        now = c.deadline
        c.expire(now)
    return f"over after {now:g} s" if c.state is State.CLOSED else "for ever"


def gives_up(state: State) -> Look:
    def look(stack: Profile) -> str:
        c = synchronized(stack, state)
        c.timeout(Timer.USER, 100.0)
        return abridged(outcome(c, state))

    return look


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


def kept_alive(state: State) -> Look:
    """Nobody answers keep-alives; a FIN of ours waits for a window."""

    def look(stack: Profile) -> str:
        c = synchronized(stack, state, window=WINDOW if state in (E, W, C) else 0)
        c.options = SocketOptions(keepalive=(10.0, 5.0, 2))
        c.t_keepalive = 10.0
        while c.state is state:
            c.out.clear()
            c.expire(c.deadline or 0.0)
        return abridged(outcome(c, state))

    return look


def abridged(what: str) -> str:
    """Without the numbers, which are another state's only for its FINs."""
    return re.sub(r" seq=\d+ ack=\d+", "", what)


def given_up(stack: Profile) -> str:
    c = synchronized(stack, State.ESTABLISHED)
    c.send(b"text", 0.0)
    while c.state is State.ESTABLISHED:
        c.out.clear()
        now = c.deadline or 0.0
        c.expire(now)
    return f"after {now:.0f} s: {outcome(c, State.ESTABLISHED)}"


def orphan_given_up(stack: Profile) -> str:
    c = synchronized(stack, State.FIN_WAIT_1, orphan=True)
    while c.state is State.FIN_WAIT_1:
        now = c.deadline or 0.0
        c.expire(now)
    return f"after {now - 2.0:.0f} s"


def timestamped(recent: int, ts_val: int, idle: float = 1.0, text: bytes = b"text") -> Look:
    """Text with a timestamp, that of the SYN,ACK having been `recent`."""

    def look(stack: Profile) -> str:
        c = Connection(stack, iss=1000, timestamps=True)
        c.open_active(0.0)
        offer = Options(1460, ts_val=recent, ts_ecr=0)
        c.segment(Segment(PEER, 1001, SYN | ACK, WINDOW, b"", offer), 0.0)
        stamp = Options(ts_val=ts_val % 2**32, ts_ecr=0)
        c.out.clear()
        c.segment(Segment(5001, 1001, ACK, WINDOW, text, stamp), idle)
        return "taken" if c.readable_bytes else "too old: " + outcome(c, State.ESTABLISHED)

    return look


def tiny_mss(stack: Profile) -> str:
    c = Connection(stack, iss=1000, timestamps=False)
    c.open_active(0.0)
    c.segment(Segment(PEER, 1001, SYN | ACK, WINDOW, b"", Options(mss=1)), 0.0)
    c.options = SocketOptions(nodelay=True)
    c.out.clear()
    c.send(b"a" * 300, 0.0)
    return f"the first carries {len(c.out[0].data)} bytes"


def bursts(stack: Profile) -> str:
    c = synchronized(stack, E, window=65535)
    writes = []
    for now in (1.0, 2.0, 9.0):
        sizes = []
        c.send(b"a" * 60 * 1460, now)
        while c.out:
            sizes.append(str(len(c.out)))
            c.out.clear()
            now += 0.1
            c.segment(Segment(5001, c.snd_nxt, ACK, 65535), now)
        writes.append(", ".join(sizes))
    return "; ".join(writes)


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
F, X, L, R = State.FIN_WAIT_1, State.CLOSING, State.LAST_ACK, State.SYN_RECEIVED
SITUATIONS: list[tuple[str, Look]] = [
    ("How long it lasts", span),
    ("A RST at RCV.NXT in TIME_WAIT", arrives(T, 0, RST)),
    ("A RST inside the window in TIME_WAIT", arrives(T, 10, RST)),
    ("A SYN below RCV.NXT in TIME_WAIT", arrives(T, -10, SYN)),
    ("A SYN above RCV.NXT in TIME_WAIT, and somebody listens", arrives(T, 10, SYN)),
    ("A SYN above RCV.NXT in TIME_WAIT, twice, and nobody listens", twice(T, 10, SYN)),
    ("A SYN,ACK in TIME_WAIT", arrives(T, -10, SYN | ACK, ack=1002)),
    ("A bare ACK at RCV.NXT in TIME_WAIT", restarted(0)),
    ("A bare ACK below RCV.NXT in TIME_WAIT", restarted(-10)),
    ("Text without an ACK in TIME_WAIT", arrives(T, 0, 0, data=b"x")),
    ("A RST at RCV.NXT after the peer's FIN", each(lambda s: arrives(s, 0, RST), C, X, L)),
    ("A RST at RCV.NXT - 1 after the peer's FIN", each(lambda s: arrives(s, -1, RST), C, X, L)),
    (
        "Text across the peer's FIN",
        each(lambda s: arrives(s, -1, ACK, data=b"xyz"), C, X, L),
    ),
    ("The FIN once more, with an ACK of ours, in LAST_ACK", again),
    ("A RST inside the window in ESTABLISHED", arrives(E, 10, RST)),
    ("Twenty of them at once, and twenty a second later", challenged),
    ("A SYN inside the window in ESTABLISHED", arrives(E, 10, SYN)),
    (
        "An ACK of what was never sent, twice within 0.1 s",
        each(lambda s: twice(s, 0, ACK, 2000), E, F, W, C, X, L),
    ),
    ("A SYN for an orphan in FIN_WAIT_2", arrives(W, 10, SYN, orphan=True)),
    ("A RST outside the window for an orphan in FIN_WAIT_2", arrives(W, -10, RST, orphan=True)),
    ("A RST inside the window for an orphan in FIN_WAIT_2", arrives(W, 10, RST, orphan=True)),
    ("Text for an orphan in FIN_WAIT_1", arrives(F, 0, ACK, data=b"x", orphan=True)),
    ("Text for an orphan in FIN_WAIT_2", arrives(W, 0, ACK, ack=1002, data=b"x", orphan=True)),
    ("TCP_LINGER2 of 70 s for an orphan in FIN_WAIT_2", lingers),
    ("A RST at RCV.NXT in SYN_RECEIVED, opened actively", arrives(R, 0, RST)),
    ("A RST at RCV.NXT in SYN_RECEIVED, opened passively", arrives(R, 0, RST, passive=True)),
    ("A SYN in the window in SYN_RECEIVED, opened passively", arrives(R, 9, SYN, passive=True)),
    ("The SYN once more in SYN_RECEIVED, opened passively", arrives(R, -1, SYN, passive=True)),
    ("A SYN with a FIN for a listener", syn_to_listener),
    ("A SYN with text for a listener, and the ACK that follows", syn_with_text),
    ("A SYN,ACK with text and a FIN", syn_ack_with_text),
    ("An ACK of something else in SYN_SENT", hurried),
    ("Nobody answers a SYN", syn_times(State.SYN_SENT)),
    ("Nobody answers a SYN,ACK", syn_times(R)),
    ("Text is sent again, the round trip being 0.3 s", text_again),
    ("Nobody acknowledges text", given_up),
    ("Nobody acknowledges an orphan's FIN", orphan_given_up),
    ("An orphan's FIN waits for a window, and nobody answers", probed),
    ("Giving up, once synchronized", each(gives_up, E, F, W, C, X, L)),
    ("Nobody answers keep-alives", each(kept_alive, E, F, W, C, X, L)),
    ("A timestamp that is one older than the last", timestamped(9000, 8999)),
    ("Much older", timestamped(9000, 1000)),
    ("Much older, and no text", timestamped(9000, 1000, text=b"")),
    ("Much older, after an hour without a segment", timestamped(9000, 1000, 3600.0)),
    ("Much older, after 25 days", timestamped(9000, 1000, 25 * 86400.0)),
    ("Older than a timestamp of 0", timestamped(0, -1000)),
    ("A peer whose MSS is 1", tiny_mss),
    ("60 segments' text, again after 1 s, and after 7 s: how many go at once", bursts),
    ("What a SYN offers", offered),
    ("When text is acknowledged, a byte every 100 ms", text_acknowledged),
    ("When a FIN is acknowledged, no text before it", fin_acknowledged),
    ("send() before connect()", called(State.CLOSED, "send")),
    ("send() on a listener", called(State.LISTEN, "send")),
    ("send() while connecting", each(lambda s: called(s, "send"), State.SYN_SENT, R)),
    ("connect() on a listener", called(State.LISTEN, "open_active")),
    ("shutdown(SHUT_WR) on a listener", called(State.LISTEN, "shutdown")),
    ("shutdown(SHUT_WR) while connecting", called(State.SYN_SENT, "shutdown")),
    ("shutdown(SHUT_WR) in SYN_RECEIVED", called(R, "shutdown")),
    ("shutdown(SHUT_WR) in TIME_WAIT", called(T, "shutdown")),
    ("ABORT in TIME_WAIT", called(T, "abort")),
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
        lines += [
            f"    {', '.join(names)}: {what}".replace(": \n", ":\n") for what, names in same.items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(examples())

"""RFC 9293 §3.10.7 read line by line, against the `rfc9293` profile: every state, every segment.

`expected` follows the section's text and knows nothing of the machine. Each segment arrives at a
fresh connection; what it answers and the state it is in then must be what the text says.

In one place the text is at odds with itself: the SYN,ACK that ends a simultaneous open in figure 7
(§3.5) lies left of the window, where the first check would only acknowledge it (and the ACK in
return would then do what the figure shows). The figure is followed.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import product

import pytest
from attrs import frozen

from timewait.tcp.connection import Connection, SocketOptions, TCPError
from timewait.tcp.profiles import profile
from timewait.tcp.segment import ACK, FIN, RST, SYN, URG, Options, Segment, seq_diff
from timewait.tcp.states import State, Timer

RFC = profile("rfc9293")
ISS, IRS, WINDOW = 1000, 5000, 500  # WINDOW is SND.WND; RCV.WND is read from the connection
S = State


def there(name: str) -> Connection:
    """A connection in that state, by the shortest way; nothing is on its way."""
    c = Connection(RFC, iss=ISS, timestamps=False)
    state = S[name.split()[0]]
    if name in ("LISTEN", "SYN_RECEIVED passive"):
        c.open_passive(0.0)
    elif state is not S.CLOSED:
        c.open_active(0.0)
    if state is S.SYN_RECEIVED:
        c.segment(Segment(IRS, 0, SYN, WINDOW), 0.0)
    elif state not in (S.CLOSED, S.LISTEN, S.SYN_SENT):
        c.segment(Segment(IRS, ISS + 1, SYN | ACK, WINDOW), 0.0)
    if state in (S.CLOSE_WAIT, S.LAST_ACK):
        c.segment(Segment(IRS + 1, ISS + 1, FIN | ACK, WINDOW), 0.0)
    if state in (S.FIN_WAIT_1, S.FIN_WAIT_2, S.CLOSING, S.LAST_ACK, S.TIME_WAIT):
        c.shutdown(0.0)
    if state in (S.FIN_WAIT_2, S.TIME_WAIT):
        c.segment(Segment(IRS + 1, ISS + 2, ACK, WINDOW), 0.0)
    if state in (S.CLOSING, S.TIME_WAIT):
        c.segment(Segment(IRS + 1, c.snd_una, FIN | ACK, WINDOW), 0.0)
    assert c.state is state
    c.out.clear()
    return c


NAMES = [name for name in (state.name for state in State) if name != "SYN_RECEIVED"]
NAMES += ["SYN_RECEIVED passive", "SYN_RECEIVED active"]

# Flags, then what of ACK numbers, sequence numbers and text is tried with them.
KINDS = [0, RST, RST | ACK, SYN, SYN | ACK, SYN | FIN, SYN | FIN | ACK]
KINDS += [FIN, FIN | ACK, ACK, URG | ACK]
PLACES = ["left", "before", "at", "inside", "last", "right"]
ACKS = ["ancient", "old", "una", "nxt", "unsent"]


def segments(c: Connection) -> Iterator[tuple[str, Segment]]:
    window = (c.rcv_adv - c.rcv_nxt) or WINDOW
    base = c.rcv_nxt or IRS
    places = {
        "left": base - 20,
        "before": base - 1,
        "at": base,
        "inside": base + 10,
        "last": base + window - 1,
        "right": base + window,
    }
    acks = {
        "ancient": c.snd_una - WINDOW - 1,
        "old": c.snd_una - 1,
        "una": c.snd_una,
        "nxt": c.snd_nxt,
        "unsent": c.snd_nxt + 1,
    }
    for flags, place, ack, text in product(KINDS, PLACES, ACKS, (b"", b"x", b"0123456789")):
        if (not flags & ACK and ack != "una") or (flags & RST and text):
            continue
        label = f"{Segment(0, 0, flags)!s}".split(" ")[0]
        number = acks[ack] if flags & ACK else 0
        yield (
            f"{label} {place} ack {ack} len {len(text)}",
            Segment(places[place], number, flags, WINDOW, text),
        )


@frozen
class Then:
    """What the text says: segments sent as (flags, seq, ack), the state, the user's error."""

    answer: tuple[int, int, int] | None
    state: State
    error: int | None = None


def expected(c: Connection, seg: Segment) -> Then:
    """§3.10.7, in its order."""
    state, una, nxt = c.state, c.snd_una, c.snd_nxt
    rcv_nxt, rcv_wnd = c.rcv_nxt, c.rcv_adv - c.rcv_nxt
    flags, length = seg.flags, len(seg.data) + bool(seg.flags & SYN) + bool(seg.flags & FIN)
    drop = Then(None, state)
    reset = Then((RST, seg.ack, 0), state)
    ack = Then((ACK, nxt, rcv_nxt), state)

    if state is S.CLOSED:  # §3.10.7.1
        if flags & RST:
            return drop
        return reset if flags & ACK else Then((RST | ACK, 0, seg.seq + length), state)
    if state is S.LISTEN:  # §3.10.7.2
        if flags & RST:
            return drop
        if flags & ACK:
            return reset
        return Then((SYN | ACK, ISS, seg.seq + 1), S.SYN_RECEIVED) if flags & SYN else drop
    if state is S.SYN_SENT:  # §3.10.7.3
        if flags & ACK and not una < seg.ack <= nxt:
            return drop if flags & RST else reset
        if flags & RST:
            return Then(None, S.CLOSED, errno.ECONNREFUSED) if flags & ACK else drop
        if not flags & SYN:
            return drop
        if not flags & ACK:
            return Then((SYN | ACK, ISS, seg.seq + 1), S.SYN_RECEIVED)
        # Other controls or text in the segment: on with the sixth step.
        return Then((ACK, nxt, seg.seq + length), S.CLOSE_WAIT if flags & FIN else S.ESTABLISHED)

    # §3.10.7.4. First, the sequence number.
    first, last = seq_diff(seg.seq, rcv_nxt), seq_diff(seg.seq + length - 1, rcv_nxt)
    if length == 0:
        acceptable = first == 0 if rcv_wnd == 0 else 0 <= first < rcv_wnd
    else:
        acceptable = rcv_wnd > 0 and (0 <= first < rcv_wnd or 0 <= last < rcv_wnd)
    again = flags & SYN and not flags & RST and first == -1
    if state is S.SYN_RECEIVED and again and not (c.passive and flags & ACK):
        # The peer's own SYN once more: what is left of the window may be trimmed, and it is.
        figure_7 = flags & ACK and seg.ack == nxt and not seg.data
        return Then((ACK, nxt, rcv_nxt), S.ESTABLISHED if figure_7 else state)
    if not acceptable:
        if state is S.TIME_WAIT and flags & SYN and not flags & ACK and first > 0:
            # RFC 1122 §4.2.2.13: a new SYN above the old numbers may open it anew.
            return Then((SYN | ACK, c.next_iss, seg.seq + 1), S.SYN_RECEIVED)
        return drop if flags & RST else ack
    # Second, RST.
    if flags & RST:
        if first != 0:
            return ack
        if state is S.SYN_RECEIVED:
            if c.passive:
                return Then(None, S.LISTEN)
            return Then(None, S.CLOSED, errno.ECONNREFUSED)
        quiet = state in (S.CLOSING, S.LAST_ACK, S.TIME_WAIT)
        return Then(None, S.CLOSED, None if quiet else errno.ECONNRESET)
    # Fourth, SYN.
    if flags & SYN:
        if state is S.SYN_RECEIVED and c.passive:
            return Then(None, S.LISTEN)
        if state is S.TIME_WAIT and not flags & ACK and first > 0:
            return Then((SYN | ACK, c.next_iss, seg.seq + 1), S.SYN_RECEIVED)
        return ack
    # Fifth, ACK.
    if not flags & ACK:
        return drop
    if state is S.TIME_WAIT:
        return drop  # nothing of text here; a repeated FIN is not acceptable, and was answered
    fin_acked = False
    if state is S.SYN_RECEIVED:
        if not una < seg.ack <= nxt:
            return reset
        state = S.ESTABLISHED
    elif seg.ack > nxt or seg.ack < una - c.max_wnd:
        return ack
    else:
        closing = state in (S.FIN_WAIT_1, S.CLOSING, S.LAST_ACK)
        fin_acked = closing and seg.ack == nxt
        if fin_acked and state is S.CLOSING:
            return Then(None, S.TIME_WAIT)
        if fin_acked and state is S.LAST_ACK:
            return Then(None, S.CLOSED)
        if fin_acked:
            state = S.FIN_WAIT_2
    if state in (S.CLOSE_WAIT, S.CLOSING, S.LAST_ACK):
        # Text after a FIN is ignored. (The text says nothing of one that overlaps the FIN.)
        return Then((ACK, nxt, rcv_nxt) if first < 0 else None, state)
    # Seventh, the text; eighth, the FIN.
    taken = last + 1 if first <= 0 and length else 0
    whole = first <= 0 and last < rcv_wnd
    answer = (ACK, nxt, rcv_nxt + min(taken, rcv_wnd)) if length else None
    if flags & FIN and whole:
        after = {
            S.ESTABLISHED: S.CLOSE_WAIT,
            S.FIN_WAIT_1: S.CLOSING,
            S.FIN_WAIT_2: S.TIME_WAIT,
        }
        state = after[state]
    return Then(answer, state)


def seen(c: Connection, seg: Segment) -> Then:
    c.segment(seg, 1.0)
    assert len(c.out) <= 1
    answer = next(((s.flags, s.seq, s.ack) for s in c.out), None)
    return Then(answer, c.state, c.error)


@pytest.mark.parametrize("name", NAMES)
def test_every_segment_is_answered_as_the_section_says(name: str) -> None:
    wrong = []
    tried = 0
    for label, seg in segments(there(name)):
        c = there(name)
        if name == "TIME_WAIT":
            c.passive = True  # somebody still listens
        want = expected(c, seg)
        got = seen(c, seg)
        tried += 1
        if got != want:
            wrong.append(f"{label}: {got} but the text says {want}")
    assert tried > 100
    assert wrong == []


# --- Text and controls that come with a SYN (§3.10.7.2, §3.10.7.3) ------------------------------


def told(c: Connection) -> list[str]:
    lines = [str(seg) for seg in c.out]
    c.out.clear()
    return lines


def test_text_with_a_syn_waits_until_the_syn_is_acknowledged() -> None:
    c = there("LISTEN")
    c.segment(Segment(IRS, 0, SYN, WINDOW, b"hello"), 1.0)
    assert told(c) == ["SYN,ACK seq=1000 ack=5001"]
    assert c.readable_bytes == 0
    c.segment(Segment(IRS + 6, ISS + 1, ACK, WINDOW), 1.0)
    assert told(c) == ["ACK seq=1001 ack=5006"]
    assert c.state is S.ESTABLISHED
    assert c.receive(9, 1.0) == b"hello"


def test_a_fin_with_a_syn_ends_what_it_begins() -> None:
    c = there("LISTEN")
    states: list[State] = []
    c.on_transition = lambda old, new, event, now: states.append(new)
    c.segment(Segment(IRS, 0, SYN | FIN, WINDOW, b"all"), 1.0)
    c.segment(Segment(IRS + 5, ISS + 1, ACK, WINDOW), 1.0)
    assert told(c) == ["SYN,ACK seq=1000 ack=5001", "ACK seq=1001 ack=5005"]
    assert states == [S.SYN_RECEIVED, S.ESTABLISHED, S.CLOSE_WAIT]
    assert c.receive(9, 1.0) == b"all"
    assert c.eof


def test_text_with_a_syn_of_a_simultaneous_open_waits_too() -> None:
    c = there("SYN_SENT")
    c.segment(Segment(IRS, 0, SYN, WINDOW, b"hello"), 1.0)
    c.segment(Segment(IRS + 6, ISS + 1, ACK, WINDOW), 1.0)
    assert told(c) == ["SYN,ACK seq=1000 ack=5001", "ACK seq=1001 ack=5006"]
    assert c.receive(9, 1.0) == b"hello"


def test_text_and_a_fin_with_a_syn_ack_are_taken_at_once() -> None:
    c = there("SYN_SENT")
    states: list[State] = []
    c.on_transition = lambda old, new, event, now: states.append(new)
    c.segment(Segment(IRS, ISS + 1, SYN | FIN | ACK, WINDOW, b"bye"), 1.0)
    assert told(c) == ["ACK seq=1001 ack=5005"]
    assert states == [S.ESTABLISHED, S.CLOSE_WAIT]
    assert c.receive(9, 1.0) == b"bye"
    assert c.eof


def test_a_listener_that_is_reset_forgets_the_text_too() -> None:
    c = there("LISTEN")
    c.segment(Segment(IRS, 0, SYN, WINDOW, b"old"), 1.0)
    c.segment(Segment(IRS + 1, 0, RST, 0), 1.0)
    c.segment(Segment(IRS + 100, 0, SYN, WINDOW), 1.0)
    c.segment(Segment(IRS + 101, ISS + 1, ACK, WINDOW), 1.0)
    assert c.state is S.ESTABLISHED
    assert c.readable_bytes == 0


def test_closing_before_the_text_with_a_syn_was_read_resets() -> None:
    """RFC 2525 §2.17: it would be lost without a word."""
    c = there("SYN_SENT")
    c.segment(Segment(IRS, 0, SYN, WINDOW, b"hello"), 1.0)
    told(c)
    c.close(1.0)
    assert told(c) == ["RST,ACK seq=1001 ack=5001"]
    assert c.state is S.CLOSED


def test_linux_takes_nothing_that_comes_with_a_syn() -> None:
    """The scripts syn-with-text.pkt and syn-ack-with-text.pkt say so of the live kernel."""
    c = Connection(profile("linux"), iss=ISS, timestamps=False)
    c.open_active(0.0)
    c.segment(Segment(IRS, ISS + 1, SYN | FIN | ACK, WINDOW, b"bye"), 1.0)
    assert c.state is S.ESTABLISHED
    assert c.rcv_nxt == IRS + 1


# --- The calls (§3.10.1 to §3.10.6), and the timeouts (§3.10.8) ----------------------------------

REFUSED = {
    "open_passive": "SYN_SENT SYN_RECEIVED+ ESTABLISHED FIN_WAIT_1 FIN_WAIT_2 CLOSE_WAIT CLOSING "
    "LAST_ACK TIME_WAIT",
    "open_active": "SYN_SENT SYN_RECEIVED+ ESTABLISHED FIN_WAIT_1 FIN_WAIT_2 CLOSE_WAIT CLOSING "
    "LAST_ACK TIME_WAIT",
    "send": "CLOSED LISTEN FIN_WAIT_1 FIN_WAIT_2 CLOSING LAST_ACK TIME_WAIT",
    "receive": "CLOSED LISTEN",
    "shutdown": "CLOSED",
    "abort": "",
}
LEADS = {
    ("open_passive", "CLOSED"): ("LISTEN", []),
    ("open_active", "CLOSED"): ("SYN_SENT", ["SYN seq=1000"]),
    ("open_active", "LISTEN"): ("SYN_SENT", ["SYN seq=1000"]),
    ("send", "ESTABLISHED"): ("ESTABLISHED", ["PSH,ACK seq=1001 ack=5001 len=4"]),
    ("send", "CLOSE_WAIT"): ("CLOSE_WAIT", ["PSH,ACK seq=1001 ack=5002 len=4"]),
    ("shutdown", "LISTEN"): ("CLOSED", []),
    ("shutdown", "SYN_SENT"): ("CLOSED", []),
    ("shutdown", "SYN_RECEIVED passive"): ("FIN_WAIT_1", ["FIN,ACK seq=1001 ack=5001"]),
    ("shutdown", "SYN_RECEIVED active"): ("FIN_WAIT_1", ["FIN,ACK seq=1001 ack=5001"]),
    ("shutdown", "ESTABLISHED"): ("FIN_WAIT_1", ["FIN,ACK seq=1001 ack=5001"]),
    ("shutdown", "CLOSE_WAIT"): ("LAST_ACK", ["FIN,ACK seq=1001 ack=5002"]),
    ("abort", "LISTEN"): ("CLOSED", []),
    ("abort", "SYN_SENT"): ("CLOSED", []),
    ("abort", "SYN_RECEIVED passive"): ("CLOSED", ["RST,ACK seq=1001 ack=5001"]),
    ("abort", "SYN_RECEIVED active"): ("CLOSED", ["RST,ACK seq=1001 ack=5001"]),
    ("abort", "ESTABLISHED"): ("CLOSED", ["RST,ACK seq=1001 ack=5001"]),
    ("abort", "FIN_WAIT_1"): ("CLOSED", ["RST,ACK seq=1002 ack=5001"]),
    ("abort", "FIN_WAIT_2"): ("CLOSED", ["RST,ACK seq=1002 ack=5001"]),
    ("abort", "CLOSE_WAIT"): ("CLOSED", ["RST,ACK seq=1001 ack=5002"]),
    ("abort", "CLOSING"): ("CLOSED", []),
    ("abort", "LAST_ACK"): ("CLOSED", []),
    ("abort", "TIME_WAIT"): ("CLOSED", []),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", list(REFUSED))
def test_every_call_does_what_its_section_says(call: str, name: str) -> None:
    c = there(name)
    state, before = c.state, c.snapshot()
    arguments = {"send": (b"text", 1.0), "receive": (10, 1.0)}.get(call, (1.0,))
    if name.split()[0] in REFUSED[call].replace("+", "").split():
        with pytest.raises(TCPError):
            getattr(c, call)(*arguments)
        assert (c.snapshot(), c.out) == (before, [])
        return
    getattr(c, call)(*arguments)
    after, sent = LEADS.get((call, name), (str(state), []))
    assert (str(c.state), told(c)) == (after, sent)


@pytest.mark.parametrize("name", ["SYN_RECEIVED passive", "SYN_RECEIVED active"])
@pytest.mark.parametrize("call", ["shutdown", "close"])
def test_a_close_waits_for_established_behind_text(call: str, name: str) -> None:
    """§3.10.4: "otherwise, queue for processing after entering ESTABLISHED state"."""
    c = there(name)
    states: list[State] = []
    c.on_transition = lambda old, new, event, now: states.append(new)
    assert c.send(b"text", 1.0) == 4
    getattr(c, call)(1.0)
    assert (c.state, told(c)) == (S.SYN_RECEIVED, [])
    with pytest.raises(TCPError, match="Broken pipe"):
        c.send(b"more", 1.0)
    getattr(c, call)(1.0)
    assert (c.state, told(c)) == (S.SYN_RECEIVED, [])
    c.segment(Segment(IRS + 1, ISS + 1, ACK, WINDOW), 1.0)
    assert states == [S.ESTABLISHED, S.FIN_WAIT_1]
    assert told(c) == ["FIN,PSH,ACK seq=1001 ack=5001 len=4"]
    c.segment(Segment(IRS + 1, ISS + 6, ACK, WINDOW), 1.0)
    assert c.state is S.FIN_WAIT_2


def test_a_close_that_waits_for_established_is_sent_as_the_window_allows() -> None:
    c = there("SYN_RECEIVED active")
    c.send(b"text", 1.0)
    c.close(1.0)
    c.segment(Segment(IRS + 1, ISS + 1, ACK, 4), 1.0)
    assert told(c) == ["PSH,ACK seq=1001 ack=5001 len=4"]
    c.segment(Segment(IRS + 1, ISS + 5, ACK, WINDOW), 1.0)
    assert told(c) == ["FIN,ACK seq=1005 ack=5001"]


def test_a_close_that_waits_and_the_peers_fin_with_the_ack_of_the_syn() -> None:
    c = there("SYN_RECEIVED active")
    c.send(b"text", 1.0)
    c.shutdown(1.0)
    c.segment(Segment(IRS + 1, ISS + 1, FIN | ACK, WINDOW, b"bye"), 1.0)
    assert c.state is S.CLOSING
    assert [seg.ack for seg in c.out][-1] == IRS + 5
    assert c.receive(9, 1.0) == b"bye"
    c.segment(Segment(IRS + 5, ISS + 6, ACK, WINDOW), 1.0)
    assert c.state is S.TIME_WAIT


@pytest.mark.parametrize("kind", [RST, RST | ACK])
def test_a_reset_ends_a_close_that_waits(kind: int) -> None:
    """Nobody wants to listen any more, however the connection was opened."""
    for name in ("SYN_RECEIVED passive", "SYN_RECEIVED active"):
        c = there(name)
        c.send(b"text", 1.0)
        c.close(1.0)
        c.segment(Segment(IRS + 1, ISS + 1 if kind & ACK else 0, kind, 0), 1.0)
        assert (c.state, told(c), c.deadline) == (S.CLOSED, [], None)


@pytest.mark.parametrize("name", NAMES)
def test_status_tells_and_changes_nothing(name: str) -> None:
    """§3.10.6: the state, the windows, what waits for an ACK, what can be received, the timeout."""
    c = there(name)
    if name in ("ESTABLISHED", "CLOSE_WAIT"):
        c.send(b"text", 0.0)
    if name == "ESTABLISHED":
        c.segment(Segment(IRS + 1, ISS + 1, ACK, 2, b"hello"), 0.0)
        c.send(b"more", 0.0)
    before = c.snapshot()
    status = c.status()
    assert c.snapshot() == before
    assert status.state is c.state
    assert (status.snd_una, status.snd_nxt, status.rcv_nxt) == (c.snd_una, c.snd_nxt, c.rcv_nxt)
    assert status.unacknowledged == c.snd_nxt - c.snd_una
    if name == "ESTABLISHED":
        assert (status.snd_wnd, status.unacknowledged, status.unsent) == (2, 4, 4)
        assert (status.readable, status.eof) == (5, False)
        assert (status.rcv_nxt, status.rto) == (IRS + 6, 1.0)
        assert Timer.RETRANSMIT in status.timers
    assert status.eof == (name in ("CLOSE_WAIT", "CLOSING", "LAST_ACK", "TIME_WAIT"))


@pytest.mark.parametrize("name", ["SYN_SENT", "ESTABLISHED", "FIN_WAIT_1", "CLOSE_WAIT"])
def test_the_user_timeout_aborts_the_connection(name: str) -> None:
    """§3.10.8: "connection aborted due to user timeout", and CLOSED."""
    c = Connection(RFC, iss=ISS, timestamps=False)
    c.options = SocketOptions(user_timeout=10.0)
    c.open_active(0.0)
    if name != "SYN_SENT":
        c.segment(Segment(IRS, ISS + 1, SYN | ACK, WINDOW), 0.0)
    if name == "CLOSE_WAIT":
        c.segment(Segment(IRS + 1, ISS + 1, FIN | ACK, WINDOW), 0.0)
    if name == "FIN_WAIT_1":
        c.shutdown(0.0)
    elif name != "SYN_SENT":
        c.send(b"text", 0.0)
    c.expire(9.9)
    assert str(c.state) == name
    c.expire(10.0)
    assert (c.state, c.error) == (S.CLOSED, errno.ETIMEDOUT)


def test_a_syn_is_sent_for_three_minutes() -> None:
    """§3.8.3: R2 for a SYN must be at least that."""
    c = there("SYN_SENT")
    while c.state is S.SYN_SENT:
        now = c.deadline
        assert now is not None
        c.expire(now)
    assert now >= 180.0


@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("mss", [1, 11, 12, 13])
def test_text_goes_out_however_little_the_peer_can_receive(mss: int, stamped: bool) -> None:
    """§3.7.1: Eff.snd.MSS, less the octets of the options; never less than one."""
    c = Connection(RFC, iss=0xFFFFFFF0, timestamps=stamped)
    offer = Options(mss, ts_val=1 if stamped else None)
    c.open_active(0.0)
    c.segment(Segment(IRS, 0xFFFFFFF1, SYN | ACK, WINDOW, b"", offer), 0.0)
    c.out.clear()
    c.options = SocketOptions(nodelay=True)
    c.send(b"0123456789", 0.0)
    assert b"".join(seg.data for seg in c.out) == b"0123456789"
    assert {len(seg.data) for seg in c.out[:-1]} <= {max(1, mss - 12 * stamped)}


def test_a_fin_waits_for_the_window_behind_a_syn() -> None:
    """The peer takes one octet, and that is our SYN."""
    c = Connection(RFC, iss=ISS, timestamps=False)
    c.open_passive(0.0)
    c.segment(Segment(IRS, 0, SYN, 1), 0.0)
    c.shutdown(0.0)
    assert told(c) == ["SYN,ACK seq=1000 ack=5001"]
    c.segment(Segment(IRS + 1, ISS + 1, ACK, 1), 1.0)
    assert told(c) == ["FIN,ACK seq=1001 ack=5001"]


@pytest.mark.parametrize(
    "wrong", [{"iss": -1}, {"iss": 1 << 32}, {"iss": 0, "mss": 0}, {"iss": 0, "mss": -1}]
)
def test_what_cannot_be_a_connection(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="not 32 bits, or not above 0"):
        Connection(RFC, **wrong)


def test_fewer_bytes_than_none_cannot_be_received() -> None:
    c = there("ESTABLISHED")
    c.segment(Segment(IRS + 1, ISS + 1, ACK, WINDOW, b"text"), 0.0)
    with pytest.raises(ValueError, match="-1 bytes"):
        c.receive(-1, 0.0)
    assert c.receive(0, 0.0) == b""
    assert c.receive(9, 0.0) == b"text"

"""THE transition table: for every state and every event, what follows and why.

Theory of operation
===================

`timewait.tcp.connection` turns whatever happens to an endpoint into exactly
one `Event`. This module says, for each of the eleven states, what that event
leads to. It holds no code that runs during a connection's life: only rows. The
machine runs on them, the explorer breaks them one at a time to see that it
notices, the diagrams and the matrix in the documentation are drawn from them.

A cell of states x events is a `Row`, of one of four kinds:

- ``go``: the connection performs the row's actions and is then in `next`
  (perhaps the same state);
- ``ignored``: nothing happens, and the standard says so;
- ``error``: a user's call that is refused with `errno`, changing nothing;
- ``never``: the classification cannot produce this event in this state, for
  the reason given. Reaching one is a bug, and raises.

Every row names its source. The base table is RFC 9293 with the RFCs it points
to; what a real stack does otherwise is a difference in `timewait.tcp.profiles`.

Actions are names (`ACTIONS` explains each); `timewait.tcp.actions` has a function
for each. They are performed in order, after the state has changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from attrs import frozen

from timewait.tcp.states import (
    CLOSE_WAIT,
    CLOSED,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    LISTEN,
    SYN_RECEIVED,
    SYN_SENT,
    TIME_WAIT,
    Event,
    State,
)

__all__ = [
    "ACTIONS",
    "ALL",
    "SYNCHRONIZED",
    "TABLE",
    "Row",
    "Table",
    "error",
    "go",
    "ignored",
    "never",
    "stay",
]

ACTIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "send_syn": "send a SYN and start the retransmission timer",
        "send_syn_ack": "note the peer's SYN; send our SYN with its ACK",
        "send_syn_ack_again": "send the SYN,ACK once more",
        "establish": "note that our SYN was acknowledged; the user's OPEN succeeds",
        "return_to_listen": "forget the peer and wait for another SYN",
        "take_text": "take the user's text into the send buffer",
        "send_text": "send what the peer's window allows, and then the FIN if one is queued",
        "queue_fin": "queue a FIN behind the text; send what the window allows",
        "give_text": "hand received text to the user; tell the peer if the window reopens",
        "orphan": "forget the user: nobody reads any more, and FIN_WAIT_2 is bounded",
        "send_ack": "send an ACK at once",
        "acknowledge": "acknowledge the text that came: now or soon, as the stack's policy has it",
        "acknowledge_fin": "acknowledge the FIN: now or soon, as the stack's policy has it",
        "ack_unacceptable": "send an ACK that tells where we are (rate-limited where stacks do)",
        "challenge_ack": "send a challenge ACK (rate-limited)",
        "reset_reply": "answer with the RST that RFC 9293 §3.5.2 gives for this segment",
        "send_rst": "send a RST from SND.NXT",
        "deliver_eof": "tell the user that the peer will send no more",
        "forget": "stop all timers, drop what was not delivered",
        "report_refused": "the user gets ECONNREFUSED",
        "report_reset": "the user gets ECONNRESET",
        "report_pipe": "the user gets EPIPE",
        "report_timeout": "the user gets ETIMEDOUT",
        "start_time_wait": "stop the other timers, start 2MSL",
        "restart_time_wait": "start 2MSL again",
        "start_fin_wait_2": "stop retransmitting; an orphan starts its limit",
        "retransmit": "send the oldest unacknowledged thing again, double the timeout",
        "probe": "send what the window allows, or a segment below it, to be answered",
        "ask": "send a keep-alive, unless something was heard of late",
        "shrink_or_ask": "an orphan becomes a small socket; else send a keep-alive",
        "reopen": "begin a new incarnation, its sequence numbers above the old one's",
    }
)

Kind: TypeAlias = Literal["go", "ignored", "error", "never"]


@frozen
class Row:
    """One cell of the table.

    `next` is the state afterwards, None for "the same". `via` is a state
    passed on the way, where one segment does two things (its ACK and its FIN).
    `source` names the RFC section or the kernel function; `why` is for readers.
    """

    kind: Kind
    next: State | None = None
    actions: tuple[str, ...] = ()
    source: str = ""
    why: str = ""
    errno: str | None = None
    via: State | None = None

    def __str__(self) -> str:
        if self.kind == "error":
            text = str(self.errno)
        elif self.kind == "go":
            acts = ", ".join(self.actions).replace("_", " ")
            text = f"-> {self.next}" if self.next is not None else acts or "nothing happens"
            if self.next is not None and acts:
                text += f": {acts}"
        else:
            text = "ignored" if self.kind == "ignored" else "cannot happen"
        return f"{text} ({self.why})" if self.why else text


def go(to: State, *actions: str, source: str, why: str = "", via: State | None = None) -> Row:
    """A row that leads to another state."""
    return Row("go", to, actions, source, why, via=via)


def stay(*actions: str, source: str, why: str = "") -> Row:
    """A row that acts and stays where it is."""
    return Row("go", None, actions, source, why)


def ignored(source: str, why: str = "") -> Row:
    """A row by which nothing happens."""
    return Row("ignored", source=source, why=why)


def error(errno: str, source: str, why: str = "") -> Row:
    """A row that refuses a user's call."""
    return Row("error", source=source, why=why, errno=errno)


def never(why: str) -> Row:
    """A row for what cannot arise."""
    return Row("never", why=why)


Table: TypeAlias = Mapping[tuple[State, Event], Row]

ALL: Final = tuple(State)
SYNCHRONIZED: Final = (
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    CLOSE_WAIT,
    CLOSING,
    LAST_ACK,
    TIME_WAIT,
)
# Where the peer's FIN has been received.
_FIN_RECEIVED = (CLOSE_WAIT, CLOSING, LAST_ACK, TIME_WAIT)

_Rules: TypeAlias = Iterable[tuple[Iterable[State] | State, Row]]
_cells: dict[tuple[State, Event], Row] = {}


def _on(event: Event, rules: _Rules, others: Row) -> None:
    """Fill one event's column: the rules, and `others` for every state they do not name."""
    for state in ALL:
        _cells[state, event] = others
    for states, row in rules:
        for state in (states,) if isinstance(states, State) else states:
            _cells[state, event] = row


# --- The user's calls -------------------------------------------------------------------------

_3101 = "RFC 9293 §3.10.1"
_on(
    Event.OPEN_PASSIVE,
    [
        (CLOSED, go(LISTEN, source=_3101)),
        (LISTEN, stay(source="POSIX listen(): again, to change the backlog")),
    ],
    error("EINVAL", _3101, "error: connection already exists"),
)
_on(
    Event.OPEN_ACTIVE,
    [
        (CLOSED, go(SYN_SENT, "send_syn", source=_3101)),
        (LISTEN, go(SYN_SENT, "send_syn", source=_3101, why="from passive to active")),
        (SYN_SENT, error("EALREADY", _3101)),
        (SYN_RECEIVED, error("EALREADY", _3101)),
    ],
    error("EISCONN", _3101, "error: connection already exists"),
)
_3102 = "RFC 9293 §3.10.2"
_on(
    Event.SEND,
    [
        ((CLOSED, LISTEN), error("ENOTCONN", _3102, "error: foreign socket unspecified")),
        ((SYN_SENT, SYN_RECEIVED), stay("take_text", source=_3102, why="sent when established")),
        ((ESTABLISHED, CLOSE_WAIT), stay("take_text", "send_text", source=_3102)),
    ],
    error("EPIPE", _3102, "error: connection closing"),
)
_3103 = "RFC 9293 §3.10.3"
_on(
    Event.RECEIVE,
    [
        (CLOSED, error("ENOTCONN", _3103, "error: connection does not exist")),
        (LISTEN, error("ENOTCONN", "POSIX recv()", "the RFC queues it until ESTABLISHED")),
        ((SYN_SENT, SYN_RECEIVED), stay("give_text", source=_3103, why="nothing to read yet")),
        ((ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2), stay("give_text", source=_3103)),
        (CLOSE_WAIT, stay("give_text", source=_3103, why="what is left, then end of file")),
    ],
    stay("give_text", source="POSIX recv()", why="end of file; the RFC: connection closing"),
)
_3104 = "RFC 9293 §3.10.4"
for _event, _orphan in ((Event.SHUTDOWN, ()), (Event.CLOSE, ("orphan",))):
    _on(
        _event,
        [
            (
                CLOSED,
                error("ENOTCONN", _3104, "error: connection does not exist")
                if _event is Event.SHUTDOWN
                else stay("orphan", source="POSIX close(): the socket is given up"),
            ),
            ((LISTEN, SYN_SENT), go(CLOSED, *_orphan, "forget", source=_3104)),
            (SYN_RECEIVED, go(FIN_WAIT_1, *_orphan, "queue_fin", source=_3104)),
            (ESTABLISHED, go(FIN_WAIT_1, *_orphan, "queue_fin", source=_3104)),
            (CLOSE_WAIT, go(LAST_ACK, *_orphan, "queue_fin", source=_3104)),
        ],
        stay(*_orphan, source=_3104, why="ok, as long as no second FIN is sent"),
    )
for _event, _orphan in ((Event.SHUTDOWN_QUEUED, ()), (Event.CLOSE_QUEUED, ("orphan",))):
    _on(
        _event,
        [(SYN_RECEIVED, stay(*_orphan, source=_3104, why="queued until ESTABLISHED"))],
        never("no text waits for ESTABLISHED"),
    )
_unread = "RFC 2525 §2.17, RFC 9293 §3.6.1"
_on(
    Event.CLOSE_UNREAD,
    [
        (
            (SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT),
            go(CLOSED, "orphan", "send_rst", "forget", source=_unread, why="text would be lost"),
        ),
        (CLOSED, stay("orphan", source="POSIX close(): the socket is given up")),
        (
            (CLOSING, LAST_ACK),
            go(CLOSED, "orphan", "send_rst", "forget", source=_unread),
        ),
        (TIME_WAIT, stay("orphan", source=_unread, why="both FINs are acknowledged already")),
    ],
    never("no text can have been received"),
)
_3105 = "RFC 9293 §3.10.5"
_on(
    Event.ABORT,
    [
        (CLOSED, stay("orphan", source=_3105)),
        ((LISTEN, SYN_SENT), go(CLOSED, "orphan", "forget", source=_3105)),
        (
            (SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT),
            go(CLOSED, "orphan", "send_rst", "forget", source=_3105),
        ),
    ],
    go(CLOSED, "orphan", "forget", source=_3105, why="the peer has our FIN or will"),
)
_on(Event.STATUS, [], stay(source="RFC 9293 §3.10.6"))

# --- Segments: RST ----------------------------------------------------------------------------

_71 = "RFC 9293 §3.10.7.1"
_72 = "RFC 9293 §3.10.7.2"
_73 = "RFC 9293 §3.10.7.3"
_74 = "RFC 9293 §3.10.7.4"
_unsynchronized = never("there is no sequence number to hold it against")
_on(
    Event.RST_EXACT,
    [
        (CLOSED, ignored(_71, "a RST is never answered")),
        (LISTEN, ignored(_72, "it cannot be in response to anything sent from here")),
        (
            (SYN_SENT, SYN_RECEIVED),
            go(CLOSED, "report_refused", "forget", source=f"{_73}, §3.10.7.4"),
        ),
        ((CLOSING, LAST_ACK, TIME_WAIT), go(CLOSED, "forget", source=_74)),
    ],
    go(CLOSED, "report_reset", "forget", source=_74),
)
_on(
    Event.RST_TO_PASSIVE,
    [(SYN_RECEIVED, go(LISTEN, "return_to_listen", source=_74))],
    never("only SYN_RECEIVED after a passive open"),
)
_on(
    Event.RST_AFTER_FIN,
    [(_FIN_RECEIVED, ignored(_74, "left of the window"))],
    never("no FIN has been received"),
)
_on(
    Event.RST_IN_WINDOW,
    [
        ((SYN_RECEIVED, *SYNCHRONIZED), stay("challenge_ack", source=f"{_74}, RFC 5961 §3.2")),
    ],
    _unsynchronized,
)
_on(
    Event.RST_OUTSIDE,
    [
        ((CLOSED, LISTEN), _unsynchronized),
        (SYN_SENT, ignored(_73, "no acceptable ACK: not for this attempt")),
    ],
    ignored(_74, "outside the window"),
)

# --- Segments: SYN ----------------------------------------------------------------------------

_on(
    Event.SYN,
    [
        (CLOSED, stay("reset_reply", source=_71)),
        (LISTEN, go(SYN_RECEIVED, "send_syn_ack", source=_72)),
        (SYN_SENT, go(SYN_RECEIVED, "send_syn_ack", source=_73, why="simultaneous open")),
    ],
    never("only where no SYN has been received"),
)
_on(
    Event.SYN_ACK,
    [(SYN_SENT, go(ESTABLISHED, "establish", "send_ack", "send_text", source=_73))],
    never("only in SYN_SENT"),
)
_on(
    Event.FIN_AND_SYN_ACK,
    [
        (
            SYN_SENT,
            go(
                CLOSE_WAIT,
                "establish",
                "deliver_eof",
                "send_ack",
                "send_text",
                source=f"{_73}, §3.10.7.4",
                via=ESTABLISHED,
            ),
        )
    ],
    never("only in SYN_SENT"),
)
_on(
    Event.SYN_TO_PASSIVE,
    [(SYN_RECEIVED, go(LISTEN, "return_to_listen", source=_74))],
    never("only SYN_RECEIVED after a passive open"),
)
_on(
    Event.SYN_AGAIN,
    [
        (
            SYN_RECEIVED,
            stay("ack_unacceptable", source=_74, why="its SYN is left of the window"),
        )
    ],
    never("only in SYN_RECEIVED"),
)
_on(
    Event.SYN_UNEXPECTED,
    [((SYN_RECEIVED, *SYNCHRONIZED), stay("challenge_ack", source=f"{_74}, RFC 5961 §4.2"))],
    never("no connection is synchronized"),
)
_on(
    Event.SYN_REOPENS,
    [
        (
            TIME_WAIT,
            go(
                SYN_RECEIVED,
                "reopen",
                "send_syn_ack",
                source=f"{_74}, RFC 6191 §2",
                why="somebody still listens",
            ),
        )
    ],
    never("only in TIME_WAIT"),
)

# --- Segments: sequence number and acknowledgment ----------------------------------------------

_on(
    Event.UNACCEPTABLE,
    [((SYN_RECEIVED, *SYNCHRONIZED), stay("ack_unacceptable", source=_74))],
    _unsynchronized,
)
_on(
    Event.NO_ACK,
    [
        (CLOSED, stay("reset_reply", source=_71)),
        (LISTEN, ignored(_72, "neither RST, ACK nor SYN")),
        (SYN_SENT, ignored(_73, "neither SYN nor RST")),
    ],
    ignored(_74, "the ACK bit is off"),
)
_on(
    Event.ACK_OF_UNSENT,
    [
        (CLOSED, stay("reset_reply", source=_71)),
        (LISTEN, stay("reset_reply", source=_72)),
        (SYN_SENT, stay("reset_reply", source=_73)),
        (SYN_RECEIVED, stay("reset_reply", source=_74)),
    ],
    stay("send_ack", source=_74),
)
_on(
    Event.ACK_TOO_OLD,
    [
        (SYN_RECEIVED, stay("reset_reply", source=_74)),
        (SYNCHRONIZED, stay("challenge_ack", source=f"{_74}, RFC 5961 §5.2")),
    ],
    _unsynchronized,
)

# --- Segments: acceptable, by what they amount to ----------------------------------------------

_no_fin_sent = never("no FIN of ours is unacknowledged")
_on(
    Event.SEGMENT,
    [
        ((CLOSED, LISTEN, SYN_SENT), never("classified by its flags alone")),
        (SYN_RECEIVED, never("an acceptable segment acknowledges our SYN")),
        (
            (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2),
            stay("send_text", "acknowledge", source=_74),
        ),
        (
            (CLOSE_WAIT, CLOSING, LAST_ACK),
            stay("send_text", "acknowledge", source=_74, why="text after a FIN is ignored"),
        ),
    ],
    ignored(_74, "only the peer's FIN matters here"),
)
_on(
    Event.ACK_OF_SYN,
    [
        (SYN_RECEIVED, go(ESTABLISHED, "establish", "send_text", "acknowledge", source=_74)),
        (
            FIN_WAIT_1,
            stay("establish", "send_text", "acknowledge", source=_74, why="closed early"),
        ),
    ],
    never("our SYN is acknowledged already, or was never sent"),
)
_on(
    Event.ACK_OF_FIN,
    [
        (FIN_WAIT_1, go(FIN_WAIT_2, "start_fin_wait_2", "acknowledge", source=_74)),
        (CLOSING, go(TIME_WAIT, "start_time_wait", source=_74)),
        (LAST_ACK, go(CLOSED, "forget", source=_74)),
    ],
    _no_fin_sent,
)
_on(
    Event.FIN,
    [
        (ESTABLISHED, go(CLOSE_WAIT, "deliver_eof", "send_text", "acknowledge_fin", source=_74)),
        (FIN_WAIT_1, go(CLOSING, "deliver_eof", "send_ack", "send_text", source=_74)),
        (FIN_WAIT_2, go(TIME_WAIT, "deliver_eof", "send_ack", "start_time_wait", source=_74)),
        ((CLOSED, LISTEN, SYN_SENT), never("classified by its flags alone")),
        (SYN_RECEIVED, never("an acceptable segment acknowledges our SYN")),
    ],
    never("the peer's FIN has been received already"),
)
_on(
    Event.FIN_AND_ACK_OF_SYN,
    [
        (
            SYN_RECEIVED,
            go(
                CLOSE_WAIT,
                "establish",
                "deliver_eof",
                "send_text",
                "acknowledge_fin",
                source=_74,
                via=ESTABLISHED,
            ),
        ),
        (
            FIN_WAIT_1,
            go(CLOSING, "establish", "deliver_eof", "send_ack", "send_text", source=_74),
        ),
    ],
    never("our SYN is acknowledged already, or was never sent"),
)
_on(
    Event.FIN_AND_ACK_OF_FIN,
    [
        (
            FIN_WAIT_1,
            go(
                TIME_WAIT,
                "deliver_eof",
                "send_ack",
                "start_time_wait",
                source=_74,
                via=FIN_WAIT_2,
            ),
        ),
    ],
    never("only FIN_WAIT_1 waits for both"),
)
_on(
    Event.FIN_AGAIN,
    [
        ((CLOSE_WAIT, CLOSING, LAST_ACK), stay("send_text", "acknowledge", source=_74)),
        (TIME_WAIT, stay("send_ack", "restart_time_wait", source=_74)),
    ],
    never("no FIN has been received"),
)
_on(
    Event.TEXT_AFTER_CLOSE,
    [
        (
            (FIN_WAIT_1, FIN_WAIT_2),
            go(CLOSED, "reset_reply", "forget", source="RFC 9293 §3.6.1, RFC 1122 §4.2.2.13"),
        ),
        (
            (CLOSE_WAIT, CLOSING, LAST_ACK),
            ignored(_74, "text after a FIN"),
        ),
    ],
    never("somebody is left to read"),
)

_on(
    Event.ACK_OF_SYN_AFTER_SHUTDOWN,
    [
        (
            SYN_RECEIVED,
            go(
                FIN_WAIT_1,
                "establish",
                "queue_fin",
                source="RFC 9293 §3.10.4; tcp_rcv_state_process",
                why="the text, then the FIN",
                via=ESTABLISHED,
            ),
        )
    ],
    never("only in SYN_RECEIVED"),
)

# --- Timeouts ---------------------------------------------------------------------------------

_38 = "RFC 9293 §3.8.1, RFC 6298"
_no_timer = never("this timer does not run here")
_on(
    Event.RETRANSMIT,
    [
        (
            (SYN_SENT, SYN_RECEIVED, ESTABLISHED, FIN_WAIT_1, CLOSE_WAIT, CLOSING, LAST_ACK),
            stay("retransmit", source=_38),
        )
    ],
    _no_timer,
)
_on(
    Event.GIVE_UP,
    [
        ((CLOSED, LISTEN, TIME_WAIT), _no_timer),
        (SYN_RECEIVED, go(CLOSED, "report_timeout", "forget", source="RFC 9293 §3.8.3")),
    ],
    go(CLOSED, "report_timeout", "forget", source="RFC 9293 §3.8.3, §3.10.8"),
)
_on(
    Event.PROBE,
    [
        (
            (ESTABLISHED, FIN_WAIT_1, CLOSE_WAIT, CLOSING, LAST_ACK),
            stay("probe", source="RFC 9293 §3.8.6.1"),
        )
    ],
    _no_timer,
)
_on(
    Event.KEEPALIVE,
    [
        (
            (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK),
            stay("ask", source="RFC 9293 §3.8.4"),
        ),
        (SYN_RECEIVED, stay("ask", source="RFC 9293 §3.8.4", why="put off: the SYN is in flight")),
    ],
    _no_timer,
)
_on(
    Event.UNANSWERED,
    [
        (
            (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK),
            go(CLOSED, "report_timeout", "forget", source="RFC 9293 §3.8.4, RFC 1122 §4.2.3.6"),
        )
    ],
    _no_timer,
)
_on(
    Event.DELAYED_ACK,
    [
        (
            (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2, CLOSE_WAIT, CLOSING, LAST_ACK),
            stay("send_ack", source="RFC 9293 §3.8.6.3, RFC 1122 §4.2.3.2"),
        )
    ],
    _no_timer,
)
_on(
    Event.TIME_WAIT_OVER,
    [(TIME_WAIT, go(CLOSED, "forget", source="RFC 9293 §3.10.8"))],
    never("2MSL is only waited for in TIME_WAIT"),
)
_on(
    Event.FIN_WAIT_2_OVER,
    [(FIN_WAIT_2, go(CLOSED, "forget", source="RFC 1122 §4.2.2.13, RFC 9293 §3.6"))],
    never("only an orphan in FIN_WAIT_2 has this limit"),
)

TABLE: Final[Table] = MappingProxyType(_cells)

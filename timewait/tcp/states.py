"""The vocabulary of a TCP lifecycle: the eleven states and the names people give them.

RFC 9293 §3.3.2 names the states; Linux, BSD and `netstat` spell them in their
own ways. Everything in this project uses the RFC's names with underscores,
and accepts the others on input.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Event", "State", "Timer"]


class State(IntEnum):
    """A TCP connection's state (RFC 9293 §3.3.2).

    The values are small and dense so that a table indexed by state stays a
    list; they are not the kernel's numbers (see `State.from_linux`).
    """

    CLOSED = 0
    LISTEN = 1
    SYN_SENT = 2
    SYN_RECEIVED = 3
    ESTABLISHED = 4
    FIN_WAIT_1 = 5
    FIN_WAIT_2 = 6
    CLOSE_WAIT = 7
    CLOSING = 8
    LAST_ACK = 9
    TIME_WAIT = 10

    def __str__(self) -> str:
        return self.name

    @classmethod
    def parse(cls, text: str) -> State:
        """Read a state in any common spelling: RFC, Linux, BSD, `ss` or `netstat`.

        Raises `ValueError` naming the text where it is no state's name.
        """
        try:
            return _SPELLINGS[text.strip().upper().removeprefix("TCP_").replace("-", "_")]
        except KeyError:
            raise ValueError(f"not a TCP state: {text!r}") from None

    @classmethod
    def from_linux(cls, number: int) -> State:
        """The state of a Linux state number (include/net/tcp_states.h).

        Linux's TCP_NEW_SYN_RECV (12) is an embryonic SYN_RECEIVED; its
        TCP_BOUND_INACTIVE (13, only in sock_diag) is CLOSED with a port.

        Raises `ValueError` for a number Linux does not use.
        """
        try:
            return _LINUX[number]
        except KeyError:
            raise ValueError(f"not a Linux TCP state number: {number}") from None


# By name alone, for the machine: it compares them for every segment.
CLOSED, LISTEN, SYN_SENT = State.CLOSED, State.LISTEN, State.SYN_SENT
SYN_RECEIVED, ESTABLISHED = State.SYN_RECEIVED, State.ESTABLISHED
FIN_WAIT_1, FIN_WAIT_2 = State.FIN_WAIT_1, State.FIN_WAIT_2
CLOSE_WAIT, CLOSING = State.CLOSE_WAIT, State.CLOSING
LAST_ACK, TIME_WAIT = State.LAST_ACK, State.TIME_WAIT

_SPELLINGS: dict[str, State] = {state.name: state for state in State} | {
    "CLOSE": State.CLOSED,
    "UNCONN": State.CLOSED,
    "SYN_RECV": State.SYN_RECEIVED,
    "SYN_RCVD": State.SYN_RECEIVED,
    "NEW_SYN_RECV": State.SYN_RECEIVED,
    "ESTAB": State.ESTABLISHED,
    "FIN_WAIT1": State.FIN_WAIT_1,
    "FIN_WAIT2": State.FIN_WAIT_2,
    "LISTENING": State.LISTEN,
}

_LINUX: dict[int, State] = {
    1: State.ESTABLISHED,
    2: State.SYN_SENT,
    3: State.SYN_RECEIVED,
    4: State.FIN_WAIT_1,
    5: State.FIN_WAIT_2,
    6: State.TIME_WAIT,
    7: State.CLOSED,
    8: State.CLOSE_WAIT,
    9: State.LAST_ACK,
    10: State.LISTEN,
    11: State.CLOSING,
    12: State.SYN_RECEIVED,
    13: State.CLOSED,
}


class Event(IntEnum):
    """What can happen to a connection: a user's call, a segment that arrived, a timeout.

    `timewait.tcp.connection` turns whatever happens into exactly one of these,
    in the order of RFC 9293 §3.10.7.4; `timewait.tcp.transitions` says what
    follows. An ``ACK_...`` or ``FIN...`` event is what the *whole* segment
    amounts to after its sequence number, acknowledgment and text were looked at.
    """

    # User calls (RFC 9293 §3.10.1 to §3.10.6, and the sockets API's own).
    OPEN_PASSIVE = 0
    OPEN_ACTIVE = 1
    SEND = 2
    RECEIVE = 3
    SHUTDOWN = 4  # SHUT_WR: the RFC's CLOSE
    CLOSE = 5  # close(2): the RFC's CLOSE, and nobody will read any more
    CLOSE_UNREAD = 6  # close(2) with text received and not read
    ABORT = 7  # the RFC's ABORT: SO_LINGER {1, 0}
    STATUS = 8
    # Segments that no connection, or one not yet synchronized, receives.
    RST_EXACT = 9  # at RCV.NXT; in SYN_SENT: its ACK is acceptable
    RST_TO_PASSIVE = 10  # an acceptable RST to a passive open's SYN_RECEIVED
    RST_AFTER_FIN = 11  # at RCV.NXT - 1, the peer's FIN having been received
    RST_IN_WINDOW = 12
    RST_OUTSIDE = 13
    SYN = 14
    SYN_ACK = 15  # in SYN_SENT: acceptable
    SYN_TO_PASSIVE = 16  # in the window of a passive open's SYN_RECEIVED
    SYN_AGAIN = 17  # SYN_RECEIVED: the peer's own SYN, once more
    SYN_UNEXPECTED = 18  # in a synchronized state
    SYN_REOPENS = 19  # in TIME_WAIT: newer than anything of the old connection
    UNACCEPTABLE = 20  # outside the window, or an old timestamp (PAWS)
    NO_ACK = 21  # none of RST, SYN and ACK is set, or an ACK of no use any more
    ACK_OF_UNSENT = 22  # acknowledges what was never sent
    ACK_TOO_OLD = 23  # older than any window the peer was ever given (RFC 5961 §5)
    # Acceptable segments, by what they amount to.
    SEGMENT = 24  # text or an acknowledgment that changes no state
    ACK_OF_SYN = 25
    ACK_OF_FIN = 26
    FIN = 27
    FIN_AND_ACK_OF_SYN = 28
    FIN_AND_ACK_OF_FIN = 29
    FIN_AGAIN = 30  # a FIN already received
    TEXT_AFTER_CLOSE = 31  # text that nobody is left to read
    # Timeouts.
    RETRANSMIT = 32
    GIVE_UP = 33  # retransmitted long enough (R2), or the USER TIMEOUT
    PROBE = 34  # zero window
    KEEPALIVE = 35
    DELAYED_ACK = 36
    TIME_WAIT_OVER = 37
    FIN_WAIT_2_OVER = 38
    ACK_OF_SYN_AFTER_SHUTDOWN = 39  # the FIN has waited for it
    FIN_AND_SYN_ACK = 40  # in SYN_SENT: the peer opens and has nothing more to send
    UNANSWERED = 41  # so many keep-alives, or for so long, that the peer must be gone
    SHUTDOWN_QUEUED = 42  # SHUTDOWN behind text that waits for ESTABLISHED
    CLOSE_QUEUED = 43  # CLOSE behind such text

    def __str__(self) -> str:
        return self.name


class Timer(IntEnum):
    """A connection's timers. At most one of each runs."""

    RETRANSMIT = 0
    DELAYED_ACK = 1
    PROBE = 2  # zero-window probe
    KEEPALIVE = 3
    WAIT = 4  # 2MSL in TIME_WAIT; the orphan's limit in FIN_WAIT_2
    USER = 5

    def __str__(self) -> str:
        return self.name

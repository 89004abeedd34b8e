"""The vocabulary of a TCP lifecycle: the eleven states and the names people give them.

RFC 9293 §3.3.2 names the states; Linux, BSD and `netstat` spell them in their
own ways. Everything in this project uses the RFC's names with underscores,
and accepts the others on input.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["State"]


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

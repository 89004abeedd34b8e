"""What differs between stacks: parameters and rows, each with its source.

A `Profile` is the RFC's table with some rows replaced, and a set of named
parameters. `profile("linux", tcp_fin_timeout=5)` gives one with parameters of
your own; they carry the names their stack gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from attrs import evolve, field, frozen

from timewait.tcp.states import Event, State
from timewait.tcp.transitions import (
    SYNCHRONIZED,
    TABLE,
    Row,
    Table,
    error,
    go,
    ignored,
    stay,
)

__all__ = ["PROFILES", "Parameters", "Profile", "profile"]


@frozen
class Parameters:
    """What the machine reads while it runs. Times in seconds, sizes in bytes."""

    time_wait: float = 240.0
    fin_wait_2: float | None = None  # for an orphan; None: no limit
    rto_initial: float = 1.0
    rto_min: float = 1.0
    rto_max: float = 60.0
    rto_floor_on_variance: bool = False  # Linux: RTO = SRTT + max(rto_min, 4 RTTVAR)
    syn_retries: int = 6
    syn_linear: int = 0  # so many SYN timeouts pass before they double
    synack_retries: int = 5
    give_up_after: float = 100.0  # R2, from the first transmission
    orphan_give_up_after: float = 100.0
    delayed_ack: float = 0.0  # 0: every segment is acknowledged at once
    quick_acks: int = 0  # so many ACKs are sent at once before they are delayed
    first_ack_delay: float = 0.0  # 0: a FIN is acknowledged at once; Linux: by the next jiffy
    challenge_interval: float = 0.0  # at most one challenge ACK in so long, per connection
    timestamps: bool = True
    sack: bool = True
    window_scale: int = 7
    linux_checks: bool = False  # tcp_sequence, tcp_ack, tcp_check_req instead of §3.10.7.4's
    small_sockets: bool = False  # TIME_WAIT and orphaned FIN_WAIT_2 as small objects
    rst_after_fin: bool = False
    rfc1337: bool = False
    reset_text_after_close: bool = True
    nagle: bool = True


@frozen
class Profile:
    """A stack: its name, its parameters, its table."""

    name: str
    parameters: Parameters = Parameters()
    differences: Mapping[tuple[State, Event], Row] = MappingProxyType({})
    settings: Mapping[str, Any] = MappingProxyType({})
    table: Table = field(init=False, eq=False, repr=False)
    # The machine's own form of the table, made once (see Connection).
    compiled: list[Any] = field(init=False, eq=False, repr=False, factory=list)

    @table.default
    def _merge(self) -> Table:
        return MappingProxyType({**TABLE, **self.differences})

    def __hash__(self) -> int:
        return hash((self.name, self.parameters))


S, E = State, Event

_LINUX_ROWS: dict[tuple[State, Event], Row] = {
    (S.LISTEN, E.OPEN_ACTIVE): error("EISCONN", "inet_stream_connect"),
    (S.CLOSED, E.SEND): error("EPIPE", "sk_stream_wait_connect"),
    (S.LISTEN, E.SEND): error("EPIPE", "sk_stream_wait_connect"),
    (S.LISTEN, E.SHUTDOWN): stay(source="inet_shutdown: only SHUT_RD ends a listener"),
    (S.TIME_WAIT, E.SHUTDOWN): error("ENOTCONN", "inet_shutdown: the full socket is gone"),
    (S.SYN_SENT, E.SEND): stay(source="sk_stream_wait_connect: EAGAIN"),
    (S.SYN_RECEIVED, E.RST_TO_PASSIVE): go(S.CLOSED, "forget", source="tcp_check_req"),
    (S.SYN_RECEIVED, E.SYN_TO_PASSIVE): go(
        S.CLOSED, "reset_reply", "forget", source="tcp_check_req"
    ),
    (S.SYN_RECEIVED, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    (S.CLOSE_WAIT, E.RST_EXACT): go(S.CLOSED, "report_pipe", "forget", source="tcp_reset"),
    (S.CLOSING, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    (S.LAST_ACK, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    (S.CLOSE_WAIT, E.RST_AFTER_FIN): go(
        S.CLOSED, "report_pipe", "forget", source="tcp_reset_check (since 4.11)"
    ),
    (S.CLOSING, E.RST_AFTER_FIN): go(
        S.CLOSED, "report_reset", "forget", source="tcp_reset_check (since 4.11)"
    ),
    (S.LAST_ACK, E.RST_AFTER_FIN): go(
        S.CLOSED, "report_reset", "forget", source="tcp_reset_check (since 4.11)"
    ),
    (S.TIME_WAIT, E.RST_IN_WINDOW): ignored("tcp_timewait_state_process"),
    (S.ESTABLISHED, E.ACK_OF_UNSENT): ignored("tcp_rcv_established: discarded"),
    **{
        (s, E.ACK_OF_UNSENT): stay("challenge_ack", source="tcp_rcv_state_process")
        for s in SYNCHRONIZED
        if s not in (S.ESTABLISHED, S.TIME_WAIT)
    },
    (S.TIME_WAIT, E.SYN_UNEXPECTED): stay("ack_unacceptable", source="tcp_timewait_state_process"),
    (S.TIME_WAIT, E.SEGMENT): stay("restart_time_wait", source="tcp_timewait_state_process"),
}


def _linux() -> Profile:
    return Profile(
        "linux",
        Parameters(
            time_wait=60.0,
            fin_wait_2=60.0,
            rto_min=0.2,
            rto_max=120.0,
            rto_floor_on_variance=True,
            syn_retries=6,
            syn_linear=4,
            synack_retries=5,
            give_up_after=924.6,
            orphan_give_up_after=102.2,
            delayed_ack=0.04,
            quick_acks=16,
            first_ack_delay=0.004,
            challenge_interval=0.5,
            window_scale=10,
            linux_checks=True,
            small_sockets=True,
            rst_after_fin=True,
        ),
        _LINUX_ROWS,
    )


_FREEBSD_ROWS: dict[tuple[State, Event], Row] = {
    (S.SYN_RECEIVED, E.RST_TO_PASSIVE): go(S.CLOSED, "forget", source="syncache_chkrst"),
    (S.SYN_RECEIVED, E.SYN_TO_PASSIVE): go(S.CLOSED, "forget", source="syncache"),
    (S.TIME_WAIT, E.RST_EXACT): ignored("tcp_twcheck"),
    (S.TIME_WAIT, E.RST_IN_WINDOW): ignored("tcp_twcheck"),
    (S.TIME_WAIT, E.SYN_UNEXPECTED): ignored("tcp_twcheck"),
}

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {
        "rfc9293": Profile("rfc9293"),
        "linux": _linux(),
        "freebsd": Profile(
            "freebsd",
            Parameters(time_wait=60.0, fin_wait_2=60.0, rto_min=0.23, delayed_ack=0.04),
            _FREEBSD_ROWS,
        ),
        "macos": Profile(
            "macos",
            Parameters(time_wait=30.0, fin_wait_2=60.0, rto_min=0.23, delayed_ack=0.1),
            _FREEBSD_ROWS,
        ),
        "windows": Profile(
            "windows", Parameters(time_wait=120.0, fin_wait_2=120.0, rto_min=0.3, delayed_ack=0.04)
        ),
    }
)


def profile(name: str, **settings: Any) -> Profile:
    """The profile of that name, with settings of your own.

    Raises `ValueError` naming an unknown profile or setting.
    """
    try:
        base = PROFILES[name]
    except KeyError:
        raise ValueError(f"no such profile: {name!r} (there are {', '.join(PROFILES)})") from None
    if not settings:
        return base
    renamed = {"tcp_fin_timeout": "fin_wait_2", "tcp_rfc1337": "rfc1337"}
    values = {renamed.get(key, key): value for key, value in settings.items()}
    try:
        parameters = evolve(base.parameters, **values)
    except TypeError:
        raise ValueError(f"{name} has no such setting: {', '.join(settings)}") from None
    return evolve(base, parameters=parameters, settings=MappingProxyType(dict(settings)))

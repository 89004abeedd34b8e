"""What differs between stacks: settings and rows, each with its source.

A `Profile` is the RFC's table with some rows replaced (`differences`), and the
`Parameters` the machine runs with. They follow from its `settings`, which carry
the names their own stack gives them; `profile("linux", tcp_fin_timeout=5)`
gives a profile with settings of your own.

Where nobody measured a value or read it in a stack's source for this project,
its `Setting` says so (`verified` is false): believe the rest more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from attrs import Factory, evolve, field, fields, frozen

from timewait.tcp.states import Event, State
from timewait.tcp.transitions import TABLE, Row, Table, error, go, ignored, stay

__all__ = [
    "PROFILES",
    "RMEM_MAX",
    "Parameters",
    "Profile",
    "Setting",
    "linux_fin_wait_2",
    "profile",
    "window_scale",
]

RMEM_MAX: Final = 4194304  # bytes: net.core.rmem_max, up to which SO_RCVBUF goes


@frozen
class Parameters:
    """What the machine reads while it runs. Times in seconds."""

    time_wait: float = 240.0
    fin_wait_2: float | None = None  # for an orphan; None: no limit
    fin_wait_2_whole: float = 0.0  # Linux: of that, so long before it is a small socket
    rto_initial: float = 1.0
    rto_after_lost_syn: float = 3.0  # RFC 6298 §5.7: where the handshake gave no round trip
    rto_min: float = 1.0
    rto_max: float = 60.0
    synack_rto_max: float = 60.0  # the same of a SYN,ACK
    rto_floor_on_variance: bool = False  # RTO = SRTT + max(rto_min, 4 RTTVAR)
    syn_retries: int = 6
    syn_give_up_after: float = inf  # however often it was sent
    syn_hurry: float = 0.0  # Linux: a wrong ACK of the SYN has it sent again so soon
    syn_linear: int = 0  # so many SYN timeouts pass before they double
    synack_retries: int = 5
    give_up_after: float = 100.0  # R2, from the first transmission
    retries: float = inf  # instead: after so many retransmissions, however long they took
    orphan_give_up_after: float = 100.0  # the same when nobody waits any more
    orphan_until_rto_max: bool = False  # and no longer than until the timeout grows no more
    probe_retries: int = 15  # unanswered zero-window probes
    orphan_probe_retries: int = 15  # the same when nobody waits any more
    delayed_ack: float = 0.0  # 0: text is acknowledged at once
    first_ack_delay: float = 0.0  # 0: a FIN is acknowledged at once; else so late before any text
    quick_acks: int = 0  # so many ACKs are sent at once before they are delayed
    challenge_interval: float = 0.0  # of challenge ACKs, a connection sends in so long
    challenge_most: int = 1  # at most so many
    timestamps: bool = True
    paws_window: int = 0  # ticks by which a timestamp may be older than the last one
    paws_idle: float = 24 * 86400.0  # after so long without a segment TS.Recent is not valid
    paws_zero: bool = True  # TS.Recent is valid though it is 0
    paws_silent: bool = False  # of what is too old only text is answered
    sack: bool = True
    window_scale: int | None = 7  # None: it is not offered
    least_mss: int = 1  # whatever the peer says
    slow_start: bool = False  # a window of segments in flight, until something is lost (RFC 5681)
    slow_start_after_idle: bool = True  # it is small again after a silence
    tail_loss_probe: bool = False  # the first timeout repeats the last segment, undoubled
    drop_synfin: bool = False  # a SYN with a FIN opens nothing
    syn_text: bool = True  # text and a FIN that come with a SYN wait for its acknowledgment
    syn_ack_text: bool = True  # those that come with a SYN,ACK are taken
    old_fin_acks: bool = False  # a FIN left of the window may acknowledge ours all the same
    bsd_time_wait: bool = False  # tcp_twcheck instead of §3.10.7.4 in TIME_WAIT
    time_wait_yields: bool = False  # to a newer SYN, though nobody listens
    linux_checks: bool = False  # tcp_sequence, tcp_check_req, ... instead of §3.10.7.4's order
    small_sockets: bool = False  # an orphan's FIN_WAIT_2 knows only sequence numbers


Rows: TypeAlias = Mapping[tuple[State, Event], Row]
_Effect: TypeAlias = Callable[[Any, dict[str, Any], dict[tuple[State, Event], Row]], None]


@frozen
class Setting:
    """A value that a stack's administrator can (or cannot) change, under the stack's name.

    `verified` is false where the value is neither measured nor read in the
    stack's own source or documentation by this project.
    """

    name: str
    value: Any
    source: str
    meaning: str
    verified: bool = True
    effect: _Effect | None = field(default=None, eq=False, repr=False)


@frozen
class Profile:
    """A stack: its name, its settings, and what follows from them.

    `differences` are the rows that replace the RFC's; `table` is the whole.
    `basis` says in a sentence how far the profile may be believed.
    """

    name: str
    basis: str = "made up"
    settings: Mapping[str, Setting] = field(factory=dict, eq=False, repr=False)
    parameters: Parameters = Parameters()
    differences: Rows = field(factory=dict, eq=False, repr=False)
    # What `profile()` was given beyond the stack's own values.
    changed: tuple[tuple[str, Any], ...] = ()
    table: Table = field(
        init=False,
        eq=False,
        repr=False,
        default=Factory(
            lambda self: MappingProxyType({**TABLE, **self.differences}), takes_self=True
        ),
    )
    # The machine's own form of the table, made once (see `Connection`).
    compiled: list[Any] = field(init=False, eq=False, repr=False, factory=list)

    def __getitem__(self, name: str) -> Any:
        """A setting's value by its stack's name for it. Raises `KeyError`."""
        return self.settings[name].value


S, E = State, Event


def _to(*names: str) -> _Effect:
    """A setting that is a parameter."""

    def effect(
        value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
    ) -> None:
        for name in names:
            parameters[name] = value

    return effect


def _flag(name: str) -> _Effect:
    """A setting that switches a parameter on or off."""

    def effect(
        value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
    ) -> None:
        parameters[name] = bool(value)

    return effect


def _times(factor: float, name: str) -> _Effect:
    def effect(
        value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
    ) -> None:
        parameters[name] = factor * value

    return effect


def _per(unit: float, name: str) -> _Effect:
    def effect(
        value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
    ) -> None:
        parameters[name] = value / unit

    return effect


def _way(name: str, value: Any, source: str, meaning: str, verified: bool = True) -> Setting:
    """A way that a stack has and nobody can change there: a parameter under its own name."""
    return Setting(name, value, source, meaning, verified, effect=_to(name))


def _rows_if(wanted: bool, changes: Rows) -> _Effect:
    """A setting that changes rows when it is `wanted`."""

    def effect(
        value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
    ) -> None:
        if bool(value) is wanted:
            rows.update(changes)

    return effect


def _build(
    name: str,
    basis: str,
    settings: list[Setting],
    rows: Rows,
    **own: Any,
) -> Profile:
    known = {setting.name: setting for setting in settings}
    general = {attribute.name for attribute in fields(Parameters)}
    unknown = [key for key in own if key not in known and key not in general]
    if unknown:
        raise ValueError(
            f"{name} has no setting {unknown[0]!r} (it has {', '.join(known) or 'none'})"
        )
    parameters: dict[str, Any] = {}
    replaced = dict(rows)
    for key, setting in known.items():
        if key in own:
            if not isinstance(own[key], int | float) or not own[key] >= 0:
                raise ValueError(f"{name}: {key}={own[key]!r} is not a number from 0 on")
            setting = Setting(
                **{a.name: getattr(setting, a.name) for a in fields(Setting)} | {"value": own[key]}
            )
            known[key] = setting
        if setting.effect is not None:
            setting.effect(setting.value, parameters, replaced)
    parameters.update({key: value for key, value in own.items() if key not in known})
    return Profile(
        name,
        basis,
        MappingProxyType(known),
        Parameters(**parameters),
        MappingProxyType(replaced),
        tuple(sorted(own.items())),
    )


# --- RFC 9293 ---------------------------------------------------------------------------------

_RFC_SETTINGS = [
    Setting(
        "msl", 120.0, "RFC 9293 §3.4.2", "maximum segment lifetime", effect=_times(2, "time_wait")
    ),
    Setting(
        "rto_initial",
        1.0,
        "RFC 6298 §2.1",
        "first retransmission timeout",
        effect=_to("rto_initial"),
    ),
    Setting("rto_min", 1.0, "RFC 6298 §2.4", "least retransmission timeout", effect=_to("rto_min")),
    Setting(
        "rto_max",
        60.0,
        "RFC 6298 §2.5",
        "greatest, at least 60 s",
        effect=_to("rto_max", "synack_rto_max"),
    ),
    Setting(
        "r2",
        100.0,
        "RFC 9293 §3.8.3",
        "giving up, at least 100 s",
        effect=_to("give_up_after", "orphan_give_up_after"),
    ),
    Setting(
        "syn_retries",
        7,
        "RFC 9293 §3.8.3",
        "of a SYN, with or without an ACK: it must be sent for at least three minutes",
        effect=_to("syn_retries", "synack_retries"),
    ),
    Setting(
        "challenge_interval",
        5.0,
        "RFC 5961 §7",
        "seconds for challenge_most",
        effect=_to("challenge_interval"),
    ),
    Setting(
        "challenge_most",
        5,
        "RFC 5961 §7",
        "challenge ACKs of a connection in that time: no more than ten in any five seconds",
        effect=_to("challenge_most"),
    ),
    Setting(
        "user_timeout",
        300.0,
        "RFC 9293 §3.9.1.1, §3.10.8",
        "five minutes, which also end an orphan's FIN_WAIT_2",
        effect=_to("fin_wait_2"),
    ),
    Setting(
        "paws_idle",
        24 * 86400.0,
        "RFC 7323 §5.5",
        "seconds without a segment after which no timestamp is too old",
        effect=_to("paws_idle"),
    ),
]

# --- Linux ------------------------------------------------------------------------------------


def linux_time_of(retries: int, most: float, timeout: float = 0.2) -> float:
    """How long so many retransmissions take (tcp_model_timeout), the first after `timeout`."""
    total = 0.0
    for _ in range(retries + 1):
        total += timeout
        timeout = min(2 * timeout, most)
    return total


def _retries2(value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]) -> None:
    parameters["give_up_after"] = linux_time_of(value, parameters["rto_max"])
    parameters["probe_retries"] = value


def _orphan_retries(
    value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
) -> None:
    parameters["orphan_give_up_after"] = linux_time_of(value or 8, parameters["rto_max"])
    parameters["orphan_probe_retries"] = value or 8
    parameters["orphan_until_rto_max"] = not value


def _early_retrans(
    value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
) -> None:
    parameters["tail_loss_probe"] = value >= 3


def window_scale(largest: int) -> int:
    """The scale by which a window of so many bytes can be told (tcp_select_initial_window)."""
    return min(max(largest.bit_length() - 1 - 15, 0), 14)


def _rmem_max(value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]) -> None:
    parameters["window_scale"] = window_scale(max(int(value), RMEM_MAX))


def linux_fin_wait_2(timeout: float) -> tuple[float, float]:
    """How many seconds an orphan stays in FIN_WAIT_2 on Linux: as a whole socket, as a small one.

    A small socket's time is bounded by 60 s. What `timeout` (tcp_fin_timeout,
    TCP_LINGER2) has above that is waited for by the keepalive timer, and then
    once more: 120 s is twice 60, but 63 s is twice 3 (tcp_rcv_state_process,
    tcp_keepalive_timer; measured with 63, 70, 90 and 120 s).
    """
    return (timeout - 60.0, timeout - 60.0) if timeout > 60.0 else (0.0, timeout)


def _fin_timeout(
    value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
) -> None:
    parameters["fin_wait_2_whole"], small = linux_fin_wait_2(value)
    parameters["fin_wait_2"] = parameters["fin_wait_2_whole"] + small


def _tick(value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]) -> None:
    parameters["first_ack_delay"] = 1 / value


_LINUX_SETTINGS = [
    Setting(
        "TCP_TIMEWAIT_LEN",
        60.0,
        "include/net/tcp.h; measured 60.02 to 62.07 s",
        "TIME_WAIT, fixed when the kernel is compiled",
        effect=_to("time_wait"),
    ),
    Setting(
        "tcp_fin_timeout",
        60.0,
        "Documentation/networking/ip-sysctl.rst, tcp_fin_time; measured",
        "an orphan's FIN_WAIT_2 (not TIME_WAIT); what is above 60 s alone, twice: 63 lasts 6 s",
        effect=_fin_timeout,
    ),
    Setting(
        "tcp_rfc1337",
        0,
        "tcp_timewait_state_process",
        "1: a RST does not end TIME_WAIT",
        effect=_rows_if(
            True,
            {
                (S.TIME_WAIT, E.RST_EXACT): ignored(
                    "tcp_timewait_state_process, RFC 1337 §3", "tcp_rfc1337=1"
                )
            },
        ),
    ),
    Setting(
        "tcp_tw_reuse",
        2,
        "Documentation/networking/ip-sysctl.rst; measured",
        "connect() over TIME_WAIT: 0 never, 1 yes, 2 on loopback only",
    ),
    Setting(
        "tcp_tw_reuse_delay",
        1000,
        "Documentation/networking/ip-sysctl.rst; measured",
        "milliseconds that a TIME_WAIT must be old for tcp_tw_reuse",
    ),
    Setting(
        "tcp_max_tw_buckets",
        131072,
        "Documentation/networking/ip-sysctl.rst; measured",
        "beyond so many, the newest skips TIME_WAIT",
    ),
    Setting(
        "tcp_rto_max_ms",
        120_000,
        "ip-sysctl.rst (since 6.15), tcp_model_timeout; measured",
        "greatest retransmission timeout, but of a SYN,ACK",
        effect=_per(1000, "rto_max"),
    ),
    _way("synack_rto_max", 120.0, "TCP_RTO_MAX; measured", "greatest timeout of a SYN,ACK"),
    Setting(
        "tcp_orphan_retries",
        0,
        "tcp_orphan_retries",
        "retransmissions for an orphan; 0: 8, and none once the timeout is tcp_rto_max_ms",
        effect=_orphan_retries,
    ),
    Setting(
        "tcp_retries2",
        15,
        "retransmits_timed_out",
        "retransmissions before giving up: 924.6 s",
        effect=_retries2,
    ),
    Setting("tcp_syn_retries", 6, "tcp_write_timeout", "of a SYN", effect=_to("syn_retries")),
    Setting(
        "tcp_syn_linear_timeouts",
        4,
        "tcp_retransmit_timer (since 6.5)",
        "SYN timeouts that do not double, beside tcp_syn_retries",
        effect=_to("syn_linear"),
    ),
    Setting(
        "tcp_synack_retries", 5, "reqsk_timer_handler", "of a SYN,ACK", effect=_to("synack_retries")
    ),
    Setting(
        "tcp_invalid_ratelimit",
        500,
        "tcp_oow_rate_limited",
        "milliseconds between answers to segments that are out of place",
        effect=_per(1000, "challenge_interval"),
    ),
    Setting(
        "tcp_challenge_ack_limit",
        2147483647,
        "tcp_send_challenge_ack (no limit since 5.19)",
        "challenge ACKs of the whole host in a second",
    ),
    Setting(
        "tcp_early_retrans",
        3,
        "tcp_schedule_loss_probe; measured",
        "3: the first retransmission is a tail loss probe, and does not double the timeout",
        effect=_early_retrans,
    ),
    Setting("tcp_timestamps", 1, "ip-sysctl.rst", "RFC 7323", effect=_flag("timestamps")),
    Setting("tcp_sack", 1, "ip-sysctl.rst", "RFC 2018", effect=_flag("sack")),
    Setting(
        "tcp_slow_start_after_idle",
        1,
        "ip-sysctl.rst, tcp_cwnd_restart; measured",
        "after a timeout's silence the congestion window is halved, to the first one at least",
        effect=_flag("slow_start_after_idle"),
    ),
    Setting(
        "TCP_PAWS_WINDOW",
        1,
        "tcp_paws_check; measured",
        "a timestamp may be so much older than the last one",
        effect=_to("paws_window"),
    ),
    Setting(
        "TCP_PAWS_WRAP",
        2147.0,
        "include/net/tcp.h (since 6.7); measured",
        "seconds without a timestamp after which none is too old",
        effect=_to("paws_idle"),
    ),
    _way("paws_zero", False, "tcp_paws_check; measured", "a TS.Recent of 0 counts as none"),
    Setting(
        "tcp_min_snd_mss",
        48,
        "ip-sysctl.rst, __tcp_mtu_to_mss; measured",
        "least MSS that a peer's SYN is believed, options included",
        effect=_to("least_mss"),
    ),
    Setting(
        "tcp_rmem_max",
        33554432,
        "tcp_select_initial_window; the third of tcp_rmem, 6 MiB before 6.17",
        "decides the window scale",
        effect=_rmem_max,
    ),
    Setting(
        "tcp_rto_min_us",
        200_000,
        "ip-sysctl.rst (since 6.11); tcp_set_rto",
        "least that is added to SRTT for the retransmission timeout",
        effect=_per(1_000_000, "rto_min"),
    ),
    Setting(
        "TCP_TIMEOUT_MIN",
        0.008,
        "tcp_rcv_synsent_state_process; measured, two ticks at HZ=250",
        "after a wrong ACK of the SYN it is sent again so soon",
        effect=_to("syn_hurry"),
    ),
    Setting(
        "TCP_DELACK_MIN",
        0.04,
        "include/net/tcp.h; measured",
        "an ACK of text waits so long, or for a second segment",
        effect=_to("delayed_ack"),
    ),
    Setting(
        "TCP_MAX_QUICKACKS",
        16,
        "include/net/tcp.h, tcp_incr_quickack; measured",
        "so many ACKs are sent at once before they are delayed",
        effect=_to("quick_acks"),
    ),
    Setting(
        "CONFIG_HZ",
        250,
        "tcp_send_delayed_ack; measured",
        "a FIN before any text is acknowledged at the next tick",
        effect=_tick,
    ),
    _way(
        "rto_floor_on_variance", True, "tcp_set_rto; measured", "RTO = SRTT + max(least, 4 RTTVAR)"
    ),
    _way(
        "slow_start",
        True,
        "tcp_cwnd_test, tcp_cwnd_validate, tcp_slow_start; measured",
        "ten segments in flight at first, until something is lost: RFC 5681, RFC 6928",
    ),
    _way("drop_synfin", True, "tcp_rcv_state_process; measured", "a SYN with a FIN opens nothing"),
    _way("syn_text", False, "tcp_conn_request; measured", "text with a SYN is dropped"),
    _way(
        "syn_ack_text",
        False,
        "tcp_rcv_synsent_state_process; measured",
        "text and a FIN with a SYN,ACK are dropped",
    ),
    _way(
        "old_fin_acks", True, "tcp_sequence; measured", "a FIN received before may acknowledge ours"
    ),
    _way(
        "linux_checks",
        True,
        "tcp_sequence, tcp_check_req, tcp_timewait_state_process; measured",
        "segments are looked at in its order and by its measures",
    ),
    _way(
        "small_sockets", True, "tcp_time_wait; measured", "an orphan's FIN_WAIT_2 is a small socket"
    ),
]
_reset_check = "tcp_reset_check (since 4.11)"
_state_process = "tcp_rcv_state_process"
_tw = "tcp_timewait_state_process"
_BEYOND_SYN = (
    S.ESTABLISHED,
    S.FIN_WAIT_1,
    S.FIN_WAIT_2,
    S.CLOSE_WAIT,
    S.CLOSING,
    S.LAST_ACK,
)
_LINUX_ROWS: Rows = {
    # Calls.
    (S.LISTEN, E.OPEN_ACTIVE): error("EISCONN", "inet_stream_connect"),
    (S.CLOSED, E.SEND): error("EPIPE", "sk_stream_wait_connect"),
    (S.LISTEN, E.SEND): error("EPIPE", "sk_stream_wait_connect"),
    (S.SYN_SENT, E.SEND): stay(source="sk_stream_wait_connect", why="EAGAIN: nothing is taken"),
    (S.SYN_RECEIVED, E.SEND): stay(source="sk_stream_wait_connect", why="EAGAIN"),
    (S.LISTEN, E.SHUTDOWN): stay(source="inet_shutdown", why="only SHUT_RD ends a listener"),
    (S.SYN_SENT, E.SHUTDOWN): go(S.CLOSED, "forget", "report_reset", source="tcp_disconnect"),
    (S.SYN_RECEIVED, E.SHUTDOWN): stay(source="tcp_shutdown", why="the FIN waits"),
    (S.TIME_WAIT, E.SHUTDOWN): error("ENOTCONN", "inet_shutdown", "the full socket is gone"),
    (S.TIME_WAIT, E.ABORT): stay("orphan", source="tcp_disconnect", why="the full socket is gone"),
    # SYN_RECEIVED after a passive open is only a request there.
    (S.SYN_RECEIVED, E.SYN_AGAIN): stay(
        "send_syn_ack_again", source="tcp_check_req", why="our SYN,ACK was lost"
    ),
    (S.SYN_RECEIVED, E.RST_TO_PASSIVE): go(S.CLOSED, "forget", source="tcp_check_req"),
    (S.SYN_RECEIVED, E.SYN_TO_PASSIVE): go(
        S.CLOSED, "reset_reply", "forget", source="tcp_check_req"
    ),
    (S.SYN_RECEIVED, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    # RST.
    (S.CLOSE_WAIT, E.RST_EXACT): go(S.CLOSED, "report_pipe", "forget", source="tcp_reset"),
    (S.CLOSING, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    (S.LAST_ACK, E.RST_EXACT): go(S.CLOSED, "report_reset", "forget", source="tcp_reset"),
    (S.CLOSE_WAIT, E.RST_AFTER_FIN): go(S.CLOSED, "report_pipe", "forget", source=_reset_check),
    (S.CLOSING, E.RST_AFTER_FIN): go(S.CLOSED, "report_reset", "forget", source=_reset_check),
    (S.LAST_ACK, E.RST_AFTER_FIN): go(S.CLOSED, "report_reset", "forget", source=_reset_check),
    (S.TIME_WAIT, E.RST_IN_WINDOW): ignored(_tw, "only a RST at RCV.NXT counts"),
    # Acknowledgments of what was never sent.
    **{
        (state, E.ACK_OF_UNSENT): stay("challenge_ack", source="tcp_ack; measured on 6.18")
        for state in _BEYOND_SYN
    },
    # Text that nobody will read.
    **{
        (state, E.TEXT_AFTER_CLOSE): go(
            S.CLOSED, "report_reset", "reset_reply", "forget", source=_state_process
        )
        for state in (S.FIN_WAIT_1, S.FIN_WAIT_2, S.CLOSING, S.LAST_ACK)
    },
    (S.CLOSE_WAIT, E.TEXT_AFTER_CLOSE): go(
        S.CLOSED, "report_pipe", "reset_reply", "forget", source=_state_process
    ),
    # Keep-alives that nobody answers; a peer that does not acknowledge gets no RST.
    **{
        (state, E.UNANSWERED): go(
            S.CLOSED, "send_rst", "report_timeout", "forget", source="tcp_keepalive_timer"
        )
        for state in _BEYOND_SYN
    },
    # An orphan in FIN_WAIT_2, and TIME_WAIT, are small sockets.
    (S.FIN_WAIT_2, E.SYN_REOPENS): go(
        S.CLOSED, "reset_reply", "forget", source=_tw, why="an orphan's"
    ),
    (S.FIN_WAIT_2, E.KEEPALIVE): stay(
        "shrink_or_ask", source="tcp_keepalive_timer", why="an orphan's tcp_fin_timeout above 60 s"
    ),
    (S.TIME_WAIT, E.SEGMENT): stay("restart_time_wait", source=_tw),
    (S.TIME_WAIT, E.UNACCEPTABLE): stay("ack_unacceptable", "restart_time_wait", source=_tw),
    (S.TIME_WAIT, E.SYN_UNEXPECTED): stay("ack_unacceptable", source=_tw),
    (S.TIME_WAIT, E.NO_ACK): stay("ack_unacceptable", source=_tw),
}

# --- FreeBSD ----------------------------------------------------------------------------------


def _fast_recycle(
    value: Any, parameters: dict[str, Any], rows: dict[tuple[State, Event], Row]
) -> None:
    if not value:
        parameters["fin_wait_2"] = 600.0  # TP_MAXIDLE: eight keep-alive intervals of 75 s


_insecure_rst = "net.inet.tcp.insecure_rst, tcp(4)"
_FREEBSD_SETTINGS = [
    Setting(
        "msl", 30.0, "tcp(4)", "seconds; TIME_WAIT is twice that", effect=_times(2, "time_wait")
    ),
    Setting(
        "finwait2_timeout",
        60.0,
        "tcp(4)",
        "an orphan's FIN_WAIT_2, in seconds, if fast_finwait2_recycle is 1",
        effect=_to("fin_wait_2"),
    ),
    Setting(
        "fast_finwait2_recycle",
        0,
        "tcp(4); tcp_timer_2msl",
        "0: an orphan's FIN_WAIT_2 is given up after 600 s without a segment",
        effect=_fast_recycle,
    ),
    Setting(
        "keepinit",
        75.0,
        "tcp(4), TCPTV_KEEP_INIT",
        "seconds after which an OPEN that was not answered is given up",
        effect=_to("syn_give_up_after"),
    ),
    Setting(
        "syncache.rexmtlimit",
        3,
        "syncache(4)",
        "of a SYN,ACK",
        False,
        effect=_to("synack_retries"),
    ),
    Setting(
        "retries",
        12,
        "tcp_timer_rexmt, TCP_MAXRXTSHIFT",
        "retransmissions before giving up",
        effect=_to("retries"),
    ),
    Setting(
        "rexmit_min",
        0.23,
        "tcp(4): 30 ms, and a slop of 200 ms",
        "least retransmission timeout",
        effect=_to("rto_min"),
    ),
    Setting(
        "TCPTV_REXMTMAX",
        64.0,
        "tcp_timer.h",
        "greatest retransmission timeout",
        effect=_to("rto_max", "synack_rto_max"),
    ),
    Setting(
        "insecure_rst",
        0,
        "tcp(4)",
        "1: any RST in the window resets (RFC 793)",
        effect=_rows_if(
            True,
            {
                (state, E.RST_IN_WINDOW): go(
                    S.CLOSED, "report_reset", "forget", source=_insecure_rst
                )
                for state in _BEYOND_SYN
            },
        ),
    ),
    Setting(
        "insecure_syn",
        0,
        "tcp(4)",
        "1: a SYN in the window resets (RFC 793)",
        effect=_rows_if(
            True,
            {
                (state, E.SYN_UNEXPECTED): go(
                    S.CLOSED,
                    "report_reset",
                    "reset_reply",
                    "forget",
                    source="net.inet.tcp.insecure_syn, tcp(4)",
                )
                for state in _BEYOND_SYN
            },
        ),
    ),
    Setting(
        "drop_synfin", 0, "tcp(4)", "1: a SYN with a FIN is dropped", effect=_flag("drop_synfin")
    ),
    Setting(
        "nolocaltimewait",
        0,
        "tcp(4), tcp_twstart; since 14 its default is 1",
        "1: no TIME_WAIT between addresses of this host",
    ),
    Setting(
        "ack_war_cnt",
        5,
        "tcp_subr.c; that the default stack asks for it was not verified",
        "challenge ACKs of a connection in ack_war_timewindow",
        False,
        effect=_to("challenge_most"),
    ),
    Setting(
        "ack_war_timewindow",
        1000,
        "tcp_subr.c",
        "milliseconds for ack_war_cnt",
        False,
        effect=_per(1000, "challenge_interval"),
    ),
    Setting(
        "delacktime",
        0.04,
        "TCPTV_DELACK (100 ms in older versions)",
        "an ACK of text waits so long, or for a second segment",
        effect=_to("delayed_ack"),
    ),
    Setting(
        "minmss",
        216,
        "tcp_mss_update",
        "least MSS that a peer's SYN is believed",
        effect=_to("least_mss"),
    ),
    _way("bsd_time_wait", True, "tcp_twcheck", "segments in TIME_WAIT are held against no window"),
    _way("old_fin_acks", True, "tcp_do_segment", "a FIN received before may acknowledge ours"),
    _way("paws_zero", False, "tcp_do_segment", "a TS.Recent of 0 counts as none"),
    _way("paws_silent", True, "tcp_do_segment", "of what is too old only text is answered"),
    _way("syn_text", False, "syncache_add", "text with a SYN is dropped", False),
]
_GIVES_UP_ALOUD: Rows = {
    (state, event): go(S.CLOSED, "send_rst", "report_timeout", "forget", source="tcp_drop")
    for state in _BEYOND_SYN
    for event in (E.GIVE_UP, E.UNANSWERED)
}
_FREEBSD_ROWS: Rows = {
    **_GIVES_UP_ALOUD,
    (S.SYN_RECEIVED, E.SYN_AGAIN): stay(
        "send_syn_ack_again", source="syncache_add", why="our SYN,ACK was lost"
    ),
    (S.SYN_RECEIVED, E.RST_TO_PASSIVE): go(S.CLOSED, "forget", source="syncache_chkrst"),
    (S.SYN_RECEIVED, E.SYN_TO_PASSIVE): stay("challenge_ack", source="syncache_add"),
    (S.TIME_WAIT, E.RST_EXACT): ignored("tcp_twcheck", "RFC 1337 §3"),
    (S.TIME_WAIT, E.RST_IN_WINDOW): ignored("tcp_twcheck", "RFC 1337 §3"),
    (S.TIME_WAIT, E.SYN_UNEXPECTED): ignored("tcp_twcheck", "without an ACK: in silence"),
    (S.TIME_WAIT, E.SYN): go(
        S.CLOSED,
        "reset_reply",
        "forget",
        source="tcp_twcheck, tcp_input (findpcb); not verified",
        why="newer, and nobody listens",
    ),
}

# --- macOS ------------------------------------------------------------------------------------

_xnu = "XNU's tcp_input"
_MACOS_SETTINGS = [
    Setting(
        "msl",
        15.0,
        "XNU's tcp_timer.h, TCPTV_MSL",
        "seconds; TIME_WAIT is twice that",
        effect=_times(2, "time_wait"),
    ),
    Setting(
        "fin_timeout",
        60.0,
        "XNU's tcp_set_finwait_timeout; TCPTV_FINWAIT2",
        "an orphan's FIN_WAIT_2, in seconds",
        effect=_to("fin_wait_2"),
    ),
    Setting(
        "keepinit",
        75.0,
        "XNU's tcp_timer.h, TCPTV_KEEP_INIT",
        "seconds after which an OPEN that was not answered is given up",
        effect=_to("syn_give_up_after"),
    ),
    _way("syn_linear", 4, "XNU's tcp_syn_backoff", "SYN timeouts that do not double"),
    _way("synack_retries", 6, "like text; in truth keepinit ends it", "of a SYN,ACK", False),
    Setting(
        "TCP_MAXRXTSHIFT",
        12,
        "XNU's tcp_timer.h, tcp_timers",
        "retransmissions before giving up",
        effect=_to("retries"),
    ),
    Setting(
        "rexmt_min",
        0.23,
        "XNU's tcp_timer.h, TCPTV_REXMTMIN and TCPTV_REXMTSLOP",
        "least retransmission timeout (30 ms, and a slop of 200 ms)",
        effect=_to("rto_min"),
    ),
    Setting(
        "TCPTV_REXMTMAX",
        64.0,
        "XNU's tcp_timer.h",
        "greatest retransmission timeout",
        effect=_to("rto_max", "synack_rto_max"),
    ),
    Setting(
        "challengeack_limit",
        10,
        f"{_xnu}, tcp_is_ack_ratelimited",
        "challenge ACKs of a connection in a second",
        effect=_to("challenge_most"),
    ),
    _way("challenge_interval", 1.0, "XNU's tcp_is_ack_ratelimited", "seconds for that"),
    Setting("drop_synfin", 1, _xnu, "1: a SYN with a FIN is dropped", effect=_flag("drop_synfin")),
    Setting(
        "delayed_ack",
        0.1,
        "tcp(4) of its ancestor",
        "an ACK of text waits so long, or for a second segment",
        False,
        effect=_to("delayed_ack"),
    ),
    _way("old_fin_acks", True, _xnu, "a FIN received before may acknowledge ours"),
    _way("paws_zero", False, _xnu, "a TS.Recent of 0 counts as none"),
    _way("paws_silent", True, _xnu, "of what is too old only text is answered"),
    _way("time_wait_yields", True, _xnu, "a newer SYN ends TIME_WAIT though nobody listens"),
]
_MACOS_ROWS: Rows = {
    **{cell: evolve(row, source="XNU's tcp_drop") for cell, row in _GIVES_UP_ALOUD.items()},
    (S.SYN_RECEIVED, E.RST_TO_PASSIVE): go(S.CLOSED, "report_refused", "forget", source=_xnu),
    (S.SYN_RECEIVED, E.SYN_TO_PASSIVE): stay("challenge_ack", source=_xnu),
    (S.CLOSE_WAIT, E.RST_AFTER_FIN): go(S.CLOSED, "report_reset", "forget", source=_xnu),
    (S.CLOSING, E.RST_AFTER_FIN): go(S.CLOSED, "forget", source=_xnu),
    (S.LAST_ACK, E.RST_AFTER_FIN): go(S.CLOSED, "forget", source=_xnu),
    (S.TIME_WAIT, E.RST_EXACT): ignored(_xnu, "RFC 1337 §3"),
    (S.TIME_WAIT, E.SYN): go(
        S.CLOSED, "reset_reply", "forget", source=_xnu, why="newer, and nobody listens"
    ),
}

# --- Windows ----------------------------------------------------------------------------------

_WINDOWS_SETTINGS = [
    Setting(
        "TcpTimedWaitDelay",
        120.0,
        "documented for Windows Server 2003, observed on Server 2019; 240 s in Windows 2000",
        "TIME_WAIT, in seconds",
        False,
        effect=_to("time_wait"),
    ),
    Setting(
        "TcpFinWait2Delay",
        120.0,
        "documented for Windows Server 2003 (TcpFinWait2Delay)",
        "an orphan's FIN_WAIT_2, in seconds",
        False,
        effect=_to("fin_wait_2"),
    ),
    Setting(
        "InitialRto",
        1.0,
        "netsh interface tcp show global",
        "first retransmission timeout",
        False,
        effect=_to("rto_initial"),
    ),
    Setting(
        "TcpMaxDataRetransmissions",
        5,
        "documented for Windows Server 2003",
        "retransmissions before giving up",
        False,
        effect=_to("retries"),
    ),
    Setting("MinRto", 0.3, "Get-NetTCPSetting", "least", False, effect=_to("rto_min")),
    Setting(
        "MaxSynRetransmissions",
        4,
        "netsh interface tcp show global",
        "of a SYN",
        False,
        effect=_to("syn_retries"),
    ),
    Setting(
        "DelayedAckTimeout",
        0.04,
        "Get-NetTCPSetting",
        "an ACK of text waits so long, or for a second segment",
        False,
        effect=_to("delayed_ack"),
    ),
    Setting(
        "Timestamps",
        0,
        "netsh interface tcp show global: disabled unless asked for",
        "RFC 7323",
        False,
        effect=_flag("timestamps"),
    ),
]

_STACKS: dict[str, tuple[str, list[Setting], Rows]] = {
    "rfc9293": ("RFC 9293 and the RFCs it points to", _RFC_SETTINGS, {}),
    "linux": (
        "held against a live kernel, 6.18, segment by segment",
        _LINUX_SETTINGS,
        _LINUX_ROWS,
    ),
    "freebsd": (
        "from its documentation and sources; not measured; what is not listed is the RFC's",
        _FREEBSD_SETTINGS,
        _FREEBSD_ROWS,
    ),
    "macos": (
        "from XNU's published sources; not verified on a macOS; what is not listed is the RFC's",
        _MACOS_SETTINGS,
        _MACOS_ROWS,
    ),
    "windows": (
        "documented and reported times over the RFC's rows; not verified",
        _WINDOWS_SETTINGS,
        {},
    ),
}

PROFILES: Final[Mapping[str, Profile]] = MappingProxyType(
    {name: _build(name, *stack) for name, stack in _STACKS.items()}
)


def profile(name: str, **settings: Any) -> Profile:
    """The stack of that name, with settings of your own.

    Settings go by their stack's names (`Profile.settings`), or by those of
    `Parameters`. Raises `ValueError` naming an unknown stack or setting.
    """
    if name not in PROFILES:
        raise ValueError(f"no such profile: {name!r} (there are {', '.join(PROFILES)})")
    return _build(name, *_STACKS[name], **settings) if settings else PROFILES[name]

import pytest

from timewait import State


@pytest.mark.parametrize(
    ("spelling", "state"),
    [
        ("TIME_WAIT", State.TIME_WAIT),
        ("TIME-WAIT", State.TIME_WAIT),
        ("time-wait", State.TIME_WAIT),
        ("TCP_FIN_WAIT2", State.FIN_WAIT_2),
        ("FIN-WAIT-2", State.FIN_WAIT_2),
        ("SYN-RECV", State.SYN_RECEIVED),
        ("ESTAB", State.ESTABLISHED),
        ("UNCONN", State.CLOSED),
    ],
)
def test_every_common_spelling_is_read(spelling: str, state: State) -> None:
    assert State.parse(spelling) is state


def test_a_word_that_is_no_state_is_named() -> None:
    with pytest.raises(ValueError, match="'WAITING'"):
        State.parse("WAITING")

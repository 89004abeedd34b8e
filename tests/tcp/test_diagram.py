"""The documentation's diagrams are the table's, and the commands say what the profiles hold."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from timewait.cli import _timewait
from timewait.tcp.diagram import listing, matrix, mermaid
from timewait.tcp.profiles import PROFILES, profile

DOCS = Path(__file__).parents[2] / "docs"


def test_the_diagram_in_the_documentation_is_the_tables() -> None:
    assert mermaid(profile("rfc9293")) in (DOCS / "model.md").read_text()


@pytest.mark.parametrize("name", ["rfc9293", "linux"])
def test_the_matrix_in_the_documentation_is_the_tables(name: str) -> None:
    assert matrix(profile(name)) in (DOCS / "matrix.md").read_text()


def test_the_sources_in_the_documentation_are_the_tables() -> None:
    assert listing(profile("rfc9293")).strip() in (DOCS / "matrix.md").read_text()


def test_the_diagram_has_figure_5s_ways_through() -> None:
    drawn = mermaid(profile("rfc9293"))
    assert "SYN_SENT --> SYN_RECEIVED: SYN / SYN,ACK" in drawn
    assert "FIN_WAIT_1 --> CLOSING: FIN / ACK" in drawn
    assert "TIME_WAIT --> CLOSED: TIME_WAIT_OVER" in drawn


def run(*arguments: str) -> str:
    outcome = CliRunner().invoke(_timewait, ["profiles", *arguments])
    assert outcome.exception is None, outcome.output
    return outcome.output


def test_profiles_lists_every_stack() -> None:
    assert all(name in run() for name in PROFILES)
    assert [stack["name"] for stack in json.loads(run("--json"))] == list(PROFILES)


def test_profiles_shows_a_stacks_settings_with_their_sources() -> None:
    shown = run("linux")
    assert "tcp_fin_timeout" in shown
    assert "tcp_timewait_state_process" in shown
    assert "not verified" not in shown
    assert "not verified" in run("windows")


def test_profiles_shows_what_two_differ_in() -> None:
    both = json.loads(run("freebsd", "linux", "--json"))
    assert both["profiles"] == ["freebsd", "linux"]
    assert both["parameters"]["small_sockets"] == [False, True]
    cells = {(row["state"], row["event"]) for row in both["rows"]}
    assert ("TIME_WAIT", "RST_EXACT") in cells
    assert run("linux", "linux") == "linux and linux do not differ\n"


def test_an_unknown_profile_is_named() -> None:
    outcome = CliRunner().invoke(_timewait, ["profiles", "plan9"])
    assert outcome.exit_code == 1
    assert "no such profile: 'plan9'" in outcome.output


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="linux has no setting 'tcp_tw_recycle'"):
        profile("linux", tcp_tw_recycle=1)


def test_settings_under_their_own_names_change_what_follows_from_them() -> None:
    assert profile("linux", tcp_fin_timeout=5.0).parameters.fin_wait_2 == 5.0
    # Measured: 4.5 s with 62, 20.6 s with 70, 62.4 s with 90 (tcp_fin_time, tcp_keepalive_timer).
    assert profile("linux", tcp_fin_timeout=70.0).parameters.fin_wait_2 == 20.0
    # FreeBSD's tcp_do_segment: finwait2_timeout counts only where recycling is fast.
    assert profile("freebsd").parameters.fin_wait_2 == 600.0
    assert profile("freebsd", fast_finwait2_recycle=1).parameters.fin_wait_2 == 60.0
    assert profile("freebsd", msl=10.0).parameters.time_wait == 20.0
    assert profile("linux", tcp_retries2=3).parameters.give_up_after == pytest.approx(3.0)
    assert profile("linux", tcp_tw_reuse=1)["tcp_tw_reuse"] == 1
    assert profile("linux", tcp_rmem_max=6 << 20).parameters.window_scale == 7


def test_nothing_unverified_passes_for_verified() -> None:
    """No macOS and no Windows was at hand: whatever is shown of them says so."""
    for name in ("macos", "windows"):
        assert "not verified" in profile(name).basis
    # XNU's sources are published.
    macos = profile("macos")
    assert all(s.verified is ("XNU" in s.source) for s in macos.settings.values())
    assert all("XNU" in row.source for row in macos.differences.values())
    assert not any(setting.verified for setting in profile("windows").settings.values())
    assert "not measured" in profile("freebsd").basis
    shown = CliRunner().invoke(_timewait, ["profiles", "windows"]).output
    shown = " ".join(shown.split())
    assert shown.count("not verified") > len(profile("windows").settings)

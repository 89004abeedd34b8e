"""Real servers close as docs/servers.md says, each started as its own process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from timewait.kernel.namespace import why_not

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "servers.md"
ROW = re.compile(
    r"^\| `python -m examples\.servers (?P<server>\S+) --case (?P<case>\S+)` "
    r"\| (?P<first>client|server|nobody)(?: (?P<how>FIN|RST))?[^|]* "
    r"\| (?P<answer>[^|]+) \| [^|]+ \| (?P<left>[^|]+) \| (?P<resets>[^|]+) "
    r"\| \*\*(?P<restart>[^*]+)\*\*: (?P<why>[^|]+) \|$",
    re.MULTILINE,
)
DOCUMENTED = {
    (row["server"], row["case"]): row.groupdict() for row in ROW.finditer(PAGE.read_text())
}
SERVERS = sorted({server for server, _ in DOCUMENTED})
FAST = "sigkill-idle"
RACY = "sigkill-upload"  # whether bytes are unread at that instant varies

if reason := why_not():
    pytest.skip(f"no private network namespace: {reason}", allow_module_level=True)


def measured(server: str, case: str) -> dict[str, Any]:
    """The case, run now, in the words of the page."""
    done = subprocess.run(
        [sys.executable, "-m", "examples.servers", server, "--case", case, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode == 2 and " needs " in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)
    documented = DOCUMENTED[server, case]
    # On a busy machine they have ended by the time at which the new server asks for the port,
    # or a worker of HAProxy's, which notices its master's death within milliseconds, has not.
    late = "outlived" in documented["why"] and "slow to start" in outcome["why"]
    if late or (server == "haproxy" and outcome["why"].startswith("workers of the old server")):
        outcome |= {key: documented[key] for key in ("restart", "why")}
    return {
        "server": server,
        "case": case,
        "first": outcome["closed_first"],
        "how": outcome["how"] or None,
        "answer": outcome["answer"] or "-",
        "left": ", ".join(outcome["left"]) or "nothing",
        "resets": " and ".join(f"by the {who}" for who in outcome["resets"]) or "none",
        "restart": outcome["restart"],
        "why": outcome["why"],
    }


def test_the_page_has_every_server_and_case() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "examples.servers"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    servers = re.findall(r"^(\S+) +(?:ready|missing)", listed.stdout, re.MULTILINE)
    cases = re.findall(r"--case (\S+)", listed.stdout)
    assert len(servers) == 10
    assert set(DOCUMENTED) == {(server, case) for server in servers for case in cases}


@pytest.fixture
def as_documented(undisturbed: Callable[..., None]) -> Callable[[str, str], None]:
    """Runs a case and holds it against the page: servers too have only so long for each step."""

    def run(server: str, case: str) -> None:
        def same() -> None:
            assert measured(server, case) == DOCUMENTED[server, case]

        undisturbed(same, times=4)

    return run


@pytest.mark.parametrize("server", SERVERS)
def test_killed_with_an_idle_client(server: str, as_documented: Callable[[str, str], None]) -> None:
    as_documented(server, FAST)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("server", SERVERS)
def test_every_other_case(server: str, as_documented: Callable[[str, str], None]) -> None:
    cases = [case for name, case in DOCUMENTED if name == server and case not in (FAST, RACY)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda case: as_documented(server, case), cases))


@pytest.mark.parametrize("server", ["socketserver"])
def test_killed_in_an_upload_it_resets_or_closes(
    server: str, undisturbed: Callable[..., None]
) -> None:
    def killed() -> None:
        outcome = measured(server, RACY)
        assert (outcome["how"], outcome["left"], outcome["restart"]) in (
            ("RST", "nothing", "binds"),
            ("FIN", "nothing", "binds"),  # what comes after the FIN is reset, and so the orphan
            ("FIN", "TIME_WAIT (server)", "refused"),
        )

    undisturbed(killed, times=4)


def test_an_unknown_server_or_case_is_one_word_of_trouble() -> None:
    for arguments in (["iis"], ["nginx", "--case", "earthquake"]):
        done = subprocess.run(
            [sys.executable, "-m", "examples.servers", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "invalid choice" in done.stderr

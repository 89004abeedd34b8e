"""The README keeps its word: its commands and its code are run as they stand there."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
from_source = pytest.mark.skipif(
    not (ROOT / "timewait").is_dir(), reason="the source is out of the way"
)


def command(title: str) -> str:
    found = re.search(rf"^<!-- {title} -->\n```sh\n(.+)\n```$", README, re.MULTILINE)
    assert found
    return found[1]


def test_the_example_does_what_it_says() -> None:
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example
    proof = (
        "import errno\n"
        "assert run.time_wait.holder == 'server' and run.restart.error == errno.EADDRINUSE\n"
        "assert run.scenario.port == 9090 and 55 < run.restart.free_after <= 60.1\n"
    )
    alone = "from timewait.kernel.namespace import isolate; isolate()\n"  # 9090 is its own there
    done = subprocess.run(
        [sys.executable, "-c", alone + example[1] + proof], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tcp  0  0 127.0.0.1:9090   0.0.0.0:*        LISTEN" in done.stdout


@from_source
@pytest.mark.slow
def test_one_command_shows_the_main_job(tmp_path: Path) -> None:
    """In a copy of the source and a new environment; needs the network for pip."""
    ignore = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs", "benchmarks")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=ignore)
    done = subprocess.run(
        ["bash", "-c", command("the main job")],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "kernel: conforms" in done.stdout
    assert "model: conforms" in done.stdout
    assert "EADDRINUSE from bind()" in done.stdout


def test_one_command_runs_the_tests() -> None:
    """Which are these: what it installs and starts is looked at, not done again."""
    words = command("the tests")
    assert "--group test" in words
    assert words.endswith("-m pytest -n auto")


@from_source
def test_continuous_integration_runs_the_readmes_own_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "$(readme 'the main job')" in script
    assert "$(readme 'the tests')" in script


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name = re.match(r"[\w-]+", requirement)
        assert name
        assert f"| {name[0]} |" in README


@from_source
@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
)
def test_every_link_leads_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
        assert (path.parent / target).exists(), target


@from_source
def test_no_page_shows_a_command_that_could_not_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    shown = "<!-- $~ timewait explain nonsense -->\n```text\nas it was\n```\n"
    page.write_text(shown)
    regenerate = [sys.executable, ROOT / "docs" / "regenerate.py", page]
    done = subprocess.run(regenerate, capture_output=True, text=True)
    assert done.returncode == 1
    assert "timewait explain nonsense: exit status 2" in done.stderr
    assert page.read_text() == shown

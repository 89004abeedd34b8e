import os
import subprocess
import sys

import pytest

from timewait import __version__ as version


def timewait(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *args], capture_output=True, text=True, timeout=150
    )


def test_help_is_the_answer_to_no_arguments() -> None:
    done = timewait()
    assert done.returncode == 0
    assert "TIME_WAIT" in done.stdout


def test_unknown_command_is_one_line_and_status_2() -> None:
    done = timewait("nonsense")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nonsense" in done.stderr


def test_version_is_the_package_s() -> None:
    assert timewait("--version").stdout == f"timewait {version}\n"


def shell(script: str) -> subprocess.CompletedProcess[str]:
    script = script.replace("timewait", f"{sys.executable} -m timewait")
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=150)


@pytest.mark.parametrize("command", ["scenarios", "--help", "", "profiles linux"])
def test_a_reader_that_goes_away_is_no_answer(command: str) -> None:
    done = shell(f"timewait {command} | true; exit ${{PIPESTATUS[0]}}")
    assert done.returncode in (0, 141)  # 0 where the pipe took all before it closed
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["scenarios", "run server-first --on model"])
def test_a_reader_that_has_gone_is_told_by_the_status(command: str) -> None:
    gone, theirs = os.pipe()
    os.close(gone)
    words = [sys.executable, "-m", "timewait", *command.split()]
    with open(theirs, "w") as output:
        done = subprocess.run(words, stdout=output, stderr=subprocess.PIPE, text=True, timeout=150)
    assert done.returncode == 141
    assert done.stderr == ""


def test_a_full_disk_is_one_line_and_status_2() -> None:
    done = shell("timewait scenarios > /dev/full")
    assert done.returncode == 2
    assert done.stderr == "timewait: No space left on device\n"


def test_a_closed_output_changes_no_answer() -> None:
    assert shell("timewait scenarios >&-").returncode == 0
    assert shell("timewait nonsense >&- 2>&-").returncode == 2


def test_an_output_without_our_letters_still_gets_an_answer() -> None:
    done = shell("PYTHONIOENCODING=ascii timewait profiles linux freebsd")
    assert done.returncode == 0
    assert done.stderr == ""

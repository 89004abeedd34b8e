import subprocess
import sys

from timewait import __version__ as version


def timewait(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "timewait", *args], capture_output=True, text=True, timeout=60
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

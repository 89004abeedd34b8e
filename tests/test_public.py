"""The public surface is what `timewait.__all__` says: importable, typed, documented, and cheap."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import timewait

ROOT = Path(__file__).resolve().parent.parent
NAMES = [name for name in timewait.__all__ if name != "__version__"]


def test_the_names_are_sorted_and_unique() -> None:
    assert timewait.__all__ == ["__version__", *sorted(set(NAMES))]
    assert dir(timewait) == sorted(timewait.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_public_at_home_too(name: str) -> None:
    value = getattr(timewait, name)
    home = sys.modules[value.__module__]
    assert name in home.__all__
    assert getattr(home, name) is value


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_documented(name: str) -> None:
    value = getattr(timewait, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    if inspect.isclass(value) and not issubclass(value, BaseException):
        for member, function in inspect.getmembers(value, inspect.isfunction):
            if not member.startswith("_") and function.__module__.startswith("timewait"):
                assert inspect.getdoc(function), f"{name}.{member} has no docstring"


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_typed(name: str) -> None:
    value = getattr(timewait, name)
    functions = [(name, value)] if inspect.isfunction(value) else []
    if inspect.isclass(value):
        functions = [
            (f"{name}.{member}", function)
            for member, function in inspect.getmembers(value, inspect.isfunction)
            if not member.startswith("__") and function.__module__.startswith("timewait")
        ]
    for what, function in functions:
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty, what
        for parameter in list(signature.parameters.values()):
            if parameter.name not in ("self", "cls"):
                assert parameter.annotation is not inspect.Parameter.empty, f"{what}: {parameter}"


def test_the_package_is_marked_as_typed() -> None:
    assert (Path(timewait.__file__).parent / "py.typed").exists()


def test_the_page_lists_every_name() -> None:
    page = (ROOT / "docs" / "stability.md").read_text()
    listed = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    listed.remove("from timewait import ...")
    assert listed == timewait.__all__, "run python docs/regenerate.py docs/stability.md"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'timewait' has no attribute 'nothing'"):
        timewait.nothing  # noqa: B018


def test_importing_the_package_imports_none_of_its_modules() -> None:
    code = "import sys, timewait; print(*[n for n in sys.modules if n.startswith('timewait')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["timewait"]


def modules() -> list[Path]:
    return sorted(Path(timewait.__file__).parent.glob("**/*.py"))


@pytest.mark.parametrize(
    ("room", "above"), [("tcp", "sim kernel check"), ("sim", "kernel check"), ("check", "kernel")]
)
def test_a_room_stands_without_those_it_does_not_build_on(room: str, above: str) -> None:
    """The check reads events on systems where no observer of Linux's can be imported."""
    code = f"import pkgutil, sys, importlib, timewait.{room} as room\n"
    code += "for m in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
    code += "    importlib.import_module(m.name)\nprint(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    rooms = {name.split(".")[1] for name in loaded if name.startswith("timewait.")}
    assert room in rooms
    assert not rooms & set(above.split())


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_every_module_says_why_it_exists(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_events_name_their_schema() -> None:
    from timewait import events

    assert isinstance(events, ModuleType)
    head = events.RunStarted(0.0, "kernel", "sock_diag")
    assert head.schema == events.SCHEMA


def test_the_check_is_reached_from_the_top() -> None:
    from timewait import Checker, Verdict, check_events
    from timewait.check import check

    assert check_events is check
    verdict = check_events([])
    assert isinstance(verdict, Verdict)
    assert isinstance(Checker().verdict(), Verdict)

"""The `timewait` command: what there is, grouped by what people come for.

A command's code lives in `timewait/commands/NAME.py` as `command`, a click
command, and is imported only when it is called. Trouble is one line on
stderr and exit status 2; 0 and 1 are a command's own yes and no.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from io import TextIOWrapper
from typing import Any, Final, NoReturn

import click

from timewait import __version__

__all__ = ["SECTIONS", "Command", "answer", "main"]

# Section -> command -> its line in the help (kept here so that help imports nothing).
SECTIONS: Final[dict[str, dict[str, str]]] = {
    "Run and see": {
        "run": "Do a scenario on the kernel, on the model or both, and compare",
        "scenarios": "List the built-in scenarios",
    },
    "Ask about a port": {
        "explain": "Say why a port cannot be bound, who holds it, and until when",
        "watch": "Show a port's sockets live, with countdowns and every transition",
        "wait": "Return as soon as a port can be bound",
    },
    "Check": {
        "check": "Say whether TCP allows what an event file or a packet capture shows",
        "mutate": "Change one thing in a true trace, many times: does the check notice?",
        "profiles": "Show what each stack does otherwise than the RFC, and where that is written",
    },
    "Laboratory": {
        "exec": "Run any program in a private network, see all of its TCP, and judge it",
        "explore": "Walk every state of two endpoints on a bad network, and check what must hold",
        "fuzz": "Play random programs and segments to kernel and model, and compare",
        "matrix": "Ask kernel and model who may take a held port, in every combination",
        "packetdrill": "Run packetdrill scripts on the model or the kernel",
    },
}


class _ReaderGone(Exception):
    """Whoever read our output (head, less) went away; click would call that status 1, a no."""


class Command(click.Command):
    """A command whose reader may go away without click's calling that a no."""

    def make_context(self, *args: Any, **named: Any) -> click.Context:  # noqa: D102
        try:
            return super().make_context(*args, **named)
        except BrokenPipeError:
            raise _ReaderGone from None

    def invoke(self, ctx: click.Context) -> Any:  # noqa: D102
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _ReaderGone from None


class _Commands(Command, click.Group):
    """Commands by section, each loaded from its own file when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.list_commands(ctx):
            return None
        command = import_module(f"timewait.commands.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in SECTIONS.items():
            if section:
                with formatter.section(title):
                    formatter.write_dl(list(section.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="TCP socket lifecycles: who closed first, who is left in TIME_WAIT, when the port is "
    "free, and whether what happened is what TCP allows.",
)
@click.version_option(__version__, message="timewait %(version)s")
def _timewait() -> None:
    pass


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit, as `answer` does."""
    answer(lambda: _timewait, "timewait", args)


def answer(load: Callable[[], click.Command], name: str, args: list[str] | None = None) -> NoReturn:
    """Load a command, run it and exit.

    Status: 0 yes, 1 no, 2 trouble, 130 interrupted, 141 nobody reads on.
    A command returns its exit status, raises `SystemExit`, or raises
    `click.ClickException`, whose message becomes the one line of trouble.
    """
    _settle_streams()
    try:
        try:
            status = load().main(args, prog_name=name, standalone_mode=False)
        except click.exceptions.NoArgsIsHelpError as help_page:
            click.echo(help_page.format_message())
            status = 0
        sys.stdout.flush()
    except click.ClickException as trouble:
        status = _trouble(name, trouble.format_message())
    except (click.Abort, KeyboardInterrupt):
        status = _trouble(name, "interrupted", 130)
    except (_ReaderGone, BrokenPipeError):
        status = 141
    except OSError as trouble:
        where = f"{trouble.filename}: " if trouble.filename else ""
        status = _trouble(name, f"{where}{trouble.strerror or trouble}")
    try:
        sys.stdout.flush()
    except OSError:  # said already; what is left must not be flushed again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(status if isinstance(status, int) else 0)


def _settle_streams() -> None:
    """Let no closed or narrow-minded stream turn an answer into a traceback."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _trouble(name: str, message: str, status: int = 2) -> int:
    print(f"{name}: {' '.join(message.split())}", file=sys.stderr)
    return status

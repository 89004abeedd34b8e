"""Rerun every command whose output the documentation shows, and put the new output in its place.

    python docs/regenerate.py            rewrite docs/*.md and README.md
    python docs/regenerate.py --check    exit 1 if a page is stale, naming it
    python docs/regenerate.py FILE...    only these pages
    python docs/regenerate.py --campaign WORDS FILE...    there only the campaigns with WORDS in
                                                          their command

A block is an HTML comment with a command, and the fenced block after it:

    <!-- $ COMMAND -->    the same on every run: `--check` reruns it and compares
    <!-- $~ COMMAND -->   varies (ports, times): rerun here, only required to exist by `--check`
    <!-- $$ COMMAND -->   a campaign too long to rerun: touched by `--campaign` only, dated

`timewait` and `python` in a command mean this interpreter's. A command is run
by the shell in the repository's root; no page is written with one that ends
with exit status 2. A fenced block marked `mermaid` or `json` keeps its mark; a
block marked `markdown` is written without a fence, between the comment and a
closing `<!-- $ -->`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(
    r"(?P<head><!-- \$(?P<kind>[~$]?) (?P<command>[^\n]+?) -->\n+```(?P<mark>\w*)\n)"
    r"(?P<body>.*?)(?P<tail>^```$)",
    re.DOTALL | re.MULTILINE,
)
BARE = re.compile(
    r"(?P<head><!-- \$(?P<kind>[~$]?) (?P<command>[^\n]+?) -->\n\n)(?!```)"
    r"(?P<body>.*?)(?P<tail>\n<!-- \$ -->)",
    re.DOTALL,
)


def output_of(command: str) -> str:
    """What the command prints, on both streams, in a plain 80-column terminal."""
    shell = (
        f'timewait() {{ "{sys.executable}" -m timewait "$@"; }}; '
        f'python() {{ "{sys.executable}" "$@"; }}; '
    )
    plain = {"NO_COLOR": "1", "COLUMNS": "80", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", shell + command],
        cwd=ROOT,
        env={**os.environ, **plain},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=600,
    )
    if done.returncode == 2:
        raise SystemExit(f"{command}: exit status 2\n{done.stdout}")
    return "".join(line.rstrip() + "\n" for line in done.stdout.splitlines())


def fresh(text: str, *, check: bool, campaign: str | None = None) -> str:
    """The page with each block's output as it is now."""

    def block(match: re.Match[str]) -> str:
        kind = match["kind"]
        if campaign is not None:
            if kind != "$" or campaign not in match["command"]:
                return match[0]
        elif kind == "$" or (kind == "~" and check and match["body"].strip()):
            return match[0]
        print(f"  $ {match['command']}", file=sys.stderr, flush=True)
        return match["head"] + output_of(match["command"]) + match["tail"]

    return BARE.sub(block, FENCED.sub(block, text))


def main(arguments: list[str]) -> int:
    """Rewrite or check the pages; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--campaign", metavar="WORDS")
    parser.add_argument("pages", nargs="*", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    check: bool = options.check
    named = [page.resolve() for page in options.pages]
    stale = []
    for page in named or sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]):
        before = page.read_text()
        after = fresh(before, check=check, campaign=options.campaign)
        if after != before:
            stale.append(page.relative_to(ROOT))
            if not check:
                page.write_text(after)
    for page in stale:
        print(f"{'stale' if check else 'rewritten'}: {page}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

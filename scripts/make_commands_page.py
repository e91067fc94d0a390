"""Make docs/commands.md: every command with its flags, but for those of settings, which docs/settings.md has.

    python scripts/make_commands_page.py

Everything comes from the parsers; a test holds the page against them.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

from stepgraph.bench import _BENCHMARKS
from stepgraph.cli import _parser
from stepgraph.command_parser import CommandParser
from stepgraph.config.server import SERVE_PARTS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
HEAD = """\
<!-- Made by scripts/make_commands_page.py from the parsers in stepgraph/cli.py and stepgraph/bench: change them, then run it. -->

# Commands

Commands that run a model take every [setting](settings.md) as a flag, and the flags of [other engines](coming-from.md); their own
flags are below. `--help` behind a command lists both. All but the benchmarks know `-v`, which logs what happens to stderr, and
`-vv` more of it. What is refused ends a command with exit code 2 and one sentence on stderr.
"""


def page() -> str:
    """The whole page."""
    bench = CommandParser(prog="stepgraph bench")
    benchmarks = bench.add_subparsers()
    for name in _BENCHMARKS:
        importlib.import_module(f"stepgraph.bench.{name}").add_parser(benchmarks)
    commands = [*_commands(_parser()), *_commands(bench)]
    return "\n".join([HEAD, *(_section(parser) for parser in commands if parser.prog != "stepgraph bench")])


def _commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands of a tree."""
    of_commands = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for inner in (parser for action in of_commands for parser in action.choices.values()):
        yield from _commands(inner)
    if not of_commands:
        yield parser


def _section(parser: argparse.ArgumentParser) -> str:
    takes_settings = "--config" in parser._option_string_actions
    groups = [group for group in parser._action_groups if not (takes_settings and group.title in SERVE_PARTS)]
    rows = [_row(action) for group in groups for action in group._group_actions if _is_of_this_command(action)]
    lines = [f"## `{parser.prog}`", "", _cell(parser.description or "")]
    if takes_settings:
        server = "--port" in parser._option_string_actions
        lines += ["", f"Takes MODEL and [settings](settings.md){', those of the server too' if server else ''}."]
    if rows:
        lines += ["", "| Flag | Meaning |", "| --- | --- |", *rows]
    return "\n".join(lines) + "\n"


def _is_of_this_command(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS and action.dest not in ("help", "verbose", "config")


def _row(action: argparse.Action) -> str:
    named = [action.metavar] if isinstance(action.metavar, str) else action.metavar or ["|".join(action.choices or ())]
    values = "" if action.nargs == 0 else " ".join(named) + (" ..." if action.nargs in ("+", "*") else "")
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    shown = " ".join(part for part in (flags, values and f"`{values}`") if part)
    return f"| {_cell(shown)} | {_cell((action.help or '') % {**vars(action), 'prog': ''})} |"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")

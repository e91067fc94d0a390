"""Parsing command lines: what a command does not know is refused in that command's name, with the flag that may be meant."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser for a tree of commands, all of this class.

    argparse leaves what a command does not know to the root, which reports it with its own usage and has none of its flags.
    """

    text_flag: str | None = None
    """The flag by which a text is given that may be written in its place without quotes."""

    prepare: Callable[[CommandParser, Sequence[str]], Sequence[str]] | None = None
    """Gets a command's parser and its arguments, and returns those to parse."""

    further_flags: Sequence[str] = ()
    """Those that `prepare` adds where they are given; one may be meant that is hardly another."""

    def error(self, message: str) -> NoReturn:
        """End the process with exit code 2 and one line on stderr, as everything that is refused does."""
        self.exit(2, f"error: {self.prog}: {message}. See {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override]  # one signature for argparse's overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """As argparse's, but arguments that are not known end the process with exit code 2 and one line on stderr."""
        if self.prepare is not None:
            args = self.prepare(self, sys.argv[1:] if args is None else args)
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [argument.partition("=")[0] for argument in unknown if argument.startswith("--")]
            close = [
                match
                for flag in flags
                for match in difflib.get_close_matches(flag, self.further_flags, n=1, cutoff=0.9)
                or difflib.get_close_matches(flag, self._option_string_actions, n=1)
            ]
            if self.text_flag and not any(argument.startswith("-") for argument in unknown):
                close = [f"{self.text_flag} 'TEXT'"]
            hint = f"; did you mean {', '.join(close)}?" if close else "."
            self.exit(2, f"error: {self.prog} does not know {' '.join(unknown)}{hint} See {self.prog} --help\n")
        return parsed, unknown

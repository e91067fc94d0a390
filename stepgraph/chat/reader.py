"""Messages as they are typed: line editing, history, completion, and texts of several lines."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import NamedTuple

from stepgraph.chat.history import History

PROMPT, CONTINUED = "> ", "... "
_QUOTES = '"""'


class Typed(NamedTuple):
    """What the user entered."""

    text: str
    is_quoted: bool
    """It stood between triple quotes, and is a message whatever it begins with."""


class Reader:
    """Asks on a terminal. With GNU readline a text that is pasted arrives whole, whatever line breaks it holds.

    Args:
        history: what the arrow keys find, and where entries are added.
        commands: what Tab completes at the beginning, each with its slash.
        of_files: those of them that take a file's name, which Tab completes too.
    """

    def __init__(self, history: History, commands: Sequence[str], of_files: Sequence[str]):
        self._history = history
        self._commands, self._of_files = commands, of_files
        self._readline = _readline()
        if self._readline is not None:
            self._set_up(self._readline)

    def read(self) -> Typed:
        """The next message, or "".

        Ctrl-C where something is typed drops that and asks again, as in a shell.

        Raises:
            EOFError: Ctrl-D, or the terminal is gone.
            KeyboardInterrupt: Ctrl-C where nothing is typed.
        """
        while True:
            try:
                first = self._ask(PROMPT)
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if self._readline is None or not self._readline.get_line_buffer().strip():
                    raise
                continue
            try:
                typed = self._whole(first)
            except (KeyboardInterrupt, EOFError):
                print(file=sys.stderr)
                continue
            if typed.text:
                self._remember(f"{_QUOTES}{typed.text}{_QUOTES}" if typed.is_quoted else typed.text)
            return typed

    def _whole(self, first: str) -> Typed:
        """What begins with a line, with the lines that belong to it."""
        text = first.strip()
        if text.startswith(_QUOTES) and text.endswith(_QUOTES) and len(text) >= 2 * len(_QUOTES):
            return Typed(text[len(_QUOTES) : -len(_QUOTES)].strip("\n"), is_quoted=True)
        if "\n" in text:  # pasted, or from the history
            return Typed(text, is_quoted=False)
        if text.startswith(_QUOTES):
            lines = [text.removeprefix(_QUOTES)]
            while not (line := self._ask(CONTINUED)).rstrip().endswith(_QUOTES):
                lines.append(line)
            lines.append(line.rstrip().removesuffix(_QUOTES))
            return Typed("\n".join(lines).strip("\n"), is_quoted=True)
        lines = [first]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._ask(CONTINUED))
        return Typed("\n".join(lines).strip(), is_quoted=False)

    def _ask(self, prompt: str) -> str:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for the answers
        return input()

    def _remember(self, entry: str) -> None:
        self._history.add(entry)
        if self._readline is not None:
            _offer(self._readline, entry)

    def _set_up(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)  # an entry may be of several lines
        for entry in self._history.entries:
            _offer(readline, entry)
        readline.set_completer(self._completion)
        readline.set_completer_delims(" ")
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")

    def _completion(self, text: str, state: int) -> str | None:
        """The completion of that number of the word that is being typed, as readline asks for it."""
        assert self._readline is not None
        before = self._readline.get_line_buffer()[: self._readline.get_begidx()]
        if not before:
            found = [f"{command} " for command in self._commands if text and command.startswith(text)]
        elif before.rstrip() in self._of_files:
            names = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
            found = [f"{name}/" if os.path.isdir(name) else name for name in names]
        else:
            found = []
        return found[state] if state < len(found) else None


def _offer(readline: ModuleType, entry: str) -> None:
    """Have the arrow keys find an entry, if the terminal can show it."""
    with suppress(UnicodeEncodeError):  # the locale lacks a character, as "C" lacks most; other sessions may have it
        readline.add_history(entry)


def _readline() -> ModuleType | None:
    """Python's module for line editing; None where it is not built, as on Windows, or standard input is read without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline if sys.stdin.isatty() and sys.stdout.isatty() else None

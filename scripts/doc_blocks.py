"""The fenced blocks of the project's pages, and the commands in them: what scripts/tour.py runs and tests/test_docs.py checks.

- ```` ```console ```` holds commands, each after `$ `, with what they print below them where that is always the same.
- ```` ```python ```` is run as it stands; `print(...)  # TEXT` says what it prints.
- ```` ```yaml ````, ```` ```json ```` are files of settings, and bodies of requests.
- a fence without a word holds output or a picture.

`<!-- not run: REASON -->` on the line before a block says why the tour leaves it out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
LANGUAGES = ("console", "python", "yaml", "json", "")
FENCED = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Command:
    """A line of a console, continued lines joined."""

    text: str
    output: str
    """What the page shows below it; "" if nothing."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    """Why the tour leaves it out, if the page says so."""

    def __str__(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page
        return f"{page}:{self.line}"

    @property
    def commands(self) -> list[Command]:
        """Of a console."""
        assert self.language == "console", self
        lines = self.text.replace("\\\n", " ").splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[:1] == [0], f"{self} does not begin with a command: $ ..."
        ends = [*starts[1:], len(lines)]
        return [
            Command(lines[start].removeprefix("$ "), "\n".join(lines[start + 1 : end]))
            for start, end in zip(starts, ends, strict=True)
        ]


def pages() -> list[Path]:
    """Those that users read, in the order of a tour."""
    first = [ROOT / "README.md", ROOT / "docs" / "chat.md", ROOT / "docs" / "serving.md", ROOT / "docs" / "settings.md"]
    others = [
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "benchmarks").glob("*.md")),
        ROOT / "CONTRIBUTING.md",
    ]
    return list(dict.fromkeys([*first, *others]))


def blocks(page: Path) -> list[Block]:
    """Those of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start("text")].count("\n"), found["language"], found["text"], found["reason"])
        for found in FENCED.finditer(text)
    ]


def without_blocks(page: Path) -> str:
    """The page's prose."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def words(command: str) -> list[str]:
    """Of a shell command, its comment left out.

    Raises:
        ValueError: a quotation does not end.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    return list(lexer)


def simple_commands(command: str) -> Iterator[Sequence[str]]:
    """The commands that a pipe or a list joins, each as its words."""
    found: list[str] = []
    for word in words(command):
        if set(word) <= set("|&;"):
            yield found
            found = []
        else:
            found.append(word)
    yield found

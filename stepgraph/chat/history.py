"""What was typed in earlier sessions, kept in a file of the user's."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from stepgraph.trusted_folder import make_private

MAX_ENTRIES = 1000
MAX_FILE_BYTES = 1 << 20
MAX_ENTRY_BYTES = 1 << 14
"""Longer ones, as a rule pasted files, are known to their session only."""


def history_file() -> Path | None:
    """Where the history is kept by the XDG's rules for state; None without a home directory."""
    given = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(given):  # the rules say to leave out others
        try:
            given = str(Path.home() / ".local" / "state")
        except RuntimeError:
            return None
    return Path(given) / "stepgraph" / "chat_history"


class History:
    """The last entries of all sessions, oldest first. Sessions that run at the same time add to one file.

    A file that cannot be read or written costs the history and nothing else; lines in it that are none of ours are left out.

    Args:
        path: of the file, a line of JSON per entry, which only its user can read; None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.entries: list[str] = []
        self.trouble: str | None = None
        """Why the file is not used, if so, for people."""
        try:
            self._load()
        except OSError as error:
            self._give_up(error)

    def add(self, entry: str) -> None:
        """Add what was typed, unless it is what was typed before."""
        if self.entries[-1:] == [entry]:
            return
        self.entries.append(entry)
        line = _line(entry)
        if self._path is None or len(line) > MAX_ENTRY_BYTES:
            return
        try:
            make_private(self._path.parent)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "ab", buffering=0) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(line)
        except OSError as error:
            self._give_up(error)

    def _load(self) -> None:
        if self._path is None or not self._path.exists():
            return
        if not self._path.is_file():
            raise OSError(None, "it is no file")  # reading a device or a pipe might never end
        with self._path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - MAX_FILE_BYTES))
            lines = file.read(MAX_FILE_BYTES).splitlines(keepends=True)
        found = [_entry(line) for line in lines]
        self.entries = [entry for entry in found if entry is not None][-MAX_ENTRIES:]
        if size > MAX_FILE_BYTES or len(lines) > 2 * MAX_ENTRIES or None in found:
            self._rewrite(self._path)

    def _rewrite(self, path: Path) -> None:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # of mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(map(_line, self.entries))
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise

    def _give_up(self, error: OSError) -> None:
        self.trouble = f"{self._path}: {error.strerror}"
        self._path = None


def _line(entry: str) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _entry(line: bytes) -> str | None:
    """What `_line` made a line of; None for any other, as one that was cut off."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, str) else None

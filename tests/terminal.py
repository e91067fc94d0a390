"""A command in a terminal of its own, typed at as a user does."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

TIMEOUT_S = 120
_BECOME_FOREGROUND = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
)
"""Without a controlling terminal, keys send no signals."""
_SILENT = re.compile(r"\r|\x1b\[\?\d+[hl]")
"""What readline tells the terminal and nobody sees."""
CTRL_C, CTRL_D, UP, TAB, ENTER = "\x03", "\x04", "\x1b[A", "\t", "\r"


def pasted(text: str) -> str:
    """What a terminal sends for a paste to a program that asked to have it marked."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """`python -m stepgraph` with these arguments; `screen` is all that it has shown by now."""

    def __init__(self, arguments: Sequence[str], **environment: str):
        ours, theirs = pty.openpty()
        self._ours = ours
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BECOME_FOREGROUND, sys.executable, "-m", "stepgraph", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env=os.environ | {"TERM": "xterm", "INPUTRC": "/dev/null"} | environment,
        )
        os.close(theirs)
        self._raw = b""
        self.screen = ""
        self._seen = 0

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def wait_for(self, pattern: str, seconds: float = TIMEOUT_S) -> None:
        """Read until this comes behind what was waited for before; fails if it does not."""
        deadline = time.monotonic() + seconds
        while not (found := re.compile(pattern).search(self.screen, self._seen)):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} does not come after {self.screen[self._seen :]!r}")
        self._seen = found.end()

    def interrupt(self, pattern: str) -> None:
        """Ctrl-C, and again if nothing comes of it: CPython's readline misses one that arrives just before it waits."""
        for _ in range(3):
            self.type(CTRL_C)
            with suppress(AssertionError):
                self.wait_for(pattern, seconds=10)
                return
        self.wait_for(pattern)

    def wait_for_end(self) -> int:
        """The exit code."""
        while self._read(TIMEOUT_S):
            pass
        return self.process.wait(TIMEOUT_S)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._ours], [], [], max(0.0, seconds))
        try:
            new = os.read(self._ours, 1 << 16) if ready else b""
        except OSError:  # nobody has the other end
            new = b""
        self._raw += new
        self.screen = _SILENT.sub("", self._raw.decode(errors="replace"))
        return bool(new)

"""A command in a terminal of its own, typed at as a user does."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence

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

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first place behind those waited for before; fails if it does not come."""
        deadline = time.monotonic() + TIMEOUT_S
        while not (found := re.compile(pattern).search(self.screen, self._seen)):
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{pattern!r} does not come after {self.screen[self._seen :]!r}")
        self._seen = found.end()
        return found

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

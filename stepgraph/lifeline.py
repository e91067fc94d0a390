"""A process that ends with the one that started it: nobody is left to hear of what it does."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that a process gets when its parent ends."""


def end_with_parent() -> None:
    """From here on, end this process when the parent, which holds the other end of its standard input, does."""
    if sys.platform == "linux":
        # The thread below is of no use to a process that is stopped, or that hangs with Python's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait, name="stepgraph-lifeline", daemon=True).start()


def _wait() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):  # past Python's buffer, whose lock would be in the way at exit
            pass
    os._exit(0)

"""A worker's process: the rank that a leader started it for, of one engine after another.

    python -m stepgraph.executor.worker RANK SIZE LEADER RING PIPE WAKE

LEADER is the process that started it, the last three are descriptors that it inherits; see `stepgraph.executor.workers`.
Its first act is to tie its life to the leader's: nothing heavy is imported before.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

# Of Linux's prctl: the signal that a process gets when its parent ends, and how late a sleeping thread may wake up, in ns.
_PR_SET_PDEATHSIG, _PR_SET_TIMERSLACK = 1, 29


def main() -> None:
    """Entry point of the process."""
    rank, size, leader, ring, pipe, wake = map(int, sys.argv[1:])
    _end_with(leader)
    try:
        from stepgraph.executor.follower import serve
    except Exception as error:  # a library is missing or broken, or there is no memory for it
        # What the leader takes for a `Message` that something went wrong.
        Connection(pipe).send(("error", ("EngineDeadError", f"its process cannot start: {error}")))
        sys.exit(1)
    serve(rank, size, ring=ring, pipe=pipe, wake=wake)


def _end_with(leader: int) -> None:
    """End when the leader's process does, whatever this one is doing."""
    if (
        sys.platform == "linux"
    ):  # the thread below is of no use to a process that is stopped, or hangs with Python's lock
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(_PR_SET_TIMERSLACK, 1000)  # its naps between orders are short
    if os.getppid() != leader:  # it has ended already
        os._exit(0)
    threading.Thread(target=_read_to_the_end, name="stepgraph-lifeline", daemon=True).start()


def _read_to_the_end() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os._exit(0)


if __name__ == "__main__":
    main()

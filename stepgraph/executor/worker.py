"""A worker's process: the rank that a leader started it for, of one engine after another.

    python -m stepgraph.executor.worker RANK SIZE LEADER RING PIPE WAKE MOVERS

LEADER is the process that started it, the last four are descriptors that it inherits; see `stepgraph.executor.workers`.
Its first act is to tie its life to the leader's: nothing heavy is imported before.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

from stepgraph.lifeline import end_with_parent

_PR_SET_TIMERSLACK = 29
"""Of Linux's prctl: how late a sleeping thread may wake up, in ns."""


def main() -> None:
    """Entry point of the process."""
    rank, size, leader, ring, pipe, wake, movers = map(int, sys.argv[1:])
    end_with_parent()
    if os.getppid() != leader:  # it has ended already
        os._exit(0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # some terminals stop those in the background that write to them
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1000)  # its naps between orders are short
    try:
        from stepgraph.executor.follower import serve
    except Exception as error:  # a library is missing or broken, or there is no memory for it
        # What the leader takes for a `Message` that something went wrong.
        Connection(pipe).send(("error", ("EngineDeadError", f"its process cannot start: {error}")))
        sys.exit(1)
    serve(rank, size, ring=ring, pipe=pipe, wake=wake, movers=movers)


if __name__ == "__main__":
    main()

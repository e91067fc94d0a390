"""The engine's side of the fork server: its process, and those of grammars, by number. See `stepgraph.engine.grammar_process`."""

from __future__ import annotations

import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import count

from stepgraph.engine.guidance import Vocabulary
from stepgraph.engine.guide_messages import Channel, Kind

_END_SECONDS = 5.0


class ForkServer:
    """A process that starts grammars' processes. It is started by a thread, as reading the vocabulary takes a second; whatever
    else is here never waits, and belongs to one thread.

    Args:
        read_vocabulary: of the model. What it raises is `failure`.
    """

    def __init__(self, read_vocabulary: Callable[[], Vocabulary]):
        ours, theirs = socket.socketpair()
        self._control = Channel(ours)
        self._numbers = count(1)
        self._start = _Start()
        self._starter = threading.Thread(
            target=_start_process,
            args=(read_vocabulary, ours, theirs, self._start),
            name="stepgraph-fork-server",
            daemon=True,
        )
        self._end = weakref.finalize(self, _end, ours, self._starter, self._start)
        self._starter.start()

    @property
    def failure(self) -> Exception | None:
        """Why it could not start."""
        return self._start.failure

    @property
    def is_ready(self) -> bool:
        """Whether it can start processes."""
        return self._start.is_ready

    @property
    def is_gone(self) -> bool:
        """Whether it has ended, or failed to start. The processes it started are lost."""
        return self._control.closed or self.failure is not None

    def fileno(self) -> int:
        return self._control.fileno()

    def fork(self) -> tuple[int, socket.socket] | None:
        """Start a process: its number, and the socket to it, which does not block. None if there is no room to ask for it now."""
        self._control.flush()
        ours, theirs = socket.socketpair()
        number = next(self._numbers)
        try:
            if not self._control.send_with(theirs, Kind.FORK, number):
                ours.close()
                return None
        finally:
            theirs.close()
        ours.setblocking(False)
        return number, ours

    def tell(self, kind: Kind, number: int) -> None:
        """END, YIELD, PAUSE or RESUME a process. Nothing happens if it is gone."""
        self._control.send(kind, number)

    def receive(self) -> list[tuple[int, int]]:
        """Numbers of the processes that have ended since, and their exit status, negative for a signal."""
        ended: list[tuple[int, int]] = []
        if self._starter.is_alive() or self.failure is not None:
            return ended
        self._control.flush()
        for frame in self._control.receive():
            if frame.kind == Kind.READY:
                self._start.is_ready = True
            if frame.kind == Kind.ENDED:
                ended.append((frame.number, struct.unpack("<i", frame.payload)[0]))
        return ended

    def shut_down(self) -> None:
        """End all processes."""
        self._end()


class _Start:
    """What has come of starting the process."""

    process: subprocess.Popen[bytes] | None = None
    failure: Exception | None = None
    is_ready = False


def _start_process(
    read_vocabulary: Callable[[], Vocabulary], ours: socket.socket, theirs: socket.socket, start: _Start
) -> None:
    try:
        paths = [path or os.getcwd() for path in sys.path]
        start.process = subprocess.Popen(
            [sys.executable, "-m", "stepgraph.engine.grammar_process", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is not for it
            # One thread: a process with more is not safe to fork.
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
            | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        )
        theirs.close()
        channel = Channel(ours)  # until it is ready, nobody else sends
        channel.send(Kind.VOCABULARY, 0, pickle.dumps(read_vocabulary()))
        ours.setblocking(False)
    except Exception as error:
        start.failure = error
        theirs.close()


def _end(ours: socket.socket, starter: threading.Thread, start: _Start) -> None:
    ours.close()  # which tells it
    starter.join()
    if start.process is not None:
        if not start.is_ready:  # and has started none
            start.process.kill()
        try:
            start.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            start.process.kill()
            start.process.wait()

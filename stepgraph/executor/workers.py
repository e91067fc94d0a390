"""Workers: the processes of all ranks but the leader's, as the leader sees them.

Each has a pipe for what is rare (builds, exchanged values, replies), one for its mover, a reader's place at the ring of orders,
and a thread of the leader's process that starts it and waits for its end. A worker ends when the leader's process does: the
kernel sees to it, and its standard input, which only the leader holds, ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from signal import Signals
from typing import Any, NamedTuple

import torch

from stepgraph import errors
from stepgraph.config import EngineConfig
from stepgraph.errors import DeviceMemoryError, EngineDeadError, StepgraphError
from stepgraph.executor.ring import RingWriter, create_memory

_ANSWER_S = 600.0
"""A worker that serves answers within this, whatever it is asked."""
_ORDER_S = 60.0
"""A worker that serves goes on to the next order within this: what takes longer is asked for, and answered."""
_PATIENCE_S, _MOST_PATIENCE_S = 0.1, 10.0
"""Of one who waits for an answer, between looks at the other workers: ever longer, for whoever watches whether this process
computes anything must not take its waiting for that."""
_END_S = 5.0
"""How long a worker may take to end by itself."""


class Build(NamedTuple):
    """What a worker needs to know to build its part of an engine."""

    config: EngineConfig
    threads: int | None
    """Of a rank on CPU; None: as many as there are."""
    time_limit_s: float
    """How long a collective waits for another rank."""
    log_level: int


class Message(NamedTuple):
    """What a worker says."""

    kind: str
    """`VALUE`, `REPLY` or `ERROR`."""
    content: Any

    @classmethod
    def of(cls, error: BaseException) -> Message:
        """What went wrong."""
        kind = DeviceMemoryError if isinstance(error, torch.OutOfMemoryError) else type(error)
        return cls(ERROR, (kind.__name__, str(error) or repr(error)))


class NotAdmitted(NamedTuple):
    """A request that a worker could not admit."""

    rank: int
    slot: int
    """As that rank numbers them."""
    message: str


VALUE, REPLY, ERROR = "value", "reply", "error"


class _Worker:
    """One process, from its start to its end."""

    def __init__(self, rank: int, size: int, ring: int, on_end: Callable[[], None]) -> None:
        self.rank = rank
        self.ended = threading.Event()
        self.end = ""
        """How it ended, once it has."""
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe, theirs = Pipe()
        self.mover_pipe, movers = Pipe()
        self._theirs = (theirs, movers)
        self._wakes, self.wake = os.pipe()
        os.set_blocking(self.wake, False)
        self._on_end = on_end
        self._started = threading.Event()
        command = [sys.executable, "-m", "stepgraph.executor.worker"]
        self._pass = (ring, theirs.fileno(), self._wakes, movers.fileno())
        self._command = [*command, *map(str, (rank, size, os.getpid(), *self._pass))]
        # The kernel ends a worker with the thread that started it, so that is one which lives as long.
        self._thread = threading.Thread(target=self._run, name=f"stepgraph-rank-{rank}", daemon=True)
        self._thread.start()

    def wait_started(self) -> None:
        """Wait until there is a process, or cannot be."""
        self._started.wait()

    def _run(self) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=2,  # what it prints is for people
                pass_fds=self._pass,
                process_group=0,  # Ctrl-C is not for it
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"},
            )
        except OSError as error:
            self.end = f"could not be started: {error}"
        else:
            self.process = process
        finally:
            for theirs in self._theirs:
                theirs.close()
            os.close(self._wakes)
            self._started.set()
        if self.process is not None:
            status = self.process.wait()
            self.end = f"was ended by {_signal_name(-status)}" if status < 0 else f"ended with exit status {status}"
        self.ended.set()
        self._on_end()

    def finish(self, seconds: float) -> None:
        """Have it end, if need be by force, and let go of what belongs to it."""
        self._started.wait()
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            if not self.ended.wait(seconds):
                self.process.kill()
        if self._thread is not threading.current_thread():  # which lets go of the last that knew of it
            self._thread.join()
        self.pipe.close()
        self.mover_pipe.close()
        os.close(self.wake)

    def leave(self) -> None:
        """Let go of what belongs to it, in a process that was forked from this one: only this one's hold it then."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.pipe.close()
        self.mover_pipe.close()
        os.close(self.wake)


class Workers:
    """Processes that wait for a build, serve as ranks 1 … size - 1 of an engine, and wait for the next build when it is closed.

    Everything but `on_end` belongs to one thread.

    Args:
        size: ranks, the leader's included.
    """

    def __init__(self, size: int) -> None:
        assert size > 1, size
        self.size = size
        self.on_end: Callable[[], None] = lambda: None
        """Called by another thread when a worker has ended though nobody asked it to."""
        self.has_ended = False
        """Whether one has, or is as good as gone: `check` says which."""
        self._failure: StepgraphError | None = None
        self._limit_s: float | None = None  # of an answer
        self._is_closed = False
        ring = create_memory(size - 1)
        told = _weakly(self, Workers._tell)
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._workers)
        try:
            for rank in range(1, size):
                self._workers.append(_Worker(rank, size, ring, told))
            for worker in self._workers:
                worker.wait_started()
            self.ring = RingWriter(ring, [worker.wake for worker in self._workers], self._check_orders)
        except BaseException:  # Ctrl-C, or the system has no more threads or descriptors
            self.close(now=True)
            raise
        finally:
            os.close(ring)
        os.register_at_fork(after_in_child=_weakly(self, Workers._leave))

    def build(self, build: Build) -> None:
        """Have all build their part of an engine; `built` waits for it."""
        self._limit_s = None
        for worker in self._workers:
            self._send(worker, build)

    def exchange(self, value: bytes) -> list[bytes]:
        """See `stepgraph.parallel.exchange.Exchange`; of rank 0."""
        values = [value, *self._messages(VALUE)]
        for worker in self._workers:
            self._send(worker, values)
        return values

    def built(self) -> list[Any]:
        """What workers say of what they have built, however long it took."""
        specs = self.replies()
        self._limit_s = _ANSWER_S
        return specs

    def replies(self, limit_s: float | None = None) -> list[Any]:
        """What the workers reply, in the order of their ranks. A StepgraphError if one failed, once all have replied; an
        EngineDeadError if one takes longer than `limit_s`, or than anything may."""
        return list(self._messages(REPLY, limit_s))

    def _tell(self) -> None:
        self.has_ended = True
        self.on_end()

    def _leave(self) -> None:
        """This process is a copy of the one that the workers belong to, and has nothing to do with them."""
        self._failure = EngineDeadError(
            "this process was forked from the one that started the ranks; create an engine in it, or start it otherwise"
        )
        self.has_ended = self._is_closed = True
        self._finalizer.detach()
        for worker in self._workers:
            worker.leave()

    def _check_orders(self, reader: int, waited_s: float) -> None:
        """EngineDeadError if a worker has ended, or does not carry out orders."""
        self.check()
        if waited_s > _ORDER_S:
            raise EngineDeadError(f"rank {1 + reader} has carried out no order for {waited_s:.0f} s")

    def check(self) -> None:
        """EngineDeadError if a worker has ended."""
        if self._failure is None:
            for worker in self._workers:
                if worker.ended.is_set():
                    self._failure = EngineDeadError(f"rank {worker.rank} {worker.end}{self._last_words(worker)}")
                    break
        if self._failure is not None:
            raise self._failure

    def admission_failures(self) -> list[NotAdmitted]:
        """The requests that a worker could not admit since the last call."""
        return [
            NotAdmitted(worker.rank, slot, f"rank {worker.rank} could not take the request in; its log says why")
            for index, worker in enumerate(self._workers)
            if (slot := self.ring.take_failure(index))
        ]

    @property
    def pids(self) -> list[int]:
        """Of the processes, in the order of their ranks."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    @property
    def mover_pipes(self) -> list[Connection]:
        """To the movers, in the order of their ranks."""
        return [worker.mover_pipe for worker in self._workers]

    def close(self, *, now: bool = False) -> None:
        """End the processes.

        Args:
            now: by force.
        """
        if not self._is_closed:
            self._is_closed = True
            self.on_end = lambda: None
            for worker in self._workers:
                if now and worker.process is not None:
                    worker.process.kill()
            self._finalizer()

    def _messages(self, kind: str, limit_s: float | None = None) -> Iterator[Any]:
        """A message of each; a StepgraphError if one failed, once all have said what they have to say."""
        contents, failed = [], None
        for worker in self._workers:
            message = self._receive(worker, self._limit_s if limit_s is None else limit_s)
            if message.kind == ERROR:
                failed = failed or self._error(worker, message.content)
                if kind == VALUE:  # those who wait for an exchange are not told of a failure
                    break
            else:
                if message.kind != kind:
                    raise self._lost(f"rank {worker.rank} is at something else than rank 0: {message.kind}, not {kind}")
            contents.append(message.content)
        if failed is not None:
            raise failed
        yield from contents

    def _receive(self, worker: _Worker, limit_s: float | None) -> Message:
        started, patience_s = time.monotonic(), _PATIENCE_S
        try:
            while not worker.pipe.poll(patience_s if limit_s is None else min(patience_s, limit_s)):
                self.check()
                if limit_s is not None and time.monotonic() - started > limit_s:
                    raise self._lost(f"rank {worker.rank} gave no answer within {limit_s:.0f} s")
                patience_s = min(2 * patience_s, _MOST_PATIENCE_S)
            return Message(*worker.pipe.recv())
        except (EOFError, OSError):
            raise self._gone(worker) from None

    def _send(self, worker: _Worker, content: Any) -> None:
        try:
            worker.pipe.send(content)
        except OSError:
            raise self._gone(worker) from None

    def _lost(self, what: str) -> StepgraphError:
        """What a worker says from now on may be the answer to something else: nothing more is asked."""
        self._failure = EngineDeadError(what)
        self.has_ended = True
        return self._failure

    def _gone(self, worker: _Worker) -> StepgraphError:
        worker.ended.wait(_END_S)
        try:
            self.check()
        except StepgraphError as error:
            return error
        return self._lost(f"rank {worker.rank} has closed its pipe")

    def _error(self, worker: _Worker, content: tuple[str, str]) -> StepgraphError:
        """What a worker said went wrong, as the error it was."""
        name, sentence = content
        kind = getattr(errors, name, StepgraphError)
        if not (isinstance(kind, type) and issubclass(kind, StepgraphError)):
            kind = StepgraphError
        return kind(f"rank {worker.rank}: {sentence}")

    def _last_words(self, worker: _Worker) -> str:
        """What a worker said of its end, if anything."""
        said = ""
        with contextlib.suppress(EOFError, OSError):
            while worker.pipe.poll():
                message = Message(*worker.pipe.recv())
                if message.kind == ERROR:
                    said = f": {message.content[1]}"
        return said


def _signal_name(number: int) -> str:
    try:
        return Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _weakly(workers: Workers, method: Callable[[Workers], None]) -> Callable[[], None]:
    """Calls a method, if there are still any workers."""
    reference = weakref.ref(workers)

    def call() -> None:
        there = reference()
        if there is not None:
            method(there)

    return call


def _end(workers: list[_Worker]) -> None:
    deadline = time.monotonic() + _END_S
    for worker in workers:
        worker.finish(max(0.0, deadline - time.monotonic()))


def log_level() -> int:
    """What is logged here, and so by workers."""
    return logging.getLogger("stepgraph").getEffectiveLevel()


def connection(descriptor: int) -> Connection:
    """A worker's end of its pipe."""
    return Connection(descriptor)

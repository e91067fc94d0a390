"""The movers of several ranks, driven from the leader's process: each worker has a pipe for that, and a thread that serves it.

Nothing of it goes through the ring of orders, which steps need. What goes through a pipe is pickled: both ends are one engine.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from stepgraph.transfer.base import Move, Movers, Moves, SourceCaches, TransferError
from stepgraph.transfer.messages import Hello

logger = logging.getLogger(__name__)

_LOOK_S = 2e-4
"""Between two looks of a worker at what its mover has done."""
_ANSWER_S = 60.0
"""A worker has reached another engine's memory within this, or has let go of it."""


class _Attach(NamedTuple):
    source: int
    peer: Hello


class _Detach(NamedTuple):
    source: int


class _Begin(NamedTuple):
    source: int
    moves: int
    num_done: int
    """Steps that must be done on the rank before it begins."""


class _Submit(NamedTuple):
    moves: int
    move: Move


class _Cancel(NamedTuple):
    moves: int


class _End(NamedTuple):
    """Of the service; answered by itself."""


class _Answer(NamedTuple):
    """To `_Attach` and `_Detach`."""

    source: int
    error: str


class _Progress(NamedTuple):
    num_moved: int
    error: str
    is_done: bool


class _Report(NamedTuple):
    moves: int
    progress: _Progress


class MoverService:
    """Has a worker's mover do what the leader's `RankedMovers` want. A thread, until they end it or are gone.

    Args:
        pipe: the worker's end.
        movers: of its rank.
        wait_done: blocks until so many steps are done on the rank.
    """

    def __init__(self, pipe: Connection, movers: Movers, wait_done: Callable[[int], None]) -> None:
        self._pipe, self._movers, self._wait_done = pipe, movers, wait_done
        self._sources: dict[int, SourceCaches] = {}
        self._moves: dict[int, tuple[Moves, _Progress]] = {}  # with what was said of each
        self._thread = threading.Thread(target=self._run, name="stepgraph-mover-service", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._serve():
                self._report()
        except (EOFError, OSError):
            logger.debug("the leader is gone")
        finally:
            self._movers.close()

    def _serve(self) -> bool:
        """Do what the next message says, if one comes soon. False if it was the last."""
        if not self._pipe.poll(_LOOK_S if self._moves else None):
            return True
        message = self._pipe.recv()
        if isinstance(message, _Attach | _Detach):
            error = self._attach(message)
            self._report()  # of moves that have ended with a source before it is said to be left
            self._pipe.send(_Answer(message.source, error))
        elif isinstance(message, _Begin):
            self._wait_done(message.num_done)
            self._moves[message.moves] = self._sources[message.source].begin(), _Progress(0, "", False)
        elif isinstance(message, _Submit) and message.moves in self._moves:  # else it has failed, as was said
            self._moves[message.moves][0].submit(message.move)
        elif isinstance(message, _Cancel) and message.moves in self._moves:
            self._moves[message.moves][0].cancel()
        elif isinstance(message, _End):
            self._movers.close()
            self._pipe.send(message)
            return False
        return True

    def _attach(self, message: _Attach | _Detach) -> str:
        """Reach or leave a source. Returns what went wrong."""
        try:
            if isinstance(message, _Attach):
                self._sources[message.source] = self._movers.attach(message.peer)
            elif message.source in self._sources:
                self._sources.pop(message.source).close()
        except Exception as error:
            if not isinstance(error, TransferError):
                logger.exception("another engine's memory could not be reached")
            return str(error) or repr(error)
        return ""

    def _report(self) -> None:
        for number, (moving, said) in list(self._moves.items()):
            is_done = moving.done()
            error = "" if moving.error is None else str(moving.error) or repr(moving.error)
            progress = _Progress(moving.num_moved, error, is_done)
            if progress != said:
                self._pipe.send(_Report(number, progress))
                self._moves[number] = moving, progress
            if is_done:
                del self._moves[number]


class RankedMovers:
    """See `stepgraph.transfer.base.Movers`: of this rank, and of all workers, which copy the same blocks, each its part.

    Args:
        own: of this rank.
        pipes: to the workers, each of which has a `MoverService` at the other end.
        num_done: steps whose results have been read here.
    """

    def __init__(self, own: Movers, pipes: Sequence[Connection], num_done: Callable[[], int]) -> None:
        self._own, self._pipes, self._num_done = own, pipes, num_done
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        # These three: under that.
        self._answers: dict[int, dict[int, str]] = {}  # of sources, by worker
        self._moves: weakref.WeakValueDictionary[int, _RankedMoves] = weakref.WeakValueDictionary()
        self._ended: set[int] = set()  # workers
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, name="stepgraph-movers", daemon=True)
        self._thread.start()

    def attach(self, peer: Hello) -> SourceCaches:
        """See `Movers.attach`."""
        number = next(self._numbers)
        with self._changed:
            self._answers[number] = {}
        self.send(_Attach(number, peer))
        own, errors = None, []
        try:
            own = self._own.attach(peer)
        except TransferError as error:
            errors.append(str(error))
        errors += self._answers_to(number)
        source = _RankedSource(self, number, own)
        if errors:
            source.close()
            raise TransferError(errors[0])
        return source

    def close(self) -> None:
        """See `Movers.close`. Can be called again."""
        with self._sending:
            if self._is_closed:
                return
            self._is_closed = True
            self._send(_End())
        self._own.close()
        self._thread.join()

    def begin(self, source: int, own: SourceCaches) -> Moves:
        """See `SourceCaches.begin`."""
        number = next(self._numbers)
        with self._changed:
            moves = self._moves[number] = _RankedMoves(self, number, own.begin(), len(self._pipes))
            for worker in self._ended:
                moves.of_workers[worker] = _GONE
        self.send(_Begin(source, number, self._num_done()))
        return moves

    def detach(self, source: int) -> None:
        """See `SourceCaches.close`; of the workers."""
        with self._changed:
            self._answers[source] = {}
        self.send(_Detach(source))
        for error in self._answers_to(source):
            logger.warning("memory of another engine is not given back: %s", error)

    def send(self, message: Any) -> None:
        """Tell all workers something, in one order; nothing once the movers are closed."""
        with self._sending:
            if not self._is_closed:
                self._send(message)

    def _send(self, message: Any) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it is gone, as whoever listens to it finds
                pipe.send(message)

    def _answers_to(self, source: int) -> list[str]:
        """What went wrong on workers, when all have said it."""
        deadline = time.monotonic() + _ANSWER_S
        workers = range(len(self._pipes))
        with self._changed:
            answers = self._answers[source]
            while any(worker not in answers and worker not in self._ended for worker in workers):
                if not self._changed.wait(deadline - time.monotonic()):
                    break
            del self._answers[source]
            for worker in workers:
                answers.setdefault(worker, _GONE.error if worker in self._ended else "it does not answer")
        return [f"rank {1 + worker}: {answers[worker]}" for worker in workers if answers[worker]]

    def _listen(self) -> None:
        pipes = {pipe: worker for worker, pipe in enumerate(self._pipes)}
        while pipes:
            try:
                ready = [pipe for pipe in pipes if pipe.closed] or wait(list(pipes))
            except OSError:
                continue  # one was closed meanwhile, by whoever ends workers
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    message = _End()
                with self._changed:
                    self._take(pipes[pipe], message)
                    self._changed.notify_all()
                if isinstance(message, _End):
                    del pipes[pipe]

    def _take(self, worker: int, message: Any) -> None:
        if isinstance(message, _Answer):
            self._answers.get(message.source, {})[worker] = message.error
        elif isinstance(message, _Report):
            moves = self._moves.get(message.moves)
            if moves is not None:
                moves.of_workers[worker] = message.progress
        else:
            assert isinstance(message, _End), message
            self._ended.add(worker)
            for moves in self._moves.values():
                if not moves.of_workers[worker].is_done:
                    moves.of_workers[worker] = _GONE


_NOTHING, _GONE = _Progress(0, "", False), _Progress(0, "it is gone", True)


class _RankedSource:
    """See `SourceCaches`. `own`: this rank's; None if it could not be reached."""

    def __init__(self, movers: RankedMovers, number: int, own: SourceCaches | None) -> None:
        self._movers, self._number, self._own = movers, number, own
        self.num_blocks = 0 if own is None else own.num_blocks

    def begin(self) -> Moves:
        assert self._own is not None
        return self._movers.begin(self._number, self._own)

    def close(self) -> None:
        self._movers.detach(self._number)
        if self._own is not None:
            self._own.close()


class _RankedMoves:
    """See `Moves`. Workers say how far they are; `own` is this rank's."""

    def __init__(self, movers: RankedMovers, number: int, own: Moves, num_workers: int) -> None:
        self.of_workers = [_NOTHING] * num_workers  # under the movers' lock
        self._movers, self._number, self._own = movers, number, own

    @property
    def num_moved(self) -> int:
        return min(self._own.num_moved, *(progress.num_moved for progress in self.of_workers))

    @property
    def error(self) -> Exception | None:
        errors = (
            TransferError(f"rank {rank}: {progress.error}")
            for rank, progress in enumerate(self.of_workers, start=1)
            if progress.error
        )
        return self._own.error or next(errors, None)

    def submit(self, move: Move) -> None:
        self._own.submit(move)
        self._movers.send(_Submit(self._number, move))

    def cancel(self) -> None:
        self._own.cancel()
        self._movers.send(_Cancel(self._number))

    def done(self) -> bool:
        return self._own.done() and all(progress.is_done for progress in self.of_workers)

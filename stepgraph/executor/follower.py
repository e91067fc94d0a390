"""What a worker does: it builds its part of an engine and carries out the leader's orders, until there are no more."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

from stepgraph.errors import EngineDeadError, StepgraphError
from stepgraph.executor.build import Ranks, build_local_executor
from stepgraph.executor.local import LocalExecutor
from stepgraph.executor.orders import admission_of, call_of, part_of, shape_of
from stepgraph.executor.ring import NUMBERS, Kind, RingReader, Words
from stepgraph.executor.workers import REPLY, VALUE, Build, Message, connection
from stepgraph.models.source import resolve_configured
from stepgraph.parallel.shard import Shard
from stepgraph.step.shape import StepShape

logger = logging.getLogger(__name__)


def serve(rank: int, size: int, *, ring: int, pipe: int, wake: int, movers: int) -> None:
    """Serve one engine after another as one of its ranks. Ends when the leader closes the pipe, or with what went wrong."""
    to_leader, orders = connection(pipe), RingReader(ring, rank - 1, size - 1, wake)
    mover_pipe = connection(movers)

    def receive() -> Any:
        try:
            return to_leader.recv()
        except (EOFError, OSError) as error:
            raise _LeaderGoneError from error

    def exchange(value: bytes) -> list[bytes]:
        to_leader.send(Message(VALUE, value))
        values: list[bytes] = receive()
        return values

    logging.basicConfig(format=f"rank {rank} %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        while True:
            build: Build = receive()
            logging.getLogger("stepgraph").setLevel(build.log_level)
            if build.threads is not None:
                torch.set_num_threads(build.threads)
            ranks = Ranks(Shard(rank, size), exchange, build.time_limit_s)
            executor = build_local_executor(build.config, resolve_configured(build.config.model), ranks=ranks)
            executor.mover_pipe = mover_pipe
            to_leader.send(Message(REPLY, executor.specs))
            gc.collect()
            gc.freeze()  # what is there lives as long as the engine
            Follower(executor, orders, to_leader.send).run()
            gc.unfreeze()
            executor.close()
            del executor
    except _LeaderGoneError:
        return
    except BaseException as error:
        logger.debug("rank %d ends", rank, exc_info=error)
        to_leader.send(Message.of(error))
        sys.exit(1)


class _LeaderGoneError(Exception):
    """The leader has closed the pipe, or is gone."""


class Follower:
    """Carries out orders.

    Args:
        executor: of this rank.
        orders: where they come from.
        send: says something to the leader.
    """

    def __init__(self, executor: LocalExecutor, orders: RingReader, send: Callable[[Message], None]) -> None:
        self._executor, self._orders, self._send = executor, orders, send
        assert executor.group is not None
        self._runner, self._group = executor.runner, executor.group
        before = orders.waited_s
        executor.waited_s = lambda: orders.waited_s - before
        self._shapes: list[StepShape] = []
        self._rank, self._num_own = executor.group.shard.rank, executor.specs.data_parallel_size

    def run(self) -> None:
        """Until there are no more. What a launch raises is raised: the other ranks wait for this one's part of the step.

        Raises:
            EngineDeadError: another rank did not come to a collective.
        """
        while True:
            if (fault := self._group.fault()) is not None:
                raise EngineDeadError(
                    f"rank {fault.rank} did not come to collective {fault.sequence} ({fault.collective}) in time"
                )
            kind, number, shape, words = self._orders.next()
            if kind in (Kind.LAUNCH, Kind.EAGER):
                self._launch(kind, number, self._shapes[shape], words)
            elif kind == Kind.ADMIT:
                self._admit(words)
            elif kind == Kind.MASKS:
                self._runner.state.set_masks(number, words)
            elif kind == Kind.SHAPE:
                self._shapes.append(shape_of(words))
            elif kind in (Kind.CAPTURE, Kind.TRY):
                self._agree(kind, self._shapes[shape])
            elif kind == Kind.CALL:
                self._call(words)
            elif kind == Kind.ONLY:
                if number != self._rank:
                    self._orders.next()
            else:
                assert kind == Kind.END, kind
                return

    def _launch(self, kind: int, number: int, shape: StepShape, words: Words) -> None:
        runner = self._runner
        expected = runner.num_launched % NUMBERS
        assert number == expected, f"step {expected} was expected, and {number} came"
        graph = (
            runner.graphs.store.eager_twin(shape) if kind == Kind.EAGER else runner.graphs.store.captured_graph(shape)
        )
        if self._num_own > 1:
            words = part_of(words, self._rank, self._num_own)
        end = shape.plan_length(runner.block_size, runner.layout.groups.size)
        part = slice(end - len(words), end)
        runner.staged(part)[:] = words
        runner.put(part)
        runner.run(graph)

    def _agree(self, kind: int, shape: StepShape) -> None:
        store = self._runner.graphs.store
        try:
            if kind == Kind.CAPTURE:
                store.graph(shape)
            else:
                store.try_eager_twin(shape)
        except Exception as error:  # which the leader has been told
            logger.debug("%s failed: %s", shape, error)

    def _admit(self, words: Words) -> None:
        admission = admission_of(words)
        try:
            self._executor.admit(admission)
        except Exception as error:
            logger.warning("the request of slot %d could not be taken in: %s", admission.slot, error)
            self._orders.report_failure(admission.slot)

    def _call(self, words: Words) -> None:
        function: Any = None
        try:
            function, args = call_of(words)
            reply = Message(REPLY, function(self._executor, *args))
        except Exception as error:
            if not isinstance(error, StepgraphError):
                logger.exception("a call of %s failed", function)
            reply = Message.of(error)
        self._send(reply)

"""Mover: copies blocks of another engine into the caches of a rank, each layer as soon as it is written there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.parallel.shard import Cut, Shard
from stepgraph.transfer.base import BlockCopy, Move, RemoteMemory
from stepgraph.transfer.layout import BlockLayout, Piece, pieces
from stepgraph.transfer.messages import Hello

logger = logging.getLogger(__name__)

_NAP_S = 50e-6
"""Between two looks at what is not written yet."""

_LAYERS_AT_ONCE = 8
"""Of a fetch, if they are written, before others have their turn: who copies by a device waits for it once for all of them."""

Heads = Callable[[int], Cut]
"""Of so many key/value heads, those that a rank has: `Shard.heads` of it, or `Cut.whole`."""


CopyBlocks = Callable[[Sequence[BlockCopy]], None]


def copy_blocks(copies: Sequence[BlockCopy]) -> None:
    """Copy blocks in host memory. When it returns, they are there."""
    for source, source_blocks, target, target_blocks in copies:
        numbers = (torch.tensor(blocks, dtype=torch.int32) for blocks in (source_blocks, target_blocks))
        ops.copy_blocks(source, next(numbers), target, next(numbers))


def heads_of(peer: Hello) -> list[Heads]:
    """What each rank of an engine has."""
    size = len(peer.ranks)
    return [Shard(rank, size).heads if peer.is_cut else Cut.whole for rank in range(size)]


class Moving:
    """What is copied for one fetch. Any thread may call it. Made by `Mover.begin`."""

    def __init__(self, mover: Mover, memory: RemoteMemory, sources: Sequence[Heads]) -> None:
        self.num_moved = 0
        """Blocks that have arrived, in all layers."""
        self.error: Exception | None = None
        """Why no more will come."""
        self.memory, self.sources = memory, sources
        self.is_over = self.is_busy = False  # these two: under the mover's lock
        self._mover = mover

    def submit(self, move: Move) -> None:
        """Copy blocks, after those that were submitted before."""
        self._mover.add(self, move)

    def cancel(self) -> None:
        """Copy no more; does not wait for the copy under way."""
        self._mover.end(self)

    def done(self) -> bool:
        """Whether nothing is copied for it any more, and nothing will be."""
        with self._mover.changed:
            return self.is_over and not self.is_busy


@dataclass(eq=False)
class _Job:
    moving: Moving
    move: Move
    layer: int = 0


class Mover:
    """A thread, and what it has to copy. Several fetches take turns, a few layers at a time.

    Args:
        layout: of blocks, at both ends.
        tensors: of each entry of `layout.layers`, this rank's tensors: [blocks, block_size, …] each.
        heads: what this rank has.
        rank: its number.
        copy: copies blocks; default: in host memory.
    """

    def __init__(
        self,
        layout: BlockLayout,
        tensors: Sequence[Sequence[Tensor]],
        heads: Heads,
        rank: int,
        copy: CopyBlocks = copy_blocks,
    ) -> None:
        assert len(tensors) == len(layout.layers), (len(tensors), len(layout.layers))
        self._layout, self._tensors, self._heads, self._rank, self._copy = layout, tensors, heads, rank, copy
        self.changed = threading.Condition()
        self._jobs: list[_Job] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="stepgraph-mover", daemon=True)
        self._thread.start()

    def begin(self, memory: RemoteMemory, sources: Sequence[Heads]) -> Moving:
        """Copy from another engine, what is submitted.

        Args:
            memory: of that engine.
            sources: what each of its ranks has.
        """
        return Moving(self, memory, sources)

    def close(self) -> None:
        """Copy nothing more, and wait for the copy under way."""
        with self.changed:
            self._is_closed = True
            for job in self._jobs:
                job.moving.is_over = True
            self._jobs.clear()
            self.changed.notify()
        self._thread.join()

    def add(self, moving: Moving, move: Move) -> None:
        """See `Moving.submit`."""
        assert len(move.source) == len(move.target), move
        with self.changed:
            if self._is_closed:
                moving.is_over = True
            if not moving.is_over:
                self._jobs.append(_Job(moving, move))
                self.changed.notify()

    def end(self, moving: Moving) -> None:
        """See `Moving.cancel`."""
        with self.changed:
            moving.is_over = True
            self._jobs = [job for job in self._jobs if job.moving is not moving]

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self._jobs and not self._is_closed:
                    self.changed.wait()
                if self._is_closed:
                    return
                jobs = {job.moving: job for job in reversed(self._jobs)}  # of each fetch the first
            advanced = [self._advance(job) for job in jobs.values()]
            if not any(advanced):
                time.sleep(_NAP_S)

    def _advance(self, job: _Job) -> bool:
        """Copy the next layers of a job, as far as they are written. Whether anything was done."""
        moving = job.moving
        with self.changed:
            if moving.is_over:
                return True
            moving.is_busy = True
        try:
            copies: list[BlockCopy] = []
            layer, last = job.layer, min(job.layer + _LAYERS_AT_ONCE, len(self._layout.layers))
            while layer < last and (of_layer := self._copies_of(job, layer)) is not None:
                copies += of_layer
                layer += 1
            if layer == job.layer:
                return False
            self._copy(copies)
            job.layer = layer
            return True
        except Exception as error:  # of a back end: whoever waits hears of it, and other fetches go on
            logger.warning("copying keys and values from another engine failed: %s", error)
            moving.error = error
            self.end(moving)
            return True
        finally:
            with self.changed:
                moving.is_busy = False
                if job.layer == len(self._layout.layers) and not moving.is_over:
                    self._jobs.remove(job)
                    moving.num_moved += len(job.move.target)

    def _copies_of(self, job: _Job, layer: int) -> list[BlockCopy] | None:
        """All of a layer, if it is written."""
        found = self._pieces_of(job.moving, layer)
        signal, memory = self._layout.signal_of(layer), job.moving.memory
        if not all(memory.has_written(rank, signal, job.move.step) for rank in {piece.rank for _, piece in found}):
            return None
        return [self._copy_of(job, layer, number, piece) for number, piece in found]

    def _pieces_of(self, moving: Moving, layer: int) -> list[tuple[int, Piece]]:
        """Of each tensor of a layer, by its number, what comes from where."""
        found = []
        for number, tensor in enumerate(self._layout.layers[layer]):
            of = tensor.shape[0] if tensor.has_heads else 1
            sources = [(heads if tensor.has_heads else Cut.whole)(of) for heads in moving.sources]
            target = (self._heads if tensor.has_heads else Cut.whole)(of)
            found += [(number, piece) for piece in pieces(sources, target, self._rank)]
        return found

    def _copy_of(self, job: _Job, layer: int, number: int, piece: Piece) -> BlockCopy:
        source = job.moving.memory.tensors(piece.rank)[layer][number]
        target = self._tensors[layer][number]
        if self._layout.layers[layer][number].has_heads:
            source = source[:, :, piece.source : piece.source + piece.length]
            target = target[:, :, piece.target : piece.target + piece.length]
        return BlockCopy(source, job.move.source, target, job.move.target)

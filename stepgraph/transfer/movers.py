"""What the movers of an engine's ranks are to whoever has blocks fetched, and what they work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from stepgraph.parallel.shard import Shard
from stepgraph.step.signals import KVSignals
from stepgraph.transfer.base import Move
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import Hello


@dataclass(frozen=True)
class RankCache:
    """The KV cache of one rank, in the process that has it."""

    layout: BlockLayout
    """The same on all ranks."""
    shard: Shard
    """Which of them it is; its key/value heads are those of `Shard.heads`."""
    tensors: tuple[tuple[Tensor, ...], ...]
    """Of each entry of `layout.layers`: [blocks, block_size, …] each."""
    signals: KVSignals | None
    """Where its steps say what they have written; None: nowhere."""


@dataclass(frozen=True)
class ExportedCache:
    """The KV cache of an engine, as others are told of it: fields of its `Hello`."""

    layout: BlockLayout
    is_cut: bool
    ranks: tuple[str, ...]


class Copying(Protocol):
    """What is copied for one fetch, into the caches of all ranks. Any thread may call it."""

    @property
    def num_moved(self) -> int:
        """Blocks that have arrived, in all layers of all ranks."""

    @property
    def error(self) -> Exception | None:
        """Why no more will come."""

    def submit(self, move: Move) -> None:
        """Copy blocks, after those that were submitted before. Does not wait."""

    def cancel(self) -> None:
        """Copy no more. Does not wait."""

    def done(self) -> bool:
        """Whether it was cancelled, or has failed, and no rank copies anything for it any more, or will."""


class Attached(Protocol):
    """The memory of another engine, as the ranks of this one reach it. Any thread may call it."""

    def begin(self) -> Copying:
        """Have blocks copied from it. Those that they go to may be touched by steps of this engine whose results have been read
        by now, and by none after these."""

    def close(self) -> None:
        """Let go of the memory. All that was begun is cancelled, and is done when this returns."""


class Movers(Protocol):
    """One mover in each rank of an engine. Any thread may call it."""

    def attach(self, peer: Hello) -> Attached:
        """Reach the memory of another engine. Waits for all ranks.

        Args:
            peer: that engine; of the same layout.

        Raises:
            StepgraphError: a rank cannot.
        """

    def close(self) -> None:
        """Copy nothing more, and wait for the copies under way."""

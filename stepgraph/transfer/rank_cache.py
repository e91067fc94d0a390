"""The KV cache of an engine, as transfers see it: in each rank's process, and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stepgraph.parallel.shard import Shard
from stepgraph.platforms import DeviceMemory
from stepgraph.step.signals import KVSignals
from stepgraph.transfer.base import Inbox, Movers
from stepgraph.transfer.layout import BlockLayout


@dataclass(frozen=True)
class RankCache:
    """The KV cache of one rank, in the process that has it."""

    layout: BlockLayout
    """The same on all ranks."""
    shard: Shard
    """Which of them it is; its key/value heads are those of `Shard.heads`."""
    tensors: tuple[tuple[Tensor, ...], ...]
    """Of each entry of `layout.layers`: [blocks, block_size, …] each."""
    memory: DeviceMemory
    """That they lie in."""
    signals: KVSignals | None
    """Where its steps say what they have written; None: nowhere."""


@dataclass(frozen=True)
class ExportedCache:
    """The KV cache of an engine, for whoever tells others of it and fills it with what they have."""

    layout: BlockLayout
    is_cut: bool
    ranks: tuple[str, ...]
    """These two: as `Hello` has them."""
    movers: Movers
    receive: Callable[[], Inbox] | None = None
    """Lets one source write into it; TransferError if it cannot. None: sinks move the bytes."""

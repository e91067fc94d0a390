"""What the parts of a transfer are to each other.

A sink *fetches*: it takes blocks of its own, says whose they are to become, and hears what came of it. `Transfers` is all that an
engine knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.reference import Reference


class FetchFailure(StrEnum):
    """Why a fetch has brought nothing, beside what `LossReason` says of its lease."""

    TIMEOUT = "timeout"
    LINK = "link"  # the source cannot be reached, or is gone
    PROTOCOL = "protocol"  # it said what makes no sense
    STALE = "stale"  # who answers is another engine than the reference names
    OTHER_MODEL = "other_model"
    OTHER_LAYOUT = "other_layout"
    OTHER_BLOCKS = "other_blocks"  # a block's key is not the one that the prompt has there
    OUT_OF_RANGE = "out_of_range"  # a block that the source's memory does not have
    BACKEND = "backend"  # a copy failed, or no way to move bytes serves both
    CANCELLED = "cancelled"  # by the engine: nobody waits for it any more


class FetchState(StrEnum):
    """Where a fetch stands."""

    UNDER_WAY = "under_way"
    DONE = "done"  # the bytes are there, and were confirmed
    FAILED = "failed"


class Fetch(Protocol):
    """Blocks that are to come. A fence (see `stepgraph.engine.blocks`) on the blocks that were taken for them."""

    @property
    def state(self) -> FetchState:
        """Once it is not under way, it stays so."""

    @property
    def num_blocks(self) -> int:
        """Of a fetch that is done, how many of the blocks hold what was asked for, from the first on."""

    @property
    def reason(self) -> FetchFailure | LossReason | None:
        """Of a fetch that failed, why."""

    def cancel(self) -> None:
        """Want it no more. Does not wait."""

    def done(self) -> bool:
        """Whether nobody can write into the blocks any more for this. Once it is so, it stays so."""


class Transfers(Protocol):
    """What an engine has of other engines. Driven by the engine's thread."""

    engine_id: str
    """Random, another one at each start."""
    host: str
    port: int
    """These two: where others reach it, as `Reference` has them."""
    leases: Leases
    """What it holds for others."""

    def fetch(self, reference: Reference, first: int, blocks: Sequence[int], keys: Sequence[bytes]) -> Fetch:
        """Bring blocks of a prompt here, in the order of the prompt. Does not wait.

        Args:
            reference: who has them.
            first: index of the first of them among the prompt's.
            blocks: where they go: taken from the pool, and no step under way touches them but those launched before.
            keys: what each is to hold.
        """

    def close(self) -> None:
        """End all leases and fetches, for good."""


@dataclass(frozen=True)
class Move:
    """Blocks to be copied once a step of the source has written them."""

    source: tuple[int, ...]
    target: tuple[int, ...]
    """The sink's, as many."""
    step: int
    """See `stepgraph.transfer.messages.Filled.step`."""


class RemoteMemory(Protocol):
    """The caches of another engine, as far as this process reaches them."""

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        """Of each entry of `BlockLayout.layers`, the tensors that a rank has: [blocks, block_size, …] each."""

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        """See `stepgraph.step.signals.KVSignals.has_written`, of a rank; `signal` as `BlockLayout.signal_of` says."""

"""What the parts of a transfer are to each other.

A sink *fetches*: it takes blocks of its own, says whose they are to become, and hears what came of it. `Transfers` is all that an
engine knows of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

from torch import Tensor

from stepgraph.errors import StepgraphError
from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.reference import Reference


class TransferError(StepgraphError):
    """Bytes cannot go between two engines in this way, or not at the speed that it is for: what is in the way."""


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

    @property
    def seconds(self) -> float:
        """From its begin to its end, or until now."""

    def cancel(self) -> None:
        """Want it no more. Does not wait."""

    def done(self) -> bool:
        """Whether nobody can write into the blocks any more for this. Once it is so, it stays so."""


@dataclass(frozen=True)
class TransferCounts:
    """What has been transferred since the start, and what is on its way."""

    num_leases: int  # now
    num_fetches: int  # now, those that were cancelled and are not done included
    blocks_sent: int  # that others have confirmed
    bytes_sent: int  # of all ranks
    blocks_received: int
    bytes_received: int
    leases_ended: Mapping[str, int]
    """By `LossReason`."""
    failures: Mapping[str, int]
    """Fetches that failed, by `FetchFailure` and `LossReason`."""


class Transfers(Protocol):
    """What an engine has of other engines. Driven by the engine's thread."""

    engine_id: str
    """Random, another one at each start."""
    host: str
    port: int
    """These two: where others reach it, as `Reference` has them."""
    leases: Leases
    """What it holds for others."""

    def check(self, reference: Reference) -> None:
        """RequestError if nothing may be fetched from there, whoever asks. For requests, before they are taken."""

    def fetch(self, reference: Reference, first: int, blocks: Sequence[int], keys: Sequence[bytes]) -> Fetch:
        """Bring blocks of a prompt here, in the order of the prompt. Does not wait.

        Args:
            reference: who has them.
            first: index of the first of them among the prompt's.
            blocks: where they go: taken from the pool, and no step under way touches them but those launched before.
            keys: what each is to hold.
        """

    def renew(self, references: Sequence[Reference]) -> None:
        """Keep leases alive that are to be fetched later. To be called again and again until then, as often as one likes: what
        is sent is one message to each source in a third of the time after which leases expire. Does not wait."""

    def leave(self, reference: Reference) -> None:
        """Nothing is going to be fetched of it: its source need not wait until the lease expires. Does not wait."""

    def cache_lost(self, reason: LossReason) -> None:
        """End all leases and fetches: what is cached counts no more, or is about to be given up. Until `cache_back`, there are
        none. Does not wait: memory is not to be given up before the fetches are done."""

    def cache_back(self, model: str) -> None:
        """There is a cache again.

        Args:
            model: digest of the weights that it is for, see `Hello.model`.
        """

    def counts(self) -> TransferCounts:
        """For metrics."""

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


class BlockCopy(NamedTuple):
    """Blocks of one tensor that go to those of another, [blocks, block_size, …] of one dtype and equal otherwise."""

    source: Tensor
    source_blocks: tuple[int, ...]
    target: Tensor
    target_blocks: tuple[int, ...]


class RemoteMemory(Protocol):
    """The caches of another engine, as far as this process reaches them."""

    def tensors(self, rank: int) -> Sequence[Sequence[Tensor]]:
        """Of each entry of `BlockLayout.layers`, the tensors that a rank has: [blocks, block_size, …] each."""

    def has_written(self, rank: int, signal: int, step: int) -> bool:
        """See `stepgraph.step.signals.KVSignals.has_written`, of a rank; `signal` as `BlockLayout.signal_of` says."""

    def close(self) -> None:
        """Give it back; nothing is read of it any more."""


class Backend(Protocol):
    """A way for sinks to reach the memory of sources, as one rank has it."""

    @property
    def name(self) -> str:
        """As `Hello.backends` and settings say it."""

    def describe(self) -> str:
        """This rank's entry of `Hello.ranks`. It may be read by whoever knows the secret of the link."""

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks. When it returns, they are there."""

    def attach(self, peer: Hello) -> RemoteMemory:
        """Reach the memory of another engine. In any rank's process, which has no link to that engine.

        Raises:
            TransferError: it cannot be reached, or not as fast as it should be.
        """

    def close(self) -> None:
        """Nobody can attach to this rank any more, and nothing is copied any more."""


class Moves(Protocol):
    """What is copied for one fetch, on all ranks. Any thread may call it."""

    @property
    def num_moved(self) -> int:
        """Blocks, from the first on, that have arrived in all layers of all ranks."""

    @property
    def error(self) -> Exception | None:
        """Why no more will come."""

    def submit(self, move: Move) -> None:
        """Copy blocks, after those that were submitted before."""

    def cancel(self) -> None:
        """Copy no more. Does not wait. Also to be called when all has arrived: then all ranks forget it."""

    def done(self) -> bool:
        """Whether nothing is copied for it any more, and nothing will be. So it is once it was cancelled and no copy is under
        way."""


class SourceCaches(Protocol):
    """The caches of a source, as all ranks of a sink reach them."""

    num_blocks: int
    """The null block included."""

    def begin(self) -> Moves:
        """What a fetch copies from them. Of this engine's steps, only those may touch the blocks that it fills whose results have
        been read by now."""

    def close(self) -> None:
        """Reach them no more. Whatever was begun is cancelled, and is done when this returns."""


class Movers(Protocol):
    """What copies into the caches of an engine, on all of its ranks."""

    def attach(self, peer: Hello) -> SourceCaches:
        """Reach the caches of another engine, which has the same layout. Waits for all ranks. Any thread may call it.

        Raises:
            TransferError: a rank cannot.
        """

    def close(self) -> None:
        """Copy nothing more, and wait for the copies under way."""


class Inbox(Protocol):
    """The caches of a sink, as one source may write into them."""

    ranks: tuple[str, ...]
    """`Hello.ranks` for that source."""

    def close(self) -> None:
        """When this returns, the source can write nothing any more, whatever has become of it."""

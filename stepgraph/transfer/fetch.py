"""RemoteFetch: blocks that are to come from a source."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from stepgraph.transfer.base import FetchFailure, FetchState, Move, Moves
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.reference import Reference

if TYPE_CHECKING:
    from stepgraph.transfer.peer import Peer

Reason = FetchFailure | LossReason


class Pushed:
    """What the source copies for a fetch, which messages tell it to begin and to end. See `stepgraph.transfer.base.Moves`."""

    def __init__(self) -> None:
        self.num_moved = 0
        self.error: Exception | None = None
        self._is_stopped = False

    def submit(self, move: Move) -> None:
        """The source knows."""

    def cancel(self) -> None:
        """The source is told."""

    def stop(self) -> None:
        """Nobody copies for it any more: the source has said so, or cannot write here any more."""
        self._is_stopped = True

    def done(self) -> bool:
        return self._is_stopped


class RemoteFetch:
    """See `stepgraph.transfer.base.Fetch`. What changes, changes under its peer's lock.

    Args:
        reference: who has the blocks.
        first: index of the first of them among those of the prompt.
        blocks: where they go.
        keys: what they are to hold.
        count: hears of its end.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        reference: Reference,
        first: int,
        blocks: tuple[int, ...],
        keys: tuple[bytes, ...],
        count: Callable[[RemoteFetch], None],
        clock: Callable[[], float],
    ) -> None:
        assert len(blocks) == len(keys) > 0, (blocks, keys)
        self.reference, self.first, self.blocks, self.keys = reference, first, blocks, keys
        self.state = FetchState.UNDER_WAY
        self.num_blocks = 0
        self.reason: Reason | None = None
        self.peer: Peer | None = None
        self.moves: Moves | None = None
        self.num_told = 0
        """Blocks that the source has filled, from the first on, wanted here or not."""
        self.total: int | None = None
        """Blocks to come, once that is known."""
        self.num_moved = 0
        self.is_confirming = False
        """Whether the source was asked whether what has come was right."""
        self.dropped_at: float | None = None
        """When the source was told that nothing more is wanted, if it was."""
        self._count, self._clock = count, clock
        self._began_at = self.progress_at = clock()
        self._ended_at: float | None = None

    @property
    def seconds(self) -> float:
        """See `Fetch.seconds`."""
        return (self._clock() if self._ended_at is None else self._ended_at) - self._began_at

    @property
    def is_under_way(self) -> bool:
        return self.state is FetchState.UNDER_WAY

    def cancel(self) -> None:
        """See `Fetch.cancel`."""
        if self.peer is not None:
            self.peer.give_up(self, FetchFailure.CANCELLED)

    def done(self) -> bool:
        """See `Fetch.done`."""
        return not self.is_under_way and (self.moves is None or self.moves.done())

    def end(self, reason: Reason | None) -> bool:
        """Has brought what there was, or nothing, for a reason. False if it has ended before."""
        if not self.is_under_way:
            return False
        if self.moves is not None:
            self.moves.cancel()  # which has nothing to do if all is there
        self._ended_at, self.reason = self._clock(), reason
        if reason is None:
            assert self.total is not None
            self.num_blocks = self.total
        self.state = FetchState.DONE if reason is None else FetchState.FAILED
        self._count(self)
        return True

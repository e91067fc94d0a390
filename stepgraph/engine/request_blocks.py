"""The KV blocks of each request that runs: how many it needs, which it has, and what of that the device must hear."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.request import Request
from stepgraph.engine.request_table import RequestTable


class RequestBlocks:
    """Takes blocks from the pool for requests, and gives them back.

    Args:
        pool: all KV blocks.
        table: the counts of the requests that run; its `room` is kept here.
        block_size: tokens per block.
    """

    def __init__(self, pool: BlockPool, table: RequestTable, block_size: int):
        self.pool, self.block_size = pool, block_size
        self._table = table

    def count(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.block_size)

    def lacking(self, request: Request, num_tokens: int) -> int:
        """Blocks that a request lacks for so many tokens."""
        return max(0, self.count(num_tokens) - len(request.blocks))

    def enter(self, request: Request, found: Sequence[int]) -> None:
        """A request that got a slot starts from cached blocks."""
        self.pool.hold(found)
        request.blocks = list(found)
        self._set_room(request)

    def grant(self, request: Request, count: int) -> Iterable[tuple[int, int, int]]:
        """Give a request `count` more blocks; there must be so many free ones.

        Returns:
            What changes in the block table: (slot, index of the block in its line, block).
        """
        assert request.slot is not None
        deltas = self.pool.extend(request.blocks, count, request.slot)
        self._set_room(request)
        return deltas

    def take_back(self, request: Request, count: int) -> None:
        """Undo a request's last grants. The device is not to hear of them."""
        if count:
            self.pool.release(request.blocks[-count:])
            del request.blocks[-count:]
            self._set_room(request)

    def leave(self, request: Request) -> None:
        """A request gives its slot up, and all its blocks."""
        self.pool.release(request.blocks)
        request.blocks = []

    def _set_room(self, request: Request) -> None:
        assert request.slot is not None
        self._table.set_room(request.slot, len(request.blocks) * self.block_size)

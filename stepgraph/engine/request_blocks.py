"""The KV blocks of each request that runs: how many it needs, which it has, and what of that the device must hear.

Where every layer sees only a window of tokens, a request releases the blocks that have passed behind it whenever it is granted
others. Steps under way may still read them; who gets them next writes them in a later step, or in one that reads them no more. On
the host, the null block takes their places. The device is not told: no operator follows the entries of blocks before a row's
window (see `stepgraph.ops.paged_attention`), and a plan has no room for as many entries more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stepgraph.abi.slot_line import NULL_BLOCK
from stepgraph.engine.blocks import BlockPool, num_unseen
from stepgraph.engine.prefix_cache import PrefixCache
from stepgraph.engine.request import Request
from stepgraph.engine.request_table import RequestTable


class RequestBlocks:
    """Takes blocks from the pool for requests, and gives them back.

    Args:
        pool: all KV blocks.
        table: the counts of the requests that run; its `room` is kept here.
        prefixes: learns of the blocks that are released before a request leaves.
        block_size: tokens per block.
        window: tokens that one sees, its own included; 0: all before it.
    """

    def __init__(self, pool: BlockPool, table: RequestTable, prefixes: PrefixCache, block_size: int, window: int):
        self.pool, self.block_size = pool, block_size
        self._table, self._prefixes, self.window = table, prefixes, window

    def count(self, num_tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-num_tokens // self.block_size)

    def most_held(self, num_tokens: int, num_in_flight: int) -> int:
        """Blocks that a request of `num_tokens` holds at once if its steps under way have up to `num_in_flight` of them."""
        count = self.count(num_tokens)
        return min(count, self.count(self.window + num_in_flight) + 1) if self.window else count

    def needed(self, found: Sequence[int], num_tokens: int, num_in_flight: int) -> int:
        """Free blocks that a request takes which starts from `found`; the rest as in `most_held`."""
        unseen = found.count(NULL_BLOCK)
        held = found[unseen:]
        most = min(self.most_held(num_tokens, num_in_flight), self.count(num_tokens) - unseen)
        return max(0, most - len(held)) + self.pool.count_free(held)

    def lacking(self, request: Request, num_tokens: int) -> int:
        """Blocks that a request lacks for so many tokens."""
        return max(0, self.count(num_tokens) - len(request.blocks))

    def enter(self, request: Request, found: Sequence[int]) -> None:
        """A request that got a slot starts from cached blocks."""
        request.num_unseen = found.count(NULL_BLOCK)
        self.pool.hold(found[request.num_unseen :])
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

    def release_unseen(self, request: Request, start: int) -> None:
        """Release the blocks of which no token from position `start` on sees anything, where the request's next row starts."""
        num_blocks = num_unseen(start, self.window, self.block_size)
        if num_blocks > request.num_unseen:
            num_blocks = self._prefixes.give_up(request, num_blocks)
            unseen = slice(request.num_unseen, num_blocks)
            self.pool.release(request.blocks[unseen])
            request.blocks[unseen] = [NULL_BLOCK] * len(request.blocks[unseen])
            request.num_unseen = max(request.num_unseen, num_blocks)

    def take_back(self, request: Request, count: int) -> None:
        """Undo a request's last grants. The device is not to hear of them."""
        if count:
            self.pool.release(request.blocks[-count:])
            del request.blocks[-count:]
            self._set_room(request)

    def leave(self, request: Request) -> None:
        """A request gives its slot up, and all its blocks."""
        self.pool.release(request.blocks[request.num_unseen :])
        request.blocks, request.num_unseen = [], 0

    def _set_room(self, request: Request) -> None:
        assert request.slot is not None
        self._table.set_room(request.slot, len(request.blocks) * self.block_size)

"""The KV blocks of each request that runs: how many it needs, which it has, and what of that the device must hear.

Of block groups whose layers see only a window of tokens, a request releases the blocks that have passed behind it whenever it is
granted others. Steps under way may still read them; who gets them next writes them in a later step, or in one that reads them no
more. On the host, the null block takes their places. The device is not told: no operator follows the entries of blocks before a
row's window (see `stepgraph.ops.paged_attention`), and a plan has no room for as many entries more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import numpy.typing as npt

from stepgraph.abi.block_groups import BlockGroups
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
        groups: that a request has blocks of for each place.
    """

    def __init__(
        self, pool: BlockPool, table: RequestTable, prefixes: PrefixCache, block_size: int, groups: BlockGroups
    ):
        self.pool, self.block_size = pool, block_size
        self._table, self._prefixes, self._groups, self._size = table, prefixes, groups, groups.size
        self.window = groups.window
        """Of the groups whose blocks are released; 0: there are none."""

    @property
    def num_grantable(self) -> int:
        """Places that there are free blocks for."""
        return self.pool.num_free // self._size

    def count(self, num_tokens: int) -> int:
        """Places for so many tokens."""
        return -(-num_tokens // self.block_size)

    def num_tokens(self, blocks: Sequence[int]) -> int:
        """Tokens that blocks of all groups hold."""
        return len(blocks) // self._size * self.block_size

    def most_held(self, num_tokens: int, num_in_flight: int) -> int:
        """See `BlockGroups.most_held`."""
        return self._groups.most_held(num_tokens, num_in_flight, self.block_size)

    def needed(self, found: Sequence[int], num_tokens: int, num_in_flight: int) -> int:
        """Free blocks that a request takes which starts from `found`; the rest as in `most_held`."""
        groups, count, num_found = self._groups, self.count(num_tokens), len(found) // self._size
        unseen = self._num_unseen(found)
        seen = min(groups.most_seen(count, num_in_flight, self.block_size), count - unseen)
        return (
            max(0, count - num_found) * groups.num_full
            + max(0, seen - (num_found - unseen)) * groups.num_windowed
            + self.pool.count_free(found)
        )

    def lacking(self, request: Request, num_tokens: int) -> int:
        """Places that a request lacks for so many tokens."""
        return max(0, self.count(num_tokens) - len(request.blocks) // self._size)

    def num_beyond(self, request: Request, num_tokens: int) -> int:
        """Blocks of a request beyond those of so many tokens; there are no fewer."""
        return len(request.blocks) - self.count(num_tokens) * self._size

    def enter(self, request: Request, found: Sequence[int]) -> None:
        """A request that got a slot starts from cached blocks."""
        request.num_unseen = self._num_unseen(found)
        self.pool.hold([block for block in found if block] if request.num_unseen else found)
        request.blocks = list(found)
        self._set_room(request)

    def grant(self, request: Request, count: int) -> Iterable[tuple[int, int, int]]:
        """Give a request the blocks of `count` more places; there must be so many free ones.

        Returns:
            What is new in its list: (slot, index, block).
        """
        assert request.slot is not None
        deltas = self.pool.extend(request.blocks, count * self._size, request.slot)
        self._set_room(request)
        return deltas

    def grant_lacking(
        self, requests: Sequence[Request], num_lacking_R: npt.NDArray[np.int64]
    ) -> list[tuple[int, int, int]] | None:
        """Give R requests that decode the blocks for so many tokens more; a number below 1 is none.

        Returns:
            What is new in their lists, as `grant` does. None if there are not enough free blocks; nothing has changed then.
        """
        rows_N = (num_lacking_R > 0).nonzero()[0]
        num_places_N = -(-num_lacking_R[rows_N] // self.block_size)
        requests = [requests[row] for row in rows_N.repeat(num_places_N).tolist()]  # each as often as it gets a place
        if len(requests) > self.num_grantable:
            return None
        if self.window:
            for request in requests:
                assert request.slot is not None
                self.release_unseen(request, self._table.planned[request.slot])
        deltas: list[tuple[int, int, int]] = []
        taken, room = iter(self.pool.take(len(requests) * self._size)), self._table.room
        for request in requests:
            slot, blocks = request.slot, request.blocks
            assert slot is not None
            for block in islice(taken, self._size):
                deltas.append((slot, len(blocks), block))
                blocks.append(block)
            room[slot] += self.block_size
        return deltas

    def release_unseen(self, request: Request, start: int) -> None:
        """Release the blocks of which no token from position `start` on sees anything, where the request's next row starts."""
        num_places = num_unseen(start, self.window, self.block_size)
        if num_places > request.num_unseen:
            num_places = self._prefixes.give_up(request, num_places)
            blocks, size, num_full = request.blocks, self._size, self._groups.num_full
            unseen = [
                index
                for first in range(request.num_unseen * size, num_places * size, size)
                for index in range(first + num_full, first + size)
            ]
            self.pool.release([blocks[index] for index in unseen])
            for index in unseen:
                blocks[index] = NULL_BLOCK
            request.num_unseen = max(request.num_unseen, num_places)

    def take_back(self, request: Request, count: int) -> None:
        """Undo a request's last grants, of so many blocks. The device is not to hear of them."""
        if count:
            self.pool.release(request.blocks[-count:])
            del request.blocks[-count:]
            self._set_room(request)

    def leave(self, request: Request) -> None:
        """A request gives its slot up, and all its blocks."""
        self.pool.release([block for block in request.blocks if block] if request.num_unseen else request.blocks)
        request.blocks, request.num_unseen = [], 0

    def _set_room(self, request: Request) -> None:
        assert request.slot is not None
        self._table.set_room(request.slot, self.num_tokens(request.blocks))

    def _num_unseen(self, found: Sequence[int]) -> int:
        """See `Request.num_unseen`, of a request that starts from `found`."""
        return found.count(NULL_BLOCK) // self._groups.num_windowed if self.window else 0

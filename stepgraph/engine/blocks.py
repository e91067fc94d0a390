"""The KV blocks of the paged cache: who holds them, and which of them hold a prefix that a later request can reuse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

from stepgraph.step import slot_line


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """Name of a full block's content: its tokens, those after it that its content depends on, and everything before.

    Args:
        parent: key of the block before it; for the first one `root_key`.
        tokens: the block's token ids as int32, and as many more as a drafter looks ahead.
    """
    return hashlib.sha256(parent + tokens).digest()


def root_key(salt: str | None) -> bytes:
    """What a chain of keys starts from. Requests with different salts never share a block: a salted chain starts from bytes of
    another length than any key or block, so that no choice of salt and tokens can imitate another chain."""
    return b"" if salt is None else b"salt" + hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


class BlockPool:
    """Reference-counted KV blocks with a prefix cache. Block 0 is the null block and is never handed out.

    A block without holders keeps its content until it is handed out again, least recently released first, so a cached prefix
    lives as long as memory allows and never stands in the way of a request.

    Args:
        num_blocks: the null block included.
    """

    def __init__(self, num_blocks: int):
        self.num_usable = num_blocks - 1
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(slot_line.NULL_BLOCK + 1, num_blocks))
        self._holders = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks_by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, those with cached content included."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Blocks for new content, held once. There must be so many free ones."""
        assert count <= len(self._free), (count, len(self._free))
        blocks = list(islice(self._free, count))
        for block in blocks:
            del self._free[block]
            key = self._keys[block]
            if key is not None:
                del self._blocks_by_key[key]
                self._keys[block] = None
            self._holders[block] = 1
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Let `block`, which somebody holds, be found by `key`. If another block has that content already, it stays the one."""
        assert self._holders[block] > 0, block
        assert self._keys[block] is None, block
        if key not in self._blocks_by_key:
            self._keys[block] = key
            self._blocks_by_key[key] = block

    def find(self, key: bytes) -> int | None:
        """The block with the content of that name, not yet held; None if there is none."""
        return self._blocks_by_key.get(key)

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` nobody holds: holding those takes them from the free ones."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that were found."""
        for block in blocks:
            if not self._holders[block]:
                del self._free[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a holder. The last block of a chain is reused first: without it the blocks before it are still a prefix."""
        holders, keys, free = self._holders, self._keys, self._free
        for block in reversed(blocks):
            num_left = holders[block] - 1
            assert num_left >= 0, block
            holders[block] = num_left
            if not num_left:
                free[block] = None
                if keys[block] is None:
                    free.move_to_end(block, last=False)

    def forget(self) -> None:
        """Drop all cached content; nobody may hold a block. For when the cache's memory or the weights change."""
        assert len(self._free) == self.num_usable, (len(self._free), self.num_usable)
        self._keys = [None] * len(self._keys)
        self._blocks_by_key.clear()

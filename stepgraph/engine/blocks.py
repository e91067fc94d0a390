"""The KV blocks of the paged cache: who holds them, and which of them hold a prefix that a later request can reuse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import repeat

from stepgraph.abi import slot_line


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


def memory_key(salt: str | None, secret: bytes) -> int:
    """The `SlotSampling.memory_key` of requests with a salt: 64 bits that nobody without the secret can aim at; 0 without one."""
    return (
        0 if salt is None else int.from_bytes(hashlib.blake2b(root_key(salt), key=secret, digest_size=8).digest()) or 1
    )


class BlockPool:
    """Reference-counted KV blocks with a prefix cache. Block 0 is the null block and is never handed out.

    A block without holders keeps its content until it is handed out again, least recently released first, so a cached prefix
    lives as long as memory allows and never stands in the way of a request.

    Args:
        num_blocks: the null block included.
    """

    def __init__(self, num_blocks: int):
        self.num_usable = num_blocks - 1
        # Free and without content; the next one last.
        self._empty = list(range(num_blocks - 1, slot_line.NULL_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # free and with content; the least recently released first
        self._holders = [1] * num_blocks  # of blocks with a key, which alone can be shared
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks_by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, those with cached content included."""
        return len(self._empty) + len(self._cached)

    def extend(self, blocks: list[int], count: int, slot: int) -> Iterator[tuple[int, int, int]]:
        """Add `count` blocks for new content, held once, to those of a slot. There must be so many free ones.

        Returns:
            What changes in the block table: (slot, index of the block in its line, block).
        """
        assert count <= self.num_free, (count, self.num_free)
        first = len(blocks)
        blocks += self._empty[: -count - 1 : -1]
        del self._empty[len(self._empty) - (len(blocks) - first) :]
        while len(blocks) < first + count:
            block, _ = self._cached.popitem(last=False)
            key, self._keys[block] = self._keys[block], None
            assert key is not None, block
            del self._blocks_by_key[key]
            self._holders[block] = 1
            blocks.append(block)
        return zip(repeat(slot), range(first, first + count), blocks[first:], strict=False)

    def publish(self, block: int, key: bytes) -> None:
        """Let `block`, which somebody holds, be found by `key`. If another block has that content already, it stays the one."""
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
                del self._cached[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a holder. The last block of a chain is reused first: without it the blocks before it are still a prefix."""
        keys, empty = self._keys, self._empty
        for block in reversed(blocks):
            if keys[block] is None:
                empty.append(block)
                continue
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if not self._holders[block]:
                self._cached[block] = None
        assert self.num_free <= self.num_usable, blocks

    def forget(self) -> None:
        """Drop all cached content; nobody may hold a block. For when the cache's memory or the weights change."""
        assert self.num_free == self.num_usable, (self.num_free, self.num_usable)
        self.forget_free()

    def forget_free(self) -> int:
        """Drop the cached content of blocks that nobody holds; returns how many others can still be found."""
        for block in self._cached:
            key, self._keys[block] = self._keys[block], None
            assert key is not None, block
            del self._blocks_by_key[key]
            self._holders[block] = 1
        self._empty += reversed(self._cached)
        self._cached.clear()
        return len(self._blocks_by_key)

"""The KV blocks of the paged cache: who holds them, and which of them hold a prefix that a later request can reuse."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Protocol

from stepgraph.abi import slot_line
from stepgraph.engine.kv_events import KVEvents

_KEY_BYTES = 32


def block_key(parent: bytes, tokens: bytes) -> bytes:
    """Name of a full block's content: its tokens, those after it that its content depends on, and everything before.

    Args:
        parent: key of the block before it; for the first one `root_key`.
        tokens: the block's token ids as int32, and as many more as a drafter looks ahead.
    """
    return hashlib.sha256(parent + tokens).digest()


def numbered_key(key: bytes, number: int) -> bytes:
    """By what a block is found that has that number among those of a place, whose content has that name."""
    return key + bytes((number,)) if number else key


def root_key(salt: str | None, adapter: bytes | None = None) -> bytes:
    """What a chain of keys starts from. Requests with different salts, or different LoRA adapters, never share a block. Chains
    with neither, with a salt, with an adapter and with both start from bytes of four lengths, none of which a key has, and blocks
    are all of one length: so no choice of salt and tokens can imitate another chain.

    Args:
        salt: any text; None: no salt.
        adapter: digest of the adapter's files, of 32 bytes; None: no adapter.
    """
    root = b"" if adapter is None else b"adapter" + adapter
    return root if salt is None else root + b"salt" + hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()


def memory_key(salt: str | None, secret: bytes) -> int:
    """The `SlotSampling.memory_key` of requests with a salt: 64 bits that nobody without the secret can aim at; 0 without one."""
    return (
        0 if salt is None else int.from_bytes(hashlib.blake2b(root_key(salt), key=secret, digest_size=8).digest()) or 1
    )


def num_unseen(position: int, window: int, block_size: int) -> int:
    """Blocks, from the first on, of which neither the token at `position` nor a later one sees anything. A token sees the last
    `window` ones, its own included; 0: all."""
    return max(0, position - window + 1) // block_size if window else 0


class Fence(Protocol):
    """Work that may touch KV blocks after their holders have released them, and that the device's stream of steps does not order
    before what comes next: a transfer that was given up and may still read or write, for one."""

    def done(self) -> bool:
        """Whether it can touch them no more. Once it is, it stays so."""
        ...


class BlockPool:
    """Reference-counted KV blocks with a prefix cache. Block 0 is the null block and is never handed out.

    A block returns to the pool when its last holder has released it and every fence on it is done. Until then it is quarantined:
    not free, and never handed out for new content; what it holds can still be found.

    Steps need no fence among themselves: they run on one stream, so that a step of a block's next holder, planned after the
    release, touches the block after every step that was planned before. That orders nothing else. Whoever reads or writes blocks
    beside the stream holds them meanwhile, starts after the steps planned by then, and, if it lets go of them before it is
    sure to have ended, releases them with a fence.

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
        self._holders = [1] * num_blocks  # of an empty block that of the holder to come: handing it out changes nothing
        self._keys: list[bytes | None] = [None] * num_blocks
        self._blocks_by_key: dict[bytes, int] = {}
        self._fenced: dict[Fence, list[int]] = {}  # the fences not known to be done, and their blocks
        self._num_fences: dict[int, int] = {}  # of blocks that have any
        self._quarantined: set[int] = set()  # without holders
        self._cached_lately: dict[int, None] | None = None  # if somebody watches
        self.events: KVEvents | None = None
        """Hears of content that cannot be found any more; whoever tells of it sets it."""

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, those with cached content included."""
        return len(self._empty) + len(self._cached)

    @property
    def num_quarantined(self) -> int:
        """Blocks that nobody holds and that wait for their fences."""
        return len(self._quarantined)

    def extend(self, blocks: list[int], count: int, slot: int) -> Iterator[tuple[int, int, int]]:
        """Add `count` blocks for new content, held once, to those of a slot. There must be so many free ones.

        Returns:
            What changes in the block table: (slot, index of the block in its line, block).
        """
        first, taken = len(blocks), self.take(count)
        blocks += taken
        return zip(repeat(slot), range(first, first + count), taken, strict=False)

    def take(self, count: int) -> list[int]:
        """Blocks for new content, held once. There must be so many free ones. Steps under way may still read them."""
        assert count <= self.num_free, (count, self.num_free)
        taken = self._empty[: -count - 1 : -1]
        del self._empty[len(self._empty) - len(taken) :]
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        return taken

    def _evict(self, count: int) -> list[int]:
        """The blocks with content that nobody holds and that were released least recently; now held once."""
        blocks = [self._cached.popitem(last=False)[0] for _ in range(count)]
        keys = [key for block in blocks if (key := self._forget_key(block)) is not None]
        for block in blocks:
            self._holders[block] = 1
        if self.events is not None and keys:
            self.events.removed(keys)
        return blocks

    def publish(self, block: int, key: bytes) -> bool:
        """Let `block`, which somebody holds, be found by `key`. False if another block has that content already, which stays the
        one."""
        assert self._keys[block] is None, block
        if key in self._blocks_by_key:
            return False
        self._keys[block] = key
        self._blocks_by_key[key] = block
        return True

    def find(self, key: bytes) -> int | None:
        """The block with the content of that name, not yet held; None if there is none."""
        return self._blocks_by_key.get(key)

    def key_of(self, block: int) -> bytes | None:
        """By what a block can be found; None if it cannot."""
        return self._keys[block]

    def watch_cached(self) -> dict[int, None]:
        """Blocks that lose their last holder and can be found, in this order, from now on; the caller takes out what it has
        seen."""
        self._cached_lately = {}
        return self._cached_lately

    def count_free(self, blocks: Sequence[int]) -> int:
        """How many of `blocks`, which were found, are free: holding those takes them from the free ones."""
        return sum(block in self._cached for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Add a holder to blocks that somebody holds, or that were found."""
        for block in blocks:
            if not self._holders[block]:
                if block in self._quarantined:
                    self._quarantined.remove(block)
                else:
                    del self._cached[block]
            self._holders[block] += 1

    def release(self, blocks: Sequence[int], fence: Fence | None = None) -> None:
        """Drop a holder. The last block of a chain is reused first: without it the blocks before it are still a prefix.

        Args:
            blocks: any that are held.
            fence: what may still touch them, beside steps.
        """
        if fence is not None and blocks:
            self._fenced.setdefault(fence, []).extend(reversed(blocks))
            for block in blocks:
                self._num_fences[block] = self._num_fences.get(block, 0) + 1
        holders, keys, empty, fences = self._holders, self._keys, self._empty, self._num_fences
        for block in reversed(blocks):
            if holders[block] != 1:
                holders[block] -= 1
                assert holders[block] > 0, block
            elif fences and block in fences:
                holders[block] = 0
                self._quarantined.add(block)
            elif keys[block] is None:
                empty.append(block)
            else:
                holders[block] = 0
                self._cached[block] = None
                if self._cached_lately is not None:
                    self._cached_lately[block] = None
        assert self.num_free <= self.num_usable, blocks

    def reclaim(self) -> None:
        """Take back the quarantined blocks whose fences are done."""
        for fence in [fence for fence in self._fenced if fence.done()]:
            for block in self._fenced.pop(fence):
                self._num_fences[block] -= 1
                if not self._num_fences[block]:
                    del self._num_fences[block]
                    if block in self._quarantined:
                        self._quarantined.remove(block)
                        self._holders[block] = 1
                        self.release((block,))

    def forget(self) -> None:
        """Drop all cached content; nobody may hold a block. For when the cache's memory or the weights change."""
        assert self.num_free + self.num_quarantined == self.num_usable, (self.num_free, self.num_usable)
        self.forget_free()

    def forget_free(self) -> int:
        """Drop the cached content of blocks that nobody holds; returns how many others can still be found."""
        gone = [self._forget_key(block) for block in (*self._cached, *self._quarantined)]
        for block in self._cached:
            self._holders[block] = 1
        self._empty += reversed(self._cached)
        self._cached.clear()
        if self.events is not None:
            if not self._blocks_by_key:
                self.events.cleared()
            elif keys := [key for key in gone if key is not None]:
                self.events.removed(keys)
        return len(self._blocks_by_key)

    def _forget_key(self, block: int) -> bytes | None:
        """Let a block be found no more; returns by what it could, if it is the first of a place: others hear of those."""
        key, self._keys[block] = self._keys[block], None
        if key is None:
            return None
        del self._blocks_by_key[key]
        return key if len(key) == _KEY_BYTES else None

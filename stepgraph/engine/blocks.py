"""The KV blocks of the paged cache."""

from __future__ import annotations

from stepgraph.ops import slot_line


class BlockAllocator:
    """Hands out KV blocks. Block 0 is the null block, where padding points, and is never handed out.

    A request reserves at admission all it can ever need and takes blocks from its reservation as it grows, so a running
    request never waits for memory.
    """

    def __init__(self, num_blocks: int):
        self._free = list(range(num_blocks - 1, slot_line.NULL_BLOCK, -1))
        self._reserved = 0
        self.num_usable = num_blocks - 1

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, reserved ones included."""
        return len(self._free)

    def can_reserve(self, count: int) -> bool:
        return self._reserved + count <= self.num_usable

    def reserve(self, count: int) -> None:
        assert self.can_reserve(count), (count, self._reserved, self.num_usable)
        self._reserved += count

    def take(self) -> int:
        """One block of a reservation."""
        return self._free.pop()

    def release(self, blocks: list[int], reserved: int) -> None:
        """Give back a request's blocks and its reservation."""
        self._free.extend(reversed(blocks))
        self._reserved -= reserved
        assert self._reserved >= 0, self._reserved
        assert len(self._free) <= self.num_usable, (len(self._free), self.num_usable)

"""How layers that keep blocks of tokens are grouped, as host and device count blocks.

Layers of a group share a block table. A block is of one group at a time, and one of any group takes the same memory, so all come
from one pool. A *place* is a run of `block_size` positions of a request, for which each group has a block of its own, or several
that share the positions evenly, if its layers keep more bytes of a token than those of others. Block b of place p is number
``p · size + b`` of a request's list; those of a group follow each other.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockGroups:
    """The blocks of a place, in the order of the groups of a model and its drafter: first those that a request keeps."""

    num_full: int = 1
    """Blocks of groups with layers that see all tokens."""
    num_windowed: int = 0
    """Blocks of groups all of whose layers see a window of tokens."""
    window: int = 0
    """Of these, the last positions, the first of a step's own included, whose blocks the step may read; 0 without such groups."""

    def __post_init__(self) -> None:
        assert self.num_full + self.num_windowed > 0, self
        assert (self.window > 0) == (self.num_windowed > 0), self

    @classmethod
    def one(cls, reach: int) -> BlockGroups:
        """All layers in one group, where a token sees the last `reach` ones, its own included; 0: all."""
        return cls(0, 1, reach) if reach else cls()

    @property
    def size(self) -> int:
        """Blocks of a place."""
        return self.num_full + self.num_windowed

    def num_blocks(self, num_kv_blocks: int) -> int:
        """Blocks of the pool, the null block included, where there is memory for `num_kv_blocks` of all layers."""
        return (num_kv_blocks - 1) * self.size + 1

    def most_held(self, num_tokens: int, num_in_flight: int, block_size: int) -> int:
        """Blocks that a request of `num_tokens` holds at once if its steps under way have up to `num_in_flight` of them."""
        num_places = -(-num_tokens // block_size)
        return num_places * self.num_full + self.most_seen(num_places, num_in_flight, block_size) * self.num_windowed

    def most_seen(self, num_places: int, num_in_flight: int, block_size: int) -> int:
        """Of so many places, those whose windowed blocks a request holds at once, likewise."""
        return min(num_places, -(-(self.window + num_in_flight) // block_size) + 1) if self.num_windowed else num_places

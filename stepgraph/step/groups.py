"""Which layers share a block table, and where each finds its part of a block.

Layers that see all tokens need every block of a request, layers with a window those of its last tokens. In one group, every layer
keeps what any of them needs. So where a model has both, they are put into groups of equally many layers, each of one sort: a
block then has as many parts as a group has layers, and the k-th layers of all groups share the tensors of part k, in which every
block is of one group at a time. All blocks come from one pool: what a long prompt needs for a few layers and what many short
ones need for all is one number, and nothing has to be divided between them at start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.layers.cache import CacheSpec, PagedSpec

MAX_GROUPS = 8
"""Each has a block table, and takes a share of the plan and of the host's work."""
LEAST_SAVING = 0.1
"""Of the bytes of two tokens, one that is in all windows and one that is in none: with less, one group is simpler."""


class Home(NamedTuple):
    """Where a layer's entries are."""

    group: int
    part: int
    """Of a block."""


class Arrangement(NamedTuple):
    """The groups, and where each layer is that has a cache of its own."""

    groups: BlockGroups
    homes: dict[int, Home]
    """By the layer's index."""

    @property
    def num_parts(self) -> int:
        """Of a block."""
        return 1 + max((home.part for home in self.homes.values()), default=-1)


def arrange(specs: Sequence[CacheSpec], num_model: int, lookahead: int, block_size: int, longest: int) -> Arrangement:
    """Group layers.

    Args:
        specs: of the model's layers, then of the drafter's.
        num_model: how many are the model's. A drafter's are to be in one group, since its modules find their entries by one
            table: where they are not, all layers are.
        lookahead: of the drafter.
        block_size: tokens per block.
        longest: tokens of a request; if no window ends before it, all layers are in one group. 0 has that effect too.
    """
    reaches: dict[int, int] = {}  # of the layers that own blocks, and of those that use theirs too; 0: all tokens
    for index, spec in enumerate(specs):
        if spec.reach is not None:
            owner = _owner(specs, index)
            reaches[owner] = _wider(reaches.get(owner, spec.reach), spec.reach)
    window = max(reaches.values(), default=0)
    # Of several draft modules, the k-th runs from k - 1 positions before the step's own on.
    window += max(0, lookahead - 1) if window else 0
    by_reach = [[owner for owner, reach in reaches.items() if (reach > 0) == windowed] for windowed in (False, True)]
    size = _group_size(*map(len, by_reach)) if window < longest and _are_alike(specs, reaches, block_size) else 0
    if size:
        full, windowed = ([owners[i : i + size] for i in range(0, len(owners), size)] for owners in by_reach)
        if sum(owners[-1] >= num_model for owners in (*full, *windowed)) <= 1:
            homes = {
                owner: Home(group, part)
                for group, owners in enumerate((*full, *windowed))
                for part, owner in enumerate(owners)
            }
            return Arrangement(BlockGroups(len(full), len(windowed), window), homes)
    owners = [index for index, spec in enumerate(specs) if spec.shares is None]
    reach = window if reaches and all(reaches.values()) else 0
    return Arrangement(BlockGroups.one(reach), {owner: Home(0, part) for part, owner in enumerate(owners)})


def _owner(specs: Sequence[CacheSpec], index: int) -> int:
    """The layer whose cache a layer uses."""
    shares = specs[index].shares
    return index if shares is None else _owner(specs, shares)


def _wider(reach: int, other: int) -> int:
    return max(reach, other) if reach and other else 0


def _are_alike(specs: Sequence[CacheSpec], owners: Iterable[int], block_size: int) -> bool:
    """Whether a block's part may be of any of the layers, and none keeps anything beside blocks."""
    if not all(isinstance(spec, PagedSpec) for spec in specs):
        return False
    return len({specs[owner].per_block(block_size) for owner in owners}) == 1


def _group_size(num_full: int, num_windowed: int) -> int:
    """Layers of a group, of which the last one of a sort may lack some; 0 where one group is no worse."""
    num_layers = num_full + num_windowed
    best, least = 0, 2 * (1 - LEAST_SAVING)
    for size in range(max(num_full, num_windowed), 0, -1) if num_full and num_windowed else ():
        full, windowed = -(-num_full // size), -(-num_windowed // size)
        # Beside what one group takes: bytes of a token that windows have passed, and of one in all windows.
        cost = (full + full + windowed) * size / num_layers
        if full + windowed <= MAX_GROUPS and cost < least:
            best, least = size, cost
    return best

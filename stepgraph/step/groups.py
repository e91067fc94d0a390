"""Which layers share a block table, and where each finds its part of a block.

Layers that see all tokens need every block of a request, layers with a window those of its last tokens. In one group, every layer
keeps what any of them needs. So where a model has both, they are put into groups of equally many layers, each of one sort: a
block then has as many parts as a group has layers, and the k-th layers of all groups share the tensors of part k, in which every
block is of one group at a time. All blocks come from one pool: what a long prompt needs for a few layers and what many short
ones need for all is one number, and nothing has to be divided between them at start.

A block takes the same memory in every group. Layers that keep twice as many bytes of a token as others (Gemma 4's, whose heads
differ in number and size) have blocks of half as many tokens: the same bytes, seen as another shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.layers.cache import CacheSpec, PagedSpec

MAX_GROUPS = 8
"""Each has a block table, and takes a share of the plan and of the host's work."""
SPLITS = (1, 2, 4)
"""In how many blocks a group may have the tokens of a place. Each is granted and found by itself."""
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
    splits: tuple[int, ...]
    """Of each group, the blocks of a place."""
    homes: dict[int, Home]
    """By the layer's index."""

    @property
    def num_parts(self) -> int:
        """Of a block."""
        return 1 + max((home.part for home in self.homes.values()), default=-1)


class _Sort(NamedTuple):
    """Of layers that may be in one group. Those that see all tokens come first."""

    windowed: bool
    split: int
    """Blocks of a place."""


def arrange(specs: Sequence[CacheSpec], num_model: int, lookahead: int, block_size: int, longest: int) -> Arrangement:
    """Group layers.

    Args:
        specs: of the model's layers, then of the drafter's.
        num_model: how many are the model's. A drafter's are to be in one group, since its modules find their entries by one
            table: where they are not, all layers are.
        lookahead: of the drafter.
        block_size: tokens of a place.
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
    sorts: dict[_Sort, list[int]] = {}
    for owner, split in _splits(specs, reaches, block_size).items() if window < longest else ():
        sorts.setdefault(_Sort(reaches[owner] > 0, split), []).append(owner)
    if size := _group_size({sort: len(owners) for sort, owners in sorts.items()}):
        groups = [
            (sort, owners[i : i + size]) for sort, owners in sorted(sorts.items()) for i in range(0, len(owners), size)
        ]
        if sum(owners[-1] >= num_model for _, owners in groups) <= 1:
            num_full, num_windowed = (
                sum(sort.split for sort, _ in groups if sort.windowed == windowed) for windowed in (False, True)
            )
            homes = {
                owner: Home(group, part)
                for group, (_, owners) in enumerate(groups)
                for part, owner in enumerate(owners)
            }
            splits = tuple(sort.split for sort, _ in groups)
            return Arrangement(BlockGroups(num_full, num_windowed, window), splits, homes)
    owners = [index for index, spec in enumerate(specs) if spec.shares is None]
    reach = window if reaches and all(reaches.values()) else 0
    return Arrangement(BlockGroups.one(reach), (1,), {owner: Home(0, part) for part, owner in enumerate(owners)})


def _owner(specs: Sequence[CacheSpec], index: int) -> int:
    """The layer whose cache a layer uses."""
    shares = specs[index].shares
    return index if shares is None else _owner(specs, shares)


def _wider(reach: int, other: int) -> int:
    return max(reach, other) if reach and other else 0


def _splits(specs: Sequence[CacheSpec], owners: Iterable[int], block_size: int) -> dict[int, int]:
    """How many blocks of a place each layer has, so that all take the same memory; empty where no such numbers will do, or where
    anything is kept beside blocks."""
    if not all(isinstance(spec, PagedSpec) for spec in specs):
        return {}
    items = {owner: specs[owner].per_block(block_size) for owner in owners}
    least = min(items.values(), key=lambda of_layer: sum(item.num_bytes for item in of_layer), default=())
    splits = {}
    for owner, of_layer in items.items():
        ratios = {item.num_bytes / other.num_bytes for item, other in zip(of_layer, least, strict=True)}
        dtypes = {item.dtype for item in (*of_layer, *least)}
        split = next((split for split in SPLITS if ratios == {split}), 0)
        if not split or block_size % split or len(dtypes) > 1:
            return {}
        splits[owner] = split
    return splits


def _group_size(numbers: Mapping[_Sort, int]) -> int:
    """Layers of a group, of which the last one of a sort may lack some; 0 where one group is no worse.

    Args:
        numbers: of the layers of each sort.
    """
    best, least = 0, 2 * (1 - LEAST_SAVING)
    num_layers = sum(sort.split * number for sort, number in numbers.items())  # a layer of two blocks counts as two
    for size in range(max(numbers.values()), 0, -1) if len({sort.windowed for sort in numbers}) == 2 else ():
        groups = {sort: -(-number // size) for sort, number in numbers.items()}
        # Beside what one group takes: bytes of a token that windows have passed, and of one in all windows.
        blocks = sum(sort.split * number * (1 if sort.windowed else 2) for sort, number in groups.items())
        cost = blocks * size / num_layers
        if sum(groups.values()) <= MAX_GROUPS and cost < least:
            best, least = size, cost
    return best

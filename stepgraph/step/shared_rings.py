"""Output rings of ranks that have requests of their own: each rank's device writes one, and the leader reads them all."""

from __future__ import annotations

from math import prod

import torch

from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.shard import Shard
from stepgraph.parallel.shared_memory import map_shared
from stepgraph.platforms.shared_memory import pin
from stepgraph.step.output_rings import OutputRings, ring_sizes
from stepgraph.step.shape import StepShape

_PAGE = 1 << 14
"""Bytes; a multiple of every system's pages, which devices map one by one."""


class SharedRings:
    """Memory of the host that all ranks have. All call it, before any graph is captured.

    Args:
        max_shape: the largest step.
        shard: this rank's place among them.
        exchange: of the ranks.
        device: of this rank.

    Raises:
        StepgraphError: there is no room for it, the device cannot reach it, or another rank failed.
    """

    def __init__(self, max_shape: StepShape, shard: Shard, exchange: Exchange, device: torch.device) -> None:
        sizes = ring_sizes(max_shape)
        part_bytes = -(-4 * sum(map(prod, sizes)) // _PAGE) * _PAGE
        memory = map_shared(shard, exchange, shard.size * part_bytes)
        parts = torch.frombuffer(memory, dtype=torch.int32).view(shard.size, -1)  # keeps the mapping
        self.of_ranks = tuple(
            OutputRings(
                *(
                    flat.view(size)
                    for flat, size in zip(part[: sum(map(prod, sizes))].split([*map(prod, sizes)]), sizes, strict=True)
                )
            )
            for part in parts
        )
        """Of each rank."""
        self.close = pin(self, parts[shard.rank], device)
        """Takes the memory from the device, which is done with it; so does the end of this object."""

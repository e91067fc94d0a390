"""How a layer keeps its weight, if not as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """A weight of `width` inputs in a file's own blocks: [outputs, bytes of a row] uint8. See `stepgraph.ops.packed`."""

    format: str  # a key of `ops.packed.BLOCK_BYTES`
    width: int
    exact: bool  # products never round their operands

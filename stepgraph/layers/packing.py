"""How a layer keeps its weight, if not as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Packing:
    """A weight of `width` inputs in blocks as in GGUF files: [outputs, bytes of a row] uint8. See `stepgraph.ops.packed`."""

    format: str  # a key of `ops.packed.BLOCK_BYTES`
    width: int
    exact_tokens: int | None  # products of more tokens may round their operands; None: none may
    takes_values: bool = False  # it can be filled with numbers, which are rounded; else with such blocks only

"""Low-rank updates of a model's projections, an adapter for each token.

Shapes: T tokens, R rows, I inputs, O outputs, N adapters counted from 1, r rank, P merged projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.abi import slot_line
from stepgraph.ops import StepTokens


@dataclass(frozen=True)
class LoRA:
    """Buffers of one projection's updates, at addresses that are fixed for the engine's life."""

    a: Tensor  # [N + 1, P·r, I]
    b: Tensor  # [N + 1, O, r], scaled; zero beyond an adapter's own rank
    parts: tuple[int, ...]  # outputs of each merged projection
    index: Tensor  # [most tokens of a step] int32, adapter of each token or 0; one for all projections

    def update(self, x_TI: Tensor, out_TO: Tensor, *, deterministic: bool) -> None:
        """Add to `out_TO`, the projection of `x_TI`, what each token's adapter adds. May run inside a graph."""
        index_T = self.index[: x_TI.shape[0]]
        ops.lora(x_TI, self.a, self.b, index_T, self.parts, out_TO, deterministic=deterministic)


def token_adapters(tokens: StepTokens, lines: Tensor) -> Tensor:
    """The adapter of each token of a step: [T] int32, 0 for padding. May run inside a graph.

    Args:
        tokens: of the step.
        lines: [slots, LINE_WIDTH], see `stepgraph.abi.slot_line`.
    """
    token_T = torch.arange(tokens.token_ids.shape[0], dtype=torch.int32, device=lines.device)
    row_T = torch.searchsorted(tokens.query_start[1:], token_T, right=True, out_int32=True)
    inside_T = row_T < tokens.row_slot.shape[0]
    adapter_R = lines.select(1, slot_line.ADAPTER).index_select(0, tokens.row_slot)
    return adapter_R.index_select(0, row_T * inside_T) * inside_T

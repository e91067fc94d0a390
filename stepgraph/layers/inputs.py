"""What a model sees of a step. Nothing else about the batch exists for it: no phase, no global context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from stepgraph.ops import AttentionGeometry, AttentionPlan, StepTokens


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors, built on the device inside the graph."""

    tokens: StepTokens
    attention_plans: dict[int, AttentionPlan]  # by the sliding window of the layers that use it; 0: full attention
    geometry: AttentionGeometry
    block_table: Tensor  # [slots, max blocks] int32
    kv_caches: tuple[tuple[Tensor, Tensor], ...]  # per layer: keys, values, each [blocks, block_size, G, D]

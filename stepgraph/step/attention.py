"""Which sizes the attention of a step gets, for each kind of attention that its layers have."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch

from stepgraph import ops
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.platforms import Platform
from stepgraph.step.shape import StepShape


class AttentionSizes:
    """Chooses an `AttentionGeometry` per `AttentionSpec` and StepShape."""

    def __init__(
        self,
        specs: Iterable[AttentionSpec],
        platform: Platform,
        *,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
        block_size: int,
        deterministic: bool,
    ) -> None:
        """Args:
        specs: of all layers, the drafter's too.
        platform: that runs them.
        dtype: of the activations.
        cache_dtype: of keys and values.
        block_size: tokens per KV block, the fewest of any layer's.
        deterministic: a token's result must not depend on the batch.
        """
        self._platform, self._deterministic = platform, deterministic
        self._specs = sorted(set(specs))
        alike = defaultdict(list)
        for spec in self._specs:
            if not spec.latent:
                alike[_heads(spec)].append(spec)
        self._tall_tiles = {
            heads: ops.tall_tile(
                platform.tuning,
                dtype,
                cache_dtype,
                heads[2],
                block_size,
                windows=[spec.window for spec in specs],
                plain_scores=all(spec.has_plain_scores for spec in specs),
            )
            for heads, specs in alike.items()
        }

    def of(self, shape: StepShape) -> dict[AttentionSpec, ops.AttentionGeometry]:
        """The geometries of a step, in the order in which it lists their work; the same for specs that differ in their window
        alone."""
        return {spec: self._geometry(spec, shape) for spec in self._specs}

    def _geometry(self, spec: AttentionSpec, shape: StepShape) -> ops.AttentionGeometry:
        if spec.latent:
            sizes = shape.num_tokens, shape.num_rows, spec.num_heads, self._platform.multiprocessors
            geometry = ops.mla_geometry(*sizes, deterministic=self._deterministic, tuning=self._platform.tuning)
            longest_prompt = shape.num_tokens - shape.num_rows * (1 + shape.num_drafts)
            if self._deterministic or longest_prompt < self._platform.tuning.min_expanded_tokens:
                return geometry
            return replace(geometry, own=ops.expanded_geometry(*sizes))
        return ops.attention_geometry(
            shape.num_tokens,
            shape.num_rows,
            spec.num_heads,
            spec.num_kv_heads,
            self._platform.multiprocessors,
            head_dim=spec.head_dim,
            decode_tokens=1 + shape.num_drafts,
            deterministic=self._deterministic,
            tall_tile=self._tall_tiles[_heads(spec)],
            tuning=self._platform.tuning,
        )


def _heads(spec: AttentionSpec) -> tuple[int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.head_dim

"""Qwen3 with experts: Qwen3 whose layers, all or some, have a mixture of them.

Source: Yang et al., "Qwen3 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.qwen3 import Qwen3
from stepgraph.ops import Routing


class Qwen3Moe(Qwen3):
    """The shared decoder with head norms and experts."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = super().config_from_hf(hf_config)
        routing = Routing(hf_config.num_experts_per_tok, normalise=hf_config.norm_topk_prob)
        spec = ExpertsSpec(hf_config.num_experts, hf_config.moe_intermediate_size, routing)
        return replace(
            config,
            mixtures=tuple(
                None if index in hf_config.mlp_only_layers or (index + 1) % hf_config.decoder_sparse_step else spec
                for index in range(config.num_layers)
            ),
        )

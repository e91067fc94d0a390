"""Ministral 3: Llama with queries that are multiplied by a function of their position, beyond the length of its first training.

Source: Liu et al., "Ministral 3" (2026); the function is Llama 4's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.attention import QueryScaling
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Ministral3(Decoder):
    """The shared decoder with scaled queries."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(hf_config, qkv_bias=False, output_bias=False)
        rope = hf_config.rope_parameters
        beta = rope.get("llama_4_scaling_beta")
        return replace(
            config, query_scaling=beta and QueryScaling(float(beta), int(rope["original_max_position_embeddings"]))
        )

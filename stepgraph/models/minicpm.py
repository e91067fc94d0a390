"""MiniCPM 1, 2 and 4, dense: Llama with a constant factor at the embedding, the residual stream and the logits.

Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class MiniCPM(Decoder):
    """The shared decoder with factors."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(hf_config, qkv_bias=False, output_bias=False)
        if getattr(hf_config, "sparse_config", None):
            raise ModelError(
                "A MiniCPM with a sparse_config attends to chosen blocks of keys where sequences are long, and every key is "
                "attended to here. MiniCPM checkpoints without a sparse_config run."
            )
        if any(rope.scale != 1.0 for rope in config.ropes):
            raise ModelError(
                "A MiniCPM whose rope settings lengthen its context may scale its rotation in a way of its own; it runs where "
                "max_position_embeddings is original_max_position_embeddings in config.json, and sequences up to that."
            )
        return replace(
            config,
            embedding_multiplier=hf_config.scale_emb,
            residual_multiplier=hf_config.scale_depth / hf_config.num_hidden_layers**0.5,
            logits_divisor=hf_config.hidden_size / hf_config.dim_model_base,
        )

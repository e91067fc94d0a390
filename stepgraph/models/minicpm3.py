"""MiniCPM 3: latent attention, and constant factors at the embedding, the residual stream and the logits.

Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models" (2024), for the factors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.deepseek import latent_config


class MiniCPM3(Decoder):
    """The shared decoder with latent attention and factors."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return replace(
            latent_config(hf_config, interleaved=False),
            embedding_multiplier=hf_config.scale_emb,
            residual_multiplier=hf_config.scale_depth / hf_config.num_hidden_layers**0.5,
            logits_divisor=hf_config.hidden_size / hf_config.dim_model_base,
        )

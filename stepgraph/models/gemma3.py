"""Gemma 3, text: norms before and after attention and feed-forward, GeGLU, windows in five of six layers, with a rotary
embedding of their own.

Source: Gemma Team, "Gemma 3 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Gemma3(Decoder):
    """The shared decoder with Gemma's norms and scales."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        return replace(
            DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, qk_norm=True),
            attention_scale=hf_config.query_pre_attn_scalar**-0.5,
            embedding_multiplier=hf_config.hidden_size**0.5,
            norm_weight_offset=1.0,
            output_norms=True,
        )

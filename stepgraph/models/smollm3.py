"""SmolLM3: Llama without position embedding in every fourth layer.

Source: Bakouch et al., "SmolLM3" (2025); Yang et al., "RoPE to NoPE and Back Again" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.rotary import UNROTATED
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class SmolLM3(Decoder):
    """The shared decoder, rotating in some layers."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias)
        rotates = hf_config.no_rope_layers  # 1 for a layer that rotates, whatever the name says
        ropes = (rope if r else UNROTATED for rope, r in zip(config.ropes, rotates, strict=False))
        return replace(config, ropes=tuple(ropes))

"""Gemma 2: norms before and after attention and feed-forward, GeGLU, windows in every other layer, capped scores and logits.
VaultGemma: Gemma 2 without the norms after.

Source: Gemma Team, "Gemma 2: Improving Open Language Models at a Practical Size" (2024); Sinha et al., "VaultGemma: A
Differentially Private Gemma Model" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Gemma2(Decoder):
    """The shared decoder with Gemma's norms and scales, and caps."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        return replace(
            DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias),
            attention_scale=hf_config.query_pre_attn_scalar**-0.5,
            attention_softcap=hf_config.attn_logit_softcapping or 0.0,
            logits_softcap=hf_config.final_logit_softcapping or 0.0,
            embedding_multiplier=hf_config.hidden_size**0.5,
            norm_weight_offset=1.0,
            output_norms=True,
        )


class VaultGemma(Gemma2):
    """Without norms of what layers add, so that the norm before the feed-forward is the second."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = super().config_from_hf(hf_config)
        return replace(config, output_norms=False, mlp_norm="pre_feedforward_layernorm")

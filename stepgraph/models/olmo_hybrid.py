"""OLMo Hybrid: layers of gated delta rules whose rates reach 2, each fourth with attention. The former normalise what they read,
the latter what they add, and queries and keys of all heads together; these are rotated only if the config has a base of angles.

Source: Ai2, "Olmo Hybrid" (2026); Yang et al., "Gated Delta Networks" (2024).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from stepgraph.layers.gated_delta import DeltaLayout, DeltaSizes
from stepgraph.layers.rotary import UNROTATED
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.qwen3_next import check_delta

_HEAD_EPS = 1e-5
"""Of the norm of heads, whatever the config says of the others'."""


class OlmoHybrid(Decoder):
    """The shared decoder with norms as OLMo 3 has them in layers with attention."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        rotates = hf_config.rope_parameters.get("rope_theta") is not None
        named = copy.copy(hf_config)
        if not rotates:
            named.rope_parameters = {"rope_type": "default", "rope_theta": 1.0}
        config = DecoderConfig.from_hf(named, qkv_bias=bias, output_bias=bias)
        sizes = DeltaSizes(
            num_key_heads=hf_config.linear_num_key_heads,
            num_value_heads=hf_config.linear_num_value_heads,
            key_dim=hf_config.linear_key_head_dim,
            value_dim=hf_config.linear_value_head_dim,
            conv_width=hf_config.linear_conv_kernel_dim,
            layout=DeltaLayout.APART,
            eps=_HEAD_EPS,
            max_rate=2.0 if hf_config.linear_allow_neg_eigval else 1.0,
        )
        check_delta(config, sizes)
        ropes = config.ropes if rotates else (UNROTATED,) * config.num_layers
        return replace(
            config, ropes=ropes, delta=sizes, joint_qk_norm=True, only_output_norms=True, norms_round_once=True
        )

"""gpt-oss: attention with sinks, in windows in every other layer, and experts with biases and a clamped SwiGLU in all.

Source: OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing
from stepgraph.ops.swiglu import Clamp

_ALPHA, _LIMIT = 1.702, 7.0
"""Where a config does not say."""


class GptOss(Decoder):
    """The shared decoder with sinks and experts."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias)
        spec = ExpertsSpec(
            hf_config.num_local_experts,
            config.intermediate_size,
            Routing(hf_config.num_experts_per_tok),
            has_logit_bias=True,
            has_expert_biases=True,
            clamp=Clamp(getattr(hf_config, "swiglu_limit", _LIMIT), getattr(hf_config, "swiglu_alpha", _ALPHA)),
        )
        # What is published names no dtype: its experts have 4 bits, and all else is bfloat16.
        dtype = config.dtype if getattr(hf_config, "dtype", None) is not None else torch.bfloat16
        return replace(config, attention_sinks=True, mixtures=(spec,) * config.num_layers, dtype=dtype)

"""Qwen3, dense: Llama with an RMS norm on every query and key head, and a head size of its own.

Source: Yang et al., "Qwen3 Technical Report" (2025).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Qwen3(Decoder):
    """The shared decoder with head norms."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        return DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, qk_norm=True)

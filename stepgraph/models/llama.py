"""Llama, and Mistral and Ministral, which add sliding windows: no biases unless the config asks for them.

Source: Touvron et al., "Llama 2" (2023); Jiang et al., "Mistral 7B" (2023).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Llama(Decoder):
    """The shared decoder as it is."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = getattr(hf_config, "attention_bias", False)
        return DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias)

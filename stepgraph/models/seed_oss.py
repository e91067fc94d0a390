"""Seed-OSS: Llama with biases of its own choice: on queries, keys and values, on attention's output, in the feed-forward.

Source: ByteDance Seed Team, Seed-OSS (2025).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class SeedOss(Decoder):
    """The shared decoder with biases."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return DecoderConfig.from_hf(
            hf_config, qkv_bias=hf_config.attention_bias, output_bias=hf_config.attention_out_bias
        )

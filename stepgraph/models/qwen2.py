"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections.

Source: Yang et al., "Qwen2 Technical Report" (2024).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Qwen2(Decoder):
    """The shared decoder with q, k and v biases."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return DecoderConfig.from_hf(hf_config, qkv_bias=True, output_bias=False)

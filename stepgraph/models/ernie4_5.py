"""ERNIE 4.5, dense: Llama whose rotary embedding pairs adjacent dimensions, and one switch for all biases.

Source: Baidu-ERNIE-Team, "ERNIE 4.5 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Ernie45(Decoder):
    """The shared decoder over a checkpoint with interleaved rotary pairs."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.use_bias
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias)
        return replace(config, mlp_bias=bias, interleaved_rope=True)

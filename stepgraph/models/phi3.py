"""Phi-3, Phi-3.5 and Phi-4: Llama with merged projections in the checkpoint, and LongRoPE over a part of each head.

Source: Abdin et al., "Phi-3 Technical Report" (2024); Ding et al., "LongRoPE" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder


class Phi3(Decoder):
    """The shared decoder over a checkpoint with merged projections."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(hf_config, qkv_bias=False, output_bias=False, partial_rope=True)
        return replace(config, merged_projections=True)

"""Youtu-LLM: a dense model with DeepSeek-V3's attention.

Source: Youtu-LLM Team, "Youtu-LLM" (2025).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.deepseek import latent_config


class Youtu(Decoder):
    """The shared decoder with latent attention."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return latent_config(hf_config, interleaved=bool(hf_config.rope_interleave))

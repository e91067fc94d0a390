"""dots.llm1: Qwen3's attention, and experts that are chosen as in DeepSeek-V3.

Source: rednote-hilab, "dots.llm1 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.glm4_moe import deepseek_mixtures
from stepgraph.models.qwen3 import Qwen3


class Dots1(Qwen3):
    """The shared decoder with head norms and experts beside those that all tokens take."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return replace(
            super().config_from_hf(hf_config), mixtures=deepseek_mixtures(hf_config, hf_config.first_k_dense_replace)
        )

"""Qwen3 with experts: Qwen3 whose layers, all or some, have a mixture of them.

Source: Yang et al., "Qwen3 Technical Report" (2025).
"""

from __future__ import annotations

from typing import Any

from stepgraph.models.config import DecoderConfig
from stepgraph.models.qwen2_moe import with_sparse_layers
from stepgraph.models.qwen3 import Qwen3


class Qwen3Moe(Qwen3):
    """The shared decoder with head norms and experts."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return with_sparse_layers(super().config_from_hf(hf_config), hf_config)

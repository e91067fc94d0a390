"""Mixtral: Mistral whose layers all have a mixture of experts.

Source: Jiang et al., "Mixtral of Experts" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing


class Mixtral(Decoder):
    """The shared decoder with experts."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(hf_config, qkv_bias=False, output_bias=False)
        spec = ExpertsSpec(
            hf_config.num_local_experts, config.intermediate_size, Routing(hf_config.num_experts_per_tok)
        )
        return replace(config, mixtures=(spec,) * config.num_layers)

"""ERNIE 4.5 with experts: ERNIE 4.5 with a mixture in some layers, whose experts are chosen by softmax and a learned bias.

Source: Baidu-ERNIE-Team, "ERNIE 4.5 Technical Report" (2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.ernie4_5 import Ernie45
from stepgraph.ops import Routing


class Ernie45Moe(Ernie45):
    """The shared decoder over a checkpoint with interleaved rotary pairs, with experts beside those that all tokens take."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        if hf_config.use_bias:
            raise ModelError(
                "use_bias is true in config.json, by which the output head of an Ernie4_5_MoeForCausalLM has a bias; heads "
                "without one are supported."
            )
        config = super().config_from_hf(hf_config)
        spec = ExpertsSpec(
            hf_config.moe_num_experts,
            hf_config.moe_intermediate_size,
            Routing(hf_config.moe_k, least_sum=hf_config.moe_norm_min),
            has_bias=True,
            shared_intermediate_size=hf_config.moe_intermediate_size * hf_config.moe_num_shared_experts,
        )
        first, last = hf_config.moe_layer_start_index, hf_config.moe_layer_end_index
        return replace(
            config,
            mixtures=tuple(
                spec if first <= index <= last and (index + 1) % hf_config.moe_layer_interval == 0 else None
                for index in range(config.num_layers)
            ),
        )

"""Granite 4.0: Granite with layers of Mamba-2 among those with attention (4.0-H), or without, and rotating or not; dense, or with
experts beside a feed-forward layer that all tokens take.

Source: IBM, "Granite 4.0" (2025); Dao and Gu, "Transformers are SSMs" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.rotary import UNROTATED
from stepgraph.models.bamba import layer_kinds, mamba_sizes, with_mamba
from stepgraph.models.config import FULL, LINEAR, DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.granite import with_factors
from stepgraph.ops import Routing


class GraniteHybrid(Decoder):
    """The shared decoder with factors and Mamba-2."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias, kinds = hf_config.attention_bias, layer_kinds(hf_config, FULL, LINEAR)
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, layer_types=kinds)
        config = replace(with_factors(config, hf_config), intermediate_size=hf_config.shared_intermediate_size)
        if hf_config.position_embedding_type != "rope":
            config = replace(config, ropes=(UNROTATED,) * config.num_layers)
        if hf_config.num_local_experts:
            spec = ExpertsSpec(
                hf_config.num_local_experts,
                hf_config.intermediate_size,
                Routing(hf_config.num_experts_per_tok),
                shared_intermediate_size=hf_config.shared_intermediate_size,
            )
            config = replace(config, mixtures=(spec,) * config.num_layers)
        return with_mamba(config, mamba_sizes(hf_config, hf_config.mamba_expand * hf_config.hidden_size))

    def checkpoint_name(self, name: str) -> str:
        """See `Decoder.checkpoint_name`. What all tokens take has the same name where there are no experts beside it."""
        name = super().checkpoint_name(name)
        return name if self.config.mixtures else name.replace(".mlp.", ".mlp.shared_experts.")

    def merged_name(self, name: str) -> str | None:
        """See `Decoder.merged_name`."""
        return name.replace("gate_up_proj", "input_linear") if name.endswith(".shared_experts.gate_up_proj") else None

"""Qwen1.5 and Qwen2 with experts: Qwen2 whose layers, all or some, have a mixture of them beside one that all tokens take.

Source: Yang et al., "Qwen2 Technical Report" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing


class Qwen2Moe(Decoder):
    """The shared decoder with q, k and v biases, experts and a gated shared one."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(hf_config, qkv_bias=hf_config.qkv_bias, output_bias=False)
        return with_sparse_layers(
            config,
            hf_config,
            shared_intermediate_size=hf_config.shared_expert_intermediate_size,
            has_shared_gate=True,
        )


def with_sparse_layers(config: DecoderConfig, hf_config: Any, **shared: Any) -> DecoderConfig:
    """A config with the experts of those layers that a Qwen's config gives them.

    Args:
        config: of the model.
        hf_config: of transformers.
        shared: fields of `ExpertsSpec`.
    """
    routing = Routing(hf_config.num_experts_per_tok, normalise=hf_config.norm_topk_prob)
    spec = ExpertsSpec(hf_config.num_experts, hf_config.moe_intermediate_size, routing, **shared)
    dense, step = hf_config.mlp_only_layers or (), hf_config.decoder_sparse_step
    if spec.num_experts == 0:
        return config
    return replace(
        config,
        mixtures=tuple(None if index in dense or (index + 1) % step else spec for index in range(config.num_layers)),
    )

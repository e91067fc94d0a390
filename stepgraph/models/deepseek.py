"""DeepSeek V2, V3 and R1: multi-head latent attention, and experts in all but the first layers.

Source: DeepSeek-AI, "DeepSeek-V2" (2024) and "DeepSeek-V3 Technical Report" (2024).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.latent_attention import LatentSizes
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.glm4_moe import deepseek_mixtures
from stepgraph.ops import Routing


class DeepseekV2(Decoder):
    """The shared decoder with latent attention, and experts that are chosen by softmax, some of them within groups."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        grouped = hf_config.topk_method == "group_limited_greedy"
        routing = Routing(
            hf_config.num_experts_per_tok,
            normalise=False,
            scale=hf_config.routed_scaling_factor,
            groups=hf_config.n_group if grouped else 1,
            kept_groups=hf_config.topk_group if grouped else 1,
            group_top=1,
        )
        spec = ExpertsSpec(
            hf_config.n_routed_experts,
            hf_config.moe_intermediate_size,
            routing,
            shared_intermediate_size=hf_config.moe_intermediate_size * hf_config.n_shared_experts,
        )
        config = latent_config(hf_config, interleaved=True)
        num_dense = hf_config.first_k_dense_replace
        return replace(
            config, mixtures=tuple(None if index < num_dense else spec for index in range(config.num_layers))
        )


class DeepseekV3(Decoder):
    """The shared decoder with latent attention, and experts that are chosen by sigmoids, within groups."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = latent_config(hf_config, interleaved=hf_config.rope_interleave)
        return replace(config, mixtures=deepseek_mixtures(hf_config, hf_config.first_k_dense_replace))


def latent_config(hf_config: Any, *, interleaved: bool) -> DecoderConfig:
    """What `DecoderConfig.from_hf` reads, and latent attention.

    Args:
        hf_config: with DeepSeek's fields.
        interleaved: whether the checkpoint rotates adjacent dimensions.
    """
    bias = hf_config.attention_bias
    config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias)
    query_dim = hf_config.qk_nope_head_dim + hf_config.qk_rope_head_dim
    latent = LatentSizes(
        q_rank=hf_config.q_lora_rank or 0,
        kv_rank=hf_config.kv_lora_rank,
        key_dim=hf_config.qk_nope_head_dim,
        rotated_dim=hf_config.qk_rope_head_dim,
        value_dim=hf_config.v_head_dim,
        scale=_yarn_scale(hf_config.rope_parameters) ** 2 / math.sqrt(query_dim),
    )
    return replace(config, latent=latent, num_kv_heads=1, interleaved_rope=interleaved)


def _yarn_scale(rope: Any) -> float:
    """What YaRN multiplies queries and keys with, rotated or not, where the config asks for it ("mscale_all_dim")."""
    weight, factor = rope.get("mscale_all_dim") or 0, rope.get("factor") or 1
    if rope.get("rope_type", "default") == "default" or not weight or factor <= 1:
        return 1.0
    return 0.1 * weight * math.log(factor) + 1.0

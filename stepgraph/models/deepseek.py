"""DeepSeek V2, V3 and R1: multi-head latent attention, and experts in all but the first layers.

Source: DeepSeek-AI, "DeepSeek-V2" (2024) and "DeepSeek-V3 Technical Report" (2024).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.latent_attention import LatentSizes
from stepgraph.models.config import ConfigFileError, DecoderConfig, architecture_of
from stepgraph.models.decoder import Decoder
from stepgraph.models.glm4_moe import deepseek_mixtures
from stepgraph.ops import Routing


class DeepseekV2(Decoder):
    """The shared decoder with latent attention, and experts that are chosen by softmax, some of them within groups."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        check_router(hf_config, topk_method=("greedy", "group_limited_greedy"), scoring_func=("softmax",))
        if hf_config.norm_topk_prob:
            raise _odd_router(
                hf_config, "norm_topk_prob", "False: of True, DeepSeek's code and transformers' make different weights"
            )
        if hf_config.mlp_bias:
            raise ModelError(
                "mlp_bias is true in the config of this DeepseekV2ForCausalLM, and experts that all tokens take have no biases "
                "here. Use a checkpoint without them, as DeepSeek's are."
            )
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
            shared_intermediate_size=hf_config.moe_intermediate_size * (hf_config.n_shared_experts or 0),
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
        check_router(hf_config, topk_method=("noaux_tc",), scoring_func=("sigmoid",))
        config = latent_config(hf_config, interleaved=bool(hf_config.rope_interleave))
        return replace(config, mixtures=deepseek_mixtures(hf_config, hf_config.first_k_dense_replace))


def latent_config(hf_config: Any, *, interleaved: bool) -> DecoderConfig:
    """What `DecoderConfig.from_hf` reads, and latent attention.

    Args:
        hf_config: with DeepSeek's fields.
        interleaved: whether the checkpoint rotates adjacent dimensions.

    Raises:
        ModelError: biases that a layer does not have.
        ConfigFileError: a size is out of range.
    """
    _check_sizes(hf_config)
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


def _check_sizes(hf_config: Any) -> None:
    names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in names if hf_config.q_lora_rank is None else (*names, "q_lora_rank"):
        size = getattr(hf_config, name)
        if size < 1 or (name == "qk_rope_head_dim" and size % 2):
            raise ConfigFileError(
                f"{name} is {size} in the config of this {architecture_of(hf_config)}, and must be at least 1"
                + (" and even, as pairs of dimensions are rotated" if name == "qk_rope_head_dim" else "")
                + (", or null where queries have no latent" if name == "q_lora_rank" else "")
                + ". Correct config.json, or download it again."
            )
    if hf_config.attention_bias and hf_config.q_lora_rank is None:
        raise ModelError(
            f"This {architecture_of(hf_config)} has biases in attention (attention_bias) and no latent of its queries "
            "(q_lora_rank is null): biases are supported where queries have a latent. No published model has both; check "
            "config.json."
        )


def check_router(hf_config: Any, **known: tuple[str, ...]) -> None:
    """Refuse a way of choosing experts that is not the one of the class.

    Args:
        hf_config: of a model with experts.
        known: by field, the values that name the way of the class; where the field is absent, it is that.
    """
    for name, values in known.items():
        if getattr(hf_config, name, None) not in (None, *values):
            raise _odd_router(hf_config, name, " or ".join(map(repr, values)))
    if getattr(hf_config, "moe_layer_freq", 1) != 1:
        raise _odd_router(hf_config, "moe_layer_freq", "1: all layers behind the first dense ones have experts")


def _odd_router(hf_config: Any, name: str, instead: str) -> ConfigFileError:
    """Of a field that transformers' code does not read."""
    return ConfigFileError(
        f"{name} is {getattr(hf_config, name)!r:.80} in the config of this {architecture_of(hf_config)}, and models of its class "
        f"run where it is {instead}. Correct config.json, or use another checkpoint."
    )


def _yarn_scale(rope: Any) -> float:
    """What YaRN multiplies queries and keys with, rotated or not, where the config asks for it ("mscale_all_dim")."""
    weight, factor = rope.get("mscale_all_dim") or 0, rope.get("factor") or 1
    if rope.get("rope_type", "default") == "default" or not weight or factor <= 1:
        return 1.0
    scale = 0.1 * weight * math.log(factor) + 1.0
    if not math.isfinite(scale):
        raise ConfigFileError(
            f"mscale_all_dim and factor are {weight!r:.40} and {factor!r:.40} in config.json, which multiply scores with "
            f"{scale}; correct them, or download it again."
        )
    return scale

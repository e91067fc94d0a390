"""Qwen3-Next, and the language models of Qwen3.5 and 3.6: layers of gated delta rules, each fourth with gated attention, norms
whose weights are stored less one, a part of each head rotated; dense, or with experts beside one that all tokens take.

Source: Qwen Team, "Qwen3-Next" (2025); Yang et al., "Gated Delta Networks" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.gated_delta import DeltaLayout, DeltaSizes
from stepgraph.models.config import ConfigFileError, DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.qwen2_moe import with_sparse_layers
from stepgraph.ops import Routing


class Qwen35(Decoder):
    """The shared decoder with Qwen3.5's layers, dense."""

    delta_layout = DeltaLayout.STACKED

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, qk_norm=True, partial_rope=True)
        sizes = DeltaSizes(
            num_key_heads=hf_config.linear_num_key_heads,
            num_value_heads=hf_config.linear_num_value_heads,
            key_dim=hf_config.linear_key_head_dim,
            value_dim=hf_config.linear_value_head_dim,
            conv_width=hf_config.linear_conv_kernel_dim,
            layout=cls.delta_layout,
            eps=config.rms_norm_eps,
        )
        check_delta(config, sizes)
        return replace(config, norm_weight_offset=1.0, output_gate=True, delta=sizes)


def check_delta(config: DecoderConfig, sizes: DeltaSizes) -> None:
    """Raise ModelError if layers cannot be of these sizes."""
    if config.activation != "silu":
        raise ModelError(
            f"The activation of this {config.architecture} is {config.activation}, which its convolutions have too, and they "
            "run with silu."
        )
    numbers = (sizes.num_key_heads, sizes.num_value_heads, sizes.key_dim, sizes.value_dim)
    if min(numbers) < 1 or sizes.conv_width < 2 or sizes.num_value_heads % sizes.num_key_heads:
        raise ConfigFileError(
            f"The linear_attention layers of this {config.architecture} have {sizes.num_key_heads} key heads of {sizes.key_dim}, "
            f"{sizes.num_value_heads} value heads of {sizes.value_dim}, and convolutions of {sizes.conv_width} tokens: value "
            "heads must be a multiple of key heads, and convolutions of at least 2 tokens. Correct config.json, or download it "
            "again."
        )


class Qwen35Moe(Qwen35):
    """With experts in all layers."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = super().config_from_hf(hf_config)
        spec = ExpertsSpec(
            hf_config.num_experts,
            hf_config.moe_intermediate_size,
            Routing(hf_config.num_experts_per_tok, normalise=True),
            shared_intermediate_size=hf_config.shared_expert_intermediate_size,
            has_shared_gate=True,
        )
        return replace(config, mixtures=(spec,) * config.num_layers)


class Qwen3Next(Qwen35):
    """With experts in all layers or some, and projections merged by heads of keys."""

    delta_layout = DeltaLayout.BY_HEADS

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return with_sparse_layers(
            super().config_from_hf(hf_config),
            hf_config,
            shared_intermediate_size=hf_config.shared_expert_intermediate_size,
            has_shared_gate=True,
        )

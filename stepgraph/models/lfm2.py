"""LFM2 and LFM2.5: layers of gated short convolutions among those with attention, norms of query and key heads; dense, or with
experts behind the first layers, chosen as in DeepSeek-V3 without groups.

Source: Liquid AI, "LFM2 Technical Report" (2025).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.short_conv import ConvSizes
from stepgraph.models.config import ConfigFileError, DecoderConfig, architecture_of
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing

_MOST_VALUES = 2**24
_LEAST_SUM = 1e-6
"""Added there to what weights are divided by; here, their sum is no less."""


class Lfm2(Decoder):
    """The shared decoder with short convolutions, dense."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return replace(_with_convolutions(hf_config), intermediate_size=_intermediate_size(hf_config))


def _with_convolutions(hf_config: Any) -> DecoderConfig:
    """What the dense and those with experts have in common."""
    if not hf_config.layer_types:
        raise ConfigFileError(
            f"The config of this {architecture_of(hf_config)} has no layer_types, which say where its convolutions are. Correct "
            "config.json, or download it again."
        )
    named = copy.copy(hf_config)
    named.rms_norm_eps = hf_config.norm_eps
    sizes = ConvSizes(hf_config.conv_L_cache, hf_config.conv_bias)
    config = DecoderConfig.from_hf(named, qkv_bias=False, output_bias=False, qk_norm=True)
    if sizes.width < 2:
        raise ConfigFileError(
            f"The convolutions of this {config.architecture} are of {sizes.width} tokens (conv_L_cache), and must be of at least "
            "2. Correct config.json, or download it again."
        )
    return replace(config, short_conv=sizes)


def _intermediate_size(hf_config: Any) -> int:
    """That of the weights; the config may give that of a layer without a gate, from which it follows."""
    size, multiple = int(hf_config.intermediate_size), int(hf_config.block_multiple_of)
    if hf_config.block_auto_adjust_ff_dim:
        size = int(hf_config.block_ffn_dim_multiplier * int(2 * size / 3))
        size = -(-size // max(1, multiple)) * multiple
    if not 1 <= size <= _MOST_VALUES or multiple < 1:
        raise ConfigFileError(
            f"This {architecture_of(hf_config)} would have feed-forward layers of {size} values, in multiples of {multiple} "
            "(intermediate_size, block_ffn_dim_multiplier, block_multiple_of). Correct config.json, or download it again."
        )
    return size


class Lfm2Moe(Decoder):
    """With experts in all layers but the first."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = _with_convolutions(hf_config)
        routing = Routing(
            hf_config.num_experts_per_tok,
            sigmoid=True,
            normalise=hf_config.norm_topk_prob,
            least_sum=_LEAST_SUM,
            scale=hf_config.routed_scaling_factor,
        )
        spec = ExpertsSpec(
            hf_config.num_experts, hf_config.moe_intermediate_size, routing, has_bias=hf_config.use_expert_bias
        )
        dense = hf_config.num_dense_layers
        return replace(config, mixtures=tuple(None if index < dense else spec for index in range(config.num_layers)))

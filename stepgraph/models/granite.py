"""Granite 3, dense and with experts: Llama with a constant factor at the embedding, residual stream, attention and logits.
Granite SWA: with attention sinks, windows in most layers, and a rotation of each layer's own, or none.

Source: Granite Team, "Granite 3.0 Language Models" (2024); the factors are those of Yang et al., "Tensor Programs V" (2022).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.rotary import UNROTATED, rotary_frequencies
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing


class Granite(Decoder):
    """The shared decoder with factors."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        return with_factors(DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias), hf_config)


def with_factors(config: DecoderConfig, hf_config: Any) -> DecoderConfig:
    """A config with the factors of Granite's."""
    return replace(
        config,
        attention_scale=hf_config.attention_multiplier,
        embedding_multiplier=hf_config.embedding_multiplier,
        residual_multiplier=hf_config.residual_multiplier,
        logits_divisor=hf_config.logits_scaling,
    )


class GraniteMoe(Granite):
    """The shared decoder with factors, and experts in all layers."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = super().config_from_hf(hf_config)
        routing = Routing(hf_config.num_experts_per_tok)
        shared = getattr(hf_config, "shared_intermediate_size", 0)
        spec = ExpertsSpec(
            hf_config.num_local_experts, config.intermediate_size, routing, shared_intermediate_size=shared
        )
        return replace(config, mixtures=(spec,) * config.num_layers)


class GraniteSWA(Granite):
    """The shared decoder with factors, sinks and windows."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return _with_sinks(super().config_from_hf(hf_config), hf_config)


class GraniteMoeSWA(GraniteMoe):
    """Likewise, with experts in all layers."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        return _with_sinks(super().config_from_hf(hf_config), hf_config)


def _with_sinks(config: DecoderConfig, hf_config: Any) -> DecoderConfig:
    ropes = {0: UNROTATED}
    for theta in {*hf_config.layer_rope_theta} - {0}:
        of_theta = copy.copy(hf_config)
        of_theta.rope_parameters = hf_config.rope_parameters | {"rope_theta": theta}
        ropes[theta] = rotary_frequencies(of_theta, config.head_dim)
    return replace(config, attention_sinks=True, ropes=tuple(ropes[theta] for theta in hf_config.layer_rope_theta))

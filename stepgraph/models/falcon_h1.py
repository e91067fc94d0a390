"""Falcon-H1: attention and Mamba-2 side by side in each layer, over the same normalised stream, and a constant factor at nearly
every product.

Source: Falcon LLM Team, "Falcon-H1" (2025); the factors are those of Yang et al., "Tensor Programs V" (2022).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.bamba import mamba_sizes, with_mamba
from stepgraph.models.config import LINEAR, ConfigFileError, DecoderConfig, PartMultipliers, architecture_of
from stepgraph.models.decoder import Decoder


class FalconH1(Decoder):
    """The shared decoder with attention beside Mamba-2, and factors."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`. What multiplies the inputs of attention, and keys, multiplies scores here; the former,
        as it does values, also what attention gives."""
        _check(hf_config)
        bias, num_layers = hf_config.attention_bias, hf_config.num_hidden_layers
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, layer_types=[LINEAR] * num_layers)
        given, (gate, down) = hf_config.attention_in_multiplier, hf_config.mlp_multipliers
        config = replace(
            config,
            attends=(True,) * num_layers,
            attention_scale=config.head_dim**-0.5 * given**2 * hf_config.key_multiplier,
            embedding_multiplier=hf_config.embedding_multiplier,
            logits_divisor=1 / hf_config.lm_head_multiplier,
            part_multipliers=PartMultipliers(
                attention=given * hf_config.attention_out_multiplier,
                state=hf_config.ssm_out_multiplier,
                mlp=down,
                mlp_gate=gate,
            ),
        )
        width = hf_config.mamba_d_ssm or hf_config.mamba_expand * hf_config.hidden_size
        projected = tuple(hf_config.ssm_in_multiplier * number for number in hf_config.ssm_multipliers)
        sizes = mamba_sizes(
            hf_config,
            width,
            has_norm=bool(hf_config.mamba_rms_norm),
            gate_first=not hf_config.mamba_norm_before_gate,
            multipliers=projected,
        )
        return with_mamba(config, sizes)


def _check(hf_config: Any) -> None:
    """Raise ModelError if factors are of the wrong number, or lie before a bias."""
    architecture = architecture_of(hf_config)
    if (len(hf_config.ssm_multipliers), len(hf_config.mlp_multipliers)) != (5, 2) or not hf_config.lm_head_multiplier:
        raise ConfigFileError(
            f"The config of this {architecture} has {len(hf_config.ssm_multipliers)} ssm_multipliers, "
            f"{len(hf_config.mlp_multipliers)} mlp_multipliers and the lm_head_multiplier {hf_config.lm_head_multiplier}, and "
            "must have 5, 2 and one that is not 0. Correct config.json, or download it again."
        )
    for bias, factor in (("attention_bias", "attention_in_multiplier"), ("mamba_proj_bias", "ssm_in_multiplier")):
        if getattr(hf_config, bias) and getattr(hf_config, factor) != 1:
            raise ModelError(
                f"This {architecture} has a bias ({bias}) behind a factor ({factor} = {getattr(hf_config, factor)}), and either "
                "is supported without the other, as in published models. Use such a checkpoint."
            )
    if bool(hf_config.mamba_proj_bias) != bool(hf_config.projectors_bias):
        raise ModelError(
            f"This {architecture} has biases in one of the projections of its layers of Mamba-2 (mamba_proj_bias = "
            f"{hf_config.mamba_proj_bias}, projectors_bias = {hf_config.projectors_bias}), and they are supported in both or "
            "none, as in published models. Use such a checkpoint."
        )

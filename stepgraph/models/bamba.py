"""Bamba: layers of Mamba-2 among those with attention, which rotates half of each head. And what models with such layers share.

Source: IBM, Princeton, CMU and UIUC, "Bamba: Inference-Efficient Hybrid Mamba2 Model" (2024); Dao and Gu, "Transformers are SSMs"
(2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.mamba2 import MambaSizes
from stepgraph.models.config import FULL, LINEAR, ConfigFileError, DecoderConfig, architecture_of
from stepgraph.models.decoder import Decoder

_LATER_NAMES = {"mamba": LINEAR, "attention": FULL}
"""What published configs call types of layers, and what transformers does."""


class Bamba(Decoder):
    """The shared decoder with Mamba-2."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        bias = hf_config.attention_bias
        kinds = layer_kinds(hf_config, FULL, LINEAR)
        config = DecoderConfig.from_hf(hf_config, qkv_bias=bias, output_bias=bias, partial_rope=True, layer_types=kinds)
        sizes = mamba_sizes(hf_config, hf_config.mamba_expand * hf_config.hidden_size)
        return with_mamba(config, sizes)


def layer_kinds(hf_config: Any, *known: str) -> list[str]:
    """The type of each layer, in transformers' words.

    Args:
        hf_config: of a model with layers of Mamba-2.
        known: types that the class has; one is `FULL`, of which there must be a layer.

    Raises:
        ConfigFileError: there are others.
    """
    listed: Sequence[str] = getattr(hf_config, "layers_block_type", None) or hf_config.layer_types
    kinds = [_LATER_NAMES.get(kind, kind) for kind in listed]
    architecture = architecture_of(hf_config)
    if odd := sorted(set(kinds) - set(known)):
        raise ConfigFileError(
            f"This {architecture} has layers of type {', '.join(odd)}, and its class has layers of type {', '.join(known)}. "
            "Correct config.json, or download it again."
        )
    if FULL not in kinds:
        raise ModelError(
            f"No layer of this {architecture} is of type {FULL}, and at least one must be: models of Mamba-2 are supported with "
            "attention in some layers."
        )
    return kinds


def mamba_sizes(hf_config: Any, width: int, **options: Any) -> MambaSizes:
    """The layers of Mamba-2 by a config with Bamba's fields.

    Args:
        hf_config: of the model.
        width: of all heads together.
        options: fields of `MambaSizes`.
    """
    head_dim = width // hf_config.mamba_n_heads if hf_config.mamba_d_head == "auto" else hf_config.mamba_d_head
    return MambaSizes(
        num_heads=hf_config.mamba_n_heads,
        head_dim=head_dim,
        num_groups=hf_config.mamba_n_groups,
        state_size=hf_config.mamba_d_state,
        conv_width=hf_config.mamba_d_conv,
        conv_bias=bool(hf_config.mamba_conv_bias),
        bias=bool(hf_config.mamba_proj_bias),
        steps=step_limits(hf_config),
        **options,
    )


def step_limits(hf_config: Any) -> tuple[float, float]:
    """The least and the most step size."""
    limits = getattr(hf_config, "time_step_limit", None) or (0.0, math.inf)
    least, most = map(float, limits)
    if not 0 <= least <= most:
        raise ConfigFileError(
            f"time_step_limit is {limits!r:.80} in the config of this {architecture_of(hf_config)}, and must be two numbers, the "
            "least step and the most. Correct config.json, or download it again."
        )
    return least, most


def with_mamba(config: DecoderConfig, sizes: MambaSizes) -> DecoderConfig:
    """A config with such layers where it is recurrent.

    Raises:
        ConfigFileError: layers cannot be of these sizes.
        ModelError: their activation is another.
    """
    if not config.is_recurrent:
        return config
    if config.activation not in ("silu", "relu2"):
        raise ModelError(
            f"The activation of this {config.architecture} is {config.activation}, which its convolutions have too, and they "
            "run with silu."
        )
    numbers = (sizes.num_heads, sizes.head_dim, sizes.num_groups, sizes.state_size)
    if min(numbers) < 1 or sizes.conv_width < 2 or sizes.num_heads % sizes.num_groups:
        raise ConfigFileError(
            f"The layers of Mamba-2 of this {config.architecture} have {sizes.num_heads} heads of {sizes.head_dim} in "
            f"{sizes.num_groups} groups, states of {sizes.state_size}, and convolutions of {sizes.conv_width} tokens: heads must "
            "be a multiple of groups, and convolutions of at least 2 tokens. Correct config.json, or download it again."
        )
    return replace(config, mamba=sizes)

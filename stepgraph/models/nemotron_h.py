"""Nemotron-H, Nemotron Nano 2 and Nemotron 3: layers of one part each, which is Mamba-2, attention that rotates nothing, a
feed-forward layer of squared ReLU without a gate, or a mixture of such experts, chosen as in DeepSeek-V3.

Source: NVIDIA, "Nemotron-H" (2025) and "Nemotron 3 Nano" (2025); squared ReLU: So et al., "Primer" (2021).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.mamba2 import MambaSizes
from stepgraph.layers.rotary import UNROTATED
from stepgraph.models.bamba import layer_kinds, step_limits, with_mamba
from stepgraph.models.config import FULL, LINEAR, DecoderConfig, architecture_of
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing

_MIXTURE, _MLP = "moe", "mlp"
_LEAST_SUM = 1e-20
"""Added there to what weights are divided by; here, their sum is no less."""


class NemotronH(Decoder):
    """The shared decoder with layers of one part each."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`.

        Steps of Mamba-2 are limited by `time_step_limit`, as in NVIDIA's code. That of transformers has `time_step_min`, which is
        for the weights that training begins with, as the least step of prompts, and none of answers.
        """
        _check(hf_config)
        kinds = layer_kinds(hf_config, FULL, LINEAR, _MLP, _MIXTURE)
        named = copy.copy(hf_config)
        named.rms_norm_eps = hf_config.layer_norm_epsilon
        named.sliding_window, named.rope_parameters = None, {"rope_theta": 10000.0}
        config = DecoderConfig.from_hf(named, qkv_bias=False, output_bias=False, layer_types=kinds)
        spec = _experts(hf_config) if _MIXTURE in kinds else None
        config = replace(
            config,
            ropes=(UNROTATED,) * config.num_layers,
            activation="relu2",
            attends=tuple(kind == FULL for kind in kinds),
            feeds_forward=tuple(kind in (_MLP, _MIXTURE) for kind in kinds),
            mixtures=() if spec is None else tuple(spec if kind == _MIXTURE else None for kind in kinds),
            num_mtp_modules=0,
        )
        sizes = MambaSizes(
            num_heads=hf_config.mamba_num_heads,
            head_dim=hf_config.mamba_head_dim,
            num_groups=hf_config.n_groups,
            state_size=hf_config.ssm_state_size,
            conv_width=hf_config.conv_kernel,
            conv_bias=bool(hf_config.use_conv_bias),
            bias=bool(hf_config.use_bias),
            steps=step_limits(hf_config),
        )
        return with_mamba(config, sizes)


def _experts(hf_config: Any) -> ExpertsSpec:
    routing = Routing(
        hf_config.num_experts_per_tok,
        sigmoid=True,
        normalise=hf_config.norm_topk_prob,
        least_sum=_LEAST_SUM,
        scale=hf_config.routed_scaling_factor,
        groups=hf_config.n_group,
        kept_groups=hf_config.topk_group,
    )
    return ExpertsSpec(
        hf_config.n_routed_experts,
        hf_config.moe_intermediate_size,
        routing,
        has_bias=True,
        shared_intermediate_size=hf_config.moe_shared_expert_intermediate_size,
        latent_size=hf_config.moe_latent_size or 0,
    )


def _check(hf_config: Any) -> None:
    """Raise ModelError if layers have activations or biases that published models do not have."""
    architecture = architecture_of(hf_config)
    for name, known in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if getattr(hf_config, name) != known:
            raise ModelError(
                f"{name} is {getattr(hf_config, name)!r:.80} in the config of the {architecture}, whose layers run with {known}, "
                "as in published models. Use such a checkpoint."
            )
    experts = _MIXTURE in (getattr(hf_config, "layers_block_type", None) or ())
    odd = {
        "attention_bias": hf_config.attention_bias,
        "mlp_bias": hf_config.mlp_bias and experts,
        "mamba_proj_bias": bool(hf_config.mamba_proj_bias) != bool(hf_config.use_bias),
    }
    if names := [name for name, is_odd in odd.items() if is_odd]:
        raise ModelError(
            f"{names[0]} is {getattr(hf_config, names[0])} in the config of this {architecture}: attention and experts have no "
            "biases here, and projections of Mamba-2 have them where use_bias says so. Use a checkpoint as NVIDIA publishes them."
        )

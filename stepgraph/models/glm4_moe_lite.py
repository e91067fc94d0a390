"""GLM-4.7-Flash: DeepSeek-V3's attention and routing, and a list of the layers that have experts.

Source: GLM-4.5 Team, "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models" (2025), for the family.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.config import ConfigFileError, DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.models.deepseek import check_router, latent_config
from stepgraph.models.glm4_moe import deepseek_mixtures


class Glm4MoeLite(Decoder):
    """The shared decoder with latent attention, and experts beside one that all tokens take."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        check_router(hf_config, topk_method=("noaux_tc",), scoring_func=("sigmoid",))
        config = latent_config(hf_config, interleaved=bool(hf_config.rope_interleave))
        kinds = hf_config.mlp_layer_types
        num_dense = kinds.count("dense")
        if kinds != ["dense"] * num_dense + ["sparse"] * (config.num_layers - num_dense):
            raise ModelError(
                f"mlp_layer_types is {kinds!r:.200} in config.json; it must name each of the {config.num_layers} layers: dense "
                "ones, then sparse ones."
            )
        if getattr(hf_config, "first_k_dense_replace", num_dense) != num_dense:
            raise ConfigFileError(
                f"first_k_dense_replace is {hf_config.first_k_dense_replace} in config.json, and mlp_layer_types, of which the "
                f"first layer is dense where there is none, makes it {num_dense}: correct one of them."
            )
        return replace(config, mixtures=deepseek_mixtures(hf_config, num_dense))

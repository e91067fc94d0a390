"""GLM-4.5 and 4.6: first layers that are dense, others with experts that are chosen as in DeepSeek-V3; partly rotated heads.

Source: GLM-4.5 Team, "GLM-4.5: Agentic, Reasoning, and Coding (ARC) Foundation Models" (2025); the routing: DeepSeek-AI,
"DeepSeek-V3 Technical Report" (2024).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stepgraph.layers.experts import ExpertsSpec
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing

_LEAST_SUM = 1e-20
"""Added there to what weights are divided by; here, their sum is no less."""


class Glm4Moe(Decoder):
    """The shared decoder with experts beside one that all tokens take."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        config = DecoderConfig.from_hf(
            hf_config,
            qkv_bias=hf_config.attention_bias,
            output_bias=False,
            qk_norm=hf_config.use_qk_norm,
            partial_rope=True,
        )
        return replace(config, mixtures=deepseek_mixtures(hf_config, hf_config.first_k_dense_replace))


def deepseek_mixtures(hf_config: Any, num_dense: int) -> tuple[ExpertsSpec | None, ...]:
    """The experts of each layer by a config with DeepSeek-V3's fields; the first `num_dense` layers have none."""
    routing = Routing(
        hf_config.num_experts_per_tok,
        sigmoid=True,
        normalise=hf_config.norm_topk_prob,
        least_sum=_LEAST_SUM,
        scale=hf_config.routed_scaling_factor,
        groups=hf_config.n_group,
        kept_groups=hf_config.topk_group,
    )
    spec = ExpertsSpec(
        hf_config.n_routed_experts,
        hf_config.moe_intermediate_size,
        routing,
        has_bias=True,
        shared_intermediate_size=hf_config.moe_intermediate_size * (hf_config.n_shared_experts or 0),
    )
    return tuple(None if index < num_dense else spec for index in range(hf_config.num_hidden_layers))

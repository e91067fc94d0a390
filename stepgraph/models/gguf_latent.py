"""Models with latent attention in GGUF files, for llama.cpp deepseek2 and minicpm3, in the fields of transformers' configs.

Of deepseek2 are DeepSeek's V2, V3 and R1, Kimi K2, GLM-4.7-Flash and Youtu-LLM, which differ in how experts are chosen, if there
are any. Rows are in the checkpoints' order: the one rotates adjacent dimensions, the other halves, as transformers does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from stepgraph.errors import ModelError

TENSOR_NAMES = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "exp_probs_b": "mlp.gate",
}
"""Of tensors that no other architecture has."""
KEYS, VALUES = "attn_k_b", "attn_v_b"
"""The two tensors that newer files have in place of ``attn_kv_b``: see `stepgraph.models.gguf_tensors.KeysAndValues`."""
_SOFTMAX, _SIGMOID = 1, 2
"""Values of ``expert_gating_func``."""
_MINICPM3 = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}
"""Factors that files do not hold: llama.cpp has those of the one model of its kind."""


class Metadata(Protocol):
    """Values of a file, by keys without the architecture's name; see `stepgraph.models.gguf.GGUFFile.value`."""

    def __call__(self, key: str, kind: type = int, default: Any = ..., /) -> Any: ...


class Described(NamedTuple):
    """A model's class, and fields of its config."""

    model_type: str
    class_name: str
    fields: dict[str, Any]


def latent_sizes(path: Path, value: Metadata) -> dict[str, Any]:
    """Fields of transformers' configs that describe the attention.

    Files made since llama.cpp absorbs queries describe what it then computes, one key head of latents, and the heads of the model
    beside it ("key_length_mla"); older ones the latter alone.

    Raises:
        ModelError: sizes are missing or do not fit each other.
    """
    rotated = value("rope.dimension_count")
    heads, hidden = (value(key) for key in ("attention.head_count", "embedding_length"))
    key_length, value_length = (
        value(f"attention.{name}_mla", int, 0) or value(f"attention.{name}", int, hidden // max(1, heads))
        for name in ("key_length", "value_length")
    )
    sizes = {
        "q_lora_rank": value("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": value("attention.kv_lora_rank"),
        "qk_nope_head_dim": key_length - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value_length,
    }
    for name, size in sizes.items():
        if size is not None and not 1 <= size < 2**24:
            raise ModelError(
                f"{path} describes latent attention whose {name} is {size} (keys of {key_length} numbers, {rotated} of them "
                f"rotated, values of {value_length}); it must be at least 1. Convert the model to GGUF again."
            )
    if value("attention.temperature_scale", float, 0.0):
        raise ModelError(
            f"{path} scales queries by their position (attention.temperature_scale), which is not supported; models "
            "without it are."
        )
    return sizes | {"num_key_value_heads": heads}


def minicpm3(path: Path, value: Metadata, factors: Mapping[str, list[float]]) -> Described:
    """A MiniCPM 3.

    Args:
        path: of the file, for errors.
        value: of its metadata.
        factors: "short" and "long" ones by which its frequencies are divided; empty: by none.
    """
    fields = latent_sizes(path, value) | _MINICPM3
    if factors:
        rope = {"rope_type": "longrope", "rope_theta": value("rope.freq_base", float, 10000.0)}
        original = value("rope.scaling.original_context_length", int, value("context_length"))
        rope |= {f"{name}_factor": values for name, values in factors.items()}
        fields["rope_parameters"] = rope | {"original_max_position_embeddings": original}
    return Described("minicpm3", "MiniCPM3ForCausalLM", fields)


def deepseek2(path: Path, value: Metadata, *, corrects_choices: bool) -> Described:
    """A model of DeepSeek's kind.

    Args:
        path: of the file, for errors.
        value: of its metadata. Where that does not say that experts are in groups, they are not, as in llama.cpp; files of V2 and
            V3 that were made before late 2025 do not.
        corrects_choices: whether routers have a bias, which those with sigmoids have; older files do not say which they are.

    Raises:
        ModelError: no model of this kind chooses its experts so.
    """
    fields = latent_sizes(path, value)
    if not (count := value("expert_count", int, 0)):
        return Described("youtu", "YoutuForCausalLM", fields)
    gating = value("expert_gating_func", int, 0) or (_SIGMOID if corrects_choices else _SOFTMAX)
    groups, normalised = value("expert_group_count", int, 0), value("expert_weights_norm", bool, False)
    if gating not in (_SOFTMAX, _SIGMOID) or (gating == _SOFTMAX and (normalised or corrects_choices)):
        raise ModelError(
            f"{path} chooses experts by expert_gating_func = {gating}, with{'' if normalised else 'out'} expert_weights_norm "
            f"and with{'' if corrects_choices else 'out'} biases (exp_probs_b); read are models with latent attention that do so "
            f"as DeepSeek-V3 ({_SIGMOID}) or as DeepSeek-V2 ({_SOFTMAX}, without either)."
        )
    fields |= {
        "n_routed_experts": count,
        "num_experts_per_tok": value("expert_used_count"),
        "moe_intermediate_size": value("expert_feed_forward_length"),
        "n_shared_experts": value("expert_shared_count", int, 0),
        "first_k_dense_replace": value("leading_dense_block_count", int, 0),
        "routed_scaling_factor": value("expert_weights_scale", float, 0.0) or 1.0,
        "n_group": groups or 1,
        "topk_group": value("expert_group_used_count", int, 0) or 1,
    }
    if gating == _SOFTMAX:
        method = "group_limited_greedy" if groups > 1 else "greedy"
        return Described("deepseek_v2", "DeepseekV2ForCausalLM", fields | {"topk_method": method})
    return Described("deepseek_v3", "DeepseekV3ForCausalLM", fields | {"norm_topk_prob": normalised})

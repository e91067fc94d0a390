"""Random tiny configs of families of models, for `sweep_families.py`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _counts(rng: random.Random, least: int = 1) -> tuple[int, int]:
    """Experts, and how many of them a token takes."""
    experts = rng.choice([n for n in (1, 2, 3, 4, 8, 16, 60, 64) if n >= least])
    return experts, rng.randint(1, min(8, experts))


def groups(rng: random.Random) -> dict[str, Any]:
    """What DeepSeek-V3's routers differ in."""
    size, groups = rng.choice((2, 3, 4, 8)), rng.choice((1, 2, 4, 8))
    kept = rng.randint(1, groups)
    return {
        "n_routed_experts": size * groups,
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": rng.randint(1, min(8, size * kept)),
        "n_shared_experts": rng.randint(1, 2),
        "moe_intermediate_size": rng.choice((24, 32)),
        "first_k_dense_replace": rng.randint(0, 2),
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice((1.0, 2.5)),
        "attention_bias": rng.random() < 0.5,
    }


def _qwen(rng: random.Random) -> dict[str, Any]:
    experts, top = _counts(rng)
    return {
        "num_experts": experts,
        "num_experts_per_tok": top,
        "moe_intermediate_size": rng.choice((24, 32)),
        "norm_topk_prob": rng.random() < 0.5,
        "decoder_sparse_step": rng.randint(1, 2),
        "mlp_only_layers": rng.choice(([], [0], [2])),
        "hidden_act": rng.choice(("silu", "silu", "gelu_pytorch_tanh")),
    }


def _of_few_fields(rng: random.Random) -> dict[str, Any]:
    experts, top = _counts(rng)
    return {"num_local_experts": experts, "num_experts_per_tok": top}


def _mixtral(rng: random.Random) -> Any:
    return transformers.MixtralConfig(**SIZES, **_of_few_fields(rng), sliding_window=rng.choice((None, 20)))


def _qwen2_moe(rng: random.Random) -> Any:
    shared = {"shared_expert_intermediate_size": rng.choice((32, 48)), "qkv_bias": rng.random() < 0.7}
    return transformers.Qwen2MoeConfig(**SIZES, **_qwen(rng), **shared)


def _qwen3_moe(rng: random.Random) -> Any:
    return transformers.Qwen3MoeConfig(**SIZES, **_qwen(rng), head_dim=rng.choice((16, 32)))


def _delta(rng: random.Random) -> dict[str, Any]:
    """Layers of gated delta rules below attention, which a draft module is like."""
    key_heads = rng.choice((1, 2, 3))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rng.choice((0.25, 0.5, 1.0))}
    return {
        "layer_types": [
            *rng.choices(("linear_attention", "linear_attention", "full_attention"), k=2),
            "full_attention",
        ],
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * rng.choice((1, 2, 3)),
        "linear_key_head_dim": rng.choice((8, 24, 32)),
        "linear_value_head_dim": rng.choice((8, 16, 40)),
        "linear_conv_kernel_dim": rng.choice((2, 3, 4)),
        "head_dim": rng.choice((16, 32)),
        "attention_bias": rng.random() < 0.3,
        "rms_norm_eps": 1e-3,
        "rope_parameters": rope,
    }


def _qwen3_next(rng: random.Random) -> Any:
    experts = _qwen(rng) | {"hidden_act": "silu", "shared_expert_intermediate_size": rng.choice((32, 48))}
    return transformers.Qwen3NextConfig(**SIZES, **_delta(rng), **experts)


def _qwen3_5_text(rng: random.Random) -> Any:
    return transformers.Qwen3_5TextConfig(**SIZES, **_delta(rng), tie_word_embeddings=rng.random() < 0.5)


def _qwen3_5_moe_text(rng: random.Random) -> Any:
    experts, top = _counts(rng)
    sizes = {"moe_intermediate_size": rng.choice((24, 32)), "shared_expert_intermediate_size": rng.choice((32, 48))}
    return transformers.Qwen3_5MoeTextConfig(
        **SIZES, **_delta(rng), **sizes, num_experts=experts, num_experts_per_tok=top
    )


def _olmo_hybrid(rng: random.Random) -> Any:
    fields = _delta(rng)
    rotated = rng.random() < 0.5
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0 if rotated else None}
    del fields["head_dim"]
    if "linear_attention" not in fields["layer_types"]:  # which transformers refuses
        fields["layer_types"][0] = "linear_attention"
    return transformers.OlmoHybridConfig(**SIZES, **fields, linear_allow_neg_eigval=rng.random() < 0.7, pad_token_id=0)


def _convolutions(rng: random.Random) -> dict[str, Any]:
    """Short convolutions below attention, which a draft module is like."""
    return {
        "layer_types": [*rng.choices(("conv", "conv", "full_attention"), k=2), "full_attention"],
        "conv_L_cache": rng.choice((2, 3, 3, 4)),
        "conv_bias": rng.random() < 0.3,
        "tie_word_embeddings": rng.random() < 0.7,
    }


def _lfm2(rng: random.Random) -> Any:
    return transformers.Lfm2Config(
        **SIZES,
        **_convolutions(rng),
        block_auto_adjust_ff_dim=rng.random() < 0.7,
        block_multiple_of=rng.choice((8, 32)),
        block_ffn_dim_multiplier=rng.choice((1.0, 1.3)),
    )


def _lfm2_moe(rng: random.Random) -> Any:
    experts, top = _counts(rng)
    return transformers.Lfm2MoeConfig(
        **SIZES,
        **_convolutions(rng),
        num_experts=experts,
        num_experts_per_tok=top,
        moe_intermediate_size=rng.choice((24, 32)),
        num_dense_layers=rng.randint(0, 2),
        use_expert_bias=rng.random() < 0.7,
        norm_topk_prob=rng.random() < 0.5,
        routed_scaling_factor=rng.choice((1.0, 2.5)),
    )


def _mamba(rng: random.Random) -> dict[str, Any]:
    groups = rng.choice((1, 2, 4))
    heads = groups * rng.choice((1, 2, 4))
    return {
        "mamba_n_heads": heads,
        "mamba_n_groups": groups,
        "mamba_d_state": rng.choice((8, 16, 24, 40)),
        "mamba_d_conv": rng.choice((2, 3, 4, 4)),
        "mamba_conv_bias": rng.random() < 0.7,
        "mamba_proj_bias": rng.random() < 0.3,
        "time_step_limit": rng.choice(((0.0, float("inf")), (0.0, float("inf")), (0.3, 1.5))),
    }


def _bamba(rng: random.Random) -> Any:
    return transformers.BambaConfig(
        **SIZES,
        **_mamba(rng),
        attn_layer_indices=rng.choice(([2], [0, 2], [1, 2])),
        attention_bias=rng.random() < 0.3,
        mlp_bias=rng.random() < 0.3,
    )


def _granitemoehybrid(rng: random.Random) -> Any:
    experts, top = _counts(rng)
    return transformers.GraniteMoeHybridConfig(
        **SIZES,
        **_mamba(rng),
        num_local_experts=experts,
        num_experts_per_tok=top,
        shared_intermediate_size=rng.choice((32, 48)),
        layer_types=[*rng.choices(("linear_attention", "linear_attention", "full_attention"), k=2), "full_attention"],
        position_embedding_type=rng.choice((None, "rope")),
        embedding_multiplier=rng.choice((1.0, 12.0)),
        residual_multiplier=rng.choice((1.0, 0.22)),
        attention_multiplier=rng.choice((0.25, 0.1)),
        logits_scaling=rng.choice((1.0, 6.0)),
    )


def _nemotron_h(rng: random.Random) -> Any:
    """Of parts in any order; some layers have attention."""
    experts, top = _counts(rng)
    groups = rng.choice((1, 2, 4))
    of_experts = groups if experts % groups == 0 and experts // groups >= 2 else 1
    bias, kinds = rng.random() < 0.3, ["full_attention", *rng.choices(("linear_attention", "moe", "mlp"), k=4)]
    rng.shuffle(kinds)
    return transformers.NemotronHConfig(
        **SIZES,
        layers_block_type=kinds,
        head_dim=rng.choice((16, 32)),
        mamba_num_heads=groups * rng.choice((1, 2, 4)),
        mamba_head_dim=rng.choice((8, 16, 24)),
        n_groups=groups,
        ssm_state_size=rng.choice((8, 16, 40)),
        conv_kernel=rng.choice((2, 4)),
        use_conv_bias=rng.random() < 0.7,
        use_bias=bias,
        mamba_proj_bias=bias,
        mlp_bias="moe" not in kinds and rng.random() < 0.5,
        n_routed_experts=experts,
        num_experts_per_tok=1 if of_experts > 1 else top,
        n_group=of_experts,
        topk_group=1,
        moe_intermediate_size=rng.choice((24, 32)),
        moe_shared_expert_intermediate_size=rng.choice((32, 48)),
        moe_latent_size=rng.choice((None, 24)),
        norm_topk_prob=rng.random() < 0.5,
        routed_scaling_factor=rng.choice((1.0, 2.5)),
        time_step_min=1e-9,  # the least step, of prompts alone, in transformers' code
    )


def _falcon_h1(rng: random.Random) -> Any:
    sizes = _mamba(rng)
    bias = sizes["mamba_proj_bias"]

    def factor() -> float:
        return rng.choice((1.0, 0.3, 0.7, 1.8))

    return transformers.FalconH1Config(
        **SIZES,
        **sizes,
        projectors_bias=bias,
        mamba_d_ssm=rng.choice((None, sizes["mamba_n_heads"] * 8, sizes["mamba_n_heads"] * 12)),
        mamba_rms_norm=rng.random() < 0.5,
        mamba_norm_before_gate=rng.random() < 0.5,
        lm_head_multiplier=factor(),
        embedding_multiplier=factor(),
        mlp_multipliers=[factor(), factor()],
        key_multiplier=factor(),
        attention_in_multiplier=factor(),
        attention_out_multiplier=factor(),
        ssm_multipliers=[factor() for _ in range(5)],
        ssm_in_multiplier=1.0 if bias else factor(),
        ssm_out_multiplier=factor(),
    )


def _gemma4_text(rng: random.Random) -> Any:
    kinds = ["sliding_attention", "full_attention"]
    layer_types = [*rng.choice((kinds, kinds[:1] * 2, kinds[1:] * 2)), *rng.choice((kinds, kinds[1:]))]
    own = max(layer_types.index(kind) for kind in set(layer_types)) + 1
    width = rng.choice((0, 8, 16))  # without which transformers' code of layers that share fails
    fields = SIZES | {
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "num_key_value_heads": rng.choice((1, 2, 4)),
        "head_dim": rng.choice((16, 32)),
        "global_head_dim": rng.choice((16, 32, 64)),
        "sliding_window": rng.choice((8, 20, 300)),
        "attention_k_eq_v": rng.random() < 0.5,
        "num_global_key_value_heads": rng.choice((None, 1, 2)),
        "attention_bias": rng.random() < 0.2,
        "num_kv_shared_layers": rng.randint(0, len(layer_types) - own) if width else 0,
        "use_double_wide_mlp": rng.random() < 0.5,
        "hidden_size_per_layer_input": width,
        "vocab_size_per_layer_input": SIZES["vocab_size"],
        "final_logit_softcapping": rng.choice((None, 5.0)),
        "tie_word_embeddings": rng.random() < 0.7,
        "use_bidirectional_attention": rng.choice((None, "vision")),
        "rms_norm_eps": 1e-3,
    }
    if rng.random() < 0.4:
        experts, top = _counts(rng)
        fields |= {"enable_moe_block": True, "num_experts": experts, "top_k_experts": top, "moe_intermediate_size": 32}
    return transformers.Gemma4TextConfig(**fields)


def _ernie4_5_moe(rng: random.Random) -> Any:
    experts, top = _counts(rng)
    return transformers.Ernie4_5_MoeConfig(
        **SIZES,
        moe_num_experts=experts,
        moe_k=top,
        moe_intermediate_size=rng.choice((24, 32)),
        moe_num_shared_experts=rng.randint(0, 2),
        moe_layer_start_index=rng.randint(0, 1),
        moe_layer_end_index=rng.choice((-1, 1, 2)),
        moe_layer_interval=rng.randint(1, 2),
        moe_norm_min=rng.choice((1e-12, 0.5)),
        tie_word_embeddings=rng.random() < 0.5,
    )


def _glm4_moe(rng: random.Random) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rng.choice((0.5, 1.0))}
    head = {"head_dim": rng.choice((16, 32)), "use_qk_norm": rng.random() < 0.5}
    return transformers.Glm4MoeConfig(**SIZES, **groups(rng), **head, rope_parameters=rope)


def _dots1(rng: random.Random) -> Any:
    return transformers.Dots1Config(**SIZES, **groups(rng), head_dim=16)


def _granitemoe(rng: random.Random) -> Any:
    factors = {
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.1,
    }
    return transformers.GraniteMoeConfig(**SIZES, **_of_few_fields(rng), **factors)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


def latent(rng: random.Random) -> dict[str, Any]:
    """Sizes of latent attention, some of them odd, of which the norms of latents share no epsilon with the others."""
    heads, hidden_size = rng.choice(((4, 64), (5, 80), (16, 64), (20, 80), (24, 96), (40, 80)))
    q_rank = rng.choice((None, 17, 24))
    yarn = YARN | {"mscale": rng.choice((0.707, 1.0)), "mscale_all_dim": rng.choice((0.707, 1.0))}
    return SIZES | {
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_size": hidden_size,
        "q_lora_rank": q_rank,
        "kv_lora_rank": rng.choice((21, 32, 48)),
        "qk_rope_head_dim": rng.choice((6, 8, 16)),
        "qk_nope_head_dim": rng.choice((13, 16, 24)),
        "v_head_dim": rng.choice((11, 16, 24)),
        "attention_bias": q_rank is not None and rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.3,
        "rms_norm_eps": rng.choice((1e-6, 0.1)),
        "rope_parameters": rng.choice(({"rope_type": "default", "rope_theta": 10000.0}, yarn, YARN)),
    }


def _deepseek_v2(rng: random.Random) -> Any:
    fields = groups(rng) | latent(rng) | {"norm_topk_prob": False}
    fields["topk_method"] = rng.choice(("greedy", "group_limited_greedy"))
    if fields["topk_method"] == "greedy":
        fields["n_group"] = fields["topk_group"] = None
    for name in ("kv_lora_rank", "qk_nope_head_dim"):
        fields[name] += fields[name] % 2  # transformers' code rotates complex numbers, which begin at even places
    return transformers.DeepseekV2Config(**fields)


def _deepseek_v3(rng: random.Random) -> Any:
    return transformers.DeepseekV3Config(**groups(rng) | latent(rng), rope_interleave=rng.random() < 0.5)


def _glm4_moe_lite(rng: random.Random) -> Any:
    fields = groups(rng) | latent(rng)
    num_dense = fields.pop("first_k_dense_replace")
    kinds = ["dense"] * num_dense + ["sparse"] * (fields["num_hidden_layers"] - num_dense)
    return transformers.Glm4MoeLiteConfig(**fields, mlp_layer_types=kinds, rope_interleave=rng.random() < 0.7)


def _minicpm3(rng: random.Random) -> Any:
    fields = latent(rng)
    pairs = fields["qk_rope_head_dim"] // 2
    if rng.random() < 0.5:
        fields["rope_parameters"] = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": rng.choice((16, 128)),  # fewer than any sequence's tokens, or more
            "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
            "long_factor": [1.0 + 0.5 * pair for pair in range(pairs)],
        }
    factors = {"scale_emb": 3, "scale_depth": rng.choice((1.4, None)), "dim_model_base": rng.choice((32, None))}
    return transformers.MiniCPM3Config(**fields, **factors, mlp_bias=rng.random() < 0.3)


def _youtu(rng: random.Random) -> Any:
    return transformers.YoutuConfig(**latent(rng), rope_interleave=rng.random() < 0.5)


_WINDOWS = {"sliding_window": 20}


def _gpt_oss(rng: random.Random) -> Any:
    return transformers.GptOssConfig(
        **SIZES,
        **_of_few_fields(rng),
        **_WINDOWS,
        head_dim=rng.choice((16, 32)),
        attention_bias=rng.random() < 0.8,
        swiglu_limit=rng.choice((0.5, 7.0)),
        rope_parameters=YARN | {"truncate": rng.random() < 0.3, "beta_fast": 32.0, "beta_slow": 1.0},
    )


def _gemma2(rng: random.Random, config: Any = transformers.Gemma2Config) -> Any:
    return config(
        **SIZES,
        **_WINDOWS,
        head_dim=rng.choice((16, 32)),
        query_pre_attn_scalar=rng.choice((16, 24)),
        attn_logit_softcapping=rng.choice((None, 2.0, 50.0)),
        final_logit_softcapping=rng.choice((None, 4.0, 30.0)),
    )


def _vaultgemma(rng: random.Random) -> Any:
    return _gemma2(rng, transformers.VaultGemmaConfig)


def _granite_swa(rng: random.Random, config: Any = None, **fields: Any) -> Any:
    factors = {
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
    }
    thetas = rng.choice((None, [10000.0, 0, 500.0]))
    kind = config or transformers.GraniteSWAConfig
    return kind(**SIZES, **_WINDOWS, **factors, **fields, layer_rope_theta=thetas)


def _granitemoe_swa(rng: random.Random) -> Any:
    shared = {"shared_intermediate_size": rng.choice((0, 32))}
    return _granite_swa(rng, transformers.GraniteMoeSWAConfig, **shared, **_of_few_fields(rng))


FAMILIES: dict[str, Callable[[random.Random], Any]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "qwen3_5_text": _qwen3_5_text,
    "qwen3_5_moe_text": _qwen3_5_moe_text,
    "olmo_hybrid": _olmo_hybrid,
    "lfm2": _lfm2,
    "lfm2_moe": _lfm2_moe,
    "bamba": _bamba,
    "granitemoehybrid": _granitemoehybrid,
    "falcon_h1": _falcon_h1,
    "nemotron_h": _nemotron_h,
    "gemma4_text": _gemma4_text,
    "ernie4_5_moe": _ernie4_5_moe,
    "glm4_moe": _glm4_moe,
    "dots1": _dots1,
    "granitemoe": _granitemoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "glm4_moe_lite": _glm4_moe_lite,
    "minicpm3": _minicpm3,
    "youtu": _youtu,
    "gpt_oss": _gpt_oss,
    "gemma2": _gemma2,
    "vaultgemma": _vaultgemma,
    "granite_swa": _granite_swa,
    "granitemoe_swa": _granitemoe_swa,
}
"""By model type: a random config."""

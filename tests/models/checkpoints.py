"""Tiny random models in the layouts that transformers writes."""

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    CwmConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    Ernie4_5Config,
    FalconH1Config,
    Gemma2Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeLiteConfig,
    GptOssConfig,
    GraniteConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    Lfm2Config,
    Lfm2MoeConfig,
    LlamaConfig,
    MiniCPM3Config,
    MinistralConfig,
    MistralConfig,
    MixtralConfig,
    NemotronHConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    SeedOssConfig,
    SmolLM3Config,
    YoutuConfig,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,  # 12 of 16 dimensions
    "short_factor": [1.0, 1.1, 1.2, 1.4, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0}
WINDOW = 24
MIXED_LAYERS = {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 32}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "rms_norm_eps": 0.1,  # of all norms but those of latents
}
LATENT_YARN = YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7}
LATENT_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
DELTA = SIZES | {
    "rms_norm_eps": 1e-3,  # of heads too, which may be small
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 24,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
GEMMA4 = SIZES | {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "sliding_window": WINDOW,
    "num_key_value_heads": 4,  # twice the bytes of layers that see all tokens, as in 26B-A4B and 31B
    "head_dim": 16,
    "global_head_dim": 32,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "final_logit_softcapping": 4.0,
    "rms_norm_eps": 1e-3,  # of heads too, which may be small
}
GEMMA4_SHARED = GEMMA4 | {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_key_value_heads": 2,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
}
HYBRID = {name: value for name, value in DELTA.items() if name != "head_dim"} | {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": 0,
}
CONVOLUTIONS = SIZES | {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
MAMBA = SIZES | {
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "time_step_limit": (0.05, 2.0),
}
FALCON_FACTORS = {
    "lm_head_multiplier": 0.3,
    "embedding_multiplier": 5.0,
    "mlp_multipliers": [0.7, 0.4],
    "key_multiplier": 0.6,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.7, 0.5, 0.4, 1.2, 0.9],
    "ssm_out_multiplier": 0.6,
}
GRANITE_HYBRID = MAMBA | {
    "layer_types": ["mamba", "attention", "mamba"],
    "shared_intermediate_size": 48,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 6.0,
}
CAPPED = SIZES | {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 4.0,
}
SINKS = SIZES | {
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "layer_rope_theta": [10000.0, 0, 500.0],
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.2,
    "logits_scaling": 6.0,
}
ONE_PART = SIZES | {
    "layers_block_type": ["mamba", "moe", "attention", "mlp", "mamba"],
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 24,
    "time_step_min": 1e-9,  # the least step, of prompts alone, in transformers' code
}
MIXTURES = {
    "n_routed_experts": 12,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
GROUPS = EXPERTS | {"n_routed_experts": 12, "n_group": 4, "topk_group": 2}

HF_CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama with every bias": lambda: LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama with llama3 rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "llama with linear rope": lambda: LlamaConfig(**SIZES, rope_parameters=LINEAR_ROPE),
    "mistral without window": lambda: MistralConfig(**SIZES, sliding_window=None),
    "mistral with windows": lambda: MistralConfig(**SIZES, sliding_window=WINDOW),
    "ministral with windows in some layers": lambda: MinistralConfig(
        **SIZES | MIXED_LAYERS, head_dim=32, sliding_window=WINDOW
    ),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2 with windows in later layers": lambda: Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32),
    "qwen3 tied": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3 next": lambda: Qwen3NextConfig(**DELTA | EXPERTS, num_experts=8, shared_expert_intermediate_size=48),
    "qwen3 next without experts in a layer": lambda: Qwen3NextConfig(
        **DELTA | EXPERTS | {"layer_types": ["full_attention", "linear_attention"]},
        num_experts=8,
        shared_expert_intermediate_size=48,
        norm_topk_prob=False,
        mlp_only_layers=[1],
    ),
    "lfm2": lambda: Lfm2Config(**CONVOLUTIONS, block_multiple_of=32),
    "lfm2 with biases": lambda: Lfm2Config(
        **CONVOLUTIONS | {"layer_types": ["full_attention", "conv", "full_attention"]},
        conv_bias=True,
        conv_L_cache=2,
        block_auto_adjust_ff_dim=False,
        tie_word_embeddings=False,
    ),
    "lfm2 moe": lambda: Lfm2MoeConfig(
        **CONVOLUTIONS | EXPERTS, num_experts=8, num_dense_layers=1, routed_scaling_factor=1.5
    ),
    "bamba": lambda: BambaConfig(**MAMBA, attn_layer_indices=[1]),
    "bamba with biases": lambda: BambaConfig(
        **MAMBA | {"mamba_n_groups": 1, "time_step_limit": (0.0, float("inf"))},
        attn_layer_indices=[0, 2],
        attention_bias=True,
        mamba_proj_bias=True,
        mamba_conv_bias=False,
        mamba_d_conv=3,
        mlp_bias=True,
    ),
    "falcon h1": lambda: FalconH1Config(
        **MAMBA | FALCON_FACTORS, mamba_d_ssm=96, attention_in_multiplier=1.5, ssm_in_multiplier=0.8, head_dim=32
    ),
    "falcon h1 with norms and biases": lambda: FalconH1Config(
        **MAMBA | FALCON_FACTORS,
        mamba_d_ssm=None,
        mamba_rms_norm=True,
        mamba_norm_before_gate=True,
        attention_bias=True,
        mamba_proj_bias=True,
        projectors_bias=True,
        mlp_bias=True,
    ),
    "falcon h1 with gates before norms": lambda: FalconH1Config(
        **MAMBA, mamba_d_ssm=64, mamba_rms_norm=True, mamba_norm_before_gate=False, tie_word_embeddings=True
    ),
    "granite 4.0-h": lambda: GraniteMoeHybridConfig(
        **GRANITE_HYBRID, num_local_experts=8, num_experts_per_tok=3, tie_word_embeddings=True
    ),
    "granite 4.0-h dense": lambda: GraniteMoeHybridConfig(
        **GRANITE_HYBRID, num_local_experts=0, position_embedding_type="rope"
    ),
    "granite 4.0 without mamba": lambda: GraniteMoeHybridConfig(
        **GRANITE_HYBRID | {"layer_types": ["attention"] * 3}, num_local_experts=0, position_embedding_type="rope"
    ),
    "nemotron h": lambda: NemotronHConfig(**ONE_PART | MIXTURES),
    "nemotron h with latent experts": lambda: NemotronHConfig(
        **ONE_PART | MIXTURES | {"layers_block_type": ["moe", "attention", "mamba", "moe"]},
        moe_latent_size=24,
        norm_topk_prob=False,
        tie_word_embeddings=True,
    ),
    "nemotron h dense with biases": lambda: NemotronHConfig(
        **ONE_PART | {"layers_block_type": ["mlp", "mamba", "mamba", "attention"]},
        use_bias=True,
        mamba_proj_bias=True,
        mlp_bias=True,
        use_conv_bias=False,
        conv_kernel=3,
    ),
    "olmo hybrid": lambda: hf_config("OlmoHybridConfig", **HYBRID, rope_parameters={"rope_theta": None}),
    "olmo hybrid with rope": lambda: hf_config(
        "OlmoHybridConfig",
        **HYBRID | {"layer_types": ["full_attention", "full_attention", "linear_attention"]},
        linear_allow_neg_eigval=False,
        attention_bias=True,
    ),
    "qwen3.5": lambda: Qwen3_5TextConfig(**DELTA, tie_word_embeddings=True),
    "qwen3.5 with biases": lambda: Qwen3_5TextConfig(
        **DELTA | {"linear_num_value_heads": 2},
        attention_bias=True,
        linear_conv_kernel_dim=2,
        partial_rotary_factor=0.5,
    ),
    "qwen3.5 moe": lambda: Qwen3_5MoeTextConfig(**DELTA | EXPERTS, num_experts=8, shared_expert_intermediate_size=48),
    "qwen3 with yarn rope": lambda: Qwen3Config(**SIZES, head_dim=32, rope_parameters=YARN_ROPE),
    "qwen3 with windows in some layers": lambda: Qwen3Config(
        **SIZES | MIXED_LAYERS, head_dim=32, use_sliding_window=True, sliding_window=WINDOW
    ),
    "ernie 4.5": lambda: Ernie4_5Config(**SIZES, head_dim=32),
    "ernie 4.5 with every bias": lambda: Ernie4_5Config(**SIZES, head_dim=16, use_bias=True),
    "gemma 3": lambda: Gemma3TextConfig(
        **SIZES | MIXED_LAYERS,
        head_dim=32,
        query_pre_attn_scalar=24,
        sliding_window=WINDOW,
        rope_parameters=GEMMA3_ROPE,
    ),
    "gemma 4 e4b": lambda: hf_config("Gemma4TextConfig", **GEMMA4_SHARED),
    "gemma 4 26b": lambda: hf_config(
        "Gemma4TextConfig",
        **GEMMA4,
        hidden_size_per_layer_input=0,
        enable_moe_block=True,
        num_experts=8,
        top_k_experts=3,
        moe_intermediate_size=32,
    ),
    "gemma 4 12b": lambda: hf_config(
        "Gemma4UnifiedTextConfig", **GEMMA4 | {"num_attention_heads": 8, "num_key_value_heads": 8}
    ),
    "granite": lambda: GraniteConfig(
        **SIZES, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1, logits_scaling=6.0
    ),
    "phi 3 with windows": lambda: Phi3Config(**SIZES, pad_token_id=0, sliding_window=WINDOW),
    "phi 4 with long rope": lambda: Phi3Config(
        **SIZES, pad_token_id=0, rope_parameters=LONG_ROPE, original_max_position_embeddings=64
    ),
    "seed oss": lambda: SeedOssConfig(
        **SIZES, head_dim=16, attention_bias=True, attention_out_bias=False, mlp_bias=True
    ),
    "seed oss with another choice of biases": lambda: SeedOssConfig(
        **SIZES, head_dim=16, attention_bias=False, attention_out_bias=True
    ),
    "cwm with windows in some layers": lambda: CwmConfig(
        **SIZES | MIXED_LAYERS, head_dim=16, sliding_window=WINDOW, rope_parameters=LLAMA3_ROPE
    ),
    "llama with dynamic rope": lambda: LlamaConfig(**SIZES, rope_parameters=DYNAMIC_ROPE),
    "smollm 3": lambda: SmolLM3Config(**SIZES, pad_token_id=0, no_rope_layer_interval=2),
    "smollm 3 with windows": lambda: SmolLM3Config(
        **SIZES | {"num_hidden_layers": 3},
        pad_token_id=0,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=WINDOW,
    ),
    "mixtral with windows": lambda: MixtralConfig(**SIZES, num_local_experts=8, sliding_window=WINDOW),
    "qwen2 moe": lambda: Qwen2MoeConfig(
        **SIZES | {"num_hidden_layers": 3},
        **EXPERTS,
        num_experts=8,
        shared_expert_intermediate_size=48,
        mlp_only_layers=[1],
    ),
    "ernie 4.5 moe": lambda: Ernie4_5_MoeConfig(
        **SIZES | {"num_hidden_layers": 3},
        moe_num_experts=8,
        moe_k=3,
        moe_intermediate_size=32,
        moe_num_shared_experts=2,
        moe_layer_start_index=0,
        moe_layer_end_index=1,
    ),
    "glm 4.5": lambda: Glm4MoeConfig(
        **SIZES | {"num_hidden_layers": 3},
        **EXPERTS,
        head_dim=16,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "dots 1": lambda: Dots1Config(
        **SIZES, **EXPERTS, head_dim=16, n_routed_experts=8, n_shared_experts=1, first_k_dense_replace=1
    ),
    "granite moe": lambda: GraniteMoeConfig(
        **SIZES, num_local_experts=8, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.1
    ),
    "deepseek v2": lambda: DeepseekV2Config(
        **LATENT | GROUPS, q_lora_rank=None, topk_method="group_limited_greedy", first_k_dense_replace=1
    ),
    "deepseek v3": lambda: DeepseekV3Config(
        **LATENT | GROUPS, q_lora_rank=24, attention_bias=True, first_k_dense_replace=1, rope_parameters=LATENT_YARN
    ),
    "glm 4.7 flash": lambda: Glm4MoeLiteConfig(**LATENT | GROUPS, q_lora_rank=24, rope_interleave=False),
    "minicpm 3": lambda: MiniCPM3Config(
        **LATENT,
        q_lora_rank=24,
        dim_model_base=32,
        rope_parameters=LATENT_LONG_ROPE,
    ),
    "gpt oss": lambda: GptOssConfig(
        **SIZES,
        num_local_experts=8,
        num_experts_per_tok=3,
        head_dim=16,
        sliding_window=WINDOW,
        rope_parameters=YARN_ROPE | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
    "gemma 2": lambda: Gemma2Config(**CAPPED),
    "vault gemma": lambda: hf_config("VaultGemmaConfig", **CAPPED),
    "granite swa": lambda: hf_config("GraniteSWAConfig", **SINKS),
    "granite moe swa": lambda: hf_config(
        "GraniteMoeSWAConfig", **SINKS, num_local_experts=8, num_experts_per_tok=3, shared_intermediate_size=48
    ),
    "youtu": lambda: YoutuConfig(**LATENT, q_lora_rank=None, tie_word_embeddings=True),
    "qwen3 moe": lambda: Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=16, num_experts=8, norm_topk_prob=True, decoder_sparse_step=2
    ),
}


def hf_config(name, **fields):
    """A config of transformers, of a class that only later versions may have."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return getattr(transformers, name)(**fields)


def random_hf_model(hf_config):
    """A transformers model with every parameter random, norms and biases included, so that none can be left out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or name.endswith("scale") else 0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.2)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model

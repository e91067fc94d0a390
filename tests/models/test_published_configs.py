"""config.json as published with well-known models, often in the form that older transformers wrote."""

import json
import math

import pytest
import torch

from stepgraph.models import resolve
from stepgraph.models.registry import ARCHITECTURES

SILU = {"hidden_act": "silu", "torch_dtype": "bfloat16"}
DEEPSEEK = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_layer_freq": 1,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "seq_aux": True,
    "tie_word_embeddings": False,
    "v_head_dim": 128,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
MINICPM3_FACTORS = [
    *(1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725, 2.093982484148734),
    *(3.1446935121267696, 4.937952647693647, 7.524541999994549, 10.475458000005451, 13.062047352306353),
    *(14.85530648787323, 15.906017515851266, 16.461961959767827, 16.740306425132907, 16.87581087164081),
    16.940876586213285,
]
PUBLISHED = {
    "google/gemma-3-1b-it": (
        999_885_952,
        {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "bos_token_id": 2,
            "cache_implementation": "hybrid",
            "eos_token_id": [1, 106],
            "final_logit_softcapping": None,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-6,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": 512,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "vocab_size": 262144,
        },
    ),
    "microsoft/Phi-4-mini-instruct": (
        3_836_021_760,
        SILU
        | {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": "phi3",
            "attention_bias": False,
            "bos_token_id": 199999,
            "eos_token_id": 199999,
            "full_attn_mod": 1,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "original_max_position_embeddings": 4096,
            "pad_token_id": 199999,
            "partial_rotary_factor": 0.75,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},  # shortened
            "rope_theta": 10000.0,
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
    ),
    "baidu/ERNIE-4.5-0.3B-PT": (
        360_748_032,
        SILU
        | {
            "architectures": ["Ernie4_5ForCausalLM"],
            "model_type": "ernie4_5",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 131072,
            "num_attention_heads": 16,
            "num_hidden_layers": 18,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "use_bias": False,
            "vocab_size": 103424,
        },
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        3_075_098_624,
        SILU
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "model_type": "smollm3",
            "attention_bias": False,
            "eos_token_id": 128012,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pad_token_id": 128004,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
    ),
    "ibm-granite/granite-3.3-2b-instruct": (
        2_533_539_840,
        SILU
        | {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            "attention_bias": False,
            "attention_multiplier": 0.015625,
            "bos_token_id": 0,
            "embedding_multiplier": 12.0,
            "eos_token_id": 0,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "logits_scaling": 8.0,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "residual_multiplier": 0.22,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 49159,
        },
    ),
    "mistralai/Mistral-7B-v0.1": (
        7_241_732_096,
        SILU
        | {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (
        46_702_792_704,
        SILU
        | {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "attention_dropout": 0.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": (
        21_825_437_888,
        SILU
        | {
            "architectures": ["Ernie4_5_MoeForCausalLM"],
            "model_type": "ernie4_5_moe",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "max_position_embeddings": 131072,
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_intermediate_size": 1536,
            "moe_k": 6,
            "moe_layer_end_index": 27,
            "moe_layer_interval": 1,
            "moe_layer_start_index": 1,
            "moe_num_experts": 64,
            "moe_num_shared_experts": 2,
            "moe_use_aux_free": True,
            "num_attention_heads": 20,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "num_nextn_predict_layers": 1,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000,
            "tie_word_embeddings": True,
            "use_bias": False,
            "vocab_size": 103424,
        },
    ),
    "zai-org/GLM-4.5-Air": (
        106_852_251_264,  # without its draft module
        SILU
        | {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": "glm4_moe",
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": [151329, 151336, 151338],
            "first_k_dense_replace": 1,
            "head_dim": 128,
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 96,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 46,
            "num_key_value_heads": 8,
            "num_nextn_predict_layers": 1,
            "pad_token_id": 151329,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "use_qk_norm": False,
            "vocab_size": 151552,
        },
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        SILU
        | {
            "architectures": ["Qwen2MoeForCausalLM"],
            "model_type": "qwen2_moe",
            "bos_token_id": 151643,
            "decoder_sparse_step": 1,
            "eos_token_id": 151643,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
    ),
    "deepseek-ai/DeepSeek-V2-Lite": (
        15_706_484_224,
        SILU
        | DEEPSEEK
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 27,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 1.0,
            "scoring_func": "softmax",
            "topk_group": 1,
            "topk_method": "greedy",
            "vocab_size": 102400,
        },
    ),
    "deepseek-ai/DeepSeek-V2": (
        235_741_434_880,
        SILU
        | DEEPSEEK
        | {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "bos_token_id": 100000,
            "eos_token_id": 100001,
            "first_k_dense_replace": 1,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_group": 8,
            "n_routed_experts": 160,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_attention_heads": 128,
            "num_experts_per_tok": 6,
            "num_hidden_layers": 60,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
            "routed_scaling_factor": 16.0,
            "scoring_func": "softmax",
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "vocab_size": 102400,
        },
    ),
    "deepseek-ai/DeepSeek-R1": (
        671_026_419_200,  # without its draft module
        SILU
        | DEEPSEEK
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "bos_token_id": 0,
            "ep_size": 1,
            "eos_token_id": 1,
            "first_k_dense_replace": 3,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_group": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 128,
            "num_nextn_predict_layers": 1,
            "q_lora_rank": 1536,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "vocab_size": 129280,
        },
    ),
    "moonshotai/Kimi-K2-Instruct": (
        1_026_408_232_448,
        SILU
        | DEEPSEEK
        | {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "kimi_k2",
            "bos_token_id": 163584,
            "eos_token_id": 163585,
            "first_k_dense_replace": 1,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "max_position_embeddings": 131072,
            "moe_intermediate_size": 2048,
            "n_group": 1,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 61,
            "num_key_value_heads": 64,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": 1536,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
            },
            "rope_scaling": YARN
            | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
            "rope_theta": 50000.0,
            "routed_scaling_factor": 2.827,
            "scoring_func": "sigmoid",
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "vocab_size": 163840,
        },
    ),
    "zai-org/GLM-4.7-Flash": (
        29_943_393_920,  # without its draft module
        {
            "architectures": ["Glm4MoeLiteForCausalLM"],
            "model_type": "glm4_moe_lite",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "eos_token_id": [154820, 154827, 154829],
            "first_k_dense_replace": 1,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 10240,
            "kv_lora_rank": 512,
            "max_position_embeddings": 202752,
            "moe_intermediate_size": 1536,
            "n_group": 1,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "num_attention_heads": 20,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 47,
            "num_key_value_heads": 20,
            "num_nextn_predict_layers": 1,
            "pad_token_id": 154820,
            "partial_rotary_factor": 1.0,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "routed_scaling_factor": 1.8,
            "tie_word_embeddings": False,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "v_head_dim": 256,
            "vocab_size": 154880,
        },
    ),
    "openbmb/MiniCPM3-4B": (
        4_073_875_968,
        SILU
        | {
            "architectures": ["MiniCPM3ForCausalLM"],
            "model_type": "minicpm3",
            "bos_token_id": 1,
            "dim_model_base": 256,
            "eos_token_id": [2, 73440],
            "hidden_size": 2560,
            "intermediate_size": 6400,
            "kv_lora_rank": 256,
            "max_position_embeddings": 32768,
            "num_attention_heads": 40,
            "num_hidden_layers": 62,
            "num_key_value_heads": 40,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "long_factor": MINICPM3_FACTORS,
                "original_max_position_embeddings": 32768,
                "short_factor": MINICPM3_FACTORS,
                "type": "longrope",
            },
            "scale_depth": 1.4,
            "scale_emb": 12,
            "vocab_size": 73448,
        },
    ),
    "tencent/Youtu-LLM-2B": (
        1_961_560_064,
        SILU
        | {
            "architectures": ["YoutuForCausalLM"],
            "model_type": "youtu",
            "attention_bias": False,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "kv_lora_rank": 512,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "num_key_value_heads": 16,
            "q_lora_rank": 1536,
            "qk_head_dim": 192,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "rms_norm_eps": 1e-6,
            "rope_interleave": True,
            "rope_parameters": {"rope_theta": 1600000, "rope_type": "default"},
            "tie_word_embeddings": True,
            "v_head_dim": 128,
            "vocab_size": 128256,
        },
    ),
    "LiquidAI/LFM2-1.2B": (
        1_170_340_608,
        {
            "architectures": ["Lfm2ForCausalLM"],
            "model_type": "lfm2",
            "block_auto_adjust_ff_dim": True,
            "block_dim": 2048,
            "block_ff_dim": 12288,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "block_norm_eps": 1e-5,
            "block_use_swiglu": True,
            "bos_token_id": 1,
            "conv_L_cache": 3,
            "conv_bias": False,
            "conv_dim": 2048,
            "eos_token_id": 7,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "hidden_size": 2048,
            "max_position_embeddings": 128000,
            "norm_eps": 1e-5,
            "num_attention_heads": 32,
            "num_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pad_token_id": 0,
            "rope_theta": 1000000.0,
            "torch_dtype": "bfloat16",
            "use_pos_enc": True,
            "vocab_size": 65536,
        },
    ),
}


@pytest.fixture
def config_of(tmp_path):
    def read(name: str):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
        return resolve(str(tmp_path)).config

    return read


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_parameters_as_the_published_one(config_of, name) -> None:
    config = config_of(name)
    model = ARCHITECTURES[config.architecture](config, max_model_len=8, dtype=config.dtype, device=torch.device("meta"))
    assert config.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]


def test_gemma_3_has_windows_and_another_rotary_base_in_five_of_six_layers(config_of) -> None:
    config = config_of("google/gemma-3-1b-it")
    assert config.windows == (*[512, 512, 512, 512, 512, 0] * 4, 512, 512)
    bases = [rope.inv_freq[1] ** (-256 / 2) for rope in config.ropes]
    assert bases == pytest.approx([1e4 if window else 1e6 for window in config.windows], rel=1e-3)
    assert config.attention_scale == 1 / 16
    assert config.eos_token_ids == (1, 106)


def test_phi_4_mini_rotates_three_quarters_of_a_head_with_the_factors_of_the_context_length(config_of) -> None:
    config = config_of("microsoft/Phi-4-mini-instruct")
    (rope,) = set(config.ropes)
    assert (len(rope.inv_freq), rope.original_length, config.head_dim) == (48, 4096, 128)
    assert rope.long_inv_freq == tuple(f / 2 for f in rope.inv_freq)
    assert rope.scale == pytest.approx((1 + 5 / 12) ** 0.5)  # sqrt(1 + ln 32 / ln 4096)
    assert set(config.windows) == {0}


def test_smollm_3_leaves_every_fourth_layer_without_positions(config_of) -> None:
    config = config_of("HuggingFaceTB/SmolLM3-3B")
    assert [bool(rope.inv_freq) for rope in config.ropes] == [True, True, True, False] * 9
    assert set(config.windows) == {0}


def test_ernies_and_glms_first_layer_is_dense_and_half_of_glms_heads_is_rotated(config_of) -> None:
    ernie, glm = (config_of(name) for name in ("baidu/ERNIE-4.5-21B-A3B-PT", "zai-org/GLM-4.5-Air"))
    for config, top in ((ernie, 6), (glm, 8)):
        assert config.mixture(0) is None
        assert {config.mixture(layer).routing.top for layer in range(1, config.num_layers)} == {top}
        assert config.num_mtp_modules == 1
    assert (ernie.mixture(1).shared_intermediate_size, glm.mixture(1).shared_intermediate_size) == (3072, 1408)
    assert {len(rope.inv_freq) for rope in glm.ropes} == {32}


def test_deepseek_scales_scores_by_yarn_and_not_the_rotation(config_of) -> None:
    for name, weight in (("deepseek-ai/DeepSeek-V2-Lite", 0.707), ("deepseek-ai/DeepSeek-R1", 1.0)):
        config = config_of(name)
        (rope,) = set(config.ropes)
        assert (len(rope.inv_freq), rope.scale, config.interleaved_rope) == (32, 1.0, True)
        assert config.latent.scale == pytest.approx((0.1 * weight * math.log(40) + 1) ** 2 / 192**0.5)


def test_deepseek_chooses_experts_within_groups_from_the_second_or_fourth_layer_on(config_of) -> None:
    names = (
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek-ai/DeepSeek-V2",
        "deepseek-ai/DeepSeek-R1",
        "zai-org/GLM-4.7-Flash",
    )
    routings = []
    for name, num_dense in zip(names, (1, 1, 3, 1), strict=True):
        config = config_of(name)
        assert [config.mixture(layer) is None for layer in range(5)] == [layer < num_dense for layer in range(5)]
        routings.append(config.mixture(4).routing)
    assert [(r.top, r.sigmoid, r.normalise, r.scale) for r in routings] == [
        (6, False, False, 1.0),
        (6, False, False, 16.0),
        (8, True, True, 2.5),
        (4, True, True, 1.8),
    ]
    assert [(r.groups, r.kept_groups, r.group_top) for r in routings] == [(1, 1, 1), (8, 3, 1), (8, 4, 2), (1, 1, 2)]
    assert [config_of(name).num_mtp_modules for name in names] == [0, 0, 1, 1]


def test_minicpm_3_lengthens_no_context_and_divides_its_angles(config_of) -> None:
    config = config_of("openbmb/MiniCPM3-4B")
    (rope,) = set(config.ropes)
    assert (rope.scale, rope.original_length, rope.long_inv_freq == rope.inv_freq) == (1.0, 32768, True)
    assert [1e4 ** (-i / 16) / f for i, f in enumerate(rope.inv_freq)] == pytest.approx(MINICPM3_FACTORS)
    assert (config.latent.value_dim, config.tie_word_embeddings, config.logits_divisor) == (64, True, 10.0)
    assert not config.interleaved_rope

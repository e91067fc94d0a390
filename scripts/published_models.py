"""The models of up to 41B parameters that a public collection of recipes told people how to serve in August 2026: what their
configs ask for, in tiny sizes. `scripts/make_models_page.py` counts which of them run.

Fields are those that change what a model computes, as published where that is known, else the defaults of transformers' config
class, whose makers took them from the first model of the family. Parts that see or hear are as small as they may be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

TEXT: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MEDIA = 199
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
IDS = {"image_token_id": MEDIA, "video_token_id": 198, "vision_start_token_id": 197, "vision_end_token_id": 196}
SQUARE = VIT | {"image_size": 32, "patch_size": 16}
SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [2.0] * 6,
}
MINISTRAL3 = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
FIVE_TO_ONE = (["sliding_attention"] * 5 + ["full_attention"])[2:]
THREE_TO_ONE = ["linear_attention"] * 3 + ["full_attention"]
GDN = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": THREE_TO_ONE,
    "rope_parameters": SECTIONS
    | {"mrope_section": [1, 1, 0], "mrope_interleaved": True, "partial_rotary_factor": 0.25},
}
MAMBA = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "time_step_min": 1e-9,  # published as 0.001: the least step in transformers' code, of prompts alone, and in no other
}
GATELESS = {"n_routed_experts": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@dataclass(frozen=True)
class Published:
    """Recipes for models whose configs differ in sizes only."""

    names: str
    recipes: int
    class_name: str  # in config.json
    config: str | None  # name of transformers' config class; None: transformers has none
    fields: dict[str, Any]


def _text(names: str, recipes: int, config: str, class_name: str, **fields: Any) -> Published:
    return Published(names, recipes, class_name, config, TEXT | fields)


def _with_images(
    names: str, recipes: int, config: str, class_name: str, text: dict[str, Any], **fields: Any
) -> Published:
    return Published(names, recipes, class_name, config, {"text_config": TEXT | text} | fields)


def _qwen3_5(names: str, recipes: int, *, experts: bool) -> Published:
    text = GDN | ({"shared_expert_intermediate_size": 32} | EXPERTS if experts else {})
    kind = "Moe" if experts else ""
    vision = PATCHES | {"num_position_embeddings": 16}
    return _with_images(
        names, recipes, f"Qwen3_5{kind}Config", f"Qwen3_5{kind}ForConditionalGeneration", text, vision_config=vision, **IDS,
        tie_word_embeddings=False,
    )  # fmt: skip


def _gemma4(names: str, recipes: int, kind: str = "", **text: Any) -> Published:
    common = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 24, "layer_types": FIVE_TO_ONE}
    classes = f"Gemma4{kind}Config", f"Gemma4{kind}ForConditionalGeneration"
    return _with_images(names, recipes, *classes, common | {"final_logit_softcapping": 30.0} | text)


def _glm4v(names: str, recipes: int, config: str, class_name: str) -> Published:
    text = {"rope_parameters": SECTIONS | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}}
    return _with_images(names, recipes, config, class_name, text, vision_config=PATCHES | {"image_size": 32}, **IDS)


PUBLISHED = (
    _text("Qwen2.5-32B", 1, "Qwen2Config", "Qwen2ForCausalLM"),
    _text("Qwen3-1.7B, Qwen3-4B", 2, "Qwen3Config", "Qwen3ForCausalLM", head_dim=32, tie_word_embeddings=True),
    _text("Qwen3-8B, Qwen3-32B, Qwen3Guard-8B", 3, "Qwen3Config", "Qwen3ForCausalLM", head_dim=32),
    _text(
        "Granite 3.2 2B", 1, "GraniteConfig", "GraniteForCausalLM", tie_word_embeddings=True, embedding_multiplier=12.0,
        residual_multiplier=0.22, attention_multiplier=0.015625, logits_scaling=8.0,
    ),
    _text("Llama 3.1 8B", 2, "LlamaConfig", "LlamaForCausalLM", rope_parameters=LLAMA3),
    _text(
        "Llama 3.2 1B and 3B", 3, "LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True,
        rope_parameters=LLAMA3 | {"factor": 32.0},
    ),
    _text(
        "Phi-4-mini", 1, "Phi3Config", "Phi3ForCausalLM", tie_word_embeddings=True, rope_parameters=LONG,
        original_max_position_embeddings=64, sliding_window=256,
    ),
    _text("Phi-4-reasoning", 1, "Phi3Config", "Phi3ForCausalLM"),
    _text("MiniCPM5-1B", 1, "LlamaConfig", "LlamaForCausalLM"),
    _text(
        "Seed-OSS-36B", 1, "SeedOssConfig", "SeedOssForCausalLM", head_dim=16, attention_bias=True,
        attention_out_bias=False, mlp_bias=False,
    ),
    _text(
        "Mellum 2", 2, "MellumConfig", "MellumForCausalLM", head_dim=16, **EXPERTS, sliding_window=24,
        layer_types=["full_attention", *["sliding_attention"] * 3],
    ),
    _text(
        "Qwen3-30B-A3B", 1, "Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=32, norm_topk_prob=True, **EXPERTS,
    ),
    _text(
        "ERNIE-4.5-21B-A3B", 1, "Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", moe_num_experts=8, moe_k=2,
        moe_intermediate_size=32, moe_num_shared_experts=2, moe_layer_start_index=1, tie_word_embeddings=True,
    ),
    _text("GLM-4-9B", 1, "Glm4Config", "Glm4ForCausalLM", head_dim=16, attention_bias=True),
    _with_images(
        "TranslateGemma", 1, "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"head_dim": 32, "sliding_window": 24, "layer_types": FIVE_TO_ONE, "query_pre_attn_scalar": 32},
        vision_config=SQUARE, mm_tokens_per_image=4, image_token_index=MEDIA,
    ),
    _with_images(
        "Ministral 3", 2, "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"model_type": "ministral3", "head_dim": 32, "rope_parameters": MINISTRAL3},
        vision_config=SQUARE | {"model_type": "pixtral"}, image_token_index=MEDIA, tie_word_embeddings=False,
    ),
    _with_images(
        "InternVL3.5", 1, "InternVLConfig", "InternVLForConditionalGeneration", {"model_type": "qwen3", "head_dim": 32},
        vision_config=VIT | {"image_size": [32, 32], "patch_size": [16, 16]}, image_token_id=MEDIA,
        tie_word_embeddings=False,
    ),
    _with_images(
        "Qwen2.5-VL-7B", 1, "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", {"rope_parameters": SECTIONS},
        vision_config=PATCHES | {"fullatt_block_indexes": [0]}, **IDS,
    ),
    _with_images(
        "ERNIE-4.5-VL", 1, "Ernie4_5_VLMoeConfig", "Ernie4_5_VLMoeForConditionalGeneration",
        {
            "moe_intermediate_size": [32, 16], "moe_k": 2, "moe_num_experts": 8, "moe_num_shared_experts": 2,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 2, 4]},
        },
        vision_config=PATCHES, **IDS,
    ),
    _with_images(
        "Muse-Glimmer-30B", 1, "MuseGlimmerConfig", "MuseGlimmerForConditionalGeneration",
        {"head_dim": 16, "sliding_window": 24}, vision_config=VIT, out_hidden_size=64, projector_hidden_size=16,
        image_token_id=MEDIA, video_token_id=198,
    ),
    _glm4v("GLM-4.x-V", 1, "Glm46VConfig", "Glm46VForConditionalGeneration"),
    _glm4v("Glyph", 1, "Glm4vConfig", "Glm4vForConditionalGeneration"),
    _gemma4(
        "Gemma 4 E2B and E4B", 2, hidden_size_per_layer_input=16, vocab_size_per_layer_input=200, num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    _gemma4("Gemma 4 12B", 1, "Unified", num_global_key_value_heads=1, attention_k_eq_v=True),
    _gemma4("Gemma 4 31B", 1, hidden_size_per_layer_input=0, num_global_key_value_heads=1, attention_k_eq_v=True),
    _gemma4(
        "Gemma 4 26B-A4B", 1, hidden_size_per_layer_input=0, num_global_key_value_heads=1, attention_k_eq_v=True,
        enable_moe_block=True, num_experts=8, top_k_experts=2, moe_intermediate_size=32,
    ),
    _qwen3_5("Qwen3.5 dense, Qwen3.6-27B, Qwen3.8-27B", 7, experts=False),
    _qwen3_5("Qwen3.5-35B-A3B, Qwen3.6-35B-A3B", 2, experts=True),
    _with_images(
        "MiniCPM-V-4.6", 1, "MiniCPMV4_6Config", "MiniCPMV4_6ForConditionalGeneration", GDN,
        vision_config=SQUARE | {"insert_layer_id": 0},
    ),
    Published("Intern-S2-Preview", 1, "InternS2PreviewForConditionalGeneration", None, {}),
    _text(
        "LFM2.5 dense", 6,
        "Lfm2Config", "Lfm2ForCausalLM", tie_word_embeddings=True,
        layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    _text(
        "LFM2.5-8B-A1B, LFM2.5-24B-A2B", 2, "Lfm2MoeConfig", "Lfm2MoeForCausalLM", tie_word_embeddings=True, **EXPERTS,
        num_dense_layers=2, layer_types=["conv", "conv", "full_attention", "conv"],
    ),
    _with_images(
        "LFM2.5-VL", 2, "Lfm2VlConfig", "Lfm2VlForConditionalGeneration",
        {"layer_types": ["conv", "conv", "full_attention", "conv"]},
        vision_config=VIT, projector_hidden_size=16, image_token_id=MEDIA,
    ),
    _text(
        "Nemotron 3 Nano 4B, Nemotron Nano 9B v2", 2, "NemotronHConfig", "NemotronHForCausalLM",
        **MAMBA, layers_block_type=["mamba", "mlp", "attention", "mlp"],
    ),
    _text(
        "Nemotron 3 Nano 30B-A3B, Nemotron 3.5 Lightning", 2, "NemotronHConfig", "NemotronHForCausalLM",
        **MAMBA, **GATELESS, layers_block_type=["mamba", "moe", "attention", "moe"],
    ),
    Published("Nemotron VL", 1, "NemotronH_Nano_VL_V2", None, {}),
    _with_images(
        "Nemotron Omni", 1, "NemotronH_Omni_Reasoning_V3_Config", "NemotronH_Omni_Reasoning_V3",
        {"layers_block_type": ["mamba", "moe", "attention", "moe"]},
    ),
    _text(
        "gpt-oss-20b", 1, "GptOssConfig", "GptOssForCausalLM", head_dim=16, num_local_experts=8, num_experts_per_tok=2,
        sliding_window=24, layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    _text(
        "Laguna XS", 2, "LagunaConfig", "LagunaForCausalLM", head_dim=16, **EXPERTS, sliding_window=24,
        layer_types=["full_attention", *["sliding_attention"] * 3], num_attention_heads_per_layer=[4, 8, 8, 8],
    ),
    Published("PLaMo", 2, "Plamo2ForCausalLM", None, {}),
    _text(
        "Phi-4-multimodal", 1, "Phi4MultimodalConfig", "Phi4MultimodalForCausalLM", tie_word_embeddings=True,
        rope_parameters=LONG, original_max_position_embeddings=64, sliding_window=256,
        vision_config=SQUARE | {"crop_size": 32, "image_token_id": MEDIA},
        audio_config={
            "hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2, "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16, "audio_token_id": 198,
        },
    ),
)  # fmt: skip


def build(recipe: Published) -> Any:
    """transformers' config object, tiny, of a recipe that has one."""
    assert recipe.config is not None
    return getattr(transformers, recipe.config).from_dict(recipe.fields)

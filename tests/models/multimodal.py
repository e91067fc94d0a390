"""Tiny random models that take images beside text, in the layouts that transformers writes."""

import torch
import transformers
from checkpoints import GEMMA3_ROPE, GEMMA4, GEMMA4_SHARED, MIXED_LAYERS, SIZES, WINDOW

IMAGE_TOKEN = 95
IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
INDEX = {"image_token_index": IMAGE_TOKEN}
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
PATCHES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
TEXT = SIZES | {"pad_token_id": 0}
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
PIXTRAL = VIT | {"model_type": "pixtral", "image_size": 32, "patch_size": 16}


def _gemma3():
    text = TEXT | MIXED_LAYERS | {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
    text["rope_parameters"] = GEMMA3_ROPE
    vision = VIT | {"image_size": 32, "patch_size": 16}
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **INDEX)


def _gemma4(kind, text):
    """With towers for images and sound."""
    head = {"num_key_value_heads": 2, "head_dim": 8}
    parts = {
        "": {
            "vision_config": VIT | head | {"patch_size": 2, "position_embedding_size": 16, "use_clipped_linears": True},
            "audio_config": VIT | {"subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
        },
        "Unified": {},
    }[kind]
    media = {"image_token_id": IMAGE_TOKEN, "video_token_id": 94, "audio_token_id": 93}
    return getattr(transformers, f"Gemma4{kind}Config")(text_config=text, **media, **parts)


def _mistral3(text):
    return transformers.Mistral3Config(text_config=text, vision_config=PIXTRAL, tie_word_embeddings=False, **INDEX)


def _qwen2_5_vl():
    vision = PATCHES | {"fullatt_block_indexes": [0]}
    return transformers.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": SECTIONS}, vision_config=vision, **IDS)


def _qwen3_vl():
    vision = PATCHES | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = TEXT | {"head_dim": 16, "rope_parameters": SECTIONS | {"mrope_interleaved": True}}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **IDS)


def _phi4_multimodal():
    """Whose decoder's fields are beside its parts, and not in one."""
    vision = VIT | {"image_size": 32, "patch_size": 16, "crop_size": 32, "image_token_id": IMAGE_TOKEN}
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "audio_token_id": 94,
    }
    audio |= dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"), 16)
    return transformers.Phi4MultimodalConfig(**TEXT, vision_config=vision, audio_config=audio, tie_word_embeddings=True)


MULTIMODAL = {
    "gemma 3": ("Gemma3ForConditionalGeneration", _gemma3),
    "gemma 4 e4b": ("Gemma4ForConditionalGeneration", lambda: _gemma4("", GEMMA4_SHARED)),
    "gemma 4 12b": ("Gemma4UnifiedForConditionalGeneration", lambda: _gemma4("Unified", GEMMA4)),
    "mistral small 3": (
        "Mistral3ForConditionalGeneration",
        lambda: _mistral3(transformers.MistralConfig(**TEXT, head_dim=32, sliding_window=None)),
    ),
    "ministral 3": (
        "Mistral3ForConditionalGeneration",
        lambda: _mistral3(transformers.Ministral3Config(**TEXT, head_dim=16, rope_parameters=MINISTRAL3_ROPE)),
    ),
    "qwen2.5-vl": ("Qwen2_5_VLForConditionalGeneration", _qwen2_5_vl),
    "qwen3-vl": ("Qwen3VLForConditionalGeneration", _qwen3_vl),
}
"""Names of classes, and their configs."""
NATIVE = {
    "phi 4 multimodal": ("Phi4MultimodalForCausalLM", _phi4_multimodal),
}
"""Likewise; what transformers has of these is not taken apart."""


def random_multimodal_model(name):
    """A model with every parameter random, those of its vision tower included."""
    class_name, config = (MULTIMODAL | NATIVE)[name]
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config()).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in path else 0.0, 0.2)
        for path, buffer in model.named_buffers():
            if path.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model

"""The decoders of models that take images, sound or video beside text: text in, text out, as if they had been saved alone.

What such a model does with text alone is what its decoder does, in the classes that are listed here; what makes embeddings of
images is neither read nor kept. `scripts/sweep_text_parts.py` holds each class against transformers.
"""

from __future__ import annotations

import copy
import re
from typing import Any

_CLASSES = frozenset(
    (
        "AriaForConditionalGeneration",
        "Cohere2VisionForConditionalGeneration",
        "Ernie4_5_VLMoeForConditionalGeneration",
        "Gemma3ForConditionalGeneration",
        "Gemma3nForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "Gemma4UnifiedForConditionalGeneration",
        "Glm46VForConditionalGeneration",
        "Glm4vForConditionalGeneration",
        "InternVLForConditionalGeneration",
        "Lfm2VlForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "Mistral3ForConditionalGeneration",
        "MuseGlimmerForConditionalGeneration",
        "Phi4MultimodalForCausalLM",
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    )
)
"""Classes of transformers that pass embeddings of text to their decoder as they are, and mask nothing of it."""
_NATIVE = {
    "ministral3": "Ministral3ForCausalLM",
    "phi4_multimodal": "Phi3ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
}
"""By the type of a decoder for which transformers has no class that writes text: the class that computes the same. Positions of
text are one number, however many sections of a head rotate by positions of their own."""
_APART = {"Gemma3nForConditionalGeneration"}
"""Classes that need packages for embeddings of images: transformers' class of the decoder alone is built in their place."""
_PARTS = {"vision_config", "audio_config"}
"""Of a config that has them beside its decoder's fields, and not these in a part of their own."""
_OF_MEDIA = re.compile(r"(?:image|video|audio)_token_(?:id|index)")
_MEDIA_TENSOR = re.compile(
    r"(?:model\.)?(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector|embed_vision|embed_audio|connector|merger"
    r"|embed_tokens_extend)\."
    r"|(?:model\.)?image_newline"
)
_PREFIX = re.compile(r"(?:model\.language_model|language_model\.model|model\.text_model)\.")


def is_of_media(name: str) -> bool:
    """Whether a checkpoint's tensor is of what makes embeddings of images, sound or video.

    >>> is_of_media("model.visual.blocks.0.attn.qkv.weight"), is_of_media("model.merger.mlp.0.linear_1.weight")
    (True, True)
    >>> is_of_media("model.layers.0.self_attn.q_proj.weight")
    False
    """
    return _MEDIA_TENSOR.match(name) is not None


def in_decoder(name: str) -> str:
    """The name that a checkpoint's tensor would have if the decoder had been saved alone.

    >>> in_decoder("language_model.model.norm.weight"), in_decoder("language_model.lm_head.weight")
    ('model.norm.weight', 'lm_head.weight')
    """
    return _PREFIX.sub("model.", name, count=1).removeprefix("language_model.")


def is_multimodal(hf_config: Any) -> bool:
    """Whether a config is of a class whose text part runs."""
    return bool(hf_config.architectures) and str(hf_config.architectures[0]) in _CLASSES


def is_run_apart(hf_config: Any) -> bool:
    """Whether transformers' code of a multimodal model's decoder alone runs, and not that of the whole class."""
    return is_multimodal(hf_config) and str(hf_config.architectures[0]) in _APART


def text_config(hf_config: Any) -> Any:
    """What a config says of the decoder: a part of it, or itself if there are no others."""
    return hf_config.get_text_config(decoder=True) if is_multimodal(hf_config) else hf_config


def alone(hf_config: Any) -> Any:
    """The config of a multimodal model's decoder as if it had been saved alone, as the class that computes the same."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = copy.deepcopy(text_config(hf_config))
    class_name = _NATIVE.get(config.model_type) or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    config.architectures = class_name and [class_name]
    for name in _PARTS & vars(config).keys():
        setattr(config, name, None)
    for name in ("tie_word_embeddings", "quantization_config", "dtype"):
        if getattr(hf_config, name, None) is not None:
            setattr(config, name, getattr(hf_config, name))
    config.eos_token_id = end_token_ids(hf_config)
    config.bos_token_id = getattr(hf_config, "bos_token_id", getattr(config, "bos_token_id", None))
    return config


def end_token_ids(hf_config: Any) -> Any:
    """What a config says ends an answer. Its part, which may have a default that is another model's, is asked if it does not."""
    whole = getattr(hf_config, "eos_token_id", None)
    return getattr(text_config(hf_config), "eos_token_id", None) if whole is None else whole


def media_token_ids(hf_config: Any) -> tuple[int, ...]:
    """Tokens in whose place a multimodal model puts embeddings of images, sound or video; none of other models."""
    if not is_multimodal(hf_config):
        return ()
    fields = hf_config.to_dict()
    places = (fields, *(fields[name] for name in _PARTS & fields.keys() if isinstance(fields[name], dict)))
    found = {v for place in places for name, v in place.items() if _OF_MEDIA.fullmatch(name)}
    return tuple(sorted(v for v in found if type(v) is int and v >= 0))

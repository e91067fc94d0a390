"""What a config says of a model that transformers is to run, before its class is tried, and what it means if that fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto import modeling_auto

from stepgraph.errors import ModelError
from stepgraph.models.config import architecture_of
from stepgraph.models.fp8_checkpoint import method_of
from stepgraph.models.hf_config import foreign_code
from stepgraph.models.text_part import is_multimodal, text_config
from stepgraph.models.transformers_interfaces import CAUSAL_ONLY, IMPLEMENTATIONS, REQUIREMENTS, RefusalError, refuse

_KINDS = {
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES": "multimodal",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "multimodal",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES": "a model of speech",
    "MODEL_FOR_CTC_MAPPING_NAMES": "a model of speech",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES": "a model of sound",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES": "of an encoder and a decoder",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "an encoder",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "a model of images",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES": "a model of images",
}
"""By transformers' lists of model types: what models of these types are."""
_CHUNKED = "chunked_attention"
_LAYERS = {"full_attention", "sliding_attention", _CHUNKED}
_OTHERS = (
    "See docs/models.md for those; one that does what its text alone would may be added, see docs/adding-a-model.md."
)
_TEXT_ONLY = "What runs are decoders that read and write text only."


def check_class(hf_config: Any, runs: Callable[[Any], bool]) -> None:
    """Refuse a config whose class is not the one that transformers writes text with.

    Args:
        hf_config: transformers' config object.
        runs: tells whether a config that names another class could run.

    Raises:
        RefusalError: the class is another of transformers'.
        ModelError: it is none of transformers'.
    """
    if is_multimodal(hf_config):
        return
    architecture, model_type = architecture_of(hf_config), str(hf_config.model_type)
    listed = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), ())
    names = [c.__name__ for c in (listed if isinstance(listed, tuple) else (listed,))]
    if architecture in names or (names and _is_of_type(architecture, model_type)):
        return
    if not hasattr(transformers, architecture):
        has_code = bool(getattr(hf_config, "auto_map", None))
        raise ModelError(foreign_code(architecture, model_type, has_code=has_code))
    kinds = (kind for name, kind in _KINDS.items() if model_type in getattr(modeling_auto, name, ()))
    kind = next(kinds, "no language model")
    for name in names:
        other = copy.deepcopy(hf_config)
        other.architectures = [name]
        if runs(other):
            refuse(
                f"it is not the class of its type that writes text, which is {name}",
                f"A checkpoint that was saved as {name} runs.",
            )
    if kind == "multimodal":
        refuse("it is multimodal, and its decoder is none of those that run by themselves", _OTHERS)
    refuse(f"it is {kind}", _TEXT_ONLY)


def _is_of_type(architecture: str, model_type: str) -> bool:
    """Whether a class that transformers need not have is by its name the language model of a type that it has: checkpoints of
    type "exaone" name ExaoneForCausalLM, which transformers runs as Llama, those of "phimoe" PhiMoEForCausalLM."""
    return architecture.lower() == model_type.lower().replace("_", "").replace("-", "") + "forcausallm"


def check_fields(hf_config: Any) -> None:
    """Refuse what the config of a decoder says and a run on tensors without values does not show."""

    def value(name: str) -> Any:
        return getattr(hf_config, name, None)

    if value("vision_config") or value("audio_config") or value("text_config"):
        refuse("it is multimodal, and its decoder is none of those that run by themselves", _OTHERS)
    if value("is_encoder_decoder"):
        refuse("it is of an encoder and a decoder (is_encoder_decoder in its config)", CAUSAL_ONLY)
    bidirectional = value("use_bidirectional_attention")  # "vision": of tokens of images alone, which do not come here
    if (bidirectional and bidirectional != "vision") or value("is_causal") is False:
        refuse("its attention is not causal", CAUSAL_ONLY)
    if odd := sorted(set(value("layer_types") or ()) - _LAYERS):
        refuse(f"it has layers of type {', '.join(odd)}", f"What runs are layers of type {', '.join(sorted(_LAYERS))}.")
    if value("kv_lora_rank") and any(rope.get("llama_4_scaling_beta") for rope in _ropes(hf_config)):
        refuse(
            "its queries are multiplied by a function of their position (llama_4_scaling_beta), which few classes with latent "
            "attention do",
            "Models that do not scale them are supported.",
        )
    if value("recurrent_kv_cache_mode") == "last_loop":
        refuse(
            'tokens of later steps see other keys than those of the same step (recurrent_kv_cache_mode "last_loop")',
            'With "per_loop" it runs.',
        )
    if any(rope.get("rope_type") == "longrope" for rope in _ropes(hf_config)):
        refuse(
            'its rope type is "longrope", whose angles transformers chooses anew by the longest sequence of each step',
            "Native models choose them once: Phi3ForCausalLM is one; to add another, see docs/adding-a-model.md.",
        )


def check_last(hf_config: Any) -> None:
    """Refuse what keeps a model of a class that runs from doing so: what is said here helps."""
    if not longest_sequence(text_config(hf_config)):
        refuse(
            "its config does not say how long a sequence may be",
            'Add "max_position_embeddings", the longest sequence in tokens, to config.json.',
        )
    if quantization := getattr(hf_config, "quantization_config", None):
        refuse(
            f'its weights are quantised with method "{method_of(quantization)}"',
            "Of the models that run through transformers, unquantised checkpoints are read; use one.",
        )


def longest_sequence(hf_config: Any) -> int:
    """How many tokens a sequence may have by the config of a decoder, under one of several names; 0 if it does not say."""
    names = "max_position_embeddings", "max_seq_len", "seq_length"
    longest = int(next((size for name in names if (size := getattr(hf_config, name, None))), 0))
    if _CHUNKED in (getattr(hf_config, "layer_types", None) or ()):
        return min(longest, hf_config.attention_chunk_size)  # within the first chunk, tokens see all tokens before them
    return longest


def without_dynamic_rope(hf_config: Any) -> Any:
    """A copy of a config whose rotation does not look at the longest sequence of a step: what is scaled only for sequences beyond
    max_position_embeddings is not, as there are none."""
    copied = copy.deepcopy(hf_config)
    for rope in _ropes(text_config(copied)):
        if rope.get("rope_type") == "dynamic" and "alpha" not in rope:
            rope["rope_type"] = "default"
    return copied


def _ropes(hf_config: Any) -> Iterator[dict[str, Any]]:
    ropes = getattr(hf_config, "rope_parameters", None) or {}
    yield ropes
    yield from (part for part in ropes.values() if isinstance(part, dict))


def explain(error: Exception) -> RefusalError:
    """What it means that a class of transformers fails on tensors without values and with our attention."""
    if isinstance(error, KeyError) and error.args[0] in IMPLEMENTATIONS.values():
        what = (
            "its layers choose their attention from a list of their own, and not from transformers' AttentionInterface"
        )
    elif isinstance(error, AttributeError) and type(error.obj).__module__.startswith("stepgraph."):
        what = "its output head takes more than the last hidden states, or runs parts of the layers itself"
    else:
        what = (
            f"the code of transformers {transformers.__version__} fails in a trial without weights; a field may be missing or "
            "empty in config.json, or the class needs what it is not given here (at log level DEBUG, the log has where it fails)"
        )
    return RefusalError(what, REQUIREMENTS)

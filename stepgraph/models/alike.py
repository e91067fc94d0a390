"""Models that transformers does not know and that compute what one it knows does: their configs, in its words.

Facts about them are their makers' own code. What differs, or whose tensors are merged otherwise, is refused with the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _internlm(fields: dict[str, Any]) -> dict[str, Any]:
    """One switch for the biases of attention; the rotation in a field of its own."""
    rotary = fields.pop("rotary", None) or {}
    fields["attention_bias"] = fields.pop("bias", True)
    fields["rope_theta"] = rotary.get("base", 10000)
    if rotary.get("type") == "dynamic":
        fields["rope_scaling"] = {"rope_type": "dynamic", "factor": rotary.get("scaling_factor", 1.0)}
    return fields


def _minicpm(fields: dict[str, Any]) -> dict[str, Any]:
    """Its output head is the embedding table where the config does not say."""
    return {"tie_word_embeddings": True} | fields


def _olmo_hybrid(fields: dict[str, Any]) -> dict[str, Any]:
    """Its first configs have no rope settings, as it rotates nothing, which transformers takes for a default."""
    rope = fields.get("rope_parameters", {})
    if fields.get("rope_theta") is None and rope in (None, {"rope_type": None}):
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": None}
    return fields


@dataclass(frozen=True)
class _Alike:
    model_type: str  # of transformers, whose config has the same fields
    translate: Callable[[dict[str, Any]], dict[str, Any]] = dict


_ALIKE = {
    "aquila": _Alike("llama"),
    "internlm": _Alike("llama", _internlm),
    "kimi_k2": _Alike("deepseek_v3"),
    "mimo": _Alike("qwen2"),
    "minicpm": _Alike("llama", _minicpm),
    "olmo_hybrid": _Alike("olmo_hybrid", _olmo_hybrid),
    "telechat3": _Alike("llama"),
    "xverse": _Alike("llama"),
}
"""By model type, of those that transformers does not know, or whose configs it reads otherwise than they are meant."""

DIFFERENCES = {
    "BaiChuanForCausalLM": "it keeps queries, keys and values in one matrix of its own layout",
    "BaichuanForCausalLM": "it keeps queries, keys and values in one matrix of its own layout, and has position biases "
    "(ALiBi) or a normalised output head",
    "ChatGLMModel": "it keeps queries, keys and values in one matrix of its own layout and rotates half of each head",
    "DeciLMForCausalLM": "its layers differ in the number of their key heads, or lack attention or feed-forward",
    "IQuestLoopCoderForCausalLM": "it runs its layers twice, with a gate between two attentions",
    "InternLM2ForCausalLM": "it keeps queries, keys and values in one matrix, interleaved by head",
    "OrionForCausalLM": "its norms are layer norms with biases",
    "QWenLMHeadModel": "it keeps queries, keys and values in one matrix and scales queries by the length of the sequence",
    "SolarForCausalLM": "it adds the states of earlier layers to those of later ones",
    "TeleChat2ForCausalLM": "it keeps keys and values in one matrix, interleaved by head",
    "TeleChatForCausalLM": "it keeps keys and values in one matrix, interleaved by head",
}
"""Why classes that resemble Llama are not run as such."""


def in_known_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, those of `_ALIKE` as transformers names them in a type that it knows."""
    alike = _ALIKE.get(str(fields.get("model_type")))
    if alike is None:
        return dict(fields)
    return alike.translate(dict(fields)) | {"model_type": alike.model_type}

"""Gemma 4, text: what Gemma 3 has, and layers that differ. Those that attend to all tokens have larger heads, which rotate in
part, and fewer of keys and values, which may be one. The last layers may use the keys and values of earlier ones, and have wider
feed-forward layers. In E2B and E4B each layer takes an embedding of its own; in 26B-A4B it has experts beside its dense part.

Source: Google, "Gemma 4" (2026), and transformers' modeling_gemma4.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.layers.attention import KeysAndValues
from stepgraph.layers.experts import ExpertsSpec
from stepgraph.layers.per_layer_inputs import PerLayerSizes
from stepgraph.models.config import ConfigFileError, DecoderConfig, LayerSizes, architecture_of
from stepgraph.models.decoder import Decoder
from stepgraph.ops import Routing

_OF_KEYS = re.compile(r"model\.layers\.(\d+)\.self_attn\.[kv]_(?:proj|norm)\.")
_FULL = "full_attention"
_ROPES = ("default", "proportional")
_DIFFERING = ("head_dim", "num_key_value_heads")
"""Fields that transformers refuses to read of the whole config, as they differ from layer to layer."""


class Gemma4(Decoder):
    """The shared decoder with Gemma 4's layers."""

    @classmethod
    def config_from_hf(cls, hf_config: Any) -> DecoderConfig:
        """See `Decoder.config_from_hf`."""
        heads = _heads(hf_config)
        kinds = dict(zip(hf_config.layer_types, heads, strict=True))
        _check(hf_config, heads, kinds)
        bias, (num_kv_heads, head_dim) = hf_config.attention_bias, heads[0]
        fields = {name: value for name, value in vars(hf_config).items() if name not in _DIFFERING}
        config = DecoderConfig.from_hf(
            SimpleNamespace(**fields | {"head_dim": head_dim, "num_key_value_heads": num_kv_heads}),
            qkv_bias=bias,
            output_bias=bias,
            qk_norm=True,
            head_dims={kind: size for kind, (_, size) in kinds.items()},
        )
        width = getattr(hf_config, "hidden_size_per_layer_input", None)
        per_layer = PerLayerSizes(hf_config.vocab_size_per_layer_input, width) if width else None
        spec = _experts(hf_config) if getattr(hf_config, "enable_moe_block", False) else None
        return replace(
            config,
            attention_scale=1.0,
            embedding_multiplier=hf_config.hidden_size**0.5,
            norms_round_once=True,
            output_norms=True,
            logits_softcap=hf_config.final_logit_softcapping or 0.0,
            layers=_layers(hf_config, heads),
            layer_scalars=True,
            per_layer_inputs=per_layer,
            mixtures=() if spec is None else (spec,) * config.num_layers,
        )

    def reads(self, name: str) -> bool:
        """See `Decoder.reads`: published checkpoints have keys and values of layers that use those of others, too."""
        match = _OF_KEYS.match(name)
        if match is None or int(match[1]) >= self.config.num_layers:
            return True
        return self.config.sizes(int(match[1])).keys_and_values.shares is None


def _heads(hf_config: Any) -> list[tuple[int, int]]:
    """Key/value heads and head size of each layer."""
    per_layer = getattr(hf_config, "per_layer_config", None)
    if per_layer is not None:
        layers = [per_layer[index] for index in range(hf_config.num_hidden_layers)]
        return [(layer.num_key_value_heads, layer.head_dim) for layer in layers]
    number, size = hf_config.num_key_value_heads, hf_config.head_dim  # of transformers before it had such configs
    global_number = hf_config.num_global_key_value_heads if hf_config.attention_k_eq_v else None
    of_global = (number if global_number is None else global_number, hf_config.global_head_dim)
    return [of_global if kind == _FULL else (number, size) for kind in hf_config.layer_types]


def _check(hf_config: Any, heads: list[tuple[int, int]], kinds: dict[str, tuple[int, int]]) -> None:
    """Raise ModelError if layers cannot be so."""
    architecture = architecture_of(hf_config)
    if any(kinds[kind] != sizes for kind, sizes in zip(hf_config.layer_types, heads, strict=True)):
        raise ModelError(
            f"Layers of one type differ in the number or size of their heads in the config of this {architecture}; they may "
            "differ between types of layers. Correct per_layer_config in config.json."
        )
    if any(number < 1 or size < 1 or hf_config.num_attention_heads % number for number, size in heads):
        raise ConfigFileError(
            f"The layers of this {architecture} have key/value heads of these numbers and sizes: {sorted(set(heads))}; its "
            f"{hf_config.num_attention_heads} query heads must be a multiple of each number. Correct config.json, or download it "
            "again."
        )
    odd = {kind: hf_config.rope_parameters[kind]["rope_type"] for kind in kinds}
    if odd := {kind: rope for kind, rope in odd.items() if rope not in _ROPES}:
        raise ModelError(
            f"The rope types of this {architecture} are {odd}; its layers run with {' and '.join(_ROPES)}. Correct "
            "rope_parameters in config.json."
        )
    rows = getattr(hf_config, "vocab_size_per_layer_input", 0)
    if getattr(hf_config, "hidden_size_per_layer_input", None) and rows < hf_config.vocab_size:
        raise ConfigFileError(
            f"This {architecture} has {hf_config.vocab_size} tokens, and embeddings of each layer for {rows} "
            "(vocab_size_per_layer_input). Correct config.json, or download it again."
        )


def _layers(hf_config: Any, heads: list[tuple[int, int]]) -> tuple[LayerSizes, ...]:
    """Of each layer, what differs."""
    kinds, width = hf_config.layer_types, hf_config.intermediate_size
    first_sharing = hf_config.num_hidden_layers - hf_config.num_kv_shared_layers
    own = {kind: index for index, kind in enumerate(kinds[: max(0, first_sharing)])}
    if hf_config.num_kv_shared_layers < 0 or set(kinds) - set(own):
        raise ConfigFileError(
            f"The last {hf_config.num_kv_shared_layers} of the {len(kinds)} layers of this {architecture_of(hf_config)} use keys "
            "and values of earlier layers of their types (num_kv_shared_layers), and there must be one of each. Correct "
            "config.json, or download it again."
        )
    layers = []
    for index, (kind, (num_kv_heads, head_dim)) in enumerate(zip(kinds, heads, strict=True)):
        shares = own[kind] if index >= first_sharing else None
        wide = shares is not None and hf_config.use_double_wide_mlp
        source = KeysAndValues(shares, are_one=hf_config.attention_k_eq_v and kind == _FULL, value_norm=True)
        layers.append(LayerSizes(num_kv_heads, head_dim, width * (2 if wide else 1), source))
    return tuple(layers)


def _experts(hf_config: Any) -> ExpertsSpec:
    routing = Routing(hf_config.top_k_experts, normalise=True)
    return ExpertsSpec(hf_config.num_experts, hf_config.moe_intermediate_size, routing, is_beside_dense=True)

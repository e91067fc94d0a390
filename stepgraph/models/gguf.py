"""Checkpoints in GGUF files, llama.cpp's format. Metadata becomes a config, tensors get transformers' names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stepgraph.errors import ModelError
from stepgraph.layers.rotary import RotaryFrequencies
from stepgraph.models import gguf_latent
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.config import DecoderConfig
from stepgraph.models.end_tokens import end_tokens
from stepgraph.models.gguf_reader import Texts, open_gguf
from stepgraph.models.gguf_tensors import GGUFTensor, KeysAndValues
from stepgraph.models.hf_config import check_sizes, plain_config, why_unusable
from stepgraph.models.registry import read_config


@dataclass(frozen=True)
class _Architecture:
    model_type: str  # in transformers
    class_name: str
    permuted: bool = False  # query and key rows are reordered for llama.cpp's rotation of adjacent pairs
    has_experts: bool = False
    normalised: bool = False  # whether llama.cpp divides the weights of a token's experts by their sum
    latent: bool = False  # attention; metadata may then say that the model is of another class


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM"),
    "qwen2moe": _Architecture("qwen2_moe", "Qwen2MoeForCausalLM", has_experts=True),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": _Architecture("qwen3_moe", "Qwen3MoeForCausalLM", has_experts=True, normalised=True),
    "deepseek2": _Architecture("deepseek_v3", "DeepseekV3ForCausalLM", has_experts=True, latent=True),
    "minicpm3": _Architecture("minicpm3", "MiniCPM3ForCausalLM", latent=True),
}

_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **gguf_latent.TENSOR_NAMES,
}
_EXPERT_NAMES = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
"""Of tensors that hold a matrix of each expert."""
_ONLY_CHOICES = {
    "expert_gating_func": (0, 1),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
}
"""Metadata of other mixtures, and what they are in those that are read, if they are there: softmax, no groups, no scale."""
_ROPE_FACTORS = "rope_freqs.weight"
_LONG_ROPE_FACTORS = {name: f"rope_factors_{name}.weight" for name in ("short", "long")}
_YARN = {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
"""Metadata of YaRN that has fields of its own in transformers' configs."""
_LOG_MULTIPLIER = "yarn_log_multiplier"
_REQUIRED: Any = object()
_ENDS = (
    *(
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<end_of_turn>",
        "<|end_of_turn|>",
        "<|return|>",
        "<|call|>",
    ),
    *("<EOT>", "<|EOT|>", "_<EOT>", "[EOT]", "<|END_OF_TURN_TOKEN|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"),
    *("<|endoftext|>", "<|end_of_text|>", "[EOS]", "<eos>", "</s>"),
)
"""Texts of tokens that end an answer, in whichever model has them."""
_NORMAL, _BYTE, _UNUSED = 1, 6, 5
"""Values of ``tokenizer.ggml.token_type`` of tokens that cannot be control tokens."""


class GGUFFile:
    """An open GGUF file of a supported architecture."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of the file at `path`.

        Raises:
            ModelError: the file is not GGUF, truncated, or of an architecture or tensor type that is not supported.
        """
        self.path = path
        reader = open_gguf(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (num_files := self.value("split.count", int, 1)) > 1:
            raise ModelError(
                f"{path} is one of {num_files} parts of a split GGUF file; merge them with llama-gguf-split."
            )
        name = self.value("general.architecture", str)
        if name not in _ARCHITECTURES:
            raise ModelError(
                f'{path} holds a model of architecture "{name}"; GGUF files are read of {", ".join(_ARCHITECTURES)}. '
                "Use the model's safetensors folder if its architecture is supported there."
            )
        self._architecture = _ARCHITECTURES[name]
        unreadable = {t.tensor_type for t in reader.tensors if not _can_dequantize(t.tensor_type)}
        if unreadable:
            readable = [t.name for t in type(next(iter(unreadable))) if _can_dequantize(t)]
            raise ModelError(
                f"{path} holds tensors of type {', '.join(sorted(t.name for t in unreadable))}, which cannot be "
                f"dequantised; supported are {', '.join(readable)}."
            )

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return a metadata value.

        Args:
            key: its name.
            kind: bool, int, float (which takes whole numbers too), str or list.
            default: what it is if it is absent.

        Raises:
            ModelError: it is absent and there is no default, or it is of another kind.
        """
        if key in self._fields:
            field = self._fields[key]
            try:
                found = field.parts[-1].read() if isinstance(field.parts[-1], Texts) else field.contents()
            except UnicodeDecodeError as error:
                raise ModelError(f"{self.path}: {key} is not UTF-8 text ({error}). Download the file again.") from error
            if kind is float and type(found) is int:
                found = float(found)
            if type(found) is not kind or (isinstance(found, float) and not math.isfinite(found)):
                raise ModelError(
                    f"{self.path}: {key} is {found!r:.80}, and must be of type {kind.__name__}; convert the model to GGUF again."
                )
            return found
        if default is _REQUIRED:
            raise ModelError(f"{self.path} has no metadata value {key}; convert the model to GGUF again.")
        return default

    def config(self) -> DecoderConfig:
        """The model's config. ModelError if it uses something unsupported or a metadata value is missing."""
        config = replace(read_config(self._hf_config()), dtype=self._dtype())
        config = replace(
            config, eos_token_ids=end_tokens(config.eos_token_ids, config.vocab_size, f"GGUF file {self.path}")
        )
        if _ROPE_FACTORS in self._tensors:  # how llama.cpp stores Llama 3's scaling of the frequencies
            stored, rope = self._tensors[_ROPE_FACTORS], config.ropes[0]
            factors = stored.data.ravel().tolist() if stored.data.dtype.kind == "f" else []
            if len(factors) != len(rope.inv_freq) or not all(math.isfinite(f) and f > 0 for f in factors):
                raise ModelError(
                    f"{self.path}: {_ROPE_FACTORS} must hold {len(rope.inv_freq)} numbers above 0; convert the model to GGUF "
                    "again."
                )
            inv_freq = tuple(f / factor for f, factor in zip(rope.inv_freq, factors, strict=True))
            config = replace(config, ropes=(RotaryFrequencies(inv_freq, rope.scale),) * config.num_layers)
        return config

    def tensors(self) -> Iterator[CheckpointTensor]:
        """Yield every tensor, named as in transformers' checkpoints; names that have no counterpart are kept."""
        prefix = self.value("general.architecture", str)
        num_heads = self.value(f"{prefix}.attention.head_count", int)
        heads = {"attn_q": num_heads, "attn_k": self.value(f"{prefix}.attention.head_count_kv", int, num_heads)}
        for name, tensor in self._tensors.items():
            if name == _ROPE_FACTORS or name in _LONG_ROPE_FACTORS.values():
                continue
            stem, _, kind = name.rpartition(".")
            if stem.startswith("blk.") and stem.count(".") > 1:
                _, layer, part = stem.split(".", 2)
                if part in _EXPERT_NAMES and len(tensor.shape) == 3:
                    yield from _of_each_expert(tensor, f"model.layers.{layer}.mlp.experts", _EXPERT_NAMES[part], kind)
                    continue
                if self._architecture.latent and part in (gguf_latent.KEYS, gguf_latent.VALUES):
                    if part == gguf_latent.KEYS:
                        yield self._keys_and_values(layer)
                    continue
                new_stem = f"model.layers.{layer}.{_LAYER_NAMES[part]}" if part in _LAYER_NAMES else stem
                permuted_heads = heads.get(part) if self._architecture.permuted else None
            else:
                new_stem, permuted_heads = _MODEL_NAMES.get(stem, stem), None
            yield GGUFTensor(f"{new_stem}.{kind}", tensor, permuted_heads=permuted_heads)

    def _keys_and_values(self, layer: str) -> CheckpointTensor:
        """What makes keys and values of latents, where a file has it in two tensors; ModelError if they do not fit each other."""
        keys, values = (
            GGUFTensor(name, self._tensor(name))
            for name in (f"blk.{layer}.{part}.weight" for part in (gguf_latent.KEYS, gguf_latent.VALUES))
        )
        num_heads = self.value(f"{self.value('general.architecture', str)}.attention.head_count", int)
        shapes = keys.shape, values.shape
        if (
            [len(shape) for shape in shapes] != [3, 3]
            or {shape[0] for shape in shapes} != {num_heads}
            or keys.shape[1] != values.shape[2]
        ):
            raise ModelError(
                f"{self.path}: {keys.name} has shape {list(keys.shape)} and {values.name} {list(values.shape)}; they must be "
                f"[{num_heads}, rank, keys] and [{num_heads}, values, rank]. Convert the model to GGUF again."
            )
        return KeysAndValues(f"model.layers.{layer}.self_attn.kv_b_proj.weight", keys, values)

    def _hf_config(self) -> Any:
        prefix = self.value("general.architecture", str)

        def value(key: str, kind: type = int, default: Any = _REQUIRED) -> Any:
            return self.value(f"{prefix}.{key}", kind, default)

        if not self._architecture.has_experts and (num_experts := value("expert_count", int, 0)):
            *known, last = (name for name, architecture in _ARCHITECTURES.items() if architecture.has_experts)
            raise ModelError(
                f"{self.path} is a mixture of {num_experts} experts; with experts, GGUF files are read of architecture "
                f"{', '.join(known)} and {last}. Use the model's safetensors folder if its architecture is supported there."
            )
        if not value("attention.causal", bool, True):
            raise ModelError(f"{self.path} has attention that is not causal; causal models are supported.")
        hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
        context_length = value("context_length")
        described = self._latent(value) if self._architecture.latent else None
        head_dim = value("attention.key_length", int, hidden_size // max(1, num_heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            if described is None and value(key, int, head_dim) != head_dim:
                raise ModelError(
                    f"{self.path} has {prefix}.{key} = {value(key)}; native models need the head size, {head_dim}."
                )
        if value("attention.sliding_window", int, context_length) < context_length:
            raise ModelError(f"{self.path} attends over a sliding window; models with full attention are supported.")
        fields = {
            "model_type": self._architecture.model_type,
            "architectures": [self._architecture.class_name],
            "vocab_size": int(self._tensor("token_embd.weight").shape[-1]),
            "hidden_size": hidden_size,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": value("attention.head_count_kv", int, num_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon", float),
            "max_position_embeddings": context_length,
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id", int, None),
            "eos_token_id": self._end_tokens() or None,
        }
        if described is not None:
            del fields["head_dim"]
            fields |= {"model_type": described.model_type, "architectures": [described.class_name], **described.fields}
        elif self._architecture.has_experts:
            fields |= self._experts(fields["intermediate_size"])
        check_sizes(fields, self.path)
        plain = plain_config(fields)
        if plain is not None:
            return plain
        from transformers import AutoConfig

        try:
            return AutoConfig.for_model(**fields)
        except Exception as error:  # of many types, validation errors of its own among them
            raise ModelError(
                f"{self.path} describes no model that transformers knows: {why_unusable(error, fields)}. Convert the model to "
                "GGUF again."
            ) from error

    def _latent(self, value: gguf_latent.Metadata) -> gguf_latent.Described:
        """What distinguishes a model with latent attention."""
        if self._architecture.has_experts:
            biases = any(name.endswith(".exp_probs_b.bias") for name in self._tensors)
            return gguf_latent.deepseek2(self.path, value, corrects_choices=biases)
        stored = {name: self._tensors.get(key) for name, key in _LONG_ROPE_FACTORS.items()}
        factors = {name: tensor.data.ravel().tolist() for name, tensor in stored.items() if tensor is not None}
        return gguf_latent.minicpm3(self.path, value, factors)

    def _experts(self, intermediate_size: int) -> dict[str, Any]:
        """Fields of transformers' config that describe the mixture, with llama.cpp's defaults."""
        prefix = self.value("general.architecture", str)
        count, used = (self.value(f"{prefix}.{key}", int) for key in ("expert_count", "expert_used_count"))
        if not 1 <= used <= count:
            raise ModelError(
                f"{self.path} takes {used} of {count} experts for a token ({prefix}.expert_used_count, "
                f"{prefix}.expert_count); it must be between 1 and {count}. Convert the model to GGUF again."
            )
        for name, choices in _ONLY_CHOICES.items():
            found = self.value(f"{prefix}.{name}", type(choices[0]), choices[0])
            if found not in choices:
                raise ModelError(
                    f"{self.path} has {prefix}.{name} = {found}; mixtures of this architecture are read with "
                    f"{choices[1]}, or without it."
                )
        width = self.value(f"{prefix}.expert_feed_forward_length", int, 0)
        shared = self.value(f"{prefix}.expert_shared_feed_forward_length", int, 0)
        return {
            "num_experts": count,
            "num_experts_per_tok": used,
            "moe_intermediate_size": width or intermediate_size // used,
            "norm_topk_prob": self.value(f"{prefix}.expert_weights_norm", bool, self._architecture.normalised),
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        } | ({"shared_expert_intermediate_size": shared or intermediate_size} if prefix == "qwen2moe" else {})

    def _end_tokens(self) -> list[int]:
        """Tokens that end an answer: those that the file names so, and control tokens that do so in every model that has them, if
        the chat template writes them, or there is none. Of a file that names none, any of them."""
        named = [self.value(f"tokenizer.ggml.{key}_token_id", int, None) for key in ("eos", "eot", "eom")]
        named = [token_id for token_id in named if token_id is not None]
        tokens = self._fields.get("tokenizer.ggml.tokens")
        if tokens is None or not isinstance(tokens.parts[-1], Texts):
            return named
        found = tokens.parts[-1].find(_ENDS)
        types = self.value("tokenizer.ggml.token_type", list, []) if found else []
        for token_id in list(found):
            if token_id < len(types) and types[token_id] in (_NORMAL, _BYTE, _UNUSED):
                del found[token_id]
        template = self.value("tokenizer.chat_template", str, None)
        written = [token_id for token_id, text in found.items() if template is None or text in template]
        return named + written or list(found)

    def _rope_parameters(self) -> dict[str, Any]:
        """Rope settings, with llama.cpp's defaults: scaling by a factor is linear where no type is named, and a factor of 0, or
        none, is 1."""
        prefix = self.value("general.architecture", str) + ".rope."
        known = {f"{prefix}scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned", *_YARN)}
        if self._architecture.latent:
            known.add(f"{prefix}scaling.{_LOG_MULTIPLIER}")
        if unknown := [key for key in self._fields if key.startswith(f"{prefix}scaling.") and key not in known]:
            raise ModelError(f"{self.path} has rope settings that are not supported: {', '.join(unknown)}.")
        scaling_type = self.value(f"{prefix}scaling.type", str, "linear")
        if scaling_type not in ("none", "linear", "yarn"):
            raise ModelError(f'{self.path} has the rope scaling type "{scaling_type}"; supported are linear, yarn.')
        key = next(
            (key for key in ("scaling.factor", "scale_linear") if prefix + key in self._fields), "scaling.factor"
        )
        factor = self.value(prefix + key, float, 0.0) or 1.0
        if factor < 0:
            raise ModelError(f"{self.path} has {prefix}{key} = {factor}; it must be above 0, or 0, which is none.")
        rope = {"rope_type": "default", "rope_theta": self.value(f"{prefix}freq_base", float, 10000.0)}
        if rope["rope_theta"] <= 0:
            raise ModelError(f"{self.path} has {prefix}freq_base = {rope['rope_theta']}; it must be above 0.")
        if scaling_type == "none" or factor == 1:
            return rope
        rope |= {"rope_type": scaling_type, "factor": factor}
        if scaling_type == "yarn":
            context_length = self.value(f"{prefix.removesuffix('rope.')}context_length", int)
            original = self.value(f"{prefix}scaling.original_context_length", int, context_length)
            rope["original_max_position_embeddings"] = original
            for key, field in _YARN.items():
                if f"{prefix}scaling.{key}" in self._fields:
                    rope[field] = self.value(f"{prefix}scaling.{key}", float)
            if (
                f"{prefix}scaling.{_LOG_MULTIPLIER}" in self._fields
            ):  # a tenth of it, and of "mscale", which is the same
                rope["mscale_all_dim"] = rope["mscale"] = 10 * self.value(f"{prefix}scaling.{_LOG_MULTIPLIER}", float)
        return rope

    def _dtype(self) -> torch.dtype:
        down = "blk.0.ffn_down.weight"  # the first layer may be dense beside others with experts
        experts = self._architecture.has_experts and down not in self._tensors
        stored = self._tensor("blk.0.ffn_down_exps.weight" if experts else down).tensor_type.name
        return {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ModelError(f"{self.path} has no tensor {name}; convert the model to GGUF again.")
        return self._tensors[name]


def _of_each_expert(tensor: Any, path: str, projection: str, kind: str) -> Iterator[CheckpointTensor]:
    """A tensor of all experts of a layer as those of each, views of the mapped file."""
    for expert in range(int(tensor.shape[-1])):
        yield GGUFTensor(f"{path}.{expert}.{projection}.{kind}", tensor, expert=expert)


def _can_dequantize(tensor_type: Any) -> bool:
    """Whether the installed gguf package dequantises a type; it has no other way to ask."""
    import gguf

    block = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor_type][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, tensor_type)
    except NotImplementedError:
        return False
    return True

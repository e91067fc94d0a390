"""Checkpoints in GGUF files, llama.cpp's format. Metadata becomes a config, tensors get transformers' names."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.rotary import RotaryFrequencies
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.config import DecoderConfig
from stepgraph.models.hf_config import plain_config
from stepgraph.models.registry import read_config


@dataclass(frozen=True)
class _Architecture:
    model_type: str  # in transformers
    class_name: str
    permuted: bool  # query and key rows are reordered for llama.cpp's rotation of adjacent pairs


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", permuted=False),
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
}
_ARRAY, _LENGTH = struct.Struct("<IQ"), struct.Struct("<Q")
"""In a GGUF file: type and count of a list; length of a text."""
_ROPE_FACTORS = "rope_freqs.weight"
_REQUIRED = object()


class GGUFFile:
    """An open GGUF file of a supported architecture."""

    def __init__(self, path: Path) -> None:
        """Read the metadata of the file at `path`.

        Raises:
            ModelError: the file is not GGUF, truncated, or of an architecture or tensor type that is not supported.
        """
        self.path = path
        reader = _open(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        if (num_files := self.value("split.count", 1)) > 1:
            raise ModelError(
                f"{path} is one of {num_files} parts of a split GGUF file; merge them with llama-gguf-split."
            )
        name = self.value("general.architecture")
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

    def value(self, key: str, default: Any = _REQUIRED) -> Any:
        """Return a metadata value; ModelError if it is absent and there is no default."""
        if key in self._fields:
            field = self._fields[key]
            return field.parts[-1].read() if isinstance(field.parts[-1], _Texts) else field.contents()
        if default is _REQUIRED:
            raise ModelError(f"{self.path} has no metadata value {key}; convert the model to GGUF again.")
        return default

    def config(self) -> DecoderConfig:
        """The model's config. ModelError if it uses something unsupported or a metadata value is missing."""
        config = replace(read_config(self._hf_config()), dtype=self._dtype())
        if _ROPE_FACTORS in self._tensors:  # how llama.cpp stores Llama 3's scaling of the frequencies
            factors = self._tensors[_ROPE_FACTORS].data.tolist()
            rope = config.ropes[0]
            inv_freq = tuple(f / factor for f, factor in zip(rope.inv_freq, factors, strict=True))
            config = replace(config, ropes=(RotaryFrequencies(inv_freq, rope.scale),) * config.num_layers)
        return config

    def tensors(self) -> Iterator[CheckpointTensor]:
        """Yield every tensor, named as in transformers' checkpoints; names that have no counterpart are kept."""
        prefix = self.value("general.architecture")
        num_heads = self.value(f"{prefix}.attention.head_count")
        heads = {"attn_q": num_heads, "attn_k": self.value(f"{prefix}.attention.head_count_kv", num_heads)}
        for name, tensor in self._tensors.items():
            if name == _ROPE_FACTORS:
                continue
            stem, _, kind = name.rpartition(".")
            if stem.startswith("blk."):
                _, layer, part = stem.split(".", 2)
                new_stem = f"model.layers.{layer}.{_LAYER_NAMES[part]}" if part in _LAYER_NAMES else stem
                permuted_heads = heads.get(part) if self._architecture.permuted else None
            else:
                new_stem, permuted_heads = _MODEL_NAMES.get(stem, stem), None
            yield _GGUFTensor(f"{new_stem}.{kind}", tensor, permuted_heads)

    def _hf_config(self) -> Any:
        prefix = self.value("general.architecture")

        def value(key: str, default: Any = _REQUIRED) -> Any:
            return self.value(f"{prefix}.{key}", default)

        if num_experts := value("expert_count", 0):
            raise ModelError(f"{self.path} is a mixture of {num_experts} experts; dense decoders are supported.")
        hidden_size, num_heads = value("embedding_length"), value("attention.head_count")
        context_length = value("context_length")
        head_dim = value("attention.key_length", hidden_size // num_heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if value(key, head_dim) != head_dim:
                raise ModelError(
                    f"{self.path} has {prefix}.{key} = {value(key)}; native models need the head size, {head_dim}."
                )
        if value("attention.sliding_window", context_length) < context_length:
            raise ModelError(f"{self.path} attends over a sliding window; models with full attention are supported.")
        eos = (self.value(f"tokenizer.ggml.{key}_token_id", None) for key in ("eos", "eot", "eom"))
        fields = {
            "model_type": self._architecture.model_type,
            "architectures": [self._architecture.class_name],
            "vocab_size": int(self._tensor("token_embd.weight").shape[-1]),
            "hidden_size": hidden_size,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": value("attention.head_count_kv", num_heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
            "max_position_embeddings": context_length,
            "rope_parameters": self._rope_parameters(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "bos_token_id": self.value("tokenizer.ggml.bos_token_id", None),
            "eos_token_id": list(dict.fromkeys(i for i in eos if i is not None)) or None,
        }
        plain = plain_config(fields)
        if plain is not None:
            return plain
        from transformers import AutoConfig

        return AutoConfig.for_model(**fields)

    def _rope_parameters(self) -> dict[str, Any]:
        prefix = self.value("general.architecture") + ".rope."
        rope = {"rope_type": "default", "rope_theta": self.value(f"{prefix}freq_base", 10000.0)}
        scaling_type = self.value(f"{prefix}scaling.type", "none")
        if scaling_type == "none":
            return rope
        if scaling_type not in ("linear", "yarn"):
            raise ModelError(f'{self.path} has the rope scaling type "{scaling_type}"; supported are linear, yarn.')
        known = {f"{prefix}scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned")}
        if unknown := [key for key in self._fields if key.startswith(f"{prefix}scaling.") and key not in known]:
            raise ModelError(f"{self.path} has rope settings that are not supported: {', '.join(unknown)}.")
        rope |= {"rope_type": scaling_type, "factor": self.value(f"{prefix}scaling.factor")}
        if scaling_type == "yarn":
            rope["original_max_position_embeddings"] = self.value(f"{prefix}scaling.original_context_length")
        return rope

    def _dtype(self) -> torch.dtype:
        stored = self._tensor("blk.0.ffn_down.weight").tensor_type.name
        return {"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)

    def _tensor(self, name: str) -> Any:
        if name not in self._tensors:
            raise ModelError(f"{self.path} has no tensor {name}; convert the model to GGUF again.")
        return self._tensors[name]


class _GGUFTensor(CheckpointTensor):
    def __init__(self, name: str, tensor: Any, permuted_heads: int | None) -> None:
        self.name = name
        self.shape = tuple(int(size) for size in reversed(tensor.shape))
        self.quantization = None if tensor.tensor_type.name in ("F32", "F16", "BF16") else tensor.tensor_type.name
        self._type, self._data, self._permuted_heads = tensor.tensor_type, tensor.data, permuted_heads

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `CheckpointTensor.load`."""
        import gguf

        values = gguf.quants.dequantize(self._rows(), self._type)
        return _to_torch(values).to(device).to(dtype)

    def packed(self) -> Tensor:
        """See `CheckpointTensor.packed`."""
        return _to_torch(self._rows()) if self.quantization else super().packed()

    def _rows(self) -> np.ndarray:
        """The stored rows, queries and keys back in the order in which transformers rotates them.

        Per head, llama.cpp interleaves the two halves of the rows; blocks of quantisation never span rows, so that rows
        can be moved while packed.
        """
        rows = self._data
        if self._permuted_heads is None:
            return rows
        return rows.reshape(self._permuted_heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@dataclass(frozen=True)
class _Texts:
    """Texts that follow each other in a GGUF file: the length of each, then its bytes."""

    file: memoryview
    start: int
    count: int
    nbytes: int  # named as in an array, which gguf takes it for

    @classmethod
    def at(cls, file: memoryview, start: int, count: int) -> _Texts:
        """The texts from byte `start` on; struct.error if the file ends in them."""
        end = start
        for _ in range(count):
            end += _LENGTH.size + _LENGTH.unpack_from(file, end)[0]
        return cls(file, start, count, end - start)

    def read(self) -> list[str]:
        texts, end = [], self.start
        for _ in range(self.count):
            begin = end + _LENGTH.size
            end = begin + _LENGTH.unpack_from(self.file, end)[0]
            texts.append(str(self.file[begin:end], "utf-8"))
        return texts


def _to_torch(array: np.ndarray) -> Tensor:
    """Wrap an array, copied if it is a view of the read-only file, which torch must not own."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _open(path: Path) -> Any:
    """Open `path` with gguf's reader, its errors translated to ModelError."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"Reading {path} needs the gguf package: pip install gguf.") from error

    class Reader(gguf.GGUFReader):
        """Reads from a plain view of the mapped file, as slicing a numpy.memmap costs several times as much, and takes a list for
        one part: a vocabulary has a hundred thousand texts and numbers, of which gguf makes an array or two each."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            types = gguf.GGUFValueType
            if raw_type != types.ARRAY or self.byte_order != "I" or sys.byteorder != "little":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = _ARRAY.unpack(self.data[orig_offs : orig_offs + _ARRAY.size].tobytes())
            start = orig_offs + _ARRAY.size
            if kind == types.STRING:
                texts = _Texts.at(self.data.data, start, count)
                return _ARRAY.size + texts.nbytes, [texts], [], [types.ARRAY, types.STRING]
            if kind in self.gguf_scalar_to_np:
                values = self._get(start, self.gguf_scalar_to_np[kind], count)
                return _ARRAY.size + values.nbytes, [values], [0], [types.ARRAY, types(kind)]
            return super()._get_field_parts(orig_offs, raw_type)

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as GGUF: {error}. "
            "It may be truncated; download it again."
        ) from error


def _can_dequantize(tensor_type: Any) -> bool:
    """Whether the installed gguf package dequantises a type; it has no other way to ask."""
    import gguf

    block = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor_type][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, tensor_type)
    except NotImplementedError:
        return False
    return True

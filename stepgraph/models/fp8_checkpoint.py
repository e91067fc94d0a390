"""Weights that checkpoints store in 8 bits (E4M3), and their scales, which they store as further tensors.

Read are what llm-compressor writes (``compressed-tensors``, format ``float-quantized``), DeepSeek's layout, which Qwen and
Mistral use too (``fp8``), NVIDIA's (``modelopt``) and Meta's (``fbgemm_fp8``): one scale per matrix, per output, or per block of
128 × 128.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.formats.fp8 import FP8, pack
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.models.four_bit_checkpoint import four_bit_refusal, packed_refusal
from stepgraph.ops.fp8_linear import GROUP_SIZE, dequantize, num_groups
from stepgraph.parallel.shard import Cut, Part

_SCALES = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales; both are factors, the first in spite of its name."""
_UNUSED = (".input_scale", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
"""Scales for activations and for the KV cache: activations are not quantised here, and the cache has none."""


_MODELOPT = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4")
"""Of modelopt's formats, those that are read."""
READABLE = (
    "Quantised weights that run: those of 8-bit floating point in native models (compressed-tensors, fp8, modelopt and "
    f"fbgemm_fp8, with a scale per matrix, per output, or per block of {GROUP_SIZE} × {GROUP_SIZE}) or of 4 bits (awq, gptq, "
    "auto-round, compressed-tensors, NVFP4 and MXFP4), gpt-oss's experts in MXFP4, and GGUF files of architecture llama, qwen2, "
    "qwen2moe, qwen3, qwen3moe, deepseek2 or minicpm3. Use such a checkpoint of the model, or the unquantised one, which "
    "--quantization fp8 rounds to 8 bits as it is read."
)
"""What to do about a checkpoint that is refused."""


def refusal(quantization: Any) -> str | None:
    """Why a checkpoint with this `quantization_config` cannot be read, as a part of a sentence; None if it can."""
    if not isinstance(quantization, dict):
        return f"they are quantised in a way that config.json does not describe ({quantization!r:.80})"
    method = method_of(quantization)
    described = f'they are quantised with method "{method}"{_bits(quantization)}'
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if quantization.get("fmt", "e4m3") != "e4m3":
            return f"{described} in the format {quantization['fmt']}, and e4m3 is read"
        return None if block is None or list(block) == [GROUP_SIZE, GROUP_SIZE] else _blocks(described, block)
    if method in ("fbgemm_fp8", "mxfp4"):
        return None
    if method == "modelopt":
        nested = quantization.get("quantization")
        algorithm = str((nested if isinstance(nested, dict) else quantization).get("quant_algo", "unknown"))
        readable = algorithm.upper() in _MODELOPT
        return None if readable else f"{described} in the format {algorithm}, and {', '.join(_MODELOPT)} are read"
    if method in ("awq", "gptq", "auto-round"):
        reason = four_bit_refusal(method, quantization)
        return reason and described + reason
    if method != "compressed-tensors":
        return f"{described}, for which there are no kernels here"
    transforms = quantization.get("transform_config") or {}
    if transforms.get("config_groups"):
        return f"{described} after rotations (transform_config) that a model would have to apply as it runs"
    for group in quantization.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits") == 4:
            if reason := packed_refusal(weights, str(group.get("format") or quantization.get("format"))):
                return described + reason
            continue
        type_, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
        if (type_, bits) != ("float", 8) or strategy not in ("tensor", "channel", "block"):
            return (
                f"{described} (type {type_}, {bits} bits, a scale per {strategy}), for which there are no kernels here"
            )
        block = weights.get("block_structure")
        if strategy == "block" and list(block or ()) != [GROUP_SIZE, GROUP_SIZE]:
            return _blocks(described, block)
    return None


def method_of(quantization: Any) -> str:
    """Name of the method by which a `quantization_config` says that weights were quantised."""
    if not isinstance(quantization, dict):
        return "unknown"
    producer = quantization.get("producer")
    name = producer.get("name") if isinstance(producer, dict) else None  # modelopt may name no method beside it
    return str(quantization.get("quant_method") or name or "unknown")


def _bits(quantization: dict[str, Any]) -> str:
    flags = {4: "load_in_4bit", 8: "load_in_8bit"}
    bits = next((bits for bits, flag in flags.items() if quantization.get(flag)), None)
    bits = bits or quantization.get("bits") or quantization.get("w_bit")
    return f" of {bits} bits" if bits else ""


def _blocks(described: str, block: Any) -> str:
    return f"{described} with a scale per block of {block}, and blocks of {GROUP_SIZE} × {GROUP_SIZE} are read"


class FP8Tensor(CheckpointTensor):
    """A weight in 8 bits, taken together with its scales."""

    def __init__(self, codes: CheckpointTensor, scale: CheckpointTensor) -> None:
        self.name, self.shape = codes.name, codes.shape
        outputs, inputs = self.shape
        blocks = num_groups(outputs), num_groups(inputs)
        written = blocks, (blocks[0], 1, blocks[1], 1)  # the second by modelopt
        self._blocked = scale.shape in written and math.prod(scale.shape) > 1
        if not self._blocked and scale.shape not in ((), (1,), (1, 1), (1, 1, 1, 1), (outputs,), (outputs, 1)):
            raise ModelError(
                f"{scale.name} has shape {list(scale.shape)}, and {codes.name} is {list(codes.shape)}: scales are read of whole "
                f"matrices, of outputs, or of blocks of {GROUP_SIZE} × {GROUP_SIZE}."
            )
        self.groups = blocks[1] if self._blocked else 1
        self.quantization = FP8(grouped=self.groups > 1).encoding
        self.nbytes = math.prod(self.shape) + 4 * math.prod(scale.shape)
        self._codes, self._scale = codes, scale

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        if part is None or not self._blocked:
            return dequantize(*self._read(device, part)).to(dtype)
        widened = part.widened(GROUP_SIZE)
        return take(dequantize(*self._read(device, widened)), part.within(widened)).to(dtype)

    def packed(self, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.packed`; the bytes are those of `stepgraph.layers.formats.fp8.pack`."""
        return pack(*self._read(torch.device("cpu"), part))

    def _read(self, device: torch.device, part: Part | None) -> tuple[Tensor, Tensor]:
        """Codes [O, I] and scales [O, G] of a part, whose columns begin and end where groups do; None: of the whole."""
        codes_OI = self._codes.load(torch.float8_e4m3fn, device, part)
        scale = self._scale.load(torch.float32, device)  # a fraction of the codes: not worth reading in parts
        outputs = self.shape[0]
        if self._blocked:
            scale_OG = scale.view(-1, num_groups(self.shape[1])).repeat_interleave(GROUP_SIZE, 0)[:outputs]
        else:
            scale_OG = scale.view(-1, 1).expand(outputs, 1)
        if part is None:
            return codes_OI, scale_OG
        columns = Cut.whole(self.groups)
        if self.groups > 1:
            assert part.columns is not None
            begin, end = part.columns.begin, part.columns.begin + part.columns.length
            assert begin % GROUP_SIZE == 0, part
            columns = Cut(self.groups, begin // GROUP_SIZE, num_groups(end) - begin // GROUP_SIZE)
        return codes_OI, take(scale_OG, Part(part.rows, columns))


def join_scales(tensors: Iterable[CheckpointTensor]) -> Iterator[CheckpointTensor]:
    """A checkpoint's tensors, those in 8 bits taken together with their scales. In a checkpoint that has any, scales that are
    not used are left out."""
    by_name = {tensor.name: tensor for tensor in tensors}
    scales = {
        name: by_name[name + suffix]
        for name, tensor in by_name.items()
        for suffix in _SCALES
        if tensor.is_e4m3 and name + suffix in by_name
    }
    used = {scale.name for scale in scales.values()}
    for name, tensor in by_name.items():
        if name in scales:
            yield FP8Tensor(tensor, scales[name])
        elif name not in used and not (scales and name.endswith(_UNUSED)):
            yield tensor

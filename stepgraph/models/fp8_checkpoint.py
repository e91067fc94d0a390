"""Weights that checkpoints store in 8 bits (E4M3), and their scales, which they store as further tensors.

Read are what llm-compressor writes (``compressed-tensors``, format ``float-quantized``), and DeepSeek's layout, which Qwen uses
too (``fp8``): one scale per matrix, per output, or per block of 128 × 128.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.layers.fp8_linear import pack, quantization_name
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.ops.fp8_linear import GROUP_SIZE, dequantize, num_groups

_SCALES = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales; both are factors, the first in spite of its name."""
_UNUSED = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale")
"""Scales for activations and for the KV cache: activations are not quantised here, and the cache has none."""


def refusal(quantization: Any) -> str | None:
    """Why a checkpoint with this `quantization_config` cannot be read; None if it can."""
    if not isinstance(quantization, dict):
        return f"its checkpoint is quantised in a way that its config does not describe ({quantization!r})"
    method = quantization.get("quant_method", "unknown")
    described = f'its checkpoint is quantised with method "{method}"'
    if method == "fp8":
        block = quantization.get("weight_block_size")
        if quantization.get("fmt", "e4m3") != "e4m3":
            return f"{described} in the format {quantization['fmt']}, and e4m3 is read"
        return None if block is None or list(block) == [GROUP_SIZE, GROUP_SIZE] else _blocks(described, block)
    if method != "compressed-tensors":
        return f"{described}, which needs kernels of its own"
    for group in quantization.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        type_, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
        if (type_, bits) != ("float", 8) or strategy not in ("tensor", "channel", "block"):
            return f"{described} (type {type_}, {bits} bits, a scale per {strategy}), which needs kernels of its own"
        block = weights.get("block_structure")
        if strategy == "block" and list(block or ()) != [GROUP_SIZE, GROUP_SIZE]:
            return _blocks(described, block)
    return None


def _blocks(described: str, block: Any) -> str:
    return f"{described} with a scale per block of {block}, and blocks of {GROUP_SIZE} × {GROUP_SIZE} are read"


class FP8Tensor(CheckpointTensor):
    """A weight in 8 bits, taken together with its scales."""

    def __init__(self, codes: CheckpointTensor, scale: CheckpointTensor) -> None:
        self.name, self.shape = codes.name, codes.shape
        outputs, inputs = self.shape
        blocks = num_groups(outputs), num_groups(inputs)
        self._blocked = scale.shape == blocks and scale.shape != (1, 1)
        if not self._blocked and scale.shape not in ((), (1,), (1, 1), (outputs,), (outputs, 1)):
            raise ModelError(
                f"{scale.name} has shape {list(scale.shape)}, and {codes.name} is {list(codes.shape)}: scales are read of whole "
                f"matrices, of outputs, or of blocks of {GROUP_SIZE} × {GROUP_SIZE}."
            )
        self.groups = blocks[1] if self._blocked else 1
        self.quantization = quantization_name(self.groups)
        self._codes, self._scale = codes, scale

    def load(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `CheckpointTensor.load`."""
        return dequantize(*self._read(device)).to(dtype)

    def packed(self) -> Tensor:
        """See `CheckpointTensor.packed`; the bytes are those of `stepgraph.layers.fp8_linear.pack`."""
        return pack(*self._read(torch.device("cpu")))

    def _read(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Codes [O, I] and scales [O, G]."""
        codes_OI = self._codes.load(torch.float8_e4m3fn, device)
        scale = self._scale.load(torch.float32, device)
        if self._blocked:
            return codes_OI, scale.repeat_interleave(GROUP_SIZE, 0)[: self.shape[0]]
        return codes_OI, scale.view(-1, 1).expand(self.shape[0], 1)


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

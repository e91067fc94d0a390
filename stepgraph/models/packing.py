"""Weights that stay in a GGUF file's own blocks, where kernels multiply them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stepgraph import native
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.packing import Packing
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.ops.packed import BLOCK, BLOCK_BYTES, packed_rows


class PackedTarget:
    """A `Target` that is filled with a tensor's stored bytes or, if its packing says so, with values, which are rounded."""

    def __init__(self, codes: Tensor, packing: Packing) -> None:
        """Args:
        codes: [rows, bytes of a row] uint8, a parameter or a view into one.
        packing: of the layer.
        """
        self.quantization, self.takes_values = packing.format, packing.takes_values
        self.shape, self.dtype, self.device = torch.Size((codes.shape[0], packing.width)), torch.float32, codes.device
        self._codes = codes

    def copy_(self, values: Tensor) -> None:
        """Take [rows, bytes of a row] uint8, or [rows, width] values."""
        self._codes.copy_(values if values.dtype == torch.uint8 else round_to_q8_0(values))


def pack(model: nn.Module, tensors: Iterable[CheckpointTensor], *, merged: bool, exact_tokens: int | None) -> None:
    """Have a model's layers keep the blocks of a checkpoint, of those tensors whose format has kernels on this machine.

    Args:
        model: native, in float32, on the meta device: layers get new parameters.
        tensors: of the checkpoint; nothing is read.
        merged: the checkpoint merges projections as the model does.
        exact_tokens: products of more tokens may round to bfloat16; None: none may.
    """
    formats = {tensor.name: tensor.quantization for tensor in tensors}
    if not formats.keys() or not any(formats.values()) or not native.available():
        return
    for path, module in model.named_modules():
        if isinstance(module, Linear | Embedding):
            names = _tensor_names(path, module, merged=merged)
            (outputs, width), (format_, *others) = module.weight.shape, {formats.get(name) for name in names}
            if format_ in BLOCK_BYTES and not others and width % BLOCK == 0:
                codes = module.weight.new_empty(outputs, width // BLOCK * BLOCK_BYTES[format_], dtype=torch.uint8)
                module.weight, module.packing = nn.Parameter(codes, False), Packing(format_, width, exact_tokens)


def pack_rounded(module: nn.Module, *, exact_tokens: int | None) -> None:
    """Have the linear layers of a module keep blocks of Q8_0, made of whatever they are filled with.

    Args:
        module: in float32 on the CPU, not filled yet: layers get new parameters.
        exact_tokens: see `pack`.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.in_features % BLOCK == 0:
            layer.packing = Packing("Q8_0", layer.in_features, exact_tokens, takes_values=True)
            size = layer.out_features, layer.in_features // BLOCK * BLOCK_BYTES["Q8_0"]
            layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), False)


def round_to_q8_0(values_OI: Tensor) -> Tensor:
    """Blocks of Q8_0 nearest to some values: 32 codes of 8 bits after their scale, a float16. I is a multiple of 32.

    Returns:
        [O, I / 32 · 34] uint8.
    """
    block_OB32 = values_OI.float().unflatten(1, (-1, BLOCK))
    scale_OB1 = (block_OB32.abs().amax(2, keepdim=True) / 127).half()
    code_OB32 = (block_OB32 / scale_OB1.float()).nan_to_num(0.0).round().clamp(-127, 127).to(torch.int8)
    return torch.cat((scale_OB1.view(torch.uint8), code_OB32.view(torch.uint8)), 2).flatten(1)


def plain_weight(module: Linear | Embedding) -> Tensor:
    """The weight as numbers: the parameter itself, or a new tensor of what it stands for."""
    if module.packing is None:
        return module.weight
    return packed_rows(module.weight, torch.arange(len(module.weight), dtype=torch.int32), module.packing.width)


def _tensor_names(path: str, module: nn.Module, *, merged: bool) -> list[str]:
    """Names in the checkpoint of the tensors that a layer's weight is made of."""
    if not path.startswith("lm_head"):
        path = f"model.{path}"
    if isinstance(module, MergedLinear) and not merged:
        parent = path.rpartition(".")[0]
        return [f"{parent}.{part}.weight" for part in module.parts]
    return [f"{path}.weight"]

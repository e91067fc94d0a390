"""Which layers of a model get weights of 8 bits: decided before any weight takes memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from stepgraph.layers.fp8_linear import fp8_linear
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.decoder import Decoder
from stepgraph.models.fp8_checkpoint import FP8Tensor


def quantize_layers(model: Decoder, tensors: Iterable[CheckpointTensor], *, everything: bool) -> bool:
    """Replace those linear layers whose weights a checkpoint has in 8 bits. Embedding, norms and output head stay.

    Args:
        model: unfilled; on the meta device, so that its layers take memory only as what they become.
        tensors: of the checkpoint.
        everything: quantise the other layers' weights too, as they are read, with one scale per output.

    Returns:
        Whether there are any.
    """
    stored = {tensor.name: tensor for tensor in tensors}
    chosen: dict[str, tuple[Linear, int]] = {}
    for path, module in model.layers.named_modules(prefix="layers"):
        if not isinstance(module, Linear):
            continue
        names = [path]
        if isinstance(module, MergedLinear) and not model.config.merged_projections:
            names = [f"{path.rpartition('.')[0]}.{part}" for part in module.parts]
        weights = [stored.get(f"model.{name}.weight") for name in names]
        groups = {weight.groups if isinstance(weight, FP8Tensor) else None for weight in weights}
        common = groups.pop() if len(groups) == 1 else None
        if common is not None or everything:
            chosen[path] = module, common or 1
    for path, (module, count) in chosen.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, fp8_linear(module, count))
    return bool(chosen)


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give the parameters of a model on the meta device memory, uninitialised, and move its buffers, which hold values."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Not empty_like, which on the meta device runs Python code that imports half a second's worth of sympy.
            new = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(new, False))
        for name, buffer in module.named_buffers(recurse=False):
            assert buffer.device.type != "meta", name
            setattr(module, name, buffer.to(device))

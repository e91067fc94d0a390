"""How the layers of a model keep their weights: decided before any weight takes memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from stepgraph.errors import ModelError
from stepgraph.layers.experts import ExpertLinear
from stepgraph.layers.formats import FORMATS, FP8, FormatOptions, FourBit, Packed, Plain, WeightFormat
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.matrix import Matrix
from stepgraph.models.checkpoint import CheckpointTensor
from stepgraph.models.decoder import Decoder
from stepgraph.models.sharing import possible_sizes
from stepgraph.ops.packed import BLOCK
from stepgraph.parallel.shard import WHOLE

GROUP_SIZE = 128
"""Inputs that share a scale where weights are rounded to 4 bits."""


def choose_formats(
    model: Decoder,
    tensors: Iterable[CheckpointTensor],
    *,
    keep: bool,
    round_to: str | None,
    packed: bool,
    repacked: bool,
    deterministic: bool,
    exact_tokens: int | None,
) -> None:
    """Have each layer of a model keep its weight as the checkpoint does, where there is a format for that.

    Args:
        model: unfilled; on the meta device, so that its layers take memory only in the format that they get.
        tensors: of the checkpoint; nothing is read.
        keep: quantised weights stay so; else they become numbers, as those do of layers that need numbers.
        round_to: "fp8" or "int4": the other linear layers' weights are rounded to 8 bits as they are read, with one scale per
            output, of all its inputs whichever the rank keeps, or to 4 bits, with one for every `GROUP_SIZE` inputs. Embedding,
            norms, output head, and layers that need numbers, stay. None: they all do.
        packed, repacked, deterministic, exact_tokens: see `FormatOptions`.

    Raises:
        ModelError: ranks would share a layer's inputs where its format keeps some together.
    """
    encodings = {tensor.name: tensor.quantization for tensor in tensors}
    formats: dict[str, WeightFormat] = {
        "fp8": FP8(deterministic=deterministic),
        "int4": FourBit(GROUP_SIZE, deterministic=deterministic),
    }
    to = None if round_to is None else formats[round_to]
    for path, module in model.named_modules():
        if not isinstance(module, Matrix):
            continue
        options = FormatOptions(path.startswith("layers."), deterministic, packed, repacked, exact_tokens)
        names = _tensor_names(path, module, merged=model.config.merged_projections)
        kept = (
            _keeping(module, [encodings.get(model.checkpoint_name(name)) for name in names], options) if keep else None
        )
        rounded = to if options.in_layers and isinstance(module, Linear) else None
        plain = Plain(deterministic)
        module.use(plain if module.needs_numbers else kept or rounded or plain)
    _check_inputs(model)


def keep_fp8(
    module: nn.Module, tensors: Iterable[CheckpointTensor], name_of: Callable[[str], str], *, merged: bool
) -> None:
    """Have the linear layers of a draft module keep weights of 8 bits as a checkpoint does, where ranks cut between its scales.

    Args:
        module: not filled yet: layers get new parameters.
        tensors: of the checkpoint; nothing is read.
        name_of: that in the checkpoint of what has a name in the module.
        merged: whether the checkpoint merges projections, see `DecoderConfig`.
    """
    encodings = {tensor.name: tensor.quantization for tensor in tensors}
    options = FormatOptions(in_layers=True, deterministic=False, packed=False, repacked=False, exact_tokens=None)
    for path, layer in module.named_modules():
        if isinstance(layer, Linear) and not layer.needs_numbers:
            names = _tensor_names(path, layer, merged=merged)
            kept = _keeping(layer, [encodings.get(name_of(name)) for name in names], options)
            if kept is not None and (layer.inputs.is_whole or layer.inputs.length % kept.input_unit == 0):
                layer.use(kept)


def _keeping(layer: Matrix, encodings: Sequence[str | None], options: FormatOptions) -> WeightFormat | None:
    """The format that keeps tensors in these encodings, which make up a layer's weight; None if they become numbers."""
    if len(set(encodings)) > 1 or (encoding := encodings[0]) is None:
        return None
    candidates = (format.keeping(encoding, layer.inputs.size, options) for format in FORMATS)
    return next((format for format in candidates if format is not None), None)


def _check_inputs(model: Decoder) -> None:
    """Refuse, with the numbers that can, so many ranks as would share inputs that are quantised together."""
    cut = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, Matrix) and not module.inputs.is_whole
    }
    uneven = {path: m for path, m in cut.items() if m.inputs.length % m.format.input_unit}
    if not uneven:
        return
    path, module = next(iter(uneven.items()))
    possible = [
        str(size)
        for size in possible_sizes(model.config, expert_parallel=model.expert_shard.experts != WHOLE)
        if all(m.inputs.size % (size * m.format.input_unit) == 0 or size == 1 for m in cut.values())
    ]
    only_experts = all(isinstance(m, ExpertLinear) for m in uneven.values())
    in_experts = only_experts and model.shard.size in possible_sizes(model.config, expert_parallel=True)
    raise ModelError(
        f"{model.shard.size} devices cannot share {path} evenly: its weights are quantised in groups of "
        f"{module.format.input_unit} of {module.inputs.size} inputs. Numbers that can: {', '.join(possible)}. Or set "
        + ("enable_expert_parallel, which keeps experts whole, or " if in_experts else "")
        + "quantization to none, which keeps them as numbers."
    )


def pack_rounded(module: nn.Module, *, exact_tokens: int | None) -> None:
    """Have the linear layers of a draft module keep blocks of Q8_0, made of whatever they are filled with.

    Args:
        module: in float32 on the CPU, not filled yet: layers get new parameters.
        exact_tokens: see `Packed`.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and layer.in_features % BLOCK == 0 and not layer.needs_numbers:
            layer.use(Packed("Q8_0", exact_tokens, takes_values=True))


def names_of_numbers(model: Decoder) -> set[str]:
    """Names in the checkpoint of the tensors that become numbers whatever it keeps them in."""
    merged = model.config.merged_projections
    matrices = {path: module for path, module in model.named_modules() if isinstance(module, Matrix)}
    needing = (_tensor_names(path, m, merged=merged) for path, m in matrices.items() if m.needs_numbers)
    return {model.checkpoint_name(name) for names in needing for name in names}


def _tensor_names(path: str, module: Matrix, *, merged: bool) -> list[str]:
    """Names, by the paths of modules, of the checkpoint's tensors that a layer's weight is made of."""
    if isinstance(module, MergedLinear) and not merged:
        parent = path.rpartition(".")[0]
        return [f"{parent}.{part}.weight" for part in module.parts]
    return [f"{path}.weight"]


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

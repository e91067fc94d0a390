"""What a model's weights take, told and checked before they are read: beyond its memory, a machine ends the process that asks."""

from __future__ import annotations

import logging
import math

import torch

from stepgraph import native
from stepgraph.errors import DeviceMemoryError
from stepgraph.layers.formats.target import Skipped, part_of, quantization_of
from stepgraph.models.source import ModelSource
from stepgraph.models.update import Update
from stepgraph.ops.packed import BLOCK_BYTES

logger = logging.getLogger(__name__)


def check_fits(
    num_weights: int, nbytes: int, free_bytes: int | None, *, dtype: torch.dtype, source: ModelSource
) -> None:
    """Raise DeviceMemoryError if weights take more memory than is free.

    Args:
        num_weights: of the model.
        nbytes: what they take.
        free_bytes: of the device; None: not known.
        dtype: of what is not quantised.
        source: of the model.
    """
    if free_bytes is None or nbytes <= free_bytes:
        return
    halved = dtype == torch.float32 and 2 * num_weights <= free_bytes
    way = f"set dtype='bfloat16' ({_gib(2 * num_weights)}), " if halved else ""
    raise DeviceMemoryError(
        f"the weights of {source.name} take {_gib(nbytes)} of memory with dtype {_name(dtype)}, and {_gib(free_bytes)} are free: "
        f"{way}free some, or choose a smaller model"
    )


def tell_of_dequantised(matches: Update, source: ModelSource, *, warn: bool) -> None:
    """Log what blocks of quantised tensors take that become numbers, for lack of kernels or because they were not asked for.

    Args:
        matches: where each tensor goes.
        source: of the tensors.
        warn: as a warning, with what keeps its bits: blocks are kept where there are kernels.
    """
    formats, kept, stored = set(), 0, 0
    for target, tensor in matches:
        if isinstance(target, Skipped):
            continue
        if tensor.quantization is not None and tensor.quantization != quantization_of(target):
            formats.add(tensor.quantization)
            part = part_of(target)
            numel = math.prod(target.shape if part is None else part.kept_shape)
            kept += numel * target.dtype.itemsize
            stored += tensor.nbytes * numel // math.prod(target.shape)
            dtype = target.dtype
    if not formats:
        return
    condition = "" if native.available() else " and the CPU kernels can be compiled (docs/cpu.md)"
    types = ", ".join(BLOCK_BYTES)
    advice = (
        f" Tensors of type {types} keep their bits where those that make up one matrix (q, k and v; gate and up) are of one "
        f"type{condition}: use such a file, or dtype bfloat16 for half the memory."
    )
    logger.log(
        logging.WARNING if warn else logging.INFO,
        "%s: tensors of type %s are kept as %s, which takes %s of memory instead of the file's %s.%s",
        source.description,
        ", ".join(sorted(formats)),
        _name(dtype),
        _gib(kept),
        _gib(stored),
        advice if warn else "",
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 0.1 * 2**30 else f"{nbytes / 2**20:.1f} MiB"

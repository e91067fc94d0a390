"""Experts' tensors as gpt-oss's checkpoints hold them, in which each is that of all experts of a layer, of whose outputs gate and
up alternate: blocks of MXFP4, as published, or numbers, with inputs before outputs, as transformers has them in memory.

Shapes: N experts, O outputs, I inputs, B blocks of inputs.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from stepgraph.errors import ModelError
from stepgraph.models import mxfp4
from stepgraph.models.checkpoint import CheckpointTensor, take
from stepgraph.parallel.shard import Cut, Part

_NAME = re.compile(
    r"(?P<path>.+\.mlp\.experts)\.(?P<projection>gate_up_proj|down_proj)(?P<kind>_blocks|_scales|_bias|)"
)
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def split_interleaved(by_name: Mapping[str, CheckpointTensor]) -> tuple[set[str], list[CheckpointTensor]]:
    """Find the tensors of such experts.

    Args:
        by_name: all of a checkpoint.

    Returns:
        The names of those that are theirs, and what they are in native models: a matrix and a bias for each projection of each.

    Raises:
        ModelError: blocks lack their scales, or sizes do not fit.
    """
    names: set[str] = set()
    pieces: list[CheckpointTensor] = []
    for name, tensor in by_name.items():
        match = _NAME.fullmatch(name)
        # Of other models, no expert has a bias, and outputs lie one after the other.
        if match is None or f"{match['path']}.{match['projection']}_bias" not in by_name:
            continue
        names.add(name)
        if match["kind"] != "_scales":
            pieces += _of_each(tensor, match, by_name)
    return names, pieces


def _of_each(
    tensor: CheckpointTensor, match: re.Match[str], by_name: Mapping[str, CheckpointTensor]
) -> Iterator[CheckpointTensor]:
    path, kind, parts = match["path"], match["kind"], _PARTS[match["projection"]]
    dims = {"_blocks": 4, "_bias": 2}.get(kind, 3)
    if len(tensor.shape) != dims:
        raise ModelError(
            f"{tensor.name} has shape {list(tensor.shape)}, and {dims} dimensions are read; download it again."
        )
    scales = by_name.get(tensor.name.removesuffix("_blocks") + "_scales")
    if kind == "_blocks" and (
        scales is None or scales.shape != tensor.shape[:3] or tensor.shape[3] != mxfp4.BLOCK // 2
    ):
        raise ModelError(
            f"{tensor.name} has shape {list(tensor.shape)}, and its scales {scales and list(scales.shape)}: blocks of "
            f"{mxfp4.BLOCK} inputs are read, with a scale each; download the checkpoint again."
        )
    for expert in range(tensor.shape[0]):
        for index, part in enumerate(parts):
            name, place = f"{path}.{expert}.{part}", (expert, index, len(parts))
            if kind == "_bias":
                yield _Bias(f"{name}.bias", tensor, *place)
            elif kind == "_blocks":
                assert scales is not None
                yield _Blocks(f"{name}.weight", tensor, scales, *place)
            else:
                yield _Transposed(f"{name}.weight", tensor, *place)


class _OfExpert(CheckpointTensor):
    """Every so-manieth output of one expert."""

    def __init__(self, name: str, stored: CheckpointTensor, outputs: int, expert: int, first: int, step: int) -> None:
        """Args:
        name: in native models.
        stored: of all experts.
        outputs: of each expert there.
        expert, first, step: which are this tensor's.
        """
        if outputs % step:
            raise ModelError(
                f"{stored.name} has shape {list(stored.shape)}: of each expert, {outputs} outputs are not {step} parts of equal "
                "length; config and weights are not of one model."
            )
        self.name, self._stored, self._expert, self._first, self._step = name, stored, expert, first, step
        self._outputs = outputs

    def load(self, dtype: torch.dtype, device: torch.device, part: Part | None = None) -> Tensor:
        """See `CheckpointTensor.load`."""
        part = part or Part.whole(self.shape)
        if len(part.rows) > 1:
            return take(self.load(dtype, device), part)
        return self._values(part.rows[0], part.columns, dtype, device).to(dtype)

    @abstractmethod
    def _values(self, rows: Cut, columns: Cut | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A part of the tensor, in `dtype` or in what holds it exactly."""

    def _part(self, columns: Cut) -> Part:
        """Of the stored tensor, whose second dimension is cut."""
        return Part((Cut(self._stored.shape[0], self._expert, 1),), columns)

    def _span(self, rows: Cut) -> Cut:
        """Of the outputs there, those among which some of this tensor's are."""
        return Cut(self._outputs, rows.begin * self._step, rows.length * self._step)


class _Bias(_OfExpert):
    def __init__(self, name: str, stored: CheckpointTensor, expert: int, first: int, step: int) -> None:
        super().__init__(name, stored, stored.shape[1], expert, first, step)
        self.shape = (stored.shape[1] // step,)

    def _values(self, rows: Cut, columns: Cut | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._stored.load(dtype, device, self._part(self._span(rows)))[0, self._first :: self._step]


class _Transposed(_OfExpert):
    """Of [N, I, O]."""

    def __init__(self, name: str, stored: CheckpointTensor, expert: int, first: int, step: int) -> None:
        _, inputs, outputs = stored.shape
        super().__init__(name, stored, outputs, expert, first, step)
        self.shape = outputs // step, inputs

    def _values(self, rows: Cut, columns: Cut | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert columns is not None
        values_IO, span = self._stored.load(dtype, device, self._part(columns))[0], self._span(rows)
        return values_IO[:, span.begin : span.begin + span.length][:, self._first :: self._step].mT


class _Blocks(_OfExpert):
    """Of codes [N, O, B, 16] and scales [N, O, B]. Ranks make numbers of no other blocks than those that their inputs are in."""

    quantization = mxfp4.NAME

    def __init__(
        self, name: str, codes: CheckpointTensor, scales: CheckpointTensor, expert: int, first: int, step: int
    ) -> None:
        _, outputs, blocks, _ = codes.shape
        super().__init__(name, codes, outputs, expert, first, step)
        self.shape = outputs // step, blocks * mxfp4.BLOCK
        self._scales = scales
        self.nbytes = math.prod(self.shape) * 17 // 32

    def _values(self, rows: Cut, columns: Cut | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        assert columns is not None
        wide = columns.widened(mxfp4.BLOCK)
        blocks = slice(wide.begin // mxfp4.BLOCK, (wide.begin + wide.length) // mxfp4.BLOCK)
        codes_OB16, scale_OB = (
            self._bytes(stored, rows)[:, blocks].to(device) for stored in (self._stored, self._scales)
        )
        begin = columns.begin - wide.begin
        return mxfp4.dequantize(codes_OB16, scale_OB, dtype)[:, begin : begin + columns.length]

    def _bytes(self, stored: CheckpointTensor, rows: Cut) -> Tensor:
        values = stored.stored(self._part(self._span(rows)))
        if values.dtype != torch.uint8:
            raise ModelError(f"{stored.name} holds {values.dtype}, and MXFP4 is bytes; download the checkpoint again.")
        return values[0, self._first :: self._step]

"""A layer that is one matrix, or a rank's part of one, in whatever format.

Shapes: T tokens, I inputs, O outputs, of what the rank keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stepgraph.layers.formats import End, Target, WeightFormat, Weights
from stepgraph.layers.formats.target import Skipped, sharded
from stepgraph.layers.norm import RMSNorm
from stepgraph.parallel.shard import Axis, Cut, Part


class Matrix(nn.Module):
    """A weight [O, I] in a format, and a bias [O] if it has one. Uninitialised until a loader fills `targets`."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    needs_numbers: bool = False
    """Whether operators read the weight itself, so that it is kept as numbers whatever the checkpoint keeps it in."""

    def __init__(
        self,
        inputs: Cut,
        outputs: Sequence[Cut],
        *,
        axis: Axis | None,
        bias: bool,
        format: WeightFormat,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        inputs: which inputs the rank keeps.
        outputs: which outputs, of each of the matrices that are stacked in this one.
        axis: along which ranks share it; None: each has all of it.
        bias: whether it has one. If the ranks' products are summed, only the first of them has.
        format: of the weight.
        dtype: of the activations.
        device: of the parameters.
        """
        super().__init__()
        self.axis, self.inputs, self.outputs = axis, inputs, tuple(outputs)
        self.in_features, self.out_features = inputs.length, sum(cut.length for cut in outputs)
        self.dtype = dtype
        self.use(format, device)
        has_bias = bias and (axis is not Axis.IN or inputs.begin == 0)
        self.bias = (
            nn.Parameter(torch.empty(self.out_features, dtype=dtype, device=device), False) if has_bias else None
        )
        self.bias_is_elsewhere = bias and not has_bias

    def use(self, format: WeightFormat, device: torch.device | None = None) -> None:
        """Keep the weight in another format.

        Args:
            format: in place of the one it has. Parameters that both keep alike stay, filled or not; the others are new ones,
                uninitialised.
            device: of new ones; None: that of the old.
        """
        device = self.weight.device if device is None else device
        specs = format.parameters(self.out_features, self.in_features, self.dtype)
        for name in self._parameters.keys() - specs.keys() - {"bias"}:
            delattr(self, name)
        for name, spec in specs.items():
            old = self._parameters.get(name)
            if old is None or (tuple(old.shape), old.dtype) != spec:
                setattr(self, name, nn.Parameter(torch.empty(spec.shape, dtype=spec.dtype, device=device), False))
        self.format = format

    @property
    def parameters_by_name(self) -> Weights:
        """Those of the format, and the bias, if there is one."""
        return self._parameters  # type: ignore[return-value]  # a bias that is None is not among them

    def targets(self) -> dict[str, Target]:
        """What a loader fills, by the names of a checkpoint's tensors after the layer's."""
        return self.targets_of(self.parameters_by_name, self.outputs)

    def targets_of(self, weights: Weights, outputs: Sequence[Cut]) -> dict[str, Target]:
        """What a loader fills of some outputs.

        Args:
            weights: views of the parameters.
            outputs: which of the checkpoint's they hold.
        """
        targets, part = self.format.targets(weights, self.in_features), Part(tuple(outputs), self.inputs)
        if not part.is_whole:
            parts = {name: part if len(target.shape) == 2 else part.along_rows() for name, target in targets.items()}
            targets = {name: sharded(target, parts[name]) for name, target in targets.items()}
        if self.bias_is_elsewhere:
            targets["bias"] = Skipped(torch.Size(part.along_rows().shape), self.dtype, self.weight.device)
        return targets

    def values(self) -> Tensor:
        """The weight as numbers, [O, I]: the parameter itself, or a new tensor of what it stands for."""
        return self.format.values(self.parameters_by_name, self.in_features)

    def product(
        self,
        x_TI: Tensor,
        *,
        norm: RMSNorm | None = None,
        end: End = End.STORE,
        out: Tensor | None = None,
        multiplier: float = 1.0,
    ) -> Tensor:
        """`x @ weight.T + bias`, with what comes before and after. May run inside a graph.

        Args:
            x_TI: [T, I]; with a norm, rows may lie apart.
            norm: of `x_TI`, if the product is that of the normalised inputs.
            end: what becomes of the product.
            out: [T, O], dtype of `x_TI`, contiguous. With `End.ADD`, what is added to; with `End.STORE`, of a layer without bias,
                where to write, or None; else None.
            multiplier: of what is added.

        Returns:
            `out`, or a new tensor: [T, O], with an activation [T, O / 2], dtype of `x_TI`.
        """
        return self.format.product(self.parameters_by_name, x_TI, norm=norm, end=end, out=out, multiplier=multiplier)

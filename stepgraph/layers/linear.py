"""Matrix products with weights in the checkpoint's [out, in] layout.

Shapes: T tokens, I inputs, O outputs, of what the rank keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from stepgraph.layers.formats import Plain, Target, WeightFormat
from stepgraph.layers.matrix import Matrix
from stepgraph.parallel.shard import WHOLE, Axis, Cut, Shard

_PLAIN = Plain()


class Linear(Matrix):
    """`x @ weight.T + bias`. May run inside a graph."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        axis: Axis | None = None,
        shard: Shard = WHOLE,
        format: WeightFormat = _PLAIN,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        in_features, out_features: of the whole.
        axis: along which ranks share it; None: each has all of it.
        shard: the part of this rank.
        bias, format, dtype, device: as of `Matrix`.
        """
        inputs = shard.cut(in_features) if axis is Axis.IN else Cut.whole(in_features)
        outputs = shard.span(out_features) if axis is Axis.OUT else Cut.whole(out_features)
        super().__init__(inputs, [outputs], axis=axis, bias=bias, format=format, dtype=dtype, device=device)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Outputs of each projection that the rank keeps."""
        return (self.out_features,)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Return [T, O], dtype of `x_TI`."""
        return self.product(x_TI)


class MergedLinear(Linear):
    """Projections of one input, kept by checkpoints as several matrices and computed here as one product. Ranks share them along
    their outputs."""

    by_heads: frozenset[str] = frozenset()

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, Sequence[Cut]],
        *,
        by_heads: Collection[str] = (),
        bias: bool = False,
        format: WeightFormat = _PLAIN,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        in_features: I.
        parts: which outputs of each projection the rank keeps, of each of the matrices that are stacked in it; by its checkpoint
            name, in the order in which they are stacked here.
        by_heads: projections that checkpoints stack head by head: of each matrix the first head's rows, then the second's, …
            What the rank keeps of them are the same heads of all matrices, and is to be filled in that order of its rows.
        bias: whether every projection has one.
        format, dtype, device: as of `Matrix`.
        """
        Matrix.__init__(
            self,
            Cut.whole(in_features),
            [cut for cuts in parts.values() for cut in cuts],
            axis=Axis.OUT,
            bias=bias,
            format=format,
            dtype=dtype,
            device=device,
        )
        self.parts = {name: tuple(cuts) for name, cuts in parts.items()}
        self.by_heads = frozenset(by_heads)

    @property
    def lengths(self) -> tuple[int, ...]:
        """See `Linear.lengths`."""
        return tuple(sum(cut.length for cut in cuts) for cuts in self.parts.values())

    def part_targets(self) -> dict[str, Target]:
        """What a loader fills, by the names of the projections' tensors (``"q_proj.weight"``, ``"q_proj.bias"``, …)."""
        views = {name: parameter.split(self.lengths) for name, parameter in self.parameters_by_name.items()}
        return {
            f"{part}.{name}": target
            for index, (part, cuts) in enumerate(self.parts.items())
            for name, target in self.targets_of(
                {name: view[index] for name, view in views.items()},
                [Cut.of_heads(cuts)] if part in self.by_heads else cuts,
            ).items()
        }

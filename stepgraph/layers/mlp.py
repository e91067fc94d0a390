"""Feed-forward layer, gated or of squared ReLU. Shapes: T tokens, E hidden size, M intermediate size."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from stepgraph.layers.formats import End
from stepgraph.layers.inputs import StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.residual import ResidualStream
from stepgraph.ops import geglu, swiglu
from stepgraph.parallel.shard import Axis, Shard

Activation = Literal["silu", "gelu_tanh", "relu2"]
"""Of gates; layers of "relu2" have none."""
ENDS: dict[Activation, End] = {"silu": End.SWIGLU, "gelu_tanh": End.GEGLU, "relu2": End.RELU2}
"""What becomes of the product with the first matrix."""


def first_parts(activation: Activation) -> tuple[str, ...]:
    """The projections that the first matrix is made of, by their checkpoint names."""
    return ("up_proj",) if activation == "relu2" else ("gate_proj", "up_proj")


class MLP(nn.Module):
    """`down(activation(gate(x)) · up(x))`, or `down(max(up(x), 0)²)`. May run inside a graph.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        gate_multiplier: float = 1.0,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size, intermediate_size: E and M, of the whole.
        activation: of the gate, or of a layer without one.
        bias: of all projections.
        gate_multiplier: of what the activation takes.
        shard: the part of this rank: some of the M.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.gate_up_proj = MergedLinear(
            hidden_size,
            dict.fromkeys(first_parts(activation), (shard.cut(intermediate_size),)),
            bias=bias,
            dtype=dtype,
            device=device,
        )
        self.down_proj = Linear(
            intermediate_size, hidden_size, bias=bias, axis=Axis.IN, shard=shard, dtype=dtype, device=device
        )
        self._gate_multiplier, self._width = gate_multiplier, shard.cut(intermediate_size).length
        self._end = ENDS[activation]

    def add_to(
        self,
        stream: ResidualStream,
        norm: RMSNorm | None,
        inputs: StepInputs,
        *,
        multiplier: float,
        post_norm: RMSNorm | None,
        next_norm: RMSNorm | None,
        scale_1: Tensor | None = None,
    ) -> None:
        """Add the layer's product to the residual stream.

        Args:
            stream: [T, E], updated.
            norm: of the stream, before the layer; None: the layer takes it as it is.
            inputs: of the step.
            multiplier, post_norm, next_norm, scale_1: as of `ResidualStream.add`.
        """
        hidden_TM = self.hidden(*stream.inputs(norm))
        stream.add(
            self.down_proj,
            hidden_TM,
            multiplier=multiplier,
            post_norm=post_norm,
            next_norm=next_norm,
            scale_1=scale_1,
        )

    def hidden(self, norm: RMSNorm | None, x_TE: Tensor) -> Tensor:
        """Return what `down_proj` takes, `activation(gate(norm(x))) · up(norm(x))` or `max(up(norm(x)), 0)²`: [T, M], dtype of
        `x_TE`. Without a norm, `x_TE` is normalised."""
        if self._gate_multiplier == 1.0:
            return self.gate_up_proj.product(x_TE, norm=norm, end=self._end)
        both_TM = self.gate_up_proj.product(x_TE, norm=norm)
        both_TM[:, : self._width] *= self._gate_multiplier
        return (geglu if self._end is End.GEGLU else swiglu)(both_TM)

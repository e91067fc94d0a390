"""A layer of gated short convolutions in place of attention: its state is the last few inputs of the convolution.

Shapes: T tokens, U tokens to run (`stepgraph.layers.recurrent`), E hidden size, C channels of what the rank keeps: in all
as many, W width of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import Item
from stepgraph.layers.formats import Target
from stepgraph.layers.formats.target import sharded
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.recurrent import RecurrentCache, RecurrentRows, RecurrentSpec
from stepgraph.ops import causal_conv
from stepgraph.parallel.shard import WHOLE, Axis, Cut, Part, Shard


class Convolution(nn.Module):
    """The weight of a convolution of each channel, as checkpoints keep it: [channels, 1, W]; and a bias, if it has one."""

    bias: nn.Parameter | None

    def __init__(
        self, channels: Sequence[Cut], width: int, *, bias: bool = False, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Args:
        channels: which the rank keeps, of each of the groups of them that are stacked in it.
        width: of the convolution.
        bias: whether each channel has one.
        dtype, device: of the parameters.
        """
        super().__init__()
        self.part = Part(tuple(channels), None)
        (num_channels,) = self.part.kept_shape
        self.weight = nn.Parameter(torch.empty(num_channels, 1, width, dtype=dtype, device=device), False)
        self.bias = nn.Parameter(torch.empty(num_channels, dtype=dtype, device=device), False) if bias else None

    def targets(self) -> dict[str, Target]:
        """What a loader fills, by the names of a checkpoint's tensors after the layer's."""
        return {name: sharded(parameter, self.part) for name, parameter in self.named_parameters()}

    def forward(self, x_UC: Tensor, state: Tensor, rows: RecurrentRows, *, silu: bool) -> Tensor:
        """See `stepgraph.ops.causal_conv`."""
        return causal_conv(x_UC, self.weight.squeeze(1), self.bias, state, *rows.operands, silu=silu)


@dataclass(frozen=True)
class ConvSizes:
    """Of a layer."""

    width: int  # W
    bias: bool  # of the convolution and both projections


class ShortConv(nn.Module):
    """Normalise, project, gate, convolve and gate again; `out_proj` is the caller's to apply. May run inside a graph.

    Source: Liquid AI, "LFM2 Technical Report" (2025).
    """

    def __init__(
        self,
        hidden_size: int,
        sizes: ConvSizes,
        *,
        shard: Shard = WHOLE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size: E.
        sizes: of the layer.
        shard: the part of this rank: some of the channels.
        dtype, device: of the parameters.
        """
        super().__init__()
        channels = shard.cut(hidden_size)
        self.sizes, self.num_channels = sizes, channels.length
        self.in_proj = MergedLinear(
            hidden_size, {"in_proj": [channels] * 3}, bias=sizes.bias, dtype=dtype, device=device
        )
        self.conv = Convolution([channels], sizes.width, bias=sizes.bias, dtype=dtype, device=device)
        self.out_proj = Linear(
            hidden_size, hidden_size, bias=sizes.bias, axis=Axis.IN, shard=shard, dtype=dtype, device=device
        )

    def cache_spec(self, dtype: torch.dtype) -> RecurrentSpec:
        """What the layer keeps of requests whose activations are of `dtype`: the last inputs of the convolution; of a token, its
        input."""
        return RecurrentSpec(
            state=(Item((self.sizes.width - 1, self.num_channels), dtype),), inputs=(Item((self.num_channels,), dtype),)
        )

    def forward(self, norm: RMSNorm | None, x_TE: Tensor, cache: RecurrentCache, rows: RecurrentRows) -> Tensor:
        """Run the step's tokens, writing the states after them.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            cache: this layer's.
            rows: of the step.

        Returns:
            [T, C], dtype of `x_TE`. What is left is `out_proj`.
        """
        in_gate_TC, out_gate_TC, values_TC = self.in_proj.product(x_TE, norm=norm).chunk(3, dim=1)
        (gated_UC,) = cache.replayed(rows, (in_gate_TC * values_TC,))
        (state,) = cache.state
        return out_gate_TC * rows.own(self.conv(gated_UC, state, rows, silu=False))

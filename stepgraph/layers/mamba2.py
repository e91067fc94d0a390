"""A layer of Mamba-2: a state-space model with a state per request in place of keys and values.

Shapes: T tokens, U tokens to run (`stepgraph.layers.recurrent`), E hidden size, H heads, D their size, F = H·D, G groups of
heads, N size of a group's B and C, C = F + 2·G·N channels of the convolution, W its width; all of what the rank keeps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import Item
from stepgraph.layers.formats import Target
from stepgraph.layers.formats.target import sharded
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.recurrent import RecurrentCache, RecurrentRows, RecurrentSpec
from stepgraph.layers.short_conv import Convolution
from stepgraph.ops import gated_norm, mamba2
from stepgraph.parallel.shard import WHOLE, Axis, Cut, Part, Shard


@dataclass(frozen=True)
class MambaSizes:
    """Sizes and options of a layer."""

    num_heads: int  # H
    head_dim: int  # D
    num_groups: int  # G
    state_size: int  # N
    conv_width: int  # W
    conv_bias: bool
    bias: bool  # of both projections
    steps: tuple[float, float] = (0.0, math.inf)
    """The least and the most step size."""
    has_norm: bool = True
    """Whether what is read is normalised, by groups, with a weight of each channel; else it is only gated."""
    gate_first: bool = True
    """Whether it is gated before it is normalised, else after."""
    multipliers: tuple[float, float, float, float, float] = (1.0,) * 5
    """Of what `in_proj` gives: gates, x, B, C and step sizes."""

    @property
    def width(self) -> int:
        """F."""
        return self.num_heads * self.head_dim

    @property
    def channels(self) -> int:
        """C."""
        return self.width + 2 * self.num_groups * self.state_size

    def sharded(self, shard: Shard) -> MambaSizes:
        """Of the groups that a rank keeps."""
        heads, groups = shard.cut(self.num_heads), shard.cut(self.num_groups)
        return replace(self, num_heads=heads.length, num_groups=groups.length)

    @property
    def projected(self) -> tuple[int, int, int, int, int]:
        """Outputs of `in_proj` of each kind, in the order of `multipliers`."""
        of_groups = self.num_groups * self.state_size
        return self.width, self.width, of_groups, of_groups, self.num_heads


class ChannelNorm(RMSNorm):
    """The weight of a norm of channels of which ranks keep some."""

    def __init__(self, channels: Cut, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        """Args:
        channels: which the rank keeps.
        eps, dtype, device: as of `RMSNorm`.
        """
        super().__init__(channels.length, eps, dtype=dtype, device=device)
        self.part = Part((channels,), None)

    def targets(self) -> dict[str, Target]:
        """What a loader fills, by the names of a checkpoint's tensors after the layer's."""
        return {"weight": sharded(self.weight, self.part)}


class Mamba2(nn.Module):
    """Normalise, project, convolve, scan, gate and normalise; `out_proj` is the caller's to apply. May run inside a graph.

    Source: Dao and Gu, "Transformers are SSMs" (2024).
    """

    norm: ChannelNorm | None
    multipliers: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        sizes: MambaSizes,
        *,
        eps: float,
        shard: Shard = WHOLE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size: E.
        sizes: of the whole layer.
        eps: of the norm behind the scan.
        shard: the part of this rank: some of the groups, and their heads.
        dtype, device: of the parameters; those that decide the decay, and what passes the scan by, are float32.
        """
        super().__init__()
        self.sizes, self.eps = sizes.sharded(shard), eps
        heads, of_groups = shard.cut(sizes.num_heads), shard.cut(sizes.num_groups).times(sizes.state_size)
        channels = heads.times(sizes.head_dim)
        projected = [channels, channels, of_groups, of_groups, heads]
        self.in_proj = MergedLinear(hidden_size, {"in_proj": projected}, bias=sizes.bias, dtype=dtype, device=device)
        self.conv1d = Convolution(projected[1:4], sizes.conv_width, bias=sizes.conv_bias, dtype=dtype, device=device)
        self.heads = Part((heads,), None)
        self.A_log, self.dt_bias, self.D = (
            nn.Parameter(torch.empty(heads.length, dtype=torch.float32, device=device), False) for _ in range(3)
        )
        self.norm = ChannelNorm(channels, eps, dtype=dtype, device=device) if sizes.has_norm else None
        self.out_proj = Linear(
            sizes.width, hidden_size, bias=sizes.bias, axis=Axis.IN, shard=shard, dtype=dtype, device=device
        )
        # It has values from the start, which a model on the meta device keeps in host memory.
        device = torch.device("cpu") if device.type == "meta" else device
        kinds = (
            torch.full((size,), number) for size, number in zip(self.sizes.projected, sizes.multipliers, strict=True)
        )
        multipliers = None if set(sizes.multipliers) == {1.0} else torch.cat([*kinds]).to(dtype).to(device)
        self.register_buffer("multipliers", multipliers, persistent=False)

    def targets(self) -> dict[str, Target]:
        """What a loader fills of the layer's own parameters, by the names of a checkpoint's tensors after the layer's."""
        return {name: sharded(parameter, self.heads) for name, parameter in self.named_parameters(recurse=False)}

    def cache_spec(self, dtype: torch.dtype) -> RecurrentSpec:
        """What the layer keeps of requests whose activations are of `dtype`: the last inputs of the convolution and the scan's
        state; of a token, what both take."""
        sizes = self.sizes
        return RecurrentSpec(
            state=(
                Item((sizes.conv_width - 1, sizes.channels), dtype),
                Item((sizes.num_heads, sizes.state_size, sizes.head_dim), torch.float32),
            ),
            inputs=(Item((sizes.channels,), dtype), Item((sizes.num_heads,), dtype)),
        )

    def forward(self, norm: RMSNorm | None, x_TE: Tensor, cache: RecurrentCache, rows: RecurrentRows) -> Tensor:
        """Run the step's tokens, writing the states after them.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            cache: this layer's.
            rows: of the step.

        Returns:
            [T, F], dtype of `x_TE`. What is left is `out_proj`.
        """
        sizes = self.sizes
        projected_TP = self.in_proj.product(x_TE, norm=norm)
        if self.multipliers is not None:
            projected_TP = projected_TP * self.multipliers
        gate_TF, xbc_TC, dt_TH = projected_TP.split((sizes.width, sizes.channels, sizes.num_heads), dim=1)
        xbc_UC, dt_UH = cache.replayed(rows, (xbc_TC, dt_TH))
        conv_state, state = cache.state
        xbc_UC = self.conv1d(xbc_UC, conv_state, rows, silu=True)
        of_heads = self.A_log, self.dt_bias, self.D
        deterministic = self.in_proj.format.deterministic
        read_UF = mamba2(
            xbc_UC, dt_UH, *of_heads, state, *rows.operands, steps=sizes.steps, deterministic=deterministic
        )
        weight = None if self.norm is None else self.norm.weight
        group = sizes.width // sizes.num_groups
        return gated_norm(rows.own(read_UF), gate_TF, weight, self.eps, size=group, gate_first=sizes.gate_first)

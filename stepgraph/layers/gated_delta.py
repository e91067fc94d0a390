"""A layer of gated delta rules (Gated DeltaNet): linear attention with a state per request in place of keys and values.

Shapes: T tokens, U tokens to run (`stepgraph.layers.recurrent`), E hidden size; of what the rank keeps, G heads of queries and
keys, N their size, H heads of values, D their size, C = 2·G·N + H·D channels of the convolution, W its width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import Item
from stepgraph.layers.formats import Target
from stepgraph.layers.formats.target import sharded
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.recurrent import RecurrentCache, RecurrentRows, RecurrentSpec
from stepgraph.layers.short_conv import Convolution
from stepgraph.ops import gated_delta, gated_norm
from stepgraph.parallel.shard import WHOLE, Axis, Part, Shard


class DeltaLayout(Enum):
    """How checkpoints keep projections."""

    BY_HEADS = "by heads"
    """Queries, keys, values and output gates are one matrix, and rates and decays another, by heads of keys: of each its query,
    its key, and of all heads of values that go with it the values, then the gates."""
    STACKED = "stacked"
    """Queries, keys and values are one matrix; gates, rates and decays have one each."""
    APART = "apart"
    """Each has a matrix of its own."""


@dataclass(frozen=True)
class DeltaSizes:
    """Sizes of a layer, and what else is of it alone."""

    num_key_heads: int  # G
    num_value_heads: int  # H
    key_dim: int  # N
    value_dim: int  # D
    conv_width: int  # W
    layout: DeltaLayout
    eps: float  # of the norm of heads
    max_rate: float = 1.0  # see `stepgraph.ops.gated_delta`

    @property
    def channels(self) -> int:
        """C."""
        return 2 * self.num_key_heads * self.key_dim + self.width

    @property
    def width(self) -> int:
        """H·D."""
        return self.num_value_heads * self.value_dim

    def sharded(self, shard: Shard) -> DeltaSizes:
        """Those of a rank's part: heads of keys, and the heads of values that go with them."""
        heads = shard.cut(self.num_key_heads).length, shard.cut(self.num_value_heads).length
        return replace(self, num_key_heads=heads[0], num_value_heads=heads[1])

    def grouped_rows(self, *per_key_head: int) -> Tensor:
        """Where rows lie in a checkpoint's matrix that is merged by heads of keys, in the order of parts.

        Args:
            per_key_head: rows of each part that go with a head of keys.
        """
        group = sum(per_key_head)
        first_G1 = torch.arange(self.num_key_heads).unsqueeze(1) * group
        rows = torch.arange(group).split(list(per_key_head))
        return torch.cat([(first_G1 + part).flatten() for part in rows])

    @property
    def qkvz_rows(self) -> Tensor:
        """Of the matrix of queries, keys, values and gates."""
        values = self.width // self.num_key_heads
        return self.grouped_rows(self.key_dim, self.key_dim, values, values)

    @property
    def ba_rows(self) -> Tensor:
        """Of the matrix of rates and decays."""
        return self.grouped_rows(*[self.num_value_heads // self.num_key_heads] * 2)


class GatedDelta(nn.Module):
    """Normalise, project, convolve, run the rule, normalise heads and gate them; `out_proj` is the caller's to apply. May run
    inside a graph.

    Source: Yang et al., "Gated Delta Networks" (2024).
    """

    def __init__(
        self,
        hidden_size: int,
        sizes: DeltaSizes,
        *,
        shard: Shard = WHOLE,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size: E.
        sizes: of the whole layer.
        shard: the part of this rank: some of the heads of keys, and the heads of values that go with them.
        dtype, device: of the parameters; those that decide the decay are float32.
        """
        super().__init__()
        self.sizes = sizes.sharded(shard)
        heads = shard.cut(sizes.num_value_heads)
        keys, values = shard.cut(sizes.num_key_heads).times(sizes.key_dim), heads.times(sizes.value_dim)
        qkv = [keys, keys, values]
        qkvz_parts = {"in_proj_qkv": qkv, "in_proj_z": [values]}
        ba_parts = {"in_proj_b": [heads], "in_proj_a": [heads]}
        if sizes.layout is DeltaLayout.BY_HEADS:
            qkvz_parts, ba_parts = {"in_proj_qkvz": [*qkv, values]}, {"in_proj_ba": [heads, heads]}
        elif sizes.layout is DeltaLayout.APART:
            qkvz_parts = {"q_proj": [keys], "k_proj": [keys], "v_proj": [values], "in_proj_z": [values]}
        by_heads = ("in_proj_qkvz", "in_proj_ba")
        self.qkvz_proj = MergedLinear(hidden_size, qkvz_parts, by_heads=by_heads, dtype=dtype, device=device)
        self.ba_proj = MergedLinear(hidden_size, ba_parts, by_heads=by_heads, dtype=dtype, device=device)
        self.conv1d = Convolution(qkv, sizes.conv_width, dtype=dtype, device=device)
        self.heads = Part((heads,), None)
        self.A_log = nn.Parameter(torch.empty(heads.length, dtype=torch.float32, device=device), False)
        self.dt_bias = nn.Parameter(torch.empty(heads.length, dtype=torch.float32, device=device), False)
        self.norm = RMSNorm(sizes.value_dim, sizes.eps, dtype=dtype, device=device)
        self.out_proj = Linear(sizes.width, hidden_size, axis=Axis.IN, shard=shard, dtype=dtype, device=device)

    def targets(self) -> dict[str, Target]:
        """What a loader fills of the layer's own parameters, by the names of a checkpoint's tensors after the layer's."""
        return {name: sharded(parameter, self.heads) for name, parameter in self.named_parameters(recurse=False)}

    def cache_spec(self, dtype: torch.dtype) -> RecurrentSpec:
        """What the layer keeps of requests whose activations are of `dtype`: the last inputs of the convolution and the rule's
        state; of a token, what both take."""
        sizes = self.sizes
        return RecurrentSpec(
            state=(
                Item((sizes.conv_width - 1, sizes.channels), dtype),
                Item((sizes.num_value_heads, sizes.key_dim, sizes.value_dim), torch.float32),
            ),
            inputs=(Item((sizes.channels,), dtype), Item((2 * sizes.num_value_heads,), dtype)),
        )

    def forward(self, norm: RMSNorm | None, x_TE: Tensor, cache: RecurrentCache, rows: RecurrentRows) -> Tensor:
        """Run the step's tokens, writing the states after them.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            cache: this layer's.
            rows: of the step.

        Returns:
            [T, H·D], dtype of `x_TE`. What is left is `out_proj`.
        """
        qkv_TC, z_TF = self.qkvz_proj.product(x_TE, norm=norm).tensor_split((self.sizes.channels,), dim=1)
        ba_TH = self.ba_proj.product(x_TE, norm=norm)
        qkv_UC, ba_UH = cache.replayed(rows, (qkv_TC, ba_TH))
        conv_state, state = cache.state
        qkv_UC = self.conv1d(qkv_UC, conv_state, rows, silu=True)
        deterministic = self.qkvz_proj.format.deterministic
        read_UF = gated_delta(
            qkv_UC,
            ba_UH,
            self.A_log,
            self.dt_bias,
            state,
            *rows.operands,
            max_rate=self.sizes.max_rate,
            deterministic=deterministic,
        )
        return gated_norm(rows.own(read_UF), z_TF, self.norm.weight, self.sizes.eps, size=self.sizes.value_dim)

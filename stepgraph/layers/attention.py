"""Grouped-query attention over the paged KV cache.

Shapes: T tokens, E hidden size, H query heads, G key/value heads, D head size, B tokens per KV block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import PagedCache, PagedSpec
from stepgraph.layers.formats import Target
from stepgraph.layers.formats.target import Sharded
from stepgraph.layers.inputs import AttentionSpec, StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops import rope_attention, rope_cache, sigmoid_gate
from stepgraph.parallel.shard import Axis, Cut, Part, Shard


@dataclass(frozen=True)
class QueryScaling:
    """Multiplies the queries at position p by 1 + beta · ln(1 + ⌊p / length⌋): by 1 within the first `length` positions."""

    beta: float
    length: int  # tokens

    def table(self, num_positions: int) -> Tensor:
        """[num_positions] float32 on the CPU."""
        positions = torch.arange(num_positions, dtype=torch.float32)
        return 1 + self.beta * torch.log(1 + torch.floor(positions / self.length))


@dataclass(frozen=True)
class KeysAndValues:
    """Where a layer's keys and values come from."""

    shares: int | None = None
    """An earlier layer whose keys and values these are; None: the layer has its own."""
    are_one: bool = False
    """Whether values are what the projection of keys gives, before a norm and rotation."""
    value_norm: bool = False
    """Whether each value head is normalised, without a weight."""

    @property
    def projections(self) -> tuple[str, ...]:
        """Those that the layer has, by their names in checkpoints."""
        return () if self.shares is not None else ("k_proj",) if self.are_one else ("k_proj", "v_proj")


OWN_KEYS_AND_VALUES = KeysAndValues()
"""A projection for each, and a norm of keys where queries have one."""


class Attention(nn.Module):
    """Normalise, project, rotate, cache, attend; `o_proj` is the caller's to apply. May run inside a graph.

    Source: Ainslie et al., "GQA" (2023); the optional RMS norm of every query and key head is Qwen3's.
    """

    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    sinks: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        spec: AttentionSpec,
        *,
        qkv_bias: bool,
        output_bias: bool,
        qk_norm: bool,
        joint_qk_norm: bool,
        norm_weight_offset: float,
        output_gate: bool,
        scale: float | None,
        eps: float,
        keys_and_values: KeysAndValues = OWN_KEYS_AND_VALUES,
        norms_round_once: bool = False,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size: E.
        spec: H, G, D, window, cap and sinks, of the whole; values are as wide as keys.
        qkv_bias, output_bias: of the projections.
        qk_norm: normalise every query and key head, or, with `joint_qk_norm`, all queries together, and all keys, which all ranks
            compute for that.
        output_gate: what attention gives is multiplied by sigmoids of a projection of the hidden state, one for each entry of
            each query head; checkpoints keep it in `q_proj`, behind each head's query.
        scale: multiplies q·k; None: D^-1/2.
        eps: of the RMS norms.
        keys_and_values: where they come from.
        norms_round_once: see `RMSNorm`.
        shard: the part of this rank: some of the heads.
        dtype, device: of the parameters.
        """
        super().__init__()
        head_dim, heads, kv_heads = spec.head_dim, shard.cut(spec.num_heads), shard.heads(spec.num_kv_heads)
        self.spec, self.eps, self.kv_heads, self.output_gate = spec.sharded(shard), eps, kv_heads, output_gate
        self.keys_and_values = keys_and_values
        queries, keys = heads.times(head_dim), kv_heads.times(head_dim)
        self.jointly_normed = (queries, keys) if joint_qk_norm else None
        if joint_qk_norm:
            assert keys_and_values == OWN_KEYS_AND_VALUES
            assert not output_gate
            queries, keys = Cut.whole(queries.size), Cut.whole(keys.size)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.qkv_proj = MergedLinear(
            hidden_size,
            {"q_proj": [queries] * (2 if output_gate else 1)}
            | {name: [keys if name == "k_proj" else kv_heads.times(head_dim)] for name in keys_and_values.projections},
            by_heads=["q_proj"],
            bias=qkv_bias,
            dtype=dtype,
            device=device,
        )
        self.o_proj = Linear(
            spec.num_heads * head_dim,
            hidden_size,
            bias=output_bias,
            axis=Axis.IN,
            shard=shard,
            dtype=dtype,
            device=device,
        )
        self._part_of_sinks = Part((heads,), None)
        self.sinks = (
            nn.Parameter(torch.empty(heads.length, dtype=torch.float32, device=device), False) if spec.sinks else None
        )
        norm = partial(
            RMSNorm,
            eps=eps,
            weight_offset=norm_weight_offset,
            rounds_once=norms_round_once,
            dtype=dtype,
            device=device,
        )
        self.q_norm = self.k_norm = None
        if joint_qk_norm:
            self.q_norm, self.k_norm = norm(queries.size), norm(keys.size)
        elif qk_norm:
            self.q_norm, self.k_norm = norm(head_dim), norm(head_dim) if keys_and_values.projections else None

    def cache_spec(self, dtype: torch.dtype) -> PagedSpec:
        """What the layer keeps in `dtype`."""
        return replace(PagedSpec.of(self.spec, dtype, self.kv_heads), shares=self.keys_and_values.shares)

    def targets(self) -> dict[str, Target]:
        """What a loader fills, beside what the modules below ask for."""
        if self.sinks is None:
            return {}
        return {"sinks": self.sinks if self._part_of_sinks.is_whole else Sharded(self.sinks, self._part_of_sinks)}

    def forward(
        self,
        norm: RMSNorm | None,
        x_TE: Tensor,
        cos_sin: Tensor,
        cache: PagedCache,
        inputs: StepInputs,
        query_scale_T: Tensor | None = None,
    ) -> Tensor:
        """Attend, writing this step's keys and values.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            cos_sin: [max positions, D] float32, see `stepgraph.layers.rotary`.
            cache: this layer's.
            inputs: of the step.
            query_scale_T: [T] float32, multiplies queries, in layers that do not normalise them; see `QueryScaling`.

        Returns:
            [T, H·D], dtype of `x_TE`. What is left is `o_proj`.
        """
        work, group = inputs.attention[self.spec], inputs.groups[cache.group]
        qkv_TF, gate_TF = self._projected(norm, x_TE)
        if query_scale_T is not None:
            assert self.q_norm is None
            qkv_TF[:, : self.spec.num_heads * self.spec.head_dim] *= query_scale_T.unsqueeze(1)
        attended_TF = rope_attention(
            qkv_TF,
            cos_sin,
            *self._head_norms,
            cache.keys,
            cache.values,
            group.block_table,
            group.tokens,
            work.plan,
            work.geometry,
            num_heads=self.spec.num_heads,
            eps=self.eps,
            scale=self.scale,
            window=self.spec.window,
            sinks=self.sinks,
            softcap=self.spec.softcap,
            value_norm=self.keys_and_values.value_norm,
        )
        return attended_TF if gate_TF is None else sigmoid_gate(attended_TF, gate_TF)

    def _projected(self, norm: RMSNorm | None, x_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        """Queries and what the layer projects of keys and values, [T, (H + 2G)·D] if both, and gates, [T, H·D], if there are
        any."""
        product_TF = self.qkv_proj.product(x_TE, norm=norm)
        if self.jointly_normed is not None:
            return self._normed_jointly(product_TF, *self.jointly_normed), None
        if not self.output_gate:
            return product_TF, None
        width = self.spec.num_heads * self.spec.head_dim
        q_TF, gate_TF, kv_TF = product_TF.tensor_split((width, 2 * width), dim=1)
        return torch.cat((q_TF, kv_TF), dim=1), gate_TF

    def _normed_jointly(self, product_TF: Tensor, queries: Cut, keys: Cut) -> Tensor:
        """Of the queries and keys of all ranks, normalised together, those of this one, and its values."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        q_TF, k_TF, v_TF = product_TF.tensor_split((queries.size, queries.size + keys.size), dim=1)
        q_TF = self.q_norm(q_TF).narrow(1, queries.begin, queries.length)
        return torch.cat((q_TF, self.k_norm(k_TF).narrow(1, keys.begin, keys.length), v_TF), dim=1)

    @property
    def _head_norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Weights of the norms of a head's query and of its key."""
        norms = (None, None) if self.jointly_normed is not None else (self.q_norm, self.k_norm)
        query, key = (None if norm is None else norm.weight for norm in norms)
        return query, key

    def cache_only(
        self, norm: RMSNorm | None, x_TE: Tensor, cos_sin: Tensor, cache: PagedCache, inputs: StepInputs
    ) -> None:
        """Write this step's keys and values; arguments as of `forward`."""
        tokens = inputs.groups[cache.group].tokens
        rope_cache(
            self._projected(norm, x_TE)[0],
            tokens.positions,
            tokens.kv_slots,
            cos_sin,
            *self._head_norms,
            cache.keys,
            cache.values,
            self.spec.num_heads,
            self.eps,
            value_norm=self.keys_and_values.value_norm,
        )

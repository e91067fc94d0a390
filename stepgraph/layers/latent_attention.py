"""Multi-head latent attention over a paged cache of latents.

Shapes: T tokens, E hidden size, H query heads of the rank, N and P dimensions of a head that are not and that are rotated, V of a
head's values, Q rank of the queries' latent, R of the keys' and values'.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import LatentCache, LatentSpec
from stepgraph.layers.inputs import AttentionSpec, StepInputs
from stepgraph.layers.linear import Linear, MergedLinear
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops import expanded_attention, head_linear, latent_queries, mla_attention, mla_context_attention
from stepgraph.parallel.shard import Axis, Cut, Shard


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of a layer's multi-head latent attention, and the factor of its scores."""

    q_rank: int  # of the queries' latent; 0: queries are projected from the hidden state
    kv_rank: int  # of the keys' and values' latent
    key_dim: int  # of a head, not rotated
    rotated_dim: int  # of a head's queries; of keys, shared by all heads
    value_dim: int  # of a head
    scale: float  # multiplies q·k

    @property
    def entry_size(self) -> int:
        """Numbers of a token in the cache."""
        return self.kv_rank + self.rotated_dim

    def spec(self, num_heads: int) -> AttentionSpec:
        """What lists the work: all heads share one key, the entry, and one value, the latent."""
        return AttentionSpec(num_heads, 1, self.entry_size, self.kv_rank, latent=True)


class LatentAttention(nn.Module):
    """Normalise, project, rotate, cache, attend; `o_proj` is the caller's to apply. May run inside a graph.

    Keys and values of a head are products of the latent with `kv_b_proj`, [H, N + V, R]. They are not made: queries are
    multiplied with the keys' part of it before attention, and what attention gives, with the values' part after. But in a step
    with a long prompt those of its own tokens are made, see `stepgraph.ops.expanded_attention`.

    Source: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        sizes: LatentSizes,
        *,
        bias: bool,
        eps: float,
        shard: Shard,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Args:
        hidden_size: E.
        num_heads: of the whole.
        sizes: of the layer.
        bias: of the projections from and to the hidden state; only of queries that have a latent.
        eps: of the latents' RMS norms.
        shard: the part of this rank: some of the heads. Latents are whole on all.
        dtype, device: of the parameters.
        """
        super().__init__()
        assert sizes.q_rank or not bias
        heads, self.sizes = shard.cut(num_heads), sizes
        self.spec = sizes.spec(num_heads).sharded(shard)
        merged = partial(MergedLinear, dtype=dtype, device=device)
        linear = partial(Linear, bias=bias, shard=shard, dtype=dtype, device=device)
        norm = partial(RMSNorm, eps=eps, dtype=dtype, device=device)
        queries, entry = heads.times(sizes.key_dim + sizes.rotated_dim), Cut.whole(sizes.entry_size)
        self.q_a_layernorm: RMSNorm | None = None
        first = {"q_a_proj": [Cut.whole(sizes.q_rank)]} if sizes.q_rank else {"q_proj": [queries]}
        self.qkv_proj = merged(hidden_size, {**first, "kv_a_proj_with_mqa": [entry]}, bias=bias)
        if sizes.q_rank:
            self.q_a_layernorm = norm(sizes.q_rank)
            self.q_proj = merged(sizes.q_rank, {"q_b_proj": [queries]})
        self.kv_a_layernorm = norm(sizes.kv_rank)
        self.kv_proj = merged(sizes.kv_rank, {"kv_b_proj": [heads.times(sizes.key_dim + sizes.value_dim)]})
        self.kv_proj.needs_numbers = True  # see `_head_weights`
        self.o_proj = linear(num_heads * sizes.value_dim, hidden_size, axis=Axis.IN)

    def cache_spec(self, dtype: torch.dtype) -> LatentSpec:
        """What the layer keeps in `dtype`."""
        return LatentSpec(self.sizes.entry_size, dtype)

    def forward(
        self, norm: RMSNorm | None, x_TE: Tensor, cos_sin: Tensor, cache: LatentCache, inputs: StepInputs
    ) -> Tensor:
        """Attend, writing this step's latents.

        Args:
            norm: of `x_TE`; None: it is normalised.
            x_TE: [T, E].
            cos_sin: [max positions, P] float32, see `stepgraph.layers.rotary`.
            cache: this layer's.
            inputs: of the step.

        Returns:
            [T, H·V], dtype of `x_TE`. What is left is `o_proj`.
        """
        (block_table, tokens, _), work = inputs.groups[cache.group], inputs.attention[self.spec]
        deterministic = work.geometry.deterministic
        q_TF, absorbed_THL = self._queries(norm, x_TE, cos_sin, cache, inputs, deterministic)
        if work.own is not None:
            return self._expanded(q_TF, absorbed_THL, cache, inputs)
        latent_THR = mla_attention(
            absorbed_THL,
            cache.entries,
            block_table,
            tokens.row_slot,
            tokens.query_start,
            tokens.kv_len,
            work.plan,
            work.geometry,
            value_dim=self.sizes.kv_rank,
            scale=self.sizes.scale,
        )
        return head_linear(latent_THR, self._value_weights, deterministic=deterministic)

    def cache_only(
        self, norm: RMSNorm | None, x_TE: Tensor, cos_sin: Tensor, cache: LatentCache, inputs: StepInputs
    ) -> None:
        """Write this step's latents; arguments as of `forward`."""
        self._queries(norm, x_TE, cos_sin, cache, inputs, inputs.attention[self.spec].geometry.deterministic)

    def _expanded(self, q_TF: Tensor, absorbed_THL: Tensor, cache: LatentCache, inputs: StepInputs) -> Tensor:
        """What `forward` returns, by keys and values of this step's tokens, and absorbed queries for older ones."""
        (block_table, tokens, _), sizes = inputs.groups[cache.group], self.sizes
        plan, geometry, own = inputs.attention[self.spec]
        assert own is not None
        assert geometry.own is not None
        latent_TR, key_TP = (
            _entries(part, tokens.kv_slots).to(q_TF.dtype)
            for part in cache.entries.flatten(0, 1).tensor_split((sizes.kv_rank,), dim=1)
        )
        latent_THR, lse_TH = mla_context_attention(
            absorbed_THL,
            cache.entries,
            block_table,
            tokens.row_slot,
            tokens.query_start,
            own.context_len,
            plan,
            geometry,
            value_dim=sizes.kv_rank,
            scale=sizes.scale,
        )
        return expanded_attention(
            q_TF,
            absorbed_THL,
            self.kv_proj.product(latent_TR),
            key_TP,
            head_linear(latent_THR, self._value_weights, deterministic=False),
            lse_TH,
            tokens.query_start,
            tokens.kv_len,
            own.plan,
            geometry.own,
            scale=sizes.scale,
        )

    @property
    def _value_weights(self) -> Tensor:
        """[H, V, R]."""
        return self._head_weights[:, self.sizes.key_dim :]

    @property
    def _head_weights(self) -> Tensor:
        """[H, N + V, R]: of each head, what makes keys of a latent, then what makes values."""
        return self.kv_proj.weight.unflatten(0, (self.spec.num_heads, -1))

    def _queries(
        self,
        norm: RMSNorm | None,
        x_TE: Tensor,
        cos_sin: Tensor,
        cache: LatentCache,
        inputs: StepInputs,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        """Queries, [T, H · (N + P)], and absorbed ones, [T, H, R + P]; writes the latents."""
        sizes, tokens = self.sizes, inputs.groups[cache.group].tokens
        q_TF, latent_TL = self.qkv_proj.product(x_TE, norm=norm).tensor_split((-sizes.entry_size,), dim=1)
        if self.q_a_layernorm is not None:
            q_TF = self.q_proj.product(q_TF, norm=self.q_a_layernorm)
        absorbed_THL = latent_queries(
            q_TF,
            latent_TL,
            tokens.positions,
            tokens.kv_slots,
            cos_sin,
            self.kv_a_layernorm.weight,
            self._head_weights[:, : sizes.key_dim],
            cache.entries,
            self.kv_a_layernorm.eps,
            deterministic=deterministic,
        )
        return q_TF, absorbed_THL


def _entries(cache: Tensor, kv_slots: Tensor) -> Tensor:
    """Those at some slots of a cache, [slots, …]. May run inside a graph."""
    if cache.dtype.itemsize == 1:  # for numbers of 8 bits, not every device's index_select is there
        return cache.view(torch.uint8).index_select(0, kv_slots).view(cache.dtype)
    return cache.index_select(0, kv_slots)

"""What a model sees of a step. Nothing else about the batch exists for it: no phase, no global context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from stepgraph import ops
from stepgraph.parallel.shard import Shard


@dataclass(frozen=True, order=True)
class AttentionSpec:
    """What a layer's attention needs to know to list its work. Layers with equal specs share one list."""

    num_heads: int  # query heads
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int
    window: int = 0  # last keys a token sees, its own included; 0: all
    softcap: float = 0.0  # scores s become softcap · tanh(s / softcap); 0: they stay
    sinks: bool = False  # each head has a score beside those of keys
    latent: bool = False  # values are the first part of keys, and cached with them: one entry for all heads

    @property
    def cached_numbers(self) -> int:
        """Of one token, in the cache."""
        return self.num_kv_heads * (self.head_dim if self.latent else self.head_dim + self.value_dim)

    @property
    def has_plain_scores(self) -> bool:
        """Whether the softmax is that of products of queries and keys, as they are."""
        return not (self.softcap or self.sinks)

    def sharded(self, shard: Shard) -> AttentionSpec:
        """Of the heads that a rank keeps."""
        heads, kv_heads = shard.cut(self.num_heads), shard.heads(self.num_kv_heads)
        return replace(self, num_heads=heads.length, num_kv_heads=kv_heads.length)


class OwnWork(NamedTuple):
    """The work of latent attention over this step's own keys, where that is apart."""

    plan: ops.AttentionPlan
    context_len: Tensor  # [R] int32, keys of each row from before this step


class AttentionWork(NamedTuple):
    """The work of one step for layers of one spec."""

    plan: ops.AttentionPlan  # over all keys; where there is `own`, over those from before this step
    geometry: ops.AttentionGeometry
    own: OwnWork | None = None

    @classmethod
    def of(cls, spec: AttentionSpec, tokens: ops.StepTokens, geometry: ops.AttentionGeometry) -> AttentionWork:
        """List it. Runs inside the graph."""
        kv_len, own = tokens.kv_len, None
        rows = tokens.row_slot, tokens.query_start
        if geometry.own is not None:
            context_len = kv_len - (tokens.query_start[1:] - tokens.query_start[:-1])
            heads = spec.num_heads, spec.num_heads, spec.value_dim
            own = OwnWork(ops.attention_plan(*rows, kv_len, *heads, geometry.own), context_len)
            kv_len = context_len
        heads = spec.num_heads, spec.num_kv_heads, spec.value_dim
        plan = ops.attention_plan(*rows, kv_len, *heads, geometry, spec.window)
        return cls(plan, geometry, own)


@dataclass(frozen=True)
class DispatchTable:
    """How the tokens of a step come to their experts, by the number of tokens of its shape; the same for all layers."""

    most_pairs_tokens: int = 0
    """Up to so many tokens by `ExpertDispatch.PAIRS`, more by `ExpertDispatch.TILES`."""

    def of(self, num_tokens: int) -> ops.ExpertDispatch:
        """That of steps, and of a drafter's part of a step, of so many tokens, padding included."""
        return ops.ExpertDispatch.PAIRS if num_tokens <= self.most_pairs_tokens else ops.ExpertDispatch.TILES


class LineRows(NamedTuple):
    """The lines of a step's rows, in caches that have lines. What a row writes, no other row reads or writes, but for the null
    line. What rows only read is as it was before the step."""

    read: Tensor  # [R] int32, contiguous, what earlier steps have left of the row's first tokens
    write: Tensor  # [R] int32, contiguous, where the step leaves that of all; mostly the same

    @classmethod
    def take(cls, table: Tensor, row_slot: Tensor) -> LineRows:
        """Those of a step, and move the slots on to those of their next one. Runs inside the graph, once.

        Args:
            table: [slots, 3] int32, of each slot what `slot_line` calls READ_LINE, WRITE_LINE and NEXT_LINE. Updated.
            row_slot: [R] int32.
        """
        lines_3R = table.index_select(0, row_slot).t().contiguous()
        table[:, :2].index_put_((row_slot,), lines_3R[1:].t())
        return cls(lines_3R[0], lines_3R[1])


class WriteSignals(NamedTuple):
    """Where a step says of each layer that its entries are in the cache; see `stepgraph.ops.kv_signal`."""

    counts: Tensor  # [1 + N] int64
    words: Tensor  # [N] int64, host memory

    def wrote(self, layer: int) -> None:
        """Entry `layer` of the N has written what it caches of this step. Runs inside the graph."""
        ops.kv_signal(*self, layer)


class GroupInputs(NamedTuple):
    """The step as the layers of one block group see it."""

    block_table: Tensor  # [slots, max blocks] int32
    tokens: ops.StepTokens  # the step's, with the group's `kv_slots`
    block_size: int  # tokens per block


@dataclass(frozen=True)
class StepInputs:
    """One step's tensors, built on the device inside the graph."""

    tokens: ops.StepTokens
    attention: Mapping[AttentionSpec, AttentionWork]
    groups: tuple[GroupInputs, ...]
    """By block groups, which caches name; those of `tokens` are the first's."""
    caches: tuple[Any, ...]  # one per layer, of the kind of its `CacheSpec`
    dispatch: DispatchTable = DispatchTable()  # of layers with experts
    signals: WriteSignals | None = None  # None: nobody watches
    lines: LineRows | None = None  # None: no layer has any

    def wrote(self, layer: int) -> None:
        """A model's layer has written what it caches of this step: whoever watches is told. Runs inside the graph."""
        if self.signals is not None:
            self.signals.wrote(layer)

"""What the step asks of whoever proposes tokens. Everything a drafter does runs inside the step's graph.

Shapes: T tokens, R rows, E hidden size, K proposals of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from stepgraph.layers.cache import CacheSpec
from stepgraph.layers.inputs import AttentionSpec, StepInputs


@dataclass(frozen=True)
class DraftStep:
    """A step that was just committed, as a drafter sees it."""

    inputs: StepInputs
    hidden: Tensor
    """[T, E], the model's hidden states after its final norm. Those after proposals that fell are of no use."""
    lines: Tensor  # [slots, LINE_WIDTH] int32, see `stepgraph.abi.slot_line`; `length` counts the new tokens
    tokens: Tensor  # [slots, max_model_len] int32
    caches: tuple[Any, ...]  # the drafter's own, one for each of its `cache_specs`
    num_drafts: int  # K


class Drafts(NamedTuple):
    """Proposals for each row of a step. Rows that cannot use them get some too; `stepgraph.ops.propose` sorts that out."""

    tokens: Tensor  # [R, K] int32, contiguous
    num_tokens: Tensor  # [R] int32, of these, the first so many are meant


class Drafter(Protocol):
    """Proposes what follows. Proposals are a guess at what the model will sample: they change its speed, never its answers."""

    lookahead: int
    """Tokens after a KV block that the block's content depends on."""
    costs_when_idle: bool
    """A step with room for proposals is slower also where there are none."""

    @property
    def carried(self) -> tuple[Tensor, ...]:
        """What it hands on from a request's step to the next beside its caches, each [slots, …], the null slot included. For
        checks."""

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """Of its layers that take the step's own list of work."""

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        """What each of its layers keeps of requests; keys and values in `dtype`."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Weights of its own."""

    def propose(self, step: DraftStep) -> Drafts:
        """Propose up to K ≥ 1 tokens for each row."""

    def forget(self) -> None:
        """Drop what earlier requests left behind. Not inside a graph."""

    def reload(self) -> None:
        """Take over new weights of the model, and read those of its own again, as they may be lost. Not inside a graph.

        Raises:
            ModelError: they cannot be read any more.
        """

    def follow(self, step: DraftStep) -> None:
        """Take note of a step after which nothing is to be proposed."""

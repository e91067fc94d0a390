"""State that a layer carries from token to token of a request: of a recurrence, or of a convolution over the last few tokens.

A slot has one state, not one per position, so a step that has run proposals cannot go back to before those that fall. Nor does
it copy states in advance: a line holds the state at a position up to which everything stands, and the inputs of the few tokens
since, which the next step runs again as far as they stand. K being the most proposals of a row, the line of a slot whose request
has c > 0 tokens computed holds between steps

- `start`: a position p with c - K ≤ p ≤ c;
- `state`: the state after the tokens at positions 0 … p - 1;
- `inputs`: at q mod K, what the recurrence takes from the token at position q, for p ≤ q < c. Those of proposals that fell may
  lie behind, where nothing reads them and the next step writes its own.

A step that runs n tokens of the slot from position c on runs the kept ones from p on again, then its own, and leaves `start` =
p' = max(c + 1, c + n - K), the state there and the inputs from there on. It ends with c' tokens computed: c < c' ≤ c + n, as a
row's first token always stands, and c' = c + n if n > 1 + K, as such a row has no proposals. So p' ≤ c' ≤ p' + K, whatever
stood. Without speculation K = 0: nothing is kept, and nothing is run twice.

A request's first step is the one with c = 0. The state before it is zero, whatever its line holds: that is all there is to a new
user of a slot, and to a request that starts anew after a preemption. Nothing is copied or cleared when a request is admitted. It
must start at 0, as blocks of others hold no state; see `CacheSpec.starts_from_blocks`.

All of it runs inside the graph. Rows that run no token, padding rows too, write to the null line.

Shapes: T tokens of the step, R rows, U = T + R·K tokens to run, of which those behind the last row are padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepgraph.layers.cache import CacheSpec, Item
from stepgraph.ops import StepTokens
from stepgraph.ops.rows import row_of


@dataclass(frozen=True)
class RecurrentSpec(CacheSpec):
    """A state per slot."""

    state: tuple[Item, ...]  # of a slot
    inputs: tuple[Item, ...]  # of a token, from which the state before it becomes that after it

    starts_from_blocks = False

    @property
    def reach(self) -> None:
        """See `CacheSpec.reach`."""

    def per_block(self, block_size: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_block`."""
        return ()

    def per_line(self, num_drafts: int) -> tuple[Item, ...]:
        """See `CacheSpec.per_line`."""
        kept = [Item((num_drafts, *item.shape), item.dtype) for item in self.inputs]
        return (Item((1,), torch.int32), *self.state, *(kept if num_drafts else ()))

    def cache(self, block_tensors: Sequence[Tensor], line_tensors: Sequence[Tensor]) -> RecurrentCache:
        """See `CacheSpec.cache`."""
        start, *rest = line_tensors
        return RecurrentCache(start, tuple(rest[: len(self.state)]), tuple(rest[len(self.state) :]))


class RecurrentRows(NamedTuple):
    """A step's rows as a recurrence runs them: of each row the kept tokens that stand, then its own."""

    state: tuple[Tensor, ...]  # [R, …] each, before a row's first token
    inputs: tuple[Tensor, ...]  # [U, …] each; zero for padding
    query_start: Tensor  # [R + 1] int32, where each row begins among the U, and the end of all
    num_stored: (
        Tensor  # [R] int32: after so many of its tokens, at least one, a row's state is to be stored; 0: it runs none
    )
    own: Tensor  # [T] int32, where the step's own tokens lie among the U


@dataclass(frozen=True)
class RecurrentCache:
    """Of a `RecurrentSpec`."""

    start: Tensor  # [slots, 1] int32
    state: tuple[Tensor, ...]  # [slots, …] each
    inputs: tuple[Tensor, ...]  # [slots, K, …] each; none if K = 0

    @property
    def num_kept(self) -> int:
        """K."""
        return self.inputs[0].shape[1] if self.inputs else 0

    def rows(self, tokens: StepTokens, inputs: Sequence[Tensor]) -> RecurrentRows:
        """What a step has to run. Runs inside the graph.

        Args:
            tokens: of the step.
            inputs: [T, …] each, of the step's tokens; those of padding may hold anything.
        """
        T, R, K = tokens.token_ids.shape[0], tokens.row_slot.shape[0], self.num_kept
        query_len_R = tokens.query_start.diff()
        first_R = tokens.kv_len - query_len_R
        is_later_R = (query_len_R > 0) & (first_R > 0)
        state = tuple(
            torch.where(_over(is_later_R, state), state.index_select(0, tokens.row_slot), 0) for state in self.state
        )
        start_R = torch.where(is_later_R, self._start_of(tokens, first_R), first_R)
        num_again_R = first_R - start_R
        query_start = pad((num_again_R + query_len_R).cumsum(0, dtype=torch.int32), (1, 0))
        num_stored_R = (self._next_start(first_R, query_len_R) - start_R) * (query_len_R > 0)

        token_T = torch.arange(T, dtype=torch.int32, device=start_R.device)
        row_T = row_of(token_T, tokens.query_start[1:])
        own_T = token_T + (query_start[1:] - tokens.query_start[1:]).index_select(0, row_T)
        own_T = own_T * (token_T < tokens.query_start[-1])

        token_U = torch.arange(T + R * K, dtype=torch.int32, device=start_R.device)
        row_U = row_of(token_U, query_start[1:])
        place_U = token_U - query_start.index_select(0, row_U)
        is_real_U = token_U < query_start[-1]
        is_again_U = is_real_U & (place_U < num_again_R.index_select(0, row_U))
        from_step_U = (token_U - (query_start[1:] - tokens.query_start[1:]).index_select(0, row_U)) * (
            is_real_U & ~is_again_U
        )
        taken = [x.index_select(0, from_step_U) for x in inputs]
        if K:
            place_kept_U = (start_R.index_select(0, row_U) + place_U) % K
            kept_U = (tokens.row_slot.index_select(0, row_U) * K + place_kept_U) * is_again_U
            taken = [
                torch.where(_over(is_again_U, x), kept.flatten(0, 1).index_select(0, kept_U), x)
                for kept, x in zip(self.inputs, taken, strict=True)
            ]
        real = tuple(torch.where(_over(is_real_U, x), x, 0) for x in taken)
        return RecurrentRows(state, real, query_start, num_stored_R, own_T)

    def store(self, tokens: StepTokens, inputs: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        """Leave what the next step starts from. Runs inside the graph, after `rows`.

        Args:
            tokens, inputs: as given to `rows`.
            state: [R, …] each, after `RecurrentRows.num_stored` tokens of each row; those of rows that run none may hold
                anything.
        """
        query_len_R = tokens.query_start.diff()
        ran_R = query_len_R > 0
        start_R = self._next_start(tokens.kv_len - query_len_R, query_len_R)
        slot_R = tokens.row_slot * ran_R
        for line, new in zip(self.state, state, strict=True):
            line.index_put_((slot_R,), new)
        if K := self.num_kept:
            token_T = torch.arange(tokens.token_ids.shape[0], dtype=torch.int32, device=slot_R.device)
            row_T = row_of(token_T, tokens.query_start[1:])
            is_kept_T = (token_T < tokens.query_start[-1]) & (tokens.positions >= start_R.index_select(0, row_T))
            place_T = (tokens.row_slot.index_select(0, row_T) * is_kept_T, tokens.positions % K * is_kept_T)
            for kept, x in zip(self.inputs, inputs, strict=True):
                kept.index_put_(place_T, x)
        self.start.index_put_((slot_R,), start_R.unsqueeze(1))

    def _start_of(self, tokens: StepTokens, first_R: Tensor) -> Tensor:
        """p of each row. Within its bounds for any content: the null line's is anybody's."""
        start_R = self.start.index_select(0, tokens.row_slot).squeeze(1)
        return torch.minimum(torch.maximum(start_R, first_R - self.num_kept), first_R)

    def _next_start(self, first_R: Tensor, query_len_R: Tensor) -> Tensor:
        """p' of each row."""
        return first_R + (query_len_R - self.num_kept).clamp(min=1)

    @property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.block_tensors`."""
        return ()

    @property
    def line_tensors(self) -> tuple[Tensor, ...]:
        """See `LayerCache.line_tensors`."""
        return self.start, *self.state, *self.inputs

    def lay_out(self, slot: int, computed: int, generator: torch.Generator) -> None:
        """See `LayerCache.lay_out`."""
        start = int(torch.randint(max(0, computed - self.num_kept), computed + 1, (), generator=generator))
        self.start[slot] = start
        kept = [line[slot, position % self.num_kept] for line in self.inputs for position in range(start, computed)]
        for target in (*(line[slot] for line in self.state), *kept):
            target.copy_(torch.randn(target.shape, generator=generator))

    def line_content(self, slot: int, end: int) -> tuple[Tensor, ...]:
        """See `LayerCache.line_content`."""
        start = int(self.start[slot])
        positions = range(max(start, end - self.num_kept), end)
        kept = [line[slot, position % self.num_kept] for line in self.inputs for position in positions]
        return self.start[slot], *(line[slot] for line in self.state), *kept


def _over(mask_N: Tensor, x: Tensor) -> Tensor:
    """A mask over the first dimension of `x`, to be broadcast over the others."""
    return mask_N.view(-1, *[1] * (x.dim() - 1))

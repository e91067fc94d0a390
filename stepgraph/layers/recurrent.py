"""State that a layer carries from token to token of a request: of a recurrence, or of a convolution over the last few tokens.

A request has one state, not one per position, so a step that has run proposals cannot go back to before those that fall. Nor
does it copy states in advance: a line holds the state at a position up to which everything stands, and the inputs of the few
tokens since, which the next step runs again as far as they stand. K being the most proposals of a row, the line of a request that
has c > 0 tokens computed holds between steps

- `start`: a position p with c - K ≤ p ≤ c, the same in all layers of a model;
- `state`: the state after the tokens at positions 0 … p - 1;
- `inputs`: at q mod K, what the recurrence takes from the token at position q, for p ≤ q < c. Those of proposals that fell may
  lie behind, where nothing reads them and the next step writes its own.

A step that runs n tokens of the request from position c on runs the kept ones from p on again, then its own, and leaves `start`
= p' = max(c + 1, c + n - K), the state there and the inputs from there on. It ends with c' tokens computed: c < c' ≤ c + n, as a
row's first token always stands, and c' = c + n if n > 1 + K, as such a row has no proposals. So p' ≤ c' ≤ p' + K, whatever
stood. Without speculation K = 0: there is nothing but the state, and nothing is run twice.

A row reads one line and writes another (`LineRows`), mostly the same. As p' > c, what it writes holds nothing from before c but
the state, so a line of c tokens can be read by any number of rows, in as many steps, that write elsewhere: such a line is a
checkpoint, from which requests start whose first c tokens are the same. Nothing is ever copied.

A request that starts at c = 0 has zero as the state before, whatever its line holds: that is all there is to a line's new user,
and to a request that starts anew after a preemption. Nothing is cleared when a request is admitted.

All of it runs inside the graph. What a step runs is the same for all layers, so that it is found once (`RecurrentCache.rows`).
States are read and written by operators (`stepgraph.ops.causal_conv`, `gated_delta`, `mamba2`). Rows that run no token,
padding rows too, write to the null line.

Shapes: T tokens of the step, R rows, U tokens to run: T, and R·K more where tokens are kept; those behind the last row are
padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepgraph.layers.cache import CacheSpec, Item
from stepgraph.layers.inputs import LineRows, StepInputs
from stepgraph.ops.rows import row_of


@dataclass(frozen=True)
class RecurrentSpec(CacheSpec):
    """A state in a line."""

    state: tuple[Item, ...]  # of a request
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
        return (*self.state, *((Item((1,), torch.int32), *kept) if num_drafts else ()))

    def cache(self, block_tensors: Sequence[Tensor], line_tensors: Sequence[Tensor]) -> RecurrentCache:
        """See `CacheSpec.cache`."""
        state, rest = line_tensors[: len(self.state)], line_tensors[len(self.state) :]
        return RecurrentCache(tuple(state), tuple(rest[1:]), rest[0] if rest else None)


class Replay(NamedTuple):
    """Where what a step runs comes from and goes to, where tokens are kept."""

    is_again: Tensor  # [U] bool, kept tokens that stand
    from_kept: Tensor  # [U] int32, where they are among all lines' kept ones; 0 of others
    from_step: Tensor  # [U] int32, where the others are among the T; 0 of those
    own: Tensor  # [T] int32, where the step's own tokens are among the U
    kept_line: Tensor  # [T] int32, the line that keeps each of them; the null line: none does
    kept_place: Tensor  # [T] int32, and where there
    line: Tensor  # [R] int32, that rows with tokens write; of others the null line
    next_start: Tensor  # [R] int32, `start` after the step


class RecurrentRows(NamedTuple):
    """A step's rows as a recurrence runs them: of each row the kept tokens that stand, then its own."""

    lines: LineRows
    query_start: Tensor  # [R + 1] int32, where each row begins among the U, and the end of all
    start: Tensor  # [R] int32, the position that it begins at; 0: the state before it is zero
    num_stored: (
        Tensor  # [R] int32: the state after so many of its tokens is to be stored, at least one; 0: it runs none
    )
    replay: Replay | None  # None: U = T

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The last arguments of operators that run a recurrence."""
        return *self.lines, self.query_start, self.start, self.num_stored

    def own(self, x_U: Tensor) -> Tensor:
        """Of what is of tokens to run, [U, …], that of the step's own: [T, …]."""
        return x_U if self.replay is None else x_U.index_select(0, self.replay.own)


@dataclass(frozen=True)
class RecurrentCache:
    """Of a `RecurrentSpec`."""

    state: tuple[Tensor, ...]  # [lines, …] each
    inputs: tuple[Tensor, ...]  # [lines, K, …] each; none if K = 0
    start: Tensor | None  # [lines, 1] int32; None if K = 0

    @property
    def num_kept(self) -> int:
        """K."""
        return self.inputs[0].shape[1] if self.inputs else 0

    def rows(self, inputs: StepInputs) -> RecurrentRows:
        """What a step has to run in this layer, and in all others of the model. Runs inside the graph."""
        tokens, lines = inputs.tokens, inputs.lines
        assert lines is not None
        query_len_R = tokens.query_start.diff()
        first_R = tokens.kv_len - query_len_R
        if self.start is None:
            return RecurrentRows(lines, tokens.query_start, first_R, query_len_R, None)
        T, R, K = tokens.token_ids.shape[0], tokens.row_slot.shape[0], self.num_kept
        ran_R = query_len_R > 0
        is_later_R = ran_R & (first_R > 0)
        start_R = torch.where(is_later_R, self._start_of(self.start, lines.read, first_R), first_R)
        next_R = self._next_start(first_R, query_len_R)
        num_again_R = first_R - start_R
        query_start = pad((num_again_R + query_len_R).cumsum(0, dtype=torch.int32), (1, 0))
        shift_R = query_start[1:] - tokens.query_start[1:]

        token_T = torch.arange(T, dtype=torch.int32, device=start_R.device)
        row_T = row_of(token_T, tokens.query_start[1:])
        is_real_T = token_T < tokens.query_start[-1]
        is_kept_T = is_real_T & (tokens.positions >= next_R.index_select(0, row_T))

        token_U = torch.arange(T + R * K, dtype=torch.int32, device=start_R.device)
        row_U = row_of(token_U, query_start[1:])
        place_U = token_U - query_start.index_select(0, row_U)
        is_real_U = token_U < query_start[-1]
        is_again_U = is_real_U & (place_U < num_again_R.index_select(0, row_U))
        kept_U = lines.read.index_select(0, row_U) * K + (start_R.index_select(0, row_U) + place_U) % K
        replay = Replay(
            is_again=is_again_U,
            from_kept=kept_U * is_again_U,
            from_step=(token_U - shift_R.index_select(0, row_U)) * (is_real_U & ~is_again_U),
            own=(token_T + shift_R.index_select(0, row_T)) * is_real_T,
            kept_line=lines.write.index_select(0, row_T) * is_kept_T,
            kept_place=tokens.positions % K * is_kept_T,
            line=lines.write * ran_R,
            next_start=next_R,
        )
        return RecurrentRows(lines, query_start, start_R, (next_R - start_R) * ran_R, replay)

    def replayed(self, rows: RecurrentRows, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The inputs of all tokens to run, [U, …] each, from those of the step's tokens, [T, …]; and keep of these what the next
        step may have to run again. Runs inside the graph. Of padding they may hold anything.
        """
        replay = rows.replay
        if replay is None:
            return tuple(inputs)
        again = [kept.flatten(0, 1).index_select(0, replay.from_kept) for kept in self.inputs]
        taken = [
            torch.where(_over(replay.is_again, old), old, x.index_select(0, replay.from_step))
            for old, x in zip(again, inputs, strict=True)
        ]
        for kept, x in zip(self.inputs, inputs, strict=True):
            kept.index_put_((replay.kept_line, replay.kept_place), x)
        assert self.start is not None
        self.start.index_put_((replay.line,), replay.next_start.unsqueeze(1))
        return tuple(taken)

    def _start_of(self, start: Tensor, line_R: Tensor, first_R: Tensor) -> Tensor:
        """p of each row. Within its bounds for any content: the null line's is anybody's."""
        start_R = start.index_select(0, line_R).squeeze(1)
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
        return *self.state, *(() if self.start is None else (self.start, *self.inputs))

    def lay_out(self, line: int, computed: int, generator: torch.Generator) -> None:
        """See `LayerCache.lay_out`."""
        kept = []
        if self.start is not None:
            # Not drawn: all layers of a request have the same.
            start = computed - (7 * line + computed) % (min(computed, self.num_kept) + 1)
            self.start[line] = start
            kept = [x[line, position % self.num_kept] for x in self.inputs for position in range(start, computed)]
        for target in (*(x[line] for x in self.state), *kept):
            target.copy_(torch.randn(target.shape, generator=generator))

    def line_content(self, line: int, end: int) -> tuple[Tensor, ...]:
        """See `LayerCache.line_content`."""
        state = tuple(x[line] for x in self.state)
        if self.start is None:
            return state
        positions = range(max(int(self.start[line]), end - self.num_kept), end)
        kept = [x[line, position % self.num_kept] for x in self.inputs for position in positions]
        return *state, self.start[line], *kept


def _over(mask_N: Tensor, x: Tensor) -> Tensor:
    """A mask over the first dimension of `x`, to be broadcast over the others."""
    return mask_N.view(-1, *[1] * (x.dim() - 1))

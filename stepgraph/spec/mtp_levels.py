"""Which tokens the second and further modules of several compute in a step, and where their inputs lie.

Module k at position i takes token i + k. After a step a row knows the tokens up to position e, where e are computed; so what
module k did at the last k - 1 of these positions, e - k + 1 to e - 1, it did with proposals. The step after does it again. So
module k computes the positions from c - (k - 1) on where the model computes those from c on, and of these only the ones that
stand. A request that starts behind cached keys and values leaves those alone: they are exact, and may be others'.

Module k also takes, at each position, the hidden state that module k - 1 has there. Of the positions above, module k - 1
computes all but the first in the same step; the hidden state of that one is carried over from the step before, in which it was
exact already.

All of it runs inside the graph, after `commit`.

Shapes: T tokens of the step or of a module, R rows, D modules, E hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.ops import StepTokens
from stepgraph.ops.rows import row_of


@dataclass(frozen=True)
class Level:
    """What one module computes in a step: a run of positions of each row."""

    tokens: StepTokens  # token ids are those that the module takes, k positions further on
    first: Tensor  # [R] int32, position of each row's first token

    def index_of(self, position_R: Tensor) -> Tensor:
        """Where a position of each row lies among the tokens, [R] int32; 0 where it does not."""
        index_R = self.tokens.query_start[:-1] + position_R - self.first
        inside_R = (position_R >= self.first) & (index_R < self.tokens.query_start[1:])
        return index_R * inside_R


def first_level(step: StepTokens, next_ids_T: Tensor) -> Level:
    """That of the first module: the step's tokens, each with the token after it."""
    return Level(step._replace(token_ids=next_ids_T), step.kv_len - step.query_start.diff())


def next_level(
    previous: Level,
    step: StepTokens,
    k: int,
    lines: Tensor,
    tokens: Tensor,
    block_table: Tensor,
    hidden_TE: Tensor,
    carried_SE: Tensor,
    block_size: int,
) -> tuple[Level, Tensor]:
    """That of module k ≥ 2, with room for k - 1 more tokens per row than the step has, and the hidden states it takes, [T, E].

    Args:
        previous: of module k - 1.
        step: of `build_step`.
        k: 2, …, D.
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32, the proposals made so far behind the history.
        block_table: [slots, max blocks] int32.
        hidden_TE: of module k - 1.
        carried_SE: for each slot, that of module k - 1 at the position k - 1 before the step's first.
        block_size: tokens per KV block.
    """
    num_rows = step.row_slot.shape[0]
    num_tokens = step.token_ids.shape[0] + num_rows * (k - 1)
    lines_RL = lines.index_select(0, step.row_slot)
    computed_R = lines_RL[:, slot_line.COMPUTED].contiguous()
    step_first_R = step.kv_len - step.query_start.diff()
    first_R = torch.maximum(step_first_R - (k - 1), lines_RL[:, slot_line.START])
    ran_R = step.query_start.diff() > 0
    end_R = ((computed_R - first_R) * ran_R).cumsum(0, dtype=torch.int32)

    token_T = torch.arange(num_tokens, dtype=torch.int32, device=lines.device)
    real_T = token_T < end_R[-1]
    row_T = row_of(token_T, end_R)
    slot_T = step.row_slot.index_select(0, row_T) * real_T
    position_T = (token_T + (computed_R - end_R).index_select(0, row_T)) * real_T
    taken_T = (position_T + k).clamp_(max=tokens.shape[1] - 1) * real_T
    level = Level(
        StepTokens(
            token_ids=tokens[slot_T, taken_T],
            positions=position_T,
            kv_slots=block_table[slot_T, position_T // block_size] * block_size + position_T % block_size,
            row_slot=step.row_slot,
            query_start=torch.nn.functional.pad(end_R, (1, 0)),
            kv_len=computed_R,
        ),
        first_R,
    )
    is_carried_T = real_T & (position_T < previous.first.index_select(0, row_T))
    index_T = (previous.tokens.query_start[:-1] - previous.first).index_select(0, row_T) + position_T
    computed_TE = hidden_TE.index_select(0, index_T * (real_T & ~is_carried_T))
    return level, torch.where(is_carried_T.unsqueeze(1), carried_SE.index_select(0, slot_T), computed_TE)


def carry(level: Level, k: int, lines: Tensor, hidden_TE: Tensor, carried_SE: Tensor) -> None:
    """Keep what module k + 1 will need of module k's hidden states in the rows' next step. Rows that did not run keep theirs.

    Args:
        level: of module k.
        k: 1, …, D - 1.
        lines: [slots, LINE_WIDTH] int32.
        hidden_TE: of module k.
        carried_SE: of each slot.
    """
    tokens = level.tokens
    computed_R = lines.index_select(0, tokens.row_slot)[:, slot_line.COMPUTED]
    hidden_RE = hidden_TE.index_select(0, level.index_of(computed_R - k))
    carried_SE.index_put_((tokens.row_slot * (tokens.query_start.diff() > 0),), hidden_RE)


def extend_history(lines: Tensor, tokens: Tensor, slot_R: Tensor, draft_R: Tensor, place: int) -> None:
    """Put a proposal behind the history and the `place` proposals before it, where the next module finds it.

    Args:
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32.
        slot_R: int32, null for rows that do not draft.
        draft_R: int32.
        place: 0, 1, …
    """
    position_R = lines.index_select(0, slot_R)[:, slot_line.LENGTH] + place
    writes_R = (slot_R != slot_line.NULL_SLOT) & (position_R < tokens.shape[1])
    tokens.index_put_((slot_R * writes_R, position_R * writes_R), draft_R * writes_R)

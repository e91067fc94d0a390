"""What drafting needs around the drafter: which rows draft and from where, and where their proposals go.

All of it runs after `commit`: `length` counts the tokens just sampled.
"""

from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.build import StepTokens
from stepgraph.ops.draft import reference
from stepgraph.ops.registry import Inlined, register


class DraftInputs(NamedTuple):
    """Result of `draft_inputs`. All int32."""

    next_ids: Tensor  # [T] the token after each token of the step
    slot: Tensor  # [R] the rows' slots; the null slot for rows that do not draft
    token_index: (
        Tensor  # [R] where the last token that stands lies in the step, the one before the newest; 0 where none drafts
    )


_draft_inputs = register(
    "draft_inputs(Tensor lines, Tensor tokens, Tensor row_slot, Tensor query_start, Tensor kv_len, Tensor positions) "
    "-> (Tensor, Tensor, Tensor)",
    {"cpu": Inlined(reference.draft_inputs), "cuda": "stepgraph.ops.draft.triton:draft_inputs"},
)
_draft_row_tokens = register(
    "draft_row_tokens(Tensor lines, Tensor block_table, Tensor slot, int place, int block_size) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    {"cpu": Inlined(reference.draft_row_tokens), "cuda": "stepgraph.ops.draft.triton:draft_row_tokens"},
)
_propose = register(
    "propose(Tensor(a!) lines, Tensor(b!) tokens, Tensor counter, Tensor(c!) ring, Tensor row_slot, Tensor drafts, "
    "Tensor count) -> ()",
    {"cpu": Inlined(reference.propose), "cuda": "stepgraph.ops.draft.triton:propose"},
)


def draft_inputs(lines: Tensor, tokens: Tensor, step: StepTokens) -> DraftInputs:
    """What a draft model reads of the step that was just committed. Runs inside the graph.

    A row drafts if its slot is active, knows one token more than is computed, takes proposals, and has room for one besides the
    token that follows it.

    Args:
        lines: [slots, LINE_WIDTH] int32.
        tokens: [slots, max_model_len] int32.
        step: of `build_step`.
    """
    return DraftInputs(
        *_draft_inputs(lines, tokens, step.row_slot, step.query_start, step.kv_len, step.positions),
    )


def draft_row_tokens(
    lines: Tensor, block_table: Tensor, slot: Tensor, token_ids: Tensor, place: int, block_size: int
) -> StepTokens:
    """Lay out one token per row, `place` positions after the last that stands. Runs inside the graph.

    Rows that do not draft, and those whose request has no room for so many proposals, are pointed at the null slot and the null
    block, at position 0.

    Args:
        lines: [slots, LINE_WIDTH] int32.
        block_table: [slots, max blocks] int32.
        slot: [R] int32, see `DraftInputs.slot`.
        token_ids: [R] int32.
        place: 1, 2, …
        block_size: tokens per KV block.
    """
    return StepTokens(token_ids, *_draft_row_tokens(lines, block_table, slot, place, block_size))


def propose(
    lines: Tensor, tokens: Tensor, counter: Tensor, ring: Tensor, row_slot: Tensor, drafts: Tensor, count: Tensor
) -> None:
    """Put proposals where the next step verifies them, and report them. Runs inside the graph, after `commit`.

    A row's proposals are cut to what its request takes (`max_num_drafts`) and has room for besides the token that follows them
    (`max_length`). A row whose slot is inactive, or that has known tokens left to compute, gets none.

    Args:
        lines: [slots, LINE_WIDTH] int32; `num_drafts` of the rows' slots is set.
        tokens: [slots, max_model_len] int32; proposals go behind the history.
        counter: [1] int32, as `commit` left it.
        ring: [depth, max rows, OUTPUT_WIDTH] int32; the proposals join what `commit` wrote.
        row_slot: [R] int32.
        drafts: [R, K] int32, contiguous.
        count: [R] int32, of these, the first so many are meant.
    """
    _propose(lines, tokens, counter, ring, row_slot, drafts, count)

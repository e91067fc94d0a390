"""First stage of a step: from the plan's rows to what the model needs, on the device.

The plan only bounds a row's query length. The device knows the request's true state, so a row that the host planned
before it saw the request finish comes out empty, and the rows after it close up.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.ops.build import reference
from stepgraph.ops.registry import register


class BuiltStep(NamedTuple):
    """Result of `build_step`. T tokens and R rows are the captured sizes; real tokens come first, padding after.

    All int32. Padding tokens: id of the null slot's first token, position 0, kv slot 0. Empty rows: `query_start[r] ==
    query_start[r + 1]`, `kv_len` = the slot's computed length, `logit_index` 0.
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    kv_slots: Tensor  # [T] block · block_size + offset
    row_slot: Tensor  # [R]
    query_start: Tensor  # [R + 1] exclusive prefix sum of the query lengths
    kv_len: Tensor  # [R] tokens of the row's sequence that are cached after this step
    logit_index: Tensor  # [R] index in the token dimension of the row's last token


def _fake(
    plan: Tensor,
    lines: Tensor,
    tokens: Tensor,
    block_table: Tensor,
    num_tokens: int,
    num_rows: int,
    num_deltas: int,
    block_size: int,
) -> tuple[Tensor, ...]:
    T, R = num_tokens, num_rows
    return tuple(plan.new_empty(size, dtype=torch.int32) for size in (T, T, T, R, R + 1, R, R))


_build_step = register(
    "build_step(Tensor plan, Tensor lines, Tensor tokens, Tensor(a!) block_table, int num_tokens, int num_rows, "
    "int num_deltas, int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.build_step,
    fake=_fake,
    cuda="stepgraph.ops.build.triton:build_step",
    inline_on_cpu=True,
)


def build_step(
    plan: Tensor,
    lines: Tensor,
    tokens: Tensor,
    block_table: Tensor,
    num_tokens: int,
    num_rows: int,
    num_deltas: int,
    block_size: int,
) -> BuiltStep:
    """Apply the plan's block-table deltas and lay out the step's tokens. Runs inside the graph.

    A row runs ``min(bound, length - computed)`` tokens of its slot, none if the slot is inactive. The host guarantees
    that the bounds sum to at most `num_tokens` and that a slot other than the null slot appears in one row only.

    Args:
        plan: int32, at least ``2R + 3·num_deltas`` long: R rows (slot, query length bound), then the deltas (slot,
            index, block). All-zero rows and deltas are padding: they name the null slot and the null block.
        lines: [slots, LINE_WIDTH] int32, see `stepgraph.ops.slot_line`.
        tokens: [slots, max_model_len] int32 token history.
        block_table: [slots, max blocks] int32; updated with the deltas before it is read.
        num_tokens: T, captured tokens.
        num_rows: R, captured rows.
        num_deltas: deltas in the plan.
        block_size: tokens per KV block.
    """
    return BuiltStep(*_build_step(plan, lines, tokens, block_table, num_tokens, num_rows, num_deltas, block_size))

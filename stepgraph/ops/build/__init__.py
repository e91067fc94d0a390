"""First stage of a step: from the plan's rows to what the model needs, on the device.

The plan only bounds a row's query length. The device knows the request's true state, so a row that the host planned
before it saw the request finish comes out empty, and the rows after it close up.
"""

from typing import NamedTuple

from torch import Tensor

from stepgraph.ops.build import reference
from stepgraph.ops.registry import Inlined, register


class StepTokens(NamedTuple):
    """The tokens of a step, or of a part of it, as a model's layers need them. T tokens and R rows are static sizes; real tokens
    come first, padding after.

    All int32. Padding tokens: id of the null slot's first token, position 0, kv slot 0. Empty rows: `query_start[r] ==
    query_start[r + 1]`, `kv_len` = the slot's computed length.
    """

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]
    kv_slots: Tensor  # [T] block · block_size + offset
    row_slot: Tensor  # [R]
    query_start: Tensor  # [R + 1] exclusive prefix sum of the query lengths
    kv_len: Tensor  # [R] tokens of the row's sequence that are cached after this step


class StepSamples(NamedTuple):
    """Where a step samples: after every token whose successor is not known yet. S is a static size.

    A row has a sample for its last known token and one for each proposal it verifies; none if it is a chunk that leaves known
    tokens uncomputed. All int32. Padding samples, which come last, are 0 throughout.
    """

    start: Tensor  # [R + 1] exclusive prefix sum of the rows' numbers of samples
    slot: Tensor  # [S]
    offset: Tensor  # [S] place in its row: the token sampled there has position `length + offset`
    token_index: Tensor  # [S] index in the token dimension of the token whose successor is sampled


class BuiltStep(NamedTuple):
    """Result of `build_step`."""

    tokens: StepTokens
    samples: StepSamples


_build_step = register(
    "build_step(Tensor plan, Tensor lines, Tensor tokens, Tensor(a!) block_table, int num_tokens, int num_rows, "
    "int num_samples, int num_deltas, int block_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor)",
    {"cpu": Inlined(reference.build_step), "cuda": "stepgraph.ops.build.triton:build_step"},
)


def build_step(
    plan: Tensor,
    lines: Tensor,
    tokens: Tensor,
    block_table: Tensor,
    num_tokens: int,
    num_rows: int,
    num_samples: int,
    num_deltas: int,
    block_size: int,
) -> BuiltStep:
    """Apply the plan's block-table deltas and lay out the step's tokens. Runs inside the graph.

    A row runs ``min(bound, length + num_drafts - computed)`` tokens of its slot, none if the slot is inactive. The host
    guarantees that the bounds sum to at most `num_tokens`, that the rows' samples are at most `num_samples`, and that a slot
    other than the null slot appears in one row only.

    Args:
        plan: int32, at least ``2R + 3·num_deltas`` long: R rows (slot, query length bound), then the deltas (slot,
            index, block). All-zero rows and deltas are padding: they name the null slot and the null block.
        lines: [slots, LINE_WIDTH] int32, see `stepgraph.abi.slot_line`.
        tokens: [slots, max_model_len] int32 token history.
        block_table: [slots, at least max blocks] int32; updated with the deltas before it is read.
        num_tokens: T, captured tokens.
        num_rows: R, captured rows.
        num_samples: S, at most T.
        num_deltas: deltas in the plan.
        block_size: tokens per KV block.
    """
    built = _build_step(plan, lines, tokens, block_table, num_tokens, num_rows, num_samples, num_deltas, block_size)
    return BuiltStep(StepTokens(*built[:6]), StepSamples(*built[6:]))

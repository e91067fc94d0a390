"""Where the tokens of a step lie in the blocks of further block groups; `build_step` says so of the first."""

from collections.abc import Sequence

from torch import Tensor

from stepgraph.ops.group_slots import reference
from stepgraph.ops.registry import Inlined, register

_group_slots = register(
    "group_slots(Tensor block_table, Tensor row_slot, Tensor query_start, Tensor positions, int[] block_sizes) -> Tensor",
    {"cpu": Inlined(reference.group_slots), "cuda": "stepgraph.ops.group_slots.triton:group_slots"},
)


def group_slots(
    block_table: Tensor, row_slot: Tensor, query_start: Tensor, positions: Tensor, block_sizes: Sequence[int]
) -> Tensor:
    """`StepTokens.kv_slots` of every block group but the first. Runs inside the graph.

    Args:
        block_table: [num_groups · slots, max blocks] int32, contiguous: the tables of the groups, one behind the other.
        row_slot: [R] int32.
        query_start: [R + 1] int32, see `StepTokens`.
        positions: [T] int32.
        block_sizes: tokens per KV block of each group, of which there are two or more.

    Returns:
        [num_groups - 1, T] int32, `block · block size + offset`; of padding tokens the null slot's.
    """
    kv_slots: Tensor = _group_slots(block_table, row_slot, query_start, positions, list(block_sizes))
    return kv_slots

"""Plain torch definition of `group_slots`; also its CPU kernel. Shapes: T tokens, N groups, S slots, B blocks of a table."""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from stepgraph.ops.rows import row_of


def runs(block_sizes: Sequence[int]) -> Iterator[tuple[slice, int]]:
    """Groups beside each other whose blocks hold equally many tokens, and how many; the first group is not counted."""
    for size, others in groupby(range(len(block_sizes) - 1), lambda other: block_sizes[1 + other]):
        first, *rest = others
        yield slice(first, first + 1 + len(rest)), size


def group_slots(
    block_table: Tensor, row_slot: Tensor, query_start: Tensor, positions: Tensor, block_sizes: Sequence[int]
) -> Tensor:
    """See `stepgraph.ops.group_slots.group_slots`."""
    token_T = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    row_T = row_of(token_T, query_start[1:])
    slot_T = row_slot.index_select(0, row_T) * (token_T < query_start[-1])
    table_NSB = block_table.view(len(block_sizes), -1, block_table.shape[1])[1:]
    slots = [table_NSB[run, slot_T, positions // size] * size + positions % size for run, size in runs(block_sizes)]
    return slots[0] if len(slots) == 1 else torch.cat(slots)

"""Plain torch definition of `group_slots`; also its CPU kernel. Shapes: T tokens, N groups, S slots, B blocks of a table."""

import torch
from torch import Tensor

from stepgraph.ops.rows import row_of


def group_slots(
    block_table: Tensor, row_slot: Tensor, query_start: Tensor, positions: Tensor, num_groups: int, block_size: int
) -> Tensor:
    """See `stepgraph.ops.group_slots.group_slots`."""
    token_T = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    row_T = row_of(token_T, query_start[1:])
    slot_T = row_slot.index_select(0, row_T) * (token_T < query_start[-1])
    table_NSB = block_table.view(num_groups, -1, block_table.shape[1])
    block_NT = table_NSB[1:, slot_T, positions // block_size]
    return block_NT * block_size + positions % block_size

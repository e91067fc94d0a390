"""Plain torch definition of `build_step`; also its CPU kernel. Shapes: T tokens, R rows, S samples, E deltas."""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.rows import row_of


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
) -> tuple[Tensor, ...]:
    """See `stepgraph.ops.build.build_step`."""
    rows_R2, deltas_E3 = plan[: line.ROW_WIDTH * num_rows + line.DELTA_WIDTH * num_deltas].split(
        [line.ROW_WIDTH * num_rows, line.DELTA_WIDTH * num_deltas]
    )
    slot_E, index_E, block_E = deltas_E3.view(-1, line.DELTA_WIDTH).unbind(1)
    block_table.index_put_((slot_E, index_E), block_E)

    row_slot_R, bound_R = rows_R2.view(-1, line.ROW_WIDTH).unbind(1)
    lines_RL = lines.index_select(0, row_slot_R)
    length_R, computed_R, active_R, drafts_R = (
        lines_RL[:, i] for i in (line.LENGTH, line.COMPUTED, line.ACTIVE, line.NUM_DRAFTS)
    )
    query_len_R = torch.minimum(bound_R, length_R + drafts_R - computed_R).clamp_(min=0) * active_R
    query_end_R = query_len_R.cumsum(0, dtype=torch.int32)
    query_start = torch.nn.functional.pad(query_end_R, (1, 0))
    kv_len_R = computed_R + query_len_R
    num_samples_R = (kv_len_R - length_R + 1).clamp_(min=0) * (query_len_R > 0)
    sample_end_R = num_samples_R.cumsum(0, dtype=torch.int32)
    sample_start = torch.nn.functional.pad(sample_end_R, (1, 0))

    token_T = torch.arange(num_tokens, dtype=torch.int32, device=plan.device)
    real_T = token_T < query_end_R[-1]
    row_T = row_of(token_T, query_end_R)
    slot_T = row_slot_R.index_select(0, row_T) * real_T
    position_T = (token_T + (kv_len_R - query_end_R).index_select(0, row_T)) * real_T
    token_id_T = tokens[slot_T, position_T]
    kv_slot_T = block_table[slot_T, position_T // block_size] * block_size + position_T % block_size

    sample_S = torch.arange(num_samples, dtype=torch.int32, device=plan.device)
    real_S = sample_S < sample_end_R[-1]
    row_S = row_of(sample_S, sample_end_R)
    sample_slot_S = row_slot_R.index_select(0, row_S) * real_S
    sample_offset_S = (sample_S - sample_start.index_select(0, row_S)) * real_S
    sample_index_S = (sample_S + (query_end_R - sample_end_R).index_select(0, row_S)) * real_S
    return (
        token_id_T,
        position_T,
        kv_slot_T,
        row_slot_R.clone(),
        query_start,
        kv_len_R,
        sample_start,
        sample_slot_S,
        sample_offset_S,
        sample_index_S,
    )

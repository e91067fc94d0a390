"""CPU kernel of `mamba2`: rows of one token all at once, short ones token by token, longer ones by chunks. Where results must be
deterministic, all go the second way.

An opaque operator, as it may be on a CPU: it reads the rows' lengths.
"""

import torch
from torch import Tensor

from stepgraph.ops.mamba2.chunks import FEW, advance_by_chunks
from stepgraph.ops.mamba2.reference import Heads, advance, heads_of
from stepgraph.ops.rows import advance_rows, advance_single_tokens


def mamba2(
    xbc: Tensor,
    dt: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    skip: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    least_step: float,
    most_step: float,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.mamba2.mamba2`."""
    H, D = state.shape[1], state.shape[3]
    num_tokens = int(query_start[-1])
    heads = heads_of(xbc[:num_tokens], dt[:num_tokens], a_log, dt_bias, state, least_step, most_step)
    out_UHD = xbc.new_zeros(xbc.shape[0], H, D, dtype=heads.x.dtype)
    if not deterministic:

        def advanced_once(state_SHND: Tensor, token_S: Tensor) -> Tensor:
            x_SHD, b_SHN, c_SHN, step_SH, log_decay_SH = (x[token_S] for x in heads)
            state_SHND.mul_(log_decay_SH.exp()[..., None, None])
            state_SHND += b_SHN.unsqueeze(3) * (x_SHD * step_SH.unsqueeze(2)).unsqueeze(2)
            out_UHD[token_S] = torch.einsum("shnd,shn->shd", state_SHND, c_SHN)
            return state_SHND

        advance_single_tokens(advanced_once, state, read_line, write_line, query_start, start)

    def advanced(state: Tensor, tokens: slice, length: int) -> Tensor:
        way = advance if deterministic or length <= FEW else advance_by_chunks
        return way(state, Heads(*(x[tokens] for x in heads)), out_UHD[tokens])

    least = 1 if deterministic else 2
    advance_rows(advanced, state, read_line, write_line, query_start, start, num_stored, least=least)
    out_UHD[:num_tokens] += skip.unsqueeze(1) * heads.x
    return out_UHD.flatten(1).to(xbc.dtype)

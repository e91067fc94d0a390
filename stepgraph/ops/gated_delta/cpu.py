"""CPU kernel of `gated_delta`: rows of one token all at once, short ones token by token, longer ones by chunks. Where results
must be deterministic, all go the second way.

An opaque operator, as it may be on a CPU: it reads the rows' lengths.
"""

import torch
from torch import Tensor

from stepgraph.ops.gated_delta.chunks import FEW, advance_by_chunks
from stepgraph.ops.gated_delta.reference import Heads, advance, heads_of
from stepgraph.ops.rows import advance_rows, advance_single_tokens


def gated_delta(
    qkv: Tensor,
    ba: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    max_rate: float,
    deterministic: bool,
) -> Tensor:
    """See `stepgraph.ops.gated_delta.gated_delta`."""
    H, D = state.shape[1], state.shape[3]
    num_tokens = int(query_start[-1])
    heads = heads_of(qkv[:num_tokens], ba[:num_tokens], a_log, dt_bias, state, max_rate)
    out_UHD = qkv.new_zeros(qkv.shape[0], H, D, dtype=heads.v.dtype)
    if not deterministic:

        def advanced_once(state_SHND: Tensor, token_S: Tensor) -> Tensor:
            q_SHN, k_SHN, v_SHD, log_decay_SH, rate_SH = (x[token_S] for x in heads)
            state_SHND.mul_(log_decay_SH.exp()[..., None, None])
            known_SHD = torch.einsum("shnd,shn->shd", state_SHND, k_SHN)
            state_SHND += k_SHN.unsqueeze(3) * ((v_SHD - known_SHD) * rate_SH.unsqueeze(2)).unsqueeze(2)
            out_UHD[token_S] = torch.einsum("shnd,shn->shd", state_SHND, q_SHN)
            return state_SHND

        advance_single_tokens(advanced_once, state, read_line, write_line, query_start, start)

    def advanced(state: Tensor, tokens: slice, length: int) -> Tensor:
        way = advance if deterministic or length <= FEW else advance_by_chunks
        return way(state, Heads(*(x[tokens] for x in heads)), out_UHD[tokens])

    least = 1 if deterministic else 2
    advance_rows(advanced, state, read_line, write_line, query_start, start, num_stored, least=least)
    return out_UHD.flatten(1).to(qkv.dtype)

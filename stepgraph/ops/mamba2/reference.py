"""Plain torch definition of `mamba2`: token by token. Shapes: U tokens, H heads, D their size, N size of B and C."""

from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.ops.gated_delta.reference import softplus
from stepgraph.ops.rows import advance_rows


class Heads(NamedTuple):
    """What the scan takes of tokens, in float32."""

    x: Tensor  # [U, H, D]
    b: Tensor  # [U, H, N]
    c: Tensor  # [U, H, N]
    step: Tensor  # [U, H]: Δ
    log_decay: Tensor  # [U, H]


def heads_of(
    xbc: Tensor, dt: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, least_step: float, most_step: float
) -> Heads:
    """Taken apart, with B and C for each head. Float64 stays so."""
    H, N, D = state.shape[1:]
    dtype = torch.promote_types(xbc.dtype, torch.float32)
    x_UF, bc_UF = xbc.to(dtype).tensor_split((H * D,), dim=1)
    b_UGN, c_UGN = (x.unflatten(1, (-1, N)) for x in bc_UF.chunk(2, dim=1))
    b_UHN, c_UHN = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (b_UGN, c_UGN))
    step_UH = softplus(dt.to(dtype) + dt_bias).clamp(least_step, most_step)
    return Heads(x_UF.unflatten(1, (H, D)), b_UHN, c_UHN, step_UH, -a_log.exp() * step_UH)


def advance(state: Tensor, heads: Heads, out: Tensor) -> Tensor:
    """The state after some tokens, one after the other; what they read goes to `out`.

    Args:
        state: [H, N, D], before them.
        heads: of the tokens.
        out: [tokens, H, D].
    """
    for index, (x_HD, b_HN, c_HN, step_H, log_decay_H) in enumerate(zip(*heads, strict=True)):
        brought_HD = x_HD * step_H.unsqueeze(1)
        state = state * log_decay_H.exp().view(-1, 1, 1) + b_HN.unsqueeze(2) * brought_HD.unsqueeze(1)
        out[index] = (state * c_HN.unsqueeze(2)).sum(1)
    return state


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
    heads = heads_of(xbc, dt, a_log, dt_bias, state, least_step, most_step)
    out_UHD = torch.zeros_like(heads.x)

    def advanced(state: Tensor, tokens: slice, _: int) -> Tensor:
        return advance(state, Heads(*(x[tokens] for x in heads)), out_UHD[tokens])

    advance_rows(advanced, state, read_line, write_line, query_start, start, num_stored)
    return (out_UHD + skip.unsqueeze(1) * heads.x).flatten(1).to(xbc.dtype)

"""Plain torch definition of `gated_delta`: token by token. Shapes: U tokens, G and N of keys, H and D of values."""

from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph.ops.rows import advance_rows


class Heads(NamedTuple):
    """What the rule takes of tokens, in float32."""

    q: Tensor  # [U, H, N]
    k: Tensor  # [U, H, N]
    v: Tensor  # [U, H, D]
    log_decay: Tensor  # [U, H]
    rate: Tensor  # [U, H]


def heads_of(qkv: Tensor, ba: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, max_rate: float) -> Heads:
    """Taken apart, normalised, and with queries and keys for each head of the values. Float64 stays so."""
    H, N, D = state.shape[1:]
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.to(dtype).split(((qkv.shape[1] - H * D) // 2, (qkv.shape[1] - H * D) // 2, H * D), dim=1)
    q, k = (x.unflatten(1, (-1, N)) for x in (q, k))
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (q * N**-0.5, k))
    b, a = ba.to(dtype).chunk(2, dim=1)
    step = softplus(a + dt_bias)
    return Heads(q, k, v.unflatten(1, (H, D)), -a_log.exp() * step, max_rate / (1 + torch.exp(-b)))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), the same bits wherever an entry lies: torch's logarithm rounds otherwise where scalar code takes over from
    vectors, and so do its softplus and sigmoid; what is rounded from float64 is the same."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x.double().clamp(max=20))).to(x.dtype))


def advance(state: Tensor, heads: Heads, out: Tensor) -> Tensor:
    """The state after some tokens, one after the other; what they read goes to `out`.

    Args:
        state: [H, N, D], before them.
        heads: of the tokens.
        out: [tokens, H, D].
    """
    for index, (q_HN, k_HN, v_HD, log_decay_H, rate_H) in enumerate(zip(*heads, strict=True)):
        state = state * log_decay_H.exp().view(-1, 1, 1)
        known_HD = (state * k_HN.unsqueeze(2)).sum(1)
        state = state + k_HN.unsqueeze(2) * ((v_HD - known_HD) * rate_H.unsqueeze(1)).unsqueeze(1)
        out[index] = (state * q_HN.unsqueeze(2)).sum(1)
    return state


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
    heads = heads_of(qkv, ba, a_log, dt_bias, state, max_rate)
    out_UHD = torch.zeros_like(heads.v)

    def advanced(state: Tensor, tokens: slice, _: int) -> Tensor:
        return advance(state, Heads(*(x[tokens] for x in heads)), out_UHD[tokens])

    advance_rows(advanced, state, read_line, write_line, query_start, start, num_stored)
    return out_UHD.flatten(1).to(qkv.dtype)

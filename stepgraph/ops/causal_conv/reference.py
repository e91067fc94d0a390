"""Plain torch definition of `causal_conv`; also its CPU kernel. Shapes: U tokens, R rows, C channels, W width, P = W - 1."""

import torch
from torch import Tensor

from stepgraph.ops.rows import row_of


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    read_line: Tensor,
    write_line: Tensor,
    query_start: Tensor,
    start: Tensor,
    num_stored: Tensor,
    silu: bool,
) -> Tensor:
    """See `stepgraph.ops.causal_conv.causal_conv`."""
    U, P, (C, W) = x.shape[0], state.shape[1], weight.shape
    ran_R = num_stored > 0  # a row without tokens leaves its lines alone
    old_RPC = torch.where((start > 0).view(-1, 1, 1), state.index_select(0, read_line * ran_R), 0)
    token_U = torch.arange(U, dtype=torch.int32, device=x.device)
    row_U = row_of(token_U, query_start[1:])
    place_U = token_U - query_start.index_select(0, row_U)
    out_UC = x.float() * weight[:, P].float()
    for back in range(1, W):
        within_UC = x.index_select(0, (token_U - back).clamp(min=0))
        before_UC = old_RPC.view(-1, C).index_select(0, row_U * P + (P + place_U - back).clamp(0, P - 1))
        earlier_UC = torch.where((place_U >= back).unsqueeze(1), within_UC, before_UC)
        out_UC = out_UC + earlier_UC.float() * weight[:, P - back].float()
    if bias is not None:
        out_UC = out_UC + bias.float()

    entry_P = torch.arange(P, dtype=torch.int32, device=x.device)
    place_RP = num_stored.unsqueeze(1) - P + entry_P
    index_RP = (query_start[:-1].unsqueeze(1) + place_RP).clamp(0, U - 1)
    kept_RPC = old_RPC.gather(1, (P + place_RP).clamp(0, P - 1).long().unsqueeze(2).expand(-1, -1, C))
    new_RPC = torch.where((place_RP >= 0).unsqueeze(2), x.index_select(0, index_RP.flatten()).view(-1, P, C), kept_RPC)
    state.index_put_((write_line * ran_R,), new_RPC)
    return (out_UC / (1 + torch.exp(-out_UC)) if silu else out_UC).to(x.dtype)

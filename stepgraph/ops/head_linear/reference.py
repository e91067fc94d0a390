"""Plain torch definition of `head_linear`; also its CPU kernel where there is none of our own."""

import torch
from torch import Tensor


def head_linear(x: Tensor, weight: Tensor, deterministic: bool) -> Tensor:
    """See `stepgraph.ops.head_linear.head_linear`."""
    if deterministic:
        by_token = [torch.matmul(weight, token_HK.unsqueeze(2)).flatten() for token_HK in x]
        return torch.stack(by_token) if by_token else x.new_empty(0, weight.shape[0] * weight.shape[1])
    return torch.einsum("thk,hnk->thn", x, weight).flatten(1)

"""`fp8_linear` on the CPU: widened at every call, so slower than weights of 32 bits. For trying it without a GPU."""

import torch
from torch import Tensor

from stepgraph.ops.fp8_linear import reference
from stepgraph.ops.linear.cpu import linear_by_row


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, by_row: bool) -> Tensor:
    """See `stepgraph.ops.fp8_linear.fp8_linear`."""
    if not by_row:
        return reference.fp8_linear(x, weight, scale, bias)
    out = torch.empty(x.shape[0], weight.shape[0])
    linear_by_row(x.float(), reference.dequantize(weight, scale), None if bias is None else bias.float(), out)
    return out.to(x.dtype)

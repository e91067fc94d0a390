"""`lora` on the CPU: the tokens of each adapter go through two products."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops.linear.cpu import linear_by_row


def lora(
    x: Tensor, a: Tensor, b: Tensor, index: Tensor, parts: Sequence[int], deterministic: bool, out: Tensor
) -> None:
    """See `stepgraph.ops.lora.lora`. Reads tensor values: opaque to a recording."""
    product = _by_row if deterministic else F.linear
    for adapter in index.unique().tolist():
        if adapter:
            tokens = (index == adapter).nonzero().squeeze(1)
            hidden = product(x[tokens], a[adapter]).split(b.shape[2], dim=1)
            parts_of_b = b[adapter].split(list(parts))
            update = torch.cat([product(h, part) for h, part in zip(hidden, parts_of_b, strict=True)], dim=1)
            out[tokens] += update


def _by_row(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0])
    linear_by_row(x, weight, None, out)
    return out

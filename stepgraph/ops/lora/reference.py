"""Plain torch definition of `lora`: token by token, in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora(
    x: Tensor, a: Tensor, b: Tensor, index: Tensor, parts: Sequence[int], deterministic: bool, out: Tensor
) -> None:
    """See `stepgraph.ops.lora.lora`."""
    for token, adapter in enumerate(index.tolist()):
        if adapter:
            hidden = (a[adapter].float() @ x[token].float()).to(x.dtype).float().split(b.shape[2])
            parts_of_b = b[adapter].float().split(list(parts))
            out[token] += torch.cat([part @ h for part, h in zip(parts_of_b, hidden, strict=True)])

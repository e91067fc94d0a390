"""Plain torch definition of the collectives once all parts are there; also what the CPU computes.

Shapes: N ranks, T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

import torch
from torch import Tensor

from stepgraph.ops.rms_norm import rms_norm


def reduce_gathered(
    parts: Tensor,
    residual: Tensor,
    out: Tensor | None,
    multiplier: float,
    post_weight: Tensor | None,
    post_eps: float,
    weight: Tensor | None,
    eps: float,
    count: Tensor | None = None,
) -> None:
    """See `stepgraph.ops.collectives.reduce_gathered`."""
    sum_TE = torch.zeros(residual.shape, dtype=torch.float32, device=residual.device)
    for part_TE in parts.unbind():
        sum_TE = sum_TE + part_TE.float()
    if count is not None:
        row_T = torch.arange(residual.shape[0], device=residual.device)
        sum_TE = torch.where((row_T < count)[:, None], sum_TE, 0.0)
    if post_weight is not None:
        normed_TE = sum_TE * torch.rsqrt(sum_TE.square().mean(-1, keepdim=True) + post_eps)
        sum_TE = (normed_TE.to(post_weight.dtype) * post_weight).float()
    residual.copy_(residual.float() + sum_TE * multiplier)
    if weight is not None:
        assert out is not None
        out.copy_(rms_norm(residual, weight, eps))


def tokens(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """A rank's tokens as all ranks get them: normalised, if there is a weight, and with 0.0 for -0.0."""
    return (x if weight is None else rms_norm(x, weight, eps)) + 0.0


def gather_columns(parts: Tensor, out: Tensor) -> None:
    """Put [N, R, W] into [R, V], as far as there is room."""
    for columns_RW, part_RW in zip(out.split(parts.shape[2], dim=1), parts.unbind(), strict=True):
        columns_RW.copy_(part_RW[:, : columns_RW.shape[1]])

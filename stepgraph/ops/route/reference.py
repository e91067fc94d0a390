"""Plain torch definition of `route`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counts: Tensor,
    totals: Tensor,
    top: int,
    sigmoid: bool,
    normalise: bool,
    least_sum: float,
    scale: float,
    groups: int,
    kept_groups: int,
    group_top: int,
    logit_bias: Tensor | None = None,
    expert_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `stepgraph.ops.route.route`. Opaque to a recording: it reads `counts`."""
    (T, _), N = x.shape, weight.shape[0]
    expert_TK = x.new_full((T, top), N, dtype=torch.int32)
    weight_TK = x.new_zeros((T, top), dtype=torch.float32)
    length = T // counts.shape[0]
    token_T = torch.cat([torch.arange(count) + block * length for block, count in enumerate(counts.tolist())])
    if len(token_T) == 0:
        return expert_TK, weight_TK
    # By token: the last elements of a tensor are rounded otherwise by some of PyTorch's functions.
    logits = [F.linear(x[token].float(), weight, logit_bias) for token in token_T.tolist()]
    scores_TN = torch.stack([logits_N.sigmoid() if sigmoid else logits_N.softmax(0) for logits_N in logits])
    ranked_TN = scores_TN if bias is None else scores_TN + bias
    if groups > 1:
        grouped_TGN = ranked_TN.unflatten(1, (groups, -1))
        score_TG = grouped_TGN.topk(group_top, 2).values.sum(2)
        kept_TG = torch.zeros_like(score_TG, dtype=torch.bool)
        kept_TG.scatter_(1, score_TG.sort(dim=1, descending=True, stable=True).indices[:, :kept_groups], True)
        ranked_TN = grouped_TGN.masked_fill(~kept_TG[..., None], -torch.inf).flatten(1)
    chosen_TK = ranked_TN.sort(dim=1, descending=True, stable=True).indices[:, :top]
    chosen_weight_TK = scores_TN.gather(1, chosen_TK)
    if normalise:
        chosen_weight_TK = chosen_weight_TK / chosen_weight_TK.sum(1, keepdim=True).clamp(min=least_sum)
    expert_TK[token_T] = chosen_TK.to(torch.int32)
    weight_TK[token_T] = chosen_weight_TK * scale
    totals += torch.bincount(chosen_TK.flatten(), minlength=N)
    return expert_TK, scaled(weight_TK, expert_TK, expert_scale)


def scaled(weight_TK: Tensor, expert_TK: Tensor, expert_scale_N: Tensor | None) -> Tensor:
    """Weights times what their experts have, if these have a scale. Those of padding, which has no expert, stay 0."""
    if expert_scale_N is None:
        return weight_TK
    return weight_TK * expert_scale_N[expert_TK.clamp(max=len(expert_scale_N) - 1)]

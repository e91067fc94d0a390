"""Plain torch definition of `sample`: every row sorts and draws over all of the vocabulary. R rows, V entries."""

import math

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.sample.philox import gumbel


def keep_mask(x_V: Tensor, min_p: float, top_k: int, top_p: float) -> Tensor:
    """Which entries `min_p`, then `top_k` and then `top_p` keep, masses in float64. x_V: [V] float32, no NaN. Returns [V]
    bool."""
    keep_V = torch.ones_like(x_V, dtype=torch.bool)
    if min_p > 0:
        keep_V = x_V >= x_V.amax() + math.log(min_p)
    if 0 < top_k < len(x_V):
        keep_V &= x_V >= x_V.sort(descending=True).values[top_k - 1]
    if top_p < 1:
        sorted_V = x_V.masked_fill(~keep_V, -torch.inf).sort(descending=True).values
        last = int((sorted_V.double().softmax(0).cumsum(0) < top_p).sum())
        keep_V &= x_V >= sorted_V[min(last, len(x_V) - 1)]
    return keep_V


def sample(logits: Tensor, row_slot: Tensor, offset: Tensor, lines: Tensor) -> Tensor:
    """See `stepgraph.ops.sample.sample`."""
    logits_RV = logits.float().masked_fill(logits.isnan(), -torch.inf)
    tokens = []
    for logits_V, line_L, place in zip(logits_RV, lines[row_slot.long()], offset, strict=True):
        temperature, min_p, top_p = line_L[[line.TEMPERATURE, line.MIN_P, line.TOP_P]].view(torch.float32).tolist()
        score_V = logits_V
        if temperature > 0:
            x_V = logits_V / temperature
            keep_V = keep_mask(x_V, min_p, int(line_L[line.TOP_K]), top_p)
            noise_V = gumbel(line_L[line.SEED_LOW], line_L[line.SEED_HIGH], line_L[line.LENGTH] + place, len(x_V))
            score_V = (x_V + noise_V).masked_fill(~keep_V, -torch.inf)
        best, token = score_V.max(0)
        tokens.append(line.NO_TOKEN if best == -torch.inf else int(token))
    return torch.tensor(tokens, dtype=torch.int32)

"""`sample` on the CPU. Rows pay only for what their settings ask: greedy ones an arg-max, `min_p` a maximum, `top_k` a
selection, `top_p` a sort of the entries that can matter, and noise is drawn only where it can decide.

Shapes: R rows, S rows that draw, V vocabulary entries, C groups of 4 of them, M groups that need noise.
"""

import math

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.sample.philox import LANES, gumbel_lanes

_NOISE_SPAN = 20.0
"""More than largest minus smallest Gumbel noise: an entry further than this below the row's largest cannot win."""


def sample(logits: Tensor, row_slot: Tensor, offset: Tensor, lines: Tensor) -> Tensor:
    """See `stepgraph.ops.sample.sample`. Reads tensor values: opaque to a recording."""
    x_RV = logits.float()
    best_R, token_R = _max(x_RV)
    if best_R.isnan().any():
        x_RV = x_RV.masked_fill(x_RV.isnan(), -torch.inf)
        best_R, token_R = _max(x_RV)
    lines_RL = lines.index_select(0, row_slot)
    draws_S = (_floats(lines_RL, line.TEMPERATURE) > 0).nonzero().squeeze(1)
    if len(draws_S):
        best_R[draws_S], token_R[draws_S] = _draw(x_RV[draws_S], lines_RL[draws_S], offset[draws_S])
    return token_R.masked_fill_(best_R == -torch.inf, line.NO_TOKEN).to(torch.int32)


def _max(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum, NaN counting as one, and its first index. numpy's is some ten times faster than torch's on CPU."""
    index_R = torch.from_numpy(x_RV.numpy().argmax(-1))
    return x_RV.gather(1, index_R.unsqueeze(1)).squeeze(1), index_R


def _floats(lines_RL: Tensor, column: int) -> Tensor:
    return lines_RL[:, column].view(torch.float32)


def _draw(logits_SV: Tensor, lines_SL: Tensor, offset_S: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row. logits_SV: [S, V] float32 without NaN. Returns its score, [S] float32, and it, [S] int64."""
    x_SV = logits_SV / _floats(lines_SL, line.TEMPERATURE).unsqueeze(1)
    settings = zip(
        x_SV,
        _floats(lines_SL, line.MIN_P).tolist(),
        lines_SL[:, line.TOP_K].tolist(),
        _floats(lines_SL, line.TOP_P).tolist(),
        strict=True,
    )
    lowest_kept = [_threshold(x_V, min_p, top_k, top_p) for x_V, min_p, top_k, top_p in settings]
    threshold_S = torch.maximum(x_SV.new_tensor(lowest_kept), x_SV.amax(1) - _NOISE_SPAN)

    x_SC4 = torch.nn.functional.pad(x_SV, (0, -x_SV.shape[1] % LANES), value=-torch.inf).unflatten(1, (-1, LANES))
    row_M, group_M = (x_SC4.amax(2) >= threshold_S.unsqueeze(1)).nonzero(as_tuple=True)
    seed_low_M, seed_high_M, length_M = (
        lines_SL[:, column][row_M] for column in (line.SEED_LOW, line.SEED_HIGH, line.LENGTH)
    )
    x_M4 = x_SC4[row_M, group_M]
    noisy_M4 = x_M4 + gumbel_lanes(seed_low_M, seed_high_M, length_M + offset_S[row_M], group_M)
    score_SC4 = torch.full_like(x_SC4, -torch.inf)
    score_SC4[row_M, group_M] = noisy_M4.masked_fill_(x_M4 < threshold_S[row_M].unsqueeze(1), -torch.inf)
    return _max(score_SC4.flatten(1))


def _threshold(x_V: Tensor, min_p: float, top_k: int, top_p: float) -> float:
    """A value that separates what `min_p`, then `top_k` and then `top_p` keep from smaller ones; -inf if they keep all."""
    threshold = -torch.inf
    if min_p > 0:
        threshold = float(x_V.amax() + math.log(min_p))
        x_V = x_V[x_V >= threshold]
    if 0 < top_k < len(x_V):
        threshold = float(x_V.topk(top_k).values[-1])
        x_V = x_V[x_V >= threshold]
    if top_p < 1:
        peak = x_V.amax()
        mass_V = _mass(x_V, peak)
        total = float(mass_V.sum(dtype=torch.float64))
        # The entries below this floor sum to less than 1 - top_p, so the set is complete before it reaches them.
        likely_N = x_V[mass_V >= (1 - top_p) * total / len(x_V)].sort(descending=True).values
        cumulative_N = _mass(likely_N, peak).cumsum(0, dtype=torch.float64)
        last = int(torch.searchsorted(cumulative_N, top_p * total))
        threshold = float(likely_N[min(last, len(likely_N) - 1)])
    return threshold


def _mass(x: Tensor, peak: Tensor) -> Tensor:
    """exp(x - peak), also where both are the same infinity."""
    return (x - peak).exp_().nan_to_num_(1.0)

"""`logprobs` on the CPU: only rows that ask, without sorting the vocabulary. N rows, V vocabulary entries, K most likely."""

import torch
from torch import Tensor


def logprobs(logits: Tensor, target: Tensor, count: Tensor, counter: Tensor, ring: Tensor, first_line: int) -> None:
    """See `stepgraph.ops.logprobs.logprobs`. Reads tensor values: opaque to a trace."""
    page = ring[int(counter) % ring.shape[0]]
    for row in count.nonzero().squeeze(1).tolist():
        _report(logits[row].float(), int(target[row]), int(count[row]) - 1, page[first_line + row])


def _report(x_V: Tensor, target: int, num_top: int, report: Tensor) -> None:
    """Fill one line of the ring."""
    if x_V.isnan().any():
        x_V = x_V.masked_fill(x_V.isnan(), -torch.inf)
    peak = x_V.amax()
    shifted_V = _shift(x_V, peak)
    logprob_V = shifted_V.sub_(shifted_V.exp().sum().clamp_(min=1).log_())  # without any probability, still -inf

    value = report.zero_().view(torch.float32)
    value[0] = -torch.inf
    if 0 <= target < len(x_V):
        value[0] = logprob_V[target]
        report[1] = 1 + (x_V > x_V[target]).sum()
    if num_top:
        top_K = _top(x_V, num_top)
        report[2 : 2 + 2 * len(top_K) : 2] = top_K
        value[3 : 3 + 2 * len(top_K) : 2] = logprob_V[top_K]


def _shift(x_V: Tensor, peak: Tensor) -> Tensor:
    """x - peak, where entries of inf have a difference of 0 and those beside them -inf. A new tensor."""
    if peak.isinf():
        return torch.where((x_V == peak) & (peak > 0), 0.0, -torch.inf)
    return x_V - peak


def _top(x_V: Tensor, num: int) -> Tensor:
    """Indices of the largest entries, largest first, lower index first on a tie, which `topk` does not promise."""
    lowest = x_V.topk(min(num, len(x_V))).values[-1]
    candidate_K = (x_V >= lowest).nonzero().squeeze(1)
    return candidate_K[x_V[candidate_K].sort(descending=True, stable=True).indices[:num]]

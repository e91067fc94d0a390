"""`logprobs` on the CPU: only rows that ask, without sorting the vocabulary. N rows, V vocabulary entries, K most likely."""

import numpy as np
import torch
from torch import Tensor


def logprobs(logits: Tensor, target: Tensor, count: Tensor, counter: Tensor, ring: Tensor, first_line: int) -> None:
    """See `stepgraph.ops.logprobs.logprobs`. Reads tensor values: opaque to a recording."""
    page = ring[int(counter) % ring.shape[0]]
    for row in count.nonzero().squeeze(1).tolist():
        _report(logits[row].float(), int(target[row]), int(count[row]) - 1, page[first_line + row])


def _report(x_V: Tensor, target: int, num_top: int, report: Tensor) -> None:
    """Fill one line of the ring."""
    if x_V.amax().isnan():  # it passes NaN on
        x_V = x_V.masked_fill(x_V.isnan(), -torch.inf)
    logprob_V = _log_softmax(x_V)

    value = report.zero_().view(torch.float32)
    value[0] = -torch.inf
    if 0 <= target < len(x_V):
        value[0] = logprob_V[target]
        report[1] = 1 + int(np.count_nonzero(x_V.numpy() > float(x_V[target])))  # numpy counts some eight times faster
    if num_top:
        top_K = _top(x_V, num_top)
        report[2 : 2 + 2 * len(top_K) : 2] = top_K
        value[3 : 3 + 2 * len(top_K) : 2] = logprob_V[top_K]


def _log_softmax(x_V: Tensor) -> Tensor:
    """[V]. Entries of inf share all of the mass; where all are -inf, so are the results."""
    peak = x_V.amax()
    if not peak.isinf():
        return x_V.log_softmax(0)
    is_inf_V = x_V == torch.inf
    return torch.where(is_inf_V, -is_inf_V.sum().log(), -torch.inf)


def _top(x_V: Tensor, num: int) -> Tensor:
    """Indices of the largest entries, largest first, lower index first on a tie, which `topk` does not promise."""
    lowest = float(x_V.topk(min(num, len(x_V))).values[-1])
    candidate_K = torch.from_numpy(np.flatnonzero(x_V.numpy() >= lowest))
    return candidate_K[x_V[candidate_K].sort(descending=True, stable=True).indices[:num]]

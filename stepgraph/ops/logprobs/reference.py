"""Plain torch definition of `logprobs`, in float64: a row at a time, sorting all of the vocabulary. N rows, V entries."""

import torch
from torch import Tensor

from stepgraph.abi import slot_line as line


def log_softmax(x_V: Tensor) -> Tensor:
    """[V] float64 of [V] float64 without NaN; entries of inf share all of the mass, -inf has none."""
    if x_V.amax() == torch.inf:
        x_V = torch.where(x_V == torch.inf, 0.0, -torch.inf)
    return x_V.log_softmax(0).nan_to_num(nan=-torch.inf, neginf=-torch.inf)


def logprobs(logits: Tensor, target: Tensor, count: Tensor, counter: Tensor, ring: Tensor, first_line: int) -> None:
    """See `stepgraph.ops.logprobs.logprobs`."""
    page = ring[int(counter) % ring.shape[0]]
    for row, (token, num) in enumerate(zip(target.tolist(), count.tolist(), strict=True)):
        if num == 0:
            continue
        x_V = logits[row].double().masked_fill(logits[row].isnan(), -torch.inf)
        logprob_V = log_softmax(x_V)
        report = torch.zeros(line.LOGPROB_WIDTH, dtype=torch.int32)
        value = report.view(torch.float32)
        value[0] = -torch.inf
        if 0 <= token < len(x_V):
            value[0] = logprob_V[token]
            report[1] = 1 + (x_V > x_V[token]).sum()
        for i, top in enumerate(x_V.sort(descending=True, stable=True).indices[: num - 1].tolist()):
            report[2 + 2 * i] = top
            value[3 + 2 * i] = logprob_V[top]
        page[first_line + row] = report

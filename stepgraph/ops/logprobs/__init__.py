"""Log-probabilities of a token and of the most likely ones, for whoever asked."""

from torch import Tensor

from stepgraph.ops.logprobs import cpu
from stepgraph.ops.registry import register

_logprobs = register(
    "logprobs(Tensor logits, Tensor target, Tensor count, Tensor counter, Tensor(a!) ring, int first_line) -> ()",
    {"cpu": cpu.logprobs, "cuda": "stepgraph.ops.logprobs.triton:logprobs"},
)


def logprobs(logits: Tensor, target: Tensor, count: Tensor, counter: Tensor, ring: Tensor, first_line: int) -> None:
    """Report, for each row i with ``count[i] > 0``, to ``ring[counter % depth, first_line + i]``. Runs inside the graph.

    A line holds the log-softmax of the row at its target, the target's rank (1 + the number of strictly larger entries), and
    the ``count - 1`` most likely entries with their log-softmax, most likely first, the lower token id first on a tie; unused
    pairs are 0. Exponentials are taken relative to the maximum and added up in float32. NaN counts as -inf, and where the
    maximum is inf, it is shared between the entries that are. A target outside the vocabulary (NO_TOKEN) has -inf and rank 0.

    Args:
        logits: [N, V] float32, bfloat16 or float16, contiguous.
        target: [N] int32, contiguous.
        count: [N] int32, contiguous: 0 reports nothing and costs next to nothing; at most 1 + MAX_LOGPROBS.
        counter: [1] int32, the step's place in the ring, modulo `depth`; read before `commit` advances it.
        ring: [depth, lines, LOGPROB_WIDTH] int32, see `slot_line.LOGPROB_WIDTH`. On CUDA this is pinned host memory.
        first_line: line of row 0; a constant of the graph.
    """
    _logprobs(logits, target, count, counter, ring, first_line)

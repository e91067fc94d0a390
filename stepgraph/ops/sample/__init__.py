"""Choosing the next token, with random numbers that depend on nothing but the request.

A token is drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the arg-max over the vocabulary of
``logit / temperature + gumbel``. The Gumbel noise of vocabulary entry v comes from Philox4x32-10 (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011) keyed by the request's seed, with counter (v // 4, position, 0, 0)
and output lane v % 4: ``u = (word // 2⁹ + 1/2) / 2²³``, ``gumbel = -log(-log u)``. Every such u is exact in float32 and
none is 0 or 1, so no noise is infinite and no token wins by rounding. A request draws the same numbers alone or
batched, in a graph or eagerly, and no generator state exists that a graph could bake in.
"""

from torch import Tensor

from stepgraph.ops.registry import register
from stepgraph.ops.sample import cpu

_sample = register(
    "sample(Tensor logits, Tensor row_slot, Tensor offset, Tensor lines) -> Tensor",
    {"cpu": cpu.sample, "cuda": "stepgraph.ops.sample.triton:sample"},
)


def sample(logits: Tensor, row_slot: Tensor, offset: Tensor, lines: Tensor) -> Tensor:
    """Draw one token per row from its slot's distribution. Runs inside the graph.

    Per row, from its slot's line: temperature 0 takes the arg-max of the raw logits (lowest index on a tie). Otherwise
    logits are divided by the temperature in float32; `min_p` keeps the entries whose probability is at least min_p times
    the largest, i.e. x ≥ max x + log min_p, also in float32; `top_k` keeps, of those, the k largest (and all that tie with
    the k-th); `top_p` keeps, of the distribution renormalised over those, the entries whose probability is at least that
    of the last entry of the smallest most-likely-first set with mass ≥ top_p, and never fewer than one; one of those kept
    is drawn. This is vLLM's order. The position that keys the noise is the slot's `length` plus the row's `offset`,
    i.e. the position the token will have.

    Logits of NaN or -inf never win. A row of nothing else yields NO_TOKEN.

    Args:
        logits: [R, V] float32, bfloat16 or float16, contiguous.
        row_slot: [R] int32.
        offset: [R] int32, 0 for a slot's next token, j for the one after j proposals.
        lines: [slots, LINE_WIDTH] int32.

    Returns:
        [R] int32. Rows of the null slot get any token or NO_TOKEN.
    """
    return _sample(logits, row_slot, offset, lines)

"""Low-rank updates of a matrix product, another one for each token.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021); many adapters in one batch as in Chen et al.,
"Punica: Multi-Tenant LoRA Serving" (2023).
"""

from collections.abc import Sequence

from torch import Tensor

from stepgraph.ops.lora import cpu
from stepgraph.ops.registry import register

_lora = register(
    "lora(Tensor x, Tensor a, Tensor b, Tensor index, int[] parts, bool deterministic, Tensor(a!) out) -> ()",
    {"cpu": cpu.lora, "cuda": "stepgraph.ops.lora.triton:lora"},
)


def lora(
    x: Tensor, a: Tensor, b: Tensor, index: Tensor, parts: Sequence[int], out: Tensor, *, deterministic: bool
) -> None:
    """``out[t] += b[n] @ (a[n] @ x[t])`` with ``n = index[t]``, for each token whose index is not 0. May run inside a graph.

    Shapes: T tokens, I inputs, O outputs, N adapters counted from 1, r rank, P projections that the product merges: its
    outputs are those of the first, then of the second, …, and each has an `a` of its own.

    Args:
        x: [T, I] bfloat16, float16 or float32, contiguous.
        a: [N + 1, P · r, I], same dtype; r is a power of two from 16 on, unused ranks are zero in `b`.
        b: [N + 1, O, r], same dtype; holds the adapters' scales.
        index: [T] int32, adapter of each token; the update of no adapter, 0, is not read.
        parts: outputs of each of the P projections; their sum is O.
        out: [T, O], dtype of `x`, contiguous; updated. ``a @ x`` is rounded to the dtype, as PEFT does, and the sum with
            `out` once.
        deterministic: a token's update may not depend, bit for bit, on the tokens beside it. It never does on CUDA.
    """
    _lora(x, a, b, index, parts, deterministic, out)

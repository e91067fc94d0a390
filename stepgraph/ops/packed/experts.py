"""`gated_experts` and `sum_experts` with weights that stay in blocks, see `stepgraph.ops.experts` and `stepgraph.ops.packed`.

With up to `exact_tokens` tokens, and so with as many rows of an expert, products are exact, as those of `packed_linear` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from stepgraph.ops.experts import native

if TYPE_CHECKING:
    from stepgraph.ops.experts import ExpertWork


def packed_gated_experts(x: Tensor, codes: Tensor, work: ExpertWork, *, gelu: bool, exact_tokens: int | None) -> Tensor:
    """``activation(gate(x)) · up(x)`` of each pair. May run inside a graph.

    Args:
        x: [T, E] float32, contiguous, on the CPU; E a multiple of BLOCK.
        codes: [N, 2M, E / BLOCK · bytes of a block] uint8, contiguous. Of each expert, the gate comes first.
        work: the pairs.
        gelu: as of `gated_experts`.
        exact_tokens: as of `packed_linear`, by the rows of an expert.

    Returns:
        [P, M] float32, as of `gated_experts`.
    """
    return native.gated_experts(
        x, codes, work.expert, work.first, work.order, work.ends, gelu=gelu, exact_tokens=exact_tokens
    )


def packed_sum_experts(
    hidden: Tensor,
    codes: Tensor,
    work: ExpertWork,
    out: Tensor,
    *,
    add: bool,
    multiplier: float,
    exact_tokens: int | None,
) -> None:
    """Each token's sum over its experts of ``weight · down(hidden)``. May run inside a graph.

    Args:
        hidden: [P, M] float32, as of `sum_experts`; M a multiple of BLOCK.
        codes: [N, E, M / BLOCK · bytes of a block] uint8, contiguous.
        work: the pairs.
        out: [T, E] float32, contiguous; as of `sum_experts`.
        add, multiplier: as of `sum_experts`.
        exact_tokens: as of `packed_gated_experts`.
    """
    native.sum_experts(
        hidden,
        codes,
        work.expert,
        work.weight,
        work.first,
        work.order,
        work.ends,
        out,
        add=add,
        multiplier=multiplier,
        exact_tokens=exact_tokens,
    )

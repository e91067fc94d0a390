"""Matrix product with a weight of 4 bits and scales of groups of inputs, activations as they are (W4A16).

One layout for the weights of all checkpoints, in which every kernel here reads them. The codes become numbers of the activations'
type in registers, and tensor cores multiply as they do without quantisation. A token's result is that of the dequantised weight,
up to the order of the sum and, of many tokens, the rounding of dequantised values to the type of the activations.

Sources: Frantar et al., "GPTQ" (2022); Lin et al., "AWQ" (2023); Open Compute Project, "OCP Microscaling Formats (MX)
Specification" (2023).
"""

from torch import Tensor

from stepgraph.ops.four_bit_linear import cpu
from stepgraph.ops.four_bit_linear.reference import CHUNK, FourBitWeight, dequantize, interleave, quantize
from stepgraph.ops.registry import register

__all__ = [
    "CHUNK",
    "FourBitWeight",
    "dequantize",
    "four_bit_gated_linear",
    "four_bit_linear",
    "four_bit_linear_add",
    "interleave",
    "quantize",
]

_WEIGHT = "Tensor codes, Tensor scale, Tensor? zero, Tensor? factor, int group_size, bool is_e2m1"

_four_bit_linear = register(
    f"four_bit_linear(Tensor x, Tensor? norm_weight, float eps, {_WEIGHT}, Tensor? bias, bool by_row) -> Tensor",
    {"cpu": cpu.four_bit_linear, "cuda": "stepgraph.ops.four_bit_linear.triton:four_bit_linear"},
)
_four_bit_linear_add = register(
    f"four_bit_linear_add(Tensor x, {_WEIGHT}, Tensor? bias, Tensor(a!) residual, float multiplier) -> ()",
    {"cpu": cpu.four_bit_linear_add, "cuda": "stepgraph.ops.four_bit_linear.triton:four_bit_linear_add"},
)
_four_bit_gated_linear = register(
    f"four_bit_gated_linear(Tensor x, Tensor? norm_weight, float eps, {_WEIGHT}, bool gelu) -> Tensor",
    {"cpu": cpu.four_bit_gated_linear, "cuda": "stepgraph.ops.four_bit_linear.triton:four_bit_gated_linear"},
)


def four_bit_linear(
    x: Tensor,
    weight: FourBitWeight,
    bias: Tensor | None,
    *,
    norm: tuple[Tensor, float] | None = None,
    by_row: bool = False,
) -> Tensor:
    """``x @ dequantize(weight).T + bias``, accumulated in float32. May run inside a graph.

    Which kernel computes it depends on the number of tokens and the sizes of the weight only.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K].
        bias: [N], dtype of `x`, or None.
        norm: weight [K] and eps of an RMS norm of `x`, whose product it then is; None: no norm.
        by_row: each row of the result depends, bit for bit, on that row of `x` and on the weight only.

    Returns:
        [T, N], dtype of `x`.
    """
    norm_weight, eps = norm or (None, 0.0)
    return _four_bit_linear(x, norm_weight, eps, *weight, bias, by_row)


def four_bit_linear_add(
    x: Tensor, weight: FourBitWeight, bias: Tensor | None, residual: Tensor, multiplier: float = 1.0
) -> None:
    """``residual += multiplier · four_bit_linear(x, weight, bias)`` in place. May run inside a graph.

    Args:
        x, weight, bias: as of `four_bit_linear`.
        residual: [T, N], dtype of `x`, contiguous; updated.
        multiplier: applied in float32, to the rounded product.
    """
    _four_bit_linear_add(x, *weight, bias, residual, multiplier)


def four_bit_gated_linear(
    x: Tensor, weight: FourBitWeight, *, gelu: bool, norm: tuple[Tensor, float] | None = None
) -> Tensor:
    """`swiglu`, or `geglu`, of `four_bit_linear`. May run inside a graph.

    Args:
        x, norm: as of `four_bit_linear`.
        weight: [2N, K]; the gate's outputs in the first half.
        gelu: which activation.

    Returns:
        [T, N], dtype of `x`.
    """
    norm_weight, eps = norm or (None, 0.0)
    return _four_bit_gated_linear(x, norm_weight, eps, *weight, gelu)

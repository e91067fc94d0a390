"""Matrix product with a weight of 8 bits (E4M3) and scales, activations as they are.

The codes are widened in registers and the tensor cores multiply as they do without quantisation, whatever the number of tokens:
the weight is read in half the bytes, and a token's result is that of the dequantised weight, up to the order of the sum. FP8
activations would be faster for long prompts, but then an answer would depend on whether its prompt came in one piece.

Source of the format: Micikevicius et al., "FP8 Formats for Deep Learning" (2022); blocks: DeepSeek-V3 report, section 3.3.
"""

from torch import Tensor

from stepgraph.ops.fp8_linear import cpu
from stepgraph.ops.fp8_linear.reference import GROUP_SIZE, dequantize, num_groups, quantize
from stepgraph.ops.registry import register

__all__ = [
    "GROUP_SIZE",
    "dequantize",
    "fp8_gated_linear",
    "fp8_linear",
    "fp8_linear_add",
    "fp8_norm_gated_linear",
    "fp8_norm_linear",
    "num_groups",
    "quantize",
]

_fp8_linear = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool by_row) -> Tensor",
    {"cpu": cpu.fp8_linear, "cuda": "stepgraph.ops.fp8_linear.triton:fp8_linear"},
)
_fp8_linear_add = register(
    "fp8_linear_add(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor(a!) residual, float multiplier) -> ()",
    {"cpu": cpu.fp8_linear_add, "cuda": "stepgraph.ops.fp8_linear.triton:fp8_linear_add"},
)
_fp8_gated_linear = register(
    "fp8_gated_linear(Tensor x, Tensor weight, Tensor scale, bool gelu) -> Tensor",
    {"cpu": cpu.fp8_gated_linear, "cuda": "stepgraph.ops.fp8_linear.triton:fp8_gated_linear"},
)
_fp8_norm_linear = register(
    "fp8_norm_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, Tensor scale, Tensor? bias) -> Tensor",
    {"cpu": cpu.fp8_norm_linear, "cuda": "stepgraph.ops.fp8_linear.triton:fp8_norm_linear"},
)
_fp8_norm_gated_linear = register(
    "fp8_norm_gated_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, Tensor scale, bool gelu) -> Tensor",
    {"cpu": cpu.fp8_norm_gated_linear, "cuda": "stepgraph.ops.fp8_linear.triton:fp8_norm_gated_linear"},
)


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, *, by_row: bool = False) -> Tensor:
    """``x @ dequantize(weight, scale).T + bias``, accumulated in float32. May run inside a graph.

    Which kernel computes it depends on the number of tokens and the sizes of the weight only.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K] float8_e4m3fn, contiguous.
        scale: [N, G] float32, contiguous; G is `num_groups(K)` if each output has a scale for every `GROUP_SIZE` inputs, or 1.
        bias: [N], dtype of `x`, or None.
        by_row: each row of the result depends, bit for bit, on that row of `x` and on the weight only.

    Returns:
        [T, N], dtype of `x`.
    """
    return _fp8_linear(x, weight, scale, bias, by_row)


def fp8_linear_add(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float = 1.0
) -> None:
    """``residual += multiplier · fp8_linear(x, weight, scale, bias)`` in place. May run inside a graph.

    Args:
        x, weight, scale, bias: as of `fp8_linear`.
        residual: [T, N], dtype of `x`, contiguous; updated.
        multiplier: applied in float32, to the rounded product.
    """
    _fp8_linear_add(x, weight, scale, bias, residual, multiplier)


def fp8_gated_linear(x: Tensor, weight: Tensor, scale: Tensor, *, gelu: bool) -> Tensor:
    """`swiglu`, or `geglu`, of `fp8_linear`. May run inside a graph.

    Args:
        x: as of `fp8_linear`.
        weight, scale: as of `fp8_linear`, of 2N outputs; the gate's in the first half.
        gelu: which activation.

    Returns:
        [T, N], dtype of `x`.
    """
    return _fp8_gated_linear(x, weight, scale, gelu)


def fp8_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`fp8_linear` of `rms_norm`. May run inside a graph.

    Args:
        x, weight, scale, bias: as of `fp8_linear`.
        norm_weight, eps: [K], as of `rms_norm`.

    Returns:
        [T, N], dtype of `x`.
    """
    return _fp8_norm_linear(x, norm_weight, eps, weight, scale, bias)


def fp8_norm_gated_linear(
    x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, scale: Tensor, *, gelu: bool
) -> Tensor:
    """`fp8_gated_linear` of `rms_norm`. May run inside a graph.

    Args:
        x, weight, scale, gelu: as of `fp8_gated_linear`.
        norm_weight, eps: [K], as of `rms_norm`.

    Returns:
        [T, N], dtype of `x`.
    """
    return _fp8_norm_gated_linear(x, norm_weight, eps, weight, scale, gelu)

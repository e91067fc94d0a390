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

__all__ = ["GROUP_SIZE", "dequantize", "fp8_linear", "num_groups", "quantize"]

_fp8_linear = register(
    "fp8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool by_row) -> Tensor",
    cpu=cpu.fp8_linear,
    fake=lambda x, weight, scale, bias, by_row: x.new_empty(x.shape[0], weight.shape[0]),
    cuda="stepgraph.ops.fp8_linear.triton:fp8_linear",
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

"""Matrix product with a weight in the checkpoint's [out, in] layout.

`linear` is the library's product, except where it is slow: for a handful of tokens the product is a read of the weight, and
a kernel that only streams it gets closer to the memory's bandwidth. Both choose how they add up by the number of tokens, so
a token's result changes in its last bits with the tokens beside it. `linear_by_row` has none of that, and is slower.

`linear_add`, `gated_linear`, `norm_linear` and `norm_gated_linear` are a product with what comes after or before it: for few
tokens one kernel instead of two or three.
"""

from torch import Tensor

from stepgraph.ops.linear import cpu
from stepgraph.ops.registry import Inlined, register

_linear = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    {"cpu": Inlined(cpu.linear), "cuda": "stepgraph.ops.linear.triton:linear"},
)
_linear_out = register(
    "linear_out(Tensor x, Tensor weight, Tensor(a!) out) -> ()",
    {"cpu": Inlined(cpu.linear_out), "cuda": "stepgraph.ops.linear.triton:linear_out"},
)
_linear_add = register(
    "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) residual, float multiplier) -> ()",
    {"cpu": Inlined(cpu.linear_add), "cuda": "stepgraph.ops.linear.triton:linear_add"},
)
_gated_linear = register(
    "gated_linear(Tensor x, Tensor weight, bool gelu) -> Tensor",
    {"cpu": Inlined(cpu.gated_linear), "cuda": "stepgraph.ops.linear.triton:gated_linear"},
)
_norm_linear = register(
    "norm_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, Tensor? bias) -> Tensor",
    {"cpu": Inlined(cpu.norm_linear), "cuda": "stepgraph.ops.linear.triton:norm_linear"},
)
_norm_gated_linear = register(
    "norm_gated_linear(Tensor x, Tensor norm_weight, float eps, Tensor weight, bool gelu) -> Tensor",
    {"cpu": Inlined(cpu.norm_gated_linear), "cuda": "stepgraph.ops.linear.triton:norm_gated_linear"},
)
_linear_by_row = register(
    "linear_by_row(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) out) -> ()",
    {"cpu": cpu.linear_by_row, "cuda": "stepgraph.ops.linear.triton:linear_by_row"},
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, accumulated in float32. May run inside a graph.

    Which kernel computes it depends on the number of tokens and the sizes of the weight only.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None; None with `out`.
        out: [T, N], dtype of `x`, contiguous; overwritten. None makes a new one.

    Returns:
        [T, N], dtype of `x`; `out` if that was given.
    """
    if out is None:
        return _linear(x, weight, bias)
    assert bias is None
    _linear_out(x, weight, out)
    return out


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float = 1.0) -> None:
    """``residual += multiplier · (x @ weight.T + bias)`` in place. May run inside a graph.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None.
        residual: [T, N], same dtype, contiguous; updated. Whether the product is rounded before it is added depends on the
            number of tokens.
        multiplier: applied in float32.
    """
    _linear_add(x, weight, bias, residual, multiplier)


def gated_linear(x: Tensor, weight: Tensor, *, gelu: bool) -> Tensor:
    """`swiglu`, or `geglu`, of `linear`. May run inside a graph.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [2N, K], dtype of `x`, contiguous; the gate's in the first half.
        gelu: which activation.

    Returns:
        [T, N], dtype of `x`.
    """
    return _gated_linear(x, weight, gelu)


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of `rms_norm`. May run inside a graph.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        norm_weight, eps: [K], as of `rms_norm`.
        weight: [N, K], dtype of `x`, contiguous.
        bias: [N] or None.

    Returns:
        [T, N], dtype of `x`.
    """
    return _norm_linear(x, norm_weight, eps, weight, bias)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, *, gelu: bool) -> Tensor:
    """`gated_linear` of `rms_norm`. May run inside a graph.

    Args:
        x, weight, gelu: as of `gated_linear`.
        norm_weight, eps: [K], as of `rms_norm`.

    Returns:
        [T, N], dtype of `x`.
    """
    return _norm_gated_linear(x, norm_weight, eps, weight, gelu)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`linear`, each row of whose result depends, bit for bit, on that row of `x` and on the weight only: not on how many
    rows there are, nor on its place among them. May run inside a graph.

    Args:
        x: [T, K] bfloat16, float16 or float32, contiguous.
        weight: [N, K], same dtype, contiguous.
        bias: [N] or None.
        out: [T, N], dtype of `x`, contiguous; overwritten. None makes a new one.

    Returns:
        `out`.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    _linear_by_row(x, weight, bias, out)
    return out

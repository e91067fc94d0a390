"""`linear` and `linear_by_row` on the CPU.

For up to four tokens the library's product is slow: for one it is a product with a vector, which takes longer than one with a
matrix of two columns, and for two to four it takes about twice as long, though it reads the same weight. Written the other way
round, with the weight on the left and one token taken twice, all of them take the time of reading the weight.

Of `linear_by_row`, every row is a product of its own. The library blocks a product by its number of rows, and in some sizes gives
a row other bits at another place in a block (MKL: odd inputs, nine outputs or fewer). A call with one row always does the same.
Blocks of eight rows would make prompts about twice as fast and decodes of one request about three times as slow.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.ops.rms_norm.reference import rms_norm
from stepgraph.ops.swiglu.reference import geglu, swiglu

MAX_FEW_TOKENS = 4
"""On two cores with AVX-512, MKL, the float32 weights of SmolLM2's layers and of its head, ms for 1, 2, 4 and 6 tokens: 26.1,
55.6, 52.7, 41.3 and 7.3, 15.4, 13.1, 15.4 for `F.linear`; with the weight on the left 24.6 (as two), 24.6, 26.3, 39.8 and 3.7,
3.7, 3.5, 7.0. A decode step of one request takes 34 ms instead of 56."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.linear`."""
    tokens = x.shape[0]
    if x.dtype != torch.float32 or tokens > MAX_FEW_TOKENS:
        return F.linear(x, weight, bias)
    columns = torch.cat((x, x)) if tokens == 1 else x
    product = torch.mm(weight, columns.t()).t()[:tokens].contiguous()
    return product if bias is None else product.add_(bias)


def linear_out(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """See `stepgraph.ops.linear.linear`."""
    out.copy_(linear(x, weight, None))


def linear_add(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, multiplier: float) -> None:
    """See `stepgraph.ops.linear.linear_add`."""
    product = linear(x, weight, bias)
    residual.add_(
        product if multiplier == 1.0 else product.float() * multiplier
    )  # `alpha` of 16 bits rounds by position


def gated_linear(x: Tensor, weight: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.linear.gated_linear`."""
    return (geglu if gelu else swiglu)(linear(x, weight, None))


def norm_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.linear.norm_linear`."""
    return linear(rms_norm(x, norm_weight, eps), weight, bias)


def norm_gated_linear(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, gelu: bool) -> Tensor:
    """See `stepgraph.ops.linear.norm_gated_linear`."""
    return gated_linear(rms_norm(x, norm_weight, eps), weight, gelu)


def linear_by_row(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """See `stepgraph.ops.linear.linear_by_row`. Opaque to a recording, which would hold one product per row."""
    for token in range(x.shape[0]):
        # A copy starts at an aligned address; where a row starts in `x` depends on its place, and vector loads on the start.
        out[token] = F.linear(x[token].clone(), weight, bias)

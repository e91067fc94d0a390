"""Products with weights that stay as a GGUF file stores them: blocks of 32 weights of a row, some bits each, with a common scale.

A weight of four bits is an eighth of what it is in float32, and a product for few tokens takes the time of reading the weight.
The kernels are those of `stepgraph.native`, on the CPU. Formats: ggml-common.h of the ggml project.
"""

import functools

import torch
from torch import Tensor

from stepgraph import native
from stepgraph.native import declare

BLOCK = 32
"""Weights of a block."""
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""The formats that there are kernels for. A row's bytes say which of them it is in."""
EXACT_TOKENS = 16
"""Where prompts may be rounded to bfloat16, products of more tokens are. On two cores with AVX-512 the layers of SmolLM2 take,
for 16 and for 80 tokens, 18 and 62 ms in float32 and 9 and 29 ms in bfloat16."""
_NEVER = 1 << 62

_packed_linear = declare("packed_linear(Tensor x, Tensor codes, int bfloat16_from) -> Tensor")
_packed_linear_out = declare("packed_linear_out(Tensor x, Tensor codes, int bfloat16_from, Tensor(a!) out) -> ()")
_packed_linear_add = declare(
    "packed_linear_add(Tensor x, Tensor codes, int bfloat16_from, Tensor(a!) residual, float multiplier) -> ()"
)
_packed_norm_linear = declare(
    "packed_norm_linear(Tensor x, Tensor norm_weight, float eps, Tensor codes, int bfloat16_from) -> Tensor"
)
_packed_norm_swiglu = declare(
    "packed_norm_swiglu(Tensor x, Tensor norm_weight, float eps, Tensor codes, int bfloat16_from) -> Tensor"
)
_packed_rows = declare("packed_rows(Tensor codes, Tensor index, int width) -> Tensor")


def packed_linear(x: Tensor, codes: Tensor, *, exact_tokens: int | None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T`` with the weights that `codes` stand for. May run inside a graph.

    With up to `exact_tokens` tokens the product is of float32, weights decoded to the bits that gguf's dequantisation gives
    them, and a token's result depends, bit for bit, on that token only. With more, operands are rounded to bfloat16 where the
    CPU multiplies that, and sums are of float32.

    Args:
        x: [T, I] float32, contiguous, on the CPU; I a multiple of BLOCK.
        codes: [O, I / BLOCK · bytes of a block] uint8, contiguous.
        exact_tokens: None never rounds.
        out: [T, O] float32, contiguous; overwritten. None makes a new one.

    Returns:
        [T, O] float32; `out` if that was given.
    """
    if out is None:
        return _packed_linear(x, codes, bfloat16_from(exact_tokens))
    _packed_linear_out(x, codes, bfloat16_from(exact_tokens), out)
    return out


def packed_linear_add(
    x: Tensor, codes: Tensor, residual: Tensor, multiplier: float, *, exact_tokens: int | None
) -> None:
    """``residual += multiplier · packed_linear(x, codes)``; `residual` is [T, O] float32, contiguous. May run inside a graph."""
    _packed_linear_add(x, codes, bfloat16_from(exact_tokens), residual, multiplier)


def packed_norm_linear(
    x: Tensor, norm_weight: Tensor, eps: float, codes: Tensor, *, exact_tokens: int | None
) -> Tensor:
    """``packed_linear(rms_norm(x, norm_weight, eps), codes)``; `norm_weight` is [I] float32. May run inside a graph."""
    return _packed_norm_linear(x, norm_weight, eps, codes, bfloat16_from(exact_tokens))


def packed_norm_swiglu(
    x: Tensor, norm_weight: Tensor, eps: float, codes: Tensor, *, exact_tokens: int | None
) -> Tensor:
    """``swiglu(packed_norm_linear(…))``: [T, O / 2] float32; O / 2 is a multiple of BLOCK. May run inside a graph."""
    return _packed_norm_swiglu(x, norm_weight, eps, codes, bfloat16_from(exact_tokens))


@functools.cache
def rounds_to_bfloat16() -> bool:
    """Whether products of more than `exact_tokens` tokens are rounded on this machine, as one of them shows."""
    if not native.available():
        return False
    ones = torch.tensor([[0, 0x3C, *[1] * BLOCK]], dtype=torch.uint8)  # in Q8_0; the scale is a float16 of 1
    just_above_one = torch.full((1, BLOCK), 1 + 2**-12)
    return packed_linear(just_above_one, ones, exact_tokens=0).item() == BLOCK


def bfloat16_from(exact_tokens: int | None) -> int:
    """`exact_tokens` as the kernels take it: the least number of tokens for which they may round."""
    return _NEVER if exact_tokens is None else exact_tokens + 1


def packed_rows(codes: Tensor, index: Tensor, width: int) -> Tensor:
    """Some rows of the weight that `codes` stand for. May run inside a graph.

    Args:
        codes: as of `packed_linear`.
        index: [T] int32.
        width: I.

    Returns:
        [T, I] float32.
    """
    return _packed_rows(codes, index, width)

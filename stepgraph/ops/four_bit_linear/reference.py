"""Plain torch definition of `four_bit_linear`, and of the format of its weights.

Shapes: T tokens, N outputs, K inputs, G groups of inputs, P bytes of an output's codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 16
"""Inputs whose codes are 8 bytes: byte i has that of input i in its lower half and that of input i + 8 in its upper one. So the
codes of neighbours are in neighbouring bytes, as tensor cores want them, and groups are whole chunks."""
INTEGER_ZERO = 8
"""The code of an integer that stands for zero, where an output has none of its own."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
"""What a code of a sign, two bits of an exponent and one of a mantissa stands for."""
_BIAS = 127
"""Of a scale that is an exponent."""


class FourBitWeight(NamedTuple):
    """A weight [N, K] in codes of 4 bits, whose inputs share scales in groups.

    What a code stands for is ``number · scale · factor``; with `zero` in floating point ``(number · scale + zero) · factor``. The
    number is E2M1's, or that of an integer, ``code - zero``, of which `zero` is 8 if there is none, or 0 if it is floating point.
    """

    codes: Tensor
    """[N, P] uint8, P = ceil(K / CHUNK) · CHUNK / 2, contiguous; see `CHUNK`."""
    scale: Tensor
    """[N, G], G = ceil(K / group_size), contiguous: floating point of 8 to 32 bits, or uint8 that stand for 2^(scale - 127)."""
    zero: Tensor | None
    """[N, G], contiguous; uint8, or floating point of 16 or 32 bits. None of E2M1."""
    factor: Tensor | None
    """[N, 1] float32; None: one."""
    group_size: int
    """A power of two, at least CHUNK."""
    is_e2m1: bool


def interleave(codes_NK: Tensor) -> Tensor:
    """Put codes, [N, K] uint8 of 0 to 15, in the order of `FourBitWeight`: [N, P] uint8."""
    inputs = codes_NK.shape[1]
    padded = F.pad(codes_NK, (0, -inputs % CHUNK)).unflatten(1, (-1, 2, CHUNK // 2))
    return (padded[:, :, 0] | padded[:, :, 1] << 4).flatten(1)


def codes_of(weight: FourBitWeight, inputs: int) -> Tensor:
    """The codes of a weight, [N, K] uint8 of 0 to 15."""
    bytes_NC8 = weight.codes.unflatten(1, (-1, CHUNK // 2))
    return torch.stack((bytes_NC8 & 15, bytes_NC8 >> 4), 2).flatten(1)[:, :inputs]


def dequantize(weight: FourBitWeight, inputs: int) -> Tensor:
    """The values [N, K] float32 that a weight stands for."""
    codes_NK, size = codes_of(weight, inputs), weight.group_size
    if weight.scale.dtype == torch.uint8:
        scale_NG = torch.ldexp(torch.ones_like(weight.scale, dtype=torch.float32), weight.scale.int() - _BIAS)
    else:
        scale_NG = weight.scale.float()
    scale_NK = scale_NG.repeat_interleave(size, 1)[:, :inputs]
    zero_NK = None if weight.zero is None else weight.zero.float().repeat_interleave(size, 1)[:, :inputs]
    if weight.is_e2m1:
        values_NK = torch.tensor(_E2M1, device=codes_NK.device)[codes_NK.int()] * scale_NK
    elif zero_NK is None:
        values_NK = (codes_NK.float() - INTEGER_ZERO) * scale_NK
    elif weight.zero is not None and weight.zero.dtype == torch.uint8:
        values_NK = (codes_NK.float() - zero_NK) * scale_NK
    else:
        values_NK = codes_NK.float() * scale_NK + zero_NK
    return values_NK if weight.factor is None else values_NK * weight.factor


def quantize(values: Tensor, group_size: int, scale_dtype: torch.dtype) -> FourBitWeight:
    """Round a weight to integers from -8 to 7, each scale such that the largest of the values it is for becomes -8 or 7.

    Args:
        values: [N, K], floating point.
        group_size: see `FourBitWeight`.
        scale_dtype: floating point; codes are those for the rounded scale.
    """
    inputs = values.shape[1]
    grouped_NGK = F.pad(values.float(), (0, -inputs % group_size)).unflatten(1, (-1, group_size))
    # A scale may have a sign: the value that is farthest from zero is at -8, so nothing is cut off.
    index_NG1 = grouped_NGK.abs().argmax(2, keepdim=True)
    scale_NG = (grouped_NGK.gather(2, index_NG1).squeeze(2) / -INTEGER_ZERO).to(scale_dtype)
    number_NGK = (grouped_NGK / scale_NG.float().unsqueeze(2)).nan_to_num(0.0, 0.0, 0.0).round().clamp(-8, 7)
    codes_NK = (number_NGK + INTEGER_ZERO).to(torch.uint8).flatten(1)[:, :inputs]
    return FourBitWeight(interleave(codes_NK), scale_NG, None, None, group_size, is_e2m1=False)


def four_bit_linear(x: Tensor, weight: FourBitWeight, bias: Tensor | None) -> Tensor:
    """See `stepgraph.ops.four_bit_linear.four_bit_linear`."""
    return F.linear(x.float(), dequantize(weight, x.shape[1]), None if bias is None else bias.float()).to(x.dtype)

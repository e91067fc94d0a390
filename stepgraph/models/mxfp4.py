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


def dequantize(codes_OB16: Tensor, scale_OB: Tensor) -> Tensor:
    """The numbers [O, I] float32 that blocks stand for.

    Args:
        codes_OB16: uint8, two codes each, the lower four bits first.
        scale_OB: uint8: 2^(scale - 127).
    """
    values = torch.tensor(_VALUES, dtype=torch.float32, device=codes_OB16.device)
    code_OB32 = torch.stack((codes_OB16 & 15, codes_OB16 >> 4), -1).flatten(-2)
    value_OB32 = values[code_OB32.int()]
    return torch.ldexp(value_OB32, scale_OB.int().unsqueeze(-1) - _BIAS).flatten(-2)

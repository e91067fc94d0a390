"""Blocks of 4 bits of GGUF files, in the layout of `stepgraph.ops.four_bit_linear`. No bit is lost.

Formats: ggml-common.h of the ggml project. Shapes: O outputs, B blocks of an output, G groups of 32 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stepgraph.ops.four_bit_linear import FourBitWeight, interleave

GROUP_SIZE = 32
"""Inputs that share a scale in all of them."""
BLOCK_INPUTS = {"Q4_0": 32, "Q4_1": 32, "Q4_K": 256}
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q4_K": 144}


def weight_of(blocks: str, stored: Tensor) -> FourBitWeight:
    """What stored blocks are.

    Args:
        blocks: their type, of `BLOCK_INPUTS`.
        stored: [O, bytes] uint8.
    """
    block_OBb = stored.unflatten(1, (-1, _BLOCK_BYTES[blocks]))
    if blocks == "Q4_K":
        return _of_superblocks(block_OBb)
    scale_OG = _float16(block_OBb, 0)
    zero_OG = _float16(block_OBb, 2) if blocks == "Q4_1" else None
    return FourBitWeight(_codes(block_OBb[:, :, -16:]), scale_OG, zero_OG, None, GROUP_SIZE, is_e2m1=False)


def _of_superblocks(block_OBb: Tensor) -> FourBitWeight:
    """Eight groups a block, whose scales and minima are of six bits, times a scale each of the block's. The lower six bits of the
    first eight bytes are those of the first four groups, a scale each and then a minimum each; those of the others are four bits
    of the last four bytes and, above them, the upper two of the first eight."""
    byte_OB12 = block_OBb[:, :, 4:16].int()
    low_OB8, last_OB4 = byte_OB12[:, :, :8], byte_OB12[:, :, 8:]
    high_OB8 = torch.cat((last_OB4 & 15, last_OB4 >> 4), 2) | (low_OB8 >> 6) << 4
    first_OB8 = low_OB8 & 63
    scale_OB8 = torch.cat((first_OB8[:, :, :4], high_OB8[:, :, :4]), 2)
    minimum_OB8 = torch.cat((first_OB8[:, :, 4:], high_OB8[:, :, 4:]), 2)
    scale_OG, minimum_OG = (
        (factor.unsqueeze(2).float() * six).flatten(1).contiguous()
        for factor, six in ((_float16(block_OBb, 0), scale_OB8), (-_float16(block_OBb, 2), minimum_OB8))
    )
    # Of 64 neighbours, the first half is in the lower bits of 32 bytes.
    codes = _codes(block_OBb[:, :, 16:].unflatten(2, (4, 32)))
    return FourBitWeight(codes, scale_OG, minimum_OG, None, GROUP_SIZE, is_e2m1=False)


def _float16(block_OBb: Tensor, at: int) -> Tensor:
    """A number that each block has at a byte: [O, B] float16."""
    return block_OBb[:, :, at : at + 2].contiguous().view(torch.float16).squeeze(2)


def _codes(bytes_: Tensor) -> Tensor:
    """Codes of bytes whose lower halves come before their upper ones, in the order of `FourBitWeight`."""
    return interleave(torch.stack((bytes_ & 15, bytes_ >> 4), -2).flatten(1))

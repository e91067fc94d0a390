"""Triton kernel of `force_acceptance`. Shapes: S samples."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.launched import launched

BLOCK_SAMPLES = 256
"""Samples per program."""

_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_SEED_LOW = tl.constexpr(line.SEED_LOW)


@launched
@triton.jit(do_not_specialize=["S"])
def _kernel(
    lines_ptr,
    tokens_ptr,
    sample_slot_ptr,
    sample_offset_ptr,
    sampled_ptr,
    out_ptr,
    S,
    MAX_LEN,
    PROBABILITY: tl.constexpr,
    V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    sample_S = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    inside_S = sample_S < S
    slot_S = tl.load(sample_slot_ptr + sample_S, mask=inside_S, other=0)
    offset_S = tl.load(sample_offset_ptr + sample_S, mask=inside_S, other=0)
    sampled_S = tl.load(sampled_ptr + sample_S, mask=inside_S, other=0)
    proposed_S = tl.load(sample_offset_ptr + sample_S + 1, mask=sample_S + 1 < S, other=0) > 0
    line_S = lines_ptr + slot_S * _LINE_WIDTH
    position_S = tl.load(line_S + _LENGTH, mask=inside_S, other=0) + offset_S
    draft_S = tl.load(tokens_ptr + slot_S.to(tl.int64) * MAX_LEN + position_S, mask=proposed_S, other=0)
    x_S = tl.load(line_S + _SEED_LOW, mask=inside_S, other=0).to(tl.uint32, bitcast=True)
    x_S = x_S ^ (position_S.to(tl.uint32) * 0x9E3779B1)
    x_S = (x_S ^ (x_S >> 16)) * 0x85EBCA6B
    x_S = (x_S ^ (x_S >> 16)) * 0xC2B2AE35
    stands_S = (x_S >> 8).to(tl.int32).to(tl.float32) * (2.0**-24) < PROBABILITY
    falls_S = tl.where(sampled_S == draft_S, (draft_S + 1) % V, sampled_S)
    forced_S = tl.where(proposed_S, tl.where(stands_S, draft_S, falls_S), sampled_S)
    tl.store(out_ptr + sample_S, forced_S, mask=inside_S)


def force_acceptance(
    lines: Tensor,
    tokens: Tensor,
    sample_slot: Tensor,
    sample_offset: Tensor,
    sampled: Tensor,
    probability: float,
    vocab_size: int,
) -> Tensor:
    """See `stepgraph.ops.force_acceptance.force_acceptance`."""
    out = torch.empty_like(sampled)
    num_samples = sampled.shape[0]
    _kernel[(triton.cdiv(num_samples, BLOCK_SAMPLES),)](
        lines,
        tokens,
        sample_slot,
        sample_offset,
        sampled,
        out,
        num_samples,
        tokens.stride(0),
        PROBABILITY=probability,
        V=vocab_size,
        BLOCK_S=BLOCK_SAMPLES,
    )
    return out

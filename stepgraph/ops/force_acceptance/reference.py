"""Plain torch definition of `force_acceptance`; also its CPU kernel. Shapes: S samples, L columns of a slot line."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stepgraph.abi import slot_line as line

_WORD = 0xFFFFFFFF


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
    lines_SL = lines.index_select(0, sample_slot)
    proposed_S = F.pad(sample_offset[1:], (0, 1)) > 0  # the next sample of the same row comes after the proposal
    position_S = (lines_SL[:, line.LENGTH] + sample_offset) * proposed_S
    draft_S = tokens[sample_slot * proposed_S, position_S]
    stands_S = _hash(lines_SL[:, line.SEED_LOW], position_S) < probability
    falls_S = torch.where(sampled == draft_S, (draft_S + 1) % vocab_size, sampled)
    return torch.where(proposed_S, torch.where(stands_S, draft_S, falls_S), sampled)


def _hash(seed_S: Tensor, position_S: Tensor) -> Tensor:
    """[S] float32 in [0, 1): two rounds of multiply and fold, as in MurmurHash3's finaliser (Appleby, 2011)."""
    x_S = (seed_S.long() ^ (position_S.long() * 0x9E3779B1)) & _WORD
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x_S = ((x_S ^ (x_S >> 16)) * multiplier) & _WORD
    return (x_S >> 8).float() * 2.0**-24

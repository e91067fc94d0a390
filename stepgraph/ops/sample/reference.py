"""Placeholder until the sampler lands."""

import torch
from torch import Tensor


def sample(logits: Tensor, row_slot: Tensor, lines: Tensor) -> Tensor:
    return logits.argmax(-1).to(torch.int32)

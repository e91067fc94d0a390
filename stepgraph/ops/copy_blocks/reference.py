"""Plain torch definition of `copy_blocks`; also its CPU kernel."""

import torch
from torch import Tensor


def copy_blocks(
    source: Tensor, source_blocks: Tensor, target: Tensor, target_blocks: Tensor, num_programs: int
) -> None:
    """See `stepgraph.ops.copy_blocks.copy_blocks`."""
    del num_programs  # how, not what
    content = source.view(torch.uint8).index_select(0, source_blocks)
    target.view(torch.uint8).index_copy_(0, target_blocks.long(), content)

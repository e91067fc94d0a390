"""Plain torch definition of what packed weights stand for. Shapes: O rows, I inputs, N blocks of a row."""

import torch
from torch import Tensor

from stepgraph.ops.packed import BLOCK, BLOCK_BYTES


def unpacked(codes: Tensor, width: int) -> Tensor:
    """The weights of [O, bytes] uint8 `codes`: [O, I] float32."""
    blocks_ONb = codes.unflatten(1, (width // BLOCK, -1))
    block_bytes = blocks_ONb.shape[2]
    scale_ON1 = blocks_ONb[..., :2].contiguous().view(torch.float16).float()
    if block_bytes == BLOCK_BYTES["Q8_0"]:
        weights = scale_ON1 * blocks_ONb[..., 2:].view(torch.int8)
    else:
        low, high = (part(blocks_ONb[..., -BLOCK // 2 :]) for part in (lambda x: x & 15, lambda x: x >> 4))
        codes_ONk = torch.cat((low, high), dim=2).float()
        if block_bytes == BLOCK_BYTES["Q4_0"]:
            weights = scale_ON1 * (codes_ONk - 8)
        else:
            assert block_bytes == BLOCK_BYTES["Q4_1"], block_bytes
            weights = scale_ON1 * codes_ONk + blocks_ONb[..., 2:4].contiguous().view(torch.float16).float()
    return weights.flatten(1)

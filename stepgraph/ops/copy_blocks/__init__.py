"""The copy of blocks from one cache into another: keys and values that go from engine to engine."""

from torch import Tensor

from stepgraph.ops.copy_blocks import reference
from stepgraph.ops.registry import register

_copy_blocks = register(
    "copy_blocks(Tensor source, Tensor source_blocks, Tensor(a!) target, Tensor target_blocks, int num_programs) -> ()",
    {"cpu": reference.copy_blocks, "cuda": "stepgraph.ops.copy_blocks.triton:copy_blocks"},
)


def copy_blocks(
    source: Tensor, source_blocks: Tensor, target: Tensor, target_blocks: Tensor, num_programs: int = 1
) -> None:
    """Copy blocks of one cache to blocks of another, bit by bit. May run inside a graph.

    Args:
        source: [blocks, B, …], B tokens per block, those of a token contiguous: a cache, or some of its heads. It may lie in
            another device's memory that the target's device can read.
        source_blocks: [N] int32, on the target's device; each below the source's blocks, which is not checked.
        target: [blocks, B, …] of the same dtype, and equal to the source but for the number of blocks and the strides; updated.
        target_blocks: [N] int32, likewise; none of them twice.
        num_programs: thread blocks of a GPU that copy: more of them are faster and take more from other work.
    """
    assert (source.shape[1:], source.dtype) == (target.shape[1:], target.dtype), (source, target)
    assert source_blocks.shape == target_blocks.shape, (source_blocks, target_blocks)
    _copy_blocks(source, source_blocks, target, target_blocks, num_programs)

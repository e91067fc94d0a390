"""The copy of blocks: reference and Triton against plain assignment.

Shapes: B tokens per block, G key/value heads, D head size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.ops.copy_blocks import reference
from stepgraph.ops.copy_blocks import triton as kernels

SOURCE_BLOCKS, TARGET_BLOCKS = 7, 9
PAIRS = [(5, 0), (2, 8), (6, 3), (2, 4), (0, 1)]
"""Blocks of the source, each with where it goes."""
KERNELS = {"reference": reference.copy_blocks, "triton": kernels.copy_blocks}


def random(num_blocks: int, *size: int, dtype: torch.dtype) -> Tensor:
    """Any bits, whether they are numbers or not."""
    generator = torch.Generator().manual_seed(num_blocks)
    shape = (num_blocks, *size[:-1], size[-1] * dtype.itemsize)
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(dtype)


def assert_copied(kernel: str, device: str, source: Tensor, target: Tensor, part: tuple[slice, slice], programs: int):
    """`part`: heads of either tensor that are copied, in its third dimension."""
    device = device if kernel == "triton" else "cpu"
    expected = target.clone()
    for old, new in PAIRS:
        expected[new, :, part[1]] = source[old, :, part[0]]
    found = target.to(device, copy=True)
    blocks = [torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in zip(*PAIRS, strict=True)]
    KERNELS[kernel](source.to(device)[:, :, part[0]], blocks[0], found[:, :, part[1]], blocks[1], programs)
    assert torch.equal(found.cpu().view(torch.uint8), expected.view(torch.uint8))


WHOLE = (slice(None), slice(None))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("programs", [1, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("entry", [(2, 16), (3, 5), (576,), (1,)], ids=str)
def test_blocks_arrive_bit_by_bit_and_nothing_else_changes(kernel, programs, dtype, entry, device) -> None:
    source, target = (random(n, 4, *entry, dtype=dtype) for n in (SOURCE_BLOCKS, TARGET_BLOCKS))
    assert_copied(kernel, device, source, target, WHOLE, programs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", [16, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_heads_go_to_other_heads(kernel, head_dim, dtype, device) -> None:
    source, target = random(7, 4, 6, head_dim, dtype=dtype), random(9, 4, 3, head_dim, dtype=dtype)
    assert_copied(kernel, device, source, target, (slice(3, 5), slice(1, 3)), 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_may_be_larger_than_what_a_program_takes_at_once(kernel, device) -> None:
    source, target = (random(n, 40, 8, 64, dtype=torch.bfloat16) for n in (SOURCE_BLOCKS, TARGET_BLOCKS))
    assert source[0].nbytes > kernels._PART_BYTES
    assert_copied(kernel, device, source, target, WHOLE, 3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_none_may_be_copied(kernel, device) -> None:
    device = device if kernel == "triton" else "cpu"
    target = random(3, 4, 8, dtype=torch.float32).to(device)
    before, none = target.clone(), torch.zeros(0, dtype=torch.int32, device=device)
    KERNELS[kernel](before, none, target, none, 2)
    assert torch.equal(target.view(torch.uint8), before.view(torch.uint8))


def test_words_are_as_wide_as_addresses_and_entries_allow() -> None:
    def width(*tensors: Tensor) -> int:
        return kernels._as_words(*tensors)[0].itemsize

    cache = torch.zeros(3, 4, 6, 8, dtype=torch.bfloat16)
    assert width(cache, cache) == 8
    assert width(cache, cache[..., :2]) == 4
    assert width(cache, cache[:, :, :, 1:5]) == 2
    assert width(torch.zeros(3, 4, 5, dtype=torch.float8_e4m3fn)) == 1


def test_caches_that_differ_are_refused() -> None:
    cache, blocks = torch.zeros(3, 4, 8), torch.zeros(1, dtype=torch.int32)
    for other in (torch.zeros(3, 4, 7), torch.zeros(3, 4, 8, dtype=torch.bfloat16)):
        with pytest.raises(AssertionError):
            ops.copy_blocks(cache, blocks, other, blocks)
    with pytest.raises(AssertionError):
        ops.copy_blocks(cache, blocks, cache.clone(), blocks.expand(2))

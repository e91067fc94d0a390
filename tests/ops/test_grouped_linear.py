"""`grouped_linear`: reference and Triton kernel against products in float64, over every kind of split."""

import itertools

import pytest
import torch

from stepgraph.ops.grouped_linear import reference
from stepgraph.ops.grouped_linear import triton as kernel

SPLITS = {
    "even": [4, 4, 4],
    "empty groups": [0, 7, 0, 0, 5, 0],
    "one group has all": [0, 0, 150, 0],
    "tile borders": [15, 16, 17, 63, 64, 65],
    "one row": [0, 1],
    "more groups than rows": [1, 0] * 20,
    "one group": [33],
}


@pytest.fixture(params=["reference", "triton"])
def grouped_linear(request, device):
    if request.param == "reference":
        return reference.grouped_linear
    return lambda *tensors: kernel.grouped_linear(*(t.to(device) for t in tensors)).cpu()


def operands(sizes, outputs, inputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(sizes) + outputs)
    x = torch.randn(sum(sizes), inputs, generator=generator).to(dtype)
    weight = torch.randn(len(sizes), outputs, inputs, generator=generator).to(dtype)
    return x, weight, torch.tensor(sizes).cumsum(0).to(torch.int32)


def exact(x, weight, sizes):
    parts = zip(x.double().split(sizes), weight.double(), strict=True)
    return torch.cat([rows @ matrix.T for rows, matrix in parts])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize(("outputs", "inputs"), [(40, 100), (5, 16)])
def test_both_match_float64_on_any_split(grouped_linear, split, outputs, inputs) -> None:
    x, weight, ends = operands(SPLITS[split], outputs, inputs)
    found = grouped_linear(x, weight, ends)
    torch.testing.assert_close(found.double(), exact(x, weight, SPLITS[split]), rtol=1e-5, atol=1e-4)


def test_a_transposed_weight_needs_no_copy(grouped_linear) -> None:
    x, weight, ends = operands([3, 0, 20], 40, 70)
    stored = weight.transpose(1, 2).contiguous()
    torch.testing.assert_close(
        grouped_linear(x, stored.transpose(1, 2), ends).double(), exact(x, weight, [3, 0, 20]), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_summed_in_float32(grouped_linear, dtype, request, device) -> None:
    if dtype == torch.bfloat16 and device == "cpu" and "triton" in request.node.name:
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    x, weight, ends = operands([30, 2], 64, 520, dtype)
    found = grouped_linear(x, weight, ends)
    torch.testing.assert_close(found.double(), exact(x, weight, [30, 2]), rtol=torch.finfo(dtype).eps, atol=2e-3)


def test_a_group_of_nan_rows_leaves_the_others_alone(grouped_linear) -> None:
    x, weight, ends = operands([5, 9, 4], 40, 100)
    expected = grouped_linear(x, weight, ends)
    x[5:14] = torch.nan
    found = grouped_linear(x, weight, ends)
    assert torch.equal(found[:5], expected[:5])
    assert torch.equal(found[14:], expected[14:])


def test_the_bound_on_tiles_holds_for_every_split_and_is_reached() -> None:
    for rows, groups, tile in itertools.product(range(1, 9), range(1, 5), (1, 2, 3, 4)):
        splits = [s for s in itertools.product(range(rows + 1), repeat=groups) if sum(s) == rows]
        most = max(sum(-(-n // tile) for n in split) for split in splits)
        assert kernel.max_tiles(rows, groups, tile) == most

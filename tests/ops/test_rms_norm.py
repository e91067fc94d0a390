"""RMS norm: reference against the formula, Triton against the reference."""

import pytest
import torch
from torch import Tensor

from stepgraph.ops.rms_norm import cpu, reference
from stepgraph.ops.rms_norm import triton as kernels

EPS = 1e-5


def make(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """x, weight; rows differ in scale by orders of magnitude."""
    generator = torch.Generator().manual_seed(rows * width)
    scale = torch.logspace(-3, 2, rows).unsqueeze(1)
    x = torch.randn(rows, width, generator=generator) * scale
    return x.to(dtype), torch.randn(width, generator=generator).to(dtype)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


SIZES = [(1, 1), (3, 64), (5, 48), (2, 1000)]


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm_matches_the_formula_at_any_width(rows: int, width: int, device: str) -> None:
    x, weight = make(rows, width)
    expected = formula(x, weight)
    triton_out = kernels.rms_norm(x.to(device), weight.to(device), EPS).cpu()
    for out in (reference.rms_norm(x, weight, EPS), triton_out):
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6)


def test_rows_may_lie_apart_and_get_the_bits_of_rows_that_do_not(device: str) -> None:
    x, weight = make(5, 48)
    apart = torch.cat((x, torch.full((5, 30), torch.nan)), dim=1).to(device)[:, :48]
    assert torch.equal(
        kernels.rms_norm(apart, weight.to(device), EPS), kernels.rms_norm(x.to(device), weight.to(device), EPS)
    )
    assert torch.equal(cpu.rms_norm(apart.cpu(), weight, EPS), cpu.rms_norm(x, weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_to_the_dtype_before_the_weight(dtype: torch.dtype) -> None:
    x, weight = make(4, 64, dtype)
    normed = formula(x, torch.ones_like(weight)).to(dtype)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), normed * weight, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_weight_is_multiplied_before_the_only_rounding(dtype: torch.dtype, device: str) -> None:
    x, _ = make(4, 600, dtype)
    weight = 1 + torch.rand(600, generator=torch.Generator().manual_seed(0)) / 64  # lost in a 16-bit weight
    expected = formula(x, weight).to(dtype)
    assert (reference.rms_norm(x, weight, EPS) == expected).float().mean() > 0.99
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    assert (kernels.rms_norm(x.to(device), weight.to(device), EPS).cpu() == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_rounds_as_the_reference_does(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    x, weight = make(4, 200, dtype)
    out = kernels.rms_norm(x.to(device), weight.to(device), EPS)
    expected = reference.rms_norm(x, weight, EPS)
    torch.testing.assert_close(out.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert (out.cpu() == expected).float().mean() > 0.95  # one unit only where the float32 sums differ


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_what_is_normalised_is_added_to_a_residual(rows: int, width: int, device: str) -> None:
    x, weight = make(rows, width)
    residual = torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    expected, scale = residual.double() + formula(x, weight), torch.tensor([0.7])
    for norm, where in ((reference, "cpu"), (cpu, "cpu"), (kernels, device)):
        found, scaled = residual.to(where, copy=True), residual.to(where, copy=True)
        norm.rms_norm_add(x.to(where), weight.to(where), EPS, found)
        torch.testing.assert_close(found.cpu().double(), expected, rtol=2e-6, atol=2e-6)
        norm.rms_norm_add(x.to(where), weight.to(where), EPS, scaled, scale.to(where))
        assert torch.equal(scaled, found * scale.to(where))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_sum_is_rounded_after_what_is_added_is(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    x, weight = make(4, 200, dtype)
    residual = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = residual.to(device, copy=True)
    kernels.rms_norm_add(x.to(device), weight.float().to(device), EPS, found)
    expected = residual + reference.rms_norm(x, weight.float(), EPS)
    torch.testing.assert_close(found.cpu(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
    assert (found.cpu() == expected).float().mean() > 0.95
    scaled, scale = residual.to(device, copy=True), torch.tensor([1 / 3], dtype=dtype, device=device)
    kernels.rms_norm_add(x.to(device), weight.float().to(device), EPS, scaled, scale)
    assert torch.equal(scaled, found * scale)  # of the rounded sum

"""RMS norm, alone and after a residual addition: reference against the formula, Triton against the reference."""

import pytest
import torch
from torch import Tensor

from stepgraph.ops.rms_norm import reference
from stepgraph.ops.rms_norm import triton as kernels

EPS = 1e-5


def make(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual, weight; rows differ in scale by orders of magnitude."""
    generator = torch.Generator().manual_seed(rows * width)
    scale = torch.logspace(-3, 2, rows).unsqueeze(1)
    x, residual = (torch.randn(rows, width, generator=generator) * scale for _ in range(2))
    return x.to(dtype), residual.to(dtype), torch.randn(width, generator=generator).to(dtype)


def formula(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


SIZES = [(1, 1), (3, 64), (5, 48), (2, 1000)]


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_rms_norm_matches_the_formula_at_any_width(rows: int, width: int, device: str) -> None:
    x, _, weight = make(rows, width)
    expected = formula(x, weight)
    triton_out = kernels.rms_norm(x.to(device), weight.to(device), EPS).cpu()
    for out in (reference.rms_norm(x, weight, EPS), triton_out):
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
def test_add_rms_norm_adds_in_place_then_normalises(rows: int, width: int, multiplier: float, device: str) -> None:
    x, residual, weight = make(rows, width)
    total = multiplier * x.double() + residual.double()
    for add_rms_norm, place in ((reference.add_rms_norm, "cpu"), (kernels.add_rms_norm, device)):
        updated = residual.to(place, copy=True)
        out = add_rms_norm(x.to(place), updated, weight.to(place), EPS, multiplier)
        torch.testing.assert_close(updated.cpu().double(), total, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.cpu().double(), formula(updated.cpu(), weight), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reference_rounds_to_the_dtype_before_the_weight(dtype: torch.dtype) -> None:
    x, _, weight = make(4, 64, dtype)
    normed = formula(x, torch.ones_like(weight)).to(dtype)
    torch.testing.assert_close(reference.rms_norm(x, weight, EPS), normed * weight, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_weight_is_multiplied_before_the_only_rounding(dtype: torch.dtype, device: str) -> None:
    x, _, _ = make(4, 600, dtype)
    weight = 1 + torch.rand(600, generator=torch.Generator().manual_seed(0)) / 64  # lost in a 16-bit weight
    expected = formula(x, weight).to(dtype)
    assert (reference.rms_norm(x, weight, EPS) == expected).float().mean() > 0.99
    assert (reference.add_rms_norm(torch.zeros_like(x), x.clone(), weight, EPS, 1.0) == expected).float().mean() > 0.99
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    assert (kernels.rms_norm(x.to(device), weight.to(device), EPS).cpu() == expected).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_rounds_as_the_reference_does(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    x, residual, weight = make(4, 200, dtype)
    on_device = [tensor.to(device, copy=True) for tensor in (x, residual, weight)]
    out = kernels.add_rms_norm(*on_device, EPS, 1.0)
    expected = reference.add_rms_norm(x, residual, weight, EPS, 1.0)
    assert torch.equal(on_device[1].cpu(), residual)
    torch.testing.assert_close(out.cpu(), expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert (out.cpu() == expected).float().mean() > 0.95  # one unit only where the float32 sums differ

"""SwiGLU and GeGLU: reference against the formula, Triton against the reference."""

import math

import pytest
import torch

from stepgraph.ops.swiglu import reference
from stepgraph.ops.swiglu import triton as kernels


def silu(x):
    return x * torch.sigmoid(x)


def gelu_tanh(x):
    return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {"swiglu": silu, "geglu": gelu_tanh}


@pytest.fixture(params=ACTIVATIONS)
def gated(request, device):
    """The activation, the reference, and the kernel on the device."""
    kernel = getattr(kernels, request.param)
    return (
        ACTIVATIONS[request.param],
        getattr(reference, request.param),
        lambda *operands: kernel(*(operand.to(device) for operand in operands)).cpu(),
    )


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (2, 1500)])
def test_both_match_the_formula_at_any_width(gated, rows: int, width: int) -> None:
    activation, *implementations = gated
    gate_up = torch.randn(rows, 2 * width, generator=torch.Generator().manual_seed(width)) * 10
    gate, up = gate_up.double().chunk(2, dim=-1)
    for gated_product in implementations:
        torch.testing.assert_close(gated_product(gate_up).double(), activation(gate) * up, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_of_two_tensors_whose_rows_lie_apart_the_bits_are_those_of_one(gated, dtype: torch.dtype) -> None:
    activation, *implementations = gated
    generator = torch.Generator().manual_seed(1)
    gates, ups = (torch.randn(3, 130, generator=generator).to(dtype) for _ in range(2))
    gate, up = gates[:, :100], ups[:, 30:]
    for gated_product in implementations:
        found = gated_product(gate, up)
        assert torch.equal(found, gated_product(torch.cat((gate, up), dim=1)))
        expected = activation(gate.double()) * up.double()
        torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=1e-5)


def test_extreme_gates_stay_finite(gated) -> None:
    _, *implementations = gated
    gate_up = torch.tensor([[-1e4, -200.0, 200.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    for gated_product in implementations:
        torch.testing.assert_close(gated_product(gate_up), torch.tensor([[0.0, 0.0, 200.0, 1e4]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_activation_is_rounded_to_the_dtype_before_the_product(gated, dtype: torch.dtype, device: str) -> None:
    activation, reference_product, kernel_product = gated
    gate_up = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = activation(gate.float()).to(dtype) * up
    unit, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    torch.testing.assert_close(reference_product(gate_up), expected, rtol=unit, atol=tiny)
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    out = kernel_product(gate_up)
    torch.testing.assert_close(out, expected, rtol=unit, atol=tiny)
    assert (out == expected).float().mean() > 0.95  # one unit only where the float32 exponentials differ

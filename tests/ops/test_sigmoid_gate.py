"""Gates by sigmoids: reference against the formula, Triton against it too, in float32 and rounded."""

import pytest
import torch

from stepgraph.ops.sigmoid_gate import reference
from stepgraph.ops.sigmoid_gate import triton as kernels


@pytest.fixture(params=["reference", "triton"])
def gated(request, device):
    if request.param == "reference":
        return reference.sigmoid_gate
    return lambda x, gate: kernels.sigmoid_gate(x.to(device), gate.to(device)).cpu()


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (2, 1500)])
@pytest.mark.parametrize("of_tokens", [True, False])
def test_it_is_the_formula_at_any_width(gated, rows: int, width: int, of_tokens: bool) -> None:
    generator = torch.Generator().manual_seed(width)
    x, wide = torch.randn(rows, width, generator=generator), torch.randn(rows, width + 7, generator=generator) * 10
    gate = wide[:, 3:4] if of_tokens else wide[:, 3 : 3 + width]
    expected = (x.double() * gate.double().sigmoid()).float()
    torch.testing.assert_close(gated(x, gate), expected, rtol=1e-5, atol=1e-6)


def test_extreme_gates_are_shut_and_open(gated) -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]])
    torch.testing.assert_close(gated(torch.full_like(gate, 3.0), gate), torch.tensor([[0.0, 0.0, 3.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sigmoid_is_rounded_before_the_product(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(4, 600, generator=generator).to(dtype) for _ in range(2))
    found, expected = reference.sigmoid_gate(x, gate), x * gate.sigmoid()
    torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)
    assert (found == expected).float().mean() > 0.95  # one unit only where the float32 exponentials differ

"""Products fused with the norm before them and with what comes after: the CUDA kernels and the CPU forms against float64."""

import pytest
import torch

from stepgraph.ops.linear import cpu, ends, few_tokens
from stepgraph.ops.linear import triton as kernels
from stepgraph.platforms.tuning import FlatTile

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}

CASES = [
    (tokens, inputs, dtype)
    for dtype in TOLERANCE
    for tokens, inputs in [
        (1, 16),
        (1, 600),
        (1, kernels.TUNING.streamed_inputs + 8),
        (2, 136),
        (5, 48),
        (40, 136),
        (70, 136),
    ]
]
"""One token streamed, whole and in turns; a few tokens in 16 bits; the library's product."""
FORMS = [(kernels, True), (cpu, False)]


def randn(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator) * scale


def operands(tokens, inputs, outputs, dtype):
    """x, weight, bias; products are of the order of 1."""
    return (t.to(dtype) for t in (randn(tokens, inputs), randn(outputs, inputs, scale=inputs**-0.5), randn(outputs)))


def norm(x, weight):
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_close(found, expected, dtype):
    torch.testing.assert_close(found.cpu().double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("form", "on_device"), FORMS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(("tokens", "inputs", "dtype"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.22])
def test_linear_add_adds_the_product_to_the_residual(
    form, on_device, tokens, inputs, dtype, with_bias, multiplier, device
):
    place = device if on_device else "cpu"
    x, weight, bias = operands(tokens, inputs, 37, dtype)
    residual = randn(tokens + 1, 37).to(dtype)
    expected = residual[:tokens].double() + multiplier * (
        x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    )
    updated = residual.to(place, copy=True)
    form.linear_add(x.to(place), weight.to(place), bias.to(place) if with_bias else None, updated[:tokens], multiplier)
    assert_close(updated[:tokens], expected, dtype)
    assert torch.equal(updated[tokens].cpu(), residual[tokens]), "wrote beyond the last token"


@pytest.mark.parametrize(("form", "on_device"), FORMS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(("tokens", "inputs", "dtype"), CASES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_norm_linear_multiplies_what_is_normalised(form, on_device, tokens, inputs, dtype, with_bias, device):
    place = device if on_device else "cpu"
    x, weight, bias = operands(tokens, inputs, 37, dtype)
    norm_weight = 1 + randn(inputs).to(dtype) / 4
    expected = norm(x, norm_weight) @ weight.double().T + (bias.double() if with_bias else 0)
    bias = bias.to(place) if with_bias else None
    found = form.norm_linear((7 * x).to(place), norm_weight.to(place), 49 * EPS, weight.to(place), bias)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize(("form", "on_device"), FORMS, ids=["cuda", "cpu"])
@pytest.mark.parametrize(("tokens", "inputs", "dtype"), CASES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("normed", [False, True])
def test_gated_linear_gates_the_second_half_with_the_first(
    form, on_device, tokens, inputs, dtype, gelu, normed, device
):
    place = device if on_device else "cpu"
    x, weight, _ = operands(tokens, inputs, 2 * 21, dtype)
    norm_weight = 1 + randn(inputs).to(dtype) / 4
    gate, up = ((norm(x, norm_weight) if normed else x.double()) @ weight.double().T).chunk(2, dim=1)
    activation = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    if normed:
        found = form.norm_gated_linear(x.to(place), norm_weight.to(place), EPS, weight.to(place), gelu)
    else:
        found = form.gated_linear(x.to(place), weight.to(place), gelu)
    assert found.shape == (tokens, 21)
    assert_close(found, activation * up, dtype)


@pytest.mark.parametrize("tokens", [9, 40])
@pytest.mark.parametrize("gelu", [False, True])
def test_a_flat_tile_holds_gates_beside_their_partners(tokens, gelu, device):
    x, weight, _ = operands(tokens, 136, 2 * 45, torch.float16)
    gate, up = (x.double() @ weight.double().T).chunk(2, dim=1)
    activation = torch.nn.functional.gelu(gate, approximate="tanh") if gelu else torch.nn.functional.silu(gate)
    out = torch.full((tokens, 45), torch.nan, dtype=torch.float16, device=device)
    tile = FlatTile(outputs=64, inputs=64, num_stages=3)
    few_tokens.multiply(x.to(device), weight.to(device), None, out, tile, ends.GEGLU if gelu else ends.SWIGLU)
    assert_close(out, activation * up, torch.float16)

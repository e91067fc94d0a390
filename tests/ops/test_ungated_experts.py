"""Experts without gates, of squared ReLU: sorted, pair by pair, and joined with the choice, against products in float64."""

from dataclasses import replace

import pytest
import torch
from triton_operators import triton_operators

from stepgraph import native, ops
from stepgraph.ops.experts import (
    ExpertDispatch,
    ExpertWeights,
    expert_work,
    gated_experts,
    mixture,
    pairs,
    sum_experts,
    tiles,
)
from stepgraph.ops.fp8_linear import dequantize, num_groups, quantize
from stepgraph.ops.route import Chosen, Routing
from stepgraph.platforms.tuning import ExpertTile, PairTile

T, TOP, N, E, M = 9, 3, 5, 160, 136
"""Tokens, experts of each, experts; hidden size and width, each of which is two groups."""
TILE = ExpertTile(rows=16, outputs=32, inputs=32, num_warps=4, num_stages=2, group=2)
PAIR_TILE = PairTile(outputs=64, inputs=32, loads=2, num_warps=2)
PAIRS = dict.fromkeys(
    ("gated_pairs", "gated_pairs_of_one", "gated_pairs_fp8", "summed_pairs", "summed_pairs_fp8"), PAIR_TILE
)


@pytest.fixture(params=["our own kernels", "the library", "triton"])
def kernels(request, device, monkeypatch):
    """Where operators run, by their own kernels there."""
    if request.param == "triton":
        monkeypatch.setattr(tiles, "choose_tile", lambda *args, **options: TILE)
        monkeypatch.setattr(pairs, "TUNING", replace(pairs.TUNING, **PAIRS))
        with triton_operators("sort_pairs", "gated_experts", "sum_experts", "mixture", "relu2"):
            yield device if torch.cuda.is_available() else "cpu"
        return
    if request.param == "the library":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"no kernels: {native.missing()}")
    yield "cpu"


def random_weights(generator, scales: str | None):
    """Operands of both products, and their values in float64."""
    operands, values = [], []
    for outputs, inputs in ((M, E), (E, M)):
        numbers = torch.randn(N * outputs, inputs, generator=generator) / inputs**0.5
        weight, scale, exact = numbers, None, numbers
        if scales is not None:
            weight, scale = quantize(numbers, num_groups(inputs) if scales == "of groups" else 1)
            exact, scale = dequantize(weight, scale), scale.view(N, outputs, -1)
        operands += [weight.view(N, outputs, inputs), scale]
        values.append(exact.double().view(N, outputs, inputs))
    return operands, values


def expected(x, chosen: Chosen, values):
    out = torch.zeros(len(x), E, dtype=torch.float64)
    for token, (numbers, weights) in enumerate(zip(*(part.tolist() for part in chosen), strict=True)):
        for number, weight in zip(numbers, weights, strict=True):
            hidden = (values[0][number] @ x[token].double()).clamp(min=0).square()
            out[token] += weight * (values[1][number] @ hidden)
    return out


@pytest.mark.parametrize("dispatch", ExpertDispatch)
@pytest.mark.parametrize("scales", [None, "of outputs", "of groups"])
def test_they_match_float64(kernels, scales, dispatch) -> None:
    generator = torch.Generator().manual_seed(0)
    operands, values = random_weights(generator, scales)
    x = torch.randn(T, E, generator=generator)
    expert = torch.stack([torch.randperm(N, generator=generator)[:TOP] for _ in range(T)]).int()
    chosen = Chosen(expert, torch.rand(T, TOP, generator=generator))
    work = expert_work(Chosen(*(part.to(kernels) for part in chosen)), 0, N, dispatch)
    up, up_scale, down, down_scale = (None if part is None else part.to(kernels) for part in operands)
    hidden = gated_experts(x.to(kernels), up, up_scale, work, gelu=False, gated=False)
    assert hidden.shape == (T * TOP, M)
    out = torch.empty(T, E, device=kernels)
    sum_experts(hidden, down, down_scale, work, out)
    torch.testing.assert_close(out.cpu().double(), expected(x, chosen, values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scales", [None, "of outputs"])
def test_joined_with_the_choice(kernels, scales) -> None:
    generator = torch.Generator().manual_seed(1)
    operands, values = random_weights(generator, scales)
    x, router = torch.randn(T, E, generator=generator), torch.randn(N, E, generator=generator)
    counts, totals = (
        torch.tensor([T], dtype=torch.int32, device=kernels),
        torch.zeros(N, dtype=torch.int64, device=kernels),
    )
    routing = Routing(TOP, sigmoid=True)
    chosen = ops.route(x, router, None, counts.cpu(), totals.cpu(), routing)
    weights = ExpertWeights(*(None if part is None else part.to(kernels) for part in operands), 0)
    out = torch.empty(T, E, device=kernels)
    mixture(
        x.to(kernels), None, router.to(kernels), None, counts, totals, routing, weights, out, gelu=False, gated=False
    )
    torch.testing.assert_close(out.cpu().double(), expected(x, chosen, values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_squared_relu_is_rounded_once(kernels, dtype) -> None:
    x = torch.randn(3, 1030, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = ops.relu2(x.to(kernels)).cpu()
    assert torch.equal(found, x.double().clamp(min=0).square().to(dtype))

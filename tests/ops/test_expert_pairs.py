"""Experts of few tokens: both products pair by pair, and a whole mixture in three kernels, against products in float64."""

from dataclasses import astuple, replace

import pytest
import torch
from torch.nn import functional as F

from stepgraph.ops.experts import pairs, reference, triton
from stepgraph.ops.fp8_linear import dequantize, num_groups, quantize
from stepgraph.ops.route import Routing
from stepgraph.ops.route import reference as route
from stepgraph.platforms.tuning import PairTile

TILE = PairTile(outputs=64, inputs=32, loads=2, num_warps=2)
"""No size is a multiple of it."""
SIZES = 70, 24
"""Hidden size and width: of the one several loads, and more than are under way."""
GROUPED_SIZES = 140, 130
"""Two groups of inputs, the second one not whole."""


def random_weights(count, dtype, scales):
    """Operands of both products, and their values in float64. Beyond the experts lies NaN, which nothing may read."""
    hidden_size, width = GROUPED_SIZES if scales == "of groups" else SIZES
    generator = torch.Generator().manual_seed(count)
    operands, values = [], []
    for outputs, inputs in ((2 * width, hidden_size), (hidden_size, width)):
        numbers = torch.randn(count * outputs, inputs, generator=generator) / inputs**0.5
        if scales is None:
            stored = torch.full((count + 1, outputs, inputs), torch.nan, dtype=dtype)
            stored[:count] = numbers.view(count, outputs, inputs)
            weight, scale = stored[:count], None
            exact = weight.double()
        else:
            weight, scale = quantize(numbers, num_groups(inputs) if scales == "of groups" else 1)
            exact = dequantize(weight, scale).double().view(count, outputs, inputs)
            weight, scale = weight.view(count, outputs, inputs), scale.view(count, outputs, -1)
        operands += [weight, scale]
        values.append(exact)
    return operands, values


def exact_hidden(x, gate_up):
    gate, up = (gate_up @ x.double()).chunk(2)
    return F.silu(gate) * up


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


def assert_close(found, expected):
    """Up to the rounding of what is between the products, and of the result."""
    eps = torch.finfo(found.dtype).eps if found.dtype != torch.float32 else 1e-6
    torch.testing.assert_close(found.cpu().double(), expected, rtol=4 * eps, atol=4 * eps)


TUNED = "gated_pairs", "gated_pairs_of_one", "gated_pairs_fp8", "summed_pairs", "summed_pairs_fp8"
EXPERTS = torch.tensor([[4, 1, 2], [6, 6, 6], [0, 5, 3]], dtype=torch.int32)
"""Of six; the token in the middle is padding."""
FORMATS = [
    (torch.float32, None),
    (torch.float16, None),
    (torch.bfloat16, None),
    (torch.float16, "of outputs"),
    (torch.bfloat16, "of groups"),
]


@pytest.mark.parametrize(("first", "count"), [(0, 6), (1, 4)], ids=["all experts", "some experts"])
@pytest.mark.parametrize(("dtype", "scales"), FORMATS, ids=str)
def test_products_of_pairs_match_float64_and_touch_no_other(dtype, scales, first, count, monkeypatch, device):
    """What belongs to padding, or to other ranks' experts, is NaN, and stays what it was."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size, **like: tensor.new_full(size, 77, **like))
    operands, (gate_up, down) = random_weights(count, dtype, scales)
    x = torch.randn(3, gate_up.shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1] = torch.nan
    pair_weight = torch.rand(3, 3, generator=torch.Generator().manual_seed(2))
    choice = pairs.Choice(*on(device, EXPERTS, pair_weight), routing=Routing(3))
    weight, scale, down_weight, down_scale = on(device, *operands)
    hidden = pairs.launch_gated(x.to(device), weight, scale, choice, first, False, TILE).cpu()
    here = (first <= EXPERTS) & (first + count > EXPERTS)
    assert (hidden[~here.flatten()] == 77.0).all()
    hidden[~here.flatten()] = torch.nan
    expected = torch.zeros(3, gate_up.shape[2], dtype=torch.float64)
    for token, place in here.nonzero().tolist():
        number, pair = int(EXPERTS[token, place]) - first, token * 3 + place
        assert_close(hidden[pair], exact_hidden(x[token], gate_up[number]))
        expected[token] += float(pair_weight[token, place]) * (down[number] @ hidden[pair].double())
    residual = torch.randn(4, gate_up.shape[2], generator=torch.Generator().manual_seed(3)).to(dtype)
    for add in (False, True):
        out = residual.clone().to(device)
        pairs.launch_sum(hidden.to(device), down_weight, down_scale, choice, first, out[:3], add, 0.5, TILE)
        assert_close(out[:3].cpu(), expected * 0.5 + (residual[:3].double() if add else 0))
        assert torch.equal(out[3].cpu(), residual[3]), "wrote beyond the last token"
        assert not add or torch.equal(out[1].cpu(), residual[1])


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("scales", [None, "of outputs"], ids=str)
def test_operators_take_pairs_that_are_not_sorted(scales, tokens, monkeypatch, device):
    """In the tiles that are tuned, by whatever name."""
    monkeypatch.setattr(pairs, "TUNING", replace(pairs.TUNING, **dict.fromkeys(TUNED, TILE)))
    operands, _ = random_weights(6, torch.float16, scales)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, SIZES[0], generator=generator).half()
    expert, pair_weight = EXPERTS[:tokens], torch.rand(tokens, 3, generator=generator)
    found, expected = x.to(device).clone(), x.clone()
    for experts, out in ((triton, found), (reference, expected)):
        x_, gate_up, gate_up_scale, down, down_scale, expert_, pair_weight_ = on(
            out.device, x, *operands, expert, pair_weight
        )
        hidden = experts.gated_experts(x_, gate_up, gate_up_scale, expert_, 0, None, None, False, False)
        experts.sum_experts(hidden, down, down_scale, expert_, pair_weight_, 0, None, None, out, True, 1.0, False)
    torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)


MIXTURES = {
    "softmax": (Routing(top=2), torch.float32, None, False),
    "groups, eight bits": (
        Routing(top=3, sigmoid=True, groups=3, kept_groups=2, scale=2.0),
        torch.float16,
        "of outputs",
        True,
    ),
    "bfloat16": (Routing(top=2, normalise=False), torch.bfloat16, None, True),
}


@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("kind", MIXTURES)
def test_mixture_is_what_it_joins(kind, with_norm, monkeypatch, device):
    """Two blocks of tokens, the rest of which is padding and NaN; of the six experts, the first is another rank's."""
    routing, dtype, scales, has_bias = MIXTURES[kind]
    monkeypatch.setattr(pairs, "TUNING", replace(pairs.TUNING, **dict.fromkeys(TUNED, TILE)))
    operands, (gate_up, down) = random_weights(5, dtype, scales)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, gate_up.shape[2], generator=generator).to(dtype)
    tokens, padding = [0, 2, 3], [1]
    x[padding] = torch.nan
    norm = torch.rand(x.shape[1], generator=generator).to(dtype) if with_norm else None
    router = torch.randn(6, x.shape[1], generator=generator)
    bias = torch.randn(6, generator=generator) if has_bias else None
    counts = torch.tensor([1, 2], dtype=torch.int32)
    totals, out = torch.arange(6).to(device), x.clone().to(device)
    # Where there is a norm, the result is added to what it is of, in place.
    x_ = out if with_norm else x.to(device)
    normed = pairs.mixture(
        x_,
        *on(device, norm),
        1e-6,
        *on(device, router, bias, counts),
        totals,
        *astuple(routing),
        *on(device, *operands),
        1,
        False,
        out,
        True,
        0.5,
    ).cpu()
    if with_norm:
        scaled = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-6).rsqrt() * norm.double()
        assert_close(normed[tokens], scaled[tokens])
    else:
        normed = x
    expected_totals = torch.arange(6)
    expert, pair_weight = route.route(normed, router, bias, counts, expected_totals, *astuple(routing))
    assert torch.equal(totals.cpu(), expected_totals)
    for token in tokens:
        expected = x[token].double()
        for number, weight in zip(expert[token].tolist(), pair_weight[token].tolist(), strict=True):
            if number > 0:
                hidden = exact_hidden(normed[token], gate_up[number - 1]).to(dtype)
                expected += 0.5 * weight * (down[number - 1] @ hidden.double())
        assert_close(out[token].cpu(), expected)
    assert out[padding].isnan().all()


def test_mixture_of_the_cpu_is_what_it_joins_too():
    operands, _ = random_weights(4, torch.float32, None)
    x, router = torch.randn(3, SIZES[0]), torch.randn(4, SIZES[0])
    norm, counts = torch.rand(SIZES[0]), torch.tensor([2], dtype=torch.int32)
    totals, out, expected = torch.zeros(4, dtype=torch.int64), x.clone(), x.clone()
    routing = astuple(Routing(top=2))
    normed = reference.mixture(
        x, norm, 1e-6, router, None, counts, totals, *routing, *operands, 0, False, out, True, 1.0
    )
    torch.testing.assert_close(normed, F.rms_norm(x, (SIZES[0],), norm, 1e-6))
    expert, pair_weight = route.route(normed, router, None, counts, torch.zeros_like(totals), *routing)
    hidden = reference.gated_experts(normed, *operands[:2], expert, 0, None, None, False, False)
    reference.sum_experts(hidden, *operands[2:], expert, pair_weight, 0, None, None, expected, True, 1.0, False)
    torch.testing.assert_close(out, expected)
    assert totals.sum() == 4

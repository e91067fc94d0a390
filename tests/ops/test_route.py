"""`route`: reference and kernels against scores in float64, under every kind of routing."""

from dataclasses import astuple

import pytest
import torch

from stepgraph import native
from stepgraph.ops.route import Routing, cpu, reference
from stepgraph.ops.route import triton as kernel

ROUTINGS = {
    "softmax": (6, Routing(top=2), False),
    "softmax, weights as they are, scaled": (16, Routing(top=3, normalise=False, scale=2.5), False),
    "softmax and bias": (5, Routing(top=2), True),
    "sigmoid and bias": (9, Routing(top=4, sigmoid=True, least_sum=1e-20), True),
    "sigmoid, where the sum is small": (7, Routing(top=2, sigmoid=True, least_sum=3.0), False),
    "groups": (12, Routing(top=3, sigmoid=True, groups=4, kept_groups=2, scale=2.0), True),
    "groups, by the best of each": (20, Routing(top=4, groups=5, kept_groups=1, group_top=1), False),
    "one expert": (1, Routing(top=1), False),
    "all experts": (3, Routing(top=3), False),
    "many": (100, Routing(top=10), False),
}


TILES = {"few": None, "many": kernel.MANY, "most": kernel.MOST}


@pytest.fixture(params=["reference", "cpu", *TILES])
def route(request, monkeypatch, device):
    """`route` by the reference, or by the CPU's kernel, or by those of GPUs for few or for many tokens."""
    if request.param == "reference":
        return reference.route
    if request.param == "cpu":
        if not native.available():
            pytest.skip(f"no kernels: {native.missing()}")
        return cpu.route_natively
    monkeypatch.setattr(kernel, "choose_tile", lambda num_tokens: TILES[request.param])

    def call(x, weight, bias, counts, totals, *routing):
        arguments = x, weight, bias, counts, totals, *routing
        on_device = [t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments]
        found = kernel.route(*on_device)
        totals.copy_(on_device[4])
        return [t.cpu() for t in found]

    return call


def operands(tokens, num_experts, hidden_size, *, dtype, with_bias=False):
    generator = torch.Generator().manual_seed(num_experts)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    weight = torch.randn(num_experts, hidden_size, generator=generator) * (2 / hidden_size**0.5)
    return x, weight, torch.randn(num_experts, generator=generator) if with_bias else None


def exact(x, weight, bias, routing):
    """Of one token, in float64: experts and weights."""
    logits = weight.double() @ x.double()
    scores = logits.sigmoid() if routing.sigmoid else logits.softmax(0)
    ranked = dict(enumerate((scores if bias is None else scores + bias.double()).tolist()))
    if routing.groups > 1:
        size = len(ranked) // routing.groups
        groups = [range(g * size, (g + 1) * size) for g in range(routing.groups)]
        best = {g: sum(sorted(ranked[n] for n in group)[-routing.group_top :]) for g, group in enumerate(groups)}
        kept = sorted(best, key=best.__getitem__)[-routing.kept_groups :]
        ranked = {n: ranked[n] for g in kept for n in groups[g]}
    experts = sorted(ranked, key=ranked.__getitem__, reverse=True)[: routing.top]
    weights = scores[experts]
    if routing.normalise:
        weights = weights / max(float(weights.sum()), routing.least_sum)
    return experts, weights * routing.scale


@pytest.mark.parametrize("kind", ROUTINGS)
def test_experts_and_weights_are_those_of_float64_and_padding_has_none(kind, route):
    """Two blocks of tokens, the rest of which is padding and NaN."""
    num_experts, routing, with_bias = ROUTINGS[kind]
    x, weight, bias = operands(10, num_experts, 160, dtype=torch.bfloat16, with_bias=with_bias)
    tokens = [0, 1, 2, 5]
    padding = sorted(set(range(10)) - set(tokens))
    x[padding] = torch.nan
    totals = torch.arange(num_experts)
    expert, pair_weight = route(x, weight, bias, torch.tensor([3, 1], dtype=torch.int32), totals, *astuple(routing))
    assert expert.dtype == torch.int32
    assert (expert[padding] == num_experts).all()
    assert (pair_weight[padding] == 0).all()
    for token in tokens:
        experts, weights = exact(x[token], weight, bias, routing)
        assert expert[token].tolist() == experts
        torch.testing.assert_close(pair_weight[token].double(), weights, rtol=1e-5, atol=1e-7)
    counted = torch.bincount(expert[tokens].flatten(), minlength=num_experts)
    assert torch.equal(totals, torch.arange(num_experts) + counted)


@pytest.mark.parametrize("kind", ["softmax", "groups", "many"])
def test_weights_are_multiplied_by_what_their_experts_have(kind, route):
    """Bit for bit as in a multiplication afterwards; the last token is padding."""
    num_experts, routing, with_bias = ROUTINGS[kind]
    x, weight, bias = operands(6, num_experts, 160, dtype=torch.bfloat16, with_bias=with_bias)
    x[5] = torch.nan
    counts, scale = torch.tensor([5], dtype=torch.int32), torch.rand(num_experts, generator=torch.Generator()) + 0.5
    arguments = counts, torch.zeros(num_experts, dtype=torch.int64), *astuple(routing), None
    expert, plain = route(x, weight, bias, *arguments)
    same, scaled = route(x, weight, bias, *arguments, scale)
    assert torch.equal(same, expert)
    assert torch.equal(scaled[:5], plain[:5] * scale[expert[:5]])
    assert (scaled[5] == 0).all()
    for token in range(5):
        experts, weights = exact(x[token], weight, bias, routing)
        torch.testing.assert_close(scaled[token].double(), weights * scale[experts], rtol=1e-5, atol=1e-7)


def test_without_tokens_nothing_is_chosen(route):
    x, weight, _ = operands(3, 6, 32, dtype=torch.float32)
    totals = torch.zeros(6, dtype=torch.int64)
    expert, _ = route(x * torch.nan, weight, None, torch.zeros(1, dtype=torch.int32), totals, *astuple(Routing(top=2)))
    assert (expert == 6).all()
    assert (totals == 0).all()


def test_of_equal_experts_the_first_ones_are_chosen(route):
    """Of whole numbers, no sum is rounded."""
    x, weight = torch.arange(64.0).view(2, 32), torch.ones(1, 32)
    expert, pair_weight = route(
        x,
        weight.expand(7, 32).contiguous(),
        None,
        torch.tensor([2], dtype=torch.int32),
        torch.zeros(7, dtype=torch.int64),
        *astuple(Routing(top=4)),
    )
    assert expert.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close(pair_weight, torch.full((2, 4), 0.25))


@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
@pytest.mark.parametrize("slices", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_as_exact_as_in_float32(dtype, slices, tile, monkeypatch, device):
    """Whatever a slice is: all inputs, several blocks of them, or one."""
    monkeypatch.setattr(kernel, "MAX_SLICES", slices)
    x, weight, _ = operands(3, 18, 300, dtype=dtype)
    logits, _ = kernel.write_logits(x.to(device), weight.to(device), tile=tile)
    assert logits.shape == (1 if tile else min(slices, 3) if slices != 2 else 2, 3, 18)
    error = (logits.cpu().double().sum(0) - x.double() @ weight.double().T).abs()
    assert (error <= 2**-21 * (x.double().abs() @ weight.double().abs().T)).all()


def test_few_tokens_are_normalised_on_the_way(device):
    x, weight, _ = operands(9, 5, 150, dtype=torch.float16)
    norm = (torch.rand(150, generator=torch.Generator().manual_seed(5)) + 0.5).half()  # no product is subnormal
    logits, normed = kernel.write_logits(x.to(device), weight.to(device), (norm.to(device), 1e-5))
    scaled = x.double() * (x.double().square().mean(1, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(
        normed.cpu().double(), scaled * norm.double(), rtol=2e-3, atol=2**-23
    )  # subnormal numbers
    torch.testing.assert_close(
        logits.cpu().double().sum(0), normed.cpu().double() @ weight.double().T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_experts", "hidden_size"), [(128, 2048), (256, 7168), (60, 1000)])
def test_gpu_tokens_keep_their_bits_in_every_batch(dtype, num_experts, hidden_size, device):
    if device != "cuda":
        pytest.skip("Triton's interpreter adds up with numpy's products, not with tensor cores")
    x, weight, _ = (t if t is None else t.to(device) for t in operands(2048, num_experts, hidden_size, dtype=dtype))
    routing = astuple(Routing(top=min(8, num_experts)))

    def chosen(rows):
        counts = torch.tensor([len(rows)], dtype=torch.int32, device=device)
        totals = torch.zeros(num_experts, dtype=torch.int64, device=device)
        return kernel.route(rows.contiguous(), weight, None, counts, totals, *routing)

    expert, pair_weight = chosen(x)
    for size in (1, 2, 7, 16, 33, 161, 300, 1100):
        found = chosen(x[-size:])
        assert torch.equal(found[0], expert[-size:])
        assert torch.equal(found[1], pair_weight[-size:])


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_on_the_cpu_a_token_has_the_bits_that_it_has_alone():
    x, weight, bias = operands(40, 60, 96, dtype=torch.float32, with_bias=True)
    routing = Routing(top=5, sigmoid=True, groups=6, kept_groups=3, scale=1.5)

    def run(x):
        counts, totals = torch.tensor([len(x)], dtype=torch.int32), torch.zeros(60, dtype=torch.int64)
        return cpu.route_natively(x, weight, bias, counts, totals, *astuple(routing))

    experts, weights = run(x)
    for t in range(40):
        expert, pair_weight = run(x[t : t + 1])
        assert torch.equal(expert[0], experts[t])
        assert torch.equal(pair_weight[0], weights[t])


@pytest.mark.parametrize("sigmoid", [False, True])
def test_by_definition_a_token_has_the_bits_that_it_has_alone(sigmoid):
    """That runs where our own kernel does not."""
    x, weight, _ = operands(40, 13, 36, dtype=torch.float32)
    routing = Routing(top=5, sigmoid=sigmoid, scale=1.5)

    def run(x):
        counts, totals = torch.tensor([len(x)], dtype=torch.int32), torch.zeros(13, dtype=torch.int64)
        return reference.route(x, weight, None, counts, totals, *astuple(routing))

    for size in (2, 5, 17, 40):
        experts, weights = run(x[:size])
        for t in range(size):
            expert, pair_weight = run(x[t : t + 1])
            assert torch.equal(expert[0], experts[t])
            assert torch.equal(pair_weight[0], weights[t])


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_on_the_cpu_tokens_that_are_no_numbers_choose_experts_that_there_are():
    x, weight, _ = operands(4, 12, 32, dtype=torch.float32)
    totals = torch.zeros(12, dtype=torch.int64)
    x[1:3] = torch.nan
    expert, _ = cpu.route_natively(
        x, weight, None, torch.tensor([4], dtype=torch.int32), totals, *astuple(Routing(top=3, groups=3, kept_groups=2))
    )
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 12 for row in expert.tolist())
    assert totals.sum() == 12


@pytest.mark.skipif(not native.available(), reason="no kernels")
@pytest.mark.parametrize("routing", [Routing(top=7), Routing(top=2, groups=3, kept_groups=4), Routing(top=2, groups=6)])
def test_on_the_cpu_more_experts_than_there_are_cannot_be_chosen(routing):
    x, weight, _ = operands(1, 6, 32, dtype=torch.float32)
    counts, totals = torch.ones(1, dtype=torch.int32), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="more experts are to be chosen than there are"):
        cpu.route_natively(x, weight, None, counts, totals, *astuple(routing))

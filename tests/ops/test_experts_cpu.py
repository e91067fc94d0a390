"""Experts on the CPU, by our own kernels and by the library, with weights of every format: against float64 on what they
stand for; and bits that do not depend on the tokens beside."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from stepgraph import native
from stepgraph.layers.formats import FP8, End, Packed, Plain
from stepgraph.ops.experts import ExpertDispatch, cpu, expert_work, reference
from stepgraph.ops.packed import EXACT_TOKENS
from stepgraph.ops.route import Chosen

NUM_EXPERTS, TOP, PADDING = 6, 3, 2
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
FORMATS = {
    "float32": (Plain(), torch.float32),
    "bfloat16": (Plain(), torch.bfloat16),
    "float16": (Plain(), torch.float16),
    "FP8": (FP8(), torch.float32),
    "FP8, bfloat16": (FP8(), torch.bfloat16),
    "FP8 in groups": (FP8(grouped=True), torch.float32),
    "Q4_0": (Packed("Q4_0", None), torch.float32),
    "Q4_1": (Packed("Q4_1", None), torch.float32),
    "Q8_0": (Packed("Q8_0", None, takes_values=True), torch.float32),
}


@pytest.fixture(params=["our own kernels", "the library"])
def computed_by(request, monkeypatch):
    if request.param == "the library":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"no kernels: {native.missing()}")
    return request.param


def make_weight(name, outputs, inputs, seed):
    """Parameters [N, O, …] of a format, and their values [N, O, I] in float64."""
    form, dtype = FORMATS[name]
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(NUM_EXPERTS * outputs, inputs, generator=generator) / inputs**0.5
    specs = form.parameters(len(values), inputs, dtype)
    weights = {key: torch.empty(spec.shape, dtype=spec.dtype) for key, spec in specs.items()}
    if isinstance(form, Packed):
        gguf = pytest.importorskip("gguf", reason="blocks are made by the gguf package")
        kind = gguf.GGMLQuantizationType[form.blocks]
        weights["weight"] = torch.from_numpy(gguf.quants.quantize(values.numpy(), kind))
        values = torch.from_numpy(gguf.quants.dequantize(weights["weight"].numpy(), kind))
    else:
        form.targets(weights, values.shape[-1])["weight"].copy_(values)
        values = form.values(weights, inputs)
    stacked = {key: weight.view(NUM_EXPERTS, outputs, -1) for key, weight in weights.items()}
    return stacked, values.double().view(NUM_EXPERTS, outputs, inputs)


class Layer:
    """Experts of a format, some of which are kept here."""

    def __init__(self, name, hidden=128, width=160, first=0, count=NUM_EXPERTS, end=End.SWIGLU, **options):
        form, self.dtype = FORMATS[name]
        self.format = replace(form, **options)
        self.first, self.count, self.end, self.hidden = first, count, end, hidden
        kept = slice(first, first + count)
        gate_up, self.gate_up_values = make_weight(name, 2 * width, hidden, 1)
        down, self.down_values = make_weight(name, hidden, width, 2)
        self.gate_up = {key: weight[kept].contiguous() for key, weight in gate_up.items()}
        self.down = {key: weight[kept].contiguous() for key, weight in down.items()}

    def __call__(self, x, chosen, dispatch, add_to=None, multiplier=1.0):
        work = expert_work(chosen, self.first, self.count, dispatch)
        hidden = self.format.gated_experts(self.gate_up, x, work, self.end)
        return self.format.sum_experts(self.down, hidden, work, x.shape, add_to, multiplier)

    def expected(self, x, chosen, add_to=None, multiplier=1.0):
        out = torch.zeros(x.shape, dtype=torch.float64) if add_to is None else add_to.double()
        for t, (experts, weights) in enumerate(zip(*(part.tolist() for part in chosen), strict=True)):
            for number, weight in zip(experts, weights, strict=True):
                if self.first <= number < self.first + self.count:
                    gate, up = (self.gate_up_values[number] @ x[t].double()).chunk(2)
                    gate = F.gelu(gate, approximate="tanh") if self.end is End.GEGLU else F.silu(gate)
                    out[t] += multiplier * weight * (self.down_values[number] @ (gate * up))
        return out


def make_step(tokens, dtype, hidden=128):
    """Tokens, then padding whose inputs are NaN, and their experts."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens + PADDING, hidden, generator=generator).to(dtype)
    x[tokens:] = torch.nan
    expert = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP] for _ in range(len(x))]).to(
        torch.int32
    )
    weight = torch.rand(len(x), TOP, generator=generator)
    expert[tokens:], weight[tokens:] = NUM_EXPERTS, 0.0
    return x, Chosen(expert, weight)


def assert_near(found, expected, dtype):
    assert found.dtype == dtype
    assert ((found.double() - expected).norm() / expected.norm()).item() < TOLERANCES[dtype]


@pytest.mark.parametrize("dispatch", ExpertDispatch)
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_experts_match_float64(name, tokens, dispatch, computed_by):
    if name.startswith("Q") and computed_by == "the library":
        pytest.skip("blocks are kept where there are kernels")
    layer = Layer(name)
    x, chosen = make_step(tokens, layer.dtype)
    assert_near(layer(x, chosen, dispatch)[:tokens], layer.expected(x, chosen)[:tokens], layer.dtype)
    residual = torch.randn(x.shape).to(layer.dtype)
    residual[tokens:] = torch.nan
    expected = layer.expected(x, chosen, residual, 0.5)[:tokens]
    assert_near(layer(x, chosen, dispatch, residual, 0.5)[:tokens], expected, layer.dtype)


@pytest.mark.parametrize("dispatch", ExpertDispatch)
@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 3), (5, 1)])
@pytest.mark.parametrize("name", ["float32", "FP8", "Q8_0"])
def test_experts_of_other_ranks_add_nothing(name, first, count, dispatch):
    if name == "Q8_0" and not native.available():
        pytest.skip(f"no kernels: {native.missing()}")
    layer = Layer(name, first=first, count=count)
    x, chosen = make_step(9, layer.dtype)
    residual = torch.randn(x.shape)
    expected = layer.expected(x, chosen, residual)
    found = layer(x, chosen, dispatch, residual.clone())
    assert_near(found, expected, layer.dtype)
    without = ((chosen.expert < first) | (chosen.expert >= first + count)).all(1)
    assert without[9:].all()
    assert torch.equal(found[without], residual[without])
    nothing = Chosen(torch.full_like(chosen.expert, NUM_EXPERTS), torch.zeros_like(chosen.weight))
    assert torch.equal(layer(x, nothing, dispatch), torch.zeros(x.shape))


@pytest.mark.parametrize(("hidden", "width"), [(40, 160), (128, 40), (96, 24), (17, 5)])
@pytest.mark.parametrize("end", [End.SWIGLU, End.GEGLU])
def test_odd_sizes_and_the_other_activation(hidden, width, end, computed_by):
    layer = Layer("float32", hidden, width, end=end)
    x, chosen = make_step(7, layer.dtype, hidden)
    assert_near(layer(x, chosen, ExpertDispatch.TILES)[:7], layer.expected(x, chosen)[:7], layer.dtype)


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_blocks_with_the_other_activation():
    layer = Layer("Q4_1", end=End.GEGLU)
    x, chosen = make_step(7, layer.dtype)
    assert_near(layer(x, chosen, ExpertDispatch.PAIRS)[:7], layer.expected(x, chosen)[:7], layer.dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_deterministic_experts_give_a_token_the_bits_that_it_has_alone(name, computed_by):
    if name.startswith("Q") and computed_by == "the library":
        pytest.skip("blocks are kept where there are kernels")
    layer = Layer(name, 96, 64, deterministic=True)
    x, chosen = make_step(50, layer.dtype, 96)
    whole = layer(x, chosen, ExpertDispatch.TILES)
    for t in (0, 1, 17, 49):
        one = slice(t, t + 1)
        for dispatch in ExpertDispatch:
            assert torch.equal(layer(x[one], Chosen(*(part[one] for part in chosen)), dispatch)[0], whole[t])


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_up_to_so_many_tokens_blocks_are_exact():
    layer = Layer("Q4_0", exact_tokens=EXACT_TOKENS)
    exact = Layer("Q4_0", exact_tokens=EXACT_TOKENS, deterministic=True)
    x, chosen = make_step(EXACT_TOKENS - PADDING, layer.dtype)
    found, expected = (made(x, chosen, ExpertDispatch.TILES) for made in (layer, exact))
    assert torch.equal(found, expected)
    assert (layer.format.rounds_above, exact.format.rounds_above) == (EXACT_TOKENS, None)


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_bits_do_not_depend_on_the_number_of_threads():
    layer = Layer("Q4_0", exact_tokens=EXACT_TOKENS)
    x, chosen = make_step(200, layer.dtype)
    found, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(layer(x, chosen, ExpertDispatch.TILES)[:200])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert ((found[0].double() - layer.expected(x, chosen)[:200]).norm() / found[0].norm()) < 1e-2


@pytest.mark.skipif(not native.available(), reason="no kernels")
@pytest.mark.parametrize(("first", "count"), [(0, 6), (2, 3), (5, 1), (0, 1)])
@pytest.mark.parametrize("tokens", [1, 33])
def test_pairs_are_sorted_as_the_reference_sorts_them(tokens, first, count):
    _, chosen = make_step(tokens, torch.float32)
    order, ends = cpu.sort_pairs(chosen.expert, first, count)
    expected_order, expected_ends = reference.sort_pairs(chosen.expert, first, count)
    assert (order.dtype, ends.dtype) == (torch.int32, torch.int32)
    assert torch.equal(ends, expected_ends)
    assert torch.equal(order, expected_order)

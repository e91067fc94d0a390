"""Experts with biases, a clamped SwiGLU, and routers whose logits have a bias: every way there is, against float64.

Shapes: T tokens, N experts, E hidden size, M width of an expert.
"""

import pytest
import torch
from compiled_for_hopper import lines_of
from triton_operators import make_rows_of_products_independent

from stepgraph import native
from stepgraph.ops.experts import cpu, pairs, reference, tiles, triton
from stepgraph.ops.fp8_linear import dequantize, quantize
from stepgraph.ops.route import reference as route
from stepgraph.ops.route import triton as route_triton
from stepgraph.ops.swiglu import Clamp

NUM_EXPERTS, E, M = 6, 96, 64
CLAMP = Clamp(limit=0.9, alpha=1.702)
"""Of which products of these sizes are often beyond the limit, on either side."""
EXPERTS = torch.tensor([[4, 1, 2], [6, 6, 6], [0, 5, 3], [2, 4, 0], [3, 2, 1]], dtype=torch.int32)
"""The second token is padding."""


class Layer:
    """Random experts, of which those from `first` on are kept here, and what they stand for in float64."""

    def __init__(self, dtype, *, fp8=False, first=0, count=NUM_EXPERTS):
        generator = torch.Generator().manual_seed(7)
        self.first, self.count, kept = first, count, slice(first, first + count)
        self.operands, self.exact = [], []
        for outputs, inputs in ((2 * M, E), (E, M)):
            values = torch.randn(NUM_EXPERTS * outputs, inputs, generator=generator) / inputs**0.5
            bias = torch.randn(NUM_EXPERTS, outputs, generator=generator).to(dtype)
            weight, scale = quantize(values, 1) if fp8 else (values.to(dtype), None)
            exact = dequantize(weight, scale) if fp8 else weight
            scale = None if scale is None else scale.view(NUM_EXPERTS, outputs, 1)[kept].contiguous()
            weight = weight.view(NUM_EXPERTS, outputs, inputs)[kept].contiguous()
            self.operands.append((weight, scale, bias[kept].contiguous()))
            self.exact.append((exact.double().view(NUM_EXPERTS, outputs, inputs), bias.double()))
        self.x = torch.randn(len(EXPERTS), E, generator=generator).to(dtype)
        self.x[1] = torch.nan
        self.pair_weight = torch.rand(EXPERTS.shape, generator=generator)
        self.residual = torch.randn(len(EXPERTS), E, generator=generator).to(dtype)

    def expected(self):
        (gate_up, gate_up_bias), (down, down_bias) = self.exact
        out = self.residual.double()
        for token, place in (EXPERTS < NUM_EXPERTS).nonzero().tolist():
            number = int(EXPERTS[token, place])
            if self.first <= number < self.first + self.count:
                gate, up = (gate_up[number] @ self.x[token].double() + gate_up_bias[number]).chunk(2)
                gate, up = gate.clamp(max=CLAMP.limit), up.clamp(-CLAMP.limit, CLAMP.limit)
                hidden = (up + 1) * gate * torch.sigmoid(CLAMP.alpha * gate)
                weight = float(self.pair_weight[token, place])
                out[token] += 0.5 * weight * (down[number] @ hidden + down_bias[number])
        return out

    def run(self, module, device, *, is_sorted, by_row=False):
        def there(tensor):
            return None if tensor is None else tensor.to(device)

        expert, pair_weight, out = (there(t).clone() for t in (EXPERTS, self.pair_weight, self.residual))
        order = reference.sort_pairs(EXPERTS, self.first, self.count) if is_sorted else (None, None)
        order = [there(tensor) for tensor in order]
        gate_up, down = ([there(tensor) for tensor in operands] for operands in self.operands)
        hidden = module.gated_experts(
            there(self.x), *gate_up[:2], expert, self.first, *order, False, by_row, gate_up[2], *CLAMP
        )
        end = out, True, 0.5, by_row, down[2]
        module.sum_experts(hidden, *down[:2], expert, pair_weight, self.first, *order, *end)
        return out.cpu()


@pytest.mark.parametrize("is_sorted", [False, True], ids=["pairs", "tiles"])
@pytest.mark.parametrize(("first", "count"), [(0, NUM_EXPERTS), (1, 3)], ids=["all experts", "some experts"])
@pytest.mark.parametrize(
    ("dtype", "fp8"), [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.float16, True)]
)
@pytest.mark.parametrize("way", ["reference", "triton", "cpu", "the library"])
def test_every_way_matches_float64(way, dtype, fp8, first, count, is_sorted, monkeypatch, device) -> None:
    if way == "the library":
        monkeypatch.setattr(native, "available", lambda: False)
    if way == "triton" and dtype == torch.bfloat16 and is_sorted and device == "cpu":
        pytest.skip("the interpreter multiplies bfloat16 as integers")
    layer = Layer(dtype, fp8=fp8, first=first, count=count)
    module = {"reference": reference, "triton": triton}.get(way, cpu)
    found, expected = layer.run(module, device if way == "triton" else "cpu", is_sorted=is_sorted), layer.expected()
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found[1], layer.residual[1])


@pytest.mark.parametrize("way", ["cpu", "triton"])
def test_by_row_a_token_has_the_bits_that_it_has_alone(way, monkeypatch, device) -> None:
    make_rows_of_products_independent(monkeypatch)
    module, place = (triton, device) if way == "triton" else (cpu, "cpu")
    layer = Layer(torch.float16 if way == "triton" else torch.float32)
    together = layer.run(module, place, is_sorted=True, by_row=True)
    for token in (0, 2, 3, 4):
        alone = Layer(layer.x.dtype)
        monkeypatch.setattr(f"{__name__}.EXPERTS", EXPERTS[token : token + 1])
        alone.x, alone.residual = layer.x[token : token + 1], layer.residual[token : token + 1]
        alone.pair_weight = layer.pair_weight[token : token + 1]
        assert torch.equal(alone.run(module, place, is_sorted=True, by_row=True)[0], together[token])
        monkeypatch.undo()
        make_rows_of_products_independent(monkeypatch)


@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_logits_have_their_bias_in_either_kind_of_program(tokens, device) -> None:
    """Of few tokens, slices of the inputs are programs of their own."""
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 320, generator=generator), torch.randn(20, 320, generator=generator) / 18
    bias = 4 * torch.randn(20, generator=generator)
    counts, totals = torch.tensor([tokens], dtype=torch.int32), torch.zeros(20, dtype=torch.int64)
    routing = 3, False, True, 0.0, 1.0, 1, 1, 2
    expected, expected_weight = route.route(x, weight, None, counts, totals.clone(), *routing, bias)
    there = [tensor.to(device) for tensor in (x, weight, counts, totals, bias)]
    found, found_weight = route_triton.route(there[0], there[1], None, there[2], there[3], *routing, there[4])
    assert torch.equal(found.cpu(), expected)
    torch.testing.assert_close(found_weight.cpu(), expected_weight, rtol=1e-4, atol=1e-5)
    without, _ = route.route(x, weight, None, counts, totals.clone(), *routing)
    assert not torch.equal(without, expected)
    few = route_triton.write_logits(there[0], there[1], bias=there[4])[0]
    many = route_triton.write_logits(there[0], there[1], bias=there[4], tile=route_triton.MANY)[0]
    summed = few[0].clone()
    for part in few[1:]:
        summed += part
    assert torch.equal(summed, many[0])


_COMPILED = """
from stepgraph.ops.experts import pairs, tiles
from stepgraph.ops.swiglu import Clamp

N, E, M, T, K = 32, 2880, 2880, 8, 4
half = dict(dtype=torch.bfloat16)
gate_up, down = torch.empty(N, 2 * M, E, **half), torch.empty(N, E, M, **half)
biases = {"plain": (None, None, None, 0.0, 1.0), "biased": (
    torch.empty(N), torch.empty(N, 2 * M, **half), torch.empty(N, E, **half), 7.0, 1.702)}
for name, (logit_bias, gate_up_bias, down_bias, limit, alpha) in biases.items():
    x, out = torch.empty(T, E, **half), torch.empty(T, E, **half)
    counts, totals = torch.empty(1, dtype=torch.int32), torch.empty(N, dtype=torch.int64)
    pairs.mixture(
        x, torch.empty(E, **half), 1e-5, torch.empty(N, E), None, counts, totals, K, False, True, 0.0, 1.0, 1, 1, 2,
        gate_up, None, down, None, 0, False, out, True, 1.0, logit_bias, gate_up_bias, down_bias, limit, alpha,
    )
    for pairs_of in (64, 2048):
        order, ends = torch.empty(pairs_of, dtype=torch.int32), torch.empty(N, dtype=torch.int32)
        x = torch.empty(pairs_of // K, E, **half)
        hidden = tiles.gated_experts(x, gate_up, None, order, ends, False, gate_up_bias, limit, alpha)
        tiles.down_experts(hidden, down, None, order, ends, down_bias)
    print(name)
"""


def test_kernels_compile_for_hopper() -> None:
    assert lines_of(_COMPILED) == ["plain", "biased"]


def test_a_mixture_is_its_parts(device) -> None:
    layer = Layer(torch.float32)
    generator = torch.Generator().manual_seed(3)
    router, logit_bias = torch.randn(NUM_EXPERTS, E, generator=generator), torch.randn(NUM_EXPERTS, generator=generator)
    x = layer.x.nan_to_num(0.5)
    counts, totals = torch.tensor([len(x) - 1], dtype=torch.int32), torch.zeros(NUM_EXPERTS, dtype=torch.int64)
    (gate_up, _, gate_up_bias), (down, _, down_bias) = layer.operands
    choice = 3, False, True, 0.0, 1.0, 1, 1, 2
    expert, weight = route.route(x, router, None, counts, totals.clone(), *choice, logit_bias)
    hidden = reference.gated_experts(x, gate_up, None, expert, 0, None, None, False, False, gate_up_bias, *CLAMP)
    expected = layer.residual.clone()
    reference.sum_experts(hidden, down, None, expert, weight, 0, None, None, expected, True, 1.0, False, down_bias)
    there = [t.to(device) for t in (x, router, counts, totals, gate_up, down, layer.residual.clone(), logit_bias)]
    biases = gate_up_bias.to(device), down_bias.to(device)
    pairs.mixture(
        there[0], None, 0.0, there[1], None, there[2], there[3], *choice, there[4], None, there[5], None, 0, False,
        there[6], True, 1.0, there[7], *biases, *CLAMP,
    )  # fmt: skip
    torch.testing.assert_close(there[6].cpu(), expected, rtol=1e-4, atol=1e-4)


def test_tiles_take_copied_and_flat_weights_with_biases(device) -> None:
    """The forms that only 16 bits and large sizes would choose."""
    layer = Layer(torch.float16)
    order, ends = (t.to(device) for t in reference.sort_pairs(EXPERTS, 0, NUM_EXPERTS))
    weight, _, bias = (None if t is None else t.to(device) for t in layer.operands[0])
    x = layer.x.to(device)
    expected = reference.gated_experts(
        layer.x, weight.cpu(), None, EXPERTS, 0, order.cpu(), ends.cpu(), False, False, bias.cpu(), *CLAMP
    )[: int(ends[-1])]
    for outputs, copied in ((64, False), (32, False), (32, True)):
        tile = tiles.ExpertTile(rows=16, outputs=outputs, inputs=32, num_warps=4, num_stages=2, copied=copied)
        found = tiles.gated_experts(x, weight, None, order, ends, False, bias, *CLAMP, tile=tile)[: int(ends[-1])]
        torch.testing.assert_close(found.cpu(), expected, rtol=4e-3, atol=4e-3)

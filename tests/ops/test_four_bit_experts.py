"""Experts of 4 bits: kernels against products in float64 with the weights dequantised by the formats' definitions."""

import pytest
import torch
from compiled_for_hopper import lines_of
from test_four_bit_linear import defined, random_weight

from stepgraph.ops.experts import ExpertDispatch, ExpertWork, expert_work
from stepgraph.ops.four_bit_experts import cpu, triton
from stepgraph.ops.four_bit_linear import FourBitWeight
from stepgraph.ops.route import Chosen

N, TOP, FIRST = 3, 2, 1
"""Experts that are kept here, those of a token, and the number of the first; there is one before them and one behind."""


def experts(outputs, inputs, kind, group_size):
    """A weight with a dimension for the experts, and its values [N, O, I] in float64, of products of the order of 1."""
    weight, codes = random_weight(N * outputs, inputs, kind=kind, group_size=group_size)
    factor = torch.ones(N * outputs, 1) if weight.factor is None else weight.factor
    weight = weight._replace(factor=factor * inputs**-0.5 / 4)
    values = defined(weight, codes).view(N, outputs, inputs)
    return FourBitWeight(*(t.view(N, outputs, -1) if isinstance(t, torch.Tensor) else t for t in weight)), values


def routed(tokens):
    generator = torch.Generator().manual_seed(tokens)
    chosen = torch.stack([torch.randperm(N + 2, generator=generator)[:TOP] for _ in range(tokens)]).int()
    return Chosen(chosen, torch.rand(tokens, TOP, generator=generator))


def pairs_of(work: ExpertWork):
    """Where each pair's row is between the two products, and the pair's token and expert, of experts that are here."""
    for pair, number in enumerate(work.expert.flatten().tolist()):
        if FIRST <= number < FIRST + N:
            row = pair if work.order is None else work.order.tolist().index(pair)
            yield row, pair, pair // TOP, number - FIRST


@pytest.mark.parametrize("dispatch", ExpertDispatch)
@pytest.mark.parametrize("form", [triton, cpu], ids=["cuda", "cpu"])
@pytest.mark.parametrize(
    ("end", "kind", "group_size", "tokens", "dtype"),
    [
        ("silu", "integers and zeros", 32, 3, torch.float32),
        ("clamped silu with biases", "E2M1, exponents", 32, 21, torch.float16),
        ("gelu", "integers", 128, 6, torch.float16),
        ("relu2", "E2M1, 8-bit scales", 16, 6, torch.float16),
    ],
)
def test_kernels_match_float64(form, tokens, dtype, end, kind, group_size, dispatch, device):
    by_row = end == "gelu"
    place = device if form is triton else torch.device("cpu")
    hidden_size, width = 101, 40
    parts = 1 if end == "relu2" else 2
    gate_up, gate_up_values = experts(parts * width, hidden_size, kind, group_size)
    down, down_values = experts(hidden_size, width, kind, group_size)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    is_biased = "biases" in end
    sizes = parts * width, hidden_size
    biases = [torch.randn(N, size, generator=generator).to(dtype) if is_biased else None for size in sizes]
    limit, alpha = (1.2, 1.7) if is_biased else (0.0, 1.0)
    work = expert_work(routed(tokens), FIRST, N, dispatch)

    def there(*values):
        return [v.to(place) if isinstance(v, torch.Tensor) else v for v in values]

    pairs = there(work.expert, FIRST, work.order, work.ends)
    ends = end == "gelu", by_row, *there(biases[0]), limit, alpha, end != "relu2"
    hidden = form.four_bit_gated_experts(*there(x), *there(*gate_up), *pairs, *ends).cpu()
    tolerance = {torch.float32: 1e-4, torch.float16: 0.02}[dtype]
    for row, _, token, number in pairs_of(work):
        product = x[token].double() @ gate_up_values[number].T + (biases[0][number].double() if is_biased else 0)
        gate, up = product.chunk(2) if parts == 2 else (product, product)
        if is_biased:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
            expected = gate * torch.sigmoid(alpha * gate) * up
        elif end == "relu2":
            expected = gate.relu().square()
        else:
            expected = (
                torch.nn.functional.gelu(gate, approximate="tanh") if end == "gelu" else gate * gate.sigmoid()
            ) * up
        torch.testing.assert_close(hidden[row].double(), expected, rtol=tolerance, atol=tolerance)

    hidden = torch.randn(tokens * TOP, width, generator=generator).to(dtype)
    out = torch.randn(tokens, hidden_size, generator=generator).to(dtype)
    expected = out.double()
    for row, pair, token, number in pairs_of(work):
        product = hidden[row].double() @ down_values[number].T + (biases[1][number].double() if is_biased else 0)
        expected[token] += 0.5 * work.weight.flatten()[pair].double() * product
    found = out.to(place, copy=True)
    pairs = there(work.expert, work.weight, FIRST, work.order, work.ends)
    form.four_bit_sum_experts(*there(hidden), *there(*down), *pairs, found, True, 0.5, by_row, *there(biases[1]))
    torch.testing.assert_close(found.cpu().double(), expected, rtol=tolerance, atol=tolerance)


COMPILED = """
from stepgraph.ops.four_bit_experts import triton as kernel

N, E, M, K, T = 8, 2880, 2880, 4, 64
x, expert = torch.empty(T, E, dtype=torch.bfloat16), torch.zeros(T, K, dtype=torch.int32)
order, ends = torch.zeros(T * K, dtype=torch.int32), torch.zeros(N, dtype=torch.int32)
weight = torch.empty(N, 2 * M, E // 2, dtype=torch.uint8), torch.empty(N, 2 * M, E // 32, dtype=torch.uint8), None, None, 32, True
bias = torch.empty(N, 2 * M, dtype=torch.bfloat16)
kernel.four_bit_gated_experts(x, *weight, expert, 0, order, ends, False, False, bias, 7.0, 1.702, True)
for compiled in kernel._experts_kernel.device_caches[0][0].values():
    print("mma" in compiled.asm["ptx"], compiled.metadata.shared)
"""


def test_they_compile_for_hopper_and_run_on_tensor_cores():
    (line,) = lines_of(COMPILED)
    on_tensor_cores, shared = line.split()
    assert on_tensor_cores == "True"
    assert int(shared) <= 227 << 10

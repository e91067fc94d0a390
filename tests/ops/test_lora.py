"""`lora`: kernels against the definition, token by token, over mixed batches."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops import lora as lora_operator
from stepgraph.ops.lora import cpu, reference
from stepgraph.ops.lora import triton as kernel

ADAPTERS, RANK = 3, 16
CASES = {  # tokens, inputs, outputs of each merged projection
    "one token": (1, 32, (64,)),
    "merged, borders inside a block": (37, 520, (40, 70, 30)),
    "two projections, odd inputs": (20, 131, (96, 96)),
}


class Output(NamedTuple):
    out: Tensor


def operands(tokens, inputs, parts, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + inputs)
    x = torch.randn(tokens, inputs, generator=generator)
    a = torch.randn(ADAPTERS + 1, len(parts) * RANK, inputs, generator=generator) / inputs**0.5
    b = torch.randn(ADAPTERS + 1, sum(parts), RANK, generator=generator)
    a[0] = b[0] = torch.nan  # of no adapter: never read
    out = torch.randn(tokens, sum(parts), generator=generator)
    return [t.to(dtype) for t in (x, a, b, out)]


def mixed_index(tokens):
    """Rows of several tokens and of one, with and without an adapter."""
    return torch.tensor([0, 2, 2, 2, 1, 0, 3])[torch.arange(tokens) // 3 % 7].to(torch.int32)


def exact(x, a, b, out, index, parts):
    """The update in float64, each projection by itself."""
    result = out.double()
    for token, adapter in enumerate(index.tolist()):
        if adapter:
            for p, columns in enumerate(torch.arange(sum(parts)).split(list(parts))):
                hidden = a[adapter, p * RANK : (p + 1) * RANK].double() @ x[token].double()
                result[token, columns] += b[adapter, columns].double() @ hidden
    return result


def on(device, *tensors):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", ["reference", "cpu", "cpu, deterministic", "triton"])
def test_every_kernel_computes_the_update_of_each_tokens_own_adapter(run, case, device):
    tokens, inputs, parts = CASES[case]
    x, a, b, out = operands(tokens, inputs, parts)
    index = mixed_index(tokens) if tokens > 1 else torch.tensor([2], dtype=torch.int32)
    expected = exact(x, a, b, out, index, parts)
    where = device if run == "triton" else "cpu"
    function = {"reference": reference.lora, "triton": kernel.lora}.get(run, cpu.lora)
    found = out.to(where)
    function(*on(where, x, a, b, index), parts, run == "cpu, deterministic", found)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.cpu()[index == 0], out[index == 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", ["cpu", "triton"])
def test_16_bits_are_rounded_like_the_reference(run, dtype, device):
    if run == "triton" and dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    tokens, inputs, parts = CASES["merged, borders inside a block"]
    x, a, b, out = operands(tokens, inputs, parts, dtype)
    index, expected = mixed_index(tokens), out.clone()
    reference.lora(x, a, b, index, parts, False, expected)
    where = device if run == "triton" else "cpu"
    found = out.to(where)
    (kernel if run == "triton" else cpu).lora(*on(where, x, a, b, index), parts, False, found)
    torch.testing.assert_close(found.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("run", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_update_has_the_same_bits_alone_and_beside_any_others(run, dtype, device):
    if run == "triton" and device == "cpu":
        pytest.skip("Triton's interpreter adds up with numpy's products, not with tensor cores")
    tokens, inputs, parts = CASES["merged, borders inside a block"]
    where = device if run == "triton" else "cpu"
    x, a, b, out = on(where, *operands(tokens, inputs, parts, dtype))
    index = mixed_index(tokens).to(where)
    function = kernel.lora if run == "triton" else cpu.lora

    def updated(order):
        result = out[order].clone()
        function(x[order].contiguous(), a, b, index[order].contiguous(), parts, True, result)
        return result

    alone = torch.cat([updated(torch.tensor([token])) for token in range(tokens)])
    for shift in range(tokens):
        order = torch.arange(tokens).roll(shift)
        assert torch.equal(updated(order), alone[order.to(where)]), shift
    assert torch.equal(updated(torch.arange(5)), alone[:5])


def test_padding_tokens_that_hold_nan_change_nothing(device):
    x, a, b, out = on(device, *operands(37, 520, (40, 70, 30)))
    index = mixed_index(37).to(device)
    clean = out.clone()
    kernel.lora(x, a, b, index, (40, 70, 30), False, clean)
    padded = [torch.cat((t, torch.full((5, t.shape[1]), torch.nan, device=device))) for t in (x, out)]
    padded_index = torch.cat((index, index.new_zeros(5)))
    kernel.lora(padded[0], a, b, padded_index, (40, 70, 30), False, padded[1])
    torch.testing.assert_close(padded[1][:37], clean, rtol=0, atol=1e-5)


def test_the_operator_can_be_captured():
    x, a, b, out = operands(4, 32, (8, 8))
    index = torch.tensor([0, 1, 1, 3], dtype=torch.int32)

    def program() -> Output:
        lora_operator(x, a, b, index, (8, 8), out, deterministic=False)
        return Output(out)

    assert CpuBackend().capture(program, 1).calls == (torch.ops.stepgraph.lora.default,)

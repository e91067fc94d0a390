"""`linear`: the streaming kernel against the product in float64."""

import pytest
import torch

from stepgraph.ops.linear import triton as kernel


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 16), (40, 100), (9, 1030)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_streamed_product_matches_float64(tokens, outputs, inputs, with_bias, device):
    generator = torch.Generator().manual_seed(tokens * outputs)
    x, weight = torch.randn(tokens, inputs, generator=generator), torch.randn(outputs, inputs, generator=generator)
    bias = torch.randn(outputs, generator=generator) if with_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    found = kernel.linear(*(None if t is None else t.to(device) for t in (x, weight, bias)))
    assert found.shape == (tokens, outputs)
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-4)


def test_a_token_gets_the_same_sum_alone_and_beside_others(device):
    x, weight = torch.randn(2, 96, device=device), torch.randn(24, 96, device=device)
    together = kernel.linear(x, weight, None)
    for token in range(2):
        assert torch.equal(kernel.linear(x[token : token + 1], weight, None)[0], together[token])


def test_token_counts_without_a_streaming_kernel_go_to_the_library(device):
    x, weight = torch.randn(3, 32, device=device), torch.randn(8, 32, device=device)
    assert torch.equal(kernel.linear(x, weight, None), torch.nn.functional.linear(x, weight))

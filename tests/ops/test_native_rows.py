"""The CPU's own kernels of operators that work on each token by itself, against the references."""

import pytest
import torch

from stepgraph import native
from stepgraph.ops.rms_norm import cpu as rms_norm_cpu
from stepgraph.ops.rms_norm import reference as rms_norm_reference
from stepgraph.ops.rope_cache import cpu as rope_cpu
from stepgraph.ops.rope_cache import reference as rope_reference

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("width", [16, 80, 576, 20])
def test_rms_norm_matches_the_reference_and_keeps_a_rows_bits(rows, width):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator)
    weight = 1 + torch.rand(width, generator=generator)
    found = rms_norm_cpu.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(found, rms_norm_reference.rms_norm(x, weight, 1e-5), rtol=3e-6, atol=1e-6)
    assert torch.equal(rms_norm_cpu.rms_norm(x[-1:].clone(), weight, 1e-5)[0], found[-1])


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (2, 2, 32), (4, 1, 16)])
def test_rope_cache_matches_the_reference(tokens, heads, kv_heads, dim):
    """Padding tokens write slot 0 in the reference; here they write nothing, which nobody can tell."""
    generator = torch.Generator().manual_seed(tokens + dim)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim, generator=generator)
    positions = torch.randint(0, 50, (tokens,), generator=generator, dtype=torch.int32)
    kv_slots = (4 + torch.randperm(60, generator=generator)[:tokens]).to(torch.int32)
    kv_slots[tokens // 2 :: 3] = 0
    cos_sin = torch.randn(50, dim, generator=generator)
    caches = [[torch.full((16, 4, kv_heads, dim), -7.0) for _ in range(2)] for _ in range(2)]
    found, expected = (
        module.rope_cache(qkv, positions, kv_slots, cos_sin, None, None, *cache, heads, 1e-6)
        for module, cache in zip((rope_cpu, rope_reference), caches, strict=True)
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for cache, cache_expected in zip(*caches, strict=True):
        torch.testing.assert_close(cache[1:], cache_expected[1:], rtol=1e-5, atol=1e-6)

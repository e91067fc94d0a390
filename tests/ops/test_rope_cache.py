"""Rotary embedding with the cache write: reference against complex rotation, Triton against the reference.

Shapes: T tokens, H query heads, G key/value heads, D head size, B tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from stepgraph.ops.rope_cache import reference
from stepgraph.ops.rope_cache import triton as kernels

EPS = 1e-6
UNTOUCHED = -7.0


@dataclass(frozen=True)
class Inputs:
    qkv: Tensor
    positions: Tensor
    kv_slots: Tensor
    cos_sin: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    k_cache: Tensor
    v_cache: Tensor
    num_heads: int
    eps: float = EPS
    value_norm: bool = False

    def to(self, device: str) -> Inputs:
        """A copy on `device`, caches included."""
        tensors = {name: t.to(device, copy=True) for name, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **tensors)

    def run(self, rope_cache) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the caches after the call."""
        q = rope_cache(*vars(self).values())
        return q, self.k_cache, self.v_cache


def make_inputs(
    num_tokens: int = 5,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    *,
    norm: bool,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
) -> Inputs:
    generator = torch.Generator().manual_seed(num_tokens * head_dim)
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(50)[:, None] * frequency
    q_norm, k_norm = (1 + torch.rand(head_dim, generator=generator).to(dtype) for _ in range(2))
    cache = torch.full((6, 4, num_kv_heads, head_dim), UNTOUCHED, dtype=cache_dtype or dtype)
    return Inputs(
        qkv=torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, generator=generator).to(dtype),
        positions=torch.randint(0, 50, (num_tokens,), generator=generator, dtype=torch.int32),
        kv_slots=4 + torch.randperm(20, generator=generator, dtype=torch.int32)[:num_tokens],
        cos_sin=torch.cat((angle.cos(), angle.sin()), dim=1),
        q_norm=q_norm if norm else None,
        k_norm=k_norm if norm else None,
        k_cache=cache,
        v_cache=cache.clone(),
        num_heads=num_heads,
    )


@pytest.mark.parametrize("norm", [False, True])
def test_reference_rotates_each_pair_by_its_angle(norm: bool) -> None:
    inputs = make_inputs(norm=norm)
    H, G, D = 4, 2, 16
    heads = inputs.qkv.double().view(-1, H + 2 * G, D)
    q, k, v = heads.split([H, G, G], dim=1)
    if inputs.q_norm is not None and inputs.k_norm is not None:
        q, k = (
            x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
            for x, weight in ((q, inputs.q_norm), (k, inputs.k_norm))
        )
    cos, sin = inputs.cos_sin.double()[inputs.positions.long()].chunk(2, dim=1)
    turn = torch.complex(cos, sin)[:, None]

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)

    q_out, k_cache, v_cache = inputs.run(reference.rope_cache)
    slots = inputs.kv_slots.long()
    torch.testing.assert_close(q_out.double(), rotated(q), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k_cache.view(-1, G, D)[slots].double(), rotated(k), rtol=1e-5, atol=1e-6)
    assert torch.equal(v_cache.view(-1, G, D)[slots], v.float())


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 1, 16), (6, 2, 10), (8, 8, 64), (5, 5, 80)]
)
def test_triton_matches_the_reference_and_writes_nowhere_else(
    num_heads: int, num_kv_heads: int, head_dim: int, norm: bool, device: str
) -> None:
    inputs = make_inputs(3, num_heads, num_kv_heads, head_dim, norm=norm)
    written = torch.zeros(24, dtype=torch.bool)
    written[inputs.kv_slots.long()] = True
    expected = inputs.to("cpu").run(reference.rope_cache)
    q, k_cache, v_cache = (out.cpu() for out in inputs.to(device).run(kernels.rope_cache))
    torch.testing.assert_close(q, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(k_cache, expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(v_cache, expected[2])
    for cache in (k_cache, v_cache):
        assert (cache.view(24, -1)[~written] == UNTOUCHED).all()


def projected(inputs: Inputs, which: str) -> Inputs:
    """With a projection of keys for values too, or of queries alone."""
    kv_heads, D = inputs.k_cache.shape[2:]
    width = (inputs.num_heads + (kv_heads if which == "keys" else 0)) * D
    return replace(
        inputs,
        qkv=inputs.qkv[:, :width].contiguous(),
        k_norm=inputs.k_norm if which == "keys" else None,
        value_norm=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (8, 8, 64), (8, 1, 512), (6, 2, 512)])
def test_values_are_normalised_and_may_be_the_keys(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> None:
    """Before they are normalised and rotated; whole, they are what values of their own would be."""
    inputs = make_inputs(3, num_heads, num_kv_heads, head_dim, norm=True, dtype=dtype)
    shared = projected(inputs, "keys")
    k = shared.qkv[:, num_heads * head_dim :]
    doubled = replace(shared, qkv=torch.cat((shared.qkv, k), dim=1))
    v = k.view(3, num_kv_heads, head_dim).double()
    normed = v / (v.square().mean(-1, keepdim=True) + EPS).sqrt()
    slots, unit = inputs.kv_slots.long(), torch.finfo(dtype).eps
    expected = doubled.to("cpu").run(reference.rope_cache)
    for kernel, where in ((reference.rope_cache, "cpu"), (kernels.rope_cache, device)):
        for given in (shared, doubled):
            q, k_cache, v_cache = (out.cpu() for out in given.to(where).run(kernel))
            torch.testing.assert_close(q, expected[0], rtol=4 * unit, atol=4 * unit)
            torch.testing.assert_close(k_cache, expected[1], rtol=4 * unit, atol=4 * unit)
            found = v_cache.flatten(0, 1)[slots].double()
            torch.testing.assert_close(found, normed, rtol=4 * unit, atol=unit)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (3, 3, 10), (8, 1, 512)])
def test_queries_alone_are_what_they_are_beside_keys_and_write_nothing(
    num_heads: int, num_kv_heads: int, head_dim: int, device: str
) -> None:
    inputs = make_inputs(3, num_heads, num_kv_heads, head_dim, norm=True)
    alone = projected(inputs, "queries")
    expected, _, _ = inputs.to("cpu").run(reference.rope_cache)
    for kernel, where in ((reference.rope_cache, "cpu"), (kernels.rope_cache, device)):
        q, *caches = (out.cpu() for out in alone.to(where).run(kernel))
        torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-6)
        assert all((cache == UNTOUCHED).all() for cache in caches)


def test_padding_tokens_write_only_the_null_block(device: str) -> None:
    inputs = make_inputs(4, norm=True)
    inputs = replace(inputs, kv_slots=torch.tensor([9, 0, 0, 0], dtype=torch.int32))
    _, k_cache, v_cache = (out.cpu() for out in inputs.to(device).run(kernels.rope_cache))
    for cache in (k_cache, v_cache):
        lines = cache.view(24, -1)
        assert (lines[9] != UNTOUCHED).all()
        assert (lines[1:9] == UNTOUCHED).all()
        assert (lines[10:] == UNTOUCHED).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
def test_triton_rounds_as_the_reference_does(norm: bool, dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter truncates to bfloat16 instead of rounding")
    inputs = make_inputs(norm=norm, head_dim=64, dtype=dtype)
    expected = inputs.to("cpu").run(reference.rope_cache)
    unit = torch.finfo(dtype).eps
    for out, wanted in zip(inputs.to(device).run(kernels.rope_cache), expected, strict=True):
        torch.testing.assert_close(out.cpu(), wanted, rtol=unit, atol=unit / 8)
        assert (out.cpu() == wanted).float().mean() > 0.9  # one unit only where float32 results differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_float8_cache_gets_the_same_keys_and_values_rounded(dtype: torch.dtype, device: str) -> None:
    settings = {"num_tokens": 7, "norm": False, "head_dim": 64, "dtype": dtype}
    inputs, wide = (make_inputs(**settings, cache_dtype=cache_dtype) for cache_dtype in (torch.float8_e4m3fn, dtype))
    inputs, wide = (replace(x, qkv=200 * x.qkv) for x in (inputs, wide))  # some beyond the largest float8, 448
    expected_q, *expected = wide.run(reference.rope_cache)
    assert expected[0].abs().max() > 448
    for kernel, where in ((reference.rope_cache, "cpu"), (kernels.rope_cache, device)):
        q, *caches = inputs.to(where).run(kernel)
        torch.testing.assert_close(q.cpu(), expected_q, rtol=2 * torch.finfo(dtype).eps, atol=0.05)
        for cache, wanted in zip(caches, expected, strict=True):
            assert cache.dtype == torch.float8_e4m3fn
            found, wanted = cache.cpu().float(), wanted.clamp(-448, 448).to(cache.dtype).float()
            if kernel is kernels.rope_cache and device == "cpu":  # Triton's interpreter rounds to float8 wrongly
                same = found.isclose(wanted, rtol=1 / 7, atol=2**-6)
            else:
                same = found == wanted
            assert same.float().mean() > 0.98  # in the others, float32 results round differently

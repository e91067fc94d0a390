"""A layer of latent attention gives by keys and values of this step's tokens what it gives by absorbed queries alone.

Shapes: T tokens, E hidden size, L size of a cache entry, B tokens per block.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_batches import make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from triton_operators import triton_operators

from stepgraph.layers.cache import LatentCache
from stepgraph.layers.inputs import AttentionSpec, AttentionWork, GroupInputs, StepInputs
from stepgraph.layers.latent_attention import LatentAttention, LatentSizes
from stepgraph.layers.norm import RMSNorm
from stepgraph.ops import AttentionGeometry, StepTokens, expanded_geometry, mla_geometry
from stepgraph.parallel.shard import WHOLE
from stepgraph.platforms.cpu import CpuPlatform
from stepgraph.platforms.tuning import DEFAULT
from stepgraph.step.attention import AttentionSizes
from stepgraph.step.shape import StepShape

T, E, H, B = 48, 40, 4, 8
SIZES = LatentSizes(q_rank=0, kv_rank=32, key_dim=24, rotated_dim=16, value_dim=20, scale=0.2)
ROWS = {
    "a prompt": [(41, 0)],
    "chunk of a long prompt": [(30, 100)],
    "mixture": [(17, 30), (1, 12), (0, 9), (20, 0), (1, 0), (3, 64)],
}


@pytest.fixture(scope="module")
def layer(device: str) -> LatentAttention:
    torch.manual_seed(0)
    at_home = torch.device("cpu")
    layer = LatentAttention(E, H, SIZES, bias=False, eps=1e-6, shard=WHOLE, dtype=torch.float32, device=at_home)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer.to(device)


def inputs_of(rows: list[tuple[int, int]], geometry: AttentionGeometry, device: str) -> tuple[StepInputs, torch.Tensor]:
    """Of a step, and a cache whose entries are NaN where no row has one from before."""
    batch = make_batch(
        rows, num_tokens=T, num_kv_heads=1, group=H, head_dim=SIZES.entry_size, block_size=B, poisoned=True
    )
    entries = batch.k_cache.squeeze(2)
    positions, slots = torch.zeros(T).int(), torch.zeros(T).int()
    for slot, start, (query_len, context_len) in zip(batch.row_slot, batch.query_start, rows, strict=False):
        token, position = slice(int(start), int(start) + query_len), torch.arange(context_len, context_len + query_len)
        positions[token] = position
        slots[token] = batch.block_table[slot, position // B] * B + position % B
    entries.flatten(0, 1)[slots.long()] = torch.nan
    tokens = StepTokens(
        *(
            tensor.to(device)
            for tensor in (positions, positions, slots, batch.row_slot, batch.query_start, batch.kv_len)
        )
    )
    spec = SIZES.spec(H)
    work = {spec: AttentionWork.of(spec, tokens, geometry)}
    return StepInputs(tokens, work, (GroupInputs(batch.block_table.to(device), tokens, B),), ()), entries.to(device)


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e4m3fn], ids=["whole", "fp8"])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_both_ways_give_the_same(layer, rows, cache_dtype, device) -> None:
    assert_both_ways_give_the_same(layer, rows, cache_dtype, device)


class SelectsNoFloat8(TorchDispatchMode):
    """As torch on CUDA, which in some releases gathers no such numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.index_select.default or args[0].dtype != torch.float8_e4m3fn
        return func(*args, **(kwargs or {}))


def test_an_fp8_cache_is_read_as_bytes(layer, device) -> None:
    with SelectsNoFloat8():
        assert_both_ways_give_the_same(layer, ROWS["mixture"], torch.float8_e4m3fn, device)


def test_both_ways_give_the_same_by_triton_kernels(layer, device) -> None:
    with triton_operators("attention_plan", "expanded_attention", "mla_context_attention"):
        assert_both_ways_give_the_same(layer, ROWS["mixture"], torch.float32, device)


def assert_both_ways_give_the_same(
    layer: LatentAttention, rows: list[tuple[int, int]], cache_dtype: torch.dtype, device: str
) -> None:
    generator = torch.Generator().manual_seed(1)
    x_TE, norm = (
        torch.randn(T, E, generator=generator),
        RMSNorm(E, 1e-6, dtype=torch.float32, device=torch.device("cpu")),
    )
    torch.nn.init.ones_(norm.weight)
    angle = torch.randn(256, SIZES.rotated_dim // 2, generator=generator)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=1)
    geometry = mla_geometry(T, len(rows), H, 3)
    found = []
    for own in (None, expanded_geometry(T, len(rows), H, 3)):
        inputs, entries = inputs_of(rows, replace(geometry, own=own), device)
        cache = LatentCache(entries.to(cache_dtype))
        out_TF = layer(norm.to(device), x_TE.to(device), cos_sin.to(device), cache, inputs)
        found.append((out_TF[: sum(query_len for query_len, _ in rows)], cache.entries[1:].float()))
    assert found[0][0].abs().mean() > 0.1
    for absorbed, expanded in zip(*found, strict=True):
        torch.testing.assert_close(expanded, absorbed, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("shape", "least", "deterministic", "expanded"),
    [
        (StepShape(512, 8), float("inf"), False, False),
        (StepShape(512, 8), 504, False, True),
        (StepShape(512, 8), 505, False, False),
        (StepShape(512, 64, num_drafts=3), 256, False, True),
        (StepShape(512, 64, num_drafts=3), 257, False, False),
        (StepShape(512, 8), 1, True, False),
    ],
)
def test_steps_of_long_prompts_go_this_way(shape, least, deterministic, expanded, monkeypatch) -> None:
    """As many tokens as rows and their proposals are no prompt; if deterministic, all steps go one way."""
    monkeypatch.setattr(CpuPlatform, "tuning", replace(DEFAULT, min_expanded_tokens=least))
    latent, other = SIZES.spec(H), AttentionSpec(H, 2, 16, 16)
    float32 = torch.float32
    sizes = AttentionSizes(
        [latent, other], CpuPlatform(), dtype=float32, cache_dtype=float32, block_size=B, deterministic=deterministic
    ).of(shape)
    assert (sizes[latent].own is not None) == expanded
    assert sizes[other].own is None
    assert DEFAULT.min_expanded_tokens == float("inf")

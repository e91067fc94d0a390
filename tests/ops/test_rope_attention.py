"""`rope_attention` of one row against its two operators in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.ops.attention import AttentionPlan, attention_geometry, plan_triton
from stepgraph.ops.attention.geometry import KV_BLOCK
from stepgraph.ops.rope_attention import reference
from stepgraph.ops.rope_attention import triton as kernels

EPS, BLOCK_SIZE, SLOT = 1e-6, 8, 2
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


def arguments(tokens, context, *, spare=0, G=2, group=2, D=32, dtype=torch.float32, with_norm=True):
    """qkv … kv_len of the operator, and q·k·v of padding tokens NaN, as is every cache entry but the row's old ones."""
    generator = torch.Generator().manual_seed(tokens + 31 * context)
    kv_len, T = context + tokens, tokens + spare
    num_blocks = -(-kv_len // BLOCK_SIZE)
    qkv = torch.full((T, (group + 2) * G * D), torch.nan, dtype=dtype)
    qkv[:tokens] = torch.randn(tokens, qkv.shape[1], generator=generator).to(dtype)
    table = torch.zeros(3, num_blocks + 1, dtype=torch.int32)
    table[SLOT, :num_blocks] = 1 + torch.randperm(num_blocks, generator=generator)
    position = torch.arange(kv_len)
    line = table[SLOT, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
    kv_slots = torch.zeros(T, dtype=torch.int32)
    kv_slots[:tokens] = line[context:]
    caches = []
    for _ in range(2):
        cache = torch.full(((num_blocks + 1) * BLOCK_SIZE, G, D), torch.nan, dtype=dtype)
        cache[line[:context]] = torch.randn(context, G, D, generator=generator).to(dtype)
        caches.append(cache.view(num_blocks + 1, BLOCK_SIZE, G, D))
    angle = torch.randn(kv_len + spare, D // 2, generator=generator)
    norms = [(1 + torch.randn(D, generator=generator) / 4).to(dtype) if with_norm else None for _ in range(2)]
    ints = (torch.tensor(values, dtype=torch.int32) for values in ([SLOT], [0, tokens], [kv_len]))
    return [qkv, kv_slots, torch.cat((angle.cos(), angle.sin()), 1), *norms, *caches, table, *ints]


def geometry_of(T, G, group, multiprocessors=24):
    """With splits of few keys, which the interpreter can afford."""
    return replace(attention_geometry(T, 1, G * group, G, multiprocessors), min_split_keys=KV_BLOCK)


def run_kernel(inputs, geometry, group, device, sinks=None, softcap=0.0):
    inputs = [None if t is None else t.to(device) for t in inputs]
    (G, D), (row_slot, query_start, kv_len) = inputs[5].shape[2:], inputs[-3:]
    sizes = (geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items, geometry.max_partials)
    plan = AttentionPlan(*plan_triton.attention_plan(row_slot, query_start, kv_len, G * group, G, D, *sizes, 0))
    out = kernels.rope_attention(
        *inputs, *plan, G * group, EPS, D**-0.5, None if sinks is None else sinks.to(device), softcap
    )
    assert not plan.counters.any()
    return out.cpu(), [cache.cpu() for cache in inputs[5:7]], plan


def expected(inputs, group, sinks=None, softcap=0.0):
    exact = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    G, D = exact[5].shape[2:]
    nothing = [torch.empty(0)] * 4
    caches = [cache.nan_to_num() for cache in exact[5:7]]
    out = reference.rope_attention(*exact[:5], *caches, *exact[7:], *nothing, G * group, EPS, D**-0.5, sinks, softcap)
    return out, caches


def assert_matches(inputs, group, device, *, splits, **scoring):
    tokens, geometry = int(inputs[-2][1]), geometry_of(inputs[0].shape[0], inputs[5].shape[2], group)
    assert geometry.is_one_row
    out, caches, plan = run_kernel(inputs, geometry, group, device, **scoring)
    assert int(plan.header[0]) == splits
    out_expected, caches_expected = expected(inputs, group, **scoring)
    tolerance = TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(out[:tokens].double(), out_expected[:tokens], rtol=tolerance, atol=tolerance)
    new = inputs[1][:tokens].long()
    for before, found, right in zip(inputs[5:7], caches, caches_expected, strict=True):
        found, right, before = (cache.flatten(0, 1) for cache in (found, right, before))
        torch.testing.assert_close(found[new].double(), right[new], rtol=tolerance, atol=tolerance)
        others = torch.ones(len(found), dtype=torch.bool).index_fill(0, new, False)
        assert torch.equal(found[others].nan_to_num(7), before[others].nan_to_num(7)), "wrote elsewhere"


@pytest.mark.parametrize(
    ("tokens", "context", "splits"),
    [(1, 0, 1), (8, 0, 1), (1, 5, 1), (3, 60, 1), (1, 64, 2), (5, 62, 2), (1, 63, 1), (4, 200, 4), (1, 700, 11)],
)
def test_one_row_matches_float64_however_its_keys_are_split(tokens, context, splits, device):
    """At (5, 62) the new keys reach into a split that has no old ones."""
    assert_matches(arguments(tokens, context), 2, device, splits=splits)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("with_norm", [False, True])
def test_all_groups_of_query_heads_match(tokens, group, with_norm, device):
    spare = 0 if tokens == 1 else 16 // group - 2
    inputs = arguments(tokens, 100, spare=spare, group=group, with_norm=with_norm)
    assert_matches(inputs, group, device, splits=2)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("head_dim", [32, 64, 128, 256])
def test_16_bits_and_all_head_sizes_match(tokens, head_dim, device):
    assert_matches(arguments(tokens, 90, D=head_dim, dtype=torch.float16), 2, device, splits=2)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("blocks", [2, 3, 4, 5])
def test_iterations_over_a_long_split_match(tokens, blocks, device):
    inputs = arguments(tokens, 902 - tokens, G=1)
    geometry = replace(geometry_of(2, 1, 2), min_split_keys=blocks * KV_BLOCK)
    out, _, plan = run_kernel(inputs, geometry, 2, device)
    assert plan.header.tolist() == [-(-902 // (blocks * KV_BLOCK)), blocks * KV_BLOCK]
    torch.testing.assert_close(out.double(), expected(inputs, 2)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("tokens", "context", "splits"), [(1, 0, 1), (3, 60, 1), (5, 62, 2), (4, 200, 4)])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_sinks_and_caps_match_and_sinks_count_once(tokens, context, splits, softcap, with_sinks, device):
    sinks = torch.linspace(-3.0, 6.0, 4) if with_sinks else None
    assert_matches(arguments(tokens, context), 2, device, splits=splits, sinks=sinks, softcap=softcap)


def test_a_step_without_tokens_writes_nothing(device):
    inputs = arguments(1, 40)
    inputs[-2] = torch.zeros(2, dtype=torch.int32)
    _, caches, _ = run_kernel(inputs, geometry_of(1, 2, 2), 2, device)
    for found, before in zip(caches, inputs[5:7], strict=True):
        assert torch.equal(found.nan_to_num(7), before.nan_to_num(7))


def test_the_operator_is_its_two_parts_where_there_is_no_kernel():
    """Two rows, or a window."""
    inputs = arguments(1, 40)
    qkv, kv_slots, cos_sin, q_norm, k_norm, k_cache, v_cache, table, row_slot, query_start, kv_len = inputs
    nothing = torch.zeros(1, dtype=torch.int32)
    tokens = ops.StepTokens(nothing, torch.tensor([40], dtype=torch.int32), kv_slots, row_slot, query_start, kv_len)
    geometry = attention_geometry(1, 1, 4, 2, 9)
    plan = ops.attention_plan(row_slot, query_start, kv_len, 4, 2, 32, geometry)
    out = ops.rope_attention(
        qkv, cos_sin, q_norm, k_norm, k_cache, v_cache, table, tokens, plan, geometry,
        num_heads=4, eps=EPS, scale=32**-0.5, window=0,
    )  # fmt: skip
    torch.testing.assert_close(out.double(), expected(inputs, 2)[0], rtol=1e-5, atol=1e-5)

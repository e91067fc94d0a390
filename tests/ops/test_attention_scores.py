"""Attention with sinks and with capped scores: all kernels against the reference in float64, and what a sink means.

Shapes: as in test_attention.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from attention_batches import (
    Batch,
    assert_cpu_matches,
    assert_triton_matches,
    attend_on_cpu,
    geometry_of,
    make_batch,
    plan_of,
)
from compiled_for_hopper import lines_of

from stepgraph import ops
from stepgraph.ops.attention import triton as kernels

ROWS = {
    "decode rows": [(1, 0), (1, 63), (1, 299)],
    "prompt, decode and an empty row": [(50, 0), (1, 200), (0, 77), (3, 10)],
    "one prompt": [(70, 0)],
    "a prompt's first token": [(1, 0)],
}
SCORES = {
    "sinks": {"sinks": True},
    "cap": {"softcap": 0.8},
    "both": {"sinks": True, "softcap": 1.5},
}
"""Scores of random queries and keys are up to 4: of these, caps leave little."""


def batch_of(rows: list[tuple[int, int]], **options: object) -> Batch:
    num_tokens = sum(query_len for query_len, _ in rows) + 2
    return make_batch(rows, num_tokens=num_tokens, poisoned=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # padding of a tile may see no key at all
def test_kernels_match_float64(
    scores: dict[str, object], rows: list[tuple[int, int]], window: int, device: str
) -> None:
    batch = batch_of(rows, group=3, window=window, **scores)
    assert_triton_matches(batch, device)
    assert_cpu_matches(batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")
def test_16_bit_inputs_match(scores: dict[str, object], dtype: torch.dtype, device: str) -> None:
    batch = batch_of([(20, 30), (1, 200)], dtype=dtype, window=40, **scores)
    assert_cpu_matches(batch)
    if dtype == torch.float16 or device == "cuda":  # the interpreter multiplies bfloat16 as integers
        assert_triton_matches(batch, device)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("rows", [[(1, 700), (1, 64)], [(200, 50)]], ids=["decode", "prefill"])
def test_of_split_keys_a_sink_counts_once(rows: list[tuple[int, int]], scores: dict[str, object], device: str) -> None:
    batch = make_batch(rows, num_tokens=sum(n for n, _ in rows), group=1, **scores)  # type: ignore[arg-type]
    geometry = geometry_of(batch, multiprocessors=16)
    plan = plan_of(batch.to(device), geometry)
    assert (plan.items[: int(plan.header[0]), 5] >= 3).any()
    assert_triton_matches(batch, device, geometry)


@pytest.mark.parametrize("sink", [-200.0, 0.0, 5.0, 200.0])
def test_a_sink_takes_its_share_of_the_weight_however_large_it_is(sink: float, device: str) -> None:
    """A first token sees one key, of score s: its output is the value times 1 / (1 + e^(sink - s))."""
    batch = make_batch([(1, 0)], num_tokens=1, num_kv_heads=1, group=2)
    batch = replace(batch, sinks=torch.full((2,), sink), q=batch.q * 0)
    assert_triton_matches(batch, device)
    assert_cpu_matches(batch)
    value_D = batch.v_cache[batch.block_table[int(batch.row_slot[0]), 0].long(), 0, 0]
    expected = (value_D / (1 + math.exp(sink))).repeat(2)
    torch.testing.assert_close(attend_on_cpu(batch, geometry_of(batch))[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
def test_deterministic_tiles_match(scores: dict[str, object], device: str) -> None:
    batch = batch_of([(50, 0), (1, 200), (3, 10)], **scores)
    assert_triton_matches(batch, device, geometry_of(batch, deterministic=True))


def test_without_either_the_operator_is_called_as_before() -> None:
    """Nothing is added to what a graph records: a dispatched call has neither argument."""
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append((func, len(args)))
            return func(*args, **(kwargs or {}))

    batch = make_batch([(3, 10)], num_tokens=3)
    geometry = geometry_of(batch)
    plan = ops.attention_plan(batch.row_slot, batch.query_start, batch.kv_len, 4, 2, 16, geometry)
    with Watch():
        for softcap in (0.0, 2.0):
            ops.paged_attention(*batch.inputs(), plan, geometry, batch.scale, softcap=softcap)
    own = [number for func, number in calls if func is torch.ops.stepgraph.paged_attention.default]
    assert own == [16, 18]


def test_tiles_of_hopper_are_refused_by_the_kernel_that_lacks_them() -> None:
    batch = make_batch([(3, 10)], num_tokens=3, softcap=3.0)
    nothing = torch.empty(0)
    with pytest.raises(AssertionError, match="tall_tile"):
        kernels.paged_attention(*batch.inputs(), *[nothing] * 4, 1.0, 128, 1, 0, False, None, 3.0)


_COMPILED = """
from stepgraph.ops.attention import triton as attention
from stepgraph.ops.attention.geometry import attention_geometry
from stepgraph.ops.rope_attention import triton as fused

H, G, D = 16, 2, 64
for name, (sinks, softcap) in {"plain": (None, 0.0), "scored": (torch.empty(H), 30.0)}.items():
    for tokens in (8, 600):
        g = attention_geometry(tokens, 8, H, G, 132)
        rows = [torch.empty(n, dtype=torch.int32) for n in (8, 9, 8)]
        cache = torch.empty(4, 16, G, D, dtype=torch.bfloat16)
        plan = torch.empty(9, 8, dtype=torch.int32), torch.empty(2, dtype=torch.int32), torch.empty(9), torch.empty(9)
        q = torch.empty(tokens, H, D, dtype=torch.bfloat16)
        table = torch.empty(8, 4, dtype=torch.int32)
        settings = 0.125, g.tile, g.num_programs, 128, False, sinks, softcap
        attention.paged_attention(q, cache, cache, table, *rows, *plan, *settings)
    qkv, table = torch.empty(1, (H + 2 * G) * D, dtype=torch.bfloat16), torch.empty(2, 4, dtype=torch.int32)
    rows = [torch.empty(n, dtype=torch.int32) for n in (1, 2, 1)]
    fused.rope_attention(
        qkv, rows[0], torch.empty(64, D), None, None, cache, cache, table, *rows, *plan, H, 1e-5, 0.125, sinks, softcap
    )
    print(name)
"""


def test_kernels_compile_for_hopper() -> None:
    assert lines_of(_COMPILED) == ["plain", "scored"]

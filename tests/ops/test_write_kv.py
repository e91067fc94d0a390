"""The write of keys and values: reference and Triton against plain assignment.

Shapes: T tokens, G key/value heads, D head size, B tokens per block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.write_kv import reference
from stepgraph.ops.write_kv import triton as kernels

UNTOUCHED = -7.0
BLOCKS, B = 6, 4


class Inputs(NamedTuple):
    k: Tensor
    v: Tensor
    kv_slots: Tensor
    k_cache: Tensor
    v_cache: Tensor

    def to(self, device: str) -> Inputs:
        """A copy on `device`, laid out alike."""
        return Inputs(*(tensor.to(device, copy=True) for tensor in self))


def make_inputs(
    num_kv_heads: int = 2,
    head_dim: int = 16,
    *,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    heads_first: bool = False,
) -> Inputs:
    """Five tokens, two of which are padding; keys are the middle part of a merged projection, values [G, T, D] in memory if
    `heads_first`."""
    T, G, D = 5, num_kv_heads, head_dim
    generator = torch.Generator().manual_seed(D)
    k = torch.randn(T, 3 * G, D, generator=generator).to(dtype)[:, G : 2 * G]
    v = torch.randn(T, G, D, generator=generator).to(dtype)
    if heads_first:
        v = v.transpose(0, 1).contiguous().transpose(0, 1)
    cache = torch.full((BLOCKS, B, G, D), UNTOUCHED).to(cache_dtype or dtype)
    return Inputs(k, v, torch.tensor([9, 23, 4, 0, 0], dtype=torch.int32), cache, cache.clone())


def assert_written(inputs: Inputs, expected_k: Tensor, expected_v: Tensor) -> None:
    """The first three tokens are in their slots, the null slot has values of the last two, and nothing else changed."""
    for cache, expected in ((inputs.k_cache, expected_k), (inputs.v_cache, expected_v)):
        lines = cache.cpu().float().view(BLOCKS * B, *cache.shape[2:])
        expected = expected.float()
        assert torch.equal(lines[[9, 23, 4]], expected[:3])
        assert ((lines[0] == expected[3]) | (lines[0] == expected[4])).all()
        others = [slot for slot in range(1, BLOCKS * B) if slot not in (9, 23, 4)]
        assert (lines[others] == UNTOUCHED).all()


@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 16), (2, 64), (3, 80), (8, 24)])
def test_each_token_is_written_to_its_slot_and_nowhere_else(
    num_kv_heads: int, head_dim: int, dtype: torch.dtype, heads_first: bool, device: str
) -> None:
    inputs = make_inputs(num_kv_heads, head_dim, dtype=dtype, heads_first=heads_first)
    for write_kv, where in ((reference.write_kv, "cpu"), (kernels.write_kv, device)):
        copies = inputs.to(where)
        write_kv(*copies)
        assert_written(copies, inputs.k, inputs.v)


FLOAT8 = torch.float8_e4m3fn
VALUES = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()
VALUES = VALUES[VALUES.isfinite()].sort().values


@pytest.fixture(params=["reference", "triton"])
def float8_write(request: pytest.FixtureRequest, device: str) -> tuple[Callable[..., None], str]:
    """A kernel that rounds to float8, and where it runs."""
    if request.param == "reference":
        return reference.write_kv, "cpu"
    if device == "cpu":
        pytest.skip("Triton's interpreter rounds to float8 wrongly, and makes a number of NaN")
    return kernels.write_kv, device


def test_a_float8_cache_gets_the_nearest_value(float8_write) -> None:
    write_kv, where = float8_write
    inputs = make_inputs(2, 128, cache_dtype=FLOAT8)
    size = torch.linspace(-3, 2.65, inputs.k.numel(), dtype=torch.float64)
    inputs = inputs._replace(k=(10**size).float().view_as(inputs.k) * inputs.v.sign()).to(where)
    write_kv(*inputs)
    nearest_k, nearest_v = (VALUES[(x.cpu().unsqueeze(-1) - VALUES).abs().argmin(-1)] for x in inputs[:2])
    assert_written(inputs, nearest_k, nearest_v)


def test_nan_stays_nan_in_float8(float8_write) -> None:
    """A step whose numbers have gone wrong shall show it."""
    write_kv, where = float8_write
    inputs = make_inputs(cache_dtype=FLOAT8)
    inputs.k[0, 1, 3] = float("nan")
    inputs = inputs.to(where)
    write_kv(*inputs)
    assert inputs.k_cache.float().isnan().nonzero().tolist() == [[2, 1, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_values_that_float8_has_are_kept_and_those_beyond_become_448(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(2, 64, dtype=dtype, cache_dtype=FLOAT8)
    choice = torch.randint(len(VALUES), (2, *inputs.v.shape), generator=torch.Generator().manual_seed(0))
    k, v = VALUES[choice].to(dtype)
    beyond = torch.tensor([449.0, -5e4, float("inf"), -float("inf")])
    k[0, 0, :4] = beyond
    for write_kv, where in ((reference.write_kv, "cpu"), (kernels.write_kv, device)):
        copies = inputs._replace(k=k, v=v).to(where)
        write_kv(*copies)
        assert_written(copies, k.clamp(-448, 448), v)


@pytest.mark.parametrize("cache_dtype", [torch.float32, FLOAT8])
def test_a_captured_step_writes_and_attends_to_its_own_cache(cache_dtype: torch.dtype) -> None:
    """Captured once; what replays write and read are the buffers' values then."""
    inputs = make_inputs(cache_dtype=cache_dtype)
    k, v, kv_slots, k_cache, v_cache = inputs
    q = torch.randn(5, 4, 16)
    block_table = torch.tensor([[0], [1]], dtype=torch.int32)
    row_slot = torch.tensor([1], dtype=torch.int32)
    query_start = torch.tensor([0, 1], dtype=torch.int32)
    kv_len = torch.tensor([1], dtype=torch.int32)
    geometry = ops.attention_geometry(5, 1, 4, 2, multiprocessors=1)

    class Output(NamedTuple):
        attended: Tensor

    def program() -> Output:
        ops.write_kv(k, v, kv_slots, k_cache, v_cache)
        plan = ops.attention_plan(row_slot, query_start, kv_len, 4, 2, 16, geometry)
        return Output(
            ops.paged_attention(
                q, k_cache, v_cache, block_table, row_slot, query_start, kv_len, plan, geometry, scale=1.0
            )
        )

    graph = CpuBackend().capture(program, warmups=1)
    for step in range(2):
        v += 1 + step
        kv_slots.copy_(torch.tensor([4, 9, 10, 11, 23]))
        attended = graph.replay().attended
        expected = v[0].to(cache_dtype).float().repeat_interleave(2, dim=0)  # one key: its value is the answer
        torch.testing.assert_close(attended[0].view(4, 16), expected)

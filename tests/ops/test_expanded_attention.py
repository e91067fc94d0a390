"""Attention by keys of this step's tokens on top of older ones: the Triton kernel and the reference against attention over all at
once, in float64.

Shapes: T tokens, R rows, H heads, N, P and V dimensions of a head's keys that are not and that are rotated, and of its values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from attention_batches import needs_hopper
from torch import Tensor

from stepgraph.ops.attention import plan_triton
from stepgraph.ops.expanded_attention import expanded_geometry, reference
from stepgraph.ops.expanded_attention import triton as kernels
from stepgraph.ops.expanded_attention.geometry import hopper_serves
from stepgraph.platforms.tuning import DEFAULT, SM_90

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Rows (query length, older keys).
MIXED = {
    "one prompt": [(150, 0)],
    "chunk of a long prompt": [(139, 40)],
    "chunks with and without context, decode and empty rows": [(70, 0), (1, 30), (0, 20), (129, 17), (1, 0), (3, 5)],
}


@dataclass(frozen=True)
class Batch:
    """Inputs of `expanded_attention`, and what it is to give for the real tokens."""

    q: Tensor
    absorbed: Tensor
    kv: Tensor
    key: Tensor
    context: Tensor
    context_lse: Tensor
    query_start: Tensor
    kv_len: Tensor
    expected: Tensor
    scale: float

    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.absorbed, self.kv, self.key, self.context, self.context_lse, self.query_start, self.kv_len,
        )  # fmt: skip


def make_batch(
    rows: Sequence[tuple[int, int]],
    *,
    sizes: tuple[int, int, int] = (16, 16, 16),
    num_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    offset: float = 0.0,
    key_lies_apart: bool = True,
    seed: int = 0,
) -> Batch:
    """Rows of random queries, keys and values. Attention in float64 over all keys is expected, that over the older ones is given.
    What the operator must not read is NaN: five tokens of padding, and the context of rows without.

    `offset` is added to the scores of older keys, by a rotated part of queries that is the same in all.
    """
    (N, P, V), H, R = sizes, num_heads, 8
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).double()

    query_lens = [query_len for query_len, _ in rows]
    T, scale = sum(query_lens) + 5, (N + P) ** -0.5
    q_THN, q_THP, kv_THF, key_TP = random(T, H, N), random(T, H, P), random(T, H, N + V), random(T, P)
    q_THP[..., 0] = 1.0
    context_THV, lse_TH, expected_THV = (torch.full((T, H, size), torch.nan).double() for size in (V, 1, V))
    start = 0
    for n, m in rows:
        row = slice(start, start + n)
        old_kv_mHF, old_key_mP = random(m, H, N + V), random(m, P)
        old_key_mP[:, 0] += offset / scale
        k_mHN, v_mHV = torch.cat((old_kv_mHF, kv_THF[row])).tensor_split((N,), dim=2)
        key_mP = torch.cat((old_key_mP, key_TP[row]))
        scores_Hnm = torch.einsum("nhd,mhd->hnm", q_THN[row], k_mHN) + torch.einsum("nhp,mp->hnm", q_THP[row], key_mP)
        scores_Hnm *= scale
        scores_Hnm.masked_fill_(torch.ones(n, m + n).triu_(m + 1).bool(), -math.inf)
        expected_THV[row] = torch.einsum("hnm,mhv->nhv", scores_Hnm.softmax(-1), v_mHV)
        if m:
            context_THV[row] = torch.einsum("hnm,mhv->nhv", scores_Hnm[:, :, :m].softmax(-1), v_mHV[:m])
            lse_TH[row] = scores_Hnm[:, :, :m].logsumexp(-1).T.unsqueeze(2) / math.log(2)
        start += n
    for tensor in (q_THN, q_THP, kv_THF, key_TP):
        tensor[start:] = torch.nan
    rotated_elsewhere = torch.full((T, H, P), torch.nan)
    beside = torch.full((T, 3), torch.nan)
    return Batch(
        q=torch.cat((q_THN, rotated_elsewhere), dim=2).flatten(1).to(dtype),
        absorbed=torch.cat((torch.full((T, H, R), torch.nan), q_THP), dim=2).to(dtype),
        kv=kv_THF.flatten(1).to(dtype),
        key=torch.cat((beside, key_TP), dim=1).to(dtype)[:, 3:] if key_lies_apart else key_TP.to(dtype),
        context=context_THV.flatten(1).to(dtype),
        context_lse=lse_TH.squeeze(2).float(),
        query_start=torch.tensor([0, *query_lens]).cumsum(0).int(),
        kv_len=torch.tensor([sum(row) for row in rows], dtype=torch.int32),
        expected=expected_THV.flatten(1)[:start],
        scale=scale,
    )


def attend(batch: Batch, device: str, multiprocessors: int = 3, **changes: int) -> Tensor:
    """The Triton kernel's output, real tokens only."""
    inputs = [tensor.to(device) for tensor in batch.inputs()]
    query_start, kv_len = inputs[-2:]
    T, H = batch.context_lse.shape
    geometry = replace(expanded_geometry(T, len(kv_len), H, multiprocessors), **changes)
    sizes = geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items, geometry.max_partials, 0
    items, header, _, _ = plan_triton.attention_plan(kv_len, query_start, kv_len, H, H, 0, *sizes)
    assert header[0] <= geometry.max_items
    out = kernels.expanded_attention(*inputs, items, header, batch.scale, geometry.tile, geometry.num_programs)
    return out[: len(batch.expected)].cpu()


def assert_matches(out: Tensor, batch: Batch) -> None:
    tolerance = TOLERANCE[batch.q.dtype]
    torch.testing.assert_close(out.double(), batch.expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("rows", MIXED.values(), ids=MIXED.keys())
def test_any_mixture_of_rows_matches(rows: list[tuple[int, int]], device: str) -> None:
    batch = make_batch(rows)
    assert_matches(attend(batch, device), batch)


@pytest.mark.parametrize("sizes", [(128, 64, 128), (192, 64, 256), (64, 32, 64), (24, 8, 20), (8, 8, 8)], ids=str)
def test_sizes_of_heads_match_whether_or_not_powers_of_two(sizes: tuple[int, int, int], device: str) -> None:
    batch = make_batch([(67, 9), (5, 0)], sizes=sizes, num_heads=3)
    assert_matches(attend(batch, device), batch)


def test_16_bit_inputs_match(device: str) -> None:
    batch = make_batch(MIXED["chunk of a long prompt"], sizes=(32, 16, 32), dtype=torch.float16)
    assert_matches(attend(batch, device), batch)


@pytest.mark.parametrize("offset", [-300.0, -20.0, 20.0, 300.0])
def test_scores_of_older_keys_may_be_far_from_those_of_this_steps(offset: float, device: str) -> None:
    batch = make_batch([(70, 5), (1, 3)], offset=offset)
    out = attend(batch, device)
    assert_matches(out, batch)
    context = batch.context[: len(out)]
    difference = (out - context).abs().max()
    assert difference < 1e-5 if offset > 0 else difference > 0.1  # the case is about who outweighs whom


def test_tiles_of_64_match(device: str) -> None:
    batch = make_batch(MIXED["chunks with and without context, decode and empty rows"])
    geometry = expanded_geometry(*batch.context_lse.shape[:1], len(batch.kv_len), 2, 3)
    assert_matches(attend(batch, device, tile=64, max_items=2 * geometry.max_items), batch)


def test_the_bound_of_the_list_is_reached(device: str) -> None:
    """Two rows just over a tile need four, which is what their number of tokens allows; a program does several."""
    batch = make_batch([(129, 0), (129, 1)], num_heads=1)
    assert expanded_geometry(258, 2, 1, 1).max_items == 4
    assert_matches(attend(batch, device, multiprocessors=1), batch)


HOPPER = replace(SM_90, hopper_expanded=True)


@needs_hopper
@pytest.mark.parametrize("offset", [0.0, -20.0, 20.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [*MIXED.values(), [(1000, 70), (64, 0), (65, 1), (63, 0), (192, 3)]], ids=str)
def test_the_kernel_for_hopper_matches(rows, dtype, offset, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "kernel_tuning", lambda: HOPPER)
    batch = make_batch(rows, sizes=(128, 64, 128), num_heads=3, dtype=dtype, offset=offset, key_lies_apart=False)
    for multiprocessors in (3, 132):
        assert_matches(attend(batch, "cuda", multiprocessors), batch)


def test_the_kernel_for_hopper_serves_deepseeks_heads_where_it_is_asked_for() -> None:
    pytest.importorskip("triton.experimental.gluon")
    served = (torch.bfloat16, 128, 64, 128)
    assert hopper_serves(HOPPER, *served)
    assert not hopper_serves(DEFAULT, *served)
    for index, other in enumerate((torch.float32, 192, 32, 256)):
        assert not hopper_serves(HOPPER, *served[:index], other, *served[index + 1 :])


def test_the_reference_is_whole_attention() -> None:
    for rows in MIXED.values():
        batch = make_batch(rows)
        inputs = [tensor.double() if tensor.is_floating_point() else tensor for tensor in batch.inputs()]
        nothing = torch.empty(0)
        out = reference.expanded_attention(*inputs, nothing, nothing, batch.scale, 0, 0)
        torch.testing.assert_close(out[: len(batch.expected)], batch.expected, atol=1e-6, rtol=1e-6)

"""The latent attention kernel of tall tiles on Hopper against the reference in float64, and compiled on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_batches import Batch, make_batch, needs_hopper
from torch import Tensor

from stepgraph.ops.attention import AttentionGeometry, plan_triton
from stepgraph.ops.attention.geometry import KV_BLOCK, UNSPLIT
from stepgraph.ops.mla_attention import mla_geometry, reference
from stepgraph.ops.mla_attention.geometry import TALL_TILE, hopper_serves
from stepgraph.platforms.tuning import DEFAULT, SM_90

LATENT, ENTRY = 512, 576
MULTIPROCESSORS = 132
MIXTURES = [
    [(1, 0)],
    [(80, 0)],
    [(1, 0), (2, 0), (3, 61), (4, 60), (5, 0), (9, 120)],
    [(1, 300), (30, 77), (0, 5), (20, 3), (13, 64), (1, 0), (1, 1023)],
    [(1, 128)] * 20 + [(40, 0)],
    [(5, 2000), (60, 0)],
]


def latents_of(rows: Sequence[tuple[int, int]], heads: int, block_size: int = 16, **options: object) -> Batch:
    """A batch whose only head of keys is the entry; unwritten entries are NaN."""
    sizes = {"num_kv_heads": 1, "group": heads, "head_dim": ENTRY, "block_size": block_size, "dtype": torch.bfloat16}
    return make_batch(rows, num_tokens=sum(n for n, _ in rows) + 7, poisoned=True, **{**sizes, **options})


def attend(batch: Batch, geometry: AttentionGeometry) -> Tensor:
    """The kernel's output, real tokens only. Partial results are combined here, in float64."""
    from stepgraph.ops.mla_attention import hopper

    batch = batch.to("cuda")
    sizes = (geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items, geometry.max_partials)
    heads = batch.q.shape[1]
    items, header, partials, _ = plan_triton.attention_plan(
        batch.row_slot, batch.query_start, batch.kv_len, heads, 1, LATENT, *sizes, 0
    )
    cache = batch.k_cache[:, :, 0]
    out = batch.q.new_empty(len(batch.q), heads, LATENT)
    lines = (batch.q, cache, batch.block_table)
    hopper.attend(*lines, items, header, partials, out, None, batch.scale, geometry.num_programs, causal=True)
    out = out.double().flatten(0, 1)
    num_items, keys_per_split = header.tolist()
    for _, start, query_len, kv_len, tile, split, first_partial, _ in items[:num_items].tolist():
        first_pair = tile * TALL_TILE
        pairs = min(TALL_TILE, query_len * heads - first_pair)
        visible = kv_len - query_len + (first_pair + pairs - 1) // heads + 1
        num_parts = -(-visible // keys_per_split)
        if num_parts > 1 and split == 0:
            part_SMD = partials[first_partial : first_partial + num_parts, 0, :pairs].double()
            weight_SM = (part_SMD[..., LATENT] - part_SMD[..., LATENT].amax(0)).exp2()
            total_M = (weight_SM * part_SMD[..., LATENT + 1]).sum(0)
            line = start * heads + first_pair
            out[line : line + pairs] = (weight_SM[..., None] * part_SMD[..., :LATENT]).sum(0) / total_M[:, None]
    return out.unflatten(0, (-1, heads))[: batch.num_real_tokens]


def assert_matches(batch: Batch, *, min_split_keys: int = KV_BLOCK, multiprocessors: int = MULTIPROCESSORS) -> None:
    T, H, _ = batch.q.shape
    # Of few pairs a row the geometry's tiles are lower, and so more; programs are as of tall ones.
    geometry = replace(
        mla_geometry(T, len(batch.kv_len), H, multiprocessors),
        tile=TALL_TILE,
        min_split_keys=min_split_keys,
        split_target=multiprocessors,
        max_partials=2 * multiprocessors,
        num_programs=multiprocessors,
    )
    rows = (batch.block_table, batch.row_slot, batch.query_start, batch.kv_len)
    expected = reference.mla_attention(batch.q.double(), batch.k_cache[:, :, 0].double(), *rows, LATENT, batch.scale)
    out = attend(batch, geometry).cpu()
    torch.testing.assert_close(out, expected[: batch.num_real_tokens], atol=2e-2, rtol=2e-2)


@needs_hopper
@pytest.mark.parametrize(("heads", "block_size"), [(16, 16), (128, 64), (20, 8), (3, 128)])
def test_mixtures_of_rows_match_the_reference_whatever_else_the_cache_holds(heads: int, block_size: int) -> None:
    for seed, rows in enumerate(MIXTURES):
        assert_matches(latents_of(rows, heads, block_size, seed=seed))


@needs_hopper
def test_numbers_of_the_other_sixteen_bits() -> None:
    assert_matches(latents_of(MIXTURES[3], 16, dtype=torch.float16))


@needs_hopper
@pytest.mark.parametrize("computed", [0, 1, 15, 16, 17, 47, 62, 63, 64, 65, 127, 128, 129, 191, 192, 193, 640])
def test_every_remainder_of_a_block_and_a_box_is_masked(computed: int) -> None:
    for length in (1, 4, 5, 16):
        assert_matches(latents_of([(length, computed)], 16, seed=computed), min_split_keys=1 << 30)


@needs_hopper
@pytest.mark.parametrize("multiprocessors", [1, 3, 40, 132])
def test_split_rows_give_partial_results(multiprocessors: int) -> None:
    for seed, rows in enumerate([*MIXTURES, [(3, 3000)], [(1, 4000), (10, 900)]]):
        assert_matches(latents_of(rows, 16, seed=seed), multiprocessors=multiprocessors)


@needs_hopper
def test_a_ring_that_goes_round_many_times_in_one_program_stays_in_step() -> None:
    """One program does all items of a prompt on a long context, of odd and even numbers of blocks, and of one."""
    assert_matches(
        latents_of([(50, 2048), (70, 900), (1, 0), (1, 3), (2, 0)], 16), multiprocessors=1, min_split_keys=192
    )


@needs_hopper
def test_context_alone_is_attended_to_by_all_tokens_of_a_row_and_its_sums_are_there() -> None:
    """Unsplit: of split rows the sums are the combining kernel's to write. One row has no context, and so no result."""
    from stepgraph.ops.mla_attention import hopper

    rows = [(5, 130), (1, 64), (3, 0), (9, 777)]
    batch = latents_of(rows, 16).to("cuda")
    context_len = torch.tensor([computed for _, computed in rows], dtype=torch.int32, device="cuda")
    cache, tokens = batch.k_cache[:, :, 0], (batch.block_table, batch.row_slot, batch.query_start, context_len)
    geometry = mla_geometry(len(batch.q), len(rows), 16, MULTIPROCESSORS, tuning=SM_90)
    sizes = (TALL_TILE, UNSPLIT, MULTIPROCESSORS, geometry.max_items, 0)
    items, header, partials, _ = plan_triton.attention_plan(*tokens[1:], 16, 1, LATENT, *sizes, 0)
    out = batch.q.new_empty(len(batch.q), 16, LATENT)
    lse = out.new_empty(len(batch.q), 16, dtype=torch.float32)
    lines = (batch.q, cache, batch.block_table)
    hopper.attend(*lines, items, header, partials, out, lse, batch.scale, MULTIPROCESSORS, causal=False)
    plan = (items, header, partials, LATENT, batch.scale, TALL_TILE, MULTIPROCESSORS)
    expected = reference.mla_context_attention(batch.q.double(), cache.double(), *tokens, *plan)
    seen = torch.tensor([computed > 0 for n, computed in rows for _ in range(n)])
    for found, wanted in zip((out, lse), expected, strict=True):
        of_rows = slice(batch.num_real_tokens)
        torch.testing.assert_close(
            found.cpu().double()[of_rows][seen], wanted.cpu()[of_rows][seen], atol=2e-2, rtol=2e-2
        )


@needs_hopper
def test_rows_whose_scores_are_huge_or_alike_stay_exact() -> None:
    """Weights of 0, of 1, and all the same."""
    batch = latents_of([(20, 500)], 16)
    assert_matches(replace(batch, q=batch.q * 50))
    assert_matches(replace(batch, q=batch.q * 0))


def test_it_serves_where_it_was_written_for() -> None:
    tuning = replace(SM_90, hopper_mla=True)
    pytest.importorskip("triton.experimental.gluon")
    served = (TALL_TILE, torch.bfloat16, torch.bfloat16, ENTRY, LATENT, 16)
    assert hopper_serves(tuning, *served)
    assert not hopper_serves(DEFAULT, *served)
    for index, other in enumerate((16, torch.float16, torch.float8_e4m3fn, 640, 256, 4)):
        assert not hopper_serves(tuning, *served[:index], other, *served[index + 1 :])


COMPILED = r"""
import re
import stepgraph
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from stepgraph.platforms import kernels, tuning
from stepgraph.platforms.compile_ahead import COMPILING

class Hopper:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

driver.set_active(Hopper())
kernels.kernel_tuning = lambda: tuning.SM_90
COMPILING.set(True)
CUDABackend.make_cubin = lambda self, src, metadata, opt, capability: b""  # the assembler takes ten seconds
from stepgraph.ops.mla_attention import hopper

q, cache = torch.zeros(4, 16, 576, dtype=torch.bfloat16), torch.zeros(8, 16, 576, dtype=torch.bfloat16)
out, numbers, partials = q[..., :512].clone(), torch.zeros(8, 8, dtype=torch.int32), torch.zeros(8, 64, 514)
hopper.attend(q, cache, numbers, numbers, numbers, partials, out, None, 0.1, 132, causal=True)
[compiled] = hopper._attention_kernel.device_caches[0][0].values()
ptx = re.sub(r"//.*", "", compiled.asm["ptx"])
print(compiled.metadata.shared)
print(*(len(re.findall(rf"wgmma.mma_async.sync.aligned.{shape}k16", ptx)) for shape in ("m64n64", "m64n256")))
order = re.findall(r"bar\.sync|mbarrier\.arrive\.shared|wgmma\.wait|stmatrix|wgmma\.mma", ptx)
print(sum(after == "mbarrier.arrive.shared" for after in order))
print(*sorted({before for before, after in zip(order, order[1:]) if after == "mbarrier.arrive.shared"}))
print(*sorted({before for before, after in zip(order, order[1:]) if after == "stmatrix"}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there on Linux only")
def test_it_compiles_to_products_of_warpgroups_and_no_warp_speaks_for_one_that_lags(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)  # what is compiled here cannot run
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    shared, products, arrivals, before_arrivals, before_weights = done.stdout.splitlines()
    assert int(shared) <= 227 * 1024
    # Of each consumer: scores of 36 parts in two places, as a first block and in the loop; values of four, in these two and of
    # the other's block in the loop and after it.
    assert products == f"{2 * 2 * 36} {2 * 4 * 4}"
    # One thread arrives for all, which must have read or written what it says: they have met.
    assert int(arrivals) == 2 * 9
    assert before_arrivals == "bar.sync"
    # Weights are stored over rotated dimensions that all warps have multiplied.
    assert set(before_weights.split()) == {"bar.sync", "stmatrix"}

"""The deterministic geometry: a token's result has the same bits whatever shares its step, on Triton and on CPU.

Shapes: T tokens, R rows, H query heads, G key/value heads, D head size, B tokens per block, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from torch import Tensor
from triton_operators import make_rows_of_products_independent

from stepgraph.ops.attention import attention_geometry, cpu, plan_triton, reference
from stepgraph.ops.attention import triton as kernels
from stepgraph.ops.attention.geometry import KV_BLOCK

S, LENGTH, B, G, D = 2, 135, 8, 2, 16
BLOCKS = -(-LENGTH // B)
SCALE = D**-0.5
Chunk = tuple[int, int, int]
"""A row: sequence, tokens computed before, tokens in this step."""


@dataclass(frozen=True)
class World:
    """S sequences of LENGTH tokens, sequence s in slot s + 1, and how they are attended."""

    q: Tensor  # [S, LENGTH, H, D]
    k_cache: Tensor  # [1 + S · BLOCKS, B, G, D] float32, of all tokens
    v_cache: Tensor
    block_table: Tensor  # [1 + S, BLOCKS] int32
    cache_dtype: torch.dtype
    window: int
    sinks: Tensor | None  # [H]
    softcap: float

    def caches(self, held: Tensor, garbage: float) -> list[Tensor]:
        """Keys and values, with `garbage` in all entries but those of `held`, [blocks, B] bool."""
        return [
            cache.masked_fill(~held[..., None, None], garbage).to(self.q.dtype).to(self.cache_dtype)
            for cache in (self.k_cache, self.v_cache)
        ]

    def held_by(self, rows: list[Chunk]) -> Tensor:
        """[blocks, B] bool: the entries that a step of `rows` may read."""
        held = torch.zeros(self.k_cache.shape[:2], dtype=torch.bool)
        for s, computed, query_len in rows:
            first_key = max(0, computed - self.window + 1) if self.window else 0
            position = torch.arange(first_key, computed + query_len)
            held[self.block_table[s + 1, position // B].long(), position % B] = True
        return held


def make_world(group: int, dtype: torch.dtype, cache_dtype: torch.dtype, window: int, *, softcap: float = 0.0) -> World:
    """Where scores are capped, there are sinks too."""
    generator = torch.Generator().manual_seed(group)
    block_table = torch.zeros(1 + S, BLOCKS, dtype=torch.int32)
    block_table[1:] = 1 + torch.randperm(S * BLOCKS, generator=generator).view(S, BLOCKS)
    return World(
        q=3 * torch.randn(S, LENGTH, G * group, D, generator=generator).to(dtype),
        k_cache=torch.randn(1 + S * BLOCKS, B, G, D, generator=generator),
        v_cache=torch.randn(1 + S * BLOCKS, B, G, D, generator=generator),
        block_table=block_table,
        cache_dtype=cache_dtype,
        window=window,
        sinks=torch.randn(G * group, generator=generator) if softcap else None,
        softcap=softcap,
    )


def run_step(world: World, rows: list[Chunk], rng: Random, device: str, *, deterministic: bool = True) -> Tensor:
    """Outputs [tokens, H · D] of a step of `rows`, padded at random; on Triton, or on CPU's own kernel if `device` is "".

    What the step must not read is garbage, other from step to step.
    """
    T, R = sum(query_len for _, _, query_len in rows), len(rows)
    padded_R = R + rng.randint(0, 3)
    q = torch.cat([world.q[s, computed : computed + query_len] for s, computed, query_len in rows])
    q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, rng.randint(0, 20)), value=rng.random())
    row_slot = torch.zeros(padded_R, dtype=torch.int32)
    row_slot[:R] = torch.tensor([s + 1 for s, _, _ in rows])
    kv_len = torch.zeros(padded_R, dtype=torch.int32)
    kv_len[:R] = torch.tensor([computed + query_len for _, computed, query_len in rows])
    query_start = torch.full((padded_R + 1,), T, dtype=torch.int32)
    query_start[: R + 1] = torch.tensor([0] + [query_len for _, _, query_len in rows]).cumsum(0)

    H = q.shape[1]
    geometry = attention_geometry(q.shape[0], padded_R, H, G, 3, deterministic=deterministic)
    if not deterministic:
        geometry = replace(geometry, min_split_keys=KV_BLOCK)  # short rows are split too
    module = kernels if device else cpu
    arrays = [
        tensor.to(device or "cpu")
        for tensor in (
            q, *world.caches(world.held_by(rows), rng.choice((float("nan"), 100.0))), world.block_table, row_slot,
            query_start, kv_len,
        )
    ]  # fmt: skip
    plan = (plan_triton if device else cpu).attention_plan(
        *arrays[-3:], H, G, D, geometry.tile, geometry.min_split_keys, geometry.split_target, geometry.max_items,
        geometry.max_partials, world.window,
    )  # fmt: skip
    out = module.paged_attention(
        *arrays, *plan, SCALE, geometry.tile, geometry.num_programs, world.window, geometry.deterministic,
        None if world.sinks is None else world.sinks.to(device or "cpu"), world.softcap,
    )  # fmt: skip
    return out[:T].cpu()


def compositions(rng: Random) -> Iterator[list[Chunk]]:
    """Steps that together hold every token of every sequence: each whole, then each cut in chunks that share steps with
    others', at random."""
    for s in range(S):
        yield [(s, 0, LENGTH)]
    computed = [0] * S
    while min(computed) < LENGTH:
        rows = [
            (s, computed[s], min(rng.choice((1, 1, 5, 16, 40)), LENGTH - computed[s]))
            for s in rng.sample(range(S), rng.randint(1, S))
            if computed[s] < LENGTH
        ]
        for s, _, query_len in rows:
            computed[s] += query_len
        if rows:
            yield rows


@pytest.fixture(autouse=True)
def independent_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    make_rows_of_products_independent(monkeypatch)


def outputs(world: World, device: str, *, deterministic: bool) -> dict[tuple[int, int], list[Tensor]]:
    """Each token's outputs in all steps of `compositions`."""
    rng = Random(0)
    found: dict[tuple[int, int], list[Tensor]] = {}
    for rows in compositions(rng):
        tokens = [(s, computed + j) for s, computed, query_len in rows for j in range(query_len)]
        for token, out in zip(tokens, run_step(world, rows, rng, device, deterministic=deterministic), strict=True):
            found.setdefault(token, []).append(out)
    return found


KINDS: dict[str, tuple[int, torch.dtype, torch.dtype, int]] = {  # group, dtype, dtype of the cache, window
    "float32": (2, torch.float32, torch.float32, 0),
    "float32 in a window": (3, torch.float32, torch.float32, 37),
    "float16": (3, torch.float16, torch.float16, 0),
    "bfloat16": (1, torch.bfloat16, torch.bfloat16, 0),
    "bfloat16 in a window": (4, torch.bfloat16, torch.bfloat16, 70),
    "float8 cache": (2, torch.float16, torch.float8_e4m3fn, 20),
}


@pytest.mark.parametrize("kernel", ["cpu", "triton"])
@pytest.mark.parametrize(
    ("kind", "softcap"), [*((kind, 0.0) for kind in KINDS), ("float32 in a window", 1.5), ("float16", 1.5)]
)
def test_a_token_has_the_same_bits_in_every_step_that_holds_it(
    kind: str, softcap: float, kernel: str, device: str
) -> None:
    world = make_world(*KINDS[kind], softcap=softcap)
    if kernel == "triton" and world.q.dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("Triton's interpreter keeps bfloat16 as integers, which its dot multiplies as such")
    found = outputs(world, device if kernel == "triton" else "", deterministic=True)
    assert len(found) == S * LENGTH
    for token, (first, *others) in found.items():
        assert others
        assert first.isfinite().all()
        assert all(torch.equal(first, other) for other in others), token

    arrays = (tensor.double() for tensor in (world.q[0], *world.caches(torch.tensor(True), 0.0)))
    rows = (torch.tensor([1]), torch.tensor([0, LENGTH]), torch.tensor([LENGTH]))
    scoring = world.window, world.sinks, world.softcap
    expected = reference.paged_attention(*arrays, world.block_table, *rows, SCALE, *scoring)
    out = torch.stack([found[0, position][0] for position in range(LENGTH)]).double()
    tolerance = 16 * torch.finfo(world.q.dtype).eps
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


_PLAIN = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="without vector registers torch adds up in one order, whatever the step holds",
)


@pytest.mark.parametrize("kernel", [pytest.param("cpu", marks=_PLAIN), "triton"])
def test_without_it_bits_depend_on_the_step(kernel: str, device: str) -> None:
    """Else the test above would prove nothing."""
    dtype = torch.float32 if kernel == "triton" else torch.bfloat16  # our own kernel for CPUs, of float32, would pass
    world = make_world(2, dtype, dtype, 0)
    found = outputs(world, device if kernel == "triton" else "", deterministic=False)
    assert not all(torch.equal(first, other) for first, *others in found.values() for other in others)

"""Latent attention on the CPU, by its own kernels and by torch's, against float64.

Shapes: T tokens, R rows of a step, H heads, L = K + P numbers of an entry, of which K are the latent; N dimensions of a head that
are not rotated, V of its values; B tokens per block; S sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph import native, ops
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.attention import cpu as attention_cpu
from stepgraph.ops.head_linear import reference as head_reference
from stepgraph.ops.latent_queries import reference as queries_reference
from stepgraph.ops.mla_attention import mla_geometry, reference

S, LENGTH = 2, 150
Chunk = tuple[int, int, int]
"""A row: sequence, tokens computed before, tokens in this step."""

needs_kernels = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")


class Kind(NamedTuple):
    heads: int
    latent: int  # K
    rotated: int  # P
    block_size: int
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype = torch.float32


KINDS = {
    "16 heads": Kind(16, 512, 64, 16),
    "3 heads": Kind(3, 48, 8, 8),
    "20 heads": Kind(20, 32, 16, 64),
    "odd latent": Kind(3, 20, 8, 8),
    "bfloat16": Kind(4, 64, 16, 16, torch.bfloat16, torch.bfloat16),
    "float16": Kind(5, 32, 16, 8, torch.float16, torch.float16),
    "float32, float8 cache": Kind(4, 64, 16, 64, torch.float32, torch.float8_e4m3fn),
    "bfloat16, float8 cache": Kind(3, 64, 32, 16, torch.bfloat16, torch.float8_e4m3fn),
}


@dataclass(frozen=True)
class World:
    """S sequences of LENGTH tokens, sequence s in slot s + 1."""

    kind: Kind
    q: Tensor  # [S, LENGTH, H, L]
    cache: Tensor  # [blocks, B, L] float32, of all tokens
    block_table: Tensor  # [1 + S, blocks of a sequence] int32

    @staticmethod
    def of(kind: Kind) -> World:
        generator = torch.Generator().manual_seed(kind.heads)
        blocks, size = -(-LENGTH // kind.block_size), kind.latent + kind.rotated
        table = torch.zeros(1 + S, blocks, dtype=torch.int32)
        table[1:] = 1 + torch.randperm(S * blocks, generator=generator).view(S, blocks)
        q = 2 * torch.randn(S, LENGTH, kind.heads, size, generator=generator)
        cache = torch.randn(1 + S * blocks, kind.block_size, size, generator=generator)
        return World(kind, q.to(kind.dtype), cache.to(kind.cache_dtype).float(), table)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def step(self, rows: list[Chunk], rng: Random) -> tuple[tuple[Tensor, ...], int]:
        """Tensors of `mla_attention` for a step of `rows`, padded at random, and how many of the tokens are real. What the step
        must not read is NaN or large."""
        lengths = [query_len for _, _, query_len in rows]
        real, padded_R = sum(lengths), len(rows) + rng.randint(0, 3)
        q = torch.cat([self.q[s, computed : computed + n] for s, computed, n in rows])
        q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, rng.randint(0, 20)), value=rng.random())
        row_slot, kv_len = (torch.zeros(padded_R, dtype=torch.int32) for _ in range(2))
        query_start = torch.full((padded_R + 1,), real, dtype=torch.int32)
        row_slot[: len(rows)] = torch.tensor([s + 1 for s, _, _ in rows])
        kv_len[: len(rows)] = torch.tensor([computed + n for _, computed, n in rows])
        query_start[: len(rows) + 1] = torch.tensor([0, *lengths]).cumsum(0)
        held = torch.zeros(self.cache.shape[:2], dtype=torch.bool)
        for s, computed, n in rows:
            position = torch.arange(computed + n)
            B = self.kind.block_size
            held[self.block_table[s + 1, position // B].long(), position % B] = True
        cache = self.cache.masked_fill(~held.unsqueeze(2), rng.choice((float("nan"), 100.0))).to(self.kind.cache_dtype)
        return (q, cache, self.block_table, row_slot, query_start, kv_len), real

    def attend(self, arrays: tuple[Tensor, ...], *, deterministic: bool) -> Tensor:
        T, H, L = arrays[0].shape
        geometry = mla_geometry(T, len(arrays[-1]), H, 1, deterministic=deterministic)
        plan = ops.attention_plan(*arrays[3:], H, 1, L, geometry)
        return ops.mla_attention(*arrays, plan, geometry, value_dim=self.kind.latent, scale=self.scale)

    def expected(self, s: int) -> Tensor:
        """[LENGTH, H, K] in float64."""
        rows = torch.tensor([s + 1]), torch.tensor([0, LENGTH]), torch.tensor([LENGTH])
        return reference.mla_attention(
            self.q[s].double(), self.cache.double(), self.block_table, *rows, self.kind.latent, self.scale
        )


def compositions(rng: Random) -> Iterator[list[Chunk]]:
    """Steps that together hold every token: each sequence whole, then cut in chunks that share steps with others'."""
    for s in range(S):
        yield [(s, 0, LENGTH)]
    computed = [0] * S
    while min(computed) < LENGTH:
        rows = [
            (s, computed[s], min(rng.choice((1, 3, 20, 70)), LENGTH - computed[s]))
            for s in rng.sample(range(S), rng.randint(1, S))
            if computed[s] < LENGTH
        ]
        for s, _, query_len in rows:
            computed[s] += query_len
        if rows:
            yield rows


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_mixture_is_right_and_has_its_bits_if_it_is_to(kind: str, deterministic: bool) -> None:
    world, rng = World.of(KINDS[kind]), Random(1)
    expected = [world.expected(s) for s in range(S)]
    seen: dict[tuple[int, int], Tensor] = {}
    repeated = 0
    # Queries and keys are exact, weights and sums of 16 bits are rounded once more within torch's kernels.
    tolerance = 1e-5 if world.q.dtype == torch.float32 else 8 * torch.finfo(world.q.dtype).eps
    for rows in compositions(rng):
        arrays, real = world.step(rows, rng)
        out = world.attend(arrays, deterministic=deterministic)
        assert (out.shape, out.dtype) == ((len(arrays[0]), *world.q.shape[2:3], world.kind.latent), world.q.dtype)
        wanted = torch.cat([expected[s][computed : computed + n] for s, computed, n in rows])
        torch.testing.assert_close(out[:real].double(), wanted, atol=tolerance, rtol=tolerance)
        tokens = [(s, computed + j) for s, computed, n in rows for j in range(n)]
        for token, found in zip(tokens, out[:real], strict=True):
            repeated += token in seen
            assert not deterministic or torch.equal(seen.setdefault(token, found), found), token
    assert len(seen) == repeated == S * LENGTH or not deterministic


@needs_kernels
@pytest.mark.parametrize("kind", ["16 heads", "3 heads"])
def test_the_kernel_gives_the_same_bits_on_any_number_of_threads(kind: str, threads) -> None:
    world = World.of(KINDS[kind])
    for rows in ([(0, LENGTH - 1, 1)], [(0, 0, LENGTH)], [(0, 130, 7), (1, 149, 1)]):
        arrays, _ = world.step(rows, Random(2))
        outs = []
        for number in (1, 2, 3, 7):
            threads(number)
            outs.append(world.attend(arrays, deterministic=False))
        assert all(torch.equal(outs[0], out) for out in outs)


@pytest.fixture
def threads() -> Iterator[object]:
    """Sets the number of torch's threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernels
def test_the_kernel_is_what_float32_gets() -> None:
    """Which is other arithmetic than torch's: that the two differ shows that the tests above do not compare it with itself."""
    world = World.of(KINDS["16 heads"])
    (q, cache, *rows), real = world.step([(0, 0, LENGTH)], Random(3))
    entries = cache.unsqueeze(2)
    by_torch = attention_cpu.torch_attention(q, entries, entries, *rows, world.scale, 0, deterministic=False)
    found = world.attend((q, cache, *rows), deterministic=False)[:real]
    by_torch = by_torch.view(q.shape)[:real, :, : world.kind.latent]
    assert not torch.equal(found, by_torch)
    torch.testing.assert_close(found, by_torch, atol=1e-5, rtol=1e-5)


class Projections(NamedTuple):
    """Arguments of `latent_queries`, and the heads' values' weights."""

    args: tuple[Tensor, ...]
    value_weight: Tensor  # [H, V, K]

    def on(self, tokens: list[int], dtype: torch.dtype, cache_dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The arguments for some of the tokens, with a cache of zeros."""
        q, latent, positions, kv_slots, cos_sin, norm, weight, cache = self.args
        per_token = q[tokens].to(dtype), latent[tokens].to(dtype), positions[tokens], kv_slots[tokens]
        return *per_token, cos_sin, norm.to(dtype), weight.to(dtype), torch.zeros(cache.shape, dtype=cache_dtype)


def projections(T: int, H: int, N: int, P: int, K: int, V: int) -> Projections:
    generator = torch.Generator().manual_seed(T)
    merged = torch.randn(T, H * (N + P) + K + P, generator=generator)
    q, latent = merged.tensor_split((-(K + P),), dim=1)  # rows that lie apart
    weight = torch.randn(H, N + V, K, generator=generator) / 4
    kv_slots = (8 + torch.randperm(2 * T, generator=generator)[:T]).int()
    kv_slots[T - T // 3 :] = 0
    positions = torch.randint(0, 50, (T,), generator=generator, dtype=torch.int32)
    cos_sin = torch.randn(50, P, generator=generator)
    norm = 1 + torch.rand(K, generator=generator)
    cache = torch.zeros(-(-2 * T // 8) + 1, 8, K + P)
    return Projections((q, latent, positions, kv_slots, cos_sin, norm, weight[:, :N], cache), weight[:, N:])


@pytest.mark.parametrize("T", [1, 2, 5, 9, 40])
@pytest.mark.parametrize(
    "sizes", [(4, 128, 64, 512, 128), (3, 24, 8, 48, 24), (2, 18, 6, 320, 40), (2, 16, 8, 20, 8)], ids=str
)
def test_products_around_it_are_right_and_a_tokens_own(T: int, sizes: tuple[int, ...]) -> None:
    given = projections(T, *sizes)
    K, everyone, float32 = sizes[3], list(range(T)), torch.float32
    inputs = given.on(everyone, float32, float32)
    exact = given.on(everyone, torch.float64, torch.float64)
    found = ops.latent_queries(*inputs, 1e-5, deterministic=True)
    expected = queries_reference.latent_queries(*exact, 1e-5, False)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        inputs[-1][1:].double(), exact[-1][1:], atol=1e-5, rtol=1e-5
    )  # the null block is nobody's
    assert torch.equal(found, ops.latent_queries(*given.on(everyone, float32, float32), 1e-5, deterministic=True))

    latent = found[:, :, :K].contiguous()
    values = ops.head_linear(latent, given.value_weight, deterministic=True)
    exactly = head_reference.head_linear(latent.double(), given.value_weight.double(), False)
    torch.testing.assert_close(values.double(), exactly, atol=2e-4, rtol=2e-5)
    for token in range(T):
        alone = given.on([token], float32, float32)
        assert torch.equal(ops.latent_queries(*alone, 1e-5, deterministic=True)[0], found[token])
        assert torch.equal(ops.head_linear(latent[[token]], given.value_weight, deterministic=True)[0], values[token])


class Output(NamedTuple):
    values: Tensor


def block_of(world: World, given: Projections, arrays: tuple[Tensor, ...], *, deterministic: bool) -> Output:
    """A layer's attention: queries and entries, attention, values of the heads."""
    dtype, cache, (_, _, table, *rows) = world.kind.dtype, arrays[1], arrays
    q, latent, positions, kv_slots, cos_sin, norm, weight, _ = given.args
    inputs = (
        *(x.to(dtype) for x in (q, latent)), positions, kv_slots, cos_sin, norm.to(dtype), weight.to(dtype), cache
    )  # fmt: skip
    queries = ops.latent_queries(*inputs, 1e-5, deterministic=deterministic)
    out = world.attend((queries, cache, table, *rows), deterministic=deterministic)
    return Output(ops.head_linear(out, given.value_weight.to(dtype), deterministic=deterministic))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_recorded_graph_replays_another_batch_as_eager_does(kind: str, deterministic: bool) -> None:
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    world = World.of(Kind(4, 64, 16, 16, dtype, dtype))
    T, rng = 12, Random(4)
    given = projections(T, 4, 32, 16, 64, 32)
    given.args[3].zero_()  # the caches below are full
    (q, *arrays), _ = world.step([(0, 0, 6), (1, 40, 6)], rng)
    buffers = (q[:T], *arrays)
    for tensor in buffers[3:]:
        tensor.zero_()  # captured on nothing
    graph = CpuBackend().capture(lambda: block_of(world, given, buffers, deterministic=deterministic), warmups=1)
    for rows in ([(0, 90, 1), (1, 30, 11)], [(1, 0, 12)], [(0, 140, 5), (1, 2, 3)]):
        (_, cache, table, *others), real = world.step(rows, rng)
        for buffer, tensor in zip(buffers[1:], (cache, table, *others), strict=True):
            if buffer.dim() == 1:
                buffer.fill_(real if len(buffer) != len(buffers[3]) else 0)[: len(tensor)].copy_(tensor[: len(buffer)])
            else:
                buffer.copy_(tensor)
        found, expected = graph.replay(), block_of(world, given, buffers, deterministic=deterministic)
        assert torch.equal(found.values[:real], expected.values[:real])
        assert found.values[:real].isfinite().all()
    if native.available() and dtype == torch.float32:
        kernels = [call for call in graph.calls if call.namespace == "stepgraph_native"]
        assert len(kernels) == 3  # not the opaque operators, which put Python into every replay
    # However many tokens there are.
    assert len(graph.calls) < 60

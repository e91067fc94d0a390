"""Tokens of all ranks, and sums of what is made of them: ranks of either kind of mailbox against the definition.

Ranks are processes. Those that push run Triton's kernels under its interpreter, which does not round to bfloat16 as GPUs do.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import test_push_group
import test_shared_group
import torch
import triton_interpreter  # noqa: F401  # mends it
from thread_group import ThreadGroup
from thread_group import run_ranks as run_threads
from torch import Tensor
from triton_operators import triton_operators

from stepgraph.bench.ranks import run_ranks
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.collectives import reduce_gathered
from stepgraph.ops.collectives.reference import tokens
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Fault, Group, Norm
from stepgraph.parallel.shard import Shard

E = test_shared_group.E


class Case(NamedTuple):
    """One step of a layer: how many rows a rank has, and how many of them are tokens."""

    seed: int
    rows: int
    counts: tuple[int, ...]
    normed: bool


def cases(num_ranks: int, num_cases: int, most_rows: int, seed: int = 0) -> Iterator[Case]:
    """Ranks without a token, among others and all at once; ranks with all rows."""
    draw = random.Random(seed)
    for index in range(num_cases):
        rows = min(draw.choice((1, 1, 2, 3, draw.randint(1, most_rows), most_rows)), most_rows)
        counts = tuple(draw.choice((0, 0, 1, rows, draw.randint(0, rows))) for _ in range(num_ranks))
        yield Case(index, rows, (0,) * num_ranks if index == 4 else counts, draw.random() < 0.5)


def x_of(case: Case, rank: int, dtype: torch.dtype) -> Tensor:
    """A rank's tokens, with zeros of either sign; padding is NaN."""
    x_TE = torch.randn(case.rows, E, generator=torch.Generator().manual_seed(100 * case.seed + rank)).to(dtype)
    x_TE[:, 1], x_TE[:, 2] = -0.0, 0.0
    x_TE[case.counts[rank] :] = torch.nan
    return x_TE


def part_of(case: Case, rank: int, dtype: torch.dtype) -> Tensor:
    """[N, T, E], of sizes so different that the order of a sum shows; padding is NaN."""
    size = len(case.counts), case.rows, E
    part_NTE = torch.randn(size, generator=torch.Generator().manual_seed(100 * case.seed + rank + 50))
    part_NTE = (part_NTE * 10.0 ** (3 - 2 * rank)).to(dtype)
    part_NTE[:, :, 3] = -0.0
    for to, count in enumerate(case.counts):
        part_NTE[to, count:] = torch.nan
    return part_NTE


def norms(dtype: torch.dtype) -> tuple[Norm, Norm]:
    return Norm(torch.linspace(-1, 2, E), 1e-5), Norm(torch.linspace(1, 3, E).to(dtype), 1e-6)


class Layer(NamedTuple):
    """What a rank has of one case."""

    tokens: Tensor  # of all ranks, without padding
    counts: Tensor
    residual: Tensor
    normed: Tensor


def options(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What comes with the sum of a case."""
    post_norm, norm = norms(dtype)
    return ({"multiplier": 0.5, "norm": norm}, {"post_norm": post_norm, "norm": norm}, {})[case.seed % 3]


def layer(group: Group, case: Case, dtype: torch.dtype, *, counted: bool = True) -> Layer:
    """Run both collectives. `counted`: whether ranks tell how many tokens they have."""
    rank = group.shard.rank
    count_1 = torch.tensor([case.counts[rank] if counted else case.rows], dtype=torch.int32)
    norm = norms(dtype)[1] if case.normed else None
    x_AE, counts_N = group.gather_tokens(x_of(case, rank, dtype), count_1, norm=norm)
    part_AE, residual_TE = part_of(case, rank, dtype).flatten(0, 1), torch.ones(case.rows, E, dtype=dtype)
    normed_TE = group.scatter_sum(part_AE, counts_N, residual_TE, **options(case, dtype))
    rows = [x_TE[:count] for x_TE, count in zip(x_AE.split(case.rows), case.counts, strict=True)]
    return Layer(torch.cat(rows), counts_N, residual_TE, normed_TE)


def expected(case: Case, rank: int, dtype: torch.dtype) -> Layer:
    norm = norms(dtype)[1] if case.normed else (None, 0.0)
    rows = [tokens(x_of(case, other, dtype)[:count], *norm) for other, count in enumerate(case.counts)]
    parts_NTE = torch.stack([part_of(case, other, dtype)[rank] for other in range(len(case.counts))])
    parts_NTE[:, case.counts[rank] :] = 0
    residual_TE, some = torch.ones(case.rows, E, dtype=dtype), options(case, dtype)
    normed_TE = torch.empty_like(residual_TE) if "norm" in some else None
    weights = *some.get("post_norm", (None, 0.0)), *some.get("norm", (None, 0.0))
    reduce_gathered(parts_NTE, residual_TE, normed_TE, some.get("multiplier", 1.0), *weights)
    counts_N = torch.tensor(case.counts, dtype=torch.int32)
    return Layer(torch.cat(rows), counts_N, residual_TE, residual_TE if normed_TE is None else normed_TE)


def differences(case: Case, found: Layer, rank: int, dtype: torch.dtype, *, exact_norm: bool) -> list[str]:
    """What is not bit by bit as defined; norms sum squares in another order on GPUs."""
    wrong = []
    for name, value, there in zip(Layer._fields, expected(case, rank, dtype), found, strict=True):
        summed_squares = name != "counts" and (case.normed if name == "tokens" else case.seed % 3 < 2)
        if name == "residual":
            summed_squares = case.seed % 3 == 1  # of the sum
        if summed_squares and not exact_norm:
            same = value.shape == there.shape and torch.allclose(value, there, rtol=4e-3, atol=1e-5)
            same &= name != "tokens" or not torch.signbit(there[there == 0]).any()
        else:
            same = value.dtype == there.dtype and value.shape == there.shape and bits_equal(value, there)
        if not same:
            wrong.append(f"{name} of rank {rank}, {case}")
    return wrong


def bits_equal(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


MAKERS: dict[str, Callable[..., Group]] = {
    "shared": test_shared_group.group_of,
    "push": lambda shard, exchange, dtype, **options: test_push_group.push_group(shard, exchange, **options),
}


def run_all(
    shard: Shard, exchange: Exchange, kind: str, dtype: torch.dtype, some: list[Case], options: Any
) -> list[str]:
    group = MAKERS[kind](shard, exchange, dtype, **options)
    with triton_operators("gather_tokens", "scatter_sum", "all_reduce_add") if kind == "push" else nullcontext():
        wrong = []
        for case in some:
            if case.seed % 4 == shard.rank:  # by itself, between the others' collectives
                with group.loop_back():
                    layer(group, case, dtype)
            if case.seed % 3 == 1:
                group.add_sum(torch.ones(5, E, dtype=dtype), torch.ones(5, E, dtype=dtype))
            wrong += differences(case, layer(group, case, dtype), shard.rank, dtype, exact_norm=kind != "push")
    assert group.fault() is None
    exchange(b"")
    return wrong


@pytest.mark.parametrize(
    ("num_ranks", "dtype", "slot_bytes"),
    [(2, torch.bfloat16, 1 << 16), (3, torch.float32, 1 << 16), (4, torch.float32, 8192)],
)
def test_ranks_that_share_memory_get_the_defined_value(num_ranks: int, dtype: torch.dtype, slot_bytes: int) -> None:
    """Of four ranks, in several messages."""
    some = list(cases(num_ranks, 12, 300))
    assert run_ranks(run_all, num_ranks, "shared", dtype, some, {"slot_bytes": slot_bytes}) == [[]] * num_ranks


PUSHED = {
    2: [(1, 0, 0), (5, 5, 0), (2, 0, 0), (3, 1, 3), (1, 0, 1), (22, 22, 2)],  # of 22 rows, sums go in two messages
    3: [(2, 0, 2, 1), (1, 0, 0, 0), (4, 0, 0, 3), (2, 1, 2, 1)],
}
"""By the number of ranks: rows, and counts."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton does not interpret")
@pytest.mark.parametrize("num_ranks", PUSHED)
def test_ranks_that_push_get_the_defined_value(num_ranks: int) -> None:
    some = [Case(seed, rows, tuple(counts), seed % 2 == 1) for seed, (rows, *counts) in enumerate(PUSHED[num_ranks])]
    assert run_ranks(run_all, num_ranks, "push", torch.float16, some, {}) == [[]] * num_ranks


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_threads_follow_the_definition(num_ranks: int) -> None:
    def run(group: ThreadGroup) -> list[str]:
        return [
            text
            for case in cases(num_ranks, 12, 60)
            for text in differences(
                case, layer(group, case, torch.float32), group.shard.rank, torch.float32, exact_norm=True
            )
        ]

    assert run_threads(num_ranks, run) == [[]] * num_ranks


def test_what_is_left_open_is_not_compared_but_anything_else_is() -> None:
    """The comparison sees padding that was taken for tokens, and ranks exchanged for each other."""
    case = Case(7, 8, (3, 8), False)

    def uncounted(group: ThreadGroup) -> list[str]:
        found = layer(group, case, torch.float32, counted=False)
        return differences(case, found, group.shard.rank, torch.float32, exact_norm=True)

    assert any("counts" in text for text in run_threads(2, uncounted)[0])
    for field in ("tokens", "residual"):
        right = expected(case, 0, torch.float32)
        wrong = right._replace(**{field: getattr(right, field).flip(0)})
        assert differences(case, wrong, 0, torch.float32, exact_norm=True)


class Steps(NamedTuple):
    tokens: Tensor
    residual: Tensor


def replayed(shard: Shard, exchange: Exchange) -> list[Tensor]:
    """A graph that each rank captured by itself, replayed with other counts."""
    group = test_shared_group.group_of(shard, exchange, slot_bytes=8192)
    x_TE, count_1, residual_TE = torch.ones(70, E), torch.ones(1, dtype=torch.int32), torch.zeros(70, E)

    def program() -> Steps:
        x_AE, counts_N = group.gather_tokens(x_TE * 1, count_1)
        group.scatter_sum(x_AE * 2, counts_N, residual_TE)
        inside_A = torch.arange(x_AE.shape[0]) % 70 < counts_N.repeat_interleave(70, output_size=x_AE.shape[0])
        return Steps(torch.where(inside_A[:, None], x_AE, 0.0), residual_TE)

    with group.loop_back():
        graph = CpuBackend().capture(program, warmups=1 + shard.rank)
    residual_TE.zero_()
    for step in range(4):
        x_TE.fill_(1.0 + shard.rank)
        count_1.fill_((step + 20 * shard.rank) * (step != 2))
        found = graph.replay()
    return [found.tokens.clone(), found.residual.clone()]


def test_counts_are_read_at_each_replay() -> None:
    for rank, (tokens_AE, residual_TE) in enumerate(run_ranks(replayed, 3)):
        for other, x_TE in enumerate(tokens_AE.split(70)):
            count = 3 + 20 * other
            assert (x_TE[:count] == 1 + other).all()
            assert (x_TE[count:] == 0).all()
        times_T = torch.tensor([sum(row < step + 20 * rank for step in (0, 1, 3)) for row in range(70)])
        assert torch.equal(residual_TE, (times_T * 6.0 * (1 + rank))[:, None].expand(70, E))  # three times the double


def left(shard: Shard, exchange: Exchange, kind: str, skipped: str) -> Fault | None:
    """The last rank, which has no token, leaves one collective out."""
    options = {"time_limit_s": 0.5} if kind == "shared" else {}
    group, is_last = MAKERS[kind](shard, exchange, torch.float16, **options), shard.rank == shard.size - 1
    case = Case(1, 3, (2,) * (shard.size - 1) + (0,), False)
    with triton_operators("gather_tokens", "scatter_sum") if kind == "push" else nullcontext():
        layer(group, case, torch.float16)
        exchange(b"")
        if not is_last and kind == "push":
            group.abort()  # the interpreter has no clock
        count_1 = torch.tensor([case.counts[shard.rank]], dtype=torch.int32)
        counts_N = torch.tensor(case.counts, dtype=torch.int32)
        if not is_last or skipped == "scatter_sum":
            _, found_N = group.gather_tokens(x_of(case, shard.rank, torch.float16), count_1)
            assert 0 <= found_N.min() <= found_N.max() <= 3
        if not is_last:
            part_AE = part_of(case, shard.rank, torch.float16).flatten(0, 1)
            group.scatter_sum(part_AE, counts_N, torch.ones(3, E).half())
    exchange(b"")
    return group.fault()


@pytest.mark.parametrize("skipped", ["gather_tokens", "scatter_sum"])
def test_a_rank_that_skips_a_collective_is_named(skipped: str) -> None:
    faults = run_ranks(left, 3, "shared", skipped)
    assert faults[:2] == [Fault(2, skipped, 2 + (skipped == "scatter_sum"))] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, Triton does not interpret")
def test_a_rank_that_leaves_those_who_push_is_named() -> None:
    assert run_ranks(left, 2, "push", "gather_tokens")[0] == Fault(1, "gather_tokens", 2)


def of_another_shape(shard: Shard, exchange: Exchange, kind: str, collective: str) -> Fault | None:
    """The last rank has more rows."""
    group = MAKERS[kind](shard, exchange, torch.float16)
    rows = 2 + (shard.rank == shard.size - 1)
    with triton_operators("gather_tokens", "scatter_sum") if kind == "push" else nullcontext():
        x_TE, count_1 = torch.ones(rows, E).half(), torch.ones(1, dtype=torch.int32)
        if collective == "gather_tokens":
            group.gather_tokens(x_TE, count_1)
        else:
            group.scatter_sum(x_TE.repeat(shard.size, 1), count_1.repeat(shard.size), x_TE)
    exchange(b"")
    return group.fault()


@pytest.mark.parametrize("collective", ["gather_tokens", "scatter_sum"])
@pytest.mark.parametrize("kind", MAKERS)
def test_ranks_of_different_shapes_do_not_mix_their_rows(kind: str, collective: str) -> None:
    if kind == "push" and torch.cuda.is_available():
        pytest.skip("with a GPU, Triton does not interpret")
    assert run_ranks(of_another_shape, 2, kind, collective) == [Fault(1, collective, 0), Fault(0, collective, 0)]

"""Ranks that share a host's memory: each test runs its own processes."""

import os
import tempfile
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from stepgraph.bench.ranks import run_ranks
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.collectives import reduce_gathered
from stepgraph.parallel import create as create_module
from stepgraph.parallel.create import create_group
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Fault, Group, Norm
from stepgraph.parallel.shard import Shard
from stepgraph.parallel.shared_memory import map_shared
from stepgraph.platforms.cpu import CpuPlatform

E, V = 48, 101


def group_of(
    shard: Shard,
    exchange: Exchange,
    dtype: torch.dtype = torch.float32,
    *,
    slot_bytes: int = 1 << 16,
    time_limit_s: float = 60.0,
) -> Group:
    torch.set_num_threads(1)
    create_module._HOST_SLOT_BYTES = slot_bytes
    return create_group(
        shard,
        exchange,
        CpuPlatform(),
        dtype=dtype,
        hidden_size=E,
        max_tokens=4096,
        vocab_size=V,
        max_samples=512,
        time_limit_s=time_limit_s,
    )


def random(seed: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parts(step: int, num_ranks: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What all ranks give, [N, *size], of very different sizes, so that the order of a sum shows."""
    return torch.stack([random(1000 * step + r, *size) * 10.0 ** (3 - 3 * r) for r in range(num_ranks)]).to(dtype)


def mixed_steps(shard: Shard, exchange: Exchange, dtype: torch.dtype) -> list[Tensor]:
    """Sums with all that may come with them, and gathers, of all sizes, some in several messages."""
    group = group_of(shard, exchange, dtype, slot_bytes=8192)
    post_norm, norm = Norm(random(1, E), 1e-5), Norm(random(2, E, dtype=dtype), 1e-6)
    results = []
    for step, num_tokens in enumerate((1, 3, 64, 1, 200, 0, 17)):
        residual = random(step, num_tokens, E, dtype=dtype)
        part = parts(step, shard.size, num_tokens, E, dtype=dtype)[shard.rank]
        options = {"multiplier": 0.22, "norm": norm} | ({"post_norm": post_norm} if step % 2 else {})
        results += [group.add_sum(part, residual, **options), residual]
        plain = random(step, num_tokens, E, dtype=dtype)
        assert group.add_sum(part, plain) is plain
        columns = parts(step, shard.size, num_tokens, -(-V // shard.size), dtype=dtype)[shard.rank]
        results += [plain, group.gather(columns, torch.full((num_tokens, V), torch.nan, dtype=dtype))]
    assert group.fault() is None
    return results


@pytest.mark.parametrize(("num_ranks", "dtype"), [(2, torch.bfloat16), (3, torch.float32), (4, torch.float32)])
def test_all_ranks_get_the_defined_value(num_ranks: int, dtype: torch.dtype) -> None:
    ranks = run_ranks(mixed_steps, num_ranks, dtype)
    post_norm, norm = Norm(random(1, E), 1e-5), Norm(random(2, E, dtype=dtype), 1e-6)
    expected = []
    for step, num_tokens in enumerate((1, 3, 64, 1, 200, 0, 17)):
        residual, all_parts = (
            random(step, num_tokens, E, dtype=dtype),
            parts(step, num_ranks, num_tokens, E, dtype=dtype),
        )
        out, plain = torch.empty_like(residual), residual.clone()
        reduce_gathered(all_parts, residual, out, 0.22, *(post_norm if step % 2 else (None, 0.0)), *norm)
        reduce_gathered(all_parts, plain, None)
        columns = parts(step, num_ranks, num_tokens, -(-V // num_ranks), dtype=dtype)
        expected += [out, residual, plain, torch.cat(list(columns), dim=1)[:, :V]]
    for results in ranks:
        assert len(results) == len(expected)
        for result, value in zip(results, expected, strict=True):
            assert torch.equal(result, value)


class Sums(NamedTuple):
    residual: Tensor
    gathered: Tensor


def replayed(shard: Shard, exchange: Exchange) -> list[Tensor]:
    """A graph captured by each rank for itself, at its own time, and replayed by all."""
    group = group_of(shard, exchange)
    part, residual, out = torch.ones(3, E), torch.zeros(3, E), torch.zeros(3, V)
    columns = torch.zeros(3, -(-V // shard.size))
    norm = Norm(torch.ones(E), 1e-6)

    def program() -> Sums:
        normed = group.add_sum(part * 1, residual, norm=norm)
        columns.copy_(group.add_sum(normed, residual)[:, : columns.shape[1]] + shard.rank)
        return Sums(residual, group.gather(columns, out))

    time.sleep(0.2 * shard.rank)
    with group.loop_back(), group.loop_back():
        graph = CpuBackend().capture(program, warmups=1 + shard.rank)
    residual.fill_(0.5)
    for step in range(5):
        part.fill_(step + shard.rank)
        sums = graph.replay()
    return [sums.residual.clone(), sums.gathered.clone()]


def test_a_graph_that_each_rank_captured_by_itself_communicates() -> None:
    ranks = run_ranks(replayed, 3)
    assert all(torch.equal(a, b) for results in ranks for a, b in zip(results, ranks[0], strict=True))
    residual, gathered = ranks[0]
    assert residual.unique().numel() == 1
    # Each step adds the sum of parts 3 · step + 3, and three times the norm of a constant row, which is 1.
    assert residual[0, 0] == pytest.approx(0.5 + sum(3 * step + 3 + 3 for step in range(5)), rel=1e-5)
    per_rank = -(-V // 3)
    assert (gathered[:, per_rank] - gathered[:, 0] == 1).all()
    assert (gathered[:, 2 * per_rank] - gathered[:, 0] == 2).all()


def alone(shard: Shard, exchange: Exchange) -> list[Tensor]:
    """Only rank 1 runs."""
    group = group_of(shard, exchange, time_limit_s=0.0)
    if shard.rank != 1:
        return []
    residual = torch.ones(2, E)
    with group.loop_back():
        group.add_sum(torch.full((2, E), 2.0), residual)
        gathered = group.gather(torch.arange(2.0 * 34).view(2, 34), torch.zeros(2, V))
    assert group.fault() is None
    return [residual, gathered]


def test_a_rank_in_loop_back_waits_for_nobody() -> None:
    residual, gathered = run_ranks(alone, 3)[1]
    assert (residual == 7).all()
    columns = torch.arange(2.0 * 34).view(2, 34)
    assert torch.equal(gathered, torch.cat((columns, columns, columns), dim=1)[:, :V])


def abandoned(shard: Shard, exchange: Exchange, aborts: bool) -> tuple[Fault | None, Fault | None, int, float]:
    """Rank 2 stops after three collectives."""
    group = group_of(shard, exchange, time_limit_s=3600.0 if aborts else 0.4)
    residual = torch.zeros(2, E)
    for _ in range(3):
        group.add_sum(torch.ones(2, E), residual)
    before = group.fault()
    assert group.fault_flag is not None
    assert not group.fault_flag.item()
    exchange(b"")
    if shard.rank == 2:
        exchange(b"")
        return before, None, 0, 0.0
    if aborts:
        group.abort()
    group.gather(torch.ones(2, -(-V // 3)), torch.zeros(2, V))
    started = time.monotonic()
    for _ in range(100):
        group.add_sum(torch.ones(2, E), residual)
    took_s = time.monotonic() - started
    exchange(b"")
    return before, group.fault(), int(group.fault_flag), took_s


@pytest.mark.parametrize("aborts", [False, True])
def test_a_rank_that_does_not_come_is_named_and_nobody_waits_again(aborts: bool) -> None:
    ranks = run_ranks(abandoned, 3, aborts)
    for before, after, flag, took_s in ranks[:2]:
        assert before is None
        assert after is not None
        assert after._replace(rank=2) == Fault(2, "all_gather", 3)
        assert flag == 1
        assert took_s < 30  # a hundred waits would take forty seconds, or for ever
    assert {after.rank for _, after, _, _ in ranks[:2]} <= {0, 1, 2}
    if not aborts:
        assert [after.rank for _, after, _, _ in ranks[:2]] == [2, 2]


def refused(shard: Shard, exchange: Exchange) -> str:
    if shard.rank == 0:
        create_module._HOST_SLOT_BYTES = 1 << 60
    try:
        create_group(
            shard,
            exchange,
            CpuPlatform(),
            dtype=torch.float32,
            hidden_size=1 << 50,
            max_tokens=8,
            vocab_size=1,
            max_samples=1,
        )
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "made"


def test_where_memory_cannot_be_shared_all_ranks_say_so() -> None:
    texts = run_ranks(refused, 2)
    assert texts[0] == texts[1]
    assert "StepgraphError" in texts[0]
    assert "memory that ranks share cannot be made" in texts[0]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only Linux has files without names that others can open")
def test_what_ranks_share_has_no_name_that_a_killed_process_could_leave_behind(monkeypatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", None)
    memory = map_shared(Shard(0, 1), lambda value: [value], 4096)
    memory[:4] = b"here"
    assert len(memory) == 4096

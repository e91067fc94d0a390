"""Ranks that are threads of one process: a `Group` by its definition, in plain torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stepgraph.ops.collectives.reference import reduce_gathered, tokens
from stepgraph.parallel.group import GatheredTokens
from stepgraph.parallel.shard import Shard


class ThreadGroup:
    """See `stepgraph.parallel.group.Group`. Nobody waits longer than a minute for a rank that does not come."""

    name = "threads"
    fault_flag = None

    def __init__(self, rank: int, parts: list[tuple[Tensor, ...] | None], barrier: threading.Barrier) -> None:
        self.shard = Shard(rank, len(parts))
        self.calls: list[str] = []
        self._parts, self._barrier = parts, barrier

    def add_sum(self, part_TE, residual_TE, *, multiplier=1.0, post_norm=None, norm=None):
        """See `Group.add_sum`."""
        assert part_TE.dtype == residual_TE.dtype
        assert part_TE.is_contiguous()
        assert residual_TE.is_contiguous()
        parts_NTE, out_TE = torch.stack(self._parts_of("add_sum", part_TE)), torch.empty_like(residual_TE)
        options = (multiplier, *(post_norm or (None, 0.0)), *(norm or (None, 0.0)))
        reduce_gathered(parts_NTE, residual_TE, out_TE, *options)
        return residual_TE if norm is None else out_TE

    def gather(self, part_RW, out_RV):
        """See `Group.gather`."""
        width, ranks = part_RW.shape[1], self.shard.size
        assert width * (ranks - 1) < out_RV.shape[1] <= width * ranks
        assert part_RW.is_contiguous()
        assert out_RV.is_contiguous()
        return out_RV.copy_(torch.cat(self._parts_of("gather", part_RW), 1)[:, : out_RV.shape[1]])

    def gather_tokens(self, x_TE, count_1, *, norm=None):
        """See `Group.gather_tokens`; what is left open is NaN."""
        assert x_TE.is_contiguous()
        assert count_1.dtype == torch.int32
        ranks = self._exchange("gather_tokens", (tokens(x_TE, *(norm or (None, 0.0))), count_1))
        x_NTE = torch.stack([x_TE for x_TE, _ in ranks])
        counts_N = torch.cat([count_1 for _, count_1 in ranks])
        for rank, count in enumerate(counts_N.tolist()):
            if rank != self.shard.rank:
                x_NTE[rank, count:] = torch.nan
        return GatheredTokens(x_NTE.flatten(0, 1), counts_N)

    def scatter_sum(self, part_AE, counts_N, residual_TE, *, multiplier=1.0, post_norm=None, norm=None):
        """See `Group.scatter_sum`."""
        assert part_AE.dtype == residual_TE.dtype
        assert part_AE.is_contiguous()
        rank = self.shard.rank
        ranks = self._exchange("scatter_sum", (part_AE.view(self.shard.size, *residual_TE.shape),))
        parts_NTE, out_TE = torch.stack([part_NTE[rank] for (part_NTE,) in ranks]), torch.empty_like(residual_TE)
        options = (multiplier, *(post_norm or (None, 0.0)), *(norm or (None, 0.0)))
        reduce_gathered(parts_NTE, residual_TE, out_TE, *options, counts_N[rank])
        return residual_TE if norm is None else out_TE

    def loop_back(self):
        """See `Group.loop_back`; no rank runs anything by itself."""
        return nullcontext()

    def fault(self):
        """See `Group.fault`."""

    def abort(self) -> None:
        """See `Group.abort`."""
        self._barrier.abort()

    def close(self) -> None:
        """See `Group.close`."""

    def _parts_of(self, name: str, part: Tensor) -> list[Tensor]:
        """All ranks' parts, copied."""
        return [part for (part,) in self._exchange(name, (part,))]

    def _exchange(self, name: str, tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """What all ranks give, copied."""
        self.calls.append(f"{name} {list(tensors[0].shape)}")
        self._parts[self.shard.rank] = tuple(tensor.clone() for tensor in tensors)
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts


def run_ranks(size: int, run: Callable[[ThreadGroup], Any]) -> Sequence[Any]:
    """What `run` returns on each of so many ranks."""
    barrier, parts = threading.Barrier(size, timeout=60), [None] * size
    groups = [ThreadGroup(rank, parts, barrier) for rank in range(size)]

    def run_rank(group: ThreadGroup) -> Any:
        try:
            with torch.no_grad():
                return run(group)
        except BaseException as error:
            barrier.abort()
            raise error

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run_rank, group) for group in groups]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]

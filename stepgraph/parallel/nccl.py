"""Groups of ranks on GPUs that do not reach each other's memory: NCCL gathers the parts, and each rank adds them up.

Shapes: N ranks, T tokens of each, A = N·T tokens, E hidden size, R rows, W columns that a rank computes, V all columns.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import Tensor, distributed

from stepgraph.errors import ConfigError
from stepgraph.ops.collectives import reduce_gathered
from stepgraph.ops.collectives.reference import gather_columns, tokens
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.group import Fault, GatheredTokens, Norm
from stepgraph.parallel.shard import Shard

_MOST_GATHERED = 1 << 25
"""Numbers that a rank has of all parts for all ranks' tokens at a time."""


class NcclGroup:
    """See `stepgraph.parallel.group.Group`. A graph with a collective communicates in loop-back, too, so that all ranks must try
    it out together. NCCL does not say for whom it waits: there is no time limit, and no fault is named."""

    name = "nccl"

    def __init__(self, shard: Shard, exchange: Exchange, device: torch.device, *, time_limit_s: float) -> None:
        """Args:
        shard, exchange: as of `create_group`.
        device: of this rank.
        time_limit_s: of starting together.

        Raises:
            ConfigError: torch was built without NCCL.
        """
        if not distributed.is_nccl_available():
            raise ConfigError(
                f"tensor_parallel_size={shard.size}, but the GPUs have no access to each other's memory, and torch "
                f"{torch.__version__} was built without NCCL; install a build that has it, or use one device"
            )
        self.shard, self._device = shard, device
        self.fault_flag: Tensor | None = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._depth = 0  # of loop_back
        folder = tempfile.mkdtemp(prefix="stepgraph-") if shard.rank == 0 else ""  # none but this user's
        try:
            folder, *_ = (path.decode() for path in exchange(folder.encode()))
            path = os.path.join(folder, "nccl")
            store = distributed.FileStore(path, shard.size)  # type: ignore[attr-defined]  # its stubs lack it
            options = distributed.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=time_limit_s)
            self._nccl = distributed.ProcessGroupNCCL(store, shard.rank, shard.size, options)
            self._gathered(torch.zeros(1, 1, device=device))  # which connects them
            torch.cuda.synchronize(device)
            exchange(b"")
        finally:
            if shard.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)

    def add_sum(
        self,
        part_TE: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """See `Group.add_sum`."""
        out_TE = None if norm is None else torch.empty_like(residual_TE)
        reduce_gathered(
            self._gathered(part_TE),
            residual_TE,
            out_TE,
            multiplier,
            *(post_norm or (None, 0.0)),
            *(norm or (None, 0.0)),
        )
        return residual_TE if out_TE is None else out_TE

    def gather(self, part_RW: Tensor, out_RV: Tensor) -> Tensor:
        """See `Group.gather`."""
        gather_columns(self._gathered(part_RW), out_RV)
        return out_RV

    def gather_tokens(self, x_TE: Tensor, count_1: Tensor, *, norm: Norm | None = None) -> GatheredTokens:
        """See `Group.gather_tokens`; padding is sent, too."""
        x_NTE = self._gathered(tokens(x_TE, *(norm or (None, 0.0))))
        return GatheredTokens(x_NTE.flatten(0, 1), self._gathered(count_1).flatten())

    def scatter_sum(
        self,
        part_AE: Tensor,
        counts_N: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """See `Group.scatter_sum`; all is sent to all ranks, padding too."""
        rank, size = self.shard.rank, self.shard.size
        part_NTE = part_AE.view(size, *residual_TE.shape)
        pieces = part_NTE.split(max(1, _MOST_GATHERED // (size * part_AE[0].numel() * size)), dim=1)
        parts_NTE = torch.cat([self._gathered(piece)[:, rank] for piece in pieces], dim=1)
        out_TE = None if norm is None else torch.empty_like(residual_TE)
        (post_weight, post_eps), (weight, eps) = post_norm or (None, 0.0), norm or (None, 0.0)
        reduce_gathered(parts_NTE, residual_TE, out_TE, multiplier, post_weight, post_eps, weight, eps, counts_N[rank])
        return residual_TE if out_TE is None else out_TE

    @contextmanager
    def loop_back(self) -> Iterator[None]:
        """See `Group.loop_back`."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def fault(self) -> Fault | None:
        """None: see the class."""
        return None

    def abort(self) -> None:
        """See `Group.abort`."""
        assert self.fault_flag is not None
        self.fault_flag.fill_(1)
        with suppress(RuntimeError):  # of a communicator that failed by itself
            self._nccl.abort()

    def close(self) -> None:
        """See `Group.close`."""
        torch.cuda.synchronize(self._device)
        with suppress(RuntimeError):
            self._nccl.abort()

    def _gathered(self, part: Tensor) -> Tensor:
        """All ranks' parts, [N, *part.shape]."""
        if self._depth and not torch.cuda.is_current_stream_capturing():
            return part.expand(self.shard.size, *part.shape)
        parts = part.new_empty(self.shard.size, *part.shape)
        if part.numel():
            # Without a public name, but what all_gather_into_tensor calls.
            self._nccl._allgather_base(parts, part.contiguous()).wait()  # type: ignore[attr-defined]
        return parts

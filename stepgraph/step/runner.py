"""StepRunner: launches steps and reads their results. The only place where host and device meet."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stepgraph import ops
from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError
from stepgraph.graph import Graph, create_backend
from stepgraph.graph.pool import GraphPool
from stepgraph.models.config import DecoderConfig
from stepgraph.models.decoder import Decoder
from stepgraph.ops import slot_line
from stepgraph.platforms import Platform
from stepgraph.step.plan import StepPlan
from stepgraph.step.program import StepOutput, StepProgram
from stepgraph.step.shape import StepShape
from stepgraph.step.state import RING_DEPTH, SlotState

logger = logging.getLogger(__name__)

_MEMORY_RESERVE_BYTES = 2 << 30
"""Left free beside the KV cache on a GPU, for activations and captured graphs."""
_CPU_CACHE_BYTES = 1 << 30
"""KV cache on CPU unless num_kv_blocks says otherwise; grows to one request of max_model_len if that is more."""


class RowResult(NamedTuple):
    """What one row of a step produced."""

    slot: int
    generation: int
    token: int  # NO_TOKEN if the row was a chunk of a prompt, or did not run
    finish: int  # RUNNING, FINISHED_STOP or FINISHED_LENGTH


@dataclass(frozen=True)
class Ticket:
    """A launched step whose results have not been read."""

    step: int
    num_rows: int


class StepRunner:
    """Owns the device side of an engine: SlotState, KV cache, graphs."""

    def __init__(self, model: Decoder, config: EngineConfig, platform: Platform, *, max_model_len: int):
        self.platform = platform
        self.max_model_len = max_model_len
        self.block_size = config.cache.block_size
        self.vocab_size = model.config.vocab_size
        self.model = model
        self._multiprocessors = platform.multiprocessors
        scheduler, graph = config.scheduler, config.graph
        backend = create_backend(
            platform.default_graph_backend if graph.graph_backend == "auto" else graph.graph_backend
        )
        self.pool: GraphPool[StepOutput] = GraphPool(
            graph,
            backend,
            self.create_program,
            self._leaving_no_trace,
            self._try_largest_context,
            platform.used_memory_bytes,
            max_tokens=scheduler.max_num_batched_tokens,
            max_rows=scheduler.max_num_seqs,
            lazy=graph.capture == "lazy" or (graph.capture == "auto" and not platform.captures_all_by_default),
        )
        self.state = SlotState(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
            block_size=self.block_size,
            max_shape=self.pool.max_shape,
            platform=platform,
        )
        self.kv_caches = _allocate_kv(model.config, config, platform, next(model.parameters()).dtype, max_model_len)
        self._logits = torch.empty(
            scheduler.max_num_seqs, self.vocab_size, dtype=self.kv_caches[0][0].dtype, device=platform.device
        )
        self.num_kv_blocks = self.kv_caches[0][0].shape[0]

        plan_length = self.state.plan.shape[0]
        self._staging = [platform.host_buffer(plan_length) for _ in range(RING_DEPTH)]
        self._staging_arrays = [buffer.numpy() for buffer in self._staging]
        self._completions = [platform.completion() for _ in range(RING_DEPTH)]
        self._ring = self.state.ring.numpy()
        self._trial_context_len = min(graph.capture_context_len or max_model_len, max_model_len - 1)
        self._launched = 0
        self._loaded: tuple[tuple[tuple[int, int], ...], StepShape] | None = None

    def launch(self, plan: StepPlan) -> Ticket:
        """Launch one step: at most one copy (the plan, if it changed) and one graph.

        At most RING_DEPTH - 1 steps may be launched and not collected.
        """
        shape, graph = self.pool.graph_for(plan)
        self.load(plan, shape)
        graph.replay()
        self._completions[self._launched % RING_DEPTH].record()
        self._launched += 1
        return Ticket(self._launched - 1, len(plan.rows))

    def load(self, plan: StepPlan, shape: StepShape) -> None:
        """Put `plan` where graphs of `shape` read it; nothing to do if it lies there already."""
        # Deltas are idempotent, so rows that repeat without new ones can run on the plan as it lies on the device.
        if self._loaded == (plan.rows, shape) and not plan.deltas:
            return
        length = shape.plan_length(self.block_size)
        turn = self._launched % RING_DEPTH
        plan.pack(shape, self.block_size, self._staging_arrays[turn][:length])
        self.state.plan[:length].copy_(self._staging[turn][:length], non_blocking=True)
        self._loaded = (plan.rows, shape)

    def collect(self, ticket: Ticket) -> list[RowResult]:
        """Wait for a launched step and return its rows' results, in the plan's order."""
        assert self._launched - ticket.step <= RING_DEPTH, (ticket, self._launched)
        entry = ticket.step % RING_DEPTH
        self._completions[entry].wait()
        return [RowResult(*row) for row in self._ring[entry, : ticket.num_rows].tolist()]

    @contextmanager
    def workbench(self) -> Iterator[None]:
        """Borrow the buffers for checks and timings, while no request runs.

        Inside, state may be laid out by hand, plans loaded and graphs replayed, from step 0 on; afterwards all slots are
        empty and the engine's steps count on.
        """
        self.platform.synchronize()
        self.state.counter.zero_()
        self._loaded = None
        try:
            yield
        finally:
            self.platform.synchronize()
            self.state.lines.zero_()
            self.state.counter.fill_(self._launched % RING_DEPTH)
            self._loaded = None

    def create_program(self, shape: StepShape) -> StepProgram:
        """The program of `shape` over this runner's buffers."""
        config = self.model.config
        geometry = ops.attention_geometry(
            shape.num_tokens, shape.num_rows, config.num_heads, config.num_kv_heads, self._multiprocessors
        )
        return StepProgram(self.model, self.state, self.kv_caches, self._logits, shape, geometry)

    @contextmanager
    def _leaving_no_trace(self) -> Iterator[None]:
        """Inside, programs run on the null plan: they touch the null slot and the null block only."""
        with self.state.untraced():
            self._loaded = None
            self.state.plan.zero_()
            yield

    def _try_largest_context(self, graph: Graph[StepOutput]) -> None:
        """Launch `graph` on one decode row at the largest context, in the null slot and the null block."""
        line = self.state.lines[slot_line.NULL_SLOT]
        with self._leaving_no_trace():
            self.state.plan[: slot_line.ROW_WIDTH] = torch.tensor([slot_line.NULL_SLOT, 1], dtype=torch.int32)
            line[slot_line.LENGTH], line[slot_line.COMPUTED] = self._trial_context_len, self._trial_context_len - 1
            line[slot_line.ACTIVE], line[slot_line.MAX_LENGTH] = 1, self.max_model_len
            graph.replay()
            line.zero_()
            self.state.tokens[slot_line.NULL_SLOT].zero_()


def _allocate_kv(
    model: DecoderConfig, config: EngineConfig, platform: Platform, dtype: torch.dtype, max_model_len: int
) -> tuple[tuple[Tensor, Tensor], ...]:
    """One cache of keys and one of values per layer, [blocks, block_size, G, D], block 0 being the null block."""
    block_size, max_num_seqs = config.cache.block_size, config.scheduler.max_num_seqs
    block_bytes = 2 * model.num_layers * block_size * model.num_kv_heads * model.head_dim * dtype.itemsize
    blocks_per_request = -(-max_model_len // block_size)
    num_blocks = config.cache.num_kv_blocks
    used = platform.total_memory_bytes() - platform.free_memory_bytes()
    if num_blocks is None:
        if platform.device.type == "cpu":
            budget = max(_CPU_CACHE_BYTES, (blocks_per_request + 1) * block_bytes)  # and the null block
        else:
            budget = int(platform.total_memory_bytes() * config.cache.gpu_memory_utilization) - used
            budget -= _MEMORY_RESERVE_BYTES
        num_blocks = min(budget // block_bytes, max_num_seqs * blocks_per_request + 1)
    needed = num_blocks * block_bytes
    free = platform.free_memory_bytes()
    if num_blocks < 2 and config.cache.num_kv_blocks is None:
        raise ConfigError(
            f"no memory is left for the KV cache: {used / 2**30:.2f} GiB of {platform.total_memory_bytes() / 2**30:.2f} are in "
            f"use, {_MEMORY_RESERVE_BYTES / 2**30:.0f} GiB are kept for activations and graphs, and gpu_memory_utilization is "
            f"{config.cache.gpu_memory_utilization}; free memory on the device, or set num_kv_blocks"
        )
    if needed > free:
        raise ConfigError(
            f"the KV cache needs {needed / 2**30:.2f} GiB and {free / 2**30:.2f} GiB are free; lower num_kv_blocks, "
            "max_model_len or gpu_memory_utilization"
        )
    shape = (num_blocks, block_size, model.num_kv_heads, model.head_dim)
    logger.info(
        "KV cache: %d blocks of %d tokens, %.2f GiB; %d tokens in all",
        num_blocks,
        block_size,
        needed / 2**30,
        (num_blocks - 1) * block_size,
    )
    if num_blocks <= blocks_per_request:
        logger.warning(
            "the KV cache holds %d tokens, less than one request of max_model_len=%d; longer requests will be refused",
            (num_blocks - 1) * block_size,
            max_model_len,
        )
    return tuple(
        (
            torch.zeros(shape, dtype=dtype, device=platform.device),
            torch.zeros(shape, dtype=dtype, device=platform.device),
        )
        for _ in range(model.num_layers)
    )

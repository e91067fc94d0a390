"""StepRunner: launches steps and reads their results. The only place where host and device meet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig
from stepgraph.graph import Graph, create_backend
from stepgraph.graph.eager import EagerGraph
from stepgraph.graph.store import GraphStore
from stepgraph.layers.inputs import DispatchTable
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.language_model import LanguageModel
from stepgraph.ops.collectives.cpu import order_memory
from stepgraph.parallel.exchange import Exchange, alone, least
from stepgraph.parallel.group import Group
from stepgraph.platforms import CompiledKernels, Completion, Platform
from stepgraph.spec.drafter import Drafter
from stepgraph.step.attention import AttentionSizes
from stepgraph.step.expert_counts import ExpertCounts
from stepgraph.step.graphs import StepGraphs
from stepgraph.step.loaded_plan import LoadedPlan
from stepgraph.step.logits import LogitMemory
from stepgraph.step.memory import CacheLayout, OperatorCount, choose_sizes, kv_cache_dtype
from stepgraph.step.output_rings import RING_DEPTH, OutputReader
from stepgraph.step.plan import BlockTables, StepPlan
from stepgraph.step.program import StepOutput, StepProgram
from stepgraph.step.results import StepResults, Ticket
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.shape_policy import ShapePolicy
from stepgraph.step.shared_rings import SharedRings
from stepgraph.step.signals import KVSignals
from stepgraph.step.state import SlotState

logger = logging.getLogger(__name__)


def backend_name(config: EngineConfig, platform: Platform) -> str:
    """What captures the steps, as `create_backend` takes it."""
    wanted = config.graph.graph_backend
    return platform.default_graph_backend if wanted == "auto" else wanted


class StepRunner:
    """Owns the device side of an engine: SlotState, KV cache, graphs."""

    def __init__(
        self,
        model: LanguageModel,
        config: EngineConfig,
        platform: Platform,
        *,
        max_model_len: int,
        adapters: AdapterStore | None = None,
        drafter: Drafter | None = None,
        draft_levels: Sequence[int] = (0,),
        dispatch: DispatchTable = DispatchTable(),  # noqa: B008  # frozen
        group: Group | None = None,
        exchange: Exchange = alone,
    ):
        self.platform = platform
        self.max_model_len = max_model_len
        self.block_size = config.cache.block_size
        self.vocab_size = model.config.vocab_size
        self.model = model
        self._adapters, self.drafter, self._group = adapters, drafter, group
        self._acceptance = config.speculative.speculative_acceptance
        self.deterministic = config.model.deterministic
        self.dispatch = dispatch
        """How tokens come to experts."""
        self.expert_counts = ExpertCounts(model, platform)
        scheduler, graph = config.scheduler, config.graph
        backend = create_backend(backend_name(config, platform))
        self.policy = ShapePolicy.of(graph, scheduler, draft_levels=draft_levels, graphs_off=backend.name == "eager")
        lazy = graph.capture == "lazy" or (graph.capture == "auto" and not platform.captures_all_by_default)
        num_own = config.parallel.data_parallel_size
        self.shared_rings: SharedRings | None = None
        """Of all ranks, where each has requests of its own."""
        if num_own > 1:
            assert group is not None
            self.shared_rings = SharedRings(self.policy.max_shape, group.shard, exchange, platform.device)
        self._is_read_elsewhere = group is not None and num_own > 1 and group.shard.rank > 0
        cache_dtype = kv_cache_dtype(config.cache, platform, model.dtype)
        self.layout = layout = CacheLayout(
            model.cache_specs(cache_dtype),
            drafter.cache_specs(cache_dtype) if drafter else (),
            self.block_size,
            scheduler.max_num_seqs + 1,
            self.policy.max_shape.num_drafts,
            drafter.lookahead if drafter else 0,
            0 if config.transfer.moves_blocks else max_model_len,
        )
        self.tables = tables = BlockTables(self.block_size, layout.splits, scheduler.max_num_seqs + 1)
        self.loaded = [LoadedPlan(tables, rank * scheduler.max_num_seqs) for rank in range(num_own)]
        """What lies where this rank's graphs read it and, on rank 0, where others' do that have requests of their own."""
        self.state = SlotState(
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=max_model_len,
            tables=tables,
            vocab_size=self.vocab_size,
            max_shape=self.policy.max_shape,
            platform=platform,
            rings=None if self.shared_rings is None or group is None else self.shared_rings.of_ranks[group.shard.rank],
            has_lines=layout.has_lines,
        )
        dtype = model.dtype
        self.logits = LogitMemory(
            max_samples=self.policy.max_shape.num_samples,
            max_num_seqs=scheduler.max_num_seqs,
            vocab_size=self.vocab_size,
            dtype=dtype,
            device=platform.device,
        )
        self.cache_lost: Callable[[], None] = lambda: None
        """Called when the KV cache no longer holds what was put there; whoever counts on its content sets it."""
        self.num_launched = 0
        """Steps so far."""
        self.signals = KVSignals(len(layout.model_specs), platform) if config.transfer.signals_layers else None
        """Where steps say, layer by layer, that their keys and values are in the cache; None: they do not."""
        self._attention = AttentionSizes(
            (*model.attention_specs, *(drafter.attention_specs if drafter else ())),
            platform,
            dtype=dtype,
            cache_dtype=cache_dtype,
            block_size=min(tables.block_sizes),
            deterministic=self.deterministic,
        )
        null = replace(layout, num_lines=1)  # a dry run touches no more than the null block and the null line
        self.caches = null.allocate(1, platform.memory(null.sizes(1), sleepable=False))
        """Of `layout.specs`."""
        self.kernels = CompiledKernels(0, 0)
        """Those that were compiled before anything launched them."""
        if self.compile_kernels([self.policy.max_shape]).compiled and not lazy:  # the cache on disk is cold
            self.compile_kernels(shape for level in draft_levels for shape in self.policy.shapes(num_drafts=level))
        with OperatorCount() as operators:
            activation_bytes = platform.peak_memory_bytes(self._dry_run)
        self.graph_operators = operators.count
        """Operators of the largest step, which are about those of any; 0 where no dry run is needed."""
        graph_bytes = operators.count * platform.graph_node_bytes
        num_graphs = len(self.policy.shapes()) * len(Variant) * len(draft_levels)
        budget_bytes = None if graph.graph_memory_mib is None else graph.graph_memory_mib << 20
        store: GraphStore[StepShape, StepOutput] = GraphStore(
            backend,
            self,
            budget_bytes=budget_bytes,
            driver_bytes=graph_bytes,
            warmups=graph.capture_warmups,
            exchange=exchange,
        )
        self.graphs = StepGraphs(graph, self.policy, store, lazy=lazy)
        num_kv_blocks, num_checkpoints = choose_sizes(
            layout,
            config,
            platform,
            max_model_len=max_model_len,
            activation_bytes=activation_bytes,
            later_bytes=(budget_bytes or num_graphs * graph_bytes) + self.logits.later_bytes,
            num_ranks=1 if group is None else group.shard.size,
        )
        self.num_kv_blocks = least(exchange, num_kv_blocks)
        self.num_checkpoints = least(exchange, num_checkpoints)
        """Lines for states of prefixes, beside those of slots."""
        self.layout = layout = replace(layout, num_lines=layout.num_lines + self.num_checkpoints)
        make = partial(platform.memory, layout.sizes(self.num_kv_blocks), sleepable=config.cache.enable_sleep_mode)
        self.kv_memory = make(shared=True) if config.transfer.signals_layers else make()
        self.caches = layout.allocate(self.num_kv_blocks, self.kv_memory)

        plan_length = self.state.plan.shape[0]
        self._staging = [platform.host_buffer(plan_length) for _ in range(RING_DEPTH)]
        self._staging_arrays = [buffer.numpy() for buffer in self._staging]
        self._completions = [platform.completion() for _ in range(RING_DEPTH)]
        self._output = OutputReader(self.state.rings)
        self._trial_context_len = min(graph.capture_context_len or max_model_len, max_model_len - 1)

    def launch(self, plan: StepPlan) -> Ticket:
        """Launch one step: at most one copy (the plan, if it changed) and one graph.

        At most RING_DEPTH - 1 steps may be launched and not collected.
        """
        record, graph = self.graphs.graph_for(plan)
        self.load(plan, record.shape)
        return Ticket(self.run(graph), plan, record)

    def load(self, plan: StepPlan, shape: StepShape) -> None:
        """Put `plan` where graphs of `shape` read it; nothing to do if it lies there already."""
        self.put(self.pack(plan, shape))

    def pack(self, plan: StepPlan, shape: StepShape) -> slice:
        """Pack what graphs of `shape` are to read of `plan` and does not lie there already, see `staged`. Returns where it
        belongs in the packed plan, at whose end it ends; an empty slice if all lies there."""
        return self.loaded[0].pack(plan, shape, self._staging_arrays[self.num_launched % RING_DEPTH])

    def staged(self, part: slice) -> npt.NDArray[np.int32]:
        """Where a part of the next step's packed plan waits for `put`."""
        return self._staging_arrays[self.num_launched % RING_DEPTH][part]

    def put(self, part: slice) -> None:
        """Copy a staged part of a plan to where graphs read it."""
        if part.start < part.stop:
            self.state.plan[part].copy_(self._staging[self.num_launched % RING_DEPTH][part], non_blocking=True)

    def run(self, graph: Graph[StepOutput]) -> int:
        """Launch a step on the plan that lies there; returns its number."""
        graph.replay()
        if self._is_read_elsewhere:
            self._tell_done()
        self._completions[self.num_launched % RING_DEPTH].record()
        self.num_launched += 1
        return self.num_launched - 1

    def _tell_done(self) -> None:
        """Have the leader see what is done by now, in the order of the device's work."""
        order_memory()  # results that the host has computed are there before it is said
        self.state.rings.counter.copy_(self.state.counter, non_blocking=True)

    def completion(self, step: int) -> Completion:
        """The mark at the end of a launched step, or of a later one."""
        return self._completions[step % RING_DEPTH]

    def collect(self, ticket: Ticket) -> StepResults:
        """Results of a step that is done. Log-probabilities and proposals are valid for `RING_DEPTH` launches from the ticket's
        own."""
        assert self.num_launched - ticket.step <= RING_DEPTH, (ticket, self.num_launched)
        return self._output.read(ticket.step, ticket.plan)

    @contextmanager
    def workbench(self) -> Iterator[None]:
        """Borrow the buffers for checks and timings, while no request runs.

        Inside, state may be laid out at will, plans loaded and graphs replayed, from step 0 on; afterwards all slots are
        empty, the KV cache's content is lost and the engine's steps count on, but not experts' tokens.
        """
        self.platform.synchronize()
        self.state.counter.zero_()
        self._forget_plans()
        try:
            with self.expert_counts.preserved(), self._silent():
                yield
        finally:
            self.platform.synchronize()
            self.state.lines.zero_()
            self._set_counter()
            if self.drafter is not None:
                self.drafter.forget()
            self._forget_plans()
            self.cache_lost()

    def create_program(self, shape: StepShape) -> StepProgram:
        """The program of `shape` over this runner's buffers."""
        return StepProgram(
            self.model,
            self.state,
            self.caches[: len(self.layout.model_specs)],
            self.caches[len(self.layout.model_specs) :],
            self.logits.buffers(shape.variant),
            shape,
            self._attention.of(shape),
            self.tables,
            self.dispatch,
            self._adapters,
            self.drafter,
            self._acceptance,
            None if self._group is None else self._group.fault_flag,
            None if self.signals is None else self.signals.tensors,
        )

    def recover(self) -> None:
        """Make the device ready for the next launch after one that failed for lack of memory, maybe half-way. What it left of
        requests' state is undefined: they must be admitted anew."""
        self.platform.synchronize()
        self.platform.release_cached_memory()
        self.state.lines.zero_()
        self._set_counter()
        self._forget_plans()

    def _set_counter(self) -> None:
        """All steps launched so far are done."""
        self.state.counter.fill_(self.num_launched % RING_DEPTH)
        if self.signals is not None:
            self.signals.set(self.num_launched)
        if self._is_read_elsewhere:
            self._tell_done()

    def _forget_plans(self) -> None:
        """Where graphs read plans lies something else, on all ranks: they do the same."""
        for loaded in self.loaded:
            loaded.forget()

    def compile_kernels(self, shapes: Iterable[StepShape]) -> CompiledKernels:
        """Compile the kernels of steps of these shapes, side by side, while no step is under way. Returns how many were new."""
        started = time.perf_counter()
        with self.leaving_no_trace():
            kernels = self.platform.compile_ahead(EagerGraph(self.create_program(shape)).replay for shape in shapes)
        self.kernels = CompiledKernels(*map(sum, zip(self.kernels, kernels, strict=True)))
        if any(kernels):
            logger.info("compiled %d kernels and read %d from disk in %.2f s", *kernels, time.perf_counter() - started)
        return kernels

    @contextmanager
    def leaving_no_trace(self) -> Iterator[None]:
        """Inside, programs run on the null plan: they touch the null slot and the null block only, and nothing of other ranks."""
        by_itself = nullcontext() if self._group is None else self._group.loop_back()
        with self.state.preserved(), by_itself, self._silent():
            self._forget_plans()
            self.state.plan.zero_()
            yield

    def _silent(self) -> AbstractContextManager[None]:
        """Inside, no layer of a step is said to have written anything."""
        return nullcontext() if self.signals is None else self.signals.silent()

    def _dry_run(self) -> None:
        """Run the largest step on nothing."""
        with self.leaving_no_trace():
            EagerGraph(self.create_program(self.policy.max_shape)).replay()

    def try_out(self, graph: Graph[StepOutput]) -> None:
        """Launch `graph` on one decode row at the largest context, in the null slot and the null block."""
        line = self.state.lines[slot_line.NULL_SLOT]
        with self.leaving_no_trace(), self.expert_counts.preserved():
            self.state.plan[: slot_line.ROW_WIDTH] = torch.tensor([slot_line.NULL_SLOT, 1], dtype=torch.int32)
            line[slot_line.LENGTH], line[slot_line.COMPUTED] = self._trial_context_len, self._trial_context_len - 1
            line[slot_line.ACTIVE], line[slot_line.MAX_LENGTH] = 1, self.max_model_len
            line[slot_line.PROMPT_LENGTH] = self.max_model_len  # no answer for a drafter to remember
            graph.replay()
            line.zero_()
            self.state.tokens[slot_line.NULL_SLOT].zero_()

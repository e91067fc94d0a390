"""Which requests run in a step, and how many tokens of each.

Every step gives each decoding request one token, and one for each proposal to verify, and fills the rest of the token budget
with prompts, in chunks where they do not fit. Requests are served in the order of their rank: priority, then arrival.

The scheduler plans ahead of what it knows: a request planned for a decode may have finished on the device in a step whose
results are not read yet; the device then runs nothing for it. How many proposals of a step under way will stand is not known
either: a row is planned as if none did, and its KV blocks as if all did.

KV blocks are granted as requests grow. When there are none left, the running request of the lowest rank is preempted: it loses
its blocks and its slot, waits in its old place, and is computed again later from the tokens known by then. The request of the
highest rank can preempt all others and fits alone, so there is always progress.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import SchedulerConfig
from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.logprobs import read_prompt_logprobs
from stepgraph.engine.prefix_cache import PrefixCache
from stepgraph.engine.request import FinishReason, Request, RequestUpdate, StepUpdates
from stepgraph.engine.request_blocks import RequestBlocks
from stepgraph.engine.request_table import RequestTable
from stepgraph.engine.row_planner import RowPlanner
from stepgraph.engine.row_results import read_rows
from stepgraph.engine.speculation import SpeculationStatistics
from stepgraph.engine.state_lines import StateLines
from stepgraph.engine.steady import SteadyDecode
from stepgraph.engine.step_draft import ScheduledStep, StepDraft
from stepgraph.engine.waiting import WaitingLine, rank
from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED, RequestError
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import StepResults

WATERMARK = 0.01
"""Share of the KV blocks that a new request leaves free for those that run, which would otherwise soon preempt it."""

TOKENS_OF_REQUEST = 256
"""Tokens of a prompt that are as much work as the rest of a request."""

_WAIT, _DECODE, _PREFILL = range(3)  # what a running request would do in a step


@dataclass
class SchedulerStatistics:
    """Counts over the scheduler's life."""

    preemptions: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts that got a slot, those of preempted requests counted once."""
    cached_prompt_tokens: int = 0
    """Of these, tokens whose keys and values were found in the prefix cache."""


class Scheduler:
    """Continuous batching of decodes and chunked prompts over slots and KV blocks.

    Args:
        config: limits and the insertion policy.
        max_tokens: tokens of one step; at least `config.max_num_seqs`.
        num_kv_blocks: of which each has a block of every block group; the null block included.
        block_size: tokens per KV block.
        token_sizes: captured token counts, ascending.
        prefix_caching: reuse blocks of equal prefixes.
        pure_steps: a step either computes prompts or decodes; prompts and decodes take turns.
        choose_drafts: how many proposals the step should make for each row, given how many rows decode in it.
        lookahead: tokens after a block that its content depends on.
        groups: of the layers that keep KV blocks.
        num_checkpoints: most states that are kept for others; 0: there are none, or they are not reused.
        table_width: see `StateLines`.
        first_slot: slots are numbered from `first_slot` + 1 on; those before are others'.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        max_tokens: int,
        num_kv_blocks: int,
        block_size: int,
        token_sizes: Sequence[int],
        prefix_caching: bool = True,
        pure_steps: bool = False,
        choose_drafts: Callable[[int], int] = lambda num_decodes: 0,
        lookahead: int = 0,
        groups: BlockGroups = BlockGroups(),  # noqa: B008  # frozen
        num_checkpoints: int = 0,
        table_width: int = 0,
        first_slot: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        assert max_tokens >= config.max_num_seqs, (max_tokens, config)
        self.statistics = SchedulerStatistics()
        self.speculation = SpeculationStatistics()
        self._config = config
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._pure_steps = pure_steps
        self._choose_drafts = choose_drafts
        self.blocks = BlockPool(groups.num_blocks(num_kv_blocks))
        """All KV blocks; those who move their content elsewhere hold them meanwhile."""
        last_slot = first_slot + config.max_num_seqs
        self.table = RequestTable(last_slot)
        """How far those that run have come."""
        self._lines = StateLines(config.max_num_seqs, num_checkpoints, block_size, table_width, lookahead)
        self.prefixes = PrefixCache(
            self.blocks,
            self.table,
            block_size,
            groups,
            lookahead=lookahead,
            enabled=prefix_caching,
            can_start=self._lines.can_start,
        )
        self._grants = RequestBlocks(self.blocks, self.table, self.prefixes, block_size, groups)
        self.watermark = int(self.blocks.num_usable * WATERMARK)
        self._free_slots = list(range(last_slot, first_slot, -1))
        self._generations = [0] * (last_slot + 1)
        self._waiting = WaitingLine(config, clock)
        self._running: list[Request] = []  # by rank
        self._by_slot: dict[int, Request] = {}
        self._requests: dict[str, Request] = {}
        self._prefilled_last = False
        self._last_plan = StepPlan((), (), 0, epoch=0)
        self._steady: SteadyDecode | None = None
        self._rows = RowPlanner(self.table, self._grants, self.prefixes, self._preempt_for, max_tokens, token_sizes)

    @property
    def requests(self) -> tuple[Request, ...]:
        """All that have not ended."""
        return tuple(self._requests.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self) -> tuple[Request, ...]:
        """Requests that hold a slot, highest rank first."""
        return tuple(self._running)

    @property
    def num_free_blocks(self) -> int:
        return self.blocks.num_free

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that requests hold."""
        return 1 - self.blocks.num_free / self.blocks.num_usable

    @property
    def load(self) -> int:
        """What it has to do, in tokens of prompts: those that wait, and what `TOKENS_OF_REQUEST` says for each request."""
        return TOKENS_OF_REQUEST * len(self._requests) + self._waiting.num_tokens

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def seconds_until_work(self) -> float | None:
        """How long `schedule` will have nothing to do unless a request arrives; None if it may have work now, or no request."""
        return None if self._running or not self._waiting else self._waiting.seconds_until_one_may_enter()

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use, or it could never fit into the KV cache.
        """
        if request.id in self._requests:
            raise RequestError(
                f"request id {request.id!r} is in use; ids must differ while requests run", param="request_id"
            )
        # The last token it may sample is never computed.
        needed = self._grants.most_held(request.max_length - 1, _most_in_flight(request, 1))
        if needed > self.blocks.num_usable:
            raise RequestError(
                f"the request needs KV blocks for {request.max_length - 1} tokens ({needed} blocks of {self._block_size}), "
                f"and the cache has {self.blocks.num_usable}; lower max_tokens, shorten the prompt, or raise num_kv_blocks",
                param="max_tokens",
                code=CONTEXT_LENGTH_EXCEEDED,
            )
        self._requests[request.id] = request
        self._waiting.arrive(request)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id has not ended."""
        return request_id in self._requests

    def num_cached(self, request: Request) -> int:
        """Tokens of a request that waits nowhere yet, or here, which would be found in the prefix cache."""
        return self._grants.num_tokens(self.prefixes.find(request))

    def can_take(self, request: Request) -> bool:
        """Whether a request that waits elsewhere could get a slot here, and all blocks for what is known of it, at once."""
        return not self._waiting and not self.is_short_for(request)

    def is_short_for(self, request: Request) -> bool:
        """Whether there is no free slot, or not enough blocks for what is known of a request."""
        free = self.blocks.num_free - self.watermark if self._free_slots else 0
        return self._grants.most_held(request.num_known, self._max_tokens) > free

    def first_in_line(self) -> Request | None:
        """The first request that waits for nothing but room, if it has never run."""
        first = next(filter(self._waiting.may_enter, self._waiting), None)
        return None if first is None or first.num_preemptions else first

    def hand_over(self, request: Request, other: Scheduler) -> None:
        """Let another scheduler have a request that waits."""
        del self._requests[request.id]
        self._waiting.give_up(request)
        other.add(request)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now, waiting or running. None if it is not known (any more)."""
        return self.end(request_id, FinishReason.ABORT)

    def end(self, request_id: str, reason: FinishReason) -> RequestUpdate | None:
        """End a request from the host's side, for `reason`. None if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._steady = None
        return self._finish(RequestUpdate(request, (), reason))

    def preempt_all(self) -> None:
        """Send every running request back to wait, and forget all cached content. For when the KV cache's content is lost."""
        self._steady = None
        while self._running:
            self._preempt(self._running[-1])
        self._lines.forget()
        self.blocks.forget()

    def forget_free(self) -> int:
        """Forget the cached content that no running request holds, and all states; returns how many blocks can still be found."""
        self._lines.forget()
        return self.blocks.forget_free()

    def schedule(self) -> ScheduledStep | None:
        """Plan one step; None if nothing can run until results or requests arrive."""
        self._rows.publish_pending()
        step = self._next_steady()
        if step is not None:
            return step
        self.blocks.reclaim()
        if self._pure_steps:
            decodes_first = self._prefilled_last
            draft = self._draft(decodes=decodes_first, prompts=not decodes_first)
            if not draft:
                draft = self._draft(decodes=not decodes_first, prompts=decodes_first)
        else:
            draft = self._draft(decodes=True, prompts=True)
        if not draft:
            return None
        self._prefilled_last = bool(draft.chunks)
        return self._complete(draft)

    def reconcile(self, step: ScheduledStep, results: StepResults) -> StepUpdates:
        """Take in the results of a step; rows of requests that have left their slot since it was planned are dropped."""
        if self._steady is not None:
            updates = self._steady.read(results) if step.plan.epoch == self._steady.plan.epoch else None
            if updates is not None:
                if step.plan.num_drafts:
                    self.speculation.add(results.outcomes())
                return updates
            self._steady = None
        for span in step.prompt_spans:
            assert results.prompt_logprobs is not None
            if span.request.generation == span.generation:
                read_prompt_logprobs(span, results.prompt_logprobs)
        updates, outcomes = read_rows(step.plan, results, self._by_slot, self.table)
        if step.plan.num_drafts:
            self.speculation.add(outcomes)
        for update in updates.others:
            if update.finish_reason is not None:
                self._finish(update)
        return updates

    # Planning

    def _draft(self, *, decodes: bool, prompts: bool) -> StepDraft:
        stages = self._stages()
        num_decodes = stages.count(_DECODE)
        draft = StepDraft(self._max_tokens, self._choose_drafts(num_decodes))
        self._plan_running(draft, stages, num_decodes if decodes else 0, prompts=prompts)
        if prompts:
            self._waiting.open_gate()
            if self._waiting and not draft.short_of_blocks:
                self._admit_waiting(draft)
            self._rows.top_up(draft)
            if draft.decodes:
                self._rows.snap(draft)
        return draft

    def _stages(self) -> list[int]:
        """What each running request would do in a step."""
        table, slots_R = self.table, self.table.slots(self._running)
        planned_R = table.planned_S[slots_R]
        stages_R = np.where(planned_R < table.end_S[slots_R], _DECODE, _WAIT)
        for row, request in enumerate(self._running):
            if request.awaits_host:
                stages_R[row] = _WAIT
        stages_R[planned_R < table.prefill_len_S[slots_R]] = _PREFILL
        stages: list[int] = stages_R.tolist()
        return stages

    def _plan_running(self, draft: StepDraft, stages: Sequence[int], decodes_left: int, *, prompts: bool) -> None:
        """Rows of the requests that hold slots, highest rank first, so that whoever must be preempted has no row yet.

        `decodes_left`: rows to decode; with 0, nobody does.
        """
        decodes = decodes_left > 0
        prefills_left = stages.count(_PREFILL)
        newcomers = min(self._config.max_num_partial_prefills - prefills_left, self._num_admissible(prefills_left))
        end = 0
        for stage, alike in groupby(stages):
            start, end = end, end + sum(1 for _ in alike)
            requests = self._running[start:end]  # fewer if the others were preempted
            if stage == _DECODE and decodes:
                decodes_left -= len(requests)
                self._rows.plan_decodes(requests, decodes_left, draft)
            elif stage == _PREFILL:
                for request in requests:
                    if prompts and request.slot is not None:
                        share = -(-(draft.budget - decodes_left) // (prefills_left + max(0, newcomers)))
                        self._rows.plan_chunk(request, share, draft)
                    prefills_left -= 1

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Give waiting requests slots and chunks of their prompts, highest rank first, while both and blocks are there."""
        if not self._free_slots:
            return
        limits = self._config
        prefilling = self._prefilling()
        num_partial, num_long = len(prefilling), sum(map(self._is_long, prefilling))
        for request in tuple(self._waiting):
            if not self._free_slots or not draft.budget:
                return
            if not self._waiting.may_enter(request):
                continue
            if self._waiting.must_wait_for_first(request):
                return
            if self._is_long(request) and num_long >= limits.max_long_partial_prefills:
                continue
            self._rows.publish_pending()
            hits = self.prefixes.find(request)
            num_cached = self._grants.num_tokens(hits)
            needed = self._grants.needed(
                hits,
                draft.with_proposals(request.num_known, request.sampling.max_num_drafts, request.max_length - 1),
                _most_in_flight(request, self._max_tokens if self._running else 1),
            )
            if needed > self.blocks.num_free - (self.watermark if self._running else 0):
                return
            rest = request.num_known - num_cached
            partial_left = limits.max_num_partial_prefills - num_partial
            share = -(-draft.budget // max(1, min(partial_left, len(self._waiting))))
            if rest > draft.budget and partial_left <= 0:
                return
            self._admit(request, hits, num_cached, draft)
            self._rows.plan_chunk(request, share if partial_left > 0 else draft.budget, draft)
            if self.is_prefilling(request):
                num_partial += not self._is_cut_for_state(request)
                num_long += self._is_long(request)

    def _complete(self, draft: StepDraft) -> ScheduledStep:
        for chunk in draft.chunks:
            end = chunk.start + chunk.num_tokens
            chunk.deltas += self._lines.plan_row(chunk.request, end, self.prefixes.keys)
            if not self.table.is_prefilling(chunk.slot):
                self.table.expect(chunk.slot, draft.num_drafts)
                self._rows.expect_masks(chunk.request, draft)
        plan, spans = draft.plan(self._last_plan)
        if plan.epoch == self._last_plan.epoch and SteadyDecode.may_begin(self._running, plan, self.table):
            self._steady = SteadyDecode(self._running, plan, self.table, self._grants)
        self._last_plan = plan
        return ScheduledStep(plan, tuple(draft.admitted), spans, draft.follows_grammar, chunks=draft.chunks)

    def _next_steady(self) -> ScheduledStep | None:
        """The next step of those that decode steadily, if nobody else may run and there is nothing else to decide."""
        steady = self._steady
        if steady is None:
            return None
        if self._waiting:
            self._waiting.open_gate()
        step = None
        if not (self._free_slots and any(map(self._waiting.may_enter, self._waiting))):
            plan = steady.plan
            if self._choose_drafts(len(plan.rows)) == plan.num_drafts:
                step = steady.next_step()
        if step is None:
            self._steady = None
        return step

    def _num_admissible(self, num_prefilling: int) -> int:
        """Waiting requests that the limit on long prompts lets in, as far as a step's shares need to know."""
        if not num_prefilling or not self._config.long_prefill_token_threshold:
            return len(self._waiting)
        room = self._config.max_long_partial_prefills - sum(map(self._is_long, self._prefilling()))
        longs = sum(map(self._is_long, self._waiting))
        return len(self._waiting) - longs + min(longs, max(0, room))

    def _prefilling(self) -> list[Request]:
        """Requests that run, and a part of whose prompts is not planned."""
        return [self._by_slot[slot] for slot in self.table.prefilling_slots()]

    def is_prefilling(self, request: Request) -> bool:
        """Whether a request runs, and a part of its prompt is not planned."""
        return request.slot is not None and self.table.is_prefilling(request.slot)

    def _is_cut_for_state(self, request: Request) -> bool:
        """Whether what is planned of its prompt ends where its state is to be kept, and not for lack of room."""
        assert request.slot is not None
        return self.table.planned[request.slot] in request.borders

    def _is_long(self, request: Request) -> bool:
        return 0 < self._config.long_prefill_token_threshold < request.prompt_len

    # Slots

    def _admit(self, request: Request, hits: list[int], num_cached: int, draft: StepDraft) -> None:
        """Give a request a slot, and the cached blocks of its prefix."""
        self._waiting.enter(request)
        slot = self._free_slots.pop()
        self._generations[slot] += 1
        request.slot, request.generation = slot, self._generations[slot]
        self.table.enter(request, planned=num_cached)
        self._grants.enter(request, hits)
        request.num_found = request.num_published = num_cached // self._block_size
        self._lines.enter(request, self.prefixes.num_shared)
        if not request.num_preemptions:
            request.num_cached_tokens = num_cached
            self.statistics.prompt_tokens += request.prompt_len
            self.statistics.cached_prompt_tokens += num_cached
        self.prefixes.enter(request)
        self._by_slot[slot] = request
        insort(self._running, request, key=rank)
        draft.admitted.append(request)

    def _preempt_for(self, request: Request) -> bool:
        """Preempt the running request of the lowest rank; False if that is the one given."""
        victim = self._running[-1]
        if victim is request:
            return False
        victim.overtaken += request.arrival > victim.arrival
        self._preempt(victim)
        return True

    def _preempt(self, request: Request) -> None:
        self._leave_slot(request)
        request.num_preemptions += 1
        request.awaits_host = request.guide is not None and request.guide.is_waiting
        self.statistics.preemptions += 1
        self._waiting.come_back(request)

    def _finish(self, update: RequestUpdate) -> RequestUpdate:
        request = update.request
        request.finish_reason = update.finish_reason
        del self._requests[request.id]
        if request.slot is None:
            self._waiting.give_up(request)
        else:
            self._leave_slot(request)
        return update

    def _leave_slot(self, request: Request) -> None:
        assert request.slot is not None
        self._rows.leave(request)
        self.prefixes.leave(request)
        self._running.remove(request)
        del self._by_slot[request.slot]
        self._free_slots.append(request.slot)
        self._grants.leave(request)
        self._lines.leave(request)
        self.table.leave(request.slot)
        request.slot, request.num_published, request.draft_token_ids = None, 0, ()


def _most_in_flight(request: Request, num_tokens: int) -> int:
    """Tokens that steps under way may compute at once for a request: `num_tokens` that are known, proposals to verify, and those
    that a draft model computes behind them."""
    return num_tokens + 2 * request.sampling.max_num_drafts

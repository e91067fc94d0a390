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
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from stepgraph.abi import slot_line
from stepgraph.config import SchedulerConfig
from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.lockstep import Lockstep
from stepgraph.engine.logprobs import PromptSpan, add_logprobs, read_prompt_logprobs
from stepgraph.engine.prefix_cache import PrefixCache
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.speculation import SpeculationStatistics
from stepgraph.engine.waiting import WaitingLine, rank
from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED, Fault, RequestError
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepResults
from stepgraph.step.shape import Variant

WATERMARK = 0.01
"""Share of the KV blocks that a new request leaves free for those that run, which would otherwise soon preempt it."""

SNAP_SAVING = 1 / 4
"""Share of two steps' tokens that cutting a chunk to a captured size must save: it costs its prompt one step."""

_FINISH_REASONS = {
    slot_line.FINISHED_STOP: FinishReason.STOP,
    slot_line.FINISHED_LENGTH: FinishReason.LENGTH,
    slot_line.FINISHED_ERROR: FinishReason.ERROR,
}


class ScheduledStep(NamedTuple):
    """A plan, and what the engine does before and after it runs."""

    plan: StepPlan
    admitted: tuple[Request, ...] = ()
    """Requests whose device-side state must be written first."""
    prompt_spans: tuple[PromptSpan, ...] = ()
    follows_grammar: bool = False
    """Whether it samples for a request that does."""


@dataclass
class SchedulerStatistics:
    """Counts over the scheduler's life."""

    preemptions: int = 0
    prompt_tokens: int = 0
    """Tokens of prompts that got a slot, those of preempted requests counted once."""
    cached_prompt_tokens: int = 0
    """Of these, tokens whose keys and values were found in the prefix cache."""


@dataclass(slots=True)
class _Chunk:
    """A row of prompt tokens."""

    request: Request
    slot: int
    start: int  # position of its first token
    num_tokens: int = 0
    deltas: list[tuple[int, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Draft:
    """A step in the making."""

    budget: int  # tokens left
    num_drafts: int  # proposals to make for each row
    decodes: list[tuple[int, int]] = field(default_factory=list)  # rows of one token and its proposals
    decode_deltas: list[tuple[int, int, int]] = field(default_factory=list)
    chunks: list[_Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    variant: Variant = Variant.PLAIN  # of the decodes
    short_of_blocks: bool = False
    follows_grammar: bool = False


class Scheduler:
    """Continuous batching of decodes and chunked prompts over slots and KV blocks.

    Args:
        config: limits and the insertion policy.
        max_tokens: tokens of one step; at least `config.max_num_seqs`.
        num_kv_blocks: the null block included.
        block_size: tokens per KV block.
        token_sizes: captured token counts, ascending.
        prefix_caching: reuse blocks of equal prefixes.
        pure_steps: a step either computes prompts or decodes; prompts and decodes take turns.
        choose_drafts: how many proposals the step should make for each row, given how many rows decode in it.
        lookahead: tokens after a block that its content depends on.
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
        clock: Callable[[], float] = time.monotonic,
    ):
        assert max_tokens >= config.max_num_seqs, (max_tokens, config)
        self.statistics = SchedulerStatistics()
        self.speculation = SpeculationStatistics()
        self._config = config
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._token_sizes = tuple(token_sizes)
        self._pure_steps = pure_steps
        self._choose_drafts = choose_drafts
        self.blocks = BlockPool(num_kv_blocks)
        """All KV blocks; those who move their content elsewhere hold them meanwhile."""
        self._prefixes = PrefixCache(self.blocks, block_size, lookahead, prefix_caching)
        self._watermark = int(self.blocks.num_usable * WATERMARK)
        self._free_slots = list(range(config.max_num_seqs, 0, -1))
        self._generations = [0] * (config.max_num_seqs + 1)
        self._waiting = WaitingLine(config, clock)
        self._running: list[Request] = []  # by rank
        self._by_slot: dict[int, Request] = {}
        self._requests: dict[str, Request] = {}
        self._prefilled_last = False
        self._last_plan: StepPlan | None = None
        self._epoch = 0  # of the last plan
        self._lockstep: Lockstep | None = None
        self._unpublished: _Chunk | None = None
        """The last chunk planned. The row may still be cut, and naming its blocks takes time: they become findable when the next
        prompt is looked at, or once the step is on its way."""

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
        needed = self._blocks_for(request.max_length - 1)  # the last token it may sample is never computed
        if needed > self.blocks.num_usable:
            raise RequestError(
                f"the request needs KV blocks for {request.max_length - 1} tokens ({needed} blocks of {self._block_size}), "
                f"and the cache has {self.blocks.num_usable}; lower max_tokens, shorten the prompt, or raise num_kv_blocks",
                param="max_tokens",
                code=CONTEXT_LENGTH_EXCEEDED,
            )
        self._requests[request.id] = request
        self._waiting.arrive(request)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now, waiting or running. None if it is not known (any more)."""
        return self.end(request_id, FinishReason.ABORT)

    def end(self, request_id: str, reason: FinishReason) -> RequestUpdate | None:
        """End a request from the host's side, for `reason`. None if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end_lockstep()
        return self._finish(request, reason, ())

    def preempt_all(self) -> None:
        """Send every running request back to wait, and forget all cached content. For when the KV cache's content is lost."""
        self._end_lockstep()
        while self._running:
            self._preempt(self._running[-1])
        self.blocks.forget()

    def forget_free(self) -> int:
        """Forget the cached content that no running request holds; returns how many blocks can still be found."""
        return self.blocks.forget_free()

    def schedule(self) -> ScheduledStep | None:
        """Plan one step; None if nothing can run until results or requests arrive."""
        self._publish_pending()
        plan = self._next_in_lockstep()
        if plan is not None:
            return ScheduledStep(plan)
        self.blocks.reclaim()
        if self._pure_steps:
            decodes_first = self._prefilled_last
            draft = self._draft(decodes=decodes_first, prompts=not decodes_first)
            if not (draft.decodes or draft.chunks):
                draft = self._draft(decodes=not decodes_first, prompts=decodes_first)
        else:
            draft = self._draft(decodes=True, prompts=True)
        if not (draft.decodes or draft.chunks):
            return None
        self._prefilled_last = bool(draft.chunks)
        return self._complete(draft)

    def reconcile(self, step: ScheduledStep, results: StepResults) -> Sequence[RequestUpdate]:
        """Take in the results of a step; rows of requests that have left their slot since it was planned are dropped."""
        if self._lockstep is not None:
            updates = self._lockstep.read(results) if step.plan.epoch == self._lockstep.plan.epoch else None
            if updates is not None:
                if step.plan.num_drafts:
                    self.speculation.add(results.outcomes())
                return updates
            self._end_lockstep()
        for span in step.prompt_spans:
            assert results.prompt_logprobs is not None
            if span.request.generation == span.generation:
                read_prompt_logprobs(span, results.prompt_logprobs)
        return self._read(step.plan, results)

    def _read(self, plan: StepPlan, results: StepResults) -> list[RequestUpdate]:
        """Take in the new tokens of a step's rows, one by one."""
        updates, decoded = [], []
        by_slot = self._by_slot
        for index, line in enumerate(results.table.tolist()):
            slot, generation, finish, num_tokens, num_verified, num_accepted, first_sample, num_drafts, *new = line
            request = by_slot.get(slot)
            if request is None or request.generation != generation:
                continue
            tokens = tuple(new[:num_tokens])
            if not tokens and finish == slot_line.RUNNING:
                continue
            if index >= plan.num_prefill_rows:
                request.planned += num_tokens - 1
                request.spread -= plan.rows[index][1] - 1
                request.num_draft_tokens += num_verified
                request.count_accepted(num_accepted)
                decoded.append((num_tokens, num_verified, num_accepted))
            request.num_unread -= 1
            if plan.num_drafts:
                request.was_drafted = num_drafts > 0
            if not request.num_unread:
                request.num_drafts = num_drafts
                if request.guide is not None:
                    drafts = results.drafts
                    request.draft_token_ids = () if drafts is None else drafts[index, :num_drafts].tolist()
            request.output_token_ids += tokens
            add_logprobs(request, tokens, results.logprobs, first_sample)
            if finish == slot_line.RUNNING:
                updates.append(RequestUpdate(request, tokens, None))
            else:
                reason = _FINISH_REASONS[finish]
                if reason is FinishReason.STOP:
                    request.stop_token = tokens[-1]
                elif reason is FinishReason.ERROR:
                    request.error = Fault("no token could be sampled: every logit was NaN or ruled out", is_users=False)
                updates.append(self._finish(request, reason, tokens))
        if plan.num_drafts:
            self.speculation.add(decoded)
        return updates

    # Planning

    def _draft(self, *, decodes: bool, prompts: bool) -> _Draft:
        num_decodes = sum(map(_can_decode, self._running))
        draft = _Draft(self._max_tokens, self._choose_drafts(num_decodes))
        self._plan_running(draft, num_decodes if decodes else 0, prompts=prompts)
        if prompts:
            self._waiting.open_gate()
            if self._waiting and not draft.short_of_blocks:
                self._admit_waiting(draft)
            self._top_up(draft)
            if draft.decodes:
                self._snap(draft)
        return draft

    def _plan_running(self, draft: _Draft, decodes_left: int, *, prompts: bool) -> None:
        """Rows of the requests that hold slots, highest rank first, so that whoever must be preempted has no row yet.

        `decodes_left`: rows to decode; with 0, nobody does.
        """
        decodes = decodes_left > 0
        prefills_left = sum(map(_is_prefilling, self._running))
        newcomers = min(self._config.max_num_partial_prefills - prefills_left, self._num_admissible(prefills_left))
        index = 0
        while index < len(self._running):
            request = self._running[index]
            index += 1
            if _can_decode(request):
                if decodes:
                    decodes_left -= 1
                    self._plan_decode(request, draft.budget - decodes_left, draft)
            elif _is_prefilling(request):
                if prompts:
                    share = -(-(draft.budget - decodes_left) // (prefills_left + max(0, newcomers)))
                    self._plan_chunk(request, share, draft)
                prefills_left -= 1

    def _admit_waiting(self, draft: _Draft) -> None:
        """Give waiting requests slots and chunks of their prompts, highest rank first, while both and blocks are there."""
        if not self._free_slots:
            return
        limits = self._config
        num_partial = sum(_is_prefilling(request) for request in self._running)
        num_long = self._num_long_prefilling()
        for request in tuple(self._waiting):
            if not self._free_slots or not draft.budget:
                return
            if not self._waiting.may_enter(request):
                continue
            if self._waiting.must_wait_for_first(request):
                return
            if self._is_long(request) and num_long >= limits.max_long_partial_prefills:
                continue
            self._publish_pending()
            hits = self._prefixes.find(request)
            num_cached = len(hits) * self._block_size
            needed = (
                self._blocks_for(self._with_drafts(request, request.num_known, draft))
                - len(hits)
                + self.blocks.count_free(hits)
            )
            if needed > self.blocks.num_free - (self._watermark if self._running else 0):
                return
            rest = request.num_known - num_cached
            partial_left = limits.max_num_partial_prefills - num_partial
            share = -(-draft.budget // max(1, min(partial_left, len(self._waiting))))
            if rest > draft.budget and partial_left <= 0:
                return
            self._admit(request, hits, draft)
            self._plan_chunk(request, share if partial_left > 0 else draft.budget, draft)
            if _is_prefilling(request):
                num_partial += 1
                num_long += self._is_long(request)

    def _top_up(self, draft: _Draft) -> None:
        """Give what the shares of short prompts left over to the longer ones, as far as there are free blocks."""
        for chunk in draft.chunks:
            request = chunk.request
            if draft.budget and _is_prefilling(request):
                room = (len(request.blocks) + self.blocks.num_free) * self._block_size - request.planned
                room -= max(0, draft.num_drafts - 1)
                self._extend(chunk, max(0, min(request.prefill_len - request.planned, draft.budget, room)), draft)

    def _snap(self, draft: _Draft) -> None:
        """Cut the last prompt's chunk so that the step ends at a captured size, where that saves enough padding.

        What is cut off runs in the next step, which decodes anyway. That costs the prompt one step, so it happens to a
        prompt once at most, and only if it would be complete: a prompt that fills the budget has no padding.
        """
        chunk = self._unpublished
        if chunk is None or chunk.request.was_snapped or _is_prefilling(chunk.request):
            return
        num_tokens = self._max_tokens - draft.budget
        down = bisect_right(self._token_sizes, num_tokens) - 1
        if down < 0 or not 0 < (cut := num_tokens - self._token_sizes[down]) < chunk.num_tokens:
            return
        next_decodes = sum(n for _, n in draft.decodes) + sum(
            not _is_prefilling(other.request) for other in draft.chunks
        )
        whole = self._round_up(num_tokens) + self._round_up(next_decodes)
        snapped = self._token_sizes[down] + self._round_up(next_decodes - 1 + cut)
        if whole - snapped >= whole * SNAP_SAVING:
            request = chunk.request
            request.was_snapped = True
            request.planned -= cut
            chunk.num_tokens -= cut
            draft.budget += cut
            surplus = len(request.blocks) - self._blocks_for(self._num_written(request, 0, draft))
            if surplus:
                self._take_back(request, surplus)
                del chunk.deltas[-surplus:]

    def _round_up(self, num_tokens: int) -> int:
        """The smallest captured size that holds so many tokens."""
        return self._token_sizes[min(bisect_left(self._token_sizes, num_tokens), len(self._token_sizes) - 1)]

    def _complete(self, draft: _Draft) -> ScheduledStep:
        variant = draft.variant
        spans = []
        first_line = 0
        for chunk in draft.chunks:
            request = chunk.request
            if not _is_prefilling(request):
                self._expect_token(request, draft)
            needed = request.variant
            if needed is Variant.PROMPT_LOGPROBS:
                if chunk.start < request.prompt_len - 1:
                    spans.append(PromptSpan(request, request.generation, first_line, chunk.start, chunk.num_tokens))
                else:
                    needed = Variant.EXTENDED
            variant = max(variant, needed)
            first_line += chunk.num_tokens
        # Decodes come last: they may turn out empty on the device, and the host must know where a prompt's tokens lie.
        plan = StepPlan(
            rows=(*[(chunk.slot, chunk.num_tokens) for chunk in draft.chunks], *draft.decodes),
            deltas=(*[delta for chunk in draft.chunks for delta in chunk.deltas], *draft.decode_deltas),
            num_prefill_rows=len(draft.chunks),
            variant=variant,
            num_drafts=draft.num_drafts,
            epoch=self._epoch + 1,
        )
        if self._last_plan is not None and plan.repeats(self._last_plan):
            plan = replace(plan, epoch=self._epoch)
            if Lockstep.may_begin(self._running, plan):
                self._lockstep = Lockstep(self._running, plan, self.blocks, self._block_size)
        else:
            self._epoch += 1
        self._last_plan = plan
        return ScheduledStep(plan, tuple(draft.admitted), tuple(spans), draft.follows_grammar)

    def _next_in_lockstep(self) -> StepPlan | None:
        """The plan of those that decode in lockstep, if nobody else may run and there is nothing else to decide."""
        lockstep = self._lockstep
        if lockstep is None:
            return None
        if self._waiting:
            self._waiting.open_gate()
        plan = None
        if not (self._waiting and self._free_slots) and self._repeats_drafts(lockstep.plan):
            plan = lockstep.next_plan()
        if plan is None:
            self._end_lockstep()
        return plan

    def _repeats_drafts(self, plan: StepPlan) -> bool:
        return self._choose_drafts(len(plan.rows)) == plan.num_drafts

    def _end_lockstep(self) -> None:
        """Let the requests' own counters count again."""
        if self._lockstep is not None:
            self._lockstep.settle()
            self._lockstep = None

    def _plan_decode(self, request: Request, limit: int, draft: _Draft) -> None:
        """Plan a row of one token and its proposals, up to `limit` in all, if there are blocks for it."""
        slot = request.slot
        assert slot is not None
        num_tokens = min(1 + min(request.num_drafts, draft.num_drafts), limit) if draft.num_drafts else 1
        num_written = request.planned + request.spread + num_tokens
        if len(request.blocks) * self._block_size < num_written + draft.num_drafts:  # else there are enough for sure
            num_written = self._with_drafts(request, num_written, draft)
            deltas: list[tuple[int, int, int]] = []
            if not self._grant(request, slot, num_written, deltas, draft):
                self._take_back(request, len(deltas))
                return
            draft.decode_deltas += deltas
        request.planned += 1
        request.spread += num_tokens - 1
        self._expect_token(request, draft)
        draft.decodes.append((slot, num_tokens))
        draft.budget -= num_tokens
        if request.variant > draft.variant:
            draft.variant = Variant.EXTENDED

    def _plan_chunk(self, request: Request, limit: int, draft: _Draft) -> None:
        """Plan up to `limit` tokens of a prompt, as far as blocks can be had for it."""
        assert request.slot is not None
        chunk = _Chunk(request, request.slot, request.planned)
        self._extend(chunk, min(request.prefill_len - request.planned, limit, draft.budget), draft)
        if chunk.num_tokens:
            draft.chunks.append(chunk)
            self._publish_pending()
            self._unpublished = chunk
        else:
            self._take_back(request, len(chunk.deltas))

    def _extend(self, chunk: _Chunk, num_tokens: int, draft: _Draft) -> None:
        """Add tokens to a chunk, as far as blocks can be had for it."""
        request = chunk.request
        while num_tokens:
            num_written = self._num_written(request, num_tokens, draft)
            if self._grant(request, chunk.slot, num_written, chunk.deltas, draft):
                break
            room = len(request.blocks) * self._block_size - request.planned
            num_tokens = min(num_tokens - 1, room)
        request.planned += num_tokens
        chunk.num_tokens += num_tokens
        draft.budget -= num_tokens

    def _num_written(self, request: Request, num_tokens: int, draft: _Draft) -> int:
        """Tokens of a request whose keys and values exist after `num_tokens` more of its prompt. The device makes proposals as
        soon as all of that but the last token are computed, whether the host expects any or not."""
        end = request.planned + num_tokens
        return end if end < request.prefill_len - 1 else self._with_drafts(request, end, draft)

    def _with_drafts(self, request: Request, num_tokens: int, draft: _Draft) -> int:
        """Tokens of a request whose keys and values exist once proposals follow `num_tokens`: a draft model computes all of these
        but the last."""
        num_drafts = min(draft.num_drafts, request.sampling.max_num_drafts)
        return min(num_tokens + max(0, num_drafts - 1), request.max_length - 1)

    def _expect_token(self, request: Request, draft: _Draft) -> None:
        """The step samples for a request, which a grammar must see before the next, and makes proposals for it."""
        if request.guide is not None:
            request.awaits_host = draft.follows_grammar = True
        request.num_unread += 1
        # What the step will propose is not known before its results; if it is more, the rest of it is not verified.
        request.num_drafts = min(draft.num_drafts, request.sampling.max_num_drafts) if request.was_drafted else 0

    def _grant(
        self, request: Request, slot: int, num_tokens: int, deltas: list[tuple[int, int, int]], draft: _Draft
    ) -> bool:
        """Give a request the blocks that so many tokens lack, preempting lower ranks if need be. False if there are fewer left
        for it, which it has then.

        Requests are planned in the order of their rank, so whoever is preempted has no row yet.
        """
        lacking = self._blocks_for(num_tokens) - len(request.blocks)
        if lacking <= 0:
            return True
        while self.blocks.num_free < lacking:
            draft.short_of_blocks = True
            victim = self._running[-1]
            if victim is request:
                break
            victim.overtaken += request.arrival > victim.arrival
            self._preempt(victim)
        count = min(lacking, self.blocks.num_free)
        deltas += self.blocks.extend(request.blocks, count, slot)
        return count == lacking

    def _take_back(self, request: Request, num_blocks: int) -> None:
        """Undo a request's last grants. The device is not to hear of them."""
        if num_blocks:
            self.blocks.release(request.blocks[-num_blocks:])
            del request.blocks[-num_blocks:]

    def _num_admissible(self, num_prefilling: int) -> int:
        """Waiting requests that the limit on long prompts lets in, as far as a step's shares need to know."""
        if not num_prefilling or not self._config.long_prefill_token_threshold:
            return len(self._waiting)
        num_long = self._num_long_prefilling()
        room = self._config.max_long_partial_prefills - num_long
        longs = sum(map(self._is_long, self._waiting))
        return len(self._waiting) - longs + min(longs, max(0, room))

    def _num_long_prefilling(self) -> int:
        return sum(_is_prefilling(request) and self._is_long(request) for request in self._running)

    def _is_long(self, request: Request) -> bool:
        return 0 < self._config.long_prefill_token_threshold < request.prompt_len

    # Slots

    def _admit(self, request: Request, hits: list[int], draft: _Draft) -> None:
        """Give a request a slot, and the cached blocks of its prefix."""
        self._waiting.enter(request)
        slot = self._free_slots.pop()
        self._generations[slot] += 1
        self.blocks.hold(hits)
        request.slot, request.generation = slot, self._generations[slot]
        request.prefill_len = request.num_known
        request.blocks = list(hits)
        request.num_found = request.num_published = len(hits)
        request.planned = len(hits) * self._block_size
        if not request.num_preemptions:
            request.num_cached_tokens = request.planned
            self.statistics.prompt_tokens += request.prompt_len
            self.statistics.cached_prompt_tokens += request.planned
        self._prefixes.enter(request)
        self._by_slot[slot] = request
        insort(self._running, request, key=rank)
        draft.admitted.append(request)

    def _preempt(self, request: Request) -> None:
        self._leave_slot(request)
        request.num_preemptions += 1
        request.awaits_host = request.guide is not None and request.guide.is_waiting
        self.statistics.preemptions += 1
        self._waiting.come_back(request)

    def _finish(self, request: Request, reason: FinishReason, tokens: tuple[int, ...]) -> RequestUpdate:
        request.finish_reason = reason
        del self._requests[request.id]
        if request.slot is None:
            self._waiting.give_up(request)
        else:
            self._leave_slot(request)
        return RequestUpdate(request, tokens, reason)

    def _leave_slot(self, request: Request) -> None:
        assert request.slot is not None
        if self._unpublished is not None and self._unpublished.request is request:
            self._publish_pending()
        self._prefixes.leave(request)
        self._running.remove(request)
        del self._by_slot[request.slot]
        self._free_slots.append(request.slot)
        self.blocks.release(request.blocks)
        request.slot, request.blocks, request.planned, request.num_published = None, [], 0, 0
        request.spread = request.num_unread = request.num_drafts = 0
        request.draft_token_ids, request.was_drafted = (), True

    # Blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _publish_pending(self) -> None:
        """Let others find the last prompt row's blocks. They will be full when the step has run, and every operator of a step
        writes all rows' keys and values before it reads any: a prompt may share blocks with one before it in its step."""
        if self._unpublished is not None:
            self._prefixes.publish_planned(self._unpublished.request)
            self._unpublished = None


def _is_prefilling(request: Request) -> bool:
    return request.planned < request.prefill_len


def _can_decode(request: Request) -> bool:
    return request.prefill_len <= request.planned < request.max_length - 1 and not request.awaits_host

"""Rows of a step: how many tokens of a request run in it, and the KV blocks for them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import repeat

import numpy as np

from stepgraph.engine.prefix_cache import PrefixCache
from stepgraph.engine.request import Request
from stepgraph.engine.request_blocks import RequestBlocks
from stepgraph.engine.request_table import MANY_ROWS, RequestTable
from stepgraph.engine.step_draft import Chunk, StepDraft
from stepgraph.step.shape import Variant

SNAP_SAVING = 1 / 4
"""Share of two steps' tokens that cutting a chunk to a captured size must save: it costs its prompt one step."""


class RowPlanner:
    """Adds rows to a `StepDraft`, of requests that hold slots.

    Args:
        table, blocks, prefixes: of the requests that run.
        preempt_for: takes slot and blocks from the running request of the lowest rank; False if that is the one given.
        max_tokens: tokens of one step.
        token_sizes: captured token counts, ascending.
    """

    def __init__(
        self,
        table: RequestTable,
        blocks: RequestBlocks,
        prefixes: PrefixCache,
        preempt_for: Callable[[Request], bool],
        max_tokens: int,
        token_sizes: Sequence[int],
    ):
        self._table, self._blocks, self._prefixes = table, blocks, prefixes
        self._preempt_for = preempt_for
        self._max_tokens, self._token_sizes = max_tokens, tuple(token_sizes)
        self._unpublished: Chunk | None = None
        """The last chunk planned. The row may still be cut, and naming its blocks takes time: they become findable when the next
        prompt is looked at, or once the step is on its way."""

    def plan_decodes(self, requests: Sequence[Request], num_behind: int, draft: StepDraft) -> None:
        """Plan the decodes of requests that follow each other in rank, with those of `num_behind` others still to come."""
        if draft.num_drafts or len(requests) < MANY_ROWS or not self._plan_all(requests, draft):
            for index, request in enumerate(requests):
                if request.slot is not None:  # else it was preempted for one before
                    num_left = len(requests) - 1 - index + num_behind
                    self.plan_decode(request, draft.budget - num_left, draft)

    def _plan_all(self, requests: Sequence[Request], draft: StepDraft) -> bool:
        """Plan a row of one token for each request, if there are blocks for all; False if not."""
        table = self._table
        slots_R = table.slots(requests)
        written_R = np.minimum(table.planned_S[slots_R] + table.unread_drafts_S[slots_R] + 1, table.end_S[slots_R])
        deltas = self._blocks.grant_lacking(requests, written_R - table.room_S[slots_R])
        if deltas is None:
            return False
        table.plan_decodes(slots_R)
        draft.decode_deltas += deltas
        draft.decodes += zip(slots_R.tolist(), repeat(1), strict=False)
        draft.budget -= len(requests)
        for row in table.variant_S[slots_R].nonzero()[0].tolist():
            draft.variant = Variant.EXTENDED
            self.expect_masks(requests[row], draft)
        return True

    def plan_decode(self, request: Request, limit: int, draft: StepDraft) -> None:
        """Plan a row of one token and its proposals, up to `limit` in all, if there are blocks for it."""
        table, slot = self._table, request.slot
        assert slot is not None
        num_tokens = min(1 + min(table.drafts[slot], draft.num_drafts), limit) if draft.num_drafts else 1
        planned = table.planned[slot]
        num_written = planned + table.unread_drafts[slot] + num_tokens
        if table.room[slot] < num_written + draft.num_drafts:  # else there are enough for sure
            num_written = draft.with_proposals(num_written, table.max_drafts[slot], table.end[slot])
            deltas: list[tuple[int, int, int]] = []
            if not self._grant(request, planned, num_written, deltas, draft):
                self._blocks.take_back(request, len(deltas))
                return
            draft.decode_deltas += deltas
        table.plan_decode(slot, num_tokens - 1, draft.num_drafts)
        if request.guide is not None:
            self.expect_masks(request, draft)
        draft.decodes.append((slot, num_tokens))
        draft.budget -= num_tokens
        if request.variant > draft.variant:
            draft.variant = Variant.EXTENDED

    def plan_chunk(self, request: Request, limit: int, draft: StepDraft) -> None:
        """Plan up to `limit` tokens of a prompt, as far as blocks can be had for it."""
        assert request.slot is not None
        planned = self._table.planned[request.slot]
        chunk = Chunk(request, request.slot, planned)
        self._extend(chunk, min(self._table.prefill_len[request.slot] - planned, limit, draft.budget), draft)
        if chunk.num_tokens:
            draft.chunks.append(chunk)
            self.publish_pending()
            self._unpublished = chunk
        else:
            self._blocks.take_back(request, len(chunk.deltas))

    def top_up(self, draft: StepDraft) -> None:
        """Give what the shares of short prompts left over to the longer ones, as far as there are free blocks."""
        table = self._table
        for chunk in draft.chunks:
            left = table.prefill_len[chunk.slot] - table.planned[chunk.slot]
            if draft.budget and left > 0:
                free = self._blocks.num_grantable * self._blocks.block_size
                room = table.room[chunk.slot] + free - table.planned[chunk.slot] - max(0, draft.num_drafts - 1)
                self._extend(chunk, max(0, min(left, draft.budget, room)), draft)

    def snap(self, draft: StepDraft) -> None:
        """Cut the last prompt's chunk so that the step ends at a captured size, where that saves enough padding.

        What is cut off runs in the next step, which decodes anyway. That costs the prompt one step, so it happens to a
        prompt once at most, and only if it would be complete: a prompt that fills the budget has no padding.
        """
        chunk = self._unpublished
        if chunk is None or chunk.request.was_snapped or self._table.is_prefilling(chunk.slot):
            return
        num_tokens = self._max_tokens - draft.budget
        down = bisect_right(self._token_sizes, num_tokens) - 1
        if down < 0 or not 0 < (cut := num_tokens - self._token_sizes[down]) < chunk.num_tokens:
            return
        next_decodes = num_tokens + sum(
            (not self._table.is_prefilling(other.slot)) - other.num_tokens for other in draft.chunks
        )
        whole = self._round_up(num_tokens) + self._round_up(next_decodes)
        snapped = self._token_sizes[down] + self._round_up(next_decodes - 1 + cut)
        if whole - snapped >= whole * SNAP_SAVING:
            request = chunk.request
            request.was_snapped = True
            self._table.plan_prompt(chunk.slot, -cut)
            chunk.num_tokens -= cut
            draft.budget += cut
            surplus = self._blocks.num_beyond(request, self._num_written(chunk.slot, 0, draft))
            if surplus:
                self._blocks.take_back(request, surplus)
                del chunk.deltas[-surplus:]

    def expect_masks(self, request: Request, draft: StepDraft) -> None:
        """The step samples for a request; if it follows a grammar, that must see the token before the next."""
        if request.guide is not None:
            request.awaits_host = draft.follows_grammar = True

    def publish_pending(self) -> None:
        """Let others find the last prompt row's blocks. They will be full when the step has run, and every operator of a step
        writes all rows' keys and values before it reads any: a prompt may share blocks with one before it in its step."""
        if self._unpublished is not None:
            self._prefixes.publish_planned(self._unpublished.request)
            self._unpublished = None

    def leave(self, request: Request) -> None:
        """The request is about to give its slot up."""
        if self._unpublished is not None and self._unpublished.request is request:
            self.publish_pending()

    def _extend(self, chunk: Chunk, num_tokens: int, draft: StepDraft) -> None:
        """Add tokens to a chunk, as far as blocks can be had for it, and up to where its request's state is to be kept."""
        table, slot = self._table, chunk.slot
        if chunk.request.borders:
            num_tokens = min(num_tokens, chunk.request.borders[0] - table.planned[slot])
        while num_tokens:
            num_written = self._num_written(slot, num_tokens, draft)
            if self._grant(chunk.request, chunk.start, num_written, chunk.deltas, draft):
                break
            num_tokens = min(num_tokens - 1, table.room[slot] - table.planned[slot])
        table.plan_prompt(slot, num_tokens)
        chunk.num_tokens += num_tokens
        draft.budget -= num_tokens

    def _num_written(self, slot: int, num_tokens: int, draft: StepDraft) -> int:
        """Tokens of a request whose keys and values exist after `num_tokens` more of its prompt. The device makes proposals as
        soon as all of that but the last token are computed, whether the host expects any or not."""
        table = self._table
        end = table.planned[slot] + num_tokens
        if end < table.prefill_len[slot] - 1:
            return end
        return draft.with_proposals(end, table.max_drafts[slot], table.end[slot])

    def _grant(
        self, request: Request, start: int, num_tokens: int, deltas: list[tuple[int, int, int]], draft: StepDraft
    ) -> bool:
        """Give a request whose row starts at position `start` the blocks that so many tokens lack, preempting lower ranks if need
        be. False if there are fewer left for it, which it has then.

        Requests are planned in the order of their rank, so whoever is preempted has no row yet.
        """
        lacking = self._blocks.lacking(request, num_tokens)
        if not lacking:
            return True
        self._blocks.release_unseen(request, start)
        while self._blocks.num_grantable < lacking:
            draft.short_of_blocks = True
            if not self._preempt_for(request):
                break
        count = min(lacking, self._blocks.num_grantable)
        deltas += self._blocks.grant(request, count)
        return count == lacking

    def _round_up(self, num_tokens: int) -> int:
        """The smallest captured size that holds so many tokens."""
        return self._token_sizes[min(bisect_left(self._token_sizes, num_tokens), len(self._token_sizes) - 1)]

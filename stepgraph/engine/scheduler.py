"""Which requests run in a step, and how many tokens of each.

Every step gives each decoding request one token and fills the rest of the token budget with prompts, oldest first, several
at once and in chunks where they do not fit. The scheduler plans ahead of what it knows: a request planned for a decode may
have finished on the device in a step whose results are not read yet; the device then runs nothing for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from stepgraph.engine.blocks import BlockAllocator
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.errors import RequestError
from stepgraph.ops import slot_line
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import RowResult

_FINISH_REASONS = {
    slot_line.FINISHED_STOP: FinishReason.STOP,
    slot_line.FINISHED_LENGTH: FinishReason.LENGTH,
}


@dataclass(frozen=True)
class ScheduledStep:
    """A plan, and the requests whose device-side state must be written before it runs."""

    plan: StepPlan
    admitted: tuple[Request, ...]


class Scheduler:
    """Continuous batching of decodes and chunked prompts over slots and KV blocks.

    Args:
        max_num_seqs: slots 1 … max_num_seqs.
        max_tokens: tokens of one step; at least `max_num_seqs`.
        num_kv_blocks: the null block included.
        block_size: tokens per KV block.
    """

    def __init__(self, *, max_num_seqs: int, max_tokens: int, num_kv_blocks: int, block_size: int):
        assert max_tokens >= max_num_seqs, (max_tokens, max_num_seqs)
        self._max_tokens = max_tokens
        self._block_size = block_size
        self._blocks = BlockAllocator(num_kv_blocks)
        self._free_slots = list(range(max_num_seqs, 0, -1))
        self._generations = [0] * (max_num_seqs + 1)
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}  # by slot, in order of admission
        self._requests: dict[str, Request] = {}

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def running(self) -> tuple[Request, ...]:
        """Requests that hold a slot, oldest first."""
        return tuple(self._running.values())

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: its id is in use, or it could never fit into the KV cache.
        """
        if request.id in self._requests:
            raise RequestError(f"request id {request.id!r} is in use; ids must differ while requests run")
        needed = self._blocks_for(request)
        if needed > self._blocks.num_usable:
            raise RequestError(
                f"the request needs KV blocks for {request.max_length - 1} tokens ({needed} blocks of {self._block_size}), "
                f"and the cache has {self._blocks.num_usable}; lower max_tokens, shorten the prompt, or raise num_kv_blocks"
            )
        self._requests[request.id] = request
        self._waiting.append(request)

    def abort(self, request_id: str) -> RequestUpdate | None:
        """End a request now, waiting or running. None if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        if request.slot is None:
            self._waiting.remove(request)
        return self._finish(request, FinishReason.ABORT, ())

    def schedule(self) -> ScheduledStep | None:
        """Plan one step; None if nothing can run until results arrive."""
        rows: list[tuple[int, int]] = []
        deltas: list[tuple[int, int, int]] = []
        prefilling: list[Request] = []
        for slot, request in self._running.items():
            if request.planned < request.prompt_len:
                prefilling.append(request)
            elif request.planned < request.max_length - 1:
                rows.append((slot, 1))
                self._advance(request, 1, deltas)
        num_decode_rows = len(rows)

        budget = self._max_tokens - num_decode_rows
        admitted: list[Request] = []
        for request in prefilling:
            budget -= self._plan_chunk(request, budget, rows, deltas)
        while budget and self._waiting and self._admit(self._waiting[0]):
            request = self._waiting.popleft()
            admitted.append(request)
            budget -= self._plan_chunk(request, budget, rows, deltas)

        if not rows:
            return None
        return ScheduledStep(StepPlan(tuple(rows), tuple(deltas), len(rows) - num_decode_rows), tuple(admitted))

    def reconcile(self, results: Iterable[RowResult]) -> list[RequestUpdate]:
        """Take in the results of a step; rows of requests that have ended since it was planned are dropped."""
        updates = []
        for slot, generation, token, finish in results:
            request = self._running.get(slot)
            if token == slot_line.NO_TOKEN or request is None or request.generation != generation:
                continue
            request.output_token_ids.append(token)
            if finish == slot_line.RUNNING:
                updates.append(RequestUpdate(request, (token,), None))
            else:
                reason = _FINISH_REASONS[finish]
                if reason is FinishReason.STOP:
                    request.stop_token = token
                updates.append(self._finish(request, reason, (token,)))
        return updates

    def _plan_chunk(
        self, request: Request, budget: int, rows: list[tuple[int, int]], deltas: list[tuple[int, int, int]]
    ) -> int:
        """Plan as much of a prompt as the budget allows; returns the number of tokens."""
        chunk = min(request.prompt_len - request.planned, budget)
        if chunk:
            assert request.slot is not None
            rows.append((request.slot, chunk))
            self._advance(request, chunk, deltas)
        return chunk

    def _advance(self, request: Request, num_tokens: int, deltas: list[tuple[int, int, int]]) -> None:
        """Count tokens as planned and grant the KV blocks they go to."""
        request.planned += num_tokens
        while len(request.blocks) * self._block_size < request.planned:
            block = self._blocks.take()
            assert request.slot is not None
            deltas.append((request.slot, len(request.blocks), block))
            request.blocks.append(block)

    def _admit(self, request: Request) -> bool:
        """Give a request a slot and a reservation of blocks, if both are free."""
        needed = self._blocks_for(request)
        if not self._free_slots or not self._blocks.can_reserve(needed):
            return False
        self._blocks.reserve(needed)
        slot = self._free_slots.pop()
        self._generations[slot] += 1
        request.slot, request.generation = slot, self._generations[slot]
        self._running[slot] = request
        return True

    def _finish(self, request: Request, reason: FinishReason, tokens: tuple[int, ...]) -> RequestUpdate:
        request.finish_reason = reason
        del self._requests[request.id]
        if request.slot is not None:
            del self._running[request.slot]
            self._free_slots.append(request.slot)
            self._blocks.release(request.blocks, self._blocks_for(request))
            request.slot, request.blocks = None, []
        return RequestUpdate(request, tokens, reason)

    def _blocks_for(self, request: Request) -> int:
        """Blocks a request can need in all: the last token it may sample is never computed."""
        return -(-(request.max_length - 1) // self._block_size)

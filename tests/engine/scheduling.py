"""A scheduler's surroundings for tests: a device in plain Python, and the engine's loop around both.

The device computes what `build_step`, a model of two layers and `commit` compute, in exact integers: a layer writes every row's
entries before any row reads, and a token's value depends on every entry of its context. Two runs can only agree if every
entry they read is the right one.
"""

from collections import deque
from dataclasses import dataclass, field

from stepgraph.config import SchedulerConfig
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.ops import slot_line
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import RowResult, StepResults
from stepgraph.step.shape import StepShape
from stepgraph.step.state import SlotSampling

VOCAB = 11
STOP = 0


def answer_alone(request: Request) -> list[int]:
    """What the request must get, whatever runs beside it."""
    tokens = list(request.prompt_token_ids)
    while len(tokens) < request.max_length:
        first = list(enumerate(tokens))
        second = [hash(tuple(first[: i + 1])) for i in range(len(tokens))]
        tokens.append(next_token(second, request.sampling.seed))
        if tokens[-1] in request.sampling.stop_token_ids:
            break
    return tokens[request.prompt_len :]


def next_token(values: list[int], seed: int) -> int:
    """Depends on every value of the context, on their order, and on the seed."""
    return hash((tuple(values), seed)) % VOCAB


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    active: bool = False
    generation: int = 0
    max_length: int = 0
    sampling: SlotSampling = field(default_factory=lambda: SlotSampling(seed=0))


class Device:
    """Slots, a block table and two layers of KV entries."""

    def __init__(self, num_slots: int, num_blocks: int, block_size: int):
        self.slots = [Slot() for _ in range(num_slots + 1)]
        self.block_table: dict[tuple[int, int], int] = {}
        self.kv: list[dict[tuple[int, int], object]] = [{}, {}]
        self.num_blocks, self.block_size = num_blocks, block_size

    def admit(self, request: Request) -> None:
        """What `SlotState.admit` does with what the engine gives it."""
        for index, block in enumerate(request.blocks[: request.num_found]):
            self.block_table[request.slot, index] = block
        self.slots[request.slot] = Slot(
            request.tokens(0, request.num_known),
            request.num_found * self.block_size,
            True,
            request.generation,
            request.max_length,
            request.sampling,
        )

    def run(self, plan: StepPlan) -> StepResults:
        for slot, index, block in plan.deltas:
            assert 0 < block < self.num_blocks
            self.block_table[slot, index] = block
        spans = [self._span(index, bound) for index, bound in plan.rows]
        values = [list(enumerate(self.slots[i].tokens))[a:b] for (i, _), (a, b) in zip(plan.rows, spans, strict=True)]
        for layer in self.kv:
            for (index, _), (start, end), row in zip(plan.rows, spans, values, strict=True):
                for position in range(start, end):
                    layer[self._entry(index, position)] = row[position - start]
            for row, ((index, _), (start, end)) in enumerate(zip(plan.rows, spans, strict=True)):
                context = [layer[self._entry(index, position)] for position in range(end)]
                values[row] = [hash(tuple(context[: position + 1])) for position in range(start, end)]
        return StepResults([self._commit(index, span) for (index, _), span in zip(plan.rows, spans, strict=True)])

    def _span(self, index: int, bound: int) -> tuple[int, int]:
        slot = self.slots[index]
        wants = len(slot.tokens) - slot.computed if slot.active else 0
        return slot.computed, slot.computed + min(bound, wants)

    def _commit(self, index: int, span: tuple[int, int]) -> RowResult:
        slot = self.slots[index]
        start, end = span
        slot.computed = end
        if start == end or end < len(slot.tokens):
            return RowResult(index, slot.generation, slot_line.NO_TOKEN, slot_line.RUNNING)
        token = next_token([self.kv[1][self._entry(index, position)] for position in range(end)], slot.sampling.seed)
        slot.tokens.append(token)
        finish = slot_line.RUNNING
        if token in slot.sampling.stop_token_ids:
            finish = slot_line.FINISHED_STOP
        elif len(slot.tokens) >= slot.max_length:
            finish = slot_line.FINISHED_LENGTH
        slot.active = finish == slot_line.RUNNING
        return RowResult(index, slot.generation, token, finish)

    def _entry(self, index: int, position: int) -> tuple[int, int]:
        return self.block_table[index, position // self.block_size], position % self.block_size


class Loop:
    """The engine's loop around a scheduler; checks every plan.

    `now` is the scheduler's clock, in seconds; `step_seconds` pass with every step.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int = 4,
        max_tokens: int = 16,
        num_kv_blocks: int = 33,
        block_size: int = 4,
        run_ahead: int = 0,
        token_sizes: tuple[int, ...] | None = None,
        prefix_caching: bool = True,
        pure_steps: bool = False,
        step_seconds: float = 0.001,
        **limits,
    ):
        self.config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, **limits)
        self.block_size, self.run_ahead, self.num_kv_blocks = block_size, run_ahead, num_kv_blocks
        self.now, self.step_seconds = 0.0, step_seconds
        self.scheduler = Scheduler(
            self.config,
            max_tokens=max_tokens,
            num_kv_blocks=num_kv_blocks,
            block_size=block_size,
            token_sizes=token_sizes or tuple(range(1, max_tokens + 1)),
            prefix_caching=prefix_caching,
            pure_steps=pure_steps,
            clock=lambda: self.now,
        )
        self.device = Device(max_num_seqs, num_kv_blocks, block_size)
        self.in_flight: deque = deque()
        self.plans: list[StepPlan] = []
        self.admitted: list[str] = []
        self.updates = []

    def add(
        self,
        id: str,
        prompt: int | list[int] = 5,
        max_tokens: int = 6,
        *,
        stop: bool = False,
        seed: int = 0,
        priority: int = 0,
        salt: str | None = None,
    ) -> Request:
        """Queue a request; a prompt given by its length has tokens that depend on the id."""
        if isinstance(prompt, int):
            prompt = [(7 * i + len(id) + sum(map(ord, id))) % VOCAB for i in range(prompt)]
        request = Request(
            id,
            prompt,
            SamplingParams(),
            max_length=len(prompt) + max_tokens,
            sampling=SlotSampling(seed=seed, stop_token_ids=(STOP,) if stop else ()),
            priority=priority,
            cache_salt=salt,
        )
        self.scheduler.add(request)
        return request

    def step(self) -> None:
        scheduled = self.scheduler.schedule()
        self.now += self.step_seconds
        if scheduled is not None:
            for request in scheduled.admitted:
                self.device.admit(request)
                self.admitted.append(request.id)
            self._check(scheduled.plan)
            self.plans.append(scheduled.plan)
            self.in_flight.append((scheduled, self.device.run(scheduled.plan)))
        if self.in_flight and (scheduled is None or len(self.in_flight) > self.run_ahead):
            self.updates += self.scheduler.reconcile(*self.in_flight.popleft())

    def drain(self) -> None:
        for _ in range(3000):
            if not self.scheduler.has_requests and not self.in_flight:
                return
            self.step()
        raise AssertionError("the requests never end")

    def check_nothing_is_held(self) -> None:
        """All slots and blocks are free: one request can take every block, and as many as there are slots run at once."""
        scheduler = self.scheduler
        assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
        assert scheduler.num_free_blocks == self.num_kv_blocks - 1
        everything = self.add("all blocks", 1, (self.num_kv_blocks - 1) * self.block_size)
        self.drain()
        assert everything.output_token_ids == answer_alone(everything)
        many = [self.add(f"slot {i}", 1, 3) for i in range(self.config.max_num_seqs)]
        self.drain()
        assert max(len(plan.rows) for plan in self.plans) == self.config.max_num_seqs
        assert [request.output_token_ids for request in many] == [answer_alone(request) for request in many]

    def _check(self, plan: StepPlan) -> None:
        assert 1 <= len(plan.rows) <= self.config.max_num_seqs
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert all(bound >= 1 for _, bound in plan.rows)
        slots = [slot for slot, _ in plan.rows]
        assert len(set(slots)) == len(slots)
        assert len(plan.deltas) <= StepShape(plan.num_tokens, len(plan.rows)).num_deltas(self.block_size)
        running = {request.slot: request for request in self.scheduler.running()}
        assert set(slots) <= set(running)
        for request in running.values():
            assert slot_line.NULL_BLOCK not in request.blocks
            assert len(request.blocks) * self.block_size >= request.planned
        # A block that two requests hold is one that the later found in the cache, complete before it writes.
        owners: dict[int, int] = {}
        for request in running.values():
            for index, block in enumerate(request.blocks):
                if index >= request.num_found:
                    assert owners.setdefault(block, request.slot) == request.slot

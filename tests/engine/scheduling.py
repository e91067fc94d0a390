"""A scheduler's surroundings for tests: the engine over a device in plain Python, each plan looked at.

The device computes what `build_step`, a model of two layers and `commit` compute, in exact integers: a layer writes every row's
entries before any row reads, and a token's value depends on every entry of its context. Two runs can only agree if every
entry they read is the right one.

It proposes too: random numbers of tokens, some of them right. Where the scheduler looks ahead, a draft model's entries are kept
like those of a layer, that of a position being made of all tokens up to `lookahead` after it.

Where there are checkpoints, it has lines for states, too: a line holds all tokens that its state is made of.
"""

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle

from stepgraph.abi import slot_line
from stepgraph.config import CacheConfig, EngineConfig, GraphConfig, ModelConfig, SchedulerConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.config.transfer import TransferConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.reports import StepReport
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.executor.fake import FakeClock, FakeExecutor, fake_specs
from stepgraph.models.source import ModelSource, resolve
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.results import RowResult, StepResults
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.transfer.base import Transfers
from stepgraph.transfer.reference import Offer, Reference

VOCAB = 11
STOP = 0


def answer_alone(request: Request, window: int = 0) -> list[int]:
    """What the request must get, whatever runs beside it, where a token sees the last `window` ones of each layer; 0: all."""
    sampling = request.sampling
    prompt = tuple(request.prompt_token_ids)
    return list(_answer(prompt, request.max_length, sampling.seed, sampling.stop_token_ids, window))


@cache
def _answer(
    prompt: tuple[int, ...], max_length: int, seed: int, stop_token_ids: tuple[int, ...], window: int
) -> tuple[int, ...]:
    tokens = list(prompt)
    second: list[int] = []
    while len(tokens) < max_length:
        first = list(enumerate(tokens))
        second += [hash(tuple(first[_first_seen(i, window) : i + 1])) for i in range(len(second), len(tokens))]
        tokens.append(next_token(second[_first_seen(len(tokens) - 1, window) :], seed))
        if tokens[-1] in stop_token_ids:
            break
    return tuple(tokens[len(prompt) :])


def _first_seen(position: int, window: int) -> int:
    return max(0, position - window + 1) if window else 0


def next_token(values: list[int], seed: int) -> int:
    """Depends on every value of the context, on their order, and on the seed."""
    return hash((tuple(values), seed)) % VOCAB


@dataclass
class Slot:
    tokens: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)  # what `tokens` will be in the end
    computed: int = 0
    active: bool = False
    generation: int = 0
    max_length: int = 0
    sampling: SlotSampling = field(default_factory=lambda: SlotSampling(seed=0))

    @property
    def room(self) -> int:
        """Proposals that it takes now."""
        if not self.active or self.computed < len(self.tokens) - 1:
            return 0
        return max(0, min(self.sampling.max_num_drafts, self.max_length - len(self.tokens) - 1))


class Device:
    """Slots, a block table, two layers of KV entries, and those of a draft model."""

    def __init__(
        self,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        *,
        lookahead: int = 0,
        accuracy: float = 0.7,
        window: int = 0,
        table_width: int | None = None,
    ):
        """A token sees the last `window` ones of each layer; 0: all. `accuracy` is the chance that a proposal is right; if all
        are, there are as many as a request takes. `table_width`: of blocks; behind it are a slot's
        lines. None: there are none."""
        self.slots = [Slot() for _ in range(num_slots + 1)]
        self.block_table: dict[tuple[int, int], int] = {}
        self.num_blocks, self.block_size = num_blocks, block_size
        self.limits = [0] * (num_slots + 1)
        """Positions that a slot may write; set before each step."""
        self._lookahead, self._accuracy, self._window = lookahead, accuracy, window
        self._random = random.Random(0)
        self._table_width = table_width
        self._lines = [
            [0, 0, 0] for _ in self.slots
        ]  # that the next step reads and writes, and that the one after writes
        self.forget()

    def forget(self) -> None:
        """Lose the KV cache's content."""
        self.kv: list[dict[tuple[int, int], object]] = [{}, {}]
        self.draft_kv: dict[tuple[int, int], object] = {}
        self.states: dict[int, list[int]] = {}

    def admit(self, admission: Admission) -> None:
        """What `SlotState.admit` does with what the engine gives it."""
        slot, tokens, prompt_len, generation, max_length, sampling, blocks, computed, lines = admission
        if self._table_width is not None:
            self._lines[slot] = [*lines, lines[1]]
        for index, block in enumerate(blocks):
            self.block_table[slot, index] = block
        prompt = tuple(tokens[:prompt_len])
        answer = _answer(prompt, max_length, sampling.seed, sampling.stop_token_ids, self._window)
        whole = [*prompt, *answer]
        self.slots[slot] = Slot(list(tokens), [], whole, computed, True, generation, max_length, sampling)

    def set_masks(self, slot, masks) -> None:
        raise AssertionError("it knows none")

    def run(self, plan: StepPlan) -> StepResults:
        for slot, index, block in plan.deltas:
            if self._table_width is not None and index >= self._table_width:
                self._lines[slot][index - self._table_width] = block
            else:
                assert 0 < block < self.num_blocks
                self.block_table[slot, index] = block
        spans = [self._span(index, bound) for index, bound in plan.rows]
        known = [[*self.slots[i].tokens, *self.slots[i].drafts] for i, _ in plan.rows]
        values = [list(enumerate(tokens))[a:b] for tokens, (a, b) in zip(known, spans, strict=True)]
        for layer in self.kv:
            for (index, _), (start, end), row in zip(plan.rows, spans, values, strict=True):
                for position in range(start, end):
                    self._write(layer, index, position, row[position - start])
            for row, ((index, _), (start, end)) in enumerate(zip(plan.rows, spans, strict=True)):
                first = _first_seen(start, self._window)
                context = [layer[self._entry(index, position)] for position in range(first, end)]
                values[row] = [
                    hash(tuple(context[_first_seen(position, self._window) - first : position + 1 - first]))
                    for position in range(start, end)
                ]
        if self._table_width is not None:
            self._read_states(plan)
        results = [self._commit(index, span) for (index, _), span in zip(plan.rows, spans, strict=True)]
        if self._table_width is not None:
            self._write_states(plan)
        if self._lookahead:
            for (index, _), span in zip(plan.rows, spans, strict=True):
                self._follow(index, span)
        return StepResults.of(
            [
                result._replace(num_drafts=self._propose(index, plan.num_drafts))
                for result, (index, _) in zip(results, plan.rows, strict=True)
            ]
        )

    def _read_states(self, plan: StepPlan) -> None:
        read, written = ([self._lines[slot][which] for slot, _ in plan.rows] for which in (0, 1))
        assert 0 not in (*read, *written)
        assert len(set(written)) == len(written)
        for (slot, _), line, own in zip(plan.rows, read, written, strict=True):
            assert line == own or line not in written
            state = self.slots[slot]
            assert (
                not state.active or self.states.get(line if state.computed else 0, []) == state.tokens[: state.computed]
            )

    def _write_states(self, plan: StepPlan) -> None:
        for slot, _ in plan.rows:
            _, own, following = self._lines[slot]
            self.states[own] = self.slots[slot].tokens[: self.slots[slot].computed]
            self._lines[slot] = [own, following, following]

    def _span(self, index: int, bound: int) -> tuple[int, int]:
        slot = self.slots[index]
        wants = len(slot.tokens) + len(slot.drafts) - slot.computed if slot.active else 0
        return slot.computed, slot.computed + min(bound, wants)

    def _commit(self, index: int, span: tuple[int, int]) -> RowResult:
        slot = self.slots[index]
        start, end = span
        length, drafts = len(slot.tokens), slot.drafts
        slot.drafts = []
        if start == end or end < length:
            slot.computed = end
            return RowResult(index, slot.generation, slot_line.RUNNING, 0)
        first = _first_seen(length - 1, self._window)
        values = [self.kv[1][self._entry(index, position)] for position in range(first, end)]
        num_verified, num_accepted = end - length, 0
        finish, stands = slot_line.RUNNING, True
        while stands:
            place = len(slot.tokens) - length
            seen = values[_first_seen(length + place - 1, self._window) - first : length + place - first]
            token = next_token(seen, slot.sampling.seed)
            slot.tokens.append(token)
            stands = place < num_verified and drafts[place] == token
            num_accepted += stands
            if token in slot.sampling.stop_token_ids:
                finish = slot_line.FINISHED_STOP
            elif len(slot.tokens) >= slot.max_length:
                finish = slot_line.FINISHED_LENGTH
            stands = stands and finish == slot_line.RUNNING
        new = slot.tokens[length:]
        slot.computed = len(slot.tokens) - 1
        slot.active = finish == slot_line.RUNNING
        return RowResult(index, slot.generation, finish, len(new), num_verified, num_accepted, tokens=new)

    def _follow(self, index: int, span: tuple[int, int]) -> None:
        """The draft model's entries of a step's tokens, and of those before that lacked tokens after them."""
        tokens = self.slots[index].tokens
        for position in range(max(0, span[0] - self._lookahead + 1), span[1]):
            self._write(self.draft_kv, index, position, self._draft_entry(tokens, position))

    def _draft_entry(self, tokens: list[int], position: int) -> object:
        end = position + 1 + self._lookahead
        return hash(tuple(tokens[:end])) if end <= len(tokens) else "made of proposals"

    def _propose(self, index: int, num_drafts: int) -> int:
        slot = self.slots[index]
        room = min(slot.room, num_drafts)
        if self._lookahead and room:
            end = slot.computed - self._lookahead + 1
            for position in range(_first_seen(end - 1, self._window), end):
                entry = self.draft_kv[self._entry(index, position)]
                assert entry == self._draft_entry(slot.tokens, position), (index, position)
            for place in range(1, room):
                self._write(self.draft_kv, index, slot.computed - 1 + place, "made of proposals")
        right = slot.whole[len(slot.tokens) :]
        slot.drafts = [
            right[place]
            if place < len(right) and self._random.random() < self._accuracy
            else self._random.randrange(VOCAB)
            for place in range(room if self._accuracy == 1 else self._random.randint(0, room))
        ]
        return len(slot.drafts)

    def _write(self, layer: dict[tuple[int, int], object], index: int, position: int, value: object) -> None:
        assert position < self.limits[index], "no block was granted for it"
        layer[self._entry(index, position)] = value

    def _entry(self, index: int, position: int) -> tuple[int, int]:
        return self.block_table[index, position // self.block_size], position % self.block_size


@cache
def _source() -> ModelSource:
    """A model whose weights and tokenizer nobody looks at."""
    return resolve("qwen3-0.6b", weights=False)


class Loop:
    """The engine over a device of exact integers; checks every plan.

    `step_seconds` pass with every step. Steps make up to as many proposals as `num_drafts` says in turn.
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
        num_drafts: Sequence[int] = (0,),
        lookahead: int = 0,
        accuracy: float = 0.7,
        window: int = 0,
        transfers: Transfers | None = None,
        transfer: TransferConfig | None = None,
        kv_events: KVEventsConfig | None = None,
        num_checkpoints: int = 0,
        **limits,
    ):
        self.config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, **limits)
        self.block_size, self.num_kv_blocks = block_size, num_kv_blocks
        self.clock, self.step_seconds = FakeClock(), step_seconds
        self.window, self.lookahead = window, lookahead
        max_model_len, self.num_checkpoints = 1 << 20, num_checkpoints
        self.device = Device(
            max_num_seqs,
            num_kv_blocks,
            block_size,
            lookahead=lookahead,
            accuracy=accuracy,
            window=window,
            table_width=max_model_len // block_size if num_checkpoints else None,
        )
        self.in_flight: deque = deque()
        self.held_elsewhere: set[int] = set()
        """Blocks that others than requests hold, or may still touch."""
        self._seen: dict[
            int, tuple[int, int]
        ] = {}  # by slot: generation, and tokens computed in steps whose results were read
        self.plans: list[StepPlan] = []
        self.admitted: list[str] = []
        self.updates = []
        policy = ShapePolicy.of(GraphConfig(), self.config, draft_levels=(max(num_drafts),))
        specs = replace(
            fake_specs(
                policy,
                vocab_size=128,
                max_model_len=max_model_len,
                num_kv_blocks=num_kv_blocks,
                block_size=block_size,
                run_ahead=run_ahead,
            ),
            token_sizes=token_sizes or tuple(range(1, max_tokens + 1)),
            draft_levels=policy.draft_levels,
            lookahead=lookahead,
            reach=window + max(0, lookahead - 1) if window else 0,
            reuses_prefixes=not num_checkpoints,
            num_checkpoints=num_checkpoints,
        )
        turns = cycle(num_drafts)

        def create_scheduler(config, **options) -> Scheduler:
            return Scheduler(config, **options | {"pure_steps": pure_steps, "choose_drafts": lambda _: next(turns)})

        self.engine = build_engine(
            EngineConfig(
                model=ModelConfig(load_format="dummy"),
                scheduler=self.config,
                cache=CacheConfig(enable_prefix_caching=prefix_caching),
                transfer=transfer or TransferConfig(),
                kv_events=kv_events or KVEventsConfig(),
            ),
            transfers=transfers,
            source=_source(),
            executor=FakeExecutor(self, specs, policy, self.clock),
            create_scheduler=create_scheduler,
            clock=self.clock,
        )
        self.engine.on_step = self._on_step
        self.scheduler = self.engine.scheduler

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
        max_num_drafts: int = slot_line.MAX_DRAFTS,
        transfer: Offer | Reference | None = None,
    ) -> Request:
        """Queue a request; a prompt given by its length has tokens that depend on the id."""
        if isinstance(prompt, int):
            prompt = [(7 * i + len(id) + sum(map(ord, id))) % VOCAB for i in range(prompt)]
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            ignore_eos=True,
            stop_token_ids=(STOP,) if stop else (),
            speculative={"num_speculative_tokens": max_num_drafts},
        )
        return self.engine.add_request(id, prompt, params, priority=priority, cache_salt=salt, transfer=transfer)

    def step(self) -> None:
        self.updates += self.engine.step()
        self.clock.now += self.step_seconds

    # The device, as the executor sees it

    def admit(self, admission: Admission) -> None:
        self.device.admit(admission)
        (request,) = [request for request in self.scheduler.running() if request.slot == admission.slot]
        self.admitted.append(request.id)
        self._seen[admission.slot] = admission.generation, admission.computed

    def set_masks(self, slot, masks) -> None:
        self.device.set_masks(slot, masks)

    def forget(self) -> None:
        self.device.forget()

    def run(self, plan: StepPlan) -> StepResults:
        self._check(plan)
        self.plans.append(plan)
        results = self.device.run(plan)
        computed = [self.device.slots[slot].computed for slot, _ in plan.rows]
        self.in_flight.append((plan, results, computed))
        return results

    def _on_step(self, report: StepReport) -> None:
        _, results, computed = self.in_flight.popleft()
        assert report.results is results
        for row, end in zip(results.rows, computed, strict=True):
            if self._seen[row.slot][0] == row.generation:
                self._seen[row.slot] = row.generation, end

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
        scheduler.preempt_all()
        assert len(set(scheduler._lines._free)) == self.config.max_num_seqs + self.num_checkpoints
        everything = self.add("all blocks", 1, (self.num_kv_blocks - 1) * self.block_size)
        self.drain()
        assert everything.output_token_ids == answer_alone(everything, self.window)
        many = [self.add(f"slot {i}", 1, 3) for i in range(self.config.max_num_seqs)]
        self.drain()
        assert max(len(plan.rows) for plan in self.plans) == self.config.max_num_seqs
        assert [r.output_token_ids for r in many] == [answer_alone(r, self.window) for r in many]

    def _check(self, plan: StepPlan) -> None:
        assert 1 <= len(plan.rows) <= self.config.max_num_seqs
        assert plan.num_tokens <= self.config.max_num_batched_tokens
        assert all(bound >= 1 for _, bound in plan.rows)
        slots = [slot for slot, _ in plan.rows]
        assert len(set(slots)) == len(slots)
        shape = StepShape(plan.num_tokens, len(plan.rows), num_drafts=plan.num_drafts)
        assert len(plan.deltas) <= shape.num_deltas(self.block_size)
        assert all(bound <= 1 + plan.num_drafts for _, bound in plan.rows[plan.num_prefill_rows :])
        running = {request.slot: request for request in self.scheduler.running()}
        assert set(slots) <= set(running)
        for request in running.values():
            num_unseen = request.num_unseen
            assert set(request.blocks[:num_unseen]) <= {slot_line.NULL_BLOCK}
            assert slot_line.NULL_BLOCK not in request.blocks[num_unseen:]
            state = self.device.slots[request.slot]  # which may have ended: then nothing reads any more
            first_seen = _first_seen(state.computed, self.window)
            assert not state.active or num_unseen * self.block_size <= first_seen, (
                "a block is gone that a token will see"
            )
            planned = min(
                self.scheduler.table.planned[request.slot], request.max_length - 1
            )  # it may be planned beyond its end, and then runs nothing
            assert len(request.blocks) * self.block_size >= planned
        for slot, bound in plan.rows:
            request = running[slot]
            written = min(self._may_write(request, bound, plan), request.max_length - 1)
            assert len(request.blocks) * self.block_size >= written, (request, plan)
            table = self.device.block_table | {delta[:2]: delta[2] for delta in plan.deltas}
            seen = range(request.num_unseen, len(request.blocks))
            assert [table[slot, index] for index in seen] == request.blocks[request.num_unseen :]
            self.device.limits[slot] = len(request.blocks) * self.block_size
        # A block that two requests hold is one that the later found in the cache, complete before it writes.
        owners: dict[int, int] = {}
        for request in running.values():
            for index, block in enumerate(request.blocks):
                if index >= max(request.num_found, request.num_unseen):
                    assert owners.setdefault(block, request.slot) == request.slot
        held = {block for request in running.values() for block in request.blocks if block} | self.held_elsewhere
        assert self.scheduler.num_free_blocks + len(held) == self.num_kv_blocks - 1, (
            "a block was lost, or released twice"
        )

    def _may_write(self, request: Request, bound: int, plan: StepPlan) -> int:
        """Positions of a request that may hold something after a step of up to `bound` of its tokens, whatever stands."""
        generation, computed = self._seen[request.slot]
        assert generation == request.generation
        for planned, results, _ in self.in_flight:
            computed += sum(
                under_way
                for (slot, under_way), row in zip(planned.rows, results.rows, strict=True)
                if (slot, row.generation) == (request.slot, generation)
            )
        end = computed + bound
        num_drafts = min(plan.num_drafts, request.sampling.max_num_drafts)
        return end + (num_drafts - 1 if num_drafts and end >= self.scheduler.table.prefill_len[request.slot] - 1 else 0)


def tokens_of(plans: Sequence[StepPlan]) -> list[list[int]]:
    """At most how many tokens each row of some plans has."""
    return [[bound for _, bound in plan.rows] for plan in plans]

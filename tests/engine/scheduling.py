"""A scheduler's surroundings for tests: the engine over a device in plain Python (`exact_device`), each plan looked at."""

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import cycle

from exact_device import STOP, VOCAB, Device, answer_alone, first_seen

from stepgraph.abi import slot_line
from stepgraph.abi.block_groups import BlockGroups
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
from stepgraph.step.results import StepResults
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy
from stepgraph.transfer.base import Transfers
from stepgraph.transfer.reference import Offer, Reference


@cache
def _source() -> ModelSource:
    """A model whose weights and tokenizer nobody looks at."""
    return resolve("qwen3-0.6b", weights=False)


class Loop:
    """The engine over a device of exact integers; checks every plan.

    `step_seconds` pass with every step. Steps make up to as many proposals as `num_drafts` says in turn. All layers have the
    window and are in one block group, or there are `num_full` groups of layers that see all tokens, and others with the window.
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
        num_full: int = 0,
        num_windowed: int = 1,
        transfers: Transfers | None = None,
        transfer: TransferConfig | None = None,
        kv_events: KVEventsConfig | None = None,
        num_checkpoints: int = 0,
        **limits,
    ):
        self.config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, **limits)
        self.block_size, self.num_kv_blocks = block_size, num_kv_blocks
        self.clock, self.step_seconds = FakeClock(), step_seconds
        self.lookahead = lookahead
        max_model_len, self.num_checkpoints = 1 << 20, num_checkpoints
        reach = window + max(0, lookahead - 1) if window else 0
        self.groups = BlockGroups(num_full, num_windowed, reach) if num_full else BlockGroups.one(reach)
        self.window: int | tuple[int, ...] = (0,) * num_full + (window,) * num_windowed if num_full else window
        """As `answer_alone` takes it."""
        self._shortest = window
        self.device = Device(
            max_num_seqs,
            self.groups.num_blocks(num_kv_blocks),
            block_size,
            lookahead=lookahead,
            accuracy=accuracy,
            windows=self.window if isinstance(self.window, tuple) else (window, window),
            num_groups=self.groups.size,
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
            groups=self.groups,
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
        assert scheduler.num_free_blocks == self.groups.num_blocks(self.num_kv_blocks) - 1
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
        assert len(plan.deltas) <= shape.num_deltas(self.block_size, self.groups.size)
        assert all(bound <= 1 + plan.num_drafts for _, bound in plan.rows[plan.num_prefill_rows :])
        running = {request.slot: request for request in self.scheduler.running()}
        assert set(slots) <= set(running)
        for request in running.values():
            num_unseen = request.num_unseen
            for index, block in enumerate(request.blocks):
                is_windowed = index % self.groups.size >= self.groups.num_full
                assert (block == slot_line.NULL_BLOCK) == (is_windowed and index // self.groups.size < num_unseen)
            state = self.device.slots[request.slot]  # which may have ended: then nothing reads any more
            first = first_seen(state.computed, self._shortest)
            assert not state.active or num_unseen * self.block_size <= first, "a block is gone that a token will see"
            planned = min(
                self.scheduler.table.planned[request.slot], request.max_length - 1
            )  # it may be planned beyond its end, and then runs nothing
            assert self._room(request) >= planned
        for slot, bound in plan.rows:
            request = running[slot]
            written = min(self._may_write(request, bound, plan), request.max_length - 1)
            assert self._room(request) >= written, (request, plan)
            table = self.device.block_table | {delta[:2]: delta[2] for delta in plan.deltas}
            assert all(
                block in (table[slot, index], slot_line.NULL_BLOCK) for index, block in enumerate(request.blocks)
            )
            self.device.limits[slot] = self._room(request)
        # A block that two requests hold is one that the later found in the cache, complete before it writes.
        owners: dict[int, int] = {}
        for request in running.values():
            for index, block in enumerate(request.blocks):
                if block and index // self.groups.size >= request.num_found:
                    assert owners.setdefault(block, request.slot) == request.slot
        held = {block for request in running.values() for block in request.blocks if block} | self.held_elsewhere
        assert self.scheduler.num_free_blocks + len(held) == self.groups.num_blocks(self.num_kv_blocks) - 1, (
            "a block was lost, or released twice"
        )

    def _room(self, request: Request) -> int:
        """Tokens that its blocks hold."""
        return len(request.blocks) // self.groups.size * self.block_size

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

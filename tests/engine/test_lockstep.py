"""The scheduler of several ranks against devices in plain Python, one for each, that compute tokens from their KV entries."""

import random
from dataclasses import replace
from itertools import cycle, pairwise

import numpy as np
import pytest
from exact_device import VOCAB, Device, answer_alone

from stepgraph.abi import slot_line
from stepgraph.config import EngineConfig, GraphConfig, ParallelConfig, SchedulerConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.lockstep import LockstepScheduler
from stepgraph.engine.request import FinishReason, Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import TOKENS_OF_REQUEST, Scheduler
from stepgraph.errors import RequestError
from stepgraph.executor.fake import FakeClock, FakeExecutor, fake_specs
from stepgraph.models.source import resolve
from stepgraph.step.admission import Admission
from stepgraph.step.plan import IDLE_EPOCH, StepPlan
from stepgraph.step.results import StepResults
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy


class Ranks:
    """An engine over a device for each rank. Steps make up to as many proposals as `num_drafts` says in turn."""

    def __init__(
        self,
        num_ranks: int = 2,
        *,
        max_num_seqs: int = 4,
        max_tokens: int = 16,
        num_kv_blocks: int = 33,
        block_size: int = 4,
        run_ahead: int = 1,
        num_drafts: tuple[int, ...] = (0,),
        kv_events: KVEventsConfig | None = None,
        **limits,
    ) -> None:
        self.max_num_seqs, self.num_kv_blocks = max_num_seqs, num_kv_blocks
        self.devices = [Device(num_ranks * max_num_seqs, num_kv_blocks, block_size) for _ in range(num_ranks)]
        for device in self.devices:
            device.limits = [1 << 30] * len(device.limits)
        self.plans: list[StepPlan] = []
        self.ranks_of: dict[int, set[int]] = {}
        """By the seeds of requests: the ranks that they were admitted on."""
        config = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_tokens, **limits)
        policy = ShapePolicy.of(GraphConfig(), config, draft_levels=(max(num_drafts),))
        specs = replace(
            fake_specs(
                policy,
                vocab_size=128,
                max_model_len=1 << 20,
                num_kv_blocks=num_kv_blocks,
                block_size=block_size,
                run_ahead=run_ahead,
            ),
            draft_levels=policy.draft_levels,
            num_ranks=num_ranks,
            data_parallel_size=num_ranks,
        )
        self.executor = FakeExecutor(self, specs, policy, FakeClock(), lambda record: 0.001)
        self.engine = build_engine(
            EngineConfig(
                scheduler=config,
                parallel=ParallelConfig(data_parallel_size=num_ranks, enable_expert_parallel=True),
                kv_events=kv_events or KVEventsConfig(),
            ),
            source=resolve("qwen3-0.6b", weights=False),
            executor=self.executor,
            clock=self.executor.clock,
        )
        scheduler = self.engine.scheduler
        assert isinstance(scheduler, LockstepScheduler)
        self.scheduler = scheduler
        if num_drafts != (0,):
            turns = cycle(num_drafts)
            scheduler._choose_drafts = lambda _: next(turns)

    def rank_of(self, slot: int) -> int:
        return (slot - 1) // self.max_num_seqs

    def admit(self, admission: Admission) -> None:
        rank = self.rank_of(admission.slot)
        self.devices[rank].admit(admission)
        self.ranks_of.setdefault(admission.sampling.seed, set()).add(rank)

    def run(self, plan: StepPlan) -> StepResults:
        self.plans.append(plan)
        assert len(plan.ranks) == len(self.devices)
        assert {own.num_drafts for own in plan.ranks} == {plan.num_drafts}
        for rank, own in enumerate(plan.ranks):
            assert {self.rank_of(slot) for slot, _ in (*own.rows, *((delta[0], 0) for delta in own.deltas))} <= {rank}
        assert sorted(plan.rows) == sorted(row for own in plan.ranks for row in own.rows)
        parts = [device.run(own) for device, own in zip(self.devices, plan.ranks, strict=True)]
        width = max(part.table.shape[1] for part in parts)  # which is that of the plan on a device
        wide = [np.pad(part.table, ((0, 0), (0, width - part.table.shape[1]))) for part in parts]
        return StepResults.joined([part._replace(table=table) for part, table in zip(parts, wide, strict=True)], plan)

    def forget(self) -> None:
        for device in self.devices:
            device.forget()

    def add(self, prompt: int | list[int], max_tokens: int, *, seed: int, stop: bool = False, **rest) -> Request:
        if isinstance(prompt, int):
            prompt = [(5 * i * i + seed) % VOCAB for i in range(prompt)]
        params = SamplingParams(
            max_tokens=max_tokens,
            seed=seed,
            ignore_eos=True,
            stop_token_ids=(0,) if stop else (),
            speculative={"num_speculative_tokens": slot_line.MAX_DRAFTS},
        )
        return self.engine.add_request(str(seed), prompt, params, **rest)

    def drain(self) -> None:
        for _ in range(5000):
            if not self.engine.has_work:
                return
            self.engine.step()
        raise AssertionError("the requests never end")

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """Of each step: rows of each rank."""
        return [tuple(len(own.rows) for own in plan.ranks) for plan in self.plans]


@pytest.mark.parametrize("seed", range(6))
def test_random_requests_get_the_tokens_that_they_get_alone(seed) -> None:
    rng = random.Random(seed)
    ranks = Ranks(
        rng.choice([2, 3, 4]),
        max_num_seqs=rng.randint(1, 4),
        max_tokens=rng.choice([4, 9, 16]),
        num_kv_blocks=rng.choice([18, 24, 40]),
        run_ahead=rng.choice([0, 1, 2]),
        num_drafts=rng.choice([(0,), (3,), (0, 2, 3)]),
        insertion_policy=rng.choice(["dynamic", "gather"]),
    )
    requests, aborted = [], set()
    for step in range(250):
        if step < 200 and rng.random() < 0.3:
            for _ in range(rng.choice([1, 1, 4])):
                requests.append(
                    ranks.add(
                        [(i + rng.choice([0, 0, 1])) % VOCAB for i in range(rng.randint(1, 40))],
                        rng.randint(1, 24),
                        seed=len(requests),
                        stop=rng.random() < 0.3,
                        priority=rng.choice([0, 0, 1]),
                    )
                )
        if requests and rng.random() < 0.05:
            request = rng.choice(requests)
            if ranks.engine.abort(request.id) is not None:
                aborted.add(request.id)
        if rng.random() < 0.01:
            ranks.engine.reset_prefix_cache(preempt=rng.random() < 0.5)
        ranks.engine.step()
        if not ranks.engine.has_work:
            ranks.executor.clock.now += 1.0
    while ranks.engine.has_work:
        ranks.engine.step()
        ranks.executor.clock.now += 0.001
    assert len(requests) > 30
    for request in requests:
        assert request.finish_reason is not None
        answer = answer_alone(request)
        if request.id in aborted:
            answer = answer[: len(request.output_token_ids)]
        assert request.output_token_ids == answer
    assert {len(places) for places in ranks.ranks_of.values()} == {1}, "a request goes on where it has run"
    assert {rank for places in ranks.ranks_of.values() for rank in places} == set(range(len(ranks.devices)))
    assert [plan.epoch for plan in ranks.plans] == sorted(plan.epoch for plan in ranks.plans)
    by_epoch: dict[int, StepPlan] = {}
    for plan in ranks.plans:
        rows_alone = replace(plan, ranks=tuple(replace(own, deltas=()) for own in plan.ranks))
        assert by_epoch.setdefault(plan.epoch, rows_alone) == rows_alone, "what is known of one holds for all"
    scheduler = ranks.scheduler
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.kv_usage) == (0, 0, 0.0)
    assert [rank.load for rank in scheduler.ranks] == [0] * len(scheduler.ranks)
    assert scheduler.statistics.prompt_tokens >= sum(r.prompt_len for r in requests if r.id not in aborted)


def test_a_rank_without_requests_runs_nothing_for_a_thousand_steps_and_costs_nothing_new() -> None:
    ranks = Ranks(3, num_kv_blocks=300)
    request = ranks.add(5, 1000, seed=1)
    ranks.drain()
    assert request.output_token_ids == answer_alone(request)
    assert set(ranks.rows) == {(1, 0, 0)}
    assert {own.epoch for plan in ranks.plans for own in plan.ranks[1:]} == {IDLE_EPOCH}
    assert (
        len({plan.epoch for plan in ranks.plans}) <= 3
    )  # the prompt, its decodes, and how these were planned at first
    unchanged = [a is b for a, b in pairwise(ranks.plans)]
    assert sum(unchanged) > 450  # of four steps, one needs a block, and another follows it


def test_all_ranks_run_the_shape_of_the_one_with_most_to_do() -> None:
    ranks = Ranks(2, max_tokens=16)
    ranks.add(16, 2, seed=1)
    ranks.add(3, 3, seed=2)
    ranks.drain()
    records = list(ranks.executor.statistics.recent)
    assert (records[0].num_tokens, records[0].num_rows, records[0].num_ranks) == (19, 2, 2)
    assert (records[0].shape, records[0].padding_tokens) == (StepShape(16, 1), 13)
    assert records[1].shape == StepShape(1, 1)
    statistics = ranks.executor.statistics
    assert statistics.padding_tokens == sum(record.padding_tokens for record in records)


def test_requests_go_where_there_is_least_to_do() -> None:
    ranks = Ranks(3)
    for seed in range(6):
        ranks.add(4, 4, seed=seed)
    ranks.engine.step()
    assert ranks.rows == [(2, 2, 2)]


def test_a_long_prompt_that_waits_counts_as_several_requests() -> None:
    ranks = Ranks(2, num_kv_blocks=300)
    ranks.add(2 * TOKENS_OF_REQUEST, 4, seed=0)
    for seed in range(1, 4):
        ranks.add([seed] * 5, 4, seed=seed)
    assert [len(rank.requests) for rank in ranks.scheduler.ranks] == [1, 3]
    ranks.drain()


def test_a_request_goes_to_its_prefix_as_far_as_that_saves_more_than_waiting_costs() -> None:
    ranks = Ranks(2, num_kv_blocks=600, max_num_seqs=8)
    prompt = [i % VOCAB for i in range(3 * TOKENS_OF_REQUEST)]
    ranks.add(prompt, 200, seed=0)
    while not ranks.scheduler.ranks[0].num_running or ranks.scheduler.ranks[0]._stages() != [1]:
        ranks.engine.step()
    followers, places = [], []
    for seed in range(1, 5):
        followers.append(ranks.add([*prompt, seed], 200, seed=seed))
        places.append([rank.has(str(seed)) for rank in ranks.scheduler.ranks].index(True))
        for _ in range(2):
            ranks.engine.step()
    assert places == [0, 0, 0, 1]  # the third is as cheap as on the other rank
    ranks.drain()
    assert followers[0].num_cached_tokens == len(prompt)


def test_who_waits_for_room_goes_to_a_rank_that_has_some() -> None:
    ranks = Ranks(2, max_num_seqs=1)
    long, short, waiting = ranks.add(3, 60, seed=0), ranks.add(3, 2, seed=1), ranks.add(3, 60, seed=2)
    assert [rank.num_waiting for rank in ranks.scheduler.ranks] == [2, 1]
    while short.finish_reason is None:
        ranks.engine.step()
    for _ in range(4):
        ranks.engine.step()
    assert long.finish_reason is None
    assert ranks.ranks_of[2] == {1}
    ranks.drain()
    assert [r.output_token_ids for r in (long, waiting)] == [answer_alone(r) for r in (long, waiting)]


def test_nobody_moves_where_there_is_no_room_either() -> None:
    ranks = Ranks(2, max_num_seqs=2, num_kv_blocks=18, max_tokens=64)
    for seed in range(2):
        ranks.add(60, 8, seed=seed)
    ranks.engine.step()
    waiting = ranks.add(40, 2, seed=2)
    for _ in range(5):
        ranks.engine.step()
    assert waiting.slot is None
    assert waiting.arrival == 2, "it has kept its place"
    ranks.drain()
    assert waiting.output_token_ids == answer_alone(waiting)


def test_names_limits_and_ends_are_those_of_all_ranks() -> None:
    ranks = Ranks(2, max_num_seqs=2)
    requests = [ranks.add(3, 50, seed=seed) for seed in range(4)]
    for seed in range(4):
        with pytest.raises(RequestError, match=f"request id '{seed}' is in use"):
            ranks.add(3, 2, seed=seed)
    with pytest.raises(RequestError, match="needs KV blocks for 1001 tokens"):
        ranks.add(2, 1000, seed=9)
    ranks.engine.step()
    scheduler = ranks.scheduler
    assert (scheduler.num_running, len(scheduler.requests)) == (4, 4)
    assert scheduler.kv_usage == pytest.approx(2 / 32)
    assert ranks.engine.abort("9") is None
    for request in requests:
        update = ranks.engine.abort(request.id)
        assert update is not None
        assert update.finish_reason is FinishReason.ABORT
    assert not scheduler.has_requests
    ranks.drain()


def test_time_passes_until_the_first_rank_has_work() -> None:
    ranks = Ranks(2, insertion_policy="gather", prefill_gather_size=4, prefill_gather_ms=50)
    assert ranks.engine.seconds_until_work is None
    ranks.add(3, 2, seed=0)
    ranks.executor.clock.now += 0.02
    ranks.add(3, 2, seed=1)
    assert ranks.engine.seconds_until_work == pytest.approx(0.03)
    ranks.executor.clock.now += 0.031
    ranks.engine.step()
    assert ranks.rows == [(1, 0)]
    assert ranks.engine.seconds_until_work is None
    for _ in range(200):
        ranks.engine.step()
        ranks.executor.clock.now += 0.001
    assert not ranks.engine.has_work


def test_a_scheduler_that_numbers_its_slots_from_elsewhere_uses_no_other() -> None:
    scheduler = Scheduler(
        SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8),
        max_tokens=8,
        num_kv_blocks=9,
        block_size=4,
        token_sizes=(8,),
        first_slot=6,
    )
    ranks = Ranks(2)
    requests = [ranks.add(2, 2, seed=seed) for seed in range(3)]
    for request in requests:
        ranks.engine.abort(request.id)
        scheduler.add(request)
    step = scheduler.schedule()
    assert step is not None
    assert sorted(slot for slot, _ in step.plan.rows) == [7, 8]

"""What the scheduler costs the host: microseconds of `schedule` and `reconcile` per step, on this machine.

CPU time of the thread, which other work on the machine changes less than the time on the wall.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, TypeVar

import numpy as np

from stepgraph.bench.counting_device import BLOCK_SIZE, CountingDevice, engine_over
from stepgraph.bench.workloads import VOCAB_SIZE
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.engine.request import Request, StepUpdates
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler
from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.step.results import StepResults

NUM_RUNNING = (1, 8, 64, 256, 1024)
NUM_WAITING = 10_000
_ENDLESS = 4000  # tokens, more than any case takes steps
_PROMPT = 128  # tokens of a prompt that arrives, or waits
_TIMED_STEPS = 200

Result = TypeVar("Result")


@dataclass(frozen=True)
class HostCost:
    """Of one case, per step."""

    case: str
    rows: float  # of a step, on average
    schedule_us: float  # median
    reconcile_us: float
    mean_us: float  # of both together; above the medians where few steps do most of the work
    add_us: float | None = None  # per request that arrives, median


def measure_costs() -> list[HostCost]:
    """All cases."""
    costs = [_Case(n, n).measure(f"{n} decoding") for n in NUM_RUNNING]
    costs += [
        _Case(n, n - 2).measure(f"{n - 2} decoding, a prompt arrives", arrive_each_step=True) for n in NUM_RUNNING[1:]
    ]
    waiting = f"{NUM_WAITING:,} waiting"
    full = _Case(64, 64)
    full.add_waiting()
    costs.append(full.measure(f"64 decoding, {waiting}"))
    for name, priorities, limits in (
        ("one enters each step", 1, {}),
        ("likewise, 2 priorities", 2, {}),
        ("likewise, gathered", 1, {"insertion_policy": "gather", "prefill_gather_ms": 0.0}),
    ):
        case = _Case(64, 62, **limits)
        case.add_waiting(num_priorities=priorities)
        costs.append(case.measure(f"{waiting}, {name}"))
    return costs


class _TimedScheduler(Scheduler):
    """Notes what its last calls took, in µs of CPU time."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.add_us = self.schedule_us = self.reconcile_us = 0.0

    def add(self, request: Request) -> None:
        add = super().add
        _, self.add_us = _timed(lambda: add(request))

    def schedule(self) -> ScheduledStep | None:
        scheduled, self.schedule_us = _timed(super().schedule)
        return scheduled

    def reconcile(self, step: ScheduledStep, results: StepResults) -> StepUpdates:
        reconcile = super().reconcile
        updates, self.reconcile_us = _timed(lambda: reconcile(step, results))
        return updates


class _Case:
    """An engine with requests that decode without end."""

    def __init__(self, num_slots: int, num_decoding: int, **limits: object):
        config = SchedulerConfig(max_num_seqs=num_slots, **limits)  # type: ignore[arg-type]
        self._engine, _ = engine_over(
            CountingDevice(num_slots),
            config,
            GraphConfig(),
            num_kv_blocks=2 + num_slots * (2 + _ENDLESS // BLOCK_SIZE),
            max_model_len=_PROMPT + _ENDLESS,
            create_scheduler=_TimedScheduler,
        )
        self._prompts = self._generate_prompts()
        self._num_added = 0
        self._add_us: list[float] = []
        for index in range(num_decoding):  # of different lengths, so that their block borders fall into different steps
            self._add(1 + index % BLOCK_SIZE, _ENDLESS)
        while self._engine.scheduler.num_running < num_decoding:
            self._engine.step()
        for _ in range(20):
            self._engine.step()

    def add_waiting(self, *, num_priorities: int = 1) -> None:
        """Queue prompts whose answers are one token; those that come later have the better priorities."""
        for index in range(NUM_WAITING):
            self._add(_PROMPT, 1, priority=-(index * num_priorities // NUM_WAITING))

    def measure(self, name: str, *, arrive_each_step: bool = False) -> HostCost:
        timed = []
        rows = []
        for _ in range(_TIMED_STEPS):
            if arrive_each_step:
                self._add(_PROMPT, 1)
            schedule_us, reconcile_us, num_rows = self._step()
            timed.append((schedule_us, reconcile_us))
            rows.append(num_rows)
        return HostCost(
            name,
            mean(rows),
            median(schedule for schedule, _ in timed),
            median(reconcile for _, reconcile in timed),
            mean(map(sum, timed)),
            median(self._add_us) if len(self._add_us) >= _TIMED_STEPS else None,
        )

    def _add(self, prompt_len: int, answer_len: int, priority: int = 0) -> None:
        self._num_added += 1
        params = SamplingParams(max_tokens=answer_len, ignore_eos=True)
        prompt = next(self._prompts)[:prompt_len]
        self._engine.add_request(str(self._num_added), prompt, params, priority=priority)
        if answer_len == 1:
            self._add_us.append(self._scheduler.add_us)

    def _step(self) -> tuple[float, float, int]:
        self._engine.step()
        scheduler = self._scheduler
        return scheduler.schedule_us, scheduler.reconcile_us, self._engine.executor.statistics.recent[-1].num_rows

    @property
    def _scheduler(self) -> _TimedScheduler:
        assert isinstance(self._engine.scheduler, _TimedScheduler)
        return self._engine.scheduler

    def _generate_prompts(self) -> Iterator[list[int]]:
        generator = np.random.default_rng(0)
        while True:
            yield generator.integers(VOCAB_SIZE, size=_PROMPT).tolist()


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    started = time.thread_time()
    value = call()
    return value, 1e6 * (time.thread_time() - started)

"""The real engine before a simulated device: no model, no tensors, a clock that a formula moves, one step of run-ahead.

What the scheduler promises is watched from outside, by counts of its own: see `Watch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, quantiles
from typing import Protocol

from stepgraph.bench.counting_device import BLOCK_SIZE, CountingDevice, engine_over
from stepgraph.bench.workloads import Arrival, Lengths
from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import WATERMARK, Scheduler
from stepgraph.engine.step_draft import ScheduledStep
from stepgraph.engine.waiting import MAX_OVERTAKEN
from stepgraph.step.log import StepRecord
from stepgraph.step.shape_policy import ShapePolicy

_LEAST_WAIT_S = 1e-6  # a shorter one may be lost to rounding, and time stand still


class StepTime(Protocol):
    """What a step costs."""

    def seconds(self, num_tokens: int, num_rows: int) -> float:
        """Of a step of these sizes."""


@dataclass(frozen=True)
class AffineStepTime:
    """Time of a step, affine in its captured sizes. `base_ms` is the floor that reading the weights and launching set."""

    base_ms: float
    ms_per_token: float
    ms_per_row: float

    def seconds(self, num_tokens: int, num_rows: int) -> float:
        return (self.base_ms + self.ms_per_token * num_tokens + self.ms_per_row * num_rows) / 1e3


QWEN3_0_6B_ON_H100 = AffineStepTime(base_ms=1.146, ms_per_token=0.00190, ms_per_row=0.0098)
"""Least squares of relative errors over the ten steps in benchmarks/results/h100-graphs-qwen3-0.6b.json; within 11 % of each."""


@dataclass(frozen=True)
class Scenario:
    """What a trace runs on.

    `snapping` off hides the captured sizes from the scheduler, so that it cuts no chunk to them.
    """

    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    num_kv_blocks: int = 16_385
    snapping: bool = True
    step_time: StepTime = QWEN3_0_6B_ON_H100

    def requests_per_s(self, lengths: Lengths) -> float:
        """About how many requests the device can serve when all slots that the KV cache can feed are busy: load 1."""
        prompt, answer = lengths.mean_prompt, lengths.mean_answer
        config = self.config
        num_rows = min(config.max_num_seqs, (self.num_kv_blocks - 1) * BLOCK_SIZE / (prompt + answer / 2))
        num_rows = min(num_rows, config.max_num_batched_tokens / (1 + prompt / answer))
        num_tokens = num_rows * (1 + prompt / answer)
        return num_rows / answer / self.step_time.seconds(round(num_tokens), round(num_rows))


@dataclass(frozen=True)
class Served:
    """How one request fared, in seconds."""

    queue_s: float  # from its arrival to its first slot
    first_token_s: float  # from its arrival to its first token on the host
    total_s: float  # from its arrival to its last
    alone_s: float  # the same on an idle device

    @property
    def slowdown(self) -> float:
        return self.total_s / self.alone_s


@dataclass
class ShapeUse:
    """What the steps of one captured token count ran."""

    steps: int = 0
    planned_tokens: int = 0
    real_tokens: int = 0
    """Of the planned ones, those of requests that had not ended; the others were planned ahead of their end."""

    def padding(self, size: int) -> float:
        """Share of its tokens that are padding."""
        return 1 - self.planned_tokens / (self.steps * size)


@dataclass
class Simulation:
    """What a trace came to."""

    served: list[Served] = field(default_factory=list)
    uses: dict[int, ShapeUse] = field(default_factory=dict)
    """By captured token count."""
    busy_s: float = 0.0
    """Of the device, at captured sizes."""
    unpadded_s: float = 0.0
    """The same steps at their exact sizes."""
    seconds: float = 0.0
    num_rows: int = 0
    """Over all steps."""
    captured_rows: int = 0
    """Likewise, padding included."""
    snapped: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    most_overtaken: int = 0
    longest_idle_s: float = 0.0
    longest_idle_steps: int = 0
    broken: list[str] = field(default_factory=list)
    """Promises that were not kept."""

    @property
    def steps(self) -> int:
        return sum(use.steps for use in self.uses.values())

    @property
    def planned_tokens(self) -> int:
        return sum(use.planned_tokens for use in self.uses.values())

    @property
    def real_tokens(self) -> int:
        return sum(use.real_tokens for use in self.uses.values())

    @property
    def captured_tokens(self) -> int:
        return sum(size * use.steps for size, use in self.uses.items())

    @property
    def padding(self) -> float:
        """Share of the computed tokens that are padding."""
        return 1 - self.planned_tokens / max(1, self.captured_tokens)

    @property
    def padding_time(self) -> float:
        """Share of the device's time that padding costs, of tokens and of rows."""
        return 1 - self.unpadded_s / self.busy_s if self.busy_s else 0.0

    @property
    def run_ahead_waste(self) -> float:
        """Share of the computed tokens that were planned for requests which had ended."""
        return (self.planned_tokens - self.real_tokens) / max(1, self.captured_tokens)

    @property
    def fairness(self) -> float:
        """Jain's index of the slowdowns: 1 if all are slowed down alike, 1/n if one bears it all."""
        slowdowns = [request.slowdown for request in self.served]
        return sum(slowdowns) ** 2 / (len(slowdowns) * sum(s * s for s in slowdowns)) if slowdowns else 0.0

    def percentile(self, what: str, percent: int) -> float:
        """Of a field of `Served`."""
        values = [getattr(request, what) for request in self.served]
        return quantiles(values, n=100, method="inclusive")[percent - 1] if len(values) > 1 else mean(values or [0.0])


def simulate(
    trace: Sequence[Arrival],
    scenario: Scenario,
    *,
    create_scheduler: type[Scheduler] = Scheduler,
) -> Simulation:
    """Serve a trace, and watch over what the scheduler promises.

    Args:
        trace: by arrival.
        scenario: limits and step time.
        create_scheduler: stands in for the scheduler.
    """
    return _Loop(trace, scenario, create_scheduler).run()


class _Loop:
    def __init__(self, trace: Sequence[Arrival], scenario: Scenario, create_scheduler: type[Scheduler]):
        config = scenario.config
        self._trace, self._scenario = trace, scenario
        self._shapes = ShapePolicy.of(scenario.graph, config)
        self._device = CountingDevice(config.max_num_seqs, [arrival.answer_len for arrival in trace])
        self._engine, self._executor = engine_over(
            self._device,
            config,
            scenario.graph,
            num_kv_blocks=scenario.num_kv_blocks,
            max_model_len=1 + max((len(a.prompt_token_ids) + a.max_tokens for a in trace), default=1),
            token_sizes=None if scenario.snapping else tuple(range(1, config.max_num_batched_tokens + 1)),
            step_seconds=self._account,
            create_scheduler=_watched(create_scheduler, self._after_schedule),
        )
        self._clock = self._executor.clock
        self._result = Simulation()
        scheduler = self._engine.scheduler
        assert isinstance(scheduler, Scheduler)
        self._watch = Watch(scheduler, scenario, may_overtake=len({a.priority for a in trace}) > 1)
        self._requests: list[Request] = []  # in the order of the trace
        self._first_token: dict[str, float] = {}

    def run(self) -> Simulation:
        result, engine = self._result, self._engine
        most_steps = 100 + 4 * sum(len(a.prompt_token_ids) + a.answer_len for a in self._trace)
        while (len(self._requests) < len(self._trace) or engine.has_work) and result.steps <= most_steps:
            self._add_arrived()
            had_rest = not self._executor.num_in_flight
            self._take(engine.step())
            if had_rest and not self._executor.num_in_flight and not self._sleep():
                break
        self._watch.at_the_end(self._requests, result)
        result.seconds = self._clock.now
        result.snapped = sum(request.was_snapped for request in self._requests)
        statistics = engine.scheduler.statistics
        result.preemptions = statistics.preemptions
        result.prompt_tokens, result.cached_prompt_tokens = statistics.prompt_tokens, statistics.cached_prompt_tokens
        return result

    def _add_arrived(self) -> None:
        while len(self._requests) < len(self._trace) and self._trace[len(self._requests)].at_s <= self._clock.now:
            index = len(self._requests)
            arrival = self._trace[index]
            params = SamplingParams(max_tokens=arrival.max_tokens, seed=index, ignore_eos=True)
            request = self._engine.add_request(str(index), arrival.prompt_token_ids, params, priority=arrival.priority)
            self._requests.append(request)
            self._watch.after_add(request)

    def _after_schedule(self, scheduled: ScheduledStep | None) -> None:
        self._watch.after_schedule(scheduled, self._clock.now)

    def _account(self, record: StepRecord) -> float:
        """Note a step; returns its seconds."""
        result, step_time, shape = self._result, self._scenario.step_time, record.shape
        use = result.uses.setdefault(shape.num_tokens, ShapeUse())
        use.steps += 1
        use.planned_tokens += record.num_tokens
        use.real_tokens += self._device.real_tokens
        seconds = step_time.seconds(shape.num_tokens, shape.num_rows)
        result.num_rows += record.num_rows
        result.captured_rows += shape.num_rows
        result.busy_s += seconds
        result.unpadded_s += step_time.seconds(record.num_tokens, record.num_rows)
        return seconds

    def _take(self, updates: Sequence[RequestUpdate]) -> None:
        for request, _, finish_reason in updates:
            self._first_token.setdefault(request.id, self._clock.now)
            if finish_reason is not None:
                self._watch.after_finish(request)
                arrival = self._trace[int(request.id)]
                assert request.admitted_at is not None
                self._result.served.append(
                    Served(
                        queue_s=request.admitted_at - arrival.at_s,
                        first_token_s=self._first_token[request.id] - arrival.at_s,
                        total_s=self._clock.now - arrival.at_s,
                        alone_s=self._seconds_alone(request.prompt_len, arrival.answer_len),
                    )
                )

    def _seconds_alone(self, prompt_len: int, answer_len: int) -> float:
        most, step_time = self._scenario.config.max_num_batched_tokens, self._scenario.step_time
        whole, rest = divmod(prompt_len, most)
        chunks = [most] * whole + [rest] * bool(rest)
        shapes = Counter(self._shapes.round_up(chunk, 1) for chunk in chunks)
        shapes[self._shapes.round_up(1, 1)] += answer_len - 1
        return sum(count * step_time.seconds(shape.num_tokens, shape.num_rows) for shape, count in shapes.items())

    def _sleep(self) -> bool:
        """Let time pass until there may be work; False if there never will be."""
        times = []
        if len(self._requests) < len(self._trace):
            times.append(self._trace[len(self._requests)].at_s)
        seconds = self._engine.seconds_until_work
        if seconds is not None:
            times.append(self._clock.now + max(seconds, _LEAST_WAIT_S))
        if not times:
            return False
        self._clock.now = max(self._clock.now, min(times))
        return True


def _watched(kind: type[Scheduler], after_schedule: Callable[[ScheduledStep | None], None]) -> type[Scheduler]:
    """A scheduler of some kind that shows each step it plans, and that it plans none."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def schedule(self) -> ScheduledStep | None:
            scheduled = super().schedule()
            after_schedule(scheduled)
            return scheduled

    return Watched


class Watch:
    """Sees, from outside, whether the scheduler keeps its promises:

    - every request gets its whole answer;
    - nobody is overtaken by more than `MAX_OVERTAKEN` later arrivals, and by none if there are neither priorities nor limits
      on long prompts;
    - nobody waits where it could run: the next in turn enters at once if a slot, KV blocks and tokens are left, and one step
      later if only the step itself left them or made it the next: by a preemption, a cut prompt, the end of a long prompt,
      or an admission that overtook it once too often;
    - prompts gather no longer than each but the last may wait for the next: `prefill_gather_ms`, and a step;
    - who runs has a row in every step, unless blocks, tokens or the results of its last token are lacking;
    - in the end all blocks are free.
    """

    def __init__(self, scheduler: Scheduler, scenario: Scenario, *, may_overtake: bool):
        config = scenario.config
        self._scheduler, self._config = scheduler, config
        self._num_blocks = scenario.num_kv_blocks - 1
        self._watermark = int(self._num_blocks * WATERMARK)
        step_s = scenario.step_time.seconds(config.max_num_batched_tokens, config.max_num_seqs)
        # Each may arrive during the step before the one that would have let those before it enter.
        self._longest_gathering_s = (config.prefill_gather_size - 1) * (config.prefill_gather_ms / 1e3 + step_s)
        self._bound = MAX_OVERTAKEN if may_overtake or config.long_prefill_token_threshold else 0
        self._waiting: dict[int, Request] = {}  # by number of arrival
        self._running: dict[int, Request] = {}
        self._overtaken: Counter[int] = Counter()
        self._snapped: set[int] = set()
        self._partial: set[int] = set()
        self._preemptions = 0
        self._idle_since: float | None = None
        self._idle: Request | None = None
        self._idle_steps = 0  # of that request
        self._longest_idle_s = 0.0
        self._longest_idle_steps = 0
        self._broken: Counter[str] = Counter()

    def after_add(self, request: Request) -> None:
        self._waiting[request.arrival] = request

    def after_finish(self, request: Request) -> None:
        self._running.pop(request.arrival, None)
        self._waiting.pop(request.arrival, None)

    def after_schedule(self, scheduled: ScheduledStep | None, now: float) -> None:
        was_preempted = self._scheduler.statistics.preemptions > self._preemptions
        self._preemptions = self._scheduler.statistics.preemptions
        if was_preempted:
            for request in [r for r in self._running.values() if r.slot is None]:
                self._waiting[request.arrival] = self._running.pop(request.arrival)
        is_excused = was_preempted
        for request in scheduled.admitted if scheduled else ():
            self._running[request.arrival] = self._waiting.pop(request.arrival)
            for arrival in self._waiting:
                if arrival < request.arrival:
                    self._overtaken[arrival] += 1
                    is_excused |= self._overtaken[arrival] == MAX_OVERTAKEN
        tokens_left = self._config.max_num_batched_tokens - (scheduled.plan.num_tokens if scheduled else 0)
        if scheduled is not None and scheduled.plan.num_prefill_rows:
            is_excused |= self._watch_prompts(scheduled)
        self._check_rows(scheduled, tokens_left, was_preempted)
        self._check_waiting(tokens_left, is_excused, now)

    def at_the_end(self, requests: Sequence[Request], result: Simulation) -> None:
        """Add what was seen to `result`."""
        unfinished = sum(request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH) for request in requests)
        if unfinished or len(result.served) != len(requests):
            self._broken["a request never got its whole answer"] += unfinished
        elif self._scheduler.num_free_blocks != self._num_blocks:
            self._broken["KV blocks are held by nobody's request"] += 1
        result.most_overtaken = max(self._overtaken.values(), default=0)
        if result.most_overtaken > self._bound:
            self._broken[f"a request was overtaken {result.most_overtaken} times, more than {self._bound}"] += 1
        result.longest_idle_s, result.longest_idle_steps = self._longest_idle_s, self._longest_idle_steps
        result.broken = [f"{what} ({count} times)" for what, count in self._broken.items()]

    def _watch_prompts(self, scheduled: ScheduledStep) -> bool:
        """Whether a step with prompts made room that it cannot give away itself: it cut a prompt to a captured size, or
        completed a long one that counted when others were refused."""
        snapped = {request.arrival for request in self._running.values() if request.was_snapped}
        partial = {r.arrival for r in self._running.values() if self._scheduler.is_prefilling(r)}
        completed = (self._partial | {request.arrival for request in scheduled.admitted}) - partial
        made_room = not snapped <= self._snapped or any(
            self._is_long(self._running[arrival]) for arrival in completed if arrival in self._running
        )
        self._snapped, self._partial = self._snapped | snapped, partial
        return made_room

    def _check_rows(self, scheduled: ScheduledStep | None, tokens_left: int, was_preempted: bool) -> None:
        rows = {slot for slot, _ in scheduled.plan.rows} if scheduled else set()
        if len(rows) == len(self._running) or was_preempted or not self._scheduler.num_free_blocks:
            return
        table = self._scheduler.table
        for request in self._running.values():
            slot = request.slot
            assert slot is not None
            may_run = table.planned[slot] < max(table.prefill_len[slot], table.end[slot])
            if slot not in rows and may_run and tokens_left:
                self._broken["a running request was left out of a step that had room"] += 1

    def _check_waiting(self, tokens_left: int, is_excused: bool, now: float) -> None:
        """Whether the next in turn waits though it could run. `is_excused`: only the step itself made that so."""
        has_room = tokens_left and len(self._running) < self._config.max_num_seqs
        idle = self._next_that_could_run(tokens_left) if self._waiting and has_room else None
        if idle is None:
            self._idle, self._idle_since = None, None
            return
        if self._idle_since is None:
            self._idle_since = now
        self._idle_steps = self._idle_steps + 1 if idle is self._idle else 1
        self._idle = idle
        idle_s = now - self._idle_since
        self._longest_idle_s = max(self._longest_idle_s, idle_s)
        if self._config.insertion_policy == "gather":
            if idle_s > self._longest_gathering_s and not is_excused:
                self._broken["prompts gathered for longer than they may"] += 1
            return
        self._longest_idle_steps = max(self._longest_idle_steps, self._idle_steps)
        if not is_excused:
            self._broken["a request waits though it could run"] += 1
        elif self._idle_steps > 1:
            self._broken["a request waits for more than one step though it could run"] += 1

    def _next_that_could_run(self, tokens_left: int) -> Request | None:
        """The next in turn, if nothing that can be seen keeps it from running."""
        config = self._config
        partial = [request for request in self._running.values() if self._scheduler.is_prefilling(request)]
        long_is_running = sum(map(self._is_long, partial)) >= config.max_long_partial_prefills
        in_turn = min(self._waiting.values(), key=self._turn)
        if not self._is_overdue(in_turn):
            able = [r for r in self._waiting.values() if not (long_is_running and self._is_long(r))]
            if not able:
                return None
            in_turn = min(able, key=self._turn)
        elif long_is_running and self._is_long(in_turn):
            return None
        num_blocks = -(-in_turn.num_known // BLOCK_SIZE)  # without what the prefix cache may hold
        has_blocks = num_blocks <= self._scheduler.num_free_blocks - self._watermark
        may_start = in_turn.num_known <= tokens_left or len(partial) < config.max_num_partial_prefills
        return in_turn if has_blocks and may_start else None

    def _turn(self, request: Request) -> tuple[bool, int, int]:
        overdue = self._is_overdue(request)
        return not overdue, 0 if overdue else request.priority, request.arrival

    def _is_overdue(self, request: Request) -> bool:
        # By its own count, which holds preemptions for later arrivals: who caused one is not seen from outside.
        return request.overtaken >= MAX_OVERTAKEN

    def _is_long(self, request: Request) -> bool:
        return 0 < self._config.long_prefill_token_threshold < request.prompt_len

"""What somebody who watches an engine sees: its steps, who took part in them, and what became of these requests.

An engine that nobody watches does nothing for it: `StepRecorder` puts itself behind `Engine.on_step` when it begins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from stepgraph.abi import slot_line
from stepgraph.engine.request import FinishReason

if TYPE_CHECKING:
    from stepgraph.engine.engine import Engine
    from stepgraph.engine.reports import StepReport
    from stepgraph.engine.request import Request

MAX_STEPS = 10_000
"""Steps that are kept for whoever reads them; older ones make way."""
_BATCH = 64
"""Steps are looked at so many at a time, or when they are taken: one by one, each would find the processor's caches cold."""
_REFRESH_S = 1.0
"""A request of which nothing but the number of its tokens has changed is told so often."""


class SeenStep(NamedTuple):
    """One step as it ran. Times are seconds of `time.monotonic()`, durations microseconds."""

    kind: str
    graph: str | None
    """Sizes and variant of the graph that it was a launch of, see `StepShape`; None if it ran without."""
    reason: str | None
    """Why it ran without a graph."""
    captured: bool
    """Its graph was captured for it, which took longer than the step."""
    tokens: int
    rows: int
    padding: int
    """Tokens computed for nothing."""
    ranks: int
    """That ran rows of their own; tokens, rows and padding are those of all."""
    proposed: int
    """Proposals that it verified."""
    accepted: int
    plan_start: float
    plan_us: float
    """Of the host: planning and, where that is not computing it, launching it."""
    start: float
    device_us: float
    """From `start` until its results were there; `start` is its launch, or the end of the step before if that was later."""
    read_us: float
    """Of the host, behind that: taking in the results."""
    prompts: int
    """The first so many rows are chunks of prompts."""
    ids: list[int]
    """Of each row, the request's number; 0 for none that is known."""
    gained: list[int]
    """Of each row, tokens: of a chunk those that it computed, of others those that the request gained."""


class SeenRequest(NamedTuple):
    """A request as it is now. Times are seconds of `time.monotonic()`, None if it has not come so far or that was not seen."""

    id: int
    """Its number in `SeenStep.ids`."""
    name: str
    arrived: float | None
    scheduled: float | None
    """When it first got a slot."""
    first_token: float | None
    finished: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    state: str
    """waiting, running or finished."""
    finish_reason: str | None


def step_entry(step: SeenStep, number: int, engine: int = 0) -> dict[str, Any]:
    """A step as JSON has it: with its number and its engine's, rows in pairs, and to the nanosecond."""
    fields = step._asdict()
    for name in ("plan_start", "start"):
        fields[name] = round(fields[name], 9)
    for name in ("plan_us", "device_us", "read_us"):
        fields[name] = round(fields[name], 3)
    pairs = list(zip(fields.pop("ids"), fields.pop("gained"), strict=True))
    return {
        "n": number,
        "engine": engine,
        **fields,
        "host_us": round(step.plan_us + step.read_us, 3),
        "requests": pairs,
    }


class _Life:
    """A request since it was first seen."""

    __slots__ = ("ended_at", "first_token_at", "knows_first", "number", "request", "state", "told_at")

    def __init__(self, number: int, request: Request, *, knows_first: bool):
        self.number, self.request = number, request
        self.first_token_at: float | None = None
        self.knows_first = knows_first
        """False: its first token came before."""
        self.ended_at: float | None = None
        self.state, self.told_at = "", 0.0
        """What was told last, and when."""

    def news(self, now: float) -> SeenRequest:
        """What is to be told of it."""
        request = self.request
        reason = request.finish_reason
        self.state = _FINISHED if reason is not None else _RUNNING if request.slot is not None else _WAITING
        self.told_at = now
        return SeenRequest(
            self.number,
            request.id,
            request.arrived_at,
            request.admitted_at,
            self.first_token_at,
            None if reason is None else now if self.ended_at is None else self.ended_at,
            request.prompt_len,
            request.num_cached_tokens,
            len(request.output_token_ids),
            request.num_preemptions,
            self.state,
            None if reason is None else str(reason),
        )


class StepRecorder:
    """Notes the steps that are launched from now on, until `end`. Belongs to the engine's thread.

    Args:
        engine: the one to watch.
        numbers: for the requests, each another.
        max_steps: kept between two calls of `take`.
        clock: the engine's.
    """

    def __init__(
        self,
        engine: Engine,
        numbers: Iterator[int],
        *,
        max_steps: int = MAX_STEPS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._engine = engine
        self._numbers = numbers
        self._clock = clock
        self._reports: list[StepReport] = []  # that have not been looked at
        self._steps: deque[SeenStep] = deque(maxlen=max_steps)
        self._num_dropped = 0
        self._lives: dict[Request, _Life] = {}  # of those that a step may still name
        self._changed: dict[_Life, None] = {}  # since they were told
        self._ended: deque[_Life] = deque()  # as is told
        self._by_slot: dict[int, int] = {}  # number of the request that had a slot last
        self._epoch: int | None = None
        self._ids: list[int] = []  # of its steps' rows
        self._speculates = max(engine.executor.specs.draft_levels) > 0
        self._began_at = self._refreshed_at = self._last_start = clock()
        for request in engine.scheduler.requests:
            life = self._meet(request, knows_first=not request.output_token_ids)
            if request.slot is not None:
                self._by_slot[request.slot] = life.number
        self._before, engine.on_step = engine.on_step, self._on_step

    def end(self) -> None:
        """Watch no longer."""
        self._engine.on_step = self._before

    def take(self) -> tuple[list[SeenStep], list[SeenRequest], int]:
        """The steps since the last call, the requests that are not as they were then, and how many steps made way."""
        self._read()
        steps, dropped = list(self._steps), self._num_dropped
        self._steps.clear()
        self._num_dropped = 0
        lives, changed, now = self._lives, self._changed, self._clock()
        for request in self._engine.scheduler.requests:
            if request not in lives:
                self._meet(request)
        if now - self._refreshed_at >= _REFRESH_S:
            self._refreshed_at = now
            changed |= {
                life: None for life in lives.values() if life.request.slot is not None or life.state == _RUNNING
            }
        news = [life.news(now) for life in changed]
        self._ended += [life for life in changed if life.state == _FINISHED]
        changed.clear()
        # no step that is still to come has a row of those that ended before the last one was planned
        while self._ended and self._ended[0].told_at < self._last_start:
            del lives[self._ended.popleft().request]
        return steps, news, dropped

    def _meet(self, request: Request, *, knows_first: bool = True) -> _Life:
        life = self._lives.get(request)
        if life is None:
            life = self._lives[request] = _Life(next(self._numbers), request, knows_first=knows_first)
            self._changed[life] = None
        return life

    def _on_step(self, report: StepReport) -> None:
        self._before(report)
        self._reports.append(report)
        if len(self._reports) == _BATCH:
            self._read()

    def _read(self) -> None:
        """Look at the steps that came since the last look."""
        reports, self._reports = self._reports, []
        # those launched before are left out: who had their rows is not known
        steps = [self._seen(report) for report in reports if report.launched.started_at >= self._began_at]
        if reports:
            self._last_start = reports[-1].launched.started_at
        for life in self._lives.values():
            reason = life.request.finish_reason
            if reason is not None and life.state != _FINISHED:
                if life.ended_at is None and reason in _OF_STEPS:
                    life.ended_at = _last_gain(life.number, steps)
                self._changed[life] = None
        self._num_dropped += max(0, len(self._steps) + len(steps) - (self._steps.maxlen or 0))
        self._steps += steps

    def _seen(self, report: StepReport) -> SeenStep:
        launched, record, table = report.launched, report.record, report.results.table
        plan, chunks = launched.ticket.plan, launched.scheduled.chunks
        num_prompts = len(chunks)
        gained: list[int] = table[:, slot_line.OUT_NUM_TOKENS].tolist()
        for row, chunk in enumerate(chunks):
            life = self._meet(chunk.request)
            self._by_slot[chunk.slot] = life.number
            if gained[row] and life.knows_first and life.first_token_at is None:
                life.first_token_at = report.collected_at
            if life.state != _FINISHED and (gained[row] or life.state != _RUNNING):
                self._changed[life] = None
            gained[row] = chunk.num_tokens
        if plan.epoch is None or plan.epoch != self._epoch:
            by_slot = self._by_slot
            self._epoch, self._ids = plan.epoch, [by_slot.get(slot, 0) for slot, _ in plan.rows]
        proposed = accepted = 0
        if self._speculates:
            proposed = int(table[num_prompts:, slot_line.OUT_NUM_VERIFIED].sum())
            accepted = int(table[num_prompts:, slot_line.OUT_NUM_ACCEPTED].sum())
        reason = record.eager_reason
        return SeenStep(
            record.kind.value,
            str(record.shape) if reason is None else None,
            None if reason is None else str(reason),
            record.captured,
            record.num_tokens,
            record.num_rows,
            record.padding_tokens,
            record.num_ranks,
            proposed,
            accepted,
            launched.started_at,
            1e6 * launched.host_seconds,
            report.collected_at - report.seconds,
            1e6 * report.seconds,
            1e6 * (report.host_seconds - launched.host_seconds),
            num_prompts,
            self._ids,
            gained,
        )


_WAITING, _RUNNING, _FINISHED = "waiting", "running", "finished"
_OF_STEPS = (FinishReason.STOP, FinishReason.LENGTH)
"""Ends that a step brings."""


def _last_gain(number: int, steps: Sequence[SeenStep]) -> float | None:
    """When a request got its last token, if one of the steps brought it."""
    for step in reversed(steps):
        if number in step.ids and step.gained[step.ids.index(number)]:
            return step.start + step.device_us / 1e6
    return None

"""What somebody who watches an engine sees: its steps, who took part in them, and what became of these requests.

An engine that nobody watches does nothing for it: `StepRecorder` puts itself behind `Engine.on_step` when it begins.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from stepgraph.abi import slot_line

if TYPE_CHECKING:
    from stepgraph.engine.engine import Engine
    from stepgraph.engine.reports import StepReport
    from stepgraph.engine.request import Request

MAX_STEPS = 10_000
"""Steps that are kept for whoever reads them; older ones make way."""


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
    requests: list[tuple[int, int]]
    """Of each row, the request's number, and tokens: of a chunk those that it computed, of others those that they gained."""


class SeenRequest(NamedTuple):
    """A request as it is now. Times are seconds of `time.monotonic()`, None if it has not come so far or that was not seen."""

    id: int
    """Its number in `SeenStep.requests`."""
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


class _Life:
    """A request since it was first seen."""

    __slots__ = ("ended_at", "first_token_at", "knows_first", "number", "request", "told")

    def __init__(self, number: int, request: Request):
        self.number, self.request = number, request
        self.first_token_at: float | None = None
        self.knows_first = not request.output_token_ids
        """False: its first token came before."""
        self.ended_at: float | None = None
        self.told: tuple[object, ...] | None = None

    def news(self, now: float) -> SeenRequest | None:
        """What is to be told of it; None if it is as it was."""
        request = self.request
        reason = request.finish_reason
        is_running = request.slot is not None
        now_is = (is_running, len(request.output_token_ids), request.num_preemptions, reason)
        if now_is == self.told:
            return None
        self.told = now_is
        finished = None if reason is None else now if self.ended_at is None else self.ended_at
        return SeenRequest(
            self.number,
            request.id,
            request.arrived_at,
            request.admitted_at,
            self.first_token_at,
            finished,
            request.prompt_len,
            request.num_cached_tokens,
            len(request.output_token_ids),
            request.num_preemptions,
            "finished" if reason is not None else "running" if is_running else "waiting",
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
        self._steps: deque[SeenStep] = deque(maxlen=max_steps)
        self._num_dropped = 0
        self._lives: dict[Request, _Life] = {}  # of those whose end has not been told
        self._by_slot: dict[int, _Life] = {}  # of each slot, the last one
        self._rows: list[_Life | None] = []  # of the steps of an epoch
        self._ids: list[int] = []
        self._epoch: int | None = None
        self._speculates = max(engine.executor.specs.draft_levels) > 0
        self._began_at = clock()
        self._find()
        for request, life in self._lives.items():
            if request.slot is not None:
                self._by_slot[request.slot] = life
        self._before, engine.on_step = engine.on_step, self._on_step

    def end(self) -> None:
        """Watch no longer."""
        self._engine.on_step = self._before

    def take(self) -> tuple[list[SeenStep], list[SeenRequest], int]:
        """The steps since the last call, the requests that are not as they were then, and how many steps made way."""
        steps, dropped = list(self._steps), self._num_dropped
        self._steps.clear()
        self._num_dropped = 0
        self._find()
        now = self._clock()
        news = [found for life in self._lives.values() if (found := life.news(now)) is not None]
        self._lives = {request: life for request, life in self._lives.items() if request.finish_reason is None}
        return steps, news, dropped

    def _find(self) -> None:
        """Get to know the requests that are there."""
        for request in self._engine.scheduler.requests:
            if request not in self._lives:
                self._lives[request] = _Life(next(self._numbers), request)

    def _life(self, request: Request) -> _Life:
        life = self._lives.get(request)
        if life is None:
            life = self._lives[request] = _Life(next(self._numbers), request)
            life.knows_first = True  # it came with this step, whose token it may have already
        return life

    def _on_step(self, report: StepReport) -> None:
        self._before(report)
        launched = report.launched
        if launched.started_at < self._began_at:  # who had its rows is not known
            return
        record, plan, table = report.record, launched.ticket.plan, report.results.table
        for chunk in launched.scheduled.chunks:
            self._by_slot[chunk.slot] = self._life(chunk.request)
        if plan.epoch is None or plan.epoch != self._epoch:
            self._rows = [self._by_slot.get(slot) for slot, _ in plan.rows]
            self._ids = [0 if life is None else life.number for life in self._rows]
            self._epoch = plan.epoch
        collected, num_prompts = report.collected_at, plan.num_prefill_rows
        gained: list[int] = table[:, slot_line.OUT_NUM_TOKENS].tolist()
        if table[:, slot_line.OUT_FINISH].any():
            for life, code in zip(self._rows, table[:, slot_line.OUT_FINISH].tolist(), strict=True):
                if code and life is not None and life.ended_at is None:
                    life.ended_at = collected
        for row in range(num_prompts):
            life = self._rows[row]
            if gained[row] and life is not None and life.knows_first and life.first_token_at is None:
                life.first_token_at = collected
            gained[row] = plan.rows[row][1]
        proposed = accepted = 0
        if self._speculates:
            proposed = int(table[num_prompts:, slot_line.OUT_NUM_VERIFIED].sum())
            accepted = int(table[num_prompts:, slot_line.OUT_NUM_ACCEPTED].sum())
        if len(self._steps) == self._steps.maxlen:
            self._num_dropped += 1
        reason = record.eager_reason
        self._steps.append(
            SeenStep(
                str(record.kind),
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
                collected - report.seconds,
                1e6 * report.seconds,
                1e6 * (report.host_seconds - launched.host_seconds),
                num_prompts,
                list(zip(self._ids, gained, strict=True)),
            )
        )

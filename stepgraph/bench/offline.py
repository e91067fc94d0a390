"""Requests through an engine in this process, and when each of their tokens reached the host. No text, no network."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from stepgraph.bench.serve_metrics import Outcome
from stepgraph.engine.engine import Engine
from stepgraph.engine.reports import StepReport
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import StepgraphError


@dataclass(frozen=True)
class Job:
    """One request, answered greedily to its full length."""

    prompt: Sequence[int]
    max_tokens: int
    due_s: float = 0.0
    """When it arrives, from the begin of the round."""


@dataclass(frozen=True)
class Round:
    """What became of some jobs."""

    outcomes: Sequence[Outcome]
    """In the order of the jobs. A request's time starts when it is due, though it can only enter between two steps."""
    duration_s: float
    steps: Sequence[StepReport]


@dataclass(frozen=True)
class StepShares:
    """How the steps of a round ran."""

    steps: int
    in_graphs: float
    """Share of the steps."""
    padding: float
    """Share of the computed tokens."""
    captured: int
    """Graphs that were captured meanwhile, which takes longer than a step."""
    host_us: float | None
    """Median host work of a step, waiting for the device excluded; None where the device is the host."""

    @classmethod
    def of(cls, engine: Engine, steps: Sequence[StepReport]) -> StepShares:
        """Of steps of `engine`, at least one."""
        records = [step.record for step in steps]
        num_tokens = sum(record.num_tokens for record in records)
        return cls(
            steps=len(steps),
            in_graphs=sum(record.eager_reason is None for record in records) / len(records),
            padding=1 - num_tokens / (num_tokens + sum(record.padding_tokens for record in records)),
            captured=sum(record.captured for record in records),
            host_us=1e6 * median(step.host_seconds for step in steps) if engine.executor.specs.run_ahead else None,
        )

    def cells(self) -> tuple[str, ...]:
        """For a table under `HEADER`."""
        host = "-" if self.host_us is None else f"{self.host_us:.0f}"
        return f"{self.steps}", f"{self.in_graphs:.0%}", f"{self.padding:.0%}", host


HEADER = ("steps", "in graphs", "padding", "host us")


def run_round(engine: Engine, jobs: Sequence[Job], *, on_step: Callable[[StepReport], None] | None = None) -> Round:
    """Serve jobs, in the order in which they are due, with an engine that has nothing else to do.

    Args:
        engine: which is idle.
        jobs: of the round.
        on_step: called after each step, with its report.
    """
    assert not engine.has_work
    steps: list[StepReport] = []
    times: list[list[float]] = [[] for _ in jobs]
    errors = [""] * len(jobs)
    arrived = 0

    def note(step: StepReport) -> None:
        steps.append(step)
        if on_step is not None:
            on_step(step)

    before, engine.on_step = engine.on_step, note
    started = time.perf_counter()
    try:
        while arrived < len(jobs) or engine.has_work:
            now = time.perf_counter() - started
            while arrived < len(jobs) and jobs[arrived].due_s <= now:
                job = jobs[arrived]
                params = SamplingParams(temperature=0, max_tokens=job.max_tokens, ignore_eos=True)
                engine.add_request(str(arrived), job.prompt, params)
                arrived += 1
            if wait_s := _seconds_to_wait(engine, jobs[arrived].due_s - now if arrived < len(jobs) else None):
                time.sleep(wait_s)
                continue
            updates = engine.step()
            now = time.perf_counter() - started
            for update in updates:
                index = int(update.request.id)
                if update.new_token_ids:
                    times[index].append(now)
                if update.finish_reason is FinishReason.ERROR:
                    assert update.request.error is not None
                    errors[index] = update.request.error.message
    finally:
        engine.on_step = before
    duration_s = time.perf_counter() - started
    outcomes = [
        Outcome(
            job.due_s,
            seen[-1] if seen else duration_s,
            len(job.prompt),
            job.max_tokens,
            seen,
            error=error,
            error_kind="error" if error else "",
        )
        for job, seen, error in zip(jobs, times, errors, strict=True)
    ]
    return Round(outcomes, duration_s, steps)


def answered(round_: Round) -> Round:
    """The round. StepgraphError if one of its requests failed."""
    failed = [outcome.error or "no token" for outcome in round_.outcomes if outcome.error or not outcome.chunk_times_s]
    if failed:
        raise StepgraphError(f"{len(failed)} of {len(round_.outcomes)} requests failed, the first with {failed[0]}")
    return round_


def _seconds_to_wait(engine: Engine, until_arrival_s: float | None) -> float:
    """0 if a step can be taken now."""
    if not engine.has_work:
        return until_arrival_s or 0.0
    until_work_s = engine.seconds_until_work or 0.0
    return until_work_s if until_arrival_s is None else min(until_work_s, until_arrival_s)


def settings_line(engine: Engine, where: dict[str, Any]) -> str:
    """What was measured, on what."""
    specs = engine.executor.specs
    devices = f"{specs.num_ranks} x " if specs.num_ranks > 1 else ""
    experts = ""
    if specs.dispatch is not None:
        most = specs.dispatch.most_pairs_tokens
        experts = f", experts by pairs up to {most} tokens" if most else ", experts by tiles"
    return f"{engine.source.name}, {specs.dtype}, {specs.graph_backend} graphs{experts}, {devices}{where['device']}"

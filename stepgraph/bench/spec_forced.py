"""Speculation with decreed acceptance: what a round costs on a model of any size, with random weights.

Each proposal stands with probability p whatever the model says, so a round of K proposals yields 1 + p + … + p^K tokens per row,
and its time does not depend on what is written.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from stepgraph.bench.roofline import Limits, measure_limits
from stepgraph.bench.spec_cost import RoundCosts, RoundTimes, expected_tokens, round_costs, time_round
from stepgraph.bench.spec_text import WATERMARK, check_rows
from stepgraph.config import CacheConfig, EngineConfig, SchedulerConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.reports import StepReport
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.models.source import ModelSource, resolve_configured
from stepgraph.platforms import create_platform
from stepgraph.step.plan import StepKind

_WARM_STEPS = 4
_WINDOW_STEPS = 20
"""Measured steps of a window: few, so that the context hardly grows."""


@dataclass(frozen=True)
class ForcedOptions:
    """What to run."""

    acceptance: float
    """p."""
    num_drafts: Sequence[int]
    """K, one after the other."""
    batch_sizes: Sequence[int]
    context: int
    """Tokens that a row knows, in the middle of a measurement."""
    rounds: int
    """Windows of each engine, in turn with those without speculation."""
    repeats: int
    """Timed runs of each graph alone."""
    count_launches: bool


@dataclass(frozen=True)
class Launches:
    """What the host asked of the device, per step."""

    graphs: float
    kernels: float
    """Beside those in graphs."""
    copies: float
    """Copies and fills."""


@dataclass(frozen=True)
class Window:
    """Some steps of one engine in which all rows decode."""

    step_ms: Sequence[float]
    host_us: Sequence[float]
    row_tokens: Sequence[int]
    """Tokens of each row of each step."""
    num_eager_steps: int
    launches: Launches | None


@dataclass(frozen=True)
class ForcedResult:
    """Rounds of K proposals at some number of rows."""

    batch_size: int
    num_drafts: int
    context: int
    expected_tokens: float
    """Of a row's round, by p and K."""
    row_tokens: float
    """The same as it came out."""
    plain_ms: float
    """Median step of an engine without speculation, through scheduler and runner."""
    round_ms: float
    """Likewise of a round."""
    graphs: RoundTimes
    """Alone, from launch to completion."""
    ideal_speedup: float
    """If time is bytes: of verification and of each sub-step of the module, against those of a plain step."""
    roofline_speedup: float
    """If time is the larger of what bytes and FLOPs take at the machine's limits."""
    plain_host_us: float
    """Median host work per step: planning, launching, taking in results. On CPU the launch, which is the step, is left out."""
    host_us: float
    num_eager_steps: int
    launches: Launches | None

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.batch_size * self.expected_tokens / self.round_ms

    @property
    def speedup(self) -> float:
        """Of the expected tokens per second over those of plain steps: the luck of the draw is left out."""
        return self.expected_tokens * self.plain_ms / self.round_ms

    @property
    def graph_speedup(self) -> float:
        """The same by the graphs alone."""
        return self.expected_tokens * self.graphs.plain_ms / self.graphs.round_ms

    @property
    def of_ideal(self) -> float:
        return self.speedup / self.ideal_speedup


def measure(
    settings: Mapping[str, Any], options: ForcedOptions, *, progress: bool
) -> tuple[Engine, Limits, list[ForcedResult]]:
    """Run everything: an engine without speculation, and beside it one for each K in turn.

    Returns:
        The engine without speculation, for its description; the machine's limits; the results.

    Raises:
        ConfigError: settings that do not fit each other, the model or the machine.
    """
    config = EngineConfig.from_settings(**{**settings, "load_format": "dummy"})
    platform = create_platform(config.model.device)
    if options.count_launches and platform.device.type != "cuda":
        raise ConfigError(f"--count-launches needs CUDA, and this is {platform.name}; leave it out")
    source = resolve_configured(config.model)
    settings = _complete(settings, options, source)
    configs = {num_drafts: _config(settings, options, num_drafts) for num_drafts in options.num_drafts}
    for config in (EngineConfig.from_settings(**settings), *configs.values()):
        check_rows(config, max(options.batch_sizes))
    plain = build_engine(EngineConfig.from_settings(**settings), source=source, progress=progress)
    limits, results = measure_limits(platform, runner_of(plain.executor).model.dtype), []
    for num_drafts, config in configs.items():
        engine = build_engine(config, source=source, progress=progress)
        for batch_size in tqdm(
            options.batch_sizes, f"{num_drafts} proposals", leave=False, disable=not sys.stderr.isatty()
        ):
            results.append(_measure(plain, engine, num_drafts, batch_size, limits, options))
        engine.shutdown()
    return plain, limits, results


def _complete(settings: Mapping[str, Any], options: ForcedOptions, source: ModelSource) -> dict[str, Any]:
    """Settings of the engines: two share the device, so each gets the KV cache that it needs."""
    rows = max(options.batch_sizes)
    block_size = settings.get("block_size", CacheConfig.block_size)
    budget = settings.get("max_num_batched_tokens", max(rows, SchedulerConfig.max_num_batched_tokens))
    longest = options.context + max(_reach(options, num_drafts, rows, budget) for num_drafts in options.num_drafts)
    limit = settings.get("max_model_len", source.config.max_position_embeddings)
    if longest > limit:
        raise ConfigError(
            f"--context-len {options.context} grows to {longest} tokens while it is measured, and max_model_len is {limit}; "
            "lower the first or raise the second"
        )
    return {
        "max_num_seqs": rows,
        "max_model_len": longest,
        "num_kv_blocks": 2 + int(WATERMARK * rows * -(-longest // block_size)),
        "capture": "lazy",
        **settings,
        "load_format": "dummy",
    }


def _config(settings: Mapping[str, Any], options: ForcedOptions, num_drafts: int) -> EngineConfig:
    speculative = {
        "speculative_method": "mtp",
        "num_speculative_tokens": num_drafts,
        "speculative_adaptive": False,
        "speculative_acceptance": options.acceptance,
    }
    return EngineConfig.from_settings(**{**settings, **speculative})


def _measure(
    plain: Engine, engine: Engine, num_drafts: int, batch_size: int, limits: Limits, options: ForcedOptions
) -> ForcedResult:
    expected = expected_tokens(num_drafts, options.acceptance)
    plains: list[Window] = []
    rounds: list[Window] = []
    launches = None
    for round_ in range(1 + options.rounds):
        counting = options.count_launches and round_ == 0  # the profiler slows the steps down
        pair = (
            _window(plain, batch_size, 1.0, options, counting=False),
            _window(engine, batch_size, expected, options, counting=counting),
        )
        if round_ == 0:
            launches = pair[1].launches
        else:
            plains.append(pair[0])
            rounds.append(pair[1])
    costs: RoundCosts = round_costs(runner_of(engine.executor), batch_size, options.context, num_drafts)
    return ForcedResult(
        batch_size=batch_size,
        num_drafts=num_drafts,
        context=options.context,
        expected_tokens=expected,
        row_tokens=fmean(tokens for window in rounds for tokens in window.row_tokens),
        plain_ms=median(ms for window in plains for ms in window.step_ms),
        round_ms=median(ms for window in rounds for ms in window.step_ms),
        graphs=time_round(runner_of(engine.executor), batch_size, options.context, num_drafts, options.repeats),
        ideal_speedup=costs.speedup_by_bytes(expected),
        roofline_speedup=costs.speedup_by_roofline(expected, limits),
        plain_host_us=median(us for window in plains for us in window.host_us),
        host_us=median(us for window in rounds for us in window.host_us),
        num_eager_steps=sum(window.num_eager_steps for window in rounds),
        launches=launches,
    )


def _window(
    engine: Engine, batch_size: int, tokens_per_step: float, options: ForcedOptions, *, counting: bool
) -> Window:
    """Start requests, and once all decode measure some steps, in the middle of which they know `options.context` tokens."""
    num_drafts, vocab_size = engine.config.speculative.max_drafts, engine.source.config.vocab_size
    prompt_len = max(1, options.context - round(tokens_per_step * (_WARM_STEPS + _WINDOW_STEPS / 2)))
    params = SamplingParams(
        temperature=0,
        ignore_eos=True,
        max_tokens=_reach(options, num_drafts, batch_size, engine.executor.specs.max_tokens),
    )
    rng = np.random.default_rng(0)
    for index in range(batch_size):
        engine.add_request(str(index), rng.integers(vocab_size, size=prompt_len).tolist(), params)
    reports: list[StepReport] = []

    def note(report: StepReport) -> None:
        full = report.record.kind is StepKind.DECODE and len(report.decodes) == batch_size
        if full and not report.record.captured:
            reports.append(report)

    def run(steps: int) -> None:
        while len(reports) < steps:
            assert engine.has_work, "requests ended before they were measured"
            engine.step()

    engine.on_step = note
    run(_WARM_STEPS)
    launches = _count_launches(engine) if counting else None
    reports.clear()
    run(_WINDOW_STEPS)
    for index in range(batch_size):
        engine.abort(str(index))
    measured = reports[:_WINDOW_STEPS]
    while engine.has_work:
        engine.step()
    return Window(
        step_ms=[1e3 * report.seconds for report in measured],
        host_us=[1e6 * report.host_seconds for report in measured],
        row_tokens=[row.num_tokens for report in measured for row in report.decodes],
        num_eager_steps=sum(report.record.eager_reason is not None for report in measured),
        launches=launches,
    )


def _reach(options: ForcedOptions, num_drafts: int, rows: int, budget: int) -> int:
    """Tokens that a request must be able to get while the others start and all steps run."""
    prompt_steps = 2 * -(-rows * options.context // budget) + 8
    counted = _WINDOW_STEPS * options.count_launches
    return (_WARM_STEPS + _WINDOW_STEPS + counted + prompt_steps) * (1 + num_drafts)


def _count_launches(engine: Engine) -> Launches:
    """Calls to the CUDA runtime and driver in steady steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    steps = engine.executor.statistics.num_steps
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_WINDOW_STEPS):
            engine.step()
        runner_of(engine.executor).platform.synchronize()
    steps = engine.executor.statistics.num_steps - steps
    return launches_of({event.key: event.count for event in profiler.key_averages()}, steps)


def launches_of(calls: Mapping[str, int], num_steps: int) -> Launches:
    """Sort a profiler's counts of calls, by name.

    Args:
        calls: how often each was seen; names that are no launches are ignored.
        num_steps: steps in which that was.
    """

    def per_step(pattern: str) -> float:
        return sum(count for name, count in calls.items() if re.match(pattern, name)) / num_steps

    return Launches(
        graphs=per_step(r"cu(da)?GraphLaunch"),
        kernels=per_step(r"cu(da)?Launch"),
        copies=per_step(r"cu(da)?Mem(cpy|set)"),
    )

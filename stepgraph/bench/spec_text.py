"""Speculation on real text: the same prompts under each method, in turn in one process."""

from __future__ import annotations

import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from tqdm import tqdm

from stepgraph.abi.slot_line import MAX_DRAFTS
from stepgraph.bench.spec_cost import RoundTimes, TimedStep, spread, time_round, time_steps
from stepgraph.bench.spec_workloads import Workload
from stepgraph.config import CacheConfig, EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.engine import Engine
from stepgraph.engine.prompts import require_tokenizer
from stepgraph.engine.reports import StepReport
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.models.source import ModelSource
from stepgraph.step.plan import StepKind
from stepgraph.step.shape import StepShape
from stepgraph.step.shape_policy import ShapePolicy

BASELINE = "none"
WATERMARK = 1.05
"""KV blocks that must be there over those in use: the scheduler holds some back."""
_ROOM = 2 * MAX_DRAFTS + 1
"""Tokens that a row must have room for, so that a round verifies and proposes as many as it can."""


@dataclass(frozen=True)
class TextOptions:
    """What to run."""

    methods: Sequence[str]
    """`BASELINE` first."""
    workloads: Sequence[Workload]
    batch_sizes: Sequence[int]
    """Requests under way at a time."""
    output_len: int
    """Most tokens of an answer; it may end before."""
    temperature: float
    rounds: int
    repeats: int
    """Timed runs of each graph alone."""


@dataclass(frozen=True)
class Prompts:
    """A workload as token ids."""

    workload: Workload
    token_ids: Sequence[list[int]]
    num_too_long: int
    """Prompts left out, because they do not fit the context with an answer."""


@dataclass(frozen=True)
class Pass:
    """What one method made of all prompts of a workload, once."""

    answers: Sequence[Sequence[int]]
    seconds: float
    """Captures left out."""
    num_captures: int
    num_steps: int
    num_eager_steps: int
    decode_seconds: float
    """In steps that only decode and captured nothing."""
    decode_tokens: int
    """Of those steps."""
    decode_steps: Counter[tuple[StepShape, int, int]]
    """Those steps, by (shape, tokens, rows)."""
    row_tokens: Sequence[int]
    """Tokens of each row of each step that was not of a prompt."""
    verified: Sequence[int]
    """Rows whose first, second, … proposal was verified."""
    stood: Sequence[int]
    """Rows whose first, second, … proposal stood."""

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.answers))

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def decode_tokens_per_s(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class MethodResult:
    """One method on one workload at one number of requests under way. Times and ratios are medians over rounds."""

    workload: str
    batch_size: int
    method: str
    num_drafts: int
    """K, the most proposals per row and step."""
    tokens_per_s: float
    speedup: float
    """Of the tokens per second over those of `BASELINE` in the same round, prompts included."""
    decode_speedup: float
    """The same over steps that only decode."""
    ideal_speedup: float | None
    """Of the graphs of those steps, timed alone; None for `BASELINE`."""
    step_ms: float
    """Mean of a step that only decodes."""
    tokens_per_step: float
    """Tokens that a row gets from a step, mean."""
    mean_accepted_length: float | None
    """1 + proposals that stood, mean over the rows that verified any."""
    acceptance: Sequence[float]
    """Of the rows in which the first, second, … proposal was verified, the share in which it stood."""
    proposing: float
    """Share of rows that verified proposals."""
    num_identical: int
    """Answers that in every round were token for token those of `BASELINE`."""
    num_answers: int
    num_steps: int
    """In all rounds, as the two below."""
    num_eager_steps: int
    num_captures: int
    """Graphs captured in rounds that count; the time that took is left out."""
    round_times: RoundTimes | None
    """Of the graphs at this many rows and K; None for `BASELINE`."""
    context: int
    """Tokens that a row knows at which graphs were timed."""

    @property
    def of_ideal(self) -> float | None:
        return self.decode_speedup / self.ideal_speedup if self.ideal_speedup else None


def load_prompts(source: ModelSource, workloads: Sequence[Workload], output_len: int, max_len: int) -> list[Prompts]:
    """The workloads' prompts in the model's chat template.

    Args:
        source: of the model.
        workloads: what to ask.
        output_len: tokens that must fit behind a prompt.
        max_len: of the context.

    Raises:
        ConfigError: the model has no tokenizer, or no prompt of a workload fits.
        RequestError: the model has no chat template.
    """
    template, found = ChatTemplate(require_tokenizer(source.tokenizer_if_any())), []
    for workload in workloads:
        rendered = (template.prompt([{"role": "user", "content": prompt}]) for prompt in workload.prompts)
        token_ids: list[list[int]] = [prompt["prompt_token_ids"] for prompt in rendered]
        fitting = [ids for ids in token_ids if len(ids) + output_len <= max_len]
        if not fitting:
            raise ConfigError(
                f"no prompt of {workload.name!r} leaves room for --output-len {output_len} in a context of {max_len} tokens; the "
                f"shortest has {min(map(len, token_ids))}; lower --output-len, or raise --max-model-len"
            )
        found.append(Prompts(workload, fitting, len(token_ids) - len(fitting)))
    return found


def create_engines(
    settings: Mapping[str, Any],
    source: ModelSource,
    prompts: Sequence[Prompts],
    options: TextOptions,
    *,
    progress: bool,
) -> dict[str, Engine]:
    """One engine per method, side by side, each with KV cache for just what will run.

    Raises:
        ConfigError: settings that do not fit each other, the model or the memory.
    """
    rows, block_size = max(options.batch_sizes), settings.get("block_size", CacheConfig.block_size)
    longest = max(len(ids) for each in prompts for ids in each.token_ids) + options.output_len + _ROOM
    defaults = {
        "max_num_seqs": rows,
        "max_model_len": min(longest, source.config.max_position_embeddings),
        "num_kv_blocks": 2 + int(WATERMARK * rows * -(-longest // block_size)),
        "capture": "lazy",
    }
    configs = {
        method: EngineConfig.from_settings(**{**defaults, **settings, "speculative_method": method})
        for method in options.methods
    }
    for config in configs.values():
        check_rows(config, rows)
    engines: dict[str, Engine] = {}
    for method, config in configs.items():
        engine = engines[method] = build_engine(config, source=source, progress=progress)
        if len(engines) == 1:
            _check_memory(engine, len(options.methods))
    return engines


def check_rows(config: EngineConfig, rows: int) -> None:
    """Refuse more rows than run at once, or of which a step cannot verify all proposals.

    Raises:
        ConfigError: says how many run.
    """
    most = config.scheduler.max_num_seqs
    if rows > most:
        raise ConfigError(
            f"{rows} requests do not run at once with max_num_seqs={most}; raise it, or lower --batch-sizes"
        )
    num_drafts = config.speculative.max_drafts
    limit = ShapePolicy.of(config.graph, config.scheduler).max_tokens
    if rows * (1 + num_drafts) > limit:
        raise ConfigError(
            f"{rows} rows of {num_drafts} proposals are {rows * (1 + num_drafts)} tokens, and a step runs at most {limit}; raise "
            "max_num_batched_tokens, or lower the rows or the proposals"
        )


def _check_memory(engine: Engine, count: int) -> None:
    runner = runner_of(engine.executor)
    caches = {
        tensor.data_ptr(): tensor for cache in runner.caches for tensor in cache.block_tensors
    }  # layers share them
    needed = (count - 1) * sum(tensor.nbytes for tensor in (*runner.model.parameters(), *caches.values()))
    free = runner.platform.free_memory_bytes()
    if needed > free:
        raise ConfigError(
            f"{count} engines side by side need {needed / 2**30:.1f} GiB more and {free / 2**30:.1f} GiB are free; name fewer "
            "--methods, or lower --batch-sizes or --output-len"
        )


def measure(engines: Mapping[str, Engine], prompts: Sequence[Prompts], options: TextOptions) -> list[MethodResult]:
    """Run everything. The first round of each case captures graphs and does not count."""
    results = []
    cases = [(each, batch_size) for each in prompts for batch_size in options.batch_sizes]
    total = len(cases) * (1 + options.rounds) * len(engines)
    with tqdm(total=total, desc="measuring", unit="pass", leave=False, disable=not sys.stderr.isatty()) as bar:
        for each, batch_size in cases:
            passes: dict[str, list[Pass]] = {method: [] for method in engines}
            order = list(engines)
            for round_ in range(1 + options.rounds):
                for method in order:
                    done = run_pass(engines[method], each.token_ids, batch_size, options)
                    bar.update()
                    if round_:
                        passes[method].append(done)
                order = order[1:] + order[:1]  # so that none is always the first after a pause
            for method, engine in engines.items():
                results.append(_summarise(engine, each, batch_size, method, passes, options))
    return results


def run_pass(engine: Engine, prompts: Sequence[list[int]], batch_size: int, options: TextOptions) -> Pass:
    """Answer all prompts, `batch_size` at a time: when one ends, the next starts."""
    with runner_of(engine.executor).workbench():
        pass  # leaving it forgets cached prefixes and earlier answers, which hold what is asked for again here
    store, reports = runner_of(engine.executor).graphs.store, list[StepReport]()
    capture_seconds, num_graphs = store.capture_seconds, store.num_graphs
    waiting, requests = deque(enumerate(prompts)), []
    engine.on_step = reports.append
    started = time.perf_counter()
    while waiting or engine.has_work:
        while waiting and len(engine.scheduler.requests) < batch_size:
            index, prompt = waiting.popleft()
            params = SamplingParams(temperature=options.temperature, seed=index, max_tokens=options.output_len)
            requests.append(engine.add_request(str(index), prompt, params))
        engine.step()
    seconds = time.perf_counter() - started - (store.capture_seconds - capture_seconds)
    steady = [
        report
        for report in reports
        if report.record.kind is StepKind.DECODE and report.decodes and not report.record.captured
    ]
    rows = [row for report in reports for row in report.decodes]
    return Pass(
        answers=[list(request.output_token_ids) for request in requests],
        seconds=seconds,
        num_captures=store.num_graphs - num_graphs,
        num_steps=len(reports),
        num_eager_steps=sum(report.record.eager_reason is not None for report in reports),
        decode_seconds=sum(report.seconds for report in steady),
        decode_tokens=sum(row.num_tokens for report in steady for row in report.decodes),
        decode_steps=Counter((r.record.shape, r.record.num_tokens, r.record.num_rows) for r in steady),
        row_tokens=[row.num_tokens for row in rows],
        verified=[sum(row.num_verified > place for row in rows) for place in range(MAX_DRAFTS)],
        stood=[sum(row.num_accepted > place for row in rows) for place in range(MAX_DRAFTS)],
    )


def _summarise(
    engine: Engine,
    prompts: Prompts,
    batch_size: int,
    method: str,
    passes: Mapping[str, Sequence[Pass]],
    options: TextOptions,
) -> MethodResult:
    mine, baseline = passes[method], passes[BASELINE]
    context = round(fmean(map(len, prompts.token_ids)) + fmean(len(a) for p in mine for a in p.answers) / 2)
    context = min(context, engine.max_model_len - _ROOM)
    times, ideal = None, None
    if method != BASELINE:
        num_drafts = engine.config.speculative.max_drafts
        times = time_round(runner_of(engine.executor), batch_size, context, num_drafts, options.repeats)
        ideal = _ideal_speedup(engine, mine, baseline, context, options.repeats)
    verified = [sum(counts) for counts in zip(*(p.verified for p in mine), strict=True)]
    stood = [sum(counts) for counts in zip(*(p.stood for p in mine), strict=True)]
    row_tokens = [tokens for p in mine for tokens in p.row_tokens]
    num_steady = sum(p.decode_steps.total() for p in mine)
    return MethodResult(
        workload=prompts.workload.name,
        batch_size=batch_size,
        method=method,
        num_drafts=engine.config.speculative.max_drafts,
        tokens_per_s=median(p.tokens_per_s for p in mine),
        speedup=median(a.tokens_per_s / b.tokens_per_s for a, b in zip(mine, baseline, strict=True)),
        decode_speedup=median(
            a.decode_tokens_per_s / b.decode_tokens_per_s for a, b in zip(mine, baseline, strict=True)
        ),
        ideal_speedup=ideal,
        step_ms=1e3 * sum(p.decode_seconds for p in mine) / max(1, num_steady),
        tokens_per_step=fmean(row_tokens or [0]),
        mean_accepted_length=1 + sum(stood) / verified[0] if verified[0] else None,
        acceptance=[a / b for a, b in zip(stood, verified, strict=True) if b],
        proposing=verified[0] / max(1, len(row_tokens)),
        num_identical=count_identical([p.answers for p in mine], baseline[0].answers),
        num_answers=len(prompts.token_ids),
        num_steps=sum(p.num_steps for p in mine),
        num_eager_steps=sum(p.num_eager_steps for p in mine),
        num_captures=sum(p.num_captures for p in mine),
        round_times=times,
        context=context,
    )


def count_identical(rounds: Sequence[Sequence[Sequence[int]]], expected: Sequence[Sequence[int]]) -> int:
    """Answers that in every round are token for token the expected ones."""
    return sum(all(list(answers[index]) == list(wanted) for answers in rounds) for index, wanted in enumerate(expected))


def _ideal_speedup(
    engine: Engine, mine: Sequence[Pass], baseline: Sequence[Pass], context: int, repeats: int
) -> float | None:
    """Tokens per second of decode steps over those of `BASELINE`, if each took what its graph takes alone.

    Where every step is a full round, that is (tokens per step) × plain / (verify + draft). Steps are counted by their graphs,
    because a row may have fewer proposals or none, and the last rows run in smaller steps.
    """
    steps: list[TimedStep] = []
    counts: list[int] = []
    for passes, drafts in ((baseline, False), (mine, True)):
        by_shape: dict[StepShape, Counter[tuple[int, int]]] = {}
        for (shape, num_tokens, num_rows), count in sum((p.decode_steps for p in passes), Counter()).items():
            by_shape.setdefault(shape, Counter())[num_tokens, num_rows] += count
        for shape, sizes in by_shape.items():
            steps.append(TimedStep(shape, spread(*sizes.most_common(1)[0][0]), drafts))
            counts.append(sizes.total())
    spent = {False: 0.0, True: 0.0}
    for step, count, ms in zip(
        steps, counts, time_steps(runner_of(engine.executor), steps, context, repeats), strict=True
    ):
        spent[step.drafts] += count * ms
    tokens = [sum(p.decode_tokens for p in passes) for passes in (mine, baseline)]
    if not (all(tokens) and all(spent.values())):
        return None  # answers so short that no step only decodes
    return (tokens[0] / spent[True]) / (tokens[1] / spent[False])

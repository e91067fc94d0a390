"""What an engine's process tells of its engine."""

from __future__ import annotations

from typing import Any

from stepgraph.engine.engine import Engine
from stepgraph.engine.lockstep import LockstepScheduler
from stepgraph.engine.reports import StepReport
from stepgraph.engine.request import Request
from stepgraph.server.messages import Door, FirstToken, Load, RankInfo, Ready, StepInfo, TransferLoad


def load_of(engine: Engine, transfers: TransferLoad | None = None, awaited_adapters: tuple[str, ...] = ()) -> Load:
    """How full an engine is; `transfers`: see `TransferReport.load`."""
    scheduler, executor = engine.scheduler, engine.executor
    graphs = executor.graph_counts()
    counts, speculation = scheduler.statistics, engine.speculation
    return Load(
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting,
        kv_usage=scheduler.kv_usage,
        preemptions=counts.preemptions,
        prompt_tokens=counts.prompt_tokens,
        cached_prompt_tokens=counts.cached_prompt_tokens,
        num_graphs=graphs.num_graphs,
        graph_bytes=graphs.bytes,
        capture_seconds=graphs.capture_seconds,
        failed_captures=graphs.failed_captures,
        num_grammars=engine.grammars.num_processes,
        grammar_bytes=engine.grammars.num_bytes,
        drafts=speculation.num_drafts,
        draft_tokens=speculation.num_draft_tokens,
        saved_steps=speculation.num_saved_steps,
        accepted_per_position=tuple(speculation.num_accepted_per_position[: engine.config.speculative.max_drafts]),
        transfers=transfers,
        adapters=engine.loaded_adapters(),
        awaited_adapters=awaited_adapters,
    )


def ranks_of(engine: Engine) -> list[RankInfo]:
    """The processes that share the model."""
    reports = engine.executor.rank_reports()
    tokens = reports[0].expert_tokens if reports else ()
    return [
        RankInfo(
            report.rank,
            report.device,
            report.graph_bytes,
            report.free_memory_bytes,
            report.total_memory_bytes,
            report.cpu_share,
            report.waiting_share,
            sum(tokens[report.experts[0] : sum(report.experts)]),
            report.expert_tokens,
            *load,
        )
        for report, load in zip(reports, _loads_of_ranks(engine, len(reports)), strict=True)
    ]


def _loads_of_ranks(engine: Engine, num_ranks: int) -> list[tuple[int, int]]:
    """Requests that each rank runs, and that wait for it."""
    scheduler = engine.scheduler
    schedulers = scheduler.ranks if isinstance(scheduler, LockstepScheduler) else (scheduler,) * num_ranks
    return [(each.num_running, each.num_waiting) for each in schedulers]


def graphs_of(engine: Engine) -> dict[str, Any]:
    """The captured graphs as `/graphs` shows it."""
    executor = engine.executor
    statistics, counts, reports = executor.statistics, executor.graph_counts(), executor.rank_reports()
    return {
        "backend": executor.specs.graph_backend,
        "steps": statistics.num_steps,
        "eager_steps": statistics.num_eager_steps,
        "eager_reasons": _eager_reasons(engine),
        "real_tokens": statistics.real_tokens,
        "padding_tokens": statistics.padding_tokens,
        "bytes": counts.bytes,
        "failed_captures": counts.failed_captures,
        "token_sizes": list(executor.specs.token_sizes),
        "graphs": [
            {
                "num_tokens": record.shape.num_tokens,
                "num_rows": record.shape.num_rows,
                "num_drafts": record.shape.num_drafts,
                "variant": record.shape.variant.name.lower(),
                "capture_ms": round(record.capture_ms, 3),
                "bytes": record.bytes,
                "uses": record.uses,
                "real_tokens": record.real_tokens,
                "padding_tokens": record.padding_tokens,
            }
            | ({} if (way := executor.specs.dispatch_of(record.shape)) is None else {"dispatch": way})
            for record in executor.graph_records()
        ],
        "ranks": [
            report._asdict() | {"num_running": running, "num_waiting": waiting}
            for report, (running, waiting) in zip(reports, _loads_of_ranks(engine, len(reports)), strict=True)
        ],
    }


def _eager_reasons(engine: Engine) -> dict[str, int]:
    reasons: dict[str, int] = {}
    for (_, reason), count in engine.executor.statistics.steps.items():
        if reason is not None:
            reasons[str(reason)] = reasons.get(str(reason), 0) + count
    return reasons


def first_token(request: Request) -> FirstToken:
    """What is known of a request once it runs."""
    return FirstToken(
        request.admitted_at,
        request.num_cached_tokens,
        None if request.params.prompt_logprobs is None else request.prompt_logprobs,
    )


def ready_of(engine: Engine) -> Ready:
    """What it says once it takes requests."""
    specs, transfers = engine.executor.specs, engine.exchange.transfers
    return Ready(
        max_model_len=specs.max_model_len,
        max_num_seqs=engine.config.scheduler.max_num_seqs * specs.data_parallel_size,
        backend=specs.graph_backend,
        device=specs.platform,
        precision=specs.precision,
        num_kv_blocks=specs.num_kv_blocks * specs.data_parallel_size,
        block_size=specs.block_size,
        max_drafts=engine.config.speculative.max_drafts,
        end_token_ids=engine.end_token_ids,
        longest_step_s=specs.longest_step_s,
        num_ranks=specs.num_ranks,
        collectives=specs.collectives,
        role=engine.config.transfer.splitwise_role,
        door=None if transfers is None else Door(transfers.engine_id, transfers.host, transfers.port),
        max_adapters=specs.max_adapters,
        max_tokens=specs.max_tokens * specs.data_parallel_size,
    )


def step_info(report: StepReport) -> StepInfo:
    """One step as it ran."""
    record = report.record
    return StepInfo(
        str(record.kind),
        record.shape.variant.name.lower(),
        record.shape.num_tokens,
        record.shape.num_rows,
        record.shape.num_drafts,
        record.num_tokens,
        None if record.eager_reason is None else str(record.eager_reason),
        report.seconds,
        report.host_seconds,
        record.num_ranks,
    )

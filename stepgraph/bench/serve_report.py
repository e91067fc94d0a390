"""How ``bench serve`` shows a run: tables for the screen, lists for the JSON, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepgraph.bench.report import pyplot, save_figure, table
from stepgraph.bench.serve_metrics import METRICS, Outcome, count_without_usage, errors_by_kind

if TYPE_CHECKING:
    from stepgraph.bench.serve_client import Run

_LATE_MS = 5.0
"""Behind by more, the load was not the one asked for; timers alone are up to 1 ms late."""
_BUSY_SHARE = 0.5
"""Of a core: a client busier than this adds waiting of its own to what it measures."""
LIMIT_SHARE = 0.9
"""A client busier than this was the limit, or may have been: the server could have sent more."""


def report(
    summary: Mapping[str, Any],
    done: Run,
    *,
    num_prompts: int,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    limits: Sequence[str],
) -> str:
    """Tables of what `summarize` found, the errors, and what a reader must know to trust the figures.

    Args:
        summary: of the run, with these metrics and percentiles.
        done: the run.
        num_prompts: requests that were to be sent.
        metrics: latencies to show, of `METRICS`.
        percentiles: of them.
        limits: of goodput, as they were given.
    """
    tables = [summary_table(summary, num_prompts, limits), latency_table(summary, metrics, percentiles)]
    return "\n\n".join([*tables, *_errors(done.outcomes), *_notes(done)])


def request_details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Every request, in the order of sending; times in seconds, start times since the run began, failed ones with zeros."""
    return {
        "input_lens": [outcome.input_len for outcome in outcomes],
        "output_lens": [outcome.output_len for outcome in outcomes],
        "ttfts": [0.0 if outcome.error else outcome.ttft_s for outcome in outcomes],
        "itls": [outcome.itls_s for outcome in outcomes],
        "start_times": [outcome.start_s for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def plot(path: Path, outcomes: Sequence[Outcome], title: str) -> None:
    """Draw how long first tokens and gaps took, and the course of the run, as PNG."""
    plt = pyplot()
    figure, (first, gaps, timeline) = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    answered = [outcome for outcome in outcomes if not outcome.error]
    for axes, name, times_s in (
        (first, "ttft", [outcome.ttft_s for outcome in answered]),
        (gaps, "itl", [gap for outcome in answered for gap in outcome.itls_s]),
    ):
        if times_s:
            axes.ecdf([1e3 * time_s for time_s in times_s], color="#2f6fde")
        axes.set(xlabel="ms", ylabel="share", title=f"{name.upper()}, {METRICS[name]}", xlim=(0, None), ylim=(0, 1))
    waits, answers, failures = [], [], []  # (request, from, to)
    for index, outcome in enumerate(outcomes):
        if outcome.error:
            failures.append((index, outcome.start_s, outcome.end_s))
        else:
            waits.append((index, outcome.start_s, outcome.chunk_times_s[0]))
            answers.append((index, outcome.chunk_times_s[0], outcome.end_s))
    for bars, color in ((waits, "#b0b7c3"), (answers, "#2f6fde"), (failures, "#d14343")):
        if bars:
            timeline.hlines(*zip(*bars, strict=True), color=color)
    timeline.set(
        xlabel="seconds", ylabel="request", title="until the first token (grey), its answer (blue), failed (red)"
    )
    timeline.invert_yaxis()
    figure.suptitle(title)
    save_figure(figure, path)
    plt.close(figure)


def summary_table(summary: Mapping[str, Any], num_prompts: int, limits: Sequence[str]) -> str:
    rows = [
        ("answered", f"{summary['completed']}"),
        ("failed", f"{summary['failed']}"),
        ("duration, s", f"{summary['duration']:.2f}"),
        ("prompt tokens", f"{summary['total_input_tokens']}"),
        ("output tokens", f"{summary['total_output_tokens']}"),
        ("requests per second", f"{summary['request_throughput']:.2f}"),
        ("output tokens per second", f"{summary['output_throughput']:.1f}"),
        ("output tokens, best second", f"{summary['max_output_tokens_per_s']:.0f}"),
        ("prompt and output tokens per second", f"{summary['total_token_throughput']:.1f}"),
        ("most requests at once", f"{summary['max_concurrent_requests']}"),
    ]
    if limits:
        rows.insert(6, (f"good requests per second ({' '.join(limits)})", f"{summary['request_goodput']:.2f}"))
    return table(("requests", f"{num_prompts}"), rows)


def latency_table(summary: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    statistics = ("mean", "median", "std", *(f"p{percent:g}" for percent in percentiles))
    return table(
        ("ms", *statistics),
        [
            (f"{metric.upper()}, {METRICS[metric]}", *(_ms(summary[f"{name}_{metric}_ms"]) for name in statistics))
            for metric in metrics
        ],
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _errors(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"{count} failed with {kind}, the first so:\n"
        + next(outcome.error for outcome in outcomes if outcome.error and outcome.error_kind == kind)
        for kind, count in errors_by_kind(outcomes).items()
    ]


def _notes(done: Run) -> list[str]:
    notes = []
    if done.interrupted:
        notes.append("Interrupted: these are the requests that had ended.")
    if 1e3 * done.max_late_s > _LATE_MS:
        notes.append(
            f"The load generator was late by up to {1e3 * done.max_late_s:.0f} ms: not quite the load that was asked for."
        )
    share, num_processes = max(done.cpu_shares), len(done.cpu_shares)
    if share > _BUSY_SHARE:
        who = "The load generator" if num_processes == 1 else f"The busiest of {num_processes} load generators"
        what = (
            "the figures are its own limit and not the server's"
            if share > LIMIT_SHARE
            else "latencies include waiting for it"
        )
        notes.append(f"{who} used {share:.0%} of a core: {what}; more --client-processes share the work.")
    without = count_without_usage(done.outcomes)
    if without:
        notes.append(
            f"{without} answers came without usage: prompts are estimated, and each chunk of output is taken for one token."
        )
    return notes

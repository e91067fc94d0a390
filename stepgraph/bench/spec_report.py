"""Tables and pictures of ``bench spec``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepgraph.bench.report import pyplot, save_figure, table
from stepgraph.bench.spec_forced import ForcedResult
from stepgraph.bench.spec_text import BASELINE, MethodResult


def text_table(results: Sequence[MethodResult]) -> str:
    """What each method gives on each workload."""
    header = (
        "workload, requests, method",
        "tok/s",
        "x none",
        "decode x",
        "ideal x",
        "of ideal",
        "step ms",
        "tok/step",
        "length",
        "proposing",
        "identical",
        "eager",
        "stand, by position",
    )
    return table(
        header,
        [
            (
                f"{r.workload} {r.batch_size} {r.method}",
                f"{r.tokens_per_s:.1f}",
                f"{r.speedup:.2f}",
                f"{r.decode_speedup:.2f}",
                _or_dash(r.ideal_speedup, ".2f"),
                _or_dash(r.of_ideal, ".0%"),
                f"{r.step_ms:.2f}",
                f"{r.tokens_per_step:.2f}",
                _or_dash(r.mean_accepted_length, ".2f"),
                f"{r.proposing:.0%}",
                f"{r.num_identical}/{r.num_answers}",
                f"{r.num_eager_steps}/{r.num_steps}",
                " ".join(f"{share:.2f}" for share in r.acceptance) or "-",
            )
            for r in results
        ],
    )


def cost_table(results: Sequence[MethodResult]) -> str:
    """What the graphs of each method's rounds take alone."""
    header = ("graphs alone, ms", "context", "K", "plain", "verify", "draft", "draft each", "round / plain")
    return table(
        header,
        [
            (
                f"{r.workload} {r.batch_size} {r.method}",
                str(r.context),
                str(r.num_drafts),
                f"{r.round_times.plain_ms:.3f}",
                f"{r.round_times.verify_ms:.3f}",
                f"{r.round_times.draft_ms:.3f}",
                f"{r.round_times.draft_ms / r.num_drafts:.3f}",
                f"{r.round_times.round_ms / r.round_times.plain_ms:.2f}",
            )
            for r in results
            if r.round_times is not None
        ],
    )


def forced_tables(results: Sequence[ForcedResult]) -> str:
    """What rounds take and give, and where the time goes."""
    speed = table(
        (
            "rows, proposals",
            "plain ms",
            "round ms",
            "tok/round",
            "seen",
            "tok/s",
            "speed-up",
            "ideal",
            "of ideal",
            "roofline",
            "plain host us",
            "host us",
            "eager",
        ),
        [
            (
                _case(r),
                f"{r.plain_ms:.3f}",
                f"{r.round_ms:.3f}",
                f"{r.expected_tokens:.3f}",
                f"{r.row_tokens:.3f}",
                f"{r.tokens_per_s:.0f}",
                f"{r.speedup:.2f}",
                f"{r.ideal_speedup:.2f}",
                f"{r.of_ideal:.0%}",
                f"{r.roofline_speedup:.2f}",
                f"{r.plain_host_us:.0f}",
                f"{r.host_us:.0f}",
                str(r.num_eager_steps),
            )
            for r in results
        ],
    )
    graphs = table(
        ("graphs alone, ms", "plain", "verify", "draft", "draft each", "round", "speed-up", "of ideal"),
        [
            (
                _case(r),
                f"{r.graphs.plain_ms:.3f}",
                f"{r.graphs.verify_ms:.3f}",
                f"{r.graphs.draft_ms:.3f}",
                f"{r.graphs.draft_ms / r.num_drafts:.3f}",
                f"{r.graphs.round_ms:.3f}",
                f"{r.graph_speedup:.2f}",
                f"{r.graph_speedup / r.ideal_speedup:.0%}",
            )
            for r in results
        ],
    )
    counted = [r for r in results if r.launches is not None]
    launches = table(
        ("launches per step", "graphs", "other kernels", "copies and fills"),
        [
            (_case(r), f"{r.launches.graphs:.2f}", f"{r.launches.kernels:.2f}", f"{r.launches.copies:.2f}")
            for r in counted
            if r.launches is not None
        ],
    )
    return "\n\n".join([speed, graphs, *([launches] if counted else [])])


def plot_text(path: Path, results: Sequence[MethodResult], title: str) -> None:
    """Speed-up of each method on each workload, with the ideal of its graphs."""
    plt = pyplot()
    shown = [r for r in results if r.method != BASELINE]
    figure, axes = plt.subplots(figsize=(9, 0.4 * len(shown) + 1.8), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [r.decode_speedup for r in shown], 0.7, label="measured", color="#2f6fde")
    ideal = [(place, r.ideal_speedup) for place, r in zip(places, shown, strict=True) if r.ideal_speedup]
    axes.plot(
        [x for _, x in ideal], [y for y, _ in ideal], "k|", markersize=13, markeredgewidth=2, label="graphs alone"
    )
    axes.axvline(1, color="#b0b7c3", linewidth=1)
    for place, r in zip(places, shown, strict=True):
        axes.text(0.02, place, f" {r.tokens_per_step:.2f} tokens a step", va="center", fontsize=8, color="white")
    axes.set_yticks(list(places), [f"{r.workload}, {r.batch_size}, {r.method}" for r in shown])
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second of decode steps over those without speculation")
    axes.set_title(title)
    axes.legend(loc="lower right", frameon=False)
    save_figure(figure, path, dpi=140)


def plot_forced(path: Path, results: Sequence[ForcedResult], title: str) -> None:
    """Speed-up over the number of proposals, with the ideal, for each number of rows."""
    plt = pyplot()
    sizes = sorted({r.batch_size for r in results})
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(3.2 * len(sizes) + 1, 3.6), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, size in zip(panels[0], sizes, strict=True):
        here = sorted((r for r in results if r.batch_size == size), key=lambda r: r.num_drafts)
        drafts = [r.num_drafts for r in here]
        axes.plot(
            drafts, [r.ideal_speedup for r in here], "k_", markersize=18, markeredgewidth=2, label="ideal, by bytes"
        )
        axes.plot(drafts, [r.roofline_speedup for r in here], "_", color="#8a93a3", markersize=18, label="roofline")
        axes.plot(drafts, [r.speedup for r in here], "o-", color="#2f6fde", label="measured")
        axes.set_xticks(drafts)
        axes.set_xlabel("proposals")
        axes.set_title(f"{size} row{'s' * (size > 1)}")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("speed-up")
    panels[0][0].legend(frameon=False, fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path, dpi=140)


def _case(result: ForcedResult) -> str:
    return f"{result.batch_size} rows, {result.num_drafts} proposals"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)

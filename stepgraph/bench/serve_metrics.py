"""What the outcomes of many requests come to. Names and definitions are those of ``vllm bench serve``: results compare."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METRICS = {
    "ttft": "time to first token",
    "tpot": "time per output token after the first",
    "itl": "between chunks of an answer",
    "e2el": "end to end",
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Outcome:
    """One request that came to an end. Times are in seconds, `start_s` and `end_s` since the run began."""

    start_s: float
    """When it was sent, after any wait for a place among --max-concurrency."""
    end_s: float
    input_len: int
    output_len: int = 0
    chunk_times_s: Sequence[float] = ()
    """When each piece of the answer arrived, since the run began; not empty if the request was answered."""
    has_usage: bool = True
    """Whether the server said how many tokens there were; else the answer's chunks stand for its tokens."""
    error: str = ""
    """What went wrong, empty if nothing did."""
    error_kind: str = ""
    """What the like of it is counted under; empty if nothing went wrong."""

    @property
    def ttft_s(self) -> float:
        return self.chunk_times_s[0] - self.start_s

    @property
    def e2el_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token, which says nothing about the pace of the next."""
        return (self.e2el_s - self.ttft_s) / (self.output_len - 1) if self.output_len > 1 else None

    @property
    def itls_s(self) -> list[float]:
        """The gaps between chunks. A chunk of several tokens counts once, and chunks that arrived together have gaps of 0."""
        return np.diff(self.chunk_times_s).tolist()

    def meets(self, limits_ms: Mapping[str, float]) -> bool:
        """Whether it is no slower than any of the limits, which are of `GOODPUT_METRICS`; one token meets any `tpot`."""
        seen_s = {"ttft": self.ttft_s, "tpot": self.tpot_s or 0.0, "e2el": self.e2el_s}
        return all(1e3 * seen_s[metric] <= limit_ms for metric, limit_ms in limits_ms.items())


def summarize(
    outcomes: Sequence[Outcome],
    *,
    duration_s: float,
    metrics: Sequence[str],
    percentiles: Sequence[float],
    goodput_ms: Mapping[str, float],
) -> dict[str, Any]:
    """The figures of a run, by the names that ``vllm bench serve`` writes into its JSON.

    Args:
        outcomes: of all requests that ended.
        duration_s: from the first request's time to send until the last one's end.
        metrics: of `METRICS`, to give mean, median, standard deviation and percentiles of.
        percentiles: of them, 0 to 100; between two values they are interpolated.
        goodput_ms: limits that a request has to meet to count for `request_goodput`, which is None without any.

    Returns:
        Times in ms and rates per second. What nothing was measured of is None: there is no latency of no request.
    """
    answered = [outcome for outcome in outcomes if not outcome.error]
    input_len = sum(outcome.input_len for outcome in answered)
    output_len = sum(outcome.output_len for outcome in answered)
    good = sum(outcome.meets(goodput_ms) for outcome in answered)
    samples_s = {
        "ttft": [outcome.ttft_s for outcome in answered],
        "tpot": [outcome.tpot_s for outcome in answered if outcome.tpot_s is not None],
        "itl": [gap for outcome in answered for gap in outcome.itls_s],
        "e2el": [outcome.e2el_s for outcome in answered],
    }
    summary: dict[str, Any] = {
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(outcomes) - len(answered),
        "total_input_tokens": input_len,
        "total_output_tokens": output_len,
        "request_throughput": len(answered) / duration_s,
        "request_goodput": good / duration_s if goodput_ms else None,
        "output_throughput": output_len / duration_s,
        "total_token_throughput": (input_len + output_len) / duration_s,
        "max_output_tokens_per_s": most_tokens_in_a_second(answered),
        "max_concurrent_requests": most_at_once(outcomes),
    }
    for metric in metrics:
        summary |= _statistics(metric, samples_s[metric], percentiles)
    return summary


def errors_by_kind(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many requests failed in which way, the most frequent first."""
    return dict(Counter(outcome.error_kind for outcome in outcomes if outcome.error).most_common())


def count_without_usage(outcomes: Sequence[Outcome]) -> int:
    """How many answers had no count of tokens by the server."""
    return sum(not outcome.has_usage for outcome in outcomes if not outcome.error)


def most_tokens_in_a_second(answered: Sequence[Outcome]) -> float:
    """Tokens that arrived in the best second, counted in whole seconds from the first request on.

    A chunk stands for an equal share of its answer's tokens; vLLM counts chunks, which is the same where each has one token.
    """
    if not answered:
        return 0.0
    begin_s = min(outcome.start_s for outcome in answered)
    seconds = np.concatenate([np.asarray(outcome.chunk_times_s) - begin_s for outcome in answered]).astype(int)
    weights = [o.output_len / len(o.chunk_times_s) for o in answered for _ in o.chunk_times_s]
    return float(np.bincount(seconds, weights).max())


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at one moment; vLLM counts those of a whole second, which can be more."""
    # Where one ends as another starts, the end comes first.
    changes = sorted([(o.start_s, 1) for o in outcomes] + [(o.end_s, -1) for o in outcomes])
    return int(np.cumsum([change for _, change in changes]).max(initial=0))


def _statistics(metric: str, samples_s: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    names = ("mean", "median", "std", *(f"p{percent:g}" for percent in percentiles))
    if not samples_s:
        return {f"{name}_{metric}_ms": None for name in names}
    samples_ms = 1e3 * np.asarray(samples_s)
    values = (samples_ms.mean(), np.median(samples_ms), samples_ms.std(), *np.percentile(samples_ms, percentiles))
    return {f"{name}_{metric}_ms": float(value) for name, value in zip(names, values, strict=True)}

"""What is counted and measured of requests, of HTTP and of engines, in plain numbers, which processes can send each other.

An observer is called for every token; what it counts gets its names, those of `metrics`, when someone asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import msgspec

from stepgraph.engine.request import FinishReason
from stepgraph.server.engine_observer import EngineState, EngineStatus, RestartCause
from stepgraph.server.messages import Load, RankInfo, Ready, TransferLoad
from stepgraph.server.middleware import OPEN_PATHS
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind

if TYPE_CHECKING:
    from stepgraph.server.generation import EndedRequest
    from stepgraph.server.messages import Progress

REFUSALS = {401: "unauthorized", 413: "too_large", 429: "queue_full", 503: "unavailable"}
_IDLE = Load(0, 0, 0.0, 0, 0, 0, 0, 0, 0.0)
_COUNTS = (
    "preemptions",
    "prompt_tokens",
    "cached_prompt_tokens",
    "capture_seconds",
    "failed_captures",
    "drafts",
    "draft_tokens",
    "saved_steps",
)
"""Fields of Load that count."""

# Upper bounds of histograms. They contain vLLM's, so that a query for one of its buckets finds it here, and finer ones
# below: a token takes 1 ms on an H100 and 50 ms on a laptop.
_TOKEN_SECONDS = (
    *(
        0.00025,
        0.0005,
        0.00075,
        0.001,
        0.00125,
        0.0015,
        0.002,
        0.0025,
        0.003,
        0.004,
        0.005,
        0.0075,
        0.01,
        0.0125,
        0.015,
    ),
    *(0.02, 0.025, 0.03, 0.04, 0.05, 0.06, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0),
)
_FIRST_TOKEN_SECONDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.35, 0.5, 0.75),
    *(1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_REQUEST_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_HOST_SECONDS = (
    *(0.00005, 0.0001, 0.00015, 0.0002, 0.0003, 0.0004, 0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005),
    *(0.0075, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0),
)
_REQUEST_TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
_STEP_TOKENS = tuple(float(2**power) for power in range(15))


REQUEST_HISTOGRAMS = {
    "time_to_first_token_seconds": ("From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS),
    "inter_token_latency_seconds": ("Between arrivals of a request's tokens.", _TOKEN_SECONDS),
    "request_time_per_output_token_seconds": ("Mean time between an answer's tokens.", _TOKEN_SECONDS),
    "e2e_request_latency_seconds": ("From a request's arrival to its end.", _REQUEST_SECONDS),
    "request_queue_time_seconds": ("From a request's arrival until it got a slot.", _REQUEST_SECONDS),
    "request_prefill_time_seconds": ("From getting a slot to the first token.", _REQUEST_SECONDS),
    "request_decode_time_seconds": ("From the first token to the last.", _REQUEST_SECONDS),
    "request_inference_time_seconds": ("From getting a slot to the last token.", _REQUEST_SECONDS),
    "request_prompt_tokens": ("Tokens of a prompt.", _REQUEST_TOKENS),
    "request_generation_tokens": ("Tokens of an answer.", _REQUEST_TOKENS),
    "request_params_max_tokens": ("A request's max_tokens.", _REQUEST_TOKENS),
}
"""What they tell, and their bounds, by name."""
STEP_HISTOGRAMS = {
    "iteration_tokens_total": ("Tokens of a step, without padding.", _STEP_TOKENS),
    "step_duration_seconds": (
        "From a step's launch, or the end of the one before, to its results.",
        _TOKEN_SECONDS,
    ),
    "host_step_seconds": ("Of a step: planning it and taking in results.", _HOST_SECONDS),
}


class Histogram(msgspec.Struct, array_like=True):
    """Counts values by size. That of prometheus_client takes several times as long per value, too much for every token."""

    counts: list[int]
    """One for each bound, and one for what is above the last."""
    sum: float = 0.0

    def observe(self, bounds: tuple[float, ...], value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(bounds, value)] += 1
        self.sum += value

    def add(self, other: Histogram) -> None:
        """Count what the other has counted, too."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


def _empty(histograms: Mapping[str, tuple[str, tuple[float, ...]]]) -> dict[str, Histogram]:
    return {name: Histogram([0] * (len(bounds) + 1)) for name, (_, bounds) in histograms.items()}


class RequestCounts(msgspec.Struct):
    """Of one front's requests in one engine. A `RequestObserver`."""

    generation_tokens: int = 0
    ended: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(map(str, FinishReason), 0))
    histograms: dict[str, Histogram] = msgspec.field(default_factory=lambda: _empty(REQUEST_HISTOGRAMS))

    def on_progress(self, message: Progress) -> None:
        """See `RequestObserver`."""
        self.generation_tokens += sum(len(update.token_ids) for update in message.updates)

    def on_first_token(self, seconds: float) -> None:
        """See `RequestObserver`."""
        self.histograms["time_to_first_token_seconds"].observe(_FIRST_TOKEN_SECONDS, seconds)

    def on_token_gap(self, seconds: float) -> None:
        """See `RequestObserver`."""
        self.histograms["inter_token_latency_seconds"].observe(_TOKEN_SECONDS, seconds)

    def on_end(self, request: EndedRequest) -> None:
        """See `RequestObserver`. An aborted or failed request is counted and not measured: its times say when it was given up."""
        self.ended[str(request.finish_reason)] += 1
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._observe("e2e_request_latency_seconds", request.ended_at - request.arrived_at)
        self._observe("request_prompt_tokens", request.num_prompt_tokens)
        self._observe("request_generation_tokens", request.num_output_tokens)
        if request.params.max_tokens is not None:
            self._observe("request_params_max_tokens", request.params.max_tokens)
        admitted, first, last = request.admitted_at, request.first_token_at, request.last_token_at
        if admitted is None or first is None or last is None:  # it ended without a token
            return
        self._observe("request_queue_time_seconds", admitted - request.arrived_at)
        self._observe("request_prefill_time_seconds", first - admitted)
        self._observe("request_decode_time_seconds", last - first)
        self._observe("request_inference_time_seconds", last - admitted)
        if request.num_output_tokens > 1:
            self._observe("request_time_per_output_token_seconds", (last - first) / (request.num_output_tokens - 1))

    def add(self, other: RequestCounts) -> None:
        """Count what the other has counted, too."""
        self.generation_tokens += other.generation_tokens
        _add(self.ended, other.ended)
        for name, histogram in self.histograms.items():
            histogram.add(other.histograms[name])

    def _observe(self, name: str, value: float) -> None:
        self.histograms[name].observe(REQUEST_HISTOGRAMS[name][1], value)


class FrontCounts(msgspec.Struct):
    """Of one front, or the sum over several."""

    engines: list[RequestCounts]
    """One for each engine."""
    responses: dict[tuple[str, str], int] = msgspec.field(default_factory=dict)
    """By path and status."""
    refused: dict[str, int] = msgspec.field(default_factory=lambda: dict.fromkeys(REFUSALS.values(), 0))
    connections_ended: dict[str, int] = msgspec.field(default_factory=dict)
    num_connections: int = 0
    body_bytes: int = 0
    num_unfinished: list[int] = msgspec.field(default_factory=list)
    """Requests in each engine. This one and the two before are as they are now; all others count on."""

    @classmethod
    def of(cls, num_engines: int) -> FrontCounts:
        """With nothing counted."""
        return cls([RequestCounts() for _ in range(num_engines)], num_unfinished=[0] * num_engines)

    def on_response(self, path_template: str, status: int) -> None:
        """An HTTP request was answered. The path is its route's: one with ids in it would make a series of each."""
        key = (path_template, str(status))
        self.responses[key] = self.responses.get(key, 0) + 1
        if status in REFUSALS and path_template not in OPEN_PATHS:  # there, 503 is an answer
            self.refused[REFUSALS[status]] += 1

    def add(self, other: FrontCounts, *, is_gone: bool = False) -> None:
        """Count what the other has counted, too. One that `is_gone` has nothing now."""
        for mine, its in zip(self.engines, other.engines, strict=True):
            mine.add(its)
        _add(self.responses, other.responses)
        _add(self.refused, other.refused)
        _add(self.connections_ended, other.connections_ended)
        if is_gone:
            return
        self.num_connections += other.num_connections
        self.body_bytes += other.body_bytes
        self.num_unfinished = [
            mine + its for mine, its in zip_longest(self.num_unfinished, other.num_unfinished, fillvalue=0)
        ]


class EngineCounts:
    """What one engine does, over all its processes. The counts in `Load` start at 0 with each of these; those here go on."""

    def __init__(self) -> None:
        self.state = EngineState.LOADING
        self.load = _IDLE
        self.ready: Ready | None = None
        """What the running process said of itself, or the last one."""
        self.restarts: Counter[str] = Counter(dict.fromkeys(RestartCause, 0))
        self.steps: Counter[tuple[str, str | None]] = Counter()  # by kind and reason to run eagerly
        self.steps.update({(kind, reason): 0 for kind in StepKind for reason in (None, *EagerReason)})
        self.replays: Counter[tuple[str, ...]] = Counter()
        self.real_tokens = self.padding_tokens = 0
        self.histograms = _empty(STEP_HISTOGRAMS)
        self.ranks: Sequence[RankInfo] = ()
        """Of the processes that share the model, as they were when somebody asked last."""
        self._ended_loads: Counter[str] = Counter()  # of processes that are gone, by `_COUNTS`
        self._ended_accepted: list[int] = []  # likewise, of `Load.accepted_per_position`
        self._ended_expert_tokens: list[int] = []  # likewise, of `RankInfo.expert_tokens`
        self._ended_transfers: TransferLoad | None = None  # likewise, of `Load.transfers`

    def on_progress(self, message: Progress) -> None:
        """Steps ran, or the load changed."""
        self.load = message.load
        for step in message.steps:
            self.steps[step.kind, step.eager_reason] += 1
            if step.eager_reason is None:
                self.replays[str(step.num_tokens), str(step.num_rows), str(step.num_drafts), step.variant] += 1
            self.real_tokens += step.num_real_tokens
            self.padding_tokens += step.num_ranks * step.num_tokens - step.num_real_tokens
            self.histograms["iteration_tokens_total"].observe(_STEP_TOKENS, step.num_real_tokens)
            self.histograms["step_duration_seconds"].observe(_TOKEN_SECONDS, step.seconds)
            self.histograms["host_step_seconds"].observe(_HOST_SECONDS, step.host_seconds)

    def on_status(self, status: EngineStatus) -> None:
        """Each change of state ends or begins a process, so that what the last one counted is final."""
        self.ready = status.ready or self.ready
        if status.state is self.state:
            return
        for name in _COUNTS:
            self._ended_loads[name] += getattr(self.load, name)
        self._ended_accepted, self._ended_expert_tokens = self.accepted_per_position, self.expert_tokens
        if (transfers := self.transfers) is not None:
            self._ended_transfers = transfers._replace(
                num_leases=0, num_fetches=0, num_quarantined=0, host_blocks=0, host_bytes=0
            )
        self.load, self.ranks = _IDLE, ()
        self.state = status.state

    def on_restart(self, cause: RestartCause) -> None:
        """A serving engine is started again."""
        self.restarts[cause] += 1

    def count(self, name: str) -> float:
        """A field of `Load` that counts, over all processes."""
        total: float = self._ended_loads[name] + getattr(self.load, name)
        return total

    @property
    def accepted_per_position(self) -> list[int]:
        """See `Load`; over all processes."""
        return _sums(self._ended_accepted, self.load.accepted_per_position)

    @property
    def transfers(self) -> TransferLoad | None:
        """See `Load`; over all processes, but for what there is now."""
        ended, now = self._ended_transfers, self.load.transfers
        if ended is None or now is None:
            return now or ended
        return TransferLoad(*map(_sum, ended, now))

    @property
    def expert_tokens(self) -> list[int]:
        """See `RankInfo`; over all processes. Empty without experts."""
        return _sums(self._ended_expert_tokens, self.ranks[0].expert_tokens if self.ranks else ())


def _sums(counts: Sequence[int], others: Sequence[int]) -> list[int]:
    return [count + other for count, other in zip_longest(counts, others, fillvalue=0)]


def _sum(count: Any, other: Any) -> Any:
    """Of two numbers, or two sets of them."""
    if isinstance(count, dict):
        return {key: count.get(key, 0) + other.get(key, 0) for key in count | other}
    return tuple(_sums(count, other)) if isinstance(count, tuple) else count + other


def _add(counts: dict[Any, int], others: Mapping[Any, int]) -> None:
    for key, count in others.items():
        counts[key] = counts.get(key, 0) + count

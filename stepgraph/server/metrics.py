"""What the server counts and measures, in the form Prometheus reads. Names follow vLLM's, with the prefix `stepgraph:`.

An observer is called for every token, so what it counts is kept in plain numbers; they get their names when someone asks.
"""

from __future__ import annotations

import platform
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stepgraph import __version__
from stepgraph.engine.request import FinishReason
from stepgraph.server.bodies import Bodies
from stepgraph.server.connections import Connections
from stepgraph.server.engine_observer import EngineState, RestartCause
from stepgraph.server.messages import Load
from stepgraph.server.middleware import OPEN_PATHS
from stepgraph.server.rest import Rest
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind

if TYPE_CHECKING:
    from stepgraph.server.generation import EndedRequest
    from stepgraph.server.messages import Progress

_PREFIX = "stepgraph:"
_REFUSALS = {401: "unauthorized", 413: "too_large", 429: "queue_full", 503: "unavailable"}
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


class Metrics(Collector):
    """Counts what the engine and its requests do. An `Observer`; belongs to one event loop, `render` included.

    The counts in `Load` start at 0 with each process of the engine; those given here go on.

    Args:
        model_name: the label that every metric carries.
    """

    def __init__(self, model_name: str):
        self._model_name = model_name
        self._state = EngineState.LOADING
        self._restarts: Counter[tuple[str, ...]] = Counter({(cause,): 0 for cause in RestartCause})
        self._load = _IDLE
        self._ended_loads: Counter[str] = Counter()  # of processes that are gone, by `_COUNTS`
        self._ended_accepted: list[int] = []  # likewise, of `Load.accepted_per_position`
        self._generation_tokens = 0
        self._steps: Counter[tuple[str, str | None]] = Counter()  # by kind and reason to run eagerly
        self._steps.update({(kind, reason): 0 for kind in StepKind for reason in (None, *EagerReason)})
        self._replays: Counter[tuple[str, ...]] = Counter()
        self._real_tokens = self._padding_tokens = 0
        self._ended: Counter[tuple[str, ...]] = Counter()
        self._ended.update({(reason,): 0 for reason in FinishReason})
        self._responses: Counter[tuple[str, ...]] = Counter()
        self._refused: Counter[tuple[str, ...]] = Counter()
        self._refused.update({(reason,): 0 for reason in _REFUSALS.values()})
        self._histograms: list[_Histogram] = []
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_SECONDS
        )
        self._token_gap = self._histogram(
            "inter_token_latency_seconds", "Between arrivals of a request's tokens.", _TOKEN_SECONDS
        )
        self._time_per_token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between an answer's tokens.", _TOKEN_SECONDS
        )
        self._e2e_time = self._histogram(
            "e2e_request_latency_seconds", "From a request's arrival to its end.", _REQUEST_SECONDS
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds", "From a request's arrival until it got a slot.", _REQUEST_SECONDS
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds", "From getting a slot to the first token.", _REQUEST_SECONDS
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _REQUEST_SECONDS
        )
        self._inference_time = self._histogram(
            "request_inference_time_seconds", "From getting a slot to the last token.", _REQUEST_SECONDS
        )
        self._request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _REQUEST_TOKENS)
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens of an answer.", _REQUEST_TOKENS
        )
        self._request_max_tokens = self._histogram(
            "request_params_max_tokens", "A request's max_tokens.", _REQUEST_TOKENS
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens of a step, without padding.", _STEP_TOKENS
        )
        self._step_time = self._histogram(
            "step_duration_seconds",
            "From a step's launch, or the end of the one before, to its results.",
            _TOKEN_SECONDS,
        )
        self._host_time = self._histogram(
            "host_step_seconds", "Of a step: planning it and taking in results.", _HOST_SECONDS
        )
        self._bodies: Bodies | None = None
        self._connections: Connections | None = None
        self._rest = Rest()
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def watch(self, bodies: Bodies, connections: Connections, rest: Rest) -> None:
        """Tell of these too."""
        self._bodies, self._connections, self._rest = bodies, connections, rest

    def on_progress(self, message: Progress) -> None:
        """See `Observer`."""
        self._load = message.load
        self._generation_tokens += sum(len(update.token_ids) for update in message.updates)
        for step in message.steps:
            self._steps[step.kind, step.eager_reason] += 1
            if step.eager_reason is None:
                self._replays[str(step.num_tokens), str(step.num_rows), str(step.num_drafts), step.variant] += 1
            self._real_tokens += step.num_real_tokens
            self._padding_tokens += step.num_tokens - step.num_real_tokens
            self._step_tokens.observe(step.num_real_tokens)
            self._step_time.observe(step.seconds)
            self._host_time.observe(step.host_seconds)

    def on_first_token(self, seconds: float) -> None:
        """See `Observer`."""
        self._first_token.observe(seconds)

    def on_token_gap(self, seconds: float) -> None:
        """See `Observer`."""
        self._token_gap.observe(seconds)

    def on_end(self, request: EndedRequest) -> None:
        """See `Observer`. An aborted or failed request is counted and not measured: its times say when it was given up."""
        self._ended[request.finish_reason,] += 1
        if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            return
        self._e2e_time.observe(request.ended_at - request.arrived_at)
        self._request_prompt_tokens.observe(request.num_prompt_tokens)
        self._request_generation_tokens.observe(request.num_output_tokens)
        if request.params.max_tokens is not None:
            self._request_max_tokens.observe(request.params.max_tokens)
        admitted, first, last = request.admitted_at, request.first_token_at, request.last_token_at
        if admitted is None or first is None or last is None:  # it ended without a token
            return
        self._queue_time.observe(admitted - request.arrived_at)
        self._prefill_time.observe(first - admitted)
        self._decode_time.observe(last - first)
        self._inference_time.observe(last - admitted)
        if request.num_output_tokens > 1:
            self._time_per_token.observe((last - first) / (request.num_output_tokens - 1))

    def on_state(self, state: EngineState) -> None:
        """See `Observer`. Each change ends or begins a process, so that what the last one counted is final."""
        for name in _COUNTS:
            self._ended_loads[name] += getattr(self._load, name)
        self._ended_accepted = self._accepted_per_position()
        self._load = _IDLE
        self._state = state

    def on_restart(self, cause: RestartCause) -> None:
        """See `Observer`."""
        self._restarts[cause,] += 1

    def on_response(self, path_template: str, status: int) -> None:
        """An HTTP request was answered. The path is its route's: one with ids in it would make a series of each."""
        self._responses[path_template, str(status)] += 1
        if status in _REFUSALS and path_template not in OPEN_PATHS:  # there, 503 is an answer
            self._refused[_REFUSALS[status],] += 1

    def render(self, accept: str | None) -> tuple[bytes, str]:
        """All metrics as text, and its content type: OpenMetrics if the `Accept` header names it.

        prometheus_client's `choose_encoder` is not asked: it fails on versions that are no numbers, and the escaping that it
        chooses for OpenMetrics replaces the colon in the names of samples (prometheus/client_python#1177).
        """
        if accept is not None and "application/openmetrics-text" in accept:
            text = openmetrics.generate_latest(self._registry, escaping=openmetrics.ALLOWUTF8)
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """All metrics but the process's, for Prometheus's registry."""
        load, ended = self._load, self._ended_loads
        build = {"version": __version__, "python": platform.python_version(), "torch": version("torch")}
        yield InfoMetricFamily(f"{_PREFIX}build", "Versions.", {"model_name": self._model_name, **build})
        yield self._gauge(
            "engine_up", "1 if the engine is there, also asleep or paused.", self._state is EngineState.READY
        )
        yield self._gauge(
            "engine_sleep_level",
            "0 if the engine is awake, 1 if it sleeps, 2 if it dropped its weights.",
            self._rest.sleep_level,
        )
        yield self._gauge("engine_paused", "1 if the engine was paused by an administrator.", self._rest.paused)
        yield self._counters(
            "engine_restarts", "Times a serving engine died or hung, to be started again.", ("cause",), self._restarts
        )
        yield self._counters(
            "http_requests", "HTTP requests, by route and status.", ("handler", "status"), self._responses
        )
        yield self._counters("requests_refused", "Requests that were turned away.", ("reason",), self._refused)
        if self._bodies is not None and self._connections is not None:
            yield self._gauge(
                "http_body_bytes", "Bodies of requests that are received or prepared.", self._bodies.num_bytes
            )
            yield self._gauge("http_connections", "Open connections.", self._connections.num_open)
            yield self._counters(
                "http_connections_ended",
                "Connections that the server ended, by why.",
                ("reason",),
                {(reason,): count for reason, count in self._connections.ended.items()},
            )
        yield self._gauge("num_requests_running", "Requests that have a slot.", load.num_running)
        yield self._gauge("num_requests_waiting", "Requests in the engine that wait for a slot.", load.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", load.kv_usage)
        prompt_tokens = ended["prompt_tokens"] + load.prompt_tokens
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", prompt_tokens)
        yield self._counter(
            "prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            ended["cached_prompt_tokens"] + load.cached_prompt_tokens,
        )
        yield self._counter(
            "num_preemptions", "Times a running request lost its slot.", ended["preemptions"] + load.preemptions
        )
        yield self._counter("prompt_tokens", "Tokens of prompts that began to run.", prompt_tokens)
        yield self._counter("generation_tokens", "Generated tokens.", self._generation_tokens)
        yield self._counters("request_success", "Answers that ended.", ("finished_reason",), self._ended)
        yield self._counters(
            "steps",
            "Steps, by how they ran, why not in a graph, and what they did.",
            ("mode", "reason", "kind"),
            {("eager" if reason else "graph", reason or "", kind): n for (kind, reason), n in self._steps.items()},
        )
        yield self._counters(
            "step_tokens",
            "Tokens that steps computed.",
            ("kind",),
            {("real",): self._real_tokens, ("padding",): self._padding_tokens},
        )
        yield self._counters(
            "graph_replays", "Steps that each graph ran.", ("tokens", "rows", "drafts", "variant"), self._replays
        )
        yield self._gauge("graphs", "Captured graphs.", load.num_graphs)
        yield self._gauge(
            "grammars",
            "Grammars of structured outputs that are followed, or kept, in a process each.",
            load.num_grammars,
        )
        yield self._gauge("grammar_bytes", "Memory that these take, compiled.", load.grammar_bytes)
        yield self._gauge("graph_bytes", "Memory that captured graphs take.", load.graph_bytes)
        yield self._counter(
            "graph_capture_seconds", "Time spent capturing graphs.", ended["capture_seconds"] + load.capture_seconds
        )
        yield self._counter(
            "graph_capture_failures",
            "Graphs that could not be captured while requests were served.",
            ended["failed_captures"] + load.failed_captures,
        )
        yield from self._of_speculation()
        for histogram in self._histograms:
            yield histogram.family(self._model_name)

    def _of_speculation(self) -> Iterator[Metric]:
        load, ended, accepted = self._load, self._ended_loads, self._accepted_per_position()
        yield self._counter(
            "spec_decode_num_drafts", "Rows of steps that verified proposals.", ended["drafts"] + load.drafts
        )
        yield self._counter(
            "spec_decode_num_draft_tokens", "Proposals that were verified.", ended["draft_tokens"] + load.draft_tokens
        )
        yield self._counter("spec_decode_num_accepted_tokens", "Proposals that stood.", sum(accepted))
        yield self._counters(
            "spec_decode_num_accepted_tokens_per_pos",
            "Proposals that stood, by their place in the row.",
            ("position",),
            {(str(position),): count for position, count in enumerate(accepted)},
        )
        yield self._counter(
            "spec_decode_saved_steps", "Steps that requests did not need.", ended["saved_steps"] + load.saved_steps
        )
        yield self._gauge(
            "spec_decode_mean_accepted_length",
            "Mean tokens of a row that verified proposals, since the engine started; 1 is no gain.",
            1 + sum(load.accepted_per_position) / max(1, load.drafts),
        )

    def _accepted_per_position(self) -> list[int]:
        """Over all processes of the engine."""
        return [
            before + now
            for before, now in zip_longest(self._ended_accepted, self._load.accepted_per_position, fillvalue=0)
        ]

    def _histogram(self, name: str, documentation: str, bounds: Sequence[float]) -> _Histogram:
        histogram = _Histogram(_PREFIX + name, documentation, bounds)
        self._histograms.append(histogram)
        return histogram

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        return self._counters(name, documentation, (), {(): value})

    def _counters(
        self, name: str, documentation: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]
    ) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, documentation, labels=("model_name", *labels))
        for label_values, value in values.items():
            family.add_metric((self._model_name, *label_values), value)
        return family


class _Histogram:
    """Counts values by size. That of prometheus_client takes several times as long per value, too much for every token."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]):
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def family(self, model_name: str) -> Metric:
        buckets, total = [], 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family = HistogramMetricFamily(self._name, self._documentation, labels=("model_name",))
        family.add_metric((model_name,), buckets, self._sum)
        return family

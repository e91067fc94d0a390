"""What the server counts and measures, in the form Prometheus reads. Names follow vLLM's, with the prefix `stepgraph:`; the few
that routers look for under vLLM's own are in `router_metrics`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from stepgraph import __version__
from stepgraph.server.counts import (
    REQUEST_HISTOGRAMS,
    STEP_HISTOGRAMS,
    EngineCounts,
    FrontCounts,
    Histogram,
    RequestCounts,
)
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.exposition import plain_text
from stepgraph.server.messages import FETCH_SECONDS, TransferLoad
from stepgraph.server.rest import Rest
from stepgraph.server.router_metrics import router_metrics

_PREFIX = "stepgraph:"


class Metrics(Collector):
    """Names what was counted. Every metric carries the model's name, and those of engines and their requests the engine's number.

    Args:
        model_name: the label of this name.
        engines: what they do, in the order of their numbers.
        rest: how they were brought to rest.
        adapters: folders of the LoRA adapters that requests can name; others change it.
    """

    def __init__(self, model_name: str, engines: Sequence[EngineCounts], rest: Rest, adapters: Mapping[str, str]):
        self._model_name = model_name
        self._engines = engines
        self._rest = rest
        self._adapters = adapters
        self._versions = {"version": __version__, "python": platform.python_version(), "torch": version("torch")}
        self._fronts = FrontCounts.of(len(engines))
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str | None, fronts: FrontCounts) -> tuple[bytes, str]:
        """All metrics as text, and its content type: OpenMetrics if the `Accept` header names it. `fronts`: the sum over them.

        prometheus_client's `choose_encoder` is not asked: it fails on versions that are no numbers, and the escaping that it
        chooses for OpenMetrics replaces the colon in the names of samples (prometheus/client_python#1177).
        """
        self._fronts = fronts
        if accept is not None and "application/openmetrics-text" in accept:
            text = openmetrics.generate_latest(self._registry, escaping=openmetrics.ALLOWUTF8)
            return text, openmetrics.CONTENT_TYPE_LATEST
        return plain_text(self._registry.collect()), CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """All metrics but the process's, for Prometheus's registry."""
        yield InfoMetricFamily(f"{_PREFIX}build", "Versions.", {"model_name": self._model_name, **self._versions})
        yield from router_metrics(self._model_name, self._engines, self._adapters)
        yield from self._of_life()
        yield from self._of_http()
        yield from self._of_load()
        yield from self._of_steps()
        yield from self._of_speculation()
        yield from self._of_experts()
        yield from self._of_transfers()
        for name, (documentation, bounds) in REQUEST_HISTOGRAMS.items():
            yield self._histogram(
                name, documentation, bounds, [requests.histograms[name] for requests in self._fronts.engines]
            )
        for name, (documentation, bounds) in STEP_HISTOGRAMS.items():
            yield self._histogram(name, documentation, bounds, [engine.histograms[name] for engine in self._engines])

    def _of_life(self) -> Iterator[Metric]:
        yield self._gauges(
            "engine_up",
            "1 if the engine is there, also asleep or paused.",
            lambda engine: engine.state is EngineState.READY,
        )
        yield self._gauges(
            "engine_sleep_level",
            "0 if the engine is awake, 1 if it sleeps, 2 if it dropped its weights.",
            lambda engine: self._rest.sleep_level,
        )
        yield self._gauges(
            "engine_paused", "1 if the engine was paused by an administrator.", lambda engine: self._rest.paused
        )
        yield self._of_engines(
            "engine_restarts",
            "Times a serving engine died or hung, to be started again.",
            ("cause",),
            lambda engine: {(cause,): count for cause, count in engine.restarts.items()},
        )

    def _of_http(self) -> Iterator[Metric]:
        fronts = self._fronts
        yield self._counters(
            "http_requests", "HTTP requests, by route and status.", ("handler", "status"), fronts.responses
        )
        yield self._counters("requests_refused", "Requests that were turned away.", ("reason",), _keyed(fronts.refused))
        yield self._gauge("http_body_bytes", "Bodies of requests that are received or prepared.", fronts.body_bytes)
        yield self._gauge("http_connections", "Open connections.", fronts.num_connections)
        yield self._counters(
            "http_connections_ended",
            "Connections that the server ended, by why.",
            ("reason",),
            _keyed(fronts.connections_ended),
        )

    def _of_load(self) -> Iterator[Metric]:
        yield self._gauges("num_requests_running", "Requests that have a slot.", lambda engine: engine.load.num_running)
        yield self._gauges(
            "num_requests_waiting",
            "Requests in the engine that wait for a slot.",
            lambda engine: engine.load.num_waiting,
        )
        yield self._gauges(
            "kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", lambda engine: engine.load.kv_usage
        )
        for name, field, documentation in (
            ("prefix_cache_queries", "prompt_tokens", "Prompt tokens looked up in the prefix cache."),
            ("prefix_cache_hits", "cached_prompt_tokens", "Prompt tokens found in the prefix cache."),
            ("num_preemptions", "preemptions", "Times a running request lost its slot."),
            ("prompt_tokens", "prompt_tokens", "Tokens of prompts that began to run."),
        ):
            yield self._counts(name, documentation, field)
        yield self._of_requests(
            "generation_tokens", "Generated tokens.", (), lambda requests: {(): requests.generation_tokens}
        )
        yield self._of_requests(
            "request_success",
            "Answers that ended.",
            ("finished_reason",),
            lambda requests: _keyed(requests.ended),
        )

    def _of_steps(self) -> Iterator[Metric]:
        yield self._of_engines(
            "steps",
            "Steps, by how they ran, why not in a graph, and what they did.",
            ("mode", "reason", "kind"),
            lambda engine: {
                ("eager" if reason else "graph", reason or "", kind): n for (kind, reason), n in engine.steps.items()
            },
        )
        yield self._of_engines(
            "step_tokens",
            "Tokens that steps computed.",
            ("kind",),
            lambda engine: {("real",): engine.real_tokens, ("padding",): engine.padding_tokens},
        )
        yield self._of_engines(
            "graph_replays",
            "Steps that each graph ran.",
            ("tokens", "rows", "drafts", "variant"),
            lambda engine: engine.replays,
        )
        yield self._gauges("graphs", "Captured graphs.", lambda engine: engine.load.num_graphs)
        yield self._gauges(
            "grammars",
            "Grammars of structured outputs that are followed, or kept, in a process each.",
            lambda engine: engine.load.num_grammars,
        )
        yield self._gauges(
            "grammar_bytes", "Memory that these take, compiled.", lambda engine: engine.load.grammar_bytes
        )
        yield self._gauges("graph_bytes", "Memory that captured graphs take.", lambda engine: engine.load.graph_bytes)
        for name, field, documentation in (
            ("rank_graph_bytes", "graph_bytes", "Memory that a rank's captured graphs take."),
            ("rank_free_memory_bytes", "free_memory_bytes", "Memory of a rank's device that nobody has taken."),
            ("rank_total_memory_bytes", "total_memory_bytes", "Memory of a rank's device."),
            ("rank_cpu_share", "cpu_share", "Of a core that a rank's process uses, since the engine was built."),
            ("rank_waiting_share", "waiting_share", "Of the time since then, what a rank waited for orders."),
            ("rank_requests_running", "num_running", "Requests that a rank runs."),
            ("rank_requests_waiting", "num_waiting", "Requests that wait for a rank."),
        ):
            yield self._of_ranks(name, documentation, field)
        yield self._counts("graph_capture_seconds", "Time spent capturing graphs.", "capture_seconds")
        yield self._counts(
            "graph_capture_failures",
            "Graphs that could not be captured while requests were served.",
            "failed_captures",
        )

    def _of_speculation(self) -> Iterator[Metric]:
        yield self._counts("spec_decode_num_drafts", "Rows of steps that verified proposals.", "drafts")
        yield self._counts("spec_decode_num_draft_tokens", "Proposals that were verified.", "draft_tokens")
        yield self._of_engines(
            "spec_decode_num_accepted_tokens",
            "Proposals that stood.",
            (),
            lambda engine: {(): sum(engine.accepted_per_position)},
        )
        yield self._of_engines(
            "spec_decode_num_accepted_tokens_per_pos",
            "Proposals that stood, by their place in the row.",
            ("position",),
            lambda engine: {(str(place),): count for place, count in enumerate(engine.accepted_per_position)},
        )
        yield self._counts("spec_decode_saved_steps", "Steps that requests did not need.", "saved_steps")
        yield self._gauges(
            "spec_decode_mean_accepted_length",
            "Mean tokens of a row that verified proposals, since the engine started; 1 is no gain.",
            lambda engine: 1 + sum(engine.load.accepted_per_position) / max(1, engine.load.drafts),
        )

    def _of_experts(self) -> Iterator[Metric]:
        """What is summed over layers: a series for each expert of each layer would be thousands."""
        if not any(engine.expert_tokens for engine in self._engines):
            return
        yield self._of_engines(
            "expert_tokens",
            "Tokens that chose each expert, in all layers together.",
            ("expert",),
            lambda engine: {(str(expert),): count for expert, count in enumerate(engine.expert_tokens)},
        )
        yield self._gauges(
            "expert_imbalance",
            "Tokens of the expert that got most over their mean, since the engine started; 1 is balance.",
            lambda engine: _imbalance(engine.expert_tokens),
        )
        yield self._of_ranks(
            "rank_expert_tokens",
            "Tokens that chose experts of a rank, each counted for each of these, since the engine was built.",
            "num_expert_tokens",
        )
        yield self._gauges(
            "expert_rank_imbalance",
            "That of the rank that got most over their mean; 1 is balance.",
            lambda engine: _imbalance([rank.num_expert_tokens for rank in engine.ranks]),
        )

    def _of_transfers(self) -> Iterator[Metric]:
        if not any(engine.transfers for engine in self._engines):
            return

        def of(values: Callable[[TransferLoad], Mapping[tuple[str, ...], float]]) -> Callable[[EngineCounts], Any]:
            return lambda engine: {} if engine.transfers is None else values(engine.transfers)

        yield self._of_engines(
            "kv_transfer_bytes",
            "Bytes of keys and values that other engines have taken (sent), or that came from them (received).",
            ("direction",),
            of(lambda load: {("sent",): load.bytes_sent, ("received",): load.bytes_received}),
        )
        yield self._of_engines(
            "kv_transfer_blocks",
            "KV blocks, likewise.",
            ("direction",),
            of(lambda load: {("sent",): load.blocks_sent, ("received",): load.blocks_received}),
        )
        yield self._of_engines(
            "kv_transfer_failures",
            "Prompts of which less came than another engine had computed, by why.",
            ("reason",),
            of(lambda load: _keyed(load.failures)),
        )
        yield self._of_engines(
            "kv_transfer_recomputed_tokens",
            "Tokens of prompts that were computed here although another engine had.",
            (),
            of(lambda load: {(): load.recomputed_tokens}),
        )
        yield self._of_engines(
            "kv_leases_ended",
            "Prompts that were held for others and are no more, by why.",
            ("reason",),
            of(lambda load: _keyed(load.leases_ended)),
        )
        yield self._of_engines(
            "kv_host_cache_hits",
            "KV blocks that were copied back from host memory.",
            (),
            of(lambda load: {(): load.host_hits}),
        )
        yield self._of_engines(
            "kv_host_cache_evictions",
            "KV blocks in host memory that made room for others.",
            (),
            of(lambda load: {(): load.host_evictions}),
        )
        for name, documentation, field in (
            ("kv_leases", "Prompts whose keys and values are held for other engines.", "num_leases"),
            ("kv_fetches", "Prompts whose keys and values are on their way from other engines.", "num_fetches"),
            ("kv_blocks_quarantined", "KV blocks that other engines may still write.", "num_quarantined"),
            ("kv_host_cache_blocks", "KV blocks of prefixes that host memory holds.", "host_blocks"),
            ("kv_host_cache_bytes", "Host memory for KV blocks.", "host_bytes"),
        ):
            yield self._gauges(
                name,
                documentation,
                lambda engine, field=field: getattr(engine.transfers, field, 0),  # type: ignore[misc]
            )
        for name, documentation, counts, seconds in (
            (
                "kv_transfer_seconds",
                "From asking another engine for a prompt's keys and values to having them.",
                "fetch_counts",
                "fetch_seconds",
            ),
            (
                "kv_transfer_wait_seconds",
                "From a request's coming to asking another engine for its prompt's keys and values.",
                "wait_counts",
                "wait_seconds",
            ),
        ):
            yield self._histogram(
                name,
                documentation,
                FETCH_SECONDS,
                [
                    Histogram([0] * (len(FETCH_SECONDS) + 1))
                    if (load := engine.transfers) is None
                    else Histogram(list(getattr(load, counts)), getattr(load, seconds))
                    for engine in self._engines
                ],
            )

    # Families

    def _histogram(
        self, name: str, documentation: str, bounds: Sequence[float], histograms: Sequence[Histogram]
    ) -> Metric:
        family = HistogramMetricFamily(_PREFIX + name, documentation, labels=("model_name", "engine"))
        for number, histogram in enumerate(histograms):
            buckets, total = [], 0
            for bound, count in zip((*bounds, float("inf")), histogram.counts, strict=True):
                total += count
                buckets.append((floatToGoString(bound), total))
            family.add_metric((self._model_name, str(number)), buckets, histogram.sum)
        return family

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _gauges(self, name: str, documentation: str, value: Callable[[EngineCounts], float]) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name", "engine"))
        for number, engine in enumerate(self._engines):
            family.add_metric((self._model_name, str(number)), value(engine))
        return family

    def _of_ranks(self, name: str, documentation: str, field: str) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name", "engine", "rank", "device"))
        for number, engine in enumerate(self._engines):
            for rank in engine.ranks:
                labels = (self._model_name, str(number), str(rank.rank), rank.device)
                family.add_metric(labels, getattr(rank, field))
        return family

    def _counts(self, name: str, documentation: str, field: str) -> Metric:
        return self._of_engines(name, documentation, (), lambda engine: {(): engine.count(field)})

    def _of_engines(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        values: Callable[[EngineCounts], Mapping[tuple[str, ...], float]],
    ) -> Metric:
        return self._numbered(name, documentation, labels, [values(engine) for engine in self._engines])

    def _of_requests(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        values: Callable[[RequestCounts], Mapping[tuple[str, ...], float]],
    ) -> Metric:
        return self._numbered(name, documentation, labels, [values(requests) for requests in self._fronts.engines])

    def _numbered(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str],
        values: Sequence[Mapping[tuple[str, ...], float]],
    ) -> Metric:
        by_engine = {
            (str(number), *label_values): value
            for number, of_engine in enumerate(values)
            for label_values, value in of_engine.items()
        }
        return self._counters(name, documentation, ("engine", *labels), by_engine)

    def _counters(self, name: str, documentation: str, labels: Sequence[str], values: Mapping[Any, float]) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, documentation, labels=("model_name", *labels))
        for label_values, value in values.items():
            family.add_metric((self._model_name, *label_values), value)
        return family


def _imbalance(counts: Sequence[int]) -> float:
    """The largest over the mean; 1 of nothing."""
    return max(counts) * len(counts) / sum(counts) if any(counts) else 1.0


def _keyed(counts: Mapping[str, int]) -> dict[tuple[str, ...], int]:
    return {(key,): count for key, count in counts.items()}

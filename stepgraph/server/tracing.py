"""Traces of requests for OpenTelemetry: one span for each answer, when it has ended. They hold counts and times, no text."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from stepgraph import __version__
from stepgraph.engine.request import FinishReason
from stepgraph.errors import ConfigError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

    from stepgraph.server.generation import EndedRequest

_FLUSH_S = 5.0
"""How long the end of the server waits for spans to leave."""


def create_tracer(endpoint: str) -> Tracer:
    """A tracer that sends spans to a collector by OTLP over HTTP, as the service `OTEL_SERVICE_NAME`, else "stepgraph".

    Args:
        endpoint: the collector's URL; without a path, that of the protocol, /v1/traces.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ConfigError(
            f"otlp_traces_endpoint={endpoint!r} needs OpenTelemetry, which is not installed "
            "(pip install 'stepgraph[tracing]'); or leave it unset"
        ) from error
    if urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    return Tracer(OTLPSpanExporter(endpoint=endpoint))


class Tracer:
    """Records ended requests as spans. A thread of its own exports them in batches: nothing waits for the collector, and spans
    that it does not take are dropped.

    Args:
        exporter: where spans go.
    """

    def __init__(self, exporter: SpanExporter):
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "stepgraph"), "service.version": __version__}
        self._provider = TracerProvider(resource=Resource.create(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("stepgraph.server", __version__)

    def on_end(
        self, request: EndedRequest, *, operation: str, model: str, request_id: str, traceparent: str | None
    ) -> None:
        """Record an answer that has ended.

        Args:
            operation: `chat` or `text_completion`, in the words of OpenTelemetry.
            model: name under which the model was asked.
            request_id: the response's id, which its answers share.
            traceparent: the HTTP header of this name, by which the span becomes part of the client's trace. A malformed one
                counts as none.
        """
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        headers = {} if traceparent is None else {"traceparent": traceparent}
        wall_ns = (
            time.time_ns() - time.monotonic_ns()
        )  # when the monotonic clock was 0; anew each time, as it may be set
        span = self._tracer.start_span(
            f"{operation} {model}",
            context=TraceContextTextMapPropagator().extract(headers),
            kind=SpanKind.SERVER,
            attributes=_attributes(request, operation, model, request_id),
            start_time=wall_ns + int(request.arrived_at * 1e9),
        )
        if request.finish_reason == FinishReason.ERROR:
            span.set_status(StatusCode.ERROR)
        span.end(wall_ns + int(request.ended_at * 1e9))

    def shutdown(self) -> None:
        """Export what is left, and stop. Blocks for some seconds at most."""
        stopping = threading.Thread(target=self._provider.shutdown, name="stepgraph-tracer-stop", daemon=True)
        stopping.start()
        stopping.join(_FLUSH_S)


def _attributes(
    request: EndedRequest, operation: str, model: str, request_id: str
) -> dict[str, str | int | float | list[str]]:
    """Names are those of OpenTelemetry's conventions for generative AI; `gen_ai.latency` (in seconds) is vLLM's addition."""
    params, arrived = request.params, request.arrived_at
    admitted, first, last = request.admitted_at, request.first_token_at, request.last_token_at
    attributes: dict[str, str | int | float | list[str]] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "stepgraph",
        "gen_ai.request.model": model,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.response.id": request_id,
        "gen_ai.response.finish_reasons": [str(request.finish_reason)],
        "gen_ai.usage.input_tokens": request.num_prompt_tokens,
        "gen_ai.usage.output_tokens": request.num_output_tokens,
        "gen_ai.usage.cache_read.input_tokens": request.num_cached_tokens,
        "gen_ai.latency.e2e": request.ended_at - arrived,
    }
    if params.max_tokens is not None:
        attributes["gen_ai.request.max_tokens"] = params.max_tokens
    if admitted is not None:
        attributes["gen_ai.latency.time_in_queue"] = admitted - arrived
    if first is not None:
        attributes["gen_ai.latency.time_to_first_token"] = first - arrived
    if admitted is not None and first is not None and last is not None:
        attributes["gen_ai.latency.time_in_model_prefill"] = first - admitted
        attributes["gen_ai.latency.time_in_model_decode"] = last - first
        attributes["gen_ai.latency.time_in_model_inference"] = last - admitted
    return attributes

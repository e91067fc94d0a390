import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import ENDED
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from stepgraph import __version__
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.server import tracing
from stepgraph.server.generation import EndedRequest
from stepgraph.server.tracing import Tracer, create_tracer

TRACE_ID, SPAN_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}"


def end(tracer: Tracer, request: EndedRequest = ENDED, traceparent: str | None = None) -> None:
    tracer.on_end(request, operation="chat", model="tiny", request_id="chatcmpl-1", traceparent=traceparent)


def spans_of(request: EndedRequest = ENDED, traceparent: str | None = None) -> list[ReadableSpan]:
    exporter = InMemorySpanExporter()
    tracer = Tracer(exporter)
    end(tracer, request, traceparent)
    tracer.shutdown()
    return list(exporter.get_finished_spans())


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    tracer = Tracer(InMemorySpanExporter())
    yield tracer
    tracer.shutdown()


def test_an_ended_request_is_a_span_with_its_counts_and_latencies():
    [span] = spans_of(replace(ENDED, finish_reason=FinishReason.STOP))
    assert (span.name, span.kind, span.parent) == ("chat tiny", SpanKind.SERVER, None)
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "stepgraph",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.latency.time_in_queue": 0.5,
        "gen_ai.latency.time_to_first_token": 1.5,
        "gen_ai.latency.time_in_model_prefill": 1.0,
        "gen_ai.latency.time_in_model_decode": 2.0,
        "gen_ai.latency.time_in_model_inference": 3.0,
        "gen_ai.latency.e2e": 3.75,
    }


def test_the_span_lasts_from_arrival_to_end_on_the_wall_clock(monkeypatch):
    monkeypatch.setattr(tracing.time, "time_ns", lambda: 1_700_000_000_000_000_000)
    monkeypatch.setattr(tracing.time, "monotonic_ns", lambda: 104_000_000_000)
    tracer = Tracer(exporter := InMemorySpanExporter())
    end(tracer)
    monkeypatch.undo()
    tracer.shutdown()
    [span] = exporter.get_finished_spans()
    assert span.start_time == 1_700_000_000_000_000_000 - 4_000_000_000
    assert span.end_time - span.start_time == 3_750_000_000


def test_a_request_that_never_ran_has_no_latencies_of_the_model():
    waited = replace(ENDED, finish_reason="abort", admitted_at=None, first_token_at=None, last_token_at=None)
    [span] = spans_of(replace(waited, params=SamplingParams(max_tokens=None)))
    assert [name for name in span.attributes if "latency" in name] == ["gen_ai.latency.e2e"]
    assert "gen_ai.request.max_tokens" not in span.attributes
    assert span.status.status_code is StatusCode.UNSET


def test_an_error_marks_the_span():
    [span] = spans_of(replace(ENDED, finish_reason="error"))
    assert span.status.status_code is StatusCode.ERROR


def test_text_of_a_request_stays_out():
    [span] = spans_of(replace(ENDED, params=SamplingParams(stop="a secret", bad_words=["a secret"])))
    assert "secret" not in span.to_json()


def test_a_request_joins_the_trace_of_its_client():
    [span] = spans_of(traceparent=f"{TRACEPARENT}-01")
    assert (span.context.trace_id, span.parent.span_id) == (TRACE_ID, SPAN_ID)


def test_a_client_that_does_not_record_its_trace_gets_no_span():
    assert spans_of(traceparent=f"{TRACEPARENT}-00") == []


@given(st.text() | st.from_regex(r"[0-9a-f]{2}-[0-9a-f]{0,33}-[0-9a-f]{0,17}-[0-9a-f]{0,3}", fullmatch=True))
def test_no_header_fails_a_request(tracer, traceparent):
    end(tracer, traceparent=traceparent)


class Stuck(SpanExporter):
    """A collector that does not answer until told to."""

    def __init__(self) -> None:
        self.asked, self.may_answer, self.stopped = threading.Event(), threading.Event(), threading.Event()

    def export(self, spans) -> SpanExportResult:
        self.asked.set()
        self.may_answer.wait(60)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.stopped.set()


def test_a_collector_that_hangs_delays_neither_requests_nor_the_end(monkeypatch):
    monkeypatch.setattr(tracing, "_FLUSH_S", 0.05)
    tracer = Tracer(stuck := Stuck())
    for _ in range(3000):  # more than are kept
        end(tracer)
    assert stuck.asked.wait(60)
    end(tracer)
    tracer.shutdown()
    assert not stuck.stopped.is_set()
    stuck.may_answer.set()


@pytest.fixture
def collector(monkeypatch) -> Iterator[tuple[str, "SimpleQueue[tuple[str, bytes]]"]]:
    """The URL of a collector on loopback, and the paths and bodies that it is sent."""
    received: SimpleQueue[tuple[str, bytes]] = SimpleQueue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.put((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args) -> None:
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("path", "asked"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/other", "/other")])
def test_a_collector_gets_the_spans_when_the_server_ends(collector, path, asked):
    url, received = collector
    tracer = create_tracer(url + path)
    end(tracer)
    tracer.shutdown()
    posted, body = received.get(timeout=60)
    assert posted == asked
    [spans] = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {attribute.key: attribute.value.string_value for attribute in spans.resource.attributes}
    assert (resource["service.name"], resource["service.version"]) == ("stepgraph", __version__)
    assert [span.name for scope in spans.scope_spans for span in scope.spans] == ["chat tiny"]


def test_a_service_can_have_another_name(monkeypatch, collector):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "assistant")
    url, received = collector
    tracer = create_tracer(url)
    end(tracer)
    tracer.shutdown()
    [spans] = ExportTraceServiceRequest.FromString(received.get(timeout=60)[1]).resource_spans
    assert "assistant" in [attribute.value.string_value for attribute in spans.resource.attributes]


def test_a_collector_that_is_not_there_is_logged_and_harms_nothing(monkeypatch, caplog):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        port = server.server_port
    tracer = create_tracer(f"http://127.0.0.1:{port}")
    end(tracer)
    tracer.shutdown()
    assert "Failed to export spans" in caplog.text


def test_without_opentelemetry_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:4318.*pip install 'stepgraph\[tracing\]'"):
        create_tracer("http://127.0.0.1:4318")

import asyncio
import re
import time
from collections.abc import Iterable
from dataclasses import replace
from math import inf
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from fakes import FakeEngine
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import EAGER, ENDED, IN_GRAPH, LOAD, OneServer, busy_metrics, one_engine
from prometheus_client import parser
from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.samples import Sample

from stepgraph import __version__
from stepgraph.server.counts import FrontCounts
from stepgraph.server.engine_life import Launch
from stepgraph.server.engine_observer import EngineState, RestartCause
from stepgraph.server.exposition import plain_text
from stepgraph.server.messages import AskRanks, Load, Progress, RankInfo, TokenUpdate
from stepgraph.server.supervisor import OneFront, Supervisor
from stepgraph.step.eager_reason import EagerReason

encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(FrontCounts).decode
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
IDLE = Load(0, 0, 0.0, 0, 0, 0, 0, 0, 0.0)
COUNTS = {
    "preemptions": "num_preemptions_total",
    "prompt_tokens": "prompt_tokens_total",
    "cached_prompt_tokens": "prefix_cache_hits_total",
    "capture_seconds": "graph_capture_seconds_total",
    "failed_captures": "graph_capture_failures_total",
    "drafts": "spec_decode_num_drafts_total",
    "draft_tokens": "spec_decode_num_draft_tokens_total",
    "saved_steps": "spec_decode_saved_steps_total",
}
"""What `Load` counts, and the metrics that go on counting it."""
VLLM_BOUNDS = {
    "time_to_first_token_seconds": [
        *(
            0.001,
            0.005,
            0.01,
            0.02,
            0.04,
            0.06,
            0.08,
            0.1,
            0.25,
            0.5,
            0.75,
            1,
            2.5,
            5,
            7.5,
            10,
            20,
            40,
            80,
            160,
            640,
            2560,
        )
    ],
    "inter_token_latency_seconds": [
        *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
    ],
    "e2e_request_latency_seconds": [
        *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
    ],
    "request_prompt_tokens": [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000],
    "iteration_tokens_total": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384],
}


Labels = frozenset[tuple[str, str]]


def samples(metrics: OneServer) -> dict[tuple[str, Labels], float]:
    """The server's metrics by name without the prefix, and labels without the model's name and the only engine's number."""
    return by_name_and_labels(sample for family in metrics.collect() for sample in family.samples)


def by_name_and_labels(samples: Iterable[Sample]) -> dict[tuple[str, Labels], float]:
    return {
        (
            sample.name.removeprefix("stepgraph:"),
            frozenset((name, value) for name, value in sample.labels.items() if name not in ("model_name", "engine")),
        ): sample.value
        for sample in samples
    }


def scrape(metrics: OneServer) -> dict[tuple[str, Labels], float]:
    """What Prometheus reads, the process's metrics included."""
    families = parser.text_string_to_metric_families(metrics.render(None)[0].decode())
    return by_name_and_labels(sample for family in families for sample in family.samples)


def value(metrics: OneServer, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def count_and_sum(metrics: OneServer, name: str) -> tuple[float, float]:
    return value(metrics, f"{name}_count"), value(metrics, f"{name}_sum")


def test_every_metric_of_the_server_carries_the_name_of_the_model():
    name = 'a "model" \\ of\nours'
    text = OneServer(name).render(None)[0].decode()
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("stepgraph:"):
                assert sample.labels["model_name"] == name, sample


def test_two_servers_in_one_process_share_no_counts():
    busy, idle = busy_metrics(), OneServer("tiny")
    assert value(busy, "generation_tokens_total") == 3
    assert value(idle, "generation_tokens_total") == 0


def test_steps_are_counted_by_how_they_ran_and_their_tokens_by_use():
    metrics = OneServer("tiny")
    metrics.on_progress(Progress([], [IN_GRAPH, IN_GRAPH, EAGER], LOAD))
    assert value(metrics, "steps_total", mode="graph", reason="", kind="mixed") == 2
    assert value(metrics, "steps_total", mode="eager", reason="not_pure_prefill", kind="decode") == 1
    assert value(metrics, "step_tokens_total", kind="real") == 2 * 21 + 2
    assert value(metrics, "step_tokens_total", kind="padding") == 2 * 3
    assert value(metrics, "graph_replays_total", tokens="24", rows="8", drafts="3", variant="plain") == 2
    assert [name for name, _ in samples(metrics)].count("graph_replays_total") == 1
    assert count_and_sum(metrics, "iteration_tokens_total") == (3, 44)
    assert count_and_sum(metrics, "step_duration_seconds") == (3, pytest.approx(0.058))
    assert count_and_sum(metrics, "host_step_seconds") == (3, pytest.approx(0.004))


def test_steps_that_never_happened_are_counted_as_none_so_that_rates_start_at_the_first():
    metrics = OneServer("tiny")
    for kind in ("prefill", "decode", "mixed"):
        assert value(metrics, "steps_total", mode="graph", reason="", kind=kind) == 0
        for reason in EagerReason:
            assert value(metrics, "steps_total", mode="eager", reason=reason, kind=kind) == 0
    assert value(metrics, "request_success_total", finished_reason="error") == 0


def test_phases_of_a_complete_answer_are_measured():
    metrics = OneServer("tiny")
    metrics.on_end(ENDED)
    assert value(metrics, "request_success_total", finished_reason="stop") == 1
    assert {
        name: count_and_sum(metrics, name)
        for name in (
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
            "e2e_request_latency_seconds",
            "request_time_per_output_token_seconds",
            "request_prompt_tokens",
            "request_generation_tokens",
            "request_params_max_tokens",
        )
    } == {
        "request_queue_time_seconds": (1, 0.5),
        "request_prefill_time_seconds": (1, 1.0),
        "request_decode_time_seconds": (1, 2.0),
        "request_inference_time_seconds": (1, 3.0),
        "e2e_request_latency_seconds": (1, 3.75),
        "request_time_per_output_token_seconds": (1, 0.5),
        "request_prompt_tokens": (1, 20),
        "request_generation_tokens": (1, 5),
        "request_params_max_tokens": (1, 64),
    }


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_requests_that_were_given_up_are_counted_and_not_measured(reason):
    metrics = OneServer("tiny")
    metrics.on_end(replace(ENDED, finish_reason=reason, admitted_at=None, first_token_at=None, last_token_at=None))
    assert value(metrics, "request_success_total", finished_reason=reason) == 1
    assert value(metrics, "e2e_request_latency_seconds_count") == 0


def test_an_answer_of_one_token_has_no_time_between_tokens():
    metrics = OneServer("tiny")
    metrics.on_end(replace(ENDED, num_output_tokens=1, last_token_at=ENDED.first_token_at))
    assert value(metrics, "request_time_per_output_token_seconds_count") == 0
    assert count_and_sum(metrics, "request_decode_time_seconds") == (1, 0)


def test_responses_are_counted_by_route_and_status():
    metrics = OneServer("tiny")
    for status in (200, 200, 404):
        metrics.on_response("/v1/models/{name}", status)
    assert value(metrics, "http_requests_total", handler="/v1/models/{name}", status="200") == 2
    assert value(metrics, "http_requests_total", handler="/v1/models/{name}", status="404") == 1


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "unauthorized"), (413, "too_large"), (429, "queue_full"), (503, "unavailable")]
)
def test_refusals_are_counted_and_an_unhealthy_server_refuses_nothing_by_saying_so(status, reason):
    metrics = OneServer("tiny")
    metrics.on_response("/v1/completions", status)
    metrics.on_response("/health", status)
    assert value(metrics, "requests_refused_total", reason=reason) == 1
    assert sum(count for (name, _), count in samples(metrics).items() if name == "requests_refused_total") == 1


@given(st.lists(st.floats(0, 1e4) | st.sampled_from([0.001, 0.00125, 0.025, 80.0])))
def test_a_bucket_counts_the_values_up_to_its_bound(seconds):
    metrics = OneServer("tiny")
    for gap in seconds:
        metrics.on_token_gap(gap)
    buckets = {
        dict(labels)["le"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "inter_token_latency_seconds_bucket"
    }
    assert {float(bound): count for bound, count in buckets.items()} == {
        float(bound): sum(gap <= float(bound) for gap in seconds) for bound in buckets
    }
    count, total = count_and_sum(metrics, "inter_token_latency_seconds")
    assert (count, total) == (len(seconds), pytest.approx(sum(seconds)))


@pytest.mark.parametrize("name", VLLM_BOUNDS)
def test_histograms_have_the_bounds_of_vllm_and_go_on_to_infinity(name):
    bounds = {float(dict(labels)["le"]) for sample, labels in samples(OneServer("tiny")) if sample == f"{name}_bucket"}
    assert {*VLLM_BOUNDS[name], inf} <= bounds


lives = st.lists(
    st.lists(
        st.tuples(*(st.integers(0, most) for most in (50, 5000, 5000, 64, 9, 90, 500, 90)), st.integers(0, 9)),
        max_size=4,
    ),
    max_size=4,
)
"""For each process of the engine and each of its messages: what the counts of `Load` grew by, and new tokens."""


@settings(max_examples=50)
@given(lives)
def test_counts_never_fall_and_lose_nothing_when_the_engine_is_restarted(lives):
    metrics = OneServer("tiny")
    expected = dict.fromkeys((*COUNTS.values(), "generation_tokens_total"), 0.0)

    def check() -> None:
        seen = samples(metrics)
        assert {name: seen[name, frozenset()] for name in expected} == expected

    for life in lives:
        metrics.on_state(EngineState.READY)
        check()
        load = IDLE
        for *grown, num_tokens in life:
            growth = dict(zip(COUNTS, grown, strict=True))
            load = load._replace(num_running=1, **{name: getattr(load, name) + more for name, more in growth.items()})
            metrics.on_progress(Progress([TokenUpdate("a", (1,) * num_tokens)], [], load))
            for name, more in growth.items():
                expected[COUNTS[name]] += more
            expected["generation_tokens_total"] += num_tokens
            check()
        metrics.on_state(EngineState.RESTARTING)
        check()


def test_restarts_are_counted_by_what_caused_them():
    metrics = OneServer("tiny")
    for cause in (RestartCause.HUNG, RestartCause.DIED, RestartCause.HUNG):
        metrics.on_restart(cause)
    assert {cause: value(metrics, "engine_restarts_total", cause=cause) for cause in RestartCause} == {
        "died": 1,
        "hung": 2,
    }


def test_proposals_are_counted_by_what_came_of_them_and_by_position():
    metrics = busy_metrics()
    assert {
        name: value(metrics, f"spec_decode_{name}_total")
        for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "saved_steps")
    } == {"num_drafts": 10, "num_draft_tokens": 28, "num_accepted_tokens": 15, "saved_steps": 14}
    per_position = [
        value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position=str(position)) for position in range(3)
    ]
    assert per_position == [9, 4, 2]
    assert value(metrics, "spec_decode_mean_accepted_length") == 2.5


def test_accepted_proposals_are_counted_on_when_the_engine_is_restarted_and_their_mean_starts_anew():
    metrics = busy_metrics()
    metrics.on_state(EngineState.RESTARTING)
    assert value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position="1") == 4
    assert value(metrics, "spec_decode_mean_accepted_length") == 1
    metrics.on_state(EngineState.READY)
    metrics.on_progress(Progress([], [], IDLE._replace(drafts=2, accepted_per_position=(1, 1, 1))))
    assert value(metrics, "spec_decode_num_accepted_tokens_per_pos_total", position="1") == 5
    assert value(metrics, "spec_decode_num_accepted_tokens_total") == 18
    assert value(metrics, "spec_decode_mean_accepted_length") == 2.5


def test_a_server_that_does_not_speculate_says_so_in_numbers():
    metrics = OneServer("tiny")
    assert value(metrics, "spec_decode_num_drafts_total") == 0
    assert value(metrics, "spec_decode_mean_accepted_length") == 1
    assert not [name for name, _ in samples(metrics) if name == "spec_decode_num_accepted_tokens_per_pos_total"]


def test_a_dead_engine_is_down_and_runs_nothing():
    metrics = busy_metrics()
    assert value(metrics, "engine_up") == 1
    assert value(metrics, "num_requests_running") == 2
    metrics.on_state(EngineState.RESTARTING)
    for name in ("engine_up", "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "graphs"):
        assert value(metrics, name) == 0, name
    metrics.on_state(EngineState.READY)
    assert value(metrics, "engine_up") == 1


def test_scrapers_that_come_often_do_not_hold_up_steps():
    engine, counts = FakeEngine(0), FrontCounts.of(1)
    engine.answers[AskRanks] = [(0, "cpu", 1000, 30, 80, 0.5, 0.0)]
    supervisor = Supervisor([Launch({})], "tiny", {})
    supervisor.engines = [engine]
    supervisor.attach(OneFront(one_engine(), lambda: counts))
    texts = [asyncio.run(supervisor.metrics(None))[0].decode() for _ in range(3)]
    assert all(
        'stepgraph:rank_graph_bytes{device="cpu",engine="0",model_name="tiny",rank="0"} 1000.0' in t for t in texts
    )
    assert [type(question) for question in engine.heard] == [AskRanks]


def test_each_rank_of_an_engine_is_measured_until_its_process_ends():
    metrics = busy_metrics()
    waiting = {rank: value(metrics, "rank_waiting_share", rank=rank, device=f"cuda:{rank}") for rank in ("0", "1")}
    assert waiting == {"0": 0.0, "1": 0.75}
    assert value(metrics, "rank_free_memory_bytes", rank="1", device="cuda:1") == 30
    metrics.on_state(EngineState.RESTARTING)
    assert not [name for name, _ in samples(metrics) if name.startswith("rank_")]


def test_engines_are_told_apart_by_number_and_fronts_are_summed_also_those_that_are_gone():
    metrics = OneServer("tiny", num_engines=2)
    metrics.on_progress(Progress([], [IN_GRAPH], LOAD))
    gone, other = FrontCounts.of(2), FrontCounts.of(2)
    assert gone.num_unfinished == [0, 0]
    for front, engine, seconds in ((gone, 0, 0.3), (gone, 1, 0.2), (other, 1, 0.1)):
        front.engines[engine].on_first_token(seconds)
        front.engines[engine].on_end(ENDED)
        front.on_response("/v1/completions", 429)
        front.num_connections, front.num_unfinished = 3, [0, 2]
    metrics.front.add(decode(encode(gone)), is_gone=True)
    metrics.front.add(decode(encode(other)))
    found = {
        (sample.name.removeprefix("stepgraph:"), sample.labels.get("engine"), sample.labels.get("le")): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }
    assert [found["num_requests_running", engine, None] for engine in "01"] == [LOAD.num_running, 0]
    assert [found["time_to_first_token_seconds_count", engine, None] for engine in "01"] == [1, 2]
    assert found["time_to_first_token_seconds_sum", "1", None] == pytest.approx(0.3)
    assert [found["time_to_first_token_seconds_bucket", "1", bound] for bound in ("0.1", "0.25")] == [1, 2]
    assert [found["e2e_request_latency_seconds_count", engine, None] for engine in "01"] == [1, 2]
    assert found["http_requests_total", None, None] == metrics.front.refused["queue_full"] == 3
    assert found["http_connections", None, None] == 3
    assert metrics.front.num_unfinished == [0, 2]


def test_build_info_tells_versions():
    [labels] = [dict(labels) for name, labels in samples(OneServer("tiny")) if name == "build_info"]
    assert labels["version"] == __version__
    assert labels.keys() == {"version", "python", "torch"}


def test_the_process_is_measured_too():
    assert scrape(OneServer("tiny"))["process_resident_memory_bytes", frozenset()] > 0


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        (None, "text/plain; version=0.0.4; charset=utf-8"),
        ("text/html,*/*;q=0.8", "text/plain; version=0.0.4; charset=utf-8"),
        (f"{OPEN_METRICS};q=0.7,text/plain;version=0.0.4;q=0.3", OPEN_METRICS),
    ],
)
def test_scrapers_get_the_format_they_accept(accept, content_type):
    content, given = busy_metrics().render(accept)
    assert given.startswith(content_type)
    assert content.endswith(b"# EOF\n") == ("openmetrics" in content_type)


def test_both_formats_are_read_as_what_was_counted():
    metrics = busy_metrics()
    families = openmetrics_parser.text_string_to_metric_families(metrics.render(OPEN_METRICS)[0].decode())
    open_metrics = by_name_and_labels(sample for family in families for sample in family.samples)
    plain = scrape(metrics)
    for sample, number in samples(metrics).items():
        if sample[0] == "vllm:lora_requests_info":  # the time
            assert open_metrics[sample] <= plain[sample] <= number
        else:
            assert open_metrics[sample] == plain[sample] == number, sample


@pytest.mark.parametrize("name", ["tiny", 'a "model" \\ of\nours', "モデル"])
def test_the_text_is_what_prometheus_client_would_write(name, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.8e9)
    metrics = busy_metrics(name)
    for load in (LOAD, LOAD._replace(num_running=2**40, kv_usage=1 / 3)):
        metrics.on_progress(Progress([], [], load))
        families = list(metrics.collect())
        registry = SimpleNamespace(collect=lambda families=families: families)
        assert plain_text(families) == generate_latest(registry)


ACCEPTABLE = r"(application/openmetrics-text|text/plain) ?; ?(version|escaping)=[^,]{0,5}(,.{0,5})?"


@settings(max_examples=50)
@given(st.text() | st.from_regex(ACCEPTABLE))
def test_any_accept_header_gets_an_answer(accept):
    content, content_type = OneServer("tiny").render(accept)
    assert b"stepgraph:engine_up" in content
    assert content_type.startswith(("text/plain", "application/openmetrics-text"))


def test_documentation_lists_every_metric_with_its_type_and_labels():
    documented = {
        name: (kind, frozenset(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels in re.findall(
            r"^\| `((?:stepgraph|vllm):\w+)` \| (\w+) \|([^|]*)\|", DOCS.read_text(encoding="utf-8"), re.MULTILINE
        )
    }
    registered = {}
    for family in busy_metrics().collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "le", "engine"}
        registered[family.name + suffix] = (family.type, frozenset(labels))
    assert documented == registered


def test_queries_in_the_documentation_are_for_samples_that_exist():
    queries = re.findall(r"^\| [^|`]+ \| `([^`]*stepgraph:[^`]*)`", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(queries) >= 9
    named = {name for query in queries for name in re.findall(r"stepgraph:(\w+)", query)}
    assert named <= {name for name, _ in samples(busy_metrics())}


def test_tokens_of_experts_go_on_counting_when_an_engine_is_started_again():
    metrics = busy_metrics()
    before = {expert: value(metrics, "expert_tokens_total", expert=expert) for expert in "0123"}
    assert before == {"0": 3, "1": 1, "2": 0, "3": 12}
    assert value(metrics, "rank_expert_tokens", rank="1", device="cuda:1") == 12
    assert value(metrics, "expert_imbalance") == 3
    assert value(metrics, "expert_rank_imbalance") == 1.5
    metrics.on_state(EngineState.RESTARTING)
    assert value(metrics, "expert_tokens_total", expert="3") == 12
    assert value(metrics, "expert_rank_imbalance") == 1
    metrics.on_state(EngineState.READY)
    metrics.engine.ranks = [RankInfo(0, "cuda:0", 0, 0, 0, 0.0, 0.0, 6, (1, 1, 2, 2))]
    assert [value(metrics, "expert_tokens_total", expert=expert) for expert in "0123"] == [4, 2, 2, 14]


def test_a_model_without_experts_has_no_metrics_of_any():
    metrics = OneServer("tiny")
    metrics.on_state(EngineState.READY)
    metrics.engine.ranks = [RankInfo(0, "cpu", 0, 0, 0, 0.0, 0.0)]
    assert not [name for name, _ in samples(metrics) if "expert" in name]

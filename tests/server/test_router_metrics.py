"""What routers outside the server read of it, as they read it, without being told any name."""

import os
import threading
from dataclasses import dataclass

import pytest
from live import TINY_FLAGS, LiveServer, running_server
from lora_folders import matrices, save_adapter
from msgspec.structs import replace
from observed import LOAD, READY, OneServer, busy_metrics
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser

from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.messages import Load, Progress

OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
IDLE = Load(0, 0, 0.0, 0, 0, 0, 0, 0, 0.0)
GAUGES = ("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc")


@dataclass
class Endpoint:
    """A server as the endpoint picker of llm-d and of the Gateway API sees it: of each family the series with the newest time
    stamp, which is the first where there are none; of `lora_requests_info` the one with the largest value."""

    waiting: float
    running: float
    kv_usage: float
    block_size: int | None = None
    num_blocks: int | None = None
    max_lora: int | None = None
    loaded: frozenset[str] = frozenset()
    awaited: frozenset[str] = frozenset()
    resident: frozenset[str] | None = None

    @classmethod
    def of(cls, text: str, content_type: str = "text/plain") -> "Endpoint":
        read = openmetrics_parser if "openmetrics" in content_type else parser
        families = {
            family.name: family.samples
            for family in read.text_string_to_metric_families(text)
            if family.name.startswith("vllm:")
        }
        assert all(
            family.type == "gauge" for family in read.text_string_to_metric_families(text) if "vllm:" in family.name
        )
        first = {name.removeprefix("vllm:"): samples[0] for name, samples in families.items() if samples}
        endpoint = cls(*(first[name].value for name in GAUGES))
        if cache := first.get("cache_config_info"):
            endpoint.block_size = int(cache.labels["block_size"])
            endpoint.num_blocks = int(cache.labels["num_gpu_blocks"])
        if lora := families.get("vllm:lora_requests_info"):
            labels = max(lora, key=lambda sample: sample.value).labels
            endpoint.max_lora = int(labels["max_lora"])
            endpoint.loaded = _names(labels["running_lora_adapters"])
            endpoint.awaited = _names(labels["waiting_lora_adapters"])
        if "num_gpu_loaded_lora_adapters" in first:
            series = families.get("vllm:lora_adapter_loaded", [])
            endpoint.resident = frozenset(each.labels["adapter_name"] for each in series if each.value == 1)
            assert all(each.labels["level"] == "gpu" for each in series)
        return endpoint


def _names(listed: str) -> frozenset[str]:
    return frozenset(name.strip() for name in listed.split(",") if name.strip())


def of_metrics(metrics: OneServer, accept: str | None = None) -> Endpoint:
    text, content_type = metrics.render(accept)
    return Endpoint.of(text.decode(), content_type)


@pytest.mark.parametrize("accept", [None, OPEN_METRICS])
def test_a_picker_with_its_defaults_finds_all_that_the_protocol_asks_for(accept) -> None:
    assert of_metrics(busy_metrics(), accept) == Endpoint(
        waiting=LOAD.num_waiting,
        running=LOAD.num_running,
        kv_usage=LOAD.kv_usage,
        block_size=READY.block_size,
        num_blocks=READY.num_kv_blocks,
        max_lora=2,
        loaded=frozenset({"poet"}),
        awaited=frozenset({"critic"}),
        resident=frozenset({"poet"}),
    )


def test_engines_behind_one_address_are_one_server_to_a_picker() -> None:
    metrics = OneServer("tiny", num_engines=3)
    first, second, gone = metrics.engines
    larger = replace(READY, num_kv_blocks=27)
    for engine, ready in ((first, READY), (second, larger), (gone, READY)):
        engine.on_status(EngineStatus(EngineState.READY, ready))
    first.on_progress(
        Progress([], [], IDLE._replace(num_running=2, num_waiting=5, kv_usage=1.0, adapters=("/adapters/poet",)))
    )
    second.on_progress(Progress([], [], IDLE._replace(num_running=1, kv_usage=0.0, adapters=("/adapters/critic",))))
    gone.on_progress(Progress([], [], IDLE._replace(num_running=9, kv_usage=1.0, awaited_adapters=("/adapters/poet",))))
    gone.on_status(EngineStatus(EngineState.RESTARTING))
    assert of_metrics(metrics) == Endpoint(
        waiting=5,
        running=3,
        kv_usage=0.25,
        block_size=16,
        num_blocks=45,
        max_lora=6,
        loaded=frozenset({"poet", "critic"}),
        resident=frozenset({"poet", "critic"}),
    )


def test_before_an_engine_is_there_nothing_is_made_up() -> None:
    assert of_metrics(OneServer("tiny")) == Endpoint(0, 0, 0)


def test_a_server_without_adapters_says_nothing_of_any() -> None:
    metrics = OneServer("tiny")
    plain = replace(READY, max_adapters=0)
    metrics.engine.on_status(EngineStatus(EngineState.READY, plain))
    assert b"lora" not in metrics.render(None)[0]


def test_an_adapter_has_all_its_names_and_no_name_becomes_two() -> None:
    metrics = busy_metrics()
    metrics.adapters |= {"bard": "/adapters/poet", "a,b": "/adapters/poet"}
    endpoint = of_metrics(metrics)
    assert endpoint.loaded == {"poet", "bard"}
    assert endpoint.resident == {"poet", "bard", "a,b"}
    del metrics.adapters["poet"], metrics.adapters["critic"]
    assert (of_metrics(metrics).loaded, of_metrics(metrics).awaited) == ({"bard"}, frozenset())


def scrape(server: LiveServer) -> Endpoint:
    reply = server.get("/metrics")
    return Endpoint.of(reply.body.decode(), reply.headers["content-type"])


def test_a_running_server_tells_which_adapters_it_has_and_which_it_reads(tiny_model, tmp_path) -> None:
    folders = {name: tmp_path / name for name in ("one", "two", "three")}
    for seed, folder in enumerate(folders.values()):
        folder.mkdir()
        save_adapter(folder, matrices(seed))
    flags = ["--served-model-name", "tiny", "--enable-lora", "--max-lora-rank", "4", "--max-loras", "2", *TINY_FLAGS]
    modules = ["--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())]

    def ask(server: LiveServer, name: str) -> int:
        body = {"model": name, "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
        return server.post("/v1/completions", body).status

    with running_server(tiny_model, [*flags, *modules]) as server:
        idle = scrape(server)
        assert (idle.block_size, idle.num_blocks, idle.max_lora) == (16, 257, 2)
        assert (idle.loaded, idle.awaited, idle.resident) == (frozenset(), frozenset(), frozenset())
        for name in folders:
            assert ask(server, name) == 200
        server.wait_for(lambda: scrape(server).loaded == {"two", "three"})  # the first made room
        assert scrape(server).resident == {"two", "three"}

        config = folders["one"] / "adapter_config.json"
        content = config.read_text()
        config.unlink()
        os.mkfifo(config)  # who reads it waits for who writes it
        statuses: list[int] = []
        asking = threading.Thread(target=lambda: statuses.append(ask(server, "one")))
        asking.start()
        server.wait_for(lambda: scrape(server).awaited == {"one"})
        assert scrape(server).loaded == {"two", "three"}
        with config.open("w"):  # it reads nothing, and the request is refused
            pass
        asking.join(60)
        assert statuses == [400]
        server.wait_for(lambda: not scrape(server).awaited)
        config.unlink()
        config.write_text(content)
        assert ask(server, "one") == 200
        server.wait_for(lambda: scrape(server).loaded == {"one", "three"})
        server.wait_idle()
        assert scrape(server).running == scrape(server).waiting == 0

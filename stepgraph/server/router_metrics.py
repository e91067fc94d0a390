"""The few series that routers outside the server read, under the names of vLLM that they look for.

llm-d's and the Gateway API's endpoint picker take one series of a name for a whole address: without time stamps, the first. So
each name has one here, which tells of all engines behind the address together. What is measured is in `metrics` under our
names, engine by engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from stepgraph.server.counts import EngineCounts
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.messages import Ready

_PREFIX = "vllm:"


def router_metrics(model_name: str, engines: Sequence[EngineCounts], adapters: Mapping[str, str]) -> Iterator[Metric]:
    """Those of a server. What engines must have told first comes once one has.

    Args:
        model_name: a label.
        engines: what they do.
        adapters: folders of the LoRA adapters that requests can name.
    """

    def gauge(name: str, documentation: str, value: float, **labels: str) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name", *labels))
        family.add_metric((model_name, *labels.values()), value)
        return family

    loads = [engine.load for engine in engines]
    yield gauge("num_requests_running", "Requests that have a slot.", sum(load.num_running for load in loads))
    yield gauge("num_requests_waiting", "Requests that wait for a slot.", sum(load.num_waiting for load in loads))
    yield gauge("kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", _kv_usage(engines))
    known = [engine.ready for engine in engines if engine.ready is not None]
    if not known:
        return
    yield gauge(
        "cache_config_info",
        "Tokens of a KV block, and how many blocks there are.",
        1,
        block_size=str(known[0].block_size),
        num_gpu_blocks=str(sum(ready.num_kv_blocks for ready in known)),
    )
    if known[0].max_adapters:
        yield from _of_adapters(model_name, known, engines, adapters)


def _of_adapters(
    model_name: str, known: Sequence[Ready], engines: Sequence[EngineCounts], adapters: Mapping[str, str]
) -> Iterator[Metric]:
    """`lora_requests_info` is what the model server protocol asks for; the others have taken its place in newer routers."""
    held = {folder for engine in engines for folder in engine.load.adapters}
    awaited = {folder for engine in engines for folder in engine.load.awaited_adapters} - held
    max_adapters = sum(ready.max_adapters for ready in known)
    loaded = _named(adapters, held)
    info = GaugeMetricFamily(
        _PREFIX + "lora_requests_info",
        "LoRA adapters in the device's memory, and those being read for requests; the value is the time.",
        labels=("model_name", "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
    )
    listed = (_listed(loaded), _listed(_named(adapters, awaited)))
    info.add_metric((model_name, str(max_adapters), *listed), time.time())
    yield info
    residents = GaugeMetricFamily(
        _PREFIX + "lora_adapter_loaded",
        "1 for each LoRA adapter in the device's memory.",
        labels=("model_name", "adapter_name", "level", "pinned"),
    )
    for name in loaded:
        residents.add_metric((model_name, name, "gpu", "false"), 1)
    yield residents
    for name, documentation, value in (
        ("num_gpu_loaded_lora_adapters", "LoRA adapters in the device's memory.", len(held)),
        ("max_gpu_lora_adapters", "LoRA adapters that it holds at once.", max_adapters),
    ):
        family = GaugeMetricFamily(_PREFIX + name, documentation, labels=("model_name",))
        family.add_metric((model_name,), value)
        yield family


def _kv_usage(engines: Sequence[EngineCounts]) -> float:
    """Of the blocks of all engines that are there."""
    there = [
        (engine.load.kv_usage, engine.ready.num_kv_blocks)
        for engine in engines
        if engine.state is EngineState.READY and engine.ready is not None
    ]
    num_blocks = sum(blocks for _, blocks in there)
    return sum(usage * blocks for usage, blocks in there) / num_blocks if num_blocks else 0.0


def _named(adapters: Mapping[str, str], folders: set[str]) -> list[str]:
    """The names of the adapters in these folders, which may have several."""
    return sorted(name for name, folder in adapters.items() if os.path.abspath(folder) in folders)


def _listed(names: Sequence[str]) -> str:
    """As a label. A name with a comma would be read as two others, and is left out."""
    return ",".join(name for name in names if "," not in name)

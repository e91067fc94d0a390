"""What of the machine each engine gets, and how many fronts there are."""

import os

import pytest

from stepgraph import LLM
from stepgraph.config import EngineConfig, serve_config
from stepgraph.config.server import split_replicas
from stepgraph.errors import ConfigError
from stepgraph.server.places import default_fronts, places
from stepgraph.server.spawn import ALONE


def config(device: str) -> EngineConfig:
    return EngineConfig.from_settings(model="smollm2", device=device)


@pytest.fixture
def machine(monkeypatch):
    """Sets the processor's cores, and the devices that can be seen."""

    def of(cores: int, devices: str | None = None) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
        if devices is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", devices)

    return of


def test_one_engine_has_the_machine_to_itself(machine) -> None:
    machine(8, "0,1")
    assert places(config("cuda"), 1) == places(config("cpu"), 1) == [ALONE]


def test_engines_on_a_cpu_share_its_cores(machine) -> None:
    machine(7, "")
    for device in ("cpu", "auto"):
        assert [place.cores for place in places(config(device), 3)] == [(0, 1), (2, 3), (4, 5)]
    assert [place.cores for place in places(config("cpu"), 8)] == [None] * 8


def test_each_engine_sees_its_own_devices(machine) -> None:
    machine(8, "4, GPU-c0ffee,6")
    for device in ("cuda", "auto"):
        assert [(place.devices, place.cores) for place in places(config(device), 2)] == [
            ("4", None),
            ("GPU-c0ffee", None),
        ]


def test_more_engines_than_devices_are_refused_with_both_numbers(machine) -> None:
    machine(8, "0,1,2")
    with pytest.raises(ConfigError, match=r"^data_parallel_size=4 needs 4 devices, and 3 can be seen"):
        places(config("cuda"), 4)


@pytest.mark.parametrize(
    ("cores", "devices", "device", "num_engines", "fronts"),
    [
        (2, "0", "cuda", 1, 1),
        (16, "0", "cuda", 1, 3),
        (9, "0", "cuda", 1, 2),
        (64, "0,1", "auto", 2, 6),
        (16, "0,1", "cuda", 2, 3),
        (128, "", "auto", 2, 1),
        (128, "0,1", "cpu", 2, 1),
    ],
)
def test_fronts_are_as_many_as_engines_may_keep_busy_and_cores_allow(
    machine, cores, devices, device, num_engines, fronts
) -> None:
    machine(cores, devices)
    assert default_fronts(config(device), num_engines) == fronts


def test_in_python_there_is_one_engine() -> None:
    with pytest.raises(ConfigError, match="api_server_count is a setting of the server, which only `stepgraph serve`"):
        LLM("smollm2", api_server_count=2)
    with pytest.raises(ConfigError, match="data_parallel_size=2 without enable_expert_parallel gives independent repl"):
        LLM("smollm2", data_parallel_size=2)


def test_ranks_that_share_experts_are_one_engine(machine) -> None:
    settings = {
        "model": "m",
        "data_parallel_size": 2,
        "enable_expert_parallel": True,
        "engine_worker_queue_port": 65535,
    }
    of_engine, num_engines = split_replicas(settings)
    assert (of_engine, num_engines) == (settings, 1)
    engine, _ = serve_config(settings)
    assert engine.parallel.num_ranks == 2
    machine(8, "0,1,2,3")
    assert default_fronts(engine, 1) == 1
    of_engine, num_engines = split_replicas(settings | {"enable_expert_parallel": False})
    assert (of_engine.get("data_parallel_size"), num_engines) == (None, 2)

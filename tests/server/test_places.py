"""What of the machine each engine gets, and how many fronts there are."""

import os

import pytest

from stepgraph import LLM
from stepgraph.config import EngineConfig, serve_config
from stepgraph.config.server import ServerConfig, split_replicas
from stepgraph.config.transfer import SECRET_VARIABLE
from stepgraph.errors import ConfigError
from stepgraph.server import spawn
from stepgraph.server.places import default_fronts, places
from stepgraph.server.spawn import ALONE, Place


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
    server = ServerConfig()
    assert split_replicas(settings, server) == [settings]
    engine, _ = serve_config(settings)
    assert engine.parallel.num_ranks == 2
    machine(8, "0,1,2,3")
    assert default_fronts(engine, 1) == 1
    engines = split_replicas(settings | {"enable_expert_parallel": False}, server)
    assert [one.get("data_parallel_size") for one in engines] == [None, None]


def roles(engines) -> list[str]:
    return [one["splitwise_role"] for one in engines]


def test_devices_of_two_roles_make_an_engine_each_or_one_of_as_many_ranks() -> None:
    server = ServerConfig(prefill_devices=(2, 3), decode_devices=(0, 1))
    assert roles(split_replicas({"model": "m"}, server)) == ["prefill", "prefill", "decode", "decode"]
    assert roles(split_replicas({"model": "m", "tensor_parallel_size": 2}, server)) == ["prefill", "decode"]


def test_engines_of_a_server_have_ports_of_their_own() -> None:
    settings = {"model": "m", "kv_transfer_port": 5600}
    split = split_replicas(settings, ServerConfig(prefill_devices=(0,), decode_devices=(1,)))
    replicas = split_replicas(settings | {"data_parallel_size": 2}, ServerConfig())
    assert [[one["kv_transfer_port"] for one in engines] for engines in (split, replicas)] == [[5600, 5601]] * 2
    assert "kv_transfer_port" not in split_replicas({"model": "m"}, ServerConfig())[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefill_devices": (0,)}, "prefill_devices needs decode_devices beside it"),
        ({"decode_devices": (0,)}, "decode_devices needs prefill_devices beside it"),
        ({"prefill_devices": (0, 1), "decode_devices": (1,)}, "device 1 is given twice"),
        ({"prefill_devices": (-1,), "decode_devices": (1,)}, "too small"),
        (
            {"prefill_devices": (0,), "decode_devices": (1,), "data_parallel_size": 2},
            "data_parallel_size=2 and prefill_d",
        ),
        (
            {"prefill_devices": (0,), "decode_devices": (1,), "splitwise_role": "mixed"},
            "splitwise_role='mixed' and pref",
        ),
        (
            {"prefill_devices": (0, 1), "decode_devices": (2,), "tensor_parallel_size": 2},
            "decode_devices has 1 devices, and each engine needs tensor_parallel_size=2",
        ),
        (
            {"prefill_devices": (0,), "decode_devices": (1,), "enable_prefix_caching": False},
            "enable_prefix_caching is off",
        ),
        (
            {"prefill_devices": (0,), "decode_devices": (1,), "kv_transfer_port": 5600},
            "kv_transfer_port=5600 can be re",
        ),
    ],
)
def test_devices_that_cannot_be_are_refused(settings, message, monkeypatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match=message):
        serve_config({"model": "m"} | settings)


def test_the_last_of_the_engines_ports_must_be_one(monkeypatch) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, "0123456789abcdef")
    settings = {"prefill_devices": (0,), "decode_devices": (1,), "kv_transfer_port": 65535}
    with pytest.raises(ConfigError, match="kv_transfer_port=65536 is not a port"):
        serve_config({"model": "m"} | settings)


def test_each_role_gets_the_devices_that_were_named(machine) -> None:
    machine(8, "4,GPU-c0ffee,6")
    assert [place.devices for place in places(config("cuda"), 2, (2, 0))] == ["6", "4"]
    with pytest.raises(
        ConfigError, match="there is no device 3, which prefill_devices or decode_devices names: 3 can be"
    ):
        places(config("cuda"), 2, (0, 3))
    machine(8, "0,1,2,3")
    two_ranks = EngineConfig.from_settings(model="m", device="cuda", tensor_parallel_size=2)
    assert [place.devices for place in places(two_ranks, 2, (3, 2, 0, 1))] == ["3,2", "0,1"]


def test_on_a_cpu_the_devices_numbers_are_the_order_of_equal_shares(machine) -> None:
    machine(4, "")
    assert [place.cores for place in places(config("cpu"), 2, (7, 3))] == [(2, 3), (0, 1)]
    machine(1, "")
    assert [place.cores for place in places(config("cpu"), 2, (0, 1))] == [None, None]


def test_an_engines_process_is_given_the_secret_in_its_environment(monkeypatch) -> None:
    spawned = []
    monkeypatch.setattr(spawn, "_spawn", lambda command, environment: spawned.append((command, environment)))
    spawn.spawn_engine(Place(secret="hush"))
    [(command, environment)] = spawned
    assert environment == {**os.environ, SECRET_VARIABLE: "hush"}
    assert "hush" not in command

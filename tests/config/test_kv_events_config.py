"""Settings of KV events."""

import json

import pytest

from stepgraph.config import EngineConfig, serve_config
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.config.server import ServerConfig, split_replicas
from stepgraph.errors import ConfigError

VLLMS = {
    "enable_kv_cache_events": True,
    "publisher": "zmq",
    "endpoint": "tcp://*:6000",
    "replay_endpoint": "tcp://*:6100",
    "buffer_steps": 5,
    "hwm": 6,
    "max_queue_size": 7,
    "topic": "kv@pod@model",
}


def test_vllms_config_is_understood() -> None:
    config = EngineConfig.from_settings(kv_events_config=json.dumps(VLLMS)).kv_events
    assert config == KVEventsConfig(
        enable_kv_cache_events=True,
        kv_events_endpoint="tcp://*:6000",
        kv_events_replay_endpoint="tcp://*:6100",
        kv_events_buffer_steps=5,
        kv_events_hwm=6,
        kv_events_max_queue_size=7,
        kv_events_topic="kv@pod@model",
    )
    assert EngineConfig.from_settings(kv_events_config=VLLMS).kv_events == config


def test_it_is_off_unless_it_is_turned_on() -> None:
    assert not EngineConfig().kv_events.enable_kv_cache_events
    for config in ({}, {"publisher": "null"}, {"enable_kv_cache_events": False, "endpoint": "tcp://*:1"}):
        assert not EngineConfig.from_settings(kv_events_config=config).kv_events.enable_kv_cache_events


@pytest.mark.parametrize(
    ("endpoint", "of_rank_2", "is_bound"),
    [
        ("tcp://*:5557", "tcp://*:5559", True),
        ("tcp://0.0.0.0:5557", "tcp://0.0.0.0:5559", True),
        ("tcp://[::]:5557", "tcp://[::]:5559", True),
        ("tcp://gateway.llm-d:5557", "tcp://gateway.llm-d:5559", False),
        ("tcp://127.0.0.1:5557", "tcp://127.0.0.1:5559", False),
        ("ipc:///run/kv", "ipc:///run/kv_dp2", True),
    ],
)
def test_endpoints(endpoint, of_rank_2, is_bound) -> None:
    found = KVEventsConfig(kv_events_endpoint=endpoint).endpoint
    assert (found.of_rank(0), found.of_rank(2), found.is_bound) == (endpoint, of_rank_2, is_bound)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"}}, "contradicts"),
        ({"kv_events_config": {"publisher": "kafka"}}, "publisher='kafka' is not supported: events go over ZeroMQ"),
        ({"kv_events_config": {"endpiont": "tcp://*:1"}}, "kv_events_config has no key 'endpiont'"),
        ({"kv_events_config": "yes"}, "kv_events_config is not JSON"),
        ({"kv_events_endpoint": "tcp://*"}, r"kv_events_endpoint='tcp://\*' is not an endpoint; write"),
        ({"kv_events_endpoint": "tcp://*:0"}, "is not an endpoint"),
        ({"kv_events_endpoint": "inproc://cache"}, "is not an endpoint"),
        ({"kv_events_replay_endpoint": "udp://*:7"}, "kv_events_replay_endpoint='udp://.*is not an endpoint"),
        ({"kv_events_replay_endpoint": "tcp://*:5557"}, "take the same ports"),
        ({"kv_events_endpoint": "ipc://a", "kv_events_replay_endpoint": "ipc://a"}, "are both 'ipc://a'"),
        ({"kv_events_endpoint": "tcp://*:65535", "kv_events_rank": 1}, "needs ports up to 65536"),
        ({"kv_events_endpoint": "tcp://*:" + "9" * 5000}, "is not an endpoint"),
        ({"kv_events_endpoint": "ipc:///run/\udc80"}, "is not an endpoint"),
        ({"kv_events_replay_endpoint": "ipc:///run/a\0b"}, "is not an endpoint"),
        ({"kv_events_topic": "kv@\udc80"}, r"kv_events_topic='kv@\\udc80' is not Unicode text"),
        ({"kv_events_hwm": 2**31}, "kv_events_hwm=2147483648 is more than ZeroMQ counts"),
        ({"kv_events_salts": "none"}, "choose one of: digest, plain"),
        ({"enable_kv_cache_events": True, "enable_prefix_caching": False}, "enable_prefix_caching is off"),
        (
            {
                "enable_kv_cache_events": True,
                "kv_events_replay_endpoint": "tcp://*:5558",
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
            },
            "of 2 engines or ranks take the same ports, for each rank has the next ones; leave 2 between them",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_settings(**settings)


def test_engines_of_a_server_have_ranks_one_after_another() -> None:
    settings = {"model": "smollm2", "data_parallel_size": 3, "kv_events_config": {**VLLMS, "rank": 4}}
    engines = split_replicas(settings, ServerConfig())
    assert [EngineConfig.from_settings(**engine).kv_events.kv_events_rank for engine in engines] == [4, 5, 6]


def test_engines_whose_ports_would_meet_are_refused_before_they_start() -> None:
    config = {**VLLMS, "replay_endpoint": "tcp://*:6002"}
    settings = {"model": "smollm2", "data_parallel_size": 3, "kv_events_config": config}
    with pytest.raises(ConfigError, match="of 3 engines or ranks take the same ports"):
        serve_config(settings)
    serve_config({**settings, "data_parallel_size": 2})

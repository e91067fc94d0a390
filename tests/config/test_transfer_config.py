"""Settings of engines that take keys and values over from each other."""

import json

import pytest

from stepgraph.config import EngineConfig
from stepgraph.config.transfer import SECRET_VARIABLE, TransferConfig
from stepgraph.errors import ConfigError

SECRET = "0123456789abcdef"


def settings_of(**kv_transfer_config) -> TransferConfig:
    return EngineConfig.from_settings(kv_transfer_config=json.dumps(kv_transfer_config)).transfer


@pytest.mark.parametrize(
    ("settings", "gives", "takes"),
    [
        ({}, False, False),
        ({"splitwise_role": "prefill"}, True, False),
        ({"splitwise_role": "decode"}, False, True),
        ({"kv_transfer_port": 0}, True, True),
        ({"kv_transfer_backend": "auto"}, True, True),
        ({"splitwise_role": "decode", "kv_transfer_port": 0}, False, True),
    ],
)
def test_who_gives_and_who_takes_and_only_who_gives_has_signals(settings, gives, takes) -> None:
    config = TransferConfig(**settings)
    assert (config.gives, config.takes) == (gives, takes)
    assert config.is_connected == (gives or takes)
    assert config.signals_layers == gives


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"kv_connector": "NixlConnector", "kv_role": "kv_producer"},
            {"splitwise_role": "prefill", "kv_transfer_backend": "auto"},
        ),
        (
            {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "fail"},
            {"splitwise_role": "decode", "kv_transfer_backend": "auto", "kv_load_failure": "fail"},
        ),
        (
            {
                "kv_connector": "NixlConnector",
                "kv_role": "kv_both",
                "kv_ip": "localhost",
                "kv_port": 5600,
                "kv_rank": 1,
            },
            {"kv_transfer_backend": "auto", "kv_transfer_host": "localhost", "kv_transfer_port": 5600},
        ),
        ({"engine_id": "p0", "kv_buffer_device": "cpu"}, {}),
    ],
)
def test_vllms_config_is_understood(given, expected) -> None:
    assert settings_of(**given) == TransferConfig(**expected)


def test_an_engine_of_vllms_both_roles_has_to_do_with_others() -> None:
    config = settings_of(kv_connector="NixlConnector", kv_role="kv_both")
    assert (config.gives, config.takes) == (True, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_transfer_port": 65536}, "kv_transfer_port=65536 is not a port; the largest is 65535"),
        ({"kv_transfer_host": ""}, "kv_transfer_host is empty"),
        ({"kv_transfer_host": "0.0.0.0"}, "others must be told one address"),
        ({"splitwise_role": "both"}, "choose one of: mixed, prefill, decode"),
        ({"splitwise_role": "prefill", "enable_prefix_caching": False}, "enable_prefix_caching is off"),
        ({"kv_transfer_port": 0, "enable_prefix_caching": False}, "enable_prefix_caching is off"),
        (
            {"splitwise_role": "decode", "data_parallel_size": 2, "enable_expert_parallel": True},
            "data_parallel_size=2 of one engine",
        ),
        ({"kv_lease": 0}, "kv_lease=0 is too small"),
        ({"kv_transfer_config": {"kv_connector": "MultiConnector"}}, "kv_connector='MultiConnector' is not supported"),
        ({"kv_transfer_config": {"kv_connector_extra_config": {"kv_lease_duration": 9}}}, "--kv-lease is kv_lease_dur"),
        ({"kv_transfer_config": {"kv_rol": "kv_both"}}, "kv_transfer_config has no key 'kv_rol'"),
        (
            {"splitwise_role": "decode", "kv_transfer_config": {"kv_role": "kv_producer"}},
            "splitwise_role is 'decode' and, in kv_transfer_config, 'prefill'",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_value_and_the_reason(settings, message) -> None:
    with pytest.raises(ConfigError) as refused:
        EngineConfig.from_settings(**settings)
    assert message in str(refused.value)


def test_a_mixed_engine_alone_needs_no_prefix_cache() -> None:
    assert not EngineConfig.from_settings(enable_prefix_caching=False).transfer.is_connected


def test_the_secret_is_in_the_file_else_in_the_environment(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    in_file = TransferConfig(kv_transfer_secret_file=str(tmp_path / "secret"))
    assert (in_file.secret(), TransferConfig().secret()) == (SECRET.encode(), b"")
    monkeypatch.setenv(SECRET_VARIABLE, SECRET[::-1])
    assert (in_file.secret(), TransferConfig().secret()) == (SECRET.encode(), SECRET[::-1].encode())
    monkeypatch.setenv(SECRET_VARIABLE, "short")
    with pytest.raises(ConfigError, match=f"{SECRET_VARIABLE}: a secret needs 16 characters") as refused:
        TransferConfig().secret()
    assert "short" not in str(refused.value)
    with pytest.raises(ConfigError, match="kv_transfer_secret_file='nowhere' cannot be read"):
        TransferConfig(kv_transfer_secret_file="nowhere").secret()


@pytest.mark.parametrize("host", ["192.0.2.1", "127.0.0.1"])
def test_a_port_that_others_reach_needs_a_secret(host, monkeypatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    config = TransferConfig(kv_transfer_port=0, kv_transfer_host=host)
    with pytest.raises(ConfigError, match="can be reached by others"):
        config.secret()
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    assert config.secret() == SECRET.encode()

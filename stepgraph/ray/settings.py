"""What an application under Ray Serve is built of: settings of `stepgraph serve`, and options of two deployments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve

from stepgraph.config.engine import GROUPS, EngineConfig
from stepgraph.config.fields import homes_of, refuse_unknown, scalar_type
from stepgraph.config.file import settings_in
from stepgraph.config.other_engines import value_of
from stepgraph.config.server import SERVE_PARTS, ServerConfig, serve_config
from stepgraph.errors import ConfigError
from stepgraph.ray.placement import place

_AUTOSCALING_POLICY = "stepgraph.ray.autoscaling:requests_and_cache"
_ROUTER = "stepgraph.ray.router.PrefixAwareRouter"
_STATS_S = 1.0
"""Routers hear of requests that are not theirs so often."""
_OTHER_REQUESTS = 64
"""That a replica takes beside those that run and wait: for what needs no slot, and to refuse what finds no place."""
_STOP_S = 10.0
"""What a replica gets to end its engine."""
_MAX_AT_INGRESS = 100_000
_FULL = 0.8
"""Replicas are added when requests take this share of the slots."""

_OF_HTTP_SERVER = frozenset(
    {
        "host",
        "port",
        "metrics_port",
        "engine_worker_queue_port",
        "api_server_count",
        "max_connections",
        "max_header_kib",
        "header_timeout",
        "body_timeout",
        "keep_alive_timeout",
        "stall_timeout",
        "access_log",
    }
)
"""Settings about connections, which here are Ray's."""


@dataclass(frozen=True)
class Plan:
    """An application before it is built."""

    settings: dict[str, Any]
    """Of the engine and the server, as `serve_config` takes them."""
    engine: EngineConfig
    server: ServerConfig
    engine_options: dict[str, Any]
    """Of the deployment whose replicas are engines, as `serve.deployment` takes them."""
    ingress_options: dict[str, Any]
    """Likewise, of the one in front."""


def read_plan(config: Mapping[str, Any]) -> Plan:
    """An application as users write it.

    Args:
        config: settings of `stepgraph serve` by their names, and `deployment_config`, `ingress_deployment_config` and
            `accelerator_type`. What Ray's `LLMConfig` calls `model_loading_config` and `engine_kwargs` is understood, and so is
            a list `llm_configs` of one.

    Raises:
        ConfigError: unknown setting, bad value, or settings that contradict each other.
    """
    given = _without_wrapping(dict(config))
    options = _mapping(given.pop("deployment_config", None), "deployment_config")
    ingress_options = _mapping(given.pop("ingress_deployment_config", None), "ingress_deployment_config")
    accelerator = given.pop("accelerator_type", None)
    settings = settings_in(given)
    for name in sorted(_OF_HTTP_SERVER & settings.keys()):
        raise ConfigError(
            f"{name} is about the HTTP server of `stepgraph serve`, and here Ray Serve's takes the connections; leave it out, "
            "and set Ray's: http_options of serve.start, or of Serve's configuration file"
        )
    if settings.get("enable_admin_endpoints"):
        raise ConfigError(
            "enable_admin_endpoints changes what one engine serves, and an application has several that come and go; leave it "
            "out, and deploy the application anew"
        )
    if settings.get("data_parallel_size", 1) != 1 and not settings.get("enable_expert_parallel"):
        raise ConfigError(
            f"data_parallel_size={settings['data_parallel_size']} is for engines of one server, and here each replica is an "
            "engine; set num_replicas in deployment_config"
        )
    engine, server = serve_config(settings)
    return Plan(
        settings,
        engine,
        server,
        _engine_options(options, engine, server, accelerator),
        {
            "name": "StepgraphIngress",
            "max_ongoing_requests": _MAX_AT_INGRESS,
            "graceful_shutdown_timeout_s": server.shutdown_timeout + _STOP_S,
            **_known(ingress_options, "ingress_deployment_config"),
        },
    )


def from_command_line(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `serve run` passes on, where all values are text, in the types that `read_plan` takes."""
    homes = homes_of(SERVE_PARTS)

    def read(name: str, value: Any) -> Any:
        if not isinstance(value, str) or name in GROUPS:
            return value
        name = name.replace("-", "_")
        if name in homes and scalar_type(SERVE_PARTS[homes[name]], name)[0] is str:
            return value
        return value_of(value)

    return {name: read(name, value) for name, value in arguments.items()}


def _without_wrapping(given: dict[str, Any]) -> dict[str, Any]:
    """Flat settings, of what may have the form of Ray's `LLMConfig`."""
    if (configs := given.pop("llm_configs", None)) is not None:
        if not isinstance(configs, list | tuple) or len(configs) != 1:
            raise ConfigError(
                "llm_configs must be a list of one: an application serves one model; build one for each, with a route_prefix "
                "of its own"
            )
        given = {**_mapping(configs[0], "llm_configs[0]"), **given}
    loading = _mapping(given.pop("model_loading_config", None), "model_loading_config")
    refuse_unknown(loading, ("model_id", "model_source"))
    names = {}
    if (model_id := loading.get("model_id")) is not None:
        names = {"model": loading.get("model_source") or model_id, "served_model_name": model_id}
    for source, found in (("engine_kwargs", _mapping(given.pop("engine_kwargs", None), "engine_kwargs")), ("", names)):
        for name, value in found.items():
            if given.setdefault(name, value) != value:
                raise ConfigError(
                    f"{name} is {given[name]!r} and, in {source or 'model_loading_config'}, {value!r}; leave one out"
                )
    return given


def _engine_options(
    options: dict[str, Any], engine: EngineConfig, server: ServerConfig, accelerator: str | None
) -> dict[str, Any]:
    options = _known(options, "deployment_config")
    slots = engine.scheduler.max_num_seqs
    engines_that_answer = (
        1 if server.decode_devices is None else len(server.decode_devices) // engine.parallel.num_ranks
    )
    placed = place(engine, server, options, accelerator)
    for name in ("ray_actor_options", "placement_group_bundles", "placement_group_strategy"):
        options.pop(name, None)
    autoscaling = options.pop("autoscaling_config", None)
    if options.get("num_replicas") == "auto" and autoscaling is None:
        autoscaling = {}
    if autoscaling is not None:
        options["autoscaling_config"] = {
            "target_ongoing_requests": max(1.0, _FULL * slots * engines_that_answer),
            "policy": {"policy_function": _AUTOSCALING_POLICY},
            **_mapping(autoscaling, "deployment_config: autoscaling_config"),
        }
    return {
        "name": "StepgraphEngine",
        "max_ongoing_requests": slots * engines_that_answer + server.max_queue + _OTHER_REQUESTS,
        "graceful_shutdown_timeout_s": server.shutdown_timeout + _STOP_S,
        "request_router_config": {
            "request_router_class": _ROUTER,
            "request_router_kwargs": {
                "max_adapters": engine.lora.max_loras,
                "keeps_prefixes": engine.cache.enable_prefix_caching,
            },
            "request_routing_stats_period_s": _STATS_S,
        },
        **placed,
        **options,
    }


def _known(options: dict[str, Any], name: str) -> dict[str, Any]:
    """The options, if Serve has them."""
    known = set(inspect.signature(serve.deployment).parameters) - {"_func_or_class"}
    try:
        refuse_unknown(options, known)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    return dict(options)


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must be a mapping, not {type(value).__name__}")
    return dict(value)

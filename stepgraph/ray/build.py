"""From settings to an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application

from stepgraph.ray.ingress import Ingress
from stepgraph.ray.replica import EngineReplica
from stepgraph.ray.settings import from_command_line, read_plan


def build_openai_app(config: Mapping[str, Any]) -> Application:
    """The application: an ingress with the APIs of `stepgraph serve`, and engines behind it.

    Args:
        config: see `read_plan`.

    Returns:
        What `serve.run` takes.

    Raises:
        ConfigError: see `read_plan`.
    """
    plan = read_plan(config)
    engines = serve.deployment(**plan.engine_options)(EngineReplica).bind(plan.settings)
    return serve.deployment(**plan.ingress_options)(serve.ingress()(Ingress)).bind(engines, plan.server.max_body_mib)


def app(args: dict[str, Any]) -> Application:
    """The same for ``serve run stepgraph.ray:app model=smollm2``, and for `args` of Serve's configuration file."""
    return build_openai_app(from_command_line(args))

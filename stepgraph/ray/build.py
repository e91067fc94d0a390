"""From settings to an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application, Deployment

from stepgraph.errors import ConfigError
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
    engines = _deployment("deployment_config", EngineReplica, plan.engine_options).bind(plan.settings)
    ingress = _deployment("ingress_deployment_config", serve.ingress()(Ingress), plan.ingress_options)
    return ingress.bind(engines, plan.server.max_body_mib)


def app(args: dict[str, Any]) -> Application:
    """The same for ``serve run stepgraph.ray:app model=smollm2``, and for `args` of Serve's configuration file."""
    return build_openai_app(from_command_line(args))


def _deployment(setting: str, runs: type, options: Mapping[str, Any]) -> Deployment:
    """One of Serve's, which looks at the values of its options itself."""
    try:
        return serve.deployment(**options)(runs)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise ConfigError(f"{setting}: {'; '.join(reasons)}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{setting}: {error}") from error

"""stepgraph under Ray Serve: a deployment whose replicas are engines, and an ingress with the APIs of `stepgraph serve`.

    from ray import serve
    from stepgraph.ray import build_openai_app

    serve.run(build_openai_app({"model": "smollm2", "deployment_config": {"num_replicas": 2}}))

Or ``serve run stepgraph.ray:app model=smollm2``. See docs/ray.md.
"""

from __future__ import annotations

from stepgraph.errors import ConfigError

try:
    import ray.serve  # noqa: F401  # the package of that name, not this one
except ModuleNotFoundError as error:
    raise ConfigError(f"stepgraph.ray needs {error.name}; run: pip install 'stepgraph[ray]'") from error

from stepgraph.ray.build import app, build_openai_app

__all__ = ["app", "build_openai_app"]

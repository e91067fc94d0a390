"""How many replicas there should be: as many as the requests need, and as their keys and values need. Pure."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext

KV_TARGET = 0.85
"""Share of a KV cache that requests may hold: in a fuller one, they soon wait for each other, or lose their blocks."""


def requests_and_cache(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """A policy for Serve's `autoscaling_config`, which applies its own limits, factors and delays to what this returns.

    The larger of two numbers counts. One is by requests, running and waiting, of which a replica shall have
    `target_ongoing_requests`. The other is by keys and values: what the running requests hold, and what those that wait will,
    if it is as much for each.

    Returns:
        The number wanted, and no state.
    """
    assert ctx.config is not None
    by_requests = ctx.total_num_requests / ctx.config.get_target_ongoing_requests()
    stats = ctx.aggregated_metrics or {}
    running, waiting = stats.get("num_running", {}), stats.get("num_waiting", {})
    by_cache = 0.0
    for replica, usage in stats.get("kv_usage", {}).items():
        share_waiting = waiting.get(replica, 0.0) / max(1.0, running.get(replica, 0.0))
        by_cache += usage / KV_TARGET * (1 + share_waiting)
    return max(by_requests, by_cache), {}

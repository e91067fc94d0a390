"""Where a replica runs: on one node, with a device for each rank of its engine.

A replica is one actor, and its engine's processes are the actor's children, which see the GPUs that Ray gave the actor. So all of
them are in one bundle, which Ray never spreads over nodes; ranks share a machine's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from stepgraph.config.engine import EngineConfig
from stepgraph.config.server import ServerConfig
from stepgraph.devices import AUTO
from stepgraph.errors import ConfigError
from stepgraph.server.places import visible_gpus

_ONE_MACHINE = "the ranks of an engine share the memory of one machine"


def place(
    engine: EngineConfig, server: ServerConfig, options: Mapping[str, Any], accelerator: str | None
) -> dict[str, Any]:
    """The options of a deployment that say what of a node a replica needs.

    Args:
        options: what the user gave, of which `ray_actor_options` and `placement_group_*` are looked at.
        accelerator: the kind of GPU, as Ray names it.

    Raises:
        ConfigError: a replica would need several nodes, or its GPUs are not those that its engine needs.
    """
    ranks = engine.parallel.num_ranks
    pairs = (*(server.prefill_devices or ()), *(server.decode_devices or ()))
    num_devices = len(pairs) or ranks
    bundles = options.get("placement_group_bundles")
    actor = options.get("ray_actor_options") or {}
    if not isinstance(actor, Mapping):
        raise ConfigError(f"ray_actor_options={actor!r} must be a mapping")
    if bundles is not None and not (isinstance(bundles, list) and all(isinstance(one, Mapping) for one in bundles)):
        raise ConfigError(f"placement_group_bundles={bundles!r} must be a list of mappings")
    if bundles is not None and len(bundles) != 1:
        raise ConfigError(
            f"placement_group_bundles has {len(bundles)} bundles, and a replica needs one with all its devices: {_ONE_MACHINE}; "
            "leave it out"
        )
    if (strategy := options.get("placement_group_strategy", "STRICT_PACK")) != "STRICT_PACK":
        raise ConfigError(f"placement_group_strategy={strategy!r} must be 'STRICT_PACK': {_ONE_MACHINE}; leave it out")
    actor = dict(actor)
    bundle = {} if bundles is None else dict(bundles[0])
    num_gpus = actor.pop("num_gpus", bundle.pop("GPU", None))
    num_cpus = actor.pop("num_cpus", bundle.pop("CPU", num_devices))
    if _on_gpus(engine):
        if num_gpus is None:
            num_gpus = num_devices
        is_share = num_devices == 1 and 0 < num_gpus <= 1
        if num_gpus != num_devices and not is_share:
            raise ConfigError(
                f"ray_actor_options: num_gpus={num_gpus}, and a replica has {num_devices} devices ({_sizes(engine, server)}); "
                "leave it out"
            )
        _check_nodes("GPU", num_gpus, _sizes(engine, server))
    elif num_gpus:
        raise ConfigError(
            f"ray_actor_options: num_gpus={num_gpus}, and the engine runs on device={engine.model.device}; leave it out"
        )
    else:
        num_gpus = 0
    if accelerator is not None:
        if not num_gpus:
            raise ConfigError(
                f"accelerator_type={accelerator!r} is for GPUs, and the engine runs on none; leave it out"
            )
        actor["accelerator_type"] = accelerator
    actor |= {"num_cpus": num_cpus, "num_gpus": num_gpus}
    if num_devices == 1 and bundles is None:
        return {"ray_actor_options": actor}
    needs = {"CPU": num_cpus, "GPU": num_gpus, **bundle, **actor.get("resources", {})}
    return {
        "ray_actor_options": actor,
        "placement_group_bundles": [{name: amount for name, amount in needs.items() if amount}],
        "placement_group_strategy": "STRICT_PACK",
    }


def _on_gpus(engine: EngineConfig) -> bool:
    device = engine.model.device
    if device == AUTO:  # whoever builds the application need not be where it runs
        if ray.is_initialized():
            return ray.cluster_resources().get("GPU", 0) > 0
        return bool(visible_gpus())
    return device == "cuda"


def _check_nodes(name: str, amount: float, sizes: str) -> None:
    """Refuse what no node can hold. A cluster without any may grow some."""
    if not ray.is_initialized():
        return
    largest = max((node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"]), default=0)
    if 0 < largest < amount:
        raise ConfigError(
            f"{sizes} needs {amount} {name}s on one node, and the largest has {largest:g}: {_ONE_MACHINE}; lower it, or add such "
            "a node first"
        )


def _sizes(engine: EngineConfig, server: ServerConfig) -> str:
    """The setting by which there are so many devices."""
    return engine.parallel.size_setting if server.prefill_devices is None else "prefill_devices and decode_devices"

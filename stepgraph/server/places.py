"""Where several engines run, and how many fronts there are for them. Known before anything heavy is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from stepgraph.config import EngineConfig
from stepgraph.devices import AUTO
from stepgraph.errors import ConfigError
from stepgraph.server.spawn import Place

_FRONTS_PER_ENGINE = 3
"""Fronts that a GPU's engine may keep busy: an H200 gives some 60k tokens per second of a small model, a front streams 22k."""
_CORES_PER_FRONT = 4
"""Of those that the engines leave: fronts are not alone on a machine."""


def places(config: EngineConfig, num_engines: int, devices: Sequence[int] | None = None) -> list[Place]:
    """For each engine, what of the machine is its own. One alone has all.

    Args:
        config: of all engines.
        num_engines: how many there are.
        devices: their devices' numbers, engine by engine; default: from 0 on.

    Raises:
        ConfigError: there are too few devices.
    """
    if num_engines == 1:
        return [Place()]
    device, ranks = config.model.device, config.parallel.num_ranks
    visible = visible_gpus()
    if device == "cpu" or (device == AUTO and not visible):
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // num_engines
        order = range(num_engines) if devices is None else _order([min(own) for own in _shared_out(devices, ranks)])
        return [
            Place(cores=tuple(cores[number * share : (number + 1) * share]) or None, is_one_of_many=True)
            for number in order
        ]
    what = f"data_parallel_size={num_engines}" if devices is None else "prefill_devices"
    if device not in (AUTO, "cuda"):
        raise ConfigError(
            f"{what} is for device=cuda and device=cpu; start a server for each of the devices {device!r}, behind a proxy"
        )
    if devices is not None and max(devices) >= len(visible):
        raise ConfigError(
            f"there is no device {max(devices)}, which prefill_devices or decode_devices names: {len(visible)} can be seen, "
            "numbered from 0; name others, or let more be seen (CUDA_VISIBLE_DEVICES)"
        )
    if num_engines * ranks > len(visible):
        each = "" if ranks == 1 else f", each of tensor_parallel_size={ranks},"
        raise ConfigError(
            f"{what}{each} needs {num_engines * ranks} devices, and {len(visible)} can be seen; lower it, or let more be seen "
            "(CUDA_VISIBLE_DEVICES)"
        )
    return [
        Place(devices=",".join(visible[number] for number in own), is_one_of_many=True)
        for own in _shared_out(range(num_engines * ranks) if devices is None else devices, ranks)
    ]


def _shared_out(devices: Sequence[int], num_ranks: int) -> list[Sequence[int]]:
    """The devices of each engine."""
    return [devices[first : first + num_ranks] for first in range(0, len(devices), num_ranks)]


def _order(numbers: Sequence[int]) -> list[int]:
    """Of each number, how many of the others are less."""
    return [sorted(numbers).index(number) for number in numbers]


def visible_gpus() -> list[str]:
    """NVIDIA's devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(number) for number in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return [name.strip() for name in given.split(",") if name.strip() and name.strip() != "-1"]


def default_fronts(config: EngineConfig, num_engines: int) -> int:
    """How many fronts there are where nobody said it: one, but for GPUs' engines on machines with many cores."""
    if config.model.device == "cpu" or not visible_gpus():
        return 1
    spare = len(os.sched_getaffinity(0)) - num_engines * config.parallel.num_ranks
    return max(1, min(_FRONTS_PER_ENGINE * num_engines, spare // _CORES_PER_FRONT))

"""What keeps devices from sharing a model, told before anything is loaded."""

from __future__ import annotations

import sys

import torch

from stepgraph.config import EngineConfig, ParallelConfig
from stepgraph.devices import AUTO, BUILT_IN
from stepgraph.errors import ConfigError
from stepgraph.models.config import DecoderConfig
from stepgraph.models.sharing import no_experts, shard_experts, spread_experts
from stepgraph.models.source import ModelSource
from stepgraph.parallel.shard import Shard


def check_devices(config: EngineConfig) -> None:
    """Check that there are as many devices as are to share a model.

    Raises:
        ConfigError: there are too few, they differ, or nothing is known of how they could.
    """
    wanted, device = config.parallel.size_setting, config.model.device
    if sys.platform == "win32":
        raise ConfigError(
            f"{wanted} needs processes that share memory by descriptors, which Windows does not have; use 1"
        )
    if device not in (AUTO, *BUILT_IN):
        raise ConfigError(
            f"{wanted} needs devices that exchange sums, of which device={device!r} says nothing; use "
            f"1, or device={' or '.join(map(repr, sorted(BUILT_IN)))}"
        )
    if device == "cuda" or (device == AUTO and torch.cuda.is_available()):
        _check_gpus(config.parallel)


def check_parts(config: EngineConfig, source: ModelSource) -> None:
    """Check that the model can be cut into as many parts as there are to be devices; raises as `create_model`."""
    parallel = config.parallel
    if isinstance(source.config, DecoderConfig):
        shard = Shard(0, parallel.num_ranks)
        if parallel.data_parallel_size > 1:
            spread_experts(source.config, shard)
        else:
            shard_experts(source.config, shard, expert_parallel=parallel.enable_expert_parallel)
    elif parallel.enable_expert_parallel:
        raise no_experts(source.config.architecture, "which would run through transformers")


def _check_gpus(parallel: ParallelConfig) -> None:
    there, size, wanted = torch.cuda.device_count(), parallel.num_ranks, parallel.size_setting
    if there < size:
        instead = f"{there}{' or less' if there > 1 else ''}" if there else "device='cpu'"
        raise ConfigError(
            f"{wanted} needs as many GPUs, and torch sees {there}; use {instead}, or make more visible "
            "(CUDA_VISIBLE_DEVICES)"
        )
    first, *others = ((gpu.name, gpu.total_memory) for gpu in map(torch.cuda.get_device_properties, range(size)))
    for index, other in enumerate(others, start=1):
        # Memory of GPUs of one kind differs by what their firmware keeps back.
        if other[0] != first[0] or abs(other[1] - first[1]) > first[1] // 20:
            raise ConfigError(
                f"{wanted} needs equal GPUs, and GPU 0 is {_describe(*first)} where GPU {index} is "
                f"{_describe(*other)}; choose equal ones with CUDA_VISIBLE_DEVICES, or fewer"
            )


def _describe(name: str, memory: int) -> str:
    return f"{name} with {memory / 2**30:.0f} GiB"

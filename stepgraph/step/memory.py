"""How many KV blocks fit beside everything else. Decided before the first capture, since graphs bake the cache's addresses."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import CacheConfig, EngineConfig
from stepgraph.errors import ConfigError
from stepgraph.layers.cache import CacheSpec, Item, LayerCache, PagedCache
from stepgraph.platforms import DeviceMemory, Platform
from stepgraph.step.groups import Arrangement, arrange

logger = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 1 << 30
"""KV cache on CPU unless num_kv_blocks says otherwise; grows to one request of max_model_len if that is more."""
_CPU_SHARE = 0.5
"""Of the free memory, what the cache may take at most: other programs live there too."""


@dataclass(frozen=True)
class CacheLayout:
    """The caches of all layers: how many bytes they take, and what follows from them for those who grant blocks."""

    model_specs: tuple[CacheSpec, ...]
    draft_specs: tuple[CacheSpec, ...]
    block_size: int
    num_lines: int  # the null line included
    num_drafts: int  # most proposals of a row
    lookahead: int = 0  # of the drafter
    apart_for: int = (
        0  # tokens of the longest request, if layers with a window may be in block groups of their own; else 0
    )

    def __post_init__(self) -> None:
        for index, spec in enumerate(self.specs):
            assert spec.shares is None or spec.shares < index, (index, spec)

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        """Of the model's layers, then of the drafter's."""
        return self.model_specs + self.draft_specs

    @property
    def groups(self) -> BlockGroups:
        """Which share block tables."""
        return self._arrangement.groups

    @property
    def splits(self) -> tuple[int, ...]:
        """Of each block group, the blocks of a place."""
        return self._arrangement.splits

    @property
    def block_bytes(self) -> int:
        """Of the blocks of a place."""
        parts = {self._arrangement.homes[index].part: self._of_block(index) for index, _ in self._owners}
        return self.groups.size * sum(item.num_bytes for items in parts.values() for item in items)

    @property
    def line_bytes(self) -> int:
        """Of all lines, in all layers together."""
        return self.num_lines * sum(
            item.num_bytes for _, spec in self._owners for item in spec.per_line(self.num_drafts)
        )

    def sizes(self, num_kv_blocks: int) -> list[int]:
        """Bytes of each of the tensors that `allocate` makes."""
        return [
            count * item.num_bytes
            for index, spec in self._owners
            for count, items in self._items(index, spec, num_kv_blocks)
            for item in items
        ]

    def allocate(self, num_kv_blocks: int, memory: DeviceMemory) -> tuple[LayerCache, ...]:
        """The cache of each layer, zero, block 0 being the null block and line 0 the null line. There are as many blocks as
        `BlockGroups.num_blocks` says."""
        caches: list[LayerCache] = []
        parts: dict[int, list[Tensor]] = {}
        for index, spec in enumerate(self.specs):
            if spec.shares is not None:
                caches.append(caches[spec.shares])
                continue
            block_tensors, line_tensors = (
                [memory.zeros((count, *item.shape), item.dtype) for item in items]
                for count, items in self._items(index, spec, num_kv_blocks)
            )
            home = self._arrangement.homes[index]
            made = parts.setdefault(home.part, block_tensors)
            views = [tensor.view(-1, *item.shape) for tensor, item in zip(made, self._of_block(index), strict=True)]
            cache = spec.cache(views, line_tensors)
            if home.group:
                assert isinstance(cache, PagedCache), cache
                cache = cache._replace(group=home.group)
            caches.append(cache)
        return tuple(caches)

    @property
    def has_lines(self) -> bool:
        """Whether any layer has lines."""
        return any(spec.per_line(self.num_drafts) for spec in self.specs)

    @property
    def reuses_prefixes(self) -> bool:
        """Whether requests can start from blocks that others have filled."""
        return all(spec.starts_from_blocks for spec in self.specs)

    def _items(self, index: int, spec: CacheSpec, num_kv_blocks: int) -> tuple[tuple[int, tuple[Item, ...]], ...]:
        """How many blocks, and how many lines, are made for a layer, each with what one of them has in each tensor. The first of
        those that share a part of blocks is the one it is made for."""
        homes = self._arrangement.homes
        is_first = all(homes[other].part != homes[index].part for other, _ in self._owners if other < index)
        of_blocks = self._of_block(index) if is_first else ()
        return (self.groups.num_blocks(num_kv_blocks), of_blocks), (self.num_lines, spec.per_line(self.num_drafts))

    def _of_block(self, index: int) -> tuple[Item, ...]:
        """What a block has of a layer that owns it."""
        return self.specs[index].per_block(self.block_size // self.splits[self._arrangement.homes[index].group])

    @property
    def _owners(self) -> list[tuple[int, CacheSpec]]:
        return [(index, spec) for index, spec in enumerate(self.specs) if spec.shares is None]

    @cached_property
    def _arrangement(self) -> Arrangement:
        return arrange(self.specs, len(self.model_specs), self.lookahead, self.block_size, self.apart_for)


class OperatorCount(TorchDispatchMode):
    """Counts the operators that do work while it is entered, about as many as a captured graph of them has nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def place_weights(parameters: list[nn.Parameter], config: CacheConfig, platform: Platform) -> DeviceMemory:
    """Put a loaded model's parameters where the engine can give their memory up; returns that memory.

    To be called before views of the parameters are kept: parameters may move. Buffers, such as rotary tables, stay where they
    are: they are small, and no checkpoint would bring them back.
    """
    sizes = [parameter.untyped_storage().nbytes() for parameter in parameters]
    memory = platform.memory(sizes, sleepable=config.enable_sleep_mode)
    memory.adopt(parameters)
    platform.release_cached_memory()
    return memory


def kv_cache_dtype(config: CacheConfig, platform: Platform, dtype: torch.dtype) -> torch.dtype:
    """In what keys and values of a model whose activations are of `dtype` are kept; ConfigError if the platform cannot."""
    if config.kv_cache_dtype == "auto":
        return dtype
    if not platform.supports_fp8:
        raise ConfigError("kv_cache_dtype=fp8 needs a GPU of compute capability 8.9 or later; leave it at auto")
    return torch.float8_e4m3fn


class CacheSizes(NamedTuple):
    """What there is room for."""

    num_blocks: int
    """The null block included."""
    num_checkpoints: int
    """Lines beside those of the layout, for states that are kept for others."""


def choose_sizes(
    layout: CacheLayout,
    config: EngineConfig,
    platform: Platform,
    *,
    max_model_len: int,
    activation_bytes: int,
    later_bytes: int,
    num_ranks: int = 1,
) -> CacheSizes:
    """KV blocks of the engine, as configured, or as many as memory and use allow; and checkpoints of its requests' states.

    On a GPU that is ``gpu_memory_utilization`` of the device, less what is in use (the weights are loaded), less the activations
    of the largest step twice (run eagerly and in the graphs' memory pool), less what comes later, less the slots' lines. Where
    layers have states and prefixes are reused, there is a checkpoint for each slot, if all of them take no more memory than is
    left to blocks, and leave enough for a request of `max_model_len`; else there are as many as do.

    Args:
        layout: of the caches, with a line for each slot.
        config: `num_kv_blocks` decides if it is set.
        platform: asked for its memory.
        max_model_len: tokens of the longest request.
        activation_bytes: measured peak of the largest step.
        later_bytes: what captured graphs, of variants and numbers of proposals that are not yet in use too, and their buffers
            take beside activations.
        num_ranks: that share the model, and the host's memory where that is the platform's.

    Raises:
        ConfigError: the blocks do not fit into free memory, or there is room for none.
    """
    block_bytes, line_bytes = layout.block_bytes, layout.line_bytes
    state_bytes = line_bytes // layout.num_lines
    blocks_per_request = -(-max_model_len // layout.block_size)
    num_blocks = config.cache.num_kv_blocks
    free = platform.free_memory_bytes()
    reuses_states = state_bytes > 0 and config.cache.enable_prefix_caching
    num_checkpoints = config.scheduler.max_num_seqs * reuses_states
    if num_blocks is None:
        if platform.shares_host_memory:
            needed = (blocks_per_request + 1) * block_bytes + line_bytes + num_checkpoints * state_bytes
            wanted = max(_CPU_CACHE_BYTES // num_ranks, needed)
            budget = min(wanted, int(free * _CPU_SHARE / num_ranks))
            sum_of_parts = f"{_gib(free)} are free, of which the cache may take {_CPU_SHARE / num_ranks:.0%}"
        else:
            total = platform.total_memory_bytes()
            usable = int(total * config.cache.gpu_memory_utilization)
            budget = usable - (total - free) - 2 * activation_bytes - later_bytes
            sum_of_parts = (
                f"gpu_memory_utilization={config.cache.gpu_memory_utilization} of {_gib(total)} is {_gib(usable)}, of which "
                f"{_gib(total - free)} are in use, {_gib(2 * activation_bytes)} go to activations and {_gib(later_bytes)} to "
                "graphs"
            )
        most = config.scheduler.max_num_seqs * blocks_per_request + 1
        left = budget - line_bytes
        if reuses_states:
            spare = min(left // 2, left - min(most, blocks_per_request + 1) * block_bytes)
            num_checkpoints = max(0, min(num_checkpoints, spare // state_bytes))
        num_blocks = min((left - num_checkpoints * state_bytes) // block_bytes, most) if block_bytes else most
        if num_blocks < 2:
            raise ConfigError(
                f"no memory is left for the KV cache: {sum_of_parts}; free memory, raise gpu_memory_utilization, lower "
                f"max_num_batched_tokens, or set num_kv_blocks{_or_states(line_bytes, config)}"
            )
    elif reuses_states:
        of_blocks = num_blocks * block_bytes
        spare = min(of_blocks or free, free - of_blocks - line_bytes)
        num_checkpoints = max(0, min(num_checkpoints, spare // state_bytes))
    needed = num_blocks * block_bytes + line_bytes + num_checkpoints * state_bytes
    if needed > free:
        raise ConfigError(
            f"the KV cache needs {_gib(needed)} and {_gib(free)} are free; lower num_kv_blocks, max_model_len or "
            f"gpu_memory_utilization{_or_states(line_bytes, config)}"
        )
    num_tokens, groups = (num_blocks - 1) * layout.block_size, layout.groups
    logger.info(
        "KV cache: %d blocks of %d tokens, %s; %d tokens in all%s",
        num_blocks,
        layout.block_size,
        _gib(needed),
        num_tokens,
        f", {num_tokens * groups.size // groups.num_full} of long prompts, of which layers with a window keep "
        f"{groups.window}"
        if groups.num_full and groups.num_windowed
        else "",
    )
    if state_bytes:
        logger.info("states: %s for each request; %d more of prefixes are kept", _gib(state_bytes), num_checkpoints)
    if groups.most_held(max_model_len, 1, layout.block_size) >= groups.num_blocks(num_blocks):
        logger.warning(
            "the KV cache holds %d tokens, less than one request of max_model_len=%d; longer requests will be refused",
            num_tokens,
            max_model_len,
        )
    return CacheSizes(num_blocks, num_checkpoints)


def _or_states(line_bytes: int, config: EngineConfig) -> str:
    """What else to do, where requests have states."""
    if not line_bytes:
        return ""
    return f"; or lower max_num_seqs={config.scheduler.max_num_seqs}, as many states take {_gib(line_bytes)}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"

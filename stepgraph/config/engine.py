"""All settings of an engine, and the one place that sorts flat keyword arguments into them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepgraph.config.cache import CacheConfig
from stepgraph.config.fields import homes_of, refuse_unknown
from stepgraph.config.graph import GraphConfig, graph_config_from_json
from stepgraph.config.lora import LoRAConfig
from stepgraph.config.model import ModelConfig
from stepgraph.config.scheduler import SchedulerConfig
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """All settings of an engine, one dataclass per concern. Field names are unique across them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)

    @classmethod
    def from_settings(cls, **settings: Any) -> EngineConfig:
        """Build from flat settings, e.g. ``from_settings(model="smollm2", max_num_seqs=8)``.

        ``graph_optimization_config`` may hold the JSON text (or dict) of several graph settings. When only
        `max_num_seqs` or only `max_num_batched_tokens` is given, the other's default yields to it.

        Raises:
            ConfigError: unknown setting, bad value, or settings that contradict each other.
        """
        settings = flattened(settings)
        for name in sorted(set(settings) & set(NOT_YET)):
            value, (off, reason) = settings.pop(name), NOT_YET[name]
            if value not in off:
                raise ConfigError(f"{name}={value!r} is not supported: {reason}")
        homes = homes_of(ENGINE_PARTS)
        refuse_unknown(settings, homes)
        rows, tokens = settings.get("max_num_seqs"), settings.get("max_num_batched_tokens")
        if isinstance(rows, int) and tokens is None:
            settings["max_num_batched_tokens"] = max(rows, SchedulerConfig.max_num_batched_tokens)
        if isinstance(tokens, int) and rows is None:
            settings["max_num_seqs"] = min(tokens, SchedulerConfig.max_num_seqs)
        grouped: dict[str, dict[str, Any]] = {part: {} for part in ENGINE_PARTS}
        for name, value in settings.items():
            grouped[homes[name]][name] = value
        return cls(**{part: part_type(**grouped[part]) for part, part_type in ENGINE_PARTS.items()})


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, lists as tuples, and those in ``graph_optimization_config`` beside the others.

    Raises:
        ConfigError: ``graph_optimization_config`` makes no sense, or contradicts a setting given beside it.
    """
    flat: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    graph_json = flat.pop("graph_optimization_config", None)
    if graph_json is not None:
        for name, value in graph_config_from_json(graph_json).items():
            if flat.setdefault(name, value) != value:
                raise ConfigError(f"{name} is {flat[name]!r} and, in graph_optimization_config, {value!r}")
    return flat


ENGINE_PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "graph": GraphConfig,
    "lora": LoRAConfig,
}
"""The dataclasses by the names of `EngineConfig`'s fields, in the order in which they are shown."""

NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "pipeline_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "quantization": ((None,), "weights run in float32, bfloat16 or float16; leave it unset"),
    "speculative_config": ((None,), "there is no speculative decoding yet; leave it unset"),
    "enforce_eager": ((None, False), "use graph_backend='eager'"),
    "trust_remote_code": ((None, False), "models are run by stepgraph's own code; leave it unset"),
}
"""Settings users bring from other engines: the values that mean "off" are accepted, others refused with the reason."""

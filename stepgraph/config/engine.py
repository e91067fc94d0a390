"""All settings of an engine, and the one place that sorts flat keyword arguments into them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepgraph.config.cache import CacheConfig
from stepgraph.config.fields import homes_of, refuse_unknown
from stepgraph.config.graph import GraphConfig, graph_config_from_json
from stepgraph.config.guidance import GuidanceConfig
from stepgraph.config.lora import LoRAConfig
from stepgraph.config.model import ModelConfig
from stepgraph.config.scheduler import SchedulerConfig
from stepgraph.config.speculative import SpeculativeConfig, speculative_config_from_json
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """All settings of an engine, one dataclass per concern. Field names are unique across them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    graph: GraphConfig = field(default_factory=GraphConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    speculative: SpeculativeConfig = field(default_factory=SpeculativeConfig)

    @classmethod
    def from_settings(cls, **settings: Any) -> EngineConfig:
        """Build from flat settings, e.g. ``from_settings(model="smollm2", max_num_seqs=8)``.

        ``graph_optimization_config`` and ``speculative_config`` may hold the JSON text (or dict) of several settings. When only
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
    """The same settings, lists as tuples, and those in ``graph_optimization_config`` and ``speculative_config`` beside them.

    Raises:
        ConfigError: one of the two makes no sense, or contradicts a setting given beside it.
    """
    flat: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    for key, group in GROUPS.items():
        grouped = flat.pop(key, None)
        if grouped is not None:
            for name, value in group.read(grouped).items():
                if flat.setdefault(name, value) != value:
                    raise ConfigError(f"{name} is {flat[name]!r} and, in {key}, {value!r}")
    return flat


class Group(NamedTuple):
    """A setting that holds several others, as JSON text or as a dict."""

    part: str
    """Where those belong, as in `ENGINE_PARTS`."""
    read: Callable[[Any], dict[str, Any]]
    """From text or dict to flat settings."""
    help: str


GROUPS = {
    "graph_optimization_config": Group("graph", graph_config_from_json, "with FastDeploy's key names accepted too"),
    "speculative_config": Group(
        "speculative", speculative_config_from_json, "the names without `speculative_`, and other engines' key names"
    ),
}

ENGINE_PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "graph": GraphConfig,
    "guidance": GuidanceConfig,
    "lora": LoRAConfig,
    "speculative": SpeculativeConfig,
}
"""The dataclasses by the names of `EngineConfig`'s fields, in the order in which they are shown."""

NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "pipeline_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "enforce_eager": ((None, False), "use graph_backend='eager'"),
    "trust_remote_code": ((None, False), "models are run by stepgraph's own code; leave it unset"),
}
"""Settings users bring from other engines: the values that mean "off" are accepted, others refused with the reason."""

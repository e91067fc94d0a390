"""All settings of an engine, and the one place that sorts flat keyword arguments into them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepgraph.config.cache import CacheConfig
from stepgraph.config.fields import homes_of, read_object, refuse_unknown
from stepgraph.config.graph import GraphConfig, check_graph_keys
from stepgraph.config.guidance import GuidanceConfig
from stepgraph.config.kv_events import KVEventsConfig
from stepgraph.config.lora import LoRAConfig
from stepgraph.config.model import ModelConfig
from stepgraph.config.other_engines import translated, translated_keys
from stepgraph.config.parallel import ParallelConfig
from stepgraph.config.scheduler import SchedulerConfig
from stepgraph.config.speculative import SpeculativeConfig, check_method_is_named, check_speculative_keys
from stepgraph.config.transfer import TransferConfig
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    transfer: TransferConfig = field(default_factory=TransferConfig)
    kv_events: KVEventsConfig = field(default_factory=KVEventsConfig)

    def __post_init__(self) -> None:
        if self.transfer.kv_host_cache_gib:
            self._check_host_cache()
        if self.kv_events.enable_kv_cache_events:
            self.kv_events.check_ports(self.parallel.data_parallel_size)
            if not self.cache.enable_prefix_caching:
                raise ConfigError(
                    "enable_kv_cache_events tells what is in the prefix cache, and enable_prefix_caching is off; leave one of "
                    "them out",
                    param="enable_kv_cache_events",
                )
        if not self.transfer.is_connected:
            return
        if not self.cache.enable_prefix_caching:
            raise ConfigError(
                "enable_prefix_caching is off, and keys and values come from other engines, and go to them, by way of the prefix "
                f"cache: leave it on, or splitwise_role={self.transfer.splitwise_role!r} and what begins with kv_transfer out",
                param="enable_prefix_caching",
            )
        if self.parallel.data_parallel_size > 1:
            raise ConfigError(
                f"data_parallel_size={self.parallel.data_parallel_size} of one engine: its devices have caches of their own, and "
                "no other engine can take from or fill; use tensor_parallel_size, or leave splitwise_role and what begins with "
                "kv_transfer out",
                param="data_parallel_size",
            )

    def _check_host_cache(self) -> None:
        given = f"kv_host_cache_gib={self.transfer.kv_host_cache_gib:g}"
        if not self.cache.enable_prefix_caching:
            raise ConfigError(
                f"{given} keeps prefixes, and enable_prefix_caching is off; leave one of them out",
                param="kv_host_cache_gib",
            )
        for name in ("tensor_parallel_size", "data_parallel_size"):
            if getattr(self.parallel, name) > 1:
                raise ConfigError(
                    f"{given} is for engines of one device, and {name}={getattr(self.parallel, name)}; leave one of them out",
                    param="kv_host_cache_gib",
                )

    @classmethod
    def from_settings(cls, **settings: Any) -> EngineConfig:
        """Build from flat settings, e.g. ``from_settings(model="smollm2", max_num_seqs=8)``.

        ``graph_optimization_config`` and ``speculative_config`` may hold the JSON text (or dict) of several settings. Names
        and values of other engines are understood, see `stepgraph.config.other_engines`. When only `max_num_seqs` or only
        `max_num_batched_tokens` is given, the other's default yields to it.

        Raises:
            ConfigError: unknown setting, bad value, or settings that contradict each other.
        """
        settings = flattened(settings)
        homes = homes_of(ENGINE_PARTS)
        _refuse_settings_of_the_server(settings)
        refuse_unknown(settings, homes)
        check_method_is_named(settings)
        rows, tokens = settings.get("max_num_seqs"), settings.get("max_num_batched_tokens")
        if isinstance(rows, int) and tokens is None:
            settings["max_num_batched_tokens"] = max(rows, SchedulerConfig.max_num_batched_tokens)
        if isinstance(tokens, int) and rows is None:
            settings["max_num_seqs"] = min(tokens, SchedulerConfig.max_num_seqs)
        grouped: dict[str, dict[str, Any]] = {part: {} for part in ENGINE_PARTS}
        for name, value in settings.items():
            grouped[homes[name]][name] = value
        return cls(**{part: part_type(**grouped[part]) for part, part_type in ENGINE_PARTS.items()})


def _refuse_settings_of_the_server(settings: Iterable[str]) -> None:
    from stepgraph.config.server import ServerConfig  # which imports this module

    for name in sorted(ServerConfig.__dataclass_fields__.keys() & set(settings)):
        raise ConfigError(f"{name} is a setting of the server, which only `stepgraph serve` starts; leave it out")


def flattened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under our names, lists as tuples, and those in ``graph_optimization_config`` and the like beside them.

    Raises:
        ConfigError: one asks for what does not exist, or two contradict each other.
    """
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    flat: dict[str, Any] = translated(lists)
    for key, group in GROUPS.items():
        grouped = flat.pop(key, None)
        if grouped is not None:
            for name, value in group.settings(key, grouped).items():
                if flat.setdefault(name, value) != value:
                    raise ConfigError(f"{name} is {flat[name]!r} and, in {key}, {value!r}")
    return flat


class Group(NamedTuple):
    """A setting that holds several others, as JSON text or as a dict."""

    part: str
    """Where those belong, as in `ENGINE_PARTS`."""
    help: str | None
    """None for a group that only other engines have."""
    example: str
    """JSON text that would do."""
    prefix: str = ""
    """What the keys leave out of the names of our settings."""
    check: Callable[[dict[str, Any], dict[str, Any]], None] = lambda given, settings: None
    """Raises a ConfigError if keys, and the settings they come to, make no sense together."""

    def settings(self, name: str, given: Any) -> dict[str, Any]:
        """The settings in `given`, which is text or a dict, under our names.

        Raises:
            ConfigError: it is no JSON object, or makes no sense; says what is known.
        """
        keys = read_object(name, given, self.example)
        fields = ENGINE_PARTS[self.part].__dataclass_fields__
        settings = translated_keys(
            name, keys, {key: key for key in fields} | {key.removeprefix(self.prefix): key for key in fields}
        )
        self.check(keys, settings)
        return settings


GROUPS = {
    "graph_optimization_config": Group(
        "graph", "with FastDeploy's key names accepted too", '{"use_cudagraph": true}', check=check_graph_keys
    ),
    "speculative_config": Group(
        "speculative",
        "the names without `speculative_`, and other engines' key names",
        '{"method": "mtp", "num_speculative_tokens": 3}',
        "speculative_",
        check_speculative_keys,
    ),
    "compilation_config": Group("graph", None, '{"cudagraph_mode": "FULL"}'),
    "structured_outputs_config": Group("guidance", None, '{"disable_any_whitespace": true}'),
    "kv_transfer_config": Group(
        "transfer", None, '{"kv_connector": "NixlConnector", "kv_role": "kv_producer"}', "kv_transfer_"
    ),
    "kv_events_config": Group("kv_events", None, '{"enable_kv_cache_events": true}', "kv_events_"),
}

ENGINE_PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "graph": GraphConfig,
    "guidance": GuidanceConfig,
    "lora": LoRAConfig,
    "speculative": SpeculativeConfig,
    "parallel": ParallelConfig,
    "transfer": TransferConfig,
    "kv_events": KVEventsConfig,
}
"""The dataclasses by the names of `EngineConfig`'s fields, in the order in which they are shown."""

"""All settings of an engine, and the one place that sorts flat keyword arguments and flags into them."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from dataclasses import dataclass, field
from typing import Any

from stepgraph.config.cache import CacheConfig
from stepgraph.config.fields import scalar_type
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
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
        graph_json = settings.pop("graph_optimization_config", None)
        if graph_json is not None:
            for name, value in graph_config_from_json(graph_json).items():
                if settings.setdefault(name, value) != value:
                    raise ConfigError(f"{name} is {settings[name]!r} and, in graph_optimization_config, {value!r}")
        homes = {f.name: part for part, part_type in _PARTS.items() for f in dataclasses.fields(part_type)}
        unsupported = sorted(set(settings) - set(homes))
        for name in unsupported:
            if name in NOT_YET and settings[name] in NOT_YET[name][0]:
                del settings[name]
                continue
            if name in NOT_YET:
                raise ConfigError(f"{name}={settings[name]!r} is not supported: {NOT_YET[name][1]}")
            raise ConfigError(f"unknown setting {name!r}; known settings: {', '.join(sorted(homes))}")
        rows, tokens = settings.get("max_num_seqs"), settings.get("max_num_batched_tokens")
        if isinstance(rows, int) and tokens is None:
            settings["max_num_batched_tokens"] = max(rows, SchedulerConfig.max_num_batched_tokens)
        if isinstance(tokens, int) and rows is None:
            settings["max_num_seqs"] = min(tokens, SchedulerConfig.max_num_seqs)
        grouped: dict[str, dict[str, Any]] = {part: {} for part in _PARTS}
        for name, value in settings.items():
            grouped[homes[name]][name] = value
        return cls(**{part: part_type(**grouped[part]) for part, part_type in _PARTS.items()})


_PARTS: dict[str, Any] = {
    "model": ModelConfig,
    "cache": CacheConfig,
    "scheduler": SchedulerConfig,
    "graph": GraphConfig,
    "lora": LoRAConfig,
}

NOT_YET: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "pipeline_parallel_size": ((None, 1), "the engine runs on one device; start it with 1"),
    "quantization": ((None,), "weights run in float32, bfloat16 or float16; leave it unset"),
    "speculative_config": ((None,), "there is no speculative decoding yet; leave it unset"),
    "enforce_eager": ((None, False), "use graph_backend='eager'"),
    "trust_remote_code": ((None, False), "models are run by stepgraph's own code; leave it unset"),
}
"""Settings users bring from other engines: the values that mean "off" are accepted, others refused with the reason."""


def add_flags(parser: ArgumentParser, *, positional_model: bool = True) -> None:
    """Add every engine setting to `parser` as a flag, grouped by concern. Unset flags are None.

    Args:
        parser: receives the flags.
        positional_model: MODEL is a positional argument rather than ``--model``.
    """
    for part, part_type in _PARTS.items():
        group = parser.add_argument_group(part, (part_type.__doc__ or "").strip().splitlines()[0])
        for f in dataclasses.fields(part_type):
            default = "" if f.default is None else f" (default: {f.default})"
            text = (f.metadata["help"] + default).replace("%", "%%")
            kind, several = scalar_type(part_type, f.name)
            if f.name == "model" and positional_model:
                group.add_argument("model", nargs="?", metavar="MODEL", help=text)
                continue
            options: dict[str, Any] = {"dest": f.name, "default": None, "help": text}
            if kind is bool:
                options["action"] = BooleanOptionalAction
            else:
                options |= {"type": kind, "choices": f.metadata["choices"]}
                if several:
                    options["nargs"] = "+"
                if not f.metadata["choices"]:
                    options["metavar"] = "N" if kind in (int, float) else "TEXT"
            group.add_argument("--" + f.name.replace("_", "-"), **options)
        if part_type is GraphConfig:
            group.add_argument(
                "--graph-optimization-config",
                metavar="JSON",
                help="several of these at once as JSON, with FastDeploy's key names accepted too",
            )


def settings_from_flags(arguments: Namespace) -> dict[str, Any]:
    """The engine settings among parsed flags, those that were given."""
    names = {f.name for part_type in _PARTS.values() for f in dataclasses.fields(part_type)}
    names.add("graph_optimization_config")
    return {name: value for name, value in vars(arguments).items() if name in names and value is not None}

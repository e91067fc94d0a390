"""Settings: one dataclass per concern; flags, JSON and keyword arguments are derived from them."""

from stepgraph.config.cache import CacheConfig
from stepgraph.config.engine import EngineConfig, add_flags, settings_from_flags
from stepgraph.config.graph import GraphConfig
from stepgraph.config.model import ModelConfig
from stepgraph.config.scheduler import SchedulerConfig

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "GraphConfig",
    "ModelConfig",
    "SchedulerConfig",
    "add_flags",
    "settings_from_flags",
]

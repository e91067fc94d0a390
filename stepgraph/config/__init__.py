"""Settings: one dataclass per concern; flags, YAML, JSON and keyword arguments are derived from them."""

from stepgraph.config.cache import CacheConfig
from stepgraph.config.engine import EngineConfig
from stepgraph.config.file import read_settings
from stepgraph.config.flags import add_flags, settings_from_flags
from stepgraph.config.graph import GraphConfig
from stepgraph.config.model import ModelConfig
from stepgraph.config.parallel import ParallelConfig
from stepgraph.config.scheduler import SchedulerConfig
from stepgraph.config.server import ServerConfig, serve_config
from stepgraph.config.speculative import SpeculativeConfig

__all__ = [
    "CacheConfig",
    "EngineConfig",
    "GraphConfig",
    "ModelConfig",
    "ParallelConfig",
    "SchedulerConfig",
    "ServerConfig",
    "SpeculativeConfig",
    "add_flags",
    "read_settings",
    "serve_config",
    "settings_from_flags",
]

"""How much memory keys and values get."""

from __future__ import annotations

from dataclasses import dataclass

from stepgraph.config.fields import check, setting
from stepgraph.errors import ConfigError


@dataclass(frozen=True)
class CacheConfig:
    """Size of the paged KV cache."""

    block_size: int = setting(16, "tokens per KV block; a power of two", minimum=1)
    num_kv_blocks: int | None = setting(None, "KV blocks; default: chosen from free memory", minimum=2)
    gpu_memory_utilization: float = setting(0.9, "share of the device's memory the engine may fill", minimum=0.01)
    enable_prefix_caching: bool = setting(True, "reuse the KV blocks of prompts that start alike")
    kv_cache_dtype: str = setting(
        "auto",
        "keys and values; auto is the model's dtype, fp8 (e4m3, unscaled) holds twice as many tokens as 16 bits",
        choices=("auto", "fp8"),
    )
    enable_sleep_mode: bool = setting(
        False,
        "keep weights and KV cache where sleep() can give their memory back and wake_up() can take it again; on CPU they "
        "always are",
    )

    def __post_init__(self) -> None:
        check(self)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size} is not a power of two; use e.g. 16")
        if self.gpu_memory_utilization > 1:
            raise ConfigError(f"gpu_memory_utilization={self.gpu_memory_utilization} is above 1; use e.g. 0.9")

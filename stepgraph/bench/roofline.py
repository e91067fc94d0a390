"""The least time a step can take: its bytes over the memory bandwidth, or its FLOPs over the arithmetic peak.

Both limits are measured on the machine, in the run that uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from stepgraph.layers.embedding import Embedding
from stepgraph.layers.linear import Linear
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.platforms import Platform


@dataclass(frozen=True)
class Limits:
    """What the machine can do."""

    copy_bytes_per_s: float  # a large copy, bytes read and written
    flops_per_s: float  # a large matrix product in the model's dtype


@dataclass(frozen=True)
class StepCost:
    """What a step must do at least: each weight read once, each cached key and value read once and written once."""

    bytes: int
    flops: int

    def least_ms(self, limits: Limits) -> float:
        """The larger of the two times, in ms."""
        return 1e3 * max(self.bytes / limits.copy_bytes_per_s, self.flops / limits.flops_per_s)


def measure_limits(platform: Platform, dtype: torch.dtype) -> Limits:
    """Time a copy and a matrix product, both far larger than any cache and launch overhead."""
    on_gpu = platform.device.type == "cuda"
    source = torch.empty((2 << 30) if on_gpu else (128 << 20), dtype=torch.uint8, device=platform.device).random_()
    target = torch.empty_like(source)
    copy_s = _time(lambda: target.copy_(source), platform)
    size = 8192 if on_gpu else 1024
    a, b = (torch.randn(size, size, device=platform.device).to(dtype) for _ in range(2))
    product_s = _time(lambda: a @ b, platform)
    return Limits(2 * source.numel() / copy_s, 2 * size**3 / product_s)


def step_cost(model: LanguageModel, rows: Sequence[tuple[int, int]]) -> StepCost:
    """Cost of a step of `rows`, each (query length, cached keys including this step's)."""
    config = model.config
    num_tokens = sum(query_len for query_len, _ in rows)
    weights = sum(p.numel() for p in model.parameters()) + _packed_away(model)
    weight_bytes = sum(p.nbytes for p in model.parameters())
    tables = [p for p in model.parameters() if p.shape[0] == config.vocab_size]
    head = config.vocab_size * config.hidden_size
    if len(tables) > 1:  # the embedding is only looked up; a tied one is read whole as the head
        weights -= head
        weight_bytes -= tables[0].nbytes
    kv_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    bytes_ = weight_bytes + model.dtype.itemsize * kv_per_token * sum(kv_len + n for n, kv_len in rows)
    # a query at distance d from the row's end sees kv_len - d keys
    seen = sum(n * kv_len - n * (n - 1) // 2 for n, kv_len in rows)
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * seen
    return StepCost(bytes_, 2 * num_tokens * (weights - head) + 2 * len(rows) * head + attention)


def _packed_away(model: LanguageModel) -> int:
    """Weights less bytes, of those layers that pack their weights."""
    modules = model.modules() if isinstance(model, Decoder) else ()
    packed = [m for m in modules if isinstance(m, Linear | Embedding) and m.packing is not None]
    return sum(len(m.weight) * m.packing.width - m.weight.numel() for m in packed if m.packing is not None)


def _time(call: Callable[[], object], platform: Platform) -> float:
    times = []
    for _ in range(8):
        platform.synchronize()
        started = time.perf_counter()
        call()
        platform.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[2:])

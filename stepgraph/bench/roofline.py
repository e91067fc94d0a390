"""The least time a step can take: its bytes over the memory bandwidth, or its FLOPs over the arithmetic peak.

Both limits are measured on the machine, in the run that uses them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Literal

import torch

from stepgraph.layers.attention import Attention
from stepgraph.layers.experts import Experts, MixtureMLP
from stepgraph.layers.formats import Packed
from stepgraph.layers.gated_delta import GatedDelta
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.layers.latent_attention import LatentSizes
from stepgraph.layers.mamba2 import Mamba2
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.per_layer_inputs import PerLayerInputs
from stepgraph.layers.short_conv import ShortConv
from stepgraph.models.decoder import Decoder
from stepgraph.models.language_model import LanguageModel
from stepgraph.parallel.shard import WHOLE, Shard
from stepgraph.platforms import Platform
from stepgraph.step.dispatch import mixtures_of


@dataclass(frozen=True)
class Limits:
    """What the machine can do."""

    copy_bytes_per_s: float  # a large copy, bytes read and written
    flops_per_s: float  # a large matrix product in the model's dtype


@dataclass(frozen=True)
class StepCost:
    """What a step must do at least: each weight that it needs read once, each cached key and value read once and written once."""

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


@dataclass(frozen=True)
class ExpertLoad:
    """What a step asks of the experts of a layer, or of those that a rank keeps."""

    touched: float
    """Experts that tokens have chosen, whose weights must be read."""
    pairs: float
    """Of a token and one of its experts."""

    @classmethod
    def of(cls, counts: Sequence[int]) -> ExpertLoad:
        """Of counted tokens of each expert."""
        return cls(sum(count > 0 for count in counts), sum(counts))

    @classmethod
    def expected(cls, num_tokens: int, num_experts: int, top: int, kept: int) -> ExpertLoad:
        """The mean where each token chooses any `top` of the experts, independently, all equally likely.

        One expert is left out by a token with probability 1 - top / experts, and by all of them with that to the power of their
        number.
        """
        return cls(kept * (1 - (1 - top / num_experts) ** num_tokens), num_tokens * top * kept / num_experts)


def step_cost(
    model: LanguageModel,
    rows: Sequence[tuple[int, int]],
    shard: Shard = WHOLE,
    loads: Sequence[ExpertLoad] | None = None,
) -> StepCost:
    """Cost of a step for one of the ranks that share a model. What they send each other is not counted.

    Args:
        model: what the rank keeps.
        rows: each (query length, cached keys including this step's).
        shard: which rank it is. It has the whole embedding table, and computes its part of the logits.
        loads: of the experts that the rank keeps, for each layer that has some; None: those expected of the tokens of `rows`.
    """
    config = model.config
    num_tokens = sum(query_len for query_len, _ in rows)
    weights = sum(p.numel() for p in model.parameters()) + _packed_away(model)
    weight_bytes = sum(p.nbytes for p in model.parameters())  # layers may have fewer bits than the rest
    head_rows = shard.span(config.vocab_size).length
    table, head = config.vocab_size * config.hidden_size, head_rows * config.hidden_size
    of_layers = [m.embedding.weight for m in model.modules() if isinstance(m, PerLayerInputs)]  # only looked up
    weights -= sum(p.numel() for p in of_layers)
    weight_bytes -= sum(p.nbytes for p in of_layers)
    others = (p for p in model.parameters() if all(p is not table for table in of_layers))
    tables = [p for p in others if p.shape[0] in (config.vocab_size, head_rows)]
    # The embedding is only looked up. A tied one is also the head, of which the rank reads its part.
    unread = table if len(tables) > 1 else table - head
    weights -= unread
    weight_bytes -= tables[0].nbytes * unread // table
    specs = model.attention_specs
    numbers = sum(spec.cached_numbers * (_keys_read(rows, spec.window) + num_tokens) for spec in specs)
    sharing = [m for m in model.modules() if isinstance(m, Attention) and m.keys_and_values.shares is not None]
    numbers -= num_tokens * sum(layer.spec.cached_numbers for layer in sharing)  # which write none
    cached = next(model.parameters()).element_size() * numbers
    attention = sum(attention_flops(spec, rows, latent_sizes(model)) for spec in specs)
    recurrent = [module for module in model.modules() if isinstance(module, GatedDelta | ShortConv | Mamba2)]
    states = sum(2 * item.num_bytes for module in recurrent for item in module.cache_spec(model.dtype).state)
    state_flops = sum(_state_flops(module) for module in recurrent)
    mixtures = mixtures_of(model)
    loads = [_expected(mixture, num_tokens) for mixture in mixtures] if loads is None else loads
    experts = [_experts_cost(mixture.experts, load, num_tokens) for mixture, load in zip(mixtures, loads, strict=True)]
    return StepCost(
        weight_bytes + cached + len(rows) * states + sum(cost.bytes for cost in experts),
        2 * num_tokens * (weights - head)
        + 2 * len(rows) * head
        + attention
        + num_tokens * state_flops
        + sum(cost.flops for cost in experts),
    )


def _state_flops(layer: GatedDelta | ShortConv | Mamba2) -> int:
    """Of a token, with the states of heads: products with a vector, or of two vectors, of which gated delta rules have three and
    Mamba-2 two. Those of convolutions are not counted."""
    if isinstance(layer, GatedDelta):
        return 6 * layer.sizes.num_value_heads * layer.sizes.key_dim * layer.sizes.value_dim
    if isinstance(layer, Mamba2):
        return 4 * layer.sizes.width * layer.sizes.state_size
    return 0


def latent_sizes(model: LanguageModel) -> LatentSizes | None:
    """Those of a model's attention; None: keys and values are cached."""
    return model.config.latent if isinstance(model, Decoder) else None


def attention_flops(spec: AttentionSpec, rows: Sequence[tuple[int, int]], latent: LatentSizes | None) -> int:
    """What a layer's attention computes at least.

    Latent attention has two ways. Absorbed, each pair of a query and a key costs the sizes of a cached entry and of its latent.
    Un-absorbed it costs those of a head's key and value, far fewer, and each of the row's earlier tokens a product with
    `kv_b_proj`, which makes its keys and values again. For each row, the cheaper counts. (Un-absorbed over the step's own tokens
    and absorbed over earlier ones, with a second product for each of the step's, is never cheaper than the better of both.) One
    product with `kv_b_proj` for each of the step's tokens is in either way, and not counted here: it is one of the weights.

    Args:
        spec: of the layer.
        rows: as of `step_cost`.
        latent: the sizes, if it is latent.
    """
    if latent is None:
        return 2 * spec.num_heads * (spec.head_dim + spec.value_dim) * _keys_seen(rows, spec.window)
    absorbed, expanded = spec.head_dim + spec.value_dim, latent.key_dim + latent.rotated_dim + latent.value_dim
    product = (latent.key_dim + latent.value_dim) * latent.kv_rank
    numbers = 0
    for query_len, kv_len in rows:
        pairs = _keys_seen([(query_len, kv_len)])
        numbers += min(absorbed * pairs, expanded * pairs + product * (kv_len - query_len))
    return 2 * spec.num_heads * numbers


def experts_cost(mixtures: Sequence[MixtureMLP], num_tokens: int) -> StepCost:
    """What the experts of these layers cost less (negative, as a rule) than if all tokens went through all of them, where each
    token chooses any of them."""
    costs = [_experts_cost(mixture.experts, _expected(mixture, num_tokens), num_tokens) for mixture in mixtures]
    return StepCost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))


def _expected(mixture: MixtureMLP, num_tokens: int) -> ExpertLoad:
    gate = mixture.gate
    return ExpertLoad.expected(num_tokens, gate.weight.shape[0], gate.routing.top, mixture.experts.count)


def _experts_cost(experts: Experts, load: ExpertLoad, num_tokens: int) -> StepCost:
    """What a layer's experts cost less (negative, as a rule) than if all tokens went through all of them."""
    num_bytes = sum(p.nbytes for p in experts.parameters())
    weights = sum(p.numel() for p in experts.parameters()) + _packed_away(experts)
    return StepCost(
        round(num_bytes * (load.touched / experts.count - 1)),
        round(2 * weights * (load.pairs / experts.count - num_tokens)),
    )


@dataclass(frozen=True)
class Operand:
    """A tensor that an operator of a step was given."""

    kind: Literal["weight", "cache", "other"]
    """A parameter or buffer of the model, keys or values of a layer, or anything else."""
    shape: tuple[int, ...]
    element_size: int  # bytes
    is_float: bool
    is_written: bool
    is_output: bool = False
    """It is only written."""

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.element_size

    @property
    def is_activation(self) -> bool:
        """By its form: scratch memory has four dimensions."""
        return self.is_float and len(self.shape) <= 3


_OF_STATES = ("causal_conv", "gated_delta", "mamba2")
"""What they write in place is a line of state for each request, of which rows read one and write one."""
_LOOKUPS = ("embedding", "index_select", "index", "gather")


def operator_cost(
    name: str,
    operands: Sequence[Operand],
    results: Sequence[Operand],
    rows: Sequence[tuple[int, int]],
    num_heads: int,
    load: ExpertLoad | None = None,
) -> StepCost:
    """What one operator of a step must do at least, of whatever it is made.

    Weights are read once, activations once, and written once. An operator named attention reads the keys and values of `rows`,
    one that attends to older latents alone those from before the step; any other that is given them writes those of its tokens.
    Rows read their states once and write them once.
    Integers (token ids, block tables, state) are not counted, nor is scratch memory. A matrix costs two FLOPs per entry and
    token. Stacked matrices of experts are read, and multiplied, as far as tokens have chosen them.

    Args:
        name: of the operator, without namespace.
        operands: the tensors it was given.
        results: those it returned anew.
        rows: (query length, cached keys including this step's) of the step, as for `step_cost`.
        num_heads: query heads.
        load: of the experts whose matrices the operator was given; None: it was given none.
    """
    states = [x for x in operands if name in _OF_STATES and x.is_written]
    activations = [x for x in operands if x.kind == "other" and x.is_activation and x not in states]
    num_tokens = activations[0].shape[0] if activations else 0
    written = sum(x.bytes for x in results if x.is_activation)
    bytes_ = written + sum(x.bytes * (1 + (x.is_written and not x.is_output)) for x in activations)
    bytes_ += sum(2 * len(rows) * prod(x.shape[1:]) * x.element_size for x in states)
    flops = 0
    for weight in (x for x in operands if x.kind == "weight"):
        if name in _LOOKUPS:
            bytes_ += written
            continue
        if load is not None and len(weight.shape) == 3:
            bytes_ += round(weight.bytes * load.touched / weight.shape[0])
            flops += round(2 * load.pairs * prod(weight.shape[1:]))
            continue
        bytes_ += weight.bytes
        if len(weight.shape) > 1:
            flops += 2 * num_tokens * prod(weight.shape)
    caches = [x for x in operands if x.kind == "cache"]
    entries, pairs = sum(kv_len for _, kv_len in rows), _keys_seen(rows)
    own_pairs = _keys_seen([(query_len, query_len) for query_len, _ in rows])
    if name == "expanded_attention":
        flops += (
            2 * own_pairs * (prod(activations[0].shape[1:]) + prod(results[0].shape[1:]))
        )  # queries' and values' sizes
    if name == "mla_context_attention":
        entries, pairs = entries - sum(query_len for query_len, _ in rows), pairs - own_pairs
    for cache in caches:
        token_bytes = prod(cache.shape[2:]) * cache.element_size
        if "attention" in name:
            bytes_ += token_bytes * entries
            size = cache.shape[-1]  # of the keys, or the values
            if len(caches) == 1 and results:  # latents, which are both: as values without what is rotated
                size += results[0].shape[-1]
            flops += 2 * num_heads * size * pairs
        if cache.is_written:
            bytes_ += token_bytes * num_tokens
    return StepCost(bytes_, flops)


def _keys_seen(rows: Sequence[tuple[int, int]], window: int = 0) -> int:
    """Over all queries: one at distance d from its row's end sees kv_len - d keys, or the last `window` of them."""
    numbers = 0
    for n, kv_len in rows:
        cut = min(n, max(0, kv_len - window)) if window else 0  # queries, the last ones, that see `window`
        whole = n - cut
        numbers += whole * (kv_len - cut) - whole * (whole - 1) // 2 + cut * window
    return numbers


def _keys_read(rows: Sequence[tuple[int, int]], window: int) -> int:
    """That some query of their row sees."""
    return sum(min(kv_len, window + n - 1) if window else kv_len for n, kv_len in rows)


def _packed_away(model: LanguageModel | Experts) -> int:
    """Weights less bytes, of those layers that pack their weights."""
    modules = model.modules() if isinstance(model, Decoder | Experts) else ()
    packed = [m for m in modules if isinstance(m, Matrix) and isinstance(m.format.base, Packed)]
    return sum(m.out_features * m.in_features - m.weight.numel() for m in packed)


def _time(call: Callable[[], object], platform: Platform) -> float:
    times = []
    for _ in range(8):
        platform.synchronize()
        started = time.perf_counter()
        call()
        platform.synchronize()
        times.append(time.perf_counter() - started)
    return median(times[2:])

"""A random model whose layers differ: attention of any heads, size and window, maybe over an earlier layer's keys and values, and
linear recurrences. What it answers is also computed by a loop over tokens in float64.

Shapes: T tokens, U tokens with those run again, R rows, E hidden size, V vocabulary, H query heads, G key/value heads, S keys
seen, D head size, N size of a recurrent state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from tiny import MAX_MODEL_LEN, TINY_SETTINGS, VOCAB_SIZE
from torch import Tensor, nn

from stepgraph import ops
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.executor.build import build_local_executor
from stepgraph.layers.cache import CacheSpec, Item, PagedCache, PagedSpec
from stepgraph.layers.inputs import AttentionSpec, StepInputs
from stepgraph.layers.recurrent import RecurrentCache, RecurrentSpec
from stepgraph.models.source import resolve_configured
from stepgraph.ops.rows import row_of
from stepgraph.spec.drafter import Drafter

E, N = 32, 16


@dataclass(frozen=True)
class Attends:
    """A layer of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    shares: int | None = None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim, self.window)

    def layer(self, device: str) -> nn.Module:
        return AttentionLayer(self, device)


@dataclass(frozen=True)
class Recurs:
    """A layer h_t = a ⊙ h_{t-1} + W x_t."""

    def layer(self, device: str) -> nn.Module:
        return RecurrentLayer(device)


MIXED_ATTENTION = (
    Attends(4, 2, 16),
    Attends(6, 1, 8, window=24),
    Attends(2, 2, 16, window=40, shares=0),
    Attends(4, 2, 16, window=7),
    Attends(4, 2, 16, window=24),
    Attends(6, 1, 8, shares=1, window=24),
)
RECURRENT = (Recurs(), Attends(4, 2, 16, window=24), Recurs())


def weight(*shape: int, device: str, scale: float = 0.5) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, device="cpu").mul(scale).to(device), requires_grad=False)


class AttentionLayer(nn.Module):
    def __init__(self, kind: Attends, device: str) -> None:
        super().__init__()
        self.kind, self.spec = kind, kind.spec
        H, G, D = kind.num_heads, kind.num_kv_heads, kind.head_dim
        self.q = weight(E, H * D, device=device)
        if kind.shares is None:
            self.k, self.v = weight(E, G * D, device=device), weight(E, G * D, device=device)
        self.o = weight(H * D, E, device=device)

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        return replace(PagedSpec.of(self.spec, dtype), shares=self.kind.shares)

    def forward(self, x_TE: Tensor, cache: PagedCache, inputs: StepInputs) -> Tensor:
        spec, work = self.spec, inputs.attention[self.spec]
        block_table, tokens, _ = inputs.groups[cache.group]
        if self.kind.shares is None:
            k_TGD, v_TGD = ((x_TE @ w).unflatten(1, (spec.num_kv_heads, spec.head_dim)) for w in (self.k, self.v))
            ops.write_kv(k_TGD, v_TGD, tokens.kv_slots, cache.keys, cache.values)
        attended_TF = ops.paged_attention(
            (x_TE @ self.q).unflatten(1, (spec.num_heads, spec.head_dim)),
            cache.keys,
            cache.values,
            block_table,
            tokens.row_slot,
            tokens.query_start,
            tokens.kv_len,
            work.plan,
            work.geometry,
            spec.head_dim**-0.5,
            spec.window,
        )
        return attended_TF @ self.o

    def start(self) -> list[Tensor]:
        return []

    def advance(self, x_E: Tensor, own: list, memories: Sequence[list]) -> Tensor:
        """One token, after those in `own`: keys and values of each."""
        H, G, D, kind = self.kind.num_heads, self.kind.num_kv_heads, self.kind.head_dim, self.kind
        if kind.shares is None:
            own.append([(x_E @ w.double()).view(G, D) for w in (self.k, self.v)])
        seen = (own if kind.shares is None else memories[kind.shares])[-kind.window :]
        k_SHD, v_SHD = (torch.stack([pair[part] for pair in seen]).repeat_interleave(H // G, dim=1) for part in (0, 1))
        score_SH = (k_SHD * (x_E @ self.q.double()).view(H, D)).sum(2) * D**-0.5
        return (score_SH.softmax(0).unsqueeze(2) * v_SHD).sum(0).flatten() @ self.o.double()


class RecurrentLayer(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.decay_N = nn.Parameter(torch.linspace(-0.95, 0.95, N).to(device), requires_grad=False)
        self.w, self.o = weight(E, N, device=device), weight(N, E, device=device)

    def cache_spec(self, dtype: torch.dtype) -> CacheSpec:
        return RecurrentSpec(state=(Item((N,), torch.float32),), inputs=(Item((N,), torch.float32),))

    def forward(self, x_TE: Tensor, cache: RecurrentCache, inputs: StepInputs) -> Tensor:
        rows = cache.rows(inputs)
        (u_UN,) = cache.replayed(rows, (x_TE @ self.w,))
        token_U = torch.arange(u_UN.shape[0], dtype=torch.int32, device=u_UN.device)
        u_UN = torch.where((token_U < rows.query_start[-1]).unsqueeze(1), u_UN, 0)
        h_RN = torch.where((rows.start > 0).unsqueeze(1), cache.state[0].index_select(0, rows.lines.read), 0)
        row_U = row_of(token_U, rows.query_start[1:])
        place_U = token_U - rows.query_start.index_select(0, row_U)
        distance_UU = token_U.unsqueeze(1) - token_U
        sees_UU = (distance_UU >= 0) & (row_U.unsqueeze(1) == row_U)
        power_UUN = self.decay_N ** distance_UU.clamp(min=0).unsqueeze(2) * sees_UU.unsqueeze(2)
        h_UN = (power_UUN * u_UN).sum(1) + self.decay_N ** (place_U + 1).unsqueeze(1) * h_RN.index_select(0, row_U)
        last_R = (rows.query_start[:-1] + rows.num_stored - 1).clamp(min=0)
        cache.state[0].index_put_((rows.lines.write * (rows.num_stored > 0),), h_UN.index_select(0, last_R))
        return rows.own(h_UN) @ self.o

    def start(self) -> list[Tensor]:
        return [torch.zeros(N, dtype=torch.float64)]

    def advance(self, x_E: Tensor, own: list, memories: Sequence[list]) -> Tensor:
        """One token, after the state in `own`."""
        own[0] = self.decay_N.double() * own[0] + x_E @ self.w.double()
        return own[0] @ self.o.double()


@dataclass(frozen=True)
class MixedConfig:
    """See `LanguageModelConfig`."""

    layers: tuple[Attends | Recurs, ...]
    architecture: str = "MixedForCausalLM"
    vocab_size: int = VOCAB_SIZE
    hidden_size: int = E
    max_position_embeddings: int = MAX_MODEL_LEN
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        return tuple(kind.spec for kind in self.layers if isinstance(kind, Attends))


class MixedModel(nn.Module):
    """See `LanguageModel`."""

    dtype = torch.float32

    def __init__(self, layers: Sequence[Attends | Recurs], device: str = "cpu") -> None:
        super().__init__()
        self.config = MixedConfig(tuple(layers))
        self.attention_specs = self.config.attention_specs
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.tokens = weight(VOCAB_SIZE, E, device=device, scale=2.0)
            self.places = weight(MAX_MODEL_LEN, E, device=device, scale=1.0)
            self.layers = nn.ModuleList(kind.layer(device) for kind in layers)
            self.head = weight(E, VOCAB_SIZE, device=device)
            self.head /= self.head.norm(dim=0)  # else a few tokens get the highest logits everywhere

    def cache_specs(self, dtype: torch.dtype) -> tuple[CacheSpec, ...]:
        return tuple(layer.cache_spec(dtype) for layer in self.layers)

    def forward(self, inputs: StepInputs) -> Tensor:
        hidden_TE = self.embed(inputs.tokens.token_ids) + self.places.index_select(0, inputs.tokens.positions)
        for layer, cache in zip(self.layers, inputs.caches, strict=True):
            hidden_TE = hidden_TE + layer(normalised(hidden_TE), cache, inputs)
        return normalised(hidden_TE)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        return self.tokens.index_select(0, token_ids_T)

    def logits(self, hidden_RE: Tensor, out: Tensor) -> Tensor:
        return out.copy_(hidden_RE @ self.head)

    def answer(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What follows a prompt greedily, by a loop over its tokens."""
        memories = [layer.start() for layer in self.layers]
        text = list(prompt)
        for position in range(len(prompt) + num_tokens - 1):
            hidden_E = self.tokens[text[position]].double() + self.places[position].double()
            for layer, own in zip(self.layers, memories, strict=True):
                hidden_E = hidden_E + layer.advance(normalised(hidden_E), own, memories)
            if position == len(text) - 1:
                text.append(int((normalised(hidden_E) @ self.head.double()).argmax()))
        return text[len(prompt) :]


def normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def engines_of(tiny_model: str, device: str, layers: Sequence[Attends | Recurs]) -> Callable[..., Engine]:
    """Makes engines of such a model: `create(max_num_seqs=3)`."""

    def create(*, drafter: Drafter | None = None, **settings) -> Engine:
        config = EngineConfig.from_settings(**({"model": tiny_model, "device": device} | TINY_SETTINGS | settings))
        source = resolve_configured(config.model)
        executor = build_local_executor(config, source, model=MixedModel(layers, device), drafter=drafter)
        return build_engine(config, source=source, executor=executor)

    return create

"""What transformers' layers call in place of its own attention and experts. Both are registered under one name, which a model
asks for when it is built; no mask function goes by it, so transformers builds no masks.

Shapes: T tokens, H query heads, G key/value heads, D head size, E hidden size, K experts of a token, S = T·K, M width of an
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface

from stepgraph.errors import ModelError
from stepgraph.ops import grouped_linear

_NAME = "stepgraph"
IMPLEMENTATIONS = {"attn_implementation": _NAME, "experts_implementation": _NAME}
"""Arguments of transformers' `from_config` and `from_pretrained`."""

REQUIREMENTS = (
    "What runs are native models and those classes of transformers whose layers all call its AttentionInterface."
)
CAUSAL_ONLY = "What runs are causal models: decoders, whose tokens see themselves and earlier ones."
_BIAS_PARTS = 3
_HARMLESS = {"dropout", "position_ids", "use_cache", "cache_position"}
_UNSUPPORTED = {
    "position_bias": "it adds a bias to attention scores",
}


@dataclass(frozen=True)
class AttentionCall:
    """What a layer asks of attention, rotation done."""

    number: int  # of the calls of a step, from 0: what is cached for it
    layer: int  # which may make several
    query: Tensor  # [1, H, T, D]
    key: Tensor  # [1, G, T, D]
    value: Tensor  # [1, G, T, V]
    scale: float  # multiplies q·k
    window: int  # 0: none, or not said by the layer
    sinks: Tensor | None  # of each query head; None: there are none
    softcap: float  # of scores; 0: none
    is_biased: bool  # keys hold what is added to their scores, in more digits than 8 bits have


Attend = Callable[[AttentionCall], Tensor]
"""Answers with [1, T, H, V]."""


class Relay:
    """What the modules of one model hold to reach whoever answers its calls of attention. Keyword arguments would not do: not all
    classes pass them on."""

    _NAME = "stepgraph_relay"

    def __init__(self, base: nn.Module) -> None:
        """Args:
        base: whose modules will hold it.
        """
        self._attend: Attend | None = None
        self._numbers = count()
        self._positions: Tensor | None = None
        self._shared: dict[str, Tensor] = {}
        for module in base.modules():
            setattr(module, self._NAME, self)

    @classmethod
    def of(cls, module: nn.Module) -> Relay:
        """The one that a module holds."""
        relay = getattr(module, cls._NAME)
        assert isinstance(relay, cls), relay
        return relay

    @contextmanager
    def answered_by(self, attend: Attend, positions_T: Tensor) -> Iterator[None]:
        """While the layers run once, over tokens at these positions."""
        self._attend, self._numbers, self._positions, self._shared = attend, count(), positions_T, {}
        try:
            yield
        finally:
            self._attend, self._positions, self._shared = None, None, {}

    @property
    def positions(self) -> Tensor:
        """Of the tokens: [T] int32."""
        assert self._positions is not None, "the layers do not run"
        return self._positions

    def once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is the same for all layers of a run, made by the first that asks."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def call(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int = 0,
        sinks: Tensor | None = None,
        softcap: float = 0.0,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """What a module gets, see `AttentionCall`. One that does not know the number of its layer makes one call in each.

        Args:
            module: that asks.
            query, key, value, scale, window, sinks, softcap: as in `AttentionCall`.
            key_bias: [H or G, T], added to the scores of keys. With the former, each query head gets keys and values of its own.
        """
        assert self._attend is not None, "the layers do not run"
        if key_bias is not None:
            query, key, value = with_bias(query * scale, key, value, key_bias)
            scale = 1.0
        number = next(self._numbers)
        layer = getattr(module, "layer_idx", None)
        layer = number if layer is None else layer
        is_biased = key_bias is not None
        return self._attend(AttentionCall(number, layer, query, key, value, scale, window, sinks, softcap, is_biased))


def with_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose scores are biased by key: to each key its bias is appended, as a sum of three numbers so
    that 16 bits round nothing off, and to each query ones; then zeros up to a multiple of eight, for loads of 16 bytes."""
    repeats = bias.shape[0] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) if repeats > 1 else x for x in (key, value))
    rest, parts = bias.float(), []
    for _ in range(_BIAS_PARTS):
        parts.append(rest.to(key.dtype))
        rest = rest - parts[-1].float()
    empty = -(key.shape[-1] + _BIAS_PARTS) % 8
    ones = query.new_ones(*query.shape[:-1], _BIAS_PARTS)
    return (
        F.pad(torch.cat((query, ones), -1), (0, empty)),
        F.pad(torch.cat((key, torch.stack(parts, -1).unsqueeze(0)), -1), (0, empty)),
        value,
    )


class RefusalError(ModelError):
    """What keeps a model from running, told by code that does not know which model it is in."""

    def __init__(self, what: str, instead: str) -> None:
        super().__init__(f"The model cannot run through transformers' code: {what}. {instead}")
        self.what, self.instead = what, instead

    def of(self, architecture: str) -> ModelError:
        """The same for those who know."""
        return ModelError(f"{architecture} cannot run through transformers' code: {self.what}. {self.instead}")


def refuse(what: str, instead: str = REQUIREMENTS) -> NoReturn:
    """Raise an error that says what keeps a model from running and what runs."""
    raise RefusalError(what, instead)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: takes [1, heads, T, D] each, gives [1, T, H, V] and no weights.

    Raises:
        ModelError: the layer asks for something else than causal attention within its own sequence.
    """
    who = type(module).__name__
    if is_causal is False or not getattr(module, "is_causal", True) or attention_mask is not None:
        refuse(f"{who} lets tokens see later ones, or masks them in its own way", CAUSAL_ONLY)
    for name, argument in others.items():
        if name not in _HARMLESS and argument is not None and argument is not False:
            refuse(_UNSUPPORTED.get(name, f"{who} asks attention for {name}, which is not known here"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = Relay.of(module).call(
        module, query, key, value, scale=scale, window=sliding_window or 0, sinks=s_aux, softcap=softcap or 0.0
    )
    return attended, None


def _experts(module: Any, hidden_TE: Tensor, expert_TK: Tensor, routing_TK: Tensor) -> Tensor:
    """An experts function of transformers.

    Args:
        module: with the weights of all experts, and attributes that transformers' `use_experts_implementation` sets.
        hidden_TE: input.
        expert_TK: chosen experts.
        routing_TK: their weights.

    Returns:
        [T, E]
    """
    if getattr(module, "has_post_expert_norm", False):
        refuse("its experts have norms of their own", "Experts of two or three matrices are supported.")

    def run(x_SE: Tensor, expert_S: Tensor, ends_N: Tensor) -> Tensor:
        def project(x: Tensor, name: str) -> Tensor:
            weight = getattr(module, name)
            y = grouped_linear(x, weight.transpose(1, 2) if module.is_transposed else weight, ends_N)
            return y + getattr(module, f"{name}_bias")[expert_S] if module.has_bias else y

        gated = module.has_gate
        x_SM = module._apply_gate(project(x_SE, "gate_up_proj")) if gated else module.act_fn(project(x_SE, "up_proj"))
        return project(x_SM, "down_proj")

    return by_expert(hidden_TE, expert_TK, routing_TK, module.num_experts, run)


def by_expert(
    hidden_TE: Tensor,
    expert_TK: Tensor,
    routing_TK: Tensor,
    num_experts: int,
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """What experts make of tokens, in fixed shapes: a token's rows, one per expert, are sorted by expert, and each expert's
    weights are read once. May run inside a graph.

    Args:
        hidden_TE: input.
        expert_TK: chosen experts.
        routing_TK: their weights.
        num_experts: that can be chosen.
        run: takes [S, E] rows sorted by expert, [S] their experts, [N] int32 where those of each end; gives [S, E].

    Returns:
        [T, E]
    """
    expert_S, order_S = expert_TK.reshape(-1).sort()
    numbers_N = torch.arange(num_experts, dtype=expert_S.dtype, device=expert_S.device)
    ends_N = torch.searchsorted(expert_S, numbers_N, right=True, out_int32=True)
    y_SE = run(hidden_TE[order_S // expert_TK.shape[1]], expert_S, ends_N)
    y_SE = y_SE * routing_TK.reshape(-1)[order_S].unsqueeze(-1)
    y_TKE = torch.empty_like(y_SE).index_copy_(0, order_S, y_SE).view(*expert_TK.shape, -1)
    return y_TKE.sum(1).to(hidden_TE.dtype)


AttentionInterface.register(_NAME, _attention)
ExpertsInterface.register(_NAME, _experts)

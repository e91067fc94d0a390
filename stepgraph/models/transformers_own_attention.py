"""Classes of transformers whose attention is code of their own, given ours.

Each has here what comes before a call of attention and after it in its own code, over its own projections. What lies around
attention stays as it is. `scripts/make_models_page.py` and the tests hold each against the class as it is.

Shapes: T tokens, H query heads, G key/value heads, D head size. Hidden states are [1, T, hidden size]; arguments have the names
by which their classes give them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from stepgraph.models.transformers_interfaces import IMPLEMENTATIONS, Relay, refuse
from stepgraph.models.transformers_own_experts import (
    adapt_dbrx,
    adapt_jetmoe_experts,
    adapt_jetmoe_router,
    adapt_longcat_flash,
)

_LISTS = {
    "falcon": ("FALCON_ATTENTION_CLASSES", "eager"),
    "gpt_neo": ("GPT_NEO_ATTENTION_CLASSES", "eager"),
}
"""By model type: a list of attention classes of its own, by names of implementations, and which of them is built with ours."""


def register(model_type: str) -> None:
    """Have a class with a list of its own take the name of our attention. To be called before one is built."""
    if model_type in _LISTS:
        name, built = _LISTS[model_type]
        module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
        if classes := getattr(module, name, None):  # a later version may have no list
            classes[IMPLEMENTATIONS["attn_implementation"]] = classes[built]


def adapt(base: nn.Module) -> None:
    """Give a model's modules our attention where they have their own.

    Args:
        base: of transformers, its modules holding a `Relay`.
    """
    if isinstance(base, PreTrainedModel):
        for module in base.modules():
            if adapter := _ADAPTERS.get(type(module).__qualname__):
                adapter(module)


def _call(
    module: Any, qkv_1HTD: tuple[Tensor, Tensor, Tensor], *, scale: float, key_bias: Tensor | None = None
) -> Tensor:
    """[1, T, H · D]"""
    return Relay.of(module).call(module, *qkv_1HTD, scale=scale, key_bias=key_bias).flatten(2)


def _heads(x_1TF: Tensor, num_heads: int) -> Tensor:
    """[1, T, H · D] as [1, H, T, D]."""
    return x_1TF.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _distances(module: Any, slopes_H: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """[H, T] of `dtype`: what ALiBi adds to scores, a slope times the key's position. The query's place makes no difference to a
    softmax. Source: Press et al., "Train Short, Test Long" (2022)."""
    relay = Relay.of(module)
    return relay.once("distances", lambda: (slopes_H()[:, None] * relay.positions).to(dtype))


def _two_positions(positions: Tensor) -> Tensor:
    return torch.ones(1, 2, dtype=torch.long, device=positions.device)


def _method(module: Any, *, scale: float, window: int = 0, keys_transposed: bool = False) -> None:
    """For classes with a method ``_attn`` of queries, keys and values."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> list[Tensor | None]:
        key = key.transpose(2, 3) if keys_transposed else key
        return [Relay.of(module).call(module, query, key, value, scale=scale, window=window).transpose(1, 2), None]

    module._attn = attend


def _gpt_neo(module: Any) -> None:
    _method(module, scale=1.0, window=module.config.window_size if module.attention_type == "local" else 0)


def _gpt_neox_japanese(module: Any) -> None:
    _method(module, scale=1 / module.norm_factor)


def _openai_gpt(module: Any) -> None:
    head_dim = module.split_size // module.n_head
    _method(module, scale=head_dim**-0.5 if module.scale else 1.0, keys_transposed=True)


def _falcon(module: Any) -> None:
    """ALiBi's slopes and products are in bfloat16, as in the class, whatever the model's dtype is."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb, build_alibi_tensor

    scale = module.head_dim**-0.5

    def slopes(positions: Tensor) -> Tensor:
        return build_alibi_tensor(_two_positions(positions), module.num_heads, torch.bfloat16)[:, 0, 1]

    def forward(
        hidden_states: Tensor, alibi: Tensor | None, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> tuple[Tensor, None]:
        query, key, value = (x.transpose(1, 2) for x in module._split_heads(module.query_key_value(hidden_states)))
        key_bias = None
        if alibi is None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            positions = Relay.of(module).positions
            key_bias = _distances(module, lambda: slopes(positions), torch.bfloat16).to(hidden_states.dtype) * scale
        return module.dense(_call(module, (query, key, value), scale=scale, key_bias=key_bias)), None

    module.forward = forward


def _bloom(module: Any) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor, dropout_add

    def slopes(positions: Tensor) -> Tensor:
        return build_alibi_tensor(_two_positions(positions), module.num_heads, torch.float32)[:, 0, 1]

    def forward(hidden_states: Tensor, residual: Tensor, **_: Any) -> tuple[Tensor, None]:
        qkv = module._reshape(module.query_key_value(hidden_states))
        positions = Relay.of(module).positions
        key_bias = _distances(module, lambda: slopes(positions), hidden_states.dtype)
        attended = module.dense(_call(module, qkv, scale=module.inv_norm_factor, key_bias=key_bias))
        return dropout_add(attended, residual, module.hidden_dropout, module.training), None

    module.forward = forward


def _mpt(module: Any) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    def slopes(positions: Tensor) -> Tensor:
        alibi = build_mpt_alibi_tensor(module.n_heads, 2, device=positions.device)
        return alibi[:, 0, 1] - alibi[:, 0, 0]

    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        qkv = module.Wqkv(hidden_states)
        if module.clip_qkv:
            qkv = qkv.clamp(-module.clip_qkv, module.clip_qkv)
        query, key, value = (_heads(x, module.n_heads) for x in qkv.chunk(3, -1))
        positions = Relay.of(module).positions
        key_bias = _distances(module, lambda: slopes(positions), torch.float32)
        return module.out_proj(_call(module, (query, key, value), scale=module.softmax_scale, key_bias=key_bias)), None

    module.forward = forward


def _mpt_model(module: Any) -> None:
    """It takes for granted that there is a mask; any is passed on as it is, and no layer looks at it."""
    module.forward = partial(module.forward, attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool))


def _xglm(module: Any) -> None:
    def forward(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        projections = module.q_proj, module.k_proj, module.v_proj
        query, key, value = (_heads(projection(hidden_states), module.num_heads) for projection in projections)
        return module.out_proj(_call(module, (query, key, value), scale=module.scaling)), None

    module.forward = forward


def _doge(module: Any) -> None:
    """What it adds to scores is the key's alone, as long as no key is left out."""
    from transformers.models.doge.modeling_doge import apply_rotary_pos_emb

    if module.config.keep_window_size < module.config.max_position_embeddings:
        refuse(
            f"of longer sequences it keeps {module.config.keep_window_size} keys (keep_window_size), chosen by value",
            f"Give max_position_embeddings {module.config.keep_window_size} at most in config.json.",
        )
    if module.config.is_moe:
        refuse("its experts are chosen by the scores of other tokens, too (is_moe)", "Dense models of its class run.")

    def forward(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any) -> tuple[Tensor, None]:
        query, key, value_1TF = module.q_proj(hidden_states), module.k_proj(hidden_states), module.v_proj(hidden_states)
        query, key, value = (x.unflatten(-1, (-1, module.head_dim)) for x in (query, key, value_1TF))
        query, key, value = (x.transpose(1, 2) for x in (module.q_norm(query), module.k_norm(key), value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        key_bias = torch.exp(module.A * F.softplus(module.dt_proj(value_1TF))).squeeze(0).t()
        return module.o_proj(_call(module, (query, key, value), scale=module.scaling, key_bias=key_bias)), None

    module.forward = forward


class _Behind:
    """In place of a cache, for classes that ask it how many tokens lie before those of the step: for each, as many as make its
    position."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def get_seq_length(self, *_: Any) -> Tensor:
        positions_T = self._relay.positions
        return positions_T - torch.arange(len(positions_T), device=positions_T.device)

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value


def _llama4(module: Any) -> None:
    """It counts positions by itself for the temperature of layers without rotation."""
    inner = module.forward
    (name,) = {"cache", "past_key_values"} & inspect.signature(inner).parameters.keys()  # transformers has renamed it

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs | {name: _Behind(Relay.of(module))})

    module.forward = forward


def _gemma3n(module: Any) -> None:
    """Its feed-forward keeps what lies so many standard deviations above the mean: a constant, which it computes anew each time
    with code that looks at values on the host."""
    if not module.activation_sparsity:
        return
    deviations = NormalDist().inv_cdf(module.activation_sparsity)
    rounded = {
        dtype: float(torch.tensor(deviations, dtype=dtype, device="cpu"))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }

    def keep(inputs: Tensor) -> Tensor:
        mean, deviation = inputs.mean(-1, keepdim=True), inputs.std(-1, keepdim=True, unbiased=False)
        return F.relu(inputs - (mean + deviation * rounded[inputs.dtype]))

    module._gaussian_topk = keep


_ADAPTERS: dict[str, Callable[[Any], None]] = {
    "Attention": _openai_gpt,
    "BloomAttention": _bloom,
    "DbrxExperts": adapt_dbrx,
    "DogeAttention": _doge,
    "FalconAttention": _falcon,
    "Gemma3nTextMLP": _gemma3n,
    "GPTNeoSelfAttention": _gpt_neo,
    "GPTNeoXJapaneseAttention": _gpt_neox_japanese,
    "JetMoeParallelExperts": adapt_jetmoe_experts,
    "JetMoeTopKGating": adapt_jetmoe_router,
    "Llama4TextAttention": _llama4,
    "LongcatFlashExperts": adapt_longcat_flash,
    "MptAttention": _mpt,
    "MptModel": _mpt_model,
    "XGLMAttention": _xglm,
}
"""By the name of a module's class."""

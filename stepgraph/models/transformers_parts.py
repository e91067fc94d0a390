"""A class of transformers whose linear layers ranks share, as transformers' own plan for it says (`base_model_tp_plan`).

Shapes: T tokens, I inputs, O outputs, N ranks, W outputs of a rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stepgraph.errors import ModelError
from stepgraph.models.checkpoint import take
from stepgraph.models.text_part import text_config
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.transformers_halves import decoder_path
from stepgraph.parallel.group import Fault, GatheredTokens, Group, Norm
from stepgraph.parallel.shard import Axis, Cut, Part, Shard, sizes_that_divide

_GATHERED_ROWS = 512
"""Tokens whose outputs are gathered at once."""
_WHOLE = {"replicated_with_grad_allreduce", "replicate", "embedding_rowwise", "embedding_colwise"}
"""Kinds of plans that every rank keeps whole here: an embedding table is looked up, which costs nothing."""


@dataclass(frozen=True)
class _Kind:
    axis: Axis
    gathers: bool = False  # outputs are put together
    splits: bool = False  # inputs are those of all ranks


_KINDS = {
    "colwise": _Kind(Axis.OUT),
    "colwise_gather_output": _Kind(Axis.OUT, gathers=True),
    "colwise_rep": _Kind(Axis.OUT, gathers=True),
    "rowwise": _Kind(Axis.IN),
    "rowwise_split_input": _Kind(Axis.IN, splits=True),
    "rowwise_rep": _Kind(Axis.IN, splits=True),
}


class LinearPart(nn.Module):
    """A rank's part of a linear layer, and what it tells the other ranks. May run inside a graph."""

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: _Kind, part: Part, group: Group, *, tied: bool) -> None:
        """Args:
        linear: the whole.
        kind: how ranks share it.
        part: of this rank.
        group: the ranks.
        tied: another layer needs the weight whole, of which this one takes its rows at each step.
        """
        super().__init__()
        assert part.columns is not None
        self._kind, self._group = kind, group
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._width = -(
            -linear.out_features // group.shard.size
        )  # of a gathered part, of which the last may be shorter
        self._inputs = slice(part.columns.begin, part.columns.begin + part.columns.length) if kind.splits else None
        (first,) = part.row_cuts if tied else (None,)
        self._rows = None if first is None else slice(first.begin, first.begin + first.length)
        self.weight = linear.weight if tied else _kept(linear.weight, part)
        summed_elsewhere = kind.axis is Axis.IN and group.shard.rank > 0
        self.bias = None if linear.bias is None or summed_elsewhere else _kept(linear.bias, part.along_rows())

    def forward(self, x: Tensor) -> Tensor:
        """The whole layer's outputs or, where the next layer is cut along its inputs, those of this rank: dtype of `x`."""
        if self._inputs is not None:
            x = x[..., self._inputs]
        weight = self.weight if self._rows is None else self.weight[self._rows]
        y = F.linear(x, weight, self.bias)
        if self._kind.axis is Axis.IN:
            part_TO = y.reshape(-1, y.shape[-1])
            return self._group.add_sum(part_TO, torch.zeros_like(part_TO)).view(y.shape)
        return self._gathered(y) if self._kind.gathers else y

    def _gathered(self, y: Tensor) -> Tensor:
        part_TW = F.pad(y.reshape(-1, y.shape[-1]), (0, self._width - y.shape[-1])).contiguous()
        out_TO = part_TW.new_empty(len(part_TW), self.out_features)
        for part_RW, out_RO in zip(part_TW.split(_GATHERED_ROWS), out_TO.split(_GATHERED_ROWS), strict=True):
            self._group.gather(part_RW, out_RO)
        return out_TO.view(*y.shape[:-1], self.out_features)


def _kept(values: Tensor, part: Part) -> nn.Parameter:
    return nn.Parameter(take(values.detach(), part).clone(memory_format=torch.contiguous_format), requires_grad=False)


class ShapesOnly:
    """In place of a group: for trials on tensors without values."""

    name = "none"
    fault_flag: Tensor | None = None

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def add_sum(
        self,
        part_TE: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """See `Group.add_sum`."""
        return residual_TE

    def gather(self, part_RW: Tensor, out_RV: Tensor) -> Tensor:
        """See `Group.gather`."""
        return out_RV

    def gather_tokens(self, x_TE: Tensor, count_1: Tensor, *, norm: Norm | None = None) -> GatheredTokens:
        """See `Group.gather_tokens`."""
        return GatheredTokens(x_TE.repeat(self.shard.size, 1), count_1.repeat(self.shard.size))

    def scatter_sum(
        self,
        part_AE: Tensor,
        counts_N: Tensor,
        residual_TE: Tensor,
        *,
        multiplier: float = 1.0,
        post_norm: Norm | None = None,
        norm: Norm | None = None,
    ) -> Tensor:
        """See `Group.scatter_sum`."""
        return residual_TE

    def loop_back(self) -> AbstractContextManager[None]:
        """See `Group.loop_back`."""
        return nullcontext()

    def fault(self) -> Fault | None:
        """See `Group.fault`."""

    def abort(self) -> None:
        """See `Group.abort`."""

    def close(self) -> None:
        """See `Group.close`."""


def keep_part(hf_model: Any, config: TransformersConfig, group: Group) -> None:
    """Replace the layers that ranks share by this rank's parts of them; the embedding table stays whole.

    Args:
        hf_model: of transformers, whole, on any device, the meta device included. A layer's weight is given up as its part is
            taken.
        config: of the model.
        group: the ranks.

    Raises:
        ModelError: transformers has no plan for the class, or one that cannot be followed, or so many ranks cannot share it.
    """
    if len({spec.num_kv_heads for spec in config.attention_specs}) > 1:
        refuse_to_share(config, "its layers differ in the number of their key/value heads")
    cuts = list(_cuts(hf_model, config))
    if all(_is_head(path) for path, _ in cuts):
        refuse_to_share(config, "transformers' plan for it (base_model_tp_plan) cuts none of its layers")
    _check_sizes(hf_model, config, group.shard, cuts)
    embedding = hf_model.get_input_embeddings().weight
    for path, kind in cuts:
        linear = hf_model.get_submodule(path)
        part = _part(path, linear, kind, config, group.shard)
        parent, _, name = path.rpartition(".")
        tied = linear.weight is embedding
        setattr(hf_model.get_submodule(parent), name, LinearPart(linear, kind, part, group, tied=tied))


def _cuts(hf_model: Any, config: TransformersConfig) -> Iterator[tuple[str, _Kind]]:
    """Paths of the layers that are cut, and how."""
    base_plan = getattr(text_config(config.hf_config), "base_model_tp_plan", None)
    if not base_plan:
        refuse_to_share(
            config, "transformers has no plan (base_model_tp_plan) for it that says how devices share its layers"
        )
    prefix = decoder_path(hf_model)
    plan = {f"{prefix}.{pattern}": kind for pattern, kind in base_plan.items()}
    plan |= getattr(type(hf_model), "_tp_plan", None) or {}
    modules, parameters = dict(hf_model.named_modules()), dict(hf_model.named_parameters(remove_duplicate=False))
    for pattern, kind in plan.items():
        expression = re.compile(re.escape(pattern).replace(r"\*", r"\d+"))
        found = [path for path in (*modules, *parameters) if expression.fullmatch(path)]
        if kind in _WHOLE:
            continue
        for path in found:
            if kind not in _KINDS or type(modules.get(path)) is not nn.Linear:
                refuse_to_share(
                    config,
                    f"transformers' plan cuts {pattern} by {kind}, and what can be cut are linear layers by {', '.join(_KINDS)}",
                )
            yield path, _KINDS[kind]


def _check_sizes(hf_model: Any, config: TransformersConfig, shard: Shard, cuts: list[tuple[str, _Kind]]) -> None:
    widths: dict[int, None] = {}
    for path, kind in cuts:
        linear = hf_model.get_submodule(path)
        width = linear.in_features if kind.axis is Axis.IN else linear.out_features
        if kind.gathers and width > config.vocab_size:
            refuse_to_share(
                config,
                f"what ranks gather may be as wide as the vocabulary ({config.vocab_size}), and {path} has {width} outputs",
            )
        if not _is_head(path) and (kind.gathers or not _is_of_keys(path)):
            widths[width] = None
    num_heads, *others = sorted({spec.num_heads for spec in config.attention_specs})
    num_kv_heads = config.attention_specs[0].num_kv_heads
    sizes = sizes_that_divide(num_heads, num_kv_heads, *others, *widths)
    if shard.size not in sizes:
        raise ModelError(
            f"{shard.size} devices cannot share this {config.architecture} evenly: it has "
            f"{' or '.join(map(str, (num_heads, *others)))} query heads, {num_kv_heads} key/value heads, which may be repeated, "
            f"and layers of {', '.join(map(str, widths))} values. Numbers that can: {', '.join(map(str, sizes))}."
        )


def _part(path: str, linear: nn.Linear, kind: _Kind, config: TransformersConfig, shard: Shard) -> Part:
    inputs, outputs = Cut.whole(linear.in_features), Cut.whole(linear.out_features)
    if kind.axis is Axis.IN:
        return Part((outputs,), shard.cut(linear.in_features))
    if _is_head(path):
        width = -(-linear.out_features // shard.size)
        begin = width * shard.rank
        return Part((Cut(linear.out_features, begin, min(width, linear.out_features - begin)),), inputs)
    if _is_of_keys(path) and not kind.gathers:
        num_kv_heads = config.attention_specs[0].num_kv_heads
        return Part((shard.heads(num_kv_heads).times(linear.out_features // num_kv_heads),), inputs)
    return Part((shard.cut(linear.out_features),), inputs)


def _is_head(path: str) -> bool:
    return "." not in path


def _is_of_keys(path: str) -> bool:
    """Whether a layer makes keys or values, whose heads may be repeated."""
    return path.endswith((".k_proj", ".v_proj"))


def refuse_to_share(config: TransformersConfig, what: str) -> NoReturn:
    """Raise an error that says what keeps ranks from sharing a model, and what runs."""
    raise ModelError(
        f"Several devices cannot share {config.architecture} through transformers' code: {what}. Use one device, or a native "
        "model (docs/adding-a-model.md)."
    )

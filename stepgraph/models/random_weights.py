"""Weights of `load_format` "dummy": random, the same ones every time, and for every number of ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stepgraph.layers.attention import Attention
from stepgraph.layers.embedding import Embedding
from stepgraph.layers.experts import Router
from stepgraph.layers.formats import Target
from stepgraph.layers.formats.target import values_part_of
from stepgraph.layers.gated_delta import GatedDelta
from stepgraph.layers.mamba2 import Mamba2
from stepgraph.layers.matrix import Matrix
from stepgraph.layers.norm import RMSNorm
from stepgraph.layers.normed_experts import ScaledRouter
from stepgraph.layers.short_conv import Convolution
from stepgraph.models.checkpoint import keep_rows
from stepgraph.models.decoder_layer import DecoderLayer
from stepgraph.parallel.shard import Part

_DEVIATION = 0.02
_EMBEDDING_DEVIATION = 4.0
"""Of models with experts: so much that what layers add hardly turns a token's state. With less, what all tokens of a context have
in common soon outweighs the token, and all choose the same experts, which no trained router has them do."""
_PIECE = 2**24
"""Numbers drawn at once."""


@torch.no_grad()
def fill_randomly(model: nn.Module, device: torch.device) -> None:
    """Fill a native model's parameters as `load_format` "dummy" says, the same way every time. A rank draws what the whole model
    would be filled with, which takes no longer than there, and keeps its part.

    Args:
        model: on `device`. Where ranks share it, a piece of a matrix takes memory meanwhile.
        device: numbers are drawn there, and depend on its kind.
    """
    generator = torch.Generator(device).manual_seed(0)
    has_experts = any(isinstance(module, Router) for module in model.modules())
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.fill_(1.0)
        if isinstance(module, GatedDelta | Mamba2):
            module.A_log.fill_(0.0)
            module.dt_bias.fill_(1.0)
        if isinstance(module, Mamba2):
            module.D.fill_(1.0)
        if isinstance(module, Convolution):
            module.weight.fill_(1.0 / module.weight.shape[-1])
            if module.bias is not None:
                module.bias.fill_(0.0)
        if isinstance(module, Router):
            for parameter in module.parameters(recurse=False):
                _draw(parameter, generator)
        if isinstance(module, Attention):
            for target in module.targets().values():
                _draw(target, generator)
        if isinstance(module, ScaledRouter):
            module.expert_scale.fill_(1.0)
        if isinstance(module, DecoderLayer) and module.layer_scalar is not None:
            module.layer_scalar.fill_(1.0)
        if isinstance(module, Matrix):
            spreads = has_experts and isinstance(module, Embedding)
            for target in module.targets().values():
                _draw(target, generator, _EMBEDDING_DEVIATION if spreads else _DEVIATION)


def _draw(target: Target, generator: torch.Generator, deviation: float = _DEVIATION) -> None:
    part, shape = values_part_of(target), tuple(target.shape)
    length = max(1, _PIECE // math.prod(shape[1:]))  # rows of a piece
    if part is None and isinstance(target, Tensor):
        for piece in target.split(length):
            piece.normal_(0.0, deviation, generator=generator)
        return
    part = part or Part.whole(shape)
    kept = torch.empty(part.kept_shape, dtype=target.dtype, device=generator.device)
    piece = torch.empty(min(length, shape[0]), *shape[1:], dtype=target.dtype, device=generator.device)
    for begin in range(0, shape[0], length):
        drawn = piece[: shape[0] - begin].normal_(0.0, deviation, generator=generator)
        keep_rows(drawn, begin, part, kept)
    target.copy_(kept)

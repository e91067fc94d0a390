"""Which tensors of a checkpoint belong to modules that draft, and not to the model they are stored with."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stepgraph.models.checkpoint import CheckpointTensor

_OWN_NAME = re.compile(r"(?:model\.)?mtp[._]")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.")
_MARK = re.compile(r"(?:model\.)?layers\.(\d+)\.enorm\.")
"""In DeepSeek's layout, modules are numbered as if they were further layers; no layer has a norm of this name."""


def mtp_names(names: Iterable[str]) -> set[str]:
    """Those of a checkpoint's names that are of its draft modules.

    >>> sorted(mtp_names(["model.layers.1.mlp.w", "model.layers.2.mlp.w", "model.layers.2.enorm.weight", "mtp.fc.weight"]))
    ['model.layers.2.enorm.weight', 'model.layers.2.mlp.w', 'mtp.fc.weight']
    """
    names = list(names)
    layers = {match[1] for name in names if (match := _MARK.match(name))}
    return {name for name in names if _OWN_NAME.match(name) or ((match := _LAYER.match(name)) and match[1] in layers)}


def without_mtp(tensors: Iterable[CheckpointTensor]) -> list[CheckpointTensor]:
    """The model's own tensors."""
    tensors = list(tensors)
    names = mtp_names(tensor.name for tensor in tensors)
    return [tensor for tensor in tensors if tensor.name not in names]

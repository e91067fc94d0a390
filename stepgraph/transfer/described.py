"""What a rank says of its memory, so that others find its caches in it; read by those who believe nothing of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stepgraph.platforms.shared_memory import Address
from stepgraph.transfer.base import TransferError
from stepgraph.transfer.layout import BlockLayout, TensorLayout
from stepgraph.transfer.mover import Heads
from stepgraph.transfer.rank_cache import RankCache

View = Callable[[int, tuple[int, ...], torch.dtype], Tensor]
"""A tensor of a shape and a dtype, so many bytes from the memory's start; ValueError if it does not lie within."""
_ADDRESS = (int, int, int, str)
"""Types of the fields of an `Address`."""


@dataclass(frozen=True)
class Described:
    """The memory of a rank's caches, and of its signals."""

    memory: tuple[Any, ...]
    """Where it is, in the words of a back end."""
    words: Address
    num_blocks: int
    """The null block included."""
    offsets: tuple[tuple[int, ...], ...]
    """Of each tensor of `BlockLayout.layers`, bytes from the memory's start."""


def describe(cache: RankCache, memory: Sequence[int | str], words: Address, offset: Callable[[Tensor], int]) -> str:
    """As text: where the caches of a rank are in its memory.

    Args:
        cache: of the rank.
        memory: see `Described.memory`.
        words: of its signals.
        offset: bytes from the memory's start to a tensor.
    """
    return json.dumps(
        {
            "memory": memory,
            "words": words,
            "num_blocks": next(len(tensor) for tensors in cache.tensors for tensor in tensors),
            "offsets": [[offset(tensor) for tensor in tensors] for tensors in cache.tensors],
        }
    )


def read_description(text: str, layout: BlockLayout, memory: Sequence[type]) -> Described:
    """What another engine's rank said.

    Args:
        text: its words.
        layout: of both engines.
        memory: types of `Described.memory`.

    Raises:
        TransferError: it makes no sense.
    """
    try:
        said = json.loads(text)
        where, words, num_blocks, offsets = (said[name] for name in ("memory", "words", "num_blocks", "offsets"))
        good = [type(value) for value in where] == [*memory] and [type(value) for value in words] == [*_ADDRESS]
        good = good and type(num_blocks) is int and [len(of) for of in offsets] == [len(of) for of in layout.layers]
        good = good and all(type(offset) is int for of in offsets for offset in of)
        if good and num_blocks > 0 and words[2] == 8 * (1 + layout.num_model_layers):
            return Described(tuple(where), Address(*words), num_blocks, tuple(map(tuple, offsets)))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        cause: Exception | None = error
    else:
        cause = None
    raise TransferError(f"another engine's memory is described by {text[:200]!r}, which makes no sense here") from cause


def lay_out(said: Described, layout: BlockLayout, heads: Heads, view: View) -> list[list[Tensor]]:
    """The caches of a rank, in its memory: see `RemoteMemory.tensors`.

    Args:
        said: by the rank.
        layout: of both engines.
        heads: that it has.
        view: of its memory, as this process reaches it.

    Raises:
        TransferError: they do not lie within.
    """
    found: list[list[Tensor]] = []
    for items, offsets in zip(layout.layers, said.offsets, strict=True):
        found.append([])
        for item, offset in zip(items, offsets, strict=True):
            shape = (said.num_blocks, layout.block_size, *_shape(item, heads))
            try:
                found[-1].append(view(offset, shape, getattr(torch, item.dtype.removeprefix("torch."))))
            except (ValueError, RuntimeError, OverflowError) as error:
                raise TransferError(
                    f"a tensor of {said.num_blocks} blocks at byte {offset} is beyond another engine's memory"
                ) from error
    return found


def _shape(item: TensorLayout, heads: Heads) -> tuple[int, ...]:
    """What a rank has of a token in a tensor."""
    return (heads(item.shape[0]).length, *item.shape[1:]) if item.has_heads else item.shape

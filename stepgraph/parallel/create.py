"""Which group a rank gets: the fastest that its devices allow."""

from __future__ import annotations

import logging

import torch

from stepgraph.errors import ConfigError
from stepgraph.ops.collectives.mailbox import HEAD_BYTES
from stepgraph.parallel.exchange import Exchange, least
from stepgraph.parallel.group import Group
from stepgraph.parallel.shard import Shard
from stepgraph.parallel.shared_memory import create_shared_group
from stepgraph.platforms import Platform

logger = logging.getLogger(__name__)

_COLUMN_PADDING = 16
"""Columns that a rank may have beyond its share, so that rows begin at multiples of so many."""
_HOST_SLOT_BYTES = 2 << 20
_DEVICE_BUFFER_BYTES = 32 << 20
"""Of a GPU's inbox for one turn, slots of all ranks together: three times as much is taken. Two ranks have messages of 16 MiB,
which take some 40 us of their link: what further messages begin with is little beside."""
_MAX_PROGRAMS = 128
_UNIT = 8192
"""Bytes of which slots are multiples."""


def create_group(
    shard: Shard,
    exchange: Exchange,
    platform: Platform,
    *,
    dtype: torch.dtype,
    hidden_size: int,
    max_tokens: int,
    vocab_size: int,
    max_samples: int,
    time_limit_s: float = 30.0,
) -> Group:
    """The group of the ranks that call this, each with its own shard and device, before anything is captured.

    Args:
        shard: this rank's.
        exchange: of the ranks.
        platform: whose device this rank computes on.
        dtype: of activations and logits.
        hidden_size: E of sums and of tokens.
        max_tokens: of sums, as a rule; more go in several messages.
        vocab_size: V of what is gathered, at most.
        max_samples: rows of what is gathered, as a rule.
        time_limit_s: of a wait for another rank.

    Raises:
        ConfigError: there are no collectives for such devices.
        StepgraphError: the memory that they need cannot be shared, or another rank failed.
    """
    group = _create(shard, exchange, platform, dtype, hidden_size, max_tokens, vocab_size, max_samples, time_limit_s)
    logger.info("collectives of %d ranks by %s", shard.size, group.name)
    return group


def _create(
    shard: Shard,
    exchange: Exchange,
    platform: Platform,
    dtype: torch.dtype,
    hidden_size: int,
    max_tokens: int,
    vocab_size: int,
    max_samples: int,
    time_limit_s: float,
) -> Group:
    columns = -(-vocab_size // shard.size) + _COLUMN_PADDING
    most = max(max_tokens * hidden_size, max_samples * columns) * dtype.itemsize + HEAD_BYTES
    # At least a row, of what is made of tokens one of each rank's:
    row = max(shard.size * hidden_size, columns) * dtype.itemsize + HEAD_BYTES
    if platform.device.type == "cpu":
        slot_bytes = _slot(row, most, _HOST_SLOT_BYTES)
        return create_shared_group(shard, exchange, slot_bytes=slot_bytes, dtype=dtype, time_limit_s=time_limit_s)
    if platform.name == "cuda":
        from stepgraph.parallel.nccl import NcclGroup
        from stepgraph.parallel.peer_memory import create_push_group

        num_programs = least(exchange, platform.multiprocessors)
        group = create_push_group(
            shard,
            exchange,
            platform,
            slot_bytes=_slot(row, most, _DEVICE_BUFFER_BYTES // shard.size),
            dtype=dtype,
            num_programs=min(num_programs, _MAX_PROGRAMS),
            time_limit_s=time_limit_s,
        )
        return group or NcclGroup(shard, exchange, platform.device, time_limit_s=time_limit_s)
    raise ConfigError(
        f"device={platform.name!r} has no collectives, so one device must do: leave tensor_parallel_size at 1, or use "
        "device='cpu' or 'cuda'"
    )


def _slot(row: int, most: int, limit: int) -> int:
    """Bytes of a slot: of the largest message, or of `limit`, or at least of one row."""
    return -(-max(row, min(most, limit)) // _UNIT) * _UNIT

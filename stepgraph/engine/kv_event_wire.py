"""Events as routers read them: the structs of vLLM's `vllm/distributed/kv_events.py`, and how what an engine notes becomes one.

A batch is an array, an event in it a map with its name under `type`. Names and order of fields are vLLM's; docs/kv-events.md says
with which of its revisions they were compared.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from stepgraph.engine.kv_events import Cleared, Event, Medium, Removed, Stored, StoredOnHost

_KEY_BYTES = 32
_HASH_BYTES = 8
_SALT_DIGITS = 32
_PART = 512
"""Blocks that are told of at a time, of a whole cache."""

ExtraKeys = list[str] | None


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """N blocks of one chain."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    """N · `block_size`; none of blocks in host memory, which were told before."""
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[ExtraKeys] | None = None
    """Of each block, what its name depends on beside tokens."""
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """Blocks of any chains."""

    block_hashes: list[int]
    medium: str | None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """All blocks, wherever they are."""


WireEvent = BlockStored | BlockRemoved | AllBlocksCleared


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """A message's payload."""

    ts: float
    """Seconds since 1970."""
    events: list[WireEvent]
    data_parallel_rank: int | None = None


def hashes_of(keys: Sequence[bytes]) -> list[int]:
    """Names of blocks as others know them: the last 64 bits of their keys."""
    words = np.frombuffer(b"".join(keys), dtype=f">u{_HASH_BYTES}")
    every = _KEY_BYTES // _HASH_BYTES
    return words[every - 1 :: every].tolist()


def salt_digest(salt: str) -> str:
    """What stands for a salt. Not as long as the digests by which routers know images, so that none takes it for one."""
    return "salt:" + hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest()[:_SALT_DIGITS]


def _sendable(text: str) -> str:
    """Text as UTF-8 has it. Names of folders, and salts that no JSON brought, may have halves of characters: they are spelled."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class Wording:
    """How the events of an engine are put.

    Args:
        block_size: tokens of a block.
        window: tokens that one sees in every layer; 0: all.
        shows_salts: salts appear as they are.
    """

    block_size: int
    window: int
    shows_salts: bool

    def events(self, noted: Iterable[Event]) -> list[WireEvent]:
        """What was noted, as it is told. Blocks that are removed one after another make one event."""
        told: list[WireEvent] = []
        for event in noted:
            if isinstance(event, Removed):
                last = told[-1] if told else None
                if isinstance(last, BlockRemoved) and last.medium == event.medium:
                    last.block_hashes += hashes_of(event.keys)
                else:
                    told.append(BlockRemoved(hashes_of(event.keys), event.medium, 0))
            elif isinstance(event, Stored):
                told.append(self._stored(event))
            elif isinstance(event, StoredOnHost):
                told.append(self.on_host(hashes_of(event.keys)))
            else:
                assert isinstance(event, Cleared)
                told.append(AllBlocksCleared())
        return told

    def on_host(self, hashes: list[int]) -> BlockStored:
        """That of blocks in host memory, of any chains."""
        return self.on_device(hashes, None, [], None, None, Medium.CPU)

    def on_device(
        self,
        hashes: list[int],
        parent: int | None,
        tokens: list[int],
        adapter: str | None,
        extra_keys: list[ExtraKeys] | None,
        medium: Medium = Medium.GPU,
    ) -> BlockStored:
        """That of blocks of a chain."""
        return BlockStored(
            hashes,
            parent,
            tokens,
            self.block_size,
            None,
            medium,
            adapter,
            extra_keys,
            0,
            "sliding_window" if self.window else "full_attention",
            self.window or None,
        )

    def _stored(self, event: Stored) -> BlockStored:
        hashes = hashes_of(event.keys)
        adapter = None if event.adapter is None else _sendable(event.adapter)
        every: ExtraKeys = None if adapter is None else [adapter]
        extra_keys = [every] * len(hashes)
        if event.parent is None and event.salt is not None:  # as in vLLM, the first block of a chain alone has it
            extra_keys[0] = [*(every or ()), _sendable(event.salt) if self.shows_salts else salt_digest(event.salt)]
        parent = None if event.parent is None else hashes_of((event.parent,))[0]
        of_prompt, of_answer = event.tokens
        tokens = array("i", of_prompt).tolist() + array("i", of_answer).tolist()
        return self.on_device(hashes, parent, tokens, adapter, extra_keys)


class _Block(NamedTuple):
    """A block on the device."""

    parent: int | None
    tokens: list[int]
    adapter: str | None
    extra_keys: ExtraKeys


class CacheContent:
    """What whoever has taken in all events up to one knows.

    Args:
        wording: puts it into events again.
    """

    def __init__(self, wording: Wording) -> None:
        self._wording = wording
        self._on_device: dict[int, _Block] = {}
        self._on_host: dict[int, None] = {}

    def take_in(self, events: Iterable[WireEvent]) -> None:
        """Go on by these."""
        for event in events:
            if isinstance(event, AllBlocksCleared):
                self._on_device.clear()
                self._on_host.clear()
                continue
            blocks: dict[int, Any] = self._on_host if event.medium == Medium.CPU else self._on_device
            if isinstance(event, BlockRemoved):
                for block in event.block_hashes:
                    blocks.pop(block, None)
            elif blocks is self._on_host:
                self._on_host.update(dict.fromkeys(event.block_hashes))
            else:
                self._store(event)

    def _store(self, event: BlockStored) -> None:
        size, parent, extra_keys = event.block_size, event.parent_block_hash, event.extra_keys or []
        for place, block in enumerate(event.block_hashes):
            tokens = event.token_ids[place * size : (place + 1) * size]
            self._on_device[block] = _Block(parent, tokens, event.lora_name, extra_keys[place])
            parent = block

    def copy(self) -> CacheContent:
        """One that stays as it is."""
        copy = CacheContent(self._wording)
        copy._on_device, copy._on_host = dict(self._on_device), dict(self._on_host)
        return copy

    @property
    def num_parts(self) -> int:
        """How many parts to tell it in, that none keeps the engine's thread waiting for long."""
        return max(1, -(-len(self._on_device) // _PART))

    def parts(self, num_parts: int) -> Iterator[list[WireEvent]]:
        """Events that lead here from whatever was known before, in so many parts: each block comes after the one before it in its
        chain."""
        blocks = self._in_order()
        size = max(1, -(-len(blocks) // num_parts))
        for part in range(num_parts):
            told: list[WireEvent] = [] if part else [AllBlocksCleared()]
            for block in blocks[part * size : (part + 1) * size]:
                self._tell(told, block)
            if self._on_host and part == num_parts - 1:
                told.append(self._wording.on_host(list(self._on_host)))
            yield told

    def _in_order(self) -> list[int]:
        """All blocks on the device, chain after chain."""
        blocks: list[int] = []
        seen: set[int] = set()
        for place, block in enumerate(self._on_device):
            if place % _PART == 0:
                time.sleep(0)  # the engine's thread may have waited for Python's lock
            chain: list[int] = []
            at: int | None = block
            while at is not None and at in self._on_device and at not in seen:
                seen.add(at)
                chain.append(at)
                at = self._on_device[at].parent
            blocks += reversed(chain)
        return blocks

    def _tell(self, told: list[WireEvent], block: int) -> None:
        """Go on with the last event, if the block follows on it."""
        parent, tokens, adapter, extra_keys = self._on_device[block]
        last = told[-1] if told else None
        if isinstance(last, BlockStored) and last.block_hashes[-1] == parent and last.lora_name == adapter:
            assert last.extra_keys is not None
            last.block_hashes.append(block)
            last.token_ids += tokens
            last.extra_keys.append(extra_keys)
        else:
            told.append(self._wording.on_device([block], parent, list(tokens), adapter, [extra_keys]))

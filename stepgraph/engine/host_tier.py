"""HostTier: blocks of the prefix cache that are kept in host memory too, and found there when the device has them no more.

A block is copied out once, soon after the last request has released it: when it is about to be handed out for new content, it is
too late. Copies go beside the steps, a few blocks at a time, and hold those meanwhile. Of host memory, the blocks that were
asked for least recently make room.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.kv_events import KVEvents
from stepgraph.transfer.base import FetchFailure, FetchState, Moves
from stepgraph.transfer.host_memory import HostCopies
from stepgraph.transfer.leases import LossReason

_MAX_COPIED = 64
"""Blocks that are copied out, and held for that, at a time."""

_MAX_COPIED_SHARE = 8
"""One so-manyth of the free blocks likewise: requests come first."""


class HostFetch:
    """See `stepgraph.transfer.base.Fetch`: blocks that come back. What is read may be overwritten once it was cancelled."""

    def __init__(self, moves: Moves, num_blocks: int) -> None:
        self._moves, self._num_blocks, self._begun_at = moves, num_blocks, time.monotonic()
        self._is_cancelled = False

    @property
    def state(self) -> FetchState:
        if self._is_cancelled or self._moves.error is not None:
            return FetchState.FAILED
        return FetchState.DONE if self.num_blocks else FetchState.UNDER_WAY

    @property
    def num_blocks(self) -> int:
        return self._moves.num_moved

    @property
    def reason(self) -> FetchFailure | LossReason | None:
        if self._moves.error is not None:
            return FetchFailure.BACKEND
        return FetchFailure.CANCELLED if self._is_cancelled else None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun_at

    def cancel(self) -> None:
        self._is_cancelled = True
        self._moves.cancel()

    def done(self) -> bool:
        return self.num_blocks == self._num_blocks or self._moves.done()


@dataclass
class _Copying:
    """Blocks on their way to host memory."""

    blocks: list[int]
    host_blocks: list[int]
    keys: list[bytes]
    after: int | None
    """Step whose results must be read before; None: none was under way."""
    moves: Moves | None = None


class HostTier:
    """Belongs to the engine's thread.

    Args:
        copies: host memory, and the ways there and back.
        blocks: all KV blocks.
    """

    def __init__(self, copies: HostCopies, blocks: BlockPool) -> None:
        self._copies, self._blocks = copies, blocks
        self._free = list(range(copies.num_blocks))
        self._by_key: OrderedDict[bytes, int] = OrderedDict()  # the least recently wanted first
        self._num_readers: dict[int, int] = {}  # of host blocks that are copied back
        self._dropped: set[int] = set()  # of these, those whose content is not wanted any more
        self._copying: _Copying | None = None
        self._lately = blocks.watch_cached()
        self.num_hits = self.num_evictions = 0
        """Blocks that came back, and that made room for others."""
        self.events: KVEvents | None = None
        """Hears which blocks it has; whoever tells of them sets it."""

    @property
    def num_blocks(self) -> int:
        """That it has."""
        return len(self._by_key)

    @property
    def num_bytes(self) -> int:
        """Of all its room."""
        return self._copies.num_blocks * self._copies.block_bytes

    @property
    def is_busy(self) -> bool:
        """Whether there is something to copy out."""
        return self._copying is not None or bool(self._lately)

    def count(self, keys: Sequence[bytes]) -> int:
        """How many blocks it has, from the first on."""
        return next((place for place, key in enumerate(keys) if key not in self._by_key), len(keys))

    def pin(self, keys: Sequence[bytes]) -> list[int]:
        """Keep blocks that it has until `unpin`; where they are."""
        host_blocks = []
        for key in keys:
            self._by_key.move_to_end(key)
            host_blocks.append(block := self._by_key[key])
            self._num_readers[block] = self._num_readers.get(block, 0) + 1
        return host_blocks

    def unpin(self, host_blocks: Sequence[int]) -> None:
        """These are not read any more, or what is read is worth nothing."""
        for block in host_blocks:
            self._num_readers[block] -= 1
            if not self._num_readers[block]:
                del self._num_readers[block]
                if block in self._dropped:
                    self._dropped.remove(block)
                    self._free.append(block)

    def fetch(self, host_blocks: Sequence[int], blocks: Sequence[int]) -> HostFetch:
        """Bring pinned blocks back. No step under way touches `blocks`."""
        self.num_hits += len(blocks)
        return HostFetch(self._copies.get(host_blocks, blocks), len(blocks))

    def poll(self, unread: Sequence[int]) -> None:
        """Copy out what was released. `unread`: the steps under way, in their order."""
        copying = self._copying
        if copying is None:
            copying = self._copying = self._choose(unread)
        if copying is None:
            return
        if copying.moves is None:
            if copying.after is None or not unread or unread[0] > copying.after:
                copying.moves = self._copies.put(copying.blocks, copying.host_blocks)
        elif copying.moves.num_moved:
            self._by_key.update(zip(copying.keys, copying.host_blocks, strict=True))
            if self.events is not None:
                self.events.stored_on_host(copying.keys)
            self._copying = None
            self._blocks.release(copying.blocks)
            for block in copying.blocks:
                self._lately.pop(block, None)  # or those that host memory has no room for would take turns for ever
        elif copying.moves.error is not None:
            self._stop()

    def clear(self) -> None:
        """Forget all: what the blocks hold counts no more. Nobody holds a block for this after that; some may be quarantined."""
        self._stop()
        self._lately.clear()
        if self.events is not None and self._by_key:
            self.events.removed_from_host(list(self._by_key))
        while self._by_key:
            self._give_back(self._by_key.popitem()[1])

    def close(self) -> None:
        """Give the memory back."""
        self._copies.close()

    def _choose(self, unread: Sequence[int]) -> _Copying | None:
        """Take the next blocks to be copied, and room for them."""
        most = min(_MAX_COPIED, -(-self._blocks.num_free // _MAX_COPIED_SHARE))
        blocks: list[int] = []
        keys: list[bytes] = []
        host_blocks: list[int] = []
        while self._lately and len(blocks) < most:
            block = next(iter(self._lately))
            del self._lately[block]
            key = self._blocks.key_of(block)
            if key is None:
                continue
            if key in self._by_key:
                self._by_key.move_to_end(key)
            elif (room := self._make_room()) is not None:
                blocks.append(block)
                keys.append(key)
                host_blocks.append(room)
        if not blocks:
            return None
        self._blocks.hold(blocks)
        return _Copying(blocks, host_blocks, keys, unread[-1] if unread else None)

    def _make_room(self) -> int | None:
        """A host block for new content; None if all are being read, or about to be written."""
        if self._free:
            return self._free.pop()
        for key, block in self._by_key.items():
            if block not in self._num_readers:
                del self._by_key[key]
                self.num_evictions += 1
                if self.events is not None:
                    self.events.removed_from_host((key,))
                return block
        return None

    def _stop(self) -> None:
        """Copy no more of what is on its way."""
        copying, self._copying = self._copying, None
        if copying is not None:
            if copying.moves is not None:
                copying.moves.cancel()
            self._blocks.release(copying.blocks, copying.moves)
            self._free += copying.host_blocks

    def _give_back(self, block: int) -> None:
        if block in self._num_readers:
            self._dropped.add(block)
        else:
            self._free.append(block)

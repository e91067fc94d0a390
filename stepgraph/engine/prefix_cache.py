"""Finding the blocks of a prompt that others have computed, and letting others find a request's own.

Blocks that a prompt fills can be found as soon as they are planned. Those that an answer fills are named when somebody looks for
what may lie in them, or when the request leaves: most are never asked for while it runs, and naming one takes a hash.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby, islice

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.abi.slot_line import NULL_BLOCK
from stepgraph.engine.blocks import BlockPool, block_key, num_unseen, numbered_key, root_key
from stepgraph.engine.kv_events import KVEvents
from stepgraph.engine.request import Request
from stepgraph.engine.request_table import RequestTable
from stepgraph.step.shape import Variant


class PrefixCache:
    """What requests share of each other's KV blocks.

    Args:
        blocks: all KV blocks.
        table: the counts of the requests that run.
        block_size: tokens per block.
        groups: what blocks a request has for each place.
        lookahead: tokens after a block that its content depends on.
        enabled: off, nothing is ever found.
        can_start: whether a request that has a block, by its key, and those before it can start behind it.
    """

    def __init__(
        self,
        blocks: BlockPool,
        table: RequestTable,
        block_size: int,
        groups: BlockGroups,
        *,
        lookahead: int,
        enabled: bool,
        can_start: Callable[[bytes], bool] = lambda key: True,
    ):
        self._blocks, self._table, self.block_size, self._lookahead, self._enabled = (
            blocks,
            table,
            block_size,
            lookahead,
            enabled,
        )
        self._groups, self._size = groups, groups.size
        self._can_start = can_start
        self._ends: dict[bytes, dict[Request, None]] = {}
        """Requests that run, by the key of the last block of theirs that can be found."""
        self._events: KVEvents | None = None

    def tell(self, events: KVEvents) -> None:
        """Note there, from now on, what can be found and what cannot any more."""
        self._events = self._blocks.events = events

    def find(self, request: Request) -> list[int]:
        """Cached blocks that a request can start from, those of all groups place by place. Its last known token is computed in
        any case, for its logits. It can start behind any place up to which the blocks of full groups are there, if those of
        windowed ones are of which the next token sees something; the null block is in the place of the others."""
        if not self._enabled or request.variant is Variant.PROMPT_LOGPROBS:
            return []
        num_places, num_full = max(0, self._num_full(request)), self._groups.num_full
        columns: list[list[int]] = []
        for number in range(num_full):
            columns.append(self._find_first(request, number, num_places))
            num_places = len(columns[-1])
        if not num_full:  # what answers have filled is named from the front
            for index in range(num_places):
                self._find(request, index, 0)
        border = self._border(request, num_places)
        if self._size == num_full == 1:
            return columns[0][:border]
        unseen = self._num_unseen(border)
        for number in range(num_full, self._size):
            seen = [self._find(request, index, number) for index in range(unseen, border)]
            columns.append([NULL_BLOCK] * unseen + [block for block in seen if block is not None])
        return [block for blocks in islice(zip(*columns, strict=False), border) for block in blocks]

    def _find_first(self, request: Request, number: int, num_places: int) -> list[int]:
        """Of so many first places of a request, the cached blocks of that number, up to the first that is not there."""
        blocks = []
        for index in range(num_places):
            block = self._find(request, index, number)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _border(self, request: Request, num_places: int) -> int:
        """Behind how many of its first places a request can start, of which the blocks of full groups are cached. From the last
        one backwards: of windowed groups, what is far before it does not matter."""
        border = num_places
        first = num_places if self._groups.num_windowed else 0  # from there on, the blocks of windowed groups are there
        while border:
            if first > self._num_unseen(border):
                first -= 1
                windowed = range(self._groups.num_full, self._size)
                if any(self._find(request, first, number) is None for number in windowed):
                    border = first
            elif self._can_start(request.block_keys[border - 1]):
                break
            else:
                border -= 1
                first = min(first, border)
        return border

    def num_shared(self, request: Request) -> int:
        """Places of a request, from the first on, whose blocks are cached, whether it can start behind them or not."""
        if not self._enabled:
            return 0
        num_full = self._num_full(request)
        return next((index for index in range(num_full) if self._find(request, index, 0) is None), num_full)

    def _find(self, request: Request, index: int, number: int) -> int | None:
        """The cached block of that number of a place of a request."""
        if index >= len(request.block_keys):  # twice as many each time: most prompts share little with others, some all
            self._extend_keys(request, min(2 * index + 1, self._num_full(request)))
        name = numbered_key(request.block_keys[index], number)
        while True:
            block = self._blocks.find(name)
            if block is not None or not self._publish_next(_key_before(request, index)):
                return block

    def _names(self, keys: Sequence[bytes]) -> Sequence[bytes]:
        """By what the blocks of some places are found."""
        return keys if self._size == 1 else [numbered_key(key, number) for key in keys for number in range(self._size)]

    def _num_unseen(self, num_places: int) -> int:
        """Of so many places, those of whose windowed blocks no token behind them sees anything."""
        return num_unseen(num_places * self.block_size, self._groups.window, self.block_size)

    def enter(self, request: Request) -> None:
        """The request got a slot; so many of its blocks as `num_published` says were found."""
        if self._enabled:
            self._ends.setdefault(_key_before(request, request.num_published), {})[request] = None

    def publish_planned(self, request: Request) -> None:
        """Let others find the blocks of a prompt that are full once its planned tokens are computed."""
        self._publish(request, self.num_planned(request))

    def num_planned(self, request: Request) -> int:
        """Blocks of a request that runs which are full once the planned tokens of its prompt are computed."""
        slot = request.slot
        assert slot is not None
        num_tokens = min(self._table.planned[slot], self._table.prefill_len[slot] - self._lookahead)
        return max(0, num_tokens) // self.block_size

    def wanted(self, request: Request) -> range:
        """Indices of the blocks that let a request, which has not run, go on behind all blocks that its prompt fills."""
        num_full = self._num_full(request)
        return range(self._num_unseen(num_full), num_full)

    def keys(self, request: Request, num_blocks: int) -> list[bytes]:
        """Names of the first blocks of a request, all of whose tokens are known."""
        self._extend_keys(request, num_blocks)
        return request.block_keys[:num_blocks]

    def give_up(self, request: Request, num_blocks: int) -> int:
        """A request that runs needs its first `num_blocks` blocks no more; let others find them. Returns how many it can release
        now: those that others may find only when they know all of their tokens."""
        if not self._enabled:
            return num_blocks
        num_blocks = min(num_blocks, self._num_full(request))
        self._publish(request, num_blocks)
        return num_blocks

    def publish_brought(self, request: Request, first: int, blocks: Sequence[int]) -> None:
        """Let others find `blocks`, which were brought here and somebody holds, in the places from `first` on of a request that
        does not run."""
        self._extend_keys(request, first + len(blocks))
        self._let_find(request, first, blocks)

    def leave(self, request: Request) -> None:
        """The request is about to give its slot and blocks up; let others find those that it has filled."""
        if self._enabled:
            if self._has_decoded(request):  # before, it may not even have computed its prompt
                self._publish(request, self._num_full(request))
            self._forget_end(request)

    def _num_full(self, request: Request) -> int:
        """Blocks that a request's known tokens fill; the last token is not computed yet."""
        return (request.num_known - max(1, self._lookahead)) // self.block_size

    def _has_decoded(self, request: Request) -> bool:
        """Whether a request that runs has got a token in its slot."""
        assert request.slot is not None
        return request.num_known > self._table.prefill_len[request.slot]

    def _publish_next(self, key: bytes) -> bool:
        """Let others find the next block, if it is full, of each request whose last one to be found is `key`'s. False if there
        is none."""
        requests = [
            request
            for request in self._ends.get(key, ())
            if self._has_decoded(request) and self._num_full(request) > request.num_published
        ]
        for request in requests:
            self._publish(request, request.num_published + 1)
        return len(requests) > 0

    def _publish(self, request: Request, num_blocks: int) -> None:
        """Let others find a request's first `num_blocks` blocks, which are full."""
        if self._enabled and num_blocks > request.num_published:
            self._forget_end(request)
            self._extend_keys(request, num_blocks)
            start, end = request.num_published * self._size, num_blocks * self._size
            self._let_find(request, request.num_published, request.blocks[start:end])
            request.num_published = num_blocks
            self.enter(request)

    def _let_find(self, request: Request, first: int, blocks: Sequence[int]) -> None:
        """Let `blocks` be found as a request's from place `first` on, whose keys are known."""
        keys = request.block_keys[first : first + len(blocks) // self._size]
        # Others hear of each place's first: which ones of a windowed group a hit takes depends on where it ends.
        are_new = list(map(self._blocks.publish, blocks, self._names(keys)))[:: self._size]
        if self._events is None:
            return
        if all(are_new):
            self._tell_stored(request, first, first + len(keys))
            return
        for is_new, places in groupby(range(first, first + len(keys)), lambda place: are_new[place - first]):
            if is_new:
                start, *rest = places
                self._tell_stored(request, start, start + 1 + len(rest))

    def _tell_stored(self, request: Request, start: int, end: int) -> None:
        """Note that a request's blocks from `start` to before `end` can be found."""
        assert self._events is not None
        size = self.block_size
        self._events.stored(
            request.block_keys[start:end],
            request.block_keys[start - 1] if start else None,
            request.token_parts(start * size, end * size),
            None if request.adapter is None else request.adapter.name,
            request.cache_salt,
        )

    def _forget_end(self, request: Request) -> None:
        key = _key_before(request, request.num_published)
        del self._ends[key][request]
        if not self._ends[key]:
            del self._ends[key]

    def _extend_keys(self, request: Request, num_blocks: int) -> None:
        keys, size = request.block_keys, self.block_size
        if len(keys) >= num_blocks:
            return
        tokens = request.tokens(len(keys) * size, num_blocks * size + self._lookahead)
        content, width = tokens.tobytes(), (size + self._lookahead) * tokens.itemsize
        key = _key_before(request, len(keys))
        for first in range(0, (num_blocks - len(keys)) * size * tokens.itemsize, size * tokens.itemsize):
            key = block_key(key, content[first : first + width])
            keys.append(key)


def _key_before(request: Request, index: int) -> bytes:
    """The key that the chain has before a request's block `index`."""
    if index:
        return request.block_keys[index - 1]
    return root_key(request.cache_salt, None if request.adapter is None else request.adapter.digest)

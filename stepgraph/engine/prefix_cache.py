"""Finding the blocks of a prompt that others have computed, and letting others find a request's own.

Blocks that a prompt fills can be found as soon as they are planned. Those that an answer fills are named when somebody looks for
what may lie in them, or when the request leaves: most are never asked for while it runs, and naming one takes a hash.
"""

from __future__ import annotations

from stepgraph.engine.blocks import BlockPool, block_key, root_key
from stepgraph.engine.request import Request
from stepgraph.engine.request_table import RequestTable
from stepgraph.step.shape import Variant


class PrefixCache:
    """What requests share of each other's KV blocks.

    Args:
        blocks: all KV blocks.
        table: the counts of the requests that run.
        block_size: tokens per block.
        lookahead: tokens after a block that its content depends on.
        enabled: off, nothing is ever found.
    """

    def __init__(self, blocks: BlockPool, table: RequestTable, block_size: int, lookahead: int, enabled: bool):
        self._blocks, self._table, self._block_size, self._lookahead, self._enabled = (
            blocks,
            table,
            block_size,
            lookahead,
            enabled,
        )
        self._ends: dict[bytes, dict[Request, None]] = {}
        """Requests that run, by the key of the last block of theirs that can be found."""

    def find(self, request: Request) -> list[int]:
        """Cached blocks that a request can start from. Its last known token is computed in any case, for its logits."""
        if not self._enabled or request.variant is Variant.PROMPT_LOGPROBS:
            return []
        num_blocks = self._num_full(request)
        found: list[int] = []
        while len(found) < num_blocks:
            self._extend_keys(request, len(found) + 1)  # one by one: most prompts share little with others
            block = self._blocks.find(request.block_keys[len(found)])
            if block is not None:
                found.append(block)
            elif not self._publish_next(_key_before(request, len(found))):
                break
        return found

    def enter(self, request: Request) -> None:
        """The request got a slot; so many of its blocks as `num_published` says were found."""
        if self._enabled:
            self._ends.setdefault(_key_before(request, request.num_published), {})[request] = None

    def publish_planned(self, request: Request) -> None:
        """Let others find the blocks of a prompt that are full once its planned tokens are computed."""
        slot = request.slot
        assert slot is not None
        num_tokens = min(self._table.planned[slot], self._table.prefill_len[slot] - self._lookahead)
        self._publish(request, max(0, num_tokens) // self._block_size)

    def leave(self, request: Request) -> None:
        """The request is about to give its slot and blocks up; let others find those that it has filled."""
        if self._enabled:
            if self._has_decoded(request):  # before, it may not even have computed its prompt
                self._publish(request, self._num_full(request))
            self._forget_end(request)

    def _num_full(self, request: Request) -> int:
        """Blocks that a request's known tokens fill; the last token is not computed yet."""
        return (request.num_known - max(1, self._lookahead)) // self._block_size

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
            for index in range(request.num_published, num_blocks):
                self._blocks.publish(request.blocks[index], request.block_keys[index])
            request.num_published = num_blocks
            self.enter(request)

    def _forget_end(self, request: Request) -> None:
        key = _key_before(request, request.num_published)
        del self._ends[key][request]
        if not self._ends[key]:
            del self._ends[key]

    def _extend_keys(self, request: Request, num_blocks: int) -> None:
        keys, size = request.block_keys, self._block_size
        if len(keys) >= num_blocks:
            return
        start, end = len(keys) * size, num_blocks * size + self._lookahead
        tokens = request.tokens(start, end)
        for first in range(0, end - start - self._lookahead, size):
            key = block_key(_key_before(request, len(keys)), tokens[first : first + size + self._lookahead].tobytes())
            keys.append(key)


def _key_before(request: Request, index: int) -> bytes:
    """The key that the chain has before a request's block `index`."""
    return request.block_keys[index - 1] if index else root_key(request.cache_salt)

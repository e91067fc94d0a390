"""Finding the blocks of a prompt that others have computed, and letting others find a request's own."""

from __future__ import annotations

from array import array

from stepgraph.engine.blocks import BlockPool, block_key, root_key
from stepgraph.engine.request import Request
from stepgraph.step.shape import Variant


class PrefixCache:
    """What requests share of each other's KV blocks.

    Args:
        blocks: all KV blocks.
        block_size: tokens per block.
        lookahead: tokens after a block that its content depends on.
        enabled: off, nothing is ever found.
    """

    def __init__(self, blocks: BlockPool, block_size: int, lookahead: int, enabled: bool):
        self.enabled = enabled
        self._blocks, self._block_size, self._lookahead = blocks, block_size, lookahead
        # A request's last known token is not computed yet, and no block may count on it.
        self._num_uncertain = max(1, lookahead)

    def find(self, request: Request) -> list[int]:
        """Cached blocks that a request can start from. Its last known token is computed in any case, for its logits."""
        if not self.enabled or request.variant is Variant.PROMPT_LOGPROBS:
            return []
        num_blocks = (request.num_known - self._num_uncertain) // self._block_size
        self._extend_keys(request, num_blocks)
        return self._blocks.find(request.block_keys[:num_blocks])

    def publish_planned(self, request: Request) -> None:
        """Let others find the blocks of a prompt that are full once its planned tokens are computed."""
        num_tokens = min(request.planned, request.prefill_len - self._lookahead)
        self._publish(request, max(0, num_tokens) // self._block_size)

    def publish_known(self, request: Request) -> None:
        """Let others find the blocks that a request's known tokens have filled."""
        self._publish(request, (request.num_known - self._num_uncertain) // self._block_size)

    def num_until_full(self, request: Request) -> int:
        """Tokens that a request gets before it has a block that others cannot find yet."""
        return (request.num_published + 1) * self._block_size + self._num_uncertain - request.num_known

    def _publish(self, request: Request, num_blocks: int) -> None:
        """Let others find a request's first `num_blocks` blocks, which are full."""
        if self.enabled and num_blocks > request.num_published:
            self._extend_keys(request, num_blocks)
            for index in range(request.num_published, num_blocks):
                self._blocks.publish(request.blocks[index], request.block_keys[index])
            request.num_published = num_blocks

    def _extend_keys(self, request: Request, num_blocks: int) -> None:
        keys, size = request.block_keys, self._block_size
        if len(keys) >= num_blocks:
            return
        start, end = len(keys) * size, num_blocks * size + self._lookahead
        tokens = array("i", request.tokens(start, end))
        parent = keys[-1] if keys else root_key(request.cache_salt)
        for first in range(0, end - start - self._lookahead, size):
            parent = block_key(parent, tokens[first : first + size + self._lookahead].tobytes())
            keys.append(parent)

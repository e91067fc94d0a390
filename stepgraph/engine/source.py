"""Source: the engine's side of leases, by which others take over the blocks of prompts that are computed here.

A block is given to a lease when the step that fills it has been launched, and held for that until the lease is over. A block that
was found in the cache is as if this step filled it: whoever does may be under way, or in the same step. What a preempted request
has given stays given: when it runs again, it goes on behind it.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from stepgraph.abi.slot_line import NULL_BLOCK
from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.prefix_cache import PrefixCache
from stepgraph.engine.request import FinishReason, Request
from stepgraph.errors import RequestError
from stepgraph.transfer.base import Transfers
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.reference import PARAM, Offer, Reference

MAX_LEASED_SHARE = 0.5
"""Of the blocks: prompts beyond it are computed, and nobody can take them over. Sinks that are late are not to stop a source."""


@dataclass(eq=False)
class _Growing:
    """A lease whose prompt is being computed."""

    request: Request
    name: str
    wanted: range
    """Indices of the blocks that it will have."""
    num_filled: int
    """Index of the next."""


class Source:
    """Opens leases for requests, fills and completes them. Belongs to the engine's thread.

    Args:
        transfers: has the leases.
        blocks: all KV blocks.
        prefixes: names them.
        num_ranks: of the engine.
    """

    def __init__(self, transfers: Transfers, blocks: BlockPool, prefixes: PrefixCache, num_ranks: int) -> None:
        self._transfers, self._blocks, self._prefixes, self._num_ranks = transfers, blocks, prefixes, num_ranks
        self._growing: dict[Request, _Growing] = {}
        self._num_held = 0  # blocks, each as often as leases hold it

    @property
    def is_busy(self) -> bool:
        """Whether there is a lease, a prompt for one, or a block held for one."""
        return bool(self._growing) or self._num_held > 0 or len(self._transfers.leases) > 0

    def add(self, request: Request, offer: Offer) -> None:
        """Open the lease of a request that has been queued.

        Raises:
            RequestError: the name that it asks for is, or was, that of another.
        """
        name = secrets.token_hex(16) if offer.lease is None else offer.lease
        leases = self._transfers.leases
        if not leases.open(name):
            raise RequestError(
                f"{PARAM}: remote_request_id={name!r} is, or was, the name of another lease; give each request another one",
                param=PARAM,
            )
        request.kv_transfer_params = _declined()
        wanted = self._prefixes.wanted(request)
        promised = sum(growing.wanted.stop - growing.num_filled for growing in self._growing.values())
        if not wanted or self._num_held + promised + len(wanted) > MAX_LEASED_SHARE * self._blocks.num_usable:
            leases.cancel(name, LossReason.CANCELLED)
        else:
            self._growing[request] = _Growing(request, name, wanted, wanted.start)

    def launched(self, step: int) -> None:
        """A step has been launched: give the leases what it fills."""
        for growing in tuple(self._growing.values()):
            request = growing.request
            if request.slot is None:
                continue
            num_full = min(self._prefixes.num_planned(request), growing.wanted.stop)
            if num_full > growing.num_filled and not self._fill(growing, num_full, step):
                del self._growing[request]

    def _fill(self, growing: _Growing, num_full: int, step: int) -> bool:
        """Give a lease its blocks up to `num_full`; False if it is over."""
        start = growing.num_filled
        blocks = growing.request.blocks[start:num_full]
        assert NULL_BLOCK not in blocks, (growing, blocks)
        keys = self._prefixes.keys(growing.request, num_full)[start:num_full]
        self._blocks.hold(blocks)
        if not self._transfers.leases.fill(growing.name, start, blocks, keys, step):
            self._blocks.release(blocks)
            return False
        self._num_held += len(blocks)
        growing.num_filled = num_full
        return True

    def read(self) -> None:
        """The results of a step have been read: the leases of prompts that are done are complete."""
        for request, growing in tuple(self._growing.items()):
            if request.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
                self.gone(request)
            elif request.output_token_ids or request.finish_reason is not None:
                assert growing.num_filled == growing.wanted.stop, growing
                del self._growing[request]
                transfers = self._transfers
                transfers.leases.complete(growing.name)
                reference = Reference(transfers.engine_id, transfers.host, transfers.port, growing.name)
                request.kv_transfer_params = reference.params(growing.wanted.stop, self._num_ranks)

    def gone(self, request: Request) -> None:
        """A request has ended from outside. What it has completed stays leased."""
        growing = self._growing.pop(request, None)
        if growing is not None:
            self._transfers.leases.cancel(growing.name, LossReason.CANCELLED)

    def lost(self) -> None:
        """End all leases, for what the cache holds counts no more. Nothing is held for them after that."""
        self._growing.clear()
        self._transfers.leases.cancel_all(LossReason.CACHE_LOST)
        self.collect()

    def collect(self) -> None:
        """Release the blocks of leases that are over."""
        blocks = self._transfers.leases.collect()
        self._num_held -= len(blocks)
        self._blocks.release(blocks)


def _declined() -> dict[str, Any]:
    """What an answer says whose blocks nobody can take over."""
    return {"do_remote_prefill": False, "do_remote_decode": False}

"""Sink: the engine's side of fetches, by which blocks of prompts come from where they were computed.

What arrives fills the prefix cache, under the names that the prompt gives to its own blocks, and the request then enters as any
other, by a hit. So whatever does not come is computed here.

    queued ──slot and blocks free──► fetching ──done──► ready: its blocks can be found, and nobody holds them
       │                                └────failed──► ready without them, or the request fails
       └──all there already, or nothing to be had──► ready

What host memory has comes from there first, and a request may then be queued again for the rest. Blocks that others may still
write are quarantined: see `stepgraph.engine.blocks`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepgraph.abi.slot_line import NULL_BLOCK
from stepgraph.engine.host_tier import HostTier
from stepgraph.engine.request import Request
from stepgraph.engine.scheduler import Scheduler
from stepgraph.engine.waiting import rank
from stepgraph.errors import Fault
from stepgraph.step.shape import Variant
from stepgraph.transfer.base import Fetch, FetchState, Transfers
from stepgraph.transfer.reference import Reference

logger = logging.getLogger(__name__)

MAX_FETCHED_SHARE = 0.5
"""Of the blocks: more are on their way at a time for one request alone."""


class FetchReport(NamedTuple):
    """A fetch that has ended."""

    waited_s: float
    """How long its request was queued before."""
    seconds: float
    """From its begin to its end."""
    num_blocks: int
    """That have come."""
    reason: str | None
    """Why they have not, if it failed."""


@dataclass
class _Queued:
    """A request for which nothing has begun; times in seconds."""

    added_at: float
    slot_free_since: float


@dataclass
class _Fetching:
    """Blocks that are to come for a request."""

    request: Request
    host_blocks: list[int]
    """Where they are in host memory; none: with another engine."""
    first: int
    """Index of the first of them among the request's."""
    blocks: list[int]
    held: list[int]
    """Those before them, which were here."""
    after: int | None
    """Step whose results must be read before anybody writes into the blocks; None: no step was under way."""
    waited_s: float
    """How long its request was queued."""
    fetch: Fetch | None = None


class Sink:
    """Fetches blocks for requests that wait. Belongs to the engine's thread.

    Args:
        transfers: brings them from other engines; None: nothing does.
        tier: has some in host memory; None: there is none.
        scheduler: of the requests.
        max_num_seqs: its slots.
        timeout_s: how long a request waits for blocks to put its own into, while there is a slot for it.
        fails: whether a request fails whose blocks do not come; else its prompt is computed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        transfers: Transfers | None,
        tier: HostTier | None,
        scheduler: Scheduler,
        *,
        max_num_seqs: int,
        timeout_s: float,
        fails: bool,
        clock: Callable[[], float],
    ) -> None:
        self._transfers, self.tier, self._scheduler = transfers, tier, scheduler
        self._blocks, self._prefixes = scheduler.blocks, scheduler.prefixes
        self._max_num_seqs, self._timeout_s, self._fails, self._clock = max_num_seqs, timeout_s, fails, clock
        self._queued: dict[Request, _Queued] = {}
        self._fetching: dict[Request, _Fetching] = {}
        self._ready: dict[Request, int] = {}  # tokens that it should find
        self.failures: Counter[str] = Counter()
        """Requests that found less than was computed for them elsewhere, by the reason, but for fetches that failed."""
        self.recomputed_tokens = 0
        """Of prompts that were computed elsewhere."""
        self.on_end: Callable[[FetchReport], None] = lambda report: None
        """Called in the engine's thread when a fetch has ended; whoever watches them sets it."""

    @property
    def is_busy(self) -> bool:
        """Whether there is something to do at the next step."""
        tier_is_busy = self.tier is not None and self.tier.is_busy
        return tier_is_busy or bool(self._queued or self._fetching or self._ready or self._blocks.num_quarantined)

    @property
    def takes(self) -> bool:
        """Whether blocks come from other engines."""
        return self._transfers is not None

    def add(self, request: Request) -> None:
        """A request has been queued; its prompt may be computed elsewhere.

        Raises:
            RequestError: nothing is taken from there.
        """
        reference = _reference_of(request)
        if reference is not None:
            assert self._transfers is not None
            self._transfers.check(reference)
        if request.variant is Variant.PROMPT_LOGPROBS:  # these need every token to be computed
            if reference is not None:
                self._give_up(request, "prompt_logprobs")
                self._leave(request)
        elif reference is not None or self._num_on_host(request, len(self._prefixes.find(request))):
            self._queued[request] = _Queued(self._clock(), self._clock())
            request.awaits_blocks = True

    def poll(self, unread: Sequence[int]) -> list[Request]:
        """Let requests enter whose blocks have come, and begin what there is room for.

        Args:
            unread: the steps under way, in their order.

        Returns:
            Requests that are to end, with their `error`.
        """
        if self.tier is not None:
            self.tier.poll(unread)
        failed = [request for request, fetching in tuple(self._fetching.items()) if not self._go_on(fetching, unread)]
        for request, num_tokens in tuple(self._ready.items()):
            if request.admitted_at is not None:
                self._admitted(request, num_tokens)
        if self._queued:
            failed += self._start_queued(unread)
            references = [reference for request in self._queued if (reference := _reference_of(request)) is not None]
            if references and self._transfers is not None:
                self._transfers.renew(references)
        return failed

    def gone(self, request: Request) -> None:
        """A request has ended, whatever it waited for."""
        self._ready.pop(request, None)
        if self._queued.pop(request, None) is not None:
            self._leave(request)
        if request in self._fetching:
            self._release(self._fetching[request])

    def lost(self) -> None:
        """Want nothing of what is on its way, for what the cache holds counts no more. Nothing is held after that, but blocks may
        be quarantined."""
        for request, fetching in tuple(self._fetching.items()):
            self._release(fetching)
            self._give_up(request, "cache_lost")
        if self.tier is not None:
            self.tier.clear()

    def _start_queued(self, unread: Sequence[int]) -> list[Request]:
        """Begin with those that come first, as long as there are slots and blocks. Returns requests that are to end."""
        failed: list[Request] = []
        for request in sorted(self._queued, key=rank):
            num_free_slots = self._max_num_seqs - self._scheduler.num_running
            if len(self._fetching) + len(self._ready) >= num_free_slots:
                for queued in self._queued.values():
                    queued.slot_free_since = self._clock()
                break
            reference = _reference_of(request)
            if reference is not None and reference in map(_reference_of, self._fetching):
                continue  # a lease is read once; what has come then is found
            if not self._start(request, unread):
                if self._clock() - self._queued[request].slot_free_since < self._timeout_s:
                    break
                del self._queued[request]
                self._give_up(request, "no_blocks")
                self._leave(request)
                if _reference_of(request) is not None and not self._may_go_on(request, "no_blocks"):
                    failed.append(request)
        return failed

    def _start(self, request: Request, unread: Sequence[int]) -> bool:
        """Take blocks for a request; False if there are not enough."""
        hits, wanted, pool = self._prefixes.find(request), self._prefixes.wanted(request), self._blocks
        held = [block for block in hits if block != NULL_BLOCK]
        first = max(len(hits), wanted.start)
        num_here = self._num_on_host(request, len(hits))
        count = num_here or (wanted.stop - first if _reference_of(request) is not None else 0)
        if count > 0:
            num_left = pool.num_free - count - pool.count_free(held)
            on_the_way = sum(len(fetching.blocks) for fetching in self._fetching.values())
            least = self._scheduler.watermark if self._scheduler.num_running else 0
            if num_left < least or (on_the_way and on_the_way + count > MAX_FETCHED_SHARE * pool.num_usable):
                return False
            pool.hold(held)
            waited_s = self._clock() - self._queued[request].added_at
            after = unread[-1] if unread else None
            host_blocks: list[int] = []
            if num_here:
                assert self.tier is not None
                host_blocks = self.tier.pin(self._prefixes.keys(request, first + count)[first:])
            self._fetching[request] = _Fetching(request, host_blocks, first, pool.take(count), held, after, waited_s)
            self._begin(self._fetching[request], unread)
        del self._queued[request]
        if count <= 0:
            self._let_in(request, wanted.stop)
            self._leave(request)
        return True

    def _num_on_host(self, request: Request, num_hits: int) -> int:
        """How many blocks behind those that were found host memory has."""
        if self.tier is None:
            return 0
        wanted = self._prefixes.wanted(request)
        first = max(num_hits, wanted.start)
        if first >= wanted.stop:
            return 0
        count = self.tier.count(self._prefixes.keys(request, wanted.stop)[first:])
        # Behind blocks that nobody sees any more, those that follow are found all together or not at all.
        return 0 if num_hits < wanted.start and first + count < wanted.stop else count

    def _begin(self, fetching: _Fetching, unread: Sequence[int]) -> None:
        """Fetch, as soon as no step under way may read what the blocks held before."""
        if fetching.after is None or not unread or unread[0] > fetching.after:
            if fetching.host_blocks:
                assert self.tier is not None
                fetching.fetch = self.tier.fetch(fetching.host_blocks, fetching.blocks)
                return
            keys = self._prefixes.keys(fetching.request, fetching.first + len(fetching.blocks))[fetching.first :]
            reference = _reference_of(fetching.request)
            assert reference is not None
            assert self._transfers is not None
            fetching.fetch = self._transfers.fetch(reference, fetching.first, fetching.blocks, keys)

    def _go_on(self, fetching: _Fetching, unread: Sequence[int]) -> bool:
        """See how a fetch does. False if its request is to end."""
        request, fetch = fetching.request, fetching.fetch
        if fetch is None:
            self._begin(fetching, unread)
        elif fetch.state is FetchState.DONE:
            if not fetching.host_blocks:
                self.on_end(FetchReport(fetching.waited_s, fetch.seconds, fetch.num_blocks, None))
            self._commit(fetching, fetch.num_blocks)
            if fetch.num_blocks < len(fetching.blocks):
                return self._may_go_on(request, "short")
        elif fetch.state is FetchState.FAILED and fetching.host_blocks:
            assert self.tier is not None
            self._release(fetching)
            self.tier.clear()
            self.failures["host_copy"] += 1
            self._go_on_behind(request)
        elif fetch.state is FetchState.FAILED:
            assert fetch.reason is not None
            reason = str(fetch.reason)
            self.on_end(FetchReport(fetching.waited_s, fetch.seconds, 0, reason))
            self._release(fetching)
            outcome = "it fails" if self._fails else "its prompt is computed here"
            logger.warning("request %s: its keys and values did not come (%s); %s", request.id, reason, outcome)
            self._give_up(request, None)
            return self._may_go_on(request, reason)
        return True

    def _may_go_on(self, request: Request, reason: str) -> bool:
        """Whether what has not come of a request's blocks is computed here; if not, its `error` is set."""
        if self._fails:
            request.error = Fault(
                f"the keys and values of the prompt did not come from the engine that computed them: {reason}; send the "
                "prompt again, or start this engine with --kv-load-failure recompute",
                is_users=False,
            )
        return not self._fails

    def _commit(self, fetching: _Fetching, num_blocks: int) -> None:
        """Let everybody find the blocks that have come. Nobody holds them until their request gets its slot: requests that wait
        for each other's blocks would wait for ever."""
        request, first, blocks = fetching.request, fetching.first, fetching.blocks
        self._prefixes.publish_brought(request, first, blocks[:num_blocks])
        if num_blocks < len(blocks):
            self.failures["short"] += 1
        del self._fetching[request]
        self._blocks.release(fetching.held + blocks)
        if fetching.host_blocks:
            self._unpin(fetching)
            self._go_on_behind(request)
        else:
            self._let_in(request, self._prefixes.wanted(request).stop)

    def _go_on_behind(self, request: Request) -> None:
        """Host memory has given a request what it had: another engine may have the rest."""
        if _reference_of(request) is not None:
            self._queued[request] = _Queued(self._clock(), self._clock())
        else:
            self._let_in(request, 0)

    def _unpin(self, fetching: _Fetching) -> None:
        if fetching.host_blocks:
            assert self.tier is not None
            self.tier.unpin(fetching.host_blocks)

    def _release(self, fetching: _Fetching) -> None:
        """Give the blocks back, of which others may write some for a while."""
        del self._fetching[fetching.request]
        fence = fetching.fetch
        if fence is not None:
            fence.cancel()
        self._blocks.release(fetching.blocks, fence)
        self._blocks.release(fetching.held)
        self._unpin(fetching)

    def _give_up(self, request: Request, reason: str | None) -> None:
        """Compute what does not come. `reason`: what to count, if nobody has counted it."""
        if reason is not None:
            self.failures[reason] += 1
        self._let_in(request, self._prefixes.wanted(request).stop)

    def _leave(self, request: Request) -> None:
        """A request takes nothing of its lease: if no other does, its source need not keep it."""
        reference = _reference_of(request)
        if reference is not None and reference not in map(_reference_of, (*self._queued, *self._fetching)):
            assert self._transfers is not None
            self._transfers.leave(reference)

    def _let_in(self, request: Request, num_blocks: int) -> None:
        """A request waits for nothing but room."""
        request.awaits_blocks = False
        self._ready[request] = num_blocks * self._prefixes.block_size

    def _admitted(self, request: Request, num_tokens: int) -> None:
        """A request has got its slot."""
        del self._ready[request]
        self.recomputed_tokens += max(0, num_tokens - request.num_cached_tokens)


def _reference_of(request: Request) -> Reference | None:
    """Where its prompt is computed, if elsewhere."""
    return request.transfer if isinstance(request.transfer, Reference) else None

"""Transfers between engines of `scheduling`, whose bytes move when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scheduling import Loop

from stepgraph.config.transfer import TransferConfig
from stepgraph.errors import RequestError
from stepgraph.transfer.base import FetchFailure, FetchState, TransferCounts
from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.messages import Complete, Filled, Lost, Message
from stepgraph.transfer.reference import Reference

LEASE_S, GRACE_S = 0.5, 0.05


class FakeFetch:
    """Advances by `advance` alone. One that was cancelled goes on writing until then, and what it writes is wrong."""

    def __init__(
        self, owner: FakeTransfers, reference: Reference, first: int, blocks: Sequence[int], keys: Sequence[bytes]
    ):
        self.state, self.num_blocks, self.reason = FetchState.UNDER_WAY, 0, None
        self.seconds = 0.0
        self.reference, self.first, self.blocks, self.keys = reference, first, list(blocks), list(keys)
        self.messages: list[Message] = []
        self._owner, self._num_copied, self._is_writing = owner, 0, True
        self._source = owner.network.get(reference.engine)
        if self._source is None:
            self.fail(FetchFailure.STALE)
            self._is_writing = False
        else:
            self._source.leases.read(reference.lease, self.messages.append)

    def advance(self, most: int = 1 << 30) -> None:
        """Copy, and take up to `most` messages in."""
        if self.state is not FetchState.UNDER_WAY:
            if self._is_writing:
                for block in self.blocks:
                    scribble(self._owner.loop, block)
            self._is_writing = False
            return
        while self.messages and most and self.state is FetchState.UNDER_WAY:
            most -= 1
            self._take(self.messages.pop(0))

    def cancel(self) -> None:
        if self.state is FetchState.UNDER_WAY:
            self.fail(FetchFailure.CANCELLED)
            assert self._source is not None
            self._source.leases.drop(self.reference.lease)

    def done(self) -> bool:
        return not self._is_writing

    def fail(self, reason: FetchFailure | LossReason) -> None:
        self.state, self.reason = FetchState.FAILED, reason
        self._owner.failures[reason] = self._owner.failures.get(reason, 0) + 1

    def _take(self, message: Message) -> None:
        source = self._source
        assert source is not None
        if isinstance(message, Filled):
            for index, block, key in zip(range(message.start, 1 << 30), message.blocks, message.keys, strict=False):
                place = index - self.first
                if not 0 <= place < len(self.blocks):
                    continue
                if bytes.fromhex(key) != self.keys[place]:
                    self.fail(FetchFailure.OTHER_BLOCKS)
                    source.leases.drop(self.reference.lease)
                    return
                assert place == self._num_copied
                _copy(source.loop, block, self._owner.loop, self.blocks[place])
                self._num_copied += 1
        elif isinstance(message, Complete):
            reason = source.leases.confirm(self.reference.lease, message.num_blocks)
            if reason is None:
                self.state, self.num_blocks, self._is_writing = FetchState.DONE, self._num_copied, False
            else:
                self.fail(reason)
        else:
            assert isinstance(message, Lost), message
            self.fail(message.reason)


class FakeTransfers:
    """See `stepgraph.transfer.base.Transfers`. `network`: all engines, by their ids."""

    def __init__(self, engine_id: str, network: dict[str, FakeTransfers]):
        self.engine_id, self.host, self.port = engine_id, f"/tmp/{engine_id}", 0
        self.network, self.failures, self.renewed = network, {}, []
        self.fetches: list[FakeFetch] = []
        self.is_resting = self.is_closed = False
        self.leases = Leases(LEASE_S, GRACE_S, lambda: self.loop.clock.now)
        self.loop: Loop  # whose blocks go and come: set by whoever makes it
        network[engine_id] = self

    def fetch(self, reference: Reference, first: int, blocks: Sequence[int], keys: Sequence[bytes]) -> FakeFetch:
        assert not self.is_resting
        assert not self.is_closed
        self.fetches.append(FakeFetch(self, reference, first, blocks, keys))
        return self.fetches[-1]

    def renew(self, references: Sequence[Reference]) -> None:
        self.renewed = list(references)
        for reference in [*references, *(fetch.reference for fetch in self.fetches)]:
            if reference.engine in self.network:
                self.network[reference.engine].leases.renew(reference.lease)

    def leave(self, reference: Reference) -> None:
        if reference.engine in self.network:
            self.network[reference.engine].leases.leave(reference.lease)

    def check(self, reference: Reference) -> None:
        if reference.host == "/tmp/forbidden":
            raise RequestError("not from there")

    def cache_lost(self, reason: LossReason) -> None:
        self.is_resting = True
        self.leases.cancel_all(reason)

    def cache_back(self, model: str) -> None:
        self.is_resting = False

    def counts(self) -> TransferCounts:
        return TransferCounts(len(self.leases), len(self.fetches), 0, 0, 0, 0, self.leases.ended, self.failures)

    def close(self) -> None:
        self.is_closed = True
        self.leases.cancel_all(LossReason.CACHE_LOST)

    def reference(self, lease: str) -> Reference:
        return Reference(self.engine_id, self.host, self.port, lease)

    def leased(self) -> set[int]:
        """Blocks that are held for leases, over or not."""
        leases = self.leases
        return {
            *(block for lease in leases._leases.values() for block in lease.blocks),
            *(block for _, blocks in leases._closing for block in blocks),
            *leases._free,
        }


def caches_of(loop: Loop) -> list[dict[tuple[int, int], object]]:
    return [*loop.device.kv, loop.device.draft_kv]


def _copy(source: Loop, source_block: int, target: Loop, target_block: int) -> None:
    for theirs, ours in zip(caches_of(source), caches_of(target), strict=True):
        for offset in range(source.block_size):
            if (source_block, offset) in theirs:
                ours[target_block, offset] = theirs[source_block, offset]


def scribble(loop: Loop, block: int) -> None:
    for cache in caches_of(loop):
        cache |= {(block, offset): "written late" for offset in range(loop.block_size)}


class Connected(Loop):
    """An engine that gives blocks to others of a network, takes theirs, or both."""

    def __init__(
        self, name: str, network: dict[str, FakeTransfers], role: str = "mixed", *, fails: bool = False, **options
    ):
        self.transfers = FakeTransfers(name, network)
        self.transfers.loop = self
        config = TransferConfig(
            splitwise_role=role, kv_transfer_backend="auto", kv_load_failure="fail" if fails else "recompute"
        )
        super().__init__(transfers=self.transfers, transfer=config, **options)
        self.source, self.sink = self.engine.exchange.source, self.engine.exchange.sink

    @property
    def held_elsewhere(self) -> set[int]:
        """Blocks that leases and fetches hold, or may still touch."""
        held = self.transfers.leased() | self.scheduler.blocks._quarantined
        for fetching in () if self.sink is None else self.sink._fetching.values():
            held |= {*fetching.blocks, *fetching.held}
        return held

    @held_elsewhere.setter
    def held_elsewhere(self, blocks: set[int]) -> None:
        assert not blocks

    def advance(self, chance: Callable[[], bool] = lambda: True) -> None:
        """Let bytes move, of each fetch if `chance` says so."""
        for fetch in self.transfers.fetches:
            if chance():
                fetch.advance()

    def check_nothing_is_left(self) -> None:
        """No lease, no fetch, no block that anybody holds."""
        assert not self.engine.exchange.is_active
        assert len(self.transfers.leases) == 0
        assert self.scheduler.blocks.num_quarantined == 0
        assert self.scheduler.num_free_blocks == self.num_kv_blocks - 1


def run(*loops: Connected, chance: Callable[[], bool] = lambda: True, most: int = 3000) -> None:
    """Run all requests of some engines to their end, and beyond all leases."""
    for _ in range(most):
        for loop in loops:
            if loop.engine.has_work:
                loop.step()
            else:
                loop.clock.now += loop.engine.seconds_until_work or 0.0
                loop.engine.prepare()
            loop.advance(chance)
        if not any(loop.engine.has_work or loop.engine.exchange.is_active for loop in loops):
            return
    raise AssertionError("the requests never end")

"""What an engine's process tells of its transfers."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter

from stepgraph.engine.exchange import Exchange
from stepgraph.engine.sink import FetchReport
from stepgraph.server.messages import FETCH_SECONDS, TransferLoad
from stepgraph.transfer.base import TransferCounts

_LOOK_S = 0.1
"""Counting takes locks that movers and links take, too, and goes with every step: it is done so often at most."""


_NOTHING = TransferCounts(0, 0, 0, 0, 0, 0, {}, {})
"""Of an engine that has to do with no other."""


class TransferReport:
    """Counts of one engine.

    Args:
        exchange: the engine's.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._fetches, self._waits = _Times(), _Times()
        self._load: TransferLoad | None = None
        self._looked_at = -_LOOK_S
        if exchange.sink is not None:
            exchange.sink.on_end = self._observe

    def load(self) -> TransferLoad | None:
        """The counts, as they were a moment ago; None if the engine has to do with no other, nor with host memory."""
        transfers, sink, now = self._exchange.transfers, self._exchange.sink, time.monotonic()
        if (transfers is None and sink is None) or now - self._looked_at < _LOOK_S:
            return self._load
        self._looked_at = now
        counts = _NOTHING if transfers is None else transfers.counts()
        tier = None if sink is None else sink.tier
        failures = Counter({str(reason): count for reason, count in counts.failures.items()})
        if sink is not None:
            failures.update(sink.failures)
        self._load = TransferLoad(
            counts.num_leases,
            counts.num_fetches,
            self._exchange.num_quarantined,
            counts.blocks_sent,
            counts.bytes_sent,
            counts.blocks_received,
            counts.bytes_received,
            0 if sink is None else sink.recomputed_tokens,
            {str(reason): count for reason, count in counts.leases_ended.items()},
            dict(failures),
            tuple(self._fetches.counts),
            self._fetches.seconds,
            tuple(self._waits.counts),
            self._waits.seconds,
            *((0, 0, 0, 0) if tier is None else (tier.num_blocks, tier.num_bytes, tier.num_hits, tier.num_evictions)),
        )
        return self._load

    def _observe(self, report: FetchReport) -> None:
        if report.reason is None:
            self._fetches.add(report.seconds)
            self._waits.add(report.waited_s)


class _Times:
    """Counts durations by their length."""

    def __init__(self) -> None:
        self.counts = [0] * (len(FETCH_SECONDS) + 1)
        self.seconds = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(FETCH_SECONDS, seconds)] += 1
        self.seconds += seconds

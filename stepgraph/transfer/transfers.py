"""EngineTransfers: what an engine gives to others, and takes from them."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from stepgraph.errors import RequestError
from stepgraph.transfer.base import Fetch, FetchFailure, FetchState, TransferCounts
from stepgraph.transfer.fetch import RemoteFetch
from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.peer import Patience, Peer
from stepgraph.transfer.port import Port
from stepgraph.transfer.rank_cache import ExportedCache
from stepgraph.transfer.reference import PARAM, Reference
from stepgraph.transfer.sockets import AllowedHosts, listen

logger = logging.getLogger(__name__)

_CLOSE_S = 10.0
"""For another engine's memory to be let go of."""
_MAX_PEERS = 256
"""At a time: requests say how many there are."""


class EngineTransfers:
    """See `stepgraph.transfer.base.Transfers`.

    Args:
        cache: where blocks come from and go to.
        model: digest of the weights, see `Hello.model`.
        backend: name of how bytes move.
        leases: what it holds for others.
        secret: that the engines know.
        address: host and port to be listened on, see `stepgraph.transfer.sockets.listen`; None: others take nothing from here.
        hosts: from which something is taken; None: nothing is taken.
        patience: with other engines.
        clock: seconds, monotonic.

    Raises:
        ConfigError: it cannot listen there.
    """

    def __init__(
        self,
        cache: ExportedCache,
        model: str,
        backend: str,
        leases: Leases,
        secret: bytes,
        *,
        address: tuple[str, int | None] | None = None,
        hosts: AllowedHosts | None = None,
        patience: Patience = Patience(),  # noqa: B008  # frozen
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine_id = secrets.token_hex(16)
        self.leases = leases
        self.host, self.port = "", 0
        self._cache, self._backend, self._secret = cache, backend, secret
        self._hosts, self._patience, self._clock = hosts, patience, clock
        self._lock = threading.Lock()
        self._peers: dict[tuple[str, int], Peer] = {}
        self._ending: list[Peer] = []  # that may still reach another engine's memory
        self._fetches: list[RemoteFetch] = []  # not known to be done
        self._failures: Counter[str] = Counter()
        self._num_received = 0
        self._renewed_at = -float("inf")
        self._hello: Hello | None = None
        self._port: Port | None = None
        if address is not None:
            listener, self.host, self.port = listen(*address)
            movers = None if cache.receive is None else cache.movers
            self._port = Port(listener, secret, leases, movers, timeout_s=min(patience.timeout_s, 10.0))
        self.cache_back(model)

    def check(self, reference: Reference) -> None:
        """See `Transfers.check`."""
        if self._hosts is None:
            raise RequestError(
                f"{PARAM}: this engine takes no keys and values of others; start it with --splitwise-role decode",
                param=PARAM,
            )
        if reference.host not in self._hosts:
            raise RequestError(
                f"{PARAM}: remote_host={reference.host!r} is not one that keys and values may be taken from; start this engine "
                f"with --kv-transfer-peers {reference.host}",
                param=PARAM,
            )

    def fetch(self, reference: Reference, first: int, blocks: Sequence[int], keys: Sequence[bytes]) -> Fetch:
        """See `Transfers.fetch`."""
        fetch = RemoteFetch(reference, first, tuple(blocks), tuple(keys), self._ended, self._clock)
        self._fetches = [other for other in self._fetches if not other.done()]
        self._fetches.append(fetch)
        if self._hello is None:
            fetch.end(LossReason.CACHE_LOST)
        else:
            while (peer := self._peer(reference)) is not None and not peer.fetch(fetch):
                pass  # that one has just ended
            if peer is None:
                fetch.end(FetchFailure.LINK)
        return fetch

    def renew(self, references: Sequence[Reference]) -> None:
        """See `Transfers.renew`."""
        now = self._clock()
        if self._hello is None or now - self._renewed_at < self._patience.lease_s / 3:
            return
        self._renewed_at = now
        leases: dict[tuple[str, int], tuple[Reference, set[str]]] = {}
        for reference in references:
            leases.setdefault((reference.host, reference.port), (reference, set()))[1].add(reference.lease)
        for reference, names in leases.values():
            if (peer := self._peer(reference)) is not None:
                peer.renew(names)

    def leave(self, reference: Reference) -> None:
        """See `Transfers.leave`."""
        if (peer := self._peer(reference)) is not None:
            peer.leave(reference.lease)

    def cache_lost(self, reason: LossReason) -> None:
        """See `Transfers.cache_lost`."""
        self._hello = None
        self.leases.cancel_all(reason)
        if self._port is not None:
            self._port.suspend(reason)
        with self._lock:
            peers = list(self._peers.values())
        for peer in peers:
            peer.end(reason)

    def cache_back(self, model: str) -> None:
        """See `Transfers.cache_back`."""
        cache = self._cache
        self._hello = Hello(
            PROTOCOL, self.engine_id, model, cache.layout.digest, (self._backend,), cache.is_cut, cache.ranks
        )
        if self._port is not None:
            self._port.serve(self._hello)

    def counts(self) -> TransferCounts:
        """See `Transfers.counts`."""
        num_sent = 0 if self._port is None else self._port.num_sent
        with self._lock:
            failures, num_received = dict(self._failures), self._num_received
        return TransferCounts(
            num_leases=len(self.leases),
            num_fetches=sum(not fetch.done() for fetch in self._fetches),
            blocks_sent=num_sent,
            bytes_sent=num_sent * self._cache.layout.block_bytes,
            blocks_received=num_received,
            bytes_received=num_received * self._cache.layout.block_bytes,
            leases_ended={str(reason): count for reason, count in dict(self.leases.ended).items()},
            failures=failures,
        )

    def close(self) -> None:
        """See `Transfers.close`."""
        self.cache_lost(LossReason.CACHE_LOST)
        if self._port is not None:
            self._port.close()
        with self._lock:
            peers = list(self._ending)
        for peer in peers:
            peer.join(_CLOSE_S)

    def _peer(self, reference: Reference) -> Peer | None:
        """The one that a reference names, connected or on its way to be; None if nothing may be taken from there, if there are
        too many, or while there is no cache."""
        if self._hello is None or self._hosts is None or reference.host not in self._hosts:
            return None
        address = (reference.host, reference.port)
        with self._lock:
            if address not in self._peers:
                if len(self._peers) >= _MAX_PEERS:
                    logger.warning("this engine takes keys and values from %d others, and from no more", _MAX_PEERS)
                    return None
                self._peers[address] = Peer(
                    *address,
                    self._secret,
                    self._hello,
                    self._cache.movers,
                    self._cache.receive,
                    self._patience,
                    self._clock,
                    self._gone,
                )
            return self._peers[address]

    def _gone(self, peer: Peer) -> None:
        with self._lock:
            self._ending = [other for other in self._ending if other.is_alive]
            self._ending.append(peer)
            if self._peers.get(address := (peer.host, peer.port)) is peer:
                del self._peers[address]

    def _ended(self, fetch: RemoteFetch) -> None:
        reason = fetch.reason
        with self._lock:
            if fetch.state is FetchState.DONE:
                self._num_received += fetch.num_blocks
            elif reason is not None:
                self._failures[str(reason)] += 1

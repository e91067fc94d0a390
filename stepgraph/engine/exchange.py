"""Exchange: what an engine does, beside its steps, so that blocks of prompts come from other engines and go to them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from stepgraph.engine.blocks import BlockPool
from stepgraph.engine.request import Request
from stepgraph.engine.sink import Sink
from stepgraph.engine.source import Source
from stepgraph.errors import ConfigError, RequestError
from stepgraph.models.source import ModelSource
from stepgraph.transfer.base import Transfers
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.reference import PARAM, Offer

if TYPE_CHECKING:
    from stepgraph.engine.kv_event_publisher import KVEventPublisher

POLL_S = 0.1
"""How soon to look again, while no request waits, for leases that are over and blocks that nobody writes any more."""

_PATIENCE_S = 5.0
"""How long to wait for those who may still write blocks, before the memory of these is given up."""

_NAP_S = 0.001


class Exchange:
    """The transfers of an engine's requests. Belongs to the engine's thread. An engine that has to do with no other has one
    without source and sink, which costs its steps nothing.

    Args:
        transfers: with other engines.
        source: gives blocks to others.
        sink: takes blocks of others.
        blocks: all KV blocks.
        model: digest of the weights, see `stepgraph.transfer.messages.Hello.model`.
        identify: makes it of other weights; None: of some that cannot be told from any.
        publishers: tell others what is in the cache; one for each data-parallel rank.
    """

    def __init__(
        self,
        transfers: Transfers | None = None,
        source: Source | None = None,
        sink: Sink | None = None,
        *,
        blocks: BlockPool | None = None,
        model: str = "",
        identify: Callable[[ModelSource | None], str] = lambda _: "",
        publishers: Sequence[KVEventPublisher] = (),
    ) -> None:
        self.transfers, self.source, self.sink = transfers, source, sink
        self._blocks, self._model, self._identify = blocks, model, identify
        self._publishers = publishers

    @property
    def is_active(self) -> bool:
        """Whether anything is on its way, or held for others: if not, nothing is to be done at a step."""
        source, sink = self.source, self.sink
        return (source is not None and source.is_busy) or (sink is not None and sink.is_busy)

    @property
    def num_quarantined(self) -> int:
        """Blocks that nobody has who may use them, for others may still write them."""
        return 0 if self._blocks is None else self._blocks.num_quarantined

    def add(self, request: Request) -> None:
        """A request has been queued.

        Raises:
            RequestError: this engine does not do what it asks for, or its lease has a name that was used.
        """
        transfer, source, sink = request.transfer, self.source, self.sink
        if isinstance(transfer, Offer):
            if source is None:
                raise _not_done("its prompt computed for another engine (do_remote_decode)", "prefill")
            source.add(request, transfer)
        elif transfer is not None and (sink is None or not sink.takes):
            raise _not_done("blocks that another engine has computed (do_remote_prefill)", "decode")
        if sink is not None and (transfer is not None or sink.tier is not None):
            sink.add(request)

    def poll(self, unread: Sequence[int]) -> list[Request]:
        """Before a step is planned: see `Sink.poll`."""
        self._collect()
        return [] if self.sink is None else self.sink.poll(unread)

    def launched(self, step: int) -> None:
        """A step has been launched."""
        if self.source is not None:
            self.source.launched(step)

    def read(self) -> None:
        """The results of a step have been read, and their requests know of them."""
        if self.source is not None:
            self.source.read()

    def gone(self, request: Request) -> None:
        """A request was ended by the host."""
        if self.source is not None:
            self.source.gone(request)
        if self.sink is not None:
            self.sink.gone(request)

    def lost(self) -> None:
        """What the cache holds counts no more. Nobody holds a block for others after that; some may be quarantined."""
        if self.source is not None:
            self.source.lost()
        if self.sink is not None:
            self.sink.lost()

    def reclaim(self, *, copies: bool) -> None:
        """Take back the blocks that others need no more, or do not write any more, while no step is under way. `copies`: go on
        with those to host memory."""
        self._collect()
        if copies and self.sink is not None and self.sink.tier is not None:
            self.sink.tier.poll(())

    def _collect(self) -> None:
        if self.source is not None:
            self.source.collect()
        if self._blocks is not None:
            self._blocks.reclaim()

    def rest(self) -> None:
        """The memory of the cache is about to be given up, or its weights to change: have nothing to do with others until
        `go_on`, and wait until nobody writes into it. Nobody may hold a block for others.

        Raises:
            ConfigError: somebody may still write; it goes on then.
        """
        if self._blocks is None:
            return
        if self.transfers is not None:
            self.transfers.cache_lost(LossReason.CACHE_LOST)
        deadline = time.monotonic() + _PATIENCE_S
        self._blocks.reclaim()
        while self._blocks.num_quarantined:
            if time.monotonic() > deadline:
                self.go_on()
                raise ConfigError(
                    f"{self._blocks.num_quarantined} KV blocks may still be read or written beside the steps, and that has not "
                    f"ended for {_PATIENCE_S:g} s: another engine does not answer; try again, or end that engine"
                )
            time.sleep(_NAP_S)
            self._blocks.reclaim()

    def go_on(self) -> None:
        """There is a cache again."""
        if self.transfers is not None:
            self.transfers.cache_back(self._model)

    def go_on_with(self, weights: ModelSource | Iterable[object]) -> None:
        """There is a cache again, of other weights."""
        if self.transfers is not None:
            self._model = self._identify(weights if isinstance(weights, ModelSource) else None)
            self.go_on()

    def close(self) -> None:
        """End all leases and fetches, for good; nobody reads or writes blocks after that."""
        if self.transfers is not None:
            self.transfers.close()
        if self.sink is not None and self.sink.tier is not None:
            self.sink.tier.close()
        for publisher in self._publishers:
            publisher.close()

    def forget(self) -> None:
        """Forget prefixes of requests that have ended. Blocks of leases that are over are nobody's any more."""
        self._collect()
        if self.sink is not None and self.sink.tier is not None:
            self.sink.tier.clear()


def _not_done(what: str, role: str) -> RequestError:
    return RequestError(
        f"{PARAM}: the request wants {what}, and this engine does not do that; start it with --splitwise-role {role}",
        param=PARAM,
    )

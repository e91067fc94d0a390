"""The engines as a front has them: one door to all, which sends each request to one of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import EngineDeadError
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.generation import Generation, Origin
from stepgraph.server.messages import FromEngine, Ready
from stepgraph.server.rest import Rest
from stepgraph.server.routing import Router
from stepgraph.transfer.reference import Offer, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

logger = logging.getLogger(__name__)


class Replicas:
    """All engines. Belongs to one event loop.

    Args:
        clients: one for each engine.
        rest: how the engines were brought to rest.
        max_adapters: LoRA adapters that an engine keeps.
        keeps_prefixes: they cache prefixes.
    """

    def __init__(
        self, clients: Sequence[EngineClient], rest: Rest, *, max_adapters: int = 1, keeps_prefixes: bool = True
    ):
        self.clients = tuple(clients)
        self.rest = rest
        self.ready: Ready | None = None
        """What the engines said of themselves; it is the same of all."""
        self._max_adapters = max_adapters
        self._keeps_prefixes = keeps_prefixes
        self._router: Router | None = None

    @property
    def state(self) -> EngineState:
        """Where they are in their lives, the best of them."""
        states = {client.status.state for client in self.clients}
        return next(state for state in (EngineState.READY, *EngineState) if state in states)

    @property
    def trouble(self) -> str | None:
        """Why requests are not served now; None if one engine serves them."""
        if any(client.is_ready for client in self.clients):
            return None
        return next(client for client in self.clients if client.status.state is self.state).status.trouble

    @property
    def troubles(self) -> list[str | None]:
        """Of each engine, why it serves no requests now."""
        return [client.status.trouble for client in self.clients]

    @property
    def capacity(self) -> int:
        """Requests that can run at once; 0 before anything is known of the engines."""
        serving = sum(client.is_ready for client in self.clients)
        return 0 if self.ready is None else self.ready.max_num_seqs * max(1, serving)

    @property
    def num_unfinished(self) -> int:
        """This front's requests in the engines, one for each answer."""
        return sum(client.num_unfinished for client in self.clients)

    @property
    def num_everybodys(self) -> int:
        """Requests of all fronts, as far as this one knows."""
        return sum(client.num_unfinished + client.num_others for client in self.clients)

    @property
    def mean_request_s(self) -> float:
        """Mean time from arrival to end of the last answers that came to theirs; 1 while there are none."""
        seconds = [one for client in self.clients for one in client.recent_seconds]
        return sum(seconds) / len(seconds) if seconds else 1.0

    def submit(
        self,
        id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        priority: int = 0,
        adapter: str | None = None,
        bad_words: list[list[int]] | None = None,
        session: str | None = None,
        transfer: Offer | Reference | None = None,
        arrived_at: float,
        origin: Origin,
    ) -> Generation:
        """Send a prompt to the engine that suits it best; see `EngineClient.submit`.

        Args:
            session: names requests that will share a prefix.
        """
        return self._choose(prompt, adapter, session).submit(
            id,
            prompt,
            params,
            tokenizer,
            priority=priority,
            adapter=adapter,
            bad_words=bad_words,
            transfer=transfer,
            arrived_at=arrived_at,
            origin=origin,
        )

    def forget_prefixes(self, replica: int) -> None:
        """An engine's prefix cache was emptied."""
        if self._router is not None:
            self._router.forget(replica)

    def on_message(self, replica: int, message: FromEngine) -> None:
        """See `EngineListener`."""
        self.clients[replica].take(message)

    def on_status(self, replica: int, status: EngineStatus) -> None:
        """See `EngineListener`."""
        self.clients[replica].status = status
        if status.ready is not None and self.ready is None:
            self.ready = status.ready
            if len(self.clients) > 1:
                self._router = Router(
                    len(self.clients),
                    block_size=self.ready.block_size,
                    num_kv_blocks=self.ready.num_kv_blocks if self._keeps_prefixes else 0,
                    max_adapters=self._max_adapters,
                )

    def on_end(self, replica: int, reason: str) -> None:
        """See `EngineListener`."""
        self.forget_prefixes(replica)
        self._hand_over(self.clients[replica])
        self.clients[replica].fail(reason)

    def _hand_over(self, gone: EngineClient) -> None:
        """Have the other engines, if there are any, answer what an engine that is gone has given no token of: once, for a request
        that ends engines must not end them all."""
        if self.trouble is not None:
            return
        waiting = [(generation, message) for generation, message in gone.unanswered if not generation.has_moved]
        for generation, message in waiting:
            gone.hand_over(generation, self._choose(generation.prompt, message.adapter, None))
        if waiting:
            logger.warning("%d prompts that an engine gave no token of go to others", len(waiting))

    def _choose(self, prompt: TokenizedPrompt, adapter: str | None, session: str | None) -> EngineClient:
        if self._router is None:
            return self.clients[0]
        if (trouble := self.trouble) is not None:
            raise EngineDeadError(trouble)
        loads = [client.load.tokens if client.is_ready else None for client in self.clients]
        return self.clients[
            self._router.route(prompt.token_ids, loads, salt=prompt.cache_salt, adapter=adapter, session=session)
        ]

"""The engines as a front has them: one door to all, which sends each request to one of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from secrets import token_hex
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

_LEASE_BYTES = 16
"""Of a lease's name, which nobody can guess."""


class Replicas:
    """All engines. Belongs to one event loop.

    Args:
        clients: one for each engine.
        rest: how the engines were brought to rest.
        max_adapters: LoRA adapters that an engine keeps.
        keeps_prefixes: they cache prefixes.
        min_remote_prefill_tokens: of a prompt, without what is cached, from which an engine of its own computes it.
    """

    def __init__(
        self,
        clients: Sequence[EngineClient],
        rest: Rest,
        *,
        max_adapters: int = 1,
        keeps_prefixes: bool = True,
        min_remote_prefill_tokens: int = 512,
    ):
        self.clients = tuple(clients)
        self.rest = rest
        self.ready: Ready | None = None
        """What the first of the engines said of itself; but for its role and its door it is the same of all."""
        self._min_remote_prefill_tokens = min_remote_prefill_tokens
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
        return 0 if self.ready is None else self.ready.max_num_seqs * max(1, len(self._answering))

    @property
    def num_unfinished(self) -> int:
        """This front's requests in the engines, one for each answer."""
        return sum(client.num_unfinished for client in self.clients)

    @property
    def num_everybodys(self) -> int:
        """Requests of all fronts, as far as this one knows."""
        return sum(client.num_unfinished + client.num_others for client in self._answering)

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
        """Send a prompt to the engine that suits it best; see `EngineClient.submit`. If it is long, an engine of the role prefill
        computes it, of which the other hears once that one has it.

        Args:
            session: names requests that will share a prefix.
        """
        client, num_cached = self._choose(prompt, adapter, session, transfer)
        num_new = len(prompt.token_ids) - num_cached
        source = None
        if transfer is None and num_new >= self._min_remote_prefill_tokens and params.prompt_logprobs is None:
            source = self._source_for(prompt, adapter, session)
        generation = client.submit(
            id,
            prompt,
            params,
            tokenizer,
            priority=priority,
            adapter=adapter,
            bad_words=bad_words,
            transfer=transfer,
            is_held=source is not None,
            arrived_at=arrived_at,
            origin=origin,
        )
        if source is not None:
            _prefill(source, client, generation, priority=priority, adapter=adapter)
        return generation

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
            gone.hand_over(generation, self._choose(generation.prompt, message.adapter, None, message.offer)[0])
        if waiting:
            logger.warning("%d prompts that an engine gave no token of go to others", len(waiting))

    @property
    def _answering(self) -> Sequence[EngineClient]:
        """The engines that answer requests: those of the role prefill do so only while there is no other."""
        ready = [client for client in self.clients if client.is_ready]
        return [client for client in ready if client.role != "prefill"] or ready

    def _choose(
        self, prompt: TokenizedPrompt, adapter: str | None, session: str | None, transfer: Offer | Reference | None
    ) -> tuple[EngineClient, int]:
        """The engine to answer a prompt, and how many of its tokens are cached there."""
        if self._router is None:
            return self.clients[0], 0
        if (trouble := self.trouble) is not None:
            raise EngineDeadError(trouble)
        among = self._answering
        if isinstance(transfer, Offer):
            among = [client for client in self.clients if client.is_ready and client.role != "decode"]
        return self._best_of(among, prompt, adapter, session)

    def _source_for(self, prompt: TokenizedPrompt, adapter: str | None, session: str | None) -> EngineClient | None:
        """The engine of the role prefill that is to compute a prompt; None if none can."""
        answering = self._answering
        sources = [client for client in self.clients if client.is_ready and client.role == "prefill" and client.door]
        if not sources or sources[0] in answering:
            return None
        return self._best_of(sources, prompt, adapter, session)[0]

    def _best_of(
        self, among: Sequence[EngineClient], prompt: TokenizedPrompt, adapter: str | None, session: str | None
    ) -> tuple[EngineClient, int]:
        assert self._router is not None
        loads = [client.load.tokens if client in among else None for client in self.clients]
        replica, num_cached = self._router.route(
            prompt.token_ids, loads, salt=prompt.cache_salt, adapter=adapter, session=session
        )
        return self.clients[replica], num_cached


def _prefill(
    source: EngineClient, sink: EngineClient, generation: Generation, *, priority: int, adapter: str | None
) -> None:
    """Have `source` compute the prompt of a generation that is held for `sink`."""
    assert source.door is not None
    id, lease = f"{generation.id}-prefill", token_hex(_LEASE_BYTES)
    reference = Reference(*source.door, lease)

    def then(is_accepted: bool) -> None:
        sink.release(generation, reference if is_accepted else None)

    generation.leave_prefill = partial(source.leave_prefill, id)
    source.prefill(id, generation.prompt, Offer(lease), priority=priority, adapter=adapter, then=then)

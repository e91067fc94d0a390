"""One engine as a front has it: sends it requests, and gives each what comes back for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.server.engine_observer import EngineState, EngineStatus, RequestObserver
from stepgraph.server.generation import Generation, Origin, RemoteRequest
from stepgraph.server.messages import (
    Abort,
    Accepted,
    Add,
    FromEngine,
    Progress,
    Refused,
    TokenUpdate,
    encode,
    settings_of,
)
from stepgraph.server.routing import LoadEstimate
from stepgraph.transfer.reference import Offer, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NUM_RECENT = 64
"""Answers whose mean time says what the next ones will take."""


class EngineClient:
    """Requests in one engine. Belongs to one event loop. If the engine dies, its requests fail with EngineDeadError.

    Args:
        send: an encoded message, to the engine's process; never waits.
        observer: hears of requests.
        shared: other fronts send the engine requests, too.
    """

    def __init__(self, send: Callable[[bytes], None], observer: RequestObserver, *, shared: bool = False):
        self.status = EngineStatus()
        """Set by whoever hears of it."""
        self._send = send
        self._observer = observer
        self._generations: dict[str, Generation] = {}
        self._running: dict[str, tuple[Generation, RemoteRequest]] = {}  # by id of the engine's requests
        self._unanswered: dict[str, Add] = {}  # of generations whose requests all run, without a token so far
        self._recent_seconds: deque[float] = deque(maxlen=_NUM_RECENT)
        self._heard_at = time.monotonic()
        self._shared = shared
        self.load = LoadEstimate()
        """What the engine has to do, for the choice of one."""
        self.num_others = 0
        """Requests of other fronts, as the engine told last."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are served now."""
        return self.status.state is EngineState.READY

    @property
    def num_unfinished(self) -> int:
        """This front's requests in the engine, one for each answer."""
        return len(self._running)

    @property
    def recent_seconds(self) -> Iterable[float]:
        """What the last answers that came to their ends took, from their arrival."""
        return self._recent_seconds

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
        transfer: Offer | Reference | None = None,
        arrived_at: float,
        origin: Origin,
    ) -> Generation:
        """Send a prompt to the engine.

        Args:
            id: differs from that of every other generation.
            prompt, params, priority, adapter: see `AsyncEngine.generate`.
            bad_words, transfer: see `Engine.add_request`.
            tokenizer: the model's, for the answers' text.
            arrived_at: `time.monotonic()` seconds, from which waiting counts.
            origin: for traces.

        Raises:
            RequestError: it cannot be put into a message.
            EngineDeadError: the engine is not there.
        """
        ready = self.status.ready
        if not self.is_ready or ready is None:
            raise EngineDeadError(self.status.trouble or "the engine is not there")
        assert id not in self._generations, id
        generation = Generation(self, id, prompt, params, tokenizer, arrived_at, origin, ready.end_token_ids)
        requests = [(one_id, settings_of(one.params)) for one_id, one in generation.requests.items()]
        message = Add(id, requests, prompt.token_ids, priority, prompt.cache_salt, adapter, bad_words)
        if isinstance(transfer, Offer):
            message.offer = transfer
        else:
            message.reference = transfer
        try:
            content = encode(message)
        except UnicodeEncodeError as error:
            raise RequestError("the request holds half of a surrogate pair, which is no text; leave it out") from error
        except OverflowError as error:
            raise RequestError("the request holds a whole number of more than 64 bits; give a smaller one") from error
        self._add(generation, message, content)
        return generation

    @property
    def unanswered(self) -> list[tuple[Generation, Add]]:
        """Generations of which nothing has come that a reader could have seen, and what was sent."""
        return [(self._generations[id], message) for id, message in self._unanswered.items()]

    def hand_over(self, generation: Generation, other: EngineClient) -> None:
        """Have another engine answer a generation of `unanswered`; this one is gone."""
        message = self._unanswered.pop(generation.id)
        del self._generations[generation.id]
        for request_id in generation.requests:
            del self._running[request_id]
        generation.move(other)
        other._add(generation, message, encode(message))

    def _add(self, generation: Generation, message: Add, content: bytes) -> None:
        id, prompt = generation.id, generation.prompt
        self._generations[id], self._unanswered[id] = generation, message
        self._running.update((one_id, (generation, one)) for one_id, one in generation.requests.items())
        self.load.sent(id, len(generation.requests), len(prompt.token_ids))
        self._send(content)

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests; nothing more is heard of them. `reason` is what they count as."""
        known = [request_id for request_id in request_ids if self._drop(request_id, reason)]
        if known:
            self._send(encode(Abort(known)))

    def leave(self, generation: Generation) -> None:
        """The reader of a generation has what it wants: end what still runs of it."""
        self._generations.pop(generation.id, None)
        self.abort(generation.requests)

    def take(self, message: FromEngine) -> None:
        """News from the engine."""
        self._heard_at = time.monotonic()
        if isinstance(message, Progress):
            self._observer.on_progress(message)
            for update in message.updates:
                self._take_update(update)
            num_unfinished = message.load.num_running + message.load.num_waiting
            self.load.reported(num_unfinished)
            self.num_others = max(0, num_unfinished - self.num_unfinished) if self._shared else 0
        elif isinstance(message, Accepted):
            self.load.accepted(message.group)
            accepted = self._generations.get(message.group)
            if accepted is not None:
                accepted.accept()
        elif isinstance(message, Refused):
            refused = self._generations.get(message.group)
            if refused is not None:
                for request_id in refused.requests:
                    self._drop(request_id, FinishReason.ERROR)
                refused.fail(message.error.error())

    def fail(self, reason: str) -> None:
        """The engine is gone: end all requests."""
        error = EngineDeadError(reason)
        generations, self._generations = self._generations, {}
        for request_id in tuple(self._running):
            self._drop(request_id, FinishReason.ERROR)
        for generation in generations.values():
            generation.fail(error)
        self.load, self.num_others = LoadEstimate(), 0

    def _take_update(self, update: TokenUpdate) -> None:
        running = self._running.get(update.id)
        if running is None:  # it was aborted meanwhile
            return
        generation, request = running
        if update.token_ids:
            if request.last_token_at is None:
                self.load.began(generation.id)
                self._unanswered.pop(generation.id, None)
                request.first_token_at = self._heard_at
                self._observer.on_first_token(self._heard_at - request.arrived_at)
            else:
                self._observer.on_token_gap(self._heard_at - request.last_token_at)
            request.last_token_at = self._heard_at
        request.take(update)
        generation.take(update)
        if update.finish_reason is not None:
            self._drop(update.id, FinishReason(update.finish_reason))

    def _drop(self, request_id: str, reason: FinishReason) -> bool:
        """A request has ended; False if it is not known (any more)."""
        running = self._running.pop(request_id, None)
        if running is not None:
            generation, request = running
            self._unanswered.pop(generation.id, None)
            if self._running.keys().isdisjoint(generation.requests):
                self.load.ended(generation.id)
            ended = request.ended(reason)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._recent_seconds.append(ended.ended_at - ended.arrived_at)
            self._observer.on_end(ended)
        return running is not None

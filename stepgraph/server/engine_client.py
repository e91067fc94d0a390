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
    Door,
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
        self._prefills: dict[
            str, Callable[[bool], None] | None
        ] = {}  # for other engines, by id; to be told if accepted
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
    def role(self) -> str:
        """See `TransferConfig.splitwise_role`; "mixed" before the engine is known."""
        return "mixed" if self.status.ready is None else self.status.ready.role

    @property
    def door(self) -> Door | None:
        """See `Ready`."""
        return None if self.status.ready is None else self.status.ready.door

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
        is_held: bool = False,
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
            is_held: it is sent by `release`, and another engine computes the prompt.

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
        self._note(generation, message, 0 if is_held else len(prompt.token_ids))
        if not is_held:
            self._send(content)
        return generation

    def release(self, generation: Generation, reference: Reference | None) -> None:
        """Send what is held, unless it has ended; `reference` says where the prompt's blocks come from."""
        message = self._unanswered.get(generation.id)
        if message is not None:
            message.reference = reference
            self._send(encode(message))

    def prefill(
        self,
        id: str,
        prompt: TokenizedPrompt,
        offer: Offer,
        *,
        priority: int,
        adapter: str | None,
        then: Callable[[bool], None],
    ) -> None:
        """Have the engine compute a prompt for another one. Nothing is heard of its own answer, of one token.

        Args:
            id: differs from that of every other, and of every generation.
            prompt, priority, adapter: see `submit`.
            offer: for the other engine.
            then: told, soon and once, whether the engine does it.
        """
        request = (id, settings_of(SamplingParams(max_tokens=1, temperature=0)))
        message = Add(id, [request], prompt.token_ids, priority, prompt.cache_salt, adapter, offer=offer)
        content = encode(message)
        self._prefills[id] = then
        self.load.sent(id, 1, len(prompt.token_ids))
        self._send(content)

    def leave_prefill(self, id: str) -> None:
        """Nobody wants it any more, if it has not ended."""
        if self._end_prefill(id):
            self._send(encode(Abort([id])))

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
        generation.leave_prefill()
        generation.move(other)
        message.reference = None  # the lease may be over
        other._note(generation, message, len(generation.prompt.token_ids))
        other._send(encode(message))

    def _note(self, generation: Generation, message: Add, num_prompt_tokens: int) -> None:
        id = generation.id
        self._generations[id], self._unanswered[id] = generation, message
        self._running.update((one_id, (generation, one)) for one_id, one in generation.requests.items())
        self.load.sent(id, len(generation.requests), num_prompt_tokens)

    def abort(self, request_ids: Iterable[str], reason: FinishReason = FinishReason.ABORT) -> None:
        """End requests; nothing more is heard of them. `reason` is what they count as."""
        known = [request_id for request_id in request_ids if self._drop(request_id, reason)]
        if known:
            self._send(encode(Abort(known)))

    def leave(self, generation: Generation) -> None:
        """The reader of a generation has what it wants: end what still runs of it."""
        self._generations.pop(generation.id, None)
        self.abort(generation.requests)
        generation.leave_prefill()

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
            self._begin_prefill(message.group, True)
            accepted = self._generations.get(message.group)
            if accepted is not None:
                accepted.accept()
        elif isinstance(message, Refused):
            self._begin_prefill(message.group, False)
            self._end_prefill(message.group)
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
        prefills = tuple(self._prefills)
        for id in prefills:
            self._begin_prefill(id, False)
        self._prefills.clear()
        self.load, self.num_others = LoadEstimate(), 0

    def _begin_prefill(self, id: str, is_accepted: bool) -> None:
        """The engine computes a prompt for another, or does not."""
        then = self._prefills.get(id)
        if then is not None:
            self._prefills[id] = None
            then(is_accepted)

    def _end_prefill(self, id: str) -> bool:
        """The engine is done with it; False if it is not known (any more)."""
        is_known = id in self._prefills
        if is_known:
            del self._prefills[id]
            self.load.ended(id)
        return is_known

    def _take_update(self, update: TokenUpdate) -> None:
        running = self._running.get(update.id)
        if running is None:  # it was aborted meanwhile, or is another engine's
            if update.finish_reason is not None:
                self._end_prefill(update.id)
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

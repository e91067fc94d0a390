"""One prompt being answered in the engine's process: its requests as they are known here, and what their answers gain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from msgspec import UNSET, UnsetType

from stepgraph.engine.outputs import TokenProbabilities
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import AnsweredRequest, FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta, Session, split
from stepgraph.errors import StepgraphError
from stepgraph.server.messages import TokenUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Origin(NamedTuple):
    """Where a request comes from, for traces."""

    operation: str
    """"chat" or "text_completion"."""
    model: str
    """As the client named it."""
    response_id: str
    traceparent: str | None
    """The HTTP header of this name."""


@dataclass(frozen=True)
class EndedRequest:
    """One answer's life, for metrics and traces. Times are `time.monotonic()` seconds; None if it did not come so far."""

    finish_reason: str
    params: SamplingParams
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    arrived_at: float
    admitted_at: float | None  # it got a slot
    first_token_at: float | None
    last_token_at: float | None
    ended_at: float
    origin: Origin | None = None


class RequestOwner(Protocol):
    """Sends requests to the engine, and can end them."""

    def abort(self, request_ids: Iterable[str], reason: FinishReason) -> None:
        """End requests; nothing more is heard of them. `reason` is what they count as."""

    def leave(self, generation: Generation) -> None:
        """The reader of a generation has what it wants: end what still runs of it."""


@dataclass(eq=False)
class RemoteRequest(AnsweredRequest):
    """A request that runs in the engine's process, as far as it is known here."""

    arrived_at: float
    origin: Origin
    first_token_at: float | None = None
    last_token_at: float | None = None

    def take(self, update: TokenUpdate) -> None:
        """Take in what the engine's process says of it."""
        self.count_accepted(update.num_accepted)
        self.num_draft_tokens = update.num_draft_tokens
        self.output_token_ids += update.token_ids
        self.output_logprobs += update.logprobs or ()
        if update.first is not None:
            self.admitted_at = update.first.admitted_at
            self.num_cached_tokens = update.first.num_cached_tokens
            self.prompt_logprobs = update.first.prompt_logprobs or []
        if update.finish_reason is not None:
            self.finish_reason = FinishReason(update.finish_reason)
            self.stop_token, self.error = update.stop_token, update.error
            self.kv_transfer_params = update.kv_transfer_params

    def ended(self, reason: str) -> EndedRequest:
        """Its life, now that it is over."""
        return EndedRequest(
            reason,
            self.params,
            len(self.prompt_token_ids),
            self.num_cached_tokens,
            len(self.output_token_ids),
            self.arrived_at,
            self.admitted_at,
            self.first_token_at,
            self.last_token_at,
            time.monotonic(),
            self.origin,
        )


class Generation:
    """One prompt being answered. Iterate over `deltas` once; leaving early aborts what runs."""

    def __init__(
        self,
        client: RequestOwner,
        id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        tokenizer: PreTrainedTokenizerFast | None,
        arrived_at: float,
        origin: Origin,
        end_token_ids: Collection[int],
    ):
        self.id = id
        self.prompt = prompt
        self.requests = {
            one_id: RemoteRequest(one_id, prompt.token_ids, one, arrived_at, origin)
            for one_id, one in split(id, params, end_token_ids)
        }
        """One for each answer, by their ids in the engine."""
        self.has_moved = False
        """Whether the engine that it was sent to first is gone, and another one has it."""
        self.leave_prefill: Callable[[], None] = lambda: None
        """What another engine computes of the prompt, if one does, is not wanted any more."""
        self._client = client
        self._session = Session(
            list(self.requests.values()),
            prompt.text,
            tokenizer,
            abort=self._end_early,
            id=id,
        )
        self._updates: list[TokenUpdate] = []
        self._failure: StepgraphError | None = None
        self._accepted = asyncio.Event()
        self._news = asyncio.Event()

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache saved the first answer."""
        return next(iter(self.requests.values())).num_cached_tokens

    @property
    def kv_transfer_params(self) -> dict[str, Any] | UnsetType:
        """What the client must tell the engine that goes on with the prompt; UNSET if none is to, or before the end."""
        found = next(iter(self.requests.values())).kv_transfer_params
        return UNSET if found is None else found

    @property
    def num_draft_tokens(self) -> int:
        """Proposals that were verified for the answers by now."""
        return sum(request.num_draft_tokens for request in self.requests.values())

    @property
    def num_accepted_tokens(self) -> int:
        """Of these, those that are part of the answers."""
        return sum(one.num_accepted(self._session.num_tokens(id)) for id, one in self.requests.items())

    def prompt_logprobs(self) -> list[TokenProbabilities | None] | None:
        """See `Session.prompt_logprobs`."""
        return self._session.prompt_logprobs()

    async def accepted(self) -> None:
        """Wait until the engine has queued it, and has compiled its grammar if it has one.

        Raises:
            RequestError: the engine refuses the request.
            EngineDeadError: the engine died.
        """
        await self._accepted.wait()
        if next(iter(self.requests.values())).params.structured_outputs is not None:
            await self._news.wait()
        refusals = [one.error for one in self.requests.values() if one.error is not None and one.error.is_users]
        if self._failure is not None or refusals:
            self._client.leave(self)
            raise self._failure or refusals[0].error()

    async def deltas(self) -> AsyncGenerator[list[AnswerDelta]]:
        """What the answers gain, as it comes. A slow reader finds what came meanwhile in one piece.

        Raises:
            RequestError: what was asked for cannot be done after all.
            EngineDeadError: the engine died.
            StepgraphError: an answer failed by itself.
        """
        try:
            while not self._session.finished:
                await self._news.wait()
                self._news.clear()
                updates, self._updates = self._updates, []
                for update in updates:
                    end = None if update.finish_reason is None else FinishReason(update.finish_reason)
                    self._session.update(update.id, update.token_ids, end)
                deltas = self._session.deltas()
                if deltas:
                    yield deltas
                failed = next((one.error for one in self.requests.values() if one.error is not None), None)
                if failed is not None:
                    raise failed.error("the answer ended early: ")
                if self._failure is not None and not self._session.finished:
                    raise self._failure
        finally:
            self._client.leave(self)

    def _end_early(self, request_id: str) -> None:
        """An answer ended at a stop string: what its request has beyond that counts for nothing."""
        request = self.requests[request_id]
        request.drop_tokens(len(request.output_token_ids) - self._session.num_tokens(request_id))
        self._client.abort((request_id,), FinishReason.STOP)

    def leave(self) -> None:
        """The reader has what it wants: what still runs ends."""
        self._client.leave(self)

    def move(self, client: RequestOwner) -> None:
        """For the client: this one has it from now on."""
        self._client, self.has_moved = client, True

    def accept(self) -> None:
        """For the client: the engine has queued it."""
        self._accepted.set()

    def take(self, update: TokenUpdate) -> None:
        """For the client: news from the engine."""
        self._updates.append(update)
        self._news.set()

    def fail(self, error: StepgraphError) -> None:
        """For the client: no more news will come."""
        self._failure = error
        self._accepted.set()
        self._news.set()

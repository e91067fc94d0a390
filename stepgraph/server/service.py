"""What all endpoints share: what the front knows of the model, the way into the engine, and the way back."""

from __future__ import annotations

import asyncio
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import UNSET, UnsetType

from stepgraph.config.server import ServerConfig
from stepgraph.engine.prompts import TokenizedPrompt, check_length, encode_text, require_tokenizer
from stepgraph.engine.sampling_params import SamplingParams, bad_word_token_ids
from stepgraph.engine.session import AnswerDelta
from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED, RequestError
from stepgraph.server.bodies import Bodies
from stepgraph.server.control import Control
from stepgraph.server.conversation import ChatForm
from stepgraph.server.counts import FrontCounts
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.errors import APIError, shortened
from stepgraph.server.generation import Generation, Origin
from stepgraph.server.protocol import CompletionRequest, SamplingFields, StreamOptions
from stepgraph.server.replicas import Replicas
from stepgraph.server.replies import CompletionTokensDetails, PromptTokensDetails, Usage
from stepgraph.transfer.reference import PARAM, Offer, read_params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

request_log = logging.getLogger("stepgraph.server.requests")
T = TypeVar("T")

_THREADS = 2
"""For tokenising and chat templates: beside each other, so that one long prompt does not hold up every short one."""


@dataclass(frozen=True)
class ServedModel:
    """What the front knows of the model."""

    name: str
    tokenizer: PreTrainedTokenizerFast | None
    chat_form: ChatForm
    sampling_defaults: Mapping[str, Any]
    """What the model's makers recommend; a request's own values go before."""

    longest_token: int
    """Characters of the vocabulary's longest token: no text has fewer tokens than its length over this."""


@dataclass(frozen=True)
class Context:
    """What an endpoint must know of the HTTP request beside its body."""

    request_id: str
    arrived_at: float
    """`time.monotonic()` seconds."""
    traceparent: str | None
    at_end: ExitStack
    """What runs when the HTTP request is over, however it ends."""
    prepared: Callable[[], None]
    """To be called when the engine has the prompt, and nothing more is to be made of the body."""


class Service:
    """The server without HTTP.

    Args:
        config: the server's settings.
        client: the engines.
        load_model: loads the model's tokenizer; takes seconds, and is called in a thread.
        control: the way to whoever owns the engines.
        adapters: folders of the LoRA adapters that requests can name; others change it.
        counts: what this front counts.
    """

    def __init__(
        self,
        config: ServerConfig,
        client: Replicas,
        load_model: Callable[[], ServedModel],
        control: Control,
        adapters: Mapping[str, str],
        counts: FrontCounts,
    ):
        self.config = config
        self.client = client
        self.control = control
        self.counts = counts
        self.started_at = int(time.time())
        self.adapters = adapters
        self.draining = False
        self._load_model = load_model
        self._model: ServedModel | None = None
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="stepgraph-tokenizer")
        self.bodies = Bodies(config, self.in_thread)

    async def load(self) -> None:
        """Load what the front needs of the model."""
        self._model = await self.in_thread(self._load_model)

    @property
    def model(self) -> ServedModel:
        """The model; a 503 while it is being loaded."""
        if self._model is None:
            raise APIError(503, "the model is being loaded", headers={"Retry-After": "2"})
        return self._model

    @property
    def chat_form(self) -> ChatForm:
        """How the model's chat template does things; a 503 while it is being loaded."""
        return self.model.chat_form

    @property
    def trouble(self) -> str | None:
        """Why requests are not served now; None if they are."""
        if self.draining:
            return "the server is shutting down"
        return self.client.rest.trouble or self.ailment

    @property
    def ailment(self) -> str | None:
        """What is wrong with the engine; None also if it only rests, or the server is shutting down."""
        if self.client.rest.sleep_level:
            return None
        if self._model is None and self.client.state is EngineState.READY:
            return "the model is being loaded"
        return self.client.trouble

    @property
    def fullness(self) -> str | None:
        """Why one more request would be refused; None if it would not."""
        if self.client.ready is not None and self.client.num_everybodys >= self._capacity:
            return f"the queue is full: {self.client.num_everybodys} requests run or wait"
        return None

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may give to the model itself, the first in its answers."""
        return self.config.served_model_name or (self.model.name,)

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together; a 503 while the engine is not there."""
        if self.client.ready is None:
            raise APIError(503, self.client.trouble or "the engine is not there", headers={"Retry-After": "2"})
        return self.client.ready.max_model_len

    @property
    def speculates(self) -> bool:
        """Whether the engine decodes speculatively."""
        return self.client.ready is not None and self.client.ready.max_drafts > 0

    def shut_down(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def choose_model(self, name: str | None) -> tuple[str, str | None]:
        """The model's name as answers give it, and the folder of its adapter if it is one; a 404 for an unknown name."""
        if name is None or name in self.model_names:
            return name or self.model_names[0], None
        if name not in self.adapters:
            known = shortened((*self.model_names, *self.adapters))
            raise APIError(
                404,
                f"the model {name!r:.200} is not served here; choose one of: {known}",
                param="model",
                code="model_not_found",
            )
        return name, self.adapters[name]

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Do what takes long without holding up the streams."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> TokenizedPrompt:
        """A text's tokens; a 400 if it cannot fit, which is seen without tokenising if it is far too long. For threads."""
        tokenizer = require_tokenizer(self.model.tokenizer)
        self._check_length(len(text))
        return TokenizedPrompt(text, encode_text(text, tokenizer, add_special_tokens=add_special_tokens))

    def check_turns(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """A 400 for a conversation that cannot fit, before it becomes a text: each turn is a token at least."""
        if len(messages) >= self.max_model_len:
            raise RequestError(
                f"the conversation has {len(messages)} turns, and max_model_len is {self.max_model_len}; shorten it",
                param="messages",
                code=CONTEXT_LENGTH_EXCEEDED,
            )
        self._check_length(sum(len(message.get("content") or "") for message in messages))

    def _check_length(self, num_characters: int) -> None:
        """A 400 for text of more tokens than the context holds, whatever they are."""
        least = num_characters // self.model.longest_token
        if least >= self.max_model_len:
            raise RequestError(
                f"the prompt has {num_characters} characters, which are at least {least} tokens, and max_model_len is "
                f"{self.max_model_len}; shorten it",
                param="prompt",
                code=CONTEXT_LENGTH_EXCEEDED,
            )

    def check_room(self, params: SamplingParams, *, num_prompts: int) -> None:
        """A 400 for more answers than the server gives to one request, a 429 if there is no room for them now, a 503 if
        requests are not served."""
        if params.n > self.config.max_n:
            raise RequestError(
                f"n={params.n} is above {self.config.max_n}, the most answers this server gives to a request", param="n"
            )
        self.check_queue(num_prompts * params.n)

    async def start(
        self,
        id: str,
        prompts: Sequence[TokenizedPrompt],
        params: SamplingParams,
        context: Context,
        *,
        request: SamplingFields,
        adapter: str | None,
    ) -> list[Generation]:
        """Send prompts to the engine and wait until it has queued them. What runs of them ends with the HTTP request, since a
        reply that is never begun ends nothing.

        Raises:
            APIError: 429 if too many wait already, 503 if the engine is not there.
            RequestError: the engine refuses one of them.
        """
        self.check_room(params, num_prompts=len(prompts))
        transfer = read_params(request.kv_transfer_params)
        if isinstance(transfer, Offer) and len(prompts) * params.n > 1:
            raise RequestError(
                f"{PARAM}: do_remote_decode is about one prompt and one answer, and the request has {len(prompts)} prompts and "
                f"n={params.n}; send a request for each",
                param=PARAM,
            )
        bad_words = None
        if params.bad_words:
            tokenizer = require_tokenizer(self.model.tokenizer)
            bad_words = await self.in_thread(lambda: bad_word_token_ids(params.bad_words, tokenizer))
            self.check_room(params, num_prompts=len(prompts))
        generations: list[Generation] = []
        for index, prompt in enumerate(prompts):
            prompt = self._cut(prompt, request.truncate_prompt_tokens)
            check_length(
                len(prompt.token_ids), self.max_model_len
            )  # before it becomes a message that the engine looks through
            generation = self.client.submit(
                id if len(prompts) == 1 else f"{id}-{index}",
                prompt._replace(cache_salt=request.cache_salt),
                params,
                self.model.tokenizer,
                priority=request.priority,
                adapter=adapter,
                bad_words=bad_words,
                session=request.prompt_cache_key,
                transfer=transfer,
                arrived_at=context.arrived_at,
                origin=Origin(
                    "text_completion" if isinstance(request, CompletionRequest) else "chat",
                    request.model or self.model_names[0],
                    id,
                    context.traceparent,
                ),
            )
            context.at_end.callback(generation.leave)
            generations.append(generation)
        context.prepared()
        for generation in generations:
            await generation.accepted()
        if self.config.log_requests:
            for generation in generations:
                request_log.info("request %s: %r, %s", context.request_id, generation.prompt.text, params)
        return generations

    def _cut(self, prompt: TokenizedPrompt, num_tokens: int | None) -> TokenizedPrompt:
        if num_tokens is None:
            return prompt
        if num_tokens == -1:
            num_tokens = self.max_model_len - 1
        if num_tokens < 1:
            raise RequestError(
                f"truncate_prompt_tokens={num_tokens} must be at least 1, or -1 for what fits",
                param="truncate_prompt_tokens",
            )
        if len(prompt.token_ids) <= num_tokens:
            return prompt
        return TokenizedPrompt(None, prompt.token_ids[-num_tokens:])

    @property
    def _capacity(self) -> int:
        """Requests that may run or wait at once."""
        return self.client.capacity + self.config.max_queue

    def check_queue(self, num_requests: int = 1) -> None:
        """A 429 if there is no room for so many answers now, a 503 if requests are not served."""
        if (trouble := self.trouble) is not None:
            raise APIError(503, trouble, headers={"Retry-After": "5"})
        most, unfinished = self._capacity, self.client.num_everybodys
        if num_requests > most:
            raise RequestError(
                f"the request asks for {num_requests} answers, and the server holds {most} at once; ask for fewer",
                param="n",
            )
        if unfinished + num_requests > most:
            retry_s = min(
                60, max(1, math.ceil(self.client.mean_request_s * self.config.max_queue / self.client.capacity / 2))
            )
            raise APIError(
                429,
                f"the queue is full: {unfinished} requests run or wait, and max_queue={self.config.max_queue} may wait; try "
                f"again in {retry_s} s",
                headers={"Retry-After": str(retry_s)},
            )


def new_id(prefix: str) -> str:
    """A name for what is about to be made, e.g. chatcmpl-…"""
    return f"{prefix}{uuid.uuid4().hex}"


class StreamedUsage:
    """Which events of a stream tell the token counts, as its request asks in stream_options."""

    def __init__(self, options: StreamOptions | None, usage: Callable[[], Usage]):
        self._usage = usage
        self._always = options is not None and options.continuous_usage_stats
        self.at_end = options is not None and options.include_usage
        """Whether a last event without choices tells them."""

    def of_chunk(self) -> Usage | UnsetType | None:
        """For an event with a piece of the answer: null tells that the counts are still to come."""
        return self._usage() if self._always else (None if self.at_end else UNSET)


class Tally:
    """Counts the tokens of a request while they come.

    Args:
        generations: its prompts being answered.
        thinks: tell how many tokens are reasoning.
        speculates: tell what came of proposals.
    """

    def __init__(self, generations: Sequence[Generation], *, thinks: bool, speculates: bool):
        self._generations = generations
        self._thinks = thinks
        self._speculates = speculates
        self.num_reasoning = 0
        self.num_completion = 0

    def add(self, deltas: Sequence[AnswerDelta]) -> None:
        """Count new tokens."""
        self.num_completion += sum(len(delta.token_ids) for delta in deltas)

    def usage(self) -> Usage:
        """The counts by now."""
        num_prompt = sum(len(generation.prompt.token_ids) for generation in self._generations)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self.num_completion,
            total_tokens=num_prompt + self.num_completion,
            prompt_tokens_details=PromptTokensDetails(sum(g.num_cached_tokens for g in self._generations)),
            completion_tokens_details=self._details(),
        )

    def _details(self) -> CompletionTokensDetails | UnsetType:
        if not (self._thinks or self._speculates):
            return UNSET
        details = CompletionTokensDetails(self.num_reasoning)
        if self._speculates:
            num_accepted = sum(generation.num_accepted_tokens for generation in self._generations)
            num_drafted = sum(generation.num_draft_tokens for generation in self._generations)
            details.accepted_prediction_tokens = num_accepted
            details.rejected_prediction_tokens = num_drafted - num_accepted
        return details


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, list[AnswerDelta]]]:
    """What several prompts' answers gain, with the prompt's number, as it comes. Leaving early aborts all.

    Raises:
        StepgraphError: an answer failed, see `Generation.deltas`; the others are aborted.
    """
    if len(generations) == 1:
        async with aclosing(generations[0].deltas()) as found:
            async for deltas in found:
                yield 0, deltas
        return
    queue: asyncio.Queue[tuple[int, list[AnswerDelta]] | Exception | None] = asyncio.Queue(maxsize=1)

    async def pump(index: int, generation: Generation) -> None:
        try:
            async with aclosing(generation.deltas()) as found:
                async for deltas in found:
                    await queue.put((index, deltas))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    async with _tasks([pump(index, generation) for index, generation in enumerate(generations)]):
        num_running = len(generations)
        while num_running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item


@asynccontextmanager
async def _tasks(work: Sequence[Any]) -> AsyncGenerator[None]:
    """Run coroutines beside the block; they end with it."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

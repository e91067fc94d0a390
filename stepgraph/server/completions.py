"""/v1/completions: prompts of text or token ids, continued."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from msgspec import UNSET, UnsetType

from stepgraph.engine.outputs import Logprob, TokenProbabilities
from stepgraph.engine.prompts import TokenizedPrompt, require_tokenizer
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta, TokenTexts
from stepgraph.errors import RequestError
from stepgraph.server.errors import APIError
from stepgraph.server.generation import Generation
from stepgraph.server.protocol import CompletionRequest, sampling_params
from stepgraph.server.replies import Completion, CompletionChoice, CompletionLogprobs, Usage, encode_json
from stepgraph.server.service import Context, Service, StreamedUsage, Tally, merged, new_id
from stepgraph.server.sse import DONE, event


class CompletionCall:
    """One call of /v1/completions that the engine has accepted."""

    def __init__(
        self,
        request: CompletionRequest,
        model: str,
        id: str,
        generations: Sequence[Generation],
        n: int,
        token_texts: TokenTexts,
        tally: Tally,
    ):
        self._request = request
        self._model = model
        self._id = id
        self._created = int(time.time())
        self._generations = generations
        self._n = n
        self._tally = tally
        self._choices = [_Choice(token_texts) for _ in range(n * len(generations))]

    @classmethod
    async def start(cls, request: CompletionRequest, service: Service, context: Context) -> CompletionCall:
        """Check a request and send it to the engine.

        Raises:
            APIError, RequestError: it cannot be answered.
        """
        if request.suffix:
            raise RequestError(
                "suffix is not supported: the model continues a text and fills no gaps; leave it unset", param="suffix"
            )
        if request.best_of is not None and request.best_of != (request.n or 1):
            raise RequestError(
                f"best_of={request.best_of} is not supported; use n, and choose among its answers", param="best_of"
            )
        if request.max_tokens == 0 and not request.echo:
            raise RequestError("max_tokens=0 asks for nothing; use at least 1, or set echo to true", param="max_tokens")
        model, adapter = service.choose_model(request.model)
        service.check_queue()  # before the work of preparing it
        params, prompts = await service.in_thread(lambda: _prepared(request, service))
        id = new_id("cmpl-")
        generations = await service.start(id, prompts, params, context, request=request, adapter=adapter)
        if request.echo:
            for generation in generations:
                if generation.prompt.text is None:
                    decode = partial(require_tokenizer(service.model.tokenizer).decode, generation.prompt.token_ids)
                    text = await service.in_thread(decode)
                    generation.prompt = generation.prompt._replace(text=text)
        tally = Tally(generations, thinks=False, speculates=service.speculates)
        return cls(request, model, id, generations, params.n, TokenTexts(service.model.tokenizer), tally)

    async def reply(self) -> bytes:
        """The whole answer, as JSON."""
        choices = [CompletionChoice(index, "") for index in range(len(self._choices))]
        pieces: list[list[str]] = [[] for _ in choices]
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                pieces[chunk.index].append(chunk.text)
                _join(choices[chunk.index], chunk)
        for choice, texts in zip(choices, pieces, strict=True):
            choice.text = "".join(texts)
        return self._encoded(choices, self._tally.usage())

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        usage = StreamedUsage(self._request.stream_options, self._tally.usage)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                yield event(self._encoded([chunk], usage.of_chunk()))
        if usage.at_end:
            yield event(self._encoded([], self._tally.usage()))
        yield DONE

    def _encoded(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> bytes:
        params = self._generations[0].kv_transfer_params if choices and choices[0].finish_reason else UNSET
        return encode_json(Completion(self._id, self._created, self._model, choices, usage, kv_transfer_params=params))

    def failed(self, failure: APIError) -> bytes:
        """The last event of a stream that breaks off."""
        return event(failure.body())

    async def _chunks(self) -> AsyncGenerator[CompletionChoice]:
        async with aclosing(merged(self._generations)) as found:
            async for number, deltas in found:
                if self._request.max_tokens != 0:
                    self._tally.add(deltas)
                for delta in deltas:
                    if self._tells_prompt(number, delta):  # which takes long if it is long
                        yield await asyncio.to_thread(self._choice, number, delta)
                    else:
                        yield self._choice(number, delta)

    def _tells_prompt(self, number: int, delta: AnswerDelta) -> bool:
        """Whether log-probabilities of the prompt's tokens go with the first piece of a choice, which this is."""
        request = self._request
        wants = request.prompt_logprobs is not None or (request.echo and request.logprobs is not None)
        return wants and not self._choices[number * self._n + delta.index].begun

    def _choice(self, number: int, delta: AnswerDelta) -> CompletionChoice:
        """What a choice gains."""
        request, generation = self._request, self._generations[number]
        index = number * self._n + delta.index
        state = self._choices[index]
        if request.max_tokens == 0:  # the one token that was computed is none of the answer's
            logprobs: list[TokenProbabilities] | None = None if delta.logprobs is None else []
            delta = AnswerDelta(delta.index, "", (), logprobs, delta.finish_reason and "length", None)
        is_first, state.begun = not state.begun, True
        echoed = (generation.prompt.text or "") if request.echo and is_first else ""
        choice = CompletionChoice(
            index=index,
            text=echoed + delta.text,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )
        if request.logprobs is not None:
            positions: list[tuple[int, TokenProbabilities | None]] = []
            if request.echo and is_first:
                prompt_logprobs = generation.prompt_logprobs() or [None] * len(generation.prompt.token_ids)
                positions += zip(generation.prompt.token_ids, prompt_logprobs, strict=True)
            positions += zip(delta.token_ids, delta.logprobs or (), strict=True)
            choice.logprobs = state.logprobs(positions, limit=request.logprobs)
        if request.return_token_ids:
            choice.token_ids = delta.token_ids
            if is_first:
                choice.prompt_token_ids = generation.prompt.token_ids
        if request.prompt_logprobs is not None and is_first:
            choice.prompt_logprobs = describe_prompt_logprobs(generation)
        return choice


class _Choice:
    """How far a choice has come."""

    def __init__(self, token_texts: TokenTexts) -> None:
        self.begun = False
        self._token_texts = token_texts
        self._offset = 0

    def logprobs(self, positions: Sequence[tuple[int, TokenProbabilities | None]], *, limit: int) -> CompletionLogprobs:
        found = CompletionLogprobs([], [], [], [])
        for token_id, probabilities in positions:
            if probabilities is None:  # the prompt's first token: nothing stands before it that could make it likely
                text = self._token_texts.text_of(token_id) or ""
                found.token_logprobs.append(None)
                found.top_logprobs.append(None)
            else:
                own = probabilities[token_id]
                text = own.decoded_token or ""
                found.token_logprobs.append(own.logprob)
                found.top_logprobs.append(_by_text(probabilities, own, limit))
            found.tokens.append(text)
            found.text_offset.append(self._offset)
            self._offset += len(text)
        return found


def _by_text(probabilities: TokenProbabilities, own: Logprob, limit: int) -> dict[str, float]:
    """Log-probabilities of the likeliest tokens and of the one that came. Of tokens with the same text, the likeliest counts."""
    found: dict[str, float] = {}
    for p in sorted(probabilities.values(), key=lambda p: p.rank):
        if p.rank <= limit or p is own:
            found.setdefault(p.decoded_token or "", p.logprob)
    return found


def describe_prompt_logprobs(generation: Generation) -> list[Mapping[str, Any] | None] | None:
    """Log-probabilities of the prompt's tokens by token id, as vLLM shapes them."""
    found = generation.prompt_logprobs()
    if found is None:
        return None
    return [
        None
        if position is None
        else {
            str(token): {"logprob": p.logprob, "rank": p.rank, "decoded_token": p.decoded_token}
            for token, p in position.items()
        }
        for position in found
    ]


def _join(choice: CompletionChoice, chunk: CompletionChoice) -> None:
    """Add what a chunk holds beside its text."""
    choice.finish_reason = chunk.finish_reason
    choice.stop_reason = chunk.stop_reason
    if chunk.logprobs is not None:
        if choice.logprobs is None:
            choice.logprobs = chunk.logprobs
        else:
            choice.logprobs.tokens += chunk.logprobs.tokens
            choice.logprobs.token_logprobs += chunk.logprobs.token_logprobs
            choice.logprobs.top_logprobs += chunk.logprobs.top_logprobs
            choice.logprobs.text_offset += chunk.logprobs.text_offset
    if chunk.token_ids is not UNSET:
        choice.token_ids = (() if choice.token_ids is UNSET else choice.token_ids) + chunk.token_ids
    if chunk.prompt_token_ids is not UNSET:
        choice.prompt_token_ids = chunk.prompt_token_ids
    if chunk.prompt_logprobs is not UNSET:
        choice.prompt_logprobs = chunk.prompt_logprobs


def _prompts_of(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, one by one."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise RequestError("prompt is an empty list; give at least one prompt", param="prompt")
    if isinstance(given[0], int):
        return [given]
    return list(given)


def _prepared(request: CompletionRequest, service: Service) -> tuple[SamplingParams, list[TokenizedPrompt]]:
    """What the engine is sent of a request. Takes milliseconds, or more if it is long."""
    params = sampling_params(
        request,
        service.model.sampling_defaults,
        max_tokens=1 if request.max_tokens == 0 else request.max_tokens,
        logprobs=request.logprobs,
        **({"prompt_logprobs": request.logprobs} if request.echo and request.logprobs is not None else {}),
    )
    given = _prompts_of(request.prompt)
    service.check_room(params, num_prompts=len(given))  # before the work of tokenising them all
    return params, [
        TokenizedPrompt(None, prompt)
        if isinstance(prompt, list)
        else service.encode(prompt, add_special_tokens=request.add_special_tokens)
        for prompt in given
    ]

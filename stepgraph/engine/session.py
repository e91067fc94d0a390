"""A prompt as its user sees it: tokens in, text out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from stepgraph.engine.detokenizer import Detokenizer, SpecialToken
from stepgraph.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenProbabilities
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import AnsweredRequest, FinishReason, TokenLogprobs
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.stop_strings import StopStrings
from stepgraph.engine.token_bytes import token_bytes
from stepgraph.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from stepgraph.engine.engine import Engine
    from stepgraph.models.adapters import AdapterFile

Abort = Callable[[str], object]
"""Ends the request of this id in the engine, if it still runs."""


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What an answer has gained since the last look."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: list[TokenProbabilities] | None  # one per new token, if asked for
    finish_reason: str | None  # as in `CompletionOutput`
    stop_reason: int | str | None
    specials: tuple[SpecialToken, ...] = ()
    """Special tokens among `token_ids`, which `text` leaves out; counted from the delta's beginning."""

    def parts(self) -> list[AnswerDelta]:
        """The same in parts, each with no special token but at its end."""
        parts = []
        text_start = token_start = 0
        for token_id, text_end, token_end in self.specials:
            special = SpecialToken(token_id, text_end - text_start, token_end - token_start)
            part = self._part(slice(text_start, text_end), slice(token_start, token_end))
            parts.append(replace(part, finish_reason=None, stop_reason=None, specials=(special,)))
            text_start, token_start = text_end, token_end
        rest = self._part(slice(text_start, None), slice(token_start, None))
        if not parts or rest.text or rest.token_ids or rest.finish_reason is not None:
            parts.append(rest)
        return parts

    def _part(self, text: slice, tokens: slice) -> AnswerDelta:
        logprobs = None if self.logprobs is None else self.logprobs[tokens]
        return replace(self, text=self.text[text], token_ids=self.token_ids[tokens], logprobs=logprobs, specials=())


class Session:
    """Joins a prompt with the text of its answers so far, one for each of its requests.

    Either give it each of the requests' updates, from any one thread, or `poll` it from the engine's thread. A session
    ends an answer at a stop string: it aborts the request and drops what still comes from it.
    """

    def __init__(
        self,
        requests: Sequence[AnsweredRequest],
        prompt: str | None,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        abort: Abort,
        id: str | None = None,
    ):
        """`id`: of the whole; default: the first request's."""
        self.requests = requests
        self.id = requests[0].id if id is None else id
        self._prompt = prompt
        self._prompt_token_ids = tuple(requests[0].prompt_token_ids)
        self._abort = abort
        self._token_texts = TokenTexts(tokenizer if requests[0].params.detokenize else None)
        self._answers = {
            request.id: Answer(index, request, tokenizer, self._token_texts) for index, request in enumerate(requests)
        }
        self._prompt_logprobs: list[TokenProbabilities | None] | None = None

    @classmethod
    def start(
        cls,
        engine: Engine,
        id: str,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        adapter: str | AdapterFile | None = None,
        bad_words: Sequence[Sequence[int]] | None = None,
        abort: Abort | None = None,
    ) -> Session:
        """Queue `params.n` requests for one prompt, or none. For the engine's thread.

        Answers i > 0 find the prompt in the prefix cache. `abort` is for sessions that get their updates in another thread.

        Raises:
            RequestError, ConfigError, EngineDeadError: as `Engine.add_request`.
        """
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"sampling_params={params!r:.80} must be SamplingParams, as SamplingParams(temperature=0)",
                param="sampling_params",
            )
        if not isinstance(priority, int):
            raise RequestError(f"priority={priority!r:.80} must be a whole number; lower runs first", param="priority")
        requests: list[AnsweredRequest] = []
        try:
            for request_id, one in split(id, params, engine.end_token_ids):
                requests.append(
                    engine.add_request(
                        request_id,
                        prompt.token_ids,
                        one,
                        priority=priority,
                        cache_salt=prompt.cache_salt,
                        adapter=adapter,
                        bad_words=bad_words,
                    )
                )
        except BaseException:
            for request in requests:
                engine.abort(request.id)
            raise
        return cls(requests, prompt.text, engine.tokenizer, abort=abort or engine.abort, id=id)

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return all(answer.finished for answer in self._answers.values())

    @property
    def may_stop_early(self) -> bool:
        """Whether an answer may end before its request, which takes an update or a poll."""
        return len(self.requests[0].params.stop) > 0

    def update(self, request_id: str, token_ids: Sequence[int], finish_reason: FinishReason | None) -> bool:
        """Take in a request's new tokens, and its end; False if that answer has ended already."""
        answer = self._answers[request_id]
        if answer.finished:
            return False
        self._take(answer, token_ids, finish_reason)
        return True

    def num_tokens(self, request_id: str) -> int:
        """Tokens of a request's answer by now; the request itself may be ahead."""
        return len(self._answers[request_id].token_ids)

    def deltas(self) -> list[AnswerDelta]:
        """What the answers have gained since the last call of this; those that gained nothing are left out."""
        return [delta for answer in self._answers.values() if (delta := answer.delta()) is not None]

    def prompt_logprobs(self) -> list[TokenProbabilities | None] | None:
        """Of the prompt's tokens, if they were asked for and the first answer has begun; None for the first token."""
        first = self.requests[0]
        if self._prompt_logprobs is None and first.params.prompt_logprobs is not None and first.output_token_ids:
            self._prompt_logprobs = [
                None if position is None else self._token_texts.describe(position) for position in first.prompt_logprobs
            ]
        return self._prompt_logprobs

    def poll(self) -> RequestOutput | None:
        """The answers so far, if one has grown or ended since the last call."""
        return self.output() if self.advance() else None

    def advance(self) -> bool:
        """Take in what the requests have by now; returns whether an answer has grown or ended."""
        changed = False
        for answer in self._answers.values():
            request = answer.request
            new = request.output_token_ids[len(answer.token_ids) :]
            if not answer.finished and (new or request.finish_reason is not None):
                self._take(answer, new, request.finish_reason)
                changed = True
        return changed

    def abort(self) -> None:
        """End what still runs of it in the engine."""
        for answer in self._answers.values():
            if not answer.finished:
                self._abort(answer.request.id)

    def output(self) -> RequestOutput:
        """The answers so far."""
        return RequestOutput(
            request_id=self.id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(answer.output() for answer in self._answers.values()),
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs(),
            num_cached_tokens=self.requests[0].num_cached_tokens,
        )

    def _take(self, answer: Answer, token_ids: Sequence[int], finish_reason: FinishReason | None) -> None:
        if answer.take(token_ids, finish_reason):
            self._abort(answer.request.id)


class _Given(NamedTuple):
    """How much of an answer its deltas have told."""

    text_end: int
    num_tokens: int
    finished: bool
    num_specials: int


class Answer:
    """One request's tokens, text and end."""

    def __init__(
        self, index: int, request: AnsweredRequest, tokenizer: PreTrainedTokenizerFast | None, token_texts: TokenTexts
    ):
        params = request.params
        self.request = request
        self.token_ids: list[int] = []
        self._index = index
        self._finish_reason: FinishReason | None = None
        self._stop_string: str | None = None
        self._text_end: int | None = None
        self._token_texts = token_texts
        self._logprobs: list[TokenProbabilities] | None = None if params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None and params.detokenize
            else None
        )
        self._stop_strings = StopStrings(params.stop) if params.stop else None
        self._output: CompletionOutput | None = None
        self._given = _Given(0, 0, False, 0)

    @property
    def finished(self) -> bool:
        return self._finish_reason is not None

    def take(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> bool:
        """Take in new tokens, and the request's end. Returns whether a stop string ended the answer before that."""
        self._output = None
        start = len(self.token_ids)
        with_text = token_ids[:-1] if self._hides_last(finish_reason) else token_ids
        if self._stop_strings is None or self._detokenizer is None:
            self.token_ids += token_ids
            if self._detokenizer is not None:
                self._detokenizer.append(with_text)
        else:
            for index, token_id in enumerate(token_ids):
                self.token_ids.append(token_id)
                if index < len(with_text) and self._find_stop(self._detokenizer.append((token_id,))):
                    break
        ended_early = self.finished
        if finish_reason is not None and not ended_early:
            self._finish_reason = finish_reason
            if self._detokenizer is not None:
                self._find_stop(self._detokenizer.finish())
        if self._logprobs is not None:
            for position in self.request.output_logprobs[start : len(self.token_ids)]:
                self._logprobs.append(self._token_texts.describe(position))
                self._cumulative_logprob += position.logprob
        return ended_early and finish_reason is None

    def output(self) -> CompletionOutput:
        """The answer so far."""
        fault = self.request.error
        self._output = self._output or CompletionOutput(
            index=self._index,
            text="" if self._detokenizer is None else self._detokenizer.text[: self._shown_end()],
            token_ids=tuple(self.token_ids),
            finish_reason=None if self._finish_reason is None else str(self._finish_reason),
            stop_reason=self._stop_reason(),
            logprobs=None if self._logprobs is None else list(self._logprobs),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            error=None if fault is None or self._finish_reason is not FinishReason.ERROR else fault.message,
            num_draft_tokens=self.request.num_draft_tokens,
            num_accepted_tokens=self.request.num_accepted(len(self.token_ids)),
            specials=self._specials_between(_Given(0, 0, False, 0), self._shown_end()),
        )
        return self._output

    def delta(self) -> AnswerDelta | None:
        """What the answer has gained since the last call, its end included; None if nothing."""
        given, text_end = self._given, self._shown_end()
        specials = self._specials_between(given, text_end)
        now = _Given(text_end, len(self.token_ids), self.finished, given.num_specials + len(specials))
        if now == given:
            return None
        self._given = now
        return AnswerDelta(
            index=self._index,
            text="" if self._detokenizer is None else self._detokenizer.text[given.text_end : text_end],
            token_ids=tuple(self.token_ids[given.num_tokens :]),
            logprobs=None if self._logprobs is None else self._logprobs[given.num_tokens :],
            finish_reason=None if self._finish_reason is None else str(self._finish_reason),
            stop_reason=self._stop_reason(),
            specials=specials,
        )

    def _specials_between(self, given: _Given, text_end: int) -> tuple[SpecialToken, ...]:
        """Special tokens that deltas have not told, as far as the text is shown; counted from where the deltas are."""
        if self._detokenizer is None or len(self._detokenizer.specials) == given.num_specials:
            return ()
        return tuple(
            SpecialToken(token_id, end - given.text_end, max(0, num_tokens - given.num_tokens))
            for token_id, end, num_tokens in self._detokenizer.specials[given.num_specials :]
            if end <= text_end
        )

    def _hides_last(self, finish_reason: FinishReason | None) -> bool:
        """Whether the last token ends the answer without being a part of its text, as in vLLM."""
        request = self.request
        is_stop = finish_reason is FinishReason.STOP and request.stop_token is not None
        return is_stop and not request.params.include_stop_str_in_output

    def _find_stop(self, added: str) -> bool:
        """Search the text that was just added, and end the answer at a stop string in it."""
        if self._stop_strings is None:
            return False
        params = self.request.params
        match = self._stop_strings.feed(added, may_stop=len(self.token_ids) >= params.min_tokens)
        if match is None:
            return False
        self._finish_reason = FinishReason.STOP
        self._stop_string = match.string
        self._text_end = match.end if params.include_stop_str_in_output else match.start
        return True

    def _shown_end(self) -> int:
        """Length of the text without what may turn out to be the start of a stop string."""
        if self._detokenizer is None:
            return 0
        length = len(self._detokenizer.text)
        if self._text_end is not None:
            return self._text_end
        if self.finished or self._stop_strings is None or self.request.params.include_stop_str_in_output:
            return length
        return length - self._stop_strings.num_pending

    def _stop_reason(self) -> int | str | None:
        if self._stop_string is not None or self._finish_reason is not FinishReason.STOP:
            return self._stop_string
        stop_token = self.request.stop_token
        return stop_token if stop_token in self.request.params.stop_token_ids else None


class TokenTexts:
    """The text of single tokens, for the log-probabilities of one session."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None):
        self._backend = None if tokenizer is None else tokenizer.backend_tokenizer
        self._texts: dict[int, tuple[str | None, bytes | None]] = {}

    def describe(self, position: TokenLogprobs) -> TokenProbabilities:
        """The log-probabilities at one position, by token id."""
        found = {position.token: Logprob(position.logprob, position.rank, *self._spelled(position.token))}
        for rank, (token, logprob) in enumerate(position.top, start=1):
            found.setdefault(token, Logprob(logprob, rank, *self._spelled(token)))
        return found

    def text_of(self, token: int) -> str | None:
        """The text of one token by itself, special ones included; None without a tokenizer."""
        return self._spelled(token)[0]

    def _spelled(self, token: int) -> tuple[str | None, bytes | None]:
        """`Logprob.decoded_token` and `.decoded_bytes`."""
        if self._backend is None:
            return None, None
        if token not in self._texts:
            text = self._backend.decode([token], skip_special_tokens=False)
            name = self._backend.id_to_token(token) if "\ufffd" in text else None
            self._texts[token] = text, None if name is None else token_bytes(name, text)
        return self._texts[token]


def split(id: str, params: SamplingParams, end_token_ids: Collection[int]) -> list[tuple[str, SamplingParams]]:
    """Ids and parameters of the requests that give `params.n` answers; one of them reports on the prompt.

    `end_token_ids` are the model's. A request need not name them, and one that does learns no stop reason from them, as in vLLM.
    """
    if not params.ignore_eos and any(token in end_token_ids for token in params.stop_token_ids):
        others = tuple(token for token in params.stop_token_ids if token not in end_token_ids)
        params = replace(params, stop_token_ids=others)
    if params.n == 1:
        return [(id, params)]
    return [
        (
            f"{id}#{index}",
            replace(
                params,
                n=1,
                seed=None if params.seed is None else (params.seed + index) % 2**64,
                prompt_logprobs=None if index else params.prompt_logprobs,
            ),
        )
        for index in range(params.n)
    ]

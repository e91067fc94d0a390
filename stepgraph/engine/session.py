"""One request as its user sees it: tokens in, text out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stepgraph.engine.detokenizer import Detokenizer
from stepgraph.engine.outputs import CompletionOutput, RequestOutput
from stepgraph.engine.request import Request, RequestUpdate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Session:
    """Joins a request with its prompt's text and the text of its answer so far.

    Either give it each of the request's updates, or `poll` it from the engine's thread.
    """

    def __init__(self, request: Request, prompt: str | None, tokenizer: PreTrainedTokenizerFast | None):
        self.request = request
        self._prompt = prompt
        self._token_ids: list[int] = []
        self._ended = False
        self._detokenizer = (
            Detokenizer(tokenizer, skip_special_tokens=request.params.skip_special_tokens)
            if tokenizer is not None and request.params.detokenize
            else None
        )

    def update(self, update: RequestUpdate) -> RequestOutput:
        """Take in new tokens; returns the answer so far."""
        self._token_ids.extend(update.new_token_ids)
        self._ended = update.finish_reason is not None
        if self._detokenizer is not None:
            self._detokenizer.append(update.new_token_ids)
            if update.finish_reason is not None:
                self._detokenizer.finish()
        return self._output(self._detokenizer.text if self._detokenizer else "", update.finish_reason)

    def poll(self) -> RequestOutput | None:
        """The answer so far, if it has grown or ended since the last call."""
        request = self.request
        new = tuple(request.output_token_ids[len(self._token_ids) :])
        if self._ended or (not new and request.finish_reason is None):
            return None
        return self.update(RequestUpdate(request, new, request.finish_reason))

    def _output(self, text: str, finish_reason: str | None) -> RequestOutput:
        stop = self.request.stop_token if finish_reason is not None else None
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=tuple(self._token_ids),
            finish_reason=str(finish_reason) if finish_reason is not None else None,
            stop_reason=stop if stop in self.request.params.stop_token_ids else None,
        )
        return RequestOutput(
            request_id=self.request.id,
            prompt=self._prompt,
            prompt_token_ids=tuple(self.request.prompt_token_ids),
            outputs=(completion,),
            finished=finish_reason is not None,
        )

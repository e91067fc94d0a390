"""Which tokens each request may sample next: the host's side of token masks, from allowed tokens and grammars."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stepgraph.abi import slot_line
from stepgraph.config.guidance import GuidanceConfig
from stepgraph.engine.grammars import Grammars
from stepgraph.engine.guidance import Vocabulary, require_xgrammar
from stepgraph.engine.request import FinishReason, Request, RequestUpdate
from stepgraph.errors import RequestError

if TYPE_CHECKING:
    from stepgraph.engine.sampling_params import StructuredOutputs


class TokenMasks:
    """Masks of the requests that have one. Used by the engine's thread; grammars have processes of their own.

    Args:
        read_vocabulary: for grammars, when the first request needs it.
        vocab_size: V.
        max_drafts: most proposals of a step, K.
        config: how JSON is written.
        end_token_ids: tokens that end an answer.
    """

    def __init__(
        self,
        read_vocabulary: Callable[[], Vocabulary],
        vocab_size: int,
        max_drafts: int,
        config: GuidanceConfig,
        end_token_ids: Collection[int],
    ):
        self._config, self._end_token_ids = config, end_token_ids
        self.grammars = Grammars(read_vocabulary, vocab_size)
        self._max_drafts = max_drafts
        self._num_words = -(-vocab_size // slot_line.MASK_BITS)
        self._guided: dict[int, Request] = {}  # by their guides' numbers

    def start(self, request: Request, spec: StructuredOutputs) -> None:
        """Have a request's grammar compiled; it waits for `collect` until its first mask is there.

        Raises:
            ConfigError: xgrammar is not installed.
            RequestError: what it asks for cannot be written as JSON.
        """
        require_xgrammar()
        request.guide = self.grammars.follow(self._text_of(spec), request.output_token_ids)
        request.awaits_host = True
        self._guided[request.guide.number] = request

    def ask(self, request: Request) -> None:
        """A request's answer has grown: it waits for `collect` until there are masks for what comes next."""
        assert request.guide is not None
        self.grammars.ask(request.guide, request.draft_token_ids)

    def collect(self) -> list[Request]:
        """Let requests go that have got their masks; those that cannot go on have their `error` set. Waits a moment for masks
        that were asked for just now, so that their rows take part in the next step."""
        requests = []
        for guide in self.grammars.collect():
            request = self._guided.get(guide.number)
            if request is None:
                continue
            request.awaits_host = False
            if guide.error is not None:
                request.error = guide.error
            requests.append(request)
        return requests

    def follow(self, updates: Iterable[RequestUpdate], end: Callable[[str], object]) -> list[RequestUpdate]:
        """Move requests on in their grammars, which say later what may come next; what has become of their updates. `end` is
        told the id of a request whose grammar has ended while it goes on."""
        return [update if update.request.guide is None else self._follow(update, end) for update in updates]

    def _follow(self, update: RequestUpdate, end: Callable[[str], object]) -> RequestUpdate:
        request, tokens = update.request, update.new_token_ids
        num_taken = _num_until_end(update, self._end_token_ids)
        if num_taken is not None:  # nothing may follow, not even a stop token
            request.drop_tokens(len(tokens) - num_taken)
            if update.finish_reason is not None:
                request.finish_reason, request.stop_token, request.error = FinishReason.STOP, None, None
            else:
                end(request.id)
            update = RequestUpdate(request, tokens[:num_taken], FinishReason.STOP)
        if update.finish_reason is None:
            self.ask(request)
        else:
            self.drop(request)
        return update

    def drop(self, request: Request) -> None:
        """The request has ended."""
        if request.guide is not None and self._guided.pop(request.guide.number, None) is not None:
            self.grammars.drop(request.guide)

    def masks(self, request: Request) -> npt.NDArray[np.int32]:
        """What the request may sample next, and after each of its proposals: [n, ceil(V / MASK_BITS)] int32, see
        `stepgraph.abi.slot_line.MASK_BITS`. Without a grammar that holds for all its steps, and n = 1 + K."""
        if request.guide is None:
            masks = np.full((1 + self._max_drafts, self._num_words), -1, dtype=np.int32)
        else:
            assert request.guide.masks is not None
            assert not request.guide.is_waiting
            masks = request.guide.masks[: 1 + len(request.draft_token_ids)]
        if request.params.allowed_token_ids is not None:
            masks = masks & pack_tokens(request.params.allowed_token_ids, self._num_words)
        return masks

    def shutdown(self) -> None:
        """End the processes of grammars."""
        self.grammars.shut_down()

    def _text_of(self, spec: StructuredOutputs) -> str:
        """One text for all that ask the same."""
        given = {name: value for name, value in vars(spec).items() if value not in (None, False)}
        if self._config.disable_any_whitespace:
            given["disable_any_whitespace"] = True
        try:
            return json.dumps(given, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            where = f"structured_outputs.{next(iter(given))}"
            raise RequestError(f"{where} is not JSON: {error}", param=where) from error


def _num_until_end(update: RequestUpdate, end_token_ids: Collection[int]) -> int | None:
    """After how many of its new tokens a request's grammar has ended; None if it goes on. It ends with the first end token, which
    is sampled where the answer is complete only."""
    # What ended on the device ended at its last token, or failed after it, unless the grammar ends before that.
    num_inside = len(update.new_token_ids) - (update.finish_reason in (FinishReason.STOP, FinishReason.LENGTH))
    tokens = update.new_token_ids[:num_inside]
    return next((place for place, token in enumerate(tokens, 1) if token in end_token_ids), None)


def pack_tokens(tokens: Iterable[int], num_words: int) -> npt.NDArray[np.int32]:
    """The mask that allows just these tokens."""
    bits = np.zeros(num_words * slot_line.MASK_BITS, dtype=np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)

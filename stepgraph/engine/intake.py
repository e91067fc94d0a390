"""What becomes of a request before it waits: its parameters in the form that the device wants, or the refusal of them."""

from __future__ import annotations

import random
import secrets
import struct
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from numbers import Integral
from typing import TYPE_CHECKING

from stepgraph.abi import slot_line
from stepgraph.engine.adapters import Adapter, AdapterTable
from stepgraph.engine.blocks import memory_key
from stepgraph.engine.prompts import check_length
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams, bad_word_token_ids
from stepgraph.errors import RequestError
from stepgraph.models.adapters import AdapterFile
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.transfer.reference import Offer, Reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RequestIntake:
    """Makes requests of what users ask for. Belongs to the engine's thread.

    Args:
        adapters: None if the engine takes none.
        vocab_size, max_model_len: of the model.
        media_token_ids: in whose place the model would take images, sound or video.
        end_token_ids: tokens that end an answer.
        read_tokenizer: for bad words that nobody made tokens of; ConfigError if the model has none.
        seed: of the seeds of requests that bring none.
    """

    def __init__(
        self,
        adapters: AdapterTable | None,
        *,
        vocab_size: int,
        max_model_len: int,
        media_token_ids: tuple[int, ...],
        end_token_ids: tuple[int, ...],
        read_tokenizer: Callable[[], PreTrainedTokenizerFast],
        seed: int,
    ):
        self._adapters = adapters
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._end_token_ids = end_token_ids
        self._media_token_ids = frozenset(media_token_ids)
        self._read_tokenizer = read_tokenizer
        self._seeds = random.Random(seed)
        self._secret = secrets.token_bytes(16)

    def take(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        priority: int,
        cache_salt: str | None,
        adapter: str | AdapterFile | None,
        adapters_in_use: Callable[[], Collection[Adapter]],
        bad_words: Sequence[Sequence[int]] | None,
        transfer: Offer | Reference | None,
    ) -> Request:
        """A request; see `Engine.add_request`. `adapters_in_use` gives those of unfinished requests."""
        assert params.n == 1, params.n
        packed = self._pack("prompt", prompt_token_ids)
        prompt = packed.tolist()  # whatever kind of integers they were
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token", param="prompt")
        if not self._media_token_ids.isdisjoint(prompt):
            media = next(token_id for token_id in prompt if token_id in self._media_token_ids)
            raise RequestError(
                f"the prompt has token id {media}, in whose place this model takes an image, sound or video, and here it takes "
                "text only; leave it out",
                param="prompt",
            )
        for name, token_ids in (("allowed_token_ids", params.allowed_token_ids), ("logit_bias", params.logit_bias)):
            if token_ids:
                self._pack(name, token_ids)
        check_length(len(prompt), self._max_model_len)
        room = self._max_model_len - len(prompt)
        if params.min_tokens > room:
            raise RequestError(
                f"min_tokens={params.min_tokens} is above the {room} tokens of answer that max_model_len={self._max_model_len} "
                f"leaves after a prompt of {len(prompt)}; lower min_tokens or shorten the prompt",
                param="min_tokens",
            )
        if params.bad_words and bad_words is None:
            bad_words = bad_word_token_ids(params.bad_words, self._read_tokenizer())
        sampling, loaded, memory_salt = self._sampling_of(params, bad_words or ()), None, cache_salt
        if adapter is not None:
            loaded = self.adapters_for(adapter).load(adapter, adapters_in_use())
            sampling = replace(sampling, adapter=loaded.number)
            memory_salt = f"{loaded.key} {cache_salt or ''}"  # its answers are not those of the model alone
        if memory_salt is not None:
            sampling = replace(sampling, memory_key=memory_key(memory_salt, self._secret))
        return Request(
            id=request_id,
            prompt_token_ids=prompt,
            params=params,
            max_length=len(prompt) + min(params.max_tokens or room, room),
            sampling=sampling,
            packed_prompt=packed,
            variant=params.variant,
            priority=priority,
            cache_salt=cache_salt,
            adapter=loaded,
            transfer=transfer,
            prompt_logprobs=[] if params.prompt_logprobs is None else [None] * len(prompt),
        )

    def loaded_adapters(self) -> tuple[str, ...]:
        """Folders of the LoRA adapters that a request can use without reading them; none if the engine takes none."""
        return () if self._adapters is None else self._adapters.folders

    def adapters_for(self, wanted: str | AdapterFile) -> AdapterTable:
        """Where a LoRA adapter is held; RequestError if the engine takes none."""
        if self._adapters is None:
            folder = wanted if isinstance(wanted, str) else wanted.folder
            raise RequestError(
                f"the request names the LoRA adapter {folder}, and the engine takes none; start it with enable_lora=True",
                param="adapter",
            )
        return self._adapters

    def _sampling_of(self, params: SamplingParams, bad_words: Sequence[Sequence[int]]) -> SlotSampling:
        """Sampling parameters as the device wants them."""
        stop_token_ids = tuple(
            dict.fromkeys((() if params.ignore_eos else self._end_token_ids) + params.stop_token_ids)
        )
        if len(stop_token_ids) > slot_line.MAX_STOP_TOKENS:
            raise RequestError(
                f"{len(stop_token_ids)} stop tokens, the model's end tokens included; at most "
                f"{slot_line.MAX_STOP_TOKENS} fit",
                param="stop_token_ids",
            )
        return SlotSampling(
            seed=params.seed if params.seed is not None else self._seeds.getrandbits(64),
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            stop_token_ids=stop_token_ids,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            min_tokens=params.min_tokens,
            logit_bias=tuple((params.logit_bias or {}).items()),
            bad_words=tuple(tuple(word) for word in bad_words),
            masked=params.allowed_token_ids is not None or params.structured_outputs is not None,
            num_logprobs=0 if params.logprobs is None else 1 + params.logprobs,
            num_prompt_logprobs=0 if params.prompt_logprobs is None else 1 + params.prompt_logprobs,
            max_num_drafts=params.max_num_drafts,
        )

    def _pack(self, name: str, token_ids: Collection[int]) -> array[int]:
        """Token ids as int32; RequestError if one is outside the vocabulary. `name` is that of what holds them."""
        vocab_size = self._vocab_size
        try:
            packed = struct.pack(f"{len(token_ids)}I", *token_ids)  # in half the time of array("i", token_ids)
            if max(token_ids, default=0) < vocab_size:
                return array("i", packed)
        except (struct.error, TypeError):  # what is no whole number, below 0 or beyond 32 bits
            pass
        wrong = next(t for t in token_ids if not (isinstance(t, Integral) and 0 <= int(t) < vocab_size))
        raise RequestError(
            f"{name}: token id {wrong!r:.80} is outside the vocabulary of {vocab_size} tokens; ids go up to {vocab_size - 1}",
            param=name,
        )

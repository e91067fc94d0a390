"""Turning tokens into text as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Detokenizer:
    """The text of one answer; grows only by whole characters.

    A character whose bytes are spread over several tokens appears with the last of them. Bytes that never complete a
    character appear as U+FFFD when the answer ends.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, skip_special_tokens: bool):
        self.text = ""
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._token_ids: list[int] = []

    def append(self, token_ids: Iterable[int]) -> str:
        """Take in tokens; returns the text they add, which may be empty."""
        added = ""
        for token_id in token_ids:
            self._token_ids.append(token_id)
            added += self._stream.step(self._backend, token_id) or ""
        self.text += added
        return added

    def finish(self) -> str:
        """The answer ended; returns what was held back."""
        whole = self._backend.decode(self._token_ids, skip_special_tokens=self._skip_special_tokens)
        held_back = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += held_back
        return held_back

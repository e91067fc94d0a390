"""Turning tokens into text as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_REPLACEMENT = "\ufffd"
_MAX_HELD_BACK = 64  # tokens; a character has four bytes at most


class SpecialToken(NamedTuple):
    """A special token that a text leaves out, and where it stands."""

    token_id: int
    text_end: int
    """Characters of the text before it."""
    num_tokens: int
    """Tokens up to it, itself included."""


class Detokenizer:
    """The text of one answer; grows only by whole characters.

    A character whose bytes are spread over several tokens appears with the last of them. Bytes that never complete a
    character appear as U+FFFD, at the latest when the answer ends.

    What a token adds depends on those before it, so a window of the last tokens is decoded and compared with what was
    shown of it. What has been shown stays, even where a tokenizer would decode all tokens at once to something else: a
    sentencepiece tokenizer takes back the characters just before an invalid byte.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, skip_special_tokens: bool):
        self.text = ""
        self.specials: list[SpecialToken] = []
        """Those that the text leaves out. One that comes amid a character stands before that."""
        self._num_tokens = 0
        self._backend = tokenizer.backend_tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []
        self._num_context = 0  # tokens at the window's start whose text is complete
        self._shown = ""  # what of the window's text is shown

    def append(self, token_ids: Iterable[int]) -> str:
        """Take in tokens; returns the text they add, which may be empty."""
        added = ""
        for token_id in token_ids:
            added += self._take(token_id, len(self.text) + len(added))
        self.text += added
        return added

    def finish(self) -> str:
        """The answer ended; returns what was held back."""
        added = self._show(self._decode(self._window), complete=True)
        self.text += added
        return added

    def _take(self, token_id: int, length: int) -> str:
        """The text that a token adds to one of this length."""
        self._num_tokens += 1
        self._window.append(token_id)
        text = self._decode(self._window)
        is_unfinished = text.endswith(_REPLACEMENT)
        if (text == self._shown or is_unfinished) and self._has_no_text(token_id):
            self._window.pop()
            self.specials.append(SpecialToken(token_id, length, self._num_tokens))
            return ""
        held_back = len(self._window) - self._num_context
        return self._show(text, complete=not is_unfinished or held_back > _MAX_HELD_BACK)

    def _show(self, text: str, *, complete: bool) -> str:
        """Show what is certain of the window's text: all of it, or all but the bytes at its end."""
        certain = text if complete else text.rstrip(_REPLACEMENT)
        added = ""
        if certain.startswith(self._shown):
            added = certain[len(self._shown) :]
            self._shown = certain
        elif complete:
            added = self._decode(self._window[self._num_context :])
        if complete:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._shown = self._decode(self._window)
        return added

    def _has_no_text(self, token_id: int) -> bool:
        """Whether a token is special and skipped, or none of the tokenizer's. A space at the start of a text is neither, though
        it adds nothing: what follows it is decoded differently."""
        if self._backend.id_to_token(token_id) is None:
            return True
        return self._skip_special_tokens and self._decode([token_id]) != self._backend.decode(
            [token_id], skip_special_tokens=False
        )

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens))

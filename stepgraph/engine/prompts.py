"""What users may give as a prompt, and its one inner form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED, ConfigError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; a dict may have a ``"cache_salt"``."""


_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


class TokenizedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    text: str | None  # if it was given as text
    token_ids: list[int]
    cache_salt: str | None = None  # only prompts of the same salt share cached prefixes


def tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerFast | None) -> TokenizedPrompt:
    """The inner form of a prompt.

    Raises:
        RequestError: the prompt is none of the accepted forms.
    """
    cache_salt = None
    if isinstance(prompt, Mapping):
        cache_salt = prompt.get("cache_salt")
        if not (cache_salt is None or (isinstance(cache_salt, str) and cache_salt)):
            raise RequestError(
                f"cache_salt={cache_salt!r:.80} must be a text that is not empty, or None", param="cache_salt"
            )
        if not prompt.keys() & {"prompt", "prompt_token_ids"}:
            raise RequestError(
                f"a prompt given as a dict needs 'prompt' or 'prompt_token_ids', not {sorted(prompt)}", param="prompt"
            )
        unknown = [name for name, value in prompt.items() if name not in _KEYS and value is not None]
        if unknown:  # images, say, of which the answer would know nothing
            raise RequestError(
                f"a prompt given as a dict has no {unknown[0]!r} here; it may have {', '.join(map(repr, _KEYS))}",
                param="prompt",
            )
        if "prompt_token_ids" in prompt:
            return TokenizedPrompt(prompt.get("prompt"), list(prompt["prompt_token_ids"]), cache_salt)
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return TokenizedPrompt(prompt, encode_text(prompt, tokenizer), cache_salt)
    if isinstance(prompt, Sequence):
        token_ids = [token for token in prompt if isinstance(token, int)]
        if len(token_ids) == len(prompt):
            return TokenizedPrompt(None, token_ids, cache_salt)
    raise RequestError(f"a prompt is text or a list of token ids, not {type(prompt).__name__}", param="prompt")


def encode_text(text: str, tokenizer: PreTrainedTokenizerFast | None, *, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text.

    Raises:
        RequestError: the text holds half a surrogate pair.
    """
    tokenizer = require_tokenizer(tokenizer)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the prompt has {text[error.start]!r} at character {error.start}, half a surrogate pair, which is no text; "
            "leave it out",
            param="prompt",
        ) from error
    # transformers would warn of indexing errors where a text is too long; it is refused, by who knows the engine's limit
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))


def require_tokenizer(tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast:
    """The tokenizer, or a ConfigError that says what to do without one."""
    if tokenizer is None:
        raise ConfigError("this model comes without a tokenizer; give prompts as token ids", param="prompt")
    return tokenizer


def check_length(num_tokens: int, max_model_len: int) -> None:
    """RequestError for a prompt of so many tokens if it leaves no room for an answer."""
    if num_tokens >= max_model_len:
        raise RequestError(
            f"the prompt has {num_tokens} tokens and max_model_len is {max_model_len}, which must hold the prompt and at least "
            f"one token of answer; shorten it to {max_model_len - 1} tokens or fewer",
            param="prompt",
            code=CONTEXT_LENGTH_EXCEEDED,
        )

"""What users may give as a prompt, and its one inner form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from stepgraph.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, ``{"prompt": text}`` or ``{"prompt_token_ids": ids}``; a dict may have a ``"cache_salt"``."""
Message: TypeAlias = Mapping[str, Any]
"""``{"role": ..., "content": ...}``."""


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
            raise RequestError(f"cache_salt={cache_salt!r} must be a text that is not empty, or None")
        if "prompt_token_ids" in prompt:
            return TokenizedPrompt(prompt.get("prompt"), list(prompt["prompt_token_ids"]), cache_salt)
        if "prompt" not in prompt:
            raise RequestError(f"a prompt given as a dict needs 'prompt' or 'prompt_token_ids', not {sorted(prompt)}")
        prompt = prompt["prompt"]
    if isinstance(prompt, str):
        return TokenizedPrompt(prompt, list(require_tokenizer(tokenizer).encode(prompt)), cache_salt)
    if isinstance(prompt, Sequence):
        token_ids = [token for token in prompt if isinstance(token, int)]
        if len(token_ids) == len(prompt):
            return TokenizedPrompt(None, token_ids, cache_salt)
    raise RequestError(f"a prompt is text or a list of token ids, not {type(prompt).__name__}")


def render_chat(messages: Sequence[Message], tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
    """The prompt of a conversation, text and token ids, up to where the assistant's answer starts.

    The template writes the special tokens itself, so the tokenizer must not add its own.

    Raises:
        RequestError: the messages do not fit the model's chat template, or it has none.
    """
    tokenizer = require_tokenizer(tokenizer)
    if not tokenizer.chat_template:
        raise RequestError("this model has no chat template; use generate with the whole prompt as text")
    try:
        text = str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except Exception as error:
        raise RequestError(f"the messages do not fit the model's chat template: {error}") from error
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def require_tokenizer(tokenizer: PreTrainedTokenizerFast | None) -> PreTrainedTokenizerFast:
    """The tokenizer, or a ConfigError that says what to do without one."""
    if tokenizer is None:
        raise ConfigError("this model comes without a tokenizer; give prompts as token ids")
    return tokenizer

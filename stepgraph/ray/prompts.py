"""What a router reads of a request's body, which nobody has tokenised.

Four bytes of a prompt's text stand for a token, which is about what one of English has. Prompts that share a beginning share
those.
"""

from __future__ import annotations

from typing import Any

import msgspec

_BYTES_PER_TOKEN = 4


class _Fields(msgspec.Struct):
    """Of requests of all APIs, what their prompts begin with, and what says more about where they belong."""

    model: Any = None
    prompt: Any = None
    tools: msgspec.Raw = msgspec.Raw(b"")
    system: msgspec.Raw = msgspec.Raw(b"")
    instructions: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")
    cache_salt: Any = None
    prompt_cache_key: Any = None


class Prompt(msgspec.Struct):
    """What a request's body says about where it belongs."""

    token_ids: list[int]
    """Those of its first prompt, or four bytes of text for each."""
    model: str
    salt: str | None = None
    session: str | None = None


def prompt_of(body: bytes) -> Prompt:
    """Read a body. One that is no request has no prompt: its replica says why."""
    try:
        fields = msgspec.json.decode(body, type=_Fields)
    except (msgspec.DecodeError, RecursionError):
        return Prompt([], "")
    given = fields.prompt
    if isinstance(given, list) and given and not isinstance(given[0], int):
        given = given[0]
    if isinstance(given, list) and all(isinstance(token, int) for token in given):
        token_ids = given
    elif isinstance(given, str):
        token_ids = _pretended(given.encode("utf-8", "replace"))
    else:
        parts = (fields.tools, fields.system, fields.instructions, fields.messages, fields.input)
        token_ids = _pretended(b"".join(bytes(part) for part in parts))
    return Prompt(token_ids, str(fields.model or ""), _text(fields.cache_salt), _text(fields.prompt_cache_key))


def _pretended(text: bytes) -> list[int]:
    whole = len(text) - len(text) % _BYTES_PER_TOKEN
    return memoryview(text[:whole]).cast("I").tolist()


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None

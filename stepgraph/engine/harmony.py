"""Harmony, the format of gpt-oss: special tokens around messages, of which each has a channel and may have a recipient.

An answer goes on behind ``<|start|>assistant`` with messages like ``<|channel|>analysis<|message|>text<|end|>``, each but the
first behind ``<|start|>assistant`` again. The channels are ``analysis``, what the model thinks, ``commentary``, what it says
while it works, and ``final``. A call of a function is a message ``to=functions.NAME``, which stands before ``<|channel|>`` or
behind the channel's name; ``<|constrain|>`` may announce the type of its text. ``<|call|>`` ends it and the turn, ``<|return|>``
the final message and the turn.
See https://developers.openai.com/cookbook/articles/openai-harmony.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stepgraph.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class HarmonyTokens(NamedTuple):
    """Ids of the special tokens."""

    start: int
    channel: int
    constrain: int
    message: int
    end: int
    return_: int
    call: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast | None) -> HarmonyTokens | None:
        """A tokenizer's; None if it lacks one of them, or has it as plain text."""
        if tokenizer is None:
            return None
        special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        found = [special.get(spelling) for spelling in SPELLINGS]
        return None if None in found else cls(*(id for id in found if id is not None))

    @classmethod
    def written(cls, tokenizer: PreTrainedTokenizerFast | None, template: str) -> HarmonyTokens | None:
        """As `of`, if a chat template writes the format."""
        return cls.of(tokenizer) if _CHANNEL in template else None


SPELLINGS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
"""Of the tokens of `HarmonyTokens`, in its order."""
NAMESPACE = "functions."
"""Before the name of a function that a message is for."""
_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}


def known_effort(effort: str) -> str:
    """How long the model is to think, in the words that it knows: low, medium or high. Of others that clients send, the nearest.

    Raises:
        RequestError: it is none of those.
    """
    known = _EFFORTS.get(effort, effort)
    if known not in ("low", "medium", "high"):
        raise RequestError(
            f"reasoning_effort={effort!r:.80} is not known to the model; use low, medium or high",
            param="reasoning_effort",
        )
    return known


class Place(NamedTuple):
    """Where a prompt ends, and an answer goes on."""

    is_in_message: bool
    """Behind `<|start|>`, and before the end of that message."""
    channel: str | None
    """Of the message whose text has begun; "" if it names none, None if there is no such message."""

    @classmethod
    def behind(cls, prompt: str) -> Place:
        """The place behind a rendered prompt, whose spellings of special tokens are read as such wherever they stand."""
        _, mark, message = prompt.rpartition(_START)
        if not mark or any(end in message for end in _ENDS):
            return cls(False, None)
        header, mark, _ = message.partition(_MESSAGE)
        channel = header.partition(_CHANNEL)[2].split()
        return cls(True, (channel[0] if channel else "") if mark else None)


_START, _CHANNEL, _, _MESSAGE, *_ENDS = SPELLINGS

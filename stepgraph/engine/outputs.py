"""What users get back, shaped as vLLM's outputs so that code moves over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from stepgraph.engine.detokenizer import SpecialToken


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was, by the model's raw logits."""

    logprob: float
    """Natural logarithm of its probability, from -inf to 0."""
    rank: int
    """1 is the most likely token."""
    decoded_token: str | None
    """Its text; None if nobody wants text."""
    decoded_bytes: bytes | None = None
    """Its bytes, if these are no whole characters, which `decoded_token` shows as U+FFFD; else None."""


TokenProbabilities: TypeAlias = dict[int, Logprob]
"""At one position: the token that is there, then the most likely ones, by token id."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt, complete or as far as it has come."""

    index: int
    """Which of the `n` answers it is, from 0 up."""
    text: str
    """Empty with `detokenize=False`."""
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    """`stop`, `length`, `abort` or `error`; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token or string that ended it, if not the model's end token."""
    logprobs: list[TokenProbabilities] | None = None
    """One per token, if asked for."""
    cumulative_logprob: float | None = None
    """Sum over the answer's tokens, with `logprobs`."""
    error: str | None = None
    """What went wrong, with finish_reason `error`."""
    num_draft_tokens: int = 0
    """Proposals of speculative decoding that were verified for it."""
    num_accepted_tokens: int = 0
    """Of these, those that are among `token_ids`."""
    specials: tuple[SpecialToken, ...] = ()
    """Tokens that `text` leaves out, and where in it they stand."""

    @property
    def finished(self) -> bool:
        """Whether it is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    """The same in all outputs of a request."""
    prompt: str | None
    """Its text, if it was given as text."""
    prompt_token_ids: tuple[int, ...]
    """What the model reads."""
    outputs: tuple[CompletionOutput, ...]
    """The answers, by index: `SamplingParams.n` of them."""
    finished: bool
    """Whether all answers are complete."""
    prompt_logprobs: list[TokenProbabilities | None] | None = None
    """One per prompt token, None for the first; if asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens whose computation the prefix cache saved the first answer."""

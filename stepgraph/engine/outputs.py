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
    rank: int  # 1 is the most likely token
    decoded_token: str | None  # None if nobody wants text
    decoded_bytes: bytes | None = None  # if these are no whole characters, which `decoded_token` shows as U+FFFD


TokenProbabilities: TypeAlias = dict[int, Logprob]
"""At one position: the token that is there, then the most likely ones, by token id."""


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt, complete or as far as it has come."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "abort", "error"; None while it runs
    stop_reason: int | str | None = None  # the stop token or string that ended it, if not the model's end token
    logprobs: list[TokenProbabilities] | None = None  # one per token, if asked for
    cumulative_logprob: float | None = None  # sum over the answer's tokens, with `logprobs`
    error: str | None = None  # what went wrong, with finish_reason "error"
    num_draft_tokens: int = 0  # proposals of speculative decoding that were verified for it
    num_accepted_tokens: int = 0  # of these, those that are among `token_ids`
    specials: tuple[SpecialToken, ...] = ()  # tokens that `text` leaves out, and where in it they stand

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its answers."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    prompt_logprobs: list[TokenProbabilities | None] | None = (
        None  # one per prompt token, None for the first; if asked for
    )
    num_cached_tokens: int = 0  # prompt tokens whose computation the prefix cache saved the first answer

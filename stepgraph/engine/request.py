"""One request, from arrival to its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from stepgraph.engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, in the words of the OpenAI API (`abort` and `error` are ours)."""

    STOP = "stop"  # a stop token or stop string
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"
    ERROR = "error"  # see `Request.error`


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position, of the model's raw logits."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...]  # (token, log-probability), most likely first


@dataclass
class Request:
    """What a user asked for, and how far it has come. The device has its own view in SlotState."""

    id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    stop_token_ids: Sequence[int]
    max_length: int
    """Tokens of prompt and answer at which it ends."""
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    output_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One per output token if `params.logprobs` is set, else empty."""
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    """If `params.prompt_logprobs` is set: None for the first prompt token, then one per further prompt token."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token it ended on, also the last of `output_token_ids`."""
    error: str | None = None
    """What went wrong, if it ended with `FinishReason.ERROR`."""

    slot: int | None = None
    """Index of its device-side state while it runs."""
    generation: int = 0
    planned: int = 0
    """Tokens whose computation is planned: the device has computed these, or will before anything planned later."""
    blocks: list[int] = field(default_factory=list)
    """KV blocks granted, in order."""

    @property
    def prompt_len(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(frozen=True)
class RequestUpdate:
    """A token of a request, or its end."""

    request: Request
    new_token_ids: tuple[int, ...]
    finish_reason: FinishReason | None

"""What users get back, shaped as vLLM's outputs so that code moves over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CompletionOutput:
    """One answer to a prompt, complete or as far as it has come."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None  # "stop", "length", "abort"; None while it runs
    stop_reason: int | None = None  # the stop token that ended it, if not the model's end token
    logprobs: None = None
    cumulative_logprob: None = None

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

"""One request, from arrival to its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from stepgraph.engine.sampling_params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, in the words of the OpenAI API (`abort` is ours)."""

    STOP = "stop"  # a stop token
    LENGTH = "length"  # max_tokens or the end of the context
    ABORT = "abort"


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
    finish_reason: FinishReason | None = None
    stop_token: int | None = None
    """The stop token it ended on, also the last of `output_token_ids`."""

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

"""What a user may ask of one request's sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from stepgraph.errors import RequestError
from stepgraph.ops import slot_line

_NOT_YET: dict[str, Any] = {
    "n": 1,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "stop": None,
    "logit_bias": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "logprobs": None,
    "prompt_logprobs": None,
    "structured_outputs": None,
    "guided_decoding": None,
    "include_stop_str_in_output": False,
}
"""Fields that other engines have and this one refuses; each with the value that asks for nothing."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens. Names and defaults follow vLLM.

    Raises:
        RequestError: a value outside its range, or a field that is not supported yet.
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # keep the smallest set of tokens with this probability
    top_k: int = 0  # keep the k most likely tokens; 0 or -1 keeps all
    max_tokens: int | None = 16  # None: as many as fit the context
    seed: int | None = None  # None: chosen by the engine from its own seed
    stop_token_ids: tuple[int, ...] = ()  # the answer ends after one of these
    ignore_eos: bool = False  # do not end at the model's end token
    detokenize: bool = True
    skip_special_tokens: bool = True
    n: int = 1
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    stop: str | list[str] | None = None
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: object = None
    guided_decoding: object = None
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in _NOT_YET and value != _NOT_YET[f.name] and value not in ([], {}):
                raise RequestError(f"{f.name}={value!r} is not supported yet; leave it at {_NOT_YET[f.name]!r}")
        if self.stop_token_ids is None or isinstance(self.stop_token_ids, Iterable):
            object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        number = (int, float)
        self._require("temperature", _within(self.temperature, number, 0, 100), "between 0 (greedy) and 100")
        if self.temperature < 1e-5:  # logits divided by it would overflow; the limit is greedy
            object.__setattr__(self, "temperature", 0.0)
        self._require("top_p", _within(self.top_p, number, 0, 1) and self.top_p > 0, "above 0 and at most 1")
        self._require("top_k", _within(self.top_k, int, 0, 2**31 - 1), "0 or -1 (all tokens), or a positive count")
        self._require(
            "max_tokens", self.max_tokens is None or _within(self.max_tokens, int, 1, math.inf), "at least 1, or None"
        )
        self._require(
            "seed", self.seed is None or _within(self.seed, int, 0, 2**64 - 1), "between 0 and 2**64 - 1, or None"
        )
        self._require(
            "stop_token_ids",
            isinstance(self.stop_token_ids, tuple) and all(_within(t, int, 0, 2**31 - 1) for t in self.stop_token_ids),
            "token ids, which are whole numbers from 0 up",
        )
        if len(self.stop_token_ids) > slot_line.MAX_STOP_TOKENS:
            raise RequestError(
                f"stop_token_ids has {len(self.stop_token_ids)} entries; at most {slot_line.MAX_STOP_TOKENS} fit"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise RequestError(f"{name}={getattr(self, name)!r} must be {expected}")


def _within(value: Any, kind: type[Any] | tuple[type[Any], ...], low: float, high: float) -> bool:
    return isinstance(value, kind) and low <= value <= high

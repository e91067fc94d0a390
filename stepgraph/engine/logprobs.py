"""From the device's log-probability rings to a request's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepgraph.engine.request import Request, TokenLogprobs


@dataclass(frozen=True)
class PromptSpan:
    """Prompt tokens of one row whose log-probabilities a step reports."""

    request: Request
    generation: int
    first_line: int  # of the row's tokens in the step
    start: int  # position of its first token
    num_tokens: int


def add_logprobs(request: Request, tokens: Sequence[int], lines: npt.NDArray[np.int32] | None, first_line: int) -> None:
    """Note what a step reports of the tokens that a request gained in it, if it asked. `lines`: the step's report; the tokens'
    own lines begin at `first_line`."""
    count = request.sampling.num_logprobs
    if lines is not None and count:
        request.output_logprobs += [
            read_logprobs(token, lines[line], count) for line, token in enumerate(tokens, first_line)
        ]


def read_logprobs(token: int, line: npt.NDArray[np.int32], count: int) -> TokenLogprobs:
    """One line of a log-probability ring. `count`: 1 + the number of top tokens."""
    floats = line.view(np.float32)
    top = range(2, 2 * count, 2)
    return TokenLogprobs(
        token, float(floats[0]), int(line[1]), tuple((int(line[i]), float(floats[i + 1])) for i in top)
    )


def read_prompt_logprobs(span: PromptSpan, lines: npt.NDArray[np.int32]) -> None:
    """Note what a step reports of a prompt: the logits at a position are about the token after it."""
    request = span.request
    for offset in range(min(span.num_tokens, request.prompt_len - 1 - span.start)):
        position = span.start + offset + 1
        request.prompt_logprobs[position] = read_logprobs(
            request.prompt_token_ids[position], lines[span.first_line + offset], request.sampling.num_prompt_logprobs
        )

"""Answers of engines to prompts beside each other, held against those of transformers' models."""

import random

import pytest
import torch
from tiny import drain

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams

NUM_TOKENS = 8
"""Of an answer."""


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    """Random ones, each with a first token of its own."""
    rng = random.Random(0)
    return [[3 + n, *(rng.randrange(3, 96) for _ in range(length - 1))] for n, length in enumerate(lengths)]


def continued(hf_model, prompt: list[int]) -> tuple[list[int], list[float]]:
    """How transformers goes on, greedily, without a cache: tokens and their log-probabilities."""
    tokens: list[int] = []
    logprobs = []
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            row = hf_model(torch.tensor([prompt + tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        logprobs.append(float(row.max()))
    return tokens, logprobs


def generate(
    engine: Engine,
    prompts: list[list[int]],
    *,
    together: bool,
    preemption: float = 0.0,
    adapter: str | None = None,
    max_tokens: int = NUM_TOKENS,
) -> list[Request]:
    """What each prompt is answered, greedily; with a chance of `preemption` at each step, all that run start anew."""
    rng, requests = random.Random(1), []
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
    for number, prompt in enumerate(prompts):
        requests.append(engine.add_request(f"{number}", prompt, params, adapter=adapter))
        if not together:
            drain(engine)
    while engine.has_work:
        if rng.random() < preemption:
            engine.reset_prefix_cache(preempt=True)
        engine.step()
    return requests


def assert_as_transformers(requests: list[Request], answers: list[tuple[list[int], list[float]]]) -> None:
    """`answers`: of `continued`."""
    for request, (tokens, logprobs) in zip(requests, answers, strict=True):
        assert request.output_token_ids == tokens
        assert [entry.logprob for entry in request.output_logprobs] == pytest.approx(logprobs, abs=1e-4)

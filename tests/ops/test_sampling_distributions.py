"""Thousands of draws of `process_logits` and `sample` against the exact distribution of every setting, in float64.

Seeds are fixed: a test that passes keeps passing.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from slot_fixtures import SamplingSettings, side_buffers, slot_lines
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.process_logits import cpu as process_cpu
from stepgraph.ops.process_logits import triton as process_triton
from stepgraph.ops.sample import cpu as sample_cpu
from stepgraph.ops.sample import triton as sample_triton

LOGITS = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.0, 1.3, 0.0, 0.9])
VOCAB_SIZE = len(LOGITS)
NUM_DRAWS = 3000
CHI_SQUARE_999 = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}
"""The 99.9 % quantiles by degrees of freedom."""


@dataclass(frozen=True)
class Case:
    """Settings of one request. `sampling`: temperature, min_p, top_k, top_p."""

    sampling: dict[str, float] = field(default_factory=lambda: {"temperature": 1.0})
    asked: SamplingSettings = field(default_factory=SamplingSettings)


SEEN = {"history": (5, 3, 0, 4, 3, 4, 7), "prompt_length": 2}
CASES = {
    "temperature": Case({"temperature": 0.6}),
    "high temperature": Case({"temperature": 2.5}),
    "top-k": Case({"temperature": 1.2, "top_k": 3}),
    "top-p": Case({"temperature": 1.0, "top_p": 0.8}),
    "min-p": Case({"temperature": 1.0, "min_p": 0.3}),
    "min-p, top-k and top-p": Case({"temperature": 1.4, "min_p": 0.12, "top_k": 6, "top_p": 0.85}),
    "repetition penalty": Case(asked=SamplingSettings(**SEEN, repetition_penalty=1.7)),
    "repetition reward": Case(asked=SamplingSettings(**SEEN, repetition_penalty=0.6)),
    "presence penalty": Case(asked=SamplingSettings(**SEEN, presence_penalty=0.9)),
    "frequency penalty": Case(asked=SamplingSettings(**SEEN, frequency_penalty=0.5)),
    "logit bias": Case(asked=SamplingSettings(biases=((4, 2.5), (3, -1.5)))),
    "bad words": Case(asked=SamplingSettings(**SEEN, bad_words=((1,), (4, 7, 3), (4, 5)))),
    "allowed tokens": Case(asked=SamplingSettings(allowed=frozenset({1, 3, 6, 7}))),
    "min tokens": Case(asked=SamplingSettings(**SEEN, stop_tokens=(3, 5), min_length=8)),
    "min tokens reached": Case(asked=SamplingSettings(**SEEN, stop_tokens=(3, 5), min_length=7)),
    "everything": Case(
        {"temperature": 1.3, "min_p": 0.05, "top_k": 5, "top_p": 0.95},
        SamplingSettings(
            **SEEN,
            allowed=frozenset({0, 1, 2, 3, 4, 6, 7}),
            bad_words=((4, 7, 2),),
            biases=((1, 1.2), (0, -0.4)),
            stop_tokens=(6,),
            min_length=10,
            repetition_penalty=1.2,
            presence_penalty=0.3,
            frequency_penalty=-0.4,
        ),
    ),
}


def _distribution(case: Case) -> Tensor:
    """What the documentation of both operators says, in plain float64. [V]"""
    asked, history, output = case.asked, case.asked.history, case.asked.history[case.asked.prompt_length :]
    x = LOGITS.tolist()
    banned = {word[-1] for word in asked.bad_words if history[len(history) + 1 - len(word) :] == word[:-1]}
    if asked.allowed is not None:
        banned |= set(range(VOCAB_SIZE)) - asked.allowed
    if len(history) < asked.min_length:
        banned |= set(asked.stop_tokens)
    for token, bias in asked.biases:
        x[token] += bias
    for token in set(history):
        x[token] *= asked.repetition_penalty if x[token] <= 0 else 1 / asked.repetition_penalty
    for token, count in Counter(output).items():
        x[token] -= asked.frequency_penalty * count + asked.presence_penalty
    mass = [0.0 if v in banned else math.exp(value / case.sampling["temperature"]) for v, value in enumerate(x)]

    order = sorted(range(VOCAB_SIZE), key=lambda v: -mass[v])
    kept = [v for v in order if mass[v] > 0 and mass[v] >= case.sampling.get("min_p", 0) * mass[order[0]]]
    kept = kept[: case.sampling.get("top_k", VOCAB_SIZE)]
    total, reached, nucleus = sum(mass[v] for v in kept), 0.0, []
    for v in kept:
        if reached >= case.sampling.get("top_p", 1) * total:
            break
        nucleus.append(v)
        reached += mass[v]
    return torch.tensor([mass[v] / reached if v in nucleus else 0.0 for v in range(VOCAB_SIZE)], dtype=torch.float64)


def _draws(case: Case, count: int) -> Tensor:
    """How often each token is drawn, over `count` seeds. One slot for each; they share what else they hold."""
    lines = slot_lines(case.asked.line(**case.sampling)).index_select(0, torch.ones(count, dtype=torch.int64))
    lines[:, line.SEED_LOW] = torch.arange(count)
    lines = torch.cat((torch.zeros_like(lines[:1]), lines))
    side = [buffer[1:].expand(1 + count, *buffer.shape[1:]) for buffer in side_buffers([case.asked], VOCAB_SIZE, 16)]
    rows = torch.arange(1, 1 + count, dtype=torch.int32)
    offset = torch.zeros_like(rows)
    processed = torch.empty(count, VOCAB_SIZE)
    counts = torch.zeros(count, VOCAB_SIZE, dtype=torch.int32)
    process_cpu.process_logits(LOGITS.expand(count, -1), rows, offset, lines, *side, counts, processed)
    return torch.bincount(sample_cpu.sample(processed, rows, offset, lines), minlength=VOCAB_SIZE)


def _statistic(observed: Tensor, probability: Tensor) -> tuple[float, int]:
    """Pearson's chi-square and its degrees of freedom; infinite if something impossible was drawn."""
    possible = probability > 0
    if observed[~possible].any():
        return math.inf, int(possible.sum()) - 1
    expected = probability[possible] * observed.sum()
    return float(((observed[possible] - expected) ** 2 / expected).sum()), int(possible.sum()) - 1


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    case = CASES[name]
    statistic, freedom = _statistic(_draws(case, NUM_DRAWS), _distribution(case))
    assert statistic < CHI_SQUARE_999[freedom]


WRONG = {
    "a repetition penalty that ignores the prompt": (
        "repetition penalty",
        lambda asked: {"history": asked.history[2:], "prompt_length": 0},
    ),
    "a frequency penalty that counts the prompt": ("frequency penalty", lambda asked: {"prompt_length": 0}),
    "a presence penalty that counts": (
        "presence penalty",
        lambda asked: {"presence_penalty": 0.0, "frequency_penalty": asked.presence_penalty},
    ),
    "a bias that is halved": ("logit bias", lambda asked: {"biases": tuple((t, b / 2) for t, b in asked.biases)}),
    "a ban that comes one token late": ("min tokens", lambda asked: {"min_length": 7}),
}


@pytest.mark.parametrize("rule", WRONG)
def test_draws_do_not_follow_a_wrong_rule(rule: str) -> None:
    """The counter-check: so many draws tell the rule from one that is nearly it."""
    name, change = WRONG[rule]
    case = CASES[name]
    wrong = replace(case, asked=replace(case.asked, **change(case.asked)))
    statistic, freedom = _statistic(_draws(case, NUM_DRAWS), _distribution(wrong))
    assert statistic > CHI_SQUARE_999[freedom]


def test_min_p_comes_before_top_p() -> None:
    """80 % of all mass needs four tokens, 80 % of what min-p leaves three."""
    top_p, min_p = {"temperature": 1.0, "top_p": 0.8}, {"min_p": 0.32}
    assert len(_draws(Case(top_p), NUM_DRAWS).nonzero()) == 4
    assert len(_draws(Case({"temperature": 1.0} | min_p), NUM_DRAWS).nonzero()) == 4
    assert len(_draws(Case(top_p | min_p), NUM_DRAWS).nonzero()) == 3


def test_triton_draws_the_tokens_of_the_cpu_in_one_batch_of_all_settings(device: str) -> None:
    cases = [case for case in CASES.values() for _ in range(2)]
    lines = slot_lines(*(case.asked.line(**case.sampling, seed=i << 31) for i, case in enumerate(cases)))
    side = side_buffers([case.asked for case in cases], VOCAB_SIZE, 16)
    rows = torch.arange(1, 1 + len(cases), dtype=torch.int32)
    logits = LOGITS.repeat(len(cases), 1)
    tokens = []
    for process, sample, place in ((process_cpu, sample_cpu, "cpu"), (process_triton, sample_triton, device)):
        rows_there, lines_there, offset = rows.to(place), lines.to(place), torch.zeros_like(rows, device=place)
        out = torch.empty(len(cases), VOCAB_SIZE, device=place)
        counts = torch.zeros(len(cases), VOCAB_SIZE, dtype=torch.int32, device=place)
        inputs = (logits.to(place), rows_there, offset, lines_there, *(buffer.to(place) for buffer in side))
        process.process_logits(*inputs, counts, out)
        tokens.append(sample.sample(out, rows_there, offset, lines_there).tolist())
    assert tokens[1] == tokens[0]

"""``bench tokens``: do graphs change a model's answers, and what does a smaller dtype change?

Greedy answers to prompts of 3 to 1,000 tokens: captured graphs against eager launches in the same dtype (must be the same
tokens), and each dtype against float32 (where answers first differ, and by how much log-probabilities do).
"""

from __future__ import annotations

import argparse
import gc
import pydoc_data.topics
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from stepgraph.bench.report import check_one_device, machine, table, write_json
from stepgraph.config import EngineConfig, add_flags, settings_from_flags
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.prompts import encode_text
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ConfigError
from stepgraph.executor.local import runner_of
from stepgraph.step.admission import Admission
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepRunner
from stepgraph.step.slot_sampling import SlotSampling


@dataclass(frozen=True)
class Comparison:
    """Answers in one dtype."""

    dtype: str
    prompts: int
    tokens: int
    same_as_eager: int  # answers that are token for token those of eager launches
    same_as_float32: int
    median_first_difference: float | None  # token index, over the answers that differ from float32
    mean_log_prob_difference: float  # of float32's most likely next token after the prompt, in nats
    max_log_prob_difference: float
    steps: int
    eager_steps: int  # of the run with graphs: steps that left the graph


def add_parser(commands: Any) -> None:
    """Register ``bench tokens``."""
    parser = commands.add_parser(
        "tokens",
        help="answers with graphs against eager, and by dtype",
        description="Compare greedy answers: graphs against eager launches, and each dtype against float32.",
    )
    parser.add_argument("--prompts", type=int, default=40, metavar="N", help="number of prompts (default: 40)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of each answer (default: 64)")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        metavar="TEXT",
        help="float32 first; DTYPE+fp8 has the layers' weights in FP8, DTYPE/fp8 keys and values",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")
    add_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark; returns 1 if graphs changed an answer."""
    if min(arguments.prompts, arguments.tokens) < 1:
        raise ConfigError(f"prompts={arguments.prompts}, tokens={arguments.tokens}: both must be 1 or more")
    settings = settings_from_flags(arguments) | {"seed": 0}
    precisions = {name: _precision(name) for name in arguments.dtypes}
    for precision in precisions.values():  # a bad one is found before the others have been measured
        check_one_device(EngineConfig.from_settings(**(settings | precision)))
    float32_tokens: list[list[int]] = []
    float32_log_probs = torch.empty(0)
    comparisons = []
    for name, precision in precisions.items():
        eager = _answer(settings | precision | {"graph_backend": "eager"}, arguments)
        graphs = _answer(settings | precision, arguments)
        if not float32_tokens:
            float32_tokens, float32_log_probs = graphs.tokens, graphs.log_probs
        top = float32_log_probs.argmax(-1, keepdim=True)
        difference = (graphs.log_probs.gather(1, top) - float32_log_probs.gather(1, top)).abs()
        first = [
            next(i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b)
            for x, y in zip(graphs.tokens, float32_tokens, strict=True)
            if x != y
        ]
        comparisons.append(
            Comparison(
                dtype=name,
                prompts=len(graphs.tokens),
                tokens=sum(map(len, graphs.tokens)),
                same_as_eager=sum(a == b for a, b in zip(graphs.tokens, eager.tokens, strict=True)),
                same_as_float32=len(graphs.tokens) - len(first),
                median_first_difference=median(first) if first else None,
                mean_log_prob_difference=difference.mean().item(),
                max_log_prob_difference=difference.max().item(),
                steps=graphs.steps,
                eager_steps=graphs.eager_steps,
            )
        )
    print(f"{graphs.name} on {graphs.where['device']}, greedy, {arguments.tokens} tokens per answer")
    print(_table(comparisons))
    if arguments.json:
        write_json(
            arguments.json,
            {
                "benchmark": "tokens",
                "machine": graphs.where,
                "settings": settings,
                "dtypes": [asdict(c) for c in comparisons],
            },
        )
    return 0 if all(c.same_as_eager == c.prompts and c.eager_steps == 0 for c in comparisons) else 1


def _precision(name: str) -> dict[str, str]:
    """The settings that one of ``--dtypes`` stands for."""
    weights, _, cache_dtype = name.partition("/")
    dtype, _, quantization = weights.partition("+")
    precision = {"dtype": dtype, "kv_cache_dtype": cache_dtype or "auto"}
    return precision | ({"quantization": quantization} if quantization else {})


@dataclass(frozen=True)
class _Answers:
    name: str
    where: dict[str, Any]
    tokens: list[list[int]]
    log_probs: Tensor  # [prompts, V] float32: of the token after each prompt
    steps: int
    eager_steps: int


def _answer(settings: dict[str, Any], arguments: argparse.Namespace) -> _Answers:
    engine = build_engine(EngineConfig.from_settings(**settings), progress=sys.stderr.isatty())
    prompts = _prompts(engine, arguments.prompts)
    params = SamplingParams(temperature=0, max_tokens=arguments.tokens)
    waiting = list(enumerate(prompts))
    requests = {}
    arrivals = random.Random(0)
    while (
        waiting or engine.has_work
    ):  # arrivals spread over the steps, so that prefill, decode and mixed steps all occur
        for _ in range(min(len(waiting), arrivals.choice((0, 0, 1, 3)))):
            index, prompt = waiting.pop(0)
            requests[index] = engine.add_request(str(index), prompt, params)
        engine.step()
    statistics = engine.executor.statistics
    answers = _Answers(
        name=engine.source.name,
        where=machine(engine.executor.specs.device),
        tokens=[requests[i].output_token_ids for i in range(len(prompts))],
        log_probs=torch.stack([_next_log_probs(runner_of(engine.executor), prompt) for prompt in prompts]),
        steps=statistics.num_steps,
        eager_steps=statistics.num_eager_steps,
    )
    del engine  # its KV cache must be free before the next engine sizes its own
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers


def _prompts(engine: Engine, count: int) -> list[list[int]]:
    """Slices of Python's own documentation, technical English and code, of 3 to 1,000 tokens."""
    tokenizer = engine.tokenizer
    rng = random.Random(0)
    longest = min(1000, engine.max_model_len // 2, engine.executor.specs.max_tokens)
    lengths = [max(3, round(longest ** (i / max(count - 1, 1)))) for i in range(count)]
    if tokenizer is None:
        return [[rng.randrange(engine.source.config.vocab_size) for _ in range(n)] for n in lengths]
    text = "\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items()))
    token_ids = encode_text(text[:400_000], tokenizer)
    starts = [rng.randrange(len(token_ids) - n) for n in lengths]
    return [token_ids[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def _next_log_probs(runner: StepRunner, prompt: Sequence[int]) -> Tensor:
    """Log-probabilities [V] of the token after a prompt, by one prefill step."""
    with runner.workbench():
        runner.state.admit(
            Admission(
                1,
                tokens=prompt,
                prompt_len=len(prompt),
                blocks=range(1, runner.layout.groups.size * -(-len(prompt) // runner.block_size) + 1),
                generation=1,
                max_length=runner.max_model_len,
                sampling=SlotSampling(seed=0),
            )
        )
        shape = runner.policy.round_up(len(prompt), 1)
        runner.load(StepPlan(((1, len(prompt)),), (), 1), shape)
        output = runner.graphs.store.eager_twin(shape).replay()
        return output.logits[0].float().log_softmax(-1).cpu()


def _table(comparisons: Sequence[Comparison]) -> str:
    header = (
        "dtype",
        "graph = eager",
        "steps in graphs",
        "= float32",
        "first difference",
        "mean |dlogp|",
        "max |dlogp|",
    )
    return table(
        header,
        [
            (
                c.dtype,
                f"{c.same_as_eager}/{c.prompts}",
                f"{c.steps - c.eager_steps}/{c.steps}",
                f"{c.same_as_float32}/{c.prompts}",
                "-" if c.median_first_difference is None else f"token {c.median_first_difference:.0f} (median)",
                f"{c.mean_log_prob_difference:.2g}",
                f"{c.max_log_prob_difference:.2g}",
            )
            for c in comparisons
        ],
    )

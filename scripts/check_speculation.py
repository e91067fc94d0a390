"""Is speculation lossless? Every method and number of proposals on SmolLM2, against no speculation, token by token.

60 prompts of chat, code and prose, the answers 96 tokens long: greedy or sampled with seeds; alone and batched; with chunked
prompts, aborts and preemptions in between; in graphs and eagerly. In float32, or in 16 bits with `deterministic`, where a token
does not depend on the tokens beside it; elsewhere rounding may tip a token that is nearly tied with another.

    python scripts/check_speculation.py --json benchmarks/results/h100-speculation-lossless.json
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.build import build_local_executor
from stepgraph.models.loader import load_model
from stepgraph.models.source import resolve
from stepgraph.platforms import create_platform

REFERENCE = Path(__file__).parents[1] / "tests/data/smollm2_greedy.json"
NUM_TOKENS = 96
SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "max_model_len": 1280,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "num_kv_blocks": 4000,
    "capture": "lazy",
    "capture_sizes": (1, 2, 4, 6, 8, 64, 128, 256, 384, 512),
    "capture_rows": (1, 8, 64),
}
TIGHT = {"max_num_batched_tokens": 128, "num_kv_blocks": 400, "capture_sizes": (8, 64, 128)}
"""Prompts come in chunks, and requests are preempted."""


def prompts() -> list[list[int]]:
    """56 prompts, and 4 that go on where such an answer ends, so that there is much to copy."""
    answers = json.loads(REFERENCE.read_text())["answers"]
    return [a["prompt"] for a in answers] + [a["prompt"][-200:] + a["tokens"] * 2 for a in answers[:4]]


def run(engine: Engine, texts: list[list[int]], temperature: float, *, alone: bool, trouble: bool) -> list[Request]:
    """Answers to `texts`, one after the other or all at once."""
    rng = random.Random(0)
    requests = []
    for number, text in enumerate(texts):
        params = SamplingParams(temperature=temperature, seed=number, max_tokens=NUM_TOKENS, ignore_eos=True)
        requests.append(engine.add_request(f"{number}", text, params))
        if trouble and number % 6 == 0:
            engine.add_request(f"aborted {number}", text[::-1], params)
        while alone and engine.has_work:
            engine.step()
    while engine.has_work:
        engine.step()
        if trouble and rng.random() < 0.1:
            engine.abort(f"aborted {rng.randrange(len(texts)) // 6 * 6}")
    return requests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["mtp", "suffix", "ngram", "hybrid"])
    parser.add_argument("--num-drafts", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--prompts", type=int, default=60)
    parser.add_argument("--alone", type=int, default=10, help="prompts that are also run alone, with 3 proposals")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    started = time.perf_counter()
    source, platform = resolve("smollm2"), create_platform("auto")
    general = SETTINGS | {"dtype": options.dtype, "deterministic": options.deterministic}
    model = load_model(
        source,
        dtype=getattr(torch, options.dtype),
        device=platform.device,
        max_model_len=SETTINGS["max_model_len"],
        deterministic=options.deterministic,
    )
    texts = prompts()[: options.prompts]
    ways: dict[str, tuple[dict[str, Any], list[list[int]], float, bool, bool]] = {
        "batched": ({}, texts, 0.0, False, False),
        "sampled": ({}, texts, 0.8, False, False),
        "chunked, preempted": (TIGHT, texts, 0.0, False, True),
        "eager": ({"graph_backend": "eager"}, texts, 0.0, False, False),
        "alone": ({}, texts[: options.alone], 0.0, True, False),
    }

    def answers(way: str, **speculative: Any) -> dict[str, Any]:
        settings, some, temperature, alone, trouble = ways[way]
        config = EngineConfig.from_settings(
            **(general | settings | ({"speculative_config": speculative} if speculative else {}))
        )
        engine = build_engine(config, source=source, executor=build_local_executor(config, source, model=model))
        requests = run(engine, some, temperature, alone=alone, trouble=trouble)
        statistics = engine.executor.statistics
        result = {
            "tokens": [request.output_token_ids for request in requests],
            "steps": statistics.num_steps,
            "eager_steps": statistics.num_eager_steps,
            "preemptions": engine.scheduler.statistics.preemptions,
            "mean_accepted_length": round(engine.speculation.mean_accepted_length, 3),
        }
        del engine, requests
        gc.collect()  # graphs and their buffers are parts of cycles; `shutdown` would free the weights, which are shared
        platform.release_cached_memory()
        return result

    expected = {way: answers(way) for way in ways}
    lines: list[dict[str, Any]] = []
    print(
        f"{'method':>8} {'K':>2} {'way':>20} {'identical':>10} {'steps':>12} {'eager':>6} {'preempted':>9} {'accepted':>8}"
    )
    for method in options.methods:
        for num_drafts in options.num_drafts:
            for way in ways if num_drafts == 3 else [way for way in ways if way not in ("eager", "alone")]:
                found = answers(way, method=method, num_speculative_tokens=num_drafts, adaptive=False)
                same = sum(a == b for a, b in zip(found["tokens"], expected[way]["tokens"], strict=True))
                line = {"method": method, "num_drafts": num_drafts, "way": way, "identical": same}
                line |= {"prompts": len(found["tokens"]), "steps_without": expected[way]["steps"]}
                line |= {key: value for key, value in found.items() if key != "tokens"}
                lines.append(line)
                print(
                    f"{method:>8} {num_drafts:>2} {way:>20} {same:>6}/{line['prompts']:<3} {found['steps']:>5} of "
                    f"{line['steps_without']:<5} {found['eager_steps']:>5} {found['preemptions']:>9} "
                    f"{found['mean_accepted_length']:>8}",
                    flush=True,
                )
    total, same = sum(line["prompts"] for line in lines), sum(line["identical"] for line in lines)
    print(f"{same} of {total} answers identical, {time.perf_counter() - started:.0f} s")
    if options.json:
        about = {"device": platform.name, "torch": torch.__version__, "dtype": options.dtype}
        about["deterministic"] = options.deterministic
        options.json.write_text(json.dumps(about | {"lines": lines}, indent=1) + "\n")
    return 0 if same == total else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Do ranks that share a model say what one would, and do they hold the same bits?

Random engines of mixed features (architectures, experts shared in either way, formats, block sizes, chunked prompts, prefix
caching, speculation, grammars, penalties, log-probabilities, LoRA, determinism, preemption, aborts, sleep, new weights) on 2, 3
and 4 ranks on CPU, each held against one rank on the same requests, in float32 token for token but for ties; what ranks keep
alike is compared bit for bit every few steps. `tests/ranks/random_engines.py` makes them.

    python scripts/check_ranks.py --engines 300 --seed 1 --json benchmarks/results/cpu-ranks-random.json

With --latents, models with attention over latents only:

    python scripts/check_ranks.py --latents --engines 60 --ranks 2 4 3 --seed 3 --json benchmarks/results/cpu-ranks-latents.json

With --lockstep, each rank has requests of its own, and they share experts only:

    python scripts/check_ranks.py --lockstep --engines 24 --seed 2 --json benchmarks/results/cpu-lockstep-random.json

On two GPUs, with kernels of one model's sizes:

    python scripts/check_ranks.py --device cuda --ranks 2 --one-model --engines 20

With --smollm2, 40 prompts of chat, code and prose, the answers 64 tokens long, on 3 ranks, which is what can share SmolLM2; with
every method of speculation and with none; against what transformers says, whose choices are nowhere nearly tied:

    python scripts/check_ranks.py --smollm2 --json benchmarks/results/cpu-ranks-smollm2.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1] / "tests"
sys.path += [str(TESTS), str(TESTS / "ranks"), str(TESTS / "models")]

from random_engines import Arrival, Case, Outcome, random_case, run_case, serve_ranked  # noqa: E402
from random_models import RandomModel  # noqa: E402
from ranked_engines import EngineFactory  # noqa: E402
from transformers.utils import logging  # noqa: E402

from stepgraph.bench.report import check_outputs, machine, write_json  # noqa: E402
from stepgraph.engine.sampling_params import SamplingParams  # noqa: E402
from stepgraph.errors import StepgraphError  # noqa: E402

ONE_MODEL = RandomModel(
    "llama",
    {
        "vocab_size": 257,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 0,
    },
    num_mtp_modules=1,
    num_adapters=2,
)
SMOLLM2 = RandomModel("smollm2", {}, name="smollm2")
SMOLLM2_RANKS, NUM_PROMPTS, NUM_TOKENS = 3, 40, 64
SMOLLM2_SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 1088,
    "num_kv_blocks": 1200,
    "max_num_seqs": 40,
    "max_num_batched_tokens": 256,
    "capture_sizes": (40, 160, 256),
    "capture_rows": (40,),
}


def check_random_engines(options: argparse.Namespace, create: EngineFactory) -> dict[str, Any]:
    outcomes: list[Outcome] = []
    failures: list[str] = []
    before = json.loads(options.json.read_text())["engines"] if options.resume else []
    known = {outcome["number"]: Outcome(**outcome) for outcome in before}
    for index in range(options.engines):
        number = 1_000_000 * options.seed + index
        if number in known:
            outcomes.append(known[number])
            continue
        num_ranks = options.ranks[index % len(options.ranks)]
        model = ONE_MODEL if options.one_model else None
        case = random_case(
            number,
            num_ranks,
            model=model,
            experts=options.experts,
            latents=options.latents,
            lockstep=options.lockstep,
            device=options.device,
        )
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcomes.append(run_case(case, Path(folder), create))
            except (AssertionError, StepgraphError) as error:
                failures.append(f"{number} on {case.num_ranks} ranks, {', '.join(case.features)}: {error}")
                print(f"FAILED {failures[-1]}", flush=True)
                create.close()  # of processes in whatever state
        if (index + 1) % 10 == 0:
            print(f"{index + 1} engines, {len(failures)} failures", flush=True)
            write(options, _summary(options, outcomes, failures))  # it may take an hour
    return _summary(options, outcomes, failures)


def _summary(options: argparse.Namespace, outcomes: list[Outcome], failures: list[str]) -> dict[str, Any]:
    features = Counter(feature for outcome in outcomes for feature in outcome.features)
    sums = {
        name: sum(getattr(outcome, name) for outcome in outcomes)
        for name in ("tokens", "steps", "eager_steps", "preemptions", "accepted", "ties", "seconds")
    }
    return {
        "seed": options.seed,
        "num_engines": len(outcomes) + len(failures),
        "failures": failures,
        **sums,
        "features": dict(sorted(features.items())),
        "engines": [asdict(outcome) for outcome in outcomes],
    }


def check_smollm2(create: EngineFactory) -> dict[str, Any]:
    answers = json.loads((TESTS / "data/smollm2_greedy.json").read_text())["answers"][:NUM_PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    arrivals = tuple(Arrival(0, tuple(answer["prompt"]), params, 0, None, None) for answer in answers)
    lines, failures = [], []
    for method in ("none", "mtp", "suffix", "ngram", "hybrid"):
        proposing = {"speculative_method": method, "num_speculative_tokens": 3, "speculative_adaptive": False}
        settings = SMOLLM2_SETTINGS | (proposing if method != "none" else {})
        case = Case(0, SMOLLM2_RANKS, SMOLLM2, settings, arrivals, event=None)
        outcome, started = Outcome(0, SMOLLM2_RANKS, case.features), time.perf_counter()
        found = serve_ranked(case, Path(), create, outcome)
        outcome.seconds = time.perf_counter() - started
        pairs = zip(found, answers, strict=True)
        parted = [i for i, (request, answer) in enumerate(pairs) if request.output_token_ids != answer["tokens"]]
        failures += [f"{method}: answer {index} parts" for index in parted]
        lines.append(asdict(outcome) | {"method": method, "identical": len(found) - len(parted)})
        print(f"{method:>7}: {lines[-1]['identical']} of {len(found)} identical, {outcome.steps} steps", flush=True)
    return {"prompts": len(answers), "answer_tokens": NUM_TOKENS, "failures": failures, "methods": lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=20, help="random engines (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4], metavar="N", help="in turn (default: 2 3 4)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--one-model", action="store_true", help="the same model for all of them")
    parser.add_argument("--experts", action="store_true", help="models with experts only")
    parser.add_argument("--latents", action="store_true", help="models with attention over latents only")
    parser.add_argument("--lockstep", action="store_true", help="ranks with requests of their own, which share experts")
    parser.add_argument("--resume", action="store_true", help="leave out engines that agree by the file of --json")
    parser.add_argument("--smollm2", action="store_true", help="the embedded model instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what came of it")
    options = parser.parse_args()
    check_outputs(options)
    logging.disable_progress_bar()
    create = EngineFactory()
    try:
        result = check_smollm2(create) if options.smollm2 else check_random_engines(options, create)
    finally:
        create.close()
    print({name: value for name, value in result.items() if isinstance(value, int | float)})
    write(options, result)
    return 1 if result["failures"] else 0


def write(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if options.json:
        with contextlib.redirect_stdout(io.StringIO()):
            write_json(options.json, {"check": "ranks", "machine": machine(options.device), **result})


if __name__ == "__main__":
    raise SystemExit(main())

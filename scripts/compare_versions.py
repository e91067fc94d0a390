"""Is a version of stepgraph slower than another? Both run side by side, round by round in turn, on one device.

    git worktree add /tmp/before v0.1.0
    python scripts/compare_versions.py /tmp/before . --seconds 120 --json compared.json

Each version has a process of its own for each model, which imports `stepgraph` from its tree and keeps one engine; all are
started before the first round. A round asks every engine for the same first tokens and decode steps, old and new in
alternating order, so that what changes on the machine meanwhile meets both. Shown are the medians over the rounds, their
ratio, and how far the medians of the old version's own rounds lie apart when these are halved at random: a ratio within that
range says nothing. The first round is not counted.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

MODELS = ("qwen3-0.6b", "qwen3-8b")
FIRST_TOKENS = (10, 80, 481, 2048)
"""Lengths of prompts, each asked for `REPEATS` times a round."""
REPEATS = 6
DECODES = ((1, 32), (8, 32), (64, 32), (256, 32), (1, 8160))
"""Requests, and the length of their prompts; each answers `ANSWER` tokens."""
ANSWER = 64
SETTINGS: dict[str, Any] = {"load_format": "dummy", "num_kv_blocks": 4096, "enable_prefix_caching": False}
HALVINGS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time two versions of stepgraph side by side.")
    parser.add_argument("old", type=Path, help="folder that holds the old version's `stepgraph`")
    parser.add_argument("new", type=Path, help="that of the new one")
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="MODEL", help="named shapes; weights are random")
    parser.add_argument("--device", default="auto", help="as of `stepgraph generate`")
    parser.add_argument(
        "--max-num-seqs", type=int, default=256, metavar="N", help="cases of more requests are left out"
    )
    parser.add_argument("--max-model-len", type=int, default=16384, metavar="N", help="and of longer prompts")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to go on after all have started")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rounds as JSON")
    parser.add_argument("--engine", metavar="MODEL", help=argparse.SUPPRESS)  # this process is one of the engines
    options = parser.parse_args(argv)
    if options.engine:
        limits = {"max_num_seqs": options.max_num_seqs, "max_model_len": options.max_model_len}
        _serve_rounds(options.new, options.engine, options.device, limits)
        return 0
    for tree in (options.old, options.new):
        if not (tree / "stepgraph" / "__init__.py").is_file():
            parser.error(f"{tree} holds no stepgraph/__init__.py; name the folder above the package")
    starts, rounds = _compare(options)
    for model in options.models:
        print(_table(model, [each for each in rounds if each["model"] == model]))
    if options.json:
        options.json.write_text(json.dumps({"benchmark": "versions", "starts": starts, "rounds": rounds}) + "\n")
        print(f"wrote {options.json}")
    return 0


def _compare(options: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """How the engines started, and what each gave in each round."""
    trees = {"old": options.old, "new": options.new}
    engines = {
        (version, model): _start(trees[version], model, options) for model in options.models for version in trees
    }
    rounds: list[dict[str, Any]] = []
    try:
        starts = {f"{version} {model}": _answer(engine) for (version, model), engine in engines.items()}
        print("\n".join(f"{name}: {start}" for name, start in starts.items()), flush=True)
        end, number = time.monotonic() + options.seconds, 0
        while number < 2 or time.monotonic() < end:
            for model in options.models:
                for version in ("old", "new") if number % 2 else ("new", "old"):
                    cells = _ask(engines[version, model])
                    if number:
                        rounds.append({"model": model, "version": version, "cells": cells})
            number += 1
    finally:
        for engine in engines.values():
            engine.kill()
            engine.wait()
    return starts, rounds


def _start(tree: Path, model: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    flags = [
        "--device",
        options.device,
        "--max-num-seqs",
        options.max_num_seqs,
        "--max-model-len",
        options.max_model_len,
    ]
    command = [sys.executable, Path(__file__).resolve(), tree, tree.resolve(), "--engine", model, *flags]
    return subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
    )


def _ask(engine: subprocess.Popen[str]) -> Any:
    assert engine.stdin is not None
    engine.stdin.write("round\n")
    engine.stdin.flush()
    return _answer(engine)


def _answer(engine: subprocess.Popen[str]) -> Any:
    """What an engine's process prints next, if it is not about something else."""
    assert engine.stdout is not None
    for line in engine.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit(f"an engine ended with code {engine.wait()}; what it said stands above")


def _serve_rounds(tree: Path, model: str, device: str, limits: dict[str, int]) -> None:
    """Keep an engine of the version in `tree`; run a round of the cases within its limits for each line of standard input."""
    sys.path.insert(0, str(tree))
    from stepgraph.config import EngineConfig

    try:
        from stepgraph.engine.build import build_engine as create
    except ImportError:  # a version in which the class builds itself
        from stepgraph.engine import engine as module

        create = module.Engine

    started = time.perf_counter()
    config = EngineConfig.from_settings(model=model, device=device, **SETTINGS | limits)
    engine = create(config)
    print(json.dumps({"start_s": round(time.perf_counter() - started, 2)}), flush=True)
    for turn, _ in enumerate(sys.stdin):
        cells = {}
        for length in (n for n in FIRST_TOKENS if n < limits["max_model_len"]):
            cells[f"first token after {length}"] = _cell(engine, turn, 1, length, 1, REPEATS)
        for num_requests, length in DECODES:
            if num_requests > limits["max_num_seqs"] or length + ANSWER > limits["max_model_len"]:
                continue
            name = f"decode {num_requests}" + (" at 8k" if length > 32 else "")
            cells[name] = _cell(engine, turn, num_requests, length, ANSWER, 1)
        print(json.dumps(cells), flush=True)


def _cell(
    engine: Any, turn: int, num_requests: int, prompt_len: int, answer_len: int, repeats: int
) -> dict[str, float]:
    """Medians of one case: ms to the first token or from token to token, and the host's µs per step."""
    from stepgraph.bench.latency import Case, _samples_s
    from stepgraph.bench.offline import Job, run_round

    case = Case("", num_requests, prompt_len, answer_len)
    vocab = engine.source.config.vocab_size
    seconds, host_seconds = [], []
    for repeat in range(repeats):
        first = 31 * turn + repeat
        jobs = [Job([(first + 7 * i + j) % vocab for j in range(prompt_len)], answer_len) for i in range(num_requests)]
        done = run_round(engine, jobs)
        seconds += _samples_s(done, case)
        timed = [step for step in done.steps if answer_len == 1 or step.record.num_tokens == num_requests]
        host_seconds += [step.host_seconds for step in timed]
    return {"ms": 1e3 * median(seconds), "host_us": 1e6 * median(host_seconds)}


def _table(model: str, rounds: Sequence[dict[str, Any]]) -> str:
    from stepgraph.bench.report import table

    rows = []
    for name in rounds[0]["cells"]:
        of = {v: [each["cells"][name] for each in rounds if each["version"] == v] for v in ("old", "new")}
        old, new = ([cell["ms"] for cell in of[v]] for v in ("old", "new"))
        low, high = _own_spread(old)
        host = [f"{median(cell['host_us'] for cell in of[v]):.0f}" for v in ("old", "new")]
        ratio = f"{median(new) / median(old):.3f}"
        rows.append((name, f"{median(old):.3f}", f"{median(new):.3f}", ratio, f"{low:.3f} – {high:.3f}", *host))
    header = (
        f"{model}, {len(rounds) // 2} rounds",
        "old ms",
        "new ms",
        "new / old",
        "old / old, 95 %",
        "old host us",
        "new host us",
    )
    return table(header, rows) + "\n"


def _own_spread(values: Sequence[float]) -> tuple[float, float]:
    """Between which ratios 95 % of the medians of random halves lie."""
    if len(values) < 2:
        return 1.0, 1.0
    generator, ratios = random.Random(0), []
    for _ in range(HALVINGS):
        shuffled = generator.sample(values, len(values))
        middle = len(values) // 2
        ratios.append(median(shuffled[:middle]) / median(shuffled[middle:]))
    ratios.sort()
    return ratios[HALVINGS // 40], ratios[-1 - HALVINGS // 40]


if __name__ == "__main__":
    sys.exit(main())

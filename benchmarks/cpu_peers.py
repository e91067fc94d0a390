"""The embedded model on CPU: stepgraph as it comes, and what else runs the same weights here, interleaved in one run.

    python benchmarks/cpu_peers.py --json benchmarks/results/cpu-peers.json
    ATEN_CPU_CAPABILITY=avx2 python benchmarks/cpu_peers.py --json benchmarks/results/cpu-peers-avx2.json

All use the same cores and greedy decoding, each its fastest precision and float32 where it offers both. Needs `stepgraph pull
smollm2`; llama.cpp takes part if `llama-cpp-python` is installed. Beside the times: what the memory gives, and so the fewest
milliseconds a decode step of one row could take, reading the weights once.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from against_transformers import engine_times, transformers_model, transformers_times

from stepgraph import EngineConfig, SamplingParams
from stepgraph.bench.report import check_outputs, machine, table, write_json
from stepgraph.bench.roofline import measure_limits
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.models.source import packaged_file

PROMPTS = (10, 80, 480)
ROWS, ROW_PROMPT = 8, 80


def engine_rate(engine: Engine, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of all rows together, from the step in which the last of them got its first token on."""
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    while not all(request.output_token_ids for request in requests):
        engine.step()
    before = sum(len(request.output_token_ids) for request in requests)
    started = time.perf_counter()
    while engine.has_work:
        engine.step()
    return (len(prompts) * tokens - before) / (time.perf_counter() - started)


@torch.no_grad()
def transformers_rate(model: torch.nn.Module, prompts: list[list[int]], tokens: int) -> float:
    """The same of a plain loop over a batch."""
    output = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    for _ in range(tokens - 1):
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        output = model(ids, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1)
    return len(prompts) * (tokens - 1) / (time.perf_counter() - started)


def llama_cpp_times(llama: object, prompt: list[int], tokens: int) -> Iterator[float]:
    """Seconds to the first token, then from each token to the next, by llama.cpp."""
    llama.reset()  # type: ignore[attr-defined]
    started = time.perf_counter()
    for _, _ in zip(range(tokens), llama.generate(prompt, temp=0.0), strict=False):  # type: ignore[attr-defined]
        now = time.perf_counter()
        yield now - started
        started = now


def prompt_of(length: int, row: int = 0) -> list[int]:
    return [(7 * i + 131 * row + 5) % 40_000 for i in range(length)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per answer (default: 24)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    check_outputs(arguments)

    engine = build_engine(EngineConfig.from_settings(model="smollm2", device="cpu", enable_prefix_caching=False))
    times: dict[str, Callable[[list[int], int], Iterator[float]]] = {
        "stepgraph": lambda prompt, tokens: engine_times(engine, prompt, tokens)
    }
    rates: dict[str, Callable[[list[list[int]], int], float]] = {
        "stepgraph": lambda prompts, tokens: engine_rate(engine, prompts, tokens)
    }
    for name, dtype in (("transformers float32", torch.float32), ("transformers bfloat16", torch.bfloat16)):
        model = transformers_model(engine).to(dtype)
        times[name] = lambda prompt, tokens, model=model: transformers_times(model, prompt, tokens)
        rates[name] = lambda prompts, tokens, model=model: transformers_rate(model, prompts, tokens)
    if importlib.util.find_spec("llama_cpp"):
        from llama_cpp import Llama

        path, threads = packaged_file("smollm2"), torch.get_num_threads()
        llama = Llama(str(path), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
        times["llama.cpp Q4_1"] = lambda prompt, tokens: llama_cpp_times(llama, prompt, tokens)

    limits = measure_limits(engine.executor.runner.platform, torch.float32)
    weight_bytes = sum(parameter.nbytes for parameter in engine.executor.runner.model.parameters())
    first: dict[tuple[str, int], list[float]] = defaultdict(list)
    decode: dict[tuple[str, int], list[float]] = defaultdict(list)
    together: dict[str, list[float]] = defaultdict(list)
    for turn in range(arguments.rounds + 1):
        for length in PROMPTS:
            for name, run in times.items():
                series = list(run(prompt_of(length), arguments.tokens))
                if turn:  # the first round warms up and captures
                    first[name, length].append(1e3 * series[0])
                    decode[name, length].extend(series[1:])
        for name, rate in rates.items():
            found = rate([prompt_of(ROW_PROMPT, row) for row in range(ROWS)], arguments.tokens)
            if turn:
                together[name].append(found)

    rows, peers = [], []
    for name in times:
        lengths = {
            length: {"first_token_ms": median(first[name, length]), "tokens_per_s": 1 / median(decode[name, length])}
            for length in PROMPTS
        }
        rate = median(together[name]) if name in together else None
        peers.append({"name": name, "prompts": lengths, "rows": {"rows": ROWS, "tokens_per_s": rate}})
        cells = (f"{case['first_token_ms']:.0f} / {case['tokens_per_s']:.1f}" for case in lengths.values())
        rows.append((name, *cells, "-" if rate is None else f"{rate:.0f}"))
    where = machine(engine.executor.specs.device)
    print(f"smollm2, {where['device']}, {where['threads']} threads; first token ms / decode tokens per s; medians")
    print(table(("", *(f"{length}-token prompt" for length in PROMPTS), f"{ROWS} rows, tokens per s"), rows))
    least_ms = 1e3 * weight_bytes / limits.copy_bytes_per_s
    print(
        f"a copy moves {limits.copy_bytes_per_s / 1e9:.1f} GB/s here; stepgraph's weights are {weight_bytes / 1e6:.1f} MB, "
        f"read in {least_ms:.1f} ms at that rate ({1e3 / least_ms:.0f} tokens per s)"
    )
    if arguments.json:
        result = {
            "benchmark": "cpu_peers",
            "machine": where,
            "copy_bytes_per_s": limits.copy_bytes_per_s,
            "weight_bytes": weight_bytes,
            "rounds": arguments.rounds,
            "tokens": arguments.tokens,
            "peers": peers,
        }
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()

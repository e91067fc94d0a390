"""The embedded model on CPU: stepgraph with graphs, stepgraph eagerly, and transformers, interleaved in one run.

    python benchmarks/against_transformers.py --json benchmarks/results/cpu-against-transformers.json

Same cores, same dtype (float32), same weights, greedy. Needs `stepgraph pull smollm2`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stepgraph import EngineConfig, SamplingParams
from stepgraph.bench.report import check_outputs, machine, table, write_json
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine


def engine_times(engine: Engine, prompt: list[int], tokens: int) -> Iterator[float]:
    """Seconds from arrival to the first token, then from each token to the next."""
    engine.add_request("request", prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    started = time.perf_counter()
    while engine.has_work:
        for _ in engine.step():
            now = time.perf_counter()
            yield now - started
            started = now


@torch.no_grad()
def transformers_times(model: torch.nn.Module, prompt: list[int], tokens: int) -> Iterator[float]:
    """The same of a plain greedy loop over transformers' model and its KV cache."""
    ids, cache = torch.tensor([prompt]), None
    for _ in range(tokens):
        started = time.perf_counter()
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        ids.item()
        yield time.perf_counter() - started


def transformers_model(engine: Engine) -> LlamaForCausalLM:
    """transformers' own Llama with the weights of the same file."""
    c = engine.source.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):  # else it draws random weights first
        model = LlamaForCausalLM(config).eval()
    weights = {t.name: t.load(torch.float32, torch.device("cpu")) for t in engine.source.tensors()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per answer (default: 24)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    check_outputs(arguments)

    settings = {"model": "smollm2", "dtype": "float32", "device": "cpu", "max_num_seqs": 1, "max_model_len": 1024}
    graphs, eager = (
        build_engine(EngineConfig.from_settings(**settings, max_num_batched_tokens=512, graph_backend=backend))
        for backend in ("cpu", "eager")
    )
    reference = transformers_model(graphs)

    rows, cases = [], []
    for length in (10, 80, 480):
        prompt = [(7 * i) % 40_000 for i in range(length)]
        first: dict[str, list[float]] = {"transformers": [], "eager": [], "graphs": []}
        decode: dict[str, list[float]] = {"transformers": [], "eager": [], "graphs": []}
        for turn in range(arguments.rounds + 1):
            for name, times in (
                ("transformers", transformers_times(reference, prompt, arguments.tokens)),
                ("eager", engine_times(eager, prompt, arguments.tokens)),
                ("graphs", engine_times(graphs, prompt, arguments.tokens)),
            ):
                series = list(times)
                if turn:  # the first round warms up and captures
                    first[name].append(series[0])
                    decode[name].extend(series[1:])
        for what, measured in (("first token", first), ("decode", decode)):
            ms = {name: 1e3 * median(series) for name, series in measured.items()}
            cases.append({"prompt": length, "step": what, "ms": ms})
            rows.append(
                (
                    f"{length}-token prompt, {what}",
                    *(f"{ms[name]:.1f}" for name in ms),
                    f"{ms['eager'] / ms['graphs']:.2f}x",
                    f"{ms['transformers'] / ms['graphs']:.2f}x",
                )
            )
    where = machine(graphs.executor.specs.device)
    print(f"smollm2, float32, {where['device']}, {where['threads']} threads; medians, ms")
    print(table(("", "transformers", "eager", "graphs", "eager / graphs", "transformers / graphs"), rows))
    if arguments.json:
        write_json(arguments.json, {"benchmark": "against_transformers", "machine": where, "cases": cases})


if __name__ == "__main__":
    main()

"""The embedded model on CPU: stepgraph with graphs, stepgraph eagerly, and transformers, interleaved in one run.

    python benchmarks/against_transformers.py --json benchmarks/results/cpu-against-transformers.json
    python benchmarks/against_transformers.py --latent --cpu-time --json benchmarks/results/cpu-against-transformers-latent.json

Same cores, same dtype (float32), same weights, greedy; the shortest time of each kind, as others may use the machine. With
--cpu-time, all run in one thread, and its CPU time counts, which others change less. Needs `stepgraph pull smollm2`; with
--latent it is a random model with latent attention instead.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

from stepgraph import EngineConfig, SamplingParams
from stepgraph.bench.report import check_outputs, machine, table, write_json
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine

Clock = Callable[[], float]
"""Gives seconds."""


def engine_times(engine: Engine, prompt: list[int], tokens: int, clock: Clock) -> Iterator[float]:
    """Seconds from arrival to the first token, then from each token to the next."""
    engine.add_request("request", prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
    started = clock()
    while engine.has_work:
        for _ in engine.step():
            now = clock()
            yield now - started
            started = now


@torch.no_grad()
def transformers_times(model: torch.nn.Module, prompt: list[int], tokens: int, clock: Clock) -> Iterator[float]:
    """The same of a plain greedy loop over transformers' model and its KV cache."""
    ids, cache = torch.tensor([prompt]), None
    for _ in range(tokens):
        started = clock()
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = output.logits[:, -1].argmax(-1, keepdim=True), output.past_key_values
        ids.item()
        yield clock() - started


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


def save_latent_model(folder: str) -> torch.nn.Module:
    """A random model whose attention is latent in each of its 4 layers, none of which has experts."""
    config = DeepseekV2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        q_lora_rank=None,
        kv_lora_rank=256,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = DeepseekV2ForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--tokens", type=int, default=24, help="tokens per answer (default: 24)")
    parser.add_argument("--latent", action="store_true", help="a random model with latent attention")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, not the time on the wall")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    check_outputs(arguments)
    clock = time.perf_counter
    if arguments.cpu_time:
        clock = time.thread_time
        torch.set_num_threads(1)

    settings = {
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 1,
        "max_model_len": 1024,
        "enable_prefix_caching": False,
    }
    with tempfile.TemporaryDirectory() as folder:
        latent = save_latent_model(folder) if arguments.latent else None
        settings["model"] = folder if arguments.latent else "smollm2"
        graphs, eager = (
            build_engine(EngineConfig.from_settings(**settings, max_num_batched_tokens=512, graph_backend=backend))
            for backend in ("cpu", "eager")
        )
    reference = latent or transformers_model(graphs)

    rows, cases = [], []
    for length in (10, 80, 480):
        prompt = [(7 * i) % 8_000 for i in range(length)]
        first: dict[str, list[float]] = {"transformers": [], "eager": [], "graphs": []}
        decode: dict[str, list[float]] = {"transformers": [], "eager": [], "graphs": []}
        for turn in range(arguments.rounds + 1):
            for name, times in (
                ("transformers", transformers_times(reference, prompt, arguments.tokens, clock)),
                ("eager", engine_times(eager, prompt, arguments.tokens, clock)),
                ("graphs", engine_times(graphs, prompt, arguments.tokens, clock)),
            ):
                series = list(times)
                if turn:  # the first round warms up and captures
                    first[name].append(series[0])
                    decode[name].extend(series[1:])
        for what, measured in (("first token", first), ("decode", decode)):
            ms = {name: 1e3 * min(series) for name, series in measured.items()}
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
    name = "latent attention" if arguments.latent else "smollm2"
    what = "CPU time" if arguments.cpu_time else "time"
    print(f"{name}, float32, {where['device']}, {where['threads']} threads; shortest {what}, ms")
    print(table(("", "transformers", "eager", "graphs", "eager / graphs", "transformers / graphs"), rows))
    if arguments.json:
        shown = {"model": name, "clock": what, "machine": where, "cases": cases}
        write_json(arguments.json, {"benchmark": "against_transformers", **shown})


if __name__ == "__main__":
    main()

"""Tries families of native models in random tiny sizes against transformers in float32: every one with experts (1 to 64, of which
a token takes 1 to 8; groups, scales and biases of routers; dense layers among the others; shared experts), every one with
latent attention (4 to 40 heads, odd ranks and head sizes, with and without a latent of queries, biases, YaRN with its scales,
LongRoPE), every one whose layers carry states (gated delta rules, short convolutions, Mamba-2), and every one whose attention
has sinks or caps its scores.

Each must give transformers' most likely tokens and log-probabilities: several requests at once, prompts in chunks, with prefixes
that are found in the cache; and the same tokens alone, with looked-up proposals, and with those of a draft module like its last
layer.

    python scripts/sweep_families.py [--seeds 12] [--families glm4_moe,minicpm3] [--settings JSON] [--out sweep.json]

With --settings '{"tensor_parallel_size": 2, "enable_expert_parallel": true}', two ranks share each, or it is refused in a
sentence; with '{"device": "cuda"}', kernels for GPUs run.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from random_families import FAMILIES
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ModelError
from stepgraph.layers.experts import Router
from stepgraph.models import resolve
from stepgraph.spec.mtp_checkpoint import may_draft

SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "max_model_len": 96,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 24,
    "capture_sizes": (3, 24),
    "capture_rows": (3,),
    "num_kv_blocks": 33,
}
STEM = [(7 * i + 3) % 96 for i in range(40)]
PROMPTS = [STEM, [(5 * i + 11) % 96 for i in range(9)], [*STEM[:35], 4, 4, 4]]
WAYS: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "alone": (PROMPTS[:1], {}),
    "with looked-up proposals": (PROMPTS, {"speculative_config": {"method": "suffix", "num_speculative_tokens": 3}}),
    "with a draft module": (
        PROMPTS,
        {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False}},
    ),
}
"""Which may change no token: prompts, and settings."""
NUM_TOKENS = 10
TOLERANCE = 1e-3
"""Of log-probabilities, most of which are between -1 and -10."""


def write_model(config: Any, folder: Path) -> Any:
    """Write a random model, and a module that drafts for it in DeepSeek's layout, with its last layer; return the model."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name or name.endswith("scale") else 0.0, 0.15)
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(0.0, 0.15)
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    path, (E, L) = folder / "model.safetensors", (config.hidden_size, config.num_hidden_layers)
    stored = load_file(path)
    module = {name: torch.randn(shape) * 0.15 + (len(shape) == 1) for name, shape in _module_shapes(E).items()}
    last = f"model.layers.{L - 1}."
    module |= {name.removeprefix(last): tensor.clone() for name, tensor in stored.items() if name.startswith(last)}
    module = {name: tensor for name, tensor in module.items() if not name.startswith("mamba.")}
    if config.model_type == "nemotron_h":  # whose layers have one part each
        shapes = _layer_shapes(config)
        module |= {name: torch.randn(shape) * 0.15 + ("norm" in name) for name, shape in shapes.items()}
    save_file(stored | {f"model.layers.{L}.{name}": t for name, t in module.items()}, path, metadata={"format": "pt"})
    return model


def _layer_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Of attention and feed-forward without gates."""
    E, M, D = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_attention_heads * D, config.num_key_value_heads * D
    shapes = {"q_proj": (heads, E), "k_proj": (kv_heads, E), "v_proj": (kv_heads, E), "o_proj": (E, heads)}
    parts: dict[str, tuple[int, ...]] = {f"self_attn.{name}.weight": shape for name, shape in shapes.items()}
    parts |= {"mlp.up_proj.weight": (M, E), "mlp.down_proj.weight": (E, M)}
    parts |= {"mlp.up_proj.bias": (M,), "mlp.down_proj.bias": (E,)} if config.mlp_bias else {}
    return parts | {"input_layernorm.weight": (E,), "post_attention_layernorm.weight": (E,)}


def _module_shapes(hidden_size: int) -> dict[str, tuple[int, ...]]:
    norms = ("enorm", "hnorm", "shared_head.norm")
    return {"eh_proj.weight": (hidden_size, 2 * hidden_size)} | {f"{name}.weight": (hidden_size,) for name in norms}


def answer(
    folder: Path, prompts: list[list[int]], device: str = "cpu", **settings: Any
) -> tuple[Engine, list[Request]]:
    """An engine that has answered these prompts, the last after the others."""
    engine = build_engine(EngineConfig.from_settings(model=str(folder), **SETTINGS | settings))
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=0)
    requests: list[Request] = []
    for part in (prompts[:-1], prompts[-1:]):
        requests += [engine.add_request(str(len(requests) + i), prompt, params) for i, prompt in enumerate(part)]
        while engine.has_work:
            engine.step()
    assert engine.executor.statistics.num_eager_steps == 0
    return engine, requests


def differences(model: Any, requests: list[Request]) -> list[str]:
    """Where answers are not transformers'."""
    found = []
    for prompt, request in zip(PROMPTS, requests, strict=True):
        tokens = torch.tensor(request.output_token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + request.output_token_ids])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        chosen = expected.gather(1, tokens[:, None])[:, 0]
        reported = torch.tensor([entry.logprob for entry in request.output_logprobs])
        for what, off in (("token", expected.amax(1) - chosen), ("log-probability", (reported - chosen).abs())):
            if not bool((off < TOLERANCE).all()):
                found.append(f"request {request.id}: a {what} is off by {off.max():.1e}")
    return found


def miscounted(engine: Engine) -> list[str]:
    """Layers whose experts got other tokens than those that steps computed."""
    num_tokens = engine.executor.statistics.real_tokens
    routers = {
        name: module for name, module in engine.executor.runner.model.named_modules() if isinstance(module, Router)
    }
    return [
        f"{name} gave {int(router.totals.sum())} tokens to experts, and {router.routing.top} experts get {num_tokens} each"
        for name, router in routers.items()
        if int(router.totals.sum()) != router.routing.top * num_tokens
    ]


def check(config: Any, folder: Path, **settings: Any) -> list[str]:
    """What is wrong with a model of this config; ModelError if these settings cannot be with it."""
    model = write_model(config, folder)
    engine, requests = answer(folder, PROMPTS, **settings)
    found = differences(model, requests) + miscounted(engine)
    engine.shutdown()
    if engine.executor.specs.reuses_prefixes and not requests[-1].num_cached_tokens:
        found.append("no prefix was found in the cache")
    for way, (prompts, further) in WAYS.items():
        if way == "with a draft module" and not may_draft(resolve(str(folder)).config):
            continue
        engine, others = answer(folder, prompts, **settings | further)
        engine.shutdown()
        for ours, other in zip(requests, others, strict=False):
            if ours.output_token_ids != other.output_token_ids:
                found.append(f"request {ours.id}, {way}: {other.output_token_ids}, not {ours.output_token_ids}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=12, help="configs of each family")
    parser.add_argument("--families", help="model types, with commas between them; all if not given")
    parser.add_argument("--settings", type=json.loads, default={}, help="of the engines, beside their own")
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    families = options.families.split(",") if options.families else list(FAMILIES)
    begun, results = time.monotonic(), []
    for family in families:
        for seed in range(options.seeds):
            config = FAMILIES[family](random.Random(seed))
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found, refused = check(config, Path(folder), **options.settings), ""
                except ModelError as error:
                    found, refused = [], str(error)
            results.append({"family": family, "seed": seed, "differences": found, "refused": refused})
            for difference in found:
                print(f"{family}, seed {seed}: {difference}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(results, indent=1))
    wrong = sum(bool(result["differences"]) for result in results)
    num_refused = sum(bool(result["refused"]) for result in results)
    print(f"{len(results)} models in {time.monotonic() - begun:.0f} s, {wrong} wrong, {num_refused} refused")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()

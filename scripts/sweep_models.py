"""Tries every causal language model of the installed transformers, tiny and with random weights: as its config is, and with each
switch of its config the other way. Each must give an engine the log-probabilities of transformers, or be refused in a sentence.

    python scripts/sweep_models.py [--types gpt2,phi] [--plain] [--others] [--ranks 2] [--seconds 3000] [--out sweep.json]

A sentence is for people: one that shows names from inside (`INNER_NAMES`) counts as a failure. So does advice that would be
refused in turn: what a sentence says to add to config.json is added, and must help.

With --ranks, so many processes share each, or it is refused in a sentence.

With --others, the model types that write no text (encoders, vision, sound, …) are tried too: each must be refused in a sentence.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from damage_checkpoints import INNER_NAMES
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ModelError
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import resolve
from stepgraph.models.transformers_model import judge_part
from stepgraph.models.transformers_parts import ShapesOnly
from stepgraph.parallel.shard import Shard

SIZES = {
    **dict.fromkeys(("vocab_size",), 200),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "n_group", "topk_group"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 96,
    **dict.fromkeys(("n_input_layers", "n_output_layers"), 0),
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
}
VALUES = {
    "pad_token_id": [0],
    "activation_sparsity_pattern": [[0.5, 0.0]],
    "sliding_window": [20],
    "hidden_act": ["gelu", "relu"],
    "activation_function": ["relu"],
    "logit_scale": [0.5],
    "attention_dropout": [0.1],
    "num_kv_shared_layers": [1],
    "final_logit_softcapping": [30.0],
}
"""Other values of fields that are no switches."""
TOKENS = [(7 * i + 3) % 90 + 4 for i in range(40)]


def tiny(config_class: type) -> Any:
    """A config with each size it knows made small."""
    known = config_class().to_dict()
    names = known.keys() | getattr(config_class, "attribute_map", {}).keys()
    sizes = {name: size for name, size in SIZES.items() if name in names}
    if isinstance(known.get("layer_types"), list):
        kinds = list(dict.fromkeys(known["layer_types"]))
        sizes["layer_types"] = (kinds * 2)[:2]
    if isinstance(known.get("activation_sparsity_pattern"), list):
        sizes["activation_sparsity_pattern"] = [0.0, 0.0]
    return config_class(**sizes)


def variants(config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What to change, and its name."""
    yield "as it is", {}
    for name, value in config.to_dict().items():
        if isinstance(value, bool):
            yield f"{name} = {not value}", {name: not value}
    for name, values in VALUES.items():
        if hasattr(config, name):
            yield from ((f"{name} = {value}", {name: value}) for value in values)


def refused(error: ModelError, folder: Path) -> tuple[str, str]:
    """What a refusal is worth."""
    sentence = str(error).replace(str(folder), "FOLDER")
    if found := INNER_NAMES.search(sentence):
        return "failed", f'a sentence with "{found[0]}": {sentence}'
    added: dict[str, Any] = {}
    if 'Add "max_position_embeddings"' in sentence:
        added = {"max_position_embeddings": 256}
    elif class_name := re.search(r'Add "architectures": \["(\w+)"\]', sentence):
        added = {"architectures": [class_name[1]]}
    if added:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | added))
        try:
            resolve(str(folder), weights=False)
        except ModelError as second:
            return "failed", f"advice that does not help: {sentence} Then: {second}"
    return "refused", sentence


def try_other(config: Any, architecture: str | None, folder: Path) -> tuple[str, str]:
    """What came of a model of another kind: "refused", or "failed"."""
    config.architectures = architecture and [architecture]
    config.save_pretrained(folder)
    try:
        resolve(str(folder), weights=False)
    except ModelError as error:
        return refused(error, folder)
    except Exception as error:  # a traceback where a sentence should be: what this looks for
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    return "failed", f"{architecture} is taken for a language model"


def others() -> Iterator[tuple[str, str | None]]:
    """Model types and classes of transformers that are not causal language models: the base class, and those with other heads."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    lists = [names for key, names in vars(modeling_auto).items() if re.fullmatch("MODEL_.*MAPPING_NAMES", key)]
    for model_type in CONFIG_MAPPING:
        found = [names[model_type] for names in lists if names is not causal and model_type in names]
        classes = {name for entry in found for name in ((entry,) if isinstance(entry, str) else entry)}
        yield from ((model_type, name) for name in sorted(classes - {causal.get(model_type)}) or [None])


def try_one(config: Any, folder: Path, workers: Workers | None) -> tuple[str, str]:
    """What came of it ("right", "wrong", "refused", "failed", or "transformers fails"), and a sentence about it.

    Args:
        config: of transformers.
        folder: empty.
        workers: of the ranks that share it; None: there is one.
    """
    classes = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [(classes[0] if isinstance(classes, tuple) else classes).__name__]
    try:
        config.save_pretrained(folder)
        source = resolve(str(folder), model_impl="transformers")  # first: parts that are not tiny take long to fill
        if workers is not None:
            judge_part(source.config, ShapesOnly(Shard(0, workers.size)))  # a build that fails ends the workers
    except ModelError as error:
        return refused(error, folder)
    except Exception as error:  # a traceback where a sentence should be: what this looks for
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    try:
        torch.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in hf_model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
            expected = hf_model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
        hf_model.save_pretrained(folder)
    except Exception as error:  # whatever a combination of switches that nobody meant leads to
        return "transformers fails", f"{type(error).__name__}: {str(error)[:120]}"
    try:
        settings = {
            "model": str(folder),
            "model_impl": "transformers",
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 64,
        }
        settings |= {"max_num_seqs": 2, "max_num_batched_tokens": 16, "capture_sizes": (2, 16), "num_kv_blocks": 9}
        engine_config, executor = EngineConfig.from_settings(**settings), None
        if workers is not None:
            engine_config = EngineConfig.from_settings(**settings, tensor_parallel_size=workers.size)
            executor = build_ranked_executor(engine_config, source, workers=workers)
        engine = build_engine(engine_config, executor=executor)
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
        request = engine.add_request("a", TOKENS, params)
        while engine.has_work:
            engine.step()
        eager = engine.executor.statistics.num_eager_steps
        engine.shutdown()
    except ModelError as error:
        return refused(error, folder)
    except Exception as error:  # a traceback where a sentence should be: what this looks for
        return "failed", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    found = torch.tensor([position.logprob for position in request.prompt_logprobs[1:]])
    chosen = expected[:-1].gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    off = (found - chosen).abs().max().item()
    return (
        "right" if off < 1e-3 and not eager else "wrong"
    ), f"log-probabilities off by {off:.1e}, {eager} eager steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, with commas between them; all if not given")
    parser.add_argument("--seconds", type=float, default=3000.0, help="begin no other variant after so long")
    parser.add_argument("--plain", action="store_true", help="only each config as it is")
    parser.add_argument("--others", action="store_true", help="model types that write no text, too")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each model")
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("stepgraph").setLevel(logging.ERROR)
    types = {config_class: model_type for model_type, config_class in CONFIG_MAPPING.items()}
    wanted = options.types.split(",") if options.types else None
    workers = Workers(options.ranks) if options.ranks > 1 else None
    results: list[dict[str, str]] = []
    begun = time.monotonic()

    def record(model_type: str, variant: str, outcome: str, about: str) -> None:
        results.append({"type": model_type, "variant": variant, "outcome": outcome, "about": about})
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))
        if outcome in ("failed", "wrong"):
            print(f"{model_type}, {variant}: {outcome}: {about}", flush=True)

    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_type = types.get(config_class, config_class.__name__)
        if wanted is not None and model_type not in wanted:
            continue
        try:
            base = tiny(config_class)
            cases = list(variants(base))[: 1 if options.plain else None]
        except Exception as error:  # a class of many parts, which has no tiny one by these names
            record(model_type, "", "no tiny config", repr(error)[:200])
            continue
        for name, changes in cases:
            if time.monotonic() - begun > options.seconds:
                break
            with tempfile.TemporaryDirectory() as folder:
                try:
                    config = config_class(**base.to_dict() | changes)
                except Exception as error:
                    outcome, about = "transformers fails", repr(error)[:200]
                else:
                    outcome, about = try_one(config, Path(folder), workers)
            record(model_type, name, outcome, about)
    for model_type, architecture in others() if options.others else ():
        if (wanted is not None and model_type not in wanted) or time.monotonic() - begun > options.seconds:
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                config = CONFIG_MAPPING[model_type]()
            except Exception as error:  # a class that has no config without arguments
                outcome, about = "transformers fails", repr(error)[:200]
            else:
                outcome, about = try_other(config, architecture, Path(folder))
        record(model_type, str(architecture), outcome, about)
    counts = collections.Counter(result["outcome"] for result in results)
    seconds, num_types = time.monotonic() - begun, len({result["type"] for result in results})
    print(f"{num_types} types, {len(results)} variants in {seconds:.0f} s:", dict(counts))
    raise SystemExit(1 if counts["failed"] or counts["wrong"] else 0)


if __name__ == "__main__":
    main()

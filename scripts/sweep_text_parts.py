"""Tries every class of the installed transformers that takes images, sound or video beside text, tiny, with random weights: its
text part must give the log-probabilities that the whole gives to text alone, or be refused in a sentence.

    python scripts/sweep_text_parts.py [--types gemma3,qwen3_vl] [--any] [--out sweep.json]

With --any, classes that are not known to be right are tried too: those that are "right" may be added to `_CLASSES` of
`stepgraph/models/text_part.py` once their code has been read for masks that a text of this length does not show.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from sweep_models import SIZES, TOKENS, refused
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import ModelError
from stepgraph.models import text_part

LISTS = ("MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
MEDIA_SIZES = {
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "encoder_ffn_dim", "intermediate_size", "ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_global_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 2),
    "head_dim": 16,
    "image_size": 64,
    "out_hidden_size": SIZES["hidden_size"],
    "output_dim": SIZES["hidden_size"],
}
MOST_PARAMETERS = 20_000_000
"""Of a model that is tried: sizes of some parts go by names that are not known here."""
MEDIA_TOKEN = 199
"""Outside `TOKENS`, as the ids of all tokens that stand for something else."""


def multimodal() -> Iterator[tuple[str, str]]:
    """Model types and names of classes."""
    names: dict[str, Any] = {}
    for name in LISTS:
        names |= getattr(modeling_auto, name)
    for model_type, found in names.items():
        yield from ((model_type, name) for name in ((found,) if isinstance(found, str) else found))


def shrink(fields: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """Fields of a config, with the sizes that it has replaced; of parts that are not text, by `MEDIA_SIZES`."""
    small: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "text_config" and isinstance(value, dict):
            small[name] = shrink(value, SIZES)
        elif isinstance(value, dict) and "model_type" in value:
            small[name] = shrink(value, MEDIA_SIZES)
        elif name in sizes and value is not None:
            small[name] = sizes[name]
        elif name == "layer_types" and isinstance(value, list):
            small[name] = (list(dict.fromkeys(value)) * 2)[:2]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            small[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, MEDIA_TOKEN)
        elif name == "rope_parameters" and isinstance(value, dict) and "rope_type" in value:
            small[name] = value | {"mrope_section": [2, 3, 3]}  # which classes without sections do not read
        else:
            small[name] = value
    return small


def tiny(model_type: str) -> Any:
    """A config with each size it knows made small, and one number of layers and heads that fit."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class.from_dict(shrink(config_class().to_dict(), {}))


def try_one(config: Any, class_name: str, folder: Path, model_impl: str) -> tuple[str, str]:
    """What came of it, and a sentence about it; see `sweep_models.try_one`. The checkpoint is left in the folder, if transformers
    can make one."""
    config.architectures = [class_name]
    try:
        with torch.device("meta"):
            hf_class = getattr(transformers, class_name, None) or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            size = sum(parameter.numel() for parameter in hf_class(copy.deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            return "transformers fails", f"has {size:,} parameters with these sizes"
        torch.manual_seed(0)
        hf_model = hf_class(config).eval()
        with torch.no_grad():
            for name, parameter in hf_model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
            hf_model(input_ids=torch.tensor([TOKENS]))
        hf_model.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [class_name]}))
    except Exception as error:  # a class of many parts, whose sizes depend on each other
        return "transformers fails", f"{type(error).__name__}: {str(error)[:160]}"
    settings = {
        "model": str(folder),
        "model_impl": model_impl,
        "device": "cpu",
        "dtype": "float32",
        "max_model_len": 64,
    }
    settings |= {"max_num_seqs": 2, "max_num_batched_tokens": 16, "capture_sizes": (2, 16), "num_kv_blocks": 9}
    try:
        engine = build_engine(EngineConfig.from_settings(**settings))
        params = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, logprobs=0, ignore_eos=True)
        request = engine.add_request("a", TOKENS, params)
        while engine.has_work:
            engine.step()
        engine.shutdown()
    except ModelError as error:
        return refused(error, folder)
    except Exception as error:  # a traceback where a sentence should be: what this looks for
        return "failed", f"{type(error).__name__}: {error}"
    tokens = [*TOKENS, *request.output_token_ids]
    with torch.no_grad():
        expected = hf_model(input_ids=torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
    found = torch.tensor([p.logprob for p in (*request.prompt_logprobs[1:], *request.output_logprobs)])
    off = (found - expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]).abs().max().item()
    most_likely = expected[len(TOKENS) - 1 :].max(-1).values - found[len(TOKENS) - 1 :]
    right = off < 1e-3 and most_likely.max() < 1e-3  # a tie may go either way
    return "right" if right else "wrong", f"log-probabilities off by {off:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="model types, with commas between them; all if not given")
    parser.add_argument("--any", action="store_true", help="classes that are not known to be right, too")
    parser.add_argument("--out", type=Path, help="JSON file for all results")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.getLogger("stepgraph").setLevel(logging.CRITICAL)
    wanted = options.types.split(",") if options.types else None
    results: list[dict[str, str]] = []
    if options.any:
        every = frozenset(class_name for _, class_name in multimodal())
        mock.patch.object(text_part, "_CLASSES", every).start()
    for model_type, class_name in multimodal():
        if wanted is not None and model_type not in wanted:
            continue
        if not options.any and class_name not in text_part._CLASSES:
            continue
        for model_impl in ("auto", "transformers"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    config = tiny(model_type)
                except Exception as error:  # a class of many parts, which has no tiny one by these names
                    outcome, about = "no tiny config", repr(error)[:200]
                else:
                    outcome, about = try_one(config, class_name, Path(folder), model_impl)
            results.append(
                {"type": model_type, "class": class_name, "impl": model_impl, "outcome": outcome, "about": about}
            )
            print(f"{model_type} ({class_name}, {model_impl}): {outcome}: {about}", flush=True)
            if outcome in ("no tiny config", "transformers fails"):
                break
        if options.out:
            options.out.write_text(json.dumps(results, indent=1))
    counts = collections.Counter(result["outcome"] for result in results)
    print(f"{len(results)} tries:", dict(counts))
    raise SystemExit(1 if counts["failed"] or counts["wrong"] else 0)


if __name__ == "__main__":
    main()

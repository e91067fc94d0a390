"""Make docs/models.md: what becomes of every class of the installed transformers that writes text, of native models that it does
not have, and of the models that people are told how to serve (`published_models.py`).

    python scripts/make_models_page.py [--only Qwen3ForCausalLM,gpt-oss-20b] [--count]

Each is made tiny with random weights, saved and served on the CPU in float32; its tokens and log-probabilities must be those of
transformers, for a prompt in chunks and an answer. That takes many minutes; with --only, the other rows stay as they are. With
--count, only rows that are new are tried.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from published_models import PUBLISHED, build
from sweep_models import SIZES, tiny, try_other
from sweep_text_parts import tiny as tiny_multimodal
from sweep_text_parts import try_one
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging

from stepgraph.errors import ModelError
from stepgraph.models import DecoderConfig, resolve
from stepgraph.models.gguf import _ARCHITECTURES as OF_GGUF
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.sharing import possible_sizes
from stepgraph.models.text_part import _APART as APART
from stepgraph.models.text_part import _CLASSES as OF_TEXT_PARTS
from stepgraph.models.transformers_config import TransformersConfig
from stepgraph.models.transformers_model import judge_part
from stepgraph.models.transformers_parts import ShapesOnly
from stepgraph.parallel.shard import Shard
from stepgraph.spec.mtp_checkpoint import may_draft

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
HEAD = """\
<!-- Made by scripts/make_models_page.py, which tries each: run it after a change to models or to the version of transformers. -->

# Models

{counts}

Tried with transformers {version}: each tiny, with random weights, on the CPU in float32, its tokens and log-probabilities
compared with transformers' own.

- **native**: a class of `stepgraph/models`. **transformers**: transformers' own code inside our graphs. Both run all steps in
  graphs, with prompts in chunks, and check proposals (Speculation) of the methods `suffix` and `ngram`; those of `mtp` come from
  modules that a checkpoint brings, or from [trained ones](training-mtp.md).
- **TP**: whether devices can share the model ([tensor parallelism](tensor-parallel.md)).
- **LoRA**: whether adapters can be loaded.
- **Formats**: safetensors in 16 or 32 bits; FP8: checkpoints in 8 or 4 bits, and `--quantization fp8`
  and `int4` ([quantization](quantization.md)); MXFP4: gpt-oss's checkpoints in 4 bits, which become numbers; GGUF.
- **refused**: at start, before weights are read, with a sentence like this one.

"""
SECTIONS = {
    "published": """## Models of up to 41B parameters that people are told how to serve

Of a public collection of recipes (August 2026), by features of their configs; parts that see or hear are left out. A row may be
of several recipes.""",
    "decoders": "## Decoders of text",
    "text parts": """## Models that take images, sound or video too

Their decoders, with text alone; [what is left out](adding-a-model.md#models-that-take-images-too).""",
    "foreign": "## Native classes that transformers does not have",
    "others": """## Others of transformers' list of causal language models

Encoders, decoders of what an encoder has read, and classes that take more than text.""",
}
COLUMNS = ("Model", "Class", "Runs", "Graphs", "Speculation", "TP", "LoRA", "Formats")
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MORE: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "bert-generation": {"is_decoder": True},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": None},
        "sliding_window": 20,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 2.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "dory": {
        "rope_parameters": None,
        "layer_types": ["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"],
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
    },
    "dots3_note_text": _LATENT
    | {
        "layer_types": ["indexed_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse"],
        "per_layer_config": {},
    },
    "gemma4_text": {"vocab_size_per_layer_input": 200},
    "bloom": {"seq_length": 256},
    "gpt_neo": {
        "attention_layers": ["global", "local"],
        "attention_types": [[["global", "local"], 1]],
        "window_size": 20,
        "intermediate_size": 96,
    },
    "glm4_moe_lite": _LATENT,
    "llama4_text": {
        "attention_chunk_size": 128,
        "attn_temperature_tuning": True,
        "floor_scale": 8,
        "layer_types": ["chunked_attention", "full_attention"],
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
    },
    "longcat_flash": _LATENT | {"qk_head_dim": 24, "zero_expert_num": 2},
    "minicpm3": _LATENT,
    "sarvam_mla": _LATENT,
    "youtu": _LATENT,
    "zamba": {"layer_types": ["linear_attention", "hybrid"]},
    "zamba2": {"layer_types": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid"] * 2},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "time_step_min": 1e-9,
    },
    "mamba2": {"num_heads": 8},
}
"""By model type: sizes that must fit others."""
NOT_TEXT = ("SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT")
PUBLISHED_AS = {"sarvam_moe": "SarvamMoEForCausalLM"}
"""By model type: the class that checkpoints name, where the one that transformers has is that of another type here."""
PARTS = re.compile(r".*(text|vision|audio|encoder|decoder|image|global)_?.*config")


class Row(NamedTuple):
    """What became of a model."""

    section: str
    name: str
    class_name: str
    cells: tuple[str, ...]
    recipes: int = 1

    @property
    def runs(self) -> bool:
        """Whether it gives transformers' tokens."""
        return self.cells[0] in ("native", "transformers")

    def line(self) -> str:
        """Of the page."""
        times = f" × {self.recipes}" if self.recipes > 1 else ""
        return f"| {self.name}{times} | `{self.class_name}` | {' | '.join(self.cells)} |"


def is_other(model_type: str) -> bool:
    """Whether a type of transformers' list is of no decoder that was made for text alone."""
    lists = [getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES") for name in NOT_TEXT]
    parts = getattr(CONFIG_MAPPING[model_type], "sub_configs", None) or {}
    return (
        model_type.endswith("assistant") or any(model_type in names for names in lists) or any(map(PARTS.match, parts))
    )


def tiny_decoder(model_type: str) -> Any:
    """A config with each size it knows made small."""
    config_class = CONFIG_MAPPING[model_type]
    try:
        fields = tiny(config_class).to_dict()
    except Exception:  # what is in `MORE` is missing
        fields = {name: SIZES.get(name, value) for name, value in config_class().to_dict().items()}
    padding = {"pad_token_id": 0} if "pad_token_id" in fields else {}
    return config_class.from_dict(fields | padding | MORE.get(model_type, {}))


def everything() -> Iterator[tuple[str, str, str, int, Callable[[], Any] | None]]:
    """Section, name, class, recipes and how to make a tiny config of each row; None: transformers has no such class."""
    for recipe in PUBLISHED:
        make = None if recipe.config is None else partial(build, recipe)
        yield "published", recipe.names, recipe.class_name, recipe.recipes, make
    known: dict[str, str] = {}
    for model_type, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        known.setdefault(name, model_type)
    names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    known |= {name: model_type for model_type, name in names.items() if name in OF_TEXT_PARTS}
    classes = {t: name if isinstance(name, str) else name[0] for t, name in names.items()} | PUBLISHED_AS
    for model_type, class_name in sorted(classes.items(), key=lambda item: (item[1], item[0])):
        if model_type in {known[name] for name in OF_TEXT_PARTS}:  # listed below
            continue
        section = "others" if is_other(model_type) else "decoders"
        yield section, model_type, class_name, 1, partial(tiny_decoder, model_type)
    recipes = {recipe.class_name: recipe for recipe in PUBLISHED if recipe.config is not None}
    for class_name in sorted(OF_TEXT_PARTS):
        model_type, recipe = known[class_name], recipes.get(class_name)
        build_it = partial(tiny_multimodal, model_type) if recipe is None else partial(build, recipe)
        if class_name in APART:  # as a class of transformers that runs here without more packages
            build_it = partial(tiny_decoder, f"{model_type}_text")
        yield "text parts", model_type, class_name, 1, build_it
    for class_name in sorted(ARCHITECTURES.keys() - set(classes.values())):
        yield "foreign", "", class_name, 1, None


def _native(class_name: str, *, spread: str = "yes", modules: bool = True) -> tuple[str, ...]:
    gguf = any(architecture.class_name == class_name for architecture in OF_GGUF.values())
    return (
        "native",
        "yes",
        "suffix, ngram" + ", mtp" * modules,
        spread,
        "yes",
        "safetensors, FP8" + ", MXFP4" * (class_name == "GptOssForCausalLM") + ", GGUF" * gguf,
    )


def refused(sentence: str) -> tuple[str, ...]:
    """The cells of a row whose model does not run."""
    short = re.sub(r"^[^:]{0,120} cannot (?:run through transformers' code|run): ", "", sentence.replace("\n", " "))
    short = re.split(r"(?<=[a-z\d)`\"])\. (?=[A-Z])", short)[0].rstrip(".").replace("|", "\\|")
    return (f"refused: {short}", *["–"] * 5)


def try_row(section: str, class_name: str, make: Callable[[], Any] | None) -> tuple[str, ...]:
    """The cells of a row, after trying it."""
    if make is None:
        return _native(class_name) if class_name in ARCHITECTURES else refused("its code is no part of transformers")
    if class_name in APART:
        class_name = class_name.replace("ConditionalGeneration", "CausalLM")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            config = make()
        except Exception as error:  # a class of many parts, which has no tiny config by these names
            return refused(f"not tried, as it has no tiny config ({type(error).__name__})")
        if section == "others":
            outcome, about = try_other(copy.deepcopy(config), class_name, folder)
            if outcome == "refused":
                return refused(about)
        outcome, about = try_one(config, class_name, folder, "auto")
        about = " ".join(about.replace("|", "\\|").split())
        if outcome == "transformers fails":
            outcome, about = try_other(config, class_name, folder)  # may be refused by its config alone
            if outcome != "refused":
                return refused("not tried, as transformers' own class fails in tiny sizes")
        if outcome == "refused":
            return refused(about)
        if outcome != "right":
            return (f"**{outcome}**: {about[:200]}", *["–"] * 5)
        found = resolve(str(folder)).config
        if isinstance(found, DecoderConfig):
            spread = "yes" if len(possible_sizes(found, expert_parallel=False)) > 1 else "no"
            return _native(class_name, spread=spread, modules=may_draft(found))
        assert isinstance(found, TransformersConfig), found
        try:
            judge_part(found, ShapesOnly(Shard(0, 2)))
            spread = "yes"
        except ModelError:
            spread = "no"
        return ("transformers", "yes", "suffix, ngram", spread, "no", "safetensors")


def page(rows: list[Row], version: str) -> str:
    """The page's text.

    Args:
        rows: of all sections.
        version: of transformers.
    """
    of = {section: [row for row in rows if row.section == section] for section in SECTIONS}
    recipes = sum(row.recipes for row in of["published"])
    running = sum(row.recipes for row in of["published"] if row.runs)
    ways = {way: sum(row.cells[0] == way for row in of["decoders"]) for way in ("native", "transformers")}
    counts = (
        f"Of {recipes} models that people are told how to serve, **{running} run**. Of {len(of['decoders'])} decoders of text "
        f"that transformers has, **{sum(ways.values())} run**: {ways['native']} natively, {ways['transformers']} through its own "
        "code. The others are refused at start."
    )
    text = HEAD.format(counts=counts, version=version)
    for section, head in SECTIONS.items():
        lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *(row.line() for row in of[section])]
        text += f"{head}\n\n" + "\n".join(lines) + "\n\n"
    return text.rstrip("\n") + "\n"


def read_rows(text: str) -> list[Row]:
    """The rows of a page."""
    rows: list[Row] = []
    sections = {head.split("\n")[0]: section for section, head in SECTIONS.items()}
    section = ""
    for line in text.splitlines():
        section = sections.get(line, section)
        if match := re.fullmatch(r"\| (.*?)(?: × (\d+))? \| `(\w+)` \| (.*) \|", line):
            cells = tuple(re.split(r"(?<!\\) \| ", match[4]))
            rows.append(Row(section, match[1], match[3], cells, int(match[2] or 1)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="names or classes of rows to try, with commas between them")
    parser.add_argument("--count", action="store_true", help="try nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    logging.getLogger("stepgraph").setLevel(logging.CRITICAL)
    old = {row[:3]: row.cells for row in read_rows(PAGE.read_text())} if PAGE.is_file() else {}
    wanted = set() if options.count else set(options.only.split(",")) if options.only else None
    rows: list[Row] = []
    for section, name, class_name, recipes, make in everything():
        key = section, name, class_name
        if key in old and wanted is not None and not wanted & {name, class_name}:
            cells = old[key]
        else:
            cells = try_row(section, class_name, make)
            print(f"{name} ({class_name}): {cells[0]}", flush=True)
        rows.append(Row(section, name, class_name, cells, recipes))
    PAGE.write_text(page(rows, transformers.__version__))
    print(PAGE.read_text().split("\n\n")[2])


if __name__ == "__main__":
    main()

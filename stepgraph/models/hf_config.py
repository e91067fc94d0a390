"""The fields of a config.json as an object with defaults filled in: transformers' config object, or one like it.

transformers' config classes take more than a second to import, half of what else a start on a laptop takes. A config of the
model types that are served most, without anything unusual, is read here instead; every other goes through transformers. The
two agree on whatever is read here: `tests/models/test_hf_config.py` holds them against each other.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from stepgraph.errors import ModelError
from stepgraph.models.alike import DIFFERENCES, in_known_fields
from stepgraph.models.json_file import read_json

logger = logging.getLogger(__name__)

_COMMON: dict[str, Any] = {
    "mlp_bias": False,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": None,
    "head_dim": None,
}
_DEFAULTS: dict[tuple[Any, Any], dict[str, Any]] = {
    ("llama", "LlamaForCausalLM"): _COMMON,
    ("qwen2", "Qwen2ForCausalLM"): _COMMON | {"use_sliding_window": False},
    ("qwen3", "Qwen3ForCausalLM"): _COMMON | {"use_sliding_window": False, "head_dim": 128},
    ("qwen3_moe", "Qwen3MoeForCausalLM"): _COMMON
    | {
        "use_sliding_window": False,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
}
"""By model type and class: the fields that a config may lack, and what they are then in transformers' class."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_REQUIRED = (*_SIZES, "architectures", "hidden_act", "rms_norm_eps", "bos_token_id", "eos_token_id")
_OF_NO_ACCOUNT = frozenset(
    (
        "_name_or_path",
        "attention_dropout",
        "initializer_range",
        "max_window_layers",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "router_aux_loss_coef",
        "transformers_version",
        "use_cache",
    )
)
"""Fields that change nothing in a model without sliding windows."""


_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads", "n_head", "num_heads")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_WIDTHS = ("vocab_size", "hidden_size", "n_embd", "d_model", "max_position_embeddings", "n_positions")
_OPTIONAL_WIDTHS = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "num_key_value_heads",
    "head_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "global_head_dim",
    "num_global_key_value_heads",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_OPTIONAL = (*_OPTIONAL_WIDTHS, *_EXPERTS)
_MOST_OF = (
    dict.fromkeys((*_COUNTS, "decoder_sparse_step", "moe_layer_interval"), 2**12)
    | dict.fromkeys(_EXPERTS, 2**14)
    | dict.fromkeys((*_WIDTHS, *_OPTIONAL_WIDTHS), 2**24)
)
"""By the names that a config may give to the sizes of a model: more than any model has. Lists are made and loops run by them, in
transformers' classes too, before a weight is read that might say otherwise."""


def check_sizes(fields: Mapping[str, Any], where: object) -> None:
    """Raise ModelError if a config says that a model has so many layers, say, as none can have. Of what is no whole number,
    whoever reads it judges, but for numbers of experts: transformers checks them by one of their names only."""
    for name, most in _MOST_OF.items():
        size, least = fields.get(name), 0 if name in _OPTIONAL else 1
        no_number = name in _EXPERTS and isinstance(size, str | float | bool)
        if no_number or (type(size) is int and not least <= size <= most):
            raise ModelError(
                f"{where}: {name} is {size!r:.80}, and must be {'a whole number ' * no_number}between {least} and {most}; "
                "download the file again."
            )


def hf_config_from_json(path: Path, *, for_transformers: bool = False) -> Any:
    """The config object of a config.json.

    Args:
        path: of the file.
        for_transformers: it must be transformers' own, as its model classes take it.

    Raises:
        ModelError: the file cannot be read, or transformers does not know its model type.
    """
    fields = read_json(path)
    for part in (fields, fields.get("text_config")):
        check_sizes(part if isinstance(part, dict) else {}, path)
    try:
        config = _read(path, fields, for_transformers=for_transformers)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many types here, validation errors of its own among them
        logger.debug("transformers cannot read %s", path, exc_info=error)
        raise ModelError(f"transformers cannot read {path}: {why_unusable(error, fields)}.") from error
    beside = path.with_name("hf_quant_config.json")  # modelopt's, which may say more than the config
    if getattr(config, "quantization_config", None) is None and beside.is_file():
        described = read_json(beside).get("quantization")
        config.quantization_config = {"quant_method": "modelopt", "quantization": described}
    return config


def _read(path: Path, fields: Mapping[str, Any], *, for_transformers: bool) -> Any:
    known = in_known_fields(fields)
    plain = None if for_transformers else plain_config(known)
    if plain is not None:
        return plain
    from transformers import CONFIG_MAPPING, AutoConfig

    model_type = known.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f'{path} names no "model_type", e.g. "llama"; download it again.')
    if model_type not in CONFIG_MAPPING:
        named = fields.get("architectures")
        architecture = str(named[0]) if isinstance(named, list) and named else "the model"
        raise ModelError(foreign_code(architecture, model_type, has_code="auto_map" in fields))
    if known != fields:
        return CONFIG_MAPPING[model_type].from_dict(known)
    return AutoConfig.from_pretrained(path, trust_remote_code=False)


def why_unusable(error: Exception, fields: Mapping[str, Any]) -> str:
    """What transformers finds wrong with the fields of a config, in words; of what it did not look for, no more than that."""
    found = re.search(r"for field '(\w+)'", str(error))
    if found and (name := found[1]) in fields:
        return f"{name} is {fields[name]!r:.80}, which is of no use there; correct it, or download the file again"
    if isinstance(error.__cause__, ValueError):  # a check of several fields together
        return str(error.__cause__).rstrip(".")
    if isinstance(error, ValueError | OSError) and str(error):
        return str(error).rstrip(".")
    return "a field is missing, of the wrong type or far out of range; download it again"


def foreign_code(architecture: str, model_type: str, *, has_code: bool) -> str:
    """The sentence for a model whose class neither transformers nor stepgraph has.

    Args:
        architecture: its class.
        model_type: of its config.
        has_code: whether its config names code that comes with the checkpoint.
    """
    from transformers import __version__

    from stepgraph.models.registry import ARCHITECTURES

    if architecture in ARCHITECTURES:
        return (
            f"{architecture} runs here, but its config is read by transformers, whose version {__version__} does not know model "
            f'type "{model_type}"; install a later one: pip install --upgrade transformers'
        )
    where = "comes with its checkpoint and is not" if has_code else "is not"
    known = f" (it resembles Llama, but {DIFFERENCES[architecture]})" if architecture in DIFFERENCES else ""
    return (
        f'The code of {architecture}, of model type "{model_type}", {where} part of transformers {__version__}{known}; '
        "stepgraph runs no code from checkpoints. What runs are native models and classes of transformers: look for a checkpoint "
        'of this model that was converted to one (its name often ends in "-hf"), or for a GGUF file of architecture llama, '
        "qwen2, qwen2moe, qwen3, qwen3moe, deepseek2 or minicpm3. Or add a native model: docs/adding-a-model.md."
    )


def plain_config(fields: Mapping[str, Any]) -> SimpleNamespace | None:
    """The object that stands for transformers' config, made without it; None if these fields need transformers to read."""
    architectures = fields.get("architectures") or [None]
    defaults = _DEFAULTS.get((fields.get("model_type"), architectures[0]))
    if defaults is None or any(fields.get(name) is None for name in _REQUIRED):
        return None
    rest = dict(fields)
    rope = _plain_rope(rest)
    if rope is None:
        return None
    if rest.pop("sliding_window", None) is not None and rest.get("use_sliding_window", True):
        return None
    if set(rest.pop("layer_types", None) or ()) - {"full_attention"}:
        return None
    if rest.pop("mlp_only_layers", None):
        return None
    if (dtype := rest.pop("torch_dtype", None)) is not None:
        rest.setdefault("dtype", dtype)
    for name in _OF_NO_ACCOUNT:
        rest.pop(name, None)
    if set(rest) - set(defaults) - set(_REQUIRED) or rest.get("use_sliding_window"):
        return None
    if any(rest.get(name, default) is None for name, default in defaults.items() if default is not None):
        return None
    config = SimpleNamespace(**(defaults | rest), model_type=fields["model_type"], rope_parameters=rope)
    counts = [name for name, default in defaults.items() if type(default) is int]
    if (
        any(type(getattr(config, name)) is not int for name in (*_SIZES, *counts))
        or config.hidden_size % config.num_attention_heads
    ):
        return None
    return config


def _plain_rope(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Take the rope settings out of `fields`: in transformers' present form, or None if they scale or are unusual."""
    theta = fields.pop("rope_theta", None)
    scaling, rope = fields.pop("rope_scaling", None), fields.pop("rope_parameters", None)
    if rope is None:
        rope = {"rope_theta": theta, "rope_type": "default"}
    plain = scaling is None and set(rope) == {"rope_theta", "rope_type"} and rope["rope_type"] == "default"
    return dict(rope) if plain and isinstance(rope["rope_theta"], int | float) else None

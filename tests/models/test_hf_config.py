"""Configs that are read without transformers: never otherwise than transformers reads them."""

import json

import pytest
from transformers import AutoConfig

from stepgraph.models.hf_config import hf_config_from_json, plain_config
from stepgraph.models.registry import read_config

OF_EVERY_KIND = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 7],
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "vocab_size": 300,
}
WINDOWS = {"max_window_layers": 1, "sliding_window": 64, "use_sliding_window": False}
CONFIGS = {
    "llama": OF_EVERY_KIND
    | {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    | {"rope_scaling": None, "head_dim": 16},
    "qwen2": OF_EVERY_KIND | {"architectures": ["Qwen2ForCausalLM"]} | WINDOWS,
    "qwen3": OF_EVERY_KIND | {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True, "head_dim": 32} | WINDOWS,
    "qwen3_moe": OF_EVERY_KIND
    | {"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "head_dim": 32, "router_aux_loss_coef": 0.001}
    | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
    | WINDOWS,
}
OF_NO_ACCOUNT = (
    "attention_dropout",
    "initializer_range",
    "max_window_layers",
    "output_router_logits",
    "pretraining_tp",
    "router_aux_loss_coef",
    "use_cache",
)
CHANGES = {
    "attention_bias": [True],
    "dtype": ["float16"],
    "eos_token_id": [5],
    "head_dim": [8, 128],
    "layer_types": [["full_attention"] * 3, ["full_attention", "sliding_attention", "sliding_attention"]],
    "mlp_bias": [True],
    "mlp_only_layers": [[1]],
    "num_experts": [0, 4],
    "num_key_value_heads": [4],
    "rope_parameters": [{"rope_type": "default", "rope_theta": 7.0}, {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}],
    "rope_scaling": [{"rope_type": "linear", "factor": 4.0}],
    "rope_theta": [1e6],
    "sliding_window": [None, 32],
    "tie_word_embeddings": [False],
    "torch_dtype": ["float32"],
    "use_sliding_window": [True],
}  # fmt: skip


def with_each_change(fields):
    """The config itself, without each of its fields, and with each other value."""
    yield "as it is", fields
    for name in fields:
        yield f"{name} dropped", {key: value for key, value in fields.items() if key != name}
        if name not in OF_NO_ACCOUNT:  # where transformers minds a null
            yield f"{name} null", fields | {name: None}
    for name, values in CHANGES.items():
        for value in values:
            yield f"{name} = {value}", fields | {name: value}


@pytest.mark.parametrize("model_type", CONFIGS)
def test_what_is_read_without_transformers_is_what_transformers_reads(tmp_path, model_type) -> None:
    num_plain = 0
    for change, fields in with_each_change(CONFIGS[model_type] | {"model_type": model_type}):
        plain = plain_config(fields)
        if plain is None:
            continue
        (tmp_path / "config.json").write_text(json.dumps(fields))
        assert read_config(plain) == read_config(AutoConfig.from_pretrained(tmp_path)), change
        num_plain += 1
    assert num_plain > len(CONFIGS[model_type])  # most changes leave a config that is read here


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "unusual",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"use_sliding_window": True, "sliding_window": 32},
        {"num_nextn_predict_layers": 1},
        {"hidden_size": "64"},
        {"hidden_size": 66},
        {"architectures": ["AnotherForCausalLM"]},
        {"model_type": "another"},
    ],
)
def test_what_is_unusual_is_left_to_transformers(model_type, unusual) -> None:
    assert plain_config(CONFIGS[model_type] | {"model_type": model_type} | unusual) is None


def test_a_config_for_transformers_classes_is_transformers_own(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"] | {"model_type": "llama"}))
    assert type(hf_config_from_json(tmp_path / "config.json", for_transformers=True)).__name__ == "LlamaConfig"

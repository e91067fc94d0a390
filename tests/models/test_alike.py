"""Checkpoints of classes whose code is their makers', and which native models run: against transformers, in float32."""

import json

import pytest
import torch
import transformers
from checkpoints import DYNAMIC_ROPE, LLAMA3_ROPE, SIZES, hf_config, random_hf_model
from safetensors.torch import load_file
from stepping import Stepper

from stepgraph.errors import ModelError
from stepgraph.models import DecoderConfig, load_model, resolve
from stepgraph.models.alike import DIFFERENCES
from stepgraph.models.fp8_checkpoint import READABLE
from stepgraph.models.gguf import _ARCHITECTURES as GGUF_ARCHITECTURES
from stepgraph.models.hf_config import foreign_code
from stepgraph.models.update import plan_update, write

TOKENS = [(7 * i + 3) % 96 for i in range(60)]
HEADS = SIZES | {"head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6}
PLAIN = {key: value for key, value in HEADS.items() if key != "head_dim"}
MINICPM = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 16}
AS_GRANITE = transformers.GraniteConfig(
    **PLAIN,
    tie_word_embeddings=True,
    embedding_multiplier=12.0,
    residual_multiplier=1.4 / 2**0.5,
    logits_scaling=64 / 16,
    attention_multiplier=16**-0.5,
)

CHECKPOINTS = {
    "LLaMAForCausalLM": (lambda: hf_config("LlamaConfig", **PLAIN), {"model_type": "llama"} | PLAIN),
    "ExaoneForCausalLM": (
        lambda: hf_config("ExaoneConfig", **PLAIN, rope_parameters=LLAMA3_ROPE),
        {
            "model_type": "exaone",
            "num_layers": 2,
            "layer_norm_epsilon": 1e-6,
            "activation_function": "silu",
            "rope_theta": 10000.0,
            "rope_scaling": {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"},
        }
        | {
            key: value for key, value in PLAIN.items() if key not in ("num_hidden_layers", "rms_norm_eps", "hidden_act")
        },
    ),
    "InternLM3ForCausalLM": (
        lambda: hf_config("InternLM3Config", **HEADS, attention_bias=True, mlp_bias=True, rope_parameters=DYNAMIC_ROPE),
        HEADS
        | {"model_type": "internlm3", "qkv_bias": True, "bias": True, "rope_theta": 10000.0}
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    ),
    "IQuestCoderForCausalLM": (
        lambda: hf_config("IQuestCoderConfig", **HEADS),
        HEADS | {"model_type": "iquestcoder", "clip_qkv": None, "use_sliding_window": False, "sliding_window": None},
    ),
    "InternLMForCausalLM": (
        lambda: hf_config("LlamaConfig", **PLAIN | {"num_key_value_heads": 4}, attention_bias=True),
        {key: value for key, value in PLAIN.items() if key != "num_key_value_heads"}
        | {"model_type": "internlm", "bias": True, "rotary": {"base": 10000, "type": "dynamic"}},
    ),
    "AquilaForCausalLM": (lambda: hf_config("LlamaConfig", **PLAIN), {"model_type": "aquila"} | PLAIN),
    "XverseForCausalLM": (
        lambda: hf_config("LlamaConfig", **PLAIN),
        {"model_type": "xverse", "max_tokenizer_truncation": 128} | PLAIN,
    ),
    "TeleChat3ForCausalLM": (
        lambda: hf_config("LlamaConfig", **HEADS, attention_bias=True, mlp_bias=True),
        {"model_type": "telechat3", "attention_bias": True, "mlp_bias": True} | HEADS,
    ),
    "MiniCPMForCausalLM": (lambda: AS_GRANITE, {"model_type": "minicpm"} | MINICPM | PLAIN),
}
"""By the class that checkpoints name: transformers' config of the reference, and the config.json in the words of the makers."""


def write_checkpoint(architecture, folder):
    """Returns transformers' model."""
    config, fields = CHECKPOINTS[architecture]
    hf_model = random_hf_model(config())
    hf_model.save_pretrained(folder)
    write_config(folder, fields, architecture)
    return hf_model


def write_config(folder, fields, architecture):
    fields = fields | {"architectures": [architecture], "auto_map": {"AutoModelForCausalLM": "modeling.Its"}}
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


def load(folder):
    return load_model(resolve(str(folder)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_logits_are_those_of_the_class_that_computes_the_same(architecture, tmp_path) -> None:
    hf_model = write_checkpoint(architecture, tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(Stepper(model, 64).step(TOKENS), expected, atol=3e-4, rtol=1e-4)


def test_exaones_own_names_of_tensors_are_understood_in_updates_too(tmp_path) -> None:
    write_checkpoint("ExaoneForCausalLM", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "transformer.h.1.attn.attention.out_proj.weight" in tensors
    model = load(tmp_path)
    before = Stepper(model, 64).step(TOKENS)
    with torch.no_grad():
        write(plan_update(model, [(name, tensor / 2) for name, tensor in tensors.items()]))
        assert not torch.equal(Stepper(model, 64).step(TOKENS), before)
        write(plan_update(model, resolve(str(tmp_path))))
    assert torch.equal(Stepper(model, 64).step(TOKENS), before)


@pytest.mark.parametrize("architecture", ["ExaoneForCausalLM", "LLaMAForCausalLM"])
def test_transformers_runs_them_where_it_has_the_type(architecture, tmp_path) -> None:
    write_checkpoint(architecture, tmp_path)
    config = resolve(str(tmp_path), model_impl="transformers").config
    assert not isinstance(config, DecoderConfig)
    assert config.architecture == architecture


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("IQuestCoderForCausalLM", {"clip_qkv": 8.0}, "clip_qkv"),
        ("IQuestCoderForCausalLM", {"use_sliding_window": True, "sliding_window": 16}, "use_sliding_window"),
        ("InternLM3ForCausalLM", {"qkv_bias": False}, "qkv_bias"),
        ("MiniCPMForCausalLM", {"sparse_config": {"dense_len": 8192}}, "attends to chosen blocks of keys"),
        (
            "MiniCPMForCausalLM",
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
            "scale its rotation in a way of its own",
        ),
        ("MiniCPMForCausalLM", {"num_experts": 8}, "mixture of experts"),
        ("MiniCPMForCausalLM", {"hidden_act": "fatrelu"}, 'activation is "fatrelu"'),
        ("LLaMAForCausalLM", {"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 9.0}}, "dynamic"),
    ],
)
def test_what_they_can_ask_for_and_nothing_here_does_is_refused(architecture, changes, message, tmp_path) -> None:
    config, fields = CHECKPOINTS[architecture]
    config()
    with pytest.raises(ModelError, match=message):
        resolve(write_config(tmp_path, fields | changes, architecture))


def test_a_model_that_runs_but_whose_type_transformers_does_not_know_asks_for_a_later_one(tmp_path) -> None:
    folder = write_config(tmp_path, PLAIN | {"model_type": "of_next_year"}, "InternLM3ForCausalLM")
    with pytest.raises(
        ModelError, match=r'InternLM3ForCausalLM runs here, .* type "of_next_year"; .*--upgrade transformers'
    ):
        resolve(folder)


@pytest.mark.parametrize("architecture", ["DeciLMForCausalLM", "InternLM2ForCausalLM", "VendorForCausalLM"])
@pytest.mark.parametrize("model_impl", ["auto", "transformers"])
def test_other_code_is_not_run_and_the_sentence_says_what_is(architecture, model_impl, tmp_path) -> None:
    folder = write_config(tmp_path, PLAIN | {"model_type": "a_vendors"}, architecture)
    with pytest.raises(
        ModelError, match=f"The code of {architecture}.*comes with its checkpoint.*runs no code"
    ) as info:
        resolve(folder, model_impl=model_impl)
    assert "trust_remote_code" not in str(info.value)
    assert DIFFERENCES.get(architecture, "") in str(info.value)


def test_sentences_name_the_kinds_of_gguf_files_that_are_read() -> None:
    *kinds, last = GGUF_ARCHITECTURES
    named = f"of architecture {', '.join(kinds)} or {last}"
    assert named in READABLE
    assert named in foreign_code("A", "b", has_code=True)

"""GGUF files written here, against the transformers model they were made from."""

import numpy as np
import pytest
import torch
from checkpoints import HF_CONFIGS, LINEAR_ROPE, LLAMA3_ROPE, SIZES, YARN_ROPE, random_hf_model
from gguf_files import write_gguf
from stepping import Stepper
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from stepgraph.errors import ModelError
from stepgraph.models import load_model, resolve
from stepgraph.models.gguf import GGUFFile

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")

TOKENS = [(7 * i + 3) % 96 for i in range(40)]


def assert_same_logits(path, hf_model) -> None:
    model = load_model(resolve(str(path)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64)
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(Stepper(model, 64).step(TOKENS), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "hf_config",
    [
        LlamaConfig(**SIZES, attention_bias=True),
        LlamaConfig(**SIZES, tie_word_embeddings=True),
        Qwen2Config(**SIZES),
        Qwen3Config(**SIZES, head_dim=32),
    ],
    ids=["llama with biases", "llama tied", "qwen2", "qwen3"],
)
def test_logits_match_transformers(tmp_path, hf_config) -> None:
    hf_model = random_hf_model(hf_config)
    write_gguf(tmp_path / "model.gguf", hf_model)
    assert_same_logits(tmp_path / "model.gguf", hf_model)


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_logits_match_transformers_on_the_values_that_quantisation_leaves(tmp_path, type_) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    types = {"attn_q.": gguf.GGMLQuantizationType[type_], "attn_k.": gguf.GGMLQuantizationType[type_]}
    types |= {"ffn_down.": gguf.GGMLQuantizationType[type_], "token_embd": gguf.GGMLQuantizationType.Q8_0}
    write_gguf(tmp_path / "model.gguf", hf_model, types)
    assert_same_logits(tmp_path / "model.gguf", hf_model)


def test_packed_rows_dequantise_to_the_loaded_values(tmp_path) -> None:
    type_ = gguf.GGMLQuantizationType.Q4_0
    write_gguf(tmp_path / "model.gguf", random_hf_model(HF_CONFIGS["llama"]()), {"attn_": type_})
    tensors = {tensor.name: tensor for tensor in resolve(str(tmp_path / "model.gguf")).tensors()}
    q = tensors["model.layers.0.self_attn.q_proj.weight"]
    assert q.quantization == "Q4_0"
    values = gguf.quants.dequantize(q.packed().numpy(), type_)
    assert np.array_equal(values, q.load(torch.float32, torch.device("cpu")).numpy())
    assert tensors["model.norm.weight"].quantization is None


def test_llama3_frequency_factors_match_transformers(tmp_path) -> None:
    scaled = LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE)
    hf_model = random_hf_model(scaled)
    plain = LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.0})
    factors = ROPE_INIT_FUNCTIONS["linear"](plain)[0] / ROPE_INIT_FUNCTIONS["llama3"](scaled)[0]
    write_gguf(tmp_path / "model.gguf", hf_model, tensors={"rope_freqs.weight": factors.numpy()})
    assert_same_logits(tmp_path / "model.gguf", hf_model)


@pytest.mark.parametrize("rope", [LINEAR_ROPE, YARN_ROPE], ids=["linear", "yarn"])
def test_rope_scaling_matches_transformers(tmp_path, rope) -> None:
    hf_model = random_hf_model(Qwen3Config(**SIZES, head_dim=32, rope_parameters=rope))
    metadata = [
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"])),
        lambda writer: writer.add_rope_scaling_factor(rope["factor"]),
        lambda writer: writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 256)),
    ]
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=metadata)
    assert_same_logits(tmp_path / "model.gguf", hf_model)


def scaling(type_=None, factor=None, old_factor=None, original=None):
    """Metadata of a file that scales its rotation, in llama.cpp's words."""
    keys = {"scaling.type": type_, "scaling.factor": factor, "scale_linear": old_factor}
    adds = {str: "add_string", float: "add_float32"}

    def add(writer) -> None:
        for key, value in keys.items():
            if value is not None:
                getattr(writer, adds[type(value)])(f"{writer.arch}.rope.{key}", value)
        if original is not None:
            writer.add_rope_scaling_orig_ctx_len(original)

    return [add]


FROM_THE_CONTEXT = YARN_ROPE | {"original_max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        (scaling(factor=2.0), LINEAR_ROPE),
        (scaling(old_factor=2.0), LINEAR_ROPE),
        (scaling("linear", old_factor=2.0), LINEAR_ROPE),
        (scaling(factor=2.0, old_factor=4.0), LINEAR_ROPE),
        (scaling(factor=0.0, old_factor=2.0), None),
        (scaling("none", factor=2.0), None),
        (scaling("linear"), None),
        (scaling("yarn", factor=1.0, original=64), None),
        (scaling("yarn", factor=4.0, original=64), YARN_ROPE),
        (scaling("yarn", factor=4.0), FROM_THE_CONTEXT),
        (scaling("yarn", old_factor=4.0), FROM_THE_CONTEXT),
    ],
)
def test_rope_scaling_goes_by_the_defaults_of_llama_cpp(tmp_path, metadata, rope) -> None:
    hf_model = random_hf_model(LlamaConfig(**SIZES, **({} if rope is None else {"rope_parameters": rope})))
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=metadata)
    assert_same_logits(tmp_path / "model.gguf", hf_model)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (scaling("su", factor=2.0), '"su"; supported are linear, yarn'),
        (scaling(factor=-2.0), r"rope\.scaling\.factor = -2\.0"),
        (scaling(factor="2"), r"rope\.scaling\.factor is '2', and must be of type float"),
        (scaling(factor=float("nan")), r"rope\.scaling\.factor is nan"),
        ([lambda writer: writer.add_float32("llama.rope.scaling.attn_factor", 1.2)], r"not supported: .*attn_factor"),
    ],
)
def test_rope_scaling_that_is_not_known_is_refused(tmp_path, metadata, message) -> None:
    write_gguf(tmp_path / "model.gguf", random_hf_model(HF_CONFIGS["llama"]()), metadata=metadata)
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "model.gguf"))


TOKENS_OF_A_CHAT = ["a", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "b"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NORMAL, CONTROL = 1, 3


def chat(*, template=None, control=TOKENS_OF_A_CHAT[1:-1], **ids):
    """Metadata of a file with these end tokens, and the text of its control tokens."""

    def add(writer) -> None:
        writer.add_token_list(TOKENS_OF_A_CHAT)
        writer.add_token_types([CONTROL if token in control else NORMAL for token in TOKENS_OF_A_CHAT])
        for name, index in ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
        if template is not None:
            writer.add_chat_template(template)

    return [add]


@pytest.mark.parametrize(
    ("metadata", "ends"),
    [
        (chat(template=CHATML, eos=2), (2, 4)),
        (chat(template=CHATML, eos=4), (4,)),
        (chat(template=CHATML), (4,)),
        (chat(template=CHATML, eos=2, eot=6, eom=7), (2, 6, 7, 4)),
        (chat(template=CHATML, eos=2, control=["</s>"]), (2,)),
        (chat(template="{{ messages }}", eos=2), (2,)),
        (chat(template="{{ messages }}"), (2, 4, 5, 6, 7)),
        (chat(eos=2), (2, 4, 5, 6, 7)),
        (chat(eos=2, control=[]), (2,)),
        (chat(eos=2**32 - 1, template=CHATML), (4,)),
        (chat(control=[]), ()),
    ],
)
def test_control_tokens_end_an_answer_where_ids_or_the_template_say_so(tmp_path, metadata, ends) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    hf_model.config.eos_token_id = None
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=metadata)
    assert resolve(str(tmp_path / "model.gguf")).config.eos_token_ids == ends


def test_a_truncated_file_is_named(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, random_hf_model(HF_CONFIGS["llama"]()))
    whole = path.read_bytes()
    for keep in (4, 10, 30, 200, 2000, len(whole) // 2, len(whole) - 10_000):
        path.write_bytes(whole[:keep])
        with pytest.raises(ModelError, match=r"model\.gguf .*truncated"):
            resolve(str(path))


def test_lists_are_what_was_written_and_a_file_that_ends_in_one_is_named(tmp_path) -> None:
    path, texts, numbers = tmp_path / "model.gguf", ["", "a b", "é" * 300, "\0"], list(range(100))
    lists = [lambda writer: writer.add_array("numbers", numbers), lambda writer: writer.add_array("texts", texts)]
    write_gguf(path, random_hf_model(HF_CONFIGS["llama"]()), metadata=lists)
    file = GGUFFile(path)
    assert (file.value("numbers", list), file.value("texts", list)) == (numbers, texts)
    whole = path.read_bytes()
    for inside in (b"numbers", b"texts", "é".encode()):
        path.write_bytes(whole[: whole.index(inside) + 20])
        with pytest.raises(ModelError, match="truncated"):
            GGUFFile(path)


def test_another_kind_of_file_is_refused(tmp_path) -> None:
    path = tmp_path / "model.gguf"
    for content in (b"", b"GG", b"version https://git-lfs"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="not a GGUF file"):
            resolve(str(path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            lambda writer: writer.add_expert_count(8),
            "mixture of 8 experts; .* architecture qwen2moe, qwen3moe and deepseek2",
        ),
        (lambda writer: writer.add_sliding_window(64), "sliding window"),
        (lambda writer: writer.add_rope_dimension_count(8), r"rope\.dimension_count = 8"),
        (lambda writer: writer.add_uint16("split.count", 3), "one of 3 parts"),
        (
            lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
            '"longrope"; supported are linear, yarn',
        ),
        (lambda writer: writer.add_causal_attention(False), "not causal"),
    ],
)
def test_an_unsupported_model_is_refused(tmp_path, metadata, message) -> None:
    write_gguf(tmp_path / "model.gguf", random_hf_model(HF_CONFIGS["llama"]()), metadata=[metadata])
    with pytest.raises(ModelError, match=message):
        resolve(str(tmp_path / "model.gguf"))


def test_sizes_that_do_not_go_together_are_refused(tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    hf_model.config.hidden_size = 66
    write_gguf(tmp_path / "model.gguf", hf_model)
    with pytest.raises(
        ModelError, match=r"hidden size \(66\) is not a multiple of the number of attention heads \(4\)"
    ):
        resolve(str(tmp_path / "model.gguf"))


def test_an_unsupported_architecture_and_tensor_type_are_refused_with_the_supported_ones(tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    write_gguf(tmp_path / "types.gguf", hf_model, tensors={"odd": np.zeros(4, np.int32)})
    with pytest.raises(ModelError, match=r"type I32.*supported are .*F32.*Q4_1"):
        resolve(str(tmp_path / "types.gguf"))
    hf_model.config.model_type = "falcon"
    write_gguf(tmp_path / "architecture.gguf", hf_model)
    with pytest.raises(ModelError, match=r'"falcon".*llama, qwen2, qwen2moe, qwen3, qwen3moe'):
        resolve(str(tmp_path / "architecture.gguf"))


def test_a_missing_metadata_value_is_named(tmp_path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_embedding_length(64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"llama\.attention\.head_count"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_file_without_a_chat_template_is_known_before_its_tokenizer_is_read(tmp_path) -> None:
    hf_model = random_hf_model(HF_CONFIGS["llama"]())
    write_gguf(tmp_path / "base.gguf", hf_model)
    write_gguf(tmp_path / "chat.gguf", hf_model, metadata=[lambda writer: writer.add_chat_template("{{ messages }}")])
    resolve(str(tmp_path / "chat.gguf")).check_chat_template()
    with pytest.raises(ModelError, match="has no chat template"):
        resolve(str(tmp_path / "base.gguf")).check_chat_template()

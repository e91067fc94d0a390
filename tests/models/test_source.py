"""Finding a model, reading its config, and refusing what cannot run."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES

from stepgraph.errors import ModelError
from stepgraph.models import resolve, source
from stepgraph.models.registry import ARCHITECTURES
from stepgraph.models.source import shape_names

GEMMA = {"model_type": "gemma3_text", "rope_parameters": None}  # the Llama's are of another form than its own


def write_config(folder, **changes):
    config = HF_CONFIGS["llama"]().to_dict() | {"architectures": ["LlamaForCausalLM"]} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def offline(monkeypatch):
    """A hub that cannot be reached; returns the calls made to it."""
    calls = []

    def snapshot_download(*args, **kwargs):
        calls.append((args, kwargs))
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral", "num_local_experts": 8},
            "mixture of experts.*LlamaForCausalLM is none.*Dense decoders.*MixtralForCausalLM",
        ),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "mixture of experts"),
        ({"layer_types": ["chunked_attention"] * 2}, "layers of type chunked_attention.*full_attention and sliding"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_window is None.*Give"),
        ({"attn_logit_softcapping": 50.0}, r"caps logits \(attn_logit_softcapping = 50.0\).*without soft-capping"),
        (GEMMA | {"final_logit_softcapping": 30.0}, "caps logits.*final_logit_softcapping = 30.0"),
        (GEMMA | {"use_bidirectional_attention": True}, "not causal"),
        ({"hidden_act": "gelu"}, 'activation is "gelu".*silu and gelu_pytorch_tanh'),
        ({"kv_lora_rank": 64, "num_experts": 8}, "its attention is multi-head latent attention"),
        ({"is_encoder_decoder": True}, "not causal"),
        (
            {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}},
            '"axial", and native models know default, dynamic',
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "part of each head.*LlamaForCausalLM rotates whole heads",
        ),
        (
            {
                "model_type": "phi3",
                "architectures": ["Phi3ForCausalLM"],
                "pad_token_id": 0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7},
            },
            "rotates 11 of the 16 dimensions.*even",
        ),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, 'LlamaForCausalLM writes text. Add "architectures": '),
        ({"architectures": None, "model_type": "bert"}, '"bert", no class runs here'),
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"model_type": None}, 'names no "model_type"'),
        ({"architectures": [["a"]]}, "a field is missing, of the wrong type"),
        ({"vocab_size": None, "hidden_act": "relu"}, "vocab_size is None, which is of no use there"),
        ({"rope_parameters": "yes"}, "rope_parameters is 'yes', which"),
    ],
)
def test_an_unsupported_model_is_refused_with_what_and_why(tmp_path, changes, message) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(write_config(tmp_path, **changes))


def test_a_window_no_shorter_than_the_context_is_no_window(tmp_path) -> None:
    def windows(length: int) -> tuple[int, ...]:
        path = write_config(tmp_path, model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=length)
        return resolve(path).config.windows

    assert windows(256) == (0, 0)
    assert windows(255) == (255, 255)


def test_end_tokens_come_from_the_generation_config_and_the_config(tmp_path) -> None:
    path = write_config(tmp_path, eos_token_id=2)
    assert resolve(path).config.eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 9]}))
    assert resolve(path).config.eos_token_ids == (7, 2, 9)


def test_the_checkpoint_dtype_is_known(tmp_path) -> None:
    assert resolve(write_config(tmp_path, dtype="bfloat16")).config.dtype == torch.bfloat16


PUBLISHED_PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3-4-layers": 671_026_419_200 - 57 * 11_507_286_272,  # three dense layers, and one of 58 with experts
    "gemma4-26b-a4b": 25_233_141_760 + 30,  # and a number of each layer
    "gemma4-e4b": 7_463_013_376 + 42,
    "glm-4.7-flash": 29_943_393_920,
    "gpt-oss-20b": 20_914_757_184,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "nemotron-3-nano-30b-a3b": 31_577_937_344 + 23 * 128,  # and biases of routers, which elsewhere are buffers
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-8b": 8_190_735_360,
    "qwen3.5-35b-a3b": 34_660_610_688,
    "qwen3.5-4b": 4_205_751_296,
    "qwen3.5-9b": 8_953_803_264,
    "qwen3.6-27b": 26_895_998_464,
}


@pytest.mark.parametrize("name", shape_names())
def test_a_shape_has_as_many_parameters_as_the_published_model(name) -> None:
    config = resolve(name).config
    model = ARCHITECTURES[config.architecture](
        config, max_model_len=8, dtype=torch.bfloat16, device=torch.device("meta")
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name]


def test_a_shape_has_no_weights_and_no_tokenizer() -> None:
    shape = resolve("qwen3-8b")
    with pytest.raises(ModelError, match='load_format "dummy"'):
        shape.tensors()
    with pytest.raises(ModelError, match="token ids"):
        shape.tokenizer()


def test_a_name_that_is_not_installed_says_how_to_install_it(monkeypatch) -> None:
    monkeypatch.setattr(source, "packaged_file", lambda name: None)
    with pytest.raises(ModelError, match="stepgraph pull smollm2"):
        resolve("smollm2")


def test_a_path_that_is_nothing_is_not_asked_of_the_hub(tmp_path, offline) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent.gguf", "./absent", "absent.gguf", "a/b/c"):
        with pytest.raises(ModelError, match="no file or folder"):
            resolve(str(path))
    assert offline == []


def test_a_file_of_another_kind_and_a_folder_without_config_are_refused(tmp_path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(str(tmp_path))


def refused_by_the_hub(kind: type[Exception]) -> Exception:
    """As huggingface_hub raises it: several lines, with an address."""
    text = "403 Client Error.\n\nCannot access it at https://hub.\nSee its page."
    if not issubclass(kind, huggingface_hub.errors.HfHubHTTPError):
        return kind(text)
    return kind(text, response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "it is gated; ask for access on its page, log in with `hf auth login`, or give"),
        ("RepositoryNotFoundError", "there is none of that name, or it is private; check the name"),
        ("HFValidationError", "that is no name of a repository; check the name"),
        ("RevisionNotFoundError", "403 Client Error; check the connection, or give the path of a downloaded folder."),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(monkeypatch, kind, said) -> None:
    def snapshot_download(*_, **__) -> str:
        raise refused_by_the_hub(getattr(huggingface_hub.errors, kind))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelError) as refusal:
        resolve("qwen3/0.6b")
    assert said in str(refusal.value)
    assert "Did you mean qwen3-0.6b?" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unreachable_hub_says_what_was_tried(offline) -> None:
    with pytest.raises(
        ModelError, match=r'"org/name".*smollm2.*local hub cache.*no connection; check the connection, or give'
    ):
        resolve("org/name")
    assert [kwargs.get("local_files_only", False) for _, kwargs in offline] == [True, False]


def test_of_weights_no_others_are_downloaded_than_those_beside_the_config(offline) -> None:
    with pytest.raises(ModelError):
        resolve("openai/gpt-oss-20b")
    patterns = {name: offline[-1][1][name] for name in ("allow_patterns", "ignore_patterns")}
    files = ["config.json", "model-00000-of-00002.safetensors", "original/model.safetensors", "metal/model.bin"]
    assert list(huggingface_hub.utils.filter_repo_objects(files, **patterns)) == files[:2]


def test_a_complete_cached_model_needs_no_connection(tmp_path, monkeypatch) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, local_files_only: str(tmp_path))
    assert resolve("org/name").config.hidden_size == SIZES["hidden_size"]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_chat_template_is_found_in_either_place_without_reading_the_tokenizer(tmp_path, place) -> None:
    write_config(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(ModelError, match="has no chat template"):
        resolve(str(tmp_path)).check_chat_template()
    (tmp_path / place).write_text('{"chat_template": "{{ messages }}"}')
    resolve(str(tmp_path)).check_chat_template()


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-that-name", "a\0b"], ids=["long", "no home", "NUL"])
def test_a_name_that_no_path_can_be_is_refused_like_any_other(name, offline) -> None:
    with pytest.raises(ModelError):
        resolve(name)

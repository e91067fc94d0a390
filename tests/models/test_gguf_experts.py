"""GGUF files of mixtures of experts, written here, against the transformers model that they were made from."""

import pytest
import torch
from checkpoints import EXPERTS, SIZES, random_hf_model
from stepping import Stepper
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from stepgraph import EngineConfig, SamplingParams, native
from stepgraph.engine.build import build_engine
from stepgraph.errors import ModelError
from stepgraph.layers.formats import Packed, Plain
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")
from gguf_files import write_gguf  # noqa: E402

TOKENS = [(7 * i + 3) % 96 for i in range(40)]
TYPES = gguf.GGMLQuantizationType


def qwen3moe(**fields):
    return random_hf_model(
        Qwen3MoeConfig(**SIZES, **EXPERTS | {"norm_topk_prob": True} | fields, head_dim=16, num_experts=8)
    )


def qwen2moe():
    return random_hf_model(Qwen2MoeConfig(**SIZES, **EXPERTS, num_experts=8, shared_expert_intermediate_size=64))


def load(path, **settings):
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64} | settings
    return load_model(resolve(str(path)), **settings)


def logits(model):
    return Stepper(model, 64).step(TOKENS)


def assert_same_logits(model, hf_model) -> None:
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(logits(model), expected, atol=5e-4, rtol=5e-4)


def expert_formats(model):
    experts = model.layers[0].mlp.experts
    return experts.gate_up_proj.format, experts.down_proj.format


@pytest.mark.parametrize("make", [qwen3moe, qwen2moe])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_match_transformers(tmp_path, make, packed) -> None:
    hf_model = make()
    write_gguf(tmp_path / "model.gguf", hf_model)
    assert_same_logits(load(tmp_path / "model.gguf", packed=packed), hf_model)


@pytest.mark.parametrize("type_", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("packed", [False, True])
def test_experts_keep_the_values_that_quantisation_leaves(tmp_path, type_, packed) -> None:
    hf_model = qwen3moe()
    write_gguf(tmp_path / "model.gguf", hf_model, {"_exps": TYPES[type_], "attn_output": TYPES.Q8_0})
    model = load(tmp_path / "model.gguf", packed=packed)
    kept = packed and native.available() and type_.startswith("Q")
    assert expert_formats(model) == ((Packed(type_, None),) * 2 if kept else (Plain(),) * 2)
    assert_same_logits(model, hf_model)


@pytest.mark.skipif(not native.available(), reason="no kernels")
def test_of_mixed_types_those_with_kernels_are_kept_and_the_others_dequantised(tmp_path) -> None:
    """As Q4_K_M mixes two types, of which the gguf package writes neither."""
    hf_model = qwen3moe()
    write_gguf(tmp_path / "down.gguf", hf_model, {"down_exps": TYPES.Q5_0, "_exps": TYPES.Q4_0})
    model = load(tmp_path / "down.gguf", packed=True)
    assert expert_formats(model) == (Packed("Q4_0", None), Plain())
    assert_same_logits(model, hf_model)
    write_gguf(tmp_path / "up.gguf", hf_model, {"up_exps": TYPES.Q8_0, "_exps": TYPES.Q4_0})
    model = load(tmp_path / "up.gguf", packed=True)
    assert expert_formats(model) == (Plain(), Packed("Q4_0", None))
    assert_same_logits(model, hf_model)


def test_a_router_that_is_quantised_becomes_numbers(tmp_path) -> None:
    hf_model = qwen3moe()
    write_gguf(tmp_path / "model.gguf", hf_model, {"ffn_gate_inp": TYPES.Q8_0, "_exps": TYPES.Q8_0})
    model = load(tmp_path / "model.gguf", packed=True)
    assert model.layers[0].mlp.gate.weight.dtype == torch.float32
    assert_same_logits(model, hf_model)


def test_weights_of_experts_are_normalised_unless_the_file_says_otherwise(tmp_path) -> None:
    hf_model = qwen3moe(norm_topk_prob=False)
    write_gguf(tmp_path / "model.gguf", hf_model, metadata=[lambda writer: writer.add_expert_weights_norm(False)])
    assert_same_logits(load(tmp_path / "model.gguf"), hf_model)


def test_new_weights_can_be_written(tmp_path) -> None:
    for name, scale in (("a", 1.0), ("b", 0.9)):
        hf_model = qwen3moe()
        for parameter in hf_model.parameters():
            parameter.data *= scale
        write_gguf(tmp_path / f"{name}.gguf", hf_model, {"_exps": TYPES.Q4_1})
    model, other = (load(tmp_path / f"{name}.gguf", packed=True) for name in "ab")
    assert not torch.equal(logits(model), logits(other))
    write(plan_update(model, resolve(str(tmp_path / "b.gguf"))))
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda writer: writer.add_expert_used_count(9), r"takes 9 of 8 experts .*between 1 and 8"),
        (lambda writer: writer.add_expert_used_count(0), r"takes 0 of 8 experts"),
        (lambda writer: writer.add_expert_weights_scale(2.5), r"qwen3moe\.expert_weights_scale = 2\.5"),
        (lambda writer: writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID), r"expert_gating_func = 2"),
        (
            lambda writer: writer.add_array("qwen3moe.expert_feed_forward_length", [32, 64]),
            r"expert_feed_forward_length is \[32, 64\], and must be of type int",
        ),
        (lambda writer: writer.add_expert_feed_forward_length(48), r"has shape \[32, 64\] .* \[48, 64\]"),
        (lambda writer: writer.add_expert_count(6), r"12 \(model.layers.0.mlp.experts.6.gate_proj.weight.*left over"),
    ],
)
def test_a_mixture_that_does_not_fit_its_metadata_is_refused(tmp_path, add, message) -> None:
    write_gguf(tmp_path / "model.gguf", qwen3moe(), metadata=[add])
    with pytest.raises(ModelError, match=message):
        load(tmp_path / "model.gguf")


@pytest.mark.parametrize("settings", [{}, {"deterministic": True}, {"quantization": "none", "dtype": "float32"}])
def test_requests_are_answered_in_graphs_as_transformers_answers_them(tmp_path, settings) -> None:
    hf_model = qwen3moe()
    write_gguf(tmp_path / "model.gguf", hf_model, {"_exps": TYPES.Q8_0})
    settings = {
        "model": str(tmp_path / "model.gguf"),
        "device": "cpu",
        "max_model_len": 64,
        "max_num_seqs": 4,
    } | settings
    engine = build_engine(EngineConfig.from_settings(**settings))
    prompts = [TOKENS[:3], TOKENS[5:6], TOKENS[2:14]]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    while engine.has_work:
        engine.step()
    assert engine.executor.statistics.num_eager_steps == 0
    for prompt, request in zip(prompts, requests, strict=True):
        tokens = prompt + list(request.output_token_ids)
        with torch.no_grad():
            best = hf_model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
        chosen = best.gather(1, torch.tensor(request.output_token_ids)[:, None])[:, 0]
        assert (best.amax(1) - chosen).max() < 0.02, "the best token, or as good as it in what rounding leaves"

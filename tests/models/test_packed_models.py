"""Models whose weights stay in a GGUF file's blocks, against the same file dequantised."""

import logging

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from stepping import Stepper
from transformers import Qwen2Config

from stepgraph import EngineConfig, SamplingParams, native
from stepgraph.engine.build import build_engine
from stepgraph.errors import ModelError
from stepgraph.layers.formats import Packed
from stepgraph.layers.formats.packed import round_to_q8_0
from stepgraph.layers.linear import Linear
from stepgraph.models import load_model, resolve
from stepgraph.models.update import plan_update, write
from stepgraph.ops.packed import EXACT_TOKENS
from stepgraph.step.plan import StepKind

gguf = pytest.importorskip("gguf", reason="packed weights are those of GGUF files")
from gguf_files import write_gguf  # noqa: E402

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")

TOKENS = [(7 * i + 3) % 96 for i in range(40)]
Q4_0, Q4_1, Q8_0, F16 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "F16"))
AS_EMBEDDED = {"token_embd": Q8_0, "_norm": gguf.GGMLQuantizationType.F32, "weight": Q4_1}
"""The types of the embedded model's tensors, by a part of their names."""


def load(path, **settings):
    settings = {"packed": True} | settings
    return load_model(resolve(str(path)), dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, **settings)


def formats(model):
    """Formats of the linear layers, by path."""
    return {
        path: module.format.blocks if isinstance(module.format, Packed) else None
        for path, module in model.named_modules()
        if isinstance(module, Linear)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two files of different models of the same config: a.gguf and b.gguf."""
    folder = tmp_path_factory.mktemp("packed")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        write_gguf(folder / f"{name}.gguf", random_hf_model(HF_CONFIGS["llama tied"]()), AS_EMBEDDED)
    return folder


@pytest.mark.parametrize("config", ["llama", "llama tied", "qwen2", "qwen3 tied"])
def test_packed_logits_are_those_of_the_dequantised_weights(tmp_path, config):
    write_gguf(tmp_path / "model.gguf", random_hf_model(HF_CONFIGS[config]()), AS_EMBEDDED)
    packed, plain = load(tmp_path / "model.gguf"), load(tmp_path / "model.gguf", packed=False)
    assert set(formats(packed).values()) == {"Q4_1"}
    assert set(formats(plain).values()) == {None}
    found, expected = (Stepper(model, 64).step(TOKENS) for model in (packed, plain))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_exact_logits_do_not_depend_on_how_the_prompt_is_cut(folder):
    model = load(folder / "a.gguf")
    whole, cut = Stepper(model, 64).step(TOKENS), Stepper(model, 64)
    assert torch.equal(torch.cat([cut.step(TOKENS[:3]), cut.step(TOKENS[3:20]), cut.step(TOKENS[20:])]), whole)


def test_layers_without_kernels_and_mixtures_are_dequantised_and_that_is_logged(tmp_path, caplog):
    hf_model = random_hf_model(Qwen2Config(**SIZES))
    types = {"attn_q.weight": Q4_0, "attn_k.weight": Q8_0, "ffn_down": gguf.GGMLQuantizationType.Q5_0, "ffn_": Q4_0}
    write_gguf(tmp_path / "model.gguf", hf_model, types | {"bias": gguf.GGMLQuantizationType.F32})
    with caplog.at_level(logging.WARNING, logger="stepgraph"):
        model = load(tmp_path / "model.gguf")
    assert "tensors of type Q4_0, Q5_0, Q8_0 are kept as float32, which takes 0.1 MiB of memory" in caplog.text
    layer = {path.split(".", 3)[-1]: name for path, name in formats(model).items() if "layers.0" in path}
    assert layer == {"qkv_proj": None, "o_proj": None, "gate_up_proj": "Q4_0", "down_proj": None}
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(Stepper(model, 64).step(TOKENS), expected, atol=2e-4, rtol=1e-4)


def test_plain_weight_has_the_dequantised_bits(folder):
    packed, plain = load(folder / "a.gguf"), load(folder / "a.gguf", packed=False)
    assert torch.equal(packed.embed_tokens.values(), plain.embed_tokens.weight)
    assert plain.embed_tokens.values() is plain.embed_tokens.weight


def test_without_kernels_weights_are_dequantised(folder, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert set(formats(load(folder / "a.gguf")).values()) == {None}


def test_new_weights_of_the_same_formats_can_be_written(folder):
    model, other = load(folder / "a.gguf"), load(folder / "b.gguf")
    write(plan_update(model, resolve(str(folder / "b.gguf"))))
    assert torch.equal(Stepper(model, 64).step(TOKENS), Stepper(other, 64).step(TOKENS))


def test_plain_weights_are_refused_where_blocks_are_kept(folder):
    model, plain = load(folder / "a.gguf"), load(folder / "b.gguf", packed=False)
    with pytest.raises(ModelError, match=r"kept .* Q8_0 blocks, and is plain numbers .* quantization none"):
        plan_update(model, plain.checkpoint_tensors().items())


def rounding_above(tokens):
    return f"float32, products in steps of more than {tokens} tokens bfloat16"


@pytest.mark.parametrize(
    ("settings", "expected", "precision"),
    [
        ({}, (True, 16), rounding_above(16)),
        ({"dtype": "float32"}, (True, None), "float32"),
        ({"deterministic": True}, (True, 16), "float32"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 7}},
            (True, 32),
            rounding_above(32),
        ),
        ({"quantization": "none"}, (False, None), "float32"),
        ({"dtype": "bfloat16"}, (False, None), "bfloat16"),
    ],
)
def test_settings_decide_how_weights_are_kept(folder, settings, expected, precision, monkeypatch, caplog):
    settings = {"model": str(folder / "a.gguf"), "device": "cpu", "max_model_len": 64, "max_num_seqs": 4} | settings
    monkeypatch.setattr("stepgraph.executor.precision.rounds_to_bfloat16", lambda: True)
    with caplog.at_level(logging.INFO, logger="stepgraph"):
        engine = build_engine(EngineConfig.from_settings(**settings))
    assert engine.executor.specs.precision == precision
    assert f"{engine.source.name} on cpu: {precision}" in caplog.messages
    model = engine.executor.runner.model
    layer_format, head_format = model.layers[0].mlp.down_proj.format, model.head.format
    assert isinstance(head_format, Packed) == isinstance(layer_format, Packed) == expected[0]
    if expected[0]:
        assert (layer_format.exact_tokens, head_format.exact_tokens) == (expected[1], None), "logits are never rounded"
    requests = [
        engine.add_request(str(i), TOKENS[: 3 + 9 * i], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
        for i in range(4)
    ]
    while engine.has_work:
        engine.step()
    assert engine.executor.statistics.num_eager_steps == 0
    assert all(len(request.output_token_ids) == 5 for request in requests)


def test_proposals_are_verified_by_the_numbers_that_tokens_are_sampled_by_without_them(folder):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0)
    prompts = [[5 + i, 6, 7, 8] * 3 for i in range(4)]

    def answers(**settings):
        settings = {"model": str(folder / "a.gguf"), "device": "cpu", "max_model_len": 64, "max_num_seqs": 4} | settings
        engine, steps = build_engine(EngineConfig.from_settings(**settings)), []
        engine.on_step = steps.append
        requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
        while engine.has_work:
            engine.step()
        sizes = [step.record.num_tokens for step in steps if step.record.kind is StepKind.DECODE]
        return [[position.logprob for position in request.output_logprobs] for request in requests], max(sizes)

    plain, _ = answers()
    config = {"method": "ngram", "num_speculative_tokens": 7, "adaptive": False, "min_match": 1}
    found, most = answers(speculative_config=config)
    assert most > EXACT_TOKENS
    torch.testing.assert_close(torch.tensor(found), torch.tensor(plain), atol=1e-5, rtol=0)


def test_rounding_to_blocks_is_off_by_half_a_step_at_most_as_the_gguf_package_reads_them():
    values = torch.randn(7, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 7).unsqueeze(1)
    values[3, :32] = 0
    found = torch.from_numpy(gguf.quants.dequantize(round_to_q8_0(values).numpy(), Q8_0))
    step = values.unflatten(1, (3, 32)).abs().amax(2, keepdim=True).expand(7, 3, 32).flatten(1) / 127
    assert ((found - values).abs() <= 0.57 * step).all()  # the largest codes also take the rounding of their scale
    assert ((found - values).abs() > 0.4 * step).any()

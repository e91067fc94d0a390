"""gpt-oss's checkpoints as published: experts in blocks of MXFP4, against what transformers makes of them.

Shapes: N experts, O outputs, I inputs, B blocks of inputs.
"""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from checkpoints import HF_CONFIGS, random_hf_model
from safetensors.torch import load_file, save_file
from shards import assert_is_shard, run_stepper
from stepping import Stepper
from thread_group import run_ranks
from transformers import AutoModelForCausalLM, Mxfp4Config

from stepgraph.errors import ModelError
from stepgraph.models import load_model, mxfp4, resolve
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

SCRIPT = Path(__file__).parents[2] / "scripts" / "sweep_families.py"
TOKENS = [(7 * i + 3) % 96 for i in range(40)]
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
WAYS = {"parts of experts": False, "whole experts": True}


def pack(values_NOI):
    """The blocks nearest to some values, two codes in a byte, and their scales."""
    block_NOB32 = values_NOI.unflatten(-1, (-1, 32))
    exponent_NOB = (block_NOB32.abs().amax(-1).clamp(min=1e-20) / 6).log2().ceil()
    scaled = block_NOB32 / exponent_NOB.exp2().unsqueeze(-1)
    code = (scaled.abs().unsqueeze(-1) - VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    low, high = code.unflatten(-1, (16, 2)).unbind(-1)
    return (low + 16 * high).to(torch.uint8), (exponent_NOB + 127).to(torch.uint8)


def write_mxfp4(folder, **fields):
    """A random model whose experts have inputs that ranks cut within blocks, and end within one; in float32 otherwise."""
    config = HF_CONFIGS["gpt oss"]()
    for name, value in fields.items():
        setattr(config, name, value)
    random_hf_model(config).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        values_NIO = stored.pop(name)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = pack(values_NIO.mT.contiguous())
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_mxfp4(tmp_path_factory.mktemp("mxfp4"))


@pytest.fixture(scope="module")
def hf_model(folder):
    """What transformers makes of the folder: numbers."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    return loaded.float().eval()


def load(folder, **settings):
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64} | settings
    return load_model(resolve(str(folder)), **settings)


def test_blocks_stand_for_the_specifications_numbers() -> None:
    codes = torch.tensor([[[0x10 * (2 * i + 1) + 2 * i for i in range(8)] * 2]], dtype=torch.uint8)
    expected = torch.cat((VALUES, -VALUES)).repeat(2)
    for scale in (1, 126, 127, 130, 251):
        for dtype in (torch.float32, torch.bfloat16):
            found = mxfp4.dequantize(codes, torch.full((1, 1), scale, dtype=torch.uint8), dtype)
            assert found.dtype == dtype
            assert torch.equal(found.float(), expected[None] * 2.0 ** (scale - 127))


def test_logits_are_those_of_transformers_dequantised_model(folder, hf_model) -> None:
    with torch.no_grad():
        expected = hf_model(torch.tensor([TOKENS])).logits[0]
    found = Stepper(load(folder), 64).step(TOKENS)
    torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_answers_are_transformers_batched_in_chunks_and_with_prefixes_from_the_cache(
    folder, hf_model, monkeypatch
) -> None:
    spec = importlib.util.spec_from_file_location("sweep_families", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec.loader.exec_module(script)
    script.TOLERANCE = 1e-4
    engine, requests = script.answer(folder, script.PROMPTS)
    assert script.differences(hf_model, requests) + script.miscounted(engine) == []
    assert requests[-1].num_cached_tokens
    engine.shutdown()


@pytest.mark.parametrize("expert_parallel", WAYS.values(), ids=WAYS)
def test_ranks_keep_their_parts_and_add_up(expert_parallel, folder) -> None:
    """Of experts of 96, two ranks keep a block and a half each."""
    whole = load(folder)
    expected = Stepper(whole, 64).step(TOKENS)
    for rank in (0, 1):
        part = load(folder, shard=Shard(rank, 2), expert_parallel=expert_parallel)
        assert_is_shard(part, whole, rank, 2, expert_parallel=expert_parallel)

    def run(group):
        return run_stepper(Stepper(load(folder, group=group, expert_parallel=expert_parallel), 64), TOKENS)

    found = run_ranks(2, run)
    torch.testing.assert_close(found[0], expected, atol=2e-4, rtol=1e-4)


def test_it_is_told_what_numbers_take_in_memory(folder, caplog, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("stepgraph"), "propagate", True)  # so that `caplog` sees them
    with caplog.at_level(logging.INFO, logger="stepgraph"):
        load(folder)
    assert "tensors of type MXFP4 are kept as float32" in caplog.text


@pytest.mark.parametrize("form", ["as published", "as in memory"])
def test_new_weights_come_in_blocks_or_as_numbers(form, folder, hf_model, tmp_path) -> None:
    model = load(folder)
    expected = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.zero_()
    tensors = hf_model.state_dict() if form == "as in memory" else load_file(folder / "model.safetensors")
    write(plan_update(model, tensors.items()))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_experts_of_8_bits_are_made_of_those_of_4(folder) -> None:
    model, rounded = load(folder), load(folder, quantization="fp8")
    down, codes = (each.layers[0].mlp.experts.down_proj for each in (model, rounded))
    assert codes.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(codes.values(), down.values(), atol=0.02, rtol=0.07)
    assert torch.equal(codes.bias, down.bias)


def of_dtype(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"),
            "down_proj_blocks has shape .* its scales None",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.down_proj_scales": torch.zeros(1, 2, 3)}),
            "its scales .1, 2, 3.",
        ),
        (lambda t: t.pop("model.layers.0.mlp.experts.gate_up_proj_bias"), "missing"),
        (lambda t: t.pop("model.layers.0.self_attn.sinks"), "self_attn.sinks. missing"),
        (
            of_dtype("model.layers.0.mlp.experts.down_proj_scales", torch.float32),
            "down_proj_scales holds torch.float32, and MXFP4",
        ),
        (
            of_dtype("model.layers.0.mlp.experts.down_proj_bias", torch.int32),
            "down_proj_bias as torch.int32, which is no weight",
        ),
    ],
)
def test_what_is_missing_or_misshapen_is_named(change, told, folder, tmp_path) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ModelError, match=told):
        load(tmp_path)


def test_a_config_that_names_no_dtype_is_of_bfloat16(folder, tmp_path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert resolve(str(tmp_path), weights=False).config.dtype == torch.bfloat16

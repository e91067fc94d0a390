"""Experts where ranks share a model: each has some of them, whole, or a part of every one."""

import itertools
from dataclasses import replace

import pytest
import torch
from checkpoints import HF_CONFIGS, SIZES, random_hf_model
from fp8_folders import write_fp8
from safetensors.torch import load_file
from shards import assert_is_shard, run_stepper
from stepping import Stepper
from test_shards import SHARDS, CountedFile, write_blocks
from thread_group import run_ranks
from transformers import LlamaConfig, Qwen3MoeConfig

from stepgraph import native
from stepgraph.errors import ConfigError, DeviceMemoryError, ModelError
from stepgraph.layers.experts import ExpertLinear, ExpertShard
from stepgraph.models import load_model, random_weights, resolve, safetensors
from stepgraph.models.loader import create_model
from stepgraph.models.sharing import check_shard, shard_experts
from stepgraph.models.tensor_stream import Arriving, announce, buckets
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 36, "norm_topk_prob": True}
MODELS = {
    name: HF_CONFIGS[name]
    for name in ("qwen2 moe", "ernie 4.5 moe", "glm 4.5", "granite moe", "deepseek v3", "gpt oss")
} | {
    "qwen3": lambda: Qwen3MoeConfig(**SIZES | EXPERTS),
}
WIDE = SIZES | EXPERTS | {"hidden_size": 256, "moe_intermediate_size": 512, "num_hidden_layers": 1}
"""Of which every rank of four has whole groups of inputs."""
TOKENS = [(7 * i + 3) % 96 for i in range(40)]
WAYS = {"parts of experts": False, "whole experts": True}


def load(path, **settings):
    settings = {"dtype": torch.float32, "max_model_len": 64, "device": torch.device("cpu")} | settings
    return load_model(resolve(str(path)), **settings)


def save(hf_config, folder):
    random_hf_model(hf_config).save_pretrained(folder)
    return folder


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def expert_parallel(request):
    return request.param


def assert_shards(path, *, expert_parallel, **settings) -> None:
    whole = load(path, **settings)
    assert any(isinstance(module, ExpertLinear) for module in whole.modules())
    for rank, size in SHARDS:
        shard = load(path, shard=Shard(rank, size), expert_parallel=expert_parallel, **settings)
        assert_is_shard(shard, whole, rank, size, expert_parallel=expert_parallel)


def assert_adds_up(path, *, tolerance=2e-4, expert_parallel, **settings) -> None:
    expected = Stepper(load(path, **settings), 64).step(TOKENS)

    def run(group):
        return run_stepper(Stepper(load(path, group=group, expert_parallel=expert_parallel, **settings), 64), TOKENS)

    for size in (2, 4):
        found = run_ranks(size, run)
        assert all(torch.equal(each, found[0]) for each in found)
        torch.testing.assert_close(found[0], expected, atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_shards_of_experts_hold_their_parts_and_add_up(name, expert_parallel, tmp_path) -> None:
    save(MODELS[name](), tmp_path)
    assert_shards(tmp_path, expert_parallel=expert_parallel)
    assert_adds_up(tmp_path, expert_parallel=expert_parallel)


@pytest.mark.parametrize("layout", ["a scale per matrix", "a scale per output", "fp8 with a scale per block"])
def test_shards_of_experts_in_8_bits_keep_codes_and_scales(layout, expert_parallel, tmp_path) -> None:
    write_fp8(save(Qwen3MoeConfig(**WIDE, head_dim=128), tmp_path / "plain"), tmp_path / "fp8", layout)
    assert_shards(tmp_path / "fp8", expert_parallel=expert_parallel)
    assert_adds_up(tmp_path / "fp8", tolerance=1e-3, expert_parallel=expert_parallel)


@pytest.mark.skipif(not native.available(), reason=f"no kernels: {native.missing()}")
def test_shards_of_experts_in_blocks_keep_the_files_own(expert_parallel, tmp_path) -> None:
    config = Qwen3MoeConfig(**SIZES | EXPERTS | {"moe_intermediate_size": 128, "num_hidden_layers": 1}, head_dim=32)
    path = write_blocks(config, tmp_path / "model.gguf")
    experts = load(path, packed=True).layers[0].mlp.experts
    assert {experts.gate_up_proj.weight.dtype, experts.down_proj.weight.dtype} == {torch.uint8}
    assert_shards(path, packed=True, expert_parallel=expert_parallel)
    assert_adds_up(path, packed=True, expert_parallel=expert_parallel)


def test_memory_is_asked_for_the_experts_that_a_rank_keeps(expert_parallel, tmp_path) -> None:
    source = resolve(str(save(MODELS["qwen3"](), tmp_path)))
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64, "shard": Shard(1, 4)}

    def create(free_bytes):
        return create_model(source, **settings, expert_parallel=expert_parallel, free_bytes=free_bytes)

    nbytes = sum(parameter.nbytes for parameter in create(None).parameters())
    experts = sum(p.nbytes for name, p in load(tmp_path).named_parameters() if ".experts." in name)
    others = sum(p.nbytes for name, p in create(None).named_parameters() if ".experts." not in name)
    assert nbytes == others + experts // 4
    create(nbytes)
    with pytest.raises(DeviceMemoryError, match=r"weights of .* take"):
        create(nbytes - 1)


def test_shards_of_experts_rounded_as_they_are_read_have_the_codes_of_the_whole(expert_parallel, tmp_path) -> None:
    save(MODELS["qwen3"](), tmp_path)
    assert_shards(tmp_path, expert_parallel=expert_parallel, quantization="fp8")
    assert_adds_up(tmp_path, tolerance=1e-3, expert_parallel=expert_parallel, quantization="fp8")


@pytest.mark.parametrize("quantization", ["auto", "fp8"])
def test_random_experts_of_ranks_are_parts_of_the_wholes(quantization, expert_parallel, tmp_path, monkeypatch) -> None:
    """Also where those of a layer are drawn in several pieces."""
    save(MODELS["qwen3"](), tmp_path)
    monkeypatch.setattr(random_weights, "_PIECE", 1000)
    assert_shards(tmp_path, load_format="dummy", quantization=quantization, expert_parallel=expert_parallel)
    router = load(tmp_path, load_format="dummy", dtype=torch.bfloat16).layers[0].mlp.gate.weight
    assert router.dtype == torch.float32
    assert 0.015 < router.std() < 0.025
    assert (router.bfloat16() != router).any(), "drawn as float32"


def test_groups_of_an_experts_inputs_are_not_cut(tmp_path) -> None:
    config = Qwen3MoeConfig(**WIDE | {"moe_intermediate_size": 256}, head_dim=128)
    write_fp8(save(config, tmp_path / "plain"), tmp_path / "fp8", "fp8 with a scale per block")
    load(tmp_path / "fp8", shard=Shard(1, 2))
    with pytest.raises(
        ModelError,
        match=r"share layers.0.mlp.experts.down_proj evenly.* groups of 128 of 256 .*: 1, 2\. Or set enable_expert_parallel, ",
    ):
        load(tmp_path / "fp8", shard=Shard(1, 4))
    load(tmp_path / "fp8", shard=Shard(1, 4), expert_parallel=True)


def test_of_experts_no_more_is_read_than_is_kept(expert_parallel, tmp_path, monkeypatch) -> None:
    save(MODELS["qwen3"](), tmp_path)
    stored = {name: tensor.numel() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    numbers, open_file = {}, safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda *args, **kwargs: CountedFile(open_file(*args, **kwargs), numbers, {})
    )
    load(tmp_path, shard=Shard(1, 4), expert_parallel=expert_parallel)
    for layer, number, name in itertools.product(range(2), range(8), ("gate_proj", "up_proj", "down_proj")):
        tensor = f"model.layers.{layer}.mlp.experts.{number}.{name}.weight"
        most = stored[tensor] // 4 if not expert_parallel else stored[tensor] * (number in (2, 3))
        assert numbers.get(tensor, 0) == most, tensor


def test_new_weights_are_written_into_shards_of_experts(expert_parallel, tmp_path) -> None:
    """From a folder, from tensors, and from tensors of another process, which come in pieces."""
    hf_model = random_hf_model(MODELS["qwen3"]())
    hf_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.mul_(0.5)
    hf_model.save_pretrained(tmp_path / "second")
    first, second = load(tmp_path / "first"), load(tmp_path / "second")
    shard = load(tmp_path / "first", shard=Shard(3, 4), expert_parallel=expert_parallel)
    write(plan_update(shard, resolve(str(tmp_path / "second"))))
    assert_is_shard(shard, second, 3, 4, expert_parallel=expert_parallel)
    tensors = load_file(tmp_path / "first" / "model.safetensors")
    write(plan_update(shard, tensors.items()))
    assert_is_shard(shard, first, 3, 4, expert_parallel=expert_parallel)
    sent = plan_update(first, load_file(tmp_path / "second" / "model.safetensors").items())
    arriving = Arriving(shard, announce(sent))
    for bucket in buckets(sent, 3000):
        arriving.take(bucket)
    arriving.finish()
    assert_is_shard(shard, second, 3, 4, expert_parallel=expert_parallel)
    del tensors["model.layers.0.mlp.experts.0.up_proj.weight"]
    with pytest.raises(ModelError, match=r"1 \(model.layers.0.mlp.experts.0.up_proj.weight\) missing, none left over"):
        plan_update(shard, tensors.items())


def config_of(tmp_path, hf_config):
    hf_config.architectures = [type(hf_config).__name__.replace("Config", "ForCausalLM")]
    hf_config.save_pretrained(tmp_path)
    return resolve(str(tmp_path), weights=False).config


def test_ranks_that_experts_cannot_be_shared_by_are_refused_with_those_that_can(tmp_path) -> None:
    heads = {"num_attention_heads": 24, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 600}
    config = config_of(tmp_path, Qwen3MoeConfig(**SIZES | EXPERTS | heads))
    of_each, whole = {"expert_parallel": False}, {"expert_parallel": True}
    sizes = r"8 experts of 36 intermediate values and 600 entries in its vocabulary\. Numbers that can: "
    with pytest.raises(ModelError, match=sizes + r"1, 2, 4, 6, 12\. With enable_expert_parallel, 8 can\.$"):
        shard_experts(config, Shard(0, 8), **of_each)
    with pytest.raises(ModelError, match=sizes + r"1, 2, 4, 8\. Without enable_expert_parallel, 6 can\.$"):
        shard_experts(config, Shard(0, 6), **whole)
    with pytest.raises(ModelError, match=sizes + r"1, 2, 4, 8\.$"):
        shard_experts(config, Shard(0, 5), **whole)
    assert shard_experts(config, Shard(1, 4), **of_each) == ExpertShard(inner=Shard(1, 4))
    assert shard_experts(config, Shard(1, 4), **whole) == ExpertShard(experts=Shard(1, 4))


def test_layers_that_all_tokens_take_must_be_even_too(tmp_path) -> None:
    sizes = SIZES | EXPERTS | {"intermediate_size": 90, "num_hidden_layers": 2}
    config = config_of(tmp_path, Qwen3MoeConfig(**sizes, mlp_only_layers=[1]))
    with pytest.raises(ModelError, match=r"repeated, 90 intermediate values, 8 experts of 36 .* can: 1, 2\.$"):
        shard_experts(config, Shard(0, 4), expert_parallel=False)


def test_a_dense_module_beside_experts_must_be_even_too(tmp_path) -> None:
    """Which drafts for a model that has no such layer itself."""
    config = config_of(tmp_path, Qwen3MoeConfig(**SIZES | EXPERTS | {"intermediate_size": 90}))
    module = replace(config, mixtures=(None, None))
    check_shard(config, Shard(0, 4), expert_parallel=True)
    check_shard(module, Shard(0, 2), expert_parallel=True)
    with pytest.raises(ModelError, match=r"repeated, 90 intermediate values and .* can: 1, 2\.$"):
        check_shard(module, Shard(0, 4), expert_parallel=True)


def test_models_without_experts_have_none_to_share(tmp_path) -> None:
    random_hf_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^enable_expert_parallel=True needs a native model with experts, and this is a Llama"
    ):
        load(tmp_path, expert_parallel=True)


def test_experts_that_transformers_runs_are_not_shared(tmp_path) -> None:
    source = resolve(str(save(MODELS["qwen3"](), tmp_path)), model_impl="transformers")
    message = r"^enable_expert_parallel=True needs a native model .* a Qwen3MoeForCausalLM, which would run through transformers"
    with pytest.raises(ConfigError, match=message):
        load_model(source, dtype=torch.float32, device=torch.device("cpu"), max_model_len=64, expert_parallel=True)

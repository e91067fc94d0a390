"""Shards of models whose layers carry states: gated delta rules are cut by heads of keys, short convolutions by channels,
Mamba-2 by groups of heads."""

import pytest
import torch
from checkpoints import (
    CONVOLUTIONS,
    DELTA,
    EXPERTS,
    FALCON_FACTORS,
    GRANITE_HYBRID,
    HF_CONFIGS,
    HYBRID,
    MAMBA,
    MIXTURES,
    ONE_PART,
    hf_config,
    random_hf_model,
)
from fp8_folders import write_fp8
from safetensors.torch import load_file
from shards import assert_is_shard
from stepping import Stepper
from test_adapters import matrices, save_adapter
from test_shards import TOKENS, assert_adds_up, assert_shards, load, save
from thread_group import run_ranks
from transformers import (
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    Lfm2Config,
    NemotronHConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from stepgraph.config.lora import LoRAConfig
from stepgraph.errors import ModelError
from stepgraph.layers.cache import Item
from stepgraph.models import random_weights, resolve
from stepgraph.models.adapters import AdapterStore
from stepgraph.models.sharing import possible_sizes
from stepgraph.models.tensor_stream import Arriving, announce, buckets
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

HEADS = DELTA | {"linear_num_key_heads": 4, "linear_num_value_heads": 12}
MIXTURE = EXPERTS | {"num_experts": 8, "shared_expert_intermediate_size": 48}
FOUR = {"mamba_n_groups": 4}
MODELS = {
    "qwen3 next": lambda: Qwen3NextConfig(**HEADS | MIXTURE),
    "qwen3.5": lambda: Qwen3_5TextConfig(**HEADS, tie_word_embeddings=True),
    "qwen3.5 with biases": lambda: Qwen3_5TextConfig(**HEADS | {"linear_num_value_heads": 4}, attention_bias=True),
    "qwen3.5 moe": lambda: Qwen3_5MoeTextConfig(**HEADS | MIXTURE),
    "olmo hybrid": lambda: hf_config(
        "OlmoHybridConfig", **HYBRID | {"linear_num_key_heads": 4, "linear_num_value_heads": 12}
    ),
    "lfm2": HF_CONFIGS["lfm2"],
    "lfm2 with biases": HF_CONFIGS["lfm2 with biases"],
    "lfm2 moe": HF_CONFIGS["lfm2 moe"],
    "bamba with biases": lambda: BambaConfig(
        **MAMBA | FOUR, attn_layer_indices=[1], attention_bias=True, mamba_proj_bias=True, mlp_bias=True
    ),
    "granite 4.0-h": lambda: GraniteMoeHybridConfig(**GRANITE_HYBRID | FOUR, num_local_experts=8),
    "granite 4.0 dense": lambda: GraniteMoeHybridConfig(**GRANITE_HYBRID | FOUR, num_local_experts=0),
    "nemotron h": lambda: NemotronHConfig(**ONE_PART | MIXTURES | {"n_groups": 4}, moe_latent_size=24),
    "falcon h1": lambda: FalconH1Config(**MAMBA | FALCON_FACTORS | FOUR, mamba_d_ssm=64, mamba_rms_norm=True),
}
"""Which four ranks can share, of whom two keep the same key/value head of layers with attention."""
GROUPED = {"linear_key_head_dim": 32, "linear_value_head_dim": 128, "hidden_size": 256, "intermediate_size": 512}
ROUND = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
WIDE = {
    "qwen3 next": lambda: Qwen3NextConfig(**HEADS | EXPERTS | GROUPED | {"head_dim": 128, "mlp_only_layers": [0, 1]}),
    "qwen3.5": lambda: Qwen3_5TextConfig(**HEADS | GROUPED | {"head_dim": 128}),
    "nemotron h": lambda: NemotronHConfig(
        **ONE_PART | {"layers_block_type": ["mlp", "mamba", "attention"], "n_groups": 4, "mamba_head_dim": 64} | ROUND
    ),
    "granite 4.0-h": lambda: GraniteMoeHybridConfig(
        **GRANITE_HYBRID | FOUR | {"shared_intermediate_size": 512} | ROUND, num_local_experts=0
    ),
    "lfm2": lambda: Lfm2Config(**CONVOLUTIONS | {"hidden_size": 512, "intermediate_size": 512}, block_multiple_of=512),
}
"""Of which every rank of four has whole groups of inputs; outputs are cut within them."""


@pytest.mark.parametrize("name", MODELS)
def test_shards_hold_their_parts_and_add_up(name, tmp_path) -> None:
    save(MODELS[name](), tmp_path)
    assert_shards(tmp_path)
    assert_adds_up(tmp_path)


@pytest.mark.parametrize("layout", ["a scale per output", "fp8 with a scale per block"])
@pytest.mark.parametrize("name", WIDE)
def test_shards_in_8_bits_keep_codes_and_scales(name, layout, tmp_path) -> None:
    write_fp8(save(WIDE[name](), tmp_path / "plain"), tmp_path / "fp8", layout)
    assert_shards(tmp_path / "fp8")
    assert_adds_up(tmp_path / "fp8", tolerance=1e-3)


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_of_ranks_are_parts_of_the_wholes(name, tmp_path, monkeypatch) -> None:
    save(MODELS[name](), tmp_path)
    monkeypatch.setattr(random_weights, "_PIECE", 1000)
    assert_shards(tmp_path, load_format="dummy")
    assert_shards(tmp_path, load_format="dummy", quantization="fp8")


@pytest.mark.parametrize(
    "name", ["qwen3 next", "qwen3.5", "olmo hybrid", "lfm2 with biases", "granite 4.0-h", "nemotron h"]
)
def test_new_weights_are_cut_too(name, tmp_path) -> None:
    hf_model = random_hf_model(MODELS[name]())
    hf_model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.mul_(0.5)
    hf_model.save_pretrained(tmp_path / "second")
    shard = load(tmp_path / "first", shard=Shard(1, 4))
    second = load(tmp_path / "second")
    tensors = load_file(tmp_path / "second" / "model.safetensors")
    write(plan_update(shard, tensors.items()))
    assert_is_shard(shard, second, 1, 4)
    for model, shape in ((load(tmp_path / "first", shard=Shard(3, 4)), (3, 4)), (load(tmp_path / "first"), (0, 1))):
        update = plan_update(model, tensors.items())
        arriving = Arriving(model, announce(update))
        for bucket in buckets(update, 3000):
            arriving.take(bucket)
        arriving.finish()
        assert_is_shard(model, second, *shape)


@pytest.mark.parametrize(
    "name", ["qwen3 next", "qwen3.5", "olmo hybrid", "lfm2 with biases", "nemotron h", "granite 4.0 dense"]
)
def test_adapters_add_up_over_shards(name, tmp_path) -> None:
    hf_model = random_hf_model(MODELS[name]())
    hf_model.save_pretrained(tmp_path / "model")
    of_states = {
        module: pair
        for module, pair in matrices(hf_model, rank=5).items()
        if module.endswith(
            (
                "in_proj",
                "out_proj",
                "_qkvz",
                "_ba",
                "_qkv",
                "_z",
                "_a",
                "_b",
                "q_proj",
                "g_proj",
                "o_proj",
                "input_linear",
            )
        )
    }
    adapter = save_adapter(tmp_path / "adapter", of_states)

    def adapted(**settings):
        model = load(tmp_path / "model", **settings)
        store = AdapterStore(model, LoRAConfig(enable_lora=True), max_tokens=128)
        store.write(1, store.read(adapter))
        store._index.fill_(1)
        return model

    expected = Stepper(adapted(), 64).step(TOKENS)
    for size in (2, 4):
        found = run_ranks(size, lambda group: Stepper(adapted(group=group), 64).step(TOKENS))
        torch.testing.assert_close(found[0], expected, atol=5e-4, rtol=1e-4)
    assert (expected - Stepper(load(tmp_path / "model"), 64).step(TOKENS)).norm() > 0.1 * expected.norm()


def test_a_rank_keeps_states_of_its_heads_and_channels(tmp_path) -> None:
    save(MODELS["qwen3.5"](), tmp_path / "delta")
    (spec, _) = load(tmp_path / "delta", shard=Shard(3, 4)).cache_specs(torch.float32)
    channels = 2 * 24 + 3 * 16
    assert spec.state == (Item((3, channels), torch.float32), Item((3, 24, 16), torch.float32))
    assert spec.inputs == (Item((channels,), torch.float32), Item((6,), torch.float32))
    save(MODELS["lfm2"](), tmp_path / "conv")
    (spec, *_) = load(tmp_path / "conv", shard=Shard(3, 4)).cache_specs(torch.float32)
    assert (spec.state, spec.inputs) == ((Item((2, 16), torch.float32),), (Item((16,), torch.float32),))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3 next", r"has 4 query heads.*, 2 key heads of gated delta rules, .*can: 1, 2\."),
        ("lfm2", r"has 4 query heads.*, convolutions of 62 channels, .*can: 1, 2\."),
    ],
)
def test_numbers_of_ranks_that_cannot_share_states_are_refused(name, said, tmp_path) -> None:
    config = HF_CONFIGS[name]()
    if name == "lfm2":
        config.hidden_size, config.head_dim = 62, 16
    save(config, tmp_path)
    with pytest.raises(ModelError, match=said):
        load(tmp_path, shard=Shard(0, 4))


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
def test_up_to_sixteen_ranks_can_share_published_sizes(name) -> None:
    assert possible_sizes(resolve(name).config, expert_parallel=False) == [1, 2, 4, 8, 16]

"""Experts where ranks share a model: each has some of them, whole, or a part of every one."""

import pytest
import torch
from checkpoints import SIZES, random_hf_model
from transformers import LlamaConfig, Qwen3MoeConfig

from stepgraph.errors import ConfigError, ModelError
from stepgraph.layers.experts import ExpertShard
from stepgraph.models import load_model, resolve
from stepgraph.models.config import shard_experts
from stepgraph.parallel.shard import Shard

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 36, "norm_topk_prob": True}


def load(path, **settings):
    settings = {"dtype": torch.float32, "max_model_len": 64, "device": torch.device("cpu")} | settings
    return load_model(resolve(str(path)), **settings)


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


def test_models_without_experts_have_none_to_share(tmp_path) -> None:
    random_hf_model(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^enable_expert_parallel=True needs a native model with experts, and this is a Llama"
    ):
        load(tmp_path, expert_parallel=True)

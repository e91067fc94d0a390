"""transformers' own classes shared by ranks: the same numbers as whole, the same bits on all ranks, and what is refused."""

import copy

import pytest
import torch
import transformers
from checkpoints import SIZES, random_hf_model
from shards import run_stepper
from stepping import Stepper
from test_transformers_model import (
    GPT2_SIZES,
    MOE,
    refused_config,
)
from thread_group import run_ranks

from stepgraph.errors import ModelError
from stepgraph.models import load_model, resolve
from stepgraph.models.transformers_model import TransformersModel, judge, judge_part
from stepgraph.models.transformers_parts import ShapesOnly, keep_part
from stepgraph.models.update import plan_update, write
from stepgraph.parallel.shard import Shard

TOKENS = [(7 * i + 3) % 190 for i in range(40)]
WIDE = SIZES | {"vocab_size": 203, "num_attention_heads": 8, "pad_token_id": 0}
SHARED = {
    "llama: untied head": lambda: transformers.LlamaConfig(**WIDE),
    "gemma3: tied head, two rotations, norms of heads": lambda: transformers.Gemma3TextConfig(
        **WIDE, head_dim=16, sliding_window=20, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2: norms over all heads, which every rank has": lambda: transformers.Olmo2Config(**WIDE),
    "glm4: gate and up in one": lambda: transformers.Glm4Config(**WIDE, head_dim=8),
    "gpt_neox: queries, keys and values in one, biases": lambda: transformers.GPTNeoXConfig(**WIDE),
    "phi: a head with a bias": lambda: transformers.PhiConfig(**WIDE),
    "cohere: one norm, two sums": lambda: transformers.CohereConfig(**WIDE, logit_scale=0.25),
}


def step(model):
    with torch.no_grad():
        return run_stepper(Stepper(model, 64), TOKENS)


@pytest.mark.parametrize("name", SHARED)
def test_ranks_compute_what_the_whole_does_all_the_same_bits(name) -> None:
    config = judge(refused_config(SHARED[name]()))
    hf_model = random_hf_model(copy.deepcopy(config.hf_config))
    hf_model.set_attn_implementation("stepgraph")
    whole = TransformersModel(config, copy.deepcopy(hf_model))
    expected = step(whole)
    for size in (2, 4):
        parts = [judge_part(config, ShapesOnly(Shard(rank, size))) for rank in range(size)]

        def run(group, parts=parts):
            part, mine = parts[group.shard.rank], copy.deepcopy(hf_model)
            part = type(part)(group, part.attention_specs, part.num_parameters)
            keep_part(mine, config, group)
            model = TransformersModel(config, mine, part)
            assert sum(parameter.numel() for parameter in model.parameters()) <= part.num_parameters
            group.calls.clear()
            return step(model), sum(p.untyped_storage().nbytes() for p in model.parameters()), group.calls

        found = run_ranks(size, run)
        torch.testing.assert_close(found[0][0], expected, atol=1e-4, rtol=1e-4)
        whole_bytes = sum(parameter.nbytes for parameter in whole.parameters())
        for logits, nbytes, calls in found:
            assert torch.equal(logits, found[0][0])
            assert calls == found[0][2]
            assert nbytes < 0.8 * whole_bytes


REFUSED = {
    "no plan": (lambda: transformers.GPT2Config(**GPT2_SIZES), 2, "GPT2LMHeadModel .*transformers has no plan"),
    "no layer in the plan": (
        lambda: transformers.HunYuanDenseV1Config(**WIDE, head_dim=8),
        2,
        "cuts none of its layers",
    ),
    "experts": (
        lambda: transformers.Qwen3MoeConfig(**WIDE, **MOE, head_dim=16),
        2,
        r"cuts .*experts.* by packed_colwise",
    ),
    "three of eight heads": (
        lambda: transformers.Olmo2Config(**WIDE),
        3,
        "3 devices cannot share this Olmo2ForCausalLM evenly: it has 8 query heads, 2 key/value heads.* can: 1, 2, 4, 8\\.",
    ),
    "layers that do not divide": (
        lambda: transformers.LlamaConfig(**WIDE | {"intermediate_size": 100}),
        8,
        r"8 devices .* layers of 64, 100 values\. Numbers that can: 1, 2, 4\.",
    ),
    "norms with a weight for each head": (
        lambda: transformers.CohereConfig(**WIDE, use_qk_norm=True),
        2,
        "Several devices cannot share CohereForCausalLM .*cut by transformers' plan",
    ),
    "gathered layers wider than the vocabulary": (
        lambda: transformers.Glm4Config(**WIDE | {"vocab_size": 150}, head_dim=8),
        2,
        r"as wide as the vocabulary \(150\), and .*gate_up_proj has 192 outputs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_shared_is_refused_with_the_reason_before_weights_are_read(name) -> None:
    config, size, message = REFUSED[name]
    config = judge(refused_config(config()))
    with pytest.raises(ModelError, match=message) as info:
        judge_part(config, ShapesOnly(Shard(0, size)))
    assert "stepgraph" not in str(info.value)


class Alone(ShapesOnly):
    """One rank, by itself in loop-back."""

    def add_sum(self, part_TE, residual_TE, *, multiplier=1.0, post_norm=None, norm=None):
        return residual_TE.add_(part_TE, alpha=self.shard.size)

    def gather(self, part_RW, out_RV):
        return out_RV.copy_(part_RW.repeat(1, self.shard.size)[:, : out_RV.shape[1]])


def assert_is_part(model, whole, rank, size) -> None:
    expected = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        values = expected[name]
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            values = values.chunk(size, 1)[rank]
        elif name.endswith(("q_proj.weight", "gate_proj.weight", "up_proj.weight")):
            values = values.chunk(size)[rank]
        elif name.endswith(("k_proj.weight", "v_proj.weight")):
            values = values.chunk(2)[rank * 2 // size]
        elif name == "head.lm_head.weight":
            values = values[rank * 51 : rank * 51 + 51]
        assert torch.equal(parameter, values), name
    assert len(list(model.parameters())) == len(expected)


def test_what_is_read_drawn_and_written_anew_is_the_ranks_part(tmp_path) -> None:
    hf_model = random_hf_model(SHARED["llama: untied head"]())
    hf_model.save_pretrained(tmp_path / "old")
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.normal_()
    hf_model.save_pretrained(tmp_path / "new")
    old, new = (resolve(str(tmp_path / name), model_impl="transformers") for name in ("old", "new"))
    settings = {"dtype": torch.float32, "device": torch.device("cpu"), "max_model_len": 64}
    for rank in range(4):
        group = Alone(Shard(rank, 4))
        drawn = load_model(old, load_format="dummy", group=group, **settings)
        assert_is_part(drawn, load_model(old, load_format="dummy", **settings), rank, 4)
        model = load_model(old, group=group, **settings)
        assert model.group is group
        assert_is_part(model, load_model(old, **settings), rank, 4)
        write(plan_update(model, new))
        assert_is_part(model, load_model(new, **settings), rank, 4)
